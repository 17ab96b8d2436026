"""From what heads put out to what a person reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional as F

if TYPE_CHECKING:
    from torch import Tensor

    from zoo.adatask.tasks import TaskSpec


def readable(spec: TaskSpec, output: Tensor) -> Tensor:
    """A task's prediction.

    Args:
        spec: The task.
        output: What its head puts out.

    Returns:
        Probabilities `(batch,)` (binary), probabilities of the classes `(batch, classes)` (multiclass), values in
        natural units `(batch,)` or `(batch, num_outputs)` (regression), classes int64 `(batch, height, width)`
        (segmentation), values `(batch, 1, height, width)` (depth), or unit vectors `(batch, 3, height, width)`
        (normals).
    """
    output = output.float()
    if spec.kind == "binary":
        return output.reshape(-1).sigmoid()
    if spec.kind == "multiclass":
        return output.softmax(1)
    if spec.kind == "segmentation":
        return output.argmax(1)
    if spec.kind == "normals":
        return F.normalize(output, dim=1)
    if spec.kind == "regression":
        natural = output * spec.target_std + spec.target_mean
        return natural.reshape(-1) if spec.num_outputs == 1 else natural
    return output
