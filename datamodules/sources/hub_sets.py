"""Classification sets of the Hugging Face hub, or local copies of such, prepared as CLIP sees them.

Images stay where `datasets` keeps them, in memory-mapped Arrow files, and are decoded by the batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from datamodules.sources.classification_sets import LabelledImages
from datamodules.sources.clip_images import CLIP_SIZE, resize_and_crop
from datamodules.sources.clip_prompts import MERGING_TASKS, clip_task, tidy_class_name

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    from torch import Tensor

_CHUNK = 256  # images decoded at a time


class HubTable:
    """Images of a set and their classes; images are decoded by the batch.

    Made by `read_hub_set`.

    Attributes:
        labels: int64 `(images,)`.
        class_names: Names of the classes in the order of the labels.
        size: Rows and columns of the images.
    """

    def __init__(
        self, dataset: Any, image_column: str, labels: Tensor, class_names: list[str], size: int, where: str
    ) -> None:
        self._dataset, self._column, self._where = dataset, image_column, where
        self.labels, self.class_names, self.size = labels, class_names, size

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def gather(self, indices: Tensor) -> Tensor:
        """Images of some rows, after `resize_and_crop`.

        Args:
            indices: int64 `(batch,)`.

        Returns:
            uint8 `(batch, size, size, 3)`.

        Raises:
            ValueError: If an image is missing or damaged; the message names its row.
        """
        rows = indices.tolist()
        try:
            images = self._dataset[rows][self._column]
        except (OSError, SyntaxError, ValueError):
            # One by one, to find out which it is.
            images = [self._decode(row) for row in rows]
        missing = [row for row, image in zip(rows, images, strict=True) if image is None]
        if missing:
            raise ValueError(f"{self._where}: column {self._column!r} has no image at row {missing[0]}")
        return resize_and_crop(images, self.size)

    def _decode(self, row: int) -> Any:
        try:
            return self._dataset[row][self._column]
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(
                f"{self._where}: the image at row {row} in column {self._column!r} cannot be decoded ({error}): "
                "expected a complete picture in a format that PIL reads"
            ) from error


def read_hub_set(
    id: str | Path,
    split: str = "test",
    *,
    config: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
    class_names: Sequence[str] | None = None,
    size: int = CLIP_SIZE,
    cache_dir: str | Path | None = None,
) -> HubTable:
    """A split of a data set, from the hub or from a local copy.

    A local copy is a folder of `save_to_disk` (of the split, or of a whole set), a `.parquet` file, or a folder of
    such, the files of a split named as on the hub (`test.parquet`, `test-00000-of-00001.parquet` or in a folder
    `test`).

    Args:
        id: Id on the hub, or a file or folder.
        split: Name of the split.
        config: Name of the configuration, where the set has several.
        image_column: Column of the images.
        label_column: Column of the labels: integers from 0, or texts that are among `class_names`.
        class_names: Names of the classes in the order of the labels; by default those of the data set, or else
            numbers.
        size: Rows and columns that images are brought to.
        cache_dir: Where `datasets` keeps what it downloads or converts; its own cache by default.

    Raises:
        FileNotFoundError: If there is no such set, or the hub cannot be reached and its cache has no copy.
        ImportError: If `datasets` is not installed.
        ValueError: If there is no such split, configuration or column, a file is damaged, an image or label is missing,
            or a label is out of range.
    """
    where = f"{id} (split {split})"
    local = _local_path(id)
    cache = None if cache_dir is None else str(cache_dir)
    if local is None:
        dataset = _from_hub(str(id), split, config, cache)
    elif local.is_dir() and not any(local.rglob("*.parquet")):
        dataset = _from_disk(local, split)
    else:
        dataset = _from_parquet(local, split, config, cache)
    if not len(dataset):
        raise ValueError(f"{where} holds no row: expected at least one image")
    dataset = _with_images(dataset, image_column, where)
    names, labels = _labels(dataset, label_column, class_names, where)
    return HubTable(dataset.select_columns([image_column]), image_column, labels, names, size, where)


def _library() -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("sets of the hub need datasets: pip install 'lightning-method-zoo[hub]'") from error
    module: ModuleType = datasets
    return module


def _local_path(id: str | Path) -> Path | None:
    """The file or folder that an id means, or None for one of the hub."""
    path, text = Path(id).expanduser(), str(id)
    if path.exists():
        return path
    if isinstance(id, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or path.suffix == ".parquet":
        raise FileNotFoundError(
            f"{id} is missing: expected a folder of save_to_disk, a .parquet file, a folder of such, or the id of a "
            "set on the hub"
        )
    return None


def _from_hub(id: str, split: str, config: str | None, cache: str | None) -> Any:
    library = _library()
    try:
        return library.load_dataset(id, config, split=split, cache_dir=cache)
    except OSError as error:
        named = repr(id) if config is None else f"{id!r}, {config!r}"
        raise FileNotFoundError(
            f"{id} cannot be had: it is no local file or folder, and the hub did not give it ({_first_line(error)}). "
            f"Check the name; or, where there is a network, run `datasets.load_dataset({named}).save_to_disk(FOLDER)`, "
            "and name that folder instead"
        ) from error
    except (ValueError, RuntimeError, library.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{id}, configuration {config!r}, split {split!r} cannot be read: {_first_line(error)}"
        ) from error


def _from_disk(folder: Path, split: str) -> Any:
    library = _library()
    for candidate in (folder, folder / split):
        try:
            found = library.load_from_disk(str(candidate))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
            raise ValueError(f"{candidate} is damaged: {_first_line(error)}") from error
        except IndexError as error:  # `datasets` stumbles over a set without rows
            raise ValueError(f"{candidate} holds no row: expected at least one image") from error
        if isinstance(found, library.DatasetDict):
            if split not in found:
                raise ValueError(f"{folder} has no split {split!r}: it has {', '.join(found)}")
            return found[split]
        if candidate == folder and found.split is not None and str(found.split) != split:
            raise ValueError(f"{folder} holds the split {str(found.split)!r}, not {split!r}")
        return found
    raise FileNotFoundError(
        f"{folder} holds no data set with a split {split!r}: expected what save_to_disk writes, or files such as "
        f"{split}.parquet"
    )


def _from_parquet(path: Path, split: str, config: str | None, cache: str | None) -> Any:
    library = _library()
    files = [path]
    if path.is_dir():
        found = sorted(path.rglob("*.parquet"))
        if config is not None and any(config in file.relative_to(path).parts[:-1] for file in found):
            found = [file for file in found if config in file.relative_to(path).parts[:-1]]
        files = [file for file in found if split in (file.stem, file.stem.split("-")[0], file.parent.name)]
        if not files:
            raise ValueError(
                f"{path} has no file of the split {split!r}: expected {split}.parquet, {split}-00000-of-00001.parquet "
                f"or a folder {split}; it has {', '.join(file.name for file in found[:10])}"
            )
    if not sum(_rows_of(file) for file in files):
        raise ValueError(f"{path} (split {split}) holds no row: expected at least one image")
    try:
        return library.load_dataset(
            "parquet", data_files={"rows": [str(file) for file in files]}, split="rows", cache_dir=cache
        )
    except library.exceptions.DatasetsError as error:
        cause = error.__cause__ or error
        raise ValueError(f"{path} (split {split}) is no readable parquet file: {_first_line(cause)}") from error


def _rows_of(file: Path) -> int:
    from pyarrow import parquet

    try:
        rows: int = parquet.read_metadata(file).num_rows
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise ValueError(f"{file} is no readable parquet file: {_first_line(error)}") from error
    return rows


def _with_images(dataset: Any, column: str, where: str) -> Any:
    """The data set with decoded pictures in a column."""
    library = _library()
    _check_column(dataset, column, "image_column", where)
    feature = dataset.features[column]
    if isinstance(feature, library.Image):
        return dataset
    encoded = isinstance(feature, library.Value) and feature.dtype in ("binary", "large_binary")
    if not encoded and not (isinstance(feature, dict) and {"bytes", "path"} <= set(feature)):
        raise ValueError(
            f"{where}: column {column!r} holds {feature}: expected images, as `datasets.Image` or as bytes of files"
        )
    return dataset.cast_column(column, library.Image())


def _labels(dataset: Any, column: str, class_names: Sequence[str] | None, where: str) -> tuple[list[str], Tensor]:
    _check_column(dataset, column, "label_column", where)
    feature = dataset.features[column]
    own = list(feature.names) if isinstance(feature, _library().ClassLabel) else None
    if class_names is not None and own is not None and len(class_names) != len(own):
        raise ValueError(f"{where}: {len(class_names)} class_names are given, but column {column!r} has {len(own)} "
                         f"classes: {', '.join(own[:10])}")  # fmt: skip
    values = dataset.select_columns([column]).with_format("arrow")[:].column(0)
    if values.null_count:
        row = int(np.flatnonzero(values.is_null().to_numpy())[0])
        raise ValueError(f"{where}: column {column!r} has no label at row {row} ({values.null_count} are missing)")
    names = own if class_names is None else list(class_names)
    array = values.to_numpy()
    if array.dtype == object and isinstance(array[0], str):
        array = _numbered(array, names, column, where)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{where}: column {column!r} holds {values.type}: expected class numbers from 0, or names")
    most = len(names) if names is not None else int(array.max()) + 1
    wrong = np.flatnonzero((array < 0) | (array >= most))
    if len(wrong):
        raise ValueError(
            f"{where}: column {column!r} has the label {array[wrong[0]]} at row {wrong[0]} ({len(wrong)} such): "
            f"expected 0 to {most - 1}; a split without labels has -1"
        )
    labels = torch.from_numpy(array.astype(np.int64))
    return names if names is not None else [str(label) for label in range(most)], labels


def _numbered(texts: Any, names: list[str] | None, column: str, where: str) -> Any:
    """Numbers of classes for their names."""
    if names is None:
        raise ValueError(f"{where}: column {column!r} holds texts such as {texts[0]!r}: expected class_names with the "
                         "names of all classes in their order")  # fmt: skip
    numbers = {name: number for number, name in enumerate(names)}
    unknown = sorted(set(texts) - set(numbers))
    if unknown:
        row = int(np.flatnonzero(texts == unknown[0])[0])
        raise ValueError(f"{where}: column {column!r} has {unknown[0]!r} at row {row}: expected one of class_names, "
                         f"{', '.join(names[:10])}")  # fmt: skip
    return np.array([numbers[text] for text in texts], dtype=np.int64)


def _check_column(dataset: Any, column: str, option: str, where: str) -> None:
    if column not in dataset.features:
        raise ValueError(
            f"{where} has no column {column!r}: it has {', '.join(dataset.features)}; name another in {option}"
        )


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


class HubSets:
    """The tasks of `clip8.json` that have a data set on the hub, among them the eight of the merging papers.

    Args:
        size: Rows and columns that images are brought to.
        root: A folder with local copies, each in a folder named after its task and of a kind that `read_hub_set`
            takes; a task that is not there comes from the hub.
        prompts: A file such as `clip8.json` in its place.
        cache_dir: See `read_hub_set`.
    """

    def __init__(
        self,
        size: int = CLIP_SIZE,
        root: str | Path | None = None,
        prompts: str | Path | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        self.size, self.prompts, self.cache_dir = size, prompts, cache_dir
        self.root = None if root is None else Path(root).expanduser()
        self._tables: dict[tuple[str, str], HubTable] = {}

    def names(self) -> list[str]:
        """The eight tasks of the merging papers, in the order of their tables."""
        return list(MERGING_TASKS)

    def classes(self, task: str) -> list[str]:
        """Names of the classes as prompts have them, in the order of the labels.

        Raises:
            FileNotFoundError: If they are those of the data set, and it cannot be had.
            ValueError: If there is no such task.
        """
        known = clip_task(task, self.prompts).class_names
        return list(known) if known is not None else self.table(task, "test").class_names

    def table(self, task: str, part: str) -> HubTable:
        """A part of a task: "train", "test", or a corruption that there is a published split of.

        Raises:
            FileNotFoundError: If the set cannot be had.
            ValueError: If there is no such task or part, or the set is malformed.
        """
        if (task, part) not in self._tables:
            entry = clip_task(task, self.prompts)
            if entry.hub is None:
                raise ValueError(f"the task {task!r} has no set on the hub: expected one of {', '.join(self.names())}")
            if part not in entry.hub.splits:
                raise ValueError(f"the task {task!r} has no part {part!r}: it has {', '.join(entry.hub.splits)}")
            local = None if self.root is None else self.root / task
            table = read_hub_set(
                local if local is not None and local.exists() else entry.hub.id,
                entry.hub.splits[part],
                config=entry.hub.config,
                image_column=entry.hub.image_column,
                label_column=entry.hub.label_column,
                class_names=entry.class_names,
                size=self.size,
                cache_dir=self.cache_dir,
            )
            if entry.class_names is None:
                table.class_names = [tidy_class_name(name) for name in table.class_names]
            self._tables[task, part] = table
        return self._tables[task, part]

    def read(self, task: str, part: str) -> LabelledImages:
        """A part of a task in memory; see `table`, which does without."""
        table = self.table(task, part)
        images = torch.empty((len(table), 3, self.size, self.size), dtype=torch.uint8)
        for start in range(0, len(table), _CHUNK):
            rows = torch.arange(start, min(start + _CHUNK, len(table)))
            images[start : start + _CHUNK] = table.gather(rows).permute(0, 3, 1, 2)
        return LabelledImages(images, table.labels)
