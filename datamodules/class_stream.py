"""One labelled set as a stream of tasks, each with classes of its own, whose images are private, or nearly so."""

from __future__ import annotations

import hashlib
import logging
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningDataModule

from datamodules.class_stream_batches import (
    EvalBatch,
    EvalRows,
    StreamBatch,
    StreamSampler,
    StreamSteps,
    Stretch,
    to_canonical,
)
from datamodules.class_stream_parts import StreamParts, split_classes
from datamodules.loading import BatchLoader, KeyedSampler, LoaderMixin, follow, run_seed
from datamodules.options import at_least
from datamodules.sources.classification_sets import DigitSets, MemorySets, NpzSets
from datamodules.sources.download import data_folder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from typing_extensions import Self

    from datamodules.classification_parts import Part
    from datamodules.sources.classification_sets import TaskSets

__all__ = ["ClassStreamData", "EvalBatch", "StreamBatch"]

SOURCES = ("embedded", "zoo")
EMBEDDED = ("digits",)
_DIGIT_SIZE = 8

log = logging.getLogger(__name__)


class ClassStreamData(LoaderMixin, LightningDataModule):
    """One labelled set as a stream of tasks with classes of their own.

    The training images of a task are private: they are for whom `private` hands them to, to train the service of the
    task. Training batches hold a share `real_fraction` of them; by default none, and then they say only which task and
    step it is, and nothing of any pixel is in them. An epoch is a task, of `iterations_per_task` batches: a fit has
    `num_tasks` epochs.

    Sources:

    - "embedded": scikit-learn's digits, 1 x 8 x 8. No file.
    - "zoo": a file `<dataset>/<dataset>.npz` in `data_dir` with `x_train`, `y_train`, `x_test`, `y_test`, `classes`.
      Grey images keep their one channel, and all keep their size.

    Labels are those of the set, everywhere, so that column c of a model with `num_classes` outputs is class c of the
    set; classes that no task has leave their columns unused. Images in batches are in the canonical domain [-1, 1].

    Which image is for validation is fixed; which ones are the real share depends on `seed`. A larger share holds the
    smaller one.

    Args:
        source: "embedded" or "zoo".
        dataset: Name of the set: "digits", or that of the file.
        data_dir: Folder of the sets; `$ZOO_DATA` by default, or else the user's cache.
        test_path: Other images to test on, as a folder with `<dataset>/<dataset>.npz` or `<dataset>.npz`, or such a
            file, with `x_test`, `y_test`, `classes`. Classes are matched by name.
        num_tasks: Number of tasks; by default as many as `classes_per_task` allows, or else 5.
        classes_per_task: Classes of a task; by default all classes are shared out.
        class_order_seed: Draws the order in which classes are shared out; ascending by default.
        iterations_per_task: Training batches of each task.
        real_fraction: Share of the private images of each class that training batches show, rounded down.
        min_per_class: At least so many images of each class are in that share.
        joint: Whether the real images of all tasks are there in every epoch, whose batches are then all of the last
            task: the upper reference.
        batch_size: Real images of a training batch, per process.
        eval_batch_size: Batch size of evaluation, per process.
        max_images: At most so many images in each part (private, validation, test) of each task, of each class its
            share.
        validation_fraction: Share of the training images of each class that is held out for validation. They are
            neither private images nor real ones; still they are real pixels, so that what is chosen by them is no
            longer data-free. Without them the accuracies after each task are measured on the test images, and nothing
            is chosen by these.
        image_size: Rows and columns to bring images to; by default they keep their own.
        num_workers: Worker processes.
        pin_memory: Whether batches are in page-locked memory; by default where a GPU is.
        seed: Key of the real share and of its order; by default the one of `seed_everything`.

    Raises:
        ValueError: If options contradict each other or are out of range.
    """

    def __init__(
        self,
        source: str = "embedded",
        dataset: str = "digits",
        data_dir: str | None = None,
        test_path: str | None = None,
        num_tasks: int | None = None,
        classes_per_task: int | None = None,
        class_order_seed: int | None = None,
        iterations_per_task: int = 60,
        real_fraction: float = 0.0,
        min_per_class: int = 0,
        joint: bool = False,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        max_images: int | None = None,
        validation_fraction: float = 0.0,
        image_size: int | None = None,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.source, self.dataset, self.data_dir, self.test_path = source, dataset, data_dir, test_path
        self.num_tasks, self.classes_per_task, self.class_order_seed = num_tasks, classes_per_task, class_order_seed
        self.iterations_per_task, self.joint = iterations_per_task, joint
        self.real_fraction, self.min_per_class = real_fraction, min_per_class
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.max_images, self.validation_fraction = max_images, validation_fraction
        self.image_size, self.seed = image_size, seed
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._memory: MemorySets | None = None
        self._check_options()

    def _check_options(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {self.source!r}")
        if self.source == "embedded" and self.dataset not in EMBEDDED:
            raise ValueError(f"dataset={self.dataset!r} is not embedded: expected {', '.join(EMBEDDED)}, or source=zoo")
        if self.data_dir and self.source != "zoo":
            raise ValueError(f"data_dir={self.data_dir} has no meaning for source={self.source!r}: expected zoo")
        at_least(
            ("num_tasks", self.num_tasks, 1),
            ("classes_per_task", self.classes_per_task, 2),
            ("iterations_per_task", self.iterations_per_task, 1),
            ("min_per_class", self.min_per_class, 0),
            ("batch_size", self.batch_size, 1),
            ("eval_batch_size", self.eval_batch_size, 1),
            ("max_images", self.max_images, 1),
            ("image_size", self.image_size, 4),
            ("num_workers", self.num_workers, 0),
        )
        if not 0 <= self.real_fraction <= 1:
            raise ValueError(f"real_fraction must be from 0 to 1, got {self.real_fraction}")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be at least 0 and below 1, got {self.validation_fraction}")
        for name, given in (("joint", self.joint), ("min_per_class", self.min_per_class)):
            if given and not self.real_fraction:
                raise ValueError(f"{name}={given} has no meaning without real images: set real_fraction above 0")

    @classmethod
    def from_datasets(  # type: ignore[override]  # Lightning's own takes one set for each stage
        cls,
        datasets: Mapping[str, tuple[Tensor, Tensor]],
        class_names: Sequence[str] | None = None,
        **options: Any,
    ) -> Self:
        """A stream of images in memory.

        Args:
            datasets: By part ("train", "test"), images and labels: uint8 `(images, height, width)`,
                `(images, height, width, 3)` or `(images, 1 or 3, height, width)`, and integers `(images,)`.
            class_names: Names of the classes; numbers up to the largest label by default.
            options: Arguments of the constructor, but for `source` and `data_dir`.

        Raises:
            ValueError: If these are not images and labels, or an option is out of range.
        """
        if options.get("data_dir"):
            raise ValueError(f"data_dir={options['data_dir']} has no meaning for tensors")
        data = cls("zoo", **options)
        names = None if class_names is None else {data.dataset: class_names}
        data.source, data._memory = "memory", MemorySets({data.dataset: datasets}, names)
        return data

    @cached_property
    def _sets(self) -> TaskSets:
        if self._memory is not None:
            return self._memory
        if self.source == "embedded":
            digits = DigitSets(self.image_size or _DIGIT_SIZE)
            return MemorySets({self.dataset: {part: digits.read("upright", part) for part in ("train", "test")}})
        return NpzSets(data_folder(self.data_dir))

    @cached_property
    def class_names(self) -> list[str]:
        """Names of the classes of the set in the order of the labels; reads no image."""
        return self._sets.classes(self.dataset)

    @property
    def num_classes(self) -> int:
        """Classes of the set, those that no task has included."""
        return len(self.class_names)

    @cached_property
    def task_classes(self) -> list[list[int]]:
        """Labels of each task, ascending; reads no image.

        Raises:
            ValueError: If the classes do not suffice, do not divide, or a task has fewer than two.
        """
        tasks = split_classes(self.num_classes, self.num_tasks, self.classes_per_task, self.class_order_seed)
        unused = sorted({*range(self.num_classes)} - {label for labels in tasks for label in labels})
        if unused:
            log.info("%d of %d classes are in no task: %s", len(unused), self.num_classes,
                     ", ".join(self.class_names[label] for label in unused))  # fmt: skip
        return tasks

    @cached_property
    def image_shape(self) -> list[int]:
        """Channels, height and width of the images."""
        return self._parts.image_shape

    to_canonical = staticmethod(to_canonical)

    @cached_property
    def _parts(self) -> StreamParts:
        test_sets = None
        if self.test_path is not None:
            path = Path(self.test_path).expanduser()
            if not path.exists():
                raise FileNotFoundError(f"test_path={path} is missing: expected {self.dataset}.npz, or its folder")
            test_sets = NpzSets(path, "test_path")
        return StreamParts(
            self._sets,
            self.dataset,
            self.task_classes,
            self.image_size,
            self.validation_fraction,
            self.max_images,
            test_sets,
        )

    def _real(self, task: int) -> Part | None:
        """The real share of a task as it is read; None: there is none."""
        if not self.real_fraction:
            return None
        return self._parts.share(task, self.real_fraction, self.min_per_class, run_seed(self.seed))

    def private(self, task: int) -> tuple[Tensor, Tensor]:
        """All training images of a task, for training its service on the spot, and for nothing else.

        Args:
            task: Its number.

        Returns:
            uint8 `(images, channels, height, width)` and int64 `(images,)`, labels of the whole set.

        Raises:
            FileNotFoundError: If the file is missing.
            ValueError: If there is no such task, one of its classes has no image, or the file is malformed.
        """
        images, labels, _ = self._parts.table(task, "private")
        return images, labels

    def real(self, task: int) -> tuple[Tensor, Tensor] | None:
        """The share of a task's images that training may show; None where it may show none.

        Args:
            task: Its number.

        Returns:
            float32 `(images, channels, height, width)` in [-1, 1] and int64 `(images,)`, labels of the whole set.

        Raises:
            FileNotFoundError: If the file is missing.
            ValueError: If the share leaves a class without an image.
        """
        found = self._real(task)
        return None if found is None else (to_canonical(found.images), found.labels)

    def fingerprint(self, task: int) -> str:
        """A hash of the private images of a task, their labels and its classes: what its service depends on.

        Args:
            task: Its number.
        """
        images, labels = self.private(task)
        digest = hashlib.sha256(repr((self.task_classes[task], tuple(images.shape))).encode())
        digest.update(images.contiguous().numpy().data)
        digest.update(labels.contiguous().numpy().data)
        return digest.hexdigest()[:16]

    def setup(self, stage: str) -> None:
        """Read what the stage needs; later calls cost nothing. A data-free fit reads no training image."""
        parts = []
        if stage == "fit" and self.real_fraction:
            parts.append("private")
        if stage in ("fit", "validate"):
            parts.append("validate" if self.validation_fraction else "test")
        if stage in ("test", "predict"):
            parts.append("test")
        for part in parts:
            for task in range(len(self.task_classes)):
                self._parts.table(task, part)

    def train_dataloader(self) -> BatchLoader:
        """One task an epoch, `iterations_per_task` batches; with `joint`, images of all tasks in each.

        Raises:
            FileNotFoundError: If the file is missing.
            ValueError: If the real share leaves a class without an image.
        """
        tasks, steps = len(self.task_classes), self.iterations_per_task
        found = [self._real(task) for task in range(tasks)]
        stretches = [Stretch(task, *(part or ())[:2]) for task, part in enumerate(found)]
        if self.joint:
            images, labels = (torch.cat(tensors) for tensors in zip(*(part[:2] for part in found if part), strict=True))
            stretches, steps = [Stretch(tasks - 1, images, labels)], tasks * steps
        dataset = StreamSteps(stretches, steps, self.batch_size, run_seed(self.seed))
        sampler = StreamSampler(len(dataset), self.iterations_per_task)
        if self.trainer is not None:
            follow(sampler, self.trainer)
        return self._loader(dataset, sampler)

    def val_dataloader(self) -> list[BatchLoader]:
        """A loader for each task: of the images held out of training, or, where none are, of the test images.

        Only measured on; see `validation_fraction`.
        """
        return self._eval_loaders("validate" if self.validation_fraction else "test")

    def test_dataloader(self) -> list[BatchLoader]:
        """A loader for each task, of the test images, or those of `test_path`."""
        return self._eval_loaders("test")

    def predict_dataloader(self) -> list[BatchLoader]:
        """The test loaders."""
        return self.test_dataloader()

    def _eval_loaders(self, part: str) -> list[BatchLoader]:
        """Every image once, over all processes, in order."""
        rows = [EvalRows(*self._parts.table(task, part)[:2]) for task in range(len(self.task_classes))]
        size = self.eval_batch_size
        return [self._loader(found, KeyedSampler(len(found), size)) for found in rows]
