"""Coefficients stay within their bounds, and the surrogate carries the gradient of the loss."""

from __future__ import annotations

import pytest
import torch

from zoo.merging.constraints import CONSTRAINTS, MergingCoefficients

GRADIENT = torch.tensor([[1.0, -2.0, 3.0, -4.0, 5.0]])
RAW = torch.tensor([[-0.1, 0.0, 0.5, 1.0, 1.1]])


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_all_constraints_start_at_the_prior(constraint):
    torch.testing.assert_close(MergingCoefficients(3, 2, 0.3, constraint)(), torch.full((3, 2), 0.3))


def test_the_surrogate_has_the_gradient_where_clamping_lets_it_through():
    coefficients = MergingCoefficients(1, 5, constraint="clamp")
    coefficients.raw.data.copy_(RAW)
    coefficients.surrogate(GRADIENT).backward()
    # At the bounds themselves the gradient passes.
    assert torch.equal(coefficients.raw.grad, torch.tensor([[0.0, -2, 3, -4, 0]]))


def test_the_surrogate_of_a_sigmoid_has_its_derivative():
    coefficients = MergingCoefficients(1, 5, constraint="sigmoid")
    coefficients.raw.data.copy_(RAW)
    coefficients.surrogate(GRADIENT).backward()
    torch.testing.assert_close(coefficients.raw.grad, GRADIENT * RAW.sigmoid() * (1 - RAW.sigmoid()))


@pytest.mark.parametrize("constraint", ["none", "project"])
def test_without_clamping_the_gradient_is_whole(constraint):
    coefficients = MergingCoefficients(1, 5, constraint=constraint)
    coefficients.surrogate(GRADIENT).backward()
    assert torch.equal(coefficients.raw.grad, GRADIENT)


def test_projection_returns_to_the_bound_and_clamping_does_not_move_the_parameter():
    project, clamp = MergingCoefficients(1, 5, constraint="project"), MergingCoefficients(1, 5, constraint="clamp")
    for coefficients in (project, clamp):
        coefficients.raw.data.copy_(RAW)
        coefficients.after_step()
    assert torch.equal(project.raw.data, RAW.clamp(0, 1)) and torch.equal(clamp.raw.data, RAW)
    assert torch.equal(clamp(), RAW.clamp(0, 1))


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_assigned_coefficients_are_the_effective_ones(constraint):
    coefficients = MergingCoefficients(2, 3, constraint=constraint)
    coefficients.assign(torch.tensor([0.1, 0.2, 0.9]))
    torch.testing.assert_close(coefficients(), torch.tensor([[0.1, 0.2, 0.9]]).expand(2, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"constraint": "relu"}, "constraint must be one of clamp, project, sigmoid, none, got 'relu'"),
        ({"init": 1.2}, r"init=1.2 lies outside of \[0, 1\], the bounds of constraint='clamp'"),
        ({"init": -0.1, "constraint": "project"}, "init=-0.1 lies outside"),
        ({"init": 1.0, "constraint": "sigmoid"}, "not a value of a sigmoid"),
        ({"init": float("nan"), "constraint": "none"}, "finite number"),
    ],
)
def test_a_prior_out_of_bounds_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MergingCoefficients(1, 1, **options)


def test_values_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"shape \(3, 3\), expected \(2, 3\)"):
        MergingCoefficients(2, 3).assign(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="between 0 and 1"):
        MergingCoefficients(2, 3, constraint="sigmoid").assign(torch.zeros(3))
