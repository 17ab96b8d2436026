"""Classifiers are built for all sizes of image, and heads grow without a change of old logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from zoo.api_cl.networks import ARCHITECTURES, build_classifier, reset_head_rows

NARROW = {"lenet": {"width": 4}, "resnet18": {"width": 4}, "vgg11": {"width": 4}, "wrn": {"width": 4}}


def narrow(name, size, channels=1, classes=10):
    return build_classifier(name, (channels, size, size), classes, **NARROW.get(name, {}))


@pytest.mark.parametrize("size", [8, 28, 32, 84])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_networks_take_all_sizes_and_train_every_weight(name, size):
    torch.manual_seed(0)
    network = narrow(name, size, channels=3 if size > 28 else 1)
    images = torch.rand(4, 3 if size > 28 else 1, size, size) * 2 - 1
    features = network.features(images)
    assert features.shape == (4, network.dim)
    logits = network(images)
    assert logits.shape == (4, 10) and logits.dtype == torch.float32
    nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    for parameter in network.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_the_head_of_the_features_and_rows_do_not_couple_in_eval_mode(name):
    torch.manual_seed(0)
    network = narrow(name, 8).eval()
    images = torch.rand(6, 1, 8, 8) * 2 - 1
    logits = network(images)
    torch.testing.assert_close(logits, network.head(network.features(images)))
    torch.testing.assert_close(logits[2:3], network(images[2:3]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits[0], logits[1])


def test_images_need_not_be_square():
    for name in ARCHITECTURES:
        network = build_classifier(name, (1, 40, 12), 3, **NARROW.get(name, {}))
        assert network(torch.zeros(2, 1, 40, 12)).shape == (2, 3)


def test_the_standard_networks_have_their_known_numbers_of_weights():
    def weights(name, classes=10):
        return sum(parameter.numel() for parameter in build_classifier(name, (3, 32, 32), classes).parameters())

    # ResNet-18 for CIFAR, WRN-16-2 and multinomial logistic regression, as widely reported.
    assert weights("resnet18") == 11_173_962
    assert weights("wrn") == 691_674
    assert weights("logistic") == 30_730


def test_lenet_normalises_batches_and_a_classifier_keeps_its_options():
    lenet = build_classifier("lenet", (1, 28, 28), 10, dim=32)
    assert lenet.dim == 32 and any(isinstance(module, nn.BatchNorm2d) for module in lenet.modules())
    mlp = build_classifier("mlp", (1, 8, 8), 2, hidden=5, layers=3)
    assert [tuple(layer.weight.shape) for layer in mlp.backbone if isinstance(layer, nn.Linear)] == [
        (5, 64),
        (5, 5),
        (5, 5),
    ]


def test_a_growing_head_keeps_every_bit_of_the_old_logits():
    torch.manual_seed(0)
    network = narrow("lenet", 8).eval()
    images = torch.rand(5, 1, 8, 8)
    before, weight = network(images), network.head.weight.detach().clone()
    reset_head_rows(network.head, [7, 4])
    after = network(images)
    old = [0, 1, 2, 3, 5, 6, 8, 9]
    assert torch.equal(after[:, old], before[:, old])
    assert torch.equal(network.head.weight[old], weight[old])
    assert not torch.isclose(after[:, [4, 7]], before[:, [4, 7]]).any()


def test_new_rows_follow_the_initialisation_of_a_linear_layer():
    head = nn.Linear(400, 50)
    with torch.no_grad():
        head.weight.fill_(7.0), head.bias.fill_(7.0)
    reset_head_rows(head, range(50), torch.Generator().manual_seed(0))
    bound = 1 / math.sqrt(400)
    for values in (head.weight, head.bias):
        assert values.requires_grad and values.grad_fn is None
        assert values.abs().max() <= bound
        # The standard deviation of a uniform distribution, within 5 standard errors.
        assert values.detach().std() == pytest.approx(bound / math.sqrt(3), rel=5 * math.sqrt(0.2 / values.numel()))
    assert head.weight.abs().max() > 0.99 * bound


def test_new_rows_come_from_the_generator_alone_and_heads_without_bias_are_fine():
    heads = [nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for head in heads:
        reset_head_rows(head, [1, 2], torch.Generator().manual_seed(5))
    assert torch.equal(heads[0].weight[1:3], heads[1].weight[1:3])
    assert not torch.equal(heads[0].weight[0], heads[1].weight[0])
    assert torch.equal(torch.get_rng_state(), state)
    reset_head_rows(heads[0], [])


@pytest.mark.parametrize(
    ("name", "shape", "classes", "options", "message"),
    [
        ("alexnet", (1, 8, 8), 2, {}, "arch must be one of lenet, mlp, .*, got 'alexnet'"),
        ("mlp", (8, 8), 2, {}, r"image_shape must be \(channels, height, width\), got \(8, 8\)"),
        ("mlp", (1, 7, 8), 2, {}, "at least 1 channel and 8x8 pixels"),
        ("mlp", (1, 8, 8), 0, {}, "num_classes must be at least 1, got 0"),
        ("mlp", (1, 8, 8), 2, {"width": 3}, "mlp has no option 'width'; it takes: hidden, layers"),
        ("logistic", (1, 8, 8), 2, {"dim": 3}, "logistic has no option 'dim'; it takes: none"),
        ("lenet", (1, 8, 8), 2, {"width": 0}, "option 'width' of lenet must be a whole number of at least 1, got 0"),
        ("wrn", (1, 8, 8), 2, {"depth": 18}, "must be 6 n . 4, such as 10, 16 or 28, got 18"),
    ],
)
def test_what_cannot_be_built_is_refused(name, shape, classes, options, message):
    with pytest.raises(ValueError, match=message):
        build_classifier(name, shape, classes, **options)


def test_rows_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="the head has the rows 0 to 3, got -1"):
        reset_head_rows(nn.Linear(2, 4), [0, -1])
