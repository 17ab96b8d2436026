"""What the time gaps of a sequence say: the order of its gaps, and its most even window.

Gap i of a sequence is the time between items i and i + 1, so it lies to the right of item i. Where the time of the
next, unseen item is known too (the last training target), all n items have a gap; otherwise the last has none.
Everything here depends on differences of time only, so shifting or stretching the clock changes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zoo.ticoserec.jagged import row_and_position, row_starts

NO_GAP = torch.iinfo(torch.int64).max


class Gaps(NamedTuple):
    """Gaps of a jagged batch of sequences.

    Attributes:
        values: int64 `(items,)`, the gap right of each item in seconds, `NO_GAP` where unknown.
        known: int64 `(rows,)`, known gaps of each row, n or n - 1.
        lengths: int64 `(rows,)`, items n of each row.
    """

    values: Tensor
    known: Tensor
    lengths: Tensor


def right_gaps(timestamps: Tensor, time_lengths: Tensor, lengths: Tensor) -> Gaps:
    """Gap to the right of every item.

    Args:
        timestamps: int64 `(times,)`, seconds, row after row.
        time_lengths: int64 `(rows,)`, times of each row: n, or n + 1 where the next item's time is known.
        lengths: int64 `(rows,)`, items n of each row.

    Raises:
        ValueError: If a row has neither n nor n + 1 times.
    """
    extra = time_lengths - lengths
    if bool(((extra != 0) & (extra != 1)).any()):
        row = int(((extra != 0) & (extra != 1)).nonzero()[0])
        raise ValueError(
            f"row {row} has {int(lengths[row])} items and {int(time_lengths[row])} times: expected n or n + 1"
        )
    rows, positions = row_and_position(lengths)
    here = row_starts(time_lengths)[rows] + positions
    known = (time_lengths - 1).clamp(min=0)
    has_gap = positions < known[rows]
    after = torch.where(has_gap, here + 1, here)
    return Gaps(torch.where(has_gap, (timestamps[after] - timestamps[here]).abs(), NO_GAP), known, lengths)


def gap_ranks(gaps: Gaps) -> Tensor:
    """Place of each item in the stable ascending order of its row's gaps, int64 `(items,)`.

    Equal gaps keep the order of their items; items without a gap come last.
    """
    rows, _ = row_and_position(gaps.lengths)
    order = gaps.values.argsort(stable=True)
    order = order[rows[order].argsort(stable=True)]
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order), device=order.device) - row_starts(gaps.lengths)[rows]
    return ranks


def _exact_unit(gaps: Gaps, rows: Tensor) -> Tensor:
    """Gaps in a unit small enough for exact 64-bit window variances.

    Sums of squares are exact integers, so that equal windows tie exactly. Only where a row's n * sum(gap ** 2) would
    pass 2 ** 62 (decades in seconds without a common unit) its unit is doubled until it fits.
    """
    known = gaps.values.masked_fill(gaps.values == NO_GAP, 0)
    squares = torch.zeros(len(gaps.lengths), dtype=torch.float64, device=known.device)
    squares.index_add_(0, rows, known.double().square())
    bound = squares * gaps.lengths
    shift = ((bound.clamp(min=1).log2() - 62) / 2).ceil().clamp(min=0).long()
    return known >> shift[rows]


def even_window(gaps: Gaps, counts: Tensor, mode: str = "minimum", window: str = "full") -> Tensor:
    """Start of the window of `counts` items whose inner gaps have the smallest population variance.

    Args:
        gaps: Gaps of the rows.
        counts: int64 `(rows,)`, items c of the window, at most the row's length.
        mode: "minimum" or "maximum" variance.
        window: "full" looks at all c - 1 gaps between the window's items; "official" leaves the last of them out, as
            the published code does.

    Returns:
        int64 `(rows,)`; the latest window among equals; 0 for an empty row.
    """
    rows, positions = row_and_position(gaps.lengths)
    values = _exact_unit(gaps, rows)
    inner = (counts - (1 if window == "full" else 2)).clamp(min=0)
    # Prefix sums may wrap around; their differences are right all the same, modulo 2 ** 64.
    sums = torch.cat([values.new_zeros(1), values.cumsum(0)])
    squares = torch.cat([values.new_zeros(1), (values * values).cumsum(0)])
    starts = torch.arange(len(values), device=values.device)
    fits = positions + counts[rows] <= gaps.lengths[rows]
    ends = torch.where(fits, starts + inner[rows], starts)
    total = sums[ends] - sums[starts]
    spread = inner[rows] * (squares[ends] - squares[starts]) - total * total
    if mode == "maximum":
        spread = -spread
    spread = torch.where(fits, spread, NO_GAP)
    best = torch.full_like(gaps.lengths, NO_GAP).scatter_reduce_(0, rows, spread, "amin")
    candidate = torch.where(fits & (spread == best[rows]), positions, -1)
    return torch.zeros_like(gaps.lengths).scatter_reduce_(0, rows, candidate, "amax", include_self=True)
