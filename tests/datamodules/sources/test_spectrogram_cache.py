from __future__ import annotations

import logging
import math
import multiprocessing
import os
import wave
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from datamodules.sources import spectrogram_cache
from datamodules.sources.log_mel import LogMel
from datamodules.sources.media import audio_windows, read_wave, resample
from datamodules.sources.spectrogram_cache import SpectrogramCache

if TYPE_CHECKING:
    from pathlib import Path

RATE = 8000
WINDOW = 0.5
SETTINGS: dict[str, Any] = {"sample_rate": RATE, "n_fft": 256, "hop_length": 128, "num_mels": 16, "frames": 32}
TIMES = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)


def write_sound(path: Path, seconds: float = 2.0, amplitude: int = 9000, rate: int = RATE, hertz: float = 440) -> Path:
    time = np.arange(round(seconds * rate)) / rate
    samples = (amplitude * np.sin(2 * math.pi * hertz * time * (1 + time))).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_spectrograms_are_those_of_the_windows_around_the_frames(tmp_path: Path) -> None:
    for rate in (RATE, 11025):
        path = write_sound(tmp_path / f"{rate}.wav", rate=rate)
        log_mel = LogMel(**SETTINGS)
        pictures = SpectrogramCache(tmp_path / "cache").load(path, TIMES, log_mel, WINDOW)
        assert pictures.shape == (3, 16, 32) and pictures.dtype == torch.float32
        windows = audio_windows(resample(read_wave(path)[0], rate, RATE), RATE, TIMES, WINDOW)
        assert torch.equal(pictures, log_mel(windows))


def test_second_call_reads_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_sound(tmp_path / "a.wav")
    cache = SpectrogramCache(str(tmp_path / "deep" / "cache"))
    first = cache.load(path, TIMES, LogMel(**SETTINGS), WINDOW)
    assert (cache.hits, cache.misses, cache.silent) == (0, 1, 0)
    (name,) = names(cache.folder)
    assert name.endswith(".npy") and len(name) == 64 + len(".npy")
    monkeypatch.setattr(spectrogram_cache, "_compute", None)
    monkeypatch.chdir(tmp_path)
    second = cache.load("a.wav", TIMES.float(), LogMel(**SETTINGS), WINDOW)
    assert torch.equal(first, second) and (cache.hits, cache.misses) == (1, 1)
    second += 1  # what is given out belongs to the caller
    assert torch.equal(SpectrogramCache(cache.folder).load(path, TIMES, LogMel(**SETTINGS), WINDOW), first)


@pytest.mark.parametrize(
    "changed",
    [{"frames": None}, {"num_mels": 17}, {"log": "natural"}, {"pre_emphasis": 0.97}, {"f_min": 1.0}, {"f_max": 3999.0},
     {"mel_scale": "htk"}, {"norm": None}, {"floor": 1e-9}, {"hop_length": 127}, {"n_fft": 254}, {"sample_rate": 8001}],
    ids=lambda changed: next(iter(changed)),
)  # fmt: skip
def test_every_setting_of_the_spectrogram_has_files_of_its_own(tmp_path: Path, changed: dict[str, Any]) -> None:
    path = write_sound(tmp_path / "a.wav")
    cache = SpectrogramCache(tmp_path / "cache")
    for settings in (SETTINGS, {**SETTINGS, **changed}):
        cache.load(path, TIMES, LogMel(**settings), WINDOW)
    assert cache.misses == 2 and len(names(cache.folder)) == 2


def test_times_window_and_file_are_part_of_the_name(tmp_path: Path) -> None:
    path, log_mel = write_sound(tmp_path / "a.wav"), LogMel(**SETTINGS)
    cache = SpectrogramCache(tmp_path / "cache")
    before = cache.load(path, TIMES, log_mel, WINDOW)
    cache.load(path, TIMES + 0.001, log_mel, WINDOW)
    cache.load(path, TIMES, log_mel, WINDOW + 0.01)
    cache.load(write_sound(tmp_path / "b.wav"), TIMES, log_mel, WINDOW)
    assert cache.misses == 4
    # Another sound of the same size, written at another time.
    write_sound(path, hertz=700)
    os.utime(path, ns=(10**18, 10**18))
    assert not torch.allclose(cache.load(path, TIMES, log_mel, WINDOW), before, atol=1)
    about = path.stat()
    write_sound(path, seconds=1.9)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))  # another size, the same time
    cache.load(path, TIMES, log_mel, WINDOW)
    assert cache.misses == 6 and len(names(cache.folder)) == 6 and cache.hits == 0


@pytest.mark.parametrize("damage", ["empty", "header", "truncated", "text", "shape", "dtype", "nan", "pickle"])
def test_damaged_file_is_computed_again_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    path, log_mel = write_sound(tmp_path / "a.wav"), LogMel(**SETTINGS)
    cache = SpectrogramCache(tmp_path / "cache")
    expected = cache.load(path, TIMES, log_mel, WINDOW)
    (kept,) = cache.folder.iterdir()
    good = expected.numpy()
    wrong: dict[str, Any] = {
        "shape": good[1:], "dtype": good.astype(np.float64), "nan": good * np.nan, "pickle": np.array([{}], object)
    }  # fmt: skip
    contents = {"empty": b"", "header": kept.read_bytes()[:40], "truncated": kept.read_bytes()[:-3], "text": b"text"}
    if damage in wrong:
        np.save(kept, wrong[damage], allow_pickle=True)
    else:
        kept.write_bytes(contents[damage])
    assert torch.equal(cache.load(path, TIMES, log_mel, WINDOW), expected)
    assert f"{kept} is damaged" in caplog.text and cache.misses == 2
    caplog.clear()
    assert torch.equal(cache.load(path, TIMES, log_mel, WINDOW), expected)
    assert "is damaged" not in caplog.text and cache.hits == 1


@pytest.mark.parametrize("kind", ["silent", "empty", "short", "over", "not yet"])
def test_sound_without_enough_to_hear_is_padded_and_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    seconds, amplitude = {"silent": (2, 0), "empty": (0, 9000), "short": (0.4, 9000)}.get(kind, (2, 9000))
    times = TIMES + {"over": 1, "not yet": -1}.get(kind, 0)
    path, log_mel = write_sound(tmp_path / "a.wav", seconds, amplitude), LogMel(**SETTINGS)
    cache = SpectrogramCache(tmp_path / "cache")
    pictures = cache.load(path, times, log_mel, WINDOW)
    assert pictures.shape == (3, 16, 32) and pictures.isfinite().all()
    assert torch.equal(cache.load(path, times, log_mel, WINDOW), pictures)
    cache.load(path, times + 0.01, log_mel, WINDOW)
    assert caplog.text.count(f"{path} is silent, shorter than a window of 0.5 s, or over before one starts") == 1
    assert (cache.hits, cache.misses, cache.silent) == (1, 2, 1)
    if kind in ("silent", "empty"):
        torch.testing.assert_close(pictures, torch.full_like(pictures, -100), atol=1e-4, rtol=0)
    # A later run reads the files and still says so.
    caplog.clear()
    later = SpectrogramCache(tmp_path / "cache")
    later.load(path, times, log_mel, WINDOW)
    assert (later.hits, later.misses, later.silent) == (1, 0, 1)
    assert caplog.text.count(f"{path} is silent") == 1


def test_windows_that_reach_beyond_the_ends_are_no_reason_for_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = SpectrogramCache(tmp_path / "cache")
    with caplog.at_level(logging.WARNING):
        cache.load(write_sound(tmp_path / "a.wav"), torch.tensor([0.0, 1.9]), LogMel(**SETTINGS), WINDOW)
    assert cache.silent == 0 and "is silent" not in caplog.text


def test_missing_and_damaged_sound_is_an_error_with_its_path(tmp_path: Path) -> None:
    cache = SpectrogramCache(tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match=r"gone\.wav is not a file"):
        cache.load(tmp_path / "gone.wav", TIMES, LogMel(**SETTINGS), WINDOW)
    (tmp_path / "a.wav").write_text("text")
    with pytest.raises(ValueError, match=r"a\.wav is not a WAV file"):
        cache.load(tmp_path / "a.wav", TIMES, LogMel(**SETTINGS), WINDOW)
    assert not cache.folder.exists()


def test_folder_that_cannot_be_written_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(FileNotFoundError, match=r"file.*: spectrograms cannot be kept there .*cache_dir"):
            SpectrogramCache(folder).load(write_sound(tmp_path / "a.wav"), TIMES, LogMel(**SETTINGS), WINDOW)


def _load_all(folder: str, paths: list[str], results: Any) -> None:
    torch.set_num_threads(1)
    cache = SpectrogramCache(folder)
    sums = [float(cache.load(path, TIMES, LogMel(**SETTINGS), WINDOW).double().sum()) for path in paths]
    results.put((sums, cache.hits + cache.misses))


def test_processes_share_a_folder(tmp_path: Path) -> None:
    paths = [str(write_sound(tmp_path / f"{index}.wav", hertz=200 + 50 * index)) for index in range(8)]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [
        context.Process(target=_load_all, args=(str(tmp_path / "cache"), paths, results), daemon=True) for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(timeout=60)
    assert found[0] == found[1] and found[0][1] == 8
    assert len(names(tmp_path / "cache")) == 8
    cache = SpectrogramCache(tmp_path / "cache")
    for path in paths:
        cache.load(path, TIMES, LogMel(**SETTINGS), WINDOW)
    assert (cache.hits, cache.misses) == (8, 0)
