"""Log-mel spectrograms against librosa, closed forms and invariances.

`log_mel_librosa.npz` was made with librosa 0.11.0 (numpy 2.4.6, scipy 1.17.1) from `signal` below: for each entry of
`TABLES` it holds `librosa.power_to_db(librosa.feature.melspectrogram(y=signal(sample_rate, samples), sr=sample_rate,
n_fft=n_fft, hop_length=hop_length, n_mels=num_mels, power=2.0, center=True, pad_mode="constant", window="hann",
htk=mel_scale == "htk", norm=norm), ref=1.0, amin=1e-10, top_db=None)[:, ::step]` as float32, written by
`numpy.savez_compressed`.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from datamodules.sources.log_mel import LogMel, hertz_to_mel, mel_filter_bank, mel_to_hertz

# Settings, number of samples, and the step between stored columns.
TABLES: dict[str, tuple[dict[str, Any], int, int]] = {
    "movie": ({}, 114688, 24),
    "speech": ({"sample_rate": 8000, "n_fft": 256, "hop_length": 128, "num_mels": 32, "frames": 32}, 4096, 3),
    "speech_htk": (
        {"sample_rate": 8000, "n_fft": 256, "hop_length": 128, "num_mels": 32, "frames": 32, "mel_scale": "htk",
         "norm": None}, 4096, 3,
    ),
}  # fmt: skip
SPEECH = TABLES["speech"][0]


def signal(sample_rate: int, samples: int) -> np.ndarray:
    """A rising and a falling chirp over weak noise of integers; the noise keeps every band above the floor."""
    n = np.arange(samples, dtype=np.uint64)
    t = n.astype(np.float64) / sample_rate
    duration = samples / sample_rate
    rising = np.sin(2 * np.pi * (50 * t + 0.22 * sample_rate * t**2 / duration))
    falling = np.sin(2 * np.pi * (0.45 * sample_rate * t - 0.2 * sample_rate * t**2 / duration))
    noise = ((n * n * np.uint64(2654435761) + n * np.uint64(40503)) % np.uint64(2**32)) / 2**31 - 1
    return (0.5 * rising + 0.2 * falling * t / duration + 0.01 * noise).astype(np.float32)


def tone(hertz: float, sample_rate: int, samples: int, amplitude: float = 0.5) -> Tensor:
    time = torch.arange(samples, dtype=torch.float64) / sample_rate
    return (amplitude * torch.sin(2 * math.pi * hertz * time)).float()[None]


@pytest.mark.parametrize("name", TABLES)
def test_spectrogram_is_that_of_librosa(name: str) -> None:
    settings, samples, step = TABLES[name]
    module = LogMel(**settings)
    ours = module(torch.from_numpy(signal(module.sample_rate, samples))[None])
    assert ours.shape == (1, module.num_mels, module.frames) and ours.dtype == torch.float32
    with np.load(Path(__file__).parent / "log_mel_librosa.npz", allow_pickle=False) as stored:
        expected = torch.from_numpy(stored[name])
    torch.testing.assert_close(ours[0, :, ::step], expected, atol=0.02, rtol=0)


def test_spectrogram_is_that_of_a_sum_over_samples_in_float64() -> None:
    wave = torch.from_numpy(signal(8000, 300)).double()
    padded = torch.cat((torch.zeros(32), wave, torch.zeros(64))).double()
    columns = []
    for start in range(0, 301, 20):
        total = torch.zeros(33, dtype=torch.complex128)
        for n in range(64):
            weight = 0.5 - 0.5 * math.cos(2 * math.pi * n / 64)
            total += weight * padded[start + n] * torch.exp(-2j * math.pi * n * torch.arange(33) / 64)
        columns.append(total.abs() ** 2)
    power = mel_filter_bank(8000, 64, 8).double() @ torch.stack(columns, dim=1)
    for log, expected in (("none", power), ("natural", power.log()), ("db", 10 * power.log10())):
        module = LogMel(8000, 64, 20, 8, frames=None, log=log)
        torch.testing.assert_close(module(wave.float()[None])[0].double(), expected, atol=1e-4, rtol=1e-4)
        assert module.columns(300) == expected.shape[1] == 16


@pytest.mark.parametrize("mel_scale", ["slaney", "htk"])
@pytest.mark.parametrize("settings", [{}, SPEECH], ids=["movie", "speech"])
def test_tone_peaks_in_the_band_that_contains_it(settings: dict[str, Any], mel_scale: str) -> None:
    module = LogMel(**{**settings, "num_mels": 24, "frames": 20, "mel_scale": mel_scale})
    top = hertz_to_mel(torch.tensor([module.sample_rate / 2.0]), mel_scale)
    edges = mel_to_hertz(torch.linspace(0, 1, 26) * top, mel_scale)
    for band in (1, 5, 11, 17, 22):
        loudness = module(tone(float(edges[band + 1]), module.sample_rate, 20 * module.hop_length))[0, :, 10]
        assert int(loudness.argmax()) == band, f"tone at the centre of band {band}"


def test_doubled_amplitude_adds_six_decibel() -> None:
    wave = torch.from_numpy(signal(8000, 4096))[None]
    module = LogMel(**SPEECH)
    added = module(2 * wave) - module(wave)
    torch.testing.assert_close(added, torch.full_like(added, 20 * math.log10(2)), atol=1e-3, rtol=0)


def test_standardised_spectrogram_has_mean_0_and_deviation_1() -> None:
    picture = LogMel(**SPEECH)(torch.from_numpy(signal(8000, 4096))[None])
    assert picture.std() > 1 and not abs(picture.mean()) < 1
    standardised = (picture - picture.mean()) / picture.std()
    assert abs(standardised.mean()) < 1e-4 and abs(standardised.std() - 1) < 1e-4


def test_tone_is_loudest_where_it_sounds() -> None:
    wave = torch.zeros(1, 4096)
    wave[:, 2048:2304] = tone(1000, 8000, 256)
    loudest = LogMel(**SPEECH)(wave)[0].amax(0).argmax()
    assert int(loudest) == 17  # centred on sample 17 * 128 = 2176


def test_silence_is_the_floor_and_finite() -> None:
    for log, value in (("db", -100.0), ("natural", math.log(1e-10)), ("none", 0.0)):
        picture = LogMel(**SPEECH, log=log)(torch.zeros(2, 4096))
        torch.testing.assert_close(picture, torch.full((2, 32, 32), value), atol=1e-4, rtol=0)
    assert float(LogMel(**SPEECH, floor=1e-6)(torch.zeros(1, 1)).max()) == pytest.approx(-60, abs=1e-4)


def test_short_waveform_is_continued_by_zeros_and_a_long_one_cut_behind_the_last_column() -> None:
    wave = torch.from_numpy(signal(8000, 8192))[None]
    module, everything = LogMel(**SPEECH), LogMel(**{**SPEECH, "frames": None})
    torch.testing.assert_close(module(wave), everything(wave)[..., :32], atol=1e-3, rtol=0)
    short = wave[:, :1000]
    longer = torch.nn.functional.pad(short, (0, 4000))
    torch.testing.assert_close(module(short), everything(longer)[..., :32], atol=1e-3, rtol=0)
    assert everything(short).shape == (1, 32, 1 + 1000 // 128)
    assert module(wave[:, :1]).shape == (1, 32, 32)


def test_rows_of_a_batch_are_those_of_single_waveforms() -> None:
    waves = torch.from_numpy(signal(8000, 12288)).view(3, 4096)
    module = LogMel(**SPEECH)
    single = torch.cat([module(wave[None]) for wave in waves])
    torch.testing.assert_close(module(waves), single, atol=1e-3, rtol=0)
    assert module(waves[:0]).shape == (0, 32, 32)


def test_pre_emphasis_is_the_difference_of_neighbours() -> None:
    wave = torch.from_numpy(signal(8000, 4096))[None]
    before = torch.cat((torch.zeros(1, 1), wave[:, :-1]), dim=1)
    torch.testing.assert_close(
        LogMel(**SPEECH, pre_emphasis=0.97)(wave), LogMel(**SPEECH)(wave - 0.97 * before), atol=1e-3, rtol=0
    )
    # High frequencies gain against low ones: |1 - 0.97 exp(-iw)|.
    gains = [
        float(LogMel(**SPEECH, pre_emphasis=0.97)(wave)[0, :, 10].max() - LogMel(**SPEECH)(wave)[0, :, 10].max())
        for wave in (tone(300, 8000, 4096), tone(3500, 8000, 4096))
    ]
    assert gains[1] - gains[0] > 10


def test_autocast_and_half_precision_waveforms_give_float32() -> None:
    wave = torch.from_numpy(signal(8000, 4096))[None]
    module = LogMel(**SPEECH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        picture = module(wave)
    assert picture.dtype == torch.float32 and (picture == module(wave)).all()
    assert module(wave.double()).dtype == torch.float32
    assert torch.equal(module(wave.bfloat16()), module(wave.bfloat16().float()))


def test_nothing_is_stored_in_a_checkpoint() -> None:
    module = LogMel(**SPEECH)
    assert not module.state_dict() and not list(module.parameters())
    assert LogMel(**module.settings).settings == module.settings  # type: ignore[arg-type]
    assert "hop_length=128" in repr(module) and "floor=1e-10" in repr(module)


def test_gradient_reaches_the_waveform() -> None:
    wave = torch.from_numpy(signal(8000, 4096))[None].requires_grad_()
    LogMel(**SPEECH)(wave).mean().backward()
    assert wave.grad is not None and wave.grad.isfinite().all() and wave.grad.abs().max() > 0


def test_triangles_have_unit_area_over_hertz_or_height_1() -> None:
    for mel_scale in ("slaney", "htk"):
        # Fine bins, so that sums are integrals.
        area = mel_filter_bank(8000, 1 << 16, 20, 100, 3500, mel_scale)
        torch.testing.assert_close(area.sum(1) * 8000 / (1 << 16), torch.ones(20), atol=1e-3, rtol=0)
        height = mel_filter_bank(8000, 1 << 16, 20, 100, 3500, mel_scale, norm=None)
        torch.testing.assert_close(height.amax(1), torch.ones(20), atol=5e-3, rtol=0)
        # Neighbours add to 1 between the first centre and the last.
        inside = height.sum(0)[int(height[0].argmax()) : int(height[-1].argmax())]
        torch.testing.assert_close(inside, torch.ones_like(inside), atol=1e-3, rtol=0)
        frequencies = torch.arange((1 << 15) + 1) * 8000 / (1 << 16)
        assert not height[:, (frequencies < 100) | (frequencies > 3500)].any()


def test_mel_scales_have_their_published_points() -> None:
    hertz = torch.tensor([0.0, 500.0, 1000.0, 6400.0], dtype=torch.float64)
    slaney = torch.tensor([0.0, 7.5, 15.0, 42.0], dtype=torch.float64)
    torch.testing.assert_close(hertz_to_mel(hertz), slaney)
    torch.testing.assert_close(mel_to_hertz(slaney), hertz)
    assert float(hertz_to_mel(torch.tensor(1000.0), "htk")) == pytest.approx(1000, abs=0.1)
    torch.testing.assert_close(mel_to_hertz(hertz_to_mel(hertz, "htk"), "htk"), hertz)


def test_empty_bands_are_counted_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    bank = mel_filter_bank(8000, 128, 100)
    empty = int((bank.sum(1) == 0).sum())
    first = int((bank.sum(1) == 0).nonzero()[0])
    assert empty > 0
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert f"{empty} of 100 mel bands hold no frequency of the transform, the first is band {first}" in record.message
    assert "n_fft=128, sample_rate=8000" in record.message
    caplog.clear()
    LogMel()
    LogMel(**SPEECH)
    assert "mel bands" not in caplog.text


@pytest.mark.parametrize(
    ("wave", "message"),
    [
        (torch.zeros(10), r"is \(10,\): expected \(batch, samples\)"),
        (torch.zeros(1, 1, 10), r"is \(1, 1, 10\): expected \(batch, samples\)"),
        (torch.zeros(2, 0), r"is \(2, 0\): expected \(batch, samples\), 1 sample or more"),
        (torch.zeros(1, 10, dtype=torch.int16), r"is torch.int16: expected floating point"),
        (torch.tensor([[0.0], [math.nan]]), r"1 of 2 waveforms hold NaN or infinity, the first is row 1: audio"),
        (torch.tensor([[math.inf], [-math.inf]]), r"2 of 2 waveforms hold NaN or infinity, the first is row 0"),
    ],
    ids=["one dimension", "three dimensions", "empty", "integers", "nan", "infinity"],
)
def test_wrong_waveform_is_refused(wave: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogMel(**SPEECH)(wave)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"sample_rate": 0}, "sample_rate must be at least 1, got 0"),
        ({"n_fft": 1}, "n_fft must be at least 2, got 1"),
        ({"hop_length": 0}, "hop_length must be at least 1, got 0"),
        ({"num_mels": 0}, "num_mels must be at least 1, got 0"),
        ({"frames": 0}, "frames must be at least 1 or None, got 0"),
        ({"log": "log2"}, "log is 'log2': expected one of db, natural, none"),
        ({"pre_emphasis": 1.0}, r"pre_emphasis must be in \[0, 1\), got 1.0"),
        ({"f_min": -1.0}, "expected 0 <= f_min < f_max"),
        ({"f_min": 3000.0, "f_max": 2000.0}, "expected 0 <= f_min < f_max.*f_min=3000.0 and f_max=2000.0"),
        ({"f_max": 4001.0}, r"<= 4000.0 \(half the sample rate\), got f_min=0.0 and f_max=4001.0"),
        ({"mel_scale": "bark"}, "mel_scale is 'bark': expected one of slaney, htk"),
        ({"norm": "l2"}, "norm is 'l2': expected 'slaney' or None"),
        ({"floor": 0.0}, "floor must be a power of at least 1e-30, got 0.0"),
        ({"floor": math.nan}, "floor must be a power"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_setting_is_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogMel(**{**SPEECH, **setting})
