"""An attack on one title, and the record of it."""

from __future__ import annotations

import json
import math
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch

from zoo.text_attack.attack import AttackResult, TextAttack, item_generator
from zoo.text_attack.constraints import EditDistance, ProtectedWords, SentenceSimilarity, Stopwords
from zoo.text_attack.stealth import levenshtein
from zoo.text_attack.transformations import CharacterEdits, InsertMarks, Union
from zoo.text_attack.words import Words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from zoo.text_attack.search import SearchProblem

TITLES = ["The Legend of Zelda: Twilight Princess", "Mario Kart Wii", "Turtle Beach Ear Force", "Wii Sports"]


def noise(texts: list[str]) -> Tensor:
    """A score of its own for each text."""
    return torch.tensor([random.Random(text).random() for text in texts])


def deepwordbug(**options: Any) -> TextAttack:
    constraints = [Stopwords(), ProtectedWords(), EditDistance(30)]
    return TextAttack(CharacterEdits(), constraints, **{"delta": None, "recipe": "deepwordbug", **options})


def test_results_do_not_depend_on_the_order_of_the_targets_or_on_where_a_run_went_on() -> None:
    attack = deepwordbug()
    forward = {item: attack.attack(TITLES[item], noise, item_id=item) for item in range(4)}
    attack = deepwordbug()
    random.seed(1)
    backward = {item: attack.attack(TITLES[item], noise, item_id=item) for item in (3, 1, 0, 2)}
    assert forward == backward
    assert deepwordbug().attack(TITLES[2], noise, item_id=2) == forward[2]


def test_results_do_not_depend_on_the_score_batch() -> None:
    def one_by_one(texts: list[str]) -> list[float]:
        return [float(noise([text])) for text in texts]

    for item, title in enumerate(TITLES):
        assert deepwordbug().attack(title, noise, item_id=item) == deepwordbug().attack(title, one_by_one, item_id=item)


@pytest.mark.parametrize(("cache", "queries"), [(True, 6), (False, 7)], ids=["cache", "none"])
def test_a_repeated_text_is_a_query_only_without_a_cache(cache: bool, queries: int) -> None:
    attack = TextAttack(InsertMarks("-"), importance="delete", delta=None, cache=cache)
    # The title, two times "Wii", and two candidates of each word.
    result = attack.attack("Wii Wii", lambda texts: [0.0] * len(texts))
    assert (result.n_queries, result.n_scored) == (queries, 7)


def test_chance_differs_between_seeds_recipes_and_items() -> None:
    draws = {item_generator(*key).random() for key in ((1, "a", 1), (2, "a", 1), (1, "b", 1), (1, "a", 2))}
    assert len(draws) == 4
    base = deepwordbug().attack(TITLES[0], noise).perturbed
    assert deepwordbug(seed=43).attack(TITLES[0], noise).perturbed != base
    assert deepwordbug(recipe="other").attack(TITLES[0], noise).perturbed != base
    assert deepwordbug().attack(TITLES[0], noise, item_id=1).perturbed != base


def test_a_result_records_what_was_done() -> None:
    result = TextAttack(InsertMarks("-"), [Stopwords()], delta=None, importance="none", seed=7).attack(
        "The Wii of Mario", lambda texts: [text.count("-") / 10 for text in texts], item_id=5
    )
    assert result.perturbed == "The W-ii of M-ario" and result.original == "The Wii of Mario"
    assert (result.item_id, result.recipe, result.seed, result.stop) == (5, "custom", 7, "exhausted")
    assert (result.goal_pre, result.goal_post) == (0.0, 0.2)
    assert result.n_queries == result.n_scored == 1 + 2 + 4 and result.trace == [[1, 0.0], [2, 0.1], [4, 0.2]]
    assert (result.edit_distance, result.words_changed, result.rouge_l) == (2, 0.5, 0.5)
    assert result.synonym_source is None and result.encoder is None
    assert result.exposure_pre is result.exposure_post is result.cosine is result.ppl_pre is result.ppl_post is None


@pytest.mark.parametrize("delta", [None, 0.0, 0.3])
def test_constraints_hold_in_every_text_that_is_asked(delta: float | None) -> None:
    asked: list[str] = []

    def goal(texts: list[str]) -> Tensor:
        asked.extend(texts)
        return noise(texts)

    title = "The title of Brand Zelda AND Twilight Princess for Wii"
    attack = TextAttack(
        CharacterEdits(), [Stopwords(), ProtectedWords(), EditDistance(3)], importance="none", delta=delta
    )
    for item in range(20):
        asked.clear()
        result = attack.attack(title, goal, item_id=item, readable=lambda _: title.index("Princess"))
        for text in asked:
            assert levenshtein(title, text) <= 3
            assert text.startswith("The title of Brand ") and " AND " in text and text.endswith(" Princess for Wii")
        assert result.goal_post >= result.goal_pre


def test_what_is_read_is_asked_of_the_title_and_later_words_stay() -> None:
    seen: list[str] = []

    def readable(text: str) -> int:
        seen.append(text)
        return 5

    goal_asked: list[str] = []

    def goal(texts: list[str]) -> Tensor:
        goal_asked.extend(texts)
        return noise(texts)

    deepwordbug().attack("Mario Kart Wii", goal, readable=readable)
    assert seen == ["Mario Kart Wii"]
    assert all(text.endswith(" Kart Wii") for text in goal_asked)
    assert len(goal_asked) == 1 + 1 + 4  # words that are not read cost nothing


@pytest.mark.parametrize("title", ["", "  ", "!?", "The of AND", "Title, brand"])
def test_a_title_without_a_word_to_edit_is_a_result_and_no_error(title: str) -> None:
    result = deepwordbug().attack(title, noise)
    assert result.stop == "no_modifiable_word" and result.perturbed == title
    assert result.goal_pre == result.goal_post and result.n_queries == 1


@pytest.mark.parametrize("budget", [1, 2, 5])
def test_a_result_never_has_more_queries_than_the_budget(budget: int) -> None:
    for item, title in enumerate(TITLES):
        result = deepwordbug(budget=budget).attack(title, noise, item_id=item)
        assert result.n_queries == budget and result.stop == "budget"


def test_names_of_the_parts_are_in_the_result() -> None:
    class Named(InsertMarks):
        source_name = "ppdb"

    class Encoder:
        name = "unit"

        def encode(self, texts: Sequence[str]) -> Tensor:
            return torch.ones(len(texts), 1)

    attack = TextAttack(Union(Named(), CharacterEdits()), [SentenceSimilarity(Encoder(), metric="cosine")])
    result = attack.attack("Mario", noise)
    assert (result.synonym_source, result.encoder) == ("ppdb", "unit")


def test_another_search_may_take_the_place_of_the_greedy_one() -> None:
    def give_up(problem: SearchProblem) -> Any:
        from zoo.text_attack.search import SearchOutcome

        return SearchOutcome(problem.original.replaced(problem.modifiable[-1], "x"), problem.start, "exhausted")

    assert TextAttack(InsertMarks(), search=give_up).attack("a b c", noise).perturbed == "a b x"


def result_of(**values: Any) -> AttackResult:
    result = deepwordbug().attack("Pokémon “Émeraude”", noise, item_id=3)
    for name, value in values.items():
        setattr(result, name, value)
    return result


def test_a_result_comes_back_from_its_line_unchanged() -> None:
    result = result_of(exposure_pre=0.1 + 0.2, cosine=1e-17, synonym_source="ppdb")
    line = result.to_json()
    assert "\n" not in line and AttackResult.from_json(line) == result
    assert AttackResult.from_json(line).to_json() == line


def test_numbers_that_are_not_finite_become_null_and_the_line_stays_json() -> None:
    line = result_of(ppl_pre=math.nan, ppl_post=math.inf, cosine=0.5).to_json()
    row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert row["ppl_pre"] is None and row["ppl_post"] is None and row["cosine"] == 0.5
    assert AttackResult.from_json(line).to_json() == line


def test_a_line_with_other_fields_is_refused() -> None:
    row = json.loads(result_of().to_json())
    del row["stop"]
    with pytest.raises(ValueError, match=r"missing are \['stop'\], unknown are \['speed'\]"):
        AttackResult.from_json(json.dumps({**row, "speed": 1}))
    with pytest.raises(ValueError, match="not an attack result"):
        AttackResult.from_json("[1]")


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"delta must be at least 0, .* got -0\.1"):
        deepwordbug(delta=-0.1)
    with pytest.raises(ValueError, match="delta must be at least 0"):
        deepwordbug(delta=math.nan)
    with pytest.raises(ValueError, match=r"budget must be at least 1 query .* got 0"):
        deepwordbug(budget=0)
    with pytest.raises(ValueError, match="importance must be one of"):
        deepwordbug(importance="weight")
    with pytest.raises(ValueError, match="a constraint has a method `modifiable` or `accept`; 4 has neither"):
        TextAttack(InsertMarks(), [4])  # type: ignore[list-item]


def test_the_words_of_a_title_are_cut_once() -> None:
    calls = 0
    of = Words.of

    def counting(text: str) -> Words:
        nonlocal calls
        calls += 1
        return of(text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zoo.text_attack.attack.Words.of", counting)
        patch.setattr("zoo.text_attack.attack.make_result", lambda *given, **more: None)
        deepwordbug().attack(TITLES[0], noise)
    assert calls == 1
