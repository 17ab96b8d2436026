"""Inner products of task gradients, and the small convex problems that aggregators solve on them.

Everything after one K x K product runs on the CPU in float64 with K-sized arrays. Gradients are described by their
lengths and their cosines rather than by the product itself, so that a task whose gradient is a million times shorter
than another's loses no digits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
# Squared lengths outside of this range may have lost digits to float32's ends.
_SAFE_SQUARES = (1e-30, 1e30)


@dataclass(frozen=True)
class TaskGramian:
    """Lengths and cosines of the task gradients that are not zero.

    Attributes:
        present: int64 `(N,)`, rows of the matrix that are not zero; the other tasks are missing from the batch.
        norms: Their lengths `(N,)`.
        cosines: `(N, N)`, ones on the diagonal.
        num_tasks: K, missing tasks included.
        device: Of the matrix.
        dtype: Of the product: float32, or float64 for float64.
    """

    present: NDArray[np.int64]
    norms: Array
    cosines: Array
    num_tasks: int
    device: torch.device
    dtype: torch.dtype

    def weights(self, values: Array) -> Tensor:
        """Weights of the present tasks `(N,)` as a tensor `(K,)`, with 0 for missing tasks."""
        full = np.zeros(self.num_tasks)
        full[self.present] = values
        return torch.from_numpy(full).to(self.device, self.dtype)

    def factor(self) -> Array:
        """Vectors of length one in N dimensions, as columns `(N, N)`, that have these cosines."""
        eigenvalues, eigenvectors = np.linalg.eigh(self.cosines)
        # Rounding of the product leaves eigenvalues slightly below zero.
        return np.asarray(np.sqrt(eigenvalues.clip(min=0))[:, None] * eigenvectors.T)


def task_gramian(matrix: Tensor) -> TaskGramian:
    """Lengths and cosines of task gradients `(K, P)`, from one matrix product.

    Args:
        matrix: One row per task, any floating dtype; rows of zeros are missing tasks.

    Raises:
        ValueError: If the shape or the dtype is wrong, or a row holds a NaN or an infinity (the row is named).
    """
    if matrix.ndim != 2 or not len(matrix) or not matrix.is_floating_point():
        shape = tuple(matrix.shape)
        raise ValueError(f"task gradients must be floating, of shape (tasks, parameters); got {matrix.dtype} {shape}")
    scale = torch.ones(len(matrix), dtype=torch.float64)
    gramian = _product(matrix)
    squares = gramian.diagonal()
    # NaN is neither below nor above, hence the negation.
    doubtful = (~((squares >= _SAFE_SQUARES[0]) & (squares <= _SAFE_SQUARES[1]))).nonzero()[:, 0]
    if len(doubtful):
        largest = matrix.detach()[doubtful.to(matrix.device)].abs()
        largest = largest.amax(1).double().cpu() if matrix.shape[1] else torch.zeros(len(doubtful)).double()
        bad = doubtful[~largest.isfinite()].tolist()
        if bad:
            raise ValueError(f"the gradient of task {', '.join(map(str, bad))} (row of the matrix) is not finite")
        if largest.any():
            scale[doubtful[largest > 0]] = largest[largest > 0]
            gramian = _product(matrix.to(_wide(matrix)) / scale.to(matrix.device, _wide(matrix))[:, None])
            squares = gramian.diagonal()
    present = squares.nonzero()[:, 0]
    lengths = squares[present].sqrt()
    cosines = (gramian[present][:, present] / lengths / lengths[:, None]).clamp(-1, 1).fill_diagonal_(1)
    norms = lengths * scale[present]
    return TaskGramian(present.numpy(), norms.numpy(), cosines.numpy(), len(matrix), matrix.device, dtype=_wide(matrix))


def combine(coefficients: Tensor, matrix: Tensor) -> Tensor:
    """Rows of `coefficients @ matrix` `(K, P)` in the matrix's dtype, multiplied in float32 or wider."""
    with torch.autocast(matrix.device.type, enabled=False):
        wide = matrix.detach().to(_wide(matrix))
        return (coefficients.to(wide.device, wide.dtype) @ wide).to(matrix.dtype)


def min_norm_weights(vectors: Array) -> Array:
    """Weights `(N,)` on the simplex of the shortest vector in the convex hull of the columns of `vectors` `(D, N)`.

    With w = t v, v on the simplex, min over w >= 0 of |A w|^2 + (1^T w - 1)^2 has for every t the same best v: one
    non-negative least-squares problem, solved exactly by its active set. Columns enter with length one.
    """
    from scipy.optimize import nnls

    lengths = np.linalg.norm(vectors, axis=0)
    shortest = lengths.argmin()
    if lengths[shortest] == 0:
        return np.asarray(np.eye(len(lengths))[shortest])
    target = np.zeros(len(vectors) + 1)
    target[-1] = 1
    scaled, _ = nnls(np.vstack([vectors / lengths, lengths[shortest] / lengths]), target)
    weights = scaled / lengths
    return np.asarray(weights / weights.sum())


def cone_weights(vectors: Array) -> Array:
    """Weights `(N, N)` that take each column of `vectors` `(D, N)` into the dual cone of all columns.

    Row k is the v that minimises |A v|^2 subject to v >= e_k: A v is the point nearest to column k that has no negative
    inner product with any column.
    """
    from scipy.optimize import nnls

    return np.stack([nnls(vectors, -column)[0] for column in vectors.T]) + np.eye(vectors.shape[1])


def balanced_weights(cosines: Array, ridge: float = 1e-8, max_steps: int = 100) -> Array:
    """The positive b `(N,)` with (C b) * b = 1, by damped Newton steps on b^T C b / 2 - sum log b.

    The function is self-concordant: a step of length 1 / (1 + decrement) stays positive and cannot diverge.

    Args:
        cosines: Positive semi-definite `(N, N)` with ones on the diagonal.
        ridge: Added to the diagonal. Where a positive combination of the vectors is zero there is no solution; then b
            grows to about ridge^-1/2.
        max_steps: Steps after which the search ends.

    Raises:
        RuntimeError: If it has not converged by then.
    """
    matrix = cosines + ridge * np.eye(len(cosines))
    weights = np.full(len(matrix), np.sqrt(len(matrix) / max(matrix.sum(), ridge)))
    for _ in range(max_steps):
        gradient = matrix @ weights - 1 / weights
        step = -np.linalg.solve(matrix + np.diag(weights**-2), gradient)
        decrement = np.sqrt(max(-gradient @ step, 0.0))
        weights = weights + step / (1 if decrement < 0.25 else 1 + decrement)
        if decrement < 1e-7:
            return weights
    raise RuntimeError(f"the Nash weights have not converged in {max_steps} Newton steps: decrement {decrement:.1e}")


def _wide(matrix: Tensor) -> torch.dtype:
    return torch.float64 if matrix.dtype == torch.float64 else torch.float32


def _product(matrix: Tensor) -> Tensor:
    with torch.autocast(matrix.device.type, enabled=False):
        wide = matrix.detach().to(_wide(matrix))
        return (wide @ wide.T).to("cpu", torch.float64)
