"""ActionHead: classes from one stream, by the pre-trained encoder."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from zoo.cmmixer.export import build_encoder
from zoo.cmmixer.layer_decay import layer_decay_groups
from zoo.cmmixer.mixer import check_streams
from zoo.cmmixer.pretraining import check_training, refuse_sharding, steps_per_epoch
from zoo.cmmixer.towers import POOLS
from zoo.cmmixer.vit import pooled
from zoo.common.predictions import PredictionFile, external_labels
from zoo.common.schedules import WarmupCosine, fit_schedule

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler

    from zoo.cmmixer.types import VideoAudioBatch

STREAMS = ("video", "audio")


class ActionHead(LightningModule):
    """A classifier on a pre-trained encoder: a linear probe, or a fine-tuning with layer-wise learning rates.

    Args:
        num_classes: Classes.
        image_shape: Channels, height and width of a frame.
        num_frames: Frames T of a clip.
        init_from: Folder of an exported encoder, or a Hugging Face ViTMAE checkpoint (folder or hub id); fresh weights
            by default.
        encoder: Size of a fresh encoder: "tiny", "base" (default), "deep_base", "large" or "huge".
        encoder_options: `hidden_size`, `num_layers`, `num_heads`, `mlp_ratio` that replace the name's.
        patch_size: Side of a patch in pixels; 16 by default, that of the checkpoint with `init_from`.
        layout: "concat" (default) or "interleave"; that of the checkpoint with `init_from`.
        stream: What is classified, "video" or "audio".
        freeze_encoder: Whether the encoder stays as it is (linear probe).
        pool: "mean" over patches, or "cls".
        label_smoothing: Of the cross-entropy.
        lr: Highest learning rate of AdamW.
        weight_decay: Decoupled; not on biases, norms and the CLS token.
        layer_decay: Factor of the learning rate from one layer of the encoder to the one below.
        warmup_epochs: Epochs in which the rate rises; it falls along a cosine in the others.

    Raises:
        ValueError: If an argument is out of its range, or contradicts the checkpoint of `init_from`.
    """

    monitor = "val/acc"
    monitor_mode = "max"

    def __init__(
        self,
        num_classes: int,
        image_shape: list[int],
        num_frames: int = 4,
        init_from: str | None = None,
        encoder: str | None = None,
        encoder_options: dict[str, Any] | None = None,
        patch_size: int | None = None,
        layout: str | None = None,
        stream: str = "video",
        freeze_encoder: bool = True,
        pool: str = "mean",
        label_smoothing: float = 0.0,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        layer_decay: float | None = 0.75,
        warmup_epochs: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}: does the data have labels?")
        for name, value, allowed in (("stream", stream, STREAMS), ("pool", pool, POOLS)):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}")
        check_training(lr, weight_decay, warmup_epochs)
        self.num_classes, self.stream, self.freeze_encoder, self.pool = num_classes, stream, freeze_encoder, pool
        self.label_smoothing, self.lr, self.weight_decay = label_smoothing, lr, weight_decay
        self.layer_decay, self.warmup_epochs = layer_decay, warmup_epochs
        self.encoder = build_encoder(image_shape, num_frames, encoder, encoder_options, patch_size, layout, init_from)
        if freeze_encoder:
            self.encoder.requires_grad_(False)
        # Without weights of its own: features of different encoders come to one scale.
        self.norm = nn.LayerNorm(self.encoder.hidden_size, elementwise_affine=False)
        self.head = nn.Linear(self.encoder.hidden_size, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self._schedule = WarmupCosine(0)
        # A loss of NaN, left out of the mean as by default, would make the run look well.
        self.val_loss, self.test_loss = (MeanMetric(nan_strategy=math.inf) for _ in range(2))
        self.val_acc, self.test_acc = (MulticlassAccuracy(num_classes, average="micro") for _ in range(2))
        self._predictions = PredictionFile(self)

    def forward(self, clips: Tensor) -> Tensor:
        """Logits `(batch, num_classes)` of clips `(batch, T, channels, height, width)`, float32 also under autocast."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_encoder):
            states = pooled(self.encoder(clips), self.pool)
        # Not under autocast: of classes with logits of half precision often two are best.
        with torch.autocast(clips.device.type, enabled=False):
            logits: Tensor = self.head(self.norm(states.to(self.head.weight.dtype)))
        return logits.float()

    def setup(self, stage: str) -> None:
        """Refuse strategies that cut weights into pieces."""
        refuse_sharding(self)

    def on_train_start(self) -> None:
        """Fit the schedule to the length of the training."""
        self._schedule.warmup_steps = round(self.warmup_epochs * steps_per_epoch(self))
        fit_schedule(self, self._schedule)

    def _logits(self, batch: VideoAudioBatch, batch_idx: int) -> Tensor:
        check_streams(batch.video, batch.audio, values=batch_idx == 0)
        logits: Tensor = self(getattr(batch, self.stream))
        return logits

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        outside = (labels < 0) | (labels >= self.num_classes)
        if bool(outside.any()):
            raise ValueError(
                f"{int(outside.sum())} of {len(labels)} clips have labels outside 0 to {self.num_classes - 1}, the "
                f"first {int(labels[outside][0])}: training, validation and test need labels (-1 is none)"
            )
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    def training_step(self, batch: VideoAudioBatch, batch_idx: int) -> Tensor:
        """The cross-entropy of a batch.

        Raises:
            ValueError: If a label is missing or out of range.
        """
        loss = self._loss(self._logits(batch, batch_idx), batch.labels)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch.labels))
        return loss

    def validation_step(self, batch: VideoAudioBatch, batch_idx: int) -> None:
        """Count a batch of the validation."""
        self._evaluate(batch, batch_idx, self.val_loss, self.val_acc, "val")

    def test_step(self, batch: VideoAudioBatch, batch_idx: int) -> None:
        """Count a batch of the test."""
        self._evaluate(batch, batch_idx, self.test_loss, self.test_acc, "test")

    def _evaluate(
        self, batch: VideoAudioBatch, batch_idx: int, losses: MeanMetric, accuracy: MulticlassAccuracy, stage: str
    ) -> None:
        logits = self._logits(batch, batch_idx)
        losses.update(self._loss(logits, batch.labels), len(batch.labels))
        # A network that gives all classes one score, or NaN, has not recognised any of them.
        best = logits.amax(1, keepdim=True)
        decided = (~(logits < best)).sum(1) == 1
        guess = logits.argmax(1)
        accuracy.update(torch.where(decided, guess, (batch.labels + 1) % self.num_classes), batch.labels)
        self.log(f"{stage}/loss", losses, batch_size=len(batch.labels))
        self.log(f"{stage}/acc", accuracy, prog_bar=True, batch_size=len(batch.labels))

    def on_predict_start(self) -> None:
        """Open `predictions.jsonl` in the run's folder (one file per process, if there are several)."""
        self._predictions.open()

    def predict_step(self, batch: VideoAudioBatch, batch_idx: int) -> dict[str, Tensor]:
        """Classes int64 `(batch,)`, their `probability` and `pair_ids`; written to `predictions.jsonl` by name."""
        probability, guess = self._logits(batch, batch_idx).softmax(1).max(1)
        name, pair = external_labels(self, "label_names"), external_labels(self, "pair_names")
        rows = zip(batch.pair_ids.tolist(), guess.tolist(), probability.tolist(), strict=True)
        self._predictions.write({"pair_id": pair(i), "label": name(c), "probability": p} for i, c, p in rows)
        return {"pair_ids": batch.pair_ids, "labels": guess, "probability": probability}

    def on_predict_end(self) -> None:
        """Close the file."""
        self._predictions.close()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with layer-wise learning rates, a linear warm-up and a cosine."""
        groups = layer_decay_groups(
            [self.encoder], self.head.parameters(), self.lr, self.weight_decay, self.layer_decay
        )
        optimizer = torch.optim.AdamW(groups)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, self._schedule), "interval": "step"},
        }
