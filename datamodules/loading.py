"""Loading by whole batches: an order that depends only on its key, ranks that share it, and exact resumption.

A `Dataset` for these loaders gathers a batch at once: `dataset[Draw(indices, key)]`.
"""

from __future__ import annotations

import logging
import os
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler

if TYPE_CHECKING:
    from collections.abc import Iterator, Sized

    from lightning.pytorch import Trainer
    from numpy.typing import NDArray

log = logging.getLogger(__name__)
_MASK = (1 << 64) - 1
POOL = 50
"""Batches that are sorted by length together."""


class Draw(NamedTuple):
    """What a `KeyedSampler` asks of a dataset.

    Attributes:
        indices: int64 `(batch,)`.
        key: What random numbers of these samples depend on, together with the index: the same in every worker, on
            every rank and in a resumed run.
    """

    indices: Tensor
    key: int


def mix(*keys: int) -> int:
    """Hash integers to one in `[0, 2**63)`: SplitMix64's finaliser after each key."""
    state = 0
    for key in keys:
        state = (state + (key & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def _keyed_words(key: int, indices: Tensor) -> NDArray[np.uint64]:
    """A hash of the key and each index, of the shape of `indices`."""
    state = indices.numpy().astype(np.uint64) + np.uint64(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 0x9E3779B97F4A7C15), (29, 1)):
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    return state


def keyed_uniform(key: int, indices: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), float64, of the shape of `indices`; each depends on the key and its index alone."""
    return torch.from_numpy((_keyed_words(key, indices) >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def keyed_ids(key: int, indices: Tensor) -> Tensor:
    """A hash of the key and each index: int64 in `[0, 2**63)`, of the shape of `indices`."""
    return torch.from_numpy((_keyed_words(key, indices) >> np.uint64(1)).astype(np.int64))


def run_seed(seed: int | None) -> int:
    """The seed given, or else the one of Lightning's `seed_everything`, or else 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed


class KeyedSampler(DistributedSampler[Draw]):
    """Whole batches of indices, in an order that is a function of the seed and the epoch alone.

    The ranks cut one common order: rank r takes rows `[r * batch_size, (r + 1) * batch_size)` of every global batch of
    `world * batch_size` indices, so that two processes with `batch_size` see what one with twice of it sees. It is a
    `DistributedSampler` so that Lightning leaves it in place.

    Args:
        size: Number of samples, or anything that has a length.
        batch_size: Batch size of one process.
        shuffle: Whether to draw a new order in every epoch.
        order: int64 `(size,)`, the order without shuffling; that of the dataset by default.
        lengths: int64 `(size,)`. With them a shuffled order has samples of about one length in each global batch:
            random pools of `POOL` global batches are sorted by length, and the batches shuffled.
        equal: Whether the last batch is equally long on all ranks, as gradients averaged over ranks need it: up to
            `world - 1` samples are left out of an epoch (others in the next, as the order changes). Otherwise every
            sample is there once, and the last batches differ by one sample, or are missing on some ranks.
        drop_last: Whether a last global batch that is not full is left out of the epoch (its samples come in others, as
            the order changes). Where it is the only one it stays, so that no epoch is empty.
        seed: Key of the order.
        num_replicas: Number of processes; by default that of `torch.distributed`, or 1.
        rank: This process; by default that of `torch.distributed`, or 0.

    Attributes:
        first_batch: Batches that the next iteration leaves out.
        epoch_length: Batches after which an epoch is over, where the user of the sampler stops before its end.

    Raises:
        ValueError: If there are fewer samples than processes, or the batch size is not positive.
    """

    def __init__(
        self,
        size: int | Sized,
        batch_size: int,
        *,
        shuffle: bool = False,
        order: Tensor | None = None,
        lengths: Tensor | None = None,
        equal: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        size = size if isinstance(size, int) else len(size)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        world = (torch.distributed.get_world_size() if distributed else 1) if num_replicas is None else num_replicas
        rank = (torch.distributed.get_rank() if distributed else 0) if rank is None else rank
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if size < world:
            raise ValueError(f"{size} samples cannot be shared by {world} processes: each needs at least one")
        super().__init__(range(size), num_replicas=world, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.size, self.batch_size, self.order, self.equal = size, batch_size, order, equal
        self.lengths, self.drop_last = lengths, drop_last
        self.first_batch = 0
        self.epoch_length = len(self)

    @property
    def left_out(self) -> int:
        """Samples that no rank sees in an epoch."""
        full, rest = divmod(self.size, self.num_replicas * self.batch_size)
        if self.drop_last and full:
            return rest
        return rest % self.num_replicas if self.equal else 0

    def _slice(self, start: int) -> tuple[int, int]:
        """Bounds of this rank's part of the global batch at `start`."""
        count = min(self.size - start, self.num_replicas * self.batch_size)
        share, rest = divmod(count, self.num_replicas)
        if self.equal:
            rest = 0
        low = start + self.rank * share + min(self.rank, rest)
        return low, low + share + (self.rank < rest)

    def __len__(self) -> int:
        """Number of batches of this rank."""
        full, rest = divmod(self.size, self.num_replicas * self.batch_size)
        if not rest or (self.drop_last and full):
            return full
        low, high = self._slice(full * self.num_replicas * self.batch_size)
        return full + (high > low)

    def __iter__(self) -> Iterator[Draw]:
        """Batches of the epoch from `first_batch` on.

        What it yields is fixed here: a later `set_epoch` changes the next iteration only.
        """
        return self._batches(mix(self.seed, self.epoch), self.first_batch)

    def _batches(self, key: int, first_batch: int) -> Iterator[Draw]:
        order = self.order
        if self.shuffle:
            generator = torch.Generator().manual_seed(key)
            order = torch.randperm(self.size, generator=generator)
            if self.lengths is not None:
                order = bucketed(order, self.lengths, self.num_replicas * self.batch_size, generator)
        elif order is None:
            order = torch.arange(self.size)
        for batch in range(first_batch, len(self)):
            low, high = self._slice(batch * self.num_replicas * self.batch_size)
            yield Draw(order[low:high], key)


def bucketed(order: Tensor, lengths: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
    """A random order cut into batches of samples of about one length.

    Args:
        order: int64 `(size,)`, a random order.
        lengths: int64 `(size,)`, of the samples by their index.
        batch_size: Samples of a batch.
        generator: Draws the order of the batches.

    Returns:
        int64 `(size,)`. Neighbours in `order`, `POOL` batches at a time, are sorted by length; then these batches are
        shuffled. What fills no batch stays at the end, of any length.
    """
    full = len(order) // batch_size
    # Cut off before the sort: else the longest samples were those that an epoch may leave out.
    order, rest = order[: full * batch_size], order[full * batch_size :]
    pools = torch.arange(len(order)) // (POOL * batch_size)
    # Two stable sorts sort by pool first and by length within it.
    within = lengths[order].argsort(stable=True)
    order = order[within[pools[within].argsort(stable=True)]]
    batches = order.view(full, batch_size)
    return torch.cat([batches[torch.randperm(full, generator=generator)].flatten(), rest])


def training_sampler(
    size: int,
    batch_size: int,
    seed: int | None,
    trainer: Trainer | None,
    unit: str = "rows",
    lengths: Tensor | None = None,
    drop_last: bool = False,
) -> KeyedSampler:
    """The sampler of a training loader: a new order in every epoch, equal batches on all ranks.

    Args:
        size: Number of samples.
        batch_size: Batch size of one process.
        seed: Key of the order; by default the one of `seed_everything`.
        trainer: The Trainer that the loader is for, if any: a resumed run starts in its epoch.
        unit: What samples are called in the log.
        lengths: int64 `(size,)`; with them the samples of a batch have about one length.
        drop_last: Whether a last global batch that is not full is left out, unless it is the only one.
    """
    sampler = KeyedSampler(
        size, batch_size, shuffle=True, lengths=lengths, equal=True, drop_last=drop_last, seed=run_seed(seed)
    )
    if sampler.left_out:
        log.info("%d of %d %s are left out of each epoch, others each time, so that all %s", sampler.left_out, size,
                 unit, "batches are full" if drop_last else "processes have equal batches")  # fmt: skip
    if trainer is not None:
        follow(sampler, trainer)
    return sampler


def follow(sampler: KeyedSampler, trainer: Trainer) -> None:
    """Put a training sampler where its Trainer is: in the epoch of a resumed run, with the batches it will draw."""
    # Lightning tells the sampler its epoch only after it has made the first iterator. It reads `processed`,
    # which right after an epoch's end is one ahead of `trainer.current_epoch`.
    sampler.set_epoch(trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
    limit = trainer.limit_train_batches
    limit = len(sampler) if limit is None else limit
    sampler.epoch_length = limit if isinstance(limit, int) else int(limit * len(sampler))


def _as_is(batch: Any) -> Any:
    # A named function: worker processes must find it.
    return batch


class BatchLoader(DataLoader[Any]):
    """A loader of ready batches that continues in the middle of an epoch.

    Lightning stores `state_dict` of the training loader in its checkpoints.

    Args:
        dataset: Takes a `Draw` in `__getitem__` and returns a batch.
        sampler: Order and cut of the batches.
        overfit_batch_size: Batch size for `Trainer(overfit_batches=...)`, which puts a sequential sampler.
        kwargs: Further arguments of `torch.utils.data.DataLoader`. Workers stay from epoch to epoch.
    """

    sampler: KeyedSampler

    def __init__(
        self, dataset: Dataset[Any], *, sampler: KeyedSampler, overfit_batch_size: int = 128, **kwargs: Any
    ) -> None:
        if isinstance(sampler, SequentialSampler):
            sampler = KeyedSampler(len(sampler), overfit_batch_size, equal=True)
        given = {"batch_size": None, "collate_fn": _as_is, "persistent_workers": kwargs.get("num_workers", 0) > 0}
        given |= kwargs
        super().__init__(dataset, sampler=sampler, **given)
        self._restored = (-1, 0)  # epoch, and batches of it that an earlier run has had
        self._epoch = sampler.epoch  # that of the newest iterator
        self._had = 0  # batches of that epoch that were handed out, those of an earlier run included
        if self.num_workers == 0:
            # Gathering a batch takes less than sending it from one process to another.
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches of the sampler's epoch, from where a restored state says."""
        # The inner iterator is made now, not at the first batch: it belongs to the epoch that the sampler has now.
        self._epoch = self.sampler.epoch
        restored_epoch, batches = self._restored
        self._had = batches if restored_epoch == self._epoch else 0
        self.sampler.first_batch = self._had
        iterator = super().__iter__()
        self.sampler.first_batch = 0
        return self._count(iterator)

    def _count(self, iterator: Iterator[Any]) -> Iterator[Any]:
        for batch in iterator:
            # Only now is the restored position used up: an iterator that nobody draws from must not lose it.
            self._restored = (-1, 0)
            self._had += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch and batches of it that were handed out; after the last batch, the start of the next epoch."""
        if self._had >= min(len(self), self.sampler.epoch_length):
            return {"epoch": self._epoch + 1, "batches": 0}
        return {"epoch": self._epoch, "batches": self._had}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at the position of `state`."""
        self.sampler.set_epoch(state["epoch"])
        self._restored = (state["epoch"], state["batches"])


class LoaderMixin:
    """What data modules make their loaders with; they have `num_workers` and `pin_memory`."""

    num_workers: int
    pin_memory: bool

    def _loader(self, rows: Dataset[Any], sampler: KeyedSampler) -> BatchLoader:
        workers = {"num_workers": self.num_workers, "pin_memory": self.pin_memory}
        return BatchLoader(rows, sampler=sampler, overfit_batch_size=sampler.batch_size, **workers)
