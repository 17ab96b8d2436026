"""Validation, test and prediction of one task after the other: what all modules of the room share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule
from torch import nn

from zoo.common.artifacts import log_table
from zoo.common.predictions import PredictionFile
from zoo.merging.features import has_labels
from zoo.merging.finetune import labels_of
from zoo.merging.metrics import TaskScores

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


class TaskEvaluation(LightningModule):
    """Evaluates task by task: a loader each, and `task_logits` of the child.

    Logs `<stage>/acc/<task>`, `<stage>/acc/mean` (plain mean over the tasks) and `<stage>/entropy/<task>` in nats.

    Args:
        task_names: The tasks.

    Raises:
        ValueError: If there is none, or a name is double.
    """

    monitor: str | None = None
    monitor_mode = "max"

    def __init__(self, task_names: Sequence[str]) -> None:
        super().__init__()
        self.task_names = list(task_names)
        if not self.task_names or len(set(self.task_names)) < len(self.task_names):
            raise ValueError(f"tasks must be at least one, each with a name of its own, got {self.task_names}")
        self.scores = nn.ModuleDict({stage: TaskScores(self.task_names) for stage in ("val", "test")})
        self._predictions = PredictionFile(self)
        self.history: dict[str, dict[str, list[tuple[int, float]]]] = {"acc": {}, "entropy": {}}

    def task_logits(self, batch: Any, task: str) -> Tensor:
        """Logits `(batch, classes)` of a batch of a task."""
        raise NotImplementedError

    def groups(self) -> Mapping[str, Sequence[str]]:
        """Tasks whose mean accuracy is reported under a name of its own."""
        return {}

    def task_of(self, batch: Any, dataloader_idx: int) -> str:
        """The task of a batch: its field `task`, or else that of its loader's place.

        Raises:
            ValueError: If neither says which task it is.
        """
        task = getattr(batch, "task", None)
        if task is None and isinstance(batch, dict):
            task = batch.get("task")
        if task is None and dataloader_idx < len(self.task_names):
            task = self.task_names[dataloader_idx]
        if task not in self.task_names:
            raise ValueError(
                f"a batch of task {task!r} came from loader {dataloader_idx}, the tasks are "
                f"{', '.join(self.task_names)}: give one loader per task in this order, or batches with a field 'task'"
            )
        return str(task)

    def _evaluate(self, batch: Any, dataloader_idx: int, stage: str) -> Tensor:
        task = self.task_of(batch, dataloader_idx)
        logits = self.task_logits(batch, task)
        self._stage(stage).update(task, logits, labels_of(batch) if has_labels(batch) else None)
        return logits

    def _stage(self, stage: str) -> TaskScores:
        scores = self.scores[stage]
        assert isinstance(scores, TaskScores)
        return scores

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count a batch."""
        self._evaluate(batch, dataloader_idx, "val")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count a batch."""
        self._evaluate(batch, dataloader_idx, "test")

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of all tasks."""
        found = self._log_scores("val")
        if not self.trainer.sanity_checking:
            for key, by_task in found.items():
                for task, value in by_task.items():
                    self.history[key].setdefault(task, []).append((self.trainer.global_step, value))

    def on_test_epoch_end(self) -> None:
        """Log the metrics of all tasks, and their table."""
        found = self._log_scores("test")
        rows = [[task, value, found["entropy"].get(task)] for task, value in found["acc"].items()]
        log_table(self, "test/tasks", ["task", "accuracy", "entropy"], rows)

    def _log_scores(self, stage: str) -> dict[str, dict[str, float]]:
        scores = self._stage(stage)
        found = scores.compute()
        scores.reset()
        for key, by_task in found.items():
            self.log_dict({f"{stage}/{key}/{task}": value for task, value in by_task.items()})
        accuracies = found["acc"]
        if accuracies:
            self.log(f"{stage}/acc/mean", sum(accuracies.values()) / len(accuracies), prog_bar=True)
            for name, tasks in self.groups().items():
                own = [accuracies[task] for task in tasks if task in accuracies]
                if own:
                    self.log(f"{stage}/acc/{name}", sum(own) / len(own))
        if found["entropy"]:
            self.log(f"{stage}/entropy/mean", sum(found["entropy"].values()) / len(found["entropy"]))
        return found

    def on_predict_start(self) -> None:
        """Open `predictions.jsonl` in the run's folder (one file per process)."""
        self._predictions.open()

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Probabilities `(batch, classes)`; also written as lines `{"task", "row", "label", "probability"}`."""
        task = self.task_of(batch, dataloader_idx)
        probabilities = self.task_logits(batch, task).float().softmax(1)
        best = probabilities.max(1)
        rows = getattr(batch, "rows", None)
        names = [None] * len(probabilities) if rows is None else rows.tolist()
        self._predictions.write(
            {"task": task, "row": row, "label": label, "probability": round(probability, 6)}
            for row, label, probability in zip(names, best.indices.tolist(), best.values.tolist(), strict=True)
        )
        return probabilities

    def on_predict_end(self) -> None:
        """Close the file."""
        self._predictions.close()
