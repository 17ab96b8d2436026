from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from datamodules.image_tasks import ImageTaskData
from datamodules.sources.image_task_sets import LAYOUTS, NpyTable, boundary_distance, read_camvid, split_camvid

if TYPE_CHECKING:
    from pathlib import Path

SIZES = {"cityscapes": (128, 256), "nyuv2": (288, 384)}


def write_set(root: Path, source: str, counts: tuple[int, int] = (3, 2), last: bool = True) -> dict[str, Any]:
    """A set in MTAN's files; `last`: channels last, as published, otherwise first. What was written, by file."""
    rng = np.random.default_rng(0)
    layout, (height, width) = LAYOUTS[source], SIZES[source]
    written = {}
    for part, count in zip(("train", "val"), counts, strict=True):
        for index in range(count):
            arrays = {
                "image": rng.random((height, width, 3), dtype=np.float32) * 1.5,
                layout.folders["segmentation"]: rng.integers(-1, layout.num_classes, (height, width)).astype(float),
                "depth": rng.random((height, width, 1)).astype(np.float32),
            }
            arrays["depth"][:5] = 0
            if "normals" in layout.folders:
                normals = rng.normal(size=(height, width, 3))
                arrays["normals"] = normals / np.linalg.norm(normals, axis=-1, keepdims=True)
            for kind, array in arrays.items():
                path = root / part / kind / f"{index}.npy"
                path.parent.mkdir(parents=True, exist_ok=True)
                first = np.moveaxis(array, -1, 0) if array.ndim == 3 else array
                np.save(path, array if last else np.ascontiguousarray(first))
                written[f"{part}/{kind}/{index}"] = first.astype(np.float32)
    return written


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("source", ["cityscapes", "nyuv2"])
def test_batches_hold_what_the_files_hold(tmp_path: Path, source: str, last: bool) -> None:
    written = write_set(tmp_path / source, source, last=last)
    data = ImageTaskData(source, data_dir=str(tmp_path), batch_size=3, eval_batch_size=2, augment=False)
    data.prepare_data()
    order = next(draw.indices.tolist() for draw in data.train_dataloader().sampler)
    height, width = SIZES[source]
    label = LAYOUTS[source].folders["segmentation"]
    val = data.val_dataloader()
    assert val.dataset.table is data.test_dataloader().dataset.table is data.predict_dataloader().dataset.table
    for part, rows, loader in (("train", order, data.train_dataloader()), ("val", [0, 1], val)):
        (batch,) = list(loader)
        assert batch.masks == {}
        assert batch.images.dtype == torch.float32
        assert batch.images.shape == (len(rows), 3, height, width)
        assert batch.targets["segmentation"].dtype == torch.int64
        assert batch.targets["segmentation"].shape == (len(rows), height, width)
        assert batch.targets["depth"].shape == (len(rows), 1, height, width)
        assert list(batch.targets) == data.task_names == list(LAYOUTS[source].folders)
        for place, row in enumerate(rows):
            assert np.array_equal(batch.images[place], written[f"{part}/image/{row}"])
            assert np.array_equal(batch.targets["segmentation"][place], written[f"{part}/{label}/{row}"])
            assert np.array_equal(batch.targets["depth"][place], written[f"{part}/depth/{row}"])
            if source == "nyuv2":
                assert np.array_equal(batch.targets["normals"][place], written[f"{part}/normals/{row}"])


def test_bytes_become_shares_of_white_and_other_tasks_need_no_files(tmp_path: Path) -> None:
    write_set(tmp_path, "cityscapes")
    grey = np.full((128, 256, 3), 51, np.uint8)
    np.save(tmp_path / "val" / "image" / "1.npy", grey)
    for file in tmp_path.glob("*/depth/*.npy"):
        file.unlink()
    data = ImageTaskData("cityscapes", data_dir=str(tmp_path), tasks=["segmentation"])
    (batch,) = list(data.val_dataloader())
    assert list(batch.targets) == ["segmentation"]
    assert batch.images[1].unique().tolist() == [pytest.approx(0.2)]
    assert float(batch.images[0].max()) > 1, "floating images are taken as they are"


def test_augmentation_is_for_training_and_for_these_sets_the_default(tmp_path: Path) -> None:
    written = write_set(tmp_path, "cityscapes", (12, 1))
    data = ImageTaskData("cityscapes", data_dir=str(tmp_path), batch_size=12)
    loader = data.train_dataloader()
    (batch,), (order,) = list(loader), [draw.indices.tolist() for draw in loader.sampler]
    same = [np.array_equal(batch.images[p], written[f"train/image/{row}"]) for p, row in enumerate(order)]
    assert 0 <= sum(same) < 8
    assert set(batch.targets["segmentation"].unique().tolist()) <= set(range(-1, 7))
    (untouched,) = list(data.val_dataloader())
    assert np.array_equal(untouched.images[0], written["val/image/0"])


def test_test_path_is_a_folder_of_images_or_one_with_a_validation_part(tmp_path: Path) -> None:
    written = write_set(tmp_path / "new", "cityscapes")
    for path, part, count in ((tmp_path / "new", "val", 2), (tmp_path / "new" / "train", "train", 3)):
        data = ImageTaskData("cityscapes", test_path=str(path))
        (batch,) = list(data.test_dataloader())
        assert len(batch.images) == count
        assert np.array_equal(batch.images[1], written[f"{part}/image/1"])


def change(name: str, array: Any) -> Any:
    return lambda root: np.save(root / name, array, allow_pickle=True)


def cut(name: str, keep: int) -> Any:
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:keep])


def spoil(name: str, value: float, *place: int) -> Any:
    def act(root: Path) -> None:
        array = np.load(root / name)
        array[place] = value
        np.save(root / name, array)

    return act


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda r: (r / "train/depth/1.npy").unlink(), FileNotFoundError, r"train/depth/1\.npy is missing \(1 of 3\)"),
        (lambda r: (r / "val/image/1.npy").unlink(), FileNotFoundError, r"val/image/1\.npy is missing \(1 of 2\)"),
        (
            lambda r: (r / "train/label_7/0.npy").rename(r / "train/label_7/7.npy"),
            FileNotFoundError,
            r"train/image/3\.npy is missing \(5 of 8\): expected 0\.npy to 7\.npy in each of image, label_7, depth",
        ),
        (
            lambda r: (r / "train/image/0.npy").rename(r / "train/image/00.npy"),
            ValueError,
            r"train/image/00\.npy is no number: expected files 0\.npy, 1\.npy",
        ),
        (
            lambda r: (r / "val/depth").rename(r / "val/dpeth"),
            FileNotFoundError,
            "val/depth is missing: expected .*val to hold the folders image, label_7, depth",
        ),
        (
            lambda r: [file.unlink() for file in r.glob("val/*/*.npy")],
            ValueError,
            r"val/image holds no image: expected 0\.npy, 1\.npy",
        ),
        pytest.param(
            cut("train/image/2.npy", 0), ValueError, r"train/image/2\.npy is truncated or no \.npy", id="empty"
        ),
        pytest.param(
            cut("train/image/2.npy", 20),
            ValueError,
            r"train/image/2\.npy is truncated or no \.npy",
            id="within the header",
        ),
        pytest.param(
            cut("train/image/2.npy", -1),
            ValueError,
            r"train/image/2\.npy is truncated or no \.npy",
            id="one byte short",
        ),
        (
            change("train/depth/0.npy", np.array([None])),
            ValueError,
            r"train/depth/0\.npy is truncated or no \.npy file of numbers: .*Python objects",
        ),
        (
            change("train/image/0.npy", np.zeros((3, 256, 128), np.float32)),
            ValueError,
            r"train/image/0\.npy has the shape \(3, 256, 128\): expected \(3, 128, 256\) or \(128, 256, 3\)",
        ),
        (
            change("train/label_7/0.npy", np.zeros((3, 128, 256))),
            ValueError,
            r"label_7/0\.npy has the shape \(3, 128, 256\): expected \(1, 128, 256\) or",
        ),
        (
            change("train/image/0.npy", np.zeros((128, 256, 3), np.int64)),
            ValueError,
            r"train/image/0\.npy has the dtype int64: expected floating numbers or uint8",
        ),
        (
            change("train/label_7/0.npy", np.zeros((128, 256), bool)),
            ValueError,
            r"label_7/0\.npy has the dtype bool: expected numbers",
        ),
        (
            spoil("train/label_7/1.npy", 7, 100, 9),
            ValueError,
            r"train/label_7/1\.npy has the value 7\.0 in channel 0, row 100, column 9: expected whole numbers from -1",
        ),
        (spoil("val/label_7/1.npy", -2, 0, 0), ValueError, r"val/label_7/1\.npy has the value -2\.0"),
        (spoil("train/label_7/1.npy", 255, 1, 1), ValueError, r"label_7/1\.npy has the value 255\.0"),
        (spoil("train/label_7/1.npy", 1.5, 1, 1), ValueError, r"label_7/1\.npy has the value 1\.5"),
        (spoil("train/label_7/1.npy", math.nan, 1, 1), ValueError, r"label_7/1\.npy has the value nan"),
        (
            spoil("train/depth/2.npy", -0.25, 3, 4, 0),
            ValueError,
            r"train/depth/2\.npy has the value -0\.25 in channel 0, row 3, column 4: expected finite numbers of at lea",
        ),
        (spoil("train/depth/2.npy", math.nan, 3, 4, 0), ValueError, r"depth/2\.npy has the value nan"),
        (spoil("train/depth/2.npy", math.inf, 3, 4, 0), ValueError, r"depth/2\.npy has the value inf"),
        (
            spoil("train/image/0.npy", math.nan, 3, 4, 2),
            ValueError,
            r"train/image/0\.npy has the value nan in channel 2, row 3, column 4: expected finite numbers",
        ),
    ],
)
def test_malformed_files_are_refused_by_name_before_training(
    tmp_path: Path, act: Any, error: type[Exception], message: str
) -> None:
    write_set(tmp_path, "cityscapes")
    act(tmp_path)
    with pytest.raises(error, match=message):
        ImageTaskData("cityscapes", data_dir=str(tmp_path)).prepare_data()


def test_normals_beyond_the_unit_sphere_and_values_beyond_float32_are_refused(tmp_path: Path) -> None:
    write_set(tmp_path, "nyuv2", (1, 1))
    spoil("train/normals/0.npy", 2.0, 5, 6, 1)(tmp_path)
    data = ImageTaskData("nyuv2", data_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"normals/0\.npy has the value 2\.0 in channel 1, row 5, column 6: expected"):
        next(iter(data.train_dataloader()))
    np.save(tmp_path / "val" / "depth" / "0.npy", np.full((288, 384), 1e300))
    with pytest.raises(ValueError, match=r"depth/0\.npy has the value inf"):
        NpyTable(tmp_path / "val", LAYOUTS["nyuv2"], ["depth"]).check()


def test_a_set_that_is_not_there_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"put MTAN's .* cityscapes/\{train,val\}/\{image,label_7,depth\}/"):
        ImageTaskData("cityscapes", data_dir=str(tmp_path)).setup("fit")
    with pytest.raises(FileNotFoundError, match=r"camvid_small\.npz is not in .*: put camvid_small/camvid_small\.npz"):
        ImageTaskData("camvid", data_dir=str(tmp_path)).setup("fit")


def test_boundary_distances_equal_a_brute_force_search() -> None:
    rng = np.random.default_rng(1)
    classes = rng.integers(0, 3, (3, 3, 4)).repeat(4, axis=1).repeat(3, axis=2).astype(np.uint8)
    classes[1, :6, :4] = 11
    classes[2] = 5
    found = boundary_distance(classes, void=11)
    assert found.dtype == np.float32
    assert found.shape == (3, 1, 12, 12)
    places = [(row, column) for row in range(12) for column in range(12)]
    for image, distances in zip(classes, found[:, 0], strict=True):
        for place in places:
            others = [math.dist(place, other) for other in places if image[other] != image[place]]
            expected = 0.0 if image[place] == 11 or not others else min(others)
            assert distances[place] == pytest.approx(expected, rel=1e-6)
    assert found[:2][classes[:2, None] != 11].min() == 1


def write_camvid(folder: Path, **changes: Any) -> Path:
    rng = np.random.default_rng(0)
    names = [f"a1_{k:03d}.png" for k in range(9)] + [f"a_{k:03d}.png" for k in range(17)]
    order = rng.permutation(26)
    arrays = {
        "x_train": rng.integers(0, 256, (26, 6, 8, 3), dtype=np.uint8),
        "seg_train": rng.integers(0, 12, (26, 6, 8), dtype=np.uint8),
        "frame_train": np.array(names)[order],
        "x_test": rng.integers(0, 256, (4, 6, 8, 3), dtype=np.uint8),
        "seg_test": rng.integers(0, 12, (4, 6, 8), dtype=np.uint8),
        **changes,
    }
    path = folder / "camvid_small.npz"
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def test_camvid_holds_out_the_end_of_each_drive_and_ignores_void(tmp_path: Path) -> None:
    path = write_camvid(tmp_path)
    arrays = np.load(path)
    rows, held_out = split_camvid(path, 26)
    frames = arrays["frame_train"]
    assert frames[held_out].tolist() == ["a_015.png", "a_016.png", "a1_008.png"]
    assert sorted([*rows, *held_out]) == list(range(26))
    data = ImageTaskData("camvid", data_dir=str(tmp_path))
    assert [(t["name"], t["kind"], t["num_outputs"]) for t in data.tasks] == [
        ("segmentation", "segmentation", 11),
        ("boundary", "depth", 1),
    ]
    (batch,), (test,) = list(data.val_dataloader()), list(data.test_dataloader())
    for found, images, classes in (
        (batch, arrays["x_train"][held_out], arrays["seg_train"][held_out]),
        (test, arrays["x_test"], arrays["seg_test"]),
    ):
        assert np.allclose(found.images, images.transpose(0, 3, 1, 2) / 255, atol=1e-7)
        assert np.array_equal(found.targets["segmentation"], np.where(classes == 11, -1, classes.astype(int)))
        assert np.array_equal(found.targets["boundary"], boundary_distance(classes, 11))
    other = write_camvid(tmp_path, x_train=None, seg_train=None, frame_train=None)
    assert len(ImageTaskData("camvid", test_path=str(other)).test_dataloader()) == 1
    assert list(read_camvid(other, "test", ["boundary"]).targets) == ["boundary"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seg_train": None}, "has no seg_train: expected x_train, seg_train, found"),
        ({"x_train": np.zeros((26, 6, 8, 3))}, "x_train has the dtype float64 .* expected uint8"),
        ({"x_train": np.zeros((26, 3, 6, 8), np.uint8)}, r"the shape \(26, 3, 6, 8\): expected uint8 \(images, height"),
        ({"x_train": np.zeros((0, 6, 8, 3), np.uint8)}, "x_train holds no image"),
        (
            {"seg_train": np.zeros((26, 6, 9), np.uint8)},
            r"seg_train has .* the shape \(26, 6, 9\): expected uint8 \(26",
        ),
        ({"seg_train": np.zeros((26, 6, 8), np.int64)}, "seg_train has the dtype int64"),
        ({"seg_train": np.full((26, 6, 8), 12, np.uint8)}, "seg_train has the value 12 at image 0, row 0, column 0"),
        ({"frame_train": np.array(["a_1"] * 7)}, r"frame_train has .* the shape \(7,\): expected \(26,\) names"),
        ({"frame_train": np.array([f"{k}_0" for k in range(26)])}, "at most 1 of one drive: expected a drive of at"),
    ],
)
def test_a_malformed_camvid_is_refused_by_key(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_camvid(tmp_path, **changes)
    with pytest.raises(ValueError, match=rf"camvid_small\.npz.*{message}"):
        ImageTaskData("camvid", data_dir=str(tmp_path)).setup("fit")


def test_a_truncated_camvid_is_refused(tmp_path: Path) -> None:
    path = write_camvid(tmp_path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"camvid_small\.npz is truncated or no \.npz file"):
        ImageTaskData("camvid", data_dir=str(tmp_path)).setup("fit")
