"""Merging and representation surgery in plain form: what the equations say, by autograd and without any cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class PlainLayerwiseMerge:
    """Layer-wise AdaMerging with the graph of the merge kept, and one backward pass through it for each task.

    Args:
        base: The pre-trained parameters, tensor by tensor.
        vectors: By task the task vectors, tensor by tensor, in any precision.
    """

    def __init__(self, base: Sequence[Tensor], vectors: Sequence[Sequence[Tensor]]) -> None:
        self.base, self.vectors = list(base), [list(row) for row in vectors]

    def merge(self, coef: Tensor) -> list[Tensor]:
        """theta_0 + sum_k coef[l, k] tau_k, one tensor after the other.

        Args:
            coef: By layer (that is tensor) and task, `(L, K)`.
        """
        merged = []
        for layer, base in enumerate(self.base):
            total = base
            for weight, row in zip(coef[layer].unbind(), self.vectors, strict=True):
                total = total + weight * row[layer].to(base.dtype)
            merged.append(total)
        return merged

    def gradient(self, coef: Tensor, gradients: Sequence[Sequence[Tensor]]) -> tuple[list[Tensor], Tensor]:
        """Merge, and differentiate the sum of the tasks' losses with respect to the coefficients.

        Args:
            coef: `(L, K)`.
            gradients: By task the loss's gradients at the merged parameters, tensor by tensor.

        Returns:
            The merged parameters, and the gradient `(L, K)`.
        """
        leaf = coef.detach().requires_grad_()
        merged = self.merge(leaf)
        for row in gradients:
            torch.autograd.backward(merged, list(row), retain_graph=True)
        assert leaf.grad is not None
        return [tensor.detach() for tensor in merged], leaf.grad


class PlainSurgery:
    """Representation surgery where every step runs the merged encoder and the experts on its images.

    Args:
        merged: The merged encoder, images -> features `(batch, d)`.
        experts: The encoders of the experts, by task.
        weights: By task the matrices W_down `(r, d)` and W_up `(d, r)`, which are trained.
        lr: Adam's learning rate.
    """

    def __init__(
        self,
        merged: Callable[[Tensor], Tensor],
        experts: Sequence[Callable[[Tensor], Tensor]],
        weights: Sequence[tuple[Tensor, Tensor]],
        lr: float = 1e-3,
    ) -> None:
        self.merged, self.experts = merged, list(experts)
        self.weights = [(nn.Parameter(down), nn.Parameter(up)) for down, up in weights]
        self.optimizer = torch.optim.Adam([weight for pair in self.weights for weight in pair], lr=lr)

    def step(self, images: Sequence[Tensor]) -> Tensor:
        """One step on a batch of images of each task; returns the sum of the tasks' losses."""
        self.optimizer.zero_grad()
        losses = []
        for batch, expert, (down, up) in zip(images, self.experts, self.weights, strict=True):
            with torch.no_grad():
                z, z_ind = self.merged(batch), expert(batch)
            repaired = z - torch.relu(z @ down.T) @ up.T
            losses.append((repaired - z_ind).abs().mean())
        total = torch.stack(losses).sum()
        torch.autograd.backward(total)
        self.optimizer.step()
        return total.detach()
