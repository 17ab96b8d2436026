"""Pairs of users and items as flat tensors, and the gathering of whole batches from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.loading import Draw, KeyedSampler, keyed_ids, keyed_uniform, mix

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray


class InteractionTable(NamedTuple):
    """What users chose among items that have features: what a source returns.

    Attributes:
        name: What the data is called in messages.
        user_labels: `(num_users,)`, external ids, integers or strings; the place is the user id.
        item_labels: `(num_items,)`, external ids, integers or strings; the place is the item id.
        user_ids: int64 `(interactions,)`, 0..num_users - 1.
        item_ids: int64 `(interactions,)`, 0..num_items - 1.
        split: int8 `(interactions,)`, 0 training, 1 validation, 2 test; None where no split is published.
        features: Modality to float32 `(num_items, size)`, row k of item k; may be empty.
        images: uint8 `(num_items, height, width, 3)`, thumbnails to show; None where there are none.
        item_names: Titles to show, one an item; None where there are none.
    """

    name: str
    user_labels: NDArray[Any]
    item_labels: NDArray[Any]
    user_ids: NDArray[np.int64]
    item_ids: NDArray[np.int64]
    split: NDArray[np.int8] | None
    features: dict[str, NDArray[np.float32]]
    images: NDArray[np.uint8] | None
    item_names: list[str] | None

    @property
    def num_users(self) -> int:
        """Number of users, those without an interaction included."""
        return len(self.user_labels)

    @property
    def num_items(self) -> int:
        """Size of the catalogue, items without an interaction included."""
        return len(self.item_labels)


class InteractionBatch(NamedTuple):
    """Training pairs.

    Attributes:
        user_ids: int64 `(batch,)`.
        item_ids: int64 `(batch,)`, a training item of each user.
        keys: int64 `(batch,)`, not negative: what the random draws of a row (its negatives) depend on. The same on
            every rank, in every worker and in a resumed run; another one in every epoch.
    """

    user_ids: Tensor
    item_ids: Tensor
    keys: Tensor


class RankingBatch(NamedTuple):
    """Users to rank items for.

    Attributes:
        user_ids: int64 `(batch,)`.
        target_ids: int64 `(batch, most targets)`, padded with -1; a column of -1 in prediction.
        seen_rows: int64 `(seen,)`, position in the batch of each pair to mask.
        seen_ids: int64 `(seen,)`, the item of that pair.
        candidate_ids: int64 `(candidates,)`, the items that are ranked; None for all.
    """

    user_ids: Tensor
    target_ids: Tensor
    seen_rows: Tensor
    seen_ids: Tensor
    candidate_ids: Tensor | None


def gather_ragged(flat: Tensor, offsets: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows `flat[offsets[r] : offsets[r + 1]]`, one after the other.

    Args:
        flat: `(values,)`.
        offsets: int64 `(number of rows + 1,)`.
        rows: int64 `(batch,)`.

    Returns:
        The values; the position in `rows` of each; and its place within its row. All `(gathered,)`.
    """
    starts = offsets[rows]
    lengths = offsets[rows + 1] - starts
    positions = torch.repeat_interleave(lengths)
    within = torch.arange(len(positions)) - (lengths.cumsum(0) - lengths)[positions]
    return flat[starts[positions] + within], positions, within


def by_user(edges: Tensor, num_users: int) -> tuple[Tensor, Tensor]:
    """Pairs, user after user.

    Args:
        edges: int64 `(2, pairs)`, user and item ids.
        num_users: Number of users.

    Returns:
        The items, int64 `(pairs,)`, in the order of users and the given order within; and int64 `(num_users + 1,)`
        offsets of the users.
    """
    order = edges[0].argsort(stable=True)
    offsets = torch.zeros(num_users + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(edges[0], minlength=num_users), 0, out=offsets[1:])
    return edges[1][order], offsets


class TrainInteractions(Dataset[InteractionBatch]):
    """One row an interaction.

    Args:
        edges: int64 `(2, interactions)`, user and item ids.
    """

    def __init__(self, edges: Tensor) -> None:
        self.edges = edges

    def __len__(self) -> int:
        """Number of interactions."""
        return self.edges.shape[1]

    def __getitem__(self, draw: Draw) -> InteractionBatch:
        """The batch of the interactions `draw.indices`."""
        user_ids, item_ids = self.edges[:, draw.indices]
        return InteractionBatch(user_ids, item_ids, keyed_ids(draw.key, draw.indices))


class TrainUsers(Dataset[InteractionBatch]):
    """One row a user with training items, and one of them drawn uniformly.

    An index is `place * len(self) + row`: `UserSampler` gives every place of an epoch a number, so that a user who
    comes again draws anew.

    Args:
        edges: int64 `(2, interactions)`, user and item ids.
    """

    def __init__(self, edges: Tensor) -> None:
        present = torch.bincount(edges[0]) > 0
        self.user_ids = present.nonzero()[:, 0]
        rows = (present.cumsum(0) - 1)[edges[0]]
        self.item_ids, self.offsets = by_user(torch.stack([rows, edges[1]]), len(self.user_ids))

    def __len__(self) -> int:
        """Number of users who have training items."""
        return len(self.user_ids)

    def __getitem__(self, draw: Draw) -> InteractionBatch:
        """The batch of the users at `draw.indices`."""
        rows = draw.indices % len(self)
        starts = self.offsets[rows]
        # Two streams of one key: what the model draws for a row must not depend on which positive it got.
        drawn = keyed_uniform(mix(draw.key, 1), draw.indices) * (self.offsets[rows + 1] - starts)
        return InteractionBatch(
            self.user_ids[rows], self.item_ids[starts + drawn.long()], keyed_ids(mix(draw.key, 2), draw.indices)
        )


class UserSampler(KeyedSampler):
    """Every batch a fresh draw of distinct users: the published training procedure.

    An epoch has `floor(interactions / global batch) + 1` batches, all full. The users of a global batch are distinct
    unless it is larger than their number; then they are drawn with replacement. A batch is a function of the seed, the
    epoch and its number alone, and the ranks cut one common global batch.

    Args:
        num_users: Number of users who have training items: the length of `TrainUsers`.
        num_interactions: Number of training interactions.
        batch_size: Batch size of one process.
        seed: Key of the draws.
        num_replicas: Number of processes; by default that of `torch.distributed`, or 1.
        rank: This process; by default that of `torch.distributed`, or 0.
    """

    def __init__(
        self,
        num_users: int,
        num_interactions: int,
        batch_size: int,
        *,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        super().__init__(
            num_interactions, batch_size, shuffle=True, equal=True, seed=seed, num_replicas=num_replicas, rank=rank
        )
        self.num_users = num_users
        self.global_batch = self.num_replicas * batch_size
        # All batches are full: what the base class cuts is a row of whole global batches.
        self.size = (num_interactions // self.global_batch + 1) * self.global_batch
        self.epoch_length = len(self)

    def _batches(self, key: int, first_batch: int) -> Iterator[Draw]:
        for batch in range(first_batch, len(self)):
            generator = np.random.Generator(np.random.PCG64(mix(key, batch)))
            drawn = generator.choice(self.num_users, self.global_batch, replace=self.global_batch > self.num_users)
            low, high = self._slice(batch * self.global_batch)
            places = torch.arange(low, high)
            rows = torch.from_numpy(drawn.astype(np.int64))[low - batch * self.global_batch :][: high - low]
            yield Draw(places * self.num_users + rows, key)


class RankingRows(Dataset[RankingBatch]):
    """Users, the items to find for each, and the items that leave the ranking.

    Args:
        user_ids: int64 `(rows,)`, the users to rank for.
        targets: int64 `(2, pairs)`, user and item ids of what is to be found, of these users; None in prediction.
        seen: int64 `(2, pairs)`, user and item ids of what is masked.
        num_users: Number of users.
        candidate_ids: int64 `(candidates,)`, items that are ranked; None for all.
    """

    def __init__(
        self,
        user_ids: Tensor,
        targets: Tensor | None,
        seen: Tensor,
        num_users: int,
        candidate_ids: Tensor | None = None,
    ) -> None:
        empty = torch.zeros(2, 0, dtype=torch.int64)
        self.user_ids, self.candidate_ids = user_ids, candidate_ids
        self.target_ids, self.target_offsets = by_user(empty if targets is None else targets, num_users)
        self.seen_ids, self.seen_offsets = by_user(seen, num_users)

    def __len__(self) -> int:
        """Number of users to rank for."""
        return len(self.user_ids)

    def __getitem__(self, draw: Draw) -> RankingBatch:
        """The batch of the rows `draw.indices`."""
        user_ids = self.user_ids[draw.indices]
        items, positions, within = gather_ragged(self.target_ids, self.target_offsets, user_ids)
        width = int(within.max()) + 1 if len(within) else 1
        target_ids = torch.full((len(user_ids), width), -1, dtype=torch.int64)
        target_ids[positions, within] = items
        seen_ids, seen_rows, _ = gather_ragged(self.seen_ids, self.seen_offsets, user_ids)
        return RankingBatch(user_ids, target_ids, seen_rows, seen_ids, self.candidate_ids)

    def by_targets(self) -> Tensor:
        """Rows from the fewest targets to the most, int64 `(rows,)`: batches of equal numbers have no padding."""
        return self.target_offsets.diff()[self.user_ids].argsort(stable=True)
