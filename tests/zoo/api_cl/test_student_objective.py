"""Masks of classes, and the learner's losses against loops over images."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from zoo.api_cl.gaps import ResponseGap
from zoo.api_cl.memory import MemoryRows
from zoo.api_cl.networks import build_classifier
from zoo.api_cl.student_objective import (
    ClassSets,
    distillation,
    fisher_diagonal,
    learning_without_forgetting,
    masked_cross_entropy,
    replay,
)

SETS = ClassSets([[1, 4], [3, 0], [2, 5]], 8)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_classes_are_known_by_task_in_the_order_of_its_answers():
    assert len(SETS) == 3 and SETS.num_classes == 8 and ClassSets([[1], [4]]).num_classes == 5
    assert SETS.columns(1).tolist() == [3, 0]
    assert SETS.of_task(1).nonzero().flatten().tolist() == [0, 3]
    assert [SETS.seen(task).nonzero().flatten().tolist() for task in range(3)] == [[1, 4], [0, 1, 3, 4], [*range(6)]]
    assert SETS.task_of(torch.tensor([0, 1, 2, 3, 4, 5])).tolist() == [1, 0, 2, 1, 0, 2]


def test_a_label_competes_with_its_own_task_or_with_all_that_was_seen():
    labels = torch.tensor([4, 3])
    assert [row.nonzero().flatten().tolist() for row in SETS.allowed(labels, "til", 1)] == [[1, 4], [0, 3]]
    assert [row.nonzero().flatten().tolist() for row in SETS.allowed(labels, "cil", 1)] == [[0, 1, 3, 4]] * 2


@pytest.mark.parametrize(
    ("classes", "count", "message"),
    [
        ([[0, 1], [2, 1]], None, "class 1 is in task 0 and in task 1"),
        ([[0, 0]], None, "class 0 is in task 0 and in task 0"),
        ([[0, 1], []], None, "each task at least one class"),
        ([], None, "each task at least one class"),
        ([[0, 7]], 7, "has the label 7: expected 0 to 6"),
        ([[-1, 0]], None, "has the label -1: expected 0 to 0"),
    ],
)
def test_tasks_that_share_or_lack_classes_are_refused(classes, count, message):
    with pytest.raises(ValueError, match=message):
        ClassSets(classes, count)


def test_cross_entropy_is_over_the_allowed_classes_of_each_image():
    logits, labels = draw(4, 8).requires_grad_(), torch.tensor([4, 1, 3, 0])
    allowed = SETS.allowed(labels, "til", 2)
    loss = masked_cross_entropy(logits, labels, allowed)
    wanted = 0.0
    for row, label, mask in zip(logits.tolist(), labels.tolist(), allowed.tolist(), strict=True):
        wanted -= row[label] - math.log(sum(math.exp(s) for s, open_ in zip(row, mask, strict=True) if open_))
    torch.testing.assert_close(float(loss.detach()), wanted / 4)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.equal(gradient != 0, allowed)


def test_half_precision_logits_give_a_loss_in_single():
    labels = torch.tensor([1, 4])
    loss = masked_cross_entropy(draw(2, 8).bfloat16(), labels, SETS.allowed(labels, "til", 0))
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("kind", ["kl", "l1", "l1_prob"])
def test_a_masked_target_is_the_gap_over_the_apis_own_classes_in_its_order(kind):
    probs, logits, gap = draw(5, 2).softmax(-1), draw(5, 8, seed=1), ResponseGap(kind)
    wanted = sum(gap(p, torch.stack([s[3], s[0]])) for p, s in zip(probs, logits, strict=True)) / 5
    torch.testing.assert_close(distillation(probs, logits, SETS, 1, gap), wanted)


def test_a_padded_target_says_nought_for_earlier_classes_and_nothing_of_later_ones():
    probs, logits = draw(5, 2).softmax(-1), draw(5, 8, seed=1)
    seen = [0, 1, 3, 4]
    log_q = logits[:, seen].log_softmax(-1)
    # The API's first column is class 3, its second class 0; both stand among the seen classes.
    own = log_q[:, [2, 0]]
    wanted = (probs * (probs.log() - own)).sum(-1).mean()
    torch.testing.assert_close(distillation(probs, logits, SETS, 1, ResponseGap("kl"), "padded"), wanted)
    first = distillation(probs, logits, SETS, 0, ResponseGap("kl"), "padded")
    torch.testing.assert_close(first, distillation(probs, logits, SETS, 0, ResponseGap("kl")))


def rows(task, n, real, seed):
    labels = SETS.columns(task)[torch.arange(n) % 2] if real else torch.full((n,), -1)
    return MemoryRows(task, draw(n, 1, 4, 4, seed=seed), draw(n, 2, seed=seed).softmax(-1), labels, real)


@pytest.mark.parametrize("scenario", ["til", "cil"])
def test_replay_is_the_mean_over_images_of_all_groups(scenario):
    groups = [rows(0, 5, False, 1), rows(1, 2, False, 2), rows(0, 3, True, 3), rows(1, 1, True, 4)]
    logits = [draw(len(group.images), 8, seed=10 + place).requires_grad_() for place, group in enumerate(groups)]
    gap = ResponseGap("kl")
    losses = []
    for group, scores in zip(groups, logits, strict=True):
        own = SETS.task_classes[group.task]
        for n in range(len(scores)):
            if group.real:
                open_ = own if scenario == "til" else [0, 1, 2, 3, 4, 5]
                place = open_.index(int(group.labels[n]))
                losses.append(-scores[n, open_].log_softmax(-1)[place])
            else:
                losses.append(gap(group.responses[n], scores[n, own]))
    found = replay(groups, logits, SETS, 2, gap, scenario)
    torch.testing.assert_close(found, torch.stack(losses).mean())
    gradients = torch.autograd.grad(found, logits)
    columns = [sorted(set(gradient.nonzero()[:, 1].tolist())) for gradient in gradients]
    others = [[1, 4], [0, 3]] if scenario == "til" else [[0, 1, 2, 3, 4, 5]] * 2
    assert columns == [[1, 4], [0, 3], *others]


def test_the_former_answers_are_kept_task_by_task():
    logits, old = draw(6, 8).requires_grad_(), draw(6, 8, seed=1)
    wanted = torch.zeros(())
    for columns in ([1, 4], [3, 0]):
        p, q = old[:, columns].softmax(-1), logits[:, columns].softmax(-1)
        wanted = wanted + (p * (p / q).log()).sum() / 6
    found = learning_without_forgetting(logits, old, SETS, 2)
    torch.testing.assert_close(found, wanted)
    (gradient,) = torch.autograd.grad(found, logits)
    assert sorted(set(gradient.nonzero()[:, 1].tolist())) == [0, 1, 3, 4]
    assert learning_without_forgetting(old, old, SETS, 2).abs() < 1e-6


@pytest.mark.parametrize("scenario", ["til", "cil"])
def test_the_fisher_diagonal_is_the_mean_square_of_each_images_own_gradient(scenario):
    torch.manual_seed(0)
    model = build_classifier("lenet", (1, 8, 8), 8, width=2, dim=6).eval()
    images, labels = draw(7, 1, 8, 8), torch.tensor([0, 1, 3, 4, 0, 4, 3])
    allowed = SETS.allowed(labels, scenario, 1)
    wanted = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for n in range(7):
        scores = model(images[n : n + 1])[0, allowed[n]]
        place = int(allowed[n, : labels[n]].sum())
        gradients = torch.autograd.grad(-scores.log_softmax(-1)[place], list(model.parameters()))
        for name, gradient in zip(wanted, gradients, strict=True):
            wanted[name] += gradient.square() / 7
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for chunk in (3, 32):
        found = fisher_diagonal(model, images, labels, allowed, chunk)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-8)
    assert max(float(value.max()) for value in wanted.values()) > 1e-3
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_fisher_diagonal_of_one_linear_layer_has_a_closed_form():
    model = nn.Linear(2, 2, bias=False)
    x, labels = torch.tensor([[1.0, 2.0], [0.5, -1.0]]), torch.tensor([0, 1])
    found = fisher_diagonal(model, x, labels, torch.ones(2, 2, dtype=torch.bool))["weight"]
    error = (model(x).softmax(-1) - torch.eye(2)).detach()
    torch.testing.assert_close(found, (error[:, :, None] * x[:, None]).square().mean(0))
