"""Loss weightings against their formulas, by hand and by torch's own optimizers."""

from __future__ import annotations

import copy
import itertools
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.ranks import run_ranks
from zoo.adatask.weightings import (
    FAMO,
    DynamicWeightAverage,
    EqualWeighting,
    GradNorm,
    ImtlLWeighting,
    RandomLossWeighting,
    UncertaintyWeighting,
    weighting,
)

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from zoo.adatask.weighting_base import LossWeighting

NAMES = ("equal", "uncertainty", "dwa", "rlw", "imtl_l", "famo", "gradnorm")
LOSSES = torch.tensor([0.5, 2.0, 30.0])


def one_step(module: LossWeighting, step: int, present: Tensor | None = None) -> Tensor:
    """A step of training as a user of all hooks would do it; its losses depend on nothing else."""
    generator = torch.Generator().manual_seed(step)
    losses, norms, after, means = torch.rand(4, module.num_tasks, generator=generator) + 0.1
    weighted = module(losses, present).detach()
    module.after_backward(norms)
    module.after_step(after)
    module.end_epoch(means)
    return weighted


def test_equal_weighting_is_the_losses_or_their_multiples() -> None:
    assert torch.equal(EqualWeighting(3)(LOSSES), LOSSES)
    assert EqualWeighting(3, [2, 1, 0.5])(LOSSES).tolist() == [1.0, 2.0, 15.0]


def test_uncertainty_weighting_equals_its_formula_and_learns_the_logarithm_of_the_loss() -> None:
    module = UncertaintyWeighting(3)
    expected = [loss * math.exp(0.5) / 2 - 0.25 for loss in LOSSES.tolist()]
    assert module(LOSSES).tolist() == pytest.approx(expected)
    # The derivative (1 - L exp(-s)) / 2 vanishes at s = log L.
    with torch.no_grad():
        module.log_variances.copy_(LOSSES.log())
    module(LOSSES).sum().backward()
    assert module.log_variances.grad is not None and module.log_variances.grad.abs().max() < 1e-6


def test_imtl_l_equals_its_formula_and_its_optimum_makes_all_losses_one() -> None:
    module = ImtlLWeighting(3, initial=0.3)
    assert module(LOSSES).tolist() == pytest.approx([math.exp(0.3) * loss - 0.3 for loss in LOSSES.tolist()])
    with torch.no_grad():
        module.log_scales.copy_(-LOSSES.log())
    module(LOSSES).sum().backward()
    assert module.log_scales.grad is not None and module.log_scales.grad.abs().max() < 1e-5


def test_dwa_is_ones_for_two_epochs_and_then_follows_the_ratio_of_the_last_two() -> None:
    module = DynamicWeightAverage(3)
    epochs = [torch.tensor(values) for values in ([4.0, 2.0, 1.0], [2.0, 2.0, 0.9], [1.8, 1.0, 0.9])]
    module.end_epoch(epochs[0])
    assert module.weights.tolist() == pytest.approx([1, 1, 1])
    for before, last in itertools.pairwise(epochs):
        module.end_epoch(last)
        powers = [math.exp(b / a / 2) for a, b in zip(before.tolist(), last.tolist(), strict=True)]
        expected = [3 * power / sum(powers) for power in powers]
        assert module(LOSSES).tolist() == pytest.approx([w * x for w, x in zip(expected, LOSSES.tolist(), strict=True)])


def test_dwa_skips_an_epoch_without_the_task_and_a_ratio_to_zero() -> None:
    module = DynamicWeightAverage(2)
    for means in ([4.0, 0.0], [math.nan, 1.0], [2.0, 1.0]):
        module.end_epoch(torch.tensor(means))
    first, second = math.exp(0.5 / 2), math.exp(1 / 2)
    assert module.weights.tolist() == pytest.approx([2 * first / (first + second), 2 * second / (first + second)])
    module = DynamicWeightAverage(2)
    for means in ([4.0, 0.0], [4.0, 1.0]):
        module.end_epoch(torch.tensor(means))
    assert module.weights.tolist() == pytest.approx([1, 1])


def test_rlw_draws_softmax_of_normals_that_sum_to_one_and_is_uniform_in_evaluation() -> None:
    module = RandomLossWeighting(3)
    draws = torch.stack([module(torch.ones(3)) for _ in range(4000)])
    assert torch.allclose(draws.sum(1), torch.ones(4000))
    logits = draws.log()
    # z_i - z_j of independent standard normals has mean 0 and variance 2.
    difference = logits[:, 0] - logits[:, 1]
    assert abs(float(difference.mean())) < 0.1 and float(difference.var()) == pytest.approx(2, rel=0.1)
    assert module.eval()(LOSSES).tolist() == pytest.approx((LOSSES / 3).tolist())


def test_rlw_draws_the_same_whatever_the_global_generator_does() -> None:
    first, second = RandomLossWeighting(3), RandomLossWeighting(3)
    expected = first(LOSSES)
    torch.rand(7)
    assert torch.equal(second(LOSSES), expected)
    assert not torch.equal(RandomLossWeighting(3, seed=1)(LOSSES), expected)


def test_famo_equals_the_published_update_by_autograd_and_adam() -> None:
    module = FAMO(3, min_losses=[0.0, 0.1, 0.0])
    logits = torch.zeros(3, requires_grad=True)
    minima = torch.tensor([0.0, 0.1, 0.0])
    optimizer = torch.optim.Adam([logits], lr=0.025, weight_decay=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        before, after = torch.rand(2, 3, generator=generator) + 0.2
        before.requires_grad_()
        shares = logits.softmax(0)
        distance = before - minima + 1e-8
        scale = (shares / distance).sum().detach()
        expected = distance.log() * shares.detach() / scale
        weighted = module(before)
        assert torch.allclose(weighted, expected, rtol=1e-5)
        (found,) = torch.autograd.grad(weighted.sum(), before)
        # Normalised so that the weights of the plain losses, z_k / D_k / c, sum to one.
        assert float(found.sum()) == pytest.approx(1, rel=1e-5)
        module.after_step(after)
        falls = distance.log() - (after - minima + 1e-8).log()
        (gradient,) = torch.autograd.grad(shares, logits, falls.detach())
        logits.grad = gradient
        optimizer.step()
        assert torch.allclose(module.logits, logits, atol=1e-6)


def test_famo_gives_more_to_the_loss_that_falls_less() -> None:
    module = FAMO(2)
    module(torch.tensor([1.0, 1.0]))
    module.after_step(torch.tensor([0.5, 0.9]))
    assert module.logits[1] > 0 > module.logits[0]


def test_gradnorm_equals_autograd_of_its_loss_with_adam_and_keeps_the_sum() -> None:
    module = GradNorm(3, alpha=1.5)
    weights = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.025)
    generator = torch.Generator().manual_seed(0)
    initial = None
    for _ in range(30):
        losses, unweighted = torch.rand(2, 3, generator=generator) * torch.tensor([1.0, 5.0, 0.2]) + 0.1
        initial = losses if initial is None else initial
        assert torch.allclose(module(losses), weights.detach() * losses, rtol=1e-4)
        norms = weights * unweighted
        ratios = losses / initial
        target = (norms.mean() * (ratios / ratios.mean()) ** 1.5).detach()
        module.after_backward(norms.detach())
        optimizer.zero_grad()
        (norms - target).abs().sum().backward()
        optimizer.step()
        with torch.no_grad():
            weights.mul_(3 / weights.sum())
        assert torch.allclose(module.weights, weights, atol=1e-4)
        assert float(module.weights.sum()) == pytest.approx(3, rel=1e-5)


def test_gradnorm_evens_out_norms_of_tasks_that_learn_alike() -> None:
    module = GradNorm(2)
    for _ in range(400):
        module(torch.ones(2))
        module.after_backward(module.weights * torch.tensor([3.0, 1.0]))
    assert module.weights.tolist() == pytest.approx([0.5, 1.5], abs=0.05)


def test_gradnorm_raises_the_training_rate_to_the_power_alpha() -> None:
    # Rates (1.2, 0.8): the norms (1.25, 0.75) lie between the targets for alpha 1 and those for alpha 1.5.
    for alpha, first_rises in ((1.0, False), (1.5, True)):
        module = GradNorm(2, alpha)
        for losses, norms in (([1.0, 1.0], [1.0, 1.0]), ([1.2, 0.8], [1.25, 0.75])):
            module(torch.tensor(losses))
            module.after_backward(torch.tensor(norms))
        assert bool(module.weights[0] > module.weights[1]) == first_rises


def test_gradnorm_weights_stay_positive() -> None:
    module = GradNorm(2, lr=0.5)
    for _ in range(30):
        module(torch.ones(2))
        module.after_backward(module.weights * torch.tensor([1e4, 1.0]))
        assert module.weights.min() > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_task_is_zero_without_gradient_and_the_others_are_finite(name: str) -> None:
    module = weighting(name, 3)
    one_step(module, 0)
    losses = torch.tensor([0.5, math.nan, 30.0], requires_grad=True)
    weighted = module(losses, torch.tensor([True, False, True]))
    weighted.sum().backward()
    assert weighted[1] == 0 and weighted.isfinite().all()
    assert losses.grad is not None and losses.grad[1] == 0
    assert losses.grad.isfinite().all() and losses.grad[[0, 2]].min() > 0
    assert all(p.grad is None or (p.grad[1] == 0 and p.grad.isfinite().all()) for p in module.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_any_label_changes_nothing(name: str) -> None:
    module = weighting(name, 3)
    one_step(module, 0)
    generator = torch.Generator().manual_seed(1)
    before = {key: value.clone() for key, value in module.state_dict().items() if "last" not in key}
    losses = torch.full((3,), math.nan, requires_grad=True)
    weighted = module(losses, torch.zeros(3, dtype=torch.bool))
    weighted.sum().backward()
    assert not weighted.any() and losses.grad is not None and not losses.grad.any()
    module.after_backward(torch.zeros(3))
    module.after_step(torch.rand(3, generator=generator))
    after = module.state_dict()
    for key, value in before.items():
        if key != "_extra_state":
            assert torch.allclose(after[key], value, rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", ["famo", "gradnorm"])
def test_what_a_weighting_learns_stands_still_for_a_missing_task(name: str) -> None:
    module = weighting(name, 3)
    for step in range(3):
        one_step(module, step)
    before = copy.deepcopy(module.state_dict())
    one_step(module, 3, torch.tensor([True, False, True]))
    after = module.state_dict()
    learnt = "logits" if name == "famo" else "weights"
    for key in (learnt, "adam.first_moment", "adam.second_moment", "adam.steps"):
        assert after[key][1] == before[key][1]
        assert (after[key][[0, 2]] != before[key][[0, 2]]).all()
    if name == "gradnorm":
        assert float(after["weights"].sum()) == pytest.approx(3, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_reloaded_weighting_goes_on_as_if_never_stopped(name: str, tmp_path: Path) -> None:
    through, first, second = (weighting(name, 3) for _ in range(3))
    for step in range(3):
        one_step(through, step)
        one_step(first, step)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(3, 6):
        assert torch.equal(one_step(second, step), one_step(through, step))


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_of_a_weighting_is_independent(name: str) -> None:
    module = weighting(name, 3)
    one_step(module, 0)
    twin = copy.deepcopy(module)
    expected = one_step(module, 1)
    assert torch.equal(one_step(twin, 1), expected)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "rlw"])
def test_weightings_that_are_not_drawn_by_place_follow_a_permutation_of_the_tasks(name: str) -> None:
    module, permuted = weighting(name, 3), weighting(name, 3)
    order = torch.tensor([2, 0, 1])
    for step in range(4):
        losses, norms, after, means = torch.rand(4, 3, generator=torch.Generator().manual_seed(step)) + 0.1
        for one, index in ((module, torch.arange(3)), (permuted, order)):
            one(losses[index])
            one.after_backward(norms[index])
            one.after_step(after[index])
            one.end_epoch(means[index])
    assert torch.allclose(permuted(LOSSES[order]), module(LOSSES)[order], rtol=1e-4)


@pytest.mark.parametrize("name", ["famo", "gradnorm"])
def test_evaluation_leaves_what_training_remembers(name: str) -> None:
    module = weighting(name, 3)
    one_step(module, 0)
    before = copy.deepcopy(module.state_dict())
    module.eval()(LOSSES)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def _steps_of_a_rank(rank: int, name: str, presence: Tensor, losses: Tensor) -> dict[str, Any]:
    module = weighting(name, 3)
    for step in range(3):
        module(losses[step, rank, 0], presence[rank])
        module.after_backward(torch.tensor([1.0, 2.0, 3.0]))
        module.after_step(losses[step, rank, 1])
    return {key: value for key, value in module.state_dict().items() if "last" not in key}


@pytest.mark.parametrize("name", ["famo", "gradnorm"])
def test_processes_with_different_losses_and_tasks_learn_the_same(name: str, tmp_path: Path) -> None:
    losses = torch.rand(3, 2, 2, 3, generator=torch.Generator().manual_seed(0)) + 0.1
    presence = torch.tensor([[True, True, False], [True, False, True]])
    first, second = run_ranks(tmp_path, _steps_of_a_rank, name, presence, losses)
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    # Tasks 1 and 2 are each seen by one process, task 0 by both: its numbers are means.
    single = weighting(name, 3)
    if name == "famo":
        logs = losses.add(1e-8).log()
        mixed = torch.stack([logs.mean(1)[..., 0], logs[:, 0, :, 1], logs[:, 1, :, 2]], -1).exp() - 1e-8
    else:
        mixed = torch.stack([losses.mean(1)[..., 0], losses[:, 0, :, 1], losses[:, 1, :, 2]], -1)
    for before, after in mixed:
        single(before)
        single.after_backward(torch.tensor([1.0, 2.0, 3.0]))
        single.after_step(after)
    learnt = "logits" if name == "famo" else "weights"
    assert torch.allclose(first[learnt], single.state_dict()[learnt], atol=1e-5)


def test_names_are_known_or_refused() -> None:
    assert isinstance(weighting("dwa", 2, temperature=1.0), DynamicWeightAverage)
    with pytest.raises(ValueError, match="'uw'; known: equal, uncertainty, dwa, rlw, imtl_l, famo, gradnorm"):
        weighting("uw", 2)


@pytest.mark.parametrize("name", NAMES)
def test_summed_losses_are_refused(name: str) -> None:
    for losses in (torch.tensor(1.0), torch.ones(2), torch.ones(3, 1)):
        with pytest.raises(ValueError, match=r"losses must have shape \(3,\), one per task, unsummed"):
            weighting(name, 3)(losses)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("equal", {"weights": [1.0]}, r"2 positive numbers, got \[1.0\]"),
        ("equal", {"weights": [1.0, 0.0]}, "positive"),
        ("dwa", {"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ("famo", {"lr": 0.0}, "lr must be positive"),
        ("famo", {"gamma": -1.0}, "gamma"),
        ("famo", {"min_losses": [0.0]}, "2 numbers"),
        ("gradnorm", {"alpha": -1.0}, "alpha"),
        ("gradnorm", {"lr": math.nan}, "lr must be positive"),
    ],
)
def test_an_impossible_option_is_named_with_its_value(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weighting(name, 2, **options)


def test_no_task_is_refused_and_hooks_want_a_training_pass_first() -> None:
    with pytest.raises(ValueError, match="num_tasks"):
        weighting("equal", 0)
    with pytest.raises(RuntimeError, match="after_step needs a training pass"):
        FAMO(2).after_step(torch.ones(2))
    with pytest.raises(RuntimeError, match="after_backward needs a training pass"):
        GradNorm(2).after_backward(torch.ones(2))
