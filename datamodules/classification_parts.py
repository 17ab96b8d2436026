"""Which images of a classification task are for training, validation, test and adaptation."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from datamodules.loading import keyed_uniform, mix
from datamodules.sources.classification_sets import fit_size, match_classes

if TYPE_CHECKING:
    from datamodules.sources.classification_sets import LabelledImages, NpzSets, TaskSets

log = logging.getLogger(__name__)

_TRAIN_CUT, _TEST_CUT, _PRETRAIN_CUT, _MIXTURE = range(4)  # keys of fixed draws


def drawn_order(size: int, *keys: int) -> Tensor:
    """An order of `size` things, int64 `(size,)`, fixed by the keys."""
    return keyed_uniform(mix(*keys), torch.arange(size)).argsort(stable=True)


def stratified_order(labels: Tensor, *keys: int) -> Tensor:
    """An order, fixed by the keys, of which every beginning has its share of each class.

    Args:
        labels: int64 `(images,)`.
        keys: Of the draw.

    Returns:
        int64 `(images,)`. Among its first `n` images a class with the share `p` has `n p`, up to rounding.
    """
    order = drawn_order(len(labels), *keys)
    by_class = order[labels[order].argsort(stable=True)]
    counts = labels.bincount()
    starts = counts.cumsum(0) - counts
    classes = labels[by_class]
    within = torch.arange(len(labels)) - starts[classes]
    # The middle of each image's stretch of its class; classes of one size take turns in a drawn order.
    places = (within + 0.5) / counts[classes] + 1e-9 * keyed_uniform(mix(*keys), by_class)
    return by_class[places.argsort(stable=True)]


class Part(NamedTuple):
    """Some images of a task.

    Attributes:
        images: uint8 `(images, 1 or 3, height, width)`.
        labels: int64 `(images,)`.
        numbers: int64 `(images,)`, which image of the set each is.
    """

    images: Tensor
    labels: Tensor
    numbers: Tensor

    def take(self, rows: Tensor) -> Part:
        """Some of them."""
        return Part(*(tensor[rows] for tensor in self))

    def between(self, start: int, stop: int) -> Part:
        """A stretch of them, which shares their memory."""
        return Part(*(tensor[start:stop] for tensor in self))


@dataclass(frozen=True)
class Corruption:
    """A disturbance of images, the same one each time.

    Attributes:
        names: Corruptions; the images are shared out among them at random.
        severity: 1 to 5.
    """

    names: tuple[str, ...]
    severity: int

    def __call__(self, images: Tensor, numbers: Tensor, task: str) -> Tensor:
        """The images disturbed; how, does not depend on which others are there.

        Args:
            images: uint8 `(images, 1 or 3, height, width)`.
            numbers: int64 `(images,)`, which image of the set each is.
            task: Name of the set.

        Returns:
            uint8 `(images, 3, height, width)`.
        """
        from datamodules.sources.corruptions import corrupt

        images = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()
        kinds = (keyed_uniform(mix(_MIXTURE), numbers) * len(self.names)).long()
        for kind, name in enumerate(self.names):
            rows = (kinds == kind).nonzero()[:, 0]
            key = mix(*task.encode(), *name.encode())
            images[rows] = corrupt(images[rows], name, self.severity, key, numbers[rows])
        return images.permute(0, 3, 1, 2).contiguous()


@dataclass
class TaskParts:
    """Parts of the images of each task, read on first use and brought to one size.

    Which image is where is fixed, the same for all tasks that have equally many images (they may be views of the same
    ones), and does not depend on labels, but for the slice for pre-training.

    Attributes:
        sets: Where they come from.
        image_size: Rows and columns.
        validation_fraction: Share of the training images that is for validation.
        pretrain_images: Training images in the part "pretrain", in which every class has its share.
        max_images: At most so many images of training, validation and test.
        holdout: Whether the part "adapt" is a half of the test images that is not in "test"; the whole otherwise.
        corruption: Of the test images.
        test_sets: Other test images.
    """

    sets: TaskSets
    image_size: int
    validation_fraction: float = 0.1
    pretrain_images: int | None = None
    max_images: int | None = None
    holdout: bool = False
    corruption: Corruption | None = None
    test_sets: NpzSets | None = None
    _found: dict[tuple[str, str], Part] = field(default_factory=dict)
    _disturbed: dict[tuple[str, str], Part] = field(default_factory=dict)

    def table(self, task: str, part: str) -> Part:
        """A part of a task.

        Args:
            task: Its name.
            part: "all" (training), "pretrain", "finetune" (the rest of it), "validate", "adapt" or "test".

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If it is malformed, or has too few images for the parts.
        """
        if part == "pretrain" and self.pretrain_images is None:
            raise ValueError("the part to pre-train on needs pretrain_images, the number of its images of each task")
        if part == "validate" and not self.validation_fraction:
            raise ValueError("validation_fraction=0 holds no image out for validation: expected a number above 0")
        if (task, part) not in self._found:
            read = self._read_test if part in ("adapt", "test") else self._read_train
            self._found |= {(task, name): found for name, found in read(task).items()}
        return self._found[task, part]

    def stream(self, task: str, source: str, train_part: str, fraction: float, seed: int) -> Part:
        """What an adaptation may use. There are labels in it, but nothing here looks at them.

        Args:
            task: Its name.
            source: Where the images come from: "test", "validate" or "train".
            train_part: Which part "train" means.
            fraction: Share of these images, at least one.
            seed: Which ones.
        """
        part = {"test": "adapt", "validate": "validate"}.get(source, train_part)
        found = self.table(task, part)
        if self.corruption is not None and source != "test":
            if (task, part) not in self._disturbed:
                self._disturbed[task, part] = self._ready(
                    task, self.sets.read(task, "train"), found.numbers, self.corruption
                )
            found = self._disturbed[task, part]
        if fraction == 1:
            return found
        order = drawn_order(len(found.labels), seed, *task.encode())
        return found.take(order[: max(round(fraction * len(order)), 1)].sort().values)

    def _read_train(self, task: str) -> dict[str, Part]:
        whole = self.sets.read(task, "train")
        order = drawn_order(len(whole.labels), _TRAIN_CUT)
        count = round(self.validation_fraction * len(order))
        if (self.validation_fraction and not count) or count == len(order):
            raise ValueError(
                f"task {task!r} has {len(order)} training images, of which validation_fraction="
                f"{self.validation_fraction} holds out {count}: expected at least one on each side"
            )
        held_out, kept = (rows[: self.max_images].sort().values for rows in (order[:count], order[count:]))
        first = self.pretrain_images or 0
        if first >= len(kept):
            raise ValueError(
                f"pretrain_images={first} leaves nothing to fine-tune on: task {task!r} has {len(kept)} training images"
            )
        if first:
            choice = stratified_order(whole.labels[kept], _PRETRAIN_CUT)
            kept = torch.cat([kept[choice[:first].sort().values], kept[choice[first:].sort().values]])
        # In this order every part is a stretch, and none a copy.
        table = self._ready(task, whole, torch.cat([kept, held_out]), None)
        cuts = {"all": (0, len(kept)), "pretrain": (0, first), "finetune": (first, len(kept))}
        cuts["validate"] = (len(kept), len(table.labels))
        log.info("%s: %d training, %d validation images", task, len(kept), len(held_out))
        return {name: table.between(*cut) for name, cut in cuts.items()}

    def _read_test(self, task: str) -> dict[str, Part]:
        if self.test_sets is None:
            whole = self.sets.read(task, "test")
        else:
            whole = match_classes(self.test_sets, task, self.sets.classes(task))
        rows = drawn_order(len(whole.labels), _TEST_CUT)[: self.max_images]
        half = len(rows) // 2 if self.holdout else 0
        if self.holdout and not half:
            raise ValueError(f"holdout=True needs at least two test images, task {task!r} has {len(rows)}")
        rows = torch.cat([rows[:half].sort().values, rows[half:].sort().values])
        table = self._ready(task, whole, rows, self.corruption)
        log.info("%s: %d test images%s", task, len(rows), f", {half} of them to adapt to" if half else "")
        return {"adapt": table.between(0, half or len(rows)), "test": table.between(half, len(rows))}

    def _ready(self, task: str, whole: LabelledImages, rows: Tensor, corruption: Corruption | None) -> Part:
        images = whole.images[rows]
        grey = images.shape[1] == 1
        # Disturbed is the picture, not its frame, and at the size that it comes in.
        if corruption is not None:
            images = corruption(images, rows, task)
        return Part(fit_size(images, self.image_size, frame=grey), whole.labels[rows], rows)
