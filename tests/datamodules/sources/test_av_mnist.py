from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from datamodules.sources.av_mnist import Recordings, padded_pictures, read_av_mnist, resized, sound_pictures
from datamodules.sources.log_mel import LogMel

if TYPE_CHECKING:
    from pathlib import Path


def arrays() -> tuple[dict[str, Any], dict[str, Any]]:
    """Small files in the real formats: 20 pictures of each digit, 10 takes of 2 speakers."""
    rng = np.random.default_rng(0)
    pictures: dict[str, Any] = {"classes": np.array([str(d) for d in range(10)])}
    sounds: dict[str, Any] = {"speakers": np.array(["a", "b"]), "sample_rate": np.int64(8000)}
    for part, count, takes in (("train", 20, range(2, 12)), ("test", 5, range(2))):
        digits = np.arange(10 * count) % 10
        pictures[f"x_{part}"] = rng.integers(0, 256, (10 * count, 28, 28), dtype=np.uint8)
        pictures[f"y_{part}"] = digits.astype(np.int64)
        spoken, speaker, take = (
            grid.ravel() for grid in np.meshgrid(np.arange(10), np.arange(2), np.array(takes), indexing="ij")
        )
        lengths = rng.integers(1000, 3000, len(spoken))
        sounds[f"{part}_audio"] = rng.integers(-9000, 9000, int(lengths.sum())).astype(np.int16)
        sounds[f"{part}_offsets"] = np.concatenate([[0], lengths.cumsum()])
        sounds[f"{part}_y"], sounds[f"{part}_speaker"], sounds[f"{part}_take"] = spoken, speaker, take
        sounds[f"{part}_mnist_index"] = spoken + 10 * (np.arange(len(spoken)) % 4)
    return pictures, sounds


def write(folder: Path, pictures: dict[str, Any], sounds: dict[str, Any]) -> Path:
    for name, content in (("mnist", pictures), ("spoken_digits", sounds)):
        (folder / name).mkdir(exist_ok=True)
        np.savez(folder / name / f"{name}.npz", **content)
    return folder


def test_no_picture_and_no_take_is_in_two_parts(tmp_path: Path) -> None:
    pictures, sounds = arrays()
    found = read_av_mnist(write(tmp_path, pictures, sounds), 0.2)
    parts = found.parts
    assert [len(parts[name].pictures) for name in ("train", "validate", "test")] == [160, 40, 50]
    assert torch.bincount(parts["validate"].digits).tolist() == [4] * 10
    names = [set(part.picture_names.tolist()) for part in parts.values()]
    assert sum(map(len, names)) == len(set.union(*names)) == 250
    heard = [set(part.recordings.names.tolist()) for part in parts.values()]
    assert sum(map(len, heard)) == len(set.union(*heard)) == 240
    takes = torch.from_numpy(sounds["train_take"])
    assert {int(takes[name]) for name in parts["validate"].recordings.names} == {10, 11}
    assert {int(takes[name]) for name in parts["train"].recordings.names} == set(range(2, 10))
    # The names are places in the files: content and digit go with them.
    part = parts["validate"]
    images = torch.from_numpy(pictures["x_train"])[part.picture_names]
    assert torch.equal((part.pictures * 255).round().to(torch.uint8), images)
    recordings = part.recordings
    for row in (0, 17, 39):
        name = int(recordings.names[row])
        bounds = sounds["train_offsets"][name : name + 2]
        mine = recordings.waveform[recordings.offsets[row] : recordings.offsets[row + 1]]
        assert np.array_equal(mine.numpy() * 32768, sounds["train_audio"][bounds[0] : bounds[1]])
        assert int(recordings.digits[row]) == sounds["train_y"][name]


def test_ready_made_test_pairs_are_those_of_the_file(tmp_path: Path) -> None:
    pictures, sounds = arrays()
    found = read_av_mnist(write(tmp_path, pictures, sounds), 0.1)
    assert found.test_pictures is not None
    assert np.array_equal(found.test_pictures.numpy(), sounds["test_mnist_index"])


def test_missing_files_are_named_with_their_place(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"mnist/mnist.npz is missing: put it there \(x_train.*data_dir"):
        read_av_mnist(tmp_path, 0.1)
    write(tmp_path, *arrays())
    (tmp_path / "spoken_digits" / "spoken_digits.npz").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"spoken_digits/spoken_digits.npz is missing: put it there \(train_aud"
    ):
        read_av_mnist(tmp_path, 0.1)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("test_mnist_index", lambda x: x + 1, r"test recording 0 says 0, but its picture test_mnist_index=1.*shows 1"),
        ("test_mnist_index", lambda x: x + 1000, r"test_mnist_index goes from 1000 to .*has 50 test pictures"),
        ("train_audio", lambda x: x.astype(np.float32), r"train_audio is float32 .*expected int16 \(samples,\)"),
        ("train_audio", lambda x: x[:-1], r"train_offsets must increase from 0 to the \d+ samples of train_audio"),
        ("train_offsets", lambda x: x[::-1], r"train_offsets must increase"),
        ("train_y", lambda x: x + 1, r"train_y has the value 10 at \d+: expected 0 to 9"),
        ("train_y", lambda x: np.where(x == 4, 3, x), r"train_y has no digit 4"),
        ("train_take", lambda x: x[:5], r"train_take is int64 \(5,\), expected integers \(200,\)"),
        ("train_take", lambda x: np.where(np.arange(200) < 180, 1, 2), "leaves no recording for training of digits|"
         "leaves no recording for validation of digits"),
    ],
    ids=["unlike", "range", "dtype", "truncated", "order", "label", "absent", "takes", "lopsided"],
)  # fmt: skip
def test_malformed_recordings_are_refused(tmp_path: Path, key: str, value: Any, message: str) -> None:
    pictures, sounds = arrays()
    sounds[key] = value(sounds[key])
    with pytest.raises(ValueError, match=message):
        read_av_mnist(write(tmp_path, pictures, sounds), 0.1)


def test_malformed_pictures_and_a_truncated_file_are_refused(tmp_path: Path) -> None:
    pictures, sounds = arrays()
    write(tmp_path, pictures | {"x_train": pictures["x_train"][:, :20]}, sounds)
    with pytest.raises(ValueError, match=r"mnist.npz: x_train .*expected uint8 \(pictures, 28, 28\)"):
        read_av_mnist(tmp_path, 0.1)
    write(tmp_path, pictures, sounds)
    with pytest.raises(
        ValueError, match=r"validation_fraction=0.99 leaves none of the 20 training pictures of digit 0"
    ):
        read_av_mnist(tmp_path, 0.99)
    path = tmp_path / "spoken_digits" / "spoken_digits.npz"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"spoken_digits.npz is truncated"):
        read_av_mnist(tmp_path, 0.1)


def test_pictures_are_padded_by_background_before_they_are_resized() -> None:
    pictures = torch.rand(3, 28, 28) + 0.1
    padded = padded_pictures(pictures, 32)
    assert padded.shape == (3, 1, 32, 32)
    assert torch.equal(padded[:, 0, 2:-2, 2:-2], pictures)
    assert float(padded.sum()) == pytest.approx(float(pictures.sum()), rel=1e-6)
    assert torch.equal(padded_pictures(pictures, 48), resized(padded, 48))


def test_a_sound_has_the_same_picture_alone_and_in_company() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [900, 1000, 1023, 1024, 2500, 901]
    sounds = [torch.randn(length, generator=generator) * 0.1 for length in lengths]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    recordings = Recordings(torch.cat(sounds), offsets, torch.arange(6), torch.arange(6), 8000)
    log_mel = LogMel(8000, 256, 128, 32, frames=None)
    together = sound_pictures(recordings, log_mel, 128, 32)
    for row, sound in enumerate(sounds):
        spectrogram = log_mel(sound[None])[:, None]
        alone = torch.nn.functional.interpolate(spectrogram, (32, 32), mode="bilinear", align_corners=False)
        torch.testing.assert_close(together[row], alone[0], atol=1e-3, rtol=1e-4)


def test_low_tones_are_in_the_first_rows_and_time_runs_to_the_right() -> None:
    time = torch.arange(4000) / 8000
    low_then_high = torch.cat(
        [torch.sin(2 * torch.pi * 300 * time[:2000]), torch.sin(2 * torch.pi * 3000 * time[:2000])]
    )
    recordings = Recordings(low_then_high, torch.tensor([0, 4000]), torch.zeros(1).long(), torch.zeros(1).long(), 8000)
    picture = sound_pictures(recordings, LogMel(8000, 256, 128, 32, frames=None), 128, 32)[0, 0]
    assert int(picture[:, 5].argmax()) < 8 < 20 < int(picture[:, 26].argmax())
