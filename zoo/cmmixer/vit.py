"""A vision transformer for wide images: the encoder that pre-training leaves to everything else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.cmmixer.positions import grid_positions
from zoo.cmmixer.wide import check_grid, cut_clips

if TYPE_CHECKING:
    from collections.abc import Sequence

_EPS = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention with biases, by scaled-dot-product attention.

    Args:
        hidden_size: Width.
        num_heads: Heads; they share the width.

    Raises:
        ValueError: If the heads cannot share it.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(f"{num_heads} heads cannot share a hidden_size of {hidden_size}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        """From and to `(batch, tokens, hidden_size)`."""
        batch, tokens, width = states.shape
        qkv = self.qkv(states).view(batch, tokens, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        projected: Tensor = self.proj(attended.transpose(1, 2).reshape(batch, tokens, width))
        return projected


class Block(nn.Module):
    """A pre-norm transformer block: attention, then an MLP with GELU.

    Args:
        hidden_size: Width.
        num_heads: Attention heads.
        mlp_ratio: Width of the MLP over that of the block.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        inner = round(hidden_size * mlp_ratio)
        self.norm1 = nn.LayerNorm(hidden_size, eps=_EPS)
        self.attention = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=_EPS)
        self.mlp = nn.Sequential(nn.Linear(hidden_size, inner), nn.GELU(), nn.Linear(inner, hidden_size))

    def forward(self, states: Tensor) -> Tensor:
        """From and to `(batch, tokens, hidden_size)`."""
        states = states + self.attention(self.norm1(states))
        return states + self.mlp(self.norm2(states))  # type: ignore[no-any-return]


def initialise(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for linear maps, the initialisation of masked autoencoders."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


class ViTEncoder(nn.Module):
    """Vision transformer over the patches of wide images, with fixed positions on their true grid.

    Args:
        image_shape: Channels, height and width of a frame.
        num_frames: Frames T of a clip.
        patch_size: Side of a patch in pixels.
        hidden_size: Width D, a multiple of 4 and of `num_heads`.
        num_layers: Blocks.
        num_heads: Attention heads.
        mlp_ratio: Width of the MLPs over D.
        layout: How frames lie in the wide image, "concat" or "interleave" (see `to_wide`).

    Raises:
        ValueError: If patches do not tile the images, or the sizes do not fit each other.

    Example:
        >>> import torch
        >>> encoder = ViTEncoder([1, 16, 16], num_frames=2, patch_size=8, hidden_size=32, num_layers=1, num_heads=4)
        >>> encoder(torch.randn(3, 2, 1, 16, 16)).shape  # one token more than the 8 patches: CLS comes first
        torch.Size([3, 9, 32])
    """

    positions: Tensor

    def __init__(
        self,
        image_shape: Sequence[int],
        num_frames: int = 4,
        patch_size: int = 16,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        layout: str = "concat",
    ) -> None:
        super().__init__()
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise ValueError(f"image_shape must be channels, height and width, got {image_shape}")
        if num_layers < 1 or not mlp_ratio > 0:
            raise ValueError(f"num_layers and mlp_ratio must be positive, got {num_layers} and {mlp_ratio}")
        channels, height, width = image_shape
        rows, columns = check_grid(height, width, num_frames, patch_size, layout)
        self.config: dict[str, Any] = {
            "image_shape": [int(size) for size in image_shape],
            "num_frames": num_frames,
            "patch_size": patch_size,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "layout": layout,
        }
        self.grid, self.patch_size, self.layout, self.hidden_size = (rows, columns), patch_size, layout, hidden_size
        self.num_patches = rows * columns
        self.patch_embedding = nn.Linear(patch_size * patch_size * channels, hidden_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        # The position of CLS is zero.
        self.register_buffer("positions", grid_positions(rows, columns, hidden_size), persistent=False)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size, eps=_EPS)
        initialise(self)
        nn.init.normal_(self.cls_token, std=0.02)

    def check(self, clips: Tensor) -> None:
        """Refuse clips of another shape, or of whole numbers.

        Raises:
            ValueError: With both shapes, or with the dtype.
        """
        if not clips.is_floating_point():
            raise ValueError(f"clips are {clips.dtype}: normalise first, to floating numbers of mean 0 and variance 1")
        expected = (self.config["num_frames"], *self.config["image_shape"])
        if clips.shape[1:] != expected:
            raise ValueError(
                f"the encoder is for clips (batch, {', '.join(map(str, expected))}): frames, channels, height, width; "
                f"got {tuple(clips.shape)}"
            )

    def patches(self, clips: Tensor) -> Tensor:
        """Patches `(batch, patches, patch_size ** 2 * channels)` of clips `(batch, T, channels, height, width)`.

        Raises:
            ValueError: If the clips have another shape than the encoder is for.
        """
        self.check(clips)
        return cut_clips(clips, self.patch_size, self.layout)

    def embed(self, patches: Tensor, index: Tensor | None = None) -> Tensor:
        """Embedded patches with their positions.

        Args:
            patches: `(batch, n, patch_size ** 2 * channels)`.
            index: int64 `(batch, n)`, places of these patches in the grid; all of them in order by default.

        Returns:
            `(batch, n, D)`.
        """
        positions = self.positions if index is None else self.positions[index]
        embedded: Tensor = self.patch_embedding(patches) + positions
        return embedded

    def encode(self, tokens: Tensor) -> Tensor:
        """States `(batch, 1 + n, D)` of embedded patches `(batch, n, D)`: that of CLS first, after the last norm."""
        states = torch.cat([self.cls_token.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], 1)
        for block in self.blocks:
            states = block(states)
        normed: Tensor = self.norm(states)
        return normed

    def forward(self, clips: Tensor) -> Tensor:
        """States `(batch, 1 + patches, D)` of clips `(batch, T, channels, height, width)`, nothing hidden."""
        return self.encode(self.embed(self.patches(clips)))


def pooled(states: Tensor, pool: str) -> Tensor:
    """One vector of each image.

    Args:
        states: `(batch, 1 + n, D)`, CLS first.
        pool: "cls", or "mean" over the patches.

    Returns:
        `(batch, D)`.

    Raises:
        ValueError: If `pool` is neither.
    """
    if pool == "cls":
        return states[:, 0]
    if pool == "mean":
        return states[:, 1:].mean(1)
    raise ValueError(f"pool must be cls or mean, got {pool!r}")


SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "num_layers": 3, "num_heads": 4},
    "base": {"hidden_size": 768, "num_layers": 12, "num_heads": 12},
    "deep_base": {"hidden_size": 768, "num_layers": 24, "num_heads": 16},
    "large": {"hidden_size": 1024, "num_layers": 24, "num_heads": 16},
    "huge": {"hidden_size": 1280, "num_layers": 32, "num_heads": 16},
}
"""Encoders of the published code by name: its factories, the default of its class ("deep_base"), and a small one."""

DECODER_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 48, "num_layers": 1, "num_heads": 4},
    "base": {"hidden_size": 256, "num_layers": 4, "num_heads": 16},
    "deep_base": {"hidden_size": 512, "num_layers": 8, "num_heads": 16},
    "large": {"hidden_size": 512, "num_layers": 4, "num_heads": 16},
    "huge": {"hidden_size": 512, "num_layers": 4, "num_heads": 16},
}
"""The decoder of each."""


def size_of(name: str, options: dict[str, Any] | None, sizes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The arguments that a name and further options give.

    Args:
        name: One of the names of `sizes`.
        options: `hidden_size`, `num_layers`, `num_heads`, `mlp_ratio` that replace the name's.
        sizes: Arguments by name.

    Raises:
        ValueError: If the name or an option is unknown.
    """
    if name not in sizes:
        part = "decoder" if sizes is DECODER_SIZES else "encoder"
        raise ValueError(f"{part} must be one of {', '.join(sizes)}, got {name!r}")
    known = ("hidden_size", "num_layers", "num_heads", "mlp_ratio")
    for key in options or {}:
        if key not in known:
            raise ValueError(f"unknown option {key!r} of a transformer; there are {', '.join(known)}")
    return {**sizes[name], **(options or {})}
