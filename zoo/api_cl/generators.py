"""Generators of synthetic images, read before their tanh.

The paper's text beyond its abstract could not be read; this is a documented reconstruction, with the networks that
data-free model extraction commonly uses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence


class DFGenerator(nn.Module):
    """Upsampling generator of data-free distillation, for images up to about 64 px.

    A last BatchNorm without weights keeps the pre-activation of a training batch at mean 0 and variance 1, the active
    range of tanh; behind the tanh it would push pixels out of [-1, 1], which services refuse.

    Args:
        latent_dim: Length of a latent vector, nz.
        image_shape: `(c, h, w)`; h and w multiples of 4.
        base_channels: Channels of the last stage, ngf.

    Raises:
        ValueError: If h or w is not a multiple of 4, or a size is below 1.
    """

    def __init__(self, latent_dim: int, image_shape: Sequence[int], base_channels: int = 64) -> None:
        super().__init__()
        channels, height, width = _checked(latent_dim, image_shape, base_channels, 4, "dcgan needs multiples of 16")
        self.latent_dim = latent_dim
        self.image_shape = (channels, height, width)
        wide = 2 * base_channels
        self.project = nn.Linear(latent_dim, wide * (height // 4) * (width // 4), bias=False)
        self.unflatten = nn.Unflatten(1, (wide, height // 4, width // 4))
        self.stages = nn.Sequential(
            nn.BatchNorm2d(wide),
            nn.Upsample(scale_factor=2, mode="nearest"),
            nn.Conv2d(wide, wide, 3, padding=1, bias=False),
            nn.BatchNorm2d(wide),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2, mode="nearest"),
            nn.Conv2d(wide, base_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(base_channels),
            nn.LeakyReLU(0.2),
            nn.Conv2d(base_channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels, affine=False),
        )

    def forward(self, z: Tensor) -> Tensor:
        """Pre-activations `(B, c, h, w)` of latent vectors `(B, nz)`; the images are their tanh."""
        x_pre: Tensor = self.stages(self.unflatten(self.project(z)))
        return x_pre


class DCGANGenerator(nn.Module):
    """Generator of four transposed convolutions, for images of 64 px and more.

    Args:
        latent_dim: Length of a latent vector, nz.
        image_shape: `(c, h, w)`; h and w multiples of 16.
        base_channels: Channels of the last stage, ngf.

    Raises:
        ValueError: If h or w is not a multiple of 16, or a size is below 1.
    """

    def __init__(self, latent_dim: int, image_shape: Sequence[int], base_channels: int = 64) -> None:
        super().__init__()
        channels, height, width = _checked(latent_dim, image_shape, base_channels, 16, "df needs multiples of 4")
        self.latent_dim = latent_dim
        self.image_shape = (channels, height, width)
        wide = 8 * base_channels
        self.project = nn.Linear(latent_dim, wide * (height // 16) * (width // 16), bias=False)
        self.unflatten = nn.Unflatten(1, (wide, height // 16, width // 16))
        layers: list[nn.Module] = [nn.BatchNorm2d(wide), nn.ReLU()]
        for _ in range(3):
            layers += [nn.ConvTranspose2d(wide, wide // 2, 4, 2, 1, bias=False), nn.BatchNorm2d(wide // 2), nn.ReLU()]
            wide //= 2
        layers += [nn.ConvTranspose2d(wide, channels, 4, 2, 1, bias=False), nn.BatchNorm2d(channels, affine=False)]
        self.stages = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        """Pre-activations `(B, c, h, w)` of latent vectors `(B, nz)`; the images are their tanh."""
        x_pre: Tensor = self.stages(self.unflatten(self.project(z)))
        return x_pre


GENERATORS: dict[str, type[DFGenerator] | type[DCGANGenerator]] = {"df": DFGenerator, "dcgan": DCGANGenerator}


def _checked(
    latent_dim: int, image_shape: Sequence[int], base_channels: int, multiple: int, other: str
) -> tuple[int, int, int]:
    if len(image_shape) != 3:
        raise ValueError(f"image_shape must be (channels, height, width), got {tuple(image_shape)}")
    channels, height, width = (int(size) for size in image_shape)
    for name, value in (("latent_dim", latent_dim), ("base_channels", base_channels), ("channels", channels)):
        if value < 1:
            raise ValueError(f"{name} of a generator must be at least 1, got {value}")
    if min(height, width) < 1 or height % multiple or width % multiple:
        raise ValueError(
            f"this generator draws images whose height and width are multiples of {multiple}, got {height}x{width}; "
            f"set image_size to such a size ({other})"
        )
    return channels, height, width
