"""Recalibrated BatchNorm against means by hand and against torch's own routine."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from zoo.merging.batch_norm import recalibrate_bn
from zoo.merging.features import default_features


def network(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(16, 3)
    ).append(nn.BatchNorm1d(3, momentum=0.3))
    for module in (net[1], net[6]):
        module.running_mean.fill_(5.0)
        module.running_var.fill_(7.0)
        module.num_batches_tracked.fill_(9)
    return net


def batches(sizes: tuple[int, ...] = (6, 6, 3)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 2, 4, 4, generator=generator) * (i + 1) + i for i, size in enumerate(sizes)]


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def test_statistics_are_the_means_of_those_of_the_batches() -> None:
    net = network()
    assert recalibrate_bn(net, batches()) == 2
    inputs = [net[0](batch).detach() for batch in batches()]
    torch.testing.assert_close(net[1].running_mean, torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0))
    torch.testing.assert_close(net[1].running_var, torch.stack([x.var((0, 2, 3)) for x in inputs]).mean(0))
    assert int(net[1].num_batches_tracked) == 3


def test_all_layers_agree_with_torchs_update_bn() -> None:
    net, reference = network(), network()
    recalibrate_bn(net, batches())
    update_bn(batches(), reference)
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], tensor)


def test_what_was_there_before_does_not_matter_and_order_does_not_either() -> None:
    first, second = network(), network()
    second[1].running_mean.fill_(-100.0)
    recalibrate_bn(first, batches())
    recalibrate_bn(second, batches()[::-1])
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], tensor)


def test_dropout_is_off() -> None:
    with_dropout, without = network(0.9), network()
    recalibrate_bn(with_dropout, batches())
    recalibrate_bn(without, batches())
    assert torch.equal(with_dropout[6].running_mean, without[6].running_mean)


@pytest.mark.parametrize("training", [False, True])
def test_modes_momenta_weights_and_gradients_are_left_as_they_were(training: bool) -> None:
    net = network(0.5)
    around = nn.Sequential(net, nn.Sequential(net[6])).train(training)
    net[3].train(not training)
    # A module below two others, of which the second has another mode.
    around[1].train()
    net[6].eval()
    modes, weights = [module.training for module in around.modules()], state(net)
    recalibrate_bn(around, batches(), features=lambda model, batch: net(batch))
    assert [module.training for module in around.modules()] == modes
    assert (net[1].momentum, net[6].momentum) == (0.1, 0.3)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    assert not net[6].running_mean.requires_grad
    for name in (name for name, _ in net.named_parameters()):
        assert torch.equal(net.state_dict()[name], weights[name])


@pytest.mark.parametrize("kind", ["pair", "mapping"])
def test_a_feature_function_gets_inputs_without_labels_and_no_gradient(kind: str) -> None:
    def features(model: Any, batch: Any) -> Tensor:
        assert isinstance(batch, Tensor) if kind == "pair" else list(batch) == ["x"]
        assert not torch.is_grad_enabled()
        out: Tensor = model(batch if kind == "pair" else batch["x"])
        return out

    net, expected = network(), network()
    labels = torch.zeros(3)
    recalibrate_bn(
        net, [(x, labels) if kind == "pair" else {"x": x, "labels": labels} for x in batches()], features=features
    )
    recalibrate_bn(expected, batches())
    assert torch.equal(net[6].running_mean, expected[6].running_mean)


def test_without_running_statistics_no_batch_is_read() -> None:
    def never() -> Any:
        raise AssertionError("read")
        yield

    assert recalibrate_bn(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)), never()) == 0


def test_after_an_error_the_statistics_and_modes_are_those_of_before() -> None:
    net = network().train()
    before = state(net)

    def failing(model: Any, batch: Any) -> Tensor:
        default_features(model, batch)
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        recalibrate_bn(net, batches(), features=failing)
    with pytest.raises(ValueError, match="got no batch"):
        recalibrate_bn(net, [])
    with pytest.raises(ValueError, match="statistics of '1' became NaN or infinite"):
        recalibrate_bn(net, [torch.full((4, 2, 4, 4), torch.nan)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert net.training and net[1].training and net[1].momentum == 0.1


def test_a_module_that_does_not_run_keeps_its_statistics_and_is_named() -> None:
    net = network()
    unused = copy.deepcopy(net[1])
    net.register_module("spare", unused)
    with pytest.warns(UserWarning, match="1 of 3 BatchNorm modules did not run .*: spare"):
        assert recalibrate_bn(net, batches(), features=lambda model, batch: nn.Sequential(*model[:7])(batch)) == 2
    assert (unused.running_mean == 5).all() and (unused.running_var == 7).all()


def test_recalibration_brings_merged_activations_to_mean_zero_and_variance_one() -> None:
    net = network()
    data = batches((64,))
    recalibrate_bn(net, data)
    with torch.no_grad():
        normalised = net.eval()[:2](data[0])
    torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalised.var((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
