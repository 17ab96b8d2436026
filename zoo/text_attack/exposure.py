"""How many users find an item among their best K, without ranking the catalogue for every title that is tried.

The score of an item's new title only has to be compared with the K-th best of a user's other items. These thresholds
come from one pass over users and items and serve every target; a title then costs one product with the users.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torchmetrics import Metric

if TYPE_CHECKING:
    from collections.abc import Iterable

Ties = Literal["pessimistic", "optimistic"]

# Scores held at once where the size of a block is not given: 64 MiB of float32.
_BLOCK_SCORES = 2**24


class TopScores(NamedTuple):
    """The best K + 1 items of each user, from which the thresholds of every target follow.

    Attributes:
        values: Scores `(users, K + 1)`, descending.
        ids: Items of these scores, int64 `(users, K + 1)`.
        seen: Pairs int64 `(pairs, 2)` of (row of `values`, item) that are not ranked, or None if all items are.
    """

    values: Tensor
    ids: Tensor
    seen: Tensor | None = None

    @property
    def k(self) -> int:
        """Length of the list that a user is shown."""
        return self.values.shape[1] - 1

    def of_users(self, rows: Tensor) -> TopScores:
        """The lists of some users only, as the anchor users of a search.

        Args:
            rows: Distinct rows of `values`, int64 `(chosen,)`.

        Raises:
            ValueError: If there is no row, or one is out of range or named twice.
        """
        num_users = len(self.values)
        if not len(rows):
            raise ValueError("the set of users is empty: exposure is a mean over users")
        rows = rows.to(self.values.device)
        lowest, highest = (int(bound) for bound in torch.aminmax(rows))
        if lowest < 0 or highest >= num_users:
            raise ValueError(f"rows must lie in 0..{num_users - 1}, found {lowest if lowest < 0 else highest}")
        places = torch.full((num_users,), -1, dtype=torch.int64, device=rows.device)
        places[rows] = torch.arange(len(rows), device=rows.device)
        if int((places >= 0).sum()) != len(rows):
            raise ValueError(f"rows must be distinct, got {len(rows)} with repeats")
        seen = self.seen
        if seen is not None:
            new_rows = places[seen[:, 0]]
            seen = torch.stack([new_rows, seen[:, 1]], dim=1)[new_rows >= 0]
        return TopScores(self.values[rows], self.ids[rows], seen)


def check_cut(k: int, num_items: int) -> None:
    """Refuse a list that cannot leave an item out.

    Args:
        k: Length of the list.
        num_items: Size of the catalogue, the target included.

    Raises:
        ValueError: If `k` is below 1, or not below the number of items.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if k >= num_items:
        raise ValueError(
            f"k = {k} must be less than the number of items, {num_items}: in a list of all items each has exposure 1"
        )


def top_scores(users: Tensor, items: Tensor, k: int, block: int | None = None, seen: Tensor | None = None) -> TopScores:
    """The best K + 1 items of each user where a score is an inner product.

    Args:
        users: Vectors `(users, size)`; of unit length and divided by the temperature if the score is a cosine.
        items: Vectors `(items, size)`.
        k: Length K of the list that a user is shown.
        block: Users whose scores are held at once; None for what fits 64 MiB.
        seen: Pairs int64 `(pairs, 2)` of (user row, item id) to leave out of the ranking (`mask_seen`).

    Raises:
        ValueError: If K is not below the number of items, shapes do not fit, an id is out of range, or a value or a
            score is NaN or infinite.

    Example:
        >>> import torch
        >>> top = top_scores(torch.eye(2), torch.tensor([[3.0, 1.0], [2.0, 2.0], [1.0, 3.0]]), k=1)
        >>> thresholds(top, 0).tolist(), thresholds(top, 1).tolist()
        ([2.0, 3.0], [3.0, 3.0])
    """
    if users.ndim != 2 or items.ndim != 2 or users.shape[1] != items.shape[1]:
        raise ValueError(
            f"users and items must be matrices of one width, got {tuple(users.shape)} and {tuple(items.shape)}"
        )
    check_cut(k, len(items))
    for name, rows in (("users", users), ("items", items)):
        bad = (~rows.isfinite().all(1)).nonzero().flatten()
        if len(bad):
            raise ValueError(f"{len(bad)} vectors of {name} are not finite, the first is that of row {int(bad[0])}")
    if block is not None and block < 1:
        raise ValueError(f"block must be at least 1 user, got {block}")
    size = block or max(1, _BLOCK_SCORES // len(items))
    columns = items.T
    return top_scores_of((part @ columns for part in torch.split(users, size)), k, seen)


def top_scores_of(blocks: Iterable[Tensor], k: int, seen: Tensor | None = None) -> TopScores:
    """The best K + 1 items of each user from scores of any kind, a block of users at a time.

    Args:
        blocks: Scores `(block of users, items)`, the users in order; `-inf` is no candidate.
        k: Length K of the list that a user is shown.
        seen: Pairs int64 `(pairs, 2)` of (user row, item id) to leave out of the ranking.

    Raises:
        ValueError: If K is not below the number of items, there is no user, an id is out of range, or a score is NaN
            or `+inf`.
    """
    values, ids = [], []
    first, num_items = 0, None
    seen = None if seen is None else seen[seen[:, 0].argsort(stable=True)]
    owners = None if seen is None else seen[:, 0].contiguous()
    for scores in blocks:
        num_items = scores.shape[1] if num_items is None else num_items
        if scores.ndim != 2 or scores.shape[1] != num_items:
            raise ValueError(f"each block must have shape (users, {num_items}), got {tuple(scores.shape)}")
        check_cut(k, num_items)
        if seen is not None and owners is not None:
            _check_items(seen[:, 1], num_items)
            start, end = torch.searchsorted(owners, owners.new_tensor([first, first + len(scores)])).tolist()
            pairs = seen[start:end]
            scores = scores.index_put((pairs[:, 0] - first, pairs[:, 1]), scores.new_tensor(-torch.inf))
        best = scores.topk(k + 1, dim=1)
        # NaN sorts above everything, so the head of a list tells of it.
        bad = (~(best.values[:, 0] < torch.inf)).nonzero().flatten()
        if len(bad):
            raise ValueError(f"scores of {len(bad)} users are NaN or +inf, the first is user row {first + int(bad[0])}")
        values.append(best.values)
        ids.append(best.indices)
        first += len(scores)
    if not first:
        raise ValueError("the set of users is empty: exposure is a mean over users")
    if owners is not None and len(owners) and (int(owners[0]) < 0 or int(owners[-1]) >= first):
        wrong = int(owners[0]) if int(owners[0]) < 0 else int(owners[-1])
        raise ValueError(f"user rows of seen must lie in 0..{first - 1}, found {wrong}")
    return TopScores(torch.cat(values), torch.cat(ids), seen)


def _check_items(item_ids: Tensor, num_items: int) -> None:
    if item_ids.numel():
        lowest, highest = (int(bound) for bound in torch.aminmax(item_ids))
        if lowest < 0 or highest >= num_items:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"item ids of seen must lie in 0..{num_items - 1}, found {wrong}")


def thresholds(top: TopScores, item_id: int) -> Tensor:
    """What the item's title must score to be among each user's best K: the K-th best score of the other items.

    Args:
        top: Lists of the users, the clean title of the item among the candidates.
        item_id: The target.

    Returns:
        `(users,)`: the value at rank K + 1 where the item is in the user's list, else that at rank K. NaN for users who
        have seen the item, where seen items are not ranked: they are not counted. `-inf` where a user has fewer than K
        other candidates.
    """
    inside = (top.ids[:, :-1] == item_id).any(1)
    tau = torch.where(inside, top.values[:, -1], top.values[:, -2])
    if top.seen is not None:
        owners = top.seen[top.seen[:, 1] == item_id, 0]
        tau = tau.index_fill(0, owners, torch.nan)
    return tau


def candidate_thresholds(scores: Tensor, k: int = 10) -> Tensor:
    """Thresholds from lists of other items, for a victim that is asked about one pair at a time.

    Args:
        scores: Scores `(users, candidates)` of each user's own list, which lacks the target; `-inf` is no candidate.
        k: Length K of the list that a user is shown.

    Returns:
        `(users,)`: the K-th best score of each list.

    Raises:
        ValueError: If K is not below the number of candidates and the target, or a score is NaN or `+inf`.
    """
    if scores.ndim != 2 or not len(scores):
        raise ValueError(f"scores must have shape (users, candidates) with a user, got {tuple(scores.shape)}")
    check_cut(k, scores.shape[1] + 1)
    best = scores.topk(k, dim=1).values
    bad = (~(best[:, 0] < torch.inf)).nonzero().flatten()
    if len(bad):
        raise ValueError(f"scores of {len(bad)} users are NaN or +inf, the first is user row {int(bad[0])}")
    return best[:, -1]


def exposure(scores: Tensor, tau: Tensor, ties: Ties = "pessimistic") -> Tensor:
    """Share of users for whom each title is among the best K: the mean over users of 1[s(u, t') > tau_u].

    Args:
        scores: Scores `(users, titles)` of titles of one item.
        tau: Thresholds `(users,)` of that item; users with NaN are not counted.
        ties: "pessimistic": a title has to score more than the K-th best other item; "optimistic": as much is enough.

    Returns:
        float64 `(titles,)` in [0, 1].

    Raises:
        ValueError: If shapes do not fit, a score is NaN or infinite, or no user is counted.
    """
    check_ties(ties)
    check_scores(scores, tau)
    hits = scores > tau[:, None] if ties == "pessimistic" else scores >= tau[:, None]
    return torch.count_nonzero(hits, dim=0).double() / counted_users(tau)


def check_ties(ties: str) -> None:
    """Refuse a name that is no rule for ties.

    Raises:
        ValueError: If it is neither "pessimistic" nor "optimistic".
    """
    if ties not in get_args(Ties):
        raise ValueError(f"ties must be one of {list(get_args(Ties))}, got {ties!r}")


def check_scores(scores: Tensor, tau: Tensor | None = None) -> None:
    """Refuse scores of titles that cannot be compared.

    Args:
        scores: Scores `(users, titles)`.
        tau: Thresholds `(users,)`, if the scores are to be compared with any.

    Raises:
        ValueError: If shapes do not fit, there is no user, or a score is NaN or infinite.
    """
    if scores.ndim != 2 or not len(scores) or not scores.is_floating_point():
        raise ValueError(
            f"scores must be floating point of shape (users, titles) with a user, got {scores.dtype} "
            f"{tuple(scores.shape)}"
        )
    if tau is not None and tau.shape != scores.shape[:1]:
        raise ValueError(
            f"thresholds must have shape ({len(scores)},) like scores {tuple(scores.shape)}, got {tuple(tau.shape)}"
        )
    bad = (~scores.isfinite().all(0)).nonzero().flatten()
    if len(bad):
        raise ValueError(
            f"scores of {len(bad)} of {scores.shape[1]} titles are NaN or infinite, first in column {int(bad[0])}"
        )


def counted_users(tau: Tensor) -> int:
    """How many users have a threshold.

    Raises:
        ValueError: If none has.
    """
    count = int((~tau.isnan()).sum())
    if not count:
        raise ValueError(f"none of the {len(tau)} users is counted: with mask_seen all of them have seen the item")
    return count


class ExposureRate(Metric):
    """Mean over users, or over users and target items, of 1[s > tau].

    The states are two counts, so results are right under DDP however many users each process has.

    Args:
        ties: "pessimistic" or "optimistic" (see `exposure`).

    Raises:
        ValueError: If `ties` is neither.

    Example:
        >>> import torch
        >>> metric = ExposureRate()
        >>> metric.update(torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0.8, 0.5, 0.3]))
        >>> round(float(metric.compute()), 3)
        0.333
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    hits: Tensor
    total: Tensor

    def __init__(self, ties: Ties = "pessimistic") -> None:
        super().__init__()
        check_ties(ties)
        self.ties = ties
        self.add_state("hits", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, scores: Tensor, tau: Tensor) -> None:
        """Count users.

        Args:
            scores: `(users,)` scores of one title, or `(users, titles)`.
            tau: Thresholds `(users,)`, or `(users, titles)` where the titles are of different items. Pairs with NaN are
                not counted.

        Raises:
            ValueError: If shapes do not fit, or a score is NaN or infinite.
        """
        if tau.shape not in (scores.shape, scores.shape[:1]):
            raise ValueError(
                f"thresholds must have shape {tuple(scores.shape)} or {tuple(scores.shape[:1])}, got {tuple(tau.shape)}"
            )
        check_scores(scores if scores.ndim == 2 else scores[:, None])
        tau = tau if tau.shape == scores.shape else tau[:, None].expand_as(scores)
        hits = scores > tau if self.ties == "pessimistic" else scores >= tau
        self.hits += torch.count_nonzero(hits)
        self.total += torch.count_nonzero(~tau.isnan())

    def compute(self) -> Tensor:
        """The share in [0, 1], float64; NaN if no user was counted."""
        return self.hits.double() / self.total
