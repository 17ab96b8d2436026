"""Parts of speech of words, and which may replace one another."""

from __future__ import annotations

import logging
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from zoo.text_attack.part_of_speech import (
    NLTKTagger,
    PartOfSpeechTagger,
    WordNetTagger,
    same_part_of_speech,
    tagger,
)

if TYPE_CHECKING:
    from pathlib import Path

WORDS = {
    "game": frozenset({"NOUN", "VERB"}),
    "big": frozenset({"ADJ"}),
    "happy": frozenset({"ADJ"}),
    "run": frozenset({"VERB"}),
    "race": frozenset({"VERB"}),
    "woman": frozenset({"NOUN"}),
    "knife": frozenset({"NOUN"}),
    "city": frozenset({"NOUN"}),
    "box": frozenset({"NOUN"}),
    "fast": frozenset({"ADV", "ADJ"}),
}


@pytest.mark.parametrize(
    ("a", "b", "free", "strict"),
    [
        ("NOUN", "NOUN", True, True),
        ("NOUN", "VERB", True, False),
        ("VERB", "NOUN", True, False),
        ("ADJ", "NOUN", False, False),
        ("ADJ|ADV", "ADV", True, True),
        ("NOUN|ADJ", "VERB", True, False),
        ("X", "NOUN", False, False),
        ("X", "X", True, True),
    ],
)
def test_tags_agree_if_they_share_one_and_nouns_may_be_verbs(a: str, b: str, free: bool, strict: bool) -> None:
    assert same_part_of_speech(a, b) is free
    assert same_part_of_speech(a, b, noun_is_verb=False) is strict


def test_wordnet_gives_all_classes_of_a_word_and_of_its_base_form() -> None:
    known = WordNetTagger(WORDS)
    expected = {
        "Game": "NOUN|VERB",
        "games": "NOUN|VERB",
        "bigger": "ADJ",
        "happiest": "ADJ",
        "running": "VERB",
        "racing": "VERB",
        "raced": "VERB",
        "women": "NOUN",
        "knives": "NOUN",
        "Cities": "NOUN",
        "boxes": "NOUN",
        "fast": "ADJ|ADV",
        "The": "DET",
        "for": "ADP",
        "360": "NUM",
        "xbox": "X",
        "s": "X",
        "-": ".",
    }
    assert known.tags([list(expected), [], ["big"]]) == [list(expected.values()), [], ["ADJ"]]
    assert known.tags([["xbox"]]) == [["X"]]
    assert isinstance(known, PartOfSpeechTagger)


def test_names_give_taggers_and_none_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "wordnet_synonyms.tsv").write_text("big\ta\tlarge\n", encoding="utf-8")
    for found in (tagger("wordnet", tmp_path), tagger(tmp_path), tagger(tmp_path / "wordnet_synonyms.tsv")):
        assert found is not None and found.tags([["Big"]]) == [["ADJ"]]
    with caplog.at_level(logging.WARNING):
        assert tagger(None) is None
    assert "no part-of-speech tagger" in caplog.text
    with pytest.raises(ValueError, match=r"part_of_speech='spacy', expected 'nltk', 'wordnet'"):
        tagger("spacy")


def test_a_missing_list_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds wordnet"):
        tagger("wordnet", tmp_path)


def test_nltk_tags_each_text_as_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    library: Any = ModuleType("nltk")
    library.pos_tag_sents = lambda texts, tagset: [[(word, f"{tagset}:{word}") for word in words] for words in texts]
    monkeypatch.setitem(sys.modules, "nltk", library)
    assert NLTKTagger().tags([["a", "b"], [], ["c"]]) == [["universal:a", "universal:b"], [], ["universal:c"]]


def test_nltk_without_its_data_or_itself_names_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(texts: object, tagset: str) -> None:
        raise LookupError("Resource not found")

    library: Any = ModuleType("nltk")
    library.pos_tag_sents = lost
    monkeypatch.setitem(sys.modules, "nltk", library)
    with pytest.raises(FileNotFoundError, match=r"averaged_perceptron_tagger_eng.*wordnet"):
        tagger("nltk")
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(ImportError, match=r"pip install nltk.*wordnet"):
        tagger("nltk")


@pytest.mark.real
def test_words_of_titles_are_tagged_from_the_list_at_hand() -> None:
    found = tagger("wordnet")
    assert found is not None
    assert found.tags([["Wireless", "Controller", "games", "quickly", "Xbox", "360"]]) == [
        ["NOUN", "NOUN", "NOUN|VERB", "ADV", "X", "NUM"]
    ]
