from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifier

from datamodules import VideoAudioData
from datamodules.loading import Draw

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def data() -> VideoAudioData:
    found = VideoAudioData("av_mnist", eval_batch_size=300)
    start = time.perf_counter()
    found.setup("fit")
    assert time.perf_counter() - start < 30, "all spectrograms, once"
    return found


def test_the_set_has_the_sizes_described(data: VideoAudioData) -> None:
    clips: Any = data._clips
    sizes = {part: (len(pool.pictures), len(pool.sounds)) for part, pool in clips._pools.items()}
    assert sizes == {"train": (3600, 1380), "validate": (400, 120), "test": (1000, 300)}
    assert (data.image_shape, data.num_frames, data.num_classes) == ([1, 32, 32], 1, 10)
    assert [len(clips.rows(part)) for part in ("train", "validate", "test")] == [4000, 120, 300]
    assert len(VideoAudioData("av_mnist", pairing="fixed")._clips.rows("train")) == 1000  # type: ignore[arg-type]


def test_the_test_pairs_are_the_ready_made_ones(data: VideoAudioData) -> None:
    root = Path(os.environ["ZOO_DATA"])
    pictures, sounds = np.load(root / "mnist/mnist.npz"), np.load(root / "spoken_digits/spoken_digits.npz")
    batch = next(iter(data.test_dataloader()))
    assert np.array_equal(batch.labels.numpy(), sounds["test_y"])
    mean, std = data.standardization["video"]
    images = torch.from_numpy(pictures["x_test"][sounds["test_mnist_index"]]) / 255
    torch.testing.assert_close(batch.video[:, 0, 0, 2:-2, 2:-2], (images - mean) / std)
    assert len(set(batch.pair_ids.tolist())) == 300


def test_no_picture_and_no_recording_is_in_two_parts(data: VideoAudioData) -> None:
    parts = data._clips.source.parts.values()  # type: ignore[attr-defined]
    for names in ([part.picture_names for part in parts], [part.recordings.names for part in parts]):
        together = torch.cat(names).tolist()
        assert len(set(together)) == len(together)


def test_each_redrawn_pair_is_of_one_digit(data: VideoAudioData) -> None:
    clips: Any = data._clips
    pool, batch = clips._pools["train"], clips.rows("train")[Draw(torch.arange(1000), 5)]
    for images, own, digits in (
        (batch.video, pool.pictures, pool.digits),
        (batch.audio, pool.sounds, pool.sound_digits),
    ):
        nearest = torch.cdist(images.flatten(1), own.flatten(1)).argmin(dim=1)
        assert torch.equal(digits[nearest], batch.labels)


def test_digits_can_be_told_from_each_side(data: VideoAudioData) -> None:
    clips: Any = data._clips
    train, test = clips._pools["train"], clips._pools["test"]
    heard = RidgeClassifier(alpha=100).fit(train.sounds.flatten(1).numpy(), train.sound_digits.numpy())
    assert heard.score(test.sounds.flatten(1).numpy(), test.sound_digits.numpy()) > 0.85
    seen = RidgeClassifier(alpha=100).fit(train.pictures.flatten(1).numpy(), train.digits.numpy())
    assert seen.score(test.pictures.flatten(1).numpy(), test.digits.numpy()) > 0.8


def test_clips_of_three_digits_are_drawn_for_the_test() -> None:
    data = VideoAudioData("av_mnist", num_frames=3, eval_batch_size=300)
    batch = next(iter(data.test_dataloader()))
    assert batch.video.shape == batch.audio.shape == (300, 3, 1, 32, 32)
    assert len(set(batch.labels.tolist())) > 200
    other = next(iter(VideoAudioData("av_mnist", num_frames=3, pair_seed=5, eval_batch_size=300).test_dataloader()))
    assert torch.equal(batch.labels, other.labels)
