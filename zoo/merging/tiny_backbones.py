"""Small image backbones with fresh weights: CLIP's image tower, a ViT and a residual MLP. No network is needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.common.pretrained import transformers_library


class ResidualMLP(nn.Module):
    """A residual pre-LN MLP on pixels: linear stem, blocks x + W_2 GELU(W_1 LN(x)), LN, linear output.

    Args:
        image_size: Height and width of the images.
        hidden_size: Width of the stem and of the residual stream; blocks are twice as wide inside.
        num_layers: Number of blocks.
        num_channels: Channels of the images; with 1, images of several channels are averaged to grey.
        output_size: Length of the features.
    """

    def __init__(
        self,
        image_size: int = 32,
        hidden_size: int = 128,
        num_layers: int = 4,
        num_channels: int = 1,
        output_size: int = 64,
    ) -> None:
        super().__init__()
        self.config = {
            "image_size": image_size,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "num_channels": num_channels,
            "output_size": output_size,
        }
        self.stem = nn.Linear(num_channels * image_size**2, hidden_size)
        self.blocks = nn.ModuleList(_ResidualBlock(hidden_size) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size)
        self.output = nn.Linear(hidden_size, output_size)

    def forward(self, images: Tensor) -> Tensor:
        """Features `(B, output_size)` of images `(B, C, H, W)`.

        Raises:
            ValueError: If the images have another size.
        """
        channels, size = self.config["num_channels"], self.config["image_size"]
        pixels = images.mean(1, keepdim=True) if channels == 1 else images
        if pixels.shape[1:] != (channels, size, size):
            raise ValueError(
                f"this encoder takes images of shape {(channels, size, size)}, got {tuple(images.shape[1:])}: resize "
                "the images, or build the encoder with their image_size and num_channels"
            )
        hidden = self.stem(pixels.flatten(1))
        for block in self.blocks:
            hidden = block(hidden)
        features: Tensor = self.output(self.norm(hidden))
        return features


class _ResidualBlock(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.up = nn.Linear(hidden_size, 2 * hidden_size)
        self.down = nn.Linear(2 * hidden_size, hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = hidden + self.down(F.gelu(self.up(self.norm(hidden))))
        return output


def tiny_clip(
    image_size: int = 32,
    patch_size: int = 8,
    hidden_size: int = 128,
    num_layers: int = 4,
    num_heads: int = 4,
    num_channels: int = 3,
) -> nn.Module:
    """CLIP's image tower; its features are the class token after the last LayerNorm, `(B, hidden_size)`."""
    library = transformers_library()
    config = library.CLIPVisionConfig(
        **_sizes(image_size, patch_size, hidden_size, num_layers, num_heads, num_channels), projection_dim=hidden_size
    )
    return _fresh(library.CLIPVisionModel, config)


def tiny_vit(
    image_size: int = 32,
    patch_size: int = 8,
    hidden_size: int = 128,
    num_layers: int = 4,
    num_heads: int = 4,
    num_channels: int = 3,
) -> nn.Module:
    """A ViT without a pooler; its features are the class token after the last LayerNorm, `(B, hidden_size)`."""
    library = transformers_library()
    config = library.ViTConfig(**_sizes(image_size, patch_size, hidden_size, num_layers, num_heads, num_channels))
    return _fresh(library.ViTModel, config, add_pooling_layer=False)


def _sizes(
    image_size: int, patch_size: int, hidden_size: int, num_layers: int, num_heads: int, num_channels: int
) -> dict[str, int]:
    for whole, part in (("image_size", "patch_size"), ("hidden_size", "num_heads")):
        values = {
            "image_size": image_size,
            "patch_size": patch_size,
            "hidden_size": hidden_size,
            "num_heads": num_heads,
        }
        if values[whole] % values[part]:
            raise ValueError(f"{whole} ({values[whole]}) must be a multiple of {part} ({values[part]})")
    return {
        "image_size": image_size,
        "patch_size": patch_size,
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_channels": num_channels,
    }


def _fresh(network: Any, config: Any, **options: bool) -> nn.Module:
    built: nn.Module = network._from_config(config, attn_implementation="sdpa", dtype=torch.float32, **options)
    return built
