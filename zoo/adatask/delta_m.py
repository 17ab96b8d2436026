"""The relative change of many metrics against a baseline in one number."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

# Direction of known metrics: the first part of "metric/task".
HIGHER_IS_BETTER = {
    "accuracy": True,
    "auc": True,
    "f1": True,
    "miou": True,
    "pixel_accuracy": True,
    "r2": True,
    "user_auc": True,
    "within_11.25": True,
    "within_22.5": True,
    "within_30": True,
    "abs_err": False,
    "log_loss": False,
    "logloss": False,
    "mae": False,
    "mean_angle": False,
    "median_angle": False,
    "mse": False,
    "rel_err": False,
    "rmse": False,
}


def delta_m(
    results: Mapping[str, float],
    baseline: Mapping[str, float],
    higher_is_better: Mapping[str, bool] | None = None,
    average: Literal["metric", "task"] = "metric",
    sign: Literal["lower_is_better", "higher_is_better"] = "lower_is_better",
) -> float:
    """Mean relative change against a baseline, usually one model per task, in percent.

    With l_i = 1 if higher is better and 0 otherwise, 100 / M sum_i (-1)^l_i (M_i - B_i) / B_i: negative means better
    than the baseline. The vision literature reports this flat mean; others report the opposite sign, and the mean over
    tasks of each task's mean, which is the same number only where tasks have equally many metrics.

    Args:
        results: Value by "metric/task", as in "miou/segmentation".
        baseline: The same names.
        higher_is_better: Direction by "metric/task" or by "metric"; what it lacks is looked up in `HIGHER_IS_BETTER`.
        average: "metric" for the flat mean, "task" for the mean within each task first.
        sign: "lower_is_better" as above, or "higher_is_better" for its negative, a mean improvement.

    Returns:
        Percent.

    Raises:
        ValueError: If the two hold different names or none, a name is not "metric/task" or its direction is unknown, a
            value is NaN, a baseline value is not positive and finite, or an option is unknown.

    Example:
        >>> results = {"miou/segmentation": 0.77, "abs_err/depth": 0.9}
        >>> baseline = {"miou/segmentation": 0.7, "abs_err/depth": 1.0}
        >>> round(delta_m(results, baseline), 6)
        -10.0
    """
    if average not in ("metric", "task"):
        raise ValueError(f"average must be 'metric' or 'task', got {average!r}")
    if sign not in ("lower_is_better", "higher_is_better"):
        raise ValueError(f"sign must be 'lower_is_better' or 'higher_is_better', got {sign!r}")
    if not results or results.keys() != baseline.keys():
        raise ValueError(
            "results and baseline must hold the same metrics, at least one; "
            f"only in results: {sorted(results.keys() - baseline.keys())}, "
            f"only in baseline: {sorted(baseline.keys() - results.keys())}"
        )
    changes: dict[str, list[float]] = {}
    for name, value in results.items():
        metric, _, task = name.partition("/")
        if not metric or not task:
            raise ValueError(f"a metric must be named 'metric/task', got {name!r}")
        reference = baseline[name]
        if math.isnan(value) or not 0 < reference < math.inf:
            raise ValueError(f"{name}: needs a value and a positive, finite baseline, got {value} against {reference}")
        change = 100 * (value - reference) / reference
        worse = -change if _higher_is_better(name, metric, higher_is_better or {}) else change
        changes.setdefault(task if average == "task" else "", []).append(worse)
    mean = sum(sum(group) / len(group) for group in changes.values()) / len(changes)
    return mean if sign == "lower_is_better" else -mean


def _higher_is_better(name: str, metric: str, given: Mapping[str, bool]) -> bool:
    for key, table in ((name, given), (metric, given), (metric, HIGHER_IS_BETTER)):
        if key in table:
            return table[key]
    raise ValueError(f"whether higher is better is not known of {name!r}: pass higher_is_better={{{metric!r}: ...}}")
