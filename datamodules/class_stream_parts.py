"""Which classes a task of a stream has, and which of their images are private, real, for validation and for test."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from datamodules.classification_parts import Part, stratified_order
from datamodules.loading import keyed_uniform, mix
from datamodules.sources.classification_sets import fit_size, match_classes

if TYPE_CHECKING:
    from torch import Tensor

    from datamodules.sources.classification_sets import LabelledImages, NpzSets, TaskSets

log = logging.getLogger(__name__)

_NUM_TASKS = 5
_VALIDATION_CUT, _SIZE_CUT, _SHARE_DRAW = range(3)  # keys of draws


def split_classes(
    num_classes: int,
    num_tasks: int | None = None,
    classes_per_task: int | None = None,
    class_order_seed: int | None = None,
) -> list[list[int]]:
    """Share classes out among tasks, equally many to each.

    Args:
        num_classes: Classes of the set.
        num_tasks: Number of tasks; by default as many as `classes_per_task` allows, or else 5.
        classes_per_task: Classes of a task; by default all classes are shared out.
        class_order_seed: Draws the order in which classes are shared out; ascending by default.

    Returns:
        Labels of each task, ascending.

    Raises:
        ValueError: If the classes do not suffice, do not divide, or a task has fewer than two.
    """
    if num_tasks is None:
        num_tasks = _NUM_TASKS if classes_per_task is None else max(num_classes // classes_per_task, 1)
    if classes_per_task is None:
        classes_per_task, rest = divmod(num_classes, num_tasks)
        if rest and classes_per_task > 1:
            raise ValueError(
                f"{num_classes} classes do not divide into num_tasks={num_tasks}: set another num_tasks, or "
                f"classes_per_task={classes_per_task}, which leaves {rest} of them out"
            )
    if classes_per_task < 2:
        raise ValueError(
            f"num_tasks={num_tasks} gives each task {classes_per_task} of {num_classes} classes: expected at least 2"
        )
    if num_tasks * classes_per_task > num_classes:
        raise ValueError(
            f"num_tasks={num_tasks} with classes_per_task={classes_per_task} take {num_tasks * classes_per_task} "
            f"classes, but there are {num_classes}"
        )
    order = torch.arange(num_classes)
    if class_order_seed is not None:
        order = torch.randperm(num_classes, generator=torch.Generator().manual_seed(class_order_seed))
    chosen = order[: num_tasks * classes_per_task].view(num_tasks, classes_per_task)
    return [sorted(labels) for labels in chosen.tolist()]


def some_of_each_class(labels: Tensor, numbers: Tensor, counts: Tensor, key: int) -> Tensor:
    """A draw of so many images of each class; a larger one holds the smaller one.

    Args:
        labels: int64 `(images,)`.
        numbers: int64 `(images,)`, which image of the set each is.
        counts: int64 `(classes,)`, how many to draw of each.
        key: Of the draw.

    Returns:
        int64, places among `labels`, ascending.
    """
    order = keyed_uniform(key, numbers).argsort(stable=True)
    by_class = order[labels[order].argsort(stable=True)]
    classes, totals = labels[by_class], labels.bincount(minlength=len(counts))
    within = torch.arange(len(labels)) - (totals.cumsum(0) - totals)[classes]
    return by_class[within < counts[classes]].sort().values


@dataclass
class StreamParts:
    """Parts of the images of each task, read on first use.

    Which image is for validation is fixed and does not depend on what the tasks are.

    Attributes:
        sets: Where images come from.
        name: Which of these sets.
        task_classes: Labels of each task.
        image_size: Rows and columns to bring images to; None: they keep their own.
        validation_fraction: Share of the training images of each class that is for validation.
        max_images: At most so many images in each part of each task.
        test_sets: Other test images.
    """

    sets: TaskSets
    name: str
    task_classes: list[list[int]]
    image_size: int | None = None
    validation_fraction: float = 0.0
    max_images: int | None = None
    test_sets: NpzSets | None = None
    _found: dict[tuple[int, str], Part] = field(default_factory=dict)

    @cached_property
    def class_names(self) -> list[str]:
        """Names of all classes of the set."""
        return self.sets.classes(self.name)

    @cached_property
    def image_shape(self) -> list[int]:
        """Channels, height and width."""
        return list(self._train.images.shape[1:])

    def table(self, task: int, part: str) -> Part:
        """A part of a task.

        Args:
            task: Its number.
            part: "private" (for training), "validate" or "test".

        Raises:
            FileNotFoundError: If the file is missing.
            ValueError: If there is no such task, it has no images, or the file is malformed.
        """
        if not 0 <= task < len(self.task_classes):
            raise ValueError(f"there is no task {task}: expected 0 to {len(self.task_classes) - 1}")
        if (task, part) not in self._found:
            whole = self._test if part == "test" else self._train
            wanted = torch.isin(whole.labels, torch.tensor(self.task_classes[task]))
            if part != "test":
                wanted &= self._held_out if part == "validate" else ~self._held_out
            rows = wanted.nonzero()[:, 0]
            if self.max_images is not None and len(rows) > self.max_images:
                order = stratified_order(whole.labels[rows], _SIZE_CUT)
                rows = rows[order[: self.max_images].sort().values]
            self._check(task, part, whole.labels[rows])
            self._found[task, part] = Part(whole.images[rows], whole.labels[rows], rows)
            log.info("task %d: %d images, %s", task, len(rows), part)
        return self._found[task, part]

    def share(self, task: int, fraction: float, min_per_class: int, seed: int) -> Part:
        """Some private images of each class of a task; a larger share holds a smaller one.

        Args:
            task: Its number.
            fraction: Share of the images of each class, rounded down.
            min_per_class: But at least so many.
            seed: Which ones.

        Raises:
            ValueError: If the share leaves a class without an image, or a class has too few.
        """
        private = self.table(task, "private")
        totals = private.labels.bincount(minlength=len(self.class_names))
        # 0.29 * 100 is a little less than 29.
        counts = (totals.double() * fraction + 1e-6).long().clamp_(min=min_per_class)
        for label in self.task_classes[task]:
            total = int(totals[label])
            if not counts[label]:
                least = math.ceil(1000 / total) / 10
                raise ValueError(
                    f"real_fraction={fraction}: {100 * fraction:g} % of {total} images leaves class "
                    f"{self._label(label)} empty; need >= {least:g} %, or set min_per_class"
                )
            if counts[label] > total:
                raise ValueError(
                    f"min_per_class={min_per_class} is too much: class {self._label(label)} has {total} images"
                )
        return private.take(some_of_each_class(private.labels, private.numbers, counts, mix(seed, _SHARE_DRAW)))

    @cached_property
    def _train(self) -> LabelledImages:
        whole = self.sets.read(self.name, "train")
        if self.image_size is None:
            return whole
        return whole._replace(images=fit_size(whole.images, self.image_size, frame=whole.images.shape[1] == 1))

    @cached_property
    def _test(self) -> LabelledImages:
        if self.test_sets is None:
            whole = self.sets.read(self.name, "test")
        else:
            whole = match_classes(self.test_sets, self.name, self.class_names)
        images, (channels, height, width) = whole.images, self.image_shape
        grey, fits = images.shape[1] == 1, images.shape[-2:] == (height, width)
        if (not fits and height != width) or (channels == 1 and not grey):
            raise ValueError(
                f"test images of {self.name} have the shape {tuple(images.shape[1:])}, which cannot be brought to that "
                f"of the training images, {(channels, height, width)}"
            )
        images = images if fits else fit_size(images, height, frame=grey)
        return whole._replace(images=images.expand(-1, channels, -1, -1))

    @cached_property
    def _held_out(self) -> Tensor:
        """Which training images are for validation, bool `(images,)`: so many of each class."""
        labels = self._train.labels
        held_out = torch.zeros(len(labels), dtype=torch.bool)
        if not self.validation_fraction:
            return held_out
        totals = labels.bincount(minlength=len(self.class_names))
        counts = (totals.double() * self.validation_fraction).round().long()
        for labels_of_task in self.task_classes:
            for label in labels_of_task:
                held, total = int(counts[label]), int(totals[label])
                if total and held in (0, total):
                    raise ValueError(
                        f"validation_fraction={self.validation_fraction} holds out {held} of {total} training images "
                        f"of class {self._label(label)}: expected at least one on each side"
                    )
        held_out[some_of_each_class(labels, torch.arange(len(labels)), counts, mix(_VALIDATION_CUT))] = True
        return held_out

    def _label(self, label: int) -> str:
        name = self.class_names[label]
        return name if name == str(label) else f"{label} ({name})"

    def _check(self, task: int, part: str, labels: Tensor) -> None:
        counts = labels.bincount(minlength=len(self.class_names))
        empty = [label for label in self.task_classes[task] if not counts[label]]
        # A service must have seen each of its classes; to test on some of them is fair.
        if (part == "private" and empty) or not len(labels):
            limit = "" if self.max_images is None else f" with max_images={self.max_images}"
            raise ValueError(
                f"task {task} has no image of class {', '.join(map(self._label, empty))} in its part {part!r}{limit}"
            )
