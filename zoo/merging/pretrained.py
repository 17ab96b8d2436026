"""Pre-trained image networks of transformers, from a folder or a hub id."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoo.common.pretrained import load_pretrained, transformers_library

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn


def load_image_network(name: str | Path) -> tuple[nn.Module, nn.Linear | None, int]:
    """The image network of a folder or hub id.

    Args:
        name: A checkpoint of CLIPModel, CLIPVisionModel (with or without projection), ViT, or anything that AutoModel
            loads and that takes pixel_values.

    Returns:
        The network, its own visual projection or None, and the length of the features before a projection.

    Raises:
        FileNotFoundError: As `load_pretrained`.
        ValueError: As `load_pretrained`, and for a network that does not take images alone.
    """
    library = transformers_library()
    config = load_pretrained(name, library.AutoConfig)
    with_projection = "CLIPVisionModelWithProjection" in (config.architectures or [])
    if config.model_type == "clip" or with_projection:
        loader = library.CLIPVisionModelWithProjection if with_projection else library.CLIPModel
        clip = load_pretrained(name, loader)
        return clip.vision_model, clip.visual_projection, clip.visual_projection.in_features
    # Classifiers have no pooler, and a fresh one would make the features random: the class token serves all.
    options = {"add_pooling_layer": False} if config.model_type in ("vit", "deit") else {}
    network = load_pretrained(name, library.AutoModel, **options)
    if network.main_input_name != "pixel_values":
        raise ValueError(
            f"{name} is a {type(network).__name__}, whose input is {network.main_input_name}, not pixel_values; of a "
            "model of images and text, save the image network alone with save_pretrained"
        )
    width = config.hidden_sizes[-1] if hasattr(config, "hidden_sizes") else getattr(config, "hidden_size", None)
    if width is None:
        raise ValueError(
            f"the config of {name} ({config.model_type}) has neither hidden_size nor hidden_sizes: load the network "
            "yourself and wrap it in ImageEncoder(network, width)"
        )
    return network, None, int(width)
