"""Sequences of all users as flat tensors, and the gathering of whole batches from them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.loading import Draw, keyed_uniform


class SequenceTable(NamedTuple):
    """What every user did, user after user and oldest first.

    Attributes:
        item_ids: int32 `(interactions,)`, 1..num_items.
        timestamps: int64 `(interactions,)`, Unix seconds, non-decreasing per user; None where the data has no times.
        offsets: int64 `(num_users + 1,)`; user u has `item_ids[offsets[u] : offsets[u + 1]]`.
        train_lengths: int64 `(num_users,)`, leading interactions that training may see: all but the last two. The last
            of them is a target only.
        uniformity_rank: int64 `(num_users,)`, 0 for the user with the most even gaps between times. Users with
            `uniformity_rank < floor(ratio * num_users)` are exempt from augmentation.
    """

    item_ids: Tensor
    timestamps: Tensor | None
    offsets: Tensor
    train_lengths: Tensor
    uniformity_rank: Tensor


class SequenceBatch(NamedTuple):
    """Sequences of some users, left-padded with 0.

    Attributes:
        user_ids: int64 `(batch,)`, rows of the training table; -1 for a user who is not in it.
        item_ids: int64 `(batch, width)`, oldest first, left-padded with 0; the width is the longest in the batch, at
            most `max_length`.
        lengths: int64 `(batch,)`, filled places of each row.
        target_ids: What to predict. Training: int64 `(batch, width)`, the item that follows each input, left-padded
            with 0 (and 0 where a filled place has no target). Evaluation: int64 `(batch,)`. Prediction: zeros
            `(batch,)`.
        seen_ids: Evaluation and prediction: int64 `(batch, longest history)` padded with 0, items never to recommend.
            None in training.
    """

    user_ids: Tensor
    item_ids: Tensor
    lengths: Tensor
    target_ids: Tensor
    seen_ids: Tensor | None


def gather_left_padded(flat: Tensor, ends: Tensor, lengths: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows `flat[ends[r] - lengths[r] : ends[r]]`, left-padded with 0.

    Args:
        flat: `(values,)`.
        ends: int64 `(rows,)`.
        lengths: int64 `(rows,)`, none above `width`.
        width: Number of columns.

    Returns:
        int64 `(rows, width)`; the indices into `flat`; and where a row is filled.
    """
    columns = torch.arange(width)
    places = ends[:, None] + (columns - width)
    filled = columns >= (width - lengths)[:, None]
    values = flat[places.clamp_(min=0)].long() * filled
    return values, places, filled


class TrainRows(Dataset[SequenceBatch]):
    """Each user's training sequence: inputs v_1..v_{m-3}, targets v_2..v_{m-2}, the last `max_length` of them.

    Args:
        table: All sequences.
        max_length: Longest input.
        repeat_pad: Whether to fill the free places of a row with 1 to `floor(max_length / n)` further copies of its n
            items (RepPad, RecSys 2024). Each copy has its own targets; what does not fit is cut off at the left.
        repeat_separator: Whether one padding item stands between two copies.
    """

    def __init__(
        self, table: SequenceTable, max_length: int, repeat_pad: bool = False, repeat_separator: bool = True
    ) -> None:
        self.table, self.max_length = table, max_length
        self.repeat_pad, self.repeat_separator = repeat_pad, repeat_separator

    def __len__(self) -> int:
        """Number of users."""
        return len(self.table.train_lengths)

    def __getitem__(self, draw: Draw) -> SequenceBatch:
        """The batch of the users `draw.indices`."""
        users, table = draw.indices, self.table
        counts = table.train_lengths[users] - 1
        ends = table.offsets[users] + counts
        if self.repeat_pad:
            return self._repeated(draw, ends, counts)
        lengths = counts.clamp(max=self.max_length)
        width = int(lengths.max())
        item_ids, places, filled = gather_left_padded(table.item_ids, ends, lengths, width)
        # Padded places may point at another user's items, hence the mask; the next item is the target.
        target_ids = table.item_ids[places + 1].long() * filled
        return SequenceBatch(users, item_ids, lengths, target_ids, None)

    def _repeated(self, draw: Draw, ends: Tensor, counts: Tensor) -> SequenceBatch:
        most = self.max_length // counts
        copies = 1 + (1 + (keyed_uniform(draw.key, draw.indices) * most).long()) * (most > 0)
        period = counts + int(self.repeat_separator)
        lengths = (copies * period - int(self.repeat_separator)).clamp(max=self.max_length)
        width = int(lengths.max())
        columns = torch.arange(width)
        # Distance from the right end of the row, and in it the distance from the end of its copy.
        back = (width - 1 - columns) % period[:, None]
        filled = (columns >= (width - lengths)[:, None]) & (back < counts[:, None])
        places = (ends[:, None] - 1 - back).clamp_(min=0)
        item_ids = self.table.item_ids[places].long() * filled
        target_ids = self.table.item_ids[places + 1].long() * filled
        return SequenceBatch(draw.indices, item_ids, lengths, target_ids, None)


class HistoryRows(Dataset[SequenceBatch]):
    """Histories of users, and the one item that follows each.

    Args:
        item_ids: int32 `(interactions,)`, all sequences, one after the other.
        starts: int64 `(rows,)`, where each history begins.
        lengths: int64 `(rows,)`, its items.
        user_ids: int64 `(rows,)`, what the batch names the users.
        max_length: Longest input.
        mask_seen: Whether all items of the history, also those before the last `max_length`, go into `seen_ids`;
            otherwise it is a column of padding.
        targets: Whether the item after the history is the target; otherwise targets are 0.
    """

    def __init__(
        self,
        item_ids: Tensor,
        starts: Tensor,
        lengths: Tensor,
        user_ids: Tensor,
        max_length: int,
        mask_seen: bool = True,
        targets: bool = True,
    ) -> None:
        self.item_ids, self.starts, self.lengths, self.user_ids = item_ids, starts, lengths, user_ids
        self.max_length, self.mask_seen, self.targets = max_length, mask_seen, targets

    def __len__(self) -> int:
        """Number of histories."""
        return len(self.lengths)

    def __getitem__(self, draw: Draw) -> SequenceBatch:
        """The batch of the rows `draw.indices`."""
        rows = draw.indices
        full = self.lengths[rows]
        ends = self.starts[rows] + full
        longest = int(full.max())
        if self.mask_seen:
            seen_ids, _, _ = gather_left_padded(self.item_ids, ends, full, longest)
        else:
            seen_ids = torch.zeros(len(rows), 1, dtype=torch.int64)
        lengths = full.clamp(max=self.max_length)
        width = min(longest, self.max_length)
        if self.mask_seen:
            item_ids = seen_ids[:, longest - width :].contiguous()
        else:
            item_ids, _, _ = gather_left_padded(self.item_ids, ends, lengths, width)
        target_ids = self.item_ids[ends].long() if self.targets else torch.zeros_like(full)
        return SequenceBatch(self.user_ids[rows], item_ids, lengths, target_ids, seen_ids)

    def by_length(self) -> Tensor:
        """Rows from the shortest input to the longest, int64 `(rows,)`: batches of equal lengths have no padding."""
        return self.lengths.clamp(max=self.max_length).argsort(stable=True)

    def targets_in_history(self) -> int:
        """Number of targets that are in their own history, and so out of reach where seen items are masked."""
        rows = torch.repeat_interleave(self.lengths)
        within = torch.arange(len(rows)) - (self.lengths.cumsum(0) - self.lengths)[rows]
        same = self.item_ids[self.starts[rows] + within] == self.item_ids[self.starts + self.lengths][rows]
        return int(torch.zeros(len(self), dtype=torch.int64).index_add_(0, rows, same.long()).gt(0).sum())
