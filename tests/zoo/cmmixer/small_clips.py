"""Small clips with pictures of sound, tiny encoders, and a Trainer for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from lightning import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from zoo.cmmixer.vit import ViTEncoder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Network = TypeVar("Network", bound=nn.Module)

SHAPE, FRAMES, PATCH, WIDTH = [1, 16, 16], 2, 4, 16
SIZES: dict[str, Any] = {"hidden_size": WIDTH, "num_layers": 1, "num_heads": 2}
ENCODER: dict[str, Any] = {
    "image_shape": SHAPE,
    "num_frames": FRAMES,
    "encoder": "tiny",
    "encoder_options": SIZES,
    "patch_size": PATCH,
}


class Clips(NamedTuple):
    """A batch without the datamodule."""

    video: Tensor
    audio: Tensor
    pair_ids: Tensor
    labels: Tensor
    keys: Tensor


def clips(rows: int = 4, seed: int = 0, shape: list[int] = SHAPE, frames: int = FRAMES) -> Clips:
    """Noise whose sound resembles its video; pair ids are not row numbers."""
    generator = torch.Generator().manual_seed(seed)
    video, noise = (torch.randn(rows, frames, *shape, generator=generator) for _ in range(2))
    ids = torch.arange(rows) + 100 * seed + 7
    keys = torch.randint(2**62, (rows,), generator=generator)
    return Clips(video, 0.5 * video.flip(-1) + noise, ids, torch.arange(rows) % 3, keys)


def batches(count: int = 3, rows: int = 4, **options: Any) -> list[Clips]:
    """Batches that differ."""
    return [clips(rows, seed, **options) for seed in range(count)]


def loader(parts: list[Clips]) -> DataLoader[Any]:
    """Batches as they are."""
    return DataLoader(parts, batch_size=None)  # type: ignore[arg-type]


def trainer(folder: Path, **options: Any) -> Trainer:
    """A Trainer that writes below a folder."""
    return Trainer(
        **{
            "max_epochs": 1,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "default_root_dir": folder,
            **options,
        }
    )


def fit(module: Any, parts: list[Clips], folder: Path, val: list[Clips] | None = None, **options: Any) -> Trainer:
    """Train on batches; without a validation by default."""
    running = trainer(folder, **{"limit_val_batches": 1.0 if val else 0, **options})
    running.fit(module, loader(parts), loader(val or parts))
    return running


def at(stage: str, module: Any, parts: list[Clips], folder: Path) -> Any:
    """One of "fit", "validate", "test" and "predict"."""
    if stage == "fit":
        return fit(module, parts, folder)
    return getattr(trainer(folder), stage)(module, loader(parts))


class EachStep(Callback):
    """Keeps what a function of the module returns after each step, and its value before the first one."""

    def __init__(self, look: Callable[[Any], Any]) -> None:
        self.look, self.seen = look, []  # type: ignore[var-annotated]

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.seen.append(self.look(module))

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.seen.append(self.look(module))


def fresh_encoder(seed: int = 0, shape: list[int] = SHAPE, frames: int = FRAMES, **options: Any) -> ViTEncoder:
    """An encoder whose biases and norms are not those of the initialisation."""
    torch.manual_seed(seed)
    return uneven(ViTEncoder(shape, frames, **{"patch_size": PATCH, **SIZES, **options}))


def uneven(module: Network, scale: float = 0.1) -> Network:
    """Weights away from their first values."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return module


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the state of a module."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two states are the same, bit by bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def numbers(metrics: Any) -> dict[str, float]:
    """Logged values as numbers."""
    return {name: float(value) for name, value in metrics.items()}
