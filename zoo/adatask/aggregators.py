"""Gradient aggregators: weights of task gradients, from their Gramian alone.

Each function takes task gradients `(K, P)`, one flat row per task, and returns weights alpha `(K,)` of the combination
sum_k alpha_k g_k, in float32 or wider, for one K x K product over the parameters. A row of zeros is a missing task: it
gets weight 0, and the others are combined as if it did not exist. Aggregators that return changed gradients `(K, P)`
are in `zoo.adatask.conflicts`; `aggregator` makes either kind by name.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from zoo.adatask.conflicts import GradVac, PCGrad
from zoo.adatask.gramian import Array, balanced_weights, cone_weights, min_norm_weights, task_gramian

if TYPE_CHECKING:
    from collections.abc import Callable

# CAGrad divides by |g_w|, which is zero where the worst combination cancels; below this share of |g_0| the norm is
# replaced by its smooth (Huber) form, which keeps the direction within CAGrad's ball and the weights below 1e4.
_SMALLEST_SHARE = 1e-4


def mgda(matrix: Tensor, normalize: Literal["none", "l2"] = "none") -> Tensor:
    """MGDA (Désidéri, 2012; Sener and Koltun, 2018): the shortest vector in the convex hull of the gradients.

    Args:
        matrix: Task gradients `(K, P)`.
        normalize: "none", or "l2" for the hull of g_k / |g_k|.

    Returns:
        alpha `(K,)`, not negative; its sum is 1 with "none". Exact (an active-set method), not iterated to a tolerance.

    Raises:
        ValueError: If the matrix is malformed, a row is not finite, or `normalize` is unknown.
    """
    if normalize not in ("none", "l2"):
        raise ValueError(f"normalize must be 'none' or 'l2', got {normalize!r}")
    gramian = task_gramian(matrix)
    if not len(gramian.present):
        return gramian.weights(gramian.norms)
    if normalize == "l2":
        return gramian.weights(min_norm_weights(gramian.factor()) / gramian.norms)
    return gramian.weights(min_norm_weights(gramian.factor() * _relative(gramian.norms)))


def cagrad(matrix: Tensor, c: float = 0.4, rescale: bool = True) -> Tensor:
    """CAGrad (Liu et al., 2021): the best worst-case descent in a ball around the mean gradient.

    d = g_0 + (c |g_0| / |g_w|) g_w with g_0 the mean gradient and w the minimiser of g_w . g_0 + c |g_0| |g_w| over the
    simplex. For a fixed value v of |g_w| in the bound |g_w| <= (|g_w|^2 / v + v) / 2, w is the min-norm point of the
    vectors g_k + v / (c |g_0|) g_0; the one v that fits its own w is found by bracketing.

    Args:
        matrix: Task gradients `(K, P)`.
        c: Radius of the ball over |g_0|, at least 0; 0 is the mean gradient.
        rescale: Divide by 1 + c^2.

    Returns:
        alpha `(K,)`, not negative.

    Raises:
        ValueError: If the matrix is malformed, a row is not finite, or c is negative.
    """
    from scipy.optimize import brentq

    if not c >= 0:
        raise ValueError(f"c must be at least 0, got {c}")
    gramian = task_gramian(matrix)
    count = len(gramian.present)
    if not count:
        return gramian.weights(gramian.norms)
    vectors = gramian.factor() * _relative(gramian.norms, longest=True)
    mean = vectors.mean(1)
    radius = c * float(np.linalg.norm(mean))
    alpha = np.full(count, 1 / count)
    if radius > 0:

        def minimiser(norm: float) -> Array:
            return min_norm_weights(vectors + norm / radius * mean[:, None])

        def excess(norm: float) -> float:
            return norm - float(np.linalg.norm(vectors @ minimiser(norm)))

        lowest = _SMALLEST_SHARE * radius / c
        # The longest vector has length 1, so the excess at 2 is positive.
        norm = lowest if excess(lowest) >= 0 else brentq(excess, lowest, 2.0, xtol=1e-14, rtol=1e-12)
        alpha += radius / norm * minimiser(norm)
    return gramian.weights(alpha / (1 + c**2) if rescale else alpha)


def imtl_g(matrix: Tensor) -> Tensor:
    """IMTL-G (Liu et al., 2021): the combination with the same projection on every task's direction.

    Args:
        matrix: Task gradients `(K, P)`.

    Returns:
        alpha `(K,)` with sum 1, entries of either sign; zeros where only the zero vector has equal projections.

    Raises:
        ImportError: If torchjd is not installed.
        ValueError: If the matrix is malformed or a row is not finite.
    """
    weighting = _torchjd("IMTLGWeighting")()
    gramian = task_gramian(matrix)
    # On the directions in place of the gradients the pseudo-inverse's cutoff does not depend on the tasks' scales.
    solution = _weigh(weighting, gramian.cosines, gramian.dtype) / _relative(gramian.norms)
    total = solution.sum()
    if abs(total) <= 1e-12 * np.abs(solution).sum():
        return gramian.weights(np.zeros_like(solution))
    return gramian.weights(solution / total)


def nash_mtl(matrix: Tensor) -> Tensor:
    """Nash-MTL (Navon et al., 2022): the bargaining solution, alpha > 0 with (G alpha) * alpha = 1, G the Gramian.

    It is the minimiser of the convex alpha^T G alpha / 2 - sum log alpha, found by damped Newton steps on the
    directions. The combination has length sqrt(K), however short the gradients are.

    Args:
        matrix: Task gradients `(K, P)`.

    Returns:
        alpha `(K,)`, positive for present tasks. Where gradients cancel there is no solution; then alpha |g| is limited
        to about 1e4.

    Raises:
        ValueError: If the matrix is malformed or a row is not finite.
    """
    gramian = task_gramian(matrix)
    if not len(gramian.present):
        return gramian.weights(gramian.norms)
    factor = gramian.factor()
    return gramian.weights(balanced_weights(factor.T @ factor) / gramian.norms)


def aligned_mtl(matrix: Tensor, scale_mode: Literal["min", "median", "rmse"] = "min") -> Tensor:
    """Aligned-MTL (Senushkin et al., 2023): the mean gradient after the principal components have been made equal.

    alpha = sqrt(s) V L^-1/2 V^T 1 / K, with G = V L V^T the Gramian and s its smallest eigenvalue above zero.

    Args:
        matrix: Task gradients `(K, P)`.
        scale_mode: s is the "min" or the "median" of the eigenvalues, or their mean ("rmse").

    Returns:
        alpha `(K,)`.

    Raises:
        ImportError: If torchjd is not installed.
        ValueError: If the matrix is malformed, a row is not finite, or `scale_mode` is unknown.
    """
    if scale_mode not in ("min", "median", "rmse"):
        raise ValueError(f"scale_mode must be 'min', 'median' or 'rmse', got {scale_mode!r}")
    weighting = _torchjd("AlignedMTLWeighting")(scale_mode=scale_mode)
    gramian = task_gramian(matrix)
    norms = _relative(gramian.norms, longest=True)
    return gramian.weights(_weigh(weighting, gramian.cosines * norms * norms[:, None], gramian.dtype))


def upgrad(matrix: Tensor) -> Tensor:
    """UPGrad (Quinton and Rey, 2024): the mean of the gradients, each first taken into the dual cone of all.

    The combination has no negative inner product with any gradient.

    Args:
        matrix: Task gradients `(K, P)`.

    Returns:
        alpha `(K,)`, each at least 1 / K; exact (an active-set method on the unregularised problem).

    Raises:
        ValueError: If the matrix is malformed or a row is not finite.
    """
    gramian = task_gramian(matrix)
    if not len(gramian.present):
        return gramian.weights(gramian.norms)
    projected = cone_weights(gramian.factor())
    return gramian.weights((projected * gramian.norms[:, None] / gramian.norms).mean(0))


_VECTORS: dict[str, type[PCGrad | GradVac]] = {"pcgrad": PCGrad, "gradvac": GradVac}
_WEIGHTS: dict[str, Callable[..., Tensor]] = {
    "mgda": mgda,
    "cagrad": cagrad,
    "imtl_g": imtl_g,
    "nash_mtl": nash_mtl,
    "aligned_mtl": aligned_mtl,
    "upgrad": upgrad,
}


def aggregator(name: str, **options: Any) -> Callable[[Tensor], Tensor]:
    """An aggregator by name.

    Args:
        name: "pcgrad" or "gradvac", which return changed gradients `(K, P)` and have `state_dict` and
            `load_state_dict`; "mgda", "cagrad", "imtl_g", "nash_mtl", "aligned_mtl" or "upgrad", which return weights
            `(K,)`.
        options: Keyword arguments of the class or function of that name.

    Returns:
        A function of task gradients `(K, P)`.

    Raises:
        ValueError: If the name is unknown or the options do not fit it.
    """
    _check(name)
    home = _VECTORS.get(name) or _WEIGHTS[name]
    accepted = inspect.signature(home).parameters.keys() - {"matrix"}
    unknown = sorted(options.keys() - accepted)
    if unknown:
        raise ValueError(f"aggregator {name!r} has no option {', '.join(unknown)}; it has: {sorted(accepted)}")
    return _VECTORS[name](**options) if name in _VECTORS else partial(_WEIGHTS[name], **options)


def default_compose(name: str) -> Literal["pre", "post"]:
    """Where an aggregator belongs beside AdaTask's per-task normalisation.

    "pre": it changes the gradients that enter the moments. "post": it weighs the updates that come out; before the
    moments its weights would be normalised away.

    Raises:
        ValueError: If the name is unknown.
    """
    _check(name)
    return "pre" if name in _VECTORS else "post"


def _check(name: str) -> None:
    if name not in _VECTORS and name not in _WEIGHTS:
        raise ValueError(f"unknown aggregator {name!r}; known: {', '.join([*_VECTORS, *_WEIGHTS])}")


def _relative(norms: Array, longest: bool = False) -> Array:
    """Lengths in units of the shortest or of the longest one, so that results do not depend on the losses' unit."""
    if not len(norms):
        return norms
    return np.asarray(norms / (norms.max() if longest else norms.min()))


def _torchjd(name: str) -> Any:
    try:
        from torchjd import aggregation
    except ImportError as error:
        raise ImportError(
            "this aggregator needs torchjd: pip install 'lightning-method-zoo[aggregators]', or use another one"
        ) from error
    return getattr(aggregation, name)


def _weigh(weighting: Any, gramian: Array, dtype: torch.dtype) -> Array:
    """Weights `(N,)` from a torchjd weighting, in the dtype whose rounding the Gramian `(N, N)` has."""
    if not len(gramian):
        return np.zeros(0)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        weights: Tensor = weighting(torch.from_numpy(gramian).to(dtype))
    return weights.double().numpy()
