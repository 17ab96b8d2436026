"""Attacks on the titles that text-based recommenders read: victims, attacks, exposure and defences, in memory."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo.text_attack.aggregate import summarise
    from zoo.text_attack.attack import AttackResult, TextAttack
    from zoo.text_attack.attack_log import AttackLog
    from zoo.text_attack.attack_module import TextAttackModule
    from zoo.text_attack.attack_views import ExposureView
    from zoo.text_attack.collm import CoLLMRec
    from zoo.text_attack.constraints import EditDistance, ProtectedWords, SentenceSimilarity, Stopwords
    from zoo.text_attack.defenses import SpellDefense
    from zoo.text_attack.detector import PerplexityDetector
    from zoo.text_attack.exposure import ExposureRate, thresholds, top_scores
    from zoo.text_attack.goals import ExposureGoal, PropensityGoal, SoftExposureGoal, goal_function
    from zoo.text_attack.p5 import P5Rec
    from zoo.text_attack.recformer import RecFormer
    from zoo.text_attack.recformer_rec import RecFormerRec
    from zoo.text_attack.recipes import build_attack
    from zoo.text_attack.rewriting import LMRewriteDefense
    from zoo.text_attack.search import GreedyWordSwap
    from zoo.text_attack.stealth import TextStealth
    from zoo.text_attack.synonyms import synonym_source
    from zoo.text_attack.tallrec import TALLRec
    from zoo.text_attack.transfer import TransferStudy
    from zoo.text_attack.transformations import CharacterEdits, InsertMarks, SynonymSwap
    from zoo.text_attack.victim import TextRecVictim
    from zoo.text_attack.victims import load_victim
    from zoo.text_attack.words import Words

_HOMES = {
    "AttackLog": "attack_log",
    "AttackResult": "attack",
    "CharacterEdits": "transformations",
    "CoLLMRec": "collm",
    "EditDistance": "constraints",
    "ExposureGoal": "goals",
    "ExposureRate": "exposure",
    "ExposureView": "attack_views",
    "GreedyWordSwap": "search",
    "InsertMarks": "transformations",
    "LMRewriteDefense": "rewriting",
    "P5Rec": "p5",
    "PerplexityDetector": "detector",
    "PropensityGoal": "goals",
    "ProtectedWords": "constraints",
    "RecFormer": "recformer",
    "RecFormerRec": "recformer_rec",
    "SentenceSimilarity": "constraints",
    "SoftExposureGoal": "goals",
    "SpellDefense": "defenses",
    "Stopwords": "constraints",
    "SynonymSwap": "transformations",
    "TALLRec": "tallrec",
    "TextAttack": "attack",
    "TextAttackModule": "attack_module",
    "TextRecVictim": "victim",
    "TextStealth": "stealth",
    "TransferStudy": "transfer",
    "Words": "words",
    "build_attack": "recipes",
    "goal_function": "goals",
    "load_victim": "victims",
    "summarise": "aggregate",
    "synonym_source": "synonyms",
    "thresholds": "exposure",
    "top_scores": "exposure",
}
__all__ = [
    "AttackLog",
    "AttackResult",
    "CharacterEdits",
    "CoLLMRec",
    "EditDistance",
    "ExposureGoal",
    "ExposureRate",
    "ExposureView",
    "GreedyWordSwap",
    "InsertMarks",
    "LMRewriteDefense",
    "P5Rec",
    "PerplexityDetector",
    "PropensityGoal",
    "ProtectedWords",
    "RecFormer",
    "RecFormerRec",
    "SentenceSimilarity",
    "SoftExposureGoal",
    "SpellDefense",
    "Stopwords",
    "SynonymSwap",
    "TALLRec",
    "TextAttack",
    "TextAttackModule",
    "TextRecVictim",
    "TextStealth",
    "TransferStudy",
    "Words",
    "build_attack",
    "goal_function",
    "load_victim",
    "summarise",
    "synonym_source",
    "thresholds",
    "top_scores",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
