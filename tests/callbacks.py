"""Callbacks that tests name on the command line."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class GradientRecorder(Callback):
    """Saves the loss and the gradients of the first optimizer step, one file for each rank."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        path = self.folder / f"{trainer.global_rank}.pt"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            named = pl_module.named_parameters()
            torch.save({name: p.grad.clone() for name, p in named if p.grad is not None}, path)


class KillAt(Callback):
    """Kills the process, as a power cut would, before a batch is trained on."""

    def __init__(self, epoch: int, batch: int) -> None:
        self.epoch, self.batch = epoch, batch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (self.epoch, self.batch):
            os.kill(os.getpid(), signal.SIGKILL)
