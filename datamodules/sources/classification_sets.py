"""Sets of labelled images, one a task: `.npz` files, tensors in memory, and five tasks made of real digits."""

from __future__ import annotations

import warnings
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.nn import functional as F

from datamodules.sources.image_task_sets import read_npz

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

EIGHT_TASKS = ("mnist", "fashion_mnist", "kmnist", "notmnist", "cifar10", "gtsrb", "eurosat", "fer2013")
"""The `.npz` sets that are taken by default."""

DIGIT_TASKS = ("upright", "rotated", "parity", "halved", "noisy")
"""The tasks made of scikit-learn's digits."""

_FRAME = 8  # a picture that gets a frame lacks at most so many rows and columns
_CHUNK = 256  # images resized at a time
_DIGIT_WHITE, _DIGIT_SIZE = 16, 8
_TEST_DIGITS = 600
_NOISE = 0.3


class LabelledImages(NamedTuple):
    """Images of one task and their classes.

    Attributes:
        images: uint8 `(images, 1 or 3, height, width)`.
        labels: int64 `(images,)`.
    """

    images: Tensor
    labels: Tensor


class TaskSets(Protocol):
    """Sets of images by the name of their task, wherever they are."""

    def names(self) -> list[str]:
        """The tasks that there are."""

    def classes(self, task: str) -> list[str]:
        """Names of the classes of a task, in the order of the labels."""

    def read(self, task: str, part: str) -> LabelledImages:
        """The part "train" or "test" of a task."""


def check_images(images: NDArray[Any], labels: NDArray[Any], num_classes: int, names: tuple[str, str]) -> None:
    """Refuse what is not a set of grey or colour images with a class each.

    Args:
        images: Should be uint8 `(images, height, width)` or `(images, height, width, 3)`.
        labels: Should be integers `(images,)`, from 0 to `num_classes - 1`.
        num_classes: Number of classes.
        names: Where images and labels come from, for the message.

    Raises:
        ValueError: If they are not.
    """
    x, y = names
    colour = images.ndim == 4 and images.shape[-1] == 3
    if images.dtype != np.uint8 or not (colour or images.ndim == 3):
        raise ValueError(
            f"{x} has the dtype {images.dtype} and the shape {images.shape}: expected uint8 (images, height, width) or "
            "(images, height, width, 3)"
        )
    if not images.size:
        raise ValueError(f"{x} holds no image: its shape is {images.shape}, expected at least one")
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
        raise ValueError(
            f"{y} has the dtype {labels.dtype} and the shape {labels.shape}: expected integers ({len(images)},), one "
            f"for each image of {x}"
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise ValueError(
            f"{y} has the value {labels[wrong[0]]} at {wrong[0]}: expected 0 to {num_classes - 1}, as there are "
            f"{num_classes} classes"
        )


def match_classes(sets: TaskSets, task: str, classes: Sequence[str]) -> LabelledImages:
    """Test images of other sets, with the labels of known classes.

    Images of unknown classes are left out, with a warning that counts them.

    Args:
        sets: Where they come from.
        task: Its name.
        classes: Names of the known classes, in the order of their labels.

    Raises:
        FileNotFoundError: If the task is not there.
        ValueError: If it is malformed, or none of its classes is known.
    """
    found, names = sets.read(task, "test"), sets.classes(task)
    places = {name: label for label, name in enumerate(classes)}
    labels = torch.tensor([places.get(name, -1) for name in names])[found.labels]
    unknown = labels < 0
    if unknown.all():
        raise ValueError(f"task {task!r}: test images have the classes {_some(names)}, none of {_some(classes)}")
    if not unknown.any():
        return LabelledImages(found.images, labels)
    lost = [name for name in names if name not in places]
    warnings.warn(
        f"task {task!r}: {int(unknown.sum())} of {len(labels)} test images are left out, as training knows no class "
        f"{_some(lost)}",
        stacklevel=2,
    )
    return LabelledImages(found.images[~unknown], labels[~unknown])


def _some(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _labelled(images: NDArray[np.uint8], labels: NDArray[Any]) -> LabelledImages:
    """Channels last, or no channel, to channels first."""
    images = images[:, None] if images.ndim == 3 else np.moveaxis(images, -1, 1)
    return LabelledImages(
        torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels.astype(np.int64, copy=False))
    )


class NpzSets:
    """Sets in files `<task>/<task>.npz` or `<task>.npz` with `x_train`, `y_train`, `x_test`, `y_test`, `classes`.

    Images are uint8 `(images, height, width)` or `(images, height, width, 3)`, labels integers from 0, and `classes`
    the names of the classes in their order. Only the arrays that are asked for are read.

    Args:
        root: Their folder; a single file serves every task.
        option: What the user calls the folder, for messages.
    """

    def __init__(self, root: Path, option: str = "data_dir or ZOO_DATA") -> None:
        self.root, self.option = root, option

    def names(self) -> list[str]:
        """Tasks that have a file."""
        files = [*self.root.glob("[!.]*.npz"), *self.root.glob("[!.]*/*.npz")]
        return sorted({file.stem for file in files if file.parent in (self.root, self.root / file.stem)})

    def path(self, task: str) -> Path:
        """The file of a task.

        Raises:
            FileNotFoundError: If there is none.
        """
        for file in (self.root, self.root / task / f"{task}.npz", self.root / f"{task}.npz"):
            if file.is_file():
                return file
        raise FileNotFoundError(
            f"task {task!r} is not in {self.root}: put {task}/{task}.npz there (x_train, y_train, x_test, y_test, "
            f"classes), or name the folder in {self.option}; found {', '.join(self.names()) or 'no .npz file'}"
        )

    def classes(self, task: str) -> list[str]:
        """Names of the classes.

        Raises:
            FileNotFoundError: If there is no file.
            ValueError: If it is damaged, or they are no list of different names.
        """
        path = self.path(task)
        names = read_npz(path, ("classes",))["classes"]
        if names.dtype.kind != "U" or names.ndim != 1 or len(names) < 2:
            raise ValueError(
                f"{path}: classes has the dtype {names.dtype} and the shape {names.shape}: expected the names of at "
                "least two classes"
            )
        unique, counts = np.unique(names, return_counts=True)
        if (counts > 1).any():
            raise ValueError(f"{path}: classes has {str(unique[counts > 1][0])!r} twice: expected different names")
        found: list[str] = names.tolist()
        return found

    def read(self, task: str, part: str) -> LabelledImages:
        """The part "train" or "test".

        Raises:
            FileNotFoundError: If there is no file.
            ValueError: If it is damaged or not as described.
        """
        path, x, y = self.path(task), f"x_{part}", f"y_{part}"
        arrays = read_npz(path, (x, y))
        check_images(arrays[x], arrays[y], len(self.classes(task)), (f"{path}: {x}", f"{path}: {y}"))
        return _labelled(arrays[x], arrays[y])


class MemorySets:
    """Sets that the caller holds.

    Args:
        datasets: By task, by part ("train", "test"), images and labels: uint8 `(images, height, width)`,
            `(images, height, width, 3)` or `(images, 1 or 3, height, width)`, and integers `(images,)`.
        class_names: By task, the names of its classes; numbers up to the largest label by default.

    Raises:
        ValueError: If they are something else.
    """

    def __init__(
        self,
        datasets: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]],
        class_names: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self._sets: dict[str, dict[str, LabelledImages]] = {}
        self._classes: dict[str, list[str]] = {}
        for task, parts in datasets.items():
            arrays = {part: (np.asarray(x), np.asarray(y)) for part, (x, y) in parts.items()}
            if not arrays or not set(arrays) <= {"train", "test"}:
                raise ValueError(f"task {task!r} has the parts {', '.join(arrays) or 'none'}: expected train and test")
            if class_names is None:
                most = max((int(y.max()) for _, y in arrays.values() if y.size), default=0)
                self._classes[task] = [str(label) for label in range(most + 1)]
            elif task in class_names:
                self._classes[task] = list(class_names[task])
            else:
                raise ValueError(f"class_names has no {task!r}: it has {', '.join(class_names)}")
            self._sets[task] = {}
            for part, (x, y) in arrays.items():
                if x.ndim == 4 and x.shape[1] in (1, 3) and x.shape[-1] != 3:
                    x = np.moveaxis(x, 1, -1)
                x = x[..., 0] if x.ndim == 4 and x.shape[-1] == 1 else x
                names = (f"task {task!r}: images of {part}", f"task {task!r}: labels of {part}")
                check_images(x, y, len(self._classes[task]), names)
                self._sets[task][part] = _labelled(x, y)

    def names(self) -> list[str]:
        """The tasks given."""
        return list(self._sets)

    def classes(self, task: str) -> list[str]:
        """Names of the classes."""
        return self._classes[task]

    def read(self, task: str, part: str) -> LabelledImages:
        """The part "train" or "test".

        Raises:
            ValueError: If it was not given.
        """
        if part not in self._sets[task]:
            raise ValueError(f"task {task!r} has no part {part!r}: it has {', '.join(self._sets[task])}")
        return self._sets[task][part]


class DigitSets:
    """Five tasks made of scikit-learn's 1,797 digits, the same digits in each, 600 of them for test.

    - "upright": the digits as they are.
    - "rotated": turned by 90 degrees, black on white.
    - "parity": mirrored; the classes are even and odd.
    - "halved": turned by 180 degrees, half as large.
    - "noisy": transposed, with Gaussian noise of standard deviation 0.3, always the same.

    Args:
        size: Rows and columns, which the 8 x 8 digits are resized to.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def names(self) -> list[str]:
        """The five tasks."""
        return list(DIGIT_TASKS)

    def classes(self, task: str) -> list[str]:
        """Names of the classes."""
        return ["even", "odd"] if task == "parity" else [str(digit) for digit in range(10)]

    def read(self, task: str, part: str) -> LabelledImages:
        """The part "train" or "test"."""
        digits, labels = _digits()
        draw = np.random.default_rng(0)
        order = torch.from_numpy(draw.permutation(len(labels)))
        rows = (order[:_TEST_DIGITS] if part == "test" else order[_TEST_DIGITS:]).sort().values
        if task == "halved":
            images = F.pad(fit_size(digits, self.size // 2, frame=False), self._frame())
        else:
            images = fit_size(digits, self.size, frame=False)
        if task == "rotated":
            images = 255 - images.rot90(1, (-2, -1))
        elif task == "parity":
            images, labels = images.flip(-1), labels % 2
        elif task == "halved":
            images = images.rot90(2, (-2, -1))
        elif task == "noisy":
            noise = draw.standard_normal(images.shape, dtype=np.float32) * (255 * _NOISE)
            images = (images.transpose(-2, -1) + torch.from_numpy(noise)).round_().clamp_(0, 255).byte()
        return LabelledImages(images[rows].contiguous(), labels[rows])

    def _frame(self) -> tuple[int, int, int, int]:
        lack = self.size - self.size // 2
        return lack // 2, lack - lack // 2, lack // 2, lack - lack // 2


@cache
def _digits() -> LabelledImages:
    """All digits, uint8 `(1797, 1, 8, 8)` in 0..255."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 1, _DIGIT_SIZE, _DIGIT_SIZE) * (255 / _DIGIT_WHITE)).round().astype(np.uint8)
    return LabelledImages(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))


def fit_size(images: Tensor, size: int, frame: bool) -> Tensor:
    """Images of one size.

    Args:
        images: uint8 `(images, channels, height, width)`.
        size: Rows and columns to come to.
        frame: Whether images that lack at most 8 rows and columns get a black frame; all others are resized, bilinear
            and with antialiasing.

    Returns:
        uint8 `(images, channels, size, size)`.
    """
    height, width = images.shape[-2:]
    tall, wide = size - height, size - width
    if frame and min(tall, wide) >= 0 and max(tall, wide) <= _FRAME:
        return F.pad(images, (wide // 2, wide - wide // 2, tall // 2, tall - tall // 2))
    if (height, width) == (size, size):
        return images
    out = images.new_empty(len(images), images.shape[1], size, size)
    # In pieces, as floats take four times the memory.
    for start in range(0, len(images), _CHUNK):
        piece = images[start : start + _CHUNK].float()
        piece = F.interpolate(piece, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
        out[start : start + _CHUNK] = piece.round_().clamp_(0, 255)
    return out
