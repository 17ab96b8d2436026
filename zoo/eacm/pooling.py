"""Self-attention pooling: a sequence of states becomes one, weighted by what each state holds."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax in float32 over the last dimension of the places that count; 0 elsewhere, and in rows without any.

    Args:
        scores: `(..., places)`.
        mask: bool, of that shape or one that broadcasts to it.
    """
    scores = scores.float().masked_fill(~mask, -torch.inf)
    # A row without a place would be 0 / 0.
    scores = scores.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return scores.softmax(-1) * mask


class SelfAttentionPooling(nn.Module):
    """Weights `softmax_t(v . tanh(W h_t))` without a query (spec of the EACM's selector, both encoders).

    Args:
        hidden_size: Size of the states.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.project = nn.Linear(hidden_size, hidden_size, bias=False)
        self.score = nn.Linear(hidden_size, 1, bias=False)

    def forward(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Pool states.

        Args:
            states: `(batch, length, hidden_size)`.
            mask: bool `(batch, length)`, False on padding.

        Returns:
            The weighted mean `(batch, hidden_size)` and the weights, float32 `(batch, length)`.
        """
        scores = self.score(torch.tanh(self.project(states))).squeeze(-1)
        weights = masked_softmax(scores, mask)
        pooled = torch.bmm(weights.to(states.dtype)[:, None], states).squeeze(1)
        return pooled, weights
