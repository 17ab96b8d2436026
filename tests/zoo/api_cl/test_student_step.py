"""A step of the learner: each term is what it says, and moves the rows of the head that it may."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.zoo.api_cl.small_networks import SHAPE, backbone, seeded, sharper
from zoo.api_cl.game import StudentBatch, StudentObjective
from zoo.api_cl.gaps import ResponseGap
from zoo.api_cl.memory import MemoryRows
from zoo.api_cl.networks import Classifier
from zoo.api_cl.similarity import DebiasedCKA
from zoo.api_cl.student_objective import ClassSets

SETS = ClassSets([[1, 4], [3, 0], [2, 5]])


@pytest.fixture
def learner():
    return sharper(Classifier(backbone(9, 1), 9, 6)).double().train()


def draw_images(n, seed):
    return torch.rand(n, *SHAPE, generator=seeded(seed), dtype=torch.float64) * 2 - 1


def responses(n, seed):
    return torch.randn(n, 2, generator=seeded(seed), dtype=torch.float64).softmax(-1)


def remembered(task, n, seed, real=False, stored=2):
    labels = SETS.columns(task)[torch.arange(n) % 2] if real else torch.full((n,), -1)
    probs = torch.randn(n, stored, generator=seeded(seed + 50)).double()
    return MemoryRows(task, draw_images(n, seed), probs.softmax(-1) if stored == 2 else probs, labels, real)


def full_batch(**changed):
    parts = {
        "images": draw_images(6, 1),
        "probs": responses(6, 2),
        "real": draw_images(4, 3),
        "labels": torch.tensor([3, 0, 0, 3]),
        "real_probs": responses(4, 4),
        "memory": [remembered(0, 5, 5), remembered(0, 3, 6, real=True)],
    }
    return StudentBatch(**{**parts, **changed})


def head_rows(loss, learner):
    """Rows of the head that a loss moves."""
    weight, bias = torch.autograd.grad(loss, (learner.head.weight, learner.head.bias), retain_graph=True)
    moved = {row for row in range(6) if weight[row].any() or bias[row] != 0}
    return moved


@pytest.mark.parametrize("gap", ["kl", "l1", "l1_prob"])
@pytest.mark.parametrize("scenario", ["til", "cil"])
def test_imitating_the_api_moves_the_head_rows_of_its_own_classes_alone(gap, scenario, learner):
    objective = StudentObjective(SETS, ResponseGap(gap), scenario)
    terms = objective(learner, None, full_batch(), 1)
    assert head_rows(terms["new"], learner) == {3, 0}
    batch = full_batch(memory=[remembered(0, 5, 5)])
    assert head_rows(objective(learner, None, batch, 1)["memory"], learner) == {1, 4}


@pytest.mark.parametrize(("scenario", "real", "memory"), [("til", {3, 0}, {1, 4}), ("cil", {0, 1, 3, 4}, {0, 1, 3, 4})])
def test_real_labels_compete_with_all_seen_classes_in_cil_only(scenario, real, memory, learner):
    batch = full_batch(memory=[remembered(0, 4, 6, real=True)])
    terms = StudentObjective(SETS, ResponseGap("kl"), scenario)(learner, None, batch, 1)
    assert head_rows(terms["real"], learner) == real
    assert head_rows(terms["memory"], learner) == memory


def test_a_padded_target_pulls_the_earlier_classes_down_in_cil_only(learner):
    til = StudentObjective(SETS, ResponseGap("kl"), "til", "padded")(learner, None, full_batch(real=None), 1)
    assert head_rows(til["new"], learner) == {3, 0}
    cil = StudentObjective(SETS, ResponseGap("kl"), "cil", "padded")(learner, None, full_batch(real=None), 1)
    assert head_rows(cil["new"], learner) == {0, 1, 3, 4}
    (bias,) = torch.autograd.grad(cil["new"], learner.head.bias)
    assert bias[1] > 0 and bias[4] > 0 and bias[2] == bias[5] == 0


def test_synthetic_and_real_images_share_one_mean(learner):
    learner.eval()
    batch = full_batch()
    gap = ResponseGap("kl")
    terms = StudentObjective(SETS, gap)(learner, None, batch, 1)
    together = torch.cat([batch.images, batch.real]), torch.cat([batch.probs, batch.real_probs])
    wanted = gap(together[1], learner(together[0])[:, [3, 0]]).mean()
    torch.testing.assert_close(terms["new"], wanted)
    alone = StudentObjective(SETS, gap)(learner, None, full_batch(images=None, probs=None), 1)
    torch.testing.assert_close(alone["new"], gap(batch.real_probs, learner(batch.real)[:, [3, 0]]).mean())
    labels_only = StudentObjective(SETS, gap)(learner, None, full_batch(real_probs=None), 1)
    torch.testing.assert_close(labels_only["new"], gap(batch.probs, learner(batch.images)[:, [3, 0]]).mean())


def test_the_terms_are_weighted_and_each_is_what_it_says(learner):
    learner.eval()
    previous = copy.deepcopy(learner)
    with torch.no_grad():
        for parameter in previous.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=seeded(9), dtype=torch.float64))
    batch = full_batch(memory=[remembered(0, 5, 5), remembered(0, 3, 6, real=True, stored=6)])
    plain = StudentObjective(SETS, ResponseGap("kl"), lwf=1.0, derpp=1.0)(learner, previous, batch, 1)
    weighted = StudentObjective(
        SETS, ResponseGap("kl"), real=2.0, memory=3.0, similarity=5.0, lwf=7.0, derpp=11.0
    )(learner, previous, batch, 1)  # fmt: skip
    assert list(plain) == ["new", "real", "lwf", "memory", "derpp", "similarity"]
    factors = {"new": 1, "real": 2, "lwf": 7, "memory": 3, "derpp": 11, "similarity": 5}
    torch.testing.assert_close(weighted, {name: factors[name] * value for name, value in plain.items()})

    synthetic, real = batch.memory
    s, t = learner(synthetic.images)[:, [1, 4]].log_softmax(-1), synthetic.responses
    imitated = (t * (t.log() - s)).sum(-1)
    labels = (real.labels == 4).long()
    named = nn.functional.cross_entropy(learner(real.images)[:, [1, 4]], labels, reduction="none")
    old, new = (network(batch.real)[:, [1, 4]].log_softmax(-1) for network in (previous, learner))
    images = torch.cat([synthetic.images, real.images])
    wanted = {
        "real": nn.functional.cross_entropy(learner(batch.real)[:, [3, 0]], torch.tensor([0, 1, 1, 0])),
        "memory": torch.cat([imitated, named]).mean(),
        "lwf": (old.exp() * (old - new)).sum(-1).mean(),
        "derpp": (learner(real.images) - real.responses).square().mean(),
        "similarity": 1 - DebiasedCKA()(learner.features(images), previous.features(images)),
    }
    for name, value in wanted.items():
        torch.testing.assert_close(plain[name].double(), value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("weight", "name"), [("real", "real"), ("memory", "memory"), ("similarity", "similarity")])
def test_a_term_of_weight_zero_is_left_out(weight, name, learner):
    previous = copy.deepcopy(learner).eval()
    terms = StudentObjective(SETS, ResponseGap("kl"))(learner, previous, full_batch(), 1)
    without = StudentObjective(SETS, ResponseGap("kl"), **{weight: 0.0})(learner, previous, full_batch(), 1)
    assert set(terms) - set(without) == {name}
    without = StudentObjective(SETS, ResponseGap("kl"), kind="none")(learner, previous, full_batch(), 1)
    assert "similarity" not in without


def test_logits_are_compared_on_the_classes_that_the_former_network_knew(learner):
    learner.eval()
    previous = copy.deepcopy(learner)
    with torch.no_grad():
        # Rows of classes that came later: whatever the former network says of them means nothing.
        previous.head.bias[[0, 2, 3, 5]] += 7
        previous.head.bias[[1, 4]] += 0.5
    terms = StudentObjective(SETS, ResponseGap("kl"), kind="logit_l2")(learner, previous, full_batch(), 1)
    torch.testing.assert_close(float(terms["similarity"].detach()), 0.25)


def test_the_former_network_is_only_looked_at(learner):
    previous = copy.deepcopy(learner).eval()
    state = copy.deepcopy(previous.state_dict())
    objective = StudentObjective(SETS, ResponseGap("kl"), kind="cosine", lwf=1.0)
    torch.autograd.backward(sum(objective(learner, previous, full_batch(), 1).values()))
    assert all(parameter.grad is None for parameter in previous.parameters())
    assert all(torch.equal(value, state[name]) for name, value in previous.state_dict().items())
    assert learner.backbone[1].weight.grad.abs().max() > 0


def test_all_parts_go_through_the_learner_in_one_pass(learner):
    sizes = []
    learner.backbone.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    StudentObjective(SETS, ResponseGap("kl"))(learner, None, full_batch(), 1)
    assert sizes == [6 + 4 + 5 + 3]


def test_der_has_nothing_to_compare_with_among_synthetic_images(learner):
    objective = StudentObjective(SETS, ResponseGap("kl"), derpp=1.0)
    assert objective(learner, None, full_batch(memory=[remembered(0, 5, 5)]), 1)["derpp"] == 0


def test_a_step_without_any_image_is_refused(learner):
    with pytest.raises(ValueError, match="no images: give real_fraction > 0 or a method"):
        StudentObjective(SETS, ResponseGap("kl"))(learner, None, StudentBatch(), 0)
