"""Frames and sound of video files, by PyAV (extra `video`)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from datamodules.sources.media import (
    INSTALL,
    Clip,
    check_finite,
    choose_frames,
    existing_file,
    picture_pixels,
    read_wave,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    from torch import Tensor

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm")


def _pyav(path: Path) -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise ImportError(f"{path} is a video file, which needs PyAV: {INSTALL}") from error
    module: ModuleType = av
    return module


def _start(container: Any) -> float:
    """The clock of the container, in seconds, when the file starts."""
    return (container.start_time or 0) / 1_000_000


def read_video(
    path: str | Path,
    num_frames: int,
    image_size: int,
    channels: int = 3,
    pad_short: bool = False,
    *,
    clip_seconds: float | None = None,
    start: float | None = None,
) -> Clip:
    """Frames of a video file, evenly spaced over a clip of it (`choose_frames`), with the times the file gives them.

    Only the stretches between a key frame and a chosen frame are decoded. A rotation noted in the file is not applied.

    Args:
        path: What PyAV reads, such as MP4 or WebM.
        num_frames: How many to take.
        image_size: Pixels: the shorter side is scaled to it (bilinear), the centre of the longer is kept.
        channels: 3 for red, green, blue; 1 for grey.
        pad_short: Repeat the last frame of a clip that has fewer than `num_frames`.
        clip_seconds: Length of the clip; the whole video by default.
        start: Start of the clip in seconds; the central clip by default.

    Raises:
        FileNotFoundError: If the file is missing.
        ImportError: If PyAV is not installed.
        ValueError: If the file is damaged, has no video or too few frames, or a setting is out of range.
    """
    path = existing_file(path)
    av = _pyav(path)
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} has no video")
            stream = container.streams.video[0]
            # Reading packets without decoding them tells when frames are shown, and which are key frames.
            packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
            stamps = torch.tensor(sorted(_stamp(packet) for packet in packets), dtype=torch.int64)
            keys = sorted(_stamp(packet) for packet in packets if packet.is_keyframe)
            times = stamps.double() * float(stream.time_base) - _start(container)
            chosen = choose_frames(times, num_frames, clip_seconds, start, pad_short, path)
            wanted = sorted(set(stamps[chosen].tolist()))
            pixels: dict[int, Tensor] = {}
            # Some formats, such as AVI, seek inexactly: what is then not found is looked for from the start.
            for places in (keys, keys[:1]):
                lost = [stamp for stamp in wanted if stamp not in pixels]
                if lost:
                    for stamp, frame in _decode(container, stream, places, lost):
                        pixels[stamp] = picture_pixels(frame.to_image(), image_size, channels)
    except av.FFmpegError as error:
        raise ValueError(f"{path} cannot be read as video, FFmpeg says: {error}") from error
    lost = [stamp for stamp in wanted if stamp not in pixels]
    if lost:
        raise ValueError(f"{path} is damaged: {len(lost)} of {len(wanted)} frames cannot be decoded")
    return Clip(torch.stack([pixels[stamp] for stamp in stamps[chosen].tolist()]), times[chosen])


def _stamp(timed: Any) -> int:
    """When a packet or frame is shown, in units of its stream; some old formats only tell when it is decoded."""
    return int(timed.dts if timed.pts is None else timed.pts)


def _decode(container: Any, stream: Any, keys: list[int], wanted: list[int]) -> Iterator[tuple[int, Any]]:
    """The wanted frames, jumping to the key frame before each where that saves decoding."""
    frames: Iterator[Any] = iter(())
    here = -math.inf
    for stamp in wanted:
        key = max((key for key in keys if key <= stamp), default=None)
        if here == -math.inf or (key is not None and key > here):
            container.seek(stamp if key is None else key, stream=stream)
            frames = container.decode(stream)
        for frame in frames:
            here = _stamp(frame)
            if here >= stamp:
                if here == stamp:
                    yield stamp, frame
                break


def read_video_audio(path: str | Path) -> tuple[Tensor, int]:
    """The sound of a video file as one channel, on the clock of `read_video`: sample k is heard at k / rate.

    Args:
        path: What PyAV reads, such as MP4 or WebM.

    Returns:
        float32 `(samples,)` and the sample rate in Hz.

    Raises:
        FileNotFoundError: If the file is missing.
        ImportError: If PyAV is not installed.
        ValueError: If the file is damaged or has no sound.
    """
    path = existing_file(path)
    av = _pyav(path)
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise ValueError(f"{path} has no sound: name a sound file of its own")
            stream = container.streams.audio[0]
            rate, delay = int(stream.rate), 0.0
            resampler = av.AudioResampler(format="fltp")
            parts: list[Any] = []
            for frame in container.decode(stream):
                if not parts and frame.time is not None:
                    delay = frame.time - _start(container)
                parts.extend(part.to_ndarray().mean(axis=0) for part in resampler.resample(frame))
    except av.FFmpegError as error:
        raise ValueError(f"{path} cannot be read as sound, FFmpeg says: {error}") from error
    waveform = torch.from_numpy(np.concatenate([np.zeros(0), *parts]).astype(np.float32))
    check_finite(path, waveform)
    # Sound often starts a little after the first frame, or before it.
    return torch.nn.functional.pad(waveform, (round(delay * rate), 0)), rate


def read_audio(path: str | Path) -> tuple[Tensor, int]:
    """The sound of a sound file or of a video file, by the suffix: `read_wave` or `read_video_audio`."""
    is_video = Path(path).suffix.lower() in VIDEO_SUFFIXES
    return read_video_audio(path) if is_video else read_wave(path)
