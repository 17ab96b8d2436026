"""What all loss weightings share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LossWeighting(nn.Module):
    """Base of all weightings: the check of the input, the mask of missing tasks, hooks that do nothing.

    A subclass implements `weigh`. A task with `present` false gives exactly 0 and no gradient to its loss, which may
    then be anything, a NaN included. Hooks are called by all processes at the same time or by none; with accumulated
    gradients, once per optimizer step and with the last micro-batch.

    Args:
        num_tasks: K.

    Raises:
        ValueError: If `num_tasks` is not positive; on a call, if the losses are not K scalars in one tensor.
    """

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        if num_tasks < 1:
            raise ValueError(f"num_tasks must be at least 1, got {num_tasks}")
        self.num_tasks = num_tasks

    def forward(self, losses: Tensor, present: Tensor | None = None) -> Tensor:
        """Weighted losses `(K,)`, differentiable, to be summed.

        Args:
            losses: `(K,)`, one scalar per task.
            present: bool `(K,)`, false for tasks without a label in this batch; None for all present.
        """
        self.check(losses, "losses")
        if present is None:
            present = torch.ones(self.num_tasks, dtype=torch.bool, device=losses.device)
        self.check(present, "present")
        # A missing loss is replaced before and after: a NaN times 0 is NaN, in values and in gradients.
        losses = torch.where(present, losses, 1.0)
        return torch.where(present, self.weigh(losses, present), 0.0)

    def weigh(self, losses: Tensor, present: Tensor) -> Tensor:
        """Weighted losses `(K,)`; entries of missing tasks, whose loss reads 1, are not used."""
        raise NotImplementedError

    def end_epoch(self, mean_losses: Tensor) -> None:
        """After a training epoch, with each task's mean loss `(K,)` over it and over all processes (NaN: no label)."""

    def after_backward(self, gradient_norms: Tensor) -> None:
        """After the backward pass, with the norms `(K,)` of the weighted losses' gradients on the shared parameters."""

    def after_step(self, losses: Tensor) -> None:
        """After the optimizer's step, with the losses `(K,)` of the same batch under the new parameters."""

    def check(self, values: Tensor, what: str) -> None:
        """Raises unless `values`, called `what`, has one entry per task."""
        if values.shape != (self.num_tasks,):
            shape = tuple(values.shape)
            raise ValueError(f"{what} must have shape ({self.num_tasks},), one per task, unsummed; got {shape}")
