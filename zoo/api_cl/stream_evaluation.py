"""Validation, test and prediction of a stream of tasks: both accuracy matrices, agreement with the APIs, pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from zoo.api_cl.continual_metrics import ContinualMetrics
from zoo.api_cl.stream_accuracy import StreamAccuracy
from zoo.common.artifacts import log_figure, log_table
from zoo.common.evaluation import evaluation
from zoo.common.predictions import PredictionFile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zoo.api_cl.student_objective import ClassSets

KINDS = ("til", "cil")


class StreamEvaluation(LightningModule):
    """Evaluates a learner on one loader a task, in both scenarios.

    Logs `<stage>/til/acc` and `<stage>/cil/acc`, means over the tasks (in validation those learnt so far), the same by
    task, and after the whole stream backward transfer `bwt` and `forgetting`.

    Args:
        sets: Classes of the tasks.
        task_names: Their names; numbers by default.

    Raises:
        ValueError: If there are more or fewer names than tasks, or a name is double.
    """

    monitor: str | None = None
    monitor_mode = "max"
    learner: nn.Module

    def __init__(self, sets: ClassSets, task_names: Sequence[str] | None = None) -> None:
        super().__init__()
        self.sets = sets
        self.task_names = [str(task) for task in range(len(sets))] if task_names is None else list(task_names)
        if len(self.task_names) != len(sets) or len(set(self.task_names)) < len(sets):
            raise ValueError(f"task_names must be {len(sets)} different names, got {self.task_names}")
        self.accuracy = nn.ModuleDict({stage: StreamAccuracy(sets) for stage in ("val", "test")})
        self.matrices = {kind: ContinualMetrics(len(sets)) for kind in KINDS}
        self.fidelity: dict[str, float] = {}
        self.history: dict[str, list[Tensor]] = {}
        self.samples: dict[str, Tensor] = {}
        self._predictions = PredictionFile(self)

    @property
    def last_task(self) -> int:
        """The last task that is, or was, learnt."""
        return len(self.sets) - 1

    def forward(self, images: Tensor, classes: Sequence[int] | None = None) -> Tensor:
        """Logits `(B, K)` of images `(B, c, h, w)` in [-1, 1]; of some classes only, `(B, len(classes))`."""
        logits: Tensor = self.learner(images)
        return logits if classes is None else logits[:, list(classes)]

    def look(self, images: Tensor, task: int) -> Tensor | None:
        """Responses of a task's API outside all budgets, where it may be asked so."""
        return None

    def _evaluate(self, stage: str, batch: Any, task: int) -> None:
        images, labels = batch.images, batch.labels
        metric = self.accuracy[stage]
        assert isinstance(metric, StreamAccuracy)
        seen = self.last_task
        metric.update(self.learner(images), labels, task, seen, self.look(images, task))

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count right answers; the loader's place is the task."""
        self._evaluate("val", batch, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count right answers; the loader's place is the task."""
        self._evaluate("test", batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Add the row of the task that was just learnt."""
        metric = self.accuracy["val"]
        assert isinstance(metric, StreamAccuracy)
        found = metric.compute()
        metric.reset()
        if self.trainer.sanity_checking:
            return
        if self.trainer.state.fn == "fit":
            for kind in KINDS:
                self.matrices[kind].add_row(self.last_task, found[kind])
        self._keep_fidelity(found)
        for kind in KINDS:
            learnt = found[kind][: self.last_task + 1]
            self.log(f"val/{kind}/acc", sum(learnt) / len(learnt), prog_bar=kind == "til", rank_zero_only=False)

    @torch.no_grad()
    def fill_row(self, task: int) -> None:
        """Measure the row of a task that has ended, where a run went on from its last step and validated no more.

        Args:
            task: The task.
        """
        loaders = self.trainer.val_dataloaders
        if not self.matrices["til"].matrix[task].isnan().all() or not isinstance(loaders, (list, tuple)):
            return
        metric = self.accuracy["val"]
        assert isinstance(metric, StreamAccuracy)
        with evaluation(self.learner):
            for place, loader in enumerate(loaders):
                for batch in loader:
                    moved = self.trainer.strategy.batch_to_device(batch, self.device)
                    metric.update(self.learner(moved.images), moved.labels, place, task)
        found = metric.compute()
        metric.reset()
        for kind in KINDS:
            self.matrices[kind].add_row(task, found[kind])

    def _keep_fidelity(self, found: dict[str, list[float]]) -> None:
        for name in ("fidelity", "api"):
            values = [value for value in found[name] if value == value]
            if values:
                self.fidelity[name] = sum(values) / len(values)

    def on_test_epoch_end(self) -> None:
        """Log the accuracies, and what the matrix says of forgetting."""
        metric = self.accuracy["test"]
        assert isinstance(metric, StreamAccuracy)
        found = metric.compute()
        metric.reset()
        self._keep_fidelity(found)
        scores: dict[str, float] = {}
        for kind in KINDS:
            values = found[kind]
            scores[f"test/{kind}/acc"] = sum(values) / len(values)
            scores |= {f"test/{kind}/acc/{name}": value for name, value in zip(self.task_names, values, strict=True)}
            matrix = self.matrices[kind]
            scores |= {f"test/{kind}/bwt": matrix.bwt(), f"test/{kind}/forgetting": matrix.forgetting()}
        scores |= {f"test/{name}/acc" if name == "api" else "test/fidelity": v for name, v in self.fidelity.items()}
        scores |= self.extra_scores()
        # One task has no backward transfer, and a fit without validation no matrix.
        self.log_dict({name: value for name, value in scores.items() if value == value})
        for kind in KINDS:
            columns, rows = self.matrices[kind].table()
            log_table(self, f"accuracy_{kind}", columns, rows)

    def extra_scores(self) -> dict[str, float]:
        """Further numbers of a test."""
        return {}

    def on_predict_start(self) -> None:
        """Open the file of predictions."""
        self._predictions.open()

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Logits `(B, K)`, the best class among all tasks, and the best one of the image's own task."""
        logits = self.learner(batch.images)
        scores = logits.float()
        seen = self.sets.seen(len(self.sets) - 1, logits.device)
        own = self.sets.of_task(dataloader_idx, logits.device)
        found = {
            "logits": logits,
            "pred": scores.masked_fill(~seen, -torch.inf).argmax(-1),
            "task_pred": scores.masked_fill(~own, -torch.inf).argmax(-1),
        }
        rows = zip(found["pred"].tolist(), found["task_pred"].tolist(), strict=True)
        self._predictions.write(
            {"task": self.task_names[dataloader_idx], "pred": pred, "task_pred": task} for pred, task in rows
        )
        return found

    def on_predict_epoch_end(self) -> None:
        """Close the file of predictions."""
        self._predictions.close()

    def draw(self) -> None:
        """Pictures of the stream: matrices, course, generated images."""
        from zoo.api_cl.figures import plot_accuracy_matrices, plot_curves, plot_generated

        named = {"til": "task-incremental", "cil": "class-incremental"}
        matrices = {named[kind]: self.matrices[kind].matrix for kind in KINDS}
        log_figure(self, "accuracy", plot_accuracy_matrices(matrices, self.task_names))
        if self.samples:
            keyed = {(int(key.split("/")[0]), key.split("/")[1]): images for key, images in self.samples.items()}
            log_figure(self, "generated", plot_generated(keyed))
        curves = {name: torch.stack(values).tolist() for name, values in self.history.items() if values}
        starts = [int(value) for value in curves.pop("start", [])]
        if any(len(values) > 1 for values in curves.values()):
            log_figure(self, "course", plot_curves(curves, starts))
