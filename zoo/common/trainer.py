"""The Trainer of `train.py`, with what it needs for a run's record."""

from __future__ import annotations

import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger

from zoo.common.checkpoints import evaluation_checkpoint
from zoo.common.runs import flatten


class ZooTrainer(Trainer):
    """The Trainer with `run`."""

    def run(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
    ) -> None:
        """Fit, then test with the best checkpoint, or with the last where the model names no metric to choose by.

        Args:
            model: The model.
            datamodule: The data.
            ckpt_path: Checkpoint to go on from.
        """
        self.fit(model, datamodule=datamodule, ckpt_path=ckpt_path)
        self.test(model, datamodule=datamodule, ckpt_path=evaluation_checkpoint(self, model), verbose=False)


class Stopwatch(Timer):
    """Timer without a limit; counts on when a run is resumed. A class of its own, so that a user's Timer fits too."""


class SaveConfig(SaveConfigCallback):
    """Saves `config.yaml` in the run's folder and hands the same settings to loggers other than CSV."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log the whole configuration, flat."""
        settings = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger):
                logger.log_hyperparams(dict(flatten(settings)))
