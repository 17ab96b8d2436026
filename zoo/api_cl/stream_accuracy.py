"""Accuracies of a stream's tasks, within their own classes and among all, and agreement with the tasks' APIs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchmetrics import Metric

if TYPE_CHECKING:
    from zoo.api_cl.student_objective import ClassSets


class StreamAccuracy(Metric):
    """Right answers by task, counted on all processes.

    An answer is right if its logit is above all others: ties and NaN are wrong.

    Args:
        sets: Classes of the tasks.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, sets: ClassSets) -> None:
        super().__init__()
        self.sets = sets
        # Images, right in the own task, right among the seen classes, and with an API: images, agreeing, API right.
        self.add_state("counts", torch.zeros(len(sets), 6, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor, task: int, seen_task: int, probs: Tensor | None = None) -> None:
        """Count a batch.

        Args:
            logits: `(B, K)`.
            labels: int64 `(B,)`, global.
            task: The task of all images.
            seen_task: The last task that was learnt: class-incremental answers are among its classes and earlier ones,
                and the image's own task.
            probs: Responses of the task's API `(B, C)` in the order of the task's classes, where it may be asked.
        """
        own = self.sets.of_task(task, logits.device)
        seen = self.sets.seen(max(task, seen_task), logits.device)
        columns = self.sets.columns(task, logits.device)
        answers = None if probs is None else columns[probs.argmax(-1)]
        row = torch.stack(
            [
                labels.new_tensor(len(labels)),
                _right(logits, labels, own),
                _right(logits, labels, seen),
                *(
                    (labels.new_tensor(0),) * 3
                    if answers is None
                    else (labels.new_tensor(len(labels)), _right(logits, answers, own), (answers == labels).sum())
                ),
            ]
        )
        self.counts[task] += row

    def compute(self) -> dict[str, list[float]]:
        """By name ("til", "cil", "fidelity", "api"), one share a task; NaN where nothing was counted."""
        counts = self.counts.double().cpu()
        images, asked = counts[:, 0], counts[:, 3]
        return {
            "til": (counts[:, 1] / images).tolist(),
            "cil": (counts[:, 2] / images).tolist(),
            "fidelity": (counts[:, 4] / asked).tolist(),
            "api": (counts[:, 5] / asked).tolist(),
        }


def _right(logits: Tensor, labels: Tensor, allowed: Tensor) -> Tensor:
    """How many labels beat all other allowed classes."""
    scores = logits.float().masked_fill(~allowed, -torch.inf)
    places = labels.unsqueeze(1)
    best = scores.scatter(1, places, -torch.inf).amax(1)
    return (scores.gather(1, places).squeeze(1) > best).sum()
