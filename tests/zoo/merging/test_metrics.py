"""Accuracy counts ties and NaN against the model; entropy is that of torch's categorical distribution."""

from __future__ import annotations

import math

import pytest
import torch

from tests.ranks import run_ranks
from zoo.merging.metrics import MeanEntropy, StrictAccuracy, TaskScores


def test_accuracy_is_the_share_of_strictly_highest_logits():
    logits, labels = torch.randn(200, 7), torch.randint(0, 7, (200,))
    metric = StrictAccuracy()
    for part in range(0, 200, 64):
        metric.update(logits[part : part + 64], labels[part : part + 64])
    assert float(metric.compute()) == pytest.approx(float((logits.argmax(1) == labels).double().mean()))


def test_a_constant_output_and_nan_score_zero():
    for logits in (torch.zeros(4, 3), torch.full((4, 3), float("nan")), torch.tensor([[1.0, float("nan"), 0]] * 4)):
        metric = StrictAccuracy()
        metric.update(logits, torch.tensor([0, 0, 0, 0]))
        assert float(metric.compute()) == 0


def test_entropy_is_the_mean_over_all_inputs():
    logits = torch.randn(10, 5)
    metric = MeanEntropy()
    metric.update(logits[:3])
    metric.update(logits[3:])
    expected = torch.distributions.Categorical(logits=logits.double()).entropy().mean()
    assert float(metric.compute()) == pytest.approx(float(expected), rel=1e-5)
    metric.reset()
    metric.update(torch.zeros(2, 5))
    assert float(metric.compute()) == pytest.approx(math.log(5))


def test_tasks_are_kept_apart_whatever_their_names():
    scores = TaskScores(["a.b", "val", "unseen"])
    scores.update("a.b", torch.eye(3), torch.arange(3))
    scores.update("val", torch.eye(2), torch.tensor([1, 1]))
    found = scores.compute()
    assert found["acc"] == {"a.b": 1.0, "val": 0.5} and set(found["entropy"]) == {"a.b", "val"}
    scores.reset()
    assert scores.compute() == {"acc": {}, "entropy": {}}


def test_without_labels_there_is_entropy_only():
    scores = TaskScores(["a"])
    scores.update("a", torch.zeros(2, 3), None)
    found = scores.compute()
    assert found["acc"] == {} and found["entropy"]["a"] == pytest.approx(math.log(3))


def ranked(rank: int) -> dict[str, float]:
    scores = TaskScores(["a", "b", "none"])
    scores.update("a", torch.eye(4)[: 1 + 2 * rank], torch.zeros(1 + 2 * rank, dtype=torch.long))
    if rank:
        scores.update("b", torch.eye(4), torch.arange(4))
    found = scores.compute()
    return {f"{key}/{task}": value for key, by_task in found.items() for task, value in by_task.items()}


def test_processes_share_their_counts_also_where_one_saw_no_batch_of_a_task(tmp_path):
    one, two = run_ranks(tmp_path, ranked)
    assert one == two and one["acc/a"] == 0.5 and one["acc/b"] == 1.0
    assert set(one) == {"acc/a", "acc/b", "entropy/a", "entropy/b"}
