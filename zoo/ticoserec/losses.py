"""Losses of next-item recommendation, and the similarity of views that are sequences of states.

Shape legend: T real training positions of a batch, K negatives of each, H hidden size, B users, R = 2B views.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.ticoserec.jagged import pad_left, row_starts

REC_LOSSES = ("bce", "ce", "gbce", "sampled_softmax")
# Places counted from the newest item, cut where the number of rows that reach so far has dropped by about a third.
_GRAM_CUTS = (0, 2, 3, 4, 6, 8, 12, 20, 35)


def bce_next_item(positive: Tensor, negative: Tensor) -> Tensor:
    """Binary cross-entropy, mean over positions of softplus(-s+) + sum_k softplus(s-_k).

    Args:
        positive: Scores of the targets `(T,)`.
        negative: Scores of the negatives `(T, K)`.
    """
    return (F.softplus(-positive.float()) + F.softplus(negative.float()).sum(-1)).mean()


def gbce_next_item(positive: Tensor, negative: Tensor, num_items: int, calibration: float = 0.75) -> Tensor:
    """Generalised BCE of gSASRec: the target's probability to the power beta corrects for the sampling of negatives.

    beta = alpha (t (1 - 1 / alpha) + 1 / alpha), alpha = K / (num_items - 1); t = 0 is BCE, t = 1 the full softmax's
    calibration.

    Args:
        positive: `(T,)`.
        negative: `(T, K)`.
        num_items: Catalogue size V.
        calibration: t, in [0, 1].
    """
    count = negative.shape[-1]
    alpha = count / (num_items - 1)
    beta = alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)
    losses = beta * F.softplus(-positive.float()) + F.softplus(negative.float()).sum(-1)
    return losses.mean() / (count + 1)


def sampled_softmax_next_item(positive: Tensor, negative: Tensor) -> Tensor:
    """Softmax cross-entropy of the target `(T,)` among its own negatives `(T, K)`."""
    logits = torch.cat([positive[:, None], negative], -1).float()
    return (logits.logsumexp(-1) - logits[:, 0]).mean()


def full_softmax_next_item(states: Tensor, item_embedding: Tensor, target_ids: Tensor) -> Tensor:
    """Softmax cross-entropy over the whole catalogue: states `(T, H)`, table `(V + 1, H)` with padding in row 0."""
    return F.cross_entropy((states @ item_embedding[1:].T).float(), target_ids - 1)


def view_gram(states: Tensor, lengths: Tensor, max_length: int) -> Tensor:
    """Inner products of views, each a right-aligned row of states flattened to `max_length * H`.

    A view is zero to the left of its items, so two views meet only where both have items: places far from the newest
    item involve few rows, and the product is summed over groups of places with the rows that reach them.

    Args:
        states: `(T, H)`, view after view.
        lengths: int64 `(R,)`.
        max_length: Longest view.

    Returns:
        float32 `(R, R)`.
    """
    with torch.autocast(states.device.type, enabled=False):
        states = states.float()
        count, width = len(lengths), states.shape[1]
        if states.device.type != "cpu":
            flat = pad_left(states, lengths, max_length).view(count, -1)
            return flat @ flat.T
        ordered, order = lengths.sort(descending=True, stable=True)
        ends = (row_starts(lengths) + lengths)[order]
        extended = torch.cat([states, states.new_zeros(1, width)])
        cuts = [cut for cut in _GRAM_CUTS if cut < max_length] + [max_length]
        gram = states.new_zeros(count, count)
        for near, far in itertools.pairwise(cuts):
            reach = int((ordered > near).sum())
            if not reach:
                break
            back = torch.arange(near + 1, far + 1, device=lengths.device)
            index = torch.where(back <= ordered[:reach, None], ends[:reach, None] - back, len(states))
            block = extended[index].view(reach, -1)
            rest = count - reach
            gram = gram + F.pad(block @ block.T, (0, rest, 0, rest))
        back_to_rows = order.argsort()
        return gram[back_to_rows][:, back_to_rows]


def view_vectors(states: Tensor, lengths: Tensor, max_length: int, representation: str) -> Tensor:
    """One vector per view.

    Args:
        states: `(T, H)`, view after view.
        lengths: int64 `(R,)`.
        max_length: Longest view.
        representation: "flatten" `(R, max_length * H)`, "last" item's state or "mean" of all `(R, H)`; a view without
            items is zero.
    """
    padded = pad_left(states, lengths, max_length)
    if representation == "flatten":
        return padded.flatten(1)
    if representation == "last":
        return padded[:, -1]
    return padded.sum(1) / lengths.clamp(min=1)[:, None]
