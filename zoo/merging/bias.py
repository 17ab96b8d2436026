"""Representation bias: how far a merged encoder's features lie from the expert's (Yang et al., 2024)."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchmetrics import Metric

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NOTHING_TO_REPAIR = 1e-6


class RepresentationBias(Metric):
    """Mean of |z - z_ind| over images and dimensions, whatever the sizes of the batches.

    A NaN counts as infinitely far. Sums are kept in float64.
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, z: Tensor, z_ind: Tensor) -> None:
        """Add a batch.

        Args:
            z: Features `(batch, ...)` of the merged encoder, repaired or not.
            z_ind: The expert's features of the same images, of the same shape.

        Raises:
            ValueError: If the shapes differ.
        """
        self.total = self.total + _distance(z, z_ind)
        self.count = self.count + z.numel()

    def compute(self) -> Tensor:
        """The mean, float64; NaN without an image."""
        return self.total / self.count


class TaskRepresentationBias(Metric):
    """`RepresentationBias` of several tasks, and the mean of the tasks.

    Args:
        task_names: Distinct names other than "mean".

    Raises:
        ValueError: If the names are not distinct, or one of them is "mean".
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False
    totals: Tensor
    counts: Tensor

    def __init__(self, task_names: Sequence[str]) -> None:
        super().__init__()
        self.task_names = list(task_names)
        if not self.task_names or len({*self.task_names, "mean"}) <= len(self.task_names):
            raise ValueError(f"task_names must be distinct, and none may be 'mean', got {self.task_names}")
        self.add_state("totals", torch.zeros(len(self.task_names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(len(self.task_names), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, z: Tensor, z_ind: Tensor, task: str) -> None:
        """Add a batch of one task; features as in `RepresentationBias`.

        Raises:
            ValueError: If the shapes differ or the task is unknown.
        """
        if task not in self.task_names:
            raise ValueError(f"unknown task {task!r}; the tasks are {self.task_names}")
        index = self.task_names.index(task)
        place = torch.arange(len(self.task_names), device=self.totals.device) == index
        self.totals = self.totals + place * _distance(z, z_ind)
        self.counts = self.counts + place * z.numel()

    def compute(self) -> dict[str, Tensor]:
        """Values in float64 by task, NaN for a task without an image, and "mean" of the tasks that have images."""
        biases = self.totals / self.counts
        return {**dict(zip(self.task_names, biases, strict=True)), "mean": biases.nanmean()}


def warn_nothing_to_repair(biases: Mapping[str, Tensor | float]) -> list[str]:
    """Warn of tasks whose merged features are the expert's own already, so that surgery has nothing to learn.

    Args:
        biases: Task -> representation bias before surgery.

    Returns:
        The tasks whose bias is below 1e-6.
    """
    tasks = [task for task, bias in biases.items() if float(bias) < NOTHING_TO_REPAIR]
    if tasks:
        warnings.warn(
            f"the merged model's features of {tasks} are the expert's own (bias below {NOTHING_TO_REPAIR:g}): there is "
            "nothing to repair; check that merged and expert are not one checkpoint",
            stacklevel=2,
        )
    return tasks


def _distance(z: Tensor, z_ind: Tensor) -> Tensor:
    if z.shape != z_ind.shape:
        raise ValueError(f"features have shape {tuple(z.shape)}, the expert's {tuple(z_ind.shape)}; they must agree")
    distances = (z.double() - z_ind.double()).abs()
    return torch.where(distances.isnan(), torch.inf, distances).sum()
