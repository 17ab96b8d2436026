"""The greedy search and its count of queries."""

from __future__ import annotations

import itertools
import math
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch

from zoo.text_attack.constraints import EditDistance, SentenceSimilarity
from zoo.text_attack.search import CountedGoal, GreedyWordSwap, SearchOutcome, SearchProblem
from zoo.text_attack.words import Words

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

TITLE = "alpha beta gamma delta"
OPTIONS = {
    "alpha": ["a1", "a2", "a3"],
    "beta": ["b1"],
    "gamma": ["g1", "g2"],
    "delta": ["d1", "d2", "d3", "d4"],
}
WEIGHTS = {
    **{"alpha": 0.2, "a1": 0.1, "a2": 0.5, "a3": 0.4},
    **{"beta": -0.3, "b1": -0.4},
    **{"gamma": 0.0, "g1": 0.25, "g2": 0.3},
    **{"delta": 0.1, "d1": 0.1, "d2": 0.05, "d3": 0.2, "d4": 0.15},
}


class Choices:
    """Puts given words in a word's place."""

    def __init__(self, table: dict[str, list[str]]) -> None:
        self.table = table

    def candidates(self, words: Words, index: int, rng: random.Random) -> list[Words]:
        return [words.replaced(index, new) for new in self.table.get(words.words[index], [])]


class Recorded:
    """A goal that sums the weights of words, and remembers its calls."""

    def __init__(self, weights: dict[str, float] = WEIGHTS) -> None:
        self.weights = weights
        self.calls: list[list[str]] = []

    def __call__(self, texts: list[str]) -> list[float]:
        self.calls.append(list(texts))
        return [sum(self.weights.get(word, 0.0) for word in text.split()) for text in texts]

    @property
    def asked(self) -> list[str]:
        return [text for call in self.calls for text in call]


class ByTable:
    """An encoder whose texts have a given cosine to the title."""

    name = "by-table"

    def __init__(self, cosines: dict[str, float]) -> None:
        self.cosines = cosines

    def encode(self, texts: Sequence[str]) -> Tensor:
        cosines = torch.tensor([self.cosines.get(text, 1.0) for text in texts])
        return torch.stack([cosines, (1 - cosines**2).sqrt()], dim=1)


def search(
    goal: Callable[[list[str]], Any],
    importance: str = "delete",
    *,
    title: str = TITLE,
    table: dict[str, list[str]] = OPTIONS,
    budget: int | None = None,
    delta: float | None = None,
    constraints: Sequence[Any] = (),
    modifiable: Sequence[int] | None = None,
    seed: int = 0,
    **options: Any,
) -> tuple[SearchOutcome, CountedGoal]:
    words = Words.of(title)
    counted = CountedGoal(goal, budget, title=title)
    (start,) = counted([title])
    places = list(range(len(words)) if modifiable is None else modifiable)
    problem = SearchProblem(words, start, places, Choices(table), constraints, counted, random.Random(seed), delta)
    return GreedyWordSwap(importance, **options)(problem), counted  # type: ignore[arg-type]


def brute_force() -> tuple[float, str]:
    words = TITLE.split()
    combinations = itertools.product(*([word, *OPTIONS[word]] for word in words))
    return max((sum(WEIGHTS[word] for word in one), " ".join(one)) for one in combinations)


@pytest.mark.parametrize("importance", ["delete", "unk", "random", "none"])
def test_one_pass_over_an_additive_goal_finds_the_best_combination(importance: str) -> None:
    outcome, _ = search(Recorded(), importance)
    best, text = brute_force()
    assert outcome.words.text == text and outcome.value == pytest.approx(best) and outcome.stop == "exhausted"


@pytest.mark.parametrize(
    ("importance", "probes"),
    [("delete", 4), ("unk", 4), ("random", 0), ("none", 0)],
    ids=["delete", "unk", "random", "none"],
)
def test_queries_are_one_and_the_words_and_the_candidates(importance: str, probes: int) -> None:
    goal = Recorded()
    _, counted = search(goal, importance)
    assert counted.n_queries == len(goal.asked) == 1 + probes + sum(len(one) for one in OPTIONS.values())
    # The title, the probes of all words, and the candidates of each word: one call each.
    assert [len(call) for call in goal.calls[: 1 + bool(probes)]] == [1, probes][: 1 + bool(probes)]
    assert sorted(len(call) for call in goal.calls[1 + bool(probes) :]) == [1, 2, 3, 4]


@pytest.mark.parametrize("importance", ["delete", "unk", "random", "none"])
@pytest.mark.parametrize("budget", [1, 2, 5, 6, 8, 14, 15, 16])
def test_a_budget_is_never_exceeded_and_used_up(importance: str, budget: int) -> None:
    goal = Recorded()
    outcome, counted = search(goal, importance, budget=budget)
    needed = 11 + (4 if importance in ("delete", "unk") else 0)
    assert counted.n_queries == len(goal.asked) == min(budget, needed)
    assert outcome.stop == ("exhausted" if budget >= needed else "budget")
    assert outcome.value >= WEIGHTS["alpha"] + WEIGHTS["beta"] + WEIGHTS["gamma"] + WEIGHTS["delta"]


def test_a_call_that_the_budget_cuts_is_cut_and_its_best_text_is_kept() -> None:
    goal = Recorded()
    outcome, _ = search(goal, "none", budget=3)
    assert goal.calls == [[TITLE], ["a1 beta gamma delta", "a2 beta gamma delta"]]
    assert outcome.words.text == "a2 beta gamma delta" and outcome.stop == "budget"


def test_words_whose_loss_raises_the_goal_come_first_and_equal_ones_in_their_order() -> None:
    goal = Recorded({"alpha": 0.5, "beta": 0.1, "gamma": 0.5, "delta": 0.1})
    search(goal, "delete")
    tried = [
        TITLE.split()[next(i for i, w in enumerate(call[0].split()) if w not in TITLE.split())]
        for call in goal.calls[2:]
    ]
    assert tried == ["beta", "delta", "alpha", "gamma"]


def test_importance_probes_are_the_title_without_a_word_or_with_the_unknown_one() -> None:
    goal = Recorded()
    search(goal, "delete", modifiable=[0, 2])
    assert goal.calls[1] == ["beta gamma delta", "alpha beta delta"]
    goal = Recorded()
    search(goal, "unk", modifiable=[0, 2], unk="<unk>")
    assert goal.calls[1] == ["<unk> beta gamma delta", "alpha beta <unk> delta"]
    goal = Recorded()
    search(goal, "unk", modifiable=[0, 2], unk=None)
    assert goal.calls[1] == ["beta gamma delta", "alpha beta delta"]


def test_a_random_order_depends_on_the_generator_alone() -> None:
    def calls(seed: int) -> list[list[str]]:
        goal = Recorded()
        search(goal, "random", seed=seed)
        return goal.calls

    assert calls(1) == calls(1)
    assert len({str(calls(seed)) for seed in range(8)}) > 1


def test_candidates_are_asked_sorted_without_repeats_and_without_the_text_as_it_is() -> None:
    goal = Recorded()
    _, counted = search(goal, "none", title="alpha", table={"alpha": ["b", "alpha", "a", "b"]})
    assert goal.calls == [["alpha"], ["a", "b"]] and counted.n_scored == 3


def test_no_text_that_a_constraint_refuses_is_asked() -> None:
    goal = Recorded()
    outcome, _ = search(
        goal, "none", table={"alpha": ["alphas", "omega"], "beta": ["b"]}, constraints=[EditDistance(1)]
    )
    assert goal.asked == [TITLE, "alphas beta gamma delta"] and outcome.stop == "exhausted"


def test_the_text_stays_when_no_candidate_is_better() -> None:
    for weights in ({}, dict.fromkeys(TITLE.split(), 1.0)):  # equal, and worse
        outcome, _ = search(Recorded(weights), "none")
        assert outcome.words.text == TITLE and outcome.value == Recorded(weights)([TITLE])[0]


def test_the_goal_never_falls() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        scores: dict[str, float] = {}
        for delta in (None, 0.0, 0.5):
            outcome, counted = search(lambda texts: [scores.setdefault(t, rng.random()) for t in texts], delta=delta)  # noqa: B023
            assert outcome.value >= scores[TITLE] and outcome.value == scores[outcome.words.text]
            assert (outcome.stop == "goal") == (delta is not None and outcome.value > scores[TITLE] + delta)
            assert counted.trace[0] == [1, scores[TITLE]] and counted.trace == sorted(counted.trace)


def test_an_early_stop_leaves_later_words_untouched() -> None:
    goal = Recorded()
    outcome, counted = search(goal, "none", delta=0.05)
    assert outcome.words.text == "a2 beta gamma delta" and outcome.stop == "goal"
    assert counted.n_queries == 4 and outcome.value == pytest.approx(WEIGHTS["a2"] - 0.2)


def test_the_goal_must_rise_by_more_than_delta() -> None:
    weights = {"a1": 0.5}
    assert search(Recorded(weights), "none", delta=0.5)[0].stop == "exhausted"
    assert search(Recorded(weights), "none", delta=0.49)[0].stop == "goal"


def test_the_winner_nearest_in_meaning_is_taken_at_an_early_stop() -> None:
    rest = " beta gamma delta"
    weights = {"a1": 0.2, "a2": 0.9, "a3": 0.8}
    encoder = ByTable({"a1" + rest: 0.999, "a2" + rest: 0.9, "a3" + rest: 0.95})
    check = SentenceSimilarity(encoder, 0.5)
    near, counted = search(Recorded(weights), "none", delta=0.5, constraints=[check])
    assert near.words.text == "a3" + rest and near.value == 0.8 and near.stop == "goal"
    assert counted.n_queries == 4  # the choice costs no query
    assert search(Recorded(weights), "none", delta=0.5)[0].words.text == "a2" + rest
    skipped = SentenceSimilarity(encoder, 0.5, skip_under=15)
    assert search(Recorded(weights), "none", delta=0.5, constraints=[skipped])[0].words.text == "a2" + rest


def test_equally_near_winners_are_told_apart_by_their_value() -> None:
    weights = {"a1": 0.6, "a2": 0.9, "a3": 0.9}
    found, _ = search(Recorded(weights), "none", delta=0.5, constraints=[SentenceSimilarity(ByTable({}), 0.5)])
    assert found.words.text == "a2 beta gamma delta"


def test_each_word_is_swapped_at_most_once() -> None:
    endless = {"alpha": ["one"], "one": ["two"], "two": ["three"]}
    outcome, _ = search(Recorded({"one": 1.0, "two": 2.0, "three": 3.0}), "none", table=endless)
    assert outcome.words.text == "one beta gamma delta"


def test_a_repeated_text_costs_one_query_and_is_counted_as_scored_again() -> None:
    goal = Recorded()
    counted = CountedGoal(goal)
    assert counted(["a1", "a2", "a1"]) == [0.1, 0.5, 0.1]
    assert counted(["a2", "a3"]) == [0.5, 0.4]
    assert goal.calls == [["a1", "a2"], ["a3"]]
    assert counted.n_queries == 3 and counted.n_scored == 5


def test_repeats_are_scored_again_without_the_cache() -> None:
    goal = Recorded()
    counted = CountedGoal(goal, 4, cache=False)
    assert counted(["a1", "a1"]) == [0.1, 0.1] and counted(["a1", "a2", "a3"]) == [0.1, 0.5]
    assert goal.calls == [["a1", "a1"], ["a1", "a2"]] and counted.n_queries == counted.n_scored == 4


def test_what_the_cache_answers_needs_no_budget() -> None:
    counted = CountedGoal(Recorded(), 2)
    counted(["a1", "a2"])
    assert counted.exhausted and counted(["a2", "a1", "a3", "a1"]) == [0.5, 0.1]


@pytest.mark.parametrize("budget", range(1, 16))
def test_the_trace_tells_what_any_budget_would_have_reached(budget: int) -> None:
    _, whole = search(Recorded(), "delete")
    outcome, _ = search(Recorded(), "delete", budget=budget)
    assert outcome.value == [value for queries, value in whole.trace if queries <= budget][-1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_an_error_with_the_title(bad: float) -> None:
    with pytest.raises(ValueError, match=f"'a1 beta gamma delta' is {bad} .* attack on '{TITLE}'"):
        search(lambda texts: [bad if text.startswith("a1") else 0.0 for text in texts], "none")


def test_another_number_of_scores_is_an_error() -> None:
    with pytest.raises(ValueError, match="gave 2 scores for 1 texts"):
        search(lambda texts: torch.zeros(len(texts) + 1))


def test_an_unknown_importance_is_named() -> None:
    with pytest.raises(ValueError, match="importance must be one of unk, delete, random, none; got 'weight'"):
        GreedyWordSwap("weight")  # type: ignore[arg-type]
