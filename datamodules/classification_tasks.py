"""Several classification tasks on images of one size, to train on or, without labels, to adapt to."""

from __future__ import annotations

import hashlib
import logging
import warnings
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningDataModule

from datamodules.classification_batches import ClassificationBatch
from datamodules.classification_parts import Corruption, TaskParts
from datamodules.loading import BatchLoader, KeyedSampler, LoaderMixin, run_seed
from datamodules.options import at_least, one_of
from datamodules.sources.classification_sets import DIGIT_TASKS, EIGHT_TASKS, DigitSets, MemorySets, NpzSets
from datamodules.sources.clip_prompts import clip_prompts
from datamodules.sources.download import data_folder
from datamodules.task_streams import Normalisation, TaskRows, TaskStreams, step_sampler

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from typing_extensions import Self

    from datamodules.classification_parts import Part
    from datamodules.sources.classification_sets import TaskSets

__all__ = ["ClassificationBatch", "ClassificationTasksData"]

SOURCES = {"embedded": 20, "zoo": 32, "hub": 224}
"""Where images come from, and the size that they are brought to by default."""

HUB_TASKS = ("sun397", "stanford_cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")
DEFAULT_TASKS = {"embedded": DIGIT_TASKS, "zoo": EIGHT_TASKS, "hub": HUB_TASKS}
"""By source, the tasks by default, in the order of the published tables where there is one."""

STREAMS = ("none", "test", "validate", "train")
TRAIN_PARTS = ("all", "pretrain", "finetune")
PARTS = ("train", *TRAIN_PARTS, "validate", "test", "stream")
"""What `images`, `eval_loader` and `fingerprint` take: "train" is the part that `train_part` names."""

log = logging.getLogger(__name__)


class ClassificationTasksData(LoaderMixin, LightningDataModule):
    """Several classification tasks on images of one size.

    A training batch is a dict by task of `ClassificationBatch`, `batch_size` images of each; for evaluation there is
    one loader for each task. With a `stream`, training batches carry no labels: they are not even gathered. The stream
    of "test" is the published protocol of test-time adaptation: it adapts to the very images that it is tested on.

    Which image is in which part is fixed and does not depend on `seed`, nor on labels except for `pretrain_images`:
    runs that build on one another agree on it.

    Sources:

    - "embedded": five tasks made of scikit-learn's digits, 3 x 20 x 20: "upright", "rotated", "parity", "halved",
      "noisy". No file.
    - "zoo": files `<task>/<task>.npz` in `data_dir` with `x_train`, `y_train`, `x_test`, `y_test`, `classes`, for each
      name of `tasks`; by default mnist, fashion_mnist, kmnist, notmnist, cifar10, gtsrb, eurosat, fer2013; 3 x 32 x 32.
    - "hub": data sets of the Hugging Face hub, 3 x 224 x 224.

    Grey images that lack at most 8 rows and columns get a black frame, all others that have another size are resized;
    grey is repeated to three channels.

    Args:
        source: "embedded", "zoo" or "hub".
        data_dir: Folder of the sets; `$ZOO_DATA` by default, or else the user's cache.
        test_path: Other images to test on, as `<task>/<task>.npz` or `<task>.npz` with `x_test`, `y_test`, `classes`
            (or, for a single task, such a file). Classes are matched by name.
        tasks: Tasks and their order; by default all of the source.
        seen_tasks: Tasks of training batches; by default all. The others are there for evaluation only.
        image_size: Rows and columns; by default that of the source.
        mean: Subtracted from images in [0, 1]: one number, or one for each channel.
        std: Divides the result likewise.
        batch_size: Images of each task in a training batch, per process.
        eval_batch_size: Batch size of evaluation, per process.
        stream: What training batches hold: "none", labelled images of the train part; "test", "validate" or "train",
            images of that part without labels.
        train_part: Which part of the training images is the train part: "all", the slice "pretrain" of
            `pretrain_images` for each task, or "finetune", the others.
        pretrain_images: Images of each task in the slice for joint pre-training, in which every class has its share.
        validation_fraction: Share of the training images that is held out for validation.
        max_images: At most so many images in each part (training, validation, test) of each task.
        adapt_fraction: Share of the images that the stream may use; which ones depends on `seed`.
        holdout: Whether a stream of test images uses one half of them, and tests, with such a stream or without, the
            other half.
        corruption: Name of a corruption of the test images and of the stream, at the size that they come in; a list
            shares the images out among its names at random.
        severity: Of the corruption, 1 to 5.
        steps_per_epoch: Training batches of an epoch; by default as many as the largest task has.
        num_workers: Worker processes.
        pin_memory: Whether batches are in page-locked memory; by default where a GPU is.
        seed: Key of the order; by default the one of `seed_everything`.

    Attributes:
        rows_only: Set by who keeps something for each image (features, say) and needs no image in training batches:
            they then have their `rows`, and images of no size.

    Raises:
        ValueError: If options contradict each other or are out of range.
    """

    def __init__(
        self,
        source: str = "embedded",
        data_dir: str | None = None,
        test_path: str | None = None,
        tasks: list[str] | None = None,
        seen_tasks: list[str] | None = None,
        image_size: int | None = None,
        mean: float | list[float] = 0.5,
        std: float | list[float] = 0.5,
        batch_size: int = 16,
        eval_batch_size: int = 128,
        stream: str = "none",
        train_part: str = "all",
        pretrain_images: int | None = None,
        validation_fraction: float = 0.1,
        max_images: int | None = None,
        adapt_fraction: float = 1.0,
        holdout: bool = False,
        corruption: str | list[str] | None = None,
        severity: int = 2,
        steps_per_epoch: int | None = None,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.source, self.data_dir, self.test_path = source, data_dir, test_path
        self.mean, self.std = mean, std
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.stream, self.train_part, self.pretrain_images = stream, train_part, pretrain_images
        self.validation_fraction, self.max_images = validation_fraction, max_images
        self.adapt_fraction, self.holdout = adapt_fraction, holdout
        self.corruption = [corruption] if isinstance(corruption, str) else corruption or []
        self.severity, self.steps_per_epoch, self.seed = severity, steps_per_epoch, seed
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._chosen, self._seen = tasks, seen_tasks
        self.rows_only = False
        self._memory: MemorySets | None = None
        if source not in SOURCES:
            raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {source!r}")
        self.image_size = SOURCES[source] if image_size is None else image_size
        self._check_options()

    def _check_options(self) -> None:
        one_of(
            ("stream", self.stream, STREAMS),
            ("train_part", self.train_part, TRAIN_PARTS),
        )
        at_least(
            ("image_size", self.image_size, 4),
            ("batch_size", self.batch_size, 1),
            ("eval_batch_size", self.eval_batch_size, 1),
            ("num_workers", self.num_workers, 0),
            ("pretrain_images", self.pretrain_images, 1),
            ("max_images", self.max_images, 1),
            ("steps_per_epoch", self.steps_per_epoch, 1),
        )
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be at least 0 and below 1, got {self.validation_fraction}")
        if not 0 < self.adapt_fraction <= 1:
            raise ValueError(f"adapt_fraction must be above 0 and at most 1, got {self.adapt_fraction}")
        if not 1 <= self.severity <= 5:
            raise ValueError(f"severity must be from 1 to 5, got {self.severity}")
        if self.train_part != "all" and self.pretrain_images is None:
            raise ValueError(
                f"train_part={self.train_part} needs pretrain_images, the size of the slice for pre-training"
            )
        if self.data_dir and self.source != "zoo":
            raise ValueError(f"data_dir={self.data_dir} has no meaning for source={self.source!r}: expected zoo")
        for name, names in (("tasks", self._chosen), ("seen_tasks", self._seen)):
            if names is not None and (not names or len(set(names)) < len(names)):
                raise ValueError(f"{name} must name at least one task, each once, got {names}")
        if self.source == "embedded":
            self._check_names("tasks", self.task_names, DIGIT_TASKS)
        self._check_names("seen_tasks", self.seen_tasks, self.task_names)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if isinstance(values, list) and len(values) != 3:
                raise ValueError(f"{name} must be one number, or three, got {values}")
        if min(self._normalise.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")

    def _check_names(self, option: str, names: Sequence[str], known: Sequence[str]) -> None:
        for name in names:
            if name not in known:
                raise ValueError(f"{option} has {name!r}, expected some of {', '.join(known)}")

    @classmethod
    def from_datasets(  # type: ignore[override]  # Lightning's own takes one set for each stage
        cls,
        datasets: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]],
        class_names: Mapping[str, Sequence[str]] | None = None,
        **options: Any,
    ) -> Self:
        """Tasks whose images are in memory.

        Args:
            datasets: By task, by part ("train", "test"), images and labels: uint8 `(images, height, width)`,
                `(images, height, width, 3)` or `(images, 1 or 3, height, width)`, and integers `(images,)`.
            class_names: By task, the names of its classes; numbers up to the largest label by default.
            options: Arguments of the constructor, but for `source` and `data_dir`; images are brought to 32 x 32 by
                default.

        Raises:
            ValueError: If these are not images and labels, or an option is out of range.
        """
        if options.get("data_dir"):
            raise ValueError(f"data_dir={options['data_dir']} has no meaning for tensors")
        data = cls("zoo", **{"tasks": list(datasets), **options})
        data._check_names("tasks", data.task_names, list(datasets))
        data.source, data._memory = "memory", MemorySets(datasets, class_names)
        return data

    @cached_property
    def _sets(self) -> TaskSets:
        if self._memory is not None:
            return self._memory
        if self.source == "embedded":
            return DigitSets(self.image_size)
        if self.source == "hub":
            from datamodules.sources.hub_sets import HubSets

            return HubSets(self.image_size)
        return NpzSets(data_folder(self.data_dir))

    @cached_property
    def _parts(self) -> TaskParts:
        test_sets = None
        if self.test_path is not None:
            path = Path(self.test_path).expanduser()
            if not path.exists():
                raise FileNotFoundError(f"test_path={path} is missing: expected a folder with <task>/<task>.npz for "
                                        f"each of {', '.join(self.task_names)}")  # fmt: skip
            if path.is_file() and len(self.task_names) > 1:
                raise ValueError(f"test_path={path} is one file, but there are {len(self.task_names)} tasks: expected "
                                 "a folder with <task>/<task>.npz for each, or one name in tasks")  # fmt: skip
            test_sets = NpzSets(path, "test_path")
        return TaskParts(
            self._sets,
            self.image_size,
            self.validation_fraction,
            self.pretrain_images,
            self.max_images,
            self.holdout,
            self._corruption,
            test_sets,
        )

    @property
    def _corruption(self) -> Corruption | None:
        return Corruption(tuple(self.corruption), self.severity) if self.corruption else None

    @property
    def _normalise(self) -> Normalisation:
        mean, std = (v if isinstance(v, list) else [v] * 3 for v in (self.mean, self.std))
        return Normalisation((mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks."""
        return list(self._chosen or DEFAULT_TASKS[self.source])

    @property
    def seen_tasks(self) -> list[str]:
        """Tasks of training batches."""
        return list(self._seen or self.task_names)

    @cached_property
    def class_names(self) -> dict[str, list[str]]:
        """By task, names of its classes in the order of the labels; reads no image."""
        return {task: self._sets.classes(task) for task in self.task_names}

    @property
    def tasks(self) -> list[dict[str, Any]]:
        """The tasks as plain values: name, num_classes."""
        return [{"name": task, "num_classes": len(names)} for task, names in self.class_names.items()]

    @property
    def prompts(self) -> dict[str, dict[str, list[str]]]:
        """By task, `class_names` and `templates` with which CLIP is asked about its images.

        Raises:
            ValueError: If there are none for a task or a class.
        """
        found = {}
        for task, classes in self.class_names.items():
            names, templates = clip_prompts(task, classes)
            found[task] = {"class_names": names, "templates": templates}
        return found

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return 3

    def _part(self, task: str, part: str) -> Part:
        """A part of a task; see `PARTS`."""
        self._check_names("tasks", [task], self.task_names)
        if part not in PARTS:
            raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
        if part == "stream":
            return self._stream(task, self.stream, self.train_part)
        return self._parts.table(task, self.train_part if part == "train" else part)

    def _stream(self, task: str, stream: str, part: str) -> Part:
        if stream == "none":
            raise ValueError("stream=none has no images to adapt to: expected stream=test, validate or train")
        return self._parts.stream(task, stream, part, self.adapt_fraction, run_seed(self.seed))

    def images(self, task: str, part: str) -> tuple[Tensor, Tensor | None]:
        """Images and labels of a part, in the order that `ClassificationBatch.rows` counts.

        Args:
            task: Its name.
            part: "train" (the part that `train_part` names), "all", "pretrain", "finetune", "validate", "test", or
                "stream" (what training batches adapt to; it has no labels).

        Returns:
            uint8 `(images, 3, height, width)` and int64 `(images,)`, or None.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If there is no such task or part, or a file is malformed.
        """
        found = self._part(task, part)
        return found.images.expand(-1, 3, -1, -1), None if part == "stream" else found.labels

    def fingerprint(self, part: str, task: str | None = None) -> str:
        """A hash of what the loaders of a part show: images, labels, their order, and what is done to them.

        Args:
            part: See `images`.
            task: A single task; by default all (in "stream", the seen ones).
        """
        names = [task] if task else self.seen_tasks if part == "stream" else self.task_names
        digest = hashlib.sha256(repr((names, *self._normalise)).encode())
        for name in names:
            found = self._part(name, part)
            digest.update(repr(tuple(found.images.shape)).encode())
            digest.update(found.images.contiguous().numpy().data)
            if part != "stream":
                digest.update(found.labels.contiguous().numpy().data)
        return digest.hexdigest()[:16]

    def prepare_data(self) -> None:
        """Download what is not there yet, on one process of a machine."""
        if self.source == "hub":
            self._read(None)

    def setup(self, stage: str) -> None:
        """Read what the stage needs; later calls cost nothing."""
        self._read(stage)

    def _read(self, stage: str | None) -> None:
        if stage in (None, "fit"):
            for task in self.seen_tasks:
                self._part(task, "train" if self.stream == "none" else "stream")
        if stage in (None, "fit", "validate") and self.validation_fraction:
            for task in self.task_names:
                self._part(task, "validate")
        if stage in (None, "test", "predict"):
            for task in self.task_names:
                self._part(task, "test")

    def train_loader(
        self,
        part: str | None = None,
        stream: str | None = None,
        batch_size: int | None = None,
        tasks: Sequence[str] | None = None,
        *,
        steps: int | None = None,
        alone: bool = False,
    ) -> BatchLoader:
        """A training loader for any loop; tell `loader.sampler.set_epoch` before each epoch, as a Trainer does.

        Args:
            part: "all", "pretrain" or "finetune", instead of `train_part`.
            stream: "none", "test", "validate" or "train", instead of the one of the constructor.
            batch_size: Images of each task, instead of the one of the constructor.
            tasks: By default `seen_tasks`.
            steps: Batches of an epoch; by default as many as the largest task has.
            alone: Whether this process sees whole batches and starts with the first epoch, whatever other processes
                and the Trainer do.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a task has fewer images than a batch, or an argument is none of the above.
        """
        part, stream = part or self.train_part, stream or self.stream
        tasks = tasks or self.seen_tasks
        self._check_names("tasks", tasks, self.task_names)
        one_of(("part", part, TRAIN_PARTS), ("stream", stream, STREAMS))
        rows = {}
        for task in tasks:
            labelled = stream == "none"
            found = self._parts.table(task, part) if labelled else self._stream(task, stream, part)
            # What a stream must not know is not there to be gathered.
            labels = found.labels if labelled else None
            rows[task] = TaskRows(task, found.images, labels, self._normalise, self.rows_only and not alone)
        ranks = {"num_replicas": 1, "rank": 0} if alone else {}
        streams = TaskStreams(rows, batch_size or self.batch_size, run_seed(self.seed), **ranks)
        return self._loader(streams, step_sampler(steps or len(streams), None if alone else self.trainer))

    def eval_loader(self, task: str, part: str) -> BatchLoader:
        """Every image of a part once, over all processes, in order; see `images` for the parts."""
        found = self._part(task, part)
        rows = TaskRows(task, found.images, None if part == "stream" else found.labels, self._normalise)
        return self._loader(rows, KeyedSampler(len(rows), self.eval_batch_size))

    def train_dataloader(self) -> BatchLoader:
        """Dicts by task of `batch_size` images each."""
        return self.train_loader(steps=self.steps_per_epoch)

    def val_dataloader(self) -> list[BatchLoader]:
        """A loader for each task, of the images held out of training."""
        if not self.validation_fraction:
            # Lightning takes an empty list for a mistake.
            warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
            return []
        return [self.eval_loader(task, "validate") for task in self.task_names]

    def test_dataloader(self) -> list[BatchLoader]:
        """A loader for each task, of the test images, or those of `test_path`."""
        return [self.eval_loader(task, "test") for task in self.task_names]

    def predict_dataloader(self) -> list[BatchLoader]:
        """The test loaders."""
        return self.test_dataloader()
