"""Uniform negative items that a user has never met, for a whole batch at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.common.keyed_random import keyed_integers
from zoo.ticoserec.jagged import row_and_position


class NegativeSampler(nn.Module):
    """Draws items uniformly from 1..num_items without those of the user.

    The users' items are one sorted list of keys `user * (num_items + 1) + item`; a draw is rejected and repeated when a
    binary search finds it there. Draws are a function of their key, so they do not depend on batches or ranks.

    Args:
        item_ids: integer `(items,)`, the items to avoid, user after user.
        lengths: int64 `(users,)`.
        num_items: Catalogue size.

    Raises:
        ValueError: If a user has met every item of the catalogue.
    """

    seen: Tensor

    def __init__(self, item_ids: Tensor, lengths: Tensor, num_items: int) -> None:
        super().__init__()
        users, _ = row_and_position(lengths)
        seen = torch.unique(users * (num_items + 1) + item_ids)
        full = (seen // (num_items + 1)).bincount(minlength=1) >= num_items
        if bool(full.any()):
            raise ValueError(
                f"user {int(full.nonzero()[0])} has met all {num_items} items: no negative is left to draw"
            )
        self.num_items = num_items
        self.register_buffer("seen", seen, persistent=False)

    def forward(self, user_ids: Tensor, keys: Tensor, count: int = 1) -> Tensor:
        """Negatives for positions.

        Args:
            user_ids: int64 `(positions,)`.
            keys: int64 `(positions,)`, random keys, different for different positions.
            count: Negatives per position K.

        Returns:
            int64 `(positions, K)`.
        """
        columns = torch.arange(count, device=user_ids.device)
        keys = keys[:, None].expand(-1, count)
        drawn = 1 + keyed_integers(self.num_items, keys, columns, 0)
        attempt = 0
        while bool((met := self._met(user_ids[:, None], drawn)).any()):
            attempt += 1
            again = met.nonzero(as_tuple=True)
            drawn[again] = 1 + keyed_integers(self.num_items, keys[again], columns[again[1]], attempt)
        return drawn

    def _met(self, user_ids: Tensor, item_ids: Tensor) -> Tensor:
        wanted = user_ids * (self.num_items + 1) + item_ids
        place = torch.searchsorted(self.seen, wanted).clamp(max=len(self.seen) - 1)
        return self.seen[place] == wanted
