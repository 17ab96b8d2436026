"""Checks of an optimizer's options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zoo.adatask.rules import FUSED_DEVICES, RULES, has_fused_kernel

if TYPE_CHECKING:
    import torch

    from zoo.adatask.optimizer import AdaTask


def check_options(optimizer: AdaTask, first_moment_dtype: torch.dtype | None) -> None:
    """Check what holds for all parameters of an optimizer.

    Raises:
        ValueError: If a value is out of its range.
    """
    for name, value, allowed in (
        ("rule", optimizer.rule, RULES),
        ("reduction", optimizer.reduction, ("sum", "mean")),
        ("missing", optimizer.missing, ("skip", "zero", "error")),
        ("nonfinite", optimizer.nonfinite, ("error", "skip", "ignore")),
        ("compose", optimizer.compose, ("pre", "post")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    weights, tasks = optimizer.task_weights, optimizer.tasks
    if len(weights) != len(tasks):
        raise ValueError(f"task_weights has {len(weights)} values for {len(tasks)} tasks ({', '.join(tasks)})")
    if not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(f"task_weights must be positive, got {list(weights)}")
    if first_moment_dtype is not None and optimizer.rule != "adam":
        raise ValueError(f"first_moment_dtype belongs to rule='adam': {optimizer.rule!r} has no first moments")
    if optimizer.low_memory and optimizer.aggregator is not None:
        raise ValueError("low_memory=True drops each task's gradient before the next one: no aggregator can see both")


def check_group(rule: str, group: dict[str, Any]) -> None:
    """Check a parameter group.

    Raises:
        ValueError: If a value is out of its range.
        RuntimeError: If fused kernels are asked for and there are none.
    """
    beta1, beta2 = group["betas"]
    for name, value, low, high in (
        ("lr", float(group["lr"]), 0.0, float("inf")),
        ("betas[0]", beta1, 0.0, 1.0),
        ("betas[1]", beta2, 0.0, 1.0),
        ("alpha", group["alpha"], 0.0, 1.0),
        ("weight_decay", group["weight_decay"], 0.0, float("inf")),
        ("eps", group["eps"], 0.0, float("inf")),
    ):
        if not low <= value < high:
            raise ValueError(f"{name} must be at least {low:g} and below {high:g}, got {value}")
    if group["shared"] not in (False, True):
        raise ValueError(f"shared must be True or False, got {group['shared']!r}")
    if group["amsgrad"] and rule != "adam":
        raise ValueError(f"amsgrad belongs to rule='adam', not to {rule!r}")
    for parameter in group["params"]:
        if not parameter.is_floating_point():
            raise ValueError(f"parameters must be real numbers, got one of type {parameter.dtype}")
        if group["fused"] and not has_fused_kernel(rule, parameter):
            there = ", ".join(FUSED_DEVICES[rule]) or "no device"
            raise RuntimeError(
                f"fused=True: torch has fused {rule} kernels on {there}, and a parameter is {parameter.dtype} on "
                f"{parameter.device.type}; leave fused out"
            )
