from __future__ import annotations

import torch
from sklearn.linear_model import RidgeClassifier

from datamodules.sources.av_mnist import sound_pictures
from datamodules.sources.av_sample import MELODIES, SAMPLE_RATE, TAKES, sample_parts, sample_pictures, sample_recordings
from datamodules.sources.log_mel import LogMel


def test_every_digit_is_played_equally_often_and_never_twice_alike() -> None:
    recordings = sample_recordings("train")
    assert torch.equal(torch.bincount(recordings.digits), torch.full((10,), TAKES["train"]))
    lengths = recordings.offsets.diff()
    assert len(set(lengths.tolist())) > 100
    assert int(lengths.min()) > 0.2 * SAMPLE_RATE and int(lengths.max()) <= 0.55 * SAMPLE_RATE
    assert recordings.waveform.dtype == torch.float32
    peaks = torch.stack([part.abs().max() for part in recordings.waveform.split(lengths.tolist())])
    assert float(peaks.min()) < 0.2 and 0.5 < float(peaks.max()) <= 0.6001
    assert torch.equal(recordings.waveform, sample_recordings("train").waveform)
    assert not torch.equal(recordings.waveform[:1000], sample_recordings("test").waveform[:1000])


def test_melodies_are_distinct_and_share_their_notes() -> None:
    assert len(set(MELODIES)) == 10
    notes = [set(melody) for melody in MELODIES]
    assert all(any(notes[i] & notes[j] for j in range(10) if j != i) for i in range(10))


def test_no_picture_and_no_recording_is_in_two_parts() -> None:
    parts = sample_parts(0.1).parts
    assert {name: len(part.pictures) for name, part in parts.items()} == {"train": 1349, "validate": 149, "test": 299}
    pictures = [set(part.picture_names.tolist()) for part in parts.values()]
    assert sum(map(len, pictures)) == len(set.union(*pictures)) == 1797
    heard = [set(part.recordings.names.tolist()) for part in parts.values()]
    assert sum(map(len, heard)) == len(set.union(*heard)) == 750
    assert all(float(part.pictures.min()) >= 0 and float(part.pictures.max()) == 1 for part in parts.values())


def test_the_sounds_tell_the_digit_but_not_at_a_glance() -> None:
    log_mel = LogMel(SAMPLE_RATE, 256, 128, 16, frames=None)
    parts = {}
    for name in ("train", "test"):
        recordings = sample_recordings(name)
        parts[name] = (sound_pictures(recordings, log_mel, 128, 16).flatten(1).numpy(), recordings.digits.numpy())
    images, digits = parts["train"]
    linear = RidgeClassifier(alpha=1e3).fit(images, digits).score(*parts["test"])
    assert linear > 0.4, "the class is there"
    loudness = RidgeClassifier().fit(images.mean(axis=1, keepdims=True), digits)
    assert loudness.score(parts["test"][0].mean(axis=1, keepdims=True), parts["test"][1]) < 0.3


def test_pictures_are_enlarged() -> None:
    assert sample_pictures(torch.rand(2, 8, 8), 16).shape == (2, 1, 16, 16)
