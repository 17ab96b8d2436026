"""A model and data of a few lines: what the command line does is tested on them in milliseconds."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchmetrics import MeanMetric

from datamodules.loading import BatchLoader, Draw, KeyedSampler


class ToyBatch(NamedTuple):
    features: Tensor  # float32 (batch, 4)
    labels: Tensor  # int64 (batch,)


class ToyRows(Dataset[ToyBatch]):
    def __init__(self, rows: int, num_classes: int) -> None:
        generator = torch.Generator().manual_seed(rows)
        self.features = torch.randn(rows, 4, generator=generator)
        self.labels = self.features[:, :num_classes].argmax(1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, draw: Draw) -> ToyBatch:
        return ToyBatch(self.features[draw.indices], self.labels[draw.indices])


class ToyData(LightningDataModule):
    """Points in four dimensions."""

    def __init__(self, rows: int = 48, batch_size: int = 8, classes: int = 3, fault: str = "") -> None:
        super().__init__()
        if fault == "constructor":
            raise ValueError("rows.csv, line 3: label 'x', expected an integer")
        self.rows, self.batch_size, self.classes, self.fault = rows, batch_size, classes, fault

    @property
    def num_classes(self) -> int:
        if self.fault == "property":
            raise AttributeError("'NoneType' object has no attribute 'max'")
        return self.classes

    def setup(self, stage: str) -> None:
        if self.fault == "setup":
            raise FileNotFoundError("rows.csv: no such file; put it under data/")

    def _loader(self, rows: int, shuffle: bool = False) -> BatchLoader:
        sampler = KeyedSampler(rows, self.batch_size, shuffle=shuffle, equal=shuffle)
        if shuffle and self.trainer is not None:
            sampler.set_epoch(self.trainer.fit_loop.epoch_progress.current.processed)
        return BatchLoader(ToyRows(rows, self.classes), sampler=sampler)

    def train_dataloader(self) -> BatchLoader:
        return self._loader(self.rows, shuffle=True)

    def val_dataloader(self) -> BatchLoader:
        return self._loader(24)

    def test_dataloader(self) -> BatchLoader:
        return self._loader(17)

    def predict_dataloader(self) -> BatchLoader:
        return self._loader(17)


class TalkingData(ToyData):
    """Data that logs, under a name that the command line shows."""

    def setup(self, stage: str) -> None:
        logging.getLogger("datamodules.toy").warning("%d rows", self.rows)


class ToyDataWithoutSizes(LightningDataModule):
    """Data that knows nothing of its classes."""

    train_dataloader = ToyData.train_dataloader
    val_dataloader = ToyData.val_dataloader
    test_dataloader = ToyData.test_dataloader
    _loader = ToyData._loader
    rows, batch_size, classes = 48, 8, 3


class ToyModel(LightningModule):
    """Softmax regression with dropout."""

    monitor = "val/loss"
    monitor_mode = "min"

    def __init__(self, num_classes: int, hidden_size: int = 8, lr: float = 0.1, dropout: float = 0.5) -> None:
        super().__init__()
        self.save_hyperparameters()
        if hidden_size < 1:
            raise ValueError(f"hidden_size is {hidden_size}, expected at least 1")
        self.lr = lr
        # A metric, not a mean of the ranks' means: their last batches differ in length.
        self.losses = nn.ModuleDict({stage: MeanMetric() for stage in ("val_loss", "test_loss")})
        self.layers = nn.Sequential(nn.Linear(4, hidden_size), nn.Dropout(dropout), nn.Linear(hidden_size, num_classes))

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.layers(features)
        return logits

    def training_step(self, batch: ToyBatch, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch.features).float(), batch.labels)
        self.log("train/loss", loss, batch_size=len(batch.labels), on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def _evaluate(self, batch: ToyBatch, stage: str) -> None:
        metric = self.losses[f"{stage}_loss"]
        metric.update(F.cross_entropy(self(batch.features).float(), batch.labels, reduction="none"))
        self.log(f"{stage}/loss", metric, batch_size=len(batch.labels), on_step=False, on_epoch=True)

    def validation_step(self, batch: ToyBatch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: ToyBatch, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def predict_step(self, batch: ToyBatch, batch_idx: int) -> Tensor:
        return self(batch.features).argmax(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class ToyModelWithoutMetric(ToyModel):
    """The same with other arguments, and nothing to choose an epoch by."""

    monitor = None

    def __init__(self, num_classes: int = 3, width: int = 4) -> None:
        super().__init__(num_classes, width)
        self.save_hyperparameters()
