"""The embedded sample of several tasks: regressions that differ in nothing but their scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

NUM_INPUTS = 64
NUM_OUTPUTS = 16
# Variances: with these as standard deviations tanh is a step, and nothing is to be learnt from 3,072 rows.
_COMMON, _OWN = 10.0**0.5, 3.5**0.5
_WEIGHTS_SEED, _TASK_SEED, _INPUT_SEED, _PART_SEED = 20_221, 1_000, 31, 7


def task_names(scales: Sequence[float]) -> list[str]:
    """Names of the sample's tasks, one for each scale."""
    return [f"task_{k}" for k in range(1, len(scales) + 1)]


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def task_weights(scales: Sequence[float]) -> list[Tensor]:
    """The matrices B + E_k, float64 `(NUM_OUTPUTS, NUM_INPUTS)` each: the ground truth of the sample."""
    common = _COMMON * _normal(_WEIGHTS_SEED, NUM_OUTPUTS, NUM_INPUTS)
    return [
        common + _OWN * _normal(_WEIGHTS_SEED + _TASK_SEED + k, NUM_OUTPUTS, NUM_INPUTS) for k in range(len(scales))
    ]


def task_sample(scales: Sequence[float], sizes: Sequence[int]) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """Draw y_k = scale_k * tanh((B + E_k) x) with x ~ N(0, I) / sqrt(64).

    The entries of B are drawn from N(0, 10) and those of E_k from N(0, 3.5), variances of the toy problem of
    GradNorm (Chen et al., 2018).

    Everything has a fixed seed: fewer rows are the first of more rows, and one task more leaves the others as they are.

    Args:
        scales: One for each task.
        sizes: Rows of each part.

    Returns:
        By part, the inputs, float32 `(rows, NUM_INPUTS)`; by task and part, the targets, float32
        `(rows, NUM_OUTPUTS)`.
    """
    inputs = [
        _normal(_INPUT_SEED + _PART_SEED * part, size, NUM_INPUTS) / NUM_INPUTS**0.5 for part, size in enumerate(sizes)
    ]
    targets = {
        name: [(scale * torch.tanh(x @ weights.T)).float() for x in inputs]
        for name, scale, weights in zip(task_names(scales), scales, task_weights(scales), strict=True)
    }
    return [x.float() for x in inputs], targets


def tenths(inputs: Tensor) -> Tensor:
    """Which tenth of its distribution an input of the sample lies in: codes 1 to 10, int32, of the inputs' shape."""
    share: Tensor = torch.special.ndtr(inputs.double() * NUM_INPUTS**0.5)
    return (share * 10).floor().clamp(0, 9).int() + 1
