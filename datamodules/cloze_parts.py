"""Parts of cloze questions that have to fit each other: training, validation, test, and what to answer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from datamodules.cloze_rows import ClozeRows


def distinct(values: Iterable[str]) -> list[str]:
    """Each text once, in the order in which it is met first."""
    return list(dict.fromkeys(values))


def split_by_article(rows: ClozeRows, fraction: float) -> tuple[ClozeRows, ClozeRows]:
    """Questions to train and to validate on: a share of the articles is held out, the same in every run.

    A question without an article counts as one of its own.

    Args:
        rows: Questions.
        fraction: Share of the articles to hold out.

    Raises:
        ValueError: If either part would be empty.
    """
    keys = [article or f"question {place}" for place, article in enumerate(rows.articles)]
    names = distinct(keys)
    order = np.random.default_rng(0).permutation(len(names))
    held = {names[place] for place in order[: round(fraction * len(names))]}
    if not 0 < len(held) < len(names):
        raise ValueError(
            f"{rows.name}: {len(names)} articles leave none to train or to validate on with "
            f"validation_fraction={fraction}: give val_path"
        )
    validate = np.array([key in held for key in keys])
    return rows.select(~validate), replace(rows.select(validate), name=f"validation share of {rows.name}")


def check_same_options(parts: Iterable[ClozeRows], expected: int) -> None:
    """Check that questions of all parts have the same number of options.

    Raises:
        ValueError: If one has not.
    """
    for rows in parts:
        if rows.num_options != expected:
            raise ValueError(f"{rows.name}: {rows.num_options} options per question, expected {expected}")


def training_texts(rows: ClozeRows) -> Iterator[str]:
    """What a tokenizer is trained on: passages, and questions with all of their options in the slot."""
    from datamodules.cloze_text import PLACEHOLDER

    yield from distinct(rows.articles)
    for question, options in zip(rows.questions, rows.options, strict=True):
        yield question.replace(PLACEHOLDER, " ".join(options))
