"""Loading of several classification tasks side by side: each follows its own order, and a batch has some of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.utils.data import Dataset

from datamodules.classification_batches import ClassificationBatch
from datamodules.loading import Draw, KeyedSampler, follow, mix

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from lightning.pytorch import Trainer
    from torch import Tensor


class Normalisation(NamedTuple):
    """From bytes to what a network takes: `(x / 255 - mean) / std`, by channel.

    Attributes:
        mean: Three numbers.
        std: Three positive numbers.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, images: Tensor) -> Tensor:
        """Float32 `(images, 3, height, width)` from uint8 `(images, 1 or 3, height, width)`."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in self)
        return images.float().mul(1 / (255 * std)).sub_(mean / std)


class TaskRows(Dataset[ClassificationBatch]):
    """Batches of one task.

    Args:
        task: Its name.
        images: uint8 `(images, 1 or 3, height, width)`.
        labels: int64 `(images,)`, or None for batches without labels.
        normalise: What makes floats of the images.
        rows_only: Whether batches say which images they are, without the images themselves.
    """

    def __init__(
        self,
        task: str,
        images: Tensor,
        labels: Tensor | None,
        normalise: Normalisation,
        rows_only: bool = False,
    ) -> None:
        self.task, self.images, self.labels, self.normalise = task, images, labels, normalise
        self.rows_only = rows_only

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __getitem__(self, draw: Draw) -> ClassificationBatch:
        """The batch of the images `draw.indices`."""
        rows = draw.indices
        labels = None if self.labels is None else self.labels[rows]
        images = torch.empty(len(rows), 0) if self.rows_only else self.normalise(self.images[rows])
        return ClassificationBatch(images, labels, rows, self.task)


class StepSampler(KeyedSampler):
    """Steps counted over all epochs: step `s` of epoch `e` is number `e * steps + s`, on every rank.

    Args:
        steps: Steps of an epoch.
    """

    def __init__(self, steps: int) -> None:
        super().__init__(steps, 1, num_replicas=1, rank=0)

    def __iter__(self) -> Iterator[Draw]:
        """Numbers of the steps of the epoch from `first_batch` on."""
        return self._steps(self.epoch * self.size, range(self.first_batch, self.size))

    def _steps(self, start: int, steps: Sequence[int]) -> Iterator[Draw]:
        for step in steps:
            yield Draw(torch.tensor([start + step]), 0)


class TaskStreams(Dataset[dict[str, ClassificationBatch]]):
    """Steps of several tasks, of equally many images each.

    Every task has an endless sequence of its images: one shuffle of all of them after the other, each keyed by the
    seed, the task's name and its number. Step `s` takes the places `[s * n, (s + 1) * n)` of every sequence, where
    `n = world * batch_size`, and rank r of these the places from `r * batch_size` on. So nothing depends on the other
    tasks, on workers, or on when a run was stopped, all batches are full, and two processes see what one with twice
    the batch size sees.

    Args:
        tables: By task, its rows.
        batch_size: Images of each task in a batch of one process.
        seed: Key of the order.
        num_replicas: Number of processes; by default that of `torch.distributed`, or 1.
        rank: This process; by default that of `torch.distributed`, or 0.

    Raises:
        ValueError: If there is no task, or one has fewer images than a global batch takes.
    """

    def __init__(
        self,
        tables: Mapping[str, TaskRows],
        batch_size: int,
        seed: int,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        world = (torch.distributed.get_world_size() if distributed else 1) if num_replicas is None else num_replicas
        self.rank = (torch.distributed.get_rank() if distributed else 0) if rank is None else rank
        self.tables, self.batch_size, self.seed = dict(tables), batch_size, seed
        self.global_batch_size = world * batch_size
        if not self.tables:
            raise ValueError("there is no task to draw images of")
        for task, table in self.tables.items():
            if len(table) < self.global_batch_size:
                raise ValueError(
                    f"task {task!r} has {len(table)} images to draw from, fewer than the {self.global_batch_size} of "
                    "one batch over all processes: lower batch_size, or use more images (adapt_fraction, max_images, "
                    "pretrain_images)"
                )
        self._orders: dict[str, tuple[int, Tensor]] = {}

    def __len__(self) -> int:
        """Steps in which every image of the largest task is drawn."""
        return -(-max(len(table) for table in self.tables.values()) // self.global_batch_size)

    def __getitem__(self, draw: Draw) -> dict[str, ClassificationBatch]:
        """The batches of the step `draw.indices[0]`, by task."""
        start = int(draw.indices[0]) * self.global_batch_size + self.rank * self.batch_size
        return {task: table[Draw(self._rows(task, start), 0)] for task, table in self.tables.items()}

    def _rows(self, task: str, start: int) -> Tensor:
        """Images at the places from `start` on of the task's sequence."""
        size, parts, stop = len(self.tables[task]), [], start + self.batch_size
        while start < stop:
            shuffle, offset = divmod(start, size)
            parts.append(self._order(task, shuffle)[offset : offset + stop - start])
            start += len(parts[-1])
        return torch.cat(parts)

    def _order(self, task: str, shuffle: int) -> Tensor:
        known, order = self._orders.get(task, (-1, torch.empty(0)))
        if known != shuffle:
            key = mix(self.seed, *task.encode(), shuffle)
            order = torch.randperm(len(self.tables[task]), generator=torch.Generator().manual_seed(key))
            self._orders[task] = shuffle, order
        return order


def step_sampler(steps: int, trainer: Trainer | None) -> StepSampler:
    """The sampler of a training loader.

    Args:
        steps: Steps of an epoch.
        trainer: The Trainer that the loader is for, if any: a resumed run starts in its epoch.
    """
    sampler = StepSampler(steps)
    if trainer is not None:
        follow(sampler, trainer)
    return sampler
