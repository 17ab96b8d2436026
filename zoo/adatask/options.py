"""Checks of an optimizer's options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from zoo.adatask.rules import FUSED_DEVICES, RULES

if TYPE_CHECKING:
    from zoo.adatask.optimizer import AdaTask


def check_options(optimizer: AdaTask, amsgrad: bool, group: dict[str, Any] | None = None) -> bool:
    """Check what an optimizer was given, or one of its parameter groups.

    Args:
        optimizer: The optimizer.
        amsgrad: Its option.
        group: The group to check; without one, what holds for all groups.

    Returns:
        Whether the group uses fused kernels.

    Raises:
        ValueError: If a value is out of its range.
        RuntimeError: If fused kernels are asked for and there are none.
    """
    if group is not None:
        return _check_group(optimizer.rule, group)
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
    if amsgrad and optimizer.rule != "adam":
        raise ValueError(f"amsgrad belongs to rule='adam', not to {optimizer.rule!r}")
    if optimizer.low_memory and optimizer.aggregator is not None:
        raise ValueError("low_memory=True drops each task's gradient before the next one: no aggregator can see both")
    return False


def _check_group(rule: str, group: dict[str, Any]) -> bool:
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
    parameters = group["params"]
    complex_or_integer = next((p for p in parameters if not p.is_floating_point()), None)
    if complex_or_integer is not None:
        raise ValueError(f"parameters must be real numbers, got one of type {complex_or_integer.dtype}")
    devices = sorted({parameter.device.type for parameter in parameters})
    possible = set(devices) <= set(FUSED_DEVICES[rule]) and all(
        p.dtype in (torch.float32, torch.float64) or p.is_cuda for p in parameters
    )
    if group["fused"] and not possible:
        there = ", ".join(FUSED_DEVICES[rule]) or "no device"
        raise RuntimeError(f"fused=True: torch has fused {rule} kernels on {there}, and the parameters are on "
                           f"{', '.join(devices)}; leave fused out")  # fmt: skip
    return possible if group["fused"] is None else group["fused"]
