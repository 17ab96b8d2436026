"""What the modules of this room share: loss, metrics, optimizer, pictures and predictions."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from zoo.common.artifacts import run_folder
from zoo.common.predictions import PredictionFile
from zoo.common.schedules import WarmupLinear, fit_schedule
from zoo.summary_mrc.encoders import max_positions
from zoo.summary_mrc.metrics import ChoiceAccuracy, ChoiceMetrics, predictions
from zoo.summary_mrc.reports import TestReport

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler

    from zoo.common.schedules import Schedule
    from zoo.summary_mrc.types import ChoiceBatch, QuestionTable


log = logging.getLogger(__name__)


class ChoiceModule(LightningModule):
    """Trains and tests whatever scores the options of a question.

    A subclass has `forward(batch) -> scores (batch, options)`. The loss is the cross-entropy over the options.

    Args:
        num_options: Options K of every question.
        lr: Highest learning rate of AdamW.
        weight_decay: Decoupled, not on biases and on the weights of norms.
        warmup_ratio: Share of the steps in which the rate rises; it falls to 0 in the others.
        label_smoothing: Of the cross-entropy.

    Raises:
        ValueError: If a value is out of its range.
    """

    monitor = "val/acc"
    monitor_mode = "max"

    def __init__(
        self, num_options: int, lr: float, weight_decay: float, warmup_ratio: float, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        if num_options < 2:
            raise ValueError(f"num_options must be at least 2, got {num_options}")
        if not lr > 0:
            raise ValueError(f"lr must be positive, got {lr}")
        if weight_decay < 0:
            raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}")
        self.num_options, self.lr, self.weight_decay = num_options, lr, weight_decay
        self.label_smoothing = label_smoothing
        self._schedule = WarmupLinear(warmup_ratio)
        self.train_accuracy = ChoiceAccuracy()
        self.val_metrics, self.test_metrics = ChoiceMetrics(num_options), ChoiceMetrics(num_options)
        self.report = TestReport()
        self._predictions = PredictionFile(self)
        self._chosen: list[tuple[int, int]] = []

    def on_train_start(self) -> None:
        """Fit the schedule to the length of the training, and keep the tokenizer beside the checkpoints."""
        fit_schedule(self, self._schedule)
        save_tokenizer(self)

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of scores `(batch, options)`, in float32.

        Raises:
            ValueError: If a question has no label.
        """
        unlabelled = int((labels < 0).sum())
        if unlabelled:
            raise ValueError(
                f"{unlabelled} of {len(labels)} questions of a batch have no label: training, validation and test "
                "need labels (for questions without them use `predict`)"
            )
        return F.cross_entropy(scores.float(), labels, label_smoothing=self.label_smoothing)

    def training_step(self, batch: ChoiceBatch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        scores: Tensor = self(batch)
        loss = self.loss(scores, batch.labels)
        count = len(batch.labels)
        self.train_accuracy.update(scores.detach(), batch.accepted)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=count)
        self.log("train/acc", self.train_accuracy, on_step=False, on_epoch=True, batch_size=count)
        return loss

    def validation_step(self, batch: ChoiceBatch, batch_idx: int) -> None:
        """Count a batch of the validation."""
        self._evaluate(batch, self.val_metrics)

    def test_step(self, batch: ChoiceBatch, batch_idx: int) -> None:
        """Count a batch of the test."""
        scores = self._evaluate(batch, self.test_metrics)
        self.report.update(batch.rows, scores.float(), batch.accepted)
        if batch_idx == 0 and self.trainer.is_global_zero:
            self.report.example = batch

    def _evaluate(self, batch: ChoiceBatch, metrics: ChoiceMetrics) -> Tensor:
        scores: Tensor = self(batch)
        metrics.update(scores, self.loss(scores, batch.labels), batch.labels, batch.accepted)
        return scores

    def _log_metrics(self, stage: str, metrics: ChoiceMetrics) -> None:
        for name, value in metrics.compute().items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "acc")
        metrics.reset()

    def on_validation_epoch_end(self) -> None:
        """Log `val/*`."""
        self._log_metrics("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Log `test/*` beside what needs no reading, and draw."""
        self._log_metrics("test", self.test_metrics)
        priors: dict[str, float] = {}
        find = getattr(getattr(self.trainer, "datamodule", None), "priors", None)
        if callable(find):
            priors = find("test")
            for name, value in priors.items():
                self.log(f"test/prior/{name}", value)
        self.report.draw(self, priors)

    def attention(self, batch: Any) -> tuple[Tensor, Tensor, Tensor] | None:
        """Weights of the second segment over the passage, for the picture; None where a module has none.

        Returns:
            Ids of the second segment's tokens `(options, summary)`, ids of the passage's `(options, length)` and the
            weights `(options, summary, length)`, of the first question of a batch; places without a token have the id
            -1 and no weight.
        """
        return None

    def questions(self, stage: str) -> QuestionTable | None:
        """The text of a stage's questions, where the datamodule knows it."""
        find = getattr(getattr(self.trainer, "datamodule", None), "questions", None)
        table: QuestionTable | None = find(stage) if callable(find) else None
        return table

    def on_predict_start(self) -> None:
        """Open `predictions.jsonl` in the run's folder (one file per process, if there are several)."""
        self._predictions.open()
        self._chosen = []

    def predict_step(self, batch: ChoiceBatch, batch_idx: int) -> dict[str, Any]:
        """Chosen options: `id` list of str, `pred` int64 `(batch,)`, `prob` float `(batch, options)`."""
        scores: Tensor = self(batch)
        chosen, probabilities = predictions(scores), scores.float().softmax(1)
        rows = batch.rows.tolist()
        table = self.questions("predict")
        ids = [str(row) if table is None else table.ids[row] for row in rows]
        self._chosen += zip(rows, chosen.tolist(), strict=True)
        for identity, option, values in zip(ids, chosen.tolist(), probabilities.tolist(), strict=True):
            self._predictions.write([{"id": identity, "pred": option, "prob": values}])
        return {"id": ids, "pred": chosen, "prob": probabilities}

    def on_predict_end(self) -> None:
        """Close the file, and write `submission.csv` in the task's format."""
        self._predictions.close()
        if getattr(self.trainer, "fast_dev_run", False):
            return
        parts: list[list[tuple[int, int]]] = [self._chosen]
        if self.trainer.world_size > 1:
            parts = [[] for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather_object(parts, self._chosen)
        folder = run_folder(self.trainer)
        if self.trainer.is_global_zero:
            from zoo.summary_mrc.submission import write_submission

            chosen = dict(pair for part in parts for pair in part)
            table = self.questions("predict")
            rows = max(chosen, default=-1) + 1 if table is None else len(table.ids)
            if rows == len(chosen) > 0:
                path = write_submission([chosen[row] for row in range(rows)], folder / "submission.csv")
                log.info("Submission: %s", path)
            else:
                log.warning("No submission.csv: only %d of %d questions are answered", len(chosen), rows)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with a linear warm-up and a linear decay; no decay of biases and of the weights of norms."""
        return adamw(self, self.lr, self.weight_decay, self._schedule)


def save_tokenizer(module: LightningModule, folder: str | Path | None = None) -> None:
    """Write the datamodule's tokenizer into a folder, by default the run's, from where later runs take it.

    All processes must call it.
    """
    tokenizer = getattr(getattr(module.trainer, "datamodule", None), "tokenizer", None)
    if tokenizer is None or getattr(module.trainer, "fast_dev_run", False):
        return
    target = run_folder(module.trainer) if folder is None else Path(folder)
    if module.trainer.is_global_zero:
        tokenizer.save_pretrained(target / "tokenizer")


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters in two groups: matrices with a weight decay; biases and weights of norms without."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(module: nn.Module, lr: float, weight_decay: float, schedule: Schedule) -> OptimizerLRScheduler:
    """AdamW over `decay_groups` with a schedule by steps, as `configure_optimizers` returns it."""
    optimizer = torch.optim.AdamW(decay_groups(module, weight_decay), lr=lr)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, schedule), "interval": "step"}}


def check_length(module: LightningModule, network: nn.Module) -> None:
    """Compare the datamodule's longest sequence with the positions that an encoder has.

    Raises:
        ValueError: If sequences may be longer.
    """
    longest = getattr(getattr(module.trainer, "datamodule", None), "max_length", None)
    positions = max_positions(network)
    if longest is not None and positions is not None and longest > positions:
        raise ValueError(
            f"--data.max_length is {longest}, but the encoder ({type(network).__name__}) has {positions} positions: "
            f"set --data.max_length to at most {positions}"
        )
