"""Pictures and text tables of a run: always files in the run's folder, and in Weights & Biases where that is on."""

from __future__ import annotations

import json
import sys
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import WandbLogger

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lightning.pytorch import LightningModule, Trainer
    from matplotlib.figure import Figure


def run_folder(trainer: Trainer) -> Path:
    """Folder that holds the files of a run, the same on every process. All processes must call it.

    This is the log folder of the Trainer's first logger (for `train.py` the place of `config.yaml`, `metrics.csv` and
    the checkpoints), or the Trainer's root folder if no logger has one.
    """
    # Processes may number the versions of a run differently; the first one decides.
    return Path(trainer.strategy.broadcast(str(_own_folder(trainer))))


def log_figure(module: LightningModule, key: str, figure: Figure) -> Path | None:
    """Save a figure as `<run folder>/figures/<key>.png`, send it to W&B if that is a logger, and close it.

    A later figure of the same key replaces the file. Only the first process does anything; under `fast_dev_run`,
    which leaves no traces, nobody does.

    Args:
        module: The module whose Trainer is running.
        key: Name of the picture, such as "test/gaps"; a slash makes a subfolder.
        figure: A matplotlib figure.

    Returns:
        Path of the file, where one was written.

    Raises:
        ValueError: If the key leads out of the folder.
    """
    path = _target(module.trainer, "figures", key, ".png")
    if path is not None:
        figure.savefig(path, dpi=150, bbox_inches="tight")
        for logger in _wandb_loggers(module.trainer):
            logger.log_image(key, [str(path)], step=module.trainer.global_step)
    # A figure that pyplot has not made is not pyplot's to close, and importing it would choose a display.
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close(figure)
    return path


def log_table(module: LightningModule, key: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path | None:
    """Save rows as `<run folder>/tables/<key>.jsonl`, one JSON object a line, and send them to W&B if that is a logger.

    Args:
        module: The module whose Trainer is running.
        key: Name of the table, such as "test/replies"; a slash makes a subfolder.
        columns: Names of the columns.
        rows: One sequence of values for each row; tensors of any size are written as numbers and lists.

    Returns:
        Path of the file, where one was written (see `log_figure`).

    Raises:
        ValueError: If the key leads out of the folder, or a row has another length than `columns`.
    """
    path = _target(module.trainer, "tables", key, ".jsonl")
    if path is None:
        return None
    plain = [[_plain(value) for value in row] for row in rows]
    for number, row in enumerate(plain):
        if len(row) != len(columns):
            raise ValueError(f"row {number} of table {key!r} has {len(row)} values for {len(columns)} columns")
    with path.open("w", encoding="utf-8") as file:
        for row in plain:
            file.write(json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) + "\n")
    for logger in _wandb_loggers(module.trainer):
        logger.log_table(key, columns=list(columns), data=plain, step=module.trainer.global_step)
    return path


def _own_folder(trainer: Trainer) -> Path:
    for logger in trainer.loggers:
        folder = logger.log_dir or logger.save_dir
        if folder is not None:
            return Path(folder)
    return Path(trainer.default_root_dir)


def _target(trainer: Trainer, kind: str, key: str, suffix: str) -> Path | None:
    parts = PurePosixPath(key)
    if not parts.name or parts.is_absolute() or ".." in parts.parts:
        raise ValueError(f"a key names a file below the run's {kind}, got {key!r}")
    if getattr(trainer, "fast_dev_run", False) or not trainer.is_global_zero:
        return None
    path = _own_folder(trainer) / kind / parts.parent / (parts.name + suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _wandb_loggers(trainer: Trainer) -> list[WandbLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value
