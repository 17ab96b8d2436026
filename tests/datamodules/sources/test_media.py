from __future__ import annotations

import math
import struct
import sys
import wave
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from datamodules.sources.media import (
    audio_windows,
    choose_frames,
    frame_times,
    list_frames,
    read_frames,
    read_picture,
    read_wave,
    resample,
)
from datamodules.sources.video_files import read_audio, read_video, read_video_audio

if TYPE_CHECKING:
    from pathlib import Path

Image = pytest.importorskip("PIL.Image")

FPS = 10


def write_wave(path: Path, content: bytes, width: int = 2, channels: int = 1, rate: int = 8000) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(content)
    return path


def packed(values: list[int], width: int) -> bytes:
    if width == 1:
        return bytes(value + 128 for value in values)
    return b"".join(value.to_bytes(width, "little", signed=True) for value in values)


def write_frames(folder: Path, total: int, size: tuple[int, int] = (8, 8)) -> Path:
    """Picture i is grey of value 10 i; its name is i + 1, without zeros in front."""
    folder.mkdir()
    for index in range(total):
        Image.new("RGB", size, (10 * index,) * 3).save(folder / f"img_{index + 1}.png")
    return folder


def values(frames: torch.Tensor) -> list[int]:
    return frames[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_pcm_of_every_width_is_scaled_to_one(tmp_path: Path, width: int) -> None:
    full = 2 ** (8 * width - 1)
    numbers = [0, full // 2, -full // 2, full - 1, -full, 1, -1]
    waveform, rate = read_wave(write_wave(tmp_path / "a.wav", packed(numbers, width), width))
    assert rate == 8000 and waveform.dtype == torch.float32
    torch.testing.assert_close(waveform.double(), torch.tensor(numbers).double() / full, atol=1e-7, rtol=0)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_stereo_is_the_mean_of_its_channels(tmp_path: Path, width: int) -> None:
    left, right = [10, 20, -30], [30, -20, 10]
    both = [number for pair in zip(left, right, strict=True) for number in pair]
    waveform, _ = read_wave(write_wave(tmp_path / "a.wav", packed(both, width), width, channels=2, rate=44100))
    expected = torch.tensor([20.0, 0.0, -10.0]) / 2 ** (8 * width - 1)
    torch.testing.assert_close(waveform, expected)


def test_wave_file_without_samples_is_an_empty_waveform(tmp_path: Path) -> None:
    waveform, rate = read_audio(write_wave(tmp_path / "a.wav", b""))
    assert waveform.shape == (0,) and rate == 8000


@pytest.mark.parametrize("cut", [10, 20, 40, 60], ids=["magic", "header", "data header", "samples"])
def test_truncated_wave_file_is_an_error_with_its_path(tmp_path: Path, cut: int) -> None:
    path = write_wave(tmp_path / "a.wav", packed(list(range(100)), 2))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"a\.wav is (not a WAV file|a damaged WAV file|truncated)"):
        read_wave(path)


def test_truncation_is_told_in_samples(tmp_path: Path) -> None:
    path = write_wave(tmp_path / "a.wav", packed(list(range(100)), 2))
    path.write_bytes(path.read_bytes()[:-11])
    with pytest.raises(ValueError, match=r"a\.wav is truncated: its header promises 100 samples, there are 94"):
        read_wave(path)


def test_text_named_wav_and_a_missing_file_are_errors_with_the_path(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_text("not a sound")
    with pytest.raises(ValueError, match=r"a\.wav is not a WAV file: expected RIFF\.\.\.\.WAVE, it starts with b'not"):
        read_wave(tmp_path / "a.wav")
    with pytest.raises(FileNotFoundError, match=r"b\.wav is not a file"):
        read_wave(tmp_path / "b.wav")


def test_other_sound_without_soundfile_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    (tmp_path / "a.flac").write_bytes(b"fLaC" + bytes(40))
    with pytest.raises(ImportError, match=r"a\.flac is not a WAV.*pip install 'lightning-method-zoo\[video\]'"):
        read_wave(tmp_path / "a.flac")


def test_other_sound_is_read_by_soundfile(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    samples = np.stack((np.linspace(-0.5, 0.5, 400), np.linspace(0.5, -0.25, 400)), axis=1)
    for name, subtype in (("a.flac", "PCM_24"), ("float.wav", "FLOAT"), ("extensible.wav", "PCM_24")):
        container = "WAVEX" if name == "extensible.wav" else None
        soundfile.write(tmp_path / name, samples, 16000, subtype=subtype, format=container)
        waveform, rate = read_wave(tmp_path / name)
        assert rate == 16000 and waveform.dtype == torch.float32
        torch.testing.assert_close(waveform, torch.from_numpy(samples.mean(1)).float(), atol=1e-6, rtol=0)


def test_damaged_other_sound_is_an_error_with_its_path(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    (tmp_path / "a.flac").write_bytes(b"fLaC" + bytes(40))
    with pytest.raises(ValueError, match=r"a\.flac cannot be read as sound, soundfile says"):
        read_wave(tmp_path / "a.flac")
    soundfile.write(tmp_path / "b.wav", np.array([0.0, np.nan, np.inf]), 8000, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"b\.wav: 2 of 3 samples are NaN or infinite"):
        read_wave(tmp_path / "b.wav")


@pytest.mark.parametrize(("old", "new"), [(8000, 44100), (44100, 8000), (22050, 44100), (48000, 44100)])
def test_resampled_tone_is_the_tone_at_the_new_rate(old: int, new: int) -> None:
    def tone(rate: int) -> torch.Tensor:
        return torch.sin(2 * math.pi * 440 * torch.arange(rate // 2).double() / rate).float()

    result = resample(tone(old), old, new)
    assert result.shape == (math.ceil(old // 2 * new / old),) and result.dtype == torch.float32
    inside = slice(new // 20, -new // 20)  # the ends lack neighbours
    torch.testing.assert_close(result[inside], tone(new)[: len(result)][inside], atol=3e-3, rtol=0)


def test_resampling_removes_what_the_new_rate_cannot_carry() -> None:
    high = torch.sin(2 * math.pi * 6000 * torch.arange(22050).double() / 44100).float()
    assert resample(high, 44100, 8000)[400:-400].abs().max() < 2e-3


def test_resampling_keeps_equal_rates_and_rows() -> None:
    waves = torch.randn(3, 800, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resample(waves, 8000, 8000), waves)
    assert torch.equal(resample(waves, 8000, 4000)[1], resample(waves[1], 8000, 4000))
    assert resample(waves[:, :0], 8000, 4000).shape == (3, 0)
    with pytest.raises(ValueError, match="at least 1 Hz, got 0 and 8000"):
        resample(waves, 0, 8000)


def test_click_is_in_the_centre_of_the_window_of_its_frame_and_in_no_window_far_away() -> None:
    rate = 8000
    times = torch.tensor([0.0, 1.25, 2.5, 3.75], dtype=torch.float64)
    for clicked, time in enumerate(times.tolist()):
        waveform = torch.zeros(4 * rate)
        waveform[round(time * rate)] = 1
        windows = audio_windows(waveform, rate, times, 0.5)
        assert windows.shape == (4, 4000)
        assert windows.nonzero().tolist() == [[clicked, 2000]]
    # A window that is wider than the distance of frames holds the click in its proper place.
    waveform = torch.zeros(4 * rate)
    waveform[round(1.25 * rate)] = 1
    assert audio_windows(waveform, rate, times, 2.6).nonzero().tolist() == [[0, 20400], [1, 10400], [2, 400]]


def test_windows_are_padded_with_zeros_outside_the_file() -> None:
    waveform = torch.arange(1.0, 11.0)
    windows = audio_windows(waveform, 1, torch.tensor([0.0, 5.0, 9.0, 30.0, -9.0]), 4)
    expected = [[0, 0, 1, 2], [4, 5, 6, 7], [8, 9, 10, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert windows.tolist() == expected
    assert audio_windows(waveform[:2], 1, torch.tensor([1.0]), 6).tolist() == [[0, 0, 1, 2, 0, 0]]
    assert audio_windows(waveform[:0], 1, torch.tensor([1.0]), 3).tolist() == [[0, 0, 0]]
    with pytest.raises(ValueError, match=r"a window of 0.1 s holds no sample at 1 Hz"):
        audio_windows(waveform, 1, torch.tensor([1.0]), 0.1)


def chosen(total: int, num_frames: int, **options: Any) -> list[int]:
    return choose_frames(frame_times(torch.arange(total), FPS), num_frames, **options).tolist()


def test_frames_are_the_middles_of_equal_parts() -> None:
    assert chosen(40, 4) == [5, 15, 25, 35]
    assert chosen(9, 1) == [4]
    assert chosen(4, 4) == [0, 1, 2, 3]
    assert chosen(7, 4) == [0, 2, 4, 6]
    for total in range(5, 40):
        steps = np.diff(chosen(total, 5))
        assert steps.min() >= 1 and steps.max() - steps.min() <= 1


def test_clip_is_central_or_starts_where_told() -> None:
    assert chosen(50, 3, clip_seconds=3) == [15, 25, 35]
    assert chosen(50, 3, clip_seconds=3, start=0) == [5, 15, 25]
    assert chosen(50, 30, clip_seconds=3, start=0.7) == list(range(7, 37))
    assert chosen(50, 30, clip_seconds=3, start=4.5) == list(range(20, 50))  # moved back
    assert chosen(50, 3, clip_seconds=60) == chosen(50, 3)
    assert chosen(50, 20, start=3) == list(range(30, 50))
    # Every clip of a length has as many frames, wherever rounding puts its ends.
    for start in range(0, 200):
        assert chosen(500, 29, clip_seconds=2.9, start=start / 10) == list(range(start, start + 29))


def test_clip_of_uneven_frames_follows_their_times() -> None:
    times = torch.tensor([0.0, 0.1, 0.2, 0.3, 5.0, 5.1, 5.2, 6.0], dtype=torch.float64) + 3
    assert choose_frames(times, 3, clip_seconds=0.3, start=4.95).tolist() == [4, 5, 6]


def test_too_few_frames_are_an_error_or_repeat_the_last() -> None:
    with pytest.raises(ValueError, match=r"films/7 has 3 frames, expected 4 or more; .*pad_short=True"):
        chosen(3, 4, path="films/7")
    with pytest.raises(ValueError, match=r"the clip has 3 frames of 50 in 0.3 s, expected 4 or more"):
        chosen(50, 4, clip_seconds=0.3)
    assert chosen(3, 5, pad_short=True) == [0, 1, 2, 2, 2]
    assert chosen(1, 2, pad_short=True, clip_seconds=3) == [0, 0]
    with pytest.raises(ValueError, match=r"has 0 frames, expected 2 or more$"):
        chosen(0, 2, pad_short=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 0}, "num_frames must be at least 1, got 0"),
        ({"clip_seconds": 0.0}, "clip_seconds must be positive, got 0.0"),
        ({"clip_seconds": math.nan}, "clip_seconds must be positive, got nan"),
        ({"start": -1.0}, r"start must be in \[0, 5\) seconds, the length of the video, got -1.0"),
        ({"start": 5.0}, r"start must be in \[0, 5\) seconds, the length of the video, got 5.0"),
    ],
    ids=["no frames", "no clip", "nan", "before", "behind"],
)
def test_wrong_choice_of_frames_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chosen(50, **{"num_frames": 2, **options})


def test_frames_of_no_duration_and_no_rate_are_refused() -> None:
    with pytest.raises(ValueError, match="all 3 frames have the time 2 s"):
        choose_frames(torch.full((3,), 2.0), 1, clip_seconds=1)
    for fps in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="fps must be a positive number of frames a second"):
            frame_times(torch.arange(3), fps)


def test_frames_of_a_folder_come_in_the_order_of_their_numbers_with_their_times(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "clip", 20)
    (folder / "fps.txt").write_text("10")
    (folder / "._img_3.png").write_text("left behind by a file manager")
    clip = read_frames(folder, 4, 8, fps=FPS)
    assert clip.frames.shape == (4, 3, 8, 8) and clip.frames.dtype == torch.uint8
    assert values(clip.frames) == [20, 70, 120, 170]
    assert clip.times.tolist() == pytest.approx([0.2, 0.7, 1.2, 1.7]) and clip.times.dtype == torch.float64
    clip = read_frames(folder, 2, 8, 1, fps=FPS, clip_seconds=1, start=0)
    assert clip.frames.shape == (2, 1, 8, 8)
    assert values(clip.frames) == [20, 70] and clip.times.tolist() == pytest.approx([0.2, 0.7])


def test_numbers_count_as_numbers_wherever_they_stand(tmp_path: Path) -> None:
    for name in ("b1.jpg", "a10_2.png", "a9_11.PNG", "a9_2.jpeg", "a09_1.png", "10.png", "9.png"):
        (tmp_path / name).touch()
    names = [path.name for path in list_frames(tmp_path)]
    assert names == ["9.png", "10.png", "a09_1.png", "a9_2.jpeg", "a9_11.PNG", "a10_2.png", "b1.jpg"]


def test_only_chosen_frames_are_read(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "clip", 20)
    for index in set(range(1, 21)) - {3, 8, 13, 18}:
        (folder / f"img_{index}.png").write_text("damaged")
    assert values(read_frames(folder, 4, 8, fps=FPS).frames) == [20, 70, 120, 170]


def test_short_folder_is_an_error_with_its_path_or_repeats_its_last_frame(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "clip", 3)
    with pytest.raises(ValueError, match=r"clip has 3 frames, expected 4 or more"):
        read_frames(folder, 4, 8, fps=FPS)
    clip = read_frames(folder, 5, 8, pad_short=True, fps=FPS)
    assert values(clip.frames) == [0, 10, 20, 20, 20]
    # The sound of a repeated frame is that of the frame.
    assert clip.times.tolist() == pytest.approx([0, 0.1, 0.2, 0.2, 0.2])


def test_missing_and_empty_folders_are_errors_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone is not a folder of frames"):
        read_frames(tmp_path / "gone", 1, 8, fps=FPS)
    with pytest.raises(FileNotFoundError, match=r"has no frames: expected files \.jpeg, \.jpg, \.png"):
        read_frames(tmp_path, 1, 8, fps=FPS)


def test_picture_is_scaled_by_its_shorter_side_and_cropped_to_its_centre(tmp_path: Path) -> None:
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:, :10], pixels[:, 10:20], pixels[:, 20:30], pixels[:, 30:] = 250, (200, 0, 0), (0, 0, 100), 250
    for name, array in (("wide.png", pixels), ("tall.png", pixels.transpose(1, 0, 2))):
        Image.fromarray(array).save(tmp_path / name)
        picture = read_picture(tmp_path / name, 10)
        assert picture.shape == (3, 10, 10) and picture.is_contiguous()
        picture = picture if name == "wide.png" else picture.transpose(1, 2)
        assert picture[:, 5, 2].tolist() == [200, 0, 0] and picture[:, 5, 7].tolist() == [0, 0, 100]
        assert 250 not in picture[:, :, 1:-1]
    assert read_picture(tmp_path / "wide.png", 30, 1).shape == (1, 30, 30)
    assert abs(int(read_picture(tmp_path / "wide.png", 10, 1)[0, 5, 2]) - round(0.299 * 200)) <= 1
    with pytest.raises(ValueError, match="channels must be 1 or 3, got 2"):
        read_picture(tmp_path / "wide.png", 10, 2)
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        read_picture(tmp_path / "wide.png", 0)


def test_grey_palette_and_transparent_pictures_are_read(tmp_path: Path) -> None:
    plain = Image.new("RGB", (6, 6), (60, 60, 60))
    pictures = {mode: plain.convert(mode) for mode in ("L", "RGBA", "CMYK", "1")}
    pictures["P"] = plain.quantize(4)
    for mode, picture in pictures.items():
        path = tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        picture.save(path, **({"transparency": b"\x00\xff"} if mode == "P" else {}))
        for channels in (1, 3):
            pixels = read_picture(path, 6, channels)
            assert pixels.shape == (channels, 6, 6)
            assert mode == "1" or (pixels.float() - 60).abs().max() <= 3, mode


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_damaged_picture_is_an_error_with_its_path(tmp_path: Path, name: str) -> None:
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for damaged in (b"", b"text", content[:30], content[: len(content) // 2]):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{name} cannot be read as a picture"):
            read_picture(tmp_path / name, 8)
    with pytest.raises(FileNotFoundError, match=r"gone\.png is not a file"):
        read_picture(tmp_path / "gone.png", 8)


def test_picture_of_16_bits_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 40000, dtype=np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png holds pixels of mode I;16: expected 8 bits a channel"):
        read_picture(tmp_path / "a.png", 4)


def write_video(path: Path, total: int = 60, sound: bool = True, click: float = 2.0) -> Path:
    """Frame i is grey of value 4 i, with a key frame every 20; the sound is one click of 5 ms."""
    import av

    rate, is_pcm = 16000, path.suffix == ".mkv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=FPS)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        video.options = {"sc_threshold": "1000000000"}  # no key frames but these
        video.bit_rate, video.codec_context.gop_size, video.codec_context.max_b_frames = 8_000_000, 20, 2
        audio = container.add_stream("pcm_s16le" if is_pcm else "aac", rate=rate, layout="stereo") if sound else None
        for index in range(total):
            picture = np.full((48, 64, 3), 4 * index, dtype=np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
        if audio is not None:
            samples = np.zeros((2, rate * total // FPS), dtype=np.float32)
            samples[:, round(click * rate) - 40 : round(click * rate) + 40] = [[0.8], [0.4]]
            array = (samples.T.reshape(1, -1) * 32767).astype(np.int16) if is_pcm else samples
            frame = av.AudioFrame.from_ndarray(array, format="s16" if is_pcm else "fltp", layout="stereo")
            frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
            container.mux(audio.encode(frame))
            container.mux(audio.encode())
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_frames_of_a_video_are_the_right_ones_with_their_times(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("av")
    path = write_video(tmp_path / f"a{suffix}", sound=False)
    clip = read_video(path, 4, 32)
    assert clip.frames.shape == (4, 3, 32, 32) and clip.frames.dtype == torch.uint8
    # AVI tells when frames are decoded, which is a frame off.
    within = 0.11 if suffix == ".avi" else 0.002
    assert clip.times.tolist() == pytest.approx([0.7, 2.2, 3.7, 5.2], abs=within)
    for frame, index in zip(clip.frames.float(), (7, 22, 37, 52), strict=True):
        assert abs(frame.mean() - 4 * index) < 2
    everything = read_video(path, 60, 16, 1)
    means = everything.frames.float().mean((1, 2, 3))
    torch.testing.assert_close(means, 4 * torch.arange(60.0), atol=2, rtol=0)
    clip = read_video(path, 2, 16, 1, clip_seconds=1, start=2)
    assert clip.times.tolist() == pytest.approx([2.2, 2.7], abs=within)
    assert (clip.frames.float().mean((1, 2, 3)) - torch.tensor([88.0, 108.0])).abs().max() < 2


def test_only_stretches_behind_key_frames_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av")
    from datamodules.sources import video_files

    path = write_video(tmp_path / "a.mp4", sound=False)
    decoded: list[int] = []
    stamp = video_files._stamp

    def counted(timed: Any) -> int:
        if hasattr(timed, "to_image"):
            decoded.append(1)
        return stamp(timed)

    monkeypatch.setattr(video_files, "_stamp", counted)
    read_video(path, 2, 16, clip_seconds=0.2, start=4.2)
    assert 0 < len(decoded) <= 8
    decoded.clear()
    read_video(path, 2, 16)  # frames 15 and 45
    assert len(decoded) <= 16 + 6 + 4


def test_sound_of_a_video_is_on_the_clock_of_its_frames(tmp_path: Path) -> None:
    pytest.importorskip("av")
    for suffix in (".mp4", ".mkv"):
        path = write_video(tmp_path / f"a{suffix}", click=2.0)
        waveform, rate = read_audio(path)
        assert rate == 16000 and waveform.dtype == torch.float32 and waveform.ndim == 1
        assert abs(len(waveform) / rate - 6) < 0.1
        loud = (waveform.abs() > 0.2).nonzero().flatten().double() / rate
        assert abs(loud.mean() - 2.0) < 0.002 and loud.max() - loud.min() < 0.02
        if suffix == ".mkv":
            assert waveform.max() == pytest.approx(0.6, abs=1e-3)  # the mean of 0.8 and 0.4
        times = read_video(path, 6, 16).times
        windows = audio_windows(waveform, rate, times, 0.4)
        assert (windows.abs().amax(1) > 0.2).tolist() == [abs(time - 2.0) < 0.2 for time in times.tolist()]


def test_damaged_silent_and_short_videos_are_errors_with_the_path(tmp_path: Path) -> None:
    pytest.importorskip("av")
    path = write_video(tmp_path / "a.mp4", total=10, sound=False)
    with pytest.raises(ValueError, match=r"a\.mp4 has no sound: name a sound file of its own"):
        read_video_audio(path)
    with pytest.raises(ValueError, match=r"a\.mp4 has 10 frames, expected 11 or more"):
        read_video(path, 11, 16)
    assert len(read_video(path, 11, 16, pad_short=True).frames) == 11
    path.write_bytes(path.read_bytes()[:200])
    for read in (lambda: read_video(path, 2, 16), lambda: read_video_audio(path)):
        with pytest.raises(ValueError, match=r"a\.mp4 cannot be read as (video|sound), FFmpeg says"):
            read()
    with pytest.raises(ValueError, match=r"b\.wav has no video"):
        read_video(write_wave(tmp_path / "b.wav", bytes(8000)), 2, 16)
    with pytest.raises(FileNotFoundError, match=r"gone\.mp4 is not a file"):
        read_audio(tmp_path / "gone.mp4")


def test_video_without_pyav_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(struct.pack(">I4s", 8, b"ftyp"))
    for read in (lambda: read_video(tmp_path / "a.mp4", 2, 16), lambda: read_audio(tmp_path / "a.mp4")):
        with pytest.raises(ImportError, match=r"a\.mp4 is a video file.*pip install 'lightning-method-zoo\[video\]'"):
            read()
