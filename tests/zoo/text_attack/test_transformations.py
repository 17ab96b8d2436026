"""Candidates of one word."""

from __future__ import annotations

import random

import pytest

from zoo.text_attack.stealth import levenshtein
from zoo.text_attack.transformations import (
    HOMOGLYPHS,
    CharacterEdits,
    Homoglyphs,
    InsertBlank,
    InsertMarks,
    MaskedWordSwap,
    SynonymSwap,
    Transformation,
    Union,
    with_case_of,
)
from zoo.text_attack.words import Words

TITLE = Words.of("The Ttt Legend of Zelda: Twilight-Princess 64 x")
SEEDS = range(30)


class Table:
    """Synonyms from a dict."""

    name = "table"

    def __init__(self, table: dict[str, list[str]], cosines: dict[tuple[str, str], float] | None = None) -> None:
        self.table, self.cosines = table, cosines or {}

    def neighbours(self, word: str, count: int) -> list[str]:
        return self.table.get(word, [])[:count]

    def cosine(self, a: str, b: str) -> float | None:
        return self.cosines.get((a, b))


class FixedLanguageModel:
    """Expects the same words everywhere."""

    name = "fixed-lm"

    def __init__(self) -> None:
        self.asked: list[tuple[list[tuple[str, str, str]], str, int, float]] = []

    def word_candidates(
        self, contexts: list[tuple[str, str, str]], method: str, max_candidates: int, min_prob: float
    ) -> list[list[str]]:
        self.asked.append((list(contexts), method, max_candidates, min_prob))
        return [["story", "tale"] for _ in contexts]


def new_words(transformation: Transformation, words: Words, index: int, seed: int = 0) -> list[str]:
    """The new words, after a check that nothing else has changed."""
    found = transformation.candidates(words, index, random.Random(seed))
    for one in found:
        assert one.words[:index] + one.words[index + 1 :] == words.words[:index] + words.words[index + 1 :]
        before, word, after = words.sides(index)
        assert one.text == before + one.words[index] + after and word
    return [one.words[index] for one in found]


@pytest.mark.parametrize("index", range(len(TITLE)))
def test_typing_errors_are_at_most_four_and_each_one_edit_or_one_swap_away(index: int) -> None:
    word = TITLE.words[index]
    for seed in SEEDS:
        found = new_words(CharacterEdits(), TITLE, index, seed)
        assert len(found) == (0 if len(word) == 1 else 3 if len(set(word)) == 1 else 4)
        assert [levenshtein(word, new) for new in found] == [2, 1, 1, 1][4 - len(found) :]


def test_each_kind_of_typing_error_does_what_it_is_called() -> None:
    word = "Zelda"
    words = Words.of(word)
    for seed in SEEDS:
        (swap,) = new_words(CharacterEdits(["swap"]), words, 0, seed)
        (substitute,) = new_words(CharacterEdits(["substitute"]), words, 0, seed)
        (delete,) = new_words(CharacterEdits(["delete"]), words, 0, seed)
        (insert,) = new_words(CharacterEdits(["insert"]), words, 0, seed)
        assert sorted(swap) == sorted(word) and swap != word
        assert len(substitute) == 5 and len(delete) == 4 and len(insert) == 6


def test_typing_errors_come_at_every_position() -> None:
    words = Words.of("abcdef")
    deleted = {new_words(CharacterEdits(["delete"]), words, 0, seed)[0] for seed in range(200)}
    assert len(deleted) == 6
    swapped = {new_words(CharacterEdits(["swap"]), words, 0, seed)[0] for seed in range(200)}
    assert len(swapped) == 5


def test_inner_typing_errors_keep_both_ends() -> None:
    for word in ("ab", "abc", "abcd", "Princess"):
        for seed in SEEDS:
            for new in new_words(CharacterEdits(inner=True), Words.of(word), 0, seed):
                assert new[0] == word[0] and new[-1] == word[-1] and new != word


@pytest.mark.parametrize("index", range(len(TITLE)))
def test_marks_are_two_for_each_inner_place_and_without_them_the_word_is_back(index: int) -> None:
    word = TITLE.words[index]
    found = new_words(InsertMarks(), TITLE, index)
    assert len(found) == len(set(found)) == 2 * (len(word) - 1) or "-" in word
    assert len(found) == 2 * (len(word) - 1)
    for new in found:
        assert new[0] == word[0] and new[-1] == word[-1]
        assert word in {new[:i] + new[i + 1 :] for i in range(1, len(new) - 1) if new[i] in "'-"}


def test_a_blank_goes_inside_a_word_and_the_word_stays_one() -> None:
    for seed in SEEDS:
        (new,) = new_words(InsertBlank(), TITLE, 2, seed)
        assert new.replace(" ", "") == "Legend" and new.count(" ") == 1 and new[0] == "L" and new[-2:] == "nd"
    assert new_words(InsertBlank(), Words.of("of"), 0) == []


@pytest.mark.parametrize("index", range(len(TITLE)))
def test_a_homoglyph_keeps_the_length_and_is_no_ascii_letter(index: int) -> None:
    word = TITLE.words[index]
    for seed in SEEDS:
        for new in new_words(Homoglyphs(), TITLE, index, seed):
            differing = [b for a, b in zip(word, new, strict=True) if a != b]
            assert len(differing) == 1 and not differing[0].isascii()


def test_look_alikes_are_different_characters_outside_ascii() -> None:
    assert len(set(HOMOGLYPHS.values())) == len(HOMOGLYPHS) >= 52
    assert not any(look_alike.isascii() for look_alike in HOMOGLYPHS.values())


@pytest.mark.parametrize(
    ("word", "new", "result"),
    [
        ("turtle", "Tortoise", "tortoise"),
        ("TURTLE", "tortoise", "TORTOISE"),
        ("Turtle", "tortoise", "Tortoise"),
        ("A", "one", "One"),
        ("iPod", "player", "player"),
        ("64", "sixty", "sixty"),
    ],
)
def test_a_new_word_takes_the_case_of_the_old_one(word: str, new: str, result: str) -> None:
    assert with_case_of(word, new) == result


def test_synonyms_are_asked_in_lower_case_and_come_in_the_words_case() -> None:
    swap = SynonymSwap(Table({"legend": ["story", "myth", "tale"]}), max_candidates=2)
    assert new_words(swap, TITLE, 2) == ["Story", "Myth"]
    assert new_words(swap, TITLE, 0) == [] and swap.source_name == "table"


def test_synonyms_below_the_least_cosine_are_left_out_and_unknown_ones_stay() -> None:
    source = Table({"legend": ["story", "myth", "tale"]}, {("legend", "story"): 0.4, ("legend", "myth"): 0.6})
    assert new_words(SynonymSwap(source, min_cosine=0.6), TITLE, 2) == ["Myth", "Tale"]


def test_a_masked_language_model_gets_both_sides_of_the_word_and_its_words_take_the_case() -> None:
    model = FixedLanguageModel()
    swap = MaskedWordSwap(model, "bert-attack", max_candidates=7, min_prob=0.1)  # type: ignore[arg-type]
    assert new_words(swap, TITLE, 2) == ["Story", "Tale"]
    context = ("The Ttt ", "Legend", " of Zelda: Twilight-Princess 64 x")
    assert model.asked == [([context], "bert-attack", 7, 0.1)] and swap.source_name == "fixed-lm"


def test_a_union_gives_the_candidates_of_its_parts_in_order_and_names_their_sources() -> None:
    table = SynonymSwap(Table({"legend": ["story"]}))
    union = Union(InsertMarks("-"), table, table)
    assert (
        new_words(union, Words.of("Legend"), 0)
        == ["L-egend", "Le-gend", "Leg-end", "Lege-nd", "Legen-d"] + ["Story"] * 2
    )
    assert union.source_name == "table" and Union(InsertMarks()).source_name is None


@pytest.mark.parametrize(
    "transformation", [CharacterEdits(), InsertBlank(), Homoglyphs()], ids=lambda t: type(t).__name__
)
def test_chance_comes_from_the_given_generator_alone(transformation: Transformation) -> None:
    state = random.getstate()
    first = [new_words(transformation, TITLE, 5, seed) for seed in SEEDS]
    random.seed(5)
    assert first == [new_words(transformation, TITLE, 5, seed) for seed in SEEDS]
    random.setstate(state)
    new_words(transformation, TITLE, 5)
    assert random.getstate() == state
    assert len({tuple(one) for one in first}) > 1


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"kinds must be some of swap, substitute, delete, insert; got \['turn'\]"):
        CharacterEdits(["turn"])
    with pytest.raises(ValueError, match="kinds must be some of"):
        CharacterEdits([])
    with pytest.raises(ValueError, match="marks must be a text"):
        InsertMarks("")
    with pytest.raises(ValueError, match="method must be one of bae, bert-attack; got 'bert'"):
        MaskedWordSwap(FixedLanguageModel(), "bert")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_candidates must be at least 1, got 0"):
        SynonymSwap(Table({}), 0)
    with pytest.raises(ValueError, match="at least one transformation"):
        Union()
