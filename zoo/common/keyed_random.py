"""Random numbers that are a function of their key: the same for any batch order, worker, rank or resumed run."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = 2**64 - 1


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # torch shifts signed integers arithmetically; the hash needs zeros moved in from the left.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix_keys(*keys: int | Tensor) -> Tensor:
    """Hash integers to one well-mixed 64-bit key: a weighted sum, then the finaliser of SplitMix64.

    Args:
        keys: Integers or int64 tensors that broadcast against each other; at least one tensor.

    Returns:
        int64 tensor of the broadcast shape.

    Raises:
        TypeError: If no key is a tensor (the result's device would be unknown).

    Example:
        >>> import torch
        >>> a = mix_keys(7, 0, torch.arange(3))
        >>> bool((a == mix_keys(7, 0, torch.arange(3))).all()), len(set(a.tolist()))
        (True, 3)
    """
    constant = 0
    state: Tensor | None = None
    for place, key in enumerate(keys):
        # Odd factors that share no pattern keep (1, 0) apart from (0, 1); they depend on the place alone.
        factor = _finalise((place + 1) * _GOLDEN) | 1
        if isinstance(key, int):
            constant = _finalise(constant + key * factor + _GOLDEN)
        else:
            state = key * _signed(factor) if state is None else state + key * _signed(factor)
    if state is None:
        raise TypeError("mix_keys needs at least one tensor among its keys")
    state = state + _signed(constant)
    if state.device.type == "cpu":
        return _finalise_on_cpu(state)
    state = (state ^ _shift_right(state, 30)) * _signed(_MIX_1)
    state = (state ^ _shift_right(state, 27)) * _signed(_MIX_2)
    return state ^ _shift_right(state, 31)


def _finalise_on_cpu(state: Tensor) -> Tensor:
    """The finaliser in place: numpy has the unsigned shift that torch must emulate."""
    words = np.atleast_1d(state.numpy()).view(np.uint64)
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        words ^= words >> np.uint64(shift)
        words *= np.uint64(factor)
    words ^= words >> np.uint64(31)
    return torch.from_numpy(words.view(np.int64)).view(state.shape)


def _finalise(state: int) -> int:
    """The finaliser for a plain integer, modulo 2 ** 64."""
    state &= _MASK
    state = (state ^ (state >> 30)) * _MIX_1 & _MASK
    state = (state ^ (state >> 27)) * _MIX_2 & _MASK
    return state ^ (state >> 31)


def _signed(value: int) -> int:
    return value - 2**64 if value >> 63 else value


def keyed_uniform(*keys: int | Tensor) -> Tensor:
    """Uniform numbers in [0, 1), float64, one for each key of the broadcast shape (see `mix_keys`)."""
    words = mix_keys(*keys)
    if words.device.type == "cpu":
        unsigned = np.atleast_1d(words.numpy()).view(np.uint64) >> np.uint64(11)
        return torch.from_numpy(unsigned * 2.0**-53).view(words.shape)
    return _shift_right(words, 11).double() * 2.0**-53


def keyed_integers(high: int | Tensor, *keys: int | Tensor) -> Tensor:
    """Uniform integers in [0, high), int64; `high` broadcasts against the keys and must be positive."""
    return (keyed_uniform(*keys) * high).long()
