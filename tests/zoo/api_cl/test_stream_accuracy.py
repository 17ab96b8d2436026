"""Accuracies of a stream's tasks, counted by hand."""

from __future__ import annotations

import math

import pytest
import torch

from zoo.api_cl.stream_accuracy import StreamAccuracy
from zoo.api_cl.student_objective import ClassSets

SETS = ClassSets([[3, 0], [1, 2]])
NAN = float("nan")


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert found[name] == pytest.approx(values, nan_ok=True), name


def test_a_case_by_hand():
    metric = StreamAccuracy(SETS)
    logits = torch.tensor(
        [
            [1.0, 5.0, 0.0, 3.0],  # 3 of its own two, but 1 of all
            [4.0, 0.0, 0.0, 3.0],  # 0 both times
            [2.0, 9.0, 9.0, 1.0],  # 0 of its own, 1 and 2 of all
            [0.0, 0.0, 0.0, 1.0],  # 3 both times
        ]
    )
    labels = torch.tensor([3, 0, 0, 0])
    # Columns of the API are the classes 3 and 0: it says 3, 0, 3, 3.
    probs = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.7, 0.3]])
    metric.update(logits, labels, 0, 1, probs)
    metric.update(torch.tensor([[9.0, 5.0, 1.0, 0.0]]), torch.tensor([1]), 1, 1)
    same(
        metric.compute(),
        {"til": [3 / 4, 1.0], "cil": [1 / 4, 0.0], "fidelity": [3 / 4, NAN], "api": [2 / 4, NAN]},
    )


def test_batches_add_up_and_a_task_without_images_has_no_accuracy():
    metric = StreamAccuracy(SETS)
    for label in (3, 0, 0):
        metric.update(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.tensor([label]), 0, 0)
    same(metric.compute(), {"til": [2 / 3, NAN], "cil": [2 / 3, NAN], "fidelity": [NAN] * 2, "api": [NAN] * 2})
    metric.reset()
    metric.update(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.tensor([0]), 0, 0)
    assert metric.compute()["til"][0] == 1


def test_ties_and_nan_are_wrong_and_agree_with_no_api():
    metric = StreamAccuracy(SETS)
    logits = torch.tensor([[1.0, 0, 0, 1.0], [NAN] * 4, [NAN, 0, 0, 1.0], [1.0, 0, 0, NAN], [0.0, 0, 0, 0]])
    for label, column in ((3, 0), (0, 1)):
        probs = torch.eye(2)[[column] * 5]
        metric.update(logits, torch.full((5,), label), 0, 0, probs)
    same(metric.compute(), {"til": [0.0, NAN], "cil": [0.0, NAN], "fidelity": [0.0, NAN], "api": [1.0, NAN]})


def test_minus_infinity_elsewhere_is_no_tie():
    metric = StreamAccuracy(SETS)
    metric.update(torch.tensor([[-math.inf, 7.0, 7.0, -3.0]]), torch.tensor([3]), 0, 0)
    assert metric.compute()["til"][0] == metric.compute()["cil"][0] == 1


@pytest.mark.parametrize(("seen", "wanted"), [(0, 1.0), (1, 0.0)])
def test_class_incremental_answers_are_among_the_seen_classes(seen, wanted):
    metric = StreamAccuracy(SETS)
    metric.update(torch.tensor([[1.0, 9.0, 0.0, 0.0]]), torch.tensor([0]), 0, seen)
    assert metric.compute()["cil"][0] == wanted


def test_a_task_not_yet_learnt_competes_with_the_learnt_ones():
    metric = StreamAccuracy(SETS)
    metric.update(torch.tensor([[9.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]), torch.tensor([1, 1]), 1, 0)
    assert metric.compute()["til"][1] == 1.0 and metric.compute()["cil"][1] == 0.5


def test_classes_of_no_task_never_compete():
    metric = StreamAccuracy(ClassSets([[3, 0], [1, 2]], 5))
    metric.update(torch.tensor([[1.0, 0.0, 0.0, 0.0, 9.0]]), torch.tensor([0]), 0, 1)
    assert metric.compute()["cil"][0] == 1.0
