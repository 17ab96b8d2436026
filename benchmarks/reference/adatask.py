"""AdaTask in plain form: one Python loop over tasks and parameters, three lines of the paper each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence


class PlainAdaTask:
    """Algorithm 2 as it is written.

    Args:
        parameters: The parameters; every task reaches those that its gradients are given for.
        num_tasks: Number of tasks K.
        rule: "adam", "rmsprop" or "adagrad".
        lr: Learning rate.
        betas: Decays of first and second moment of "adam".
        alpha: Decay of "rmsprop".
        eps: Added to the root.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        num_tasks: int,
        rule: str = "adam",
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        alpha: float = 0.99,
        eps: float = 1e-8,
    ) -> None:
        self.parameters, self.rule, self.lr = list(parameters), rule, lr
        self.betas, self.alpha, self.eps = betas, alpha, eps
        self.first = [[torch.zeros_like(p) for p in self.parameters] for _ in range(num_tasks)]
        self.second = [[torch.zeros_like(p) for p in self.parameters] for _ in range(num_tasks)]
        self.steps = [[0 for _ in self.parameters] for _ in range(num_tasks)]

    @torch.no_grad()
    def step(self, rows: Sequence[Sequence[Tensor | None]]) -> None:
        """Update the parameters from gradients by task and parameter."""
        beta1, beta2 = self.betas
        for i, parameter in enumerate(self.parameters):
            total = torch.zeros_like(parameter)
            for k, row in enumerate(rows):
                g = row[i]
                if g is None:
                    continue
                self.steps[k][i] += 1
                t = self.steps[k][i]
                if self.rule == "adam":
                    self.first[k][i] = beta1 * self.first[k][i] + (1 - beta1) * g
                    self.second[k][i] = beta2 * self.second[k][i] + (1 - beta2) * g * g
                    mean = self.first[k][i] / (1 - beta1**t)
                    square = self.second[k][i] / (1 - beta2**t)
                    total += mean / (square.sqrt() + self.eps)
                elif self.rule == "rmsprop":
                    self.second[k][i] = self.alpha * self.second[k][i] + (1 - self.alpha) * g * g
                    total += g / (self.second[k][i].sqrt() + self.eps)
                else:
                    self.second[k][i] = self.second[k][i] + g * g
                    total += g / (self.second[k][i].sqrt() + self.eps)
            parameter -= self.lr * total


def separate_backwards(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[list[Tensor | None]]:
    """Gradients by task as the published code gets them: a backward pass of the sum, then a whole one per task."""
    joint = losses[0]
    for loss in losses[1:]:
        joint = joint + loss
    joint.backward(retain_graph=True)
    rows = []
    for loss in losses:
        for parameter in parameters:
            parameter.grad = None
        loss.backward(retain_graph=True)
        rows.append([None if p.grad is None else p.grad.clone() for p in parameters])
    return rows
