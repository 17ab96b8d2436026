"""Uniform negative items that a user has never met, for a whole batch at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.common.keyed_random import keyed_integers

_AT_ONCE = 8  # further draws of a row whose first the user has met


class NegativeSampler(nn.Module):
    """Draws items uniformly from the catalogue without those of the user.

    The users' items are one sorted list of keys `user * (first_item + num_items) + item`; a draw is rejected and
    repeated when a binary search finds it there. Draws are a function of their key, so they do not depend on batches or
    ranks.

    Args:
        user_ids: int64 `(interactions,)`, from 0.
        item_ids: integer `(interactions,)`, the items to avoid for each; repeated pairs count once.
        num_items: Catalogue size.
        first_item: Smallest item id: 1 where 0 is padding.
        pool: int64 `(any,)`, the items to draw from; the whole catalogue by default.

    Raises:
        ValueError: If a user has met every item to draw from.

    Example:
        >>> import torch
        >>> sampler = NegativeSampler(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2]), num_items=3)
        >>> sampler(torch.tensor([0, 0]), keys=torch.tensor([5, 6])).tolist()
        [[2], [2]]
    """

    seen: Tensor
    pool: Tensor | None

    def __init__(
        self,
        user_ids: Tensor,
        item_ids: Tensor,
        num_items: int,
        first_item: int = 0,
        pool: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.num_items, self.first_item = num_items, first_item
        self._stride = first_item + num_items
        seen = torch.unique(user_ids * self._stride + item_ids)
        counted = seen if pool is None else seen[torch.isin(seen % self._stride, pool)]
        self._size = num_items if pool is None else len(pool)
        full = (counted // self._stride).bincount(minlength=1) >= self._size
        if bool(full.any()):
            raise ValueError(
                f"user {int(full.nonzero()[0])} has met all {self._size} items: no negative is left to draw"
            )
        self.register_buffer("seen", seen, persistent=False)
        self.register_buffer("pool", pool, persistent=False)

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
        drawn = self._draw(keys, columns, 0)
        rows, places = self._met(user_ids[:, None], drawn).nonzero(as_tuple=True)
        attempts = torch.arange(1, _AT_ONCE + 1, device=user_ids.device)
        while len(rows):
            # Few rows are left, so that some further draws of each cost little more than one.
            fresh = self._draw(keys[rows, places, None], places[:, None], attempts)
            unmet = ~self._met(user_ids[rows, None], fresh)
            drawn[rows, places] = fresh.gather(1, unmet.byte().argmax(1, keepdim=True))[:, 0]
            met = ~unmet.any(1)
            rows, places, attempts = rows[met], places[met], attempts + _AT_ONCE
        return drawn

    def _draw(self, keys: Tensor, columns: Tensor, attempt: int | Tensor) -> Tensor:
        drawn = keyed_integers(self._size, keys, columns, attempt)
        return drawn + self.first_item if self.pool is None else self.pool[drawn]

    def _met(self, user_ids: Tensor, item_ids: Tensor) -> Tensor:
        wanted = user_ids * self._stride + item_ids
        place = torch.searchsorted(self.seen, wanted).clamp(max=len(self.seen) - 1)
        return self.seen[place] == wanted
