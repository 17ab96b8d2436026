"""Loss weightings: what each task's loss is multiplied by before the backward pass.

A weighting is a module: what it learns or remembers is in parameters, buffers and extra state, hence in checkpoints.
`forward` turns K losses into K weighted losses to be summed; three hooks feed those that need more than the losses.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from zoo.adatask.feedback_weightings import FAMO, GradNorm
from zoo.adatask.weighting_base import LossWeighting


class EqualWeighting(LossWeighting):
    """The losses themselves (EW), or times constants.

    Args:
        num_tasks: K.
        weights: K positive constants; None for ones.

    Raises:
        ValueError: If there are not K weights, or one is not positive and finite.
    """

    weights: Tensor

    def __init__(self, num_tasks: int, weights: list[float] | None = None) -> None:
        super().__init__(num_tasks)
        weights = [1.0] * num_tasks if weights is None else weights
        if len(weights) != num_tasks or not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"weights must be {num_tasks} positive numbers, got {weights}")
        self.register_buffer("weights", torch.tensor(weights, dtype=torch.float32))

    def weigh(self, losses: Tensor, present: Tensor) -> Tensor:
        """w_k L_k."""
        return self.weights * losses


class UncertaintyWeighting(LossWeighting):
    """UW (Kendall et al., 2018): L_k exp(-s_k) / 2 + s_k / 2 with learned log-variances s_k.

    Args:
        num_tasks: K.
        initial: Of all s_k.
    """

    def __init__(self, num_tasks: int, initial: float = -0.5) -> None:
        super().__init__(num_tasks)
        self.log_variances = nn.Parameter(torch.full((num_tasks,), float(initial)))

    def weigh(self, losses: Tensor, present: Tensor) -> Tensor:
        """L_k exp(-s_k) / 2 + s_k / 2."""
        return (losses * (-self.log_variances).exp() + self.log_variances) / 2


class ImtlLWeighting(LossWeighting):
    """IMTL-L (Liu et al., 2021): exp(s_k) L_k - s_k with learned log-scales s_k, whose optimum makes exp(s_k) L_k = 1.

    Args:
        num_tasks: K.
        initial: Of all s_k.
    """

    def __init__(self, num_tasks: int, initial: float = 0.0) -> None:
        super().__init__(num_tasks)
        self.log_scales = nn.Parameter(torch.full((num_tasks,), float(initial)))

    def weigh(self, losses: Tensor, present: Tensor) -> Tensor:
        """exp(s_k) L_k - s_k."""
        return self.log_scales.exp() * losses - self.log_scales


class DynamicWeightAverage(LossWeighting):
    """DWA (Liu et al., 2019): w_k = K softmax_k(r_k / T), r_k = L_k(e - 1) / L_k(e - 2) from epoch means.

    A task has r_k = 1 until it has two epoch means, so that all weights are 1 in the first two epochs. An epoch in
    which a task had no label (NaN) leaves its history alone.

    Args:
        num_tasks: K.
        temperature: T; the larger, the closer the weights are to 1.

    Raises:
        ValueError: If the temperature is not positive.
    """

    weights: Tensor
    history: Tensor

    def __init__(self, num_tasks: int, temperature: float = 2.0) -> None:
        super().__init__(num_tasks)
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.temperature = temperature
        self.register_buffer("weights", torch.ones(num_tasks))
        self.register_buffer("history", torch.full((2, num_tasks), math.nan))

    def weigh(self, losses: Tensor, present: Tensor) -> Tensor:
        """w_k L_k."""
        return self.weights * losses

    @torch.no_grad()
    def end_epoch(self, mean_losses: Tensor) -> None:
        """Remembers the epoch's mean losses `(K,)` and sets the weights of the next epoch."""
        self.check(mean_losses, "mean_losses")
        mean_losses = mean_losses.to(self.history)
        seen = mean_losses.isfinite()
        self.history.copy_(torch.where(seen, torch.stack([self.history[1], mean_losses]), self.history))
        ratios = (self.history[1] / self.history[0]).nan_to_num(nan=1.0, posinf=1.0)
        self.weights.copy_(self.num_tasks * (ratios / self.temperature).softmax(0))


class RandomLossWeighting(LossWeighting):
    """RLW (Lin et al., 2022): w = softmax(z) with a fresh z ~ N(0, I) per training step; 1 / K in evaluation.

    The draws come from a generator of its own, in the checkpoint and the same in every process.

    Args:
        num_tasks: K.
        seed: Of the generator.
    """

    def __init__(self, num_tasks: int, seed: int = 0) -> None:
        super().__init__(num_tasks)
        self.generator = torch.Generator().manual_seed(seed)

    def weigh(self, losses: Tensor, present: Tensor) -> Tensor:
        """w_k L_k."""
        if not self.training:
            return losses / self.num_tasks
        weights = torch.randn(self.num_tasks, generator=self.generator).softmax(0)
        return weights.to(losses.device) * losses

    def get_extra_state(self) -> Tensor:
        """The generator's state."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Goes on from a generator's state."""
        self.generator.set_state(state.cpu())


_WEIGHTINGS: dict[str, type[LossWeighting]] = {
    "equal": EqualWeighting,
    "uncertainty": UncertaintyWeighting,
    "dwa": DynamicWeightAverage,
    "rlw": RandomLossWeighting,
    "imtl_l": ImtlLWeighting,
    "famo": FAMO,
    "gradnorm": GradNorm,
}


def weighting(name: str, num_tasks: int, **options: Any) -> LossWeighting:
    """A loss weighting by name.

    Args:
        name: "equal", "uncertainty", "dwa", "rlw", "imtl_l", "famo" or "gradnorm".
        num_tasks: K.
        options: Further keyword arguments of the class of that name.

    Raises:
        ValueError: If the name or an option is unknown, or has an impossible value.
    """
    if name not in _WEIGHTINGS:
        raise ValueError(f"unknown weighting {name!r}; known: {', '.join(_WEIGHTINGS)}")
    home = _WEIGHTINGS[name]
    accepted = inspect.signature(home).parameters.keys() - {"num_tasks"}
    unknown = sorted(options.keys() - accepted)
    if unknown:
        raise ValueError(f"weighting {name!r} has no option {', '.join(unknown)}; it has: {sorted(accepted)}")
    return home(num_tasks, **options)
