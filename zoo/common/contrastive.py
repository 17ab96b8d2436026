"""Contrastive losses on plain tensors, with the negatives of other processes where wanted."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


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


def nt_xent(z1: Tensor, z2: Tensor, temperature: float = 1.0, gather_distributed: bool = False) -> Tensor:
    """NT-Xent (normalised-temperature cross-entropy, SimCLR) between two views, without normalising them.

    With Z = [z1; z2] and s_ij = Z_i . Z_j / temperature, the loss is the mean over i of
    -log(exp(s_i,pos(i)) / sum_{j != i} exp(s_ij)), where pos(i) is the other view of the same sample.

    Args:
        z1: First views `(batch, ...)`; further dimensions are flattened. Normalise before, where the method does.
        z2: Second views, of the same shape.
        temperature: Divides the inner products.
        gather_distributed: Take the views of all processes as negatives, with gradients to them. Every process must
            have the same batch size. Averaged over processes (as DDP does with gradients) value and gradient are those
            of one process with the whole batch.

    Returns:
        Scalar, fp32 also under autocast (float64 for float64); 0 when there are no negatives at all.

    Raises:
        ValueError: If shapes differ, between the views or between the processes, or the temperature is not positive.

    Example:
        >>> import torch
        >>> z = torch.eye(3)
        >>> round(nt_xent(z, z).item(), 4)  # log(1 + (2 * 3 - 2) / e)
        0.9048
    """
    z1, z2 = _prepare(z1, z2, temperature)
    with torch.autocast(z1.device.type, enabled=False):
        if not (gather_distributed and _world_size() > 1):
            z = torch.cat([z1, z2])
            return nt_xent_from_similarity(z @ z.T / temperature)
        all_z1, all_z2 = _gather(z1, z2)
        total, batch = len(all_z1), len(z1)
        own = torch.arange(batch, device=z1.device) + dist.get_rank() * batch
        similarity = torch.cat([z1, z2]) @ torch.cat([all_z1, all_z2]).T / temperature
        return _cross_entropy(similarity, torch.cat([own + total, own]), excluded=torch.cat([own, own + total]))


def info_nce(
    anchors: Tensor,
    positives: Tensor,
    temperature: float = 1.0,
    symmetric: bool = False,
    gather_distributed: bool = False,
) -> Tensor:
    """InfoNCE: each anchor against all positives of the batch, its own being the right one.

    Mean over i of -log(exp(a_i . p_i / t) / sum_j exp(a_i . p_j / t)), without normalising the vectors.

    Args:
        anchors: `(batch, ...)`; further dimensions are flattened.
        positives: Of the same shape; row i belongs to anchor i.
        temperature: Divides the inner products.
        symmetric: Average with the loss in which the two exchange their roles.
        gather_distributed: As in `nt_xent`.

    Returns:
        Scalar, fp32 also under autocast (float64 for float64).

    Raises:
        ValueError: As `nt_xent`.
    """
    anchors, positives = _prepare(anchors, positives, temperature)
    with torch.autocast(anchors.device.type, enabled=False):
        own = torch.arange(len(anchors), device=anchors.device)
        all_anchors, all_positives = anchors, positives
        if gather_distributed and _world_size() > 1:
            own += dist.get_rank() * len(anchors)
            all_anchors, all_positives = _gather(anchors, positives)
        loss = _cross_entropy(anchors @ all_positives.T / temperature, own)
        if symmetric:
            loss = (loss + _cross_entropy(positives @ all_anchors.T / temperature, own)) / 2
        return loss


def _cross_entropy(similarity: Tensor, positive: Tensor, excluded: Tensor | None = None) -> Tensor:
    with torch.autocast(similarity.device.type, enabled=False):
        logits = _full_precision(similarity)
        if excluded is not None:
            # Out of place: the caller's product may be needed by its own backward pass.
            logits = logits.scatter(1, excluded[:, None], -torch.inf)
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


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _gather(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of all processes in order of rank, with gradients."""
    # Gathering tensors of unequal size aborts the process without a message.
    shapes = [torch.empty(2, dtype=torch.int64, device=first.device) for _ in range(_world_size())]
    dist.all_gather(shapes, torch.tensor(first.shape, device=first.device))
    found = [tuple(shape.tolist()) for shape in shapes]
    if len(set(found)) > 1:
        raise ValueError(
            f"gather_distributed needs equal batches on all processes, got shapes {found}: use drop_last=True"
        )
    gathered: Tensor = _AllGather.apply(torch.cat([first, second], dim=1))  # type: ignore[no-untyped-call]
    all_first, all_second = torch.split(gathered, first.shape[1], dim=1)
    return all_first, all_second


class _AllGather(torch.autograd.Function):
    """Concatenation over processes whose backward pass sums the gradients that they all have for a row."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]
