"""Batches that carry the labels of several tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class TabularTaskBatch(NamedTuple):
    """Rows of a table with the labels of several tasks.

    Attributes:
        categories: int64 `(batch, categorical columns)`, codes from 1; 0 is a value that training does not know.
        numbers: float32 `(batch, numeric columns)`, standardised by the training part.
        targets: By task: float32 `(batch,)` in {0, 1} (binary), int64 `(batch,)` (multiclass), float32 `(batch,)` or
            `(batch, num_outputs)` in natural units (regression).
        masks: By task: bool `(batch,)`, whether a row has a label; a task without an entry has all of them.
        user_ids: int64 `(batch,)`, groups for metrics within a user, or None.
        rows: int64 `(batch,)`, places among the rows of the loader's part.
    """

    categories: Tensor
    numbers: Tensor
    targets: dict[str, Tensor]
    masks: dict[str, Tensor]
    user_ids: Tensor | None = None
    rows: Tensor | None = None


class ImageTaskBatch(NamedTuple):
    """Images with the labels of several tasks, one label an image or one a pixel.

    Attributes:
        images: float32 `(batch, channels, height, width)`.
        targets: By task: int64 `(batch,)` (multiclass), int64 `(batch, height, width)` with -1 for pixels to ignore
            (segmentation), float32 `(batch, 1, height, width)` with 0 for undefined pixels (depth), float32
            `(batch, 3, height, width)` with zero vectors for undefined pixels (normals).
        masks: By task: bool `(batch,)`, whether an image has a label; a task without an entry has all of them.
        rows: int64 `(batch,)`, places among the images of the loader's part.
    """

    images: Tensor
    targets: dict[str, Tensor]
    masks: dict[str, Tensor]
    rows: Tensor | None = None
