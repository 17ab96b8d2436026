"""Written digits and spoken digits: the two pools of AV-MNIST, and how pictures and sounds of them are made."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from datamodules.sources.image_task_sets import read_npz
from datamodules.sources.multi_mnist import check_pictures

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

NUM_DIGITS = 10
PICTURES, RECORDINGS = "mnist/mnist.npz", "spoken_digits/spoken_digits.npz"
SIZE, PADDED = 28, 32
_LEVELS = 32768.0  # of 16 bits
_SOUND_KEYS = ("audio", "offsets", "y", "speaker", "take", "mnist_index")


class Recordings(NamedTuple):
    """Sounds of different lengths, one digit each, end to end.

    Attributes:
        waveform: float32 `(samples of all,)` in [-1, 1], mono.
        offsets: int64 `(recordings + 1,)`: sound i is `waveform[offsets[i] : offsets[i + 1]]`.
        digits: int64 `(recordings,)`.
        names: int64 `(recordings,)`, tells a recording from all others, also of other parts.
        sample_rate: Samples of a second.
    """

    waveform: Tensor
    offsets: Tensor
    digits: Tensor
    names: Tensor
    sample_rate: int

    def take(self, rows: Tensor) -> Recordings:
        """Some of them."""
        bounds = self.offsets.tolist()
        sounds = [self.waveform[bounds[row] : bounds[row + 1]] for row in rows.tolist()]
        offsets = torch.tensor([0, *map(len, sounds)]).cumsum(0)
        return Recordings(torch.cat(sounds), offsets, self.digits[rows], self.names[rows], self.sample_rate)


class DigitPart(NamedTuple):
    """A part of the pools: no picture and no recording of it is in another part.

    Attributes:
        pictures: float32 `(pictures, height, width)` in 0..1.
        digits: int64 `(pictures,)`, of the pictures.
        picture_names: int64 `(pictures,)`, tells a picture from all others, also of other parts.
        recordings: Sounds.
    """

    pictures: Tensor
    digits: Tensor
    picture_names: Tensor
    recordings: Recordings


class DigitParts(NamedTuple):
    """Both pools, split before any pair is drawn.

    Attributes:
        parts: "train", "validate" and "test".
        test_pictures: int64 `(test recordings,)`, the picture of each in the ready-made pairs of the test; None where
            there are none.
    """

    parts: dict[str, DigitPart]
    test_pictures: Tensor | None


def hold_out_share(digits: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of all but a share of each digit, and the rows of that share, ascending; at least one of each is held out.

    Args:
        digits: int64 `(rows,)`.
        fraction: The share.
        seed: Of the draw.

    Raises:
        ValueError: If nothing of a digit would be left.
    """
    rng = np.random.default_rng(seed)
    held_out = torch.zeros(len(digits), dtype=torch.bool)
    for digit in range(NUM_DIGITS):
        rows = (digits == digit).nonzero()[:, 0]
        count = max(1, round(fraction * len(rows)))
        if count >= len(rows):
            raise ValueError(
                f"validation_fraction={fraction} leaves none of the {len(rows)} training pictures of digit {digit}"
            )
        held_out[rows[torch.from_numpy(rng.permutation(len(rows))[:count])]] = True
    return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]


def read_av_mnist(root: Path, validation_fraction: float) -> DigitParts:
    """MNIST's pictures and the Free Spoken Digit Dataset's sounds, split.

    Test are the sets' own test parts. For validation, a share of the training pictures of each digit and whole takes of
    the recordings, the last ones, are held out; which they are does not depend on a seed.

    Args:
        root: Folder with `mnist/mnist.npz` (`x_train`, `y_train`, `x_test`, `y_test`) and
            `spoken_digits/spoken_digits.npz` (`train_audio`, `train_offsets`, `train_y`, `train_speaker`, `train_take`,
            `train_mnist_index`, likewise `test_`, and `sample_rate`).
        validation_fraction: Share of the pictures and of the takes, at least one.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged or not as described, or nothing is left to train on.
    """
    for name, what in ((PICTURES, "x_train, y_train, x_test, y_test"), (RECORDINGS, "train_audio, train_offsets, ...")):
        if not (root / name).is_file():
            raise FileNotFoundError(
                f"{root / name} is missing: put it there ({what}), or name the folder that holds {PICTURES} and "
                f"{RECORDINGS} in data_dir or ZOO_DATA"
            )
    pictures = _read_pictures(root / PICTURES)
    sounds = _read_recordings(root / RECORDINGS)
    images, digits, names = pictures["train"]
    recordings, takes, _ = sounds["train"]
    kept, held_out = hold_out_share(digits, validation_fraction, seed=0)
    distinct = torch.tensor(sorted(set(takes.tolist())))
    count = max(1, round(validation_fraction * len(distinct)))
    late = torch.isin(takes, distinct[len(distinct) - count :])
    for what, chosen in (("for training", ~late), ("for validation", late)):
        absent = sorted({*range(NUM_DIGITS)} - set(recordings.digits[chosen].tolist()))
        if absent:
            raise ValueError(
                f"{root / RECORDINGS}: validation_fraction={validation_fraction} holds out {count} of {len(distinct)} "
                f"takes, which leaves no recording {what} of digits {absent}"
            )
    test_images, test_digits, test_names = pictures["test"]
    test_recordings, _, test_index = sounds["test"]
    if int(test_index.max()) >= len(test_images) or int(test_index.min()) < 0:
        raise ValueError(
            f"{root / RECORDINGS}: test_mnist_index goes from {int(test_index.min())} to {int(test_index.max())}, but "
            f"{root / PICTURES} has {len(test_images)} test pictures"
        )
    unlike = (test_digits[test_index] != test_recordings.digits).nonzero()[:, 0]
    if len(unlike):
        row = int(unlike[0])
        raise ValueError(
            f"{root / RECORDINGS}: test recording {row} says {int(test_recordings.digits[row])}, but its picture "
            f"test_mnist_index={int(test_index[row])} of {root / PICTURES} shows {int(test_digits[test_index[row]])}: "
            "the two files do not belong together"
        )
    parts = {
        "train": DigitPart(images[kept], digits[kept], names[kept], recordings.take((~late).nonzero()[:, 0])),
        "validate": DigitPart(
            images[held_out], digits[held_out], names[held_out], recordings.take(late.nonzero()[:, 0])
        ),
        "test": DigitPart(test_images, test_digits, test_names, test_recordings),
    }
    return DigitParts(parts, test_index)


def _read_pictures(path: Path) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """By part: pictures in 0..1, digits, names."""
    found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    before = 0
    for part in ("train", "test"):
        keys = (f"x_{part}", f"y_{part}")
        arrays = read_npz(path, keys)
        images, labels = (arrays[key] for key in keys)
        check_pictures(images, labels, SIZE, 255, (f"{path}: {keys[0]}", f"{path}: {keys[1]}"))
        digits = torch.from_numpy(labels.astype(np.int64))
        _check_complete(f"{path}: {keys[1]}", digits)
        found[part] = (torch.from_numpy(images) / 255, digits, torch.arange(before, before + len(images)))
        before += len(images)
    return found


def _read_recordings(path: Path) -> dict[str, tuple[Recordings, Tensor, Tensor]]:
    """By part: recordings, takes, rows of their pictures."""
    found: dict[str, tuple[Recordings, Tensor, Tensor]] = {}
    before = 0
    rate = int(read_npz(path, ("sample_rate",))["sample_rate"])
    for part in ("train", "test"):
        arrays = read_npz(path, tuple(f"{part}_{key}" for key in _SOUND_KEYS))
        audio, offsets, digits, _, takes, pictures = arrays.values()
        _check_sounds(path, part, arrays)
        # Divided by 2^15, a power of two: no value changes by rounding.
        waveform = torch.from_numpy(audio.astype(np.float32)) / _LEVELS
        labels = torch.from_numpy(digits.astype(np.int64))
        _check_complete(f"{path}: {part}_y", labels)
        names = torch.arange(before, before + len(labels))
        recordings = Recordings(waveform, torch.from_numpy(offsets.astype(np.int64)), labels, names, rate)
        found[part] = (
            recordings, torch.from_numpy(takes.astype(np.int64)), torch.from_numpy(pictures.astype(np.int64))
        )  # fmt: skip
        before += len(labels)
    return found


def _check_sounds(path: Path, part: str, arrays: dict[str, NDArray[np.generic]]) -> None:
    audio, offsets, digits = (arrays[f"{part}_{key}"] for key in ("audio", "offsets", "y"))
    if audio.dtype != np.int16 or audio.ndim != 1:
        raise ValueError(f"{path}: {part}_audio is {audio.dtype} {audio.shape}, expected int16 (samples,)")
    count = len(digits)
    for key in _SOUND_KEYS[1:]:
        array, length = arrays[f"{part}_{key}"], count + (key == "offsets")
        if array.dtype.kind not in "iu" or array.shape != (length,):
            raise ValueError(f"{path}: {part}_{key} is {array.dtype} {array.shape}, expected integers ({length},)")
    ends: NDArray[np.int64] = offsets.astype(np.int64)
    if not count or ends[0] != 0 or ends[-1] != len(audio) or (np.diff(ends) <= 0).any():
        raise ValueError(
            f"{path}: {part}_offsets must increase from 0 to the {len(audio)} samples of {part}_audio, one sound after "
            "the other"
        )


def _check_complete(what: str, digits: Tensor) -> None:
    outside = ((digits < 0) | (digits >= NUM_DIGITS)).nonzero()[:, 0]
    if len(outside):
        raise ValueError(f"{what} has the value {int(digits[outside[0]])} at {int(outside[0])}: expected 0 to 9")
    absent = sorted({*range(NUM_DIGITS)} - set(digits.tolist()))
    if absent:
        raise ValueError(f"{what} has no digit {', '.join(map(str, absent))}: expected each of 0 to 9")


def padded_pictures(pictures: Tensor, image_size: int) -> Tensor:
    """28 x 28 pictures with two pixels of background on each side, then brought to another size if asked.

    Args:
        pictures: float32 `(pictures, 28, 28)`.
        image_size: Rows and columns.

    Returns:
        float32 `(pictures, 1, image_size, image_size)`.
    """
    side = (PADDED - SIZE) // 2
    return resized(F.pad(pictures, (side, side, side, side))[:, None], image_size)


def resized(images: Tensor, image_size: int) -> Tensor:
    """Bring `(images, channels, height, width)` to `image_size` rows and columns by bilinear interpolation."""
    if images.shape[-2:] == (image_size, image_size):
        return images
    smaller = image_size < max(images.shape[-2:])
    return F.interpolate(images, size=(image_size, image_size), mode="bilinear", align_corners=False, antialias=smaller)


def sound_pictures(
    recordings: Recordings, log_mel: Callable[[Tensor], Tensor], hop_length: int, image_size: int
) -> Tensor:
    """The log-mel picture of each whole recording; row 0 is the lowest band, time runs to the right.

    Args:
        recordings: The sounds.
        log_mel: Takes `(sounds, samples)` to `(sounds, bands, 1 + samples // hop_length)`, with zeros assumed around a
            sound.
        hop_length: Samples from column to column.
        image_size: Rows and columns, by bilinear interpolation, however long a sound is.

    Returns:
        float32 `(recordings, 1, image_size, image_size)`.
    """
    lengths = recordings.offsets.diff()
    columns = lengths // hop_length
    pictures = torch.empty(len(lengths), 1, image_size, image_size)
    # Sounds of one number of columns go together: the zeros that make them equally long are what `log_mel` assumes
    # behind a sound anyway, so that nothing depends on the company.
    for count in sorted(set(columns.tolist())):
        rows = (columns == count).nonzero()[:, 0]
        places = torch.arange((count + 1) * hop_length - 1)
        inside = places < lengths[rows, None]
        where = (recordings.offsets[rows, None] + places).clamp(max=len(recordings.waveform) - 1)
        found = log_mel(recordings.waveform[where] * inside)
        pictures[rows] = F.interpolate(found[:, None], (image_size, image_size), mode="bilinear", align_corners=False)
    return pictures
