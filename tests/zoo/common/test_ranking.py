import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchmetrics.retrieval import (
    RetrievalHitRate,
    RetrievalMAP,
    RetrievalMRR,
    RetrievalNormalizedDCG,
    RetrievalPrecision,
    RetrievalRecall,
)

from tests.ranks import run_ranks
from zoo.common import ranking
from zoo.common.ranking import METRICS, FullRankingMetrics, target_ranks

KS = (1, 3, 10)


def brute_force_ranks(scores: list[float], targets: list[int]) -> list[float]:
    """Ranks of one user's targets, best first, by comparing every pair."""
    reachable = sorted((t for t in targets if scores[t] > -math.inf), key=lambda t: -scores[t])
    ranks: list[float] = []
    for order, target in enumerate(reachable):
        rivals = sum(1 for c, score in enumerate(scores) if c not in targets and score >= scores[target])
        ranks.append(rivals + order)
    return ranks + [math.inf] * (len(targets) - len(ranks))


def brute_force_metrics(rows: list[tuple[list[float], list[int]]], ks: tuple[int, ...]) -> dict[str, float]:
    """All metrics from their definitions, user by user in Python floats."""
    sums = {f"{name}@{k}": 0.0 for name in METRICS for k in ks}
    for scores, targets in rows:
        ranks = brute_force_ranks(scores, targets)
        for k in ks:
            inside = [r for r in ranks if r < k]
            best = min(len(targets), k)
            sums[f"hr@{k}"] += bool(inside)
            sums[f"recall@{k}"] += len(inside) / len(targets)
            sums[f"precision@{k}"] += len(inside) / k
            sums[f"ndcg@{k}"] += sum(1 / math.log2(r + 2) for r in inside) / sum(
                1 / math.log2(i + 2) for i in range(best)
            )
            sums[f"mrr@{k}"] += 1 / (ranks[0] + 1) if ranks[0] < k else 0.0
            sums[f"map@{k}"] += sum((i + 1) / (r + 1) for i, r in enumerate(inside)) / best
    return {name: total / len(rows) for name, total in sums.items()}


def evaluate(scores: Tensor, target_ids: Tensor, ks: tuple[int, ...] = KS) -> dict[str, float]:
    metric = FullRankingMetrics(ks)
    metric.update(scores, target_ids)
    return {name: float(value) for name, value in metric.compute().items()}


def quantised_scores(generator: torch.Generator, users: int, candidates: int) -> Tensor:
    """Scores with many ties and about a quarter of the candidates excluded, targets among them."""
    scores = torch.randint(0, 12, (users, candidates), generator=generator).double()
    return scores.masked_fill(torch.rand(users, candidates, generator=generator) < 0.25, -torch.inf)


@pytest.mark.parametrize("num_targets", [None, 1, 4])
@pytest.mark.parametrize("seed", range(3))
def test_equals_brute_force_with_ties_and_exclusions(num_targets: int | None, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = quantised_scores(generator, 40, 30)
    if num_targets is None:
        target_ids = torch.randint(0, 30, (40,), generator=generator)
        listed = [[t] for t in target_ids.tolist()]
    else:
        target_ids = torch.rand(40, 30, generator=generator).argsort(1)[:, :num_targets]
        target_ids[:10, 1:] = -1
        # The padding may stand anywhere.
        target_ids[5:10] = target_ids[5:10].flip(1)
        listed = [[t for t in row if t >= 0] for row in target_ids.tolist()]
    expected = brute_force_metrics(list(zip(scores.tolist(), listed, strict=True)), KS)
    assert evaluate(scores, target_ids) == pytest.approx(expected, abs=1e-12)


def test_ranks_stand_where_their_targets_stand() -> None:
    scores = torch.tensor([[-torch.inf, 5.0, 4.0, 3.0, 3.0, 2.0]])
    # By score: 1 (5.0) then 4 (3.0, behind 2 and tied 3) then 5; 0 is excluded, -1 is padding.
    ranks = target_ranks(scores, torch.tensor([[5, -1, 1, 4, 0]]))[0]
    assert ranks[[2, 3, 0]].tolist() == [0, 3, 4]
    assert (ranks[[1, 4]] > 10**9).all()


@pytest.mark.parametrize("num_targets", [1, 3])
def test_equals_torchmetrics_where_nothing_ties(num_targets: int) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(25, 40, generator=generator, dtype=torch.float64)
    target_ids = torch.rand(25, 40, generator=generator).argsort(1)[:, :num_targets]
    relevant = torch.zeros(25, 40, dtype=torch.bool).scatter(1, target_ids, True)
    queries = torch.arange(25)[:, None].expand_as(scores).flatten()
    ours = evaluate(scores, target_ids)
    for k in KS:
        library = {
            "hr": RetrievalHitRate(top_k=k),
            "ndcg": RetrievalNormalizedDCG(top_k=k),
            "recall": RetrievalRecall(top_k=k),
            "precision": RetrievalPrecision(top_k=k),
            "mrr": RetrievalMRR(top_k=k),
        }
        if num_targets <= k:
            # The library divides by the targets that were found, the field by those that could be.
            library["map"] = RetrievalMAP(top_k=40)
        for name, metric in library.items():
            metric.update(scores.flatten(), relevant.flatten(), queries)
            mine = evaluate(scores, target_ids, (40,))["map@40"] if name == "map" else ours[f"{name}@{k}"]
            assert mine == pytest.approx(float(metric.compute()), abs=1e-6), f"{name}@{k}"


def test_target_on_top_scores_one_everywhere() -> None:
    target_ids = torch.tensor([3, 7, 1])
    scores = torch.rand(3, 9).scatter(1, target_ids[:, None], 2.0)
    values = evaluate(scores, target_ids, ks=(1,))
    assert all(value == 1.0 for value in values.values())


@pytest.mark.parametrize("target_ids", [torch.tensor([3, 7]), torch.tensor([[3, 1], [7, -1]])])
def test_constant_scores_score_zero(target_ids: Tensor) -> None:
    values = evaluate(torch.ones(2, 50), target_ids, ks=(5, 20))
    assert all(value == 0.0 for value in values.values())


def test_random_scores_hit_in_proportion_to_the_cutoff() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(5000, 100, generator=generator)
    values = evaluate(scores, torch.randint(0, 100, (5000,), generator=generator), ks=(5, 20))
    # Four standard errors of 5000 draws.
    assert values["hr@5"] == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / 5000))
    assert values["hr@20"] == pytest.approx(0.20, abs=4 * math.sqrt(0.2 * 0.8 / 5000))


def test_excluded_candidate_does_not_lower_the_rank() -> None:
    scores = torch.tensor([[0.0, 9.0, 5.0, 1.0]])
    assert target_ranks(scores, torch.tensor([2])).tolist() == [1]
    scores[0, 1] = -torch.inf
    assert target_ranks(scores, torch.tensor([2])).tolist() == [0]


def test_excluded_target_is_a_miss_even_where_everything_is_excluded() -> None:
    scores = torch.full((1, 4), -torch.inf)
    assert evaluate(scores, torch.tensor([2]), ks=(4, 100)) == {f"{m}@{k}": 0.0 for m in METRICS for k in (4, 100)}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scores_that_are_no_numbers_are_refused_with_their_rows(value: float) -> None:
    scores = torch.rand(6, 5)
    scores[2, 0] = scores[4, 3] = value
    with pytest.raises(ValueError, match=r"NaN or \+inf in 2 of 6 rows: 2, 4$"):
        FullRankingMetrics().update(scores, torch.ones(6, dtype=torch.long))


@pytest.mark.parametrize(
    ("scores", "target_ids", "message"),
    [
        (torch.rand(2, 5), torch.tensor([1, 5]), "0..4, found 5"),
        (torch.rand(2, 5), torch.tensor([1, -1]), "0..4, found -1"),
        (torch.rand(2, 5), torch.tensor([[1, -2], [0, 1]]), r"-1..4, found -2"),
        (torch.rand(2, 5), torch.tensor([[1, 1], [0, 1]]), "twice"),
        (torch.rand(2, 5), torch.tensor([[1, 2], [-1, -1]]), "row 1 of target_ids has no target"),
        (torch.rand(2, 5), torch.tensor([1, 2, 3]), r"shape \(2,\)"),
        (torch.ones(2, 5, dtype=torch.long), torch.tensor([1, 2]), "torch.int64"),
        (torch.rand(0, 5), torch.tensor([], dtype=torch.long), "at least one row"),
    ],
)
def test_wrong_input_is_refused_with_what_was_found(scores: Tensor, target_ids: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FullRankingMetrics().update(scores, target_ids)


@pytest.mark.parametrize(
    ("ks", "metrics", "message"),
    [((0, 5), ("hr",), "ks"), ((), ("hr",), "ks"), ((5,), ("hit",), "'hit'"), ((5, 5), ("hr",), "distinct")],
)
def test_wrong_settings_are_refused(ks: tuple[int, ...], metrics: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FullRankingMetrics(ks, metrics)


def test_bf16_scores_rank_as_their_fp32_copies() -> None:
    scores = torch.randn(50, 400, generator=torch.Generator().manual_seed(3)).bfloat16()
    target_ids = torch.arange(50)
    assert torch.equal(target_ranks(scores, target_ids), target_ranks(scores.float(), target_ids))


def test_blocks_of_rows_give_what_one_block_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, target_ids = torch.rand(23, 30), torch.arange(23)
    expected = target_ranks(scores, target_ids)
    monkeypatch.setattr(ranking, "_BLOCK", {"cpu": 100})
    assert torch.equal(target_ranks(scores, target_ids), expected)


def test_batches_of_any_size_add_up_and_reset_forgets() -> None:
    scores, target_ids = torch.rand(30, 20), torch.randint(0, 20, (30,))
    metric = FullRankingMetrics(KS)
    metric.update(torch.rand(4, 20), torch.zeros(4, dtype=torch.long))
    metric.reset()
    for part in (slice(0, 1), slice(1, 20), slice(20, 30)):
        metric.update(scores[part], target_ids[part])
    values = {name: float(value) for name, value in metric.compute().items()}
    assert values == pytest.approx(evaluate(scores, target_ids), abs=1e-12)


def _evaluate_share(rank: int, scores: Tensor, target_ids: Tensor) -> dict[str, float]:
    share = slice(0, 7) if rank == 0 else slice(7, None)
    return evaluate(scores[share], target_ids[share])


def test_two_processes_with_unequal_shares_equal_one(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    scores, target_ids = quantised_scores(generator, 30, 25), torch.randint(0, 25, (30,), generator=generator)
    expected = evaluate(scores, target_ids)
    for values in run_ranks(tmp_path, _evaluate_share, scores, target_ids):
        assert values == pytest.approx(expected, abs=1e-12)
