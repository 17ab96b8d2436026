"""Attacks by name."""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch

from zoo.text_attack.attack import TextAttack
from zoo.text_attack.constraints import (
    EditDistance,
    PartOfSpeech,
    ProtectedWords,
    SentenceSimilarity,
    Stopwords,
    WordCosine,
)
from zoo.text_attack.one_shot import Identity, RandomEdit, RewriteAttack, TrivialInsertion
from zoo.text_attack.recipes import RECIPES, build_attack, recipe_options
from zoo.text_attack.search import GreedyWordSwap
from zoo.text_attack.transformations import CharacterEdits, InsertMarks, MaskedWordSwap, SynonymSwap, Union
from zoo.text_attack.word_lists import STOPWORDS, TEXTFOOLER_STOPWORDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

SEARCHES = ("deepwordbug", "punc", "textfooler", "bae", "bertattack", "textbugger")


class Thesaurus:
    """Three synonyms for any word."""

    name = "thesaurus"

    def neighbours(self, word: str, count: int) -> list[str]:
        return [word + "s", word + "er", word + "ing"][:count]

    def cosine(self, a: str, b: str) -> float | None:
        return 0.65


class Encoder:
    """All texts are alike."""

    name = "unit"

    def encode(self, texts: Sequence[str]) -> Tensor:
        return torch.ones(len(texts), 1)


class Tagger:
    """All words are nouns."""

    name = "nouns"

    def tags(self, texts: Sequence[Sequence[str]]) -> list[list[str]]:
        return [["NOUN"] * len(text) for text in texts]


class LanguageModel:
    """Expects the same words everywhere."""

    name = "lm"

    def word_candidates(self, contexts: Any, method: str, max_candidates: int, min_prob: float) -> list[list[str]]:
        return [["great", "good"] for _ in contexts]


PARTS: dict[str, Any] = {
    "synonyms": Thesaurus(),
    "sentence_encoder": Encoder(),
    "masked_lm": LanguageModel(),
    "part_of_speech": Tagger(),
    "rewrites": lambda titles: [title + "!" for title in titles],
}


def search_of(name: str, **options: Any) -> TextAttack:
    attack = build_attack(name, **{**PARTS, **options})
    assert isinstance(attack, TextAttack)
    return attack


def part(attack: TextAttack, kind: type) -> Any:
    """The constraint of a kind, or None."""
    found = [one for one in (*attack._before, *attack._checks) if isinstance(one, kind)]
    assert len(found) <= 1
    return found[0] if found else None


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_attacks_a_title_and_signs_its_result(name: str) -> None:
    def goal(texts: list[str]) -> list[float]:
        return [0.0 if text == title else random.Random(text).random() for text in texts]

    title = "The Legend of Zelda Twilight"
    attack = build_attack(name, **PARTS, delta=None, seed=3)
    results = [attack.attack(title, goal, item_id=item) for item in range(3)]
    assert all(result.recipe == name and result.seed == 3 for result in results)
    assert (name == "identity") == all(result.perturbed == result.original for result in results)
    assert (name in SEARCHES) == all(result.n_queries > 0 for result in results)
    assert all(result.original.startswith("The ") for result in results)


@pytest.mark.parametrize(
    ("name", "transformation", "importance", "stopwords", "edits", "similarity"),
    [
        ("deepwordbug", CharacterEdits, "unk", STOPWORDS, 30, None),
        ("punc", InsertMarks, "delete", STOPWORDS, None, (0.8, "angular", "original", None)),
        ("textfooler", SynonymSwap, "delete", TEXTFOOLER_STOPWORDS, None, (0.840845, "angular", "previous", 15)),
        ("bae", MaskedWordSwap, "unk", STOPWORDS, None, (0.8, "cosine", "original", None)),
        ("bertattack", MaskedWordSwap, "unk", STOPWORDS, None, (0.8, "cosine", "original", None)),
        ("textbugger", Union, "delete", STOPWORDS, None, (0.8, "angular", "original", None)),
    ],
    ids=SEARCHES,
)
def test_a_search_has_the_official_settings_and_always_checks(
    name: str,
    transformation: type,
    importance: str,
    stopwords: tuple[str, ...],
    edits: int | None,
    similarity: tuple[Any, ...] | None,
) -> None:
    attack = search_of(name)
    assert isinstance(attack.transformation, transformation)
    assert isinstance(attack.search, GreedyWordSwap) and attack.search.importance == importance
    assert part(attack, Stopwords).words == frozenset(stopwords) and not part(attack, Stopwords).case_sensitive
    assert part(attack, ProtectedWords).words == {"title", "brand", "category"}
    limit, check = part(attack, EditDistance), part(attack, SentenceSimilarity)
    assert (limit.max_distance if limit else None) == edits
    assert ((check.min_similarity, check.metric, check.reference, check.window) if check else None) == similarity
    assert check is None or check.skip_under is None
    assert (part(attack, WordCosine) is not None) == (part(attack, PartOfSpeech) is not None) == (name == "textfooler")


def test_numbers_of_candidates_and_methods_are_the_official_ones() -> None:
    textfooler, bae, bertattack = (search_of(name).transformation for name in ("textfooler", "bae", "bertattack"))
    assert isinstance(textfooler, SynonymSwap) and textfooler.max_candidates == 50
    assert part(search_of("textfooler"), WordCosine).min_cosine == 0.6
    assert isinstance(bae, MaskedWordSwap) and isinstance(bertattack, MaskedWordSwap)
    assert (bae.max_candidates, bae.min_prob, bae.method) == (48, 5e-4, "bae")
    assert (bertattack.max_candidates, bertattack.min_prob, bertattack.method) == (48, 5e-4, "bert-attack")
    textbugger = search_of("textbugger").transformation
    assert isinstance(textbugger, Union)
    assert [type(one).__name__ for one in textbugger.transformations] == [
        "InsertBlank",
        "CharacterEdits",
        "Homoglyphs",
        "SynonymSwap",
    ]
    assert textbugger.transformations[1].kinds == ("delete", "swap")  # type: ignore[attr-defined]
    assert textbugger.transformations[3].max_candidates == 5  # type: ignore[attr-defined]


def test_parity_brings_back_the_faults_of_the_official_code() -> None:
    assert part(search_of("textfooler", parity=True), SentenceSimilarity).skip_under == 15
    for name in ("punc", "bae", "bertattack"):
        assert part(search_of(name, parity=True), Stopwords) is None
        assert part(search_of(name, parity=True), SentenceSimilarity).skip_under is None
    for name in ("deepwordbug", "textfooler", "textbugger"):
        assert part(search_of(name, parity=True), Stopwords).case_sensitive
    transformation = search_of("bertattack", parity=True).transformation
    assert isinstance(transformation, MaskedWordSwap) and transformation.method == "bae"


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("parity", [False, True], ids=["plain", "parity"])
def test_the_strict_setting_limits_edits_and_always_checks_the_meaning(name: str, parity: bool) -> None:
    attack = search_of(name, parity=parity, max_edit_distance=4, min_similarity="always")
    check = part(attack, SentenceSimilarity)
    assert part(attack, EditDistance).max_distance == 4 and check.skip_under is None
    assert check.min_similarity == (0.840845 if name == "textfooler" else 0.8)


def test_options_change_a_recipe() -> None:
    attack = search_of(
        "punc",
        marks="*",
        importance="random",
        min_similarity=0.5,
        stopwords=["mario"],
        protected_words=["kart"],
        cache=False,
    )
    assert attack.transformation.marks == "*" and attack.search.importance == "random" and not attack.cache  # type: ignore[attr-defined]
    assert part(attack, SentenceSimilarity).min_similarity == 0.5
    assert part(attack, Stopwords).words == {"mario"} and part(attack, ProtectedWords).words == {"kart"}
    assert part(search_of("deepwordbug", max_edit_distance=None), EditDistance) is None
    assert part(search_of("punc", min_similarity=None, sentence_encoder=None), SentenceSimilarity) is None
    assert search_of("deepwordbug", kinds=["swap"]).transformation.kinds == ("swap",)  # type: ignore[attr-defined]
    assert search_of("bertattack", method="bae").transformation.method == "bae"  # type: ignore[attr-defined]
    plain = search_of("deepwordbug", delta=None, budget=9, unk="<unk>", seed=5)
    assert (plain.delta, plain.budget, plain.seed, plain.search.unk) == (None, 9, 5, "<unk>")  # type: ignore[attr-defined]


def test_attacks_without_a_search_get_their_options() -> None:
    assert isinstance(build_attack("identity"), Identity) and isinstance(build_attack("random"), RandomEdit)
    trivial = build_attack("trivial", words=["x", "y"], count=1, place="start")
    assert isinstance(trivial, TrivialInsertion) and (trivial.count, trivial.place) == (1, "start")
    assert isinstance(build_attack("rewrite", **PARTS), RewriteAttack)


def test_unknown_names_and_options_are_answered_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="no recipe 'bug'; the recipes are identity, random, trivial, rewrite, deepwordbug"
    ):
        build_attack("bug")
    with pytest.raises(ValueError, match=r"'punc' has no option speed, word; its options are cache, .*marks"):
        build_attack("punc", speed=1, word=2)
    with pytest.raises(ValueError, match="'identity' has no option count; its options are none"):
        build_attack("identity", count=1)
    assert recipe_options("trivial") == ("count", "place", "words")


def test_missing_parts_are_named() -> None:
    with pytest.raises(FileNotFoundError, match="no source of synonyms"):
        build_attack("textfooler")
    with pytest.raises(ValueError, match=r"'bae' needs masked_lm.*deepwordbug"):
        build_attack("bae")
    with pytest.raises(ValueError, match="'rewrite' needs rewrites"):
        build_attack("rewrite")
    with pytest.raises(ValueError, match=r"min_similarity=0\.7 needs a sentence_encoder"):
        build_attack("deepwordbug", min_similarity=0.7)
    with pytest.raises(ValueError, match="min_similarity must be a number, None or 'always'; got 'often'"):
        search_of("deepwordbug", min_similarity="often")
    with pytest.raises(ValueError, match="budget must be at least 1"):
        build_attack("deepwordbug", budget=0)


def test_a_similarity_that_is_not_checked_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        attack = search_of("punc", sentence_encoder=None)
    assert part(attack, SentenceSimilarity) is None and attack.encoder is None
    assert "recipe punc asks for a sentence similarity of at least 0.8, which is not checked" in caplog.text


def test_swaps_without_a_tagger_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        attack = search_of("textfooler", part_of_speech=None)
    assert part(attack, PartOfSpeech) is None and len(caplog.records) >= 1
