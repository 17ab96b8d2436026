from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from datamodules import VideoAudioData
from datamodules.loading import Draw
from datamodules.sources.av_files import TensorClips, read_pairs
from tests.datamodules.sources.av_folders import SHAPE, write_pairs

if TYPE_CHECKING:
    from pathlib import Path


def changed(value: torch.Tensor, row: int, to: float) -> torch.Tensor:
    value = value.clone()
    value[row, 1, 0, 2, 3] = to
    return value


@pytest.mark.parametrize("kind", ["pt", "npy", "safetensors"])
def test_a_folder_is_read_in_each_of_its_formats(tmp_path: Path, kind: str) -> None:
    folder = write_pairs(tmp_path / "pairs")
    tensors = {
        name: torch.load(folder / f"{name}.pt", weights_only=True) for name in ("video", "audio", "label", "pair_id")
    }
    if kind != "pt":
        for name, tensor in tensors.items():
            (folder / f"{name}.pt").unlink()
            if kind == "npy":
                np.save(folder / f"{name}.npy", tensor.numpy())
    if kind == "safetensors":
        save_file(tensors, folder / "pairs.safetensors")
    table = read_pairs(folder, standardize=True)
    for found, written in zip(table, (tensors[n] for n in ("video", "audio", "pair_id", "label")), strict=True):
        assert torch.equal(found, written)


def test_labels_and_pair_ids_may_be_absent(tmp_path: Path) -> None:
    table = read_pairs(write_pairs(tmp_path / "pairs", label=None, pair_id=None), standardize=True)
    assert table.labels.tolist() == [-1] * 40
    assert table.pair_ids.tolist() == list(range(40))
    assert VideoAudioData(path=str(tmp_path / "pairs")).num_classes == 0


AUDIO = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"audio": AUDIO[..., :10]}, r"video has the shape \(40, 2, 1, 8, 12\) and audio \(40, 2, 1, 8, 10\): audio "
         "must be rendered to the frame size"),
        ({"audio": AUDIO[0]}, r"audio has the shape \(2, 1, 8, 12\), expected \(clips, frames, channels, height"),
        ({"audio": changed(AUDIO, 7, float("nan"))}, r"audio has the value nan in row 7.*a logarithm of 0 needs"),
        ({"audio": changed(AUDIO, 9, -float("inf"))}, r"audio has the value -inf in row 9"),
        ({"video": changed(AUDIO, 39, float("nan"))}, r"video has the value nan in row 39"),
        ({"audio": AUDIO.long()}, r"audio has the dtype torch.int64, expected floats or uint8"),
        ({"label": torch.arange(39)}, r"label has .* the shape \(39,\), expected integers \(40,\)"),
        ({"label": torch.arange(40) - 3}, r"label is -3 in row 0, expected at least -1"),
        ({"pair_id": torch.arange(40.0)}, r"pair_id has the dtype torch.float32"),
        ({"pair_id": torch.arange(40) - 1}, r"pair_id is -1 in row 0, expected at least 0"),
    ],
    ids=["shapes", "dims", "nan", "inf", "video", "dtype", "labels", "label", "pairs", "pair"],
)  # fmt: skip
def test_unusable_tensors_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_pairs(write_pairs(tmp_path / "pairs", **changes), standardize=True)


def test_values_that_are_not_normalised_are_refused_where_nobody_will_standardise_them(tmp_path: Path) -> None:
    for number, changes in enumerate(({}, {"video": AUDIO * 30, "audio": AUDIO}, {"video": AUDIO})):
        folder = write_pairs(tmp_path / str(number), **changes)
        read_pairs(folder, standardize=True)
        with pytest.raises(ValueError, match="normalise first"):
            read_pairs(folder, standardize=False)
    ready = VideoAudioData(path=str(write_pairs(tmp_path / "ready", video=AUDIO, audio=AUDIO)), standardize=False)
    batch = next(iter(ready.val_dataloader()))
    assert torch.equal(batch.video, AUDIO[batch.pair_ids]) and torch.equal(batch.audio, AUDIO[batch.pair_ids])
    assert ready.standardization == {"video": (0.0, 1.0), "audio": (0.0, 1.0)}


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "pairs", audio=None)
    with pytest.raises(FileNotFoundError, match=r"pairs has no audio.pt or audio.npy"):
        read_pairs(folder, standardize=True)
    (folder / "audio.pt").write_bytes((folder / "video.pt").read_bytes()[:300])
    with pytest.raises(ValueError, match=r"audio.pt is truncated or holds more than a tensor"):
        read_pairs(folder, standardize=True)
    torch.save({"audio": AUDIO}, folder / "audio.pt")
    with pytest.raises(ValueError, match=r"audio.pt holds a dict, expected a tensor"):
        read_pairs(folder, standardize=True)
    np.save(folder / "audio.npy", AUDIO.numpy())
    with pytest.raises(ValueError, match=r"pairs has audio.pt and audio.npy: keep one of the two"):
        read_pairs(folder, standardize=True)
    (folder / "audio.pt").unlink()
    (folder / "audio.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"audio.npy is truncated or no .npy file"):
        read_pairs(folder, standardize=True)
    np.save(folder / "audio.npy", np.array(["a"]))
    with pytest.raises(ValueError, match=r"audio.npy has the dtype <U1"):
        read_pairs(folder, standardize=True)
    (folder / "pairs.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"pairs.safetensors is truncated or no safetensors file"):
        read_pairs(folder, standardize=True)
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder: expected one with video.pt"):
        read_pairs(tmp_path / "nowhere", standardize=True)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("run",))


def test_nothing_in_a_file_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_pairs(tmp_path / "pairs")
    torch.save(Harmful(), folder / "audio.pt")
    with pytest.raises(ValueError, match=r"audio.pt is truncated or holds more than a tensor"):
        read_pairs(folder, standardize=True)
    assert "run" not in capsys.readouterr().out


def test_the_training_part_has_mean_zero_and_deviation_one(tmp_path: Path) -> None:
    clips = TensorClips(write_pairs(tmp_path / "pairs"), 0.2, 0, True, hold_out_test=True)
    sizes = {part: len(clips.rows(part)) for part in ("train", "validate", "test")}
    assert sizes == {"train": 24, "validate": 8, "test": 8}
    batch = clips.rows("train")[Draw(torch.arange(24), 0)]
    for values in batch[:2]:
        assert float(values.mean()) == pytest.approx(0, abs=1e-4)
        assert float(values.std(correction=0)) == pytest.approx(1, abs=1e-4)
    seen = [clips.rows(part)[Draw(torch.arange(size), 0)].pair_ids.tolist() for part, size in sizes.items()]
    assert sorted(i for ids in seen for i in ids) == list(range(40)), "every pair is in one part"
    assert len(TensorClips(tmp_path / "pairs", 0.2, 0, True, hold_out_test=False).rows("train")) == 32


def test_duplicate_pairs_are_counted_and_stay_together(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="datamodules.video_audio_rows")
    folder = write_pairs(tmp_path / "pairs", pair_id=torch.arange(40) // 2)
    clips = TensorClips(folder, 0.2, 0, True, hold_out_test=True)
    assert caplog.text.count("20 of 40 rows have the pair_id of an earlier row") == 1
    ids = clips.rows("validate")[Draw(torch.arange(8), 0)].pair_ids.tolist()
    assert sorted(ids) == sorted([i for i in set(ids) for _ in range(2)])


def test_other_pairs_to_test_on_are_standardised_as_the_training_was(tmp_path: Path) -> None:
    train, new = write_pairs(tmp_path / "train"), write_pairs(tmp_path / "new", audio=AUDIO + 5)
    data = VideoAudioData(path=str(train), test_path=str(new), eval_batch_size=40)
    batch = next(iter(data.test_dataloader()))
    mean, std = data.standardization["audio"]
    torch.testing.assert_close(batch.audio, (AUDIO + 5 - mean) / std)
    assert batch.labels.tolist() == [row % 4 for row in range(40)]
    small = write_pairs(tmp_path / "small", video=AUDIO[..., :10], audio=AUDIO[..., :10])
    with pytest.raises(ValueError, match=r"small has clips of the shape \(2, 1, 8, 10\), the training \(2, 1, 8, 12\)"):
        VideoAudioData(path=str(train), test_path=str(small)).test_dataloader()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 3}, "num_frames=3, but clips of .*pairs have 2"),
        ({"channels": 3}, "channels=3, but clips of .*pairs have 1"),
        ({"image_size": 8}, "image_size=8, but clips of .*pairs have 8 x 12"),
    ],
    ids=["frames", "channels", "size"],
)
def test_a_shape_that_the_folder_has_not_is_refused(tmp_path: Path, options: dict[str, int], message: str) -> None:
    data = VideoAudioData(path=str(write_pairs(tmp_path / "pairs")), **options)
    with pytest.raises(ValueError, match=message):
        data.setup("fit")
