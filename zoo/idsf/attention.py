"""Attention over several views of the same rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence


class AttentionFusion(nn.Module):
    """Convex combination of views, weighted row by row (section 2.2 of the method).

    A view x has the score w^T tanh(W x + c), with one W, c, w for all views; the weights are the softmax of the scores
    over the views. So equal views give themselves back, and the order of the views does not matter.

    Args:
        hidden_size: Width d of the views.

    Example:
        >>> import torch
        >>> fusion, x = AttentionFusion(4), torch.randn(3, 4)
        >>> bool(torch.allclose(fusion([x, x]), x))
        True
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(hidden_size, hidden_size)
        self.score = nn.Linear(hidden_size, 1, bias=False)

    def weights(self, views: Sequence[Tensor]) -> Tensor:
        """Weights of the views.

        Args:
            views: One or more `(rows, d)`.

        Returns:
            float32 `(rows, views)`; each row is positive and sums to 1.
        """
        scores = torch.cat([self.score(torch.tanh(self.hidden(view))) for view in views], dim=1)
        return scores.float().softmax(dim=1)

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """The combination `(rows, d)` of views `(rows, d)`."""
        if len(views) == 1:
            return views[0]
        weights = self.weights(views)
        combined = weights[:, :1] * views[0]
        for place, view in enumerate(views[1:], start=1):
            combined = combined + weights[:, place, None] * view
        return combined


class MeanFusion(nn.Module):
    """The plain mean of the views: attention switched off."""

    def weights(self, views: Sequence[Tensor]) -> Tensor:
        """Equal weights, `(rows, views)`."""
        return torch.full((len(views[0]), len(views)), 1 / len(views), device=views[0].device)

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """The mean `(rows, d)` of views `(rows, d)`."""
        return torch.stack(list(views)).mean(0)
