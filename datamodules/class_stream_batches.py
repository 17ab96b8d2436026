"""Batches of a stream of tasks with classes of their own, and the datasets that gather them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.utils.data import Dataset

from datamodules.loading import Draw, KeyedSampler, mix

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor


_WHITE = 255


class StreamBatch(NamedTuple):
    """A training step of one task, with real images or without.

    Attributes:
        task: Number of the task, from 0.
        step: Number of the step within the task, from 0.
        first: Whether it is the first step of the task.
        last: Whether it is the last step of the task.
        images: float32 `(batch, channels, height, width)` in [-1, 1], or None where training has no real image.
        labels: int64 `(batch,)`, labels of the whole set (not places among the task's classes), or None likewise.
    """

    task: int
    step: int
    first: bool
    last: bool
    images: Tensor | None
    labels: Tensor | None


class EvalBatch(NamedTuple):
    """Images of one task to evaluate on.

    Attributes:
        images: float32 `(batch, channels, height, width)` in [-1, 1].
        labels: int64 `(batch,)`, labels of the whole set.
    """

    images: Tensor
    labels: Tensor


class Stretch(NamedTuple):
    """Consecutive steps of one task.

    Attributes:
        task: Number of the task.
        images: uint8 `(images, channels, height, width)`, the real images of its steps; None: there are none.
        labels: int64 `(images,)`, or None likewise.
    """

    task: int
    images: Tensor | None = None
    labels: Tensor | None = None


def to_canonical(images: Tensor) -> Tensor:
    """From bytes to the canonical domain [-1, 1]: `x / 127.5 - 1`, whatever the set is.

    Args:
        images: uint8, of any shape.

    Returns:
        float32, of the same shape.

    Raises:
        ValueError: If they have another dtype.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images have the dtype {images.dtype}: expected uint8, 0 to {_WHITE}")
    return images.float().div_(_WHITE / 2).sub_(1)


class StreamSteps(Dataset[StreamBatch]):
    """Steps of one stretch after the other.

    The real images of a stretch come in an endless sequence: one shuffle of all of them after the other, each keyed by
    the seed, the task and its number. Step `s` takes the places `[s * n, (s + 1) * n)` where `n = world * batch_size`,
    and rank r of these the places from `r * batch_size` on. So nothing depends on workers, or on when a run was
    stopped, all batches are full (a stretch with few images shows some of them twice in a batch), and two processes
    see what one with twice the batch size sees.

    Args:
        stretches: What there is to train on, in order.
        steps: Steps of each stretch.
        batch_size: Real images of a batch of one process.
        seed: Key of the order.
        num_replicas: Number of processes; by default that of `torch.distributed`, or 1.
        rank: This process; by default that of `torch.distributed`, or 0.
    """

    def __init__(
        self,
        stretches: Sequence[Stretch],
        steps: int,
        batch_size: int,
        seed: int,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        world = (torch.distributed.get_world_size() if distributed else 1) if num_replicas is None else num_replicas
        self.rank = (torch.distributed.get_rank() if distributed else 0) if rank is None else rank
        self.stretches, self.steps, self.batch_size, self.seed = list(stretches), steps, batch_size, seed
        self.global_batch_size = world * batch_size
        self._newest: tuple[tuple[int, int], Tensor] | None = None

    def __len__(self) -> int:
        """Steps of all stretches."""
        return len(self.stretches) * self.steps

    def __getitem__(self, draw: Draw) -> StreamBatch:
        """The step `draw.indices[0]`, counted over all stretches."""
        place, step = divmod(int(draw.indices[0]), self.steps)
        task, images, labels = self.stretches[place]
        if images is not None and labels is not None:
            rows = self._rows(task, len(images), step * self.global_batch_size + self.rank * self.batch_size)
            images, labels = to_canonical(images[rows]), labels[rows]
        return StreamBatch(task, step, step == 0, step == self.steps - 1, images, labels)

    def _rows(self, task: int, size: int, start: int) -> Tensor:
        """Images at the places from `start` on of the sequence of a task."""
        parts, stop = [], start + self.batch_size
        while start < stop:
            shuffle, offset = divmod(start, size)
            parts.append(self._order(task, shuffle, size)[offset : offset + stop - start])
            start += len(parts[-1])
        return torch.cat(parts)

    def _order(self, task: int, shuffle: int, size: int) -> Tensor:
        if self._newest is None or self._newest[0] != (task, shuffle):
            generator = torch.Generator().manual_seed(mix(self.seed, task, shuffle))
            self._newest = (task, shuffle), torch.randperm(size, generator=generator)
        return self._newest[1]


class StreamSampler(KeyedSampler):
    """The steps of one task an epoch, in order; every process has all of them, with a part of the images each.

    An epoch beyond the stream begins it anew.

    Args:
        steps: Steps of all tasks.
        steps_per_epoch: Steps of one task.
    """

    def __init__(self, steps: int, steps_per_epoch: int) -> None:
        super().__init__(steps_per_epoch, 1, num_replicas=1, rank=0)
        self.steps = steps

    def __iter__(self) -> Iterator[Draw]:
        """Steps of the epoch's task."""
        start = self.epoch * self.size % self.steps
        # What is yielded is fixed here: a later `set_epoch` changes the next iteration only.
        batches = super().__iter__()
        return (draw._replace(indices=draw.indices + start) for draw in batches)


class EvalRows(Dataset[EvalBatch]):
    """Batches of labelled images.

    Args:
        images: uint8 `(images, channels, height, width)`.
        labels: int64 `(images,)`.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __getitem__(self, draw: Draw) -> EvalBatch:
        """The batch of the images `draw.indices`."""
        return EvalBatch(to_canonical(self.images[draw.indices]), self.labels[draw.indices])
