"""What a set of attacks comes to: exposure before and after, lift with an interval, lift by popularity."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zoo.text_attack.attack import AttackResult

Measure = Literal["exposure", "goal"]

_NUM_GROUPS = 5
_CONFIDENCE = 0.95


def summarise(
    results: Sequence[AttackResult],
    popularity: Tensor | None = None,
    *,
    measure: Measure = "exposure",
    delta: float = 0.05,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, float]:
    """Means over targets of what attacks reached, the same for any order of the results.

    With the measure "exposure" the names are:

    - `exposure/pre`, `exposure/post`: means over targets before and after;
    - `exposure/gain`: their difference, the absolute lift, with `exposure/gain_low` and `exposure/gain_high`;
    - `lift`: their ratio, mean post / mean pre (x1.0 is no change; the relative lift is this less 1), with `lift_low`
      and `lift_high`. A ratio of means, since the ratio of a target that starts at 0 is infinite. 1 if both means are
      0, infinite if only the one before is;
    - `win_rate`: share of targets with post > pre; `success_rate`: with post > pre + delta;
    - `queries`, `scored`: mean number of titles that were scored, repeats counted once and counted each time;
    - `targets`: number of targets;
    - with `popularity`, for the fifths of the catalogue that hold a target, 1 being the least popular:
      `exposure/pre/fifth1`, `exposure/post/fifth1`, `exposure/gain/fifth1`, `lift/fifth1`, `win_rate/fifth1`,
      `targets/fifth1`.

    The bounds are the 2.5 and 97.5 percentiles over bootstrap samples of the targets.

    Args:
        results: One a target.
        popularity: Training interactions of every item of the catalogue, `(items,)`; items of equal popularity are told
            apart by their id.
        measure: "exposure": over all users, as the paper reports; "goal": over the anchor users, what the search saw.
        delta: Rise that counts as a success.
        resamples: Bootstrap samples.
        seed: Of the bootstrap.

    Raises:
        ValueError: If there is no result, a result lacks the measure, an item is not in the catalogue, or an argument
            is out of its range.
    """
    if measure not in get_args(Measure):
        raise ValueError(f"measure must be one of {list(get_args(Measure))}, got {measure!r}")
    if not results:
        raise ValueError("there is no attack to summarise")
    if resamples < 1 or not 0 <= delta < math.inf:
        raise ValueError(f"resamples must be at least 1 and delta at least 0, got {resamples} and {delta}")
    # Sums in one order: equal to the last bit for any order of targets, and any number of processes.
    results = sorted(results, key=lambda result: (result.item_id, result.perturbed))
    pre, post = _measured(results, measure, "pre"), _measured(results, measure, "post")
    summary = _means(pre, post, measure)
    draws = torch.randint(len(pre), (resamples, len(pre)), generator=torch.Generator().manual_seed(seed))
    sample_pre, sample_post = pre[draws].mean(1), post[draws].mean(1)
    for name, values in ((f"{measure}/gain", sample_post - sample_pre), ("lift", lift_of(sample_pre, sample_post))):
        tail = (1 - _CONFIDENCE) / 2
        # Nearest, because values between two infinite ones have no number.
        summary[f"{name}_low"] = float(values.quantile(tail, interpolation="nearest"))
        summary[f"{name}_high"] = float(values.quantile(1 - tail, interpolation="nearest"))
    summary["success_rate"] = float((post > pre + delta).double().mean())
    summary["queries"] = sum(result.n_queries for result in results) / len(results)
    summary["scored"] = sum(result.n_scored for result in results) / len(results)
    if popularity is not None:
        fifths = popularity_fifths(popularity)
        item_ids = torch.tensor([result.item_id for result in results])
        if int(item_ids.min()) < 0 or int(item_ids.max()) >= len(fifths):
            wrong = int(item_ids.min()) if int(item_ids.min()) < 0 else int(item_ids.max())
            raise ValueError(f"item ids must lie in 0..{len(fifths) - 1}, found {wrong}")
        groups = fifths[item_ids]
        for group in sorted(set(groups.tolist())):
            chosen = groups == group
            of_group = _means(pre[chosen], post[chosen], measure)
            summary |= {f"{name}/fifth{group}": value for name, value in of_group.items()}
    return summary


def _means(pre: Tensor, post: Tensor, measure: Measure) -> dict[str, float]:
    before, after = pre.mean(), post.mean()
    return {
        f"{measure}/pre": float(before),
        f"{measure}/post": float(after),
        f"{measure}/gain": float(after - before),
        "lift": float(lift_of(before, after)),
        "win_rate": float((post > pre).double().mean()),
        "targets": float(len(pre)),
    }


def _measured(results: Sequence[AttackResult], measure: Measure, when: str) -> Tensor:
    values = [getattr(result, f"{measure}_{when}") for result in results]
    for result, value in zip(results, values, strict=True):
        if value is None or not math.isfinite(value):
            raise ValueError(
                f"{measure}_{when} of item {result.item_id} is {value}, expected a number: fill it in, or choose "
                f"another measure out of {list(get_args(Measure))}"
            )
    return torch.tensor(values, dtype=torch.float64)


def lift_of(pre: Tensor, post: Tensor) -> Tensor:
    """The factor post / pre; 1 where both are 0, and infinite where only `pre` is.

    Args:
        pre: Means before, of any shape.
        post: Means after, of the same shape.
    """
    return torch.where((pre == 0) & (post == 0), torch.ones_like(pre), post / pre)


def popularity_fifths(popularity: Tensor) -> Tensor:
    """Which fifth of the catalogue each item belongs to, from 1, the least popular, to 5.

    Args:
        popularity: Interactions of each item, `(items,)`; of equally popular items those of lower id come first.

    Returns:
        int64 `(items,)`.

    Raises:
        ValueError: If it is no vector, or empty.
    """
    if popularity.ndim != 1 or not len(popularity):
        raise ValueError(f"popularity must have shape (items,) with an item, got {tuple(popularity.shape)}")
    popularity = popularity.cpu()
    ranks = torch.empty(len(popularity), dtype=torch.int64)
    ranks[popularity.argsort(stable=True)] = torch.arange(len(popularity))
    return 1 + ranks * _NUM_GROUPS // len(popularity)
