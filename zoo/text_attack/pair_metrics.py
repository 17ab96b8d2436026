"""Metrics of a recommender that scores pairs of a user and an item."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from zoo.common.ranking import target_ranks

if TYPE_CHECKING:
    from collections.abc import Sequence


class PairMetrics(Metric):
    """Area under the ROC curve and accuracy over pairs, and the rank of the asked item among candidates.

    - auc: probability that a liked pair scores higher than one that is not, ties counting half; candidates count as
      not liked. NaN where all pairs are of one kind.
    - acc: share of the asked pairs whose score is above 0.5 exactly where they are liked.
    - hr@k, ndcg@k and mrr of the asked item among itself and its candidates, where there are candidates; ties count
      against it.

    Args:
        ks: Cut-offs.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    liked: list[Tensor]
    others: list[Tensor]
    ranks: list[Tensor]
    correct: Tensor
    count: Tensor

    def __init__(self, ks: Sequence[int] = (1, 5, 10)) -> None:
        super().__init__()
        self.ks = tuple(ks)
        for name in ("liked", "others", "ranks"):
            self.add_state(name, [], dist_reduce_fx="cat")
        for name in ("correct", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Count a batch.

        Args:
            scores: `(batch, 1 + candidates)`, probabilities; the asked item comes first.
            labels: `(batch,)`: whether the user likes the asked item.

        Raises:
            ValueError: If a score is not finite.
        """
        scores = scores.detach().float()
        if not bool(scores.isfinite().all()):
            raise ValueError("scores are not finite")
        likes = labels > 0.5
        asked = scores[:, 0]
        self.liked.append(asked[likes])
        self.others.append(torch.cat((asked[~likes], scores[:, 1:].flatten())))
        first = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
        self.ranks.append(target_ranks(scores, first) if scores.shape[1] > 1 else first[:0])
        self.correct += ((asked > 0.5) == likes).sum()
        self.count += len(scores)

    def compute(self) -> dict[str, Tensor]:
        """Values by name."""
        liked, others, ranks = (dim_zero_cat(part) if part else torch.zeros(0) for part in self._lists())
        values = {"auc": area_under_roc(liked, others), "acc": self.correct / self.count}
        if len(ranks):
            gain = 1 / torch.log2(ranks.double() + 2)
            for k in self.ks:
                values[f"hr@{k}"] = (ranks < k).double().mean()
            for k in self.ks[1:]:
                values[f"ndcg@{k}"] = torch.where(ranks < k, gain, 0).mean()
            values["mrr"] = (1 / (ranks.double() + 1)).mean()
        return values

    def _lists(self) -> tuple[list[Tensor], ...]:
        # A sync leaves a tensor where a list was.
        return tuple([part] if isinstance(part, Tensor) else part for part in (self.liked, self.others, self.ranks))


def area_under_roc(liked: Tensor, others: Tensor) -> Tensor:
    """Share of pairs (one of `liked`, one of `others`) of which the first is larger, ties counting half; float64.

    Args:
        liked: `(n,)` scores.
        others: `(m,)` scores.

    Returns:
        A scalar; NaN if either is empty.
    """
    if not len(liked) or not len(others):
        return torch.full((), torch.nan, dtype=torch.float64, device=liked.device)
    ordered = others.sort().values
    below = torch.searchsorted(ordered, liked.contiguous())
    reached = torch.searchsorted(ordered, liked.contiguous(), right=True)
    return (below + reached).double().mean() / (2 * len(others))
