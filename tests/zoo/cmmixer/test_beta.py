"""Beta variates that are a function of their keys."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from zoo.cmmixer.beta import keyed_symmetric_beta
from zoo.common.keyed_random import mix_keys

KEYS = mix_keys(torch.arange(20_000), 5)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.99, 1.0, 2.0, 8.0, 1000.0])
def test_draws_have_the_beta_distribution(alpha):
    draws = keyed_symmetric_beta(alpha, KEYS)
    assert draws.dtype == torch.float64
    assert stats.kstest(draws.numpy(), stats.beta(alpha, alpha).cdf).pvalue > 1e-3


@pytest.mark.parametrize("alpha", [0.001, 0.01])
def test_a_tiny_alpha_gives_numbers_at_both_ends_and_no_nan(alpha):
    draws = keyed_symmetric_beta(alpha, KEYS)
    assert bool(((draws >= 0) & (draws <= 1)).all())
    for point in (0.001, 0.1, 0.5, 0.9, 0.999):
        share = float((draws < point).double().mean())
        assert share == pytest.approx(stats.beta(alpha, alpha).cdf(point), abs=0.015)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 3.0])
def test_a_draw_is_a_function_of_its_key_alone(alpha):
    keys = KEYS[:12]
    draws = keyed_symmetric_beta(alpha, keys)
    assert torch.equal(keyed_symmetric_beta(alpha, keys.flip(0)), draws.flip(0))
    assert torch.equal(keyed_symmetric_beta(alpha, keys.view(3, 4)), draws.view(3, 4))
    assert torch.equal(keyed_symmetric_beta(alpha, keys[5:6]), draws[5:6])
    assert len(set(draws.tolist())) == 12


@pytest.mark.parametrize("alpha", [0.3, 1.0, 3.0])
def test_draws_of_neighbouring_keys_are_unrelated(alpha):
    draws = keyed_symmetric_beta(alpha, torch.arange(20_000))
    assert abs(stats.spearmanr(draws[:-1].numpy(), draws[1:].numpy()).statistic) < 0.03
