"""Response gaps: zero for equal answers, with the direction and the temperature that they say."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F

from zoo.api_cl.gaps import GAPS, ResponseGap
from zoo.api_cl.responses import centred, log_responses

if TYPE_CHECKING:
    from torch import Tensor


def scores(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_centred_log_probabilities_of_a_softmax_are_its_centred_logits() -> None:
    s = scores(20, 7, dtype=torch.float32)
    found = centred(log_responses(s.softmax(-1)))
    torch.testing.assert_close(found, s - s.mean(-1, keepdim=True), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", GAPS)
def test_equal_answers_have_no_gap_and_others_have(kind: str) -> None:
    s = 4 * scores(20, 7, dtype=torch.float32)
    assert float(ResponseGap(kind)(s.softmax(-1), s + 3).abs().max()) < 2e-6
    assert float(ResponseGap(kind)(s.softmax(-1), s.flip(-1)).mean()) > 0.5


@pytest.mark.parametrize("kind", ["l1", "kl"])
def test_equal_answers_have_no_gap_even_where_one_is_certain(kind: str) -> None:
    s = torch.tensor([[200.0, 0.0, -50.0], [30.0, 0.0, 0.0]])
    assert float(ResponseGap(kind)(s.softmax(-1), s).abs().max()) < 1e-5


def test_the_mean_absolute_difference_is_that_of_centred_logits() -> None:
    a, b = scores(6, 3, 5), scores(6, 3, 5, seed=1)
    found = ResponseGap("l1")(a.softmax(-1), b)
    wanted = torch.zeros(6, 3, dtype=torch.float64)
    for i in range(6):
        for j in range(3):
            left, right = a[i, j] - a[i, j].mean(), b[i, j] - b[i, j].mean()
            wanted[i, j] = sum(abs(float(left[c] - right[c])) for c in range(5)) / 5
    torch.testing.assert_close(found, wanted)


def test_probabilities_below_the_resolution_of_the_api_count_as_its_smallest() -> None:
    p, s = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    # Centred, log 1 and log p_min lie half of their distance off 0, each.
    for decimals, smallest in ((2, 1e-2), (None, 1e-6)):
        assert float(ResponseGap("l1")(p, s, decimals)) == pytest.approx(-math.log(smallest) / 2)
    # The model is read at the same resolution.
    certain = torch.tensor([[50.0, 0.0]])
    assert float(ResponseGap("l1")(p, certain, 2)) == 0.0
    assert float(ResponseGap("l1")(p, certain)) == 0.0


def test_kl_is_that_of_the_model_from_the_api() -> None:
    p, q = torch.tensor([0.8, 0.15, 0.05]), torch.tensor([0.2, 0.3, 0.5])
    forward = 0.8 * math.log(4) + 0.15 * math.log(0.5) + 0.05 * math.log(0.1)
    backward = 0.2 * math.log(0.25) + 0.3 * math.log(2) + 0.5 * math.log(10)
    assert abs(forward - backward) > 0.1
    assert float(ResponseGap("kl")(p, q.log())) == pytest.approx(forward, rel=1e-5)
    assert float(ResponseGap("kl")(q, p.log())) == pytest.approx(backward, rel=1e-5)


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
def test_the_temperature_of_probabilities_is_that_of_their_logits(tau: float) -> None:
    # Logits so far apart that p falls to 1e-9: a floor at 1e-6 would show at a high temperature.
    a, b = 6 * scores(9, 5), scores(9, 5, seed=1)
    found = ResponseGap("kl", tau)(a.softmax(-1), b)
    wanted = F.kl_div((b / tau).log_softmax(-1), (a / tau).softmax(-1), reduction="none").sum(-1) * tau**2
    torch.testing.assert_close(found, wanted)


def test_the_gradient_of_kl_is_the_difference_of_probabilities_also_for_certain_responses() -> None:
    p = torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]], dtype=torch.float64)
    s = scores(2, 3).requires_grad_(True)
    ResponseGap("kl")(p, s).sum().backward()
    assert s.grad is not None
    torch.testing.assert_close(s.grad, s.detach().softmax(-1) - p)


@pytest.mark.parametrize("kind", GAPS)
def test_gradients_are_finite_in_both_arguments(kind: str) -> None:
    api = torch.tensor([[300.0, 0.0, -300.0], [0.0, 0.0, 0.0]], requires_grad=True)
    model = torch.tensor([[-300.0, 0.0, 300.0], [1.0, 0.0, 0.0]], requires_grad=True)
    ResponseGap(kind)(api.softmax(-1), model).sum().backward()
    for tensor in (api, model):
        assert tensor.grad is not None and bool(tensor.grad.isfinite().all())
        assert float(tensor.grad[1].abs().sum()) > 0


def test_differences_of_probabilities_are_summed() -> None:
    p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.1, 0.2, 0.7]])
    assert float(ResponseGap("l1_prob")(p, q.log())) == pytest.approx(1.2)


@pytest.mark.parametrize("kind", GAPS)
def test_gaps_are_computed_in_single_precision_under_autocast(kind: str) -> None:
    p, s = scores(8, 5, dtype=torch.float32).softmax(-1), scores(8, 5, seed=1, dtype=torch.float32)
    plain = ResponseGap(kind)(p, s)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ResponseGap(kind)(p, s), plain)
    narrow = ResponseGap(kind)(p, s.bfloat16())
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, ResponseGap(kind)(p, s.bfloat16().float()))
    assert ResponseGap(kind)(p, s.double()).dtype == torch.float64


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="the gap must be one of l1, kl, l1_prob, got 'l2'"):
        ResponseGap("l2")
    with pytest.raises(ValueError, match=r"tau must be a positive number, got 0\.0"):
        ResponseGap("kl", 0.0)
    with pytest.raises(ValueError, match=r"tau=2\.0 has no meaning for the gap 'l1'; leave it at 1, or use 'kl'"):
        ResponseGap("l1", 2.0)
    with pytest.raises(ValueError, match=r"responses have the shape \(4, 2\), logits \(4, 10\).*this API only"):
        ResponseGap("kl")(torch.ones(4, 2) / 2, torch.zeros(4, 10))
