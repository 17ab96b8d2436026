"""Recurrent reading of a post."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PostEncoder(nn.Module):
    """Word vectors and a GRU of several layers, read from left to right.

    The layers run one after the other over the padded batch: what comes after a post's end touches none of its states,
    and the last state of every layer is the one at the post's last word. So nothing is packed, or copied to the host.

    Args:
        vocab_size: Number of words.
        embedding_size: Size of a word vector.
        hidden_size: Size of a state.
        num_layers: Layers.
        dropout: On word vectors and between layers.
    """

    def __init__(
        self, vocab_size: int, embedding_size: int, hidden_size: int, num_layers: int = 1, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding_size)
        nn.init.normal_(self.embedding.weight, std=embedding_size**-0.5)
        sizes = [embedding_size] + [hidden_size] * (num_layers - 1)
        self.layers = nn.ModuleList(nn.GRU(size, hidden_size, batch_first=True) for size in sizes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Read posts.

        Args:
            ids: int64 `(batch, length)`, padded on the right.
            mask: bool `(batch, length)`, False on padding.

        Returns:
            States of the last layer `(batch, length, hidden_size)`, and the states of all layers at each post's last
            word `(batch, num_layers, hidden_size)`.
        """
        states = self.embedding(ids)
        last = (mask.sum(1) - 1).clamp(min=0)[:, None, None]
        finals = []
        for layer in self.layers:
            states, _ = layer(self.dropout(states))
            finals.append(states.gather(1, last.expand(-1, 1, states.shape[-1])))
        return states, torch.cat(finals, dim=1)
