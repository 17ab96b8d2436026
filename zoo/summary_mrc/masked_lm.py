"""Masked-LM pre-training of a text encoder on passages, for where no pre-trained weights are at hand."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningModule
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric

from zoo.common.artifacts import run_folder
from zoo.common.hyperparameters import plain_hyperparameters
from zoo.common.schedules import WarmupLinear, fit_schedule
from zoo.summary_mrc.choice_module import adamw, check_length, save_tokenizer
from zoo.summary_mrc.encoders import build_text_encoder, save_text_encoder
from zoo.summary_mrc.slot_scorer import MaskedSlotScorer

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler

    from zoo.summary_mrc.types import PassageBatch

log = logging.getLogger(__name__)


class MaskedLM(LightningModule):
    """Masked language modelling from fresh weights, or on from a checkpoint's.

    After the training the run's folder, or `export`, holds `encoder/`, for `--model.encoder` of `SummaryMRC` and
    `ClozeScorer`, and `tokenizer/`, for `--data.tokenizer` of `ClozeData`.

    Args:
        encoder: "tiny", a local folder, a hub id, or a config (a mapping with `model_type`) for fresh weights.
        pretrained: Whether to load the weights of a folder or hub id, or only its config.
        encoder_options: Options of "tiny" (see `build_text_encoder`).
        vocab_size: Size of the tokenizer's vocabulary.
        lr: Highest learning rate of AdamW.
        weight_decay: Decoupled; not on biases and norms.
        warmup_ratio: Share of the steps in which the rate rises; it falls to 0 in the others.
        gradient_checkpointing: Whether the encoder computes activations anew in the backward pass.
        export: Folder for `encoder/` and `tokenizer/`, where later runs find them by one name; by default the run's.

    Raises:
        ValueError: If an option is out of its range.
    """

    monitor = "val/loss"
    monitor_mode = "min"

    def __init__(
        self,
        encoder: str | dict[str, Any] = "tiny",
        pretrained: bool = True,
        encoder_options: dict[str, Any] | None = None,
        vocab_size: int | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup_ratio: float = 0.1,
        gradient_checkpointing: bool = False,
        export: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=plain_hyperparameters({"encoder": encoder}))
        if not lr > 0:
            raise ValueError(f"lr must be positive, got {lr}")
        if weight_decay < 0:
            raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")
        self.lr, self.weight_decay, self.export = lr, weight_decay, export
        self._schedule = WarmupLinear(warmup_ratio)
        network = build_text_encoder(
            encoder,
            vocab_size=vocab_size,
            pretrained=pretrained,
            options=encoder_options,
            head="masked_lm",
            gradient_checkpointing=gradient_checkpointing,
        )
        self.scorer = MaskedSlotScorer(network)
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()

    def setup(self, stage: str) -> None:
        """Check that the data's sequences fit the encoder."""
        check_length(self, self.scorer.network)

    def on_train_start(self) -> None:
        """Fit the schedule to the length of the training, and keep the tokenizer beside the checkpoints."""
        fit_schedule(self, self._schedule)
        save_tokenizer(self)

    def forward(self, batch: PassageBatch) -> tuple[Tensor, Tensor]:
        """Logits `(batch, masked, vocabulary)` at the masked places, and their labels `(batch, masked)`.

        The head runs there only: with a large vocabulary it costs more than the encoder. Rows with fewer masked tokens
        than others have labels of -100 at their ends.
        """
        masked = batch.labels >= 0
        # Wide enough for the row with the most masked tokens; stable, so that the others' places come first, too.
        width = max(1, int(masked.sum(1).max()))
        places = masked.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]
        logits = self.scorer.logits(batch.input_ids, batch.attention_mask, batch.token_type_ids, places)
        return logits, batch.labels.gather(1, places)

    def masked_loss(self, batch: PassageBatch) -> tuple[Tensor, Tensor]:
        """Loss summed over the masked tokens of a batch, and their number."""
        logits, labels = self(batch)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"), (labels >= 0).sum()

    def training_step(self, batch: PassageBatch, batch_idx: int) -> Tensor:
        """Mean cross-entropy of the masked tokens.

        Processes have unequally many of them, and their gradients are averaged: each divides by the mean number.
        """
        total, count = self.masked_loss(batch)
        share: Tensor = self.trainer.strategy.reduce(count.float(), reduce_op="mean")
        loss: Tensor = total / share.clamp(min=1)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch.labels))
        return loss

    def validation_step(self, batch: PassageBatch, batch_idx: int) -> None:
        """Count a batch of the validation."""
        self._count(batch, self.val_loss)

    def test_step(self, batch: PassageBatch, batch_idx: int) -> None:
        """Count a batch of the test."""
        self._count(batch, self.test_loss)

    def _count(self, batch: PassageBatch, metric: MeanMetric) -> None:
        total, count = self.masked_loss(batch)
        if int(count):
            metric.update(total / count, count)

    def on_validation_epoch_end(self) -> None:
        """Log `val/loss` and `val/perplexity`."""
        self._log_loss("val", self.val_loss)

    def on_test_epoch_end(self) -> None:
        """Log `test/loss` and `test/perplexity`."""
        self._log_loss("test", self.test_loss)

    def _log_loss(self, stage: str, metric: MeanMetric) -> None:
        loss = metric.compute()
        metric.reset()
        self.log(f"{stage}/loss", loss)
        self.log(f"{stage}/perplexity", loss.exp(), prog_bar=True)

    def predict_step(self, batch: PassageBatch, batch_idx: int) -> dict[str, Tensor]:
        """Masked tokens and the most probable ones in their places: `labels` and `tokens`, int64 `(batch, masked)`.

        Places without a masked token have -100 in both.
        """
        logits, labels = self(batch)
        return {"labels": labels, "tokens": logits.argmax(-1).masked_fill(labels < 0, -100)}

    def on_fit_end(self) -> None:
        """Write the network."""
        if getattr(self.trainer, "fast_dev_run", False):
            return
        folder = run_folder(self.trainer) if self.export is None else Path(self.export)
        if self.trainer.is_global_zero:
            save_text_encoder(self.scorer.network, folder / "encoder")
            log.info("Encoder: %s", folder / "encoder")
        save_tokenizer(self, self.export)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with a linear warm-up and a linear decay; no decay of biases and of the weights of norms."""
        return adamw(self, self.lr, self.weight_decay, self._schedule)
