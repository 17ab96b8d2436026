"""The metrics of continual learning, on matrices whose numbers are known."""

from __future__ import annotations

import math

import pytest
import torch

from zoo.api_cl.continual_metrics import ContinualMetrics

ROWS = [[0.9, 0.3, 0.2], [0.6, 0.8, 0.5], [0.7, 0.4, 0.95]]


@pytest.fixture
def metrics():
    metrics = ContinualMetrics(3)
    for k, row in enumerate(ROWS):
        metrics.add_row(k, row)
    return metrics


def test_a_matrix_made_by_hand_has_the_numbers_of_the_formulas(metrics):
    assert metrics.acc() == pytest.approx((0.7 + 0.4 + 0.95) / 3)
    assert metrics.bwt() == pytest.approx(((0.7 - 0.9) + (0.4 - 0.8)) / 2)
    assert metrics.forgetting() == pytest.approx(((0.9 - 0.7) + (0.8 - 0.4)) / 2)
    assert metrics.fwt() == pytest.approx((0.3 + 0.5) / 2)
    assert metrics.fwt([0.9, 0.1, 0.2]) == pytest.approx((0.2 + 0.3) / 2)


def test_forgetting_is_measured_from_the_best_accuracy_since_training_and_is_never_negative():
    metrics = ContinualMetrics(3)
    # Task 1 is best ahead of its training, which does not count; task 0 gets better, which is no forgetting.
    for k, row in enumerate([[0.5, 0.99, 0.0], [0.6, 0.7, 0.0], [0.65, 0.5, 0.9]]):
        metrics.add_row(k, row)
    assert metrics.forgetting() == pytest.approx((0.0 + 0.2) / 2)
    assert metrics.bwt() == pytest.approx((0.15 - 0.2) / 2)


def test_after_a_task_only_the_tasks_so_far_count(metrics):
    assert metrics.acc(1) == pytest.approx((0.6 + 0.8) / 2)
    assert metrics.bwt(1) == metrics.bwt(after=1) == pytest.approx(-0.3)
    assert metrics.forgetting(1) == pytest.approx(0.3)
    assert metrics.fwt(after=1) == pytest.approx(0.3)
    assert metrics.acc(0) == pytest.approx(0.9)


@pytest.mark.parametrize("number", ["bwt", "forgetting", "fwt"])
def test_one_task_has_no_transfer_and_no_forgetting(number):
    metrics = ContinualMetrics(1)
    metrics.add_row(0, [0.8])
    assert metrics.acc() == pytest.approx(0.8)
    assert math.isnan(getattr(metrics, number)())
    assert math.isnan(getattr(ContinualMetrics(1), number)())


def test_numbers_that_need_an_unknown_accuracy_are_nan():
    metrics = ContinualMetrics(3)
    metrics.add_row(0, [0.9, math.nan, math.nan])
    metrics.add_row(1, [0.8, 0.7, math.nan])
    assert math.isnan(metrics.acc()) and math.isnan(metrics.bwt()) and math.isnan(metrics.forgetting())
    assert metrics.acc(1) == pytest.approx(0.75) and metrics.forgetting(1) == pytest.approx(0.1)
    assert math.isnan(metrics.fwt(after=1))


def test_neither_the_input_nor_the_stored_matrix_is_changed_by_reading(metrics):
    row = torch.tensor([0.1, 0.2, 0.3])
    metrics.add_row(0, row)
    before = metrics.matrix.clone()
    metrics.acc(), metrics.bwt(), metrics.forgetting(), metrics.fwt(row), metrics.table()
    assert torch.equal(metrics.matrix, before) and torch.equal(row, torch.tensor([0.1, 0.2, 0.3]))
    metrics.matrix.zero_()
    row.zero_()
    assert torch.equal(metrics.matrix, before)
    assert before.dtype == torch.float64 and before.shape == (3, 3)


def test_a_table_has_a_row_for_each_trained_task():
    metrics = ContinualMetrics(2)
    metrics.add_row(0, [0.5, 0.25])
    assert metrics.table() == (["after", "task 0", "task 1", "mean so far"], [["task 0", 0.5, 0.25, 0.5]])
    metrics.add_row(1, [0.25, 0.75])
    columns, rows = metrics.table(["cats", "dogs"])
    assert columns == ["after", "cats", "dogs", "mean so far"] and rows[1] == ["dogs", 0.25, 0.75, 0.5]


def test_the_state_survives_a_checkpoint(metrics, tmp_path):
    torch.save(metrics.state_dict(), tmp_path / "state.pt")
    other = ContinualMetrics(3)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other.matrix, metrics.matrix)
    other.add_row(0, [0.0, 0.0, 0.0])
    assert metrics.matrix[0, 0] == 0.9
    with pytest.raises(ValueError, match="the state holds 3 tasks, this stream has 2"):
        ContinualMetrics(2).load_state_dict(metrics.state_dict())


def test_what_does_not_fit_is_refused(metrics):
    with pytest.raises(ValueError, match="num_tasks must be at least 1, got 0"):
        ContinualMetrics(0)
    with pytest.raises(ValueError, match="the tasks are 0 to 2, got 3"):
        metrics.add_row(3, [0.0] * 3)
    with pytest.raises(ValueError, match="the tasks are 0 to 2, got -1"):
        metrics.acc(-1)
    with pytest.raises(ValueError, match=r"expected 3 accuracies, one a task, got the shape \(2,\)"):
        metrics.add_row(0, [0.1, 0.2])
    with pytest.raises(ValueError, match=r"expected 3 accuracies, one a task, got the shape \(1,\)"):
        metrics.fwt([0.1])
