from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import numpy as np
import pytest

from datamodules.sources.cloze_sample import BAYES_ACCURACY, cloze_sample

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from datamodules.cloze_rows import ClozeRows

ROWS = 1_600
VERBS = ("wants", "fears")


def words(text: str) -> list[str]:
    return re.findall(r"@placeholder|\w+", text)


def verb_of(question: str) -> str:
    tokens = words(question)
    return tokens[tokens.index("@placeholder") - 1]


def golds(rows: ClozeRows) -> list[str]:
    return [options[label] for options, label in zip(rows.options, rows.labels.tolist(), strict=True)]


@pytest.fixture(scope="module")
def rows() -> ClozeRows:
    return cloze_sample(ROWS)


@pytest.fixture(scope="module")
def kinds(rows: ClozeRows) -> dict[str, str]:
    """The verb of each word, as training tells it."""
    found: dict[str, set[str]] = defaultdict(set)
    for question, gold in zip(rows.questions, golds(rows), strict=True):
        found[gold].add(verb_of(question))
    assert all(len(verbs) == 1 for verbs in found.values())
    return {word: verbs.pop() for word, verbs in found.items()}


@pytest.fixture(scope="module")
def nouns(rows: ClozeRows) -> dict[str, frozenset[str]]:
    """The words of passages about each option, as training tells them."""
    found: dict[str, set[str]] = defaultdict(set)
    for article, gold in zip(rows.articles, golds(rows), strict=True):
        found[gold] |= set(re.findall(r"[Tt]he (\w+)", article))
    return {word: frozenset(texts) for word, texts in found.items()}


def accuracy(rows: ClozeRows, fits: Callable[[int, str], bool]) -> float:
    """Of a solver that guesses among the options that fit."""
    left = [[option for option in options if fits(row, option)] for row, options in enumerate(rows.options)]
    return float(np.mean([(gold in fitting) / len(fitting) for gold, fitting in zip(golds(rows), left, strict=True)]))


def test_the_verb_beside_the_gap_and_the_passage_give_the_answer_and_each_alone_what_is_documented(
    kinds: dict[str, str], nouns: dict[str, frozenset[str]]
) -> None:
    test = cloze_sample(ROWS, part="test")

    def by_verb(row: int, option: str) -> bool:
        return kinds[option] == verb_of(test.questions[row])

    def by_passage(row: int, option: str) -> bool:
        return set(re.findall(r"[Tt]he (\w+)", test.articles[row])) <= nouns[option]

    assert accuracy(test, lambda row, option: True) == pytest.approx(BAYES_ACCURACY["option_only"])
    assert accuracy(test, by_verb) == pytest.approx(BAYES_ACCURACY["summary_only"])
    assert accuracy(test, by_passage) == pytest.approx(BAYES_ACCURACY["passage_and_option"])
    both = accuracy(test, lambda row, option: by_verb(row, option) and by_passage(row, option))
    assert both == BAYES_ACCURACY["passage_and_summary"] == 1.0


def test_each_topic_has_words_of_its_own(rows: ClozeRows, nouns: dict[str, frozenset[str]]) -> None:
    topics = set(nouns.values())
    assert len(topics) == 8
    assert all(len(topic) == 4 for topic in topics)
    assert len(frozenset().union(*topics)) == 32
    assert Counter(nouns.values()) == dict.fromkeys(topics, 2)
    # The gold word is in no passage, nor is any other option: nothing can be copied.
    assert not set(nouns) & {word for article in rows.articles for word in words(article)}


def table(pairs: list[tuple[Hashable, Hashable]]) -> float:
    """Chi-square of independence over its degrees of freedom; around 1 where the two are independent."""
    counts = Counter(pairs)
    left, right = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    total = sum(
        (counts[a, b] - left[a] * right[b] / len(pairs)) ** 2 / (left[a] * right[b] / len(pairs))
        for a in left
        for b in right
    )
    return total / ((len(left) - 1) * (len(right) - 1))


def test_words_without_their_places_say_nothing_about_the_verb(rows: ClozeRows, kinds: dict[str, str]) -> None:
    filled = [sorted(words(question.replace("@placeholder", "?"))) for question in rows.questions]
    people = {word for question in filled for word in question} - {"wants", "fears", "nothing", "and"}
    assert len(people) == 12
    assert all({"wants", "fears", "nothing", "and"} <= set(question) for question in filled)
    assert all(len(question) == 12 for question in filled)
    assert all(question.count(verb) == 2 for question in filled for verb in VERBS)
    verbs = [verb_of(question) for question in rows.questions]
    for name in people:
        assert table([(name in question, verb) for question, verb in zip(filled, verbs, strict=True)]) < 11
    lengths = [len(words(article)) for article in rows.articles]
    assert table([(length, verb) for length, verb in zip(lengths, verbs, strict=True)]) < 3


def test_the_gap_is_in_each_clause_equally_often_for_each_verb(rows: ClozeRows) -> None:
    places = [(words(question).index("@placeholder"), verb_of(question)) for question in rows.questions]
    assert {place for place, _ in places} == {2, 5, 8, 12}
    assert table(list(places)) < 6
    for clause in (2, 5, 8, 12):
        assert abs(np.mean([place == clause for place, _ in places]) - 0.25) < 4 * np.sqrt(0.25 * 0.75 / ROWS)


def test_the_verb_of_another_clause_says_nothing(rows: ClozeRows) -> None:
    # A verb at any place but beside the gap: as often the gap's own as not, given that two of the four are.
    same = []
    for question in rows.questions:
        tokens = words(question)
        gap = tokens.index("@placeholder") - 1
        same += [token == tokens[gap] for place, token in enumerate(tokens) if token in VERBS and place != gap]
    assert np.mean(same) == pytest.approx(1 / 3)


@pytest.mark.parametrize("count", [16, 48, ROWS])
def test_every_word_is_gold_and_distractor_equally_often(rows: ClozeRows, count: int) -> None:
    gold = Counter(golds(rows)[:count])
    offered = Counter(option for options in rows.options[:count] for option in options)
    assert len(gold) == 16
    assert set(gold.values()) == {count // 16}
    assert offered.keys() == gold.keys()
    assert set(offered.values()) == {5 * count // 16}
    assert all(len(set(options)) == 5 for options in rows.options)


def test_options_alone_do_not_tell_the_gold_one(
    rows: ClozeRows, kinds: dict[str, str], nouns: dict[str, frozenset[str]]
) -> None:
    # Of a set of options, how many share the kind or the topic with an option is the same for the gold ones as for all.
    def profile(option: str, options: list[str]) -> tuple[int, int]:
        return (
            sum(kinds[other] == kinds[option] for other in options),
            sum(nouns[other] == nouns[option] for other in options),
        )

    of_gold = Counter(profile(gold, options) for gold, options in zip(golds(rows), rows.options, strict=True))
    of_all = Counter(profile(option, options) for options in rows.options for option in options)
    assert {key: 5 * count for key, count in of_gold.items()} == of_all


def test_labels_are_balanced_and_independent_of_words(rows: ClozeRows) -> None:
    assert np.bincount(rows.labels).tolist() == [ROWS // 5] * 5
    assert table(list(zip(golds(rows), rows.labels.tolist(), strict=True))) < 1.7
    for count in (1, 7, 33):
        some = cloze_sample(count)
        assert len(some) == count
        assert np.ptp(np.bincount(some.labels, minlength=5)) <= 1


def test_a_passage_has_one_question_per_verb(rows: ClozeRows) -> None:
    for row in range(0, ROWS, 2):
        assert rows.articles[row] == rows.articles[row + 1]
        assert {verb_of(question) for question in rows.questions[row : row + 2]} == set(VERBS)
    # Neither verb comes first.
    assert abs(np.mean([verb_of(question) == "wants" for question in rows.questions[::2]]) - 0.5) < 0.07


def test_passages_are_short_and_differ_in_length(rows: ClozeRows) -> None:
    lengths = [len(re.findall(r"\w+|\.", article)) for article in rows.articles]
    assert set(lengths) == {28, 35, 42, 49}
    texts = [*rows.articles, *rows.questions, *(option for options in rows.options for option in options)]
    assert len({word.lower() for text in texts for word in words(text)}) <= 75
    assert all(question.count("@placeholder") == 1 for question in rows.questions)


def test_parts_and_seeds_have_passages_of_their_own_and_are_reproducible(rows: ClozeRows) -> None:
    again = cloze_sample(ROWS)
    assert again.questions == rows.questions
    assert again.articles == rows.articles
    assert again.options == rows.options
    assert np.array_equal(again.labels, rows.labels)
    parts = [cloze_sample(400, seed, part) for seed in (0, 1) for part in ("train", "validation", "test", "predict")]
    articles = [set(part.articles) for part in parts]
    assert len(set().union(*articles)) == sum(map(len, articles)) == 1_600
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
