"""bf16-mixed computes what fp32 does, within the precision of bf16."""

from __future__ import annotations

import math

import pytest
import torch

from tests.methods import METHODS, UNTRAINED, VARIANTS, Method


@pytest.mark.parametrize("method", [*METHODS, *VARIANTS], ids=lambda method: method.name)
def test_bf16_mixed_is_close_to_fp32(first_step, full_first_step, method: Method):
    full, (half,) = full_first_step(method), first_step("half", method, "--trainer.precision", "bf16-mixed")
    assert full.keys() == half.keys()
    flat = [torch.cat([gradients[name].flatten().double() for name in full]) for gradients in (full, half)]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.99
    assert flat[1].norm() / flat[0].norm() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("method", [*METHODS, *UNTRAINED], ids=lambda method: method.name)
def test_bf16_mixed_trains_and_its_weights_score_the_same_in_both_precisions(run, method: Method):
    cli = run(*method.command, "--trainer.precision", "bf16-mixed")
    assert all(parameter.dtype == torch.float32 for parameter in cli.model.parameters())
    half = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    assert half and all(math.isfinite(value) for value in half.values())
    best = next(path for name in ("best.ckpt", "last.ckpt") if (path := cli.run_folder / name).exists())
    again = run("test", *method.command, "--ckpt_path", str(best))
    for name, value in half.items():
        assert float(again.trainer.callback_metrics[name]) == pytest.approx(value, rel=0.05, abs=0.02), name
