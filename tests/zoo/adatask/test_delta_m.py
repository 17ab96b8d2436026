"""Delta m against the published table and by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from zoo.adatask.delta_m import HIGHER_IS_BETTER, delta_m

CITYSCAPES = ("abs_err/depth", "rel_err/depth", "miou/segmentation", "pixel_accuracy/segmentation")
SINGLE_TASK = dict(zip(CITYSCAPES, (0.0125, 27.77, 74.01, 93.16), strict=True))
ROWS = {
    22.3: (0.0152, 47.00, 75.01, 93.40),
    18.3: (0.0145, 44.16, 75.18, 93.38),
    8.4: (0.0128, 36.85, 75.02, 93.40),
}


@pytest.mark.parametrize("average", ["metric", "task"])
@pytest.mark.parametrize("expected", ROWS)
def test_the_cityscapes_table_is_met_by_both_averages_and_with_the_other_sign(average: Any, expected: float) -> None:
    results = dict(zip(CITYSCAPES, ROWS[expected], strict=True))
    assert delta_m(results, SINGLE_TASK, average=average) == pytest.approx(expected, abs=0.05)
    assert delta_m(results, SINGLE_TASK, average=average, sign="higher_is_better") == pytest.approx(-expected, abs=0.05)


def test_averages_differ_where_tasks_have_unequally_many_metrics() -> None:
    baseline = {"miou/a": 0.5, "mean_angle/b": 10.0, "median_angle/b": 10.0, "within_30/b": 0.5}
    results = {"miou/a": 0.4, "mean_angle/b": 9.0, "median_angle/b": 9.5, "within_30/b": 0.55}
    # In percent, worse is positive: 20 for a; -10, -5 and -10 for b.
    assert delta_m(results, baseline) == pytest.approx((20 - 10 - 5 - 10) / 4)
    assert delta_m(results, baseline, average="task") == pytest.approx((20 - 25 / 3) / 2)


def test_directions_can_be_given_by_metric_or_by_full_name_over_the_known_ones() -> None:
    results, baseline = {"cost/a": 2.0, "cost/b": 2.0}, {"cost/a": 1.0, "cost/b": 1.0}
    assert delta_m(results, baseline, {"cost": False}) == pytest.approx(100)
    assert delta_m(results, baseline, {"cost": False, "cost/b": True}) == pytest.approx(0)
    assert delta_m({"auc/a": 2.0}, {"auc/a": 1.0}, {"auc": False}) == pytest.approx(100)


def test_every_known_metric_has_the_direction_of_its_kind() -> None:
    errors = {name for name, higher in HIGHER_IS_BETTER.items() if not higher}
    assert errors == {
        "abs_err", "log_loss", "logloss", "mae", "mean_angle", "median_angle", "mse", "rel_err", "rmse",
    }  # fmt: skip
    for name in HIGHER_IS_BETTER:
        assert (delta_m({f"{name}/a": 2.0}, {f"{name}/a": 1.0}) > 0) == (name in errors)


def test_a_diverged_metric_is_infinitely_worse() -> None:
    results = {"abs_err/a": math.inf, "auc/b": 0.5}
    assert delta_m(results, {"abs_err/a": 1.0, "auc/b": 0.5}) == math.inf


@pytest.mark.parametrize(
    ("results", "baseline", "message"),
    [
        ({}, {}, "at least one"),
        ({"auc/a": 1.0}, {"auc/b": 1.0}, r"only in results: \['auc/a'\], only in baseline: \['auc/b'\]"),
        ({"auc": 1.0}, {"auc": 1.0}, "'metric/task', got 'auc'"),
        ({"cost/a": 1.0}, {"cost/a": 1.0}, "whether higher is better is not known of 'cost/a'"),
        ({"auc/a": math.nan}, {"auc/a": 1.0}, "auc/a: .* got nan against 1.0"),
        ({"auc/a": 1.0}, {"auc/a": 0.0}, "positive, finite baseline, got 1.0 against 0.0"),
        ({"r2/a": 1.0}, {"r2/a": -0.1}, "positive, finite baseline"),
        ({"r2/a": 1.0}, {"r2/a": math.inf}, "positive, finite baseline"),
    ],
)
def test_what_cannot_be_compared_is_named(results: dict[str, float], baseline: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        delta_m(results, baseline)


@pytest.mark.parametrize("options", [{"average": "mean"}, {"sign": "positive"}])
def test_an_unknown_option_is_named(options: Any) -> None:
    with pytest.raises(ValueError, match=r"must be .* got '(mean|positive)'"):
        delta_m({"auc/a": 1.0}, {"auc/a": 1.0}, **options)
