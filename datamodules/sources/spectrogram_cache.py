"""Log-mel spectrograms of the sound around frames, computed once and kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from datamodules.sources.media import audio_windows, existing_file, resample
from datamodules.sources.video_files import read_audio

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from datamodules.sources.log_mel import LogMel

log = logging.getLogger(__name__)

_VERSION = 1  # of what is computed here, in the names of files


class SpectrogramCache:
    """Log-mel spectrograms of windows of sound files, one `.npy` a clip.

    A file's name is a SHA-256 over the sound file (absolute path, size, time of its last change), the times of the
    frames, the window and all settings of the spectrogram; `-padded` behind it marks sound that had to be padded. Files
    are written under a temporary name and renamed, so that any number of processes can share a folder. Each counts for
    itself. Random times give ever new files: keep them fixed, or use no cache.

    Attributes:
        hits: Clips read from the folder.
        misses: Clips computed.
        silent: Sound files that are silent, shorter than a window, or over before a window starts: each is padded with
            zeros, and named in one warning.

    Args:
        folder: Where files are kept; made if missing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.hits = 0
        self.misses = 0
        self._padded: set[Path] = set()

    @property
    def silent(self) -> int:
        """How many sound files had to be padded with zeros."""
        return len(self._padded)

    def load(self, path: str | Path, times: Tensor, log_mel: LogMel, window: float) -> Tensor:
        """Spectrograms of the windows centred on frames.

        Args:
            path: A sound file or a video file.
            times: `(frames,)` in seconds from the start of the sound.
            log_mel: The spectrogram; sound of another sample rate is resampled to its own.
            window: Seconds.

        Returns:
            float32 `(frames, num_mels, columns)`.

        Raises:
            FileNotFoundError: If the sound file is missing, or the folder cannot be written.
            ImportError: If the sound file needs a library that is not installed.
            ValueError: If the sound file is damaged or the window too short.
        """
        path = existing_file(path).absolute()
        name = self._name(path, times, log_mel, window)
        shape = (len(times), log_mel.num_mels, log_mel.columns(round(window * log_mel.sample_rate)))
        for padded in (False, True):
            kept = self._read(self._file(name, padded), shape)
            if kept is not None:
                self.hits += 1
                self._report(path, window, padded)
                return torch.from_numpy(kept)
        self.misses += 1
        pictures, padded = _compute(path, times, log_mel, window)
        self._report(path, window, padded)
        self._write(self._file(name, padded), pictures.numpy())
        return pictures

    def _file(self, name: str, padded: bool) -> Path:
        return self.folder / f"{name}{'-padded' if padded else ''}.npy"

    def _name(self, path: Path, times: Tensor, log_mel: LogMel, window: float) -> str:
        about = path.stat()
        identity = [_VERSION, os.fsencode(path).hex(), about.st_size, about.st_mtime_ns]
        key = [*identity, times.double().tolist(), window, log_mel.settings]
        return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()

    def _report(self, path: Path, window: float, padded: bool) -> None:
        if padded and path not in self._padded:
            self._padded.add(path)
            log.warning("%s is silent, shorter than a window of %g s, or over before one starts: it is padded with "
                        "zeros", path, window)  # fmt: skip

    def _read(self, file: Path, shape: tuple[int, int, int]) -> NDArray[np.float32] | None:
        """What is kept, or None if there is nothing, or nothing that can be used."""
        try:
            with file.open("rb") as opened:
                kept: NDArray[np.float32] = np.lib.format.read_array(opened, allow_pickle=False)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError) as error:
            reason = str(error)
        else:
            if kept.dtype != np.float32 or kept.shape != shape:
                reason = f"it holds {kept.dtype} {kept.shape}, expected float32 {shape}"
            elif not np.isfinite(kept).all():
                reason = "it holds numbers that are not finite"
            else:
                return kept
        log.warning("%s is damaged (%s): the spectrograms are computed again", file, reason)
        return None

    def _write(self, file: Path, pictures: NDArray[np.float32]) -> None:
        # Threads share a process id, and ranks on several machines may.
        partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}.part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as opened:
                np.lib.format.write_array(opened, pictures, allow_pickle=False)
            os.replace(partial, file)
        except OSError as error:
            raise FileNotFoundError(
                f"{self.folder}: spectrograms cannot be kept there ({error}); name another folder in cache_dir"
            ) from error
        finally:
            # A disk that is full, or a folder that is a file, has more to say above.
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


@torch.no_grad()
def _compute(path: Path, times: Tensor, log_mel: LogMel, window: float) -> tuple[Tensor, bool]:
    """Spectrograms, and whether the sound had to be padded for want of any."""
    waveform, rate = read_audio(path)
    waveform = resample(waveform, rate, log_mel.sample_rate)
    windows = audio_windows(waveform, log_mel.sample_rate, times, window)
    size = windows.shape[1]
    length = len(waveform)
    # The first sample of each window, as `audio_windows` places it.
    starts = (times.double() * log_mel.sample_rate).round() - size // 2
    beyond = bool(((starts >= length) | (starts + size <= 0)).any())
    padded = length < size or beyond or not bool(waveform.any())
    return log_mel(windows.to(log_mel.filter_bank.device)).cpu(), padded
