"""All pairs of n rows at once: their cosines, and measures over them, with 4 bytes a pair.

A pair i < j stands where the upper triangle of an `(n, n)` matrix, without its diagonal, has it when read row by row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_ROWS = 512
_QUERIES = 1 << 22
_DECIMALS = 7


def finite_matrix(values: Tensor, name: str) -> Tensor:
    """The matrix on the CPU, without its graph.

    Raises:
        ValueError: If it is no matrix, or a value is not finite; `name` is in the message.
    """
    values = values.detach().cpu()
    if values.ndim != 2:
        raise ValueError(f"{name!r}: expected a matrix, got shape {tuple(values.shape)}")
    broken = ~values.isfinite().all(1)
    if broken.any():
        raise ValueError(f"{name!r}: row {int(broken.nonzero()[0])} has a value that is not finite")
    return values


def unit_rows(vectors: Tensor, name: str) -> Tensor:
    """Rows scaled to length 1, float64 `(n, d)`; rows of zeros stay so.

    Raises:
        ValueError: As `finite_matrix`.
    """
    return F.normalize(finite_matrix(vectors, name).double(), dim=1)


def num_pairs(number: int) -> int:
    """Pairs of so many rows."""
    return number * (number - 1) // 2


def pair_index(first: Tensor, second: Tensor, number: int) -> Tensor:
    """Place of each pair of n rows, int64 `(pairs,)`; either of the two may be the first."""
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    return low * (2 * number - low - 1) // 2 + high - low - 1


def pair_cosines(unit: Tensor) -> Tensor:
    """Cosine of each pair, float32 `(n (n - 1) / 2,)`, from rows of length 1."""
    number = len(unit)
    cosines = torch.empty(num_pairs(number))
    end = 0
    for start in range(0, number, _ROWS):
        # Pairs that are equal by algebra differ by rounding, by far less than this grid.
        block = (unit[start : start + _ROWS] @ unit[start:].T).round(decimals=_DECIMALS).float()
        for row, own in enumerate(block):
            count = number - start - row - 1
            cosines[end : end + count] = own[row + 1 :]
            end += count
    return cosines


def pair_auc(values: Tensor, is_related: Tensor) -> float:
    """Chance that the value of a related pair exceeds that of an unrelated one, equal ones counting half; exact.

    Args:
        values: float32 `(pairs,)`.
        is_related: bool `(pairs,)`, with both kinds.
    """
    related, unrelated = values[is_related].sort().values, values[~is_related]
    twice = 0
    for part in torch.split(unrelated, _QUERIES):
        below = torch.searchsorted(related, part)
        not_above = torch.searchsorted(related, part, right=True)
        twice += 2 * len(related) * len(part) - int(below.sum()) - int(not_above.sum())
    return twice / (2 * len(related) * len(unrelated))


def standard_ranks(values: Tensor) -> Tensor:
    """Ranks less their mean, scaled to length 1, float32; zeros where all values are equal."""
    ordered, order = values.sort()
    counts = torch.unique_consecutive(ordered, return_counts=True)[1]
    # Of the places a + 1 .. a + c that c equal values take, the mean, less that of all places.
    means = counts.cumsum(0).double() - (counts - 1) / 2 - (len(values) + 1) / 2
    length = float((means.square() * counts).sum().sqrt())
    if length:
        means /= length
    return torch.empty(len(values)).index_copy_(0, order, means.float().repeat_interleave(counts))


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's correlation, in [-1, 1], of values of which the `standard_ranks` are given, float32 `(pairs,)`."""
    pairs = zip(torch.split(first, _QUERIES), torch.split(second, _QUERIES), strict=True)
    return max(-1.0, min(1.0, sum(float(own.double() @ other.double()) for own, other in pairs)))
