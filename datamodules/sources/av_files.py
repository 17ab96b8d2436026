"""Pairs of clips and sounds from a folder of tensors."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from datamodules.video_audio_rows import (
    PARTS,
    STREAMS,
    ClipRows,
    ClipTable,
    as_floats,
    count_duplicates,
    moments,
    split_groups,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STORE = "pairs.safetensors"
_SUFFIXES = (".pt", ".npy")
_CHUNK = 256  # clips that are looked at together
_LARGEST = 20.0  # in magnitude, of values that are in the range of a network


def read_pairs(folder: Path, standardize: bool) -> ClipTable:
    """Read a folder of pairs.

    Args:
        folder: Holds `video` and `audio`, numbers `(clips, frames, channels, height, width)`, and, if wanted, `label`
            (integers `(clips,)`, -1 for none) and `pair_id` (integers `(clips,)`, by default the row), each as `.pt` or
            `.npy`; or all of them in `pairs.safetensors`.
        standardize: Whether values are standardised later, so that they may have any range.

    Returns:
        All clips, checked.

    Raises:
        FileNotFoundError: If the folder or a file is missing.
        ValueError: If a file is damaged, the shapes differ, or values cannot be used.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: expected one with video.pt and audio.pt, or {STORE}")
    found = _read_store(folder / STORE) if (folder / STORE).is_file() else _read_tensors(folder)
    name = str(folder)
    for stream in STREAMS:
        if stream not in found:
            raise FileNotFoundError(f"{folder} has no {stream}.pt or {stream}.npy, nor {STORE} with {stream!r}")
    video, audio = found["video"], found["audio"]
    for stream, values in (("video", video), ("audio", audio)):
        if values.dim() != 5 or not values.numel():
            raise ValueError(
                f"{name}: {stream} has the shape {tuple(values.shape)}, expected (clips, frames, channels, height, "
                "width), none of them 0"
            )
    if video.shape != audio.shape:
        raise ValueError(
            f"{name}: video has the shape {tuple(video.shape)} and audio {tuple(audio.shape)}: audio must be rendered "
            "to the frame size"
        )
    for stream, values in (("video", video), ("audio", audio)):
        _check_values(name, stream, values, standardize)
    clips = len(video)
    pair_ids = _integers(name, "pair_id", found.get("pair_id"), clips, 0)
    labels = _integers(name, "label", found.get("label"), clips, -1)
    pair_ids = torch.arange(clips) if pair_ids is None else pair_ids
    count_duplicates(name, pair_ids)
    return ClipTable(video, audio, pair_ids, torch.full((clips,), -1) if labels is None else labels)


def _read_store(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in (*STREAMS, "label", "pair_id"):
        paths = [folder / (name + suffix) for suffix in _SUFFIXES if (folder / (name + suffix)).is_file()]
        if len(paths) > 1:
            raise ValueError(f"{folder} has {paths[0].name} and {paths[1].name}: keep one of the two")
        for path in paths:
            found[name] = _read_npy(path) if path.suffix == ".npy" else _read_pt(path)
    return found


def _read_npy(path: Path) -> Tensor:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is truncated or no .npy file of numbers: {error}") from error
    if array.dtype.kind not in "iuf" or array.dtype.itemsize > 8 or array.dtype in (np.uint16, np.uint32, np.uint64):
        raise ValueError(f"{path} has the dtype {array.dtype}, expected uint8, integers with a sign, or floats")
    return torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False)))


def _read_pt(path: Path) -> Tensor:
    try:
        value = torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, EOFError, ValueError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} is truncated or holds more than a tensor: {reason}") from error
    if not isinstance(value, Tensor):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected a tensor")
    return value.detach()


def _check_values(name: str, stream: str, values: Tensor, standardize: bool) -> None:
    if values.dtype == torch.uint8:
        if not standardize:
            raise ValueError(f"{name}: {stream} is uint8, and standardize=False: normalise first")
        return
    if not values.dtype.is_floating_point:
        raise ValueError(f"{name}: {stream} has the dtype {values.dtype}, expected floats or uint8")
    for start in range(0, len(values), _CHUNK):
        chunk = values[start : start + _CHUNK].flatten(1)
        bad = (~chunk.isfinite()).any(dim=1).nonzero()[:, 0]
        if len(bad):
            row = int(bad[0])
            value = float(chunk[row][~chunk[row].isfinite()][0])
            way_out = ": a logarithm of 0 needs a floor" if stream == "audio" else ""
            raise ValueError(f"{name}: {stream} has the value {value} in row {start + row}, expected numbers{way_out}")
        largest = float(chunk.abs().max())
        if not standardize and largest > _LARGEST:
            raise ValueError(
                f"{name}: {stream} has values up to {largest:g} in magnitude, and standardize=False: normalise first"
            )


def _integers(name: str, key: str, values: Tensor | None, clips: int, least: int) -> Tensor | None:
    if values is None:
        return None
    if values.shape != (clips,) or values.dtype.is_floating_point or values.dtype == torch.bool:
        raise ValueError(
            f"{name}: {key} has the dtype {values.dtype} and the shape {tuple(values.shape)}, expected integers "
            f"({clips},), one for each clip"
        )
    low = (values < least).nonzero()[:, 0]
    if len(low):
        row = int(low[0])
        raise ValueError(f"{name}: {key} is {int(values[row])} in row {row}, expected at least {least}")
    return values.long()


class TensorClips:
    """A folder of pairs, cut into parts.

    Validation is a share of the pairs, and the test, if wanted, another one of that size. Rows of one
    `pair_id` are in one part.

    Args:
        folder: See `read_pairs`.
        validation_fraction: Share of the pairs.
        split_seed: Of the draw of the parts.
        standardize: Whether to standardise each stream by mean and standard deviation of the training part.
        hold_out_test: Whether a part is held out for the test.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If files are not as described.
    """

    label_names: list[str] | None = None

    def __init__(
        self, folder: Path, validation_fraction: float, split_seed: int, standardize: bool, hold_out_test: bool
    ) -> None:
        self.table = read_pairs(folder, standardize)
        held_out = 1 + hold_out_test
        self._parts = split_groups(self.table.pair_ids, validation_fraction, split_seed, str(folder), held_out)
        self.standardization = dict.fromkeys(STREAMS, (0.0, 1.0))
        if standardize:
            for stream, values in zip(STREAMS, self.table[:2], strict=True):
                self.standardization[stream] = moments(f"{folder}: {stream}", self._training_chunks(values))

    def _training_chunks(self, values: Tensor) -> Iterator[Tensor]:
        rows = (self._parts == 0).nonzero()[:, 0]
        for start in range(0, len(rows), _CHUNK):
            yield as_floats(values[rows[start : start + _CHUNK]])

    @property
    def image_shape(self) -> list[int]:
        """Channels, height, width."""
        return list(self.table.video.shape[2:])

    @property
    def num_frames(self) -> int:
        """Frames of a clip."""
        return self.table.video.shape[1]

    @property
    def num_classes(self) -> int:
        """Largest label + 1."""
        return int(self.table.labels.max()) + 1

    def rows(self, part: str) -> ClipRows:
        """The pairs of "train", "validate" or "test"."""
        rows = (self._parts == PARTS.index(part)).nonzero()[:, 0]
        return ClipRows(self.table, rows, self.standardization, training=part == "train")


def other_rows(
    folder: Path, standardize: bool, shape: list[int], standardization: dict[str, tuple[float, float]]
) -> ClipRows:
    """A folder of other pairs to test on.

    Args:
        folder: See `read_pairs`.
        standardize: As for the training.
        shape: Frames, channels, height and width of the training.
        standardization: Mean and standard deviation of the training by stream.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If files are not as described, or of another shape.
    """
    table = read_pairs(folder, standardize)
    if list(table.video.shape[1:]) != shape:
        raise ValueError(
            f"test_path={folder} has clips of the shape {tuple(table.video.shape[1:])}, the training {tuple(shape)} "
            "(frames, channels, height, width)"
        )
    return ClipRows(table, torch.arange(len(table.labels)), standardization, training=False)
