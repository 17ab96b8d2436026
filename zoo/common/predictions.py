"""Predictions of a run as lines of JSON."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, TextIO

from zoo.common.artifacts import run_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from lightning.pytorch import LightningModule
    from torch import Tensor


def external_labels(module: LightningModule, name: str) -> Callable[[int], str]:
    """What ids are called: the datamodule's list of that name, or the ids themselves where it has none.

    Args:
        module: The module whose Trainer is running.
        name: Attribute of the datamodule, such as "item_labels".
    """
    labels = getattr(getattr(module.trainer, "datamodule", None), name, None)
    # -1 is nobody, and not the last one.
    return str if labels is None else lambda index: str(labels[index]) if index >= 0 else str(index)


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

    def write_top_k(self, user_ids: Tensor, item_ids: Tensor, scores: Tensor) -> None:
        """Append a line `{"user": ..., "items": [...], "scores": [...]}` for each user, with external ids.

        Args:
            user_ids: int64 `(batch,)`.
            item_ids: int64 `(batch, k)`, best first.
            scores: `(batch, k)`; `-inf` ends the list of a user with fewer candidates.
        """
        if self._file is None:
            return
        user, item = external_labels(self._module, "user_labels"), external_labels(self._module, "item_labels")
        for row, items, values in zip(user_ids.tolist(), item_ids.tolist(), scores.tolist(), strict=True):
            kept = [(item(i), value) for i, value in zip(items, values, strict=True) if value > -math.inf]
            self.write([{"user": user(row), "items": [i for i, _ in kept], "scores": [v for _, v in kept]}])

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
