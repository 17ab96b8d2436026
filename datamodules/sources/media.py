"""Sound files, folders of pictures, and which frame of a clip belongs to which stretch of its sound.

WAV files of integer PCM are read by the standard library and pictures by Pillow; other sound files need soundfile, of
the extra `video`. Video files are read by `video_files`.
"""

from __future__ import annotations

import math
import re
import wave
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

PICTURE_SUFFIXES = (".jpeg", ".jpg", ".png")
INSTALL = "pip install 'lightning-method-zoo[video]'"


class Clip(NamedTuple):
    """Frames of a clip.

    Attributes:
        frames: uint8 `(frames, channels, height, width)`.
        times: float64 `(frames,)`, when each is shown, in seconds from the start of the file.
    """

    frames: Tensor
    times: Tensor


def read_wave(path: str | Path) -> tuple[Tensor, int]:
    """A sound file as one channel: the mean of its channels, samples of full scale in [-1, 1].

    Args:
        path: WAV of 8, 16, 24 or 32 bit PCM, or any file that soundfile reads (FLAC, OGG, MP3, WAV of floats).

    Returns:
        float32 `(samples,)` and the sample rate in Hz.

    Raises:
        FileNotFoundError: If the file is missing.
        ImportError: If the file needs soundfile and that is not installed.
        ValueError: If the file is damaged or no sound file.
    """
    path = existing_file(path)
    with path.open("rb") as file:
        head = file.read(12)
        is_wave = head[:4] == b"RIFF" and head[8:] == b"WAVE"
        if path.suffix.lower() in (".wav", ".wave") and not is_wave and head[:4] not in (b"RF64", b"RIFX"):
            raise ValueError(f"{path} is not a WAV file: expected RIFF....WAVE, it starts with {head!r}")
        file.seek(0)
        if is_wave:
            try:
                return _pcm(path, wave.open(file))
            except (wave.Error, EOFError) as error:
                if "unknown format" not in str(error):
                    raise ValueError(
                        f"{path} is a damaged WAV file ({str(error) or 'it ends in its header'})"
                    ) from error
    return _other_sound(path)


def existing_file(path: str | Path) -> Path:
    """The path of a file that is there.

    Raises:
        FileNotFoundError: If it is not.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    return path


def _pcm(path: Path, opened: wave.Wave_read) -> tuple[Tensor, int]:
    channels, width, rate, length = opened.getparams()[:4]
    content = opened.readframes(length)
    if rate < 1 or not 1 <= width <= 4:
        raise ValueError(f"{path} has {8 * width} bits a sample and {rate} samples a second: expected 8, 16, 24 or 32 "
                         "bits and 1 Hz or more")  # fmt: skip
    if len(content) != length * channels * width:
        raise ValueError(f"{path} is truncated: its header promises {length} samples, there are "
                         f"{len(content) // (channels * width)}")  # fmt: skip
    if width == 1:
        # Only 8 bits are unsigned.
        samples = np.frombuffer(content, dtype=np.uint8).astype(np.float32) - 128
    elif width == 3:
        padded = np.zeros((length * channels, 4), dtype=np.uint8)
        padded[:, 1:] = np.frombuffer(content, dtype=np.uint8).reshape(-1, 3)
        samples = (padded.view("<i4")[:, 0] >> 8).astype(np.float32)
    else:
        samples = np.frombuffer(content, dtype=f"<i{width}").astype(np.float32)
    samples = samples.reshape(length, channels).mean(axis=1) / 2 ** (8 * width - 1)
    return torch.from_numpy(samples.astype(np.float32)), rate


def _other_sound(path: Path) -> tuple[Tensor, int]:
    try:
        import soundfile
    except ImportError as error:
        raise ImportError(f"{path} is not a WAV file of integer PCM, other sound needs soundfile: {INSTALL}, or "
                          "convert it to WAV of 16 bits") from error  # fmt: skip
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise ValueError(f"{path} cannot be read as sound, soundfile says: {error}") from error
    mono = torch.from_numpy(samples.mean(axis=1))
    check_finite(path, mono)
    return mono, int(rate)


def check_finite(path: Path, waveform: Tensor) -> None:
    """Raise a ValueError that names the path if a sample is NaN or infinite."""
    wrong = len(waveform) - int(torch.isfinite(waveform).sum())
    if wrong:
        raise ValueError(f"{path}: {wrong} of {len(waveform)} samples are NaN or infinite")


def resample(waveform: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """A waveform at another sample rate, by a polyphase filter that keeps out what the new rate cannot carry.

    Args:
        waveform: `(..., samples)`.
        from_rate: Hz.
        to_rate: Hz.

    Returns:
        float32 `(..., ceil(samples * to_rate / from_rate))`.

    Raises:
        ValueError: If a rate is below 1.
    """
    if from_rate < 1 or to_rate < 1:
        raise ValueError(f"sample rates must be at least 1 Hz, got {from_rate} and {to_rate}")
    if from_rate == to_rate or not waveform.numel():
        return waveform.float()
    from scipy.signal import resample_poly

    common = math.gcd(from_rate, to_rate)
    samples = resample_poly(waveform.float().numpy(), to_rate // common, from_rate // common, axis=-1)
    return torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32))


def audio_windows(waveform: Tensor, sample_rate: int, times: Tensor, window: float) -> Tensor:
    """Windows of a waveform centred on frames: sample `size // 2` of a window is the one heard with its frame.

    Args:
        waveform: `(samples,)`; there are zeros before it and behind it.
        sample_rate: Hz.
        times: `(frames,)` in seconds from the first sample.
        window: Seconds.

    Returns:
        `(frames, size)` with `size = round(window * sample_rate)`.

    Raises:
        ValueError: If the window is shorter than a sample.
    """
    size = round(window * sample_rate)
    if size < 1:
        raise ValueError(f"a window of {window} s holds no sample at {sample_rate} Hz")
    starts = (times.double() * sample_rate).round().long() - size // 2
    windows = waveform.new_zeros(len(starts), size)
    for row, start in enumerate(starts.tolist()):
        first, last = max(start, 0), min(start + size, len(waveform))
        if first < last:
            windows[row, first - start : last - start] = waveform[first:last]
    return windows


def frame_times(indices: Tensor, fps: float) -> Tensor:
    """When frames are shown: `indices / fps`, float64 seconds from the first frame."""
    if not 0 < fps < math.inf:
        raise ValueError(f"fps must be a positive number of frames a second, got {fps}")
    return indices.double() / fps


def choose_frames(
    times: Tensor,
    num_frames: int,
    clip_seconds: float | None = None,
    start: float | None = None,
    pad_short: bool = False,
    path: str | Path = "the clip",
) -> Tensor:
    """Which frames of a video to take: the middles of `num_frames` equal parts of a clip of it.

    Args:
        times: `(total,)` seconds at which the video's frames are shown, ascending.
        num_frames: How many to take.
        clip_seconds: Length of the clip; the whole video, or all from `start` on, by default.
        start: Start of the clip in seconds from the first frame; the central clip by default. A clip that would reach
            beyond the end is moved back.
        pad_short: Repeat the last frame of a clip that has fewer than `num_frames`.
        path: What errors name.

    Returns:
        int64 `(num_frames,)`, ascending, distinct but for repeats of the last.

    Raises:
        ValueError: If a setting is out of range, or the clip has too few frames and `pad_short` is False.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    if clip_seconds is not None and not 0 < clip_seconds < math.inf:
        raise ValueError(f"clip_seconds must be positive, got {clip_seconds}")
    total = len(times)
    first, last = 0, total
    if total > 1 and (clip_seconds is not None or start is not None):
        # Frames last until the next one is shown; of the last frame that is not known.
        step = float(times[-1] - times[0]) / (total - 1)
        if not step > 0:
            raise ValueError(f"{path}: all {total} frames have the time {float(times[0]):g} s")
        duration = step * total
        if start is not None and not 0 <= start < duration:
            raise ValueError(
                f"{path}: start must be in [0, {duration:g}) seconds, the length of the video, got {start}"
            )
        length = duration - (start or 0.0) if clip_seconds is None else min(clip_seconds, duration)
        begin = (duration - length) / 2 if start is None else min(start, duration - length)
        # Half a millionth of a frame keeps rounding from moving a frame that lies on the edge.
        shown = (times - times[0]).double() / step + 5e-7
        first = int(torch.searchsorted(shown, torch.tensor(begin / step, dtype=torch.float64)))
        last = int(torch.searchsorted(shown, torch.tensor((begin + length) / step, dtype=torch.float64)))
    found = last - first
    if not found or (found < num_frames and not pad_short):
        way_out = "" if not found else "; take fewer, or repeat the last with pad_short=True"
        clip = "" if found == total else f" of {total} in {clip_seconds} s"
        raise ValueError(f"{path} has {found} frames{clip}, expected {num_frames} or more{way_out}")
    if found < num_frames:
        return first + torch.arange(num_frames).clamp(max=found - 1)
    return first + (2 * torch.arange(num_frames) + 1) * found // (2 * num_frames)


def _natural(path: Path) -> tuple[Any, ...]:
    """Sorts `9.png` before `10.png`."""
    parts = re.split(r"([0-9]+)", path.name.lower())
    return (*(int(part) if place % 2 else part for place, part in enumerate(parts)), path.name)


def list_frames(folder: str | Path) -> list[Path]:
    """PNG and JPEG files of a folder in the order of the numbers in their names; other and hidden files do not count.

    Raises:
        FileNotFoundError: If there is no such folder, or no picture in it.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder of frames")
    names = (path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES and path.name[0] != ".")
    files = sorted((path for path in names if path.is_file()), key=_natural)
    if not files:
        raise FileNotFoundError(f"{folder} has no frames: expected files {', '.join(PICTURE_SUFFIXES)}")
    return files


def read_frames(
    folder: str | Path,
    num_frames: int,
    image_size: int,
    channels: int = 3,
    pad_short: bool = False,
    *,
    fps: float,
    clip_seconds: float | None = None,
    start: float | None = None,
) -> Clip:
    """Frames from a folder of pictures, evenly spaced over a clip of it (`choose_frames`); only these are read.

    Args:
        folder: PNG or JPEG files, named so that their numbers give their order.
        num_frames: How many to take.
        image_size: Pixels: the shorter side is scaled to it (bilinear), the centre of the longer is kept.
        channels: 3 for red, green, blue; 1 for grey.
        pad_short: Repeat the last frame of a clip that has fewer than `num_frames`.
        fps: Pictures a second.
        clip_seconds: Length of the clip; the whole folder by default.
        start: Start of the clip in seconds; the central clip by default.

    Raises:
        FileNotFoundError: If there is no such folder, or no picture in it.
        ValueError: If a picture is damaged, there are too few, or a setting is out of range.
    """
    files = list_frames(folder)
    times = frame_times(torch.arange(len(files)), fps)
    chosen = choose_frames(times, num_frames, clip_seconds, start, pad_short, folder)
    pixels = {index: read_picture(files[index], image_size, channels) for index in set(chosen.tolist())}
    return Clip(torch.stack([pixels[index] for index in chosen.tolist()]), times[chosen])


def read_picture(path: str | Path, image_size: int, channels: int = 3) -> Tensor:
    """A picture as uint8 `(channels, image_size, image_size)`, scaled and cropped as in `read_frames`.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If it is damaged or holds pixels of more than 8 bits, or a setting is out of range.
    """
    from PIL import Image

    path = existing_file(path)
    try:
        with Image.open(path) as picture:
            picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture ({error})") from error
    if picture.mode.startswith(("I", "F")):
        raise ValueError(f"{path} holds pixels of mode {picture.mode}: expected 8 bits a channel")
    return picture_pixels(picture, image_size, channels)


def picture_pixels(picture: Image.Image, image_size: int, channels: int) -> Tensor:
    """Pixels of a picture of Pillow as uint8 `(channels, image_size, image_size)`, scaled and cropped.

    Raises:
        ValueError: If a setting is out of range.
    """
    from PIL import Image

    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    if picture.mode == "P":
        # Pillow wants transparent colours of a palette taken this way.
        picture = picture.convert("RGBA")
    picture = picture.convert("L" if channels == 1 else "RGB")
    shorter = min(picture.size)
    width, height = (max(image_size, round(side * image_size / shorter)) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - image_size) // 2, (height - image_size) // 2
    picture = picture.crop((left, top, left + image_size, top + image_size))
    pixels: NDArray[np.uint8] = np.array(picture).reshape(image_size, image_size, channels)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
