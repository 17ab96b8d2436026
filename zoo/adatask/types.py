"""What the module of this room expects of data: any objects with these fields do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class TaskBatch(Protocol):
    """Inputs with the labels of several tasks: of a table (`categories`, `numbers`), or `images`.

    Attributes:
        targets: Labels by task (shapes in `zoo.adatask.losses`).
        masks: By task: bool `(batch,)`, whether a row or image has a label; a task without an entry has all of them.
    """

    @property
    def targets(self) -> dict[str, Tensor]: ...  # noqa: D102
    @property
    def masks(self) -> dict[str, Tensor]: ...  # noqa: D102
    def __getattr__(self, name: str) -> Any: ...  # noqa: D105 - images, or categories, numbers and user_ids


def inputs_of(batch: TaskBatch) -> tuple[Tensor, ...]:
    """What a backbone takes of a batch."""
    return (batch.images,) if hasattr(batch, "images") else (batch.categories, batch.numbers)
