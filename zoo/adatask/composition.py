"""Aggregators before and after the preconditioning of an AdaTask optimizer."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoo.adatask.task_gradients import flatten, unflatten

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zoo.adatask.optimizer import AdaTask


def aggregate_gradients(optimizer: AdaTask, shared: Sequence[int]) -> None:
    """Replace the gradients of shared parameters by what the aggregator makes of them ("pre").

    Args:
        optimizer: The optimizer.
        shared: Indices of the parameters.

    Raises:
        ValueError: If the aggregator returns another shape than it may.
    """
    matrix = optimizer.gradients.matrix(shared)
    optimizer.gradients.replace(shared, _combined(optimizer, matrix))


def aggregate_updates(optimizer: AdaTask, updates: dict[Tensor, Tensor], shared: Sequence[int]) -> None:
    """Replace the tasks' updates of shared parameters by what the aggregator makes of them ("post").

    Args:
        optimizer: The optimizer.
        updates: By parameter, `(slots, *shape)`; changed in place.
        shared: Indices of the parameters.

    Raises:
        ValueError: If the aggregator returns another shape than it may.
    """
    parameters = optimizer.gradients.parameters
    ids_of: dict[Tensor, list[int]] = {}
    for group in optimizer.param_groups:
        ids_of |= dict(zip(group["params"], group["task_ids"], strict=True))
    moved = [i for i in shared if parameters[i] in updates]
    if not moved:
        return
    rows: list[list[Tensor | None]] = [[None] * len(parameters) for _ in optimizer.tasks]
    for i in moved:
        for slot, k in enumerate(ids_of[parameters[i]]):
            rows[k][i] = updates[parameters[i]][slot]
    matrix = torch.stack([flatten(row, parameters, moved) for row in rows])
    matrix = _combined(optimizer, matrix)
    for k, row in enumerate(rows):
        for i, part in zip(moved, unflatten(matrix[k], parameters, moved), strict=True):
            own = row[i]
            if own is not None:
                own.copy_(part)


def _combined(optimizer: AdaTask, matrix: Tensor) -> Tensor:
    """The aggregator's matrix, or the given one with the aggregator's weights."""
    assert optimizer.aggregator is not None
    found = optimizer.aggregator(matrix)
    if found.shape == matrix.shape:
        return found
    if found.shape != matrix.shape[:1]:
        raise ValueError(
            f"the aggregator returned {tuple(found.shape)} for {tuple(matrix.shape)}, expected that shape or "
            f"({len(matrix)},)"
        )
    if optimizer.compose == "post":
        # Updates are of the length of the learning rate, and no moment cancels the scale of the weights: they share
        # out the length of AdaTask's own step.
        scale = sum(optimizer.gradients.present) / found.sum()
        found = torch.where(found.sum() > 0, found * scale, found)
    elif not optimizer.weights_warned:
        optimizer.weights_warned = True
        warnings.warn(
            "the aggregator returns weights of the tasks, which compose='pre' puts before a normalisation that cancels "
            "what is constant in them: use compose='post'",
            stacklevel=6,
        )
    return found[:, None].to(matrix.dtype) * matrix
