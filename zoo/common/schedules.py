"""Learning-rate schedules that warm up, and learn the length of the training when it begins."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

from torch.optim.lr_scheduler import LambdaLR

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


class Timed(Protocol):
    """What depends on the length of the training.

    Attributes:
        total_steps: Steps of the training.
    """

    total_steps: int


class Schedule(Timed, Protocol):
    """Factor of a learning rate at a step."""

    def __call__(self, step: int) -> float: ...  # noqa: D102


class WarmupCosine:
    """Factor of a learning rate: up to 1 in a straight line, then down to 0 along a cosine.

    Args:
        warmup_steps: Steps of the way up; at most half of all.
        total_steps: Steps of the training; 0 for a training without an end, whose rate stays. May be set later,
            before the first step.
        floor: What the way down ends at, from 0 to 1.
    """

    def __init__(self, warmup_steps: int, total_steps: int = 0, floor: float = 0.0) -> None:
        self.warmup_steps, self.total_steps, self.floor = warmup_steps, total_steps, floor

    def __call__(self, step: int) -> float:
        """The factor of a step; 1 in a training without an end."""
        if self.total_steps <= 0:
            return 1.0
        warmup = min(self.warmup_steps, self.total_steps // 2)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        way = min(1.0, (step - warmup) / max(1, self.total_steps - warmup))
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * way))


class WarmupLinear:
    """Factor of a learning rate: up to 1 in a straight line, then down to 0 in another.

    Args:
        warmup_ratio: Share of the steps that the way up takes, in [0, 1).
        total_steps: Steps of the training; 0 for a training without an end, whose rate stays. May be set later,
            before the first step.

    Raises:
        ValueError: If the ratio is out of its range.
    """

    def __init__(self, warmup_ratio: float, total_steps: int = 0) -> None:
        if not 0 <= warmup_ratio < 1:
            raise ValueError(f"warmup_ratio must be at least 0 and below 1, got {warmup_ratio}")
        self.warmup_ratio, self.total_steps = warmup_ratio, total_steps

    def __call__(self, step: int) -> float:
        """The factor of a step."""
        if self.total_steps <= 0:
            return 1.0
        warmup = round(self.warmup_ratio * self.total_steps)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return max(0.0, (self.total_steps - step) / max(1, self.total_steps - warmup))


def fit_schedule(module: LightningModule, schedule: Timed) -> None:
    """Tell a module's schedule how long the training is; to be called in `on_train_start`.

    Asked for while the optimizer is built, the length would make Lightning read the data too early: a resumed run
    would then begin its epoch anew.

    Args:
        module: The module in training, with one `LambdaLR`.
        schedule: The factor of its learning rates, or that which its factors follow.
    """
    steps = module.trainer.estimated_stepping_batches
    schedule.total_steps = 0 if math.isinf(steps) else int(steps)
    scheduler = module.lr_schedulers()
    assert isinstance(scheduler, LambdaLR)
    rates = zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    for group, base, factor in rates:
        group["lr"] = base * factor(scheduler.last_epoch)
