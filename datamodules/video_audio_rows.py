"""Pairs of clips and sounds, and how they are drawn: by whole batches, each row from its key and index alone."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.loading import keyed_ids, keyed_uniform, mix

if TYPE_CHECKING:
    from collections.abc import Iterable

    from datamodules.loading import Draw

PARTS = ("train", "validate", "test")
PAIRINGS = ("redrawn", "fixed", "unpaired")
STREAMS = ("video", "audio")
_EVAL_KEY = 0x5EED
_PART_STEP = 10_000_000  # pairs of a part, so that ids of different parts differ

log = logging.getLogger(__name__)


class VideoAudioBatch(NamedTuple):
    """Clips and their sounds, as pictures of one shape.

    Attributes:
        video: float32 `(batch, frames, channels, height, width)`, standardised.
        audio: float32, of the same shape, standardised: log-mel pictures of windows centred on the frames.
        pair_ids: int64 `(batch,)`; rows of one id are the same pair.
        labels: int64 `(batch,)`, the class, or -1 where there is none.
        keys: int64 `(batch,)` in `[0, 2**63)`: what a model's random draws for this row depend on. New in every epoch
            of the training, always the same in evaluation.
    """

    video: Tensor
    audio: Tensor
    pair_ids: Tensor
    labels: Tensor
    keys: Tensor


class Clips(Protocol):
    """A source of pairs, cut into parts.

    Attributes:
        image_shape: Channels, height, width of a frame.
        num_frames: Frames of a clip.
        num_classes: Largest label + 1; 0 without labels.
        label_names: Names of the classes, if they have any.
        standardization: By stream ("video", "audio"), mean and standard deviation that values are standardised with.
    """

    @property
    def image_shape(self) -> list[int]: ...  # noqa: D102
    @property
    def num_frames(self) -> int: ...  # noqa: D102
    @property
    def num_classes(self) -> int: ...  # noqa: D102
    @property
    def label_names(self) -> list[str] | None: ...  # noqa: D102
    @property
    def standardization(self) -> dict[str, tuple[float, float]]: ...  # noqa: D102

    def rows(self, part: str) -> Dataset[VideoAudioBatch]:
        """The pairs of "train", "validate" or "test"; it has a length, and takes a `Draw`."""


def moments(what: str, chunks: Iterable[Tensor]) -> tuple[float, float]:
    """Mean and standard deviation of all values.

    Args:
        what: Name of the stream, for the message.
        chunks: Tensors of any shape and size.

    Raises:
        ValueError: If all values are equal.
    """
    count, total, squares = 0, 0.0, 0.0
    shift: float | None = None
    for chunk in chunks:
        values = chunk.double()
        # Around a value of theirs the squares cannot cancel.
        shift = float(values.mean()) if shift is None else shift
        values = values - shift
        count, total, squares = count + values.numel(), total + float(values.sum()), squares + float((values**2).sum())
    mean = total / count
    variance = squares / count - mean**2
    mean += shift or 0.0
    # Below the rounding of float32 values there is no spread.
    if variance <= (1e-6 * max(1.0, abs(mean))) ** 2:
        raise ValueError(f"{what}: all values of the training part are {mean:g}: there is no spread to standardise by")
    return mean, float(np.sqrt(variance))


def row_keys(draw: Draw, training: bool) -> Tensor:
    """The keys of a batch, int64 `(batch,)`: of the epoch in the training, else always the same."""
    return keyed_ids(draw.key if training else _EVAL_KEY, draw.indices)


def split_groups(pair_ids: Tensor, fraction: float, seed: int, name: str, held_out: int) -> Tensor:
    """Share rows out among parts; rows of one pair stay together.

    Args:
        pair_ids: int64 `(rows,)`.
        fraction: Share of the pairs that each held-out part has, at least one pair.
        seed: Of the draw.
        name: What the rows are called in messages.
        held_out: How many parts are held out: 1 for validation, 2 for validation and test.

    Returns:
        int64 `(rows,)`, 0 for the training, 1 for validation, 2 for test.

    Raises:
        ValueError: If no pair is left for the training.
    """
    groups, group_of = torch.unique(pair_ids, return_inverse=True)
    count = max(1, round(fraction * len(groups)))
    if held_out * count >= len(groups):
        raise ValueError(
            f"{name}: validation_fraction={fraction} holds out {held_out} x {count} of {len(groups)} pairs, which "
            "leaves none to train on"
        )
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(mix(seed)))
    parts = torch.zeros(len(groups), dtype=torch.int64)
    for part in range(held_out):
        parts[order[part * count : (part + 1) * count]] = part + 1
    return parts[group_of]


def digit_labels(digits: Tensor) -> Tensor:
    """Strings of digits as numbers: `(rows, frames)` to int64 `(rows,)`, the first digit the most significant."""
    return (digits * 10 ** torch.arange(digits.shape[1] - 1, -1, -1)).sum(dim=1)


class DigitPool(NamedTuple):
    """Pictures and sounds of a part, standardised.

    Attributes:
        pictures: float32 `(pictures, channels, height, width)`.
        digits: int64 `(pictures,)`, of the pictures.
        sounds: float32 `(sounds, channels, height, width)`.
        sound_digits: int64 `(sounds,)`.
    """

    pictures: Tensor
    digits: Tensor
    sounds: Tensor
    sound_digits: Tensor


def _gather(pool: DigitPool, pictures: Tensor, sounds: Tensor, pair_ids: Tensor, keys: Tensor) -> VideoAudioBatch:
    labels = digit_labels(pool.digits[pictures])
    return VideoAudioBatch(pool.pictures[pictures], pool.sounds[sounds], pair_ids, labels, keys)


class ChosenPairs(Dataset[VideoAudioBatch]):
    """Pairs of digits that are the same in every epoch.

    Args:
        pool: Pictures and sounds.
        pictures: int64 `(pairs, frames)`, rows of the pool's pictures.
        sounds: int64 `(pairs, frames)`, rows of its sounds.
        part: "train", "validate" or "test".
    """

    def __init__(self, pool: DigitPool, pictures: Tensor, sounds: Tensor, part: str) -> None:
        self.pool, self.pictures, self.sounds, self.part = pool, pictures, sounds, part

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.pictures)

    def __getitem__(self, draw: Draw) -> VideoAudioBatch:
        """The batch of the pairs `draw.indices`."""
        rows = draw.indices
        pair_ids = rows + PARTS.index(self.part) * _PART_STEP
        keys = row_keys(draw, self.part == "train")
        return _gather(self.pool, self.pictures[rows], self.sounds[rows], pair_ids, keys)


class RedrawnPairs(Dataset[VideoAudioBatch]):
    """New pairs of digits in each epoch.

    Frame t of clip i of an epoch shows the picture at place `i * num_frames + t` of a random order of all pictures,
    where none comes a second time before all had their turn. Its sound is any of those of the same digit.

    Args:
        pool: Pictures and sounds.
        num_pairs: Pairs of an epoch.
        num_frames: Frames of a clip.
        paired: Whether sounds say what pictures show; otherwise they are any.
    """

    def __init__(self, pool: DigitPool, num_pairs: int, num_frames: int, paired: bool = True) -> None:
        self.pool, self.num_pairs, self.num_frames, self.paired = pool, num_pairs, num_frames, paired
        counts = torch.bincount(pool.sound_digits)
        self._sorted_sounds = pool.sound_digits.argsort(stable=True)
        self._counts, self._starts = counts, counts.cumsum(0) - counts
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def __len__(self) -> int:
        """Pairs of an epoch."""
        return self.num_pairs

    def _pictures(self, key: int) -> Tensor:
        """The order of the epoch, int64 `(at least num_pairs * num_frames,)`."""
        if self._order[0] != key:
            pictures = torch.arange(len(self.pool.pictures))
            rounds = -(-self.num_pairs * self.num_frames // len(pictures))
            orders = [keyed_ids(mix(key, 1, turn), pictures).argsort(stable=True) for turn in range(rounds)]
            self._order = (key, torch.cat(orders))
        return self._order[1]

    def __getitem__(self, draw: Draw) -> VideoAudioBatch:
        """The batch of the pairs `draw.indices` of the epoch of `draw.key`."""
        places = draw.indices[:, None] * self.num_frames + torch.arange(self.num_frames)
        pictures = self._pictures(draw.key)[places]
        chance = keyed_uniform(mix(draw.key, 2), places)
        if self.paired:
            digits = self.pool.digits[pictures]
            sounds = self._sorted_sounds[self._starts[digits] + (chance * self._counts[digits]).long()]
        else:
            sounds = (chance * len(self.pool.sounds)).long()
        return _gather(self.pool, pictures, sounds, draw.indices, row_keys(draw, training=True))


def _cycled(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` of the rows in a random order, none a second time before all had their turn."""
    rounds = -(-count // len(rows))
    return torch.cat([rows[torch.randperm(len(rows), generator=generator)] for _ in range(rounds)] or [rows])[:count]


def draw_pairs(
    digits: Tensor, sound_digits: Tensor, num_pairs: int, num_frames: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Draw pairs of equal digits once and for all; no picture and no sound comes twice before all had their turn.

    Args:
        digits: int64 `(pictures,)`.
        sound_digits: int64 `(sounds,)`.
        num_pairs: Number of pairs.
        num_frames: Frames of a clip.
        seed: Of the draw.

    Returns:
        Rows of the pictures and of the sounds, int64 `(num_pairs, num_frames)` each.
    """
    generator = torch.Generator().manual_seed(mix(seed))
    sounds = _cycled(torch.arange(len(sound_digits)), num_pairs * num_frames, generator)
    pictures = torch.empty_like(sounds)
    wanted = sound_digits[sounds]
    for digit in sorted(set(wanted.tolist())):
        places = (wanted == digit).nonzero()[:, 0]
        pictures[places] = _cycled((digits == digit).nonzero()[:, 0], len(places), generator)
    return pictures.view(num_pairs, num_frames), sounds.view(num_pairs, num_frames)


class ClipTable(NamedTuple):
    """Clips and sounds in memory, not yet standardised.

    Attributes:
        video: uint8 or float `(clips, frames, channels, height, width)`; uint8 stands for 0..1.
        audio: float, of the same shape.
        pair_ids: int64 `(clips,)`.
        labels: int64 `(clips,)`, -1 where there is none.
    """

    video: Tensor
    audio: Tensor
    pair_ids: Tensor
    labels: Tensor


def as_floats(values: Tensor) -> Tensor:
    """Values as float32; bytes become 0..1."""
    return values.float() / 255 if values.dtype == torch.uint8 else values.float()


class ClipRows(Dataset[VideoAudioBatch]):
    """Some clips of a table, gathered by whole batches.

    Args:
        table: All clips.
        rows: int64 `(length,)`, which of them.
        standardization: By stream, mean and standard deviation.
        training: Whether keys are new in every epoch.
    """

    def __init__(
        self, table: ClipTable, rows: Tensor, standardization: dict[str, tuple[float, float]], training: bool
    ) -> None:
        self.table, self.rows, self.standardization, self.training = table, rows, standardization, training

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.rows)

    def __getitem__(self, draw: Draw) -> VideoAudioBatch:
        """The batch of the rows `draw.indices`."""
        rows = self.rows[draw.indices]
        video, audio = (
            (as_floats(values[rows]) - self.standardization[stream][0]) / self.standardization[stream][1]
            for stream, values in zip(STREAMS, self.table[:2], strict=True)
        )
        keys = row_keys(draw, self.training)
        return VideoAudioBatch(video, audio, self.table.pair_ids[rows], self.table.labels[rows], keys)


def count_duplicates(name: str, pair_ids: Tensor) -> int:
    """How many rows share their pair with an earlier one; logged, as they are several right answers of one query."""
    duplicates = len(pair_ids) - len(set(pair_ids.tolist()))
    if duplicates:
        log.info("%s: %d of %d rows have the pair_id of an earlier row: they count as right answers for each other",
                 name, duplicates, len(pair_ids))  # fmt: skip
    return duplicates


def compare_standardization(own: dict[str, Any], stored: dict[str, Any]) -> None:
    """Refuse a checkpoint whose training data were standardised with other numbers.

    Args:
        own: "source" and "standardization" of the data here.
        stored: Those of the checkpoint.

    Raises:
        ValueError: If a number differs by more than a thousandth of the larger standard deviation.
    """
    for stream in STREAMS:
        here, there = own["standardization"][stream], stored["standardization"][stream]
        if max(abs(a - b) for a, b in zip(here, there, strict=True)) > 1e-3 * max(here[1], there[1]):
            raise ValueError(
                f"the checkpoint was trained on {stream} of mean {there[0]:.5g} and standard deviation {there[1]:.5g} "
                f"(source={stored['source']!r}), source={own['source']!r} has {here[0]:.5g} and {here[1]:.5g} here: "
                "pictures would be scaled otherwise. Give the training data of that run, and other data to test on as "
                "--data.test_path"
            )
