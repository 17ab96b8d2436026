"""Published weights for the encoder: ViT-MAE checkpoints of transformers."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from zoo.cmmixer.positions import grid_positions
from zoo.common.pretrained import load_pretrained, transformers_library

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from zoo.cmmixer.vit import ViTEncoder

_LOGGER = logging.getLogger(__name__)
_LARGEST_EPS = 1e-5
_SAME_POSITIONS = 1e-2


def vitmae_config(name: str | Path) -> dict[str, Any]:
    """The sizes of a ViT-MAE checkpoint, to build an encoder that its weights fit.

    Args:
        name: A folder of `save_pretrained`, of which only config.json is read, or a hub id.

    Returns:
        `hidden_size`, `num_layers`, `num_heads`, `mlp_ratio` and `patch_size`, arguments of `ViTEncoder`, and
        `channels`, the first number of its `image_shape`.

    Raises:
        FileNotFoundError: If the folder has no config.json, or the hub cannot be reached and its cache has nothing.
        ValueError: If it is no ViT-MAE, or one that `ViTEncoder` cannot be.
    """
    return _sizes(_read_config(name))


def load_vitmae(encoder: ViTEncoder, name: str | Path) -> None:
    """Copy the encoder of a ViT-MAE checkpoint.

    Everything but the positions is copied: they are fixed, and those of `encoder` are the ones of its own grid. The
    small number in the root of layer normalisation stays 1e-6, with which the published weights were trained, whatever
    the checkpoint's config says (1e-12 by default).

    Args:
        encoder: The encoder to fill; any image size, number of frames and layout.
        name: A folder of `save_pretrained`, of `ViTMAEModel` or `ViTMAEForPreTraining`, or a hub id.

    Raises:
        FileNotFoundError: If the folder lacks files, or the hub cannot be reached and its cache has nothing.
        ValueError: If the checkpoint is no ViT-MAE, has other sizes than the encoder, or is damaged.
    """
    config = _read_config(name)
    theirs, ours = _sizes(config), {**encoder.config, "channels": encoder.config["image_shape"][0]}
    inner = round(ours["hidden_size"] * ours["mlp_ratio"])
    pairs = [(key, value, ours[key]) for key, value in theirs.items() if key != "mlp_ratio"]
    pairs.append(("width of the MLPs", config.intermediate_size, inner))
    different = [
        f"{key} {theirs} in the checkpoint, {ours} in the encoder" for key, theirs, ours in pairs if theirs != ours
    ]
    if different:
        raise ValueError(
            f"{name} does not fit the encoder: {'; '.join(different)}. vitmae_config({str(name)!r}) tells the sizes "
            "of an encoder that it fits"
        )
    network = load_pretrained(name, transformers_library().ViTMAEModel)
    encoder.load_state_dict(_weights(network))
    _compare_positions(encoder, network.embeddings, name)


def _read_config(name: str | Path) -> Any:
    """The config of a ViT-MAE whose layers are those of `ViTEncoder`."""
    config = load_pretrained(name, transformers_library().AutoConfig, weights=False)
    if config.model_type != "vit_mae":
        raise ValueError(f"{name} is a checkpoint of model_type {config.model_type!r}, expected 'vit_mae'")
    if not config.qkv_bias:
        raise ValueError(f"{name} has qkv_bias={config.qkv_bias}; the encoder has these biases: expected True")
    if config.hidden_act != "gelu":
        raise ValueError(f"{name} has hidden_act={config.hidden_act!r}; the encoder's is 'gelu'")
    if config.layer_norm_eps > _LARGEST_EPS:
        raise ValueError(f"{name} has layer_norm_eps={config.layer_norm_eps}; the encoder's is 1e-06")
    return config


def _sizes(config: Any) -> dict[str, Any]:
    height, width = _pair(config.patch_size)
    if height != width:
        raise ValueError(f"the checkpoint has patches of {height} x {width}; those of the encoder are square")
    return {
        "hidden_size": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "patch_size": height,
        "channels": config.num_channels,
    }


def _pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _weights(network: nn.Module) -> dict[str, Tensor]:
    """The weights of a loaded network under the names of `ViTEncoder`."""
    # The names are those in memory: files of older releases have others, which transformers translates.
    theirs = network.state_dict()
    projection = "embeddings.patch_embeddings.projection"
    ours = {
        # A constant added to CLS is part of it; the published checkpoints have zeros there.
        "cls_token": theirs["embeddings.cls_token"] + theirs["embeddings.position_embeddings"][:, :1],
        "patch_embedding.weight": theirs[f"{projection}.weight"].permute(0, 2, 3, 1).flatten(1),
        "patch_embedding.bias": theirs[f"{projection}.bias"],
    }
    names = {
        "norm1": "layernorm_before",
        "attention.proj": "attention.o_proj",
        "norm2": "layernorm_after",
        "mlp.0": "mlp.fc1",
        "mlp.2": "mlp.fc2",
    }
    for kind in ("weight", "bias"):
        ours[f"norm.{kind}"] = theirs[f"layernorm.{kind}"]
        for layer in range(network.config.num_hidden_layers):  # type: ignore[union-attr, arg-type]
            qkv = [theirs[f"layers.{layer}.attention.{part}_proj.{kind}"] for part in "qkv"]
            ours[f"blocks.{layer}.attention.qkv.{kind}"] = torch.cat(qkv)
            for our_name, their_name in names.items():
                ours[f"blocks.{layer}.{our_name}.{kind}"] = theirs[f"layers.{layer}.{their_name}.{kind}"]
    return ours


def _compare_positions(encoder: ViTEncoder, embeddings: Any, name: str | Path) -> None:
    """Say what becomes of the checkpoint's positions."""
    height, width = _pair(embeddings.image_size)
    rows, columns = height // encoder.patch_size, width // encoder.patch_size
    positions = embeddings.position_embeddings[0, 1:].detach()
    difference = (positions - grid_positions(rows, columns, encoder.hidden_size)).abs().max().item()
    if difference > _SAME_POSITIONS:
        _LOGGER.warning(
            "%s has positions of its own, up to %.3g away from sines and cosines: they are left out, and its weights "
            "may need further training",
            name,
            difference,
        )
    if (rows, columns) != encoder.grid:
        _LOGGER.info(
            "%s was trained on %d x %d patches: positions are computed anew for %d x %d",
            name,
            rows,
            columns,
            *encoder.grid,
        )
