"""Networks that run with merged weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.zoo.merging.small_experts import CLASSES, INPUTS, Net, encoder, equal, moved, net, states
from zoo.merging import MergedModel, TaskVectorStore
from zoo.merging.merged_model import find_prefix, freeze, non_finite, prefixed


def store(base):
    return TaskVectorStore.from_checkpoints(base, states(base))


@pytest.mark.parametrize("coef", [0.3, torch.tensor([0.1, 0.5, -0.2]), torch.linspace(0, 1, 18).view(6, 3)])
def test_it_gives_what_a_network_with_the_merged_state_dict_gives(coef):
    base = net(batch_norm=True)
    vectors = store(base)
    model = MergedModel(base, vectors, coef)
    plain = Net(batch_norm=True).eval()
    plain.load_state_dict(vectors.state_dict(coef))
    inputs = torch.randn(5, INPUTS)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs), plain(inputs))
        torch.testing.assert_close(model(pixel_values=inputs), plain(inputs))
        own = model.materialize()
        assert torch.equal(own(inputs), plain(inputs))
    assert equal(own.state_dict(), plain.state_dict())
    assert not own.training


def test_neither_network_nor_vectors_are_a_part_of_it():
    base = net()
    before = copy.deepcopy(base.state_dict())
    vectors = store(base)
    model = MergedModel(base, vectors, 0.3)
    assert list(model.parameters()) == [] and dict(model.state_dict()) == {}
    assert model.skeleton is base and model.store is vectors
    model(torch.randn(2, INPUTS))
    model.materialize().out.weight.data.zero_()
    assert equal(base.state_dict(), before)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_network_may_be_on_the_meta_device(batch_norm):
    base = net(batch_norm=batch_norm)
    with torch.device("meta"):
        skeleton = Net(batch_norm=batch_norm).eval()
    vectors = store(base)
    inputs = torch.randn(5, INPUTS)
    with torch.no_grad():
        expected = MergedModel(base, vectors, 0.4)(inputs)
        model = MergedModel(skeleton, vectors, 0.4)
        torch.testing.assert_close(model(inputs), expected)
        torch.testing.assert_close(model.materialize()(inputs), expected)


def test_a_network_around_the_merged_one_serves():
    whole = encoder()
    experts = {task: moved(whole, k).backbone for k, task in enumerate(CLASSES)}
    model = MergedModel(whole, TaskVectorStore.from_checkpoints(whole.backbone, experts), 0.3)
    assert model.prefix == "backbone."
    own = model.materialize()
    images = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(images), own(images))
    assert not torch.allclose(own(images), whole(images))


def test_gradients_reach_the_inputs():
    model = MergedModel(net(), store(net()), 0.3)
    inputs = torch.randn(2, INPUTS, requires_grad=True)
    model(inputs).sum().backward()
    assert float(inputs.grad.abs().sum()) > 0


def test_networks_that_do_not_fit_are_refused():
    vectors = store(net())
    with pytest.raises(ValueError, match=r"Linear has no parameter 'stem.weight' \(4 of 4 are missing\): give"):
        MergedModel(nn.Linear(2, 2), vectors, 0.3)
    wide = net()
    wide.out = nn.Linear(8, 7)
    with pytest.raises(ValueError, match=r"out.weight has the shape \(5, 8\) in the store and \(7, 8\) in Net"):
        MergedModel(wide, vectors, 0.3)
    with pytest.raises(ValueError, match="coefficients must be a number"):
        MergedModel(net(), vectors, torch.ones(7))


def test_the_prefix_is_the_one_under_which_all_names_are_there():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential(nn.Linear(2, 2))
            self.b = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    assert find_prefix(Two(), ["0.weight", "1.weight"]) == "b."
    assert find_prefix(Two().b, ["0.weight", "1.bias"]) == ""
    with pytest.raises(ValueError, match=r"no parameter '2.weight' \(1 of 2 are missing\)"):
        find_prefix(Two().b, ["0.weight", "2.weight"])
    assert prefixed({"x": 1}, "b.") == {"b.x": 1}


def test_a_frozen_network_evaluates_and_has_nothing_to_train():
    model = net(dropout=0.5, batch_norm=True).train()
    assert freeze(model) is model
    assert not any(part.training for part in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_broken_tensors_are_named():
    tensors = {"a": torch.ones(2), "b": torch.tensor([1.0, torch.nan]), "c": torch.tensor(torch.inf)}
    assert non_finite(tensors) == ["b", "c"]
