"""One LightningDataModule per kind of data, with the batches it yields.

Names load on first use, so that `import datamodules` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.sequence import SequenceBatch, SequenceData, SequenceTable  # noqa: F401 - for readers and type checkers

DATAMODULES: dict[str, str] = {
    "SequenceData": "datamodules.sequence",
}
"""The LightningDataModules, what `train.py --data` takes, and where each is defined."""

BATCHES: dict[str, str] = {
    "SequenceBatch": "datamodules.sequence",
    "SequenceTable": "datamodules.sequence",
}
"""What they hand to a model, and where each is defined."""

__all__ = [  # noqa: PLE0604, RUF100  (the tables above are the list)
    *DATAMODULES,
    *BATCHES,
]


def __getattr__(name: str) -> Any:
    path = DATAMODULES.get(name) or BATCHES.get(name)
    if path is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(sorted(__all__))}")
    value = getattr(import_module(path), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
