"""Optimizers by name."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

import torch

from zoo.adatask.gradients import MODES
from zoo.adatask.mtadam import MTAdam
from zoo.adatask.optimizer import AdaTask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import nn

_PLAIN: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
}
OPTIMIZERS = ("adatask", "mtadam", *_PLAIN)
CLIP_MODES = ("task", "joint")


def build_optimizer(
    name: str,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    tasks: Sequence[str],
    *,
    lr: float,
    joint_parameters: str | None = None,
    extra_group: dict[str, Any] | None = None,
    aggregator: Callable[[torch.Tensor], torch.Tensor] | None = None,
    compose: str = "pre",
    **options: Any,
) -> torch.optim.Optimizer:
    """An optimizer by name, with its parameter groups.

    Args:
        name: One of `OPTIMIZERS`.
        named_parameters: The parameters.
        tasks: Names of the tasks, for "adatask" and "mtadam".
        lr: Learning rate.
        joint_parameters: Regular expression: what it is found in is the name of a parameter whose gradients are summed
            before the rule and left alone by aggregators.
        extra_group: A further parameter group.
        aggregator: For "adatask": the aggregator inside the optimizer; others get its result as their gradient.
        compose: For "adatask": where it works.
        options: Further arguments of the optimizer's constructor; types such as `first_moment_dtype` by their names.

    Raises:
        ValueError: If the name or an option is unknown, `joint_parameters` is in no name, or the optimizer takes no
            aggregator.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}, expected one of {', '.join(OPTIMIZERS)}")
    kinds: dict[str, Any] = {"adatask": AdaTask, "mtadam": MTAdam, **_PLAIN}
    kind = kinds[name]
    accepted = inspect.signature(kind).parameters.keys() - {"params", "tasks", "lr", "aggregator", "compose"}
    unknown = sorted(options.keys() - accepted)
    if unknown:
        raise ValueError(f"optimizer {name!r} has no option {', '.join(unknown)}; it has {', '.join(sorted(accepted))}")
    if isinstance(options.get("first_moment_dtype"), str):
        options["first_moment_dtype"] = dtype_of(options["first_moment_dtype"])
    if "betas" in options:
        options["betas"] = tuple(options["betas"])
    groups = _groups(list(named_parameters), joint_parameters) + ([extra_group] if extra_group else [])
    if name == "adatask":
        optimizer: torch.optim.Optimizer = AdaTask(
            groups, tasks, lr=lr, aggregator=aggregator, compose=compose, **options
        )
    elif name == "mtadam":
        if aggregator is not None:
            raise ValueError("optimizer 'mtadam' brings the gradients to one norm itself and takes no aggregator")
        optimizer = MTAdam(groups, tasks, lr=lr, **options)
    else:
        optimizer = kind(groups, lr=lr, **options)
    return optimizer


def check_training(optimizer: str, *, clip_mode: str, backward_mode: str, select: str, lr_step_epochs: int) -> None:
    """Check options of a training by their values.

    Raises:
        ValueError: If one is unknown or out of its range.
    """
    for name, value, allowed in (
        ("optimizer", optimizer, OPTIMIZERS),
        ("clip_mode", clip_mode, CLIP_MODES),
        ("backward_mode", backward_mode, MODES),
        ("select", select, ("best", "last")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if lr_step_epochs < 0:
        raise ValueError(f"lr_step_epochs must not be negative, got {lr_step_epochs}")


def check_by_task(
    tasks: Sequence[str], loss_weights: Sequence[float] | None, baseline: Mapping[str, float] | None
) -> None:
    """Check options that have a value per task.

    Raises:
        ValueError: If there are too few or too many, one is not positive, or names no task.
    """
    if loss_weights is not None and len(loss_weights) != len(tasks):
        raise ValueError(f"loss_weights has {len(loss_weights)} values for {len(tasks)} tasks")
    if not all(weight > 0 for weight in loss_weights or []):
        raise ValueError(f"loss_weights must be positive, got {loss_weights}")
    for name in baseline or {}:
        if name.partition("/")[2] not in tasks:
            raise ValueError(f"baseline names {name!r}, expected 'metric/task' of {', '.join(tasks)}")


def dtype_of(name: str) -> torch.dtype:
    """A floating-point type by its name, such as "bfloat16".

    Raises:
        ValueError: If there is none of that name.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"unknown floating-point type {name!r}, expected such as 'bfloat16'")
    return found


def _groups(named: list[tuple[str, nn.Parameter]], joint_parameters: str | None) -> list[dict[str, Any]]:
    if joint_parameters is None:
        return [{"params": named}]
    try:
        pattern = re.compile(joint_parameters)
    except re.error as error:
        raise ValueError(f"joint_parameters={joint_parameters!r} is no regular expression: {error}") from error
    joint = [(name, parameter) for name, parameter in named if pattern.search(name)]
    if not joint:
        names = ", ".join(name for name, _ in named)
        raise ValueError(f"joint_parameters={joint_parameters!r} is in no parameter's name: {names}")
    apart = [(name, parameter) for name, parameter in named if not pattern.search(name)]
    return [{"params": apart}, {"params": joint, "shared": False}]
