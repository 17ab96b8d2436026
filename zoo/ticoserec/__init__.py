"""TiCoSeRec: time-interval-aware augmentation for sequential recommendation, and its siblings."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo.ticoserec.augment import TiAugmenter, ViewPolicy
    from zoo.ticoserec.encoder import GRU4RecEncoder, SASRecEncoder
    from zoo.ticoserec.module import TiCoSeRec
    from zoo.ticoserec.popularity import Popularity
    from zoo.ticoserec.sasrec import SASRec
    from zoo.ticoserec.siblings import CL4SRec, CoSeRec
    from zoo.ticoserec.similarity import ItemSimilarity

_HOMES = {
    "CL4SRec": "siblings",
    "CoSeRec": "siblings",
    "GRU4RecEncoder": "encoder",
    "ItemSimilarity": "similarity",
    "Popularity": "popularity",
    "SASRec": "sasrec",
    "SASRecEncoder": "encoder",
    "TiAugmenter": "augment",
    "TiCoSeRec": "module",
    "ViewPolicy": "augment",
}
__all__ = [
    "CL4SRec",
    "CoSeRec",
    "GRU4RecEncoder",
    "ItemSimilarity",
    "Popularity",
    "SASRec",
    "SASRecEncoder",
    "TiAugmenter",
    "TiCoSeRec",
    "ViewPolicy",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
