"""The attacks by name, with the settings of the official code."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zoo.text_attack.attack import TextAttack
from zoo.text_attack.constraints import (
    EditDistance,
    PartOfSpeech,
    ProtectedWords,
    SentenceSimilarity,
    Stopwords,
    WordCosine,
)
from zoo.text_attack.one_shot import Identity, OneShotAttack, RandomEdit, RewriteAttack, TrivialInsertion
from zoo.text_attack.transformations import (
    CharacterEdits,
    Homoglyphs,
    InsertBlank,
    InsertMarks,
    MaskedWordSwap,
    SynonymSwap,
    Union,
)
from zoo.text_attack.word_lists import PROTECTED_WORDS, STOPWORDS, TEXTFOOLER_STOPWORDS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zoo.text_attack.constraints import Constraint, PreConstraint
    from zoo.text_attack.masked_lm import MaskedLanguageModel
    from zoo.text_attack.part_of_speech import PartOfSpeechTagger
    from zoo.text_attack.search import Importance
    from zoo.text_attack.sentence_encoders import SentenceEncoder
    from zoo.text_attack.synonyms import SynonymSource
    from zoo.text_attack.transformations import Transformation

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Settings:
    """What the official code sets for a search recipe."""

    importance: Importance
    stopwords: tuple[str, ...] = STOPWORDS
    max_edit_distance: int | None = None
    min_similarity: float | None = None
    metric: Literal["angular", "cosine"] = "angular"
    reference: Literal["original", "previous"] = "original"
    window: int | None = None
    # The two faults of the official code that `parity` brings back.
    parity_skip_under: int | None = None
    parity_ignores_stopwords: bool = False


_SEARCHES: dict[str, _Settings] = {
    "deepwordbug": _Settings("unk", max_edit_distance=30),
    "punc": _Settings("delete", min_similarity=0.8, parity_ignores_stopwords=True),
    "textfooler": _Settings(
        "delete",
        stopwords=TEXTFOOLER_STOPWORDS,
        min_similarity=0.840845,
        reference="previous",
        window=15,
        parity_skip_under=15,
    ),
    "bae": _Settings("unk", min_similarity=0.8, metric="cosine", parity_ignores_stopwords=True),
    "bertattack": _Settings("unk", min_similarity=0.8, metric="cosine", parity_ignores_stopwords=True),
    "textbugger": _Settings("delete", min_similarity=0.8),
}
_COMMON_OPTIONS = ("importance", "max_edit_distance", "min_similarity", "stopwords", "protected_words", "cache")
_OWN_OPTIONS: dict[str, tuple[str, ...]] = {
    "identity": (),
    "random": ("stopwords", "protected_words"),
    "trivial": ("words", "count", "place"),
    "rewrite": (),
    "deepwordbug": ("kinds",),
    "punc": ("marks",),
    "textfooler": ("max_candidates", "min_cosine"),
    "bae": ("max_candidates", "min_prob"),
    "bertattack": ("max_candidates", "min_prob", "method"),
    "textbugger": ("max_candidates",),
}
RECIPES: tuple[str, ...] = tuple(_OWN_OPTIONS)
"""Names for `build_attack`: no edit, three attacks without a search, and the searches."""

ALWAYS = "always"
_DEFAULT_SIMILARITY = 0.8


def recipe_options(name: str) -> tuple[str, ...]:
    """Names of the options that a recipe takes besides those of `build_attack` itself, sorted.

    Raises:
        ValueError: If there is no such recipe.
    """
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}; the recipes are {', '.join(RECIPES)}")
    return tuple(sorted((*_OWN_OPTIONS[name], *(_COMMON_OPTIONS if name in _SEARCHES else ()))))


def build_attack(
    name: str,
    *,
    parity: bool = False,
    synonyms: SynonymSource | str | Path | None = None,
    sentence_encoder: SentenceEncoder | None = None,
    masked_lm: MaskedLanguageModel | str | Path | None = None,
    part_of_speech: PartOfSpeechTagger | str | Path | None = None,
    rewrites: Callable[[list[str]], Sequence[str]] | str | Path | None = None,
    delta: float | None = 0.05,
    budget: int | None = None,
    unk: str | None = "[UNK]",
    seed: int = 42,
    **over: Any,
) -> TextAttack | OneShotAttack:
    """An attack by the name of its recipe.

    Options beyond the named arguments change a recipe: all searches take `importance`, `max_edit_distance` (None for no
    limit), `min_similarity` (a number; None for no check; "always" for the recipe's own number, or 0.8 where it has
    none, checked for titles of every length), `stopwords` and `protected_words` (lists) and `cache`; `deepwordbug`
    takes `kinds`, `punc` `marks`, `textfooler` `max_candidates` and `min_cosine`, `bae` and `bertattack`
    `max_candidates` and `min_prob`, `bertattack` `method`, `textbugger` `max_candidates`, `trivial` `words`, `count`
    and `place`. The strict setting is `max_edit_distance=4, min_similarity="always"`.

    Args:
        name: One of `RECIPES`. `bae` is what the official code runs as "bertattack"; `bertattack` is the published
            BERT-Attack, unless `parity`.
        parity: Bring back the official code's faults: stopwords compared with their case, and not at all in `punc`,
            `bae` and `bertattack`; no similarity check of TextFooler's in titles under 15 words; BAE as `bertattack`.
        synonyms: Source of synonyms, for `textfooler` and `textbugger`, or what `synonym_source` takes.
        sentence_encoder: Encoder of the similarity constraint. Without one a recipe's similarity is not checked, which
            is logged as a warning.
        masked_lm: Masked language model, for `bae` and `bertattack`, or its folder or hub id.
        part_of_speech: Tagger, for `textfooler`, or what `tagger` takes; None lets swaps change a word's class, which
            is logged as a warning.
        rewrites: For `rewrite`: a rewriter, or a file of ready ones, see `RewriteAttack`.
        delta: Rise of the goal that ends a search, or None.
        budget: Queries allowed for one title, or None.
        unk: The victim's token for an unknown word, or None if it has none.
        seed: Seed of all chance.
        **over: Options of the recipe.

    Raises:
        ValueError: If the recipe or an option is unknown, an option is out of its range, or a part is missing that the
            recipe cannot do without.
        FileNotFoundError: If a source of synonyms or a model is missing.
    """
    known = recipe_options(name)
    unknown = sorted(set(over) - set(known))
    if unknown:
        raise ValueError(
            f"recipe {name!r} has no option {', '.join(unknown)}; its options are {', '.join(known) or 'none'}"
        )
    if name not in _SEARCHES:
        return _one_shot(name, rewrites, seed, over)
    transformation = _transformation(name, parity, synonyms, masked_lm, over)
    return TextAttack(
        transformation,
        _constraints(name, parity, transformation, sentence_encoder, part_of_speech, over),
        importance=over.get("importance", _SEARCHES[name].importance),
        unk=unk,
        delta=delta,
        budget=budget,
        cache=over.get("cache", True),
        seed=seed,
        recipe=name,
    )


def _one_shot(
    name: str, rewrites: Callable[[list[str]], Sequence[str]] | str | Path | None, seed: int, over: dict[str, Any]
) -> OneShotAttack:
    if name == "identity":
        return Identity(seed=seed)
    if name == "random":
        return RandomEdit(**over, seed=seed)
    if name == "trivial":
        return TrivialInsertion(**over, seed=seed)
    if rewrites is None:
        raise ValueError(
            'recipe \'rewrite\' needs rewrites: a file of lines {"item_id": 3, "text": "..."}, or a rewriter such as '
            "LanguageModelRewriter"
        )
    return RewriteAttack(rewrites, seed=seed)


def _transformation(
    name: str,
    parity: bool,
    synonyms: SynonymSource | str | Path | None,
    masked_lm: MaskedLanguageModel | str | Path | None,
    over: dict[str, Any],
) -> Transformation:
    if name == "deepwordbug":
        return CharacterEdits(**_only(over, CharacterEdits))
    if name == "punc":
        return InsertMarks(**_only(over, InsertMarks))
    if name in ("bae", "bertattack"):
        options: dict[str, Any] = {"method": "bae" if parity or name == "bae" else "bert-attack"}
        return MaskedWordSwap(_masked_lm(name, masked_lm), **{**options, **_only(over, MaskedWordSwap)})
    source = _synonyms(synonyms)
    if name == "textfooler":
        return SynonymSwap(source, over.get("max_candidates", 50))
    return Union(
        InsertBlank(),
        CharacterEdits(("delete", "swap"), inner=True),
        Homoglyphs(),
        SynonymSwap(source, over.get("max_candidates", 5)),
    )


def _constraints(
    name: str,
    parity: bool,
    transformation: Transformation,
    encoder: SentenceEncoder | None,
    part_of_speech: PartOfSpeechTagger | str | Path | None,
    over: dict[str, Any],
) -> list[PreConstraint | Constraint]:
    settings = _SEARCHES[name]
    constraints: list[PreConstraint | Constraint] = [ProtectedWords(over.get("protected_words", PROTECTED_WORDS))]
    if not (parity and settings.parity_ignores_stopwords):
        constraints.append(Stopwords(over.get("stopwords", settings.stopwords), case_sensitive=parity))
    max_distance = over.get("max_edit_distance", settings.max_edit_distance)
    if max_distance is not None:
        constraints.append(EditDistance(max_distance))
    if name == "textfooler" and isinstance(transformation, SynonymSwap):
        constraints.append(WordCosine(transformation.source, over.get("min_cosine", 0.6)))
        tagger = _tagger(part_of_speech)
        if tagger is not None:
            constraints.append(PartOfSpeech(tagger))
    constraints += _similarity(name, parity, encoder, over)
    return constraints


def _similarity(
    name: str, parity: bool, encoder: SentenceEncoder | None, over: dict[str, Any]
) -> list[SentenceSimilarity]:
    settings = _SEARCHES[name]
    wanted = over.get("min_similarity", settings.min_similarity)
    if wanted is None:
        return []
    always = wanted == ALWAYS
    least = (settings.min_similarity or _DEFAULT_SIMILARITY) if always else wanted
    if encoder is None:
        if "min_similarity" in over:
            raise ValueError(
                f"min_similarity={wanted!r} needs a sentence_encoder, such as sentence_encoder('tfidf', titles)"
            )
        _log.warning(
            "recipe %s asks for a sentence similarity of at least %g, which is not checked: no sentence_encoder",
            name,
            least,
        )
        return []
    if not isinstance(least, int | float):
        raise ValueError(f"min_similarity must be a number, None or {ALWAYS!r}; got {wanted!r}")
    skip = settings.parity_skip_under if parity and not always else None
    return [SentenceSimilarity(encoder, least, settings.metric, settings.reference, settings.window, skip)]


def _synonyms(given: SynonymSource | str | Path | None) -> SynonymSource:
    if given is None or isinstance(given, str | Path):
        from zoo.text_attack.synonyms import synonym_source

        return synonym_source(given)
    return given


def _masked_lm(name: str, given: MaskedLanguageModel | str | Path | None) -> MaskedLanguageModel:
    if given is None:
        raise ValueError(
            f"recipe {name!r} needs masked_lm, a masked language model's folder or hub id such as bert-base-uncased; "
            "recipe 'deepwordbug' needs no model"
        )
    if isinstance(given, str | Path):
        from zoo.text_attack.masked_lm import MaskedLanguageModel

        return MaskedLanguageModel(given)
    return given


def _tagger(given: PartOfSpeechTagger | str | Path | None) -> PartOfSpeechTagger | None:
    if given is None or isinstance(given, str | Path):
        from zoo.text_attack.part_of_speech import tagger

        return tagger(given)
    return given


def _only(over: dict[str, Any], made: Callable[..., Any]) -> dict[str, Any]:
    """The options that a class takes."""
    taken = inspect.signature(made).parameters
    return {name: value for name, value in over.items() if name in taken}
