"""Random numbers that are a function of their key: the same for any batch order, worker, rank or resumed run."""

from __future__ import annotations

from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_MASK = 2**64 - 1


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # torch shifts signed integers arithmetically; the hash needs zeros moved in from the left.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix_keys(*keys: int | Tensor) -> Tensor:
    """Hash integers to one well-mixed 64-bit key (the finaliser of SplitMix64, applied key after key).

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
    if not any(isinstance(key, Tensor) for key in keys):
        raise TypeError("mix_keys needs at least one tensor among its keys")
    state: int | Tensor = 0
    for key in keys:
        state = state + key + _GOLDEN
        if isinstance(state, int):
            state = _mix_integer(state)
            continue
        state = (state ^ _shift_right(state, 30)) * _MIX_1
        state = (state ^ _shift_right(state, 27)) * _MIX_2
        state = state ^ _shift_right(state, 31)
    assert isinstance(state, Tensor)
    return state


def _mix_integer(state: int) -> int:
    """The same step for a plain integer: leading keys that are no tensors cost nothing per element."""
    state &= _MASK
    state = (state ^ (state >> 30)) * _MIX_1 & _MASK
    state = (state ^ (state >> 27)) * _MIX_2 & _MASK
    state ^= state >> 31
    return state - 2**64 if state >> 63 else state


def keyed_uniform(*keys: int | Tensor) -> Tensor:
    """Uniform numbers in [0, 1), float64, one for each key of the broadcast shape (see `mix_keys`)."""
    return _shift_right(mix_keys(*keys), 11).double() * 2.0**-53


def keyed_integers(high: int | Tensor, *keys: int | Tensor) -> Tensor:
    """Uniform integers in [0, high), int64; `high` broadcasts against the keys and must be positive."""
    return (keyed_uniform(*keys) * high).long()
