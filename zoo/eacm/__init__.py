"""EACM: a chat machine that chooses the emotion of its replies, its siblings, and what they are measured by."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo.eacm.decoder import EmotionDecoder
    from zoo.eacm.decoding import decode
    from zoo.eacm.eacm import EACM, EmoEmb, Seq2Seq
    from zoo.eacm.ecm import ECM
    from zoo.eacm.emotion_metrics import EmotionMetrics, SelectorMetrics
    from zoo.eacm.lexicon import EmotionLexicon
    from zoo.eacm.pooling import SelfAttentionPooling
    from zoo.eacm.reply_metrics import CorpusPerplexity, DialogueMetrics
    from zoo.eacm.selector import EmotionSelector
    from zoo.eacm.steered import SteeredLM
    from zoo.eacm.tagger import EmotionTagger

_HOMES = {
    "CorpusPerplexity": "reply_metrics",
    "DialogueMetrics": "reply_metrics",
    "EACM": "eacm",
    "ECM": "ecm",
    "EmoEmb": "eacm",
    "EmotionDecoder": "decoder",
    "EmotionLexicon": "lexicon",
    "EmotionMetrics": "emotion_metrics",
    "EmotionSelector": "selector",
    "EmotionTagger": "tagger",
    "SelectorMetrics": "emotion_metrics",
    "SelfAttentionPooling": "pooling",
    "Seq2Seq": "eacm",
    "SteeredLM": "steered",
    "decode": "decoding",
}
__all__ = [
    "EACM",
    "ECM",
    "CorpusPerplexity",
    "DialogueMetrics",
    "EmoEmb",
    "EmotionDecoder",
    "EmotionLexicon",
    "EmotionMetrics",
    "EmotionSelector",
    "EmotionTagger",
    "SelectorMetrics",
    "SelfAttentionPooling",
    "Seq2Seq",
    "SteeredLM",
    "decode",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
