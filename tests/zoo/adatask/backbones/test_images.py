"""LeNet, SegNet and MTAN: published sizes, and their equations written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from zoo.adatask.backbones import MTAN, LeNet, SegNet

CITYSCAPES = {"segmentation": 7, "depth": 1}


def reached_by_tasks(backbone, images):
    """How many tasks' losses reach each parameter."""
    output = backbone(images)
    parameters = list(backbone.parameters())
    counts = [0] * len(parameters)
    for values in output.outputs.values():
        gradients = torch.autograd.grad(values.sum(), parameters, retain_graph=True, allow_unused=True)
        counts = [n + (g is not None) for n, g in zip(counts, gradients, strict=True)]
    return parameters, counts


def test_mtan_has_the_published_number_of_shared_and_task_specific_parameters():
    parameters, counts = reached_by_tasks(MTAN(CITYSCAPES), torch.randn(1, 3, 32, 32))
    shared = [p.numel() for p, n in zip(parameters, counts, strict=True) if n == 2]
    specific = [p.numel() for p, n in zip(parameters, counts, strict=True) if n == 1]
    assert (sum(shared), len(shared)) == (35_163_456, 144)
    assert (sum(specific), len(specific)) == (6_043_528, 168)


def test_segnet_shares_all_but_its_heads():
    backbone = SegNet(CITYSCAPES, filters=(4, 6, 8))
    parameters, counts = reached_by_tasks(backbone, torch.randn(2, 3, 16, 16))
    heads = {id(p) for p in backbone.heads.parameters()}
    assert all(n == (1 if id(p) in heads else 2) for p, n in zip(parameters, counts, strict=True))
    assert sum(p.numel() for p in backbone.heads.parameters()) == 2 * (9 * 16 + 4) + 4 * 8 + 8


def test_segnet_has_two_convolutions_in_the_outer_levels_and_three_in_the_others():
    trunk = SegNet(CITYSCAPES, filters=(4, 5, 6, 7)).trunk
    for first, rest in ((trunk.encoder_first, trunk.encoder_rest), (trunk.decoder_first, trunk.decoder_rest)):
        assert [1 + len(part) for part in rest] == [2, 2, 3, 3] and len(first) == 4
    assert [(b[0].in_channels, b[0].out_channels) for b in trunk.decoder_first] == [(4, 4), (5, 4), (6, 5), (7, 6)]


def test_unpooling_puts_the_maxima_back_where_they_were():
    torch.manual_seed(0)
    states = SegNet(CITYSCAPES, filters=(3, 4)).trunk(torch.randn(2, 3, 8, 8))
    encoded, unpooled = states.encoded[1], states.unpooled[1]
    for row in range(0, 4, 2):
        for column in range(0, 4, 2):
            window, back = (x[:, :, row : row + 2, column : column + 2].flatten(2) for x in (encoded, unpooled))
            assert torch.equal(back.sum(-1), window.amax(-1))
            kept = back > 0
            assert kept.sum(-1).le(1).all() and torch.equal(back[kept], window[kept])


def test_mtan_equals_its_equations_written_out_for_two_levels():
    torch.manual_seed(0)
    backbone = MTAN(CITYSCAPES, filters=(4, 6)).double()
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    trunk, carry_in, carry_out = backbone.trunk, backbone.encoder_carry, backbone.decoder_carry
    enter0 = trunk.encoder_first[0](images)
    full0 = trunk.encoder_rest[0](enter0)
    pooled0, index0 = F.max_pool2d(full0, 2, return_indices=True)
    enter1 = trunk.encoder_first[1](pooled0)
    full1 = trunk.encoder_rest[1](enter1)
    pooled1, index1 = F.max_pool2d(full1, 2, return_indices=True)
    up1 = F.max_unpool2d(pooled1, index1, (2, 2))
    down1 = trunk.decoder_rest[1](trunk.decoder_first[1](up1))
    up0 = F.max_unpool2d(down1, index0, (2, 2))
    down0 = trunk.decoder_rest[0](trunk.decoder_first[0](up0))
    output = backbone(images)
    for task in CITYSCAPES:
        masks = backbone.attention[task]
        x = F.max_pool2d(carry_in[0](masks.encoder[0](enter0) * full0), 2)
        x = F.max_pool2d(carry_in[1](masks.encoder[1](torch.cat([enter1, x], 1)) * full1), 2)
        x = carry_out[1](F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True))
        x = masks.decoder[1](torch.cat([up1, x], 1)) * down1
        x = carry_out[0](F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True))
        x = masks.decoder[0](torch.cat([up0, x], 1)) * down0
        assert torch.allclose(output.outputs[task], backbone.heads[task](x), atol=1e-12)


@pytest.mark.parametrize("cls", [SegNet, MTAN])
def test_convolutions_start_xavier_normal_without_bias_and_norms_as_identity(cls):
    torch.manual_seed(0)
    for part in cls(CITYSCAPES, filters=(32, 64)).modules():
        if isinstance(part, torch.nn.Conv2d):
            area = part.kernel_size[0] ** 2
            std = (2 / (area * (part.in_channels + part.out_channels))) ** 0.5
            assert not part.bias.any()
            assert part.weight.std().item() == pytest.approx(std, rel=0.25)
        elif isinstance(part, torch.nn.BatchNorm2d):
            assert (part.weight == 1).all() and not part.bias.any()


@pytest.mark.parametrize("cls", [SegNet, MTAN])
@pytest.mark.parametrize("size", [(12, 16), (16, 4), (0, 8)])
def test_sizes_that_the_levels_do_not_divide_are_named(cls, size):
    backbone = cls(CITYSCAPES, filters=(3, 4, 5))
    with pytest.raises(ValueError, match=f"images of {size[0]} x {size[1]}: .* multiples of 8"):
        backbone(torch.zeros(2, 3, *size))
    with pytest.raises(ValueError, match="filters is empty"):
        cls(CITYSCAPES, filters=())


@pytest.mark.parametrize("size", [(8, 8), (9, 20), (28, 28), (36, 36)])
def test_lenet_takes_any_size_from_8_by_8_with_the_same_parameters(size):
    backbone = LeNet({"left": 10, "right": 10})
    output = backbone(torch.randn(3, 1, *size))
    assert output.outputs["left"].shape == (3, 10) and output.features[0].shape == (3, 50)
    assert sum(p.numel() for p in backbone.parameters()) == 260 + 5020 + 320 * 50 + 50 + 2 * 510


def test_lenet_names_the_size_of_images_that_are_too_small():
    with pytest.raises(ValueError, match="images of 7 x 8 are too small: LeNet needs at least 8 x 8"):
        LeNet({"left": 10})(torch.zeros(2, 1, 7, 8))
