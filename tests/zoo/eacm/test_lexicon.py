"""Words of emotions."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
import torch

from zoo.eacm.lexicon import DEFAULT_WORDS, EmotionLexicon, emotion_w, is_neutral

if TYPE_CHECKING:
    from pathlib import Path


def test_the_share_counts_targets_that_are_emotions_with_words() -> None:
    lexicon = EmotionLexicon({"joy": ["Glad", "happy"], "sad": ["cry"]}, ["neutral", "happy", "sadness", "fear"])
    replies = [["i", "am", "GLAD"], ["i", "cry"], ["do", "not", "cry"], ["glad"], ["glad"], []]
    targets = torch.tensor([1, 1, 2, 0, 3, 2])
    # Counted: happy (yes), happy (no), sadness (yes), sadness (no); neutral and fear have no words.
    assert emotion_w(replies, targets, lexicon) == 0.5
    holds, counts = lexicon.said(replies, targets)
    assert holds.tolist() == [True, False, True, False, False, False]
    assert counts.tolist() == [True, True, True, False, False, True]
    assert emotion_w([["glad"]], torch.tensor([0]), lexicon) == 0
    assert emotion_w([], torch.zeros(0, dtype=torch.int64), lexicon) == 0


@pytest.mark.parametrize(
    "names",
    [
        ["neutral", "anger", "disgust", "fear", "happiness", "sadness", "surprise"],
        ["others", "happy", "sad", "angry"],
        ["neutral", "joy", "Surprised", "no_emotion"],
    ],
    ids=["dailydialog", "emocontext", "synonyms"],
)
def test_the_default_words_reach_classes_by_their_synonyms(names: list[str]) -> None:
    lexicon = EmotionLexicon.default(names)
    assert lexicon.has_words.tolist() == [not is_neutral(name) for name in names]
    assert all(lexicon.words_of(label) for label, name in enumerate(names) if not is_neutral(name))


def test_a_default_word_has_one_emotion_and_no_emotion_has_few() -> None:
    words = [word for line in DEFAULT_WORDS.values() for word in line.split()]
    assert len(words) == len(set(words))
    assert all(15 <= len(line.split()) <= 25 for line in DEFAULT_WORDS.values())


def test_both_formats_of_files_are_read_and_what_is_left_out_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "words.tsv"
    path.write_text("glad\tjoy\t1\nsad\tjoy\t0\nover the moon\tjoy\t1\nhope\ttrust\t1\n\nCry\tsadness\n")
    with caplog.at_level(logging.INFO, logger="zoo.eacm.lexicon"):
        lexicon = EmotionLexicon.read(path, ["none", "happiness", "sad", "anger"])
    assert [sorted(lexicon.words_of(label)) for label in range(4)] == [[], ["glad"], ["cry"], []]
    assert "no lexicon words for anger" in caplog.text
    assert "for trust are not used" in caplog.text
    assert "1 lexicon entries of several words" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("glad joy\n", "line 1: 'glad joy', expected lines word<TAB>emotion"),
        ("glad\tjoy\t2\n", "line 1"),
        ("glad\t\n", "line 1"),
        ("hope\ttrust\n", "words for trust, and none of the classes neutral, happy"),
        ("glad\tjoy\t0\n", "none of the classes"),
        ("", "is empty"),
    ],
    ids=["no tab", "flag", "no emotion", "no class", "no word", "empty"],
)
def test_a_bad_file_is_an_error_that_names_it(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "words.tsv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        EmotionLexicon.read(path, ["neutral", "happy"])
    assert "words.tsv" in str(caught.value)


def test_targets_that_do_not_fit_are_errors() -> None:
    lexicon = EmotionLexicon.default(["neutral", "happy"])
    with pytest.raises(ValueError, match="one a reply"):
        lexicon.said([["a"]], torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="target 2 is no class"):
        lexicon.said([["a"]], torch.tensor([2]))
    with pytest.raises(ValueError, match="none of the classes 0, 1"):
        EmotionLexicon.default(["0", "1"])
