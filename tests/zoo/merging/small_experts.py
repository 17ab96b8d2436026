"""Small bases, experts, heads and data for tests of whole modules: nothing is trained to get them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader

from datamodules import ClassificationTasksData
from zoo.merging.adamerging import AdaMerging
from zoo.merging.backbones import ImageEncoder, build_encoder
from zoo.merging.expert_folder import ExpertFolder, write_expert_folder
from zoo.merging.finetune import prototype_heads

if TYPE_CHECKING:
    from pathlib import Path

CLASSES = {"a.b": 3, "keys": 2, "c": 4}
"""Tasks and their classes; names that modules and dicts would stumble over."""

TASKS = [{"name": name, "num_classes": count} for name, count in CLASSES.items()]
QUIET = [
    pytest.mark.usefixtures("quick"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*it is recommended to use `Trainer\\(devices=1"),
    pytest.mark.filterwarnings("ignore:.*logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*this fit will run with no optimizer"),
    pytest.mark.filterwarnings("ignore:.*sync_dist=True.*"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`"),
]
"""Marks of tests of whole modules; the filters are for what Lightning says of small runs."""

INPUTS, DIM, SIZE = 6, 5, 8


class Net(nn.Module):
    """A network of someone else: it takes `pixel_values` `(batch, 6)` and gives features `(batch, 5)`."""

    def __init__(self, dropout: float = 0.0, batch_norm: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(INPUTS, 8)
        self.norm = nn.BatchNorm1d(8) if batch_norm else nn.Identity()
        self.drop = nn.Dropout(dropout)
        self.out = nn.Linear(8, DIM)

    def forward(self, pixel_values: Tensor) -> Tensor:
        features: Tensor = self.out(self.drop(torch.tanh(self.norm(self.stem(pixel_values)))))
        return features


def net(**options: Any) -> Net:
    torch.manual_seed(3)
    made = Net(**options)
    if isinstance(made.norm, nn.BatchNorm1d):
        made(torch.randn(64, INPUTS))
    return made.eval()


def moved(module: nn.Module, seed: int, scale: float = 0.1) -> Any:
    """A copy whose parameters have moved at random."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(module)
    for parameter in other.parameters():
        if parameter.requires_grad:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return other


def states(base: nn.Module, tasks: Any = CLASSES) -> dict[str, dict[str, Tensor]]:
    """State dicts of experts."""
    return {task: moved(base, 10 + number).state_dict() for number, task in enumerate(tasks)}


def adamerging(base: nn.Module | None = None, **options: Any) -> AdaMerging:
    """AdaMerging of experts of a network of someone else."""
    base = base or net()
    return AdaMerging(TASKS, **{"experts": states(base), "pretrained": base, "heads": weights(), **options})


def weights(dim: int = DIM, classes: dict[str, int] = CLASSES) -> dict[str, Tensor]:
    """Head weights whose logits tell the classes apart."""
    return {name: 4 * head.weight for name, head in prototype_heads(classes, dim, 1.0).items()}


def rows(task: str, count: int = 24, labels: bool = True, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(100 + seed + 10 * list(CLASSES).index(task))
    inputs = torch.randn(count, INPUTS, generator=generator)
    found = torch.randint(0, CLASSES[task], (count,), generator=generator)
    return [
        {"pixel_values": x, "labels": y} if labels else {"pixel_values": x} for x, y in zip(inputs, found, strict=True)
    ]


def stream(tasks: Any = CLASSES, batch_size: int = 8, labels: bool = True, seed: int = 0) -> CombinedLoader:
    """Batches `{task: {"pixel_values", "labels"}}`, of a new length for each task."""
    sizes = {task: 16 + 8 * number for number, task in enumerate(CLASSES)}
    loaders = {task: DataLoader(rows(task, sizes[task], labels, seed), batch_size=batch_size) for task in tasks}  # type: ignore[arg-type]
    return CombinedLoader(loaders, "max_size_cycle")


def task_loaders(tasks: Any = CLASSES, labels: bool = True) -> list[DataLoader[Any]]:
    return [DataLoader(rows(task, 24, labels, 5), batch_size=10) for task in tasks]  # type: ignore[arg-type]


def trainer(folder: Path, **options: Any) -> Trainer:
    return Trainer(
        **{
            "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
            "enable_model_summary": False, "default_root_dir": folder, **options,
        }
    )  # fmt: skip


def encoder(**options: Any) -> ImageEncoder:
    torch.manual_seed(5)
    settings = {"kind": "mlp", "image_size": SIZE, "hidden_size": 16, "num_layers": 1, "output_size": 8, **options}
    return build_encoder("tiny", **settings)


def clip() -> ImageEncoder:
    torch.manual_seed(5)
    return build_encoder(
        "tiny", image_size=SIZE, patch_size=4, hidden_size=16, num_layers=2, num_heads=2, projection_dim=8
    )


def expert_folder(
    root: Path, base: ImageEncoder | None = None, tasks: Any = CLASSES, joint: bool = False
) -> ExpertFolder:
    base = base or encoder()
    experts = ((task, moved(base, 10 + list(CLASSES).index(task))) for task in tasks)
    heads = prototype_heads({task: CLASSES[task] for task in tasks}, base.dim, 16.0)
    return write_expert_folder(root, base, experts, heads, moved(base, 99) if joint else None)


def images(count: int = 48, tests: int = 24, seed: int = 0) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """Grey images, brighter in the row of their class."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for task, classes in CLASSES.items():
        found[task] = {}
        for part, number in (("train", count), ("test", tests)):
            labels = torch.arange(number) % classes
            pixels = torch.randint(0, 120, (number, SIZE, SIZE), generator=generator)
            pixels[torch.arange(number), labels] += 120
            found[task][part] = (pixels.to(torch.uint8), labels)
    return found


def image_data(sets: Any = None, **options: Any) -> ClassificationTasksData:
    settings = {"image_size": SIZE, "batch_size": 8, "eval_batch_size": 10, "stream": "test", "seed": 0, **options}
    data: ClassificationTasksData = ClassificationTasksData.from_datasets(sets or images(), **settings)
    return data


def equal(left: Any, right: Any) -> bool:
    """Whether two state dicts are the same, bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
