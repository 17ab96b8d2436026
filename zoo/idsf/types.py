"""What the modules of this room read of a batch: any object with these fields will do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class InteractionBatch(Protocol):
    """Interactions to learn from.

    Attributes:
        user_ids: int64 `(batch,)`.
        item_ids: int64 `(batch,)`, a training item of each user.
        keys: int64 `(batch,)`, what the random draws for a row depend on.
    """

    @property
    def user_ids(self) -> Tensor: ...  # noqa: D102
    @property
    def item_ids(self) -> Tensor: ...  # noqa: D102
    @property
    def keys(self) -> Tensor: ...  # noqa: D102


class RankingBatch(Protocol):
    """Users to rank items for.

    Attributes:
        user_ids: int64 `(batch,)`.
        target_ids: int64 `(batch, most targets)`, padded with -1.
        seen_rows: int64 `(seen,)`, row of each pair that is not ranked.
        seen_ids: int64 `(seen,)`, its item.
        candidate_ids: int64 `(candidates,)`, items ranked; None for all.
    """

    @property
    def user_ids(self) -> Tensor: ...  # noqa: D102
    @property
    def target_ids(self) -> Tensor: ...  # noqa: D102
    @property
    def seen_rows(self) -> Tensor: ...  # noqa: D102
    @property
    def seen_ids(self) -> Tensor: ...  # noqa: D102
    @property
    def candidate_ids(self) -> Tensor | None: ...  # noqa: D102
