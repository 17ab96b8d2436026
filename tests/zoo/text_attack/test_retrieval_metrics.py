"""Metrics of rankings: against a loop over users, and the same for any cut into batches."""

from __future__ import annotations

import math

import pytest
import torch

from zoo.text_attack.retrieval_metrics import RetrievalMetrics


def by_hand(scores: torch.Tensor, targets: torch.Tensor, ks: tuple[int, ...]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for row, target in zip(scores.tolist(), targets.tolist(), strict=True):
        others = [value for item, value in enumerate(row) if item != target and value > -math.inf]
        rank = sum(value >= row[target] for value in others)
        values = {"mrr": 1 / (rank + 1), "auc": 1 - rank / len(others) if others else 1.0}
        for k in ks:
            values |= {f"recall@{k}": float(rank < k), f"ndcg@{k}": (rank < k) / math.log2(rank + 2)}
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value / len(scores)
    return sums


def scores_with_ties() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    scores = torch.randint(0, 9, (33, 25)).float()
    targets = torch.randint(25, (33,))
    holes = (torch.rand(33, 25) < 0.2).scatter(1, targets[:, None], False)
    return scores.masked_fill(holes, -torch.inf), targets


def test_values_are_those_of_a_loop_over_users() -> None:
    scores, targets = scores_with_ties()
    metric = RetrievalMetrics(ks=(3, 10))
    metric.update(scores, targets)
    found = {name: float(value) for name, value in metric.compute().items()}
    assert found == pytest.approx(by_hand(scores, targets, (3, 10)), abs=1e-12)


@pytest.mark.parametrize("size", [32, 8, 1])
def test_a_last_batch_of_one_user_counts_as_one_user(size: int) -> None:
    scores, targets = scores_with_ties()
    whole, parts = RetrievalMetrics(), RetrievalMetrics()
    whole.update(scores, targets)
    for rows in torch.split(torch.arange(33), size):
        parts.update(scores[rows], targets[rows])
    assert {k: float(v) for k, v in parts.compute().items()} == pytest.approx(
        {k: float(v) for k, v in whole.compute().items()}, abs=1e-12
    )


def test_a_target_without_rivals_is_the_best_possible() -> None:
    metric = RetrievalMetrics(ks=[1])
    metric.update(torch.tensor([[-torch.inf, 0.5]]), torch.tensor([1]))
    assert {name: float(value) for name, value in metric.compute().items()} == {
        "recall@1": 1.0,
        "ndcg@1": 1.0,
        "mrr": 1.0,
        "auc": 1.0,
    }


def test_reset_forgets_all_users() -> None:
    scores, targets = scores_with_ties()
    metric, fresh = RetrievalMetrics(), RetrievalMetrics()
    metric.update(scores, targets)
    metric.reset()
    metric.update(scores[:4], targets[:4])
    fresh.update(scores[:4], targets[:4])
    assert metric.compute() == fresh.compute()
