"""Contrastive loss between two views of the same items, with negatives in both views."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


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
        chunk: Anchors whose similarities are held at once. Their gradient is taken in the same pass and nothing of
            them is kept, so that memory grows with `chunk * items` and not with `items ** 2`.

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
        loss: Tensor = _Contrast.apply(anchors, views, rows, temperature, chunk)  # type: ignore[no-untyped-call]
        return loss


class _Contrast(torch.autograd.Function):
    """The loss of unit rows, with its gradient taken block by block in the forward pass."""

    @staticmethod
    def forward(ctx: Any, anchors: Tensor, views: Tensor, rows: Tensor, temperature: float, chunk: int) -> Tensor:
        needed = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        items = len(anchors)
        # One product for both kinds of negatives.
        candidates = torch.cat([views, anchors])
        of_candidates = torch.zeros_like(candidates) if needed else None
        of_anchors = torch.zeros_like(anchors) if needed else None
        total = anchors.new_zeros(())
        for part in torch.split(rows, chunk):
            scaled, own = anchors[part] / temperature, part[:, None]
            similarity = scaled @ candidates.T
            # The positive stays in the denominator; the anchor with itself does not.
            similarity.scatter_(1, own + items, -torch.inf)
            logs = F.log_softmax(similarity, dim=1)
            total -= logs.gather(1, own).sum()
            if of_candidates is not None and of_anchors is not None:
                # Of the similarities: the softmax, less 1 at the positive.
                gradient = logs.exp_()
                gradient.scatter_add_(1, own, gradient.new_full(own.shape, -1.0))
                of_anchors[part] = gradient @ candidates / temperature
                of_candidates.addmm_(gradient.T, scaled)
        count = max(1, len(rows))
        if of_candidates is not None and of_anchors is not None:
            of_views, of_negatives = of_candidates[:items], of_candidates[items:]
            ctx.save_for_backward((of_anchors + of_negatives) / count, of_views / count)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        of_anchors, of_views = ctx.saved_tensors
        return of_anchors * gradient, of_views * gradient, None, None, None
