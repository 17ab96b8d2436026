from __future__ import annotations

import logging

import pytest

from datamodules.sources.cloze_overlap import article_key, drop_overlap, shared_articles, warn_of_overlap
from tests.datamodules.sources.cloze_questions import questions

ARTICLES = ["Only here.", "The Queen, 90, said: no.", "Another one.", "the queen 90 said no", "", "—"]
HELD_OUT = ["THE  QUEEN\n90 said:\tno!", "Another", "", "!"]


def test_copies_of_a_passage_have_one_key_whatever_their_case_and_spaces():
    assert article_key("The Queen, 90,\r\n said: “Nein”!") == article_key("the  QUEEN 90 said nein")
    assert article_key("Änderung_1") == article_key("änderung 1") != article_key("anderung 1")
    assert article_key("a b") != article_key("a c")


def test_a_passage_that_only_begins_like_another_is_not_shared():
    start = "word " * 200
    assert shared_articles(questions([start + "x"]), questions([start + "y"])).tolist() == [False]


def test_exactly_the_rows_of_shared_articles_are_dropped(caplog):
    train, other = questions(ARTICLES, name="train"), questions(HELD_OUT, name="dev")
    assert shared_articles(train, other).tolist() == [False, True, False, True, False, False]
    with caplog.at_level(logging.INFO):
        kept = drop_overlap(train, questions(["nothing"], name="test"), other, other)
    assert kept.ids == ["0", "2", "4", "5"]
    assert "train: 2 of 6 questions are left out, as their 1 passages are in test and dev, too" in caplog.text


def test_parts_without_shared_articles_stay_as_they_are_without_a_word(caplog):
    train, other = questions(ARTICLES), questions(["another thing"])
    with caplog.at_level(logging.INFO):
        assert drop_overlap(train, other) is train
        warn_of_overlap(train, other)
    assert not caplog.records


def test_what_is_not_dropped_is_warned_of_with_its_number(caplog):
    warn_of_overlap(questions(ARTICLES, name="train"), questions(HELD_OUT, name="dev"))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "train shares 1 passages (2 questions) with dev" in caplog.text


def test_training_questions_that_all_are_held_out_are_refused():
    with pytest.raises(ValueError, match=r"train: all 2 questions are about passages of dev; .*drop_overlap=False"):
        drop_overlap(questions(["x", "X"], name="train"), questions(["x"], name="dev"))
