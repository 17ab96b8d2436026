"""The loss of one task on a batch in which some labels may be missing.

Shapes by kind (B batch, C classes, M targets, H height, W width):

| kind | output | target | loss of a label | missing besides masked rows |
| --- | --- | --- | --- | --- |
| binary | logits `(B, 1)` or `(B,)` | `(B,)` in {0, 1} | binary cross-entropy | |
| multiclass | logits `(B, C)` | integer `(B,)` | cross-entropy | -1 |
| regression | z `(B, M)`, or `(B,)` for M = 1 | `(B, M)`, or `(B,)` for M = 1 | mean over M of (z std + mean - y)² | |
| segmentation | logits `(B, C, H, W)` | integer `(B, H, W)` | cross-entropy | -1 |
| depth | `(B, 1, H, W)` | `(B, 1, H, W)` | absolute error | 0 and below |
| normals | `(B, 3, H, W)` of any length | `(B, 3, H, W)` | 1 - cosine | zero vectors |
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from zoo.adatask.tasks import TaskSpec

Scale = Literal["natural", "standardised"]

# Class of a pixel, row or image without a label.
IGNORED = -1
# The cosine's gradient grows as 1 / length of the output; a shorter vector counts as if it had this length.
_SHORTEST_NORMAL = 1e-4


class Labelled(NamedTuple):
    """A task's output beside its labels, in at least float32 and without the labels' placeholders.

    Attributes:
        prediction: `(B,)` logits (binary), `(B, C)` or `(B, C, H, W)` logits (multiclass, segmentation), `(B, M)` in
            natural units (regression), `(B, 1, H, W)` (depth), `(B, 3, H, W)` (normals).
        target: Like `prediction`, 0 where there is no label; classes are int64 `(B,)` or `(B, H, W)`, -1 without label.
        valid: bool, `(B,)` (binary, multiclass, regression), `(B, H, W)` (segmentation, normals) or `(B, 1, H, W)`
            (depth).
    """

    prediction: Tensor
    target: Tensor
    valid: Tensor


def task_loss(
    spec: TaskSpec, output: Tensor, target: Tensor, mask: Tensor | None = None, scale: Scale = "natural"
) -> tuple[Tensor, Tensor]:
    """Mean loss over the labels of a task, and their number.

    All shapes are static and nothing is read back from the device. A batch without any label gives a loss of exactly
    0 with zero gradients; the losses of parts of a batch, weighted by their counts, average to the loss of the batch.

    Args:
        spec: The task.
        output: What the task's head puts out, floating point; shapes in the table above.
        target: The labels; what stands where a label is missing is never looked at.
        mask: bool `(batch,)`, whether a row or image has labels; None for all.
        scale: "natural" leaves a regression loss in squared units of the target, "standardised" divides it by
            `target_std` squared; other kinds have no unit.

    Returns:
        The loss (scalar, float32 also under bf16 autocast, float64 for float64 outputs) and the number of labels
        (scalar, of the same type): rows, images or pixels.

    Raises:
        ValueError: If a shape, a type or `scale` is not what the task needs; the text names the task.
    """
    if scale not in ("natural", "standardised"):
        raise ValueError(f"scale must be 'natural' or 'standardised', got {scale!r}")
    labels = labelled(spec, output, target, mask)
    total = _total(spec, labels)
    if spec.kind == "regression" and scale == "standardised":
        total = total / spec.target_std**2
    count = labels.valid.sum().to(total.dtype)
    return total / count.clamp(min=1), count


def _total(spec: TaskSpec, labels: Labelled) -> Tensor:
    """Sum of the losses of all labels."""
    prediction, target, valid = labels
    if spec.kind in ("multiclass", "segmentation"):
        return F.cross_entropy(prediction, target, ignore_index=IGNORED, reduction="sum")
    if spec.kind == "binary":
        losses = F.binary_cross_entropy_with_logits(prediction, target, reduction="none")
    elif spec.kind == "regression":
        losses = (prediction - target).square().mean(1)
    elif spec.kind == "depth":
        losses = (prediction - target).abs()
    else:
        length = torch.linalg.vector_norm(prediction, dim=1).clamp(min=_SHORTEST_NORMAL)
        losses = 1 - (prediction * F.normalize(target, dim=1)).sum(1) / length
    return torch.where(valid, losses, 0.0).sum()


def labelled(spec: TaskSpec, output: Tensor, target: Tensor, mask: Tensor | None = None) -> Labelled:
    """Check a task's output and labels, bring them to one shape and type, and mark the labels that are there.

    Args:
        spec: The task.
        output: What the task's head puts out; shapes in the table above.
        target: The labels.
        mask: bool `(batch,)`, whether a row or image has labels; None for all.

    Raises:
        ValueError: If a shape or a type is not what the task needs; the text names the task.
    """
    _check_shapes(spec, output, target, mask)
    prediction = output if output.dtype == torch.float64 else output.float()
    rows = torch.ones(len(output), dtype=torch.bool, device=output.device) if mask is None else mask
    if spec.kind in ("multiclass", "segmentation"):
        present = rows.view(-1, *[1] * (target.ndim - 1)) & (target != IGNORED)
        return Labelled(prediction, torch.where(present, target.long(), IGNORED), present)
    target = target.to(prediction.dtype)
    if spec.kind == "binary":
        return Labelled(prediction.view(-1), torch.where(rows, target, 0.0), rows)
    if spec.kind == "regression":
        prediction = (prediction * spec.target_std + spec.target_mean).view(-1, spec.num_outputs)
        return Labelled(prediction, torch.where(rows[:, None], target.view_as(prediction), 0.0), rows)
    pixels = rows.view(-1, 1, 1, 1)
    if spec.kind == "depth":
        present = pixels & (target > 0)
        return Labelled(prediction, torch.where(present, target, 0.0), present)
    present = pixels & (target != 0).any(1, keepdim=True)
    return Labelled(prediction, torch.where(present, target, 0.0), present[:, 0])


def _check_shapes(spec: TaskSpec, output: Tensor, target: Tensor, mask: Tensor | None) -> None:
    """Refuse what broadcasting would silently turn into another loss."""
    if not output.is_floating_point():
        raise ValueError(f"task {spec.name!r}: output must be floating point, got {output.dtype}")
    is_class = spec.kind in ("multiclass", "segmentation")
    if is_class and (target.is_floating_point() or target.dtype == torch.bool):
        raise ValueError(f"task {spec.name!r}: target must hold integer classes, got {target.dtype}")
    batch, width = (len(output) if output.ndim else 0), spec.num_outputs
    size = tuple(output.shape[2:]) if output.ndim == 4 else ("height", "width")
    # A `(batch,)` output of one column is the usual squeeze(-1) of a head.
    rows = [(batch, 1), (batch,)]
    outputs, targets = {
        "binary": (rows, [(batch,)]),
        "multiclass": ([(batch, width)], [(batch,)]),
        "regression": (rows, rows) if width == 1 else ([(batch, width)], [(batch, width)]),
        "segmentation": ([(batch, width, *size)], [(batch, *size)]),
        "depth": ([(batch, 1, *size)], [(batch, 1, *size)]),
        "normals": ([(batch, 3, *size)], [(batch, 3, *size)]),
    }[spec.kind]
    for what, tensor, shapes in (("output", output, outputs), ("target", target, targets)):
        if tuple(tensor.shape) not in shapes:
            expected = " or ".join(str(shape).replace("'", "") for shape in shapes)
            raise ValueError(
                f"task {spec.name!r} ({spec.kind}, num_outputs={width}): {what} must have shape {expected}, got "
                f"{tuple(tensor.shape)}"
            )
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != (batch,)):
        raise ValueError(
            f"task {spec.name!r}: mask must be bool of shape ({batch},), got {mask.dtype} {tuple(mask.shape)}"
        )
