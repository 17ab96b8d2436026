"""Base and experts made on the spot, for demos and studies in which none are at hand."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from filelock import FileLock
from torch.nn import functional as F

from zoo.common.reproducibility import mix
from zoo.common.schedules import WarmupCosine
from zoo.merging.expert_folder import is_expert_folder, read_expert_folder, write_expert_folder
from zoo.merging.features import FeatureFn, default_features
from zoo.merging.finetune import build_optimizer, task_losses

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from zoo.merging.backbones import ImageEncoder
    from zoo.merging.expert_folder import ExpertFolder


_MAY_BE_ZERO = ("joint_epochs", "weight_decay", "warmup_steps", "pretrain_epochs", "shift")


class SupervisedData(Protocol):
    """What the data must offer for a training on the spot; `ClassificationTasksData` does."""

    def train_loader(
        self, part: str | None, stream: str | None, batch_size: int | None, tasks: Sequence[str] | None, **kwargs: Any
    ) -> Any:
        """Labelled batches by task, of the part "pretrain" or "finetune"; `sampler.set_epoch` changes their order."""


@dataclass(frozen=True)
class Recipe:
    """How base and experts are trained: the encoder alone, under frozen heads.

    Attributes:
        pretrain_epochs: Epochs of the joint training on the small slice "pretrain", which makes the base.
        pretrain_lr: Its highest learning rate.
        pretrain_batch_size: Images of each task in its batches.
        epochs: Epochs of each expert on its whole training part.
        lr: Its highest learning rate. Experts must stay linearly connected to the base: too high a rate leaves
            nothing to merge.
        batch_size: Images in an expert's batches.
        joint_epochs: Epochs of one more encoder trained on all tasks' whole parts, the joint multi-task row; 0 for
            none.
        weight_decay: AdamW's.
        warmup_steps: Steps of linear warm-up.
        clip: Bound of the gradient's norm.
        shift: Images are moved by up to so many pixels either way, each anew in every batch.
    """

    pretrain_epochs: int = 30
    pretrain_lr: float = 1e-3
    pretrain_batch_size: int = 16
    epochs: int = 10
    lr: float = 3e-4
    batch_size: int = 64
    joint_epochs: int = 0
    weight_decay: float = 0.01
    warmup_steps: int = 100
    clip: float = 1.0
    shift: int = 0

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Recipe:
        """A recipe from plain values.

        Raises:
            ValueError: If an option is unknown or out of range.
        """
        known = [field.name for field in fields(cls)]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise ValueError(f"recipe has no option {unknown[0]!r}: it has {', '.join(known)}")
        recipe = cls(**options)
        for field in fields(cls):
            name, value = field.name, getattr(recipe, field.name)
            least = 0 if name in _MAY_BE_ZERO else None
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"recipe: {name} must be a number, got {value!r}")
            if isinstance(field.default, int) and not isinstance(value, int):
                raise ValueError(f"recipe: {name} must be a whole number, got {value}")
            if not 0 <= value < math.inf or (least is None and value == 0):
                raise ValueError(f"recipe: {name} must be {'positive' if least is None else 'at least 0'}, got {value}")
        return recipe

    def key(self, *context: Any) -> str:
        """A short name for what this recipe makes in a context of plain values."""
        text = json.dumps([asdict(self), *context], sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def train_experts(
    root: str | Path,
    encoder: ImageEncoder,
    heads: Mapping[str, nn.Module],
    data: SupervisedData,
    recipe: Recipe,
    *,
    tasks: Sequence[str],
    seed: int = 0,
    feature_fn: FeatureFn = default_features,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> ExpertFolder:
    """Train a base on all tasks and one expert per task from it, or find them where they were trained before.

    Args:
        root: Folder of the result, kept for the next call: its name must tell the settings (`Recipe.key`).
        encoder: The network with its initial weights; left as it is.
        heads: Frozen heads of all tasks.
        data: Labelled batches.
        recipe: Settings.
        tasks: The tasks; each gets an expert, and the base sees all.
        seed: Of what the network draws, such as dropout; the order of images is the data's own.
        feature_fn: Features of a batch.
        device: Where to train.
        progress: Whether to show a progress bar.
    """
    target = Path(root)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if is_expert_folder(target):
            return read_expert_folder(target)
        with _bar(progress, len(tasks) + 1 + (recipe.joint_epochs > 0)) as bar:
            trained = {task: heads[task].to(device) for task in tasks}

            def train(start: ImageEncoder, part: str, names: Sequence[str], epochs: int, number: int) -> ImageEncoder:
                lr, size = (
                    (recipe.pretrain_lr, recipe.pretrain_batch_size)
                    if len(names) > 1
                    else (recipe.lr, recipe.batch_size)
                )
                model = copy.deepcopy(start).to(device)
                own = {task: trained[task] for task in names}
                key = mix(seed, number)
                # Nothing that is drawn here may shift what the caller draws afterwards.
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(key)
                    _fit(model, own, data, part, epochs, lr, size, recipe, feature_fn, torch.device(device))
                bar()
                return model.to("cpu").eval()

            base = train(encoder, "pretrain", tasks, recipe.pretrain_epochs, 0)
            joint = train(base, "finetune", tasks, recipe.joint_epochs, 1) if recipe.joint_epochs else None

            def experts() -> Iterator[tuple[str, ImageEncoder]]:
                for number, task in enumerate(tasks):
                    yield task, train(base, "finetune", [task], recipe.epochs, 2 + number)

            return write_expert_folder(target, base, experts(), trained, joint, {**asdict(recipe), "seed": seed})


def _fit(
    encoder: ImageEncoder,
    heads: Mapping[str, nn.Module],
    data: SupervisedData,
    part: str,
    epochs: int,
    lr: float,
    batch_size: int,
    recipe: Recipe,
    feature_fn: FeatureFn,
    device: torch.device,
) -> None:
    encoder.train()
    parameters = list(encoder.backbone.requires_grad_().parameters())
    # All on this process, however many there are: the result must not depend on their number.
    loader = data.train_loader(part, "none", batch_size, list(heads), alone=True)
    schedule = WarmupCosine(recipe.warmup_steps, epochs * len(loader))
    optimizer, scheduler = build_optimizer(parameters, lr, recipe.weight_decay, schedule)
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        for batches in loader:
            moved = {
                task: batch._replace(
                    images=shifted(batch.images, recipe.shift).to(device), labels=batch.labels.to(device)
                )
                for task, batch in batches.items()
            }
            loss = torch.stack(list(task_losses(encoder, heads, moved, feature_fn).values())).sum()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
            optimizer.step()
            scheduler.step()


def shifted(images: Tensor, most: int) -> Tensor:
    """Each image moved by its own random number of rows and columns; its edge fills what becomes empty.

    Args:
        images: `(B, c, h, w)`, on the CPU.
        most: Largest number either way.
    """
    if not most:
        return images
    height, width = images.shape[-2:]
    padded = F.pad(images, (most, most, most, most), mode="replicate")
    top, left = torch.randint(2 * most + 1, (2, len(images), 1))
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    image = torch.arange(len(images))[:, None, None]
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class _bar:  # noqa: N801 - a context manager in place of a function
    """A progress bar over trainings; nothing where nobody looks at it."""

    def __init__(self, show: bool, total: int) -> None:
        import sys

        self._show, self._total = show and sys.stderr.isatty(), total

    def __enter__(self) -> Any:
        if not self._show:
            return lambda: None
        from rich.console import Console
        from rich.progress import Progress

        self._progress = Progress(console=Console(stderr=True)).__enter__()
        row = self._progress.add_task("Training base and experts", total=self._total)
        return lambda: self._progress.advance(row)

    def __exit__(self, *error: Any) -> None:
        if self._show:
            self._progress.__exit__(*error)
