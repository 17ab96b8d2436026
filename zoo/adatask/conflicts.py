"""Aggregators that change each task's gradient where it conflicts with another's: PCGrad and GradVac.

Both are K (K - 1) projections in sequence. A changed gradient is a combination of the original ones, so the sequence
runs on K x K coefficients: one Gramian before, one product after.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.adatask.gramian import Array, TaskGramian, combine, task_gramian

# Two parallel gradients have cosine 1, where the target's sine, a divisor, vanishes.
_LARGEST_COSINE = 1 - 1e-6


@torch.no_grad()
def pcgrad(matrix: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """PCGrad (Yu et al., 2020): takes from each gradient what opposes the others, one after another in random order.

    For each k, for j != k in random order: if g'_k . g_j < 0 then g'_k -= (g'_k . g_j) / |g_j|^2 g_j, with g_j as it
    was.

    Args:
        matrix: Task gradients `(K, P)`; a row of zeros is a missing task and stays zero.
        generator: Draws the orders; a CPU generator, torch's default one if None. Processes that share a model must
            draw the same.

    Returns:
        `(K, P)` in the matrix's dtype, to be summed over tasks; the matrix itself if nothing conflicts.

    Raises:
        ValueError: If the matrix is malformed or a row is not finite.
    """
    return _vaccinate(matrix, task_gramian(matrix), None, generator)[0]


@torch.no_grad()
def gradvac(matrix: Tensor, targets: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """GradVac (Wang et al., 2021): raises each gradient's cosine with the others to a target where it is below.

    For each k, for j != k in random order, with c the cosine of g'_k and g_j and t its target: if c < t then
    g'_k += |g'_k| (t sqrt(1 - c^2) - c sqrt(1 - t^2)) / (|g_j| sqrt(1 - t^2)) g_j, after which the cosine is t. Targets
    of zero are PCGrad.

    Args:
        matrix: Task gradients `(K, P)`; a row of zeros is a missing task and stays zero.
        targets: Cosines `(K, K)` in [-1, 1], first index the changed gradient; the diagonal is not read.
        generator: As in `pcgrad`.

    Returns:
        `(K, P)` in the matrix's dtype, to be summed over tasks; the matrix itself if nothing is below its target.

    Raises:
        ValueError: If the matrix is malformed, a row is not finite, or the targets have another shape or range.
    """
    return _vaccinate(matrix, task_gramian(matrix), targets, generator)[0]


class PCGrad:
    """`pcgrad` with a generator of its own: the same orders in every process, and resumable.

    Args:
        seed: Of the random orders.
    """

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, matrix: Tensor) -> Tensor:
        """Changed gradients `(K, P)` of gradients `(K, P)`."""
        return pcgrad(matrix, self.generator)

    def state_dict(self) -> dict[str, Any]:
        """The generator's state."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state that `state_dict` gave."""
        self.generator.set_state(state["generator"].cpu())


class GradVac:
    """`gradvac` with target cosines that follow, by an exponential moving average, the cosines that were met.

    t <- (1 - beta) t + beta c, from zero, where c is the cosine of g'_k and g_j at their turn; pairs with a missing
    task keep theirs.

    Args:
        beta: Share of the newest cosine, in [0, 1]; 0.01 in the paper.
        seed: Of the random orders, which are the same in every process.

    Attributes:
        targets: float64 `(K, K)`, or None before the first call.

    Raises:
        ValueError: If beta is out of range; on a call, if the number of tasks is not that of the first call.
    """

    targets: Tensor | None

    def __init__(self, beta: float = 0.5, seed: int = 0) -> None:
        if not 0 <= beta <= 1:
            raise ValueError(f"beta must be in [0, 1], got {beta}")
        self.beta = beta
        self.targets = None
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def __call__(self, matrix: Tensor) -> Tensor:
        """Changed gradients `(K, P)` of gradients `(K, P)`, after which the targets have moved."""
        gramian = task_gramian(matrix)
        if self.targets is None:
            self.targets = torch.zeros(len(matrix), len(matrix), dtype=torch.float64)
        vectors, cosines = _vaccinate(matrix, gramian, self.targets, self.generator)
        block = np.ix_(gramian.present, gramian.present)
        moved = self.targets.numpy().copy()
        moved[block] += self.beta * (cosines - moved[block])
        self.targets = torch.from_numpy(moved).fill_diagonal_(0)
        return vectors

    def state_dict(self) -> dict[str, Any]:
        """Targets (None before the first call) and the generator's state."""
        targets = None if self.targets is None else self.targets.clone()
        return {"targets": targets, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state that `state_dict` gave."""
        targets = state["targets"]
        self.targets = None if targets is None else targets.to("cpu", torch.float64, copy=True)
        self.generator.set_state(state["generator"].cpu())


def projection_orders(num_tasks: int, generator: torch.Generator | None = None) -> Tensor:
    """For each task the other tasks in random order: int64 `(K, K - 1)`, from a CPU generator."""
    keys = torch.rand(num_tasks, num_tasks, generator=generator).fill_diagonal_(2)
    return keys.argsort(1)[:, : num_tasks - 1]


def _vaccinate(
    matrix: Tensor, gramian: TaskGramian, targets: Tensor | None, generator: torch.Generator | None
) -> tuple[Tensor, Array]:
    """Changed gradients `(K, P)`, and the cosines `(N, N)` that present tasks met on the way."""
    present = gramian.present
    wanted = np.zeros((len(matrix), len(matrix)))
    if targets is not None:
        if targets.shape != wanted.shape or not bool((targets.abs() <= 1).all()):
            shape = tuple(targets.shape)
            raise ValueError(f"target cosines must be {wanted.shape} values in [-1, 1], got shape {shape}: {targets}")
        wanted = targets.detach().to("cpu", torch.float64).numpy()
    orders = projection_orders(len(present), generator).numpy()
    units, met = _coefficients(gramian.cosines, wanted[np.ix_(present, present)], orders)
    if np.array_equal(units, np.eye(len(present))):
        return matrix, met
    # From directions back to gradients: row k is in units of |g_k|, column j in units of |g_j|.
    coefficients = np.zeros_like(wanted)
    coefficients[np.ix_(present, present)] = units * gramian.norms[:, None] / gramian.norms
    return combine(torch.from_numpy(coefficients), matrix), met


def _coefficients(cosines: Array, targets: Array, orders: np.ndarray[Any, Any]) -> tuple[Array, Array]:
    """Coefficients `(N, N)` of the changed directions in the original ones, and the cosines met `(N, N)`."""
    count = len(cosines)
    rows = np.arange(count)
    targets = targets.clip(-_LARGEST_COSINE, _LARGEST_COSINE)
    units, met = np.eye(count), np.eye(count)
    # All tasks take their next turn at once: the turns of different tasks do not read each other.
    for others in orders.T:
        along = np.einsum("kj,jk->k", units, cosines[:, others])
        length = np.sqrt(np.einsum("ki,ij,kj->k", units, cosines, units).clip(min=0))
        cosine = np.divide(along, length, out=np.zeros(count), where=length > 0).clip(-1, 1)
        target = targets[rows, others]
        sine, target_sine = np.sqrt(1 - cosine**2), np.sqrt(1 - target**2)
        raised = length * (target * sine / target_sine - cosine)
        units[rows, others] += np.where(cosine < target, raised, 0)
        met[rows, others] = cosine
    return units, met
