"""The views of all users, drawn once an epoch from tables that never change."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.common.keyed_random import mix_keys
from zoo.ticoserec.augment import BLANK, ORIGINAL, Sequences, ViewPolicy, describe, draw_operators, make_views
from zoo.ticoserec.jagged import gather_rows, keep_last, row_and_position

if TYPE_CHECKING:
    from collections.abc import Callable

    from zoo.ticoserec.types import SequenceTable

_VIEW_STREAM = 12
_CHUNK = 2**14  # rows drawn at once


class _EpochViews(NamedTuple):
    """The views of all users in one epoch: row u is user u's first view, row N + u the second.

    Attributes:
        epoch: The epoch.
        item_ids: int16 or int32 `(items,)`.
        starts: int32 or int64 `(2 * users + 1,)`, where each row starts.
    """

    epoch: int
    item_ids: Tensor
    starts: Tensor


class ViewTable(nn.Module):
    """Gap ranks, windows and exempt users of a training set, and the views of the epoch at hand.

    Small tensor operations cost by their number, so an epoch's views are drawn together, some thousand users at once,
    and a batch is one gather. A view is a function of key, epoch and user: it does not depend on batches or processes.

    Args:
        table: The training sequences.
        policy: Operators, ratios and modes.
        num_items: Catalogue size.
        max_length: Longest view; older items are cut off.
        exempt_ratio: Share of users, those with the most even gaps, that is left alone.
        blank: Give exempt users empty views in place of their sequence.

    Raises:
        ValueError: If the policy chooses by time and the table has no times.
    """

    item_ids: Tensor
    starts: Tensor
    ranks: Tensor
    users: Tensor
    exempt: Tensor

    def __init__(
        self,
        table: SequenceTable,
        policy: ViewPolicy,
        num_items: int,
        max_length: int,
        exempt_ratio: float,
        blank: bool = False,
    ) -> None:
        super().__init__()
        self._drawn: _EpochViews | None = None
        self.policy, self.num_items, self.max_length, self.blank = policy, num_items, max_length, blank
        lengths = (table.train_lengths - 1).clamp(min=0)
        first = table.offsets[:-1]
        described = describe(
            policy,
            gather_rows(table.item_ids, first, lengths),
            lengths,
            None if table.timestamps is None else gather_rows(table.timestamps, first, table.train_lengths),
            None if table.timestamps is None else table.train_lengths,
        )
        # Items and starts share the table's memory; ranks are as short as the longest sequence allows.
        ranks = torch.zeros(len(table.item_ids), dtype=torch.int16 if int(lengths.max()) < 2**15 else torch.int32)
        ranks[first[described.rows] + described.positions] = described.ranks.to(ranks.dtype)
        users = torch.stack([lengths.int(), described.crop_starts.int(), described.reorder_starts.int()], -1)
        # Without times nobody has a rank below the number of users, but everybody is everybody.
        exempt = (table.uniformity_rank < int(exempt_ratio * len(lengths))) | (exempt_ratio == 1)
        for name, tensor in (
            ("item_ids", table.item_ids),
            ("starts", first),
            ("ranks", ranks),
            ("users", users),
            ("exempt", exempt),
        ):
            self.register_buffer(name, tensor, persistent=False)

    def sequences(self) -> tuple[Tensor, Tensor]:
        """Training inputs of all users, `(items,)`, and their lengths `(users,)`."""
        lengths = self.users[:, 0].long()
        return gather_rows(self.item_ids, self.starts, lengths), lengths

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ViewTable:
        # Views drawn on the old device are drawn again on the new one.
        self.forget()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forget(self) -> None:
        """Draw anew at the next call: the nearest items have changed."""
        self._drawn = None

    def forward(self, user_ids: Tensor, epoch: int, key: int, most_similar: Tensor) -> tuple[Tensor, Tensor]:
        """Two views of each user.

        Args:
            user_ids: int64 `(batch,)`, rows of the table.
            epoch: The epoch; the next one has other views.
            key: Random key of the run.
            most_similar: int64 `(num_items + 1,)`, the nearest item of each item.

        Returns:
            Items of the views, int64, the first view of every user and then the second of every user, and the lengths
            of those `2 * batch` rows.
        """
        if self._drawn is None or self._drawn.epoch != epoch:
            self._drawn = self._draw_epoch(epoch, key, most_similar)
        rows = torch.cat([user_ids, user_ids + len(self.users)])
        starts = self._drawn.starts[rows].long()
        lengths = self._drawn.starts[rows + 1] - starts
        return gather_rows(self._drawn.item_ids, starts, lengths).long(), lengths

    def _draw_epoch(self, epoch: int, key: int, most_similar: Tensor) -> _EpochViews:
        count = 2 * len(self.users)
        item_ids, lengths = [], []
        for first in range(0, count, _CHUNK):
            rows = torch.arange(first, min(first + _CHUNK, count), device=self.users.device)
            users, view = rows % (count // 2), rows // (count // 2)
            items, sizes = self._draw_rows(users, mix_keys(key, _VIEW_STREAM, epoch, users, view), most_similar)
            item_ids.append(items.to(torch.int16 if self.num_items < 2**15 else torch.int32))
            lengths.append(sizes)
        starts = F.pad(torch.cat(lengths).cumsum(0), (1, 0))
        narrow = torch.int32 if int(starts[-1]) < 2**31 else torch.int64
        return _EpochViews(epoch, torch.cat(item_ids), starts.to(narrow))

    def _draw_rows(self, users: Tensor, keys: Tensor, most_similar: Tensor) -> tuple[Tensor, Tensor]:
        """One view of each of `users` `(rows,)` by random `keys` `(rows,)`."""
        lengths, crop_starts, reorder_starts = self.users[users].long().unbind(-1)
        rows, positions = row_and_position(lengths)
        places = self.starts[users][rows] + positions
        # The time of the last target is known, so every item has a gap.
        sequences = Sequences(
            item_ids=self.item_ids[places].long(),
            lengths=lengths,
            rows=rows,
            positions=positions,
            ranks=self.ranks[places],
            known=lengths,
            crop_starts=crop_starts,
            reorder_starts=reorder_starts,
        )
        operators = draw_operators(self.policy, lengths, keys)
        operators.masked_fill_(self.exempt[users], BLANK if self.blank else ORIGINAL)
        views = make_views(self.policy, sequences, operators, keys, most_similar)
        return keep_last(views.item_ids, views.lengths, self.max_length)
