"""Contrastive loss between two views of the same items, with negatives in both views."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def multi_view_nce(
    anchors: Tensor,
    views: Tensor,
    temperature: float = 0.5,
    index: Tensor | None = None,
    rows: Tensor | None = None,
    chunk: int = 4096,
) -> Tensor:
    """Contrastive loss of one view against another (section 2.4 of the method, the form of GRACE, one direction).

    With unit rows a_i, b_i of the two views, the loss of item i is
    -log(exp(<a_i, b_i> / t) / (sum_j exp(<a_i, b_j> / t) + sum_{j != i} exp(<a_i, a_j> / t))), and the result is the
    mean over the items. The first view is the anchor: exchanging the two gives another value.

    Args:
        anchors: `(items, d)`, of any length of rows.
        views: `(items, d)`, row i the same item as row i of `anchors`.
        temperature: t.
        index: int64 `(any,)`: only these items take part, as anchors and as negatives. All by default.
        rows: int64, places in `index`: only these are anchors, all of `index` are negatives. All by default. With the
            processes of a distributed run sharing the anchors, their mean is the mean over all.
        chunk: Anchors whose similarities are held at once; further ones are recomputed in the backward pass, so that
            memory grows with `chunk * items` and not with `items ** 2`.

    Returns:
        Scalar, float32 also under autocast (float64 for float64).

    Raises:
        ValueError: If the shapes differ, there is no item, or the temperature is not positive.

    Example:
        >>> import torch
        >>> round(multi_view_nce(torch.eye(3), torch.eye(3), temperature=1.0).item(), 4)  # log(1 + (2 * 3 - 2) / e)
        0.9048
    """
    if anchors.ndim != 2 or anchors.shape != views.shape:
        raise ValueError(f"both views must have one shape (items, d), got {tuple(anchors.shape)}, {tuple(views.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if index is not None:
        anchors, views = anchors[index], views[index]
    if not len(anchors):
        raise ValueError("there is no item to contrast")
    with torch.autocast(anchors.device.type, enabled=False):
        precision = torch.promote_types(anchors.dtype, torch.float32)
        anchors = F.normalize(anchors.to(precision), dim=1)
        views = F.normalize(views.to(precision), dim=1)
        if rows is None:
            rows = torch.arange(len(anchors), device=anchors.device)
        # One product for both kinds of negatives.
        candidates = torch.cat([views, anchors])
        total = anchors.new_zeros(())
        several = len(rows) > chunk
        for part in torch.split(rows, chunk):
            if several and torch.is_grad_enabled():
                piece = checkpoint(_block, anchors, candidates, part, temperature, use_reentrant=False)
            else:
                piece = _block(anchors, candidates, part, temperature)
            total = total + piece
        return total / max(1, len(rows))


def _block(anchors: Tensor, candidates: Tensor, rows: Tensor, temperature: float) -> Tensor:
    """Sum of the losses of some anchors."""
    similarity = (anchors[rows] / temperature) @ candidates.T
    # The positive stays in the denominator; the anchor with itself does not.
    similarity.scatter_(1, rows[:, None] + len(anchors), -torch.inf)
    return F.cross_entropy(similarity, rows, reduction="sum")
