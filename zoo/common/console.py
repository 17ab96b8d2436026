"""What a run says on the terminal."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_NOISE = (
    # Lightning's use of a name that torch has deprecated.
    ".isinstance.treespec, LeafSpec",
    # The folder holds the run's own config.yaml, or the checkpoint that is being resumed.
    "Checkpoint directory .* exists and is not empty",
    # A fork of an old run starts its own list of best checkpoints, as it should.
    "The dirpath has changed from",
    "The '.*dataloader' does not have many workers",
    # A run without validation has no best epoch; if there was a validation, Lightning raises instead.
    ".*could not find the monitored key",
    # What comes out of a Metric is the same on all ranks; where it is not, two processes do not score as one does,
    # and that is tested.
    "It is recommended to use `self.log\\(.*sync_dist=True",
    # The state after the optimizer step is the one to resume from.
    "Using ModelCheckpoint with manual optimization and every_n_train_steps",
    # Models that count say so by returning None; one that forgot to choose an optimizer is an error.
    "`LightningModule.configure_optimizers` returned `None`",
)


class LogLines(logging.Handler):
    """Writes log records to stderr as they are, one line each, from the first process alone."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
            # Looked up for each record: a progress bar puts a stream of its own there for a while.
            print(level + self.format(record), file=sys.stderr, flush=True)


def prepare_console(packages: Sequence[str]) -> None:
    """Show what the packages log, and silence what Lightning says to everybody in every run.

    Args:
        packages: Names of loggers, shown from level INFO on.
    """
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    for message in _NOISE:
        warnings.filterwarnings("ignore", message)
    for name in packages:
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        if not any(isinstance(handler, LogLines) for handler in logger.handlers):
            logger.addHandler(LogLines())


class EpochLines(Callback):
    """One line per epoch, for logs and pipes, where a progress bar would leave thousands of redrawn lines."""

    def __init__(self) -> None:
        super().__init__()
        self._started = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the epoch's clock."""
        self._started = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the epoch's number, time and metrics."""
        if not trainer.is_global_zero:
            return
        of = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        # What a method marks for the bar is what is worth a line; everything is in metrics.csv.
        shown = trainer.progress_bar_metrics or trainer.callback_metrics
        metrics = "  ".join(f"{name} {_number(shown[name])}" for name in sorted(shown, key=_natural))
        seconds = time.perf_counter() - self._started
        print(f"epoch {trainer.current_epoch + 1}{of}  {seconds:.1f} s  {metrics}", flush=True)


def progress_callback() -> Callback:
    """A rich progress bar on a terminal, otherwise one line per epoch."""
    return RichProgressBar() if sys.stdout.isatty() else EpochLines()


def print_metrics(metrics: Mapping[str, Any], title: str) -> None:
    """Print a table of metric names and values."""
    table = Table(title=title, title_justify="left")
    table.add_column("metric", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    for name in sorted(metrics, key=_natural):
        table.add_row(name, _number(metrics[name]))
    Console().print(table)


def _number(value: Any) -> str:
    number = float(value)
    return str(int(number)) if number.is_integer() and abs(number) >= 10 else f"{number:.4g}"


def _natural(name: str) -> tuple[str, int]:
    """Sort key that puts `hr@5` before `hr@10`."""
    stem, _, cutoff = name.partition("@")
    return stem, int(cutoff) if cutoff.isdigit() else 0
