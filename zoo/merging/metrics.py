"""Accuracy and entropy of each task."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torchmetrics import Metric

if TYPE_CHECKING:
    from collections.abc import Sequence


class StrictAccuracy(Metric):
    """Share of inputs whose class has a higher logit than every other: ties and NaN count as wrong."""

    full_state_update = False
    higher_is_better = True
    correct: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("correct", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count.

        Args:
            logits: `(batch, classes)`.
            labels: int64 `(batch,)`.
        """
        own = logits.gather(1, labels[:, None])
        right = ((logits >= own).sum(1) == 1) & logits.isfinite().all(1)
        self.correct = self.correct + right.sum()
        # Not in place: states that an evaluation in inference mode made may not be written to by a fit.
        self.total = self.total + len(labels)

    def compute(self) -> Tensor:
        """In [0, 1]; NaN without an input."""
        return self.correct.double() / self.total


class MeanEntropy(Metric):
    """Mean entropy of the predictions, in nats."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor) -> None:
        """Add the entropies of `logits` `(batch, classes)`."""
        log_p = logits.float().log_softmax(1)
        self.total = self.total - (log_p.exp() * log_p).sum().double()
        self.count = self.count + len(logits)

    def compute(self) -> Tensor:
        """The mean; NaN without an input."""
        return self.total / self.count


class TaskScores(nn.Module):
    """Accuracy and entropy of several tasks.

    Args:
        task_names: The tasks, in any spelling.
    """

    def __init__(self, task_names: Sequence[str]) -> None:
        super().__init__()
        self.task_names = list(task_names)
        # By place: names of tasks may hold dots, which names of modules may not.
        self.accuracies = nn.ModuleList(StrictAccuracy() for _ in self.task_names)
        self.entropies = nn.ModuleList(MeanEntropy() for _ in self.task_names)

    def update(self, task: str, logits: Tensor, labels: Tensor | None) -> None:
        """Count a batch; without labels its entropy only.

        Args:
            task: Its task.
            logits: `(batch, classes)`.
            labels: int64 `(batch,)`, or None.
        """
        place = self.task_names.index(task)
        self.entropies[place].update(logits)  # type: ignore[operator]
        if labels is not None:
            self.accuracies[place].update(logits, labels)  # type: ignore[operator]

    def compute(self) -> dict[str, dict[str, float]]:
        """`{"acc": {task: accuracy}, "entropy": {task: nats}}` of the tasks that were seen. All processes call it."""
        found: dict[str, dict[str, float]] = {"acc": {}, "entropy": {}}
        for key, metrics in (("acc", self.accuracies), ("entropy", self.entropies)):
            for task, metric in zip(self.task_names, metrics, strict=True):
                assert isinstance(metric, StrictAccuracy | MeanEntropy)
                if not metric.update_called and not _distributed():
                    continue
                # A process without a batch of the task takes part in the sum of the others.
                metric._update_count = max(1, metric._update_count)
                value = float(metric.compute())
                if value == value:
                    found[key][task] = value
        return found

    def reset(self) -> None:
        """Forget all."""
        for metric in (*self.accuracies, *self.entropies):
            assert isinstance(metric, Metric)
            metric.reset()


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
