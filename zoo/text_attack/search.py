"""Greedy word swap, the most important words first, and the queries it costs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import torch

from zoo.text_attack.constraints import SentenceSimilarity, accepted

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from zoo.text_attack.constraints import Constraint
    from zoo.text_attack.transformations import Transformation
    from zoo.text_attack.words import Words

    GoalFunction = Callable[[list[str]], Sequence[float] | Tensor]

Importance = Literal["unk", "delete", "random", "none"]
IMPORTANCES = ("unk", "delete", "random", "none")
Stop = Literal["goal", "exhausted", "budget", "no_modifiable_word"]


class CountedGoal:
    """A goal function that counts what it is asked, keeps to a budget, and remembers texts it has seen.

    Args:
        function: Scores a list of texts; higher is what the attack wants.
        budget: Queries allowed, or None.
        cache: Score a text once and give its value for nothing when it is asked for again. Without it, repeats are
            scored and counted again.
        title: The title that is attacked, for messages.

    Attributes:
        n_queries: Texts that the goal function scored.
        n_scored: Texts whose score was given, repeats included.
        trace: `[queries, best value]` for each new best value, in order: the best value that any budget would have
            reached.
    """

    def __init__(
        self, function: GoalFunction, budget: int | None = None, *, cache: bool = True, title: str = ""
    ) -> None:
        self.n_queries, self.n_scored, self.trace = 0, 0, list[list[float]]()
        self._function, self._budget, self._title = function, budget, title
        self._known: dict[str, float] | None = {} if cache else None

    @property
    def exhausted(self) -> bool:
        """Whether the budget is spent."""
        return self._budget is not None and self.n_queries >= self._budget

    def __call__(self, texts: Sequence[str], *, counts_as_best: bool = True) -> list[float]:
        """The values of texts, in one call of the goal function; of the first ones only, as far as the budget goes.

        Args:
            texts: Texts to score.
            counts_as_best: Whether the attack could submit them, so that they belong in the trace.

        Returns:
            One value for each text up to the first that the budget does not cover.

        Raises:
            ValueError: If the goal function gives another number of scores, or one that is not finite.
        """
        known = {} if self._known is None else self._known
        room = math.inf if self._budget is None else self._budget - self.n_queries
        asked: list[str] = []
        fresh: set[str] = set()
        queries: list[int] = []  # after each text
        for text in texts:
            if self._known is None or (text not in known and text not in fresh):
                if len(asked) >= room:
                    break
                asked.append(text)
                fresh.add(text)
            queries.append(self.n_queries + len(asked))
        scores = self._scores(asked) if asked else []
        if self._known is None:
            values = scores
        else:
            known.update(zip(asked, scores, strict=True))
            values = [known[text] for text in texts[: len(queries)]]
        self.n_queries += len(asked)
        self.n_scored += len(values)
        if counts_as_best:
            for count, value in zip(queries, values, strict=True):
                if not self.trace or value > self.trace[-1][1]:
                    self.trace.append([count, value])
        return values

    def _scores(self, texts: list[str]) -> list[float]:
        given = self._function(texts)
        # Python's numbers would become float32, and not every device has float64.
        scores = (
            given.detach().cpu().double()
            if isinstance(given, torch.Tensor)
            else torch.tensor([float(score) for score in given], dtype=torch.float64)
        )
        scores = scores.flatten()
        if len(scores) != len(texts):
            raise ValueError(f"the goal function gave {len(scores)} scores for {len(texts)} texts of {self._title!r}")
        bad = (~scores.isfinite()).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"the score of {texts[bad[0]]!r} is {scores[bad[0]].item()} ({len(bad)} of {len(texts)} texts in the "
                f"attack on {self._title!r}); scores must be finite"
            )
        values: list[float] = scores.tolist()
        return values


@dataclass
class SearchProblem:
    """What a search works on.

    Attributes:
        original: The title.
        start: Its goal value, already asked for.
        modifiable: Places that may be edited, ascending; at least one.
        transformation: Gives the candidates of a word.
        constraints: What they must pass.
        goal: Scores texts.
        rng: The only source of chance.
        delta: Stop as soon as the goal has risen by more; None tries every word.
    """

    original: Words
    start: float
    modifiable: list[int]
    transformation: Transformation
    constraints: Sequence[Constraint]
    goal: CountedGoal
    rng: random.Random
    delta: float | None = None


@dataclass
class SearchOutcome:
    """Where a search ended.

    Attributes:
        words: The text it chose.
        value: Its goal value, at least that of the original.
        stop: Why it ended.
    """

    words: Words
    value: float
    stop: Stop


class Search(Protocol):
    """A way through the edits of a title."""

    def __call__(self, problem: SearchProblem) -> SearchOutcome:
        """Search until the goal is reached, the budget is spent or nothing is left to try."""
        ...


@dataclass
class GreedyWordSwap:
    """TextAttack's greedy word swap with word importance ranking: each word at most once, only for the better.

    Words come in the order of the goal without them, highest first: a word whose loss raises the goal is in the way.
    For each, all candidates are scored in one call, and the best one is kept if it beats the text so far. When the goal
    has risen by more than delta, the search ends there; among the word's candidates that reach that too, the one most
    similar to the original is taken if a `SentenceSimilarity` is active.

    Without early stop that costs `1 + |I| + sum_i |C_i|` queries, for `|I|` words and `|C_i|` candidates, less what the
    cache answers.

    Args:
        importance: "unk" replaces a word by `unk` to see what it is worth, "delete" drops it, "random" shuffles, "none"
            keeps the order of the text; the last two cost no query.
        unk: What stands for an unknown word; None drops the word instead.

    Raises:
        ValueError: If the importance is unknown.
    """

    importance: Importance = "unk"
    unk: str | None = field(default="[UNK]")

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.importance not in IMPORTANCES:
            raise ValueError(f"importance must be one of {', '.join(IMPORTANCES)}; got {self.importance!r}")

    def __call__(self, problem: SearchProblem) -> SearchOutcome:
        """See `Search`."""
        words, value, goal = problem.original, problem.start, problem.goal
        for index in self._order(problem):
            if goal.exhausted:
                return SearchOutcome(words, value, "budget")
            found = _candidates(problem, words, index)
            values = goal([candidate.text for candidate in found]) if found else []
            if values and (best := max(values)) > value:
                previous = words
                choice = values.index(best)
                words, value = found[choice], best
                if problem.delta is not None and value > problem.start + problem.delta:
                    choice = _most_similar(problem, previous, found, values, choice, index)
                    return SearchOutcome(found[choice], values[choice], "goal")
            if len(values) < len(found):
                return SearchOutcome(words, value, "budget")
        return SearchOutcome(words, value, "exhausted")

    def _order(self, problem: SearchProblem) -> list[int]:
        places = list(problem.modifiable)
        if self.importance == "random":
            problem.rng.shuffle(places)
        if self.importance in ("random", "none"):
            return places
        if self.importance == "delete" or self.unk is None:
            probes = [problem.original.without(i).text for i in places]
        else:
            probes = [problem.original.replaced(i, self.unk).text for i in places]
        values = problem.goal(probes, counts_as_best=False)
        if len(values) < len(places):
            # What the budget left unasked is never tried: no query is left for its candidates.
            return places
        worth = dict(zip(places, values, strict=True))
        return sorted(places, key=lambda i: -worth[i])


def _candidates(problem: SearchProblem, words: Words, index: int) -> list[Words]:
    made = {new.text: new for new in problem.transformation.candidates(words, index, problem.rng)}
    made.pop(words.text, None)
    kept = accepted(problem.constraints, problem.original, words, list(made.values()), index)
    return sorted(kept, key=lambda new: new.text)


def _most_similar(
    problem: SearchProblem, previous: Words, found: list[Words], values: list[float], choice: int, index: int
) -> int:
    """Which of the candidates that reach the goal is nearest in meaning; `choice` where nothing measures that."""
    check = next((one for one in problem.constraints if isinstance(one, SentenceSimilarity)), None)
    if check is None or problem.delta is None:
        return choice
    winners = [i for i, value in enumerate(values) if value > problem.start + problem.delta]
    similarities = check.similarities(problem.original, previous, [found[i] for i in winners], index)
    if similarities is None:
        return choice
    # Between equally similar ones the goal decides, then the order of the texts.
    ranked = zip(similarities.tolist(), [values[i] for i in winners], [-i for i in winners], strict=True)
    return -max(ranked)[2]
