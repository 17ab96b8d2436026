"""Accuracy, backward and forward transfer, and forgetting over a stream of tasks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence


class ContinualMetrics:
    """The matrix R of a continual learner and the numbers that are read from it.

    R[k, j] is the accuracy on task j after training on task k, both from 0; the tasks behind k are known where they
    were tested ahead of training. All numbers may be asked for after any task: `after=k` takes k as the last one. A
    number that needs an unknown accuracy, or more than one task, is NaN.

    Args:
        num_tasks: Number of tasks, T.

    Raises:
        ValueError: If there is no task.
    """

    def __init__(self, num_tasks: int) -> None:
        if num_tasks < 1:
            raise ValueError(f"num_tasks must be at least 1, got {num_tasks}")
        self.num_tasks = num_tasks
        self._matrix = torch.full((num_tasks, num_tasks), math.nan, dtype=torch.float64)

    @property
    def matrix(self) -> Tensor:
        """R, float64 `(T, T)`, NaN where unknown; a copy."""
        return self._matrix.clone()

    def add_row(self, k: int, accuracies: Sequence[float] | Tensor) -> None:
        """Set the accuracies on all tasks after training on task k.

        Args:
            k: The task trained last, from 0.
            accuracies: T fractions; NaN where a task was not tested.

        Raises:
            ValueError: If the task does not exist, or there are not T accuracies.
        """
        self._position(k)
        row = torch.as_tensor(accuracies, dtype=torch.float64).detach().cpu()
        if row.shape != (self.num_tasks,):
            raise ValueError(f"expected {self.num_tasks} accuracies, one a task, got the shape {tuple(row.shape)}")
        self._matrix[k] = row

    def acc(self, after: int | None = None) -> float:
        """Mean accuracy over the tasks so far, after the last of them."""
        return float(self._so_far(after)[-1].mean())

    def bwt(self, after: int | None = None) -> float:
        """Backward transfer: the mean change of a task's accuracy since it was trained; negative is forgetting."""
        so_far = self._so_far(after)
        return float((so_far[-1, :-1] - so_far.diagonal()[:-1]).mean())

    def forgetting(self, after: int | None = None) -> float:
        """Mean loss of a task against its best accuracy from its own training on, at least 0."""
        so_far = self._so_far(after)
        before_training = torch.ones_like(so_far).triu(1).bool()
        best = so_far.masked_fill(before_training, -math.inf).amax(0)
        return float((best - so_far[-1])[:-1].mean())

    def fwt(self, baseline: Sequence[float] | Tensor | None = None, after: int | None = None) -> float:
        """Forward transfer: mean accuracy on a task right before it is trained, less that of an untrained model.

        Args:
            baseline: T accuracies of the untrained model; 0 without.
            after: The last task that counts.

        Raises:
            ValueError: If there are not T accuracies.
        """
        so_far = self._so_far(after)
        start = torch.zeros(self.num_tasks) if baseline is None else torch.as_tensor(baseline)
        if start.shape != (self.num_tasks,):
            raise ValueError(f"expected {self.num_tasks} accuracies, one a task, got the shape {tuple(start.shape)}")
        return float((so_far.diagonal(1) - start.to(so_far)[1 : len(so_far)]).mean())

    def table(self, task_names: Sequence[str] | None = None) -> tuple[list[str], list[list[str | float]]]:
        """Columns and rows: a row for each task trained so far, with the accuracies on all and the mean so far.

        Args:
            task_names: T names; "task 0" and so on without.
        """
        names = list(task_names) if task_names is not None else [f"task {task}" for task in range(self.num_tasks)]
        rows: list[list[str | float]] = []
        for k, name in enumerate(names):
            if not bool(self._matrix[k].isnan().all()):
                rows.append([name, *self._matrix[k].tolist(), self.acc(k)])
        return ["after", *names, "mean so far"], rows

    def state_dict(self) -> dict[str, Any]:
        """The matrix."""
        return {"matrix": self._matrix.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the matrix of `state_dict`.

        Raises:
            ValueError: If it is of another number of tasks.
        """
        matrix: Tensor = state["matrix"]
        if matrix.shape != self._matrix.shape:
            raise ValueError(f"the state holds {len(matrix)} tasks, this stream has {self.num_tasks}")
        self._matrix = matrix.detach().cpu().to(torch.float64).clone()

    def _position(self, k: int) -> int:
        if not 0 <= k < self.num_tasks:
            raise ValueError(f"the tasks are 0 to {self.num_tasks - 1}, got {k}")
        return k

    def _so_far(self, after: int | None) -> Tensor:
        tasks = self.num_tasks if after is None else self._position(after) + 1
        return self._matrix[:tasks, :tasks]
