"""Loss weightings that learn from what a step has done: FAMO from the losses after it, GradNorm from gradient norms."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zoo.adatask.weighting_base import LossWeighting


class FAMO(LossWeighting):
    """FAMO (Liu et al., 2023): all losses are to fall at the same relative rate, judged from one extra forward pass.

    The weighted losses are z_k log(D_k) / c with D_k = L_k - b_k + 1e-8, z = softmax(logits) over present tasks and
    c = sum_k z_k / D_k, held constant. After the step, with d_k the fall of log D_k on the same batch, the logits take
    a step of Adam (L2 decay gamma) along the gradient z_k (d_k - sum_j z_j d_j).

    Losses must not be below their minima b_k.

    Args:
        num_tasks: K.
        lr: Of the logits.
        gamma: Their decay.
        min_losses: b, K lower bounds; None for zeros.

    Raises:
        ValueError: If lr is not positive, gamma is negative or there are not K minima.
        RuntimeError: If `after_step` comes before any training pass.
    """

    logits: Tensor
    min_losses: Tensor
    last_logs: Tensor
    last_present: Tensor

    def __init__(
        self, num_tasks: int, lr: float = 0.025, gamma: float = 1e-3, min_losses: list[float] | None = None
    ) -> None:
        super().__init__(num_tasks)
        if not gamma >= 0:
            raise ValueError(f"gamma must be at least 0, got {gamma}")
        min_losses = [0.0] * num_tasks if min_losses is None else min_losses
        if len(min_losses) != num_tasks:
            raise ValueError(f"min_losses must be {num_tasks} numbers, got {min_losses}")
        self.gamma = gamma
        self.register_buffer("logits", torch.zeros(num_tasks))
        self.register_buffer("min_losses", torch.tensor(min_losses, dtype=torch.float32))
        self.register_buffer("last_logs", torch.zeros(num_tasks))
        self.register_buffer("last_present", torch.zeros(num_tasks, dtype=torch.bool))
        self.adam = _AdamStep(num_tasks, lr)
        self._ready = False

    def weigh(self, losses: Tensor, present: Tensor) -> Tensor:
        """z_k log(D_k) / c."""
        distances = torch.where(present, losses - self.min_losses + 1e-8, 1.0)
        shares = self._shares(present)
        scale = (shares / distances.detach()).sum()
        logs = distances.log()
        if self.training:
            self._ready = True
            self.last_logs.copy_(logs.detach())
            self.last_present.copy_(present)
        return shares * logs / scale

    @torch.no_grad()
    def after_step(self, losses: Tensor) -> None:
        """Moves the logits, from the losses `(K,)` of the last training batch after the step."""
        self.check(losses, "losses")
        if not self._ready:
            raise RuntimeError("FAMO.after_step needs a training pass of the losses before it")
        falls = self.last_logs - (losses.to(self.logits) - self.min_losses + 1e-8).log()
        falls, present = _mean_over_processes(falls, self.last_present)
        shares = self._shares(present)
        gradient = torch.where(present, shares * (falls - (shares * falls).sum()), 0.0)
        self.logits.sub_(self.adam(gradient + self.gamma * self.logits, present))

    def _shares(self, present: Tensor) -> Tensor:
        shares = torch.where(present, self.logits.softmax(0), 0.0)
        return shares / shares.sum().clamp(min=torch.finfo(shares.dtype).tiny)


class GradNorm(LossWeighting):
    """GradNorm (Chen et al., 2018): weights whose gradient norms are the larger, the slower a task learns.

    With G_k = |w_k g_k| on the shared parameters and r_k = (L_k / L_k(0)) over its mean, the weights descend
    sum_k |G_k - mean(G) r_k^alpha|, the target held constant, by Adam, and are then rescaled to sum K. L_k(0) is the
    loss of the first batch that has task k.

    Args:
        num_tasks: K.
        alpha: How strongly slow tasks are favoured; 0 equalises the norms.
        lr: Of the weights.

    Raises:
        ValueError: If lr is not positive or alpha is negative.
        RuntimeError: If `after_backward` comes before any training pass.
    """

    weights: Tensor
    initial_losses: Tensor
    last_losses: Tensor
    last_present: Tensor
    # Adam may step across zero, where the weight would turn descent into ascent.
    smallest_weight = 1e-3

    def __init__(self, num_tasks: int, alpha: float = 1.5, lr: float = 0.025) -> None:
        super().__init__(num_tasks)
        if not alpha >= 0:
            raise ValueError(f"alpha must be at least 0, got {alpha}")
        self.alpha = alpha
        self.register_buffer("weights", torch.ones(num_tasks))
        self.register_buffer("initial_losses", torch.full((num_tasks,), math.nan))
        self.register_buffer("last_losses", torch.zeros(num_tasks))
        self.register_buffer("last_present", torch.zeros(num_tasks, dtype=torch.bool))
        self.adam = _AdamStep(num_tasks, lr)
        self._ready = False

    def weigh(self, losses: Tensor, present: Tensor) -> Tensor:
        """w_k L_k."""
        if self.training:
            self._ready = True
            self.last_losses.copy_(losses.detach())
            self.last_present.copy_(present)
        # A copy: the weights move while autograd may still need those of this pass.
        return self.weights.clone() * losses

    @torch.no_grad()
    def after_backward(self, gradient_norms: Tensor) -> None:
        """Moves the weights, from the norms `(K,)` of w_k g_k averaged over processes; missing tasks keep theirs."""
        self.check(gradient_norms, "gradient_norms")
        if not self._ready:
            raise RuntimeError("GradNorm.after_backward needs a training pass of the losses before it")
        if not bool(gradient_norms.isfinite().all()):
            return  # an overflow under mixed precision, whose step is left out as well
        losses, present = _mean_over_processes(self.last_losses, self.last_present)
        first = present & self.initial_losses.isnan()
        self.initial_losses.copy_(torch.where(first, losses, self.initial_losses))
        norms = torch.where(present, gradient_norms.to(self.weights), 0.0)
        count = present.sum().clamp(min=1)
        ratios = torch.where(present, losses / self.initial_losses.clamp(min=1e-12), 0.0)
        rates = ratios * count / ratios.sum().clamp(min=1e-12)
        targets = norms.sum() / count * rates**self.alpha
        gradient = torch.where(present, (norms - targets).sign() * norms / self.weights, 0.0)
        moved = torch.where(present, (self.weights - self.adam(gradient, present)).clamp(min=self.smallest_weight), 0.0)
        kept = torch.where(present, 0.0, self.weights)
        self.weights.copy_(kept + moved * ((self.num_tasks - kept.sum()) / moved.sum().clamp(min=1e-12)))


class _AdamStep(nn.Module):
    """Adam's update of K numbers whose gradients are known, with a clock per number; missing ones stand still."""

    first_moment: Tensor
    second_moment: Tensor
    steps: Tensor

    def __init__(self, size: int, lr: float) -> None:
        super().__init__()
        if not lr > 0:
            raise ValueError(f"lr must be positive, got {lr}")
        self.lr = lr
        self.register_buffer("first_moment", torch.zeros(size))
        self.register_buffer("second_moment", torch.zeros(size))
        self.register_buffer("steps", torch.zeros(size))

    def forward(self, gradient: Tensor, present: Tensor) -> Tensor:
        """What to subtract `(K,)`, from gradients `(K,)`."""
        beta1, beta2 = 0.9, 0.999
        self.steps.add_(present)
        self.first_moment.lerp_(gradient, (1 - beta1) * present.to(gradient.dtype))
        self.second_moment.lerp_(gradient**2, (1 - beta2) * present.to(gradient.dtype))
        clock = self.steps.clamp(min=1)
        mean = self.first_moment / (1 - beta1**clock)
        root = (self.second_moment / (1 - beta2**clock)).sqrt()
        return torch.where(present, self.lr * mean / (root + 1e-8), 0.0)


def _mean_over_processes(values: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `(K,)` over the processes that have the task, and whether any has it; 0 where none has."""
    sums = torch.stack([torch.where(present, values, 0.0), present.to(values.dtype)])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    return sums[0] / sums[1].clamp(min=1), sums[1] > 0
