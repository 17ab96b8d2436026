"""What the modules of this room expect of data: any objects with these fields do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class VideoAudioBatch(Protocol):
    """Clips with a picture of the sound around each frame.

    Attributes:
        video: float32 `(batch, frames, channels, height, width)`, standardised.
        audio: float32, of the same shape, standardised.
        pair_ids: int64 `(batch,)`; rows of one id are the same pair.
        labels: int64 `(batch,)`, a class, -1 where there is none.
        keys: int64 `(batch,)`, what the random draws for a row are a function of.
    """

    @property
    def video(self) -> Tensor: ...  # noqa: D102
    @property
    def audio(self) -> Tensor: ...  # noqa: D102
    @property
    def pair_ids(self) -> Tensor: ...  # noqa: D102
    @property
    def labels(self) -> Tensor: ...  # noqa: D102
    @property
    def keys(self) -> Tensor: ...  # noqa: D102
