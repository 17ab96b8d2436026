"""Means over the batches of all processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def count_per_process(count: Tensor) -> Tensor:
    """Mean over processes of how many values they count.

    Gradients are averaged over processes: a sum of values divided by this number, averaged over processes, is the mean
    over all, also where processes count different numbers of them.

    Args:
        count: A scalar; all processes must ask.

    Returns:
        A scalar of the count's dtype, float32 for whole numbers.
    """
    total = count.clone() if count.is_floating_point() else count.float()
    if world_size() > 1:
        dist.all_reduce(total)
    return total / world_size()


def global_mean(values: Tensor, counted: Tensor) -> Tensor:
    """Mean of the values that count, such that its average over processes is the mean over all; 0 of none.

    All values have gradients in every process, also those that do not count.

    Args:
        values: `(batch,)`.
        counted: bool `(batch,)`, or weights.
    """
    weights = counted.to(values.dtype)
    total = count_per_process(weights.sum())
    return (values * weights).sum() / total.clamp(min=torch.finfo(values.dtype).tiny)
