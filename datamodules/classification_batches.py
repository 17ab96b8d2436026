"""Batches of images of one classification task."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class ClassificationBatch(NamedTuple):
    """Images of one task, with their classes or without.

    Attributes:
        images: float32 `(batch, 3, height, width)`, normalised.
        labels: int64 `(batch,)`, or None in a stream to adapt to.
        rows: int64 `(batch,)`, places among the images of the loader's part.
        task: Name of the task.
    """

    images: Tensor
    labels: Tensor | None
    rows: Tensor
    task: str
