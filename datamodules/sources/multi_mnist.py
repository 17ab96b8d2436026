"""MultiMNIST and its relatives: two pictures in opposite corners of one canvas, and a class of each to tell."""

from __future__ import annotations

import gzip
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from datamodules.sources.image_task_sets import ArrayTable, read_npz, task

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from datamodules.sources.interactions import Ints

SIZE = 28
SHIFT = 4
NUM_CLASSES = 10
_HELD_OUT = 10  # one training picture in so many is for validation
_MAGIC = {"images": 0x0803, "labels": 0x0801}

PAIRED_SETS = {
    "multi_mnist": ("mnist", "mnist"),
    "multi_fashion": ("fashion_mnist", "fashion_mnist"),
    "multi_fashion_mnist": ("mnist", "fashion_mnist"),
}
"""By source, the sets of the left and of the right picture."""

_RAW = {"mnist": "MNIST/raw", "fashion_mnist": "FashionMNIST/raw"}


class Pictures(NamedTuple):
    """Pictures of one object each.

    Attributes:
        images: uint8 `(pictures, size, size)`.
        labels: int64 `(pictures,)`, 0..9.
    """

    images: NDArray[np.uint8]
    labels: Ints

    def take(self, rows: Ints) -> Pictures:
        """Some of them."""
        return Pictures(self.images[rows], self.labels[rows])


def paired_tasks() -> list[dict[str, Any]]:
    """The class of the left and of the right picture."""
    return [task("left", "multiclass", NUM_CLASSES), task("right", "multiclass", NUM_CLASSES)]


def check_pictures(images: NDArray[Any], labels: NDArray[Any], size: int, white: int, names: tuple[str, str]) -> None:
    """Refuse what is not a set of square pictures with a class each.

    Args:
        images: Should be uint8 `(pictures, size, size)`, 0..white.
        labels: Should be integers `(pictures,)`, 0..9.
        size: Rows and columns.
        white: Largest pixel value.
        names: File and key of the images and of the labels, for the message.

    Raises:
        ValueError: If they are not.
    """
    x, y = names
    if images.dtype != np.uint8 or images.ndim != 3 or images.shape[1:] != (size, size):
        raise ValueError(
            f"{x} has the dtype {images.dtype} and the shape {images.shape}: expected uint8 (pictures, {size}, {size})"
        )
    if not len(images):
        raise ValueError(f"{x} holds no image: its shape is {images.shape}, expected at least one")
    if images.max() > white:
        raise ValueError(f"{x} has the value {images.max()}: expected 0 to {white}")
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
        raise ValueError(
            f"{y} has the dtype {labels.dtype} and the shape {labels.shape}: expected integers ({len(images)},), one "
            "for each image"
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= NUM_CLASSES))
    if len(wrong):
        raise ValueError(f"{y} has the value {labels[wrong[0]]} at {wrong[0]}: expected 0 to {NUM_CLASSES - 1}")


def read_npz_pictures(path: Path, part: str, size: int = SIZE, white: int = 255) -> Pictures:
    """A part ("train" or "test") of an `.npz` file with `x_<part>` and `y_<part>`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or not as described.
    """
    keys = (f"x_{part}", f"y_{part}")
    arrays = read_npz(path, keys)
    images, labels = (arrays[key] for key in keys)
    check_pictures(images, labels, size, white, (f"{path}: {keys[0]}", f"{path}: {keys[1]}"))
    return Pictures(images, labels.astype(np.int64))


def read_idx(path: Path, what: str) -> NDArray[np.uint8]:
    """An idx file of bytes, plain or gzipped, as MNIST is published.

    Args:
        path: The file.
        what: "images" or "labels".

    Raises:
        ValueError: If it is damaged or another kind of file.
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is truncated or not gzipped: {error}") from error
    ndim = 3 if what == "images" else 1
    head = 4 * (1 + ndim)
    numbers = np.frombuffer(content[:head], dtype=">u4") if len(content) >= head else np.zeros(1 + ndim, dtype=">u4")
    if numbers[0] != _MAGIC[what]:
        raise ValueError(f"{path} is no idx file of {what}: expected it to begin with {_MAGIC[what]:#010x}")
    shape = tuple(int(number) for number in numbers[1:])
    size = head + int(np.prod(shape, dtype=np.int64))
    if len(content) != size:
        raise ValueError(f"{path} has {len(content)} bytes: expected {size}, as its header says {shape}")
    return np.frombuffer(content, dtype=np.uint8, offset=head).reshape(shape)


def _idx_files(folder: Path, part: str) -> dict[str, Path]:
    stem = {"train": "train", "test": "t10k"}[part]
    found = {}
    for what, ndim in (("images", 3), ("labels", 1)):
        plain = folder / f"{stem}-{what}-idx{ndim}-ubyte"
        for path in (plain, plain.with_name(plain.name + ".gz")):
            if path.is_file():
                found[what] = path
                break
    return found


def read_pictures(name: str, part: str, root: Path, flat: bool) -> Pictures:
    """A part of "mnist" or "fashion_mnist", 28 x 28.

    Looked for, in this order: `<name>.npz` in `root/<name>` and in `root`, and the four original idx files, plain or
    gzipped, in `root/<name>`, in torchvision's `root/MNIST/raw` or `root/FashionMNIST/raw`, and, if `flat`, in `root`.

    Args:
        name: The set.
        part: "train" or "test".
        root: Where to look.
        flat: Whether idx files in `root` itself, whose names do not tell the two sets apart, are taken for this one.

    Raises:
        FileNotFoundError: If neither is there.
        ValueError: If a file is damaged or not as described.
    """
    for path in (root / name / f"{name}.npz", root / f"{name}.npz"):
        if path.is_file():
            return read_npz_pictures(path, part)
    stem = {"train": "train", "test": "t10k"}[part]
    for folder in (root / name, root / _RAW[name], *([root] if flat else [])):
        found = _idx_files(folder, part)
        if found:
            for what, ndim in (("images", 3), ("labels", 1)):
                if what not in found:
                    there = next(iter(found.values()))
                    raise FileNotFoundError(
                        f"{folder / f'{stem}-{what}-idx{ndim}-ubyte'} (or .gz) is missing beside {there}: both are "
                        "needed"
                    )
            images, labels = (read_idx(found[what], what) for what in ("images", "labels"))
            check_pictures(images, labels, SIZE, 255, (str(found["images"]), str(found["labels"])))
            return Pictures(images, labels.astype(np.int64))
    raise FileNotFoundError(
        f"{name} is not in {root}: put {name}/{name}.npz there (x_train, y_train, x_test, y_test), or the original "
        f"files {name}/{stem}-images-idx3-ubyte and {stem}-labels-idx1-ubyte (plain or .gz), or name their folder in "
        "data_dir or ZOO_DATA"
    )


def overlay(left: NDArray[np.uint8], right: NDArray[np.uint8], shift: int) -> NDArray[np.uint8]:
    """Pictures moved by `shift` pixels to the top left and to the bottom right, overlaid by maximum.

    Args:
        left: `(pairs, size, size)`.
        right: `(pairs, size, size)`.
        shift: Pixels; the canvas has `size + 2 * shift` rows and columns.

    Returns:
        `(pairs, 1, size + 2 * shift, size + 2 * shift)`.
    """
    pairs, size, _ = left.shape
    canvas = np.zeros((pairs, 1, size + 2 * shift, size + 2 * shift), dtype=np.uint8)
    canvas[:, 0, :size, :size] = left
    corner = canvas[:, 0, 2 * shift :, 2 * shift :]
    np.maximum(corner, right, out=corner)
    return canvas


def _cycle(size: int, count: int, rng: np.random.Generator) -> Ints:
    """`count` rows of `size`, in a random order, none a second time before all had their turn."""
    rounds = -(-count // size)
    return np.concatenate([rng.permutation(size) for _ in range(rounds)])[:count]


def paired(left: Pictures, right: Pictures, count: int | None, seed: int, shift: int, white: int = 255) -> ArrayTable:
    """Random pairs.

    Args:
        left: Pictures for the top left corner.
        right: Pictures for the bottom right corner.
        count: Number of pairs; by default as many as there are pictures for the left.
        seed: Of the draw.
        shift: See `overlay`.
        white: The pixel value that becomes 1.

    Returns:
        A table with the tasks `left` and `right`.
    """
    rng = np.random.default_rng(seed)
    count = len(left.images) if count is None else count
    lefts, rights = _cycle(len(left.images), count, rng), _cycle(len(right.images), count, rng)
    targets = {"left": torch.from_numpy(left.labels[lefts]), "right": torch.from_numpy(right.labels[rights])}
    return ArrayTable(torch.from_numpy(overlay(left.images[lefts], right.images[rights], shift)), targets, white)


def hold_out(pictures: Pictures, count: int, seed: int) -> tuple[Pictures, Pictures]:
    """All but `count` of the pictures, and these, chosen at random."""
    order = np.random.default_rng(seed).permutation(len(pictures.images))
    return pictures.take(order[count:]), pictures.take(order[:count])


def read_paired(source: str, root: Path, num_pairs: int | None, num_eval: int | None) -> tuple[ArrayTable, ArrayTable]:
    """Training and validation pairs of MultiMNIST, Multi-Fashion or Multi-Fashion+MNIST.

    A tenth of the training pictures is set apart for validation before any pair is drawn, so that no picture is in
    both. Both draws have a fixed seed.

    Args:
        source: A key of `PAIRED_SETS`.
        root: Where the sets are.
        num_pairs: Training pairs; by default one for each picture on the left.
        num_eval: Validation pairs; by default likewise.

    Raises:
        FileNotFoundError: If a set is not there.
        ValueError: If a file is malformed, or has fewer than 10 training pictures.
    """
    left, right = PAIRED_SETS[source]
    parts = {}
    for name in {left, right}:
        whole = read_pictures(name, "train", root, flat=left == right)
        if len(whole.images) < _HELD_OUT:
            raise ValueError(
                f"{name} in {root} has {len(whole.images)} training pictures: expected at least {_HELD_OUT}, of which "
                "a tenth is held out for validation"
            )
        parts[name] = hold_out(whole, len(whole.images) // _HELD_OUT, seed=0)
    return (
        paired(parts[left][0], parts[right][0], num_pairs, 1, SHIFT),
        paired(parts[left][1], parts[right][1], num_eval, 2, SHIFT),
    )


def read_paired_test(source: str, root: Path, num_eval: int | None) -> ArrayTable:
    """Pairs of test pictures, drawn with a fixed seed.

    Args:
        source: A key of `PAIRED_SETS`.
        root: Folder of the sets; for a source of one set also its `.npz` file.
        num_eval: Number of pairs; by default one for each picture on the left.

    Raises:
        FileNotFoundError: If a set is not there.
        ValueError: If a file is malformed.
    """
    left, right = PAIRED_SETS[source]
    if root.is_file():
        if left != right:
            raise ValueError(f"test_path={root} is one file: expected a folder with {left} and {right}, as in data_dir")
        pictures = read_npz_pictures(root, "test")
        return paired(pictures, pictures, num_eval, 3, SHIFT)
    parts = {name: read_pictures(name, "test", root, flat=left == right) for name in {left, right}}
    return paired(parts[left], parts[right], num_eval, 3, SHIFT)
