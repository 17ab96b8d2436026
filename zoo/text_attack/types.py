"""What the modules of this room ask of a batch, whoever made it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class RecBatch(Protocol):
    """Users, what they had, and an item for each."""

    @property
    def user_ids(self) -> Tensor:
        """int64 `(batch,)`."""

    @property
    def history(self) -> Tensor:
        """int64 `(batch, length)`: items, newest first, -1 at the end as padding."""

    @property
    def liked(self) -> Tensor:
        """Bool `(batch, length)`: whether the user liked that item."""

    @property
    def item_ids(self) -> Tensor:
        """int64 `(batch,)`: the next item, or the one that is asked about."""

    @property
    def labels(self) -> Tensor:
        """float32 `(batch,)`: 1 if the user likes it, 0 if not."""

    @property
    def candidate_ids(self) -> Tensor:
        """int64 `(batch, candidates)`: items to rank `item_ids` against; may have no column."""

    @property
    def keys(self) -> Tensor:
        """int64 `(batch,)`: what random numbers of a row depend on."""


class Targets(Protocol):
    """An item whose title is attacked."""

    @property
    def item_ids(self) -> Tensor:
        """int64 `(1,)`."""

    @property
    def texts(self) -> list[str]:
        """Its title."""
