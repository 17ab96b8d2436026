"""The steps of torch's own optimizers as linear functions of the gradient, to be split among tasks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Optimizer, RMSprop
from torch.optim.optimizer import _default_to_fused_or_foreach

from zoo.adatask.task_gradients import total

if TYPE_CHECKING:
    from collections.abc import Callable


class StepTerms(NamedTuple):
    """A step by the gradient g: m <- decay m + gain x, and p <- p - lr (through m + direct x).

    The denominator divides g (x = g / denominator) if it comes `before` the moment, and else the step (x = g).
    """

    lr: float
    denominator: Tensor | None = None
    decay: float = 0.0
    gain: float = 1.0
    through: float = 0.0
    direct: float = 1.0
    before: bool = False


def step_terms(
    optimizer: Optimizer, group: dict[str, Any], read: Callable[[str], Tensor], clock: float, fresh: bool
) -> StepTerms:
    """The step that one of torch's optimizers has just made, as a linear function of the gradient.

    Args:
        optimizer: SGD, RMSprop, Adagrad, Adam or AdamW.
        group: The parameter's group.
        read: Reads one of the parameter's accumulators.
        clock: Its step count after the step.
        fresh: Whether its momentum buffer was empty before the step.
    """
    lr = -float(group["lr"]) if group["maximize"] else float(group["lr"])
    momentum = float(group.get("momentum", 0.0))
    if isinstance(optimizer, SGD):
        if not momentum:
            return StepTerms(lr)
        gain = 1.0 if fresh else 1 - group["dampening"]
        through, direct = (momentum, 1.0) if group["nesterov"] else (1.0, 0.0)
        return StepTerms(lr, None, momentum, gain, through, direct)
    if isinstance(optimizer, RMSprop):
        square = read("square_avg")
        if group["centered"]:
            square = square - read("grad_avg").square()
        denominator = square.sqrt() + group["eps"]
        return StepTerms(lr, denominator, momentum, 1.0, 1.0, 0.0, True) if momentum else StepTerms(lr, denominator)
    if isinstance(optimizer, Adagrad):
        return StepTerms(lr / (1 + (clock - 1) * group["lr_decay"]), read("sum").sqrt() + group["eps"])
    beta1, beta2 = (float(beta) for beta in group["betas"])
    square = read("max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq")
    denominator = square.sqrt() / math.sqrt(1 - beta2**clock) + group["eps"]
    return StepTerms(lr, denominator, beta1, 1 - beta1, 1 / (1 - beta1**clock), 0.0)


def stepped_with(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor, state: dict[str, Any]) -> Tensor:
    """The gradient of the step; Nesterov's foreach kernel leaves the sum of gradient and momentum in `.grad`."""
    gradient = parameter.grad
    assert gradient is not None
    if isinstance(optimizer, SGD) and group["nesterov"] and not group["maximize"] and not group["weight_decay"]:
        foreach, fused = group["foreach"], group["fused"]
        if foreach is None and fused is None:
            foreach = _default_to_fused_or_foreach(group["params"], differentiable=False)[1]
        if foreach:
            return gradient.sub(state["momentum_buffer"], alpha=group["momentum"])
    return gradient


def rescaled(x: Tensor, joint: Tensor, eps: float) -> Tensor:
    """Gradients `(slots, elements)`, scaled as their sum was before the step: by one factor, or each clipped."""
    summed = total(x.unbind())
    # The usual case; on an accelerator asking would wait for it.
    if x.device.type == "cpu" and torch.equal(joint, summed):
        return x
    size, tolerance = x.abs().sum(0), 64 * eps
    square = summed.square().sum()
    factor = torch.where(square > 0, (joint * summed).sum() / square, 1.0)
    even = ((joint - factor * summed).abs() <= tolerance * factor.abs() * size).all()
    # Where the tasks nearly cancel, a ratio of sums is a ratio of rounding errors.
    clipped = (joint - summed).abs() > tolerance * size
    ratio = joint / summed
    clipped &= (ratio >= 0) & (ratio <= 1)
    return x * torch.where(even, factor, torch.where(clipped, ratio, 1.0))
