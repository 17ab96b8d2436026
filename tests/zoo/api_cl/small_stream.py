"""Tiny streams of tasks, with services that are small random networks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from datamodules.class_stream import ClassStreamData
from zoo.api_cl import APIStreamCL, ModuleAPI

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SHAPE = (1, 8, 8)
TASKS = ((0, 1), (2, 3), (4, 5))
ITERATIONS = 4

QUIET = [
    pytest.mark.usefixtures("no_pictures"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*it is recommended to use `Trainer\\(devices=1"),
    pytest.mark.filterwarnings("ignore:.*logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*sync_dist=True.*"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
"""Marks of tests of whole streams; the filters are for what Lightning says of small runs."""


class Counted(nn.Module):
    """Counts the rows that reach a network, whoever asks."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.rows = network, 0

    def forward(self, images: Tensor) -> Tensor:
        self.rows += len(images)
        return self.network(images)


class NoGradient(torch.autograd.Function):
    """What raises as soon as anyone goes backward through a service."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise AssertionError("a gradient went through a black box")


class Sealed(nn.Module):
    """A network that lets no gradient through, although it would have one."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        with torch.enable_grad():
            return NoGradient.apply(self.network(images.requires_grad_()))


def network(seed: int, classes: int = 2) -> nn.Module:
    """A service's network, sure enough of its answers that there is something to learn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        norm, head = nn.BatchNorm2d(4), nn.Linear(4 * 36, classes)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.normal_(head.weight, std=0.5)
        return nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Flatten(), head)


def apis(tasks: Sequence[Sequence[int]] = TASKS, wrap: Any = Counted, **options: Any) -> list[ModuleAPI]:
    return [
        ModuleAPI(wrap(network(task, len(classes))), classes, name=f"service{task}", input_shape=SHAPE, **options)
        for task, classes in enumerate(tasks)
    ]


def counted(boxes: Sequence[ModuleAPI]) -> list[int]:
    """Rows that reached each service."""
    return [box.module.rows for box in boxes]


def images(part: str, seed: int = 0, size: int = 60, classes: int = 6) -> tuple[Tensor, Tensor]:
    """A noisy picture of its own for each class."""
    rng = torch.Generator().manual_seed(7)
    patterns = torch.rand(classes, *SHAPE, generator=rng)
    rng.manual_seed(2 * seed + (part == "test"))
    labels = torch.arange(size) % classes
    pixels = 0.8 * patterns[labels] + 0.2 * torch.rand(size, *SHAPE, generator=rng)
    return (255 * pixels).to(torch.uint8), labels


def data(seed: int = 0, **options: Any) -> ClassStreamData:
    sets = {part: images(part, seed) for part in ("train", "test")}
    settings = {"dataset": "tiny", "num_tasks": 3, "iterations_per_task": ITERATIONS, "batch_size": 8, "seed": 0}
    return ClassStreamData.from_datasets(sets, **settings | options)


def stream(
    boxes: Sequence[Any] | str | None = None, tasks: Sequence[Sequence[int]] = TASKS, **options: Any
) -> APIStreamCL:
    settings: dict[str, Any] = {
        "model": "mlp", "model_options": {"hidden": 16}, "latent_dim": 8, "base_channels": 4,
        "generator_batch_size": 6, "student_batch_size": 12, "memory_batch_size": 8, "student_steps": 2,
        "memory_size": 24, "seed": 3,
    }  # fmt: skip
    if boxes is None:
        boxes = apis(tasks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return APIStreamCL(
            [list(classes) for classes in tasks], sum(map(len, tasks)), list(SHAPE), apis=boxes, **settings | options
        )


def trainer(folder: Path, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0, "max_epochs": 3,
        "limit_val_batches": 0, "default_root_dir": folder,
    }  # fmt: skip
    return Trainer(**settings | options)


def fit(folder: Path, model: APIStreamCL, source: ClassStreamData | None = None, **options: Any) -> Trainer:
    ckpt_path = options.pop("ckpt_path", None)
    one = trainer(folder, **options)
    one.fit(model, data() if source is None else source, ckpt_path=ckpt_path)
    return one


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def different(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Names of the tensors that are not equal bit for bit."""
    assert first.keys() == second.keys()
    return [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]


class AtStep(Callback):
    """Calls a function with the module before and after every batch, and notes what it returns."""

    def __init__(self, before: Any = None, after: Any = None) -> None:
        self.before, self.after = before, after
        self.noted: list[Any] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.before is not None:
            self.noted.append(self.before(pl_module, batch))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.after is not None:
            self.noted.append(self.after(pl_module, batch))
