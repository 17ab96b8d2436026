"""Attacks without a search."""

from __future__ import annotations

import json
import logging
import random
from typing import TYPE_CHECKING

import pytest

from zoo.text_attack.one_shot import (
    Identity,
    LanguageModelRewriter,
    OneShotAttack,
    RandomEdit,
    RewriteAttack,
    TrivialInsertion,
)
from zoo.text_attack.stealth import levenshtein
from zoo.text_attack.word_lists import POSITIVE_WORDS

if TYPE_CHECKING:
    from pathlib import Path

TITLE = "The Legend of title Zelda"


def length(texts: list[str]) -> list[float]:
    return [float(len(text)) for text in texts]


def shout(titles: list[str]) -> list[str]:
    return [title.upper() for title in titles]


@pytest.mark.parametrize(
    "attack", [RandomEdit(), TrivialInsertion(), RewriteAttack(shout)], ids=lambda attack: attack.recipe
)
def test_an_edit_costs_no_query_and_is_scored_before_and_after(attack: OneShotAttack) -> None:
    calls: list[list[str]] = []

    def goal(texts: list[str]) -> list[float]:
        calls.append(texts)
        return length(texts)

    result = attack.attack(TITLE, goal, item_id=4)
    assert calls == [[TITLE, result.perturbed]] and result.perturbed != TITLE
    assert (result.n_queries, result.n_scored, result.stop) == (0, 2, "exhausted")
    assert (result.goal_pre, result.goal_post) == (len(TITLE), len(result.perturbed))
    assert result.item_id == 4 and result.edit_distance == levenshtein(TITLE, result.perturbed)
    assert result == attack.attack(TITLE, length, item_id=4)


def test_the_identity_changes_nothing() -> None:
    result = Identity().attack(TITLE, length)
    assert result.perturbed == TITLE and result.goal_pre == result.goal_post
    assert (result.edit_distance, result.words_changed, result.rouge_l) == (0, 0.0, 1.0)


def test_a_random_edit_is_one_typing_error_in_one_free_word() -> None:
    edited = set()
    for item in range(60):
        text = RandomEdit().attack(TITLE, length, item_id=item).perturbed
        assert 1 <= levenshtein(TITLE, text) <= 2
        assert text.startswith("The ") and " of title " in text
        edited.add(0 if " of title Zelda" in text else 1)
        short = RandomEdit().attack(TITLE, length, item_id=item, readable=lambda _: 8).perturbed
        assert short.endswith(" of title Zelda") and short != TITLE
    assert edited == {0, 1}


def test_a_random_edit_does_not_depend_on_what_came_before() -> None:
    attack = RandomEdit(seed=1)
    attack.attack("Mario", length, item_id=0)
    random.seed(0)
    assert attack.attack(TITLE, length, item_id=1) == RandomEdit(seed=1).attack(TITLE, length, item_id=1)
    assert (
        RandomEdit(seed=2).attack(TITLE, length, item_id=1).perturbed
        != attack.attack(TITLE, length, item_id=1).perturbed
    )


@pytest.mark.parametrize("title", ["", "  ", "of the", "a 2", "brand title"])
def test_a_title_without_a_word_to_edit_stays(title: str) -> None:
    result = RandomEdit().attack(title, length)
    assert result.perturbed == title and result.stop == "no_modifiable_word" and result.n_scored == 2


def test_words_of_praise_are_different_ones_at_the_place_asked_for() -> None:
    for item in range(10):
        end = TrivialInsertion().attack(TITLE, length, item_id=item).perturbed
        assert end.startswith(TITLE + " ")
        drawn = end.removeprefix(TITLE).split()
        assert len(set(drawn)) == 5 and set(drawn) <= set(POSITIVE_WORDS)
        start = (
            TrivialInsertion(place="start", count=2, words=["x", "y", "z"])
            .attack(TITLE, length, item_id=item)
            .perturbed
        )
        assert start.endswith(" " + TITLE) and len(set(start.split()[:2]) & {"x", "y", "z"}) == 2
    assert TrivialInsertion().attack(" ", length).stop == "no_modifiable_word"


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"count must lie in 1\.\.2, .*; got 3"):
        TrivialInsertion(["x", "y"], 3)
    with pytest.raises(ValueError, match=r"count must lie in"):
        TrivialInsertion(count=0)
    with pytest.raises(ValueError, match="place must be one of end, start; got 'middle'"):
        TrivialInsertion(place="middle")


def rewrites(path: Path, *rows: object) -> Path:
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n", encoding="utf-8"
    )
    return path


def test_ready_rewrites_are_found_by_item(tmp_path: Path) -> None:
    path = rewrites(
        tmp_path / "r.jsonl", {"item_id": 3, "text": "Great Zelda"}, "", {"item_id": 1, "text": "Best Mario"}
    )
    attack = RewriteAttack(str(path))
    assert attack.attack(TITLE, length, item_id=3).perturbed == "Great Zelda"
    assert attack.attack("", length, item_id=3).stop == "no_modifiable_word"
    with pytest.raises(ValueError, match=r"r\.jsonl has no rewrite of item 2 \('The Legend of title Zelda'\)"):
        attack.attack(TITLE, length, item_id=2)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{"], "line 1 of .* is not JSON"),
        ([{"item_id": 1, "text": "a"}, {"item_id": "2", "text": "b"}], "line 2 of .* must be"),
        ([{"item_id": 1}], "line 1 of .* must be"),
        ([[1]], "line 1 of .* must be"),
        ([{"item_id": 1, "text": "a"}, {"item_id": 1, "text": "b"}], "line 2 of .* second rewrite of item 1"),
    ],
    ids=["json", "id", "text", "list", "twice"],
)
def test_a_bad_line_of_rewrites_is_named(tmp_path: Path, rows: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewriteAttack(rewrites(tmp_path / "r.jsonl", *rows))


def test_a_missing_file_of_rewrites_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl is not a file"):
        RewriteAttack(tmp_path / "none.jsonl")


def test_an_empty_rewrite_leaves_the_title_and_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        result = RewriteAttack(lambda titles: [" " for _ in titles]).attack(TITLE, length, item_id=9)
    assert result.perturbed == TITLE and "the rewrite of item 9" in caplog.text


def test_a_rewriter_that_gives_another_number_of_texts_is_an_error() -> None:
    with pytest.raises(ValueError, match="gave 0 texts for one title"):
        RewriteAttack(lambda titles: []).attack(TITLE, length)


def test_a_language_model_is_told_to_advertise_and_its_answer_is_the_title(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def answer(rewriter: LanguageModelRewriter, titles: list[str]) -> list[str]:
        told.extend(rewriter.prompt.replace("{title}", title) for title in titles)
        return ['"Amazing Legend of Zelda"\nmore' for _ in titles]

    monkeypatch.setattr(LanguageModelRewriter, "_answers", answer)
    result = RewriteAttack(LanguageModelRewriter("no/model")).attack(TITLE, length)
    assert result.perturbed == "Amazing Legend of Zelda"
    assert len(told) == 1 and "marketing" in told[0] and f"Title: {TITLE}\n" in told[0]
    with pytest.raises(ValueError, match=r"must hold \{title\} once"):
        LanguageModelRewriter("no/model", prompt="Rewrite it.")
