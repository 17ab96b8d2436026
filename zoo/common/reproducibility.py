"""Random numbers that depend on where training is, not on how it got there."""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from zoo.common.keyed_random import mix_keys

_MASK = (1 << 63) - 1


def mix(*keys: int) -> int:
    """Hash integers to one seed in `[0, 2**63)`.

    Neighbouring keys give unrelated seeds, and the order of the keys matters:

    >>> mix(42, 0, 1) == mix(42, 0, 1), mix(42, 0, 1) == mix(42, 1, 0)
    (True, False)

    Args:
        keys: Integers of 64 bits, at least one.

    Returns:
        A seed that `torch.manual_seed` takes.
    """
    *leading, final = keys
    return int(mix_keys(*leading, torch.tensor(final))) & _MASK


def run_seed(seed: int | None = None) -> int:
    """The seed given, or else the one of Lightning's `seed_everything`, or else 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed


class StepSeed(Callback):
    """Seed torch anew at every batch, from the seed, the epoch, the batch and the rank.

    A checkpoint holds no random state, so that a resumed run would draw other dropout masks and other negatives than
    one that was never stopped. With this callback, and a loader whose order is keyed by the epoch, both are equal bit
    for bit. Evaluation is seeded by the batch alone: sampled candidates are the same in every epoch and in a later
    `test`.

    Args:
        seed: The seed of the run, the one of `seed_everything`.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed what the method draws once per epoch."""
        torch.manual_seed(mix(self.seed, 1, trainer.current_epoch, trainer.global_rank))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed what one training step draws."""
        torch.manual_seed(mix(self.seed, 2, trainer.current_epoch, batch_idx, trainer.global_rank))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Seed what one validation step draws."""
        torch.manual_seed(mix(self.seed, 3, dataloader_idx, batch_idx, trainer.global_rank))

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Seed what one test step draws."""
        torch.manual_seed(mix(self.seed, 4, dataloader_idx, batch_idx, trainer.global_rank))

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Seed what one prediction step draws."""
        torch.manual_seed(mix(self.seed, 5, dataloader_idx, batch_idx, trainer.global_rank))
