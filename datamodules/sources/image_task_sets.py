"""Sets of images with labels for several tasks: CityScapes and NYUv2 as MTAN publishes them, and small CamVid.

No file is part of this package. CityScapes and NYUv2 are research sets; their preprocessed files (one `.npy` for each
image and label) are linked from the README of github.com/lorenmt/mtan.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.lib.npyio import NpzFile
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

CAMVID_CLASSES = 11
_CAMVID_VOID = 11
_CAMVID_HELD_OUT = 8  # one frame in so many, at the end of each drive, is for validation


def task(name: str, kind: str, num_outputs: int) -> dict[str, Any]:
    """A task as plain values."""
    return {"name": name, "kind": kind, "num_outputs": num_outputs, "target_mean": 0.0, "target_std": 1.0}


class ImageTable(Protocol):
    """Images with the labels of several tasks, wherever they are."""

    def __len__(self) -> int:
        """Number of images."""

    def gather(self, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Images and targets of the rows, in the dtypes and shapes of `ImageTaskBatch`."""


@dataclass(frozen=True)
class ArrayTable:
    """Images and labels in memory.

    Attributes:
        images: uint8 `(images, channels, height, width)`.
        targets: By task, integers of any width or float32, the first dimension over the images.
        white: The pixel value that becomes 1.
    """

    images: Tensor
    targets: dict[str, Tensor]
    white: int = 255

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def gather(self, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Images in [0, 1] and targets of the rows; integers become int64."""
        targets = {name: values[rows] for name, values in self.targets.items()}
        targets = {name: t if t.is_floating_point() else t.long() for name, t in targets.items()}
        return self.images[rows].float().div_(self.white), targets

    def take(self, rows: NDArray[np.int64]) -> ArrayTable:
        """A table of some rows."""
        chosen = torch.from_numpy(rows)
        return ArrayTable(self.images[chosen], {name: t[chosen] for name, t in self.targets.items()}, self.white)


class NpyLayout(NamedTuple):
    """Sizes and folders of a set that has one `.npy` file for each image and label.

    Attributes:
        folders: By task (`segmentation`, `depth`, `normals`), the folder of its labels.
        num_classes: Classes of the segmentation.
        height: Rows of every image.
        width: Columns of every image.
    """

    folders: dict[str, str]
    num_classes: int
    height: int
    width: int

    def tasks(self) -> list[dict[str, Any]]:
        """The tasks that the set has labels for."""
        outputs = {"segmentation": self.num_classes, "depth": 1, "normals": 3}
        return [task(name, name, outputs[name]) for name in self.folders]


LAYOUTS = {
    "cityscapes": NpyLayout({"segmentation": "label_7", "depth": "depth"}, 7, 128, 256),
    "nyuv2": NpyLayout({"segmentation": "label", "depth": "depth", "normals": "normals"}, 13, 288, 384),
}
"""The two sets of MTAN."""


class NpyTable:
    """A folder `{image, <labels>}/{0, 1, ...}.npy`, read by the batch.

    Nothing stays in memory or open: a batch maps the files that it needs. The constructor looks at the header and the
    length of every file; values are checked whenever they are read.

    Args:
        folder: Holds `image` and one folder for each task.
        layout: What is expected.
        tasks: Names of the tasks to read.

    Raises:
        FileNotFoundError: If a folder or the file of an index is missing.
        ValueError: If there is no image, or a file has another name, type or size than expected.
    """

    def __init__(self, folder: Path, layout: NpyLayout, tasks: Sequence[str]) -> None:
        self.layout = layout
        self.folders = {"image": folder / "image", **{name: folder / layout.folders[name] for name in tasks}}
        self.tasks = list(tasks)
        self._checked = False
        wanted = ", ".join(["image", *layout.folders.values()])
        for path in self.folders.values():
            if not path.is_dir():
                raise FileNotFoundError(f"{path} is missing: expected {folder} to hold the folders {wanted}, each with "
                                        "0.npy, 1.npy, ...")  # fmt: skip
        indices = {kind: self._indices(path) for kind, path in self.folders.items()}
        self._length = max(max(found, default=-1) + 1 for found in indices.values())
        if not indices["image"]:
            raise ValueError(f"{self.folders['image']} holds no image: expected 0.npy, 1.npy, ...")
        for kind, found in indices.items():
            lost = sorted(set(range(self._length)) - found)
            if lost:
                raise FileNotFoundError(
                    f"{self.folders[kind] / f'{lost[0]}.npy'} is missing ({len(lost)} of {self._length}): expected "
                    f"0.npy to {self._length - 1}.npy in each of {', '.join(p.name for p in self.folders.values())}"
                )
        for kind in self.folders:
            for row in range(self._length):
                self._map(kind, row)

    def _indices(self, path: Path) -> set[int]:
        found = set()
        for file in path.glob("[!.]*.npy"):
            if not (file.stem.isascii() and file.stem.isdigit()) or str(int(file.stem)) != file.stem:
                raise ValueError(f"{file} is no number: expected files 0.npy, 1.npy, ... in {path}")
            found.add(int(file.stem))
        return found

    def __len__(self) -> int:
        """Number of images."""
        return self._length

    def _shapes(self, kind: str) -> tuple[tuple[int, ...], ...]:
        height, width = self.layout.height, self.layout.width
        if kind in ("image", "normals"):
            return (3, height, width), (height, width, 3)
        return (1, height, width), (height, width, 1), (height, width)

    def _map(self, kind: str, row: int) -> NDArray[Any]:
        path = self.folders[kind] / f"{row}.npy"
        try:
            array: NDArray[Any] = open_memmap(path, mode="r")  # never unpickles
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{path} is truncated or no .npy file of numbers: {error}") from error
        shapes = self._shapes(kind)
        if array.shape not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(f"{path} has the shape {array.shape}: expected {wanted}")
        allowed = {"image": ("f", "floating numbers or uint8"), "normals": ("f", "floating numbers")}
        kinds, wanted = allowed.get(kind, ("fiu", "numbers"))
        if array.dtype.kind not in kinds and not (kind == "image" and array.dtype == np.uint8):
            raise ValueError(f"{path} has the dtype {array.dtype}: expected {wanted}")
        return array

    def _read(self, kind: str, rows: Tensor) -> Tensor:
        """Contents of some files, float32 `(rows, channels, height, width)`."""
        channels = self._shapes(kind)[0][0]
        out = np.empty((len(rows), channels, self.layout.height, self.layout.width), dtype=np.float32)
        # One file for each image is how the set is published: reading them is the one loop over samples.
        for place, row in zip(out, rows.tolist(), strict=True):
            array = self._map(kind, row)
            if array.shape[-1] == channels and array.shape[0] != channels:
                array = np.moveaxis(array, -1, 0)
            with np.errstate(over="ignore"):  # what is too large for float32 is refused as infinite
                place[...] = array
            if array.dtype == np.uint8 and kind == "image":
                place /= 255
        valid, wanted = self._valid(kind, out)
        if not valid.all():
            row, *at = (int(i) for i in np.argwhere(~valid)[0])
            file = self.folders[kind] / f"{int(rows[row])}.npy"
            raise ValueError(
                f"{file} has the value {out[(row, *at)]} in channel {at[0]}, row {at[1]}, column {at[2]}: expected "
                f"{wanted}"
            )
        return torch.from_numpy(out)

    def _valid(self, kind: str, values: NDArray[np.float32]) -> tuple[NDArray[np.bool_], str]:
        """Where values are allowed, and what is allowed."""
        if kind == "segmentation":
            last = self.layout.num_classes - 1
            inside = (values >= -1) & (values <= last) & (values == np.rint(values))
            return inside, f"whole numbers from -1 (ignored) to {last}"
        if kind == "depth":
            return (values >= 0) & np.isfinite(values), "finite numbers of at least 0, and 0 where undefined"
        if kind == "normals":
            return np.abs(values) <= 1.001, "components from -1 to 1, and zero vectors where undefined"
        return np.isfinite(values), "finite numbers"

    def gather(self, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Images and targets of the rows.

        Raises:
            ValueError: If a value is out of range.
        """
        targets = {name: self._read(name, rows) for name in self.tasks}
        if "segmentation" in targets:
            targets["segmentation"] = targets["segmentation"][:, 0].long()
        return self._read("image", rows), targets

    def check(self) -> None:
        """Read everything, the first time.

        Raises:
            ValueError: If a value is out of range.
        """
        if self._checked:
            return
        for start in range(0, len(self), 64):
            self.gather(torch.arange(start, min(start + 64, len(self))))
        self._checked = True


def find_npy_folder(source: str, root: Path) -> Path:
    """The folder of a set that holds `train` and `val`: `root/<source>` or `root` itself.

    Raises:
        FileNotFoundError: If neither does.
    """
    for folder in (root / source, root):
        if (folder / "train").is_dir() and (folder / "val").is_dir():
            return folder
    kinds = ",".join(["image", *LAYOUTS[source].folders.values()])
    raise FileNotFoundError(
        f"{source} is not in {root}: put MTAN's preprocessed files there as {source}/{{train,val}}/{{{kinds}}}/"
        "{0,1,...}.npy (linked from github.com/lorenmt/mtan), or name their folder in data_dir or ZOO_DATA"
    )


def read_npz(path: Path, keys: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Arrays of an `.npz` file, never unpickled.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or a key is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected an .npz file with {', '.join(keys)}")
    try:
        # Opened here, as numpy leaves a file open that it cannot read.
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, NpzFile):
                raise ValueError("one array, not an archive of arrays")
            names = ", ".join(loaded.files)
            lost = [key for key in keys if key not in loaded.files]
            found = {} if lost else {key: loaded[key] for key in keys}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is truncated or no .npz file of numbers: {error}") from error
    if lost:
        raise ValueError(f"{path} has no {lost[0]}: expected {', '.join(keys)}, found {names}")
    return found


def boundary_distance(classes: NDArray[np.uint8], void: int) -> NDArray[np.float32]:
    """Distance of every pixel to the nearest pixel of another class (void counts as one).

    Args:
        classes: `(images, height, width)`.
        void: The class of pixels without a label.

    Returns:
        float32 `(images, 1, height, width)`, in pixels from centre to centre, at least 1; 0 in void, and everywhere
        in an image of a single class.
    """
    from scipy.ndimage import distance_transform_edt

    out = np.zeros(classes.shape, dtype=np.float32)
    for image, distances in zip(classes, out, strict=True):
        present = np.unique(image)
        if len(present) > 1:
            for label in present[present != void]:
                inside = image == label
                distances[inside] = distance_transform_edt(inside)[inside]
    return out[:, None]


def camvid_tasks() -> list[dict[str, Any]]:
    """Segmentation, and the distance to the boundary (kind "depth")."""
    return [task("segmentation", "segmentation", CAMVID_CLASSES), task("boundary", "depth", 1)]


def read_camvid(path: Path, part: str, tasks: Sequence[str]) -> ArrayTable:
    """Read a part of `camvid_small.npz`.

    Args:
        path: The file.
        part: "train" or "test".
        tasks: Names of the tasks; distances are computed only where wanted.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or not as described.
    """
    x, seg = f"x_{part}", f"seg_{part}"
    arrays = read_npz(path, (x, seg))
    images, classes = arrays[x], arrays[seg]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"{path}: {x} has the dtype {images.dtype} and the shape {images.shape}: expected uint8 (images, height, "
            "width, 3)"
        )
    if not images.size:
        raise ValueError(f"{path}: {x} holds no image: its shape is {images.shape}, expected at least one")
    if classes.dtype != np.uint8 or classes.shape != images.shape[:3]:
        raise ValueError(
            f"{path}: {seg} has the dtype {classes.dtype} and the shape {classes.shape}: expected uint8 "
            f"{images.shape[:3]}, a class for each pixel of {x}"
        )
    if (classes > _CAMVID_VOID).any():
        image, row, column = (int(i) for i in np.argwhere(classes > _CAMVID_VOID)[0])
        raise ValueError(
            f"{path}: {seg} has the value {classes[image, row, column]} at image {image}, row {row}, column {column}: "
            f"expected 0 to {CAMVID_CLASSES - 1}, or {_CAMVID_VOID} for void"
        )
    targets = {}
    if "segmentation" in tasks:
        labels = classes.astype(np.int8)
        labels[classes == _CAMVID_VOID] = -1
        targets["segmentation"] = torch.from_numpy(labels)
    if "boundary" in tasks:
        targets["boundary"] = torch.from_numpy(boundary_distance(classes, _CAMVID_VOID))
    return ArrayTable(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))), targets)


def split_camvid(path: Path, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of training and of validation: the last eighth of each drive is held out, as neighbouring frames look alike.

    Args:
        path: The file, with the names of the frames (`0001TP_006690.png`: drive, number) in `frame_train`.
        count: Number of frames.

    Raises:
        ValueError: If names are missing or no drive is long enough.
    """
    frames = read_npz(path, ("frame_train",))["frame_train"]
    if frames.shape != (count,) or frames.dtype.kind != "U":
        raise ValueError(
            f"{path}: frame_train has the dtype {frames.dtype} and the shape {frames.shape}: expected ({count},) names"
        )
    drives = np.array([name.split("_")[0] for name in frames.tolist()])
    order = np.lexsort((frames, drives))
    _, starts, lengths = np.unique(drives[order], return_index=True, return_counts=True)
    within = np.arange(count) - np.repeat(starts, lengths)
    held_out = within >= np.repeat(lengths - lengths // _CAMVID_HELD_OUT, lengths)
    if not held_out.any():
        raise ValueError(
            f"{path}: frame_train has {count} frames, at most {lengths.max()} of one drive: expected a drive of at "
            f"least {_CAMVID_HELD_OUT}, of which the last eighth is held out for validation"
        )
    return order[~held_out], order[held_out]
