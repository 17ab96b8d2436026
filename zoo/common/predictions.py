"""Predictions of a run as lines of JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TextIO

from zoo.common.artifacts import run_folder

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lightning.pytorch import LightningModule


class PredictionFile:
    """`predictions.jsonl` in the run's folder, one file per process if there are several.

    Under `fast_dev_run`, which leaves no traces, nothing is written.

    Args:
        module: The module whose Trainer predicts.
    """

    def __init__(self, module: LightningModule) -> None:
        # Not an attribute of a module: modules find modules in their attributes, but not in those of other objects.
        self._module = module
        self._file: TextIO | None = None

    @property
    def is_open(self) -> bool:
        """Whether `write` writes."""
        return self._file is not None

    def open(self) -> None:
        """Start the file anew. All processes must call it."""
        trainer = self._module.trainer
        if getattr(trainer, "fast_dev_run", False):
            return
        name = "predictions.jsonl" if trainer.world_size == 1 else f"predictions-{trainer.global_rank}.jsonl"
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / name).open("w", encoding="utf-8")

    def write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Append one JSON object per line."""
        if self._file is not None:
            for line in lines:
                self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
