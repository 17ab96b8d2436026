from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from datamodules.sources.classification_sets import DIGIT_TASKS, DigitSets, MemorySets, NpzSets, fit_size, match_classes

if TYPE_CHECKING:
    from pathlib import Path


def write_npz(path: Path, **changes: Any) -> Path:
    """Four training and two test pictures of three classes."""
    pixels = np.arange(6 * 4 * 4, dtype=np.uint8).reshape(6, 4, 4)
    arrays = {
        "x_train": pixels[:4],
        "y_train": np.array([0, 1, 2, 1]),
        "x_test": pixels[4:],
        "y_test": np.array([2, 0]),
        "classes": np.array(["ant", "bee", "cow"]),
        **changes,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def test_digit_tasks_are_the_transforms_of_one_cut_of_the_digits() -> None:
    from sklearn.datasets import load_digits

    pixels, known = load_digits(return_X_y=True)
    by_bytes = {picture.astype(np.uint8).tobytes(): int(label) for picture, label in zip(pixels, known, strict=True)}
    sets, small = DigitSets(20), DigitSets(8)
    assert sets.names() == list(DIGIT_TASKS)
    seen = []
    for part, count in (("train", 1_197), ("test", 600)):
        found = {task: sets.read(task, part) for task in DIGIT_TASKS}
        plain = small.read("upright", part)
        sixteenths = (plain.images[:, 0].double() / 255 * 16).round().to(torch.uint8).numpy()
        assert [by_bytes[picture.tobytes()] for picture in sixteenths] == plain.labels.tolist()
        seen += [picture.tobytes() for picture in sixteenths]
        upright = found["upright"].images
        assert upright.shape == (count, 1, 20, 20)
        large = F.interpolate(plain.images.double(), size=(20, 20), mode="bilinear", align_corners=False)
        assert (upright.double() - large).abs().max() <= 0.51
        for row in range(0, count, 199):
            for i in range(20):
                for j in range(20):
                    pixel = upright[row, 0, i, j]
                    assert found["rotated"].images[row, 0, 19 - j, i] == 255 - pixel
                    assert found["parity"].images[row, 0, i, 19 - j] == pixel
        half = F.interpolate(plain.images.double(), size=(10, 10), mode="bilinear", align_corners=False)
        halved = found["halved"].images[:, 0].double()
        assert (halved[:, 5:15, 5:15] - half[:, 0].flip(1, 2)).abs().max() <= 0.51
        assert halved.sum() == halved[:, 5:15, 5:15].sum()
        for task in DIGIT_TASKS:
            expected = plain.labels % 2 if task == "parity" else plain.labels
            assert torch.equal(found[task].labels, expected)
            assert len(sets.classes(task)) == int(expected.max()) + 1
            assert found[task].images.dtype == torch.uint8
    assert sets.classes("parity") == ["even", "odd"], "the label 1 is odd"
    assert len(set(seen)) == 1_797, "no digit is in both parts, and none is missing"


def test_the_noise_is_gaussian_of_deviation_0_3_and_always_the_same() -> None:
    sets = DigitSets(20)
    noisy, plain = sets.read("noisy", "train").images, sets.read("upright", "train").images.transpose(-2, -1)
    assert torch.equal(noisy, DigitSets(20).read("noisy", "train").images)
    # In the middle of the range few values are cut off; on black a half of a normal distribution is left.
    middle = (plain > 120) & (plain < 135)
    difference = (noisy[middle].double() - plain[middle].double()) / 255
    assert float(difference.mean()) == pytest.approx(0, abs=0.01)
    kept = difference.abs() < 0.3
    assert float(kept.double().mean()) == pytest.approx(0.683, abs=0.01)
    black = noisy[plain == 0].double() / 255
    assert float((black == 0).double().mean()) == pytest.approx(0.5, abs=0.01)
    assert float(black.mean()) == pytest.approx(0.3 / (2 * torch.pi) ** 0.5, abs=0.005)


@pytest.mark.parametrize(("height", "width", "box"), [(28, 28, (2, 2)), (24, 27, (4, 2)), (32, 32, (0, 0))])
def test_a_grey_picture_that_is_a_little_small_gets_a_black_frame(
    height: int, width: int, box: tuple[int, int]
) -> None:
    images = torch.randint(1, 256, (5, 1, height, width), dtype=torch.uint8)
    framed = fit_size(images, 32, frame=True)
    top, left = box
    assert torch.equal(framed[:, :, top : top + height, left : left + width], images)
    assert int((framed > 0).sum()) == images.numel()


@pytest.mark.parametrize("shape", [(1, 23, 28), (1, 40, 32), (1, 33, 30), (3, 28, 28), (3, 64, 64), (3, 20, 48)])
def test_other_pictures_are_resized_without_aliasing(shape: tuple[int, int, int]) -> None:
    images = torch.randint(0, 256, (300, *shape), dtype=torch.uint8)
    resized = fit_size(images, 32, frame=shape[0] == 1)
    assert resized.shape == (300, shape[0], 32, 32) and resized.dtype == torch.uint8
    exact = F.interpolate(images.double(), size=(32, 32), mode="bilinear", antialias=True, align_corners=False)
    assert (resized.double() - exact).abs().max() <= 0.51
    assert (fit_size(torch.full((1, *shape), 77, dtype=torch.uint8), 32, frame=False) == 77).all()


def test_a_file_is_read_in_a_folder_of_its_own_or_beside_others(tmp_path: Path) -> None:
    write_npz(tmp_path / "bugs" / "bugs.npz")
    colour = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    write_npz(tmp_path / "flat.npz", x_test=colour)
    write_npz(tmp_path / "bugs" / "other.npz")
    sets = NpzSets(tmp_path)
    assert sets.names() == ["bugs", "flat"]
    assert sets.classes("bugs") == ["ant", "bee", "cow"]
    train = sets.read("bugs", "train")
    assert train.images.shape == (4, 1, 4, 4) and train.images[2, 0, 1].tolist() == [36, 37, 38, 39]
    assert train.labels.tolist() == [0, 1, 2, 1] and train.labels.dtype == torch.int64
    images = sets.read("flat", "test").images
    assert images.shape == (2, 3, 4, 5) and images[1, 2, 3, 4] == colour[1, 3, 4, 2]
    with pytest.raises(FileNotFoundError, match=r"task 'wasps' is not in .*wasps/wasps\.npz.*found bugs, flat"):
        sets.read("wasps", "test")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_test": None}, "has no x_test: expected x_test, y_test, found x_train"),
        ({"classes": None}, "has no classes: expected classes, found x_train"),
        ({"x_test": np.zeros((2, 4, 4))}, r"x_test has the dtype float64 and the shape \(2, 4, 4\): expected uint8"),
        ({"x_test": np.zeros((2, 3, 4, 4), np.uint8)}, r"x_test has the dtype uint8 and the shape \(2, 3, 4, 4\)"),
        ({"x_test": np.zeros((2, 16), np.uint8)}, r"x_test has the dtype uint8 and the shape \(2, 16\)"),
        ({"x_test": np.zeros((0, 4, 4), np.uint8)}, r"x_test holds no image: its shape is \(0, 4, 4\)"),
        ({"y_test": np.array([0, 1, 2])}, r"y_test has the dtype int64 and the shape \(3,\): expected integers \(2,\)"),
        ({"y_test": np.array([0.0, 1.0])}, r"y_test has the dtype float64 and the shape \(2,\): expected integers"),
        ({"y_test": np.array([0, 3])}, "y_test has the value 3 at 1: expected 0 to 2, as there are 3 classes"),
        ({"y_test": np.array([-1, 0])}, "y_test has the value -1 at 0: expected 0 to 2"),
        ({"classes": np.array([1, 2, 3])}, "classes has the dtype int64 and the shape"),
        ({"classes": np.array(["ant"])}, "expected the names of at least two classes"),
        ({"classes": np.array(["ant", "bee", "ant"])}, "classes has 'ant' twice: expected different names"),
        ({"x_test": np.array([{}, {}])}, "truncated or no .npz file of numbers"),
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_the_key(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_npz(tmp_path / "bugs.npz", **changes)
    with pytest.raises(ValueError, match=message) as error:
        NpzSets(tmp_path).read("bugs", "test")
    assert "bugs.npz" in str(error.value)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "bugs.npz")
    content = path.read_bytes()
    for length in (0, 10, len(content) // 2, len(content) - 10):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"bugs\.npz is truncated or no \.npz file"):
            NpzSets(tmp_path).read("bugs", "test")


def test_memory_takes_every_usual_layout() -> None:
    grey = torch.randint(0, 256, (4, 6, 6), dtype=torch.uint8)
    colour = torch.randint(0, 256, (4, 6, 6, 3), dtype=torch.uint8)
    labels = torch.tensor([0, 3, 1, 1], dtype=torch.int32)
    layouts = {"a": grey, "b": grey[:, None], "c": grey[..., None], "d": colour, "e": colour.permute(0, 3, 1, 2)}
    sets = MemorySets({task: {"train": (images, labels)} for task, images in layouts.items()})
    assert sets.names() == list("abcde")
    for task in layouts:
        found = sets.read(task, "train")
        expected = grey[:, None] if task in "abc" else colour.permute(0, 3, 1, 2)
        assert torch.equal(found.images, expected)
        assert torch.equal(found.labels, labels.long()) and found.labels.dtype == torch.int64
        assert sets.classes(task) == ["0", "1", "2", "3"]
    named = MemorySets({"a": {"test": (grey, labels)}}, {"a": list("wxyz")})
    assert named.classes("a") == list("wxyz")
    with pytest.raises(ValueError, match="task 'a' has no part 'train': it has test"):
        named.read("a", "train")


@pytest.mark.parametrize(
    ("parts", "names", "message"),
    [
        ({"train": (torch.rand(2, 4, 4), torch.zeros(2, dtype=torch.long))}, None, "images of train has the dtype"),
        ({"test": (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.long))}, None, "labels of test"),
        ({"dev": (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2))}, None, "the parts dev: expected train and"),
        ({}, None, "task 'a' has the parts none"),
        (
            {"test": (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.tensor([0, 2]))},
            {"a": ["x", "y"]},
            "has the value 2 at 1: expected 0 to 1",
        ),
        ({"test": (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2))}, {"b": []}, "class_names has no 'a'"),
    ],
)
def test_bad_tensors_are_refused_by_task_and_part(parts: Any, names: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemorySets({"a": parts}, names)


def test_classes_are_matched_by_name_and_unknown_ones_counted(tmp_path: Path) -> None:
    known = ["ant", "bee", "cow"]
    write_npz(tmp_path / "same.npz", classes=np.array(["cow", "ant", "bee"]))
    found = match_classes(NpzSets(tmp_path), "same", known)
    assert found.labels.tolist() == [1, 2]
    write_npz(tmp_path / "more.npz", classes=np.array(["bee", "cow", "dog"]))
    with pytest.warns(UserWarning, match="'more': 1 of 2 test images are left out, as training knows no class dog"):
        found = match_classes(NpzSets(tmp_path), "more", known)
    assert found.labels.tolist() == [1]
    assert torch.equal(found.images, NpzSets(tmp_path).read("more", "test").images[1:])
    write_npz(tmp_path / "none.npz", classes=np.array(["dog", "eel", "fox"]))
    with pytest.raises(ValueError, match="the classes dog, eel, fox, none of ant, bee, cow"):
        match_classes(NpzSets(tmp_path), "none", known)
