"""Images with the labels of several tasks: pairs of digits, street scenes and rooms, in whole batches."""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningDataModule
from torch.utils.data import Dataset

from datamodules.loading import (
    BatchLoader,
    Draw,
    KeyedSampler,
    LoaderMixin,
    keyed_uniform,
    mix,
    run_seed,
    training_sampler,
)
from datamodules.sources.dense_transforms import apply_crop_zoom_flip, draw_crop_zoom_flip
from datamodules.sources.download import data_folder
from datamodules.sources.image_task_sets import (
    LAYOUTS,
    NpyTable,
    camvid_tasks,
    find_npy_folder,
    read_camvid,
    split_camvid,
)
from datamodules.sources.multi_mnist import PAIRED_SETS, paired_tasks, read_paired, read_paired_test
from datamodules.task_batches import ImageTaskBatch

if TYPE_CHECKING:
    from torch import Tensor

    from datamodules.sources.image_task_sets import ImageTable

__all__ = ["ImageTaskBatch", "ImageTaskData", "ImageTaskRows"]

log = logging.getLogger(__name__)

SOURCES = ("embedded", "embedded_scenes", *PAIRED_SETS, *LAYOUTS, "camvid")
_PAIRS = ("embedded", *PAIRED_SETS)
_MIN_SCENE = 16

# A distance within the picture grows with a zoom; a depth shrinks.
_ZOOM_POWERS = {"boundary": 1}


class ImageTaskRows(Dataset[ImageTaskBatch]):
    """Batches of a table.

    Args:
        table: Images and labels.
        kinds: By task, its kind; the tasks in the order of the batch.
        augment: Whether images are cropped, zoomed and flipped, anew for every key.
        hidden: By task, bool `(images,)`, labels that are not to be seen: the batch masks them and holds something
            meaningless in their place. Tasks without an entry show all.
    """

    def __init__(
        self, table: ImageTable, kinds: dict[str, str], augment: bool = False, hidden: dict[str, Tensor] | None = None
    ) -> None:
        self.table, self.kinds, self.augment, self.hidden = table, kinds, augment, hidden or {}

    def __len__(self) -> int:
        """Number of images."""
        return len(self.table)

    def __getitem__(self, draw: Draw) -> ImageTaskBatch:
        """The batch of the images `draw.indices`."""
        images, found = self.table.gather(draw.indices)
        targets = {name: found[name] for name in self.kinds}
        if self.augment:
            height, width = images.shape[-2:]
            drawn = draw_crop_zoom_flip(draw.key, draw.indices, height, width)
            images, targets = apply_crop_zoom_flip(images, targets, self.kinds, drawn, zoom_powers=_ZOOM_POWERS)
        masks = {}
        for name, hidden in self.hidden.items():
            absent = hidden[draw.indices]
            masks[name] = ~absent
            # Nothing may be learned from what is said to be unknown, whether or not a loss looks at the mask.
            targets[name][absent] = -1 if self.kinds[name] == "segmentation" else 0
        return ImageTaskBatch(images, targets, masks, draw.indices)


class ImageTaskData(LoaderMixin, LightningDataModule):
    """Images with the labels of several tasks.

    Sources:

    - "embedded": scikit-learn's digits two by two, 1 x 12 x 12, tasks `left` and `right` (10 classes each). No file.
    - "embedded_scenes": generated scenes, 3 x 32 x 32, tasks `segmentation` (5 classes), `depth`, `normals` with exact
      labels. No file.
    - "multi_mnist", "multi_fashion", "multi_fashion_mnist": pictures two by two, 1 x 36 x 36, tasks `left` and `right`
      (10 classes each; in the last the left is a digit and the right a piece of clothing). From
      `mnist/mnist.npz` and `fashion_mnist/fashion_mnist.npz`, or the original idx files.
    - "cityscapes": MTAN's files, 3 x 128 x 256, tasks `segmentation` (7 classes), `depth` (inverse depth).
    - "nyuv2": MTAN's files, 3 x 288 x 384, tasks `segmentation` (13 classes), `depth`, `normals`.
    - "camvid": `camvid_small/camvid_small.npz`, 3 x 48 x 64, tasks `segmentation` (11 classes) and `boundary` (kind
      "depth": distance in pixels of each pixel to the nearest pixel of another class, void included, at least 1; 0 in
      void). The last eighth of each drive of the training part is for validation.

    Of the two sets of MTAN the published validation folder serves as both validation and test, as in the literature:
    choose no setting by it that you then report on it.

    Images are in [0, 1]; floating images of MTAN's files are taken as they are.

    Args:
        source: "embedded" or "embedded_scenes" (no file, no network), "multi_mnist", "multi_fashion",
            "multi_fashion_mnist", "cityscapes", "nyuv2" or "camvid".
        data_dir: Folder of the sets; `$ZOO_DATA` by default, or else the user's cache.
        test_path: Other images to test (and predict) on, in the format of the source: a folder with `image` and the
            labels, or with such a `val` (cityscapes, nyuv2; embedded_scenes with `label`, `depth`, `normals`), or an
            `.npz` file or its folder (camvid: `x_test`, `seg_test`; pairs: `x_test`, `y_test`, or idx files).
        tasks: Names of the tasks to have, in this order; all of them by default.
        batch_size: Training batch of one process.
        eval_batch_size: Batch of one process in validation, test and prediction.
        augment: Whether training images are cropped, zoomed by 1, 1.2 or 1.5 and flipped at random, as MTAN does; by
            default for cityscapes and nyuv2. Not for pairs, where it would change the labels. A zoom divides depths by
            its factor and multiplies distances to the boundary by it.
        missing_fraction: Share of the labels of each task that training does not see, chosen by the seed for each task
            on its own, the same ones in every epoch.
        num_pairs: Training pairs; by default one for each picture on the left.
        num_scenes: Training scenes of embedded_scenes; 256 by default.
        scene_size: Rows and columns of embedded_scenes; 32 by default.
        num_eval: Pairs or scenes for validation, and as many for test; by default one for each picture held out, or 64
            scenes.
        num_workers: Worker processes.
        pin_memory: Whether batches are in page-locked memory; by default where a GPU is.
        seed: Key of order, augmentation and missing labels; by default the one of `seed_everything`.

    Raises:
        ValueError: If options contradict each other or are out of range.
    """

    def __init__(
        self,
        source: str = "embedded",
        data_dir: str | None = None,
        test_path: str | None = None,
        tasks: list[str] | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 64,
        augment: bool | None = None,
        missing_fraction: float = 0.0,
        num_pairs: int | None = None,
        num_scenes: int | None = None,
        scene_size: int | None = None,
        num_eval: int | None = None,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.source, self.data_dir, self.test_path = source, data_dir, test_path
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.missing_fraction, self.seed = missing_fraction, seed
        self.num_pairs, self.num_scenes, self.scene_size, self.num_eval = num_pairs, num_scenes, scene_size, num_eval
        self.augment = source in LAYOUTS if augment is None else augment
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._chosen = tasks
        self._check_options()

    def _check_options(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {self.source!r}")
        for name, number, least, sources in (
            ("batch_size", self.batch_size, 1, SOURCES),
            ("eval_batch_size", self.eval_batch_size, 1, SOURCES),
            ("num_workers", self.num_workers, 0, SOURCES),
            ("num_pairs", self.num_pairs, 1, _PAIRS),
            ("num_scenes", self.num_scenes, 1, ("embedded_scenes",)),
            ("scene_size", self.scene_size, _MIN_SCENE, ("embedded_scenes",)),
            ("num_eval", self.num_eval, 1, (*_PAIRS, "embedded_scenes")),
        ):
            if number is not None and number < least:
                raise ValueError(f"{name} must be at least {least}, got {number}")
            if number is not None and self.source not in sources:
                raise ValueError(
                    f"{name}={number} has no meaning for source={self.source!r}: expected {', '.join(sources)}"
                )
        if not 0 <= self.missing_fraction < 1:
            raise ValueError(f"missing_fraction must be at least 0 and below 1, got {self.missing_fraction}")
        if self.augment and self.source in _PAIRS:
            raise ValueError(f"augment=True would change the labels of source={self.source!r}: leave it out")
        if self.data_dir and self.source.startswith("embedded"):
            raise ValueError(f"data_dir={self.data_dir} has no meaning for source={self.source!r}, which has no file")
        known = [task["name"] for task in self._all_tasks()]
        if self._chosen is not None:
            for name in self._chosen:
                if name not in known:
                    raise ValueError(f"tasks has {name!r}, but source={self.source!r} has {', '.join(known)}")
            if not self._chosen or len(set(self._chosen)) < len(self._chosen):
                raise ValueError(f"tasks must name at least one of {', '.join(known)}, each once, got {self._chosen}")

    def _all_tasks(self) -> list[dict[str, Any]]:
        if self.source in _PAIRS:
            return paired_tasks()
        if self.source in LAYOUTS:
            return LAYOUTS[self.source].tasks()
        if self.source == "camvid":
            return camvid_tasks()
        from datamodules.sources.image_task_sample import scene_tasks

        return scene_tasks()

    @cached_property
    def tasks(self) -> list[dict[str, Any]]:
        """The tasks as plain values: name, kind, num_outputs, target_mean, target_std. Known without reading."""
        by_name = {task["name"]: task for task in self._all_tasks()}
        return [by_name[name] for name in self._chosen or by_name]

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks."""
        return [task["name"] for task in self.tasks]

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return 1 if self.source in _PAIRS else 3

    @property
    def _kinds(self) -> dict[str, str]:
        return {task["name"]: task["kind"] for task in self.tasks}

    @property
    def _scenes(self) -> tuple[int, int, int]:
        """Training scenes, scenes of each other part, and their size."""
        return self.num_scenes or 256, self.num_eval or 64, self.scene_size or 32

    @cached_property
    def _parts(self) -> tuple[ImageTable, ImageTable]:
        """Training and validation."""
        from datamodules.sources.image_task_sample import digit_pairs, scenes

        if self.source == "embedded":
            return digit_pairs("train", self.num_pairs), digit_pairs("validate", self.num_eval)
        if self.source == "embedded_scenes":
            train, held_out, size = self._scenes
            return scenes(train, size), scenes(held_out, size, "validate")
        root = data_folder(self.data_dir)
        if self.source in PAIRED_SETS:
            return read_paired(self.source, root, self.num_pairs, self.num_eval)
        if self.source == "camvid":
            path = self._camvid_file(root)
            whole = read_camvid(path, "train", self.task_names)
            kept, held_out_rows = split_camvid(path, len(whole))
            return whole.take(kept), whole.take(held_out_rows)
        folder = find_npy_folder(self.source, root)
        layout = LAYOUTS[self.source]
        return NpyTable(folder / "train", layout, self.task_names), NpyTable(folder / "val", layout, self.task_names)

    @cached_property
    def _test_table(self) -> ImageTable:
        """Test images; those of `test_path`, if it is given, and then nothing else is read."""
        from datamodules.sources.image_task_sample import digit_pairs, read_digit_test, scene_layout, scenes

        path = None if self.test_path is None else Path(self.test_path).expanduser()
        if path is not None and not path.exists():
            raise FileNotFoundError(f"test_path={path} is missing: expected test images in the format of {self.source}")
        if self.source == "embedded":
            return digit_pairs("test", self.num_eval) if path is None else read_digit_test(path, self.num_eval)
        if self.source in PAIRED_SETS:
            return read_paired_test(self.source, path or data_folder(self.data_dir), self.num_eval)
        if self.source == "camvid":
            return read_camvid(self._camvid_file(path or data_folder(self.data_dir)), "test", self.task_names)
        _, held_out, size = self._scenes
        if path is None:
            return scenes(held_out, size, "test") if self.source == "embedded_scenes" else self._parts[1]
        layout = LAYOUTS.get(self.source) or scene_layout(size)
        inner = path / "val"
        return NpyTable(inner if inner.is_dir() else path, layout, self.task_names)

    def _camvid_file(self, path: Path) -> Path:
        if path.is_file():
            return path
        name = "camvid_small.npz"
        for file in (path / "camvid_small" / name, path / name):
            if file.is_file():
                return file
        raise FileNotFoundError(
            f"{name} is not in {path}: put camvid_small/{name} there (x_train, seg_train, frame_train, x_test, "
            "seg_test), or name its folder in data_dir or ZOO_DATA"
        )

    def _tables(self, stage: str | None) -> dict[str, ImageTable]:
        parts = {}
        if stage in (None, "fit", "validate"):
            parts = {"training": self._parts[0], "validation": self._parts[1]}
        if stage in (None, "test", "predict"):
            parts["test"] = self._test_table
        return parts

    def prepare_data(self) -> None:
        """Read sets of single files through once, on one process of a machine: bad values show now, not in an epoch."""
        running = None if self.trainer is None else self.trainer.state.fn
        for table in self._tables(running and running.value).values():
            if isinstance(table, NpyTable):
                table.check()

    def setup(self, stage: str) -> None:
        """Read what the stage needs; later calls cost nothing."""
        sizes = ", ".join(f"{len(table)} {name}" for name, table in self._tables(stage).items())
        log.info("%s: %s images, tasks %s", self.source, sizes, ", ".join(self.task_names))

    @cached_property
    def _hidden(self) -> dict[str, Tensor]:
        """By task, bool `(training images,)`: whether its label is hidden."""
        size = len(self._parts[0])
        count = int(self.missing_fraction * size)
        if not count:
            return {}
        found = {}
        for name in self.task_names:
            # Keyed by the name: a subset of the tasks hides the same labels.
            key = mix(run_seed(self.seed), *name.encode())
            order = keyed_uniform(key, torch.arange(size)).argsort(stable=True)
            found[name] = torch.zeros(size, dtype=torch.bool)
            found[name][order[:count]] = True
        return found

    def train_dataloader(self) -> BatchLoader:
        """Training batches in an order keyed by seed and epoch; all ranks have equal batches."""
        rows = ImageTaskRows(self._parts[0], self._kinds, self.augment, self._hidden)
        sampler = training_sampler(len(rows), self.batch_size, self.seed, self.trainer, "images")
        return self._loader(rows, sampler)

    def _eval_loader(self, table: ImageTable) -> BatchLoader:
        return self._loader(ImageTaskRows(table, self._kinds), KeyedSampler(len(table), self.eval_batch_size))

    def val_dataloader(self) -> BatchLoader:
        """Validation images, in the order of the data."""
        return self._eval_loader(self._parts[1])

    def test_dataloader(self) -> BatchLoader:
        """Test images, in the order of the data, or those of `test_path`."""
        return self._eval_loader(self._test_table)

    def predict_dataloader(self) -> BatchLoader:
        """The test images."""
        return self._eval_loader(self._test_table)
