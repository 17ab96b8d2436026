"""Summary-MRC: options filled into the question, whole sentences matched with the passage, and its siblings."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo.summary_mrc.cloze_scorer import ClozeScorer
    from zoo.summary_mrc.encoders import build_text_encoder, save_text_encoder
    from zoo.summary_mrc.ga_reader import GAReader
    from zoo.summary_mrc.masked_lm import MaskedLM
    from zoo.summary_mrc.matching import SummaryMatcher
    from zoo.summary_mrc.metrics import ChoiceAccuracy, TieRate
    from zoo.summary_mrc.module import SummaryMRC
    from zoo.summary_mrc.reader import GatedAttentionReader
    from zoo.summary_mrc.slot_scorer import MaskedSlotScorer
    from zoo.summary_mrc.submission import read_submission, write_submission

_HOMES = {
    "ChoiceAccuracy": "metrics",
    "ClozeScorer": "cloze_scorer",
    "GAReader": "ga_reader",
    "GatedAttentionReader": "reader",
    "MaskedLM": "masked_lm",
    "MaskedSlotScorer": "slot_scorer",
    "SummaryMRC": "module",
    "SummaryMatcher": "matching",
    "TieRate": "metrics",
    "build_text_encoder": "encoders",
    "read_submission": "submission",
    "save_text_encoder": "encoders",
    "write_submission": "submission",
}
__all__ = [
    "ChoiceAccuracy",
    "ClozeScorer",
    "GAReader",
    "GatedAttentionReader",
    "MaskedLM",
    "MaskedSlotScorer",
    "SummaryMRC",
    "SummaryMatcher",
    "TieRate",
    "build_text_encoder",
    "read_submission",
    "save_text_encoder",
    "write_submission",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
