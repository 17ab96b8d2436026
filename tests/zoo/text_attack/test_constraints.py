"""Which words may be edited, and which edits may be submitted."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

from zoo.text_attack.constraints import (
    Constraint,
    EditDistance,
    PartOfSpeech,
    PreConstraint,
    ProtectedWords,
    ReadableWords,
    SentenceSimilarity,
    Stopwords,
    WordCosine,
    accepted,
)
from zoo.text_attack.stealth import levenshtein
from zoo.text_attack.word_lists import POSITIVE_WORDS, STOPWORDS, TEXTFOOLER_STOPWORDS
from zoo.text_attack.words import Words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Angles:
    """A text's vector points where its words say: the sum of degrees in it."""

    name = "angles"

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def encode(self, texts: Sequence[str]) -> Tensor:
        self.calls.append(list(texts))
        angles = torch.tensor([sum(int(word) for word in text.split()) for text in texts]) * (math.pi / 180)
        return torch.stack([angles.cos(), angles.sin()], dim=1)


class LengthTagger:
    """Nouns are short, verbs are of six letters, the rest are adverbs."""

    name = "length"

    def __init__(self) -> None:
        self.calls: list[list[list[str]]] = []

    def tags(self, texts: Sequence[Sequence[str]]) -> list[list[str]]:
        self.calls.append([list(text) for text in texts])
        return [["NOUN" if len(w) < 6 else "VERB" if len(w) == 6 else "ADV" for w in text] for text in texts]


class Cosines:
    """Cosines from a dict."""

    name = "cosines"

    def neighbours(self, word: str, count: int) -> list[str]:
        return []

    def cosine(self, a: str, b: str) -> float | None:
        return {("legend", "story"): 0.7, ("legend", "table"): 0.1}.get((a, b))


def edits(words: Words, index: int, *new: str) -> list[Words]:
    return [words.replaced(index, one) for one in new]


def test_stopwords_are_left_alone_also_when_capitalised() -> None:
    words = Words.of("The Legend OF the Zelda don't Don’t And")  # noqa: RUF001 - a typographic apostrophe
    assert Stopwords().modifiable(words) == {1, 4}
    assert Stopwords(None).modifiable(words) == set(range(8))
    assert Stopwords(("legend",)).modifiable(words) == {0, 2, 3, 4, 5, 6, 7}


def test_the_official_comparison_of_stopwords_lets_capitalised_ones_through() -> None:
    assert Stopwords(case_sensitive=True).modifiable(Words.of("The Legend of the")) == {0, 1}


def test_protected_words_are_left_alone_wherever_they_stand() -> None:
    words = Words.of("Title Turtle Beach brand BRAND branded")
    assert ProtectedWords().modifiable(words) == {1, 2, 5}
    assert ProtectedWords(["Turtle", "beach"]).modifiable(words) == {0, 3, 4, 5}


def test_words_after_what_is_read_are_left_alone() -> None:
    words = Words.of("Mario Kart Wii")
    assert ReadableWords(99).modifiable(words) == {0, 1, 2}
    assert ReadableWords(7).modifiable(words) == {0, 1}  # "Kart" is read in part
    assert ReadableWords(6).modifiable(words) == {0}
    assert ReadableWords(0).modifiable(words) == set()


def test_the_lists_are_lower_case_words_without_repeats() -> None:
    for words in (STOPWORDS, TEXTFOOLER_STOPWORDS, POSITIVE_WORDS):
        assert len(set(words)) == len(words) >= 30
        assert all(word == word.lower().strip() and word for word in words)
    assert set(STOPWORDS) < set(TEXTFOOLER_STOPWORDS) and not set(STOPWORDS) & set(POSITIVE_WORDS)


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 30])
def test_the_edit_limit_is_that_of_the_whole_text_against_the_original(limit: int) -> None:
    original = Words.of("Mario Kart Wii")
    previous = original.replaced(0, "Mairo")
    candidates = edits(previous, 1, "Kart", "Karrt", "Krat", "Racing", "Wii", "K art")
    answers = EditDistance(limit).accept(original, previous, candidates, 1)
    assert answers == [levenshtein(original.text, one.text) <= limit for one in candidates]
    assert limit == 30 or False in answers


def test_the_edit_limit_counts_what_words_share_across_their_borders() -> None:
    original = Words.of("abcdef abcdef")
    candidate = original.replaced(0, "xabcdef")
    assert EditDistance(1).accept(original, original, [candidate], 0) == [True]


def test_a_word_cosine_is_to_the_original_word_and_unknown_words_pass() -> None:
    original = Words.of("Legend of")
    previous = original.replaced(0, "Story")
    answers = WordCosine(Cosines(), 0.6).accept(original, previous, edits(previous, 0, "Story", "Table", "Myth"), 0)
    assert answers == [True, False, True]


def test_a_part_of_speech_stays_that_of_the_original_word_in_its_surroundings() -> None:
    tagger = LengthTagger()
    original = Words.of("a b c d e Cat f g h i j")
    previous = original.replaced(4, "changed")
    candidates = edits(previous, 5, "Dog", "chased", "quickly")
    assert PartOfSpeech(tagger).accept(original, previous, candidates, 5) == [True, True, False]
    assert PartOfSpeech(tagger, noun_is_verb=False).accept(original, previous, candidates, 5) == [True, False, False]
    assert len(tagger.calls) == 2  # one a batch
    assert tagger.calls[0][:2] == [["b", "c", "d", "e", word, "f", "g", "h", "i"] for word in ("Cat", "Dog")]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"metric": "angular", "min_similarity": 0.8}, [1.0, 0.75, 0.5]),
        ({"metric": "cosine", "min_similarity": 0.8}, [1.0, math.sqrt(0.5), 0.0]),
        ({"metric": "angular", "min_similarity": 0.8, "reference": "previous"}, [2 / 3, 1 - 15 / 180, 5 / 6]),
    ],
    ids=["angular", "cosine", "previous"],
)
def test_similarity_is_that_of_the_metric_to_the_reference(options: dict[str, Any], expected: list[float]) -> None:
    encoder = Angles()
    check = SentenceSimilarity(encoder, **options)
    original = Words.of("0 0")
    previous = original.replaced(0, "60")
    candidates = [original, original.replaced(1, "45"), original.replaced(1, "90")]
    found = check.similarities(original, previous, candidates, 1)
    assert found is not None
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    assert len(encoder.calls) == 1 and len(encoder.calls[0]) == 4
    assert check.accept(original, previous, candidates, 1) == [value >= 0.8 for value in expected]


def test_the_least_similarity_itself_is_enough() -> None:
    original = Words.of("0 0")
    candidates = [original, original.replaced(1, "45")]
    check = SentenceSimilarity(Angles(), 1.0, metric="cosine")
    similarities = check.similarities(original, original, candidates, 1)
    assert similarities is not None
    check.min_similarity = float(similarities[1])
    assert check.accept(original, original, candidates, 1) == [True, True]


def test_a_window_compares_the_words_around_the_edit_alone() -> None:
    encoder = Angles()
    original = Words.of("10 20 30 40 50 60")
    SentenceSimilarity(encoder, window=3).accept(original, original, edits(original, 2, "31"), 2)
    assert encoder.calls == [["20 30 40", "20 31 40"]]


def test_short_titles_are_checked_unless_the_official_skip_is_asked_for() -> None:
    original = Words.of("0 0 0")
    candidates = edits(original, 0, "180")
    assert SentenceSimilarity(Angles(), window=15).accept(original, original, candidates, 0) == [False]
    skipping = SentenceSimilarity(Angles(), skip_under=4)
    assert skipping.accept(original, original, candidates, 0) == [True]
    assert skipping.similarities(original, original, candidates, 0) is None
    assert SentenceSimilarity(Angles(), skip_under=3).accept(original, original, candidates, 0) == [False]


def test_a_constraint_sees_what_passed_those_before_it_and_none_is_asked_about_nothing() -> None:
    encoder = Angles()
    original = Words.of("1 2")
    candidates = edits(original, 0, "1234567", "3")
    checks: list[Constraint] = [EditDistance(2), SentenceSimilarity(encoder)]
    assert accepted(checks, original, original, candidates, 0) == candidates[1:]
    assert encoder.calls == [["1 2", "3 2"]]
    assert accepted([EditDistance(1), SentenceSimilarity(encoder)], original, original, candidates[:1], 0) == []
    assert len(encoder.calls) == 1


def test_the_two_kinds_are_told_apart() -> None:
    for before in (Stopwords(), ProtectedWords(), ReadableWords(3)):
        assert isinstance(before, PreConstraint) and not isinstance(before, Constraint)
    for check in (EditDistance(), WordCosine(Cosines()), PartOfSpeech(LengthTagger()), SentenceSimilarity(Angles())):
        assert isinstance(check, Constraint) and not isinstance(check, PreConstraint)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="largest edit distance must be at least 1, got 0"):
        EditDistance(0)
    with pytest.raises(ValueError, match=r"min_cosine must lie in -1\.\.1, got 1\.5"):
        WordCosine(Cosines(), 1.5)
    with pytest.raises(ValueError, match=r"min_similarity must lie in 0\.\.1, got -0\.5"):
        SentenceSimilarity(Angles(), -0.5)
    with pytest.raises(ValueError, match="metric must be one of angular, cosine; got 'dot'"):
        SentenceSimilarity(Angles(), metric="dot")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reference must be one of original, previous; got 'last'"):
        SentenceSimilarity(Angles(), reference="last")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="window must be at least 1 word or None, got 0"):
        SentenceSimilarity(Angles(), window=0)
