"""Gradients of a function that can only be asked for values, from differences along random directions.

The paper trains its generators without a derivative of the API. The paper's text beyond its abstract could not be
read; this is a documented reconstruction: with d numbers in a sample and m directions u of length 1,

    g = d / m * sum_j (L(x + eps * u_j) - L(x)) / eps * u_j

has the gradient of L as its mean, up to O(eps). All points of all samples are evaluated in one call, in float32 or
wider: in half precision the differences are noise.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

DIRECTIONS = ("auto", "sphere", "orthonormal")
_GREY_LEVEL = 2 / 255  # of an 8-bit image, in the canonical domain [-1, 1]
_LEAST_STEP = 1e-3
_MOST_STEP = 1.0
_NOISE = 1e-5  # smallest step with differences above the rounding of float32


class Perturbed(NamedTuple):
    """Points to evaluate.

    Attributes:
        rows: `(R, B, ...)`; `rows[0]` are the samples, then come the `m` steps forward and, if central, `m` back.
        directions: `(m, B, ...)`, of length 1 in each sample.
    """

    rows: Tensor
    directions: Tensor


class ZerothOrderEstimate(NamedTuple):
    """An estimate and what it was made from.

    Attributes:
        gradient: `(B, ...)`, of each sample's own loss: not divided by B.
        losses: `(R, B)`, in the order of `Perturbed.rows`.
    """

    gradient: Tensor
    losses: Tensor


class ZerothOrderGradient:
    """Estimates the gradient of a loss per sample from its values.

    Each sample takes `rows_per_sample` evaluations. Directions on the sphere are drawn independently: the expected
    squared length of the estimate is (d + m - 1) / m times that of the gradient. Orthonormal ones tell more at the same
    cost, and all of the gradient at m = d.

    Args:
        num_directions: m.
        eps: Length of a step, in units of the samples; `step_size` knows what suits an API.
        directions: "sphere", "orthonormal" (m <= d), or "auto": orthonormal from 8 directions on, if they fit.
        central: Step back, too: twice the perturbed points for an error of O(eps^2).

    Raises:
        ValueError: If there is no direction, the step is not positive, or the kind of directions is unknown.
    """

    def __init__(
        self, num_directions: int = 1, eps: float = 1e-3, directions: str = "auto", central: bool = False
    ) -> None:
        if num_directions < 1:
            raise ValueError(f"num_directions must be at least 1, got {num_directions}")
        if not (math.isfinite(eps) and eps > 0):
            raise ValueError(f"eps must be a positive number, got {eps}")
        if directions not in DIRECTIONS:
            raise ValueError(f"directions must be one of {', '.join(DIRECTIONS)}, got {directions!r}")
        self.num_directions, self.eps, self.directions, self.central = num_directions, eps, directions, central

    @property
    def rows_per_sample(self) -> int:
        """R, the evaluations that the estimate for one sample takes."""
        return (2 if self.central else 1) * self.num_directions + 1

    def draw(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Random directions `(m, B, ...)` of length 1 for samples `(B, ...)`, on their device.

        Args:
            x: Samples; at least one dimension beside the batch's.
            generator: Source of randomness; it may lie on another device.

        Raises:
            ValueError: If the samples do not suit, or have fewer numbers than there are orthonormal directions.
        """
        x = _checked(x)
        batch, size = len(x), math.prod(x.shape[1:])
        orthonormal = self.directions == "orthonormal" or (
            self.directions == "auto" and 8 <= self.num_directions <= size
        )
        if orthonormal and self.num_directions > size:
            raise ValueError(
                f"num_directions={self.num_directions} orthonormal directions do not exist in samples of {size} "
                "numbers; ask for fewer, or set directions='sphere'"
            )
        source = x.device if generator is None else generator.device
        shape = (self.num_directions, batch, size)
        directions: Tensor = torch.randn(shape, generator=generator, dtype=x.dtype, device=source).to(x.device)
        if orthonormal:
            directions = torch.linalg.qr(directions.permute(1, 2, 0))[0].permute(2, 0, 1)
        else:
            directions = directions / torch.linalg.vector_norm(directions, dim=-1, keepdim=True)
        return directions.reshape(self.num_directions, *x.shape)

    def points(self, x: Tensor, directions: Tensor) -> Tensor:
        """Points `(R, B, ...)` to evaluate, for directions `(m, B, ...)` of one's own.

        Raises:
            ValueError: If samples and directions do not fit together.
        """
        x = _checked(x)
        expected = (self.num_directions, *x.shape)
        if directions.shape != expected:
            raise ValueError(f"directions have the shape {tuple(directions.shape)}, expected {expected}")
        m = self.num_directions
        rows = x.new_empty((self.rows_per_sample, *x.shape))
        rows[0] = x
        torch.add(x, directions, alpha=self.eps, out=rows[1 : m + 1])
        if self.central:
            torch.sub(x, directions, alpha=self.eps, out=rows[m + 1 :])
        return rows

    @torch.no_grad()
    def perturb(self, x: Tensor, generator: torch.Generator | None = None) -> Perturbed:
        """Draw directions and make the points to evaluate.

        Args:
            x: Samples `(B, ...)`, floating point; what is narrower than float32 is widened.
            generator: Source of randomness.

        Raises:
            ValueError: As in `draw`.
        """
        directions = self.draw(x, generator)
        return Perturbed(self.points(x, directions), directions)

    @torch.no_grad()
    def estimate(self, losses: Tensor, directions: Tensor) -> Tensor:
        """The gradient `(B, ...)` of each sample's loss.

        Args:
            losses: `(R, B)`, of the points in their order.
            directions: `(m, B, ...)`.

        Raises:
            ValueError: If the shapes do not fit.
        """
        m = self.num_directions
        expected = (self.rows_per_sample, *directions.shape[1:2])
        if len(directions) != m or losses.shape != expected:
            raise ValueError(
                f"losses of shape {tuple(losses.shape)} and directions of shape {tuple(directions.shape)} do not fit "
                f"{m} directions; expected losses of shape {expected}"
            )
        losses = losses.to(_wide(losses.dtype))
        if self.central:
            slopes = (losses[1 : m + 1] - losses[m + 1 :]) / (2 * self.eps)
        else:
            slopes = (losses[1:] - losses[0]) / self.eps
        flat = directions.reshape(m, directions.shape[1], math.prod(directions.shape[2:]))
        factor = flat.shape[2] / m
        with torch.autocast(directions.device.type, enabled=False):
            gradient = torch.einsum("mb,mbd->bd", (factor * slopes).to(flat.dtype), flat)
        return gradient.reshape(directions.shape[1:])

    @torch.no_grad()
    def __call__(
        self, loss_fn: Callable[[Tensor], Tensor], x: Tensor, generator: torch.Generator | None = None
    ) -> ZerothOrderEstimate:
        """Estimate the gradient of a loss at samples `(B, ...)`.

        Args:
            loss_fn: Losses `(R * B,)` of points `(R * B, ...)`, whose first B are the samples themselves. It is called
                once, without autocast or gradients, and must treat rows independently: no BatchNorm in training mode.
            x: Samples.
            generator: Source of randomness.

        Raises:
            ValueError: If the samples do not suit, or there is not one loss a point.
        """
        rows, directions = self.perturb(x, generator)
        with torch.autocast(rows.device.type, enabled=False):
            losses = loss_fn(rows.flatten(0, 1))
        if losses.shape != (rows.shape[0] * rows.shape[1],):
            raise ValueError(
                f"loss_fn returned the shape {tuple(losses.shape)} for {rows.shape[0] * rows.shape[1]} points; "
                "expected one loss a point"
            )
        losses = losses.reshape(rows.shape[:2])
        return ZerothOrderEstimate(self.estimate(losses, directions), losses)


def step_size(decimals: int | None, input_quantization: str | None, num_values: int) -> float:
    """The step that suits what an API rounds.

    10^(-(r - 2) / 2) for responses of r decimals, between 1e-3 and 1; and at least one grey level in the root mean
    square where inputs become 8-bit images.

    Args:
        decimals: r; None for unrounded float32, which takes 1e-3.
        input_quantization: "uint8" or None.
        num_values: d, the numbers in an image.

    Raises:
        ValueError: If an argument makes no sense.
    """
    if decimals is not None and decimals < 0:
        raise ValueError(f"decimals must be None or at least 0, got {decimals}")
    if input_quantization not in (None, "uint8"):
        raise ValueError(f"input_quantization must be None or 'uint8', got {input_quantization!r}")
    if num_values < 1:
        raise ValueError(f"num_values must be at least 1, got {num_values}")
    step = _LEAST_STEP
    if decimals is not None:
        step = min(max(10.0 ** (-(decimals - 2) / 2), _LEAST_STEP), _MOST_STEP)
    if input_quantization == "uint8":
        step = max(step, math.sqrt(num_values) * _GREY_LEVEL)
    return step


def check_step_size(eps: float, decimals: int | None, input_quantization: str | None, num_values: int) -> str | None:
    """What to warn of if a step drowns in what an API rounds, with the step to use; None if it is large enough.

    Args:
        eps: The step asked for.
        decimals: As in `step_size`, as are the others.
        input_quantization: As in `step_size`.
        num_values: As in `step_size`.

    Raises:
        ValueError: As in `step_size`.
    """
    wanted = step_size(decimals, input_quantization, num_values)
    rounding = []
    if decimals is not None:
        rounding.append(f"responses of {decimals} decimals")
    if input_quantization is not None:
        rounding.append(f"8-bit images of {num_values} values")
    # A tenth is left for a step that was copied from the message, which rounds it.
    least = 0.9 * wanted if rounding else _NOISE
    if eps >= least:
        return None
    return (
        f"eps={eps:g} is too small for {' and '.join(rounding) or 'float32'}: differences would be mostly rounding; "
        f"use eps={wanted:.2g}"
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _checked(x: Tensor) -> Tensor:
    if not x.is_floating_point() or x.ndim < 2:
        raise ValueError(
            f"samples must be floating point of shape (batch, ...), got {x.dtype} of shape {tuple(x.shape)}"
        )
    return x.detach().to(_wide(x.dtype))
