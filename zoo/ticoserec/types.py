"""What the modules of this room expect of data: any objects with these fields do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class SequenceTable(Protocol):
    """The sequences of all training users, user after user and oldest first.

    Attributes:
        item_ids: integer `(interactions,)`, ids 1..num_items.
        timestamps: int64 `(interactions,)`, seconds, non-decreasing per user; None where unknown.
        offsets: int64 `(num_users + 1,)`; user u has `item_ids[offsets[u] : offsets[u + 1]]`.
        train_lengths: int64 `(num_users,)`, leading interactions that training may see, the last as a target only.
        uniformity_rank: int64 `(num_users,)`, 0 for the user with the most even gaps.
    """

    @property
    def item_ids(self) -> Tensor: ...  # noqa: D102
    @property
    def timestamps(self) -> Tensor | None: ...  # noqa: D102
    @property
    def offsets(self) -> Tensor: ...  # noqa: D102
    @property
    def train_lengths(self) -> Tensor: ...  # noqa: D102
    @property
    def uniformity_rank(self) -> Tensor: ...  # noqa: D102


class SequenceBatch(Protocol):
    """Sequences of some users, left-padded with 0.

    Attributes:
        user_ids: int64 `(batch,)`, rows of the training table, -1 for others.
        item_ids: int64 `(batch, width)`.
        lengths: int64 `(batch,)`, filled places of each row.
        target_ids: int64 `(batch, width)` in training (0 where nothing is to be learnt), `(batch,)` in evaluation.
        seen_ids: int64 `(batch, any)` padded with 0, items never to recommend; None where nothing is left out.
    """

    @property
    def user_ids(self) -> Tensor: ...  # noqa: D102
    @property
    def item_ids(self) -> Tensor: ...  # noqa: D102
    @property
    def lengths(self) -> Tensor: ...  # noqa: D102
    @property
    def target_ids(self) -> Tensor: ...  # noqa: D102
    @property
    def seen_ids(self) -> Tensor | None: ...  # noqa: D102
