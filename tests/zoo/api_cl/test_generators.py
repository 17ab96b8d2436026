"""Generators draw images of the right size, with pre-activations in the active range of tanh."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo.api_cl.generators import GENERATORS, DCGANGenerator, DFGenerator

SHAPES = [("df", (1, 8, 8)), ("df", (1, 28, 28)), ("df", (3, 32, 32)), ("df", (3, 84, 84)), ("df", (2, 8, 12))]
SHAPES += [("dcgan", (1, 16, 16)), ("dcgan", (3, 64, 64)), ("dcgan", (3, 96, 32))]


@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_generators_draw_the_shape_with_mean_0_and_variance_1_of_each_channel(name, shape):
    torch.manual_seed(0)
    generator = GENERATORS[name](16, shape, 8)
    x_pre = generator(torch.randn(12, 16))
    assert x_pre.shape == (12, *shape) and generator.image_shape == shape and generator.latent_dim == 16
    torch.testing.assert_close(x_pre.mean((0, 2, 3)), torch.zeros(shape[0]), rtol=0, atol=1e-4)
    torch.testing.assert_close(x_pre.var((0, 2, 3), correction=0), torch.ones(shape[0]), rtol=0, atol=2e-2)
    # Half of the pixels and more are where tanh still has a gradient.
    assert (x_pre.abs() < 2).float().mean() > 0.5


@pytest.mark.parametrize(("name", "shape"), SHAPES[::3])
def test_every_weight_is_trained(name, shape):
    torch.manual_seed(0)
    generator = GENERATORS[name](16, shape, 8)
    (generator(torch.randn(6, 16)).tanh() * torch.randn(6, *shape)).mean().backward()
    for parameter in generator.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("name", GENERATORS)
def test_the_last_batch_norm_has_no_weights_and_no_tanh_follows(name):
    last = GENERATORS[name](16, (1, 16, 16), 8).stages[-1]
    assert isinstance(last, nn.BatchNorm2d) and not last.affine and not list(last.parameters())


def test_the_default_generator_has_the_layers_of_its_description():
    generator = DFGenerator(100, (1, 28, 28), 16)
    convolutions = [(m.in_channels, m.out_channels) for m in generator.modules() if isinstance(m, nn.Conv2d)]
    assert convolutions == [(32, 32), (32, 16), (16, 1)]
    assert generator.project.out_features == 32 * 7 * 7
    transposed = [
        (m.in_channels, m.out_channels)
        for m in DCGANGenerator(9, (3, 32, 32), 4).stages.children()
        if isinstance(m, nn.ConvTranspose2d)
    ]
    assert transposed == [(32, 16), (16, 8), (8, 4), (4, 3)]


def test_two_generators_have_weights_of_their_own():
    first, second = DFGenerator(8, (1, 8, 8), 4), DFGenerator(8, (1, 8, 8), 4)
    z = torch.randn(4, 8)
    assert not torch.allclose(first(z), second(z))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("df", (8, (1, 30, 28)), "multiples of 4, got 30x28; set image_size to such a size"),
        ("df", (8, (1, 0, 28)), "multiples of 4, got 0x28"),
        ("dcgan", (8, (1, 84, 84)), "multiples of 16, got 84x84; .*df needs multiples of 4"),
        ("df", (0, (1, 8, 8)), "latent_dim of a generator must be at least 1, got 0"),
        ("dcgan", (8, (1, 16, 16), 0), "base_channels of a generator must be at least 1, got 0"),
        ("df", (8, (8, 8)), r"image_shape must be \(channels, height, width\), got \(8, 8\)"),
    ],
)
def test_sizes_that_cannot_be_drawn_are_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        GENERATORS[name](*arguments)
