"""Rows of similar length side by side, so that no work is spent on padding."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zoo.ticoserec.jagged import row_and_position

DEFAULT_CUTS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 17, 24, 35)


class Bucket(NamedTuple):
    """A run of the packed buffer that is a matrix: `rows` rows of `width` places, from `start` on."""

    start: int
    rows: int
    width: int


class BucketPlan(NamedTuple):
    """Where every value of a jagged batch lies in one packed buffer made of buckets.

    Attributes:
        buckets: The matrices, narrowest first; inside each, rows are left-padded to its width.
        slots: int64 `(values,)`, the place of each jagged value in the packed buffer.
        positions: int64 `(size,)`, the position id of each place; the last place of every row has
            `max_length - 1`, as in a row padded to `max_length`.
        size: Number of places, padding included.
    """

    buckets: list[Bucket]
    slots: Tensor
    positions: Tensor
    size: int


def plan_buckets(
    lengths: Tensor, max_length: int, cuts: tuple[int, ...] | None = DEFAULT_CUTS, total: int | None = None
) -> BucketPlan:
    """Sort rows into buckets by length.

    Args:
        lengths: int64 `(rows,)`, values between 0 and `max_length`.
        max_length: Width of the last bucket.
        cuts: Widths of the other buckets, ascending; None puts every row into one bucket of `max_length`, which
            needs no look at the lengths (right for an accelerator, where looking means waiting).
        total: Sum of the lengths, where it is known.

    Raises:
        ValueError: If a row is longer than `max_length`; without `cuts` nobody looks, and the caller must see to it.
    """
    device = lengths.device
    if cuts is None:
        rows, positions = row_and_position(lengths, total)
        slots = rows * max_length + max_length - lengths[rows] + positions
        size = len(lengths) * max_length
        places = torch.arange(max_length, device=device).repeat(len(lengths))
        return BucketPlan([Bucket(0, len(lengths), max_length)], slots, places, size)
    widths = torch.tensor([0, *(cut for cut in cuts if cut < max_length), max_length], device=device)
    if len(lengths) and int(lengths.max()) > max_length:
        raise ValueError(f"a row has {int(lengths.max())} items, more than max_length={max_length}")
    bucket_of_row = torch.searchsorted(widths, lengths)
    order = bucket_of_row.argsort(stable=True)
    row_widths = widths[bucket_of_row]
    sorted_widths = row_widths[order]
    first_slot = torch.empty_like(lengths)
    first_slot[order] = sorted_widths.cumsum(0) - sorted_widths
    rows, positions = row_and_position(lengths, total)
    slots = (first_slot + row_widths - lengths)[rows] + positions
    buckets, start = [], 0
    for width, count in zip(widths.tolist(), bucket_of_row.bincount(minlength=len(widths)).tolist(), strict=True):
        if width and count:
            buckets.append(Bucket(start, count, width))
            start += width * count
    parts = [torch.arange(max_length - b.width, max_length, device=device).repeat(b.rows) for b in buckets]
    return BucketPlan(buckets, slots, torch.cat(parts) if parts else slots.new_zeros(0), start)
