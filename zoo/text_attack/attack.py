"""An attack on one title: what it does, and what came of it."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from zoo.text_attack.constraints import PreConstraint, ReadableWords, SentenceSimilarity
from zoo.text_attack.search import CountedGoal, GreedyWordSwap, SearchOutcome, SearchProblem
from zoo.text_attack.transformations import join_names
from zoo.text_attack.words import Words

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zoo.text_attack.constraints import Constraint
    from zoo.text_attack.search import GoalFunction, Importance, Search, Stop
    from zoo.text_attack.transformations import Transformation


@dataclass
class AttackResult:
    """What an attack made of a title. Fields that only a victim can tell are None until its owner fills them in.

    Attributes:
        item_id: The item.
        original: Its title.
        perturbed: The attacked title.
        recipe: Name of the attack.
        goal_pre: Goal value of the title.
        goal_post: Goal value of the attacked title.
        n_queries: Texts that the goal function scored for the attack.
        n_scored: Texts whose score was asked for, repeats from the cache included.
        words_changed: Share of the title's words that changed, see `zoo.text_attack.stealth.words_changed`.
        edit_distance: Levenshtein distance of the two titles, in characters.
        rouge_l: ROUGE-L F1 of the two titles.
        stop: Why the attack ended: "goal" reached, "exhausted" (nothing left to try), "budget" spent, or
            "no_modifiable_word".
        synonym_source: Where new words came from, or None.
        encoder: Sentence encoder of the similarity constraint, or None.
        seed: Seed of the attack.
        trace: `[queries, best goal value so far]` for each new best value, in order.
        exposure_pre: Exposure of the title over all users.
        exposure_post: Exposure of the attacked title over all users.
        cosine: Similarity of the two titles under the report's sentence encoder.
        ppl_pre: Perplexity of the title under the report's language model.
        ppl_post: Perplexity of the attacked title.
    """

    item_id: int
    original: str
    perturbed: str
    recipe: str
    goal_pre: float
    goal_post: float
    n_queries: int
    n_scored: int
    words_changed: float
    edit_distance: int
    rouge_l: float
    stop: Stop
    synonym_source: str | None
    encoder: str | None
    seed: int
    trace: list[list[float]] = field(default_factory=list)
    exposure_pre: float | None = None
    exposure_post: float | None = None
    cosine: float | None = None
    ppl_pre: float | None = None
    ppl_post: float | None = None

    def to_json(self) -> str:
        """One line of JSON; numbers that are not finite, such as the perplexity of no text, become null."""
        values = {name: _finite(value) for name, value in asdict(self).items()}
        return json.dumps(values, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> AttackResult:
        """The result that `to_json` wrote.

        Raises:
            ValueError: If the line is not JSON, or has other fields.
        """
        values = json.loads(line)
        names = {one.name for one in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            given = set(values) if isinstance(values, dict) else set()
            raise ValueError(
                f"not an attack result, {line[:80]!r}: missing are {sorted(names - given)}, unknown are "
                f"{sorted(given - names)}"
            )
        return cls(**values)


class TextAttack:
    """Greedy search for an edit of one title that raises a goal, under constraints; a plain object.

    Chance comes from a generator seeded by (seed, recipe, item id), so that a result does not depend on what was
    attacked before.

    Args:
        transformation: What may be put in a word's place.
        constraints: Which words may be edited (`PreConstraint`) and which edits may be submitted (`Constraint`), in
            the order in which to ask.
        importance: Order of the words, see `GreedyWordSwap`.
        unk: What stands for an unknown word in `importance="unk"`: the victim's own token for it; None if it has none,
            which drops the word instead.
        search: Another search in place of `GreedyWordSwap`; then `importance` and `unk` are not used.
        delta: Rise of the goal that ends the search; None tries every word.
        budget: Queries allowed for one title, the first one (the title itself) included; None for no limit.
        cache: Score and count a repeated text once.
        seed: Seed of all chance.
        recipe: Name of the attack in results; part of the seed.

    Raises:
        ValueError: If `delta` is negative, `budget` is below 1, the importance is unknown, or a constraint is neither
            kind.

    Example:
        >>> from zoo.text_attack.transformations import InsertMarks
        >>> attack = TextAttack(InsertMarks("-"), delta=None)
        >>> attack.attack("Mario Kart", lambda texts: [text.count("-") for text in texts]).perturbed
        'M-ario K-art'
    """

    def __init__(
        self,
        transformation: Transformation,
        constraints: Sequence[PreConstraint | Constraint] = (),
        *,
        importance: Importance = "unk",
        unk: str | None = "[UNK]",
        search: Search | None = None,
        delta: float | None = 0.05,
        budget: int | None = None,
        cache: bool = True,
        seed: int = 42,
        recipe: str = "custom",
    ) -> None:
        if delta is not None and not delta >= 0.0:
            raise ValueError(f"delta must be at least 0, or None to try every word; got {delta}")
        if budget is not None and budget < 1:
            raise ValueError(f"budget must be at least 1 query (the title itself), or None for no limit; got {budget}")
        self.transformation, self.delta, self.budget, self.cache = transformation, delta, budget, cache
        self.seed, self.recipe = seed, recipe
        self.search: Search = search if search is not None else GreedyWordSwap(importance, unk)
        self._before: list[PreConstraint] = []
        self._checks: list[Constraint] = []
        for constraint in constraints:
            if isinstance(constraint, PreConstraint):
                self._before.append(constraint)
            elif hasattr(constraint, "accept"):
                self._checks.append(constraint)
            else:
                raise ValueError(f"a constraint has a method `modifiable` or `accept`; {constraint!r} has neither")

    @property
    def synonym_source(self) -> str | None:
        """Where new words come from, or None."""
        name: str | None = getattr(self.transformation, "source_name", None)
        return name

    @property
    def encoder(self) -> str | None:
        """Names of the sentence encoders of the constraints, or None."""
        return join_names(one.encoder.name for one in self._checks if isinstance(one, SentenceSimilarity))

    def attack(
        self,
        text: str,
        goal: GoalFunction,
        *,
        item_id: int = 0,
        readable: Callable[[str], int] | None = None,
    ) -> AttackResult:
        """Search for an edit of a title.

        Args:
            text: The title.
            goal: Scores a list of texts, higher is what the attack wants. It gets all candidates of a word, or all
                texts that rank the words, in one call.
            item_id: The item, for the result and for the generator.
            readable: How many characters of a text the victim reads; words that begin later are left alone.

        Raises:
            ValueError: If the goal gives scores that are not finite, or not one a text.
        """
        words = Words.of(text)
        counted = CountedGoal(goal, self.budget, cache=self.cache, title=text)
        (start,) = counted([text])
        places = set(range(len(words)))
        limits = [] if readable is None else [ReadableWords(readable(text))]
        for constraint in (*self._before, *limits):
            places &= constraint.modifiable(words)
        outcome = SearchOutcome(words, start, "no_modifiable_word")
        if places:
            problem = SearchProblem(
                words,
                start,
                sorted(places),
                self.transformation,
                self._checks,
                counted,
                item_generator(self.seed, self.recipe, item_id),
                self.delta,
            )
            outcome = self.search(problem)
        return make_result(
            item_id,
            text,
            outcome.words.text,
            recipe=self.recipe,
            goal_pre=start,
            goal_post=outcome.value,
            n_queries=counted.n_queries,
            n_scored=counted.n_scored,
            stop=outcome.stop,
            synonym_source=self.synonym_source,
            encoder=self.encoder,
            seed=self.seed,
            trace=counted.trace,
        )


def item_generator(seed: int, recipe: str, item_id: int) -> random.Random:
    """A generator of its own for each (seed, recipe, item), the same in every process."""
    return random.Random(f"{seed}/{recipe}/{item_id}")


def make_result(item_id: int, original: str, perturbed: str, **values: Any) -> AttackResult:
    """An `AttackResult` with the measures that need nothing but the two titles."""
    from zoo.text_attack.stealth import levenshtein, rouge_l, words_changed

    return AttackResult(
        item_id=item_id,
        original=original,
        perturbed=perturbed,
        words_changed=words_changed(original, perturbed),
        edit_distance=levenshtein(original, perturbed),
        rouge_l=rouge_l(original, perturbed),
        **values,
    )


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
