"""Rows of unequal length as one flat tensor of values and one of lengths."""

from __future__ import annotations

import torch
from torch import Tensor


def row_starts(lengths: Tensor) -> Tensor:
    """Index of each row's first value, `(rows,)`, for `lengths` `(rows,)`."""
    return lengths.cumsum(0) - lengths


def row_and_position(lengths: Tensor, total: int | None = None) -> tuple[Tensor, Tensor]:
    """Row number and position inside the row of every value, both int64 `(values,)`.

    Args:
        lengths: int64 `(rows,)`.
        total: Their sum, where it is known: an accelerator then need not be waited for.
    """
    rows = torch.repeat_interleave(lengths, output_size=total)
    positions = torch.arange(rows.numel(), device=lengths.device) - row_starts(lengths)[rows]
    return rows, positions


def pad_left(values: Tensor, lengths: Tensor, width: int, fill: float = 0) -> Tensor:
    """Rows as a right-aligned matrix.

    Args:
        values: `(values, ...)`, row after row.
        lengths: int64 `(rows,)`, none above `width`.
        width: Number of columns.
        fill: Value of the free places at the left.

    Returns:
        `(rows, width, ...)`.
    """
    rows, positions = row_and_position(lengths, len(values))
    padded = values.new_full((len(lengths), width, *values.shape[1:]), fill)
    padded[rows, width - lengths[rows] + positions] = values
    return padded


def unpad_left(padded: Tensor, lengths: Tensor) -> Tensor:
    """The last `lengths` columns of each row of `padded` `(rows, width, ...)`, flat `(values, ...)`."""
    rows, positions = row_and_position(lengths)
    out: Tensor = padded[rows, padded.shape[1] - lengths[rows] + positions]
    return out


def keep_last(values: Tensor, lengths: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """The last `limit` values of every row, and the new lengths."""
    if not bool((lengths > limit).any()):
        return values, lengths
    rows, positions = row_and_position(lengths, len(values))
    return values[positions >= lengths[rows] - limit], lengths.clamp(max=limit)


def gather_rows(flat: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """Values `flat[starts[r] : starts[r] + lengths[r]]` of each row r, one after the other."""
    rows, positions = row_and_position(lengths)
    return flat[starts[rows] + positions]
