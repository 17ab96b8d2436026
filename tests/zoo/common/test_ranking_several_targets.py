"""Several targets a row: ranks from the best non-targets only, and the variant of NDCG that counts hits."""

import math

import pytest
import torch
from torch import Tensor

from zoo.common import ranking
from zoo.common.ranking import METRICS, FullRankingMetrics, target_ranks


def random_targets(generator: torch.Generator, users: int, candidates: int, most: int) -> Tensor:
    """Distinct columns, the padding at random places; the first row names as many as there can be."""
    target_ids = torch.rand(users, candidates, generator=generator).argsort(1)[:, :most]
    padded = torch.rand(users, most, generator=generator) < torch.rand(users, 1, generator=generator)
    padded[0] = False
    padded[:, most // 2] = False
    return target_ids.masked_fill(padded, -1)


def random_scores(generator: torch.Generator, users: int, candidates: int, levels: int, excluded: float) -> Tensor:
    """Scores of so many different values, a share of them -inf; the last row is constant."""
    scores = torch.randint(0, levels, (users, candidates), generator=generator).float() - levels // 2
    scores = scores.masked_fill(torch.rand(users, candidates, generator=generator) < excluded, -torch.inf)
    scores[-1] = 0.0
    return scores


@pytest.mark.parametrize("limit", [1, 5, 20, 59, 60, 61, 200])
@pytest.mark.parametrize("most", [1, 7, 60])
@pytest.mark.parametrize("levels", [2, 12, 10**6])
@pytest.mark.parametrize("excluded", [0.0, 0.3, 0.95])
def test_ranks_below_the_limit_are_the_full_ones_and_the_others_reach_it(
    limit: int, most: int, levels: int, excluded: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "_passes_worth_a_top_list", lambda *_: 0)
    # Blocks of three rows.
    monkeypatch.setattr(ranking, "_BLOCK", {"cpu": 200})
    generator = torch.Generator().manual_seed(limit + most)
    scores = random_scores(generator, 50, 60, levels, excluded)
    target_ids = random_targets(generator, 50, 60, most)
    before = scores.clone()
    full = target_ranks(scores, target_ids)
    found = ranking._several_target_ranks(scores, target_ids, limit)
    below = full < limit
    assert torch.equal(found[below], full[below])
    assert (found[~below] >= limit).all()
    # What cannot be ranked stays beyond every cut-off.
    assert torch.equal(found > 10**9, full > 10**9)
    assert torch.equal(scores, before)


@pytest.mark.parametrize("ndcg_variant", ["standard", "hits"])
def test_metrics_are_the_same_by_passes_and_by_top_lists(ndcg_variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    scores, target_ids = random_scores(generator, 40, 90, 15, 0.2), random_targets(generator, 40, 90, 30)
    values, paths = [], []
    for name in ("_count_rivals", "_count_best_rivals"):
        plain = getattr(ranking, name)
        monkeypatch.setattr(ranking, name, lambda *args, plain=plain, name=name: paths.append(name) or plain(*args))
    for passes in (0, 1000):
        monkeypatch.setattr(ranking, "_passes_worth_a_top_list", lambda *_, passes=passes: passes)
        metric = FullRankingMetrics((1, 3, 20), ndcg_variant=ndcg_variant)
        metric.update(scores, target_ids)
        values.append({name: float(value) for name, value in metric.compute().items()})
    assert paths == ["_count_best_rivals", "_count_rivals"]
    assert values[0] == values[1]
    assert 0 < values[0]["ndcg@3"] < 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_top_lists_of_every_precision_rank_as_passes_do(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(30, 3000, generator=generator).to(dtype)
    target_ids = random_targets(generator, 30, 3000, 40)
    full, found = target_ranks(scores, target_ids), ranking._several_target_ranks(scores, target_ids, 20)
    assert torch.equal(found.clamp(max=20), full.clamp(max=20))
    assert (full < 20).any()


def test_rows_and_targets_may_lie_in_memory_in_any_order() -> None:
    generator = torch.Generator().manual_seed(2)
    scores, target_ids = torch.randn(1000, 20, generator=generator).T, random_targets(generator, 20, 1000, 60).T
    found = ranking._several_target_ranks(scores, target_ids.contiguous().T, 500)
    assert torch.equal(found.clamp(max=500), target_ranks(scores, target_ids.T.contiguous()).clamp(max=500))


def test_many_targets_are_ranked_by_top_lists_and_few_by_passes() -> None:
    passes = ranking._passes_worth_a_top_list
    # Seven thousand items: lists of 20, then of 1,000, then of all.
    assert 3 < passes(20, 7050) < 10
    assert 10 < passes(1000, 7050) < 100
    assert passes(7050, 7050) == passes(10**6, 7050) > 100


def evaluate(scores: Tensor, target_ids: Tensor, ks: tuple[int, ...], variant: str) -> dict[str, float]:
    metric = FullRankingMetrics(ks, ndcg_variant=variant)
    metric.update(scores, target_ids)
    return {name: float(value) for name, value in metric.compute().items()}


def test_hits_variant_divides_by_the_best_order_of_what_was_found() -> None:
    # Ranks 1 and 3 and 5 of three targets; a user with one of two targets at rank 2; a user with none in reach.
    scores = torch.tensor([[6.0, 5.0, 4.0, 3.0, 2.0, 1.0]] * 3)
    target_ids = torch.tensor([[1, 3, 5], [2, 5, -1], [5, 4, -1]])
    found = evaluate(scores, target_ids, (2, 4), "hits")
    gain = [1 / math.log2(rank + 2) for rank in range(6)]
    # Two hits within the larger cut-off: at 2 as well both count for the ideal list.
    assert found["ndcg@2"] == pytest.approx((gain[1] / (gain[0] + gain[1]) + 0 + 0) / 3)
    assert found["ndcg@4"] == pytest.approx(((gain[1] + gain[3]) / (gain[0] + gain[1]) + gain[2] / gain[0] + 0) / 3)
    standard = evaluate(scores, target_ids, (2, 4), "standard")
    assert standard["ndcg@4"] == pytest.approx(
        ((gain[1] + gain[3]) / (gain[0] + gain[1] + gain[2]) + gain[2] / (gain[0] + gain[1])) / 3
    )
    others = [f"{name}@{k}" for name in METRICS if name != "ndcg" for k in (2, 4)]
    assert [found[name] for name in others] == [standard[name] for name in others]


def test_hits_variant_is_never_lower_and_equal_where_users_have_one_target() -> None:
    generator = torch.Generator().manual_seed(3)
    scores = random_scores(generator, 60, 40, 100, 0.1)
    one, several = random_targets(generator, 60, 40, 1), random_targets(generator, 60, 40, 9)
    ks = (2, 5, 20)
    for target_ids in (one, one[:, 0]):
        assert evaluate(scores, target_ids, ks, "hits") == evaluate(scores, target_ids, ks, "standard")
    for row in range(len(scores)):
        part = (scores[row : row + 1], several[row : row + 1], ks)
        hits, standard = evaluate(*part, "hits"), evaluate(*part, "standard")
        assert all(hits[f"ndcg@{k}"] >= standard[f"ndcg@{k}"] for k in ks)
    assert evaluate(scores, several, ks, "hits")["ndcg@20"] > 1.1 * evaluate(scores, several, ks, "standard")["ndcg@20"]


def test_unknown_variant_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"one of \['standard', 'hits'\], got 'found'"):
        FullRankingMetrics(ndcg_variant="found")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scores_that_are_no_numbers_are_refused_beside_many_targets(value: float) -> None:
    scores = torch.rand(4, 3000)
    scores[2, 17] = value
    with pytest.raises(ValueError, match=r"NaN or \+inf in 1 of 4 rows: 2$"):
        FullRankingMetrics().update(scores, torch.arange(200).view(4, 50))


def test_target_ids_without_a_column_are_refused_as_rows_without_a_target() -> None:
    with pytest.raises(ValueError, match="row 0 of target_ids has no target"):
        FullRankingMetrics().update(torch.rand(2, 5), torch.empty(2, 0, dtype=torch.long))
