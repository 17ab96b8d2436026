"""Contrastive losses on plain tensors, with the negatives of other processes where wanted."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from zoo.common.distributed import world_size


def nt_xent_from_similarity(similarity: Tensor) -> Tensor:
    """NT-Xent of 2B views from their similarities.

    Row i's positive is row (i + B) mod 2B; the diagonal is left out and all other 2B - 2 rows are negatives. For those
    who compute the product in their own way, for instance in blocks.

    Args:
        similarity: `(2B, 2B)`, inner products divided by the temperature, first views before second ones.

    Returns:
        Mean cross-entropy over the 2B rows, fp32 (float64 for float64); 0 for B = 1, where nothing is negative.

    Raises:
        ValueError: If the matrix is not square with an even, positive side.
    """
    rows = len(similarity)
    if similarity.ndim != 2 or similarity.shape[1] != rows or rows % 2 or not rows:
        raise ValueError(f"similarity must have shape (2 * batch, 2 * batch), got {tuple(similarity.shape)}")
    index = torch.arange(rows, device=similarity.device)
    return _cross_entropy(similarity, (index + rows // 2) % rows, excluded=index)


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    temperature: float = 1.0,
    gather_distributed: bool = False,
    sample_ids: Tensor | None = None,
) -> Tensor:
    """NT-Xent (normalised-temperature cross-entropy, SimCLR) between two views, without normalising them.

    With Z = [z1; z2] and s_ij = Z_i . Z_j / temperature, the loss is the mean over i of
    -log(exp(s_i,pos(i)) / sum_{j != i} exp(s_ij)), where pos(i) is the other view of the same sample.

    Args:
        z1: First views `(batch, ...)`; further dimensions are flattened. Normalise before, where the method does.
        z2: Second views, of the same shape.
        temperature: Divides the inner products. For a learnable one, multiply both views by its inverse square root and
            leave this at 1.
        gather_distributed: Take the views of all processes as negatives, with gradients to them. Every process must
            have the same batch size. Averaged over processes (as DDP does with gradients) value and gradient are those
            of one process with the whole batch.
        sample_ids: int64 `(batch,)`. Rows of one id, also on other processes, are the same sample: neither view of the
            others is a negative, and of the two views of a row only its own is the positive. By default all differ.

    Returns:
        Scalar, fp32 also under autocast (float64 for float64); 0 when there are no negatives at all.

    Raises:
        ValueError: If shapes differ, between the views or between the processes, the temperature is not positive, or
            the ids are not int64 of that shape.

    Example:
        >>> import torch
        >>> z = torch.eye(3)
        >>> round(nt_xent(z, z).item(), 4)  # log(1 + (2 * 3 - 2) / e)
        0.9048
        >>> round(nt_xent(z, z, sample_ids=torch.tensor([4, 7, 7])).item(), 4)  # four, two and two negatives
        0.6692
    """
    z1, z2 = _prepare(z1, z2, temperature)
    with torch.autocast(z1.device.type, enabled=False):
        rows = gather_rows(z1, z2, sample_ids, gather_distributed)
        total = len(rows.first)
        z = torch.cat([z1, z2])
        candidates = z if rows.first is z1 else torch.cat([rows.first, rows.second])
        own, positive = torch.cat([rows.own, rows.own + total]), torch.cat([rows.own + total, rows.own])
        ids = None if rows.sample_ids is None else rows.sample_ids.repeat(2)
        return _cross_entropy(z @ candidates.T / temperature, positive, own, _repeats(ids, own, positive))


def info_nce(
    anchors: Tensor,
    positives: Tensor,
    temperature: float = 1.0,
    symmetric: bool = False,
    gather_distributed: bool = False,
    sample_ids: Tensor | None = None,
) -> Tensor:
    """InfoNCE: each anchor against all positives of the batch, its own being the right one.

    Mean over i of -log(exp(a_i . p_i / t) / sum_j exp(a_i . p_j / t)), without normalising the vectors.

    Args:
        anchors: `(batch, ...)`; further dimensions are flattened.
        positives: Of the same shape; row i belongs to anchor i.
        temperature: As in `nt_xent`.
        symmetric: Average with the loss in which the two exchange their roles.
        gather_distributed: As in `nt_xent`.
        sample_ids: int64 `(batch,)`. The positives of other rows of the same id, also on other processes, are no
            negatives. By default all differ.

    Returns:
        Scalar, fp32 also under autocast (float64 for float64).

    Raises:
        ValueError: As `nt_xent`.
    """
    anchors, positives = _prepare(anchors, positives, temperature)
    with torch.autocast(anchors.device.type, enabled=False):
        rows = gather_rows(anchors, positives, sample_ids, gather_distributed)
        repeats = _repeats(rows.sample_ids, rows.own, rows.own)
        loss = _cross_entropy(anchors @ rows.second.T / temperature, rows.own, repeats=repeats)
        if symmetric:
            back = _cross_entropy(positives @ rows.first.T / temperature, rows.own, repeats=repeats)
            loss = (loss + back) / 2
        return loss


class GatheredRows(NamedTuple):
    """The rows of all processes, in order of rank.

    Attributes:
        first: `(total, d)`, with gradients to the process that each row is from.
        second: `(total, d)`, likewise.
        sample_ids: int64 `(total,)`, or None where no ids were given.
        own: int64 `(batch,)`, where this process's rows are among them.
    """

    first: Tensor
    second: Tensor
    sample_ids: Tensor | None
    own: Tensor


def gather_rows(
    first: Tensor, second: Tensor, sample_ids: Tensor | None = None, gather_distributed: bool = True
) -> GatheredRows:
    """Rows of all processes, for losses whose negatives come from the global batch.

    The gradient of a row is the sum of what all processes have for it: averaged over processes, as DDP does, the mean
    loss of the own rows then has the gradient of one process with the whole batch.

    Args:
        first: `(batch, d)`, of the same shape on every process.
        second: Of the same shape as `first`.
        sample_ids: int64 `(batch,)`, on every process or on none.
        gather_distributed: Without it, or with one process, the rows are those of this process, not copied.

    Raises:
        ValueError: If the processes have rows of different shapes, or if the ids do not fit the rows.
    """
    if sample_ids is not None and (sample_ids.dtype != torch.int64 or sample_ids.shape != first.shape[:1]):
        raise ValueError(
            f"sample_ids must be int64 of shape ({len(first)},), one for each row, got {sample_ids.dtype} "
            f"{tuple(sample_ids.shape)}"
        )
    own = torch.arange(len(first), device=first.device)
    if not (gather_distributed and world_size() > 1):
        return GatheredRows(first, second, sample_ids, own)
    _check_processes(first, sample_ids)
    gathered: Tensor = _AllGather.apply(torch.cat([first, second], dim=1))  # type: ignore[no-untyped-call]
    all_first, all_second = torch.split(gathered, first.shape[1], dim=1)
    if sample_ids is not None:
        parts = [torch.empty_like(sample_ids) for _ in range(world_size())]
        dist.all_gather(parts, sample_ids.contiguous())
        sample_ids = torch.cat(parts)
    return GatheredRows(all_first, all_second, sample_ids, own + dist.get_rank() * len(first))


def _check_processes(rows: Tensor, sample_ids: Tensor | None) -> None:
    # Gathering tensors of unequal size aborts the process without a message, and an id too few waits for ever.
    mine = torch.tensor([*rows.shape, sample_ids is not None], device=rows.device)
    parts = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(parts, mine)
    found = [part.tolist() for part in parts]
    shapes, with_ids = [tuple(part[:-1]) for part in found], [bool(part[-1]) for part in found]
    if len(set(shapes)) > 1:
        raise ValueError(
            f"gather_distributed needs equal batches on all processes, got shapes {shapes}: use drop_last=True"
        )
    if len(set(with_ids)) > 1:
        raise ValueError(f"sample_ids must be given on all processes or on none, got {with_ids}")


def _repeats(sample_ids: Tensor | None, own: Tensor, positive: Tensor) -> Tensor | None:
    """Candidates of each row's own id other than its positive, bool `(rows, candidates)`.

    Args:
        sample_ids: Ids of the candidates `(candidates,)`, or None where all differ.
        own: Where each row is among the candidates, `(rows,)`.
        positive: Where its positive is, `(rows,)`.
    """
    if sample_ids is None:
        return None
    return (sample_ids[own, None] == sample_ids).scatter(1, positive[:, None], False)


def _cross_entropy(
    similarity: Tensor, positive: Tensor, excluded: Tensor | None = None, repeats: Tensor | None = None
) -> Tensor:
    with torch.autocast(similarity.device.type, enabled=False):
        logits = _full_precision(similarity)
        # Out of place: the caller's product may be needed by its own backward pass.
        if excluded is not None:
            logits = logits.scatter(1, excluded[:, None], -torch.inf)
        if repeats is not None:
            logits = logits.masked_fill(repeats, -torch.inf)
        return F.cross_entropy(logits, positive)


def _full_precision(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _prepare(first: Tensor, second: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    if first.shape != second.shape or first.ndim < 2 or not len(first):
        raise ValueError(
            f"both inputs must have one shape (batch, ...) with at least one row, got {tuple(first.shape)} and "
            f"{tuple(second.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return _full_precision(first.flatten(1)), _full_precision(second.flatten(1))


class _AllGather(torch.autograd.Function):
    """Concatenation over processes whose backward pass sums the gradients that they all have for a row."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[dist.get_rank()]
