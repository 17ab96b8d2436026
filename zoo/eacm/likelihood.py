"""Likelihood of replies from the logits of their words."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def summed_nll(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood of each reply, float32 `(batch,)`.

    Args:
        logits: `(words, vocab_size)` at the places of all replies that count, in their order.
        labels: int64 `(batch, length)`.
        mask: bool `(batch, length)`, False on padding; `words` places are True.
    """
    losses = F.cross_entropy(logits.float(), labels[mask], reduction="none")
    return losses.new_zeros(len(labels)).index_add(0, mask.nonzero()[:, 0], losses)
