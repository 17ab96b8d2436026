from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import numpy as np
import pytest

from datamodules.sources.cloze_sample import BAYES_ACCURACY, cloze_sample

if TYPE_CHECKING:
    from collections.abc import Callable

    from datamodules.cloze_rows import ClozeRows

# A passage has six questions, three people of twelve, and three things of twelve of each kind: after eight passages all
# words have come equally often.
ROWS = 48 * 30


def words(text: str) -> list[str]:
    return re.findall(r"@placeholder|\w+", text)


def before_gap(question: str) -> tuple[str, str]:
    """Person and verb of the gap."""
    tokens = words(question)
    place = tokens.index("@placeholder")
    return tokens[place - 2], tokens[place - 1]


def facts(article: str) -> dict[tuple[str, str], str]:
    """What a passage tells, by person and verb."""
    return {(person, verb): thing for person, verb, thing in re.findall(r"(\w+) (drinks|carries) (\w+)\.", article)}


def golds(rows: ClozeRows) -> list[str]:
    return [options[label] for options, label in zip(rows.options, rows.labels.tolist(), strict=True)]


@pytest.fixture(scope="module")
def rows() -> ClozeRows:
    return cloze_sample(ROWS)


@pytest.fixture(scope="module")
def kinds(rows: ClozeRows) -> dict[str, str]:
    """The verb of each thing."""
    found: dict[str, set[str]] = defaultdict(set)
    for article in rows.articles:
        for (_, verb), thing in facts(article).items():
            found[thing].add(verb)
    assert all(len(verbs) == 1 for verbs in found.values())
    return {word: verbs.pop() for word, verbs in found.items()}


def accuracy(rows: ClozeRows, fits: Callable[[int, str], bool]) -> float:
    """Of a solver that guesses among the options that fit."""
    left = [[option for option in options if fits(row, option)] for row, options in enumerate(rows.options)]
    return float(np.mean([(gold in fitting) / len(fitting) for gold, fitting in zip(golds(rows), left, strict=True)]))


def test_the_passage_and_the_words_beside_the_gap_give_the_answer(rows: ClozeRows) -> None:
    for article, question, gold in zip(rows.articles, rows.questions, golds(rows), strict=True):
        assert facts(article)[before_gap(question)] == gold
    solved = accuracy(rows, lambda row, option: facts(rows.articles[row])[before_gap(rows.questions[row])] == option)
    assert solved == BAYES_ACCURACY["passage_and_summary"]


def test_without_the_passage_only_the_kind_of_thing_is_known(rows: ClozeRows, kinds: dict[str, str]) -> None:
    guessed = accuracy(rows, lambda row, option: kinds[option] == before_gap(rows.questions[row])[1])
    assert guessed == pytest.approx(BAYES_ACCURACY["summary_only"], abs=0.01)


def test_without_the_question_every_option_is_as_good(rows: ClozeRows) -> None:
    # Each thing of a passage is the answer once, and an option in five of six questions.
    for first in range(0, ROWS, 6):
        things = set(facts(rows.articles[first]).values())
        assert set(golds(rows)[first : first + 6]) == things
        offered = Counter(option for options in rows.options[first : first + 6] for option in options)
        assert offered == dict.fromkeys(things, 5)
    assert BAYES_ACCURACY["option_only"] == BAYES_ACCURACY["passage_and_option"] == 1 / 5


def test_a_question_tells_another_fact_of_the_passage_each_of_them_once(rows: ClozeRows) -> None:
    for first in range(0, ROWS, 6):
        told = []
        for row in range(first, first + 6):
            assert rows.articles[row] == rows.articles[first]
            clause = rows.questions[row].replace(" and", ".").replace(" .", ".")
            ((fact, thing),) = facts(clause).items()
            assert facts(rows.articles[row])[fact] == thing
            assert thing not in rows.options[row]
            told.append(thing)
        assert len(set(told)) == 6


def test_every_word_is_gold_offered_and_told_equally_often(rows: ClozeRows) -> None:
    gold = Counter(golds(rows))
    assert len(gold) == 24
    assert set(gold.values()) == {ROWS // 24}
    assert set(Counter(option for options in rows.options for option in options).values()) == {5 * ROWS // 24}
    people = Counter(person for row in range(0, ROWS, 6) for person, _ in facts(rows.articles[row]))
    assert len(people) == 12
    assert len(set(people.values())) == 1


def test_the_place_in_the_passage_and_in_the_question_says_nothing(rows: ClozeRows) -> None:
    places = [
        list(facts(article).values()).index(gold) for article, gold in zip(rows.articles, golds(rows), strict=True)
    ]
    assert np.bincount(places).tolist() == [ROWS // 6] * 6
    first = np.mean([words(question)[2] == "@placeholder" for question in rows.questions])
    assert abs(first - 0.5) < 0.05


def test_labels_are_balanced(rows: ClozeRows) -> None:
    assert np.bincount(rows.labels).tolist() == [ROWS // 5] * 5
    for count in (1, 7, 33):
        some = cloze_sample(count)
        assert len(some) == count
        assert np.ptp(np.bincount(some.labels, minlength=5)) <= 1


def test_passages_are_short_and_differ_in_length(rows: ClozeRows) -> None:
    lengths = {len(re.findall(r"\w+|\.", article)) for article in rows.articles}
    assert lengths == {24, 30, 36}
    assert all(question.count("@placeholder") == 1 for question in rows.questions)


def test_parts_and_seeds_have_passages_of_their_own_and_are_reproducible(rows: ClozeRows) -> None:
    again = cloze_sample(ROWS)
    assert again.questions == rows.questions
    assert again.articles == rows.articles
    assert again.options == rows.options
    assert np.array_equal(again.labels, rows.labels)
    parts = [cloze_sample(60, seed, part) for seed in (0, 1) for part in ("train", "validation", "test", "predict")]
    articles = [set(part.articles) for part in parts]
    assert len(set().union(*articles)) == sum(map(len, articles)) == 80
    assert cloze_sample(7).articles == rows.articles[:7]
    assert cloze_sample(7).questions == rows.questions[:7]


def test_the_part_to_predict_has_no_labels() -> None:
    assert not cloze_sample(30, part="predict").labelled
    assert cloze_sample(30, part="test").labelled


def test_unknown_part_and_no_question_are_refused() -> None:
    with pytest.raises(ValueError, match="part must be one of train, validation, test, predict, got 'dev'"):
        cloze_sample(10, part="dev")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_rows must be at least 1, got 0"):
        cloze_sample(0)
