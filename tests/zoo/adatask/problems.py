"""Small multi-task problems in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TwoHeads(nn.Module):
    """A trunk of two layers and a linear head per task."""

    def __init__(self, num_tasks: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.trunk = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(num_tasks))
        self.double()

    def forward(self, inputs: Tensor) -> tuple[list[Tensor], Tensor]:
        features = self.trunk(inputs)
        return [head(features).squeeze(1) for head in self.heads], features

    def losses(self, inputs: Tensor, targets: Tensor) -> tuple[list[Tensor], Tensor]:
        outputs, features = self(inputs)
        return [(o - t).square().mean() for o, t in zip(outputs, targets, strict=True)], features


def batch(step: int, num_tasks: int = 3, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    inputs = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    return inputs, torch.randn(num_tasks, size, generator=generator, dtype=torch.float64)


def quadratic(vectors: Tensor, parameter: Tensor) -> list[Tensor]:
    """Losses whose gradients with respect to the parameter are the given vectors."""
    return [(vector * parameter).sum() for vector in vectors]
