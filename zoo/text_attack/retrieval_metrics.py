"""Metrics of a ranking of the whole catalogue: with cut-offs, and by the rank itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torchmetrics import Metric

from zoo.common.ranking import FullRankingMetrics, target_ranks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class RetrievalMetrics(Metric):
    """recall@k and ndcg@k, mean reciprocal rank and AUC of one target for each user; ties count against the model.

    mrr is the mean of 1 / (r + 1) and auc of 1 - r / (candidates - 1), r being the target's rank from 0.

    Args:
        ks: Cut-offs.

    Example:
        >>> import torch
        >>> metric = RetrievalMetrics(ks=[1])
        >>> metric.update(torch.tensor([[0.1, 0.9, 0.5]]), torch.tensor([2]))
        >>> {name: float(value) for name, value in metric.compute().items()}
        {'recall@1': 0.0, 'ndcg@1': 0.0, 'mrr': 0.5, 'auc': 0.5}
    """

    full_state_update = False
    higher_is_better = True

    sums: Tensor
    users: Tensor

    def __init__(self, ks: Sequence[int] = (10, 50)) -> None:
        super().__init__()
        self.ranking = FullRankingMetrics(ks=ks, metrics=("recall", "ndcg"))
        self.add_state("sums", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("users", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, scores: Tensor, target_ids: Tensor) -> None:
        """Count users.

        Args:
            scores: Floating point `(batch, candidates)`; `-inf` is no candidate.
            target_ids: int64 `(batch,)`.
        """
        self.ranking.update(scores, target_ids)
        ranks = target_ranks(scores, target_ids).double()
        candidates = (scores > -torch.inf).sum(1).double()
        auc = 1 - ranks / (candidates - 1).clamp(min=1)
        self.sums += torch.stack([(1 / (ranks + 1)).sum(), auc.clamp(min=0).sum()])
        self.users += len(scores)

    def compute(self) -> dict[str, Tensor]:
        """Means over users."""
        values: dict[str, Tensor] = self.ranking.compute()
        mrr, auc = self.sums / self.users
        return {**values, "mrr": mrr, "auc": auc}

    def reset(self) -> None:
        """Forget all users."""
        super().reset()
        self.ranking.reset()
