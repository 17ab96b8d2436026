from __future__ import annotations

import itertools
import os
import re
from pathlib import Path

import numpy as np
import pytest

from datamodules.sources.cloze_priors import OptionPriors
from datamodules.sources.recam import read_recam
from tests.datamodules.sources.cloze_questions import questions

WORDS = ["Fear", "hope", "end", "state", "self-esteem"]


def random_questions(seed, count, name="questions"):
    rng = np.random.default_rng(seed)
    vocabulary = ["fear", "Hope", "END", "ending", "self", "esteem", "the", "stateless", "state."]
    articles = [" ".join(rng.choice(vocabulary, 12)) for _ in range(count // 2)] * 2
    options = [[str(word) for word in rng.permutation(WORDS)[:3]] for _ in range(len(articles))]
    return questions(articles, options, rng.integers(0, 3, len(articles)), name)


def occurrences(word, text):
    """How often a word is there as a whole word, by another way than the tested one."""
    return len(re.findall(rf"(?<!\w){re.escape(word.lower())}(?!\w)", text.lower()))


def brute_force(train, rows):
    def score(rule, place, row):
        word = rows.options[row][place]
        parts = word.lower().split("-")
        if rule == "rarest":
            return -min(sum(occurrences(part, text) for text in set(train.articles)) for part in parts)
        if rule == "count":
            return min(occurrences(part, rows.articles[row]) for part in parts)
        pairs = list(zip(train.options, train.labels, strict=True))
        offered = sum(option.lower() == word.lower() for options, _ in pairs for option in options)
        gold = sum(options[label].lower() == word.lower() for options, label in pairs)
        return (gold + 1) / (offered + train.num_options)

    found = {}
    for rule in ("rarest", "gold", "count"):
        credit = 0.0
        for row in range(len(rows)):
            scores = [score(rule, place, row) for place in range(rows.num_options)]
            best = [place for place, value in enumerate(scores) if value == max(scores)]
            credit += (rows.labels[row] in best) / len(best)
        found[rule] = credit / len(rows)
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_accuracies_equal_plain_loops(seed):
    train, rows = random_questions(seed, 40), random_questions(seed + 10, 60)
    found = OptionPriors.fit(train).accuracy(rows)
    assert {name: found[name] for name in ("rarest", "gold", "count")} == pytest.approx(brute_force(train, rows))
    position = np.bincount(train.labels).argmax()
    assert found["majority"] == pytest.approx(np.mean(rows.labels == position))
    assert found["chance"] == pytest.approx(1 / 3)


def test_a_passage_of_several_questions_is_counted_once():
    train = questions(["good good", "good good", "bad bad bad"], [["good", "bad"]] * 3, [0, 0, 0])
    assert OptionPriors.fit(train).accuracy(train)["rarest"] == 1.0


def test_words_are_whole_and_without_case():
    train = questions(["Ends, ENDING and end-on"], [["end", "ends"]], [0])
    assert OptionPriors.fit(train).words["end"] == 1
    assert OptionPriors.fit(train).words["ends"] == 1


def test_rules_without_a_preference_are_right_as_often_as_chance():
    train = questions(["nothing of it"] * 6, [list(order) for order in itertools.permutations("abc")], [0] * 6)
    unseen = questions(["or here"] * 3, [["x", "y", "z"]] * 3, [0, 0, 2])
    found = OptionPriors.fit(train).accuracy(unseen)
    assert [found[name] for name in ("rarest", "gold", "count")] == pytest.approx([1 / 3] * 3)
    assert found["majority"] == pytest.approx(2 / 3)


def test_a_word_that_was_offered_in_vain_is_worse_than_a_new_one_and_a_gold_one_better():
    train = questions(["no passage"], [["vain", "good"]], [1])
    rows = questions(["or here"] * 2, [["vain", "new"], ["new", "good"]], [1, 1])
    assert OptionPriors.fit(train).accuracy(rows)["gold"] == 1.0


def test_questions_that_do_not_fit_are_refused():
    labelled, bare = questions(["x"], labels=[0]), questions(["x"], name="test")
    with pytest.raises(ValueError, match="test has no labels"):
        OptionPriors.fit(bare)
    with pytest.raises(ValueError, match="test has no labels"):
        OptionPriors.fit(labelled).accuracy(bare)
    with pytest.raises(ValueError, match="wide has 3 options, the training questions 2"):
        OptionPriors.fit(labelled).accuracy(questions(["x"], [["a", "b", "c"]], [0], "wide"))


@pytest.mark.real
def test_rare_words_are_right_too_often_in_recam_and_words_of_the_passage_too_rarely():
    folder = Path(os.environ["ZOO_DATA"]) / "recam_semeval2021_task4"
    train, rows = read_recam(folder, 1, "train"), read_recam(folder, 1, "validation")
    assert train is not None and rows is not None
    found = OptionPriors.fit(train).accuracy(rows)
    assert found["rarest"] == pytest.approx(0.348, abs=0.02)
    assert found["count"] == pytest.approx(0.154, abs=0.01)
    assert found["gold"] > 0.3
    assert found["majority"] == pytest.approx(0.2, abs=0.02)
