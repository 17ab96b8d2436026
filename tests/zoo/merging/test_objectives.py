"""Objectives against closed forms and torch.distributions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional as F

from zoo.merging.objectives import (
    OBJECTIVES,
    entropy,
    expert_cross_entropy,
    expert_kl,
    information_maximisation,
    objective,
)

if TYPE_CHECKING:
    from collections.abc import Callable


def logits(rows: int = 6, classes: int = 5, seed: int = 0, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, classes, dtype=torch.float64, generator=generator)


def call(name: str, z: Tensor, *, normalize: bool = False) -> Tensor:
    expert = logits(len(z), z.shape[1], seed=1).to(z.dtype) if objective(name).needs_expert else None
    return objective(name)(z, expert, normalize=normalize)


def test_entropy_is_that_of_the_categorical_distribution() -> None:
    z = logits()
    torch.testing.assert_close(entropy(z), Categorical(logits=z).entropy().mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("classes", [2, 10, 397])
def test_uniform_logits_have_the_entropy_log_of_the_classes(classes: int) -> None:
    z = torch.full((3, classes), 7.0, dtype=torch.float64)
    assert float(entropy(z)) == pytest.approx(math.log(classes), rel=1e-12)
    assert float(entropy(z, normalize=True)) == pytest.approx(1.0, rel=1e-12)


def test_information_maximisation_is_minus_the_mutual_information() -> None:
    z = logits()
    p = z.softmax(1)
    joint = p / len(p)
    product = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    torch.testing.assert_close(information_maximisation(z), -(joint * (joint / product).log()).sum())


def test_information_maximisation_is_least_for_confident_and_balanced_predictions() -> None:
    assert float(information_maximisation(50 * torch.eye(4))) == pytest.approx(-math.log(4), rel=1e-6)
    assert float(information_maximisation(50 * torch.eye(4), normalize=True)) == pytest.approx(-1, rel=1e-6)
    collapsed = torch.zeros(4, 4)
    collapsed[:, 2] = 50
    assert float(information_maximisation(collapsed)) == pytest.approx(0, abs=1e-6)


def test_expert_cross_entropy_is_torchs_with_soft_targets() -> None:
    z, expert = logits(), logits(seed=1)
    torch.testing.assert_close(expert_cross_entropy(z, expert), F.cross_entropy(z, expert.softmax(1)))


def test_expert_kl_is_from_the_expert_to_the_merged_model() -> None:
    z, expert = logits(), logits(seed=1)
    expected = kl_divergence(Categorical(logits=expert), Categorical(logits=z)).mean()
    torch.testing.assert_close(expert_kl(z, expert), expected)
    assert float(expert_kl(z, z)) == pytest.approx(0, abs=1e-14)
    torch.testing.assert_close(expert_cross_entropy(z, expert) - entropy(expert), expected)


def test_no_gradient_enters_the_expert() -> None:
    for function in (expert_cross_entropy, expert_kl):
        z, expert = logits().requires_grad_(), logits(seed=1).requires_grad_()
        function(z, expert).backward()
        assert expert.grad is None
        assert z.grad is not None
        torch.testing.assert_close(z.grad, (z.softmax(1) - expert.softmax(1)).detach() / len(z))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_constant_added_to_a_row_changes_nothing(name: str) -> None:
    z = logits()
    shifted = z + torch.arange(len(z), dtype=z.dtype)[:, None] * 100
    torch.testing.assert_close(call(name, shifted), call(name, z))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    assert torch.autograd.gradcheck(lambda z: call(name, z), logits().requires_grad_())
    assert torch.autograd.gradcheck(lambda z: call(name, z, normalize=True), logits().requires_grad_())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_normalised_values_are_divided_by_the_log_of_the_classes(name: str) -> None:
    z = logits(classes=7)
    torch.testing.assert_close(call(name, z, normalize=True) * math.log(7), call(name, z))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_reduced_in_float32_also_under_autocast(name: str, dtype: torch.dtype) -> None:
    z = logits(rows=64, classes=100).to(dtype)
    expert = logits(64, 100, seed=1).to(dtype) if objective(name).needs_expert else None
    value = objective(name)(z, expert)
    assert value.dtype == torch.float32
    exact = objective(name)(z.double(), None if expert is None else expert.double())
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(objective(name)(z, expert), value)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_extreme_logits_give_finite_values_and_gradients(name: str) -> None:
    z = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 3e4]], requires_grad=True)
    value = call(name, z)
    value.backward()  # type: ignore[no-untyped-call]
    assert value.isfinite()
    assert z.grad is not None and z.grad.isfinite().all()


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("shape", [(6,), (6, 1), (0, 5), (2, 3, 5)])
def test_logits_without_a_softmax_over_classes_are_refused_with_their_shape(name: str, shape: tuple[int, ...]) -> None:
    z = torch.zeros(shape)
    with pytest.raises(ValueError, match=rf"at least one row and two classes.*\({', '.join(map(str, shape))}"):
        objective(name)(z, z if objective(name).needs_expert else None)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused_with_their_place(name: str, value: float) -> None:
    z = logits()
    z[4, 2] = value
    with pytest.raises(
        ValueError, match=r"not finite: 1 of 30 values, such as -?(nan|inf) for input 4 of the batch, class 2"
    ):
        call(name, z)


@pytest.mark.parametrize("function", [expert_cross_entropy, expert_kl])
def test_the_experts_logits_are_checked_too(function: Callable[..., Tensor]) -> None:
    expert = logits()
    expert[0, 0] = math.nan
    with pytest.raises(ValueError, match="the expert's logits are not finite"):
        function(logits(), expert)
    with pytest.raises(ValueError, match=r"\(6, 5\) and the expert's logits \(6, 4\)"):
        function(logits(), logits(classes=4))


def test_objectives_are_found_by_name_and_say_what_they_need() -> None:
    assert {name: found.needs_expert for name, found in OBJECTIVES.items()} == {
        "entropy": False,
        "im": False,
        "expert_ce": True,
        "expert_kl": True,
    }
    z, expert = logits(), logits(seed=1)
    assert torch.equal(objective("entropy")(z), entropy(z))
    assert torch.equal(objective("im")(z), information_maximisation(z))
    assert torch.equal(objective("expert_ce")(z, expert), expert_cross_entropy(z, expert))
    assert torch.equal(objective("expert_kl")(z, expert), expert_kl(z, expert))
    with pytest.raises(ValueError, match="unknown objective 'tent'; known: entropy, im, expert_ce, expert_kl"):
        objective("tent")
    with pytest.raises(ValueError, match="'expert_kl' needs the expert's logits"):
        objective("expert_kl")(z)
    with pytest.raises(ValueError, match="'entropy' does not use the expert's logits"):
        objective("entropy")(z, expert)
