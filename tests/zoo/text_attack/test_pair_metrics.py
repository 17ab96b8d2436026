"""Metrics over pairs."""

from __future__ import annotations

import pytest
import torch
from torchmetrics.functional.classification import binary_auroc

from zoo.text_attack.pair_metrics import PairMetrics, area_under_roc


def test_the_area_is_that_of_torchmetrics_also_with_ties() -> None:
    draw = torch.Generator().manual_seed(0)
    scores = torch.randint(5, (40,), generator=draw) / 5
    labels = torch.randint(2, (40,), generator=draw)
    ours = area_under_roc(scores[labels == 1], scores[labels == 0])
    assert float(ours) == pytest.approx(float(binary_auroc(scores, labels)), abs=1e-6)
    assert area_under_roc(scores, scores[:0]).isnan()


def test_batches_of_any_size_count_alike_and_candidates_are_not_liked() -> None:
    draw = torch.Generator().manual_seed(0)
    scores, labels = torch.rand(7, 5, generator=draw), torch.ones(7)
    whole, parts = PairMetrics(), PairMetrics()
    whole.update(scores, labels)
    for part in (slice(0, 3), slice(3, 6), slice(6, 7)):
        parts.update(scores[part], labels[part])
    expected, found = whole.compute(), parts.compute()
    assert {k: float(v) for k, v in expected.items()} == {k: float(v) for k, v in found.items()}
    assert float(found["hr@1"]) == float((scores.argmax(1) == 0).float().mean())
    flat = torch.cat((torch.ones(7, 1), torch.zeros(7, 4)), 1).long()
    assert float(found["auc"]) == pytest.approx(float(binary_auroc(scores, flat)), abs=1e-6)
    assert float(found["acc"]) == pytest.approx(float((scores[:, 0] > 0.5).float().mean()))


def test_a_constant_scorer_ranks_last() -> None:
    metric = PairMetrics()
    metric.update(torch.full((3, 11), 0.5), torch.ones(3))
    values = metric.compute()
    assert float(values["hr@10"]) == 0 and float(values["auc"]) == 0.5 and float(values["mrr"]) == pytest.approx(1 / 11)


def test_without_candidates_there_is_no_ranking_and_nan_is_refused() -> None:
    metric = PairMetrics()
    metric.update(torch.tensor([[0.9], [0.2]]), torch.tensor([1.0, 1.0]))
    assert set(metric.compute()) == {"auc", "acc"}
    with pytest.raises(ValueError, match="not finite"):
        metric.update(torch.tensor([[torch.nan]]), torch.ones(1))
