"""The EACM on generated dialogues, where neither what a post says nor how it feels tells the reply's emotion alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.methods import COMMON, CONFIGS

if TYPE_CHECKING:
    from collections.abc import Callable

    from zoo.common.cli import ZooCLI


def test_the_chosen_emotion_is_right_and_is_said(run: Callable[..., ZooCLI]) -> None:
    demo = ("--config", str(CONFIGS / "eacm" / "demo.yaml"), *COMMON)
    metrics = run(*demo).result["metrics"]
    assert metrics["test/selector/acc"] >= 0.9
    assert metrics["test/emotion_w"] >= 0.8
    # A system that repeats the emotion of the post.
    assert metrics["test/copy/acc"] <= 0.35
    assert metrics["test/forced/different"] >= 0.8
