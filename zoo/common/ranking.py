"""Ranking metrics over a whole catalogue: HR, NDCG, recall, precision, MRR and MAP at several cut-offs.

A column of the score matrix is a candidate. `-inf` takes a candidate out of the ranking (padding, items seen before);
ties count against the model, so that a constant output scores worst, never best.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchmetrics import Metric

if TYPE_CHECKING:
    from collections.abc import Sequence

METRICS = ("hr", "ndcg", "recall", "precision", "mrr", "map")
NDCG_VARIANTS = ("standard", "hits")

# Larger than any catalogue; kept away from the end of int64 so that adding to it cannot overflow.
_MISSED = 2**62
# Scores compared at once: on a CPU a block stays in the cache, on a GPU the launches are what costs.
_BLOCK = {"cpu": 2**18}
_DEFAULT_BLOCK = 2**26


def target_ranks(scores: Tensor, target_ids: Tensor) -> Tensor:
    """Rank of each target among the candidates of its row, 0 being the top.

    The rank of a row's i-th best target (i from 0) is i plus the number of candidates that are no targets and score at
    least as much: ties count against the model, and targets do not push each other further down than their own order.

    Args:
        scores: Floating point `(batch, num_candidates)`; larger is better and `-inf` is no candidate.
        target_ids: int64 column ids, `(batch,)`, or `(batch, num_targets)` padded with -1.

    Returns:
        int64 of the shape of `target_ids`, in the order of `target_ids`; a target that is padded or excluded by `-inf`
        has a rank beyond every cut-off.

    Raises:
        ValueError: If a score is NaN or +inf (the text names the rows), or if a target is no column.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[-torch.inf, 0.1, 0.9, 0.5], [-torch.inf, 0.7, 0.7, 0.2]])
        >>> target_ranks(scores, torch.tensor([3, 1])).tolist()  # the second target ties with another candidate
        [1, 1]
    """
    _check(scores, target_ids)
    if target_ids.ndim == 1:
        return _single_target_ranks(scores, target_ids)
    return _several_target_ranks(scores, target_ids)


def _check(scores: Tensor, target_ids: Tensor) -> None:
    if scores.ndim != 2 or not scores.is_floating_point():
        raise ValueError(
            f"scores must be floating point of shape (batch, num_candidates), got {scores.dtype} {tuple(scores.shape)}"
        )
    if target_ids.ndim not in (1, 2) or len(target_ids) != len(scores):
        raise ValueError(
            f"target_ids must have shape ({len(scores)},) or ({len(scores)}, num_targets) like scores "
            f"{tuple(scores.shape)}, got {tuple(target_ids.shape)}"
        )
    if scores.numel() == 0:
        raise ValueError(f"scores must have at least one row and one candidate, got {tuple(scores.shape)}")
    # The maximum propagates NaN, so one pass finds both.
    bad = (~(scores.amax(1) < torch.inf)).nonzero().flatten().tolist()
    if bad:
        shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        raise ValueError(f"scores are NaN or +inf in {len(bad)} of {len(scores)} rows: {shown}")
    lowest, highest = (int(x) for x in torch.aminmax(target_ids)) if target_ids.numel() else (0, 0)
    smallest = 0 if target_ids.ndim == 1 else -1
    if lowest < smallest or highest >= scores.shape[1]:
        wrong = lowest if lowest < smallest else highest
        raise ValueError(f"target_ids must lie in {smallest}..{scores.shape[1] - 1}, found {wrong}")


def _single_target_ranks(scores: Tensor, target_ids: Tensor) -> Tensor:
    target_scores = scores.gather(1, target_ids[:, None])
    # The target itself is among those that score at least its score.
    ranks = _count_at_least(scores, target_scores) - 1
    return ranks.masked_fill_(target_scores[:, 0] == -torch.inf, _MISSED)


def _several_target_ranks(scores: Tensor, target_ids: Tensor, limit: int | None = None) -> Tensor:
    """Ranks of `(batch, num_targets)` targets; with a `limit` only those below it are exact, the others reach it."""
    absent = target_ids < 0
    columns = target_ids.clamp(min=0)
    ordered, _ = columns.masked_fill(absent, -1).sort(dim=1)
    if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
        raise ValueError("target_ids must not name a column twice in one row")
    target_scores = scores.gather(1, columns).masked_fill(absent, -torch.inf)
    missed = target_scores == -torch.inf
    if limit is None or target_ids.shape[1] <= _passes_worth_a_top_list(limit, scores.shape[1]):
        rivals = _count_rivals(scores, target_scores)
    else:
        rivals = _count_best_rivals(scores, target_ids.masked_fill(absent, scores.shape[1]), target_scores, limit)
    order = target_scores.argsort(dim=1, descending=True, stable=True)
    return (rivals + order.argsort(dim=1)).masked_fill_(missed, _MISSED)


def _passes_worth_a_top_list(length: int, num_candidates: int) -> float:
    """How many passes over all scores take as long as finding the best `length` of each row.

    Measured on one CPU core with 500 to 100,000 candidates; on a CPU torch.topk keeps a heap for lists of up to a 64th
    of the candidates, and partitions and sorts for longer ones.
    """
    share = min(length / num_candidates, 1.0)
    return 5 + 1050 * share if share <= 1 / 64 else 35 + 150 * share


def _count_rivals(scores: Tensor, target_scores: Tensor) -> Tensor:
    """Number of candidates that are no targets and reach each target's score, `(batch, num_targets)`."""
    counts = torch.empty(target_scores.shape, dtype=torch.int64, device=scores.device)
    for place in range(target_scores.shape[1]):
        score = target_scores[:, place, None]
        counts[:, place] = _count_at_least(scores, score) - _count_at_least(target_scores, score)
    return counts


def _count_best_rivals(scores: Tensor, columns: Tensor, target_scores: Tensor, limit: int) -> Tensor:
    """As `_count_rivals`, but no further than `limit`: only the best so many non-targets of each row are looked at.

    Args:
        scores: `(batch, num_candidates)`.
        columns: The targets' columns `(batch, num_targets)`; `num_candidates` is padding.
        target_scores: `(batch, num_targets)`.
        limit: What is counted up to.
    """
    num_candidates = scores.shape[1]
    rows = max(1, _BLOCK.get(scores.device.type, _DEFAULT_BLOCK) // num_candidates)
    # The last column is there for the padding to be written to.
    block = scores.new_full((min(rows, len(scores)), num_candidates + 1), -torch.inf)
    best = []
    for part, targets in zip(torch.split(scores, rows), torch.split(columns, rows), strict=True):
        others = block[: len(part)]
        others[:, :-1] = part
        best.append(others.scatter_(1, targets, -torch.inf).topk(min(limit, num_candidates), dim=1).values)
    # Descending lists are ascending ones of the negated scores; `right` counts equal scores, as ties count.
    return torch.searchsorted(torch.cat(best).neg(), target_scores.neg().contiguous(), right=True)


def _count_at_least(scores: Tensor, thresholds: Tensor) -> Tensor:
    """Number of scores in each row of `(batch, n)` that reach the row's threshold `(batch, 1)`."""
    if scores.shape[1] >= 2**24:
        return torch.count_nonzero(scores >= thresholds, dim=1)
    # Summing a bool matrix converts all of it to int64 first (8 bytes a score, and 10 times slower on a CPU). Below
    # 2**24 a float32 sum of ones is exact.
    rows = max(1, _BLOCK.get(scores.device.type, _DEFAULT_BLOCK) // scores.shape[1])
    block = torch.empty(min(rows, len(scores)), scores.shape[1], device=scores.device)
    counts = [
        torch.ge(part, threshold, out=block[: len(part)]).sum(1)
        for part, threshold in zip(torch.split(scores, rows), torch.split(thresholds, rows), strict=True)
    ]
    return torch.cat(counts).long()


class FullRankingMetrics(Metric):
    """Means over users of ranking metrics with the whole catalogue as candidates.

    With T_u targets of user u, of which the i-th best has rank r_i (`target_ranks`, from 0):

    - hr@k: 1 if any target has r < k;
    - recall@k: share of the targets with r < k;
    - precision@k: number of targets with r < k, divided by k;
    - ndcg@k: sum over r_i < k of 1 / log2(r_i + 2), divided by the same sum for r_i = 0 .. min(T_u, k) - 1; in the
      variant "hits", of the code of LATTICE, MICRO and IDSF, for r_i = 0 .. min(H_u, k) - 1 with H_u the number of
      targets with r < max(ks), and 0 if H_u = 0: never lower, much higher where users have many targets, and equal
      where T_u = 1;
    - mrr@k: 1 / (r_0 + 1) if r_0 < k, else 0;
    - map@k: sum over r_i < k of (i + 1) / (r_i + 1), divided by min(T_u, k).

    The states are sums and one count, so results are right under DDP however many users each process has.

    Args:
        ks: Cut-offs.
        metrics: Names out of "hr", "ndcg", "recall", "precision", "mrr", "map".
        ndcg_variant: What the ideal list of ndcg holds: "standard", all targets, or "hits", those found at max(ks).

    Raises:
        ValueError: If a cut-off, a name or the variant is not valid.

    Example:
        >>> import torch
        >>> metric = FullRankingMetrics(ks=(1, 2), metrics=("hr", "mrr"))
        >>> metric.update(torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1]]), torch.tensor([2, 0]))
        >>> {name: float(value) for name, value in metric.compute().items()}
        {'hr@1': 0.5, 'hr@2': 1.0, 'mrr@1': 0.5, 'mrr@2': 0.75}
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    totals: Tensor
    num_users: Tensor

    def __init__(
        self, ks: Sequence[int] = (5, 10, 20), metrics: Sequence[str] = METRICS, ndcg_variant: str = "standard"
    ) -> None:
        super().__init__()
        if not ks or min(ks) < 1 or len(set(ks)) != len(ks):
            raise ValueError(f"ks must be distinct cut-offs of at least 1, got {list(ks)}")
        unknown = [name for name in metrics if name not in METRICS]
        if unknown or not metrics or len(set(metrics)) != len(metrics):
            raise ValueError(f"metrics must be distinct names out of {list(METRICS)}, got {list(metrics)}")
        if ndcg_variant not in NDCG_VARIANTS:
            raise ValueError(f"ndcg_variant must be one of {list(NDCG_VARIANTS)}, got {ndcg_variant!r}")
        self.ks, self.metrics, self.ndcg_variant = tuple(ks), tuple(metrics), ndcg_variant
        self.add_state(
            "totals", torch.zeros(len(self.metrics), len(self.ks), dtype=torch.float64), dist_reduce_fx="sum"
        )
        self.add_state("num_users", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, scores: Tensor, target_ids: Tensor) -> None:
        """Rank a batch of users.

        Args:
            scores: Floating point `(batch, num_candidates)`, column = candidate id; `-inf` is no candidate.
            target_ids: int64 `(batch,)`, or `(batch, num_targets)` padded with -1. Each row needs a target.

        Raises:
            ValueError: If scores are NaN or +inf, a target is no column, or a row has no target.
        """
        scores = scores.detach()
        _check(scores, target_ids)
        if target_ids.ndim == 1:
            ranks, num_targets = _single_target_ranks(scores, target_ids)[:, None], torch.ones_like(target_ids)
        else:
            # No metric tells ranks beyond the last cut-off apart, and so many targets at most have a better one.
            ranks = _several_target_ranks(scores, target_ids, max(self.ks)).sort(dim=1).values[:, : max(self.ks)]
            num_targets = (target_ids >= 0).sum(1)
            if not bool(num_targets.all()):
                raise ValueError(f"row {int(num_targets.argmin())} of target_ids has no target")
        self.totals += torch.stack([self._sums(ranks, num_targets, k) for k in self.ks], dim=1)
        self.num_users += len(ranks)

    def _sums(self, ranks: Tensor, num_targets: Tensor, k: int) -> Tensor:
        """Sum over users of each metric at `k`, `(num_metrics,)`, from ranks in ascending order."""
        real = ranks.to(torch.float64)
        hit = (ranks < k).to(torch.float64)
        order = torch.arange(1, ranks.shape[1] + 1, dtype=torch.float64, device=ranks.device)
        reachable = num_targets.clamp(max=k)
        ideal_hits = reachable
        if self.ndcg_variant == "hits":
            # Without a hit the gain is 0 whatever it is divided by.
            ideal_hits = (ranks < max(self.ks)).sum(1).clamp(min=1, max=k)
        per_user: dict[str, Tensor] = {}
        for name in self.metrics:
            if name == "hr":
                value = hit[:, 0]
            elif name == "recall":
                value = hit.sum(1) / num_targets
            elif name == "precision":
                value = hit.sum(1) / k
            elif name == "ndcg":
                ideal = (1 / torch.log2(order + 1)).cumsum(0)[ideal_hits.clamp(max=ranks.shape[1]) - 1]
                value = (hit / torch.log2(real + 2)).sum(1) / ideal
            elif name == "mrr":
                value = hit[:, 0] / (real[:, 0] + 1)
            else:
                value = (hit * order / (real + 1)).sum(1) / reachable
            per_user[name] = value
        return torch.stack([per_user[name].sum() for name in self.metrics])

    def compute(self) -> dict[str, Tensor]:
        """Means over all users, `{"hr@5": ..., "hr@10": ..., "ndcg@5": ...}`; NaN before the first update."""
        means = self.totals / self.num_users
        return {
            f"{name}@{k}": means[row, column]
            for row, name in enumerate(self.metrics)
            for column, k in enumerate(self.ks)
        }
