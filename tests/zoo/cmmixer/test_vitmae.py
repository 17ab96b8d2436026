"""ViT-MAE checkpoints of transformers in the encoder."""

from __future__ import annotations

import json
import logging
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from zoo.cmmixer.vit import ViTEncoder
from zoo.cmmixer.vitmae import load_vitmae, vitmae_config

if TYPE_CHECKING:
    from pathlib import Path

SIZES: dict[str, Any] = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "patch_size": 4}


def published_positions(side: int, width: int) -> Tensor:
    """Positions of a square grid, number by number: sines and cosines of the column, then those of the row."""
    rows = []
    for row in range(side):
        for column in range(side):
            angles = [[place / 10000 ** (4 * i / width) for i in range(width // 4)] for place in (column, row)]
            rows.append([wave(angle) for half in angles for wave in (math.sin, math.cos) for angle in half])
    return torch.tensor(rows)


def small_network(kind: str = "ViTMAEForPreTraining", **changes: Any) -> Any:
    import transformers

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "image_size": 16,
        "patch_size": 4,
        "layer_norm_eps": 1e-6,
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 16,
        **changes,
    }
    torch.manual_seed(0)
    network = getattr(transformers, kind)(transformers.ViTMAEConfig(**sizes)).eval()
    # Biases and norms are born as zeros and ones, which would hide that they are mixed up.
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "position" not in name and "pos_embed" not in name:
                parameter += torch.randn_like(parameter) * 0.1
        # transformers leaves zeros in a fresh network; published files hold these.
        embeddings = getattr(network, "vit", network).embeddings
        embeddings.position_embeddings[0, 1:] = published_positions(4, network.config.hidden_size)
    return network


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_network().save_pretrained(tmp_path / "mae")
    return tmp_path / "mae"


def small_encoder(image_shape: tuple[int, int, int] = (3, 16, 16), **changes: Any) -> ViTEncoder:
    torch.manual_seed(1)
    return ViTEncoder(image_shape, **{"num_frames": 1, "mlp_ratio": 3.0, **SIZES, **changes}).eval()


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@torch.no_grad()
def their_states(network: Any, images: Tensor) -> Tensor:
    """States of all patches in their places: nothing is masked, and the random order is undone."""
    network.config.mask_ratio = 0.0
    patches = network.embeddings.patch_embeddings.num_patches
    # An order that is not the given one, so that undoing it counts.
    noise = torch.rand(len(images), patches)
    output = network(images, noise=noise)
    index = output.ids_restore[..., None].expand(-1, -1, output.last_hidden_state.shape[-1])
    states: Tensor = output.last_hidden_state
    return torch.cat([states[:, :1], states[:, 1:].gather(1, index)], 1)


@pytest.mark.parametrize("kind", ["ViTMAEForPreTraining", "ViTMAEModel"])
def test_the_encoder_gives_the_states_of_the_checkpoint(tmp_path: Path, kind: str) -> None:
    network = small_network(kind)
    network.save_pretrained(tmp_path / "mae")
    encoder = small_encoder()
    load_vitmae(encoder, tmp_path / "mae")
    images = torch.randn(2, 3, 16, 16)
    expected = their_states(getattr(network, "vit", network), images)
    torch.testing.assert_close(encoder(images[:, None]), expected, atol=1e-5, rtol=0)


def test_the_epsilon_of_the_config_makes_no_difference_that_counts(tmp_path: Path) -> None:
    network = small_network("ViTMAEModel", layer_norm_eps=1e-12)
    network.save_pretrained(tmp_path / "mae")
    encoder = small_encoder()
    load_vitmae(encoder, tmp_path / "mae")
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(encoder(images[:, None]), their_states(network, images), atol=1e-4, rtol=0)
    assert encoder.norm.eps == 1e-6


def test_a_position_of_cls_is_added_to_its_token(tmp_path: Path) -> None:
    network = small_network("ViTMAEModel")
    assert not network.embeddings.position_embeddings[0, 0].any()
    with torch.no_grad():
        network.embeddings.position_embeddings[0, 0].normal_()
    network.save_pretrained(tmp_path / "mae")
    encoder = small_encoder()
    load_vitmae(encoder, tmp_path / "mae")
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(encoder(images[:, None]), their_states(network, images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", ["concat", "interleave"])
def test_clips_of_rectangular_frames_keep_their_own_positions(
    folder: Path, caplog: pytest.LogCaptureFixture, layout: str
) -> None:
    encoder = small_encoder((3, 8, 12), num_frames=4, layout=layout)
    fresh = small_encoder((3, 8, 12), num_frames=4, layout=layout)
    with caplog.at_level(logging.INFO, "zoo.cmmixer.vitmae"):
        load_vitmae(encoder, folder)
    assert "was trained on 4 x 4 patches: positions are computed anew for 2 x 12" in caplog.text
    assert torch.equal(encoder.positions, fresh.positions)
    square = small_encoder()
    load_vitmae(square, folder)
    loaded = square.state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in encoder.state_dict().items())
    assert not any(torch.equal(value, loaded[key]) for key, value in fresh.state_dict().items())
    assert encoder(torch.randn(2, 4, 3, 8, 12)).shape == (2, 25, 32)


def test_an_encoder_is_built_to_the_sizes_of_a_checkpoint(folder: Path) -> None:
    sizes = vitmae_config(folder)
    assert sizes == {**SIZES, "mlp_ratio": 3.0, "channels": 3}
    channels = sizes.pop("channels")
    load_vitmae(ViTEncoder([channels, 8, 8], num_frames=3, **sizes), str(folder))


def test_sizes_are_read_where_there_are_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    change_config(folder, patch_size=[4, 4], intermediate_size=60, hidden_size=44)
    sizes = vitmae_config(folder)
    assert sizes["patch_size"] == 4
    sizes.pop("channels")
    # 44 * (60 / 44) is a hair below 60.
    encoder = ViTEncoder([3, 8, 8], 1, **sizes)
    assert encoder.state_dict()["blocks.0.mlp.0.weight"].shape == (60, 44)
    with pytest.raises(FileNotFoundError, match=r"has no weights: put config\.json and model\.safetensors"):
        load_vitmae(encoder, folder)


def test_weights_in_half_precision_are_loaded_in_the_precision_of_the_encoder(tmp_path: Path) -> None:
    network = small_network("ViTMAEModel").bfloat16()
    network.save_pretrained(tmp_path / "mae")
    encoder = small_encoder()
    load_vitmae(encoder, tmp_path / "mae")
    assert {value.dtype for value in encoder.state_dict().values()} == {torch.float32}
    assert torch.equal(encoder.norm.bias, network.layernorm.bias.float())


@pytest.mark.parametrize(
    ("image_shape", "changes", "message"),
    [
        ((1, 16, 16), {}, "channels 3 in the checkpoint, 1 in the encoder"),
        ((3, 16, 16), {"patch_size": 8}, "patch_size 4 in the checkpoint, 8 in the encoder"),
        ((3, 16, 16), {"hidden_size": 64}, "hidden_size 32 in the checkpoint, 64 in the encoder"),
        ((3, 16, 16), {"num_layers": 3}, "num_layers 2 in the checkpoint, 3 in the encoder"),
        ((3, 16, 16), {"num_heads": 2}, "num_heads 4 in the checkpoint, 2 in the encoder"),
        ((3, 16, 16), {"mlp_ratio": 4.0}, "width of the MLPs 96 in the checkpoint, 128 in the encoder"),
    ],
    ids=["channels", "patch_size", "hidden_size", "num_layers", "num_heads", "mlp_ratio"],
)
def test_other_sizes_are_refused_with_both_numbers(
    folder: Path, image_shape: tuple[int, int, int], changes: dict[str, Any], message: str
) -> None:
    encoder = small_encoder(image_shape, **changes)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    with pytest.raises(ValueError, match=rf"mae does not fit the encoder: .*{message}.*vitmae_config"):
        load_vitmae(encoder, folder)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "vit"}, "of model_type 'vit', expected 'vit_mae'"),
        ({"qkv_bias": False}, "has qkv_bias=False; .*expected True"),
        ({"hidden_act": "relu"}, "has hidden_act='relu'; the encoder's is 'gelu'"),
        ({"layer_norm_eps": 0.1}, "has layer_norm_eps=0.1; the encoder's is 1e-06"),
        ({"patch_size": [4, 8]}, "has patches of 4 x 8; those of the encoder are square"),
    ],
    ids=["model_type", "qkv_bias", "hidden_act", "layer_norm_eps", "patch_size"],
)
def test_networks_that_the_encoder_cannot_be_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    change_config(folder, **changes)
    for read in (vitmae_config, lambda name: load_vitmae(small_encoder(), name)):
        with pytest.raises(ValueError, match=message):
            read(folder)


def test_a_folder_that_is_not_there_says_what_belongs_there(tmp_path: Path) -> None:
    encoder = small_encoder()
    with pytest.raises(FileNotFoundError, match=r"is not a folder; give a folder with config\.json"):
        load_vitmae(encoder, tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json: put config\.json"):
        load_vitmae(encoder, tmp_path / "empty")


def test_lost_positions_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = small_network("ViTMAEModel")
    with torch.no_grad():
        network.embeddings.position_embeddings[0, 5] += 1
    network.save_pretrained(tmp_path / "mae")
    load_vitmae(small_encoder(), tmp_path / "mae")
    assert [
        record.levelname for record in caplog.records if "positions of its own, up to 1 away" in record.message
    ] == ["WARNING"]


def test_fixed_positions_are_no_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_vitmae(small_encoder(), folder)
    assert "positions of its own" not in caplog.text
