"""Digits that are seen and heard: pools of pictures and sounds, split, standardised and paired."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch

from datamodules.loading import mix
from datamodules.sources.av_mnist import NUM_DIGITS, sound_pictures
from datamodules.video_audio_rows import PARTS, ChosenPairs, DigitPool, RedrawnPairs, draw_pairs, moments

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.utils.data import Dataset

    from datamodules.sources.av_mnist import DigitPart, DigitParts
    from datamodules.sources.log_mel import LogMel
    from datamodules.video_audio_rows import VideoAudioBatch

_TEST_SEED = 2308
TEST_CLIPS = 300
"""Clips of the test where there are no ready-made pairs."""


class DigitClips:
    """Pairs of digits. A clip has `num_frames` digits; frame t shows one that the sound of window t speaks.

    Its label is the string of its digits, read as a number. All parts are standardised by mean and standard deviation
    of the training part's pictures and of its sounds. In sounds row 0 is the lowest band.

    - Training pairs are drawn in each epoch or once, see `pairing`.
    - Validation pairs are drawn once by `pair_seed`, as many as there are recordings for validation.
    - Test pairs are the ready-made ones where the source has some and `num_frames` is 1; otherwise 300 clips that
      depend on no seed.

    Args:
        source: The pools, split.
        to_pictures: Takes `(pictures, height, width)` and an image size to `(pictures, 1, image_size, image_size)`.
        log_mel: Makes the pictures of sounds; keeps all columns.
        num_frames: Digits of a clip.
        image_size: Rows and columns.
        channels: 1 or 3; equal copies.
        pairing: "redrawn" (new pairs of equal digits in each epoch), "fixed" (the same ones in all) or "unpaired"
            (redrawn, sounds regardless of the digit).
        num_pairs: Training pairs of an epoch.
        pair_seed: Draws the fixed training pairs and those of the validation.
    """

    def __init__(
        self,
        source: DigitParts,
        to_pictures: Callable[[Tensor, int], Tensor],
        log_mel: LogMel,
        num_frames: int,
        image_size: int,
        channels: int,
        pairing: str,
        num_pairs: int,
        pair_seed: int,
    ) -> None:
        self.source, self.num_frames, self.image_size, self.channels = source, num_frames, image_size, channels
        self.pairing, self.num_pairs, self.pair_seed = pairing, num_pairs, pair_seed
        raw = {
            part: (
                to_pictures(pool.pictures, image_size),
                sound_pictures(pool.recordings, log_mel, log_mel.hop_length, image_size),
            )
            for part, pool in source.parts.items()
        }
        self.standardization = {
            stream: moments(stream, [images]) for stream, images in zip(("video", "audio"), raw["train"], strict=True)
        }
        self._pools = {part: self._pool(source.parts[part], *images) for part, images in raw.items()}

    def _pool(self, part: DigitPart, pictures: Tensor, sounds: Tensor) -> DigitPool:
        standardised = []
        for stream, images in (("video", pictures), ("audio", sounds)):
            mean, std = self.standardization[stream]
            standardised.append(((images - mean) / std).expand(-1, self.channels, -1, -1))
        return DigitPool(standardised[0], part.digits, standardised[1], part.recordings.digits)

    @property
    def image_shape(self) -> list[int]:
        """Channels, height, width."""
        return [self.channels, self.image_size, self.image_size]

    @property
    def num_classes(self) -> int:
        """Number of strings of `num_frames` digits."""
        return int(NUM_DIGITS**self.num_frames)

    @cached_property
    def label_names(self) -> list[str] | None:
        """The digits; None for strings of several."""
        return [str(digit) for digit in range(NUM_DIGITS)] if self.num_frames == 1 else None

    def pairs(self, part: str) -> tuple[Tensor, Tensor]:
        """Rows of pictures and of recordings in the pools of the part, int64 `(pairs, num_frames)` each; drawn once."""
        pool, count, seed = self._pools[part], self.num_pairs, self.pair_seed
        if part == "test":
            ready, count, seed = self.source.test_pictures, TEST_CLIPS, _TEST_SEED
            if ready is not None and self.num_frames == 1:
                return ready[:, None], torch.arange(len(ready))[:, None]
        elif part == "validate":
            count = len(pool.sounds)
        return draw_pairs(pool.digits, pool.sound_digits, count, self.num_frames, mix(seed, PARTS.index(part)))

    def rows(self, part: str) -> Dataset[VideoAudioBatch]:
        """The pairs of "train", "validate" or "test"."""
        if part == "train" and self.pairing != "fixed":
            paired = self.pairing == "redrawn"
            return RedrawnPairs(self._pools[part], self.num_pairs, self.num_frames, paired)
        return ChosenPairs(self._pools[part], *self.pairs(part), part)
