"""Softmax, maximum and mean over the tokens that a mask keeps, in float32 at least."""

from __future__ import annotations

import torch
from torch import Tensor

_NAMED = 5  # rows that an error message names


def at_least_float32(values: Tensor) -> Tensor:
    """The values in float32, or in float64 if they are."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def masked_softmax(scores: Tensor, mask: Tensor, dim: int = -1) -> Tensor:
    """Softmax over kept places; all others get exactly 0.

    Args:
        scores: `(..., length)`.
        mask: bool, broadcastable to `scores`, True for places to keep.
        dim: Dimension to normalise over.

    Returns:
        Weights in float32 (float64 for float64), of the shape of `scores`; all 0 where nothing is kept.
    """
    scores = at_least_float32(scores)
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim)
    return weights.masked_fill(~mask, 0)


def masked_max(states: Tensor, mask: Tensor) -> Tensor:
    """Largest value over kept tokens, per feature.

    Args:
        states: `(..., length, features)`.
        mask: bool, broadcastable to `(..., length)`, True for tokens to keep.

    Returns:
        `(..., features)` of the dtype of `states`; 0 where nothing is kept.
    """
    largest = states.masked_fill(~mask[..., None], torch.finfo(states.dtype).min).amax(-2)
    return largest.masked_fill(~mask.any(-1, keepdim=True), 0)


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over kept tokens, per feature.

    Args:
        states: `(..., length, features)`.
        mask: bool, broadcastable to `(..., length)`, True for tokens to keep.

    Returns:
        `(..., features)` in float32 (float64 for float64); 0 where nothing is kept.
    """
    kept = at_least_float32(states).masked_fill(~mask[..., None], 0)
    return kept.sum(-2) / mask.sum(-1, keepdim=True).clamp(min=1)


def require_kept(**masks: Tensor) -> None:
    """Refuses masks that keep nothing in some row.

    Args:
        masks: bool `(rows, length)` each, under the name that the message gives.

    Raises:
        ValueError: If a row keeps no place; names the mask and its rows.
    """
    # One wait for the device, however many masks there are.
    if bool(torch.stack([mask.any(-1).all() for mask in masks.values()]).all()):
        return
    for name, mask in masks.items():
        empty = (~mask.any(-1)).nonzero()[:, 0].tolist()
        if empty:
            rows = ", ".join(map(str, empty[:_NAMED])) + (", ..." if len(empty) > _NAMED else "")
            raise ValueError(
                f"{name} keeps no token in {len(empty)} of {len(mask)} rows (row {rows}): each row needs at least one"
            )
