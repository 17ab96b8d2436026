"""Attention over the words of a post, whose query an emotion may shift."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.eacm.pooling import masked_softmax


class EmotionAttention(nn.Module):
    """Additive attention `v . tanh(W_a h_j + U_a q + b_a)` with the query `q = [s^1; V_e; s^2; V_e]` (EACM's).

    `U_a q` is the sum of a product for each part of the query. The two products of the emotion vector are one here, and
    it is added to the memory's own once for all steps.

    Args:
        hidden_size: Size of a state, of the memory's rows and of the attention.
        num_layers: Layers whose states are the query.
        emotion_size: Size of the emotion vector; 0 for a query without.
    """

    def __init__(self, hidden_size: int, num_layers: int, emotion_size: int = 0) -> None:
        super().__init__()
        self.memory = nn.Linear(hidden_size, hidden_size)
        self.query = nn.Linear(num_layers * hidden_size, hidden_size, bias=False)
        self.emotion = nn.Linear(emotion_size, hidden_size, bias=False) if emotion_size else None
        self.score = nn.Linear(hidden_size, 1, bias=False)

    def keys(self, memory: Tensor, emotion: Tensor | None) -> Tensor:
        """What all steps share of the argument of `tanh`.

        Args:
            memory: `(batch, length, hidden_size)`.
            emotion: `(batch, emotion_size)`, or None.

        Returns:
            `(batch, length, hidden_size)`.
        """
        keys: Tensor = self.memory(memory)
        if self.emotion is not None and emotion is not None:
            keys = keys + self.emotion(emotion)[:, None]
        return keys

    def forward(self, states: Tensor, memory: Tensor, keys: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            states: `(batch, num_layers, hidden_size)`.
            memory: `(batch, length, hidden_size)`.
            keys: Those of `keys`.
            mask: bool `(batch, length)`, False on padding.

        Returns:
            The context `(batch, hidden_size)` and the weights, float32 `(batch, length)`.
        """
        scores = self.score((keys + self.query(states.flatten(1))[:, None]).tanh_()).squeeze(-1)
        weights = masked_softmax(scores, mask)
        return torch.bmm(weights.to(memory.dtype)[:, None], memory).squeeze(1), weights
