"""Keyed random numbers: uniform, told apart by every key, and a function of the key alone."""

from __future__ import annotations

import pytest
import torch

from zoo.common import keyed_random
from zoo.common.keyed_random import keyed_integers, keyed_uniform, mix_keys


def test_they_are_uniform_and_uncorrelated_along_every_key():
    first, second = torch.arange(500)[:, None], torch.arange(400)[None]
    u = keyed_uniform(3, first, second)
    assert u.shape == (500, 400) and u.dtype == torch.float64 and u.min() >= 0 and u.max() < 1
    counts = (u.flatten() * 100).long().bincount(minlength=100).double()
    chi_square = float(((counts - 2000) ** 2 / 2000).sum())
    assert chi_square < 99 + 5 * (2 * 99) ** 0.5
    for shifted in (u[1:].flatten() - 0.5, u[:, 1:].flatten() - 0.5):
        other = (u[:-1] if len(shifted) == 499 * 400 else u[:, :-1]).flatten() - 0.5
        assert abs(float((shifted * other).mean() * 12)) < 5 / 200_000**0.5


def test_no_two_of_two_hundred_thousand_keys_collide():
    assert len(mix_keys(torch.arange(500)[:, None], 7, torch.arange(400)).unique()) == 200_000


def test_the_order_of_keys_matters():
    assert int(mix_keys(1, torch.tensor(2))) != int(mix_keys(2, torch.tensor(1)))
    assert int(mix_keys(torch.tensor(1), torch.tensor(2))) != int(mix_keys(torch.tensor(2), torch.tensor(1)))


def test_a_part_of_the_keys_gives_that_part_of_the_numbers():
    whole = keyed_uniform(9, torch.arange(50), torch.arange(50) * 3)
    assert torch.equal(whole[20:], keyed_uniform(9, torch.arange(20, 50), torch.arange(20, 50) * 3))
    assert float(keyed_uniform(9, torch.tensor(7), torch.tensor(21))) == float(whole[7])


def test_the_way_for_accelerators_gives_the_same_words(monkeypatch):
    keys = (5, torch.arange(1000), torch.tensor(-3))
    expected = mix_keys(*keys)

    def plainly(state):
        state = (state ^ keyed_random._shift_right(state, 30)) * keyed_random._signed(keyed_random._MIX_1)
        state = (state ^ keyed_random._shift_right(state, 27)) * keyed_random._signed(keyed_random._MIX_2)
        return state ^ keyed_random._shift_right(state, 31)

    monkeypatch.setattr(keyed_random, "_finalise_on_cpu", plainly)
    assert torch.equal(mix_keys(*keys), expected)


def test_integers_cover_their_range_evenly():
    drawn = keyed_integers(torch.tensor([3, 7]), 1, torch.arange(30_000)[:, None])
    assert drawn[:, 0].bincount().min() > 9_600 and len(drawn[:, 0].bincount()) == 3
    assert drawn[:, 1].bincount().min() > 4_000 and len(drawn[:, 1].bincount()) == 7


def test_a_hash_without_tensor_is_refused():
    with pytest.raises(TypeError, match="at least one tensor"):
        mix_keys(1, 2)
