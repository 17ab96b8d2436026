"""The generators' objective: each term against its formula, and what is held fixed where an API gives no gradient."""

from __future__ import annotations

import math

import pytest
import torch

from zoo.api_cl.generator_objective import COOPERATION, GeneratorObjective, balance_term, entropy

G, B, C = 2, 5, 3


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parts(seed=0):
    """Responses and gaps of a batch, with a graph that ends in `logits` and `gaps`."""
    logits = draw(G, B, C, seed=seed).requires_grad_()
    gaps = draw(G, B, seed=seed + 1).requires_grad_()
    return logits, gaps


def test_the_objective_is_the_sum_over_generators_of_its_terms():
    logits, gaps = parts()
    probs = logits.softmax(-1)
    wanted = 0.0
    for p, d in zip(probs.tolist(), gaps.tolist(), strict=True):
        mean = [sum(row[c] for row in p) / B for c in range(C)]
        wanted += -0.7 * sum(d) / B
        wanted += 1.3 * sum(m * math.log(m) for m in mean)
        wanted += 0.4 * sum(-q * math.log(q) for row in p for q in row) / B
    found = GeneratorObjective(adv=0.7, balance=1.3, conf=0.4).exact(probs, gaps)
    torch.testing.assert_close(float(found.detach()), wanted)


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.7, 1.3, 0.4)])
def test_losses_per_image_have_the_gradient_of_the_objective_up_to_the_batch_size(weights):
    objective = GeneratorObjective(*weights)
    logits, gaps = parts()
    probs = logits.softmax(-1)
    exact = torch.autograd.grad(objective.exact(probs, gaps), (logits, gaps), retain_graph=True, allow_unused=True)
    linear = objective.per_sample(probs, gaps, probs.detach().mean(1)).sum() / B
    held = torch.autograd.grad(linear, (logits, gaps), allow_unused=True)
    for one, other in zip(exact, held, strict=True):
        one, other = (torch.zeros(()) if g is None else g for g in (one, other))
        torch.testing.assert_close(one, other.expand_as(one))
    assert any(g is not None and g.abs().max() > 1e-3 for g in exact)


def test_losses_per_image_of_a_stack_of_points_are_those_of_each_point():
    objective = GeneratorObjective(0.7, 1.3, 0.4)
    probs, gaps = draw(4, G, B, C).softmax(-1), draw(4, G, B, seed=1)
    mean = probs[0].mean(1)
    wanted = torch.stack([objective.per_sample(p, d, mean) for p, d in zip(probs, gaps, strict=True)])
    torch.testing.assert_close(objective.per_sample(probs, gaps, mean), wanted)


def test_balance_is_least_where_all_classes_are_as_frequent_and_zero_where_one_is():
    uniform = torch.eye(C).repeat(2, 1)[None]
    one = torch.eye(C)[:1].repeat(6, 1)[None]
    torch.testing.assert_close(balance_term(uniform), -torch.tensor(float(C)).log())
    torch.testing.assert_close(balance_term(one), torch.tensor(0.0))
    assert torch.isfinite(entropy(one)).all() and (entropy(one) == 0).all()


def test_balance_over_processes_has_the_gradient_of_the_whole_batch_once_averaged():
    logits = draw(G, 2 * B, C).requires_grad_()
    probs = logits.softmax(-1)
    whole = balance_term(probs)
    (wanted,) = torch.autograd.grad(whole, logits, retain_graph=True)
    overall = probs.detach().mean(1)
    found = torch.zeros_like(wanted)
    for share in probs.split(B, 1):
        term = balance_term(share, lambda mean: overall)
        torch.testing.assert_close(term, whole)
        found += torch.autograd.grad(term, logits, retain_graph=True)[0] / 2
    torch.testing.assert_close(found, wanted)


def test_a_surrogate_wants_images_that_the_learner_gets_wrong():
    logits = draw(G, B, C).requires_grad_()
    labels = torch.tensor([[0, 1, 2, 0, 1], [2, 2, 1, 0, 0]])
    found = GeneratorObjective(adv=0.7, balance=1.3, conf=0.4).surrogate(logits, labels)
    probs = logits.softmax(-1)
    wanted = 0.7 * probs.gather(-1, labels[..., None]).log().mean() * G
    mean = probs.mean(1)
    wanted = wanted + 1.3 * (mean * mean.log()).sum() - 0.4 * (probs * probs.log()).sum() / B
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(found, logits, retain_graph=True)[0], torch.autograd.grad(wanted, logits)[0]
    )


def test_cooperation_in_pixels_is_a_hinge_on_the_mean_difference():
    first, second = draw(B, 1, 4, 4).tanh().requires_grad_(), draw(B, 1, 4, 4, seed=1).tanh().requires_grad_()
    distance = float((first - second).detach().abs().sum() / first.numel())
    objective = GeneratorObjective(coop=2.0, margin=distance + 0.25)
    hinge = objective.cooperation(first, second)
    torch.testing.assert_close(float(hinge.detach()), 2.0 * 0.25)
    one, other = torch.autograd.grad(hinge, (first, second))
    # Descending moves the images apart, each as far as the other.
    torch.testing.assert_close(one, -2.0 * (first - second).sign() / first.numel())
    torch.testing.assert_close(one, -other)


def test_cooperation_ends_at_the_margin():
    first, second = draw(B, 4).requires_grad_(), draw(B, 4, seed=1)
    objective = GeneratorObjective(margin=float((first - second).detach().abs().mean()) - 0.01)
    hinge = objective.cooperation(first, second)
    assert hinge == 0 and torch.autograd.grad(hinge, first)[0].abs().max() == 0


def test_cooperation_in_features_is_a_hinge_on_the_cosine():
    first = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    second = torch.tensor([[2.0, 0.0], [-4.0, 3.0]])
    found = GeneratorObjective(coop=3.0, margin=0.9, kind="feature").cooperation(first, second)
    torch.testing.assert_close(found, torch.tensor(3.0 * (0.9 - (0.0 + 1.0) / 2)))


def test_generators_cooperate_if_there_is_a_kind_and_a_weight():
    assert [GeneratorObjective(kind=kind).cooperates for kind in COOPERATION] == [True, True, False]
    assert not GeneratorObjective(coop=0).cooperates


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "pixels"}, "coop must be one of pixel, feature, none, got 'pixels'"),
        ({"adv": -1.0}, "adv_weight must be at least 0, got -1.0"),
        ({"balance": float("nan")}, "balance_weight must be at least 0, got nan"),
        ({"conf": -0.5}, "conf_weight"),
        ({"coop": -2.0}, "coop_weight"),
        ({"margin": -0.1}, "coop_margin"),
    ],
)
def test_weights_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GeneratorObjective(**options)
