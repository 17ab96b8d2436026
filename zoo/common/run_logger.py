"""The metrics file of a run, which grows when the run is resumed."""

from __future__ import annotations

import csv
import os
import warnings
from typing import TYPE_CHECKING

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import CSVLogger

if TYPE_CHECKING:
    from pathlib import Path

    from lightning.fabric.loggers.csv_logs import _ExperimentWriter


class RunLogger(CSVLogger):
    """CSVLogger that appends to the `metrics.csv` that is there, where Lightning's deletes it.

    One run writes it more than once: when it is resumed, and when the test after a fit has processes of its own.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> _ExperimentWriter:
        """The writer, which knows the columns of the rows written so far."""
        if self._experiment is not None:
            return self._experiment
        path = os.path.join(self.log_dir, "metrics.csv")
        kept = path + ".kept"
        if os.path.isfile(path):
            os.replace(path, kept)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Experiment logs directory")
            writer: _ExperimentWriter = super().experiment
        if os.path.isfile(kept):
            os.replace(kept, path)
            with open(path, newline="", encoding="utf-8") as file:
                writer.metrics_keys = next(csv.reader(file), [])
        return writer


def wandb_run_id(folder: Path) -> str | None:
    """Id of the last Weights & Biases run that wrote in a run's folder, to go on with; None if there is none.

    An offline run goes on in a second `offline-run-*-ID` folder; `wandb sync` uploads both into one run.
    """
    files = sorted(folder.glob("wandb/*run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime)
    return files[-1].stem.removeprefix("run-") if files else None


@rank_zero_only
def drop_later_rows(path: Path, step: int) -> None:
    """Remove from a `metrics.csv` the rows of `step` and later, which a resumed run writes again."""
    if not path.is_file():
        return
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or [])
        rows = [row for row in reader if int(row.get("step") or 0) < step]
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)
