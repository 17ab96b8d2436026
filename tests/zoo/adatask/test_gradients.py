"""Gradients by task: every mode against separate backward passes, what each costs, and who reaches what."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.reference.adatask import separate_backwards
from tests.zoo.adatask.problems import TwoHeads, batch
from zoo.adatask import infer_membership, per_task_grads

MODES = ("loop", "cut", "batched")


class Counted(torch.autograd.Function):
    """The identity, which counts its backward passes."""

    passes = 0

    @staticmethod
    def forward(ctx, inputs):
        return inputs.clone()

    @staticmethod
    def backward(ctx, gradient):
        Counted.passes += 1
        return gradient


class Stubborn(torch.autograd.Function):
    """The identity, whose backward pass looks at values, which vmap cannot."""

    @staticmethod
    def forward(ctx, inputs):
        return inputs.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient if gradient.sum().item() < torch.inf else None


def equal(left, right):
    for a, b in zip(left, right, strict=True):
        for g, h in zip(a, b, strict=True):
            assert (g is None) == (h is None)
            if g is not None:
                torch.testing.assert_close(g, h)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_tasks", [1, 2, 5])
def test_every_mode_gives_the_gradients_of_separate_backward_passes(mode, num_tasks):
    model = TwoHeads(num_tasks)
    parameters = list(model.parameters())
    expected = separate_backwards(model.losses(*batch(0, num_tasks))[0], parameters)
    for parameter in parameters:
        parameter.grad = None
    losses, features = model.losses(*batch(0, num_tasks))
    rows = per_task_grads(losses, parameters, features, mode)
    equal(rows, expected)
    assert all(parameter.grad is None for parameter in parameters)


@pytest.mark.parametrize("mode", ["loop", "cut"])
@pytest.mark.parametrize("num_tasks", [2, 3, 5])
def test_a_trunk_is_passed_once_per_task_and_a_head_once(mode, num_tasks):
    model = TwoHeads(num_tasks)
    inputs, targets = batch(0, num_tasks)
    features = Counted.apply(model.trunk(inputs))
    Counted.passes = 0
    losses = [head(features).squeeze(1).sub(t).square().mean() for head, t in zip(model.heads, targets, strict=True)]
    trunk = Counted.apply(model.trunk[0](inputs))
    features = model.trunk[1:](trunk)
    losses = [head(features).squeeze(1).sub(t).square().mean() for head, t in zip(model.heads, targets, strict=True)]
    per_task_grads(losses, list(model.parameters()), features, mode)
    assert Counted.passes == num_tasks
    Counted.passes = 0
    features = model.trunk(inputs)
    losses = [Counted.apply(head(features)).square().mean() for head in model.heads]
    per_task_grads(losses, list(model.parameters()), features, mode)
    assert Counted.passes == num_tasks


class Tangled(nn.Module):
    """Heads that share a gate above the features, use different features, and may reach the trunk beside them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lower, self.left, self.right = (nn.Linear(5, 4) for _ in range(3))
        self.gate, self.heads = nn.Linear(4, 4), nn.ModuleList(nn.Linear(4, 1) for _ in range(3))
        self.double()

    def losses(self, inputs, targets, beside=False):
        left, right = self.left(inputs).tanh(), self.right(inputs).tanh()
        gated = self.gate(left).sigmoid() * left
        outputs = [self.heads[0](gated), self.heads[1](gated + right), self.heads[2](right)]
        losses = [(o.squeeze(1) - t).square().mean() for o, t in zip(outputs, targets, strict=True)]
        if beside:
            losses[2] = losses[2] + self.left.bias.square().sum()
        return losses, [left, right]


@pytest.mark.parametrize("mode", MODES)
def test_shared_gates_and_partly_used_features_are_counted_right(mode):
    model = Tangled()
    parameters = list(model.parameters())
    expected = separate_backwards(model.losses(*batch(0))[0], parameters)
    losses, features = model.losses(*batch(0))
    equal(per_task_grads(losses, parameters, features, mode), expected)


def test_a_path_beside_the_features_is_right_in_loop_and_refused_where_it_cannot_be_cut():
    model = Tangled()
    parameters = list(model.parameters())
    expected = separate_backwards(model.losses(*batch(0), beside=True)[0], parameters)
    losses, features = model.losses(*batch(0), beside=True)
    with pytest.raises(ValueError, match=r"loss 2 reaches the trunk beside features.*mode='loop'"):
        per_task_grads(losses, parameters, features, "cut")
    equal(per_task_grads(losses, parameters, features, "loop"), expected)


@pytest.mark.parametrize("mode", ["cut", "batched"])
@pytest.mark.parametrize(
    ("features", "message"),
    [
        (lambda z: [z, z], "holds a tensor twice"),
        (lambda z: [z, z.unsqueeze(2)], "feature 1 is computed from another one"),
        (lambda z: [z.exp(), z], "feature 0 is computed from another one"),
    ],
)
def test_features_that_would_count_twice_are_refused(mode, features, message):
    model = TwoHeads()
    losses, z = model.losses(*batch(0))
    with pytest.raises(ValueError, match=message):
        per_task_grads(losses, list(model.parameters()), features(z), mode)


def test_the_other_half_of_a_split_feature_is_not_lost():
    layer, heads = nn.Linear(5, 4), nn.ModuleList(nn.Linear(2, 1) for _ in range(2))
    parameters = [*layer.parameters(), *heads.parameters()]
    left, right = layer(torch.ones(3, 5)).chunk(2, -1)
    losses = [heads[0](left).sum(), heads[1](right).square().sum()]
    expected = separate_backwards(losses, parameters)
    for p in parameters:
        p.grad = None
    with pytest.raises(ValueError, match="loss 1 reaches the trunk beside features"):
        per_task_grads(losses, parameters, [left], "cut")
    equal(per_task_grads(losses, parameters, [left, right], "cut"), expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_frozen_parameter_has_no_gradient(mode):
    model = TwoHeads()
    model.trunk[0].weight.requires_grad_(False)
    model.heads[1].bias.requires_grad_(False)
    losses, features = model.losses(*batch(0))
    names = [name for name, _ in model.named_parameters()]
    rows = per_task_grads(losses, list(model.parameters()), features, mode)
    for k, row in enumerate(rows):
        found = dict(zip(names, row, strict=True))
        assert found["trunk.0.weight"] is None
        assert found["trunk.0.bias"] is not None
        assert (found["heads.1.bias"] is None) and (found[f"heads.{k}.weight"] is not None)


@pytest.mark.parametrize("mode", MODES)
def test_a_missing_loss_leaves_its_row_empty(mode):
    model = TwoHeads()
    parameters = list(model.parameters())
    expected = separate_backwards(model.losses(*batch(0))[0], parameters)
    losses, features = model.losses(*batch(0))
    rows = per_task_grads([losses[0], None, losses[2]], parameters, features, mode)
    assert all(gradient is None for gradient in rows[1])
    equal([rows[0], rows[2]], [expected[0], expected[2]])


def test_an_operation_without_a_batching_rule_falls_back_with_a_warning():
    model = TwoHeads(2)
    inputs, _ = batch(0)
    parameters = list(model.parameters())

    def losses():
        features = model.trunk[1:](Stubborn.apply(model.trunk[0](inputs)))
        return [head(features).square().mean() for head in model.heads], features

    expected = separate_backwards(losses()[0], parameters)
    found, features = losses()
    with pytest.warns(UserWarning, match="'cut' is used instead"):
        rows = per_task_grads(found, parameters, features, "batched")
    equal(rows, expected)


def test_membership_is_read_from_the_graph():
    model = Tangled()
    losses, _ = model.losses(*batch(0), beside=True)
    names = {p: name for name, p in model.named_parameters()}
    found = dict(zip(names.values(), infer_membership(losses, list(names)), strict=True))
    assert found["lower.weight"] == ()
    assert found["left.weight"] == found["gate.bias"] == (0, 1)
    assert found["left.bias"] == (0, 1, 2)
    assert found["right.weight"] == (1, 2)
    assert found["heads.2.bias"] == (2,)


def test_a_parameter_that_is_a_loss_itself_is_reached():
    p = nn.Parameter(torch.tensor(1.0))
    assert infer_membership([p, None], [p]) == [(0,)]


def test_an_unknown_mode_and_missing_features_are_refused():
    with pytest.raises(ValueError, match="one of loop, cut, batched, got 'both'"):
        per_task_grads([], [], mode="both")
    with pytest.raises(ValueError, match="mode='cut' needs features"):
        per_task_grads([], [], mode="cut")
