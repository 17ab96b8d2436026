"""Bounds of merging coefficients."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

CONSTRAINTS = ("clamp", "project", "sigmoid", "none")


class MergingCoefficients(nn.Module):
    """Merging coefficients `(L, K)`, the only thing that AdaMerging trains.

    Args:
        num_layers: L; 1 for one coefficient a task.
        num_tasks: K.
        init: Value that all start from; 0.3, the one of Task Arithmetic, in the paper.
        constraint: "clamp" to [0, 1] in the forward pass, as the authors' code does: a coefficient that leaves the
            interval has no gradient any more and never returns. "project" puts it back onto the bound after each step,
            where its gradient stays. "sigmoid" of a free parameter. "none".

    Raises:
        ValueError: If the constraint is unknown, or `init` lies outside of its bounds.
    """

    def __init__(self, num_layers: int, num_tasks: int, init: float = 0.3, constraint: str = "clamp") -> None:
        super().__init__()
        if constraint not in CONSTRAINTS:
            raise ValueError(f"constraint must be one of {', '.join(CONSTRAINTS)}, got {constraint!r}")
        if not math.isfinite(init):
            raise ValueError(f"init must be a finite number, got {init}")
        if constraint in ("clamp", "project") and not 0 <= init <= 1:
            raise ValueError(f"init={init} lies outside of [0, 1], the bounds of constraint={constraint!r}")
        if constraint == "sigmoid" and not 0 < init < 1:
            raise ValueError(f"init={init} is not a value of a sigmoid: expected a number between 0 and 1")
        self.constraint = constraint
        start = math.log(init / (1 - init)) if constraint == "sigmoid" else init
        self.raw = nn.Parameter(torch.full((num_layers, num_tasks), float(start)))

    def forward(self) -> Tensor:
        """The effective coefficients `(L, K)`, with a gradient."""
        if self.constraint == "sigmoid":
            return torch.sigmoid(self.raw)
        return self.raw.clone() if self.constraint == "none" else torch.clamp(self.raw, 0, 1)

    def surrogate(self, gradient: Tensor) -> Tensor:
        """A scalar whose gradient in the free parameters is that of the loss.

        `(coef * G).sum()` with a constant G = dL/dcoef has G times the derivative of the constraint as its gradient.

        Args:
            gradient: G, `(L, K)`.
        """
        effective: Tensor = self()
        return (effective * gradient.detach()).sum()

    @torch.no_grad()
    def after_step(self) -> None:
        """Put the coefficients back into their bounds ("project")."""
        if self.constraint == "project":
            self.raw.clamp_(0, 1)

    @torch.no_grad()
    def assign(self, values: Tensor) -> None:
        """Set the effective coefficients.

        Args:
            values: `(L, K)`, or what expands to it.

        Raises:
            ValueError: If the shape does not fit, or a value has no free parameter.
        """
        try:
            wide = values.to(self.raw).expand_as(self.raw)
        except RuntimeError:
            raise ValueError(
                f"coefficients have the shape {tuple(values.shape)}, expected {tuple(self.raw.shape)}"
            ) from None
        if self.constraint == "sigmoid":
            if not bool(((wide > 0) & (wide < 1)).all()):
                raise ValueError("coefficients must lie between 0 and 1 for constraint='sigmoid'")
            wide = wide.logit()
        self.raw.copy_(wide)
