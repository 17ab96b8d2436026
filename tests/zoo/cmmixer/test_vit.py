"""The vision transformer that both stages share."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo.cmmixer.vit
from zoo.cmmixer.positions import grid_positions
from zoo.cmmixer.vit import DECODER_SIZES, SIZES, Attention, Block, ViTEncoder, pooled, size_of

SMALL: dict[str, Any] = {"patch_size": 4, "hidden_size": 16, "num_layers": 2, "num_heads": 2}


def small_encoder(num_frames: int = 3, **changes: Any) -> ViTEncoder:
    """An encoder in float64 whose biases are not zero and whose norms are not one."""
    torch.manual_seed(0)
    encoder = ViTEncoder([2, 8, 12], num_frames, **{**SMALL, **changes}).double().eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return encoder


def brute_attention(attention: Attention, states: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Attention sample by sample, head by head, query by query; keys that are not allowed get no weight."""
    weight, bias = attention.qkv.weight.double(), attention.qkv.bias.double()
    batch, tokens, width = states.shape
    part = width // attention.num_heads
    mixed = torch.zeros(batch, tokens, width, dtype=torch.float64)
    for sample in range(batch):
        query, key, value = (states[sample].double() @ weight.T + bias).view(tokens, 3, width).unbind(1)
        for head in range(attention.num_heads):
            own = slice(head * part, (head + 1) * part)
            for token in range(tokens):
                scores = key[:, own] @ query[token, own] / part**0.5
                if allowed is not None:
                    scores = scores.masked_fill(~allowed[sample], -torch.inf)
                shares = scores.exp() / scores.exp().sum()
                mixed[sample, token, own] = shares @ value[:, own]
    return mixed @ attention.proj.weight.double().T + attention.proj.bias.double()


def brute_norm(norm: torch.nn.LayerNorm, states: Tensor) -> Tensor:
    centred = states - states.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight + norm.bias


def brute_encode(encoder: ViTEncoder, tokens: Tensor, allowed: Tensor) -> Tensor:
    """The states of CLS and all tokens, where only allowed tokens are attended to."""
    states = torch.cat([encoder.cls_token.expand(len(tokens), -1, -1), tokens], 1)
    allowed = torch.cat([torch.ones(len(tokens), 1, dtype=torch.bool), allowed], 1)
    for block in encoder.blocks:
        assert isinstance(block, Block)
        states = states + brute_attention(block.attention, brute_norm(block.norm1, states), allowed)
        first, last = block.mlp[0], block.mlp[2]
        assert isinstance(first, torch.nn.Linear)
        assert isinstance(last, torch.nn.Linear)
        inner = brute_norm(block.norm2, states) @ first.weight.T + first.bias
        gelu = inner * (1 + torch.erf(inner / 2**0.5)) / 2
        states = states + gelu @ last.weight.T + last.bias
    return brute_norm(encoder.norm, states)


def test_attention_is_the_softmax_of_scaled_products() -> None:
    torch.manual_seed(0)
    attention = Attention(12, 3)
    torch.nn.init.normal_(attention.qkv.bias)
    torch.nn.init.normal_(attention.proj.bias)
    states = torch.randn(2, 5, 12) * 2
    expected = brute_attention(attention, states)
    torch.testing.assert_close(attention(states).double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(attention.double()(states.double()), expected, atol=1e-12, rtol=0)


def test_visible_patches_are_encoded_as_if_the_others_were_not_there() -> None:
    encoder = small_encoder()
    patches = torch.randn(2, encoder.num_patches, 32, dtype=torch.float64)
    index = torch.stack([torch.randperm(encoder.num_patches)[:5] for _ in range(2)])
    allowed = torch.zeros(2, encoder.num_patches, dtype=torch.bool).scatter_(1, index, True)
    everything = encoder.patch_embedding(patches) + grid_positions(2, 9, 16).double()
    expected = brute_encode(encoder, everything, allowed)
    seen = patches.gather(1, index[..., None].expand(-1, -1, 32))
    states = encoder.encode(encoder.embed(seen, index))
    assert states.shape == (2, 6, 16)
    torch.testing.assert_close(states[:, 0], expected[:, 0], atol=1e-6, rtol=0)
    torch.testing.assert_close(states[:, 1:], expected[:, 1:].gather(1, index[..., None].expand(-1, -1, 16)))


@pytest.mark.parametrize("layout", ["concat", "interleave"])
def test_forward_encodes_all_patches_in_order(layout: str) -> None:
    encoder = small_encoder(layout=layout)
    clips = torch.randn(2, 3, 2, 8, 12, dtype=torch.float64)
    ordered = clips.permute(0, 2, 3, 1, 4) if layout == "concat" else clips.permute(0, 2, 3, 4, 1)
    wide = ordered.reshape(2, 2, 8, 36)
    # A convolution whose stride is its kernel is the same map of patches.
    kernel = encoder.patch_embedding.weight.view(16, 4, 4, 2).permute(0, 3, 1, 2)
    embedded = torch.nn.functional.conv2d(wide, kernel, encoder.patch_embedding.bias, stride=4).flatten(2).mT
    tokens = embedded + grid_positions(2, 9, 16).double()
    expected = brute_encode(encoder, tokens, torch.ones(2, 18, dtype=torch.bool))
    torch.testing.assert_close(encoder(clips), expected)
    assert torch.equal(encoder.embed(encoder.patches(clips)), encoder.embed(encoder.patches(clips), torch.arange(18)))


def test_patches_in_another_order_give_the_same_states_in_that_order() -> None:
    encoder = small_encoder()
    patches = encoder.patches(torch.randn(1, 3, 2, 8, 12, dtype=torch.float64))
    order = torch.randperm(encoder.num_patches)
    states = encoder.encode(encoder.embed(patches))
    moved = encoder.encode(encoder.embed(patches[:, order], order[None]))
    torch.testing.assert_close(moved[:, 0], states[:, 0])
    torch.testing.assert_close(moved[:, 1:], states[:, 1:][:, order])


def test_a_fresh_encoder_is_built_from_the_config_of_another() -> None:
    encoder = small_encoder(mlp_ratio=3.0, layout="interleave")
    copy = ViTEncoder(**encoder.config).double()
    assert copy.config == encoder.config
    assert (copy.grid, copy.num_patches, copy.layout) == ((2, 9), 18, "interleave")
    # Positions are no part of the weights, so that weights fit encoders of other image sizes.
    assert "positions" not in encoder.state_dict()
    copy.load_state_dict(encoder.state_dict())
    clips = torch.randn(2, 3, 2, 8, 12, dtype=torch.float64)
    assert torch.equal(copy(clips), encoder(clips))
    ViTEncoder(**{**encoder.config, "num_frames": 1, "image_shape": [2, 16, 8]}).load_state_dict(encoder.state_dict())


def test_the_width_of_the_mlps_is_rounded_to_the_nearest() -> None:
    # 44 * (60 / 44) is a hair below 60.
    assert Block(44, 2, 60 / 44).mlp[0].out_features == 60


def test_linear_maps_start_without_biases_and_norms_with_the_published_epsilon() -> None:
    encoder = ViTEncoder([1, 8, 8], 1, **SMALL)
    for name, part in encoder.named_modules():
        if isinstance(part, torch.nn.Linear):
            assert not part.bias.any(), name
            bound = (6 / (part.in_features + part.out_features)) ** 0.5
            assert 0.8 * bound < part.weight.abs().max() <= bound, name
        if isinstance(part, torch.nn.LayerNorm):
            assert part.eps == 1e-6, name
    assert 0 < encoder.cls_token.abs().max() < 0.1


def test_clips_of_another_shape_are_refused_with_both_shapes() -> None:
    encoder = ViTEncoder([2, 8, 12], 3, **SMALL)
    for shape in [(2, 1, 2, 8, 12), (2, 3, 1, 8, 12), (2, 3, 2, 12, 8), (3, 2, 8, 12)]:
        message = rf"clips \(batch, 3, 2, 8, 12\): frames, .*; got {shape}".replace("got (", r"got \(")
        with pytest.raises(ValueError, match=message[:-1] + r"\)"):
            encoder(torch.zeros(shape))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_shape": [8, 12]}, r"image_shape must be channels, height and width, got \[8, 12\]"),
        ({"image_shape": [0, 8, 12]}, r"image_shape must be .*, got \[0, 8, 12\]"),
        ({"image_shape": [2, 8, 10]}, "frames of 8 rows and 10 columns cannot be cut into patches of 4 x 4"),
        ({"image_shape": [2, 8, 10], "layout": "interleave"}, "8 rows and 3 x 10 columns cannot be cut into patches"),
        ({"num_layers": 0}, "num_layers and mlp_ratio must be positive, got 0"),
        ({"num_heads": 3}, "3 heads cannot share a hidden_size of 16"),
        ({"num_heads": 0}, "0 heads cannot share a hidden_size of 16"),
        ({"hidden_size": 18}, "multiple of 4, got 18"),
        ({"layout": "stacked"}, "layout must be one of concat, interleave, got 'stacked'"),
    ],
    ids=["dimensions", "channels", "width", "interleave", "layers", "heads", "no-heads", "hidden_size", "layout"],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViTEncoder(**{"image_shape": [2, 8, 12], "num_frames": 3, **SMALL, **changes})


def test_pooling_takes_cls_or_the_mean_of_the_patches() -> None:
    states = torch.randn(2, 5, 8)
    assert torch.equal(pooled(states, "cls"), states[:, 0])
    torch.testing.assert_close(pooled(states, "mean"), states[:, 1:].sum(1) / 4)
    with pytest.raises(ValueError, match="pool must be cls or mean, got 'max'"):
        pooled(states, "max")


def test_names_stand_for_the_published_sizes_and_options_replace_them() -> None:
    assert size_of("base", None, SIZES) == {"hidden_size": 768, "num_layers": 12, "num_heads": 12}
    assert size_of("large", None, SIZES) == {"hidden_size": 1024, "num_layers": 24, "num_heads": 16}
    assert size_of("huge", {"num_layers": 2, "mlp_ratio": 2}, SIZES) == {
        "hidden_size": 1280,
        "num_layers": 2,
        "num_heads": 16,
        "mlp_ratio": 2,
    }
    assert size_of("deep_base", None, DECODER_SIZES) == {"hidden_size": 512, "num_layers": 8, "num_heads": 16}
    assert SIZES.keys() == DECODER_SIZES.keys()
    assert SIZES["huge"]["num_layers"] == 32
    with pytest.raises(ValueError, match=r"encoder must be one of tiny, base, .*, got 'giant'"):
        size_of("giant", None, SIZES)
    with pytest.raises(ValueError, match="unknown option 'depth' of a transformer; there are hidden_size"):
        size_of("tiny", {"depth": 3}, SIZES)


def test_the_example_of_the_encoder_holds() -> None:
    results = doctest.testmod(zoo.cmmixer.vit)
    assert results.attempted > 0
    assert results.failed == 0
