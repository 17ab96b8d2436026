"""Exact thresholds on the magnitudes of task vectors that are never in memory as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

Blocks: TypeAlias = Callable[[], Iterator[tuple[str, Tensor]]]
"""Gives, at each call, the task vectors tensor by tensor: names and floating `(K, n)`, in the same order every time."""

_LOW_BITS = 16
_NOT_FINITE = 0x7F80
"""Upper half of the bit pattern of float32's infinity; a NaN lies above it."""


def columns(block: Tensor) -> Iterator[slice]:
    """Ranges of columns of a block `(K, n)` that fit a processor's cache with what is computed from them."""
    width = max(1, (1 << 18) // max(1, len(block))) if block.device.type == "cpu" else 1 << 22
    for start in range(0, block.shape[1], width):
        yield slice(start, min(start + width, block.shape[1]))


def threshold_passes(density: float) -> int:
    """How often `magnitude_thresholds` reads the vectors: all is kept, or a threshold is refined."""
    return 1 if density == 1 else 2


def magnitude_thresholds(blocks: Blocks, density: float) -> Tensor:
    """Thresholds that trim task vectors to their largest entries: the k-th smallest magnitude, k = P - int(density P).

    Keeping what is not below the threshold keeps int(density P) + 1 entries of P, as the code of TIES (Yadav et al.,
    arXiv 2306.01708) does, and more where magnitudes are equal to it.

    The bit patterns of floats that are not negative are ordered as the floats are. So a histogram of the upper halves
    finds the upper half of the threshold's pattern, and one of the lower halves of the entries with that upper half
    finds the rest: two passes, exact, in memory that does not depend on P.

    Args:
        blocks: The task vectors; magnitudes are those of float32.
        density: Share of entries to keep, in (0, 1].

    Returns:
        float32 `(K,)`, on the CPU; zeros for a density of 1.

    Raises:
        ValueError: If there are no blocks, their numbers of rows differ, or a value is not finite.
    """
    coarse: Tensor | None = None
    for name, block in blocks():
        if coarse is None:
            coarse = torch.zeros(len(block), 1 << (31 - _LOW_BITS), dtype=torch.int64)
        if len(block) != len(coarse):
            raise ValueError(f"{name} has {len(block)} task vectors, other tensors have {len(coarse)}")
        for row, counts in zip(block, coarse, strict=True):
            for part in columns(row[None]):
                counts += torch.bincount(_pattern(row[part]) >> _LOW_BITS, minlength=coarse.shape[1]).cpu()
        broken = coarse[:, _NOT_FINITE:].sum(1)
        if broken.any():
            row_number = int(broken.argmax())
            raise ValueError(
                f"task vector {row_number} has {int(broken[row_number])} values in {name} that are not finite (NaN or "
                "infinity): check the checkpoint that it comes from"
            )
    if coarse is None:
        raise ValueError("there are no parameters to find a threshold for")
    size = int(coarse[0].sum())
    rank = size - int(density * size)
    if rank == 0:
        return torch.zeros(len(coarse))
    high, rest = _locate(coarse, torch.full((len(coarse),), rank))
    fine = torch.zeros(len(coarse), 1 << _LOW_BITS, dtype=torch.int64)
    for _, block in blocks():
        for row, upper, counts in zip(block, high.tolist(), fine, strict=True):
            for part in columns(row[None]):
                pattern = _pattern(row[part])
                lower = pattern[pattern >> _LOW_BITS == upper].cpu().long() & ((1 << _LOW_BITS) - 1)
                # Few entries of many: a histogram of its own for each part would cost more than the entries.
                counts.scatter_add_(0, lower, torch.ones_like(lower))
    low, _ = _locate(fine, rest)
    return ((high << _LOW_BITS) | low).int().view(torch.float32)


def _pattern(values: Tensor) -> Tensor:
    """Bit patterns of magnitudes in float32, as int32 in the magnitudes' order."""
    return values.float().abs().view(torch.int32)


def _locate(counts: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of a histogram the bin of the entry with a rank (from 1), and its rank within that bin."""
    cumulative = counts.cumsum(1)
    bins = torch.searchsorted(cumulative, ranks[:, None])
    before = (cumulative - counts).gather(1, bins)
    return bins[:, 0], ranks - before[:, 0]
