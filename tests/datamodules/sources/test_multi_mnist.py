from __future__ import annotations

import gzip
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from datamodules.image_tasks import ImageTaskData
from datamodules.sources.multi_mnist import overlay, read_idx, read_pictures

if TYPE_CHECKING:
    from pathlib import Path


def pictures(count: int, first: int = 1, size: int = 28) -> tuple[np.ndarray, np.ndarray]:
    """Picture k is all k (from `first` on), of class k % 10."""
    values = np.arange(first, first + count)
    return np.repeat(values.astype(np.uint8), size * size).reshape(count, size, size), values % 10


def write_npz(folder: Path, name: str = "mnist", **changes: Any) -> Path:
    x_train, y_train = pictures(40)
    x_test, y_test = pictures(10, 101)
    arrays = {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test, **changes}
    path = folder / name / f"{name}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def write_idx(path: Path, array: np.ndarray) -> None:
    content = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def test_pictures_lie_in_opposite_corners_under_a_maximum() -> None:
    rng = np.random.default_rng(0)
    left, right = (rng.integers(0, 256, (5, 28, 28), dtype=np.uint8) for _ in range(2))
    canvas = overlay(left, right, 4)
    assert canvas.shape == (5, 1, 36, 36)
    for pair in range(5):
        for row in range(36):
            for column in range(36):
                a = left[pair, row, column] if row < 28 and column < 28 else 0
                b = right[pair, row - 8, column - 8] if row >= 8 and column >= 8 else 0
                assert canvas[pair, 0, row, column] == max(a, b)


def test_pairs_show_their_labels_and_no_picture_is_in_two_parts(tmp_path: Path) -> None:
    write_npz(tmp_path)
    data = ImageTaskData("multi_mnist", data_dir=str(tmp_path), num_pairs=90, batch_size=90, eval_batch_size=50)
    seen = []
    for loader, count in ((data.train_dataloader(), 90), (data.val_dataloader(), 4), (data.test_dataloader(), 10)):
        (batch,) = list(loader)
        assert batch.images.shape == (count, 1, 36, 36)
        values = (batch.images * 255).round().long()
        lefts, rights = values[:, 0, 0, 0], values[:, 0, -1, -1]
        assert (lefts % 10).tolist() == batch.targets["left"].tolist()
        assert (rights % 10).tolist() == batch.targets["right"].tolist()
        seen.append((set(lefts.tolist()), set(rights.tolist())))
    (train, train_right), (validation, validation_right), (test, test_right) = seen
    assert train == train_right and validation == validation_right and test == test_right == set(range(101, 111))
    assert train | validation == set(range(1, 41)), "no picture is unused"
    assert not train & validation
    assert len(validation) == 4


def test_every_picture_is_on_either_side_equally_often_and_the_draw_is_fixed(tmp_path: Path) -> None:
    write_npz(tmp_path)
    first, second = (ImageTaskData("multi_mnist", data_dir=str(tmp_path), num_pairs=72, seed=s) for s in (1, 2))
    images = first._parts[0].images  # type: ignore[attr-defined]
    assert np.array_equal(images, second._parts[0].images)  # type: ignore[attr-defined]
    for corner in (images[:, 0, 0, 0], images[:, 0, -1, -1]):
        assert np.unique(corner, return_counts=True)[1].tolist() == [2] * 36
    assert (images[:, 0, 0, 0] != images[:, 0, -1, -1]).any()


def test_fashion_and_digits_lie_on_the_right_and_on_the_left(tmp_path: Path) -> None:
    write_npz(tmp_path)
    x_train, y_train = pictures(30, 200)
    x_test, y_test = pictures(12, 240)
    write_npz(tmp_path, "fashion_mnist", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    data = ImageTaskData("multi_fashion_mnist", data_dir=str(tmp_path))
    for loader, count in ((data.train_dataloader(), 36), (data.val_dataloader(), 4), (data.test_dataloader(), 10)):
        (batch,) = list(loader)
        assert len(batch.images) == count
        values = (batch.images * 255).round()
        assert float(values[:, 0, 0, 0].max()) < 200 <= float(values[:, 0, -1, -1].min())
    write_idx(tmp_path / "other" / "t10k-images-idx3-ubyte", x_test)
    write_idx(tmp_path / "other" / "t10k-labels-idx1-ubyte", y_test)
    with pytest.raises(FileNotFoundError, match=r"mnist is not in .*other: put"):
        ImageTaskData("multi_fashion_mnist", test_path=str(tmp_path / "other")).setup("test")


@pytest.mark.parametrize(("folder", "suffix"), [("mnist", ""), ("MNIST/raw", ".gz"), (".", ".gz")])
def test_the_original_files_give_what_the_archive_gives(tmp_path: Path, folder: str, suffix: str) -> None:
    archive = write_npz(tmp_path / "npz")
    arrays = np.load(archive)
    for part, stem in (("train", "train"), ("test", "t10k")):
        write_idx(tmp_path / folder / f"{stem}-images-idx3-ubyte{suffix}", arrays[f"x_{part}"])
        write_idx(tmp_path / folder / f"{stem}-labels-idx1-ubyte{suffix}", arrays[f"y_{part}"])
    for part in ("train", "test"):
        found = read_pictures("mnist", part, tmp_path, flat=True)
        assert np.array_equal(found.images, arrays[f"x_{part}"])
        assert np.array_equal(found.labels, arrays[f"y_{part}"])
        assert found.labels.dtype == np.int64


def test_test_path_takes_other_pictures_and_needs_no_training_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "nothing"))
    monkeypatch.delenv("ZOO_DATA", raising=False)
    x, y = pictures(6, 180)
    archive = tmp_path / "other.npz"
    np.savez(archive, x_test=x, y_test=y)
    write_idx(tmp_path / "raw" / "t10k-images-idx3-ubyte", x)
    write_idx(tmp_path / "raw" / "t10k-labels-idx1-ubyte", y)
    for path in (archive, tmp_path / "raw"):
        data = ImageTaskData("multi_fashion", test_path=str(path), num_eval=12)
        data.setup("test")
        (batch,) = list(data.test_dataloader())
        assert batch.images.shape == (12, 1, 36, 36)
        assert float((batch.images[:, 0, 0, 0] * 255).round().min()) == 180
        with pytest.raises(FileNotFoundError, match="fashion_mnist is not in"):
            data.train_dataloader()
    with pytest.raises(ValueError, match=r"other\.npz is one file: expected a folder with mnist and fashion_mnist"):
        ImageTaskData("multi_fashion_mnist", test_path=str(archive)).setup("test")


LABELS = pictures(40)[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_train": None}, r"mnist\.npz has no y_train: expected x_train, y_train, found"),
        ({"x_train": np.zeros((40, 28, 28))}, r"x_train has the dtype float64 and the shape \(40, 28, 28\): expected"),
        ({"x_train": np.zeros((40, 32, 32), np.uint8)}, r"expected uint8 \(pictures, 28, 28\)"),
        ({"x_train": np.zeros((40, 784), np.uint8)}, r"expected uint8 \(pictures, 28, 28\)"),
        ({"x_train": np.zeros((0, 28, 28), np.uint8)}, "x_train holds no image"),
        ({"y_train": LABELS[:-1]}, r"y_train has the dtype int64 and the shape \(39,\): expected integers \(40,\)"),
        ({"y_train": LABELS.astype(float)}, "y_train has the dtype float64"),
        ({"y_train": np.where(LABELS == 3, 10, LABELS)}, "y_train has the value 10 at 2: expected 0 to 9"),
        ({"y_train": np.where(LABELS == 4, -1, LABELS)}, "y_train has the value -1 at 3: expected 0 to 9"),
        ({"y_train": np.array([None] * 40)}, r"mnist\.npz is truncated or no \.npz file of numbers: .*pickle"),
        (
            {"x_train": np.zeros((9, 28, 28), np.uint8), "y_train": LABELS[:9]},
            "has 9 training pictures: expected at least 10",
        ),
    ],
)
def test_a_malformed_archive_is_refused_by_file_and_key(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_npz(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as refusal:
        ImageTaskData("multi_mnist", data_dir=str(tmp_path)).setup("fit")
    assert str(tmp_path) in str(refusal.value)


@pytest.mark.parametrize("keep", [0, 10, 3_000, -100])
def test_a_truncated_archive_is_refused(tmp_path: Path, keep: int) -> None:
    path = write_npz(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"mnist\.npz is truncated or no \.npz file"):
        ImageTaskData("multi_mnist", data_dir=str(tmp_path)).setup("fit")


def test_an_array_in_place_of_an_archive_is_refused(tmp_path: Path) -> None:
    path = write_npz(tmp_path)
    with path.open("wb") as file:
        np.save(file, LABELS)
    with pytest.raises(ValueError, match="one array, not an archive"):
        ImageTaskData("multi_mnist", data_dir=str(tmp_path)).setup("fit")


def test_missing_and_malformed_idx_files_are_refused(tmp_path: Path) -> None:
    x, y = pictures(12)
    folder = tmp_path / "mnist"
    with pytest.raises(FileNotFoundError, match=r"mnist is not in .*: put mnist/mnist\.npz there.*train-images-idx3"):
        read_pictures("mnist", "train", tmp_path, flat=True)
    write_idx(folder / "train-images-idx3-ubyte", x)
    with pytest.raises(FileNotFoundError, match=r"train-labels-idx1-ubyte \(or \.gz\) is missing beside"):
        read_pictures("mnist", "train", tmp_path, flat=True)
    write_idx(folder / "train-labels-idx1-ubyte", y[:-1])
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte has the dtype uint8 and the shape \(11,\)"):
        read_pictures("mnist", "train", tmp_path, flat=True)
    whole = (folder / "train-images-idx3-ubyte").read_bytes()
    bad = folder / "bad"
    for content, message in (
        (whole[:-1], r"bad has 9423 bytes: expected 9424, as its header says \(12, 28, 28\)"),
        (whole[:7], "bad is no idx file of images: expected it to begin with 0x00000803"),
        (b"\x00\x00\x08\x01" + whole[4:], "no idx file of images"),
    ):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_idx(bad, "images")
    zipped = folder / "bad.gz"
    for content in (whole, gzip.compress(whole)[:-12]):
        zipped.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.gz is truncated or not gzipped"):
            read_idx(zipped, "images")


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data_dir=.*nowhere is not a folder"):
        ImageTaskData("multi_mnist", data_dir=str(tmp_path / "nowhere")).setup("fit")
    with pytest.raises(FileNotFoundError, match=r"test_path=.*nowhere is missing: expected test images in the format"):
        ImageTaskData("multi_mnist", test_path=str(tmp_path / "nowhere")).setup("test")
