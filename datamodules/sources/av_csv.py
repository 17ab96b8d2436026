"""Pairs of clips and sounds from a table of files, read batch by batch."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.utils.data import Dataset

from datamodules.sources.av_mnist import resized
from datamodules.sources.av_table import SPLITS, encode_labels, encode_pairs, read_rows
from datamodules.sources.log_mel import LogMel
from datamodules.sources.media import Clip, read_frames
from datamodules.sources.spectrogram_cache import SpectrogramCache
from datamodules.sources.video_files import read_video
from datamodules.video_audio_rows import (
    PARTS,
    STREAMS,
    VideoAudioBatch,
    as_floats,
    moments,
    row_keys,
    split_groups,
)

if TYPE_CHECKING:
    from torch import Tensor

    from datamodules.loading import Draw
    from datamodules.sources.av_table import Row

_SAMPLE = 256  # clips that mean and standard deviation are taken from

log = logging.getLogger(__name__)


class ClipSettings(NamedTuple):
    """How files become clips; see `VideoAudioData`."""

    num_frames: int
    image_size: int
    channels: int
    sample_rate: int
    window: float
    n_fft: int
    hop_length: int
    num_mels: int
    pre_emphasis: float
    pad_short: bool
    cache_dir: Path
    clip_seconds: float | None = None


class FileRows(Dataset[VideoAudioBatch]):
    """Some rows of a table, whose files are read when a batch is asked for.

    Args:
        rows: The rows.
        pair_ids: int64 `(rows,)`.
        labels: int64 `(rows,)`.
        settings: How files become clips.
        standardization: By stream, mean and standard deviation.
        training: Whether keys are new in every epoch.
        log_mel: Makes the pictures of sounds, of all columns.
        cache: Keeps them.
    """

    def __init__(
        self,
        rows: list[Row],
        pair_ids: Tensor,
        labels: Tensor,
        settings: ClipSettings,
        standardization: dict[str, tuple[float, float]],
        training: bool,
        log_mel: LogMel,
        cache: SpectrogramCache,
    ) -> None:
        self.table, self.pair_ids, self.labels = rows, pair_ids, labels
        self.settings, self.standardization, self.training = settings, standardization, training
        self._log_mel, self._cache = log_mel, cache

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.table)

    @property
    def pair_names(self) -> dict[int, str]:
        """What the table calls each pair; rows without a `pair_id` are called by their line."""
        return {
            number: row.pair_id or f"line {row.line}"
            for number, row in zip(self.pair_ids.tolist(), self.table, strict=True)
        }

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """A clip and its sound, not standardised.

        Args:
            index: Row.

        Returns:
            float32 `(frames, channels, image_size, image_size)` each.

        Raises:
            ValueError: If a file cannot be read, or has too few frames.
        """
        row, settings = self.table[index], self.settings
        clip = self._read_clip(row)
        found = self._cache.load(row.audio, clip.times, self._log_mel, settings.window)
        audio = resized(found[:, None], settings.image_size).expand(-1, settings.channels, -1, -1)
        return as_floats(clip.frames), audio

    def _read_clip(self, row: Row) -> Clip:
        settings = self.settings
        shape = (settings.num_frames, settings.image_size, settings.channels, settings.pad_short)
        if row.video.is_dir():
            return read_frames(row.video, *shape, fps=row.fps, clip_seconds=settings.clip_seconds)
        return read_video(row.video, *shape, clip_seconds=settings.clip_seconds)

    def __getitem__(self, draw: Draw) -> VideoAudioBatch:
        """The batch of the rows `draw.indices`."""
        clips = [self.read(index) for index in draw.indices.tolist()]
        video, audio = (
            (torch.stack(tensors) - self.standardization[stream][0]) / self.standardization[stream][1]
            for stream, tensors in zip(STREAMS, zip(*clips, strict=True), strict=True)
        )
        rows = draw.indices
        return VideoAudioBatch(video, audio, self.pair_ids[rows], self.labels[rows], row_keys(draw, self.training))


class ClipFiles:
    """A table of files, cut into parts.

    Without a column `split`, or where it names no validation or no test rows, a share of the pairs of the training rows
    is held out for each of them; rows of one pair stay together.

    Args:
        path: The table.
        settings: How files become clips.
        validation_fraction: Share of the pairs.
        split_seed: Of the draw of the parts.
        hold_out_test: Whether test rows are needed.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the table is not as described, or a part has no rows.
    """

    def __init__(
        self, path: Path, settings: ClipSettings, validation_fraction: float, split_seed: int, hold_out_test: bool
    ) -> None:
        self.path, self.settings = path, settings
        # One of each for all parts: what they warn of is said once.
        self._log_mel = LogMel(
            settings.sample_rate,
            settings.n_fft,
            settings.hop_length,
            settings.num_mels,
            frames=None,
            pre_emphasis=settings.pre_emphasis,
        )
        self._cache = SpectrogramCache(settings.cache_dir)
        self.table = read_rows(path)
        self.num_frames = settings.num_frames
        self.labels, self.label_names = encode_labels([row.label for row in self.table])
        self.pair_ids = encode_pairs(path, self.table)
        splits = torch.tensor([SPLITS.index(row.split) if row.split else 0 for row in self.table])
        wanted = [part for part in (1, 2)[: 1 + hold_out_test] if not bool((splits == part).any())]
        train = (splits == 0).nonzero()[:, 0]
        if not len(train):
            raise ValueError(
                f"{path} has no row of split=train, only {', '.join(sorted({r.split for r in self.table}))}"
            )
        if wanted:
            held_out = split_groups(self.pair_ids[train], validation_fraction, split_seed, str(path), len(wanted))
            splits[train] = torch.tensor([0, *wanted])[held_out]
        parts_of_pairs = torch.unique(torch.stack([self.pair_ids, splits]), dim=1)[0]
        torn = len(parts_of_pairs) - len(parts_of_pairs.unique())
        if torn:
            log.warning("%s: rows of %d pair_ids are in more than one split: what is evaluated was trained on", path,
                        torn)  # fmt: skip
        self._splits = splits
        self.standardization = self._standardization()

    @property
    def image_shape(self) -> list[int]:
        """Channels, height, width."""
        return [self.settings.channels, self.settings.image_size, self.settings.image_size]

    @property
    def num_classes(self) -> int:
        """Largest label + 1."""
        return int(self.labels.max()) + 1

    def rows(self, part: str) -> FileRows:
        """The pairs of "train", "validate" or "test"."""
        return self._rows(
            (self._splits == PARTS.index(part)).nonzero()[:, 0], self.standardization, training=part == "train"
        )

    def _rows(self, chosen: Tensor, standardization: dict[str, tuple[float, float]], training: bool) -> FileRows:
        table = [self.table[row] for row in chosen.tolist()]
        return self._file_rows(table, self.pair_ids[chosen], self.labels[chosen], standardization, training)

    def _file_rows(
        self,
        table: list[Row],
        pair_ids: Tensor,
        labels: Tensor,
        standardization: dict[str, tuple[float, float]],
        training: bool,
    ) -> FileRows:
        return FileRows(table, pair_ids, labels, self.settings, standardization, training, self._log_mel, self._cache)

    def other(self, path: Path) -> FileRows:
        """All rows of another table to test on, in terms of the labels of this one.

        Args:
            path: The table; its column `split` is not looked at.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If the table is not as described.
        """
        table = read_rows(path)
        texts = [row.label for row in table]
        if self.label_names is None:
            labels, names = encode_labels(texts)
            if names is not None:
                raise ValueError(f"{path} has labels like {names[0]!r}, but those of {self.path} are whole numbers")
            known = (labels == -1) | torch.isin(labels, self.labels)
        else:
            numbers = {name: number for number, name in enumerate(self.label_names)}
            labels = torch.tensor([numbers.get(text, -1) for text in texts])
            known = torch.tensor([not text or text in numbers for text in texts])
        if not bool(known.all()):
            log.warning("%s: %d of %d rows have labels that %s has not: they count as rows without a label", path,
                        int((~known).sum()), len(table), self.path)  # fmt: skip
        labels = torch.where(known, labels, -1)
        return self._file_rows(table, encode_pairs(path, table), labels, self.standardization, training=False)

    def _standardization(self) -> dict[str, tuple[float, float]]:
        """Mean and standard deviation of at most 256 training clips, evenly spaced; kept beside the spectrograms."""
        train = (self._splits == 0).nonzero()[:, 0]
        chosen = train[torch.linspace(0, len(train) - 1, min(_SAMPLE, len(train))).round().long()]
        rows = self._rows(chosen, dict.fromkeys(STREAMS, (0.0, 1.0)), training=False)
        digest = hashlib.sha256(repr(self.settings._replace(cache_dir=Path())).encode())
        for row in rows.table:
            for file in (row.video, row.audio):
                facts = file.stat()
                digest.update(f"{file.absolute()}|{facts.st_size}|{facts.st_mtime_ns}|{row.fps}\n".encode())
        store = self.settings.cache_dir / f"standardization-{digest.hexdigest()[:32]}.json"
        kept = _read_numbers(store)
        if kept is not None:
            return kept
        log.info("%s: mean and standard deviation from %d of %d training clips", self.path, len(chosen), len(train))
        clips = [rows.read(index) for index in range(len(rows))]
        if self._cache.silent:
            log.info("%s: the sound of %d of these is silent or too short", self.path, self._cache.silent)
        found = {
            stream: moments(f"{self.path}: {stream}", tensors)
            for stream, tensors in zip(STREAMS, zip(*clips, strict=True), strict=True)
        }
        store.parent.mkdir(parents=True, exist_ok=True)
        partial = store.with_name(f".{store.name}.{os.getpid()}.part")
        partial.write_text(json.dumps(found))
        os.replace(partial, store)
        return found


def _read_numbers(path: Path) -> dict[str, tuple[float, float]] | None:
    """Stored means and standard deviations; None where there are none."""
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text())
        numbers = {stream: (float(stored[stream][0]), float(stored[stream][1])) for stream in STREAMS}
    except (ValueError, KeyError, TypeError, IndexError) as error:
        log.warning("%s is damaged (%s): computed anew", path, error)
        return None
    return numbers
