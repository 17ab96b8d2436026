"""Beta-distributed numbers that are a function of their keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoo.common.keyed_random import keyed_uniform

_ROUNDS = 16
"""Of Marsaglia and Tsang's method; each accepts with a probability above 0.95, so all refuse once in 10 ** 20."""


def keyed_symmetric_beta(alpha: float, keys: Tensor) -> Tensor:
    """Draws from Beta(alpha, alpha), one for each key.

    Args:
        alpha: Both parameters, positive.
        keys: int64, of any shape.

    Returns:
        float64, of the shape of `keys`.
    """
    if alpha == 1:
        return keyed_uniform(keys, 0)
    # Ratios of Gamma variates; by logarithms, as small parameters give numbers below what floats hold.
    return torch.sigmoid(_log_gamma(alpha, keys, 1) - _log_gamma(alpha, keys, 2))


def _log_gamma(shape: float, keys: Tensor, slot: int) -> Tensor:
    """Logarithms of Gamma(shape, 1) variates (Marsaglia and Tsang 2000)."""
    boosted = shape + (shape < 1)
    d = boosted - 1 / 3
    uniform = keyed_uniform(keys[..., None], slot, torch.arange(3 * _ROUNDS + 1))
    # In (0, 1]: a logarithm of 0 is none.
    logs = (1 - uniform).log()
    radius = (-2 * logs[..., :_ROUNDS]).sqrt()
    normal = radius * (2 * math.pi * uniform[..., _ROUNDS : 2 * _ROUNDS]).cos()
    cube = (1 + normal / math.sqrt(9 * d)) ** 3
    log_cube = cube.clamp(min=1e-300).log()
    accepted = (cube > 0) & (logs[..., 2 * _ROUNDS : -1] < 0.5 * normal**2 + d - d * cube + d * log_cube)
    first = accepted.double().argmax(-1, keepdim=True)
    found = math.log(d) + log_cube.gather(-1, first)[..., 0]
    return found + logs[..., -1] / shape if shape < 1 else found
