"""Training batches in which rare emotions are as frequent as others, or more frequent than in the data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from datamodules.loading import Draw, KeyedSampler, bucketed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


class BalancedSampler(KeyedSampler):
    """Whole batches in which rare classes are more likely than among the rows, with the guarantees of `KeyedSampler`.

    An epoch is as many full global batches as the rows fill, at least one. Rows of a class come in random order,
    each once before any comes again; so rare classes repeat in an epoch, and of frequent ones an epoch has a part.

    Args:
        classes: int64 `(rows,)`, class of each row; rows with -1 are left out.
        batch_size: Batch size of one process.
        whole_batches: Whether all rows of a global batch have one class, drawn for the batch; otherwise the class is
            drawn for each row.
        power: A class is drawn in proportion to its number of rows to this power: 0 makes all that occur equally
            likely, 1 leaves them as they are, 0.5 is between.
        lengths: int64 `(rows,)`. With them the rows of a batch have about one length; see `KeyedSampler`.
        seed: Key of the order.
        num_replicas: Number of processes; by default that of `torch.distributed`, or 1.
        rank: This process; by default that of `torch.distributed`, or 0.

    Raises:
        ValueError: If no row has a class, there are fewer rows than processes, or the batch size is not positive.
    """

    def __init__(
        self,
        classes: Tensor,
        batch_size: int,
        *,
        whole_batches: bool,
        power: float = 0.0,
        lengths: Tensor | None = None,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        rows = int((classes >= 0).sum())
        if not rows:
            raise ValueError("no row has a known class to balance by: set balance='none'")
        super().__init__(
            rows, batch_size, shuffle=True, lengths=lengths, equal=True, seed=seed, num_replicas=num_replicas, rank=rank
        )
        self.whole_batches = whole_batches
        self._rows = [
            (classes == value).nonzero()[:, 0]
            for value in torch.bincount(classes[classes >= 0]).nonzero()[:, 0].tolist()
        ]
        self.weights = torch.tensor([float(len(own)) for own in self._rows]) ** power
        self._global = self.num_replicas * batch_size
        self.size = max(1, rows // self._global) * self._global
        self.epoch_length = len(self)

    def _batches(self, key: int, first_batch: int) -> Iterator[Draw]:
        generator = torch.Generator().manual_seed(key)
        unit = self._global if self.whole_batches else 1
        drawn = torch.multinomial(self.weights, self.size // unit, replacement=True, generator=generator)
        order = torch.empty(len(drawn), unit, dtype=torch.int64)
        for place, rows in enumerate(self._rows):
            chosen = drawn == place
            stream = _stream(rows, int(chosen.sum()) * unit, generator)
            if self.whole_batches and self.lengths is not None:
                stream = bucketed(stream, self.lengths, unit, generator)
            order[chosen] = stream.view(-1, unit)
        flat = order.flatten()
        if not self.whole_batches and self.lengths is not None:
            flat = bucketed(flat, self.lengths, self._global, generator)
        for batch in range(first_batch, len(self)):
            low, high = self._slice(batch * self._global)
            yield Draw(flat[low:high], key)


def _stream(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random permutations of rows, one after the other, cut to a length."""
    rounds = -(-count // len(rows))
    return rows[torch.rand(rounds, len(rows), generator=generator).argsort(1).flatten()[:count]]
