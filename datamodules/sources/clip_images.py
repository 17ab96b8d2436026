"""CLIP's transform of images for evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image
    from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of the channels in [0, 1] that CLIP's images are normalised with."""

CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation of the channels likewise."""

CLIP_SIZE = 224
"""Rows and columns that the published CLIP models take."""


def resize_and_crop(images: Sequence[Image], size: int = CLIP_SIZE) -> Tensor:
    """The geometric part of CLIP's transform for evaluation.

    The shorter side comes to `size`, bicubic, and the middle of the longer one is kept; three channels.

    Args:
        images: Pictures of any sizes and modes.
        size: Rows and columns to come to.

    Returns:
        uint8 `(images, size, size, 3)`.
    """
    from PIL import Image

    out = np.empty((len(images), size, size, 3), dtype=np.uint8)
    # Pictures differ in size, and PIL's filter is the one that CLIP was trained with.
    for place, image in enumerate(images):
        width, height = image.size
        short = min(width, height)
        # The longer side is rounded down, as in CLIP's own code.
        wide, tall = (int(size * side / short) for side in (width, height))
        resized = image.convert("RGB").resize((wide, tall), Image.Resampling.BICUBIC)
        left, top = (wide - size) // 2, (tall - size) // 2
        out[place] = np.asarray(resized.crop((left, top, left + size, top + size)))
    return torch.from_numpy(out)


def clip_transform(images: Sequence[Image] | Tensor, size: int = CLIP_SIZE) -> Tensor:
    """CLIP's transform for evaluation, without augmentation: `resize_and_crop`, then its mean and deviation.

    Args:
        images: Pictures, or uint8 `(images, height, width, 3)`.
        size: Rows and columns to come to.

    Returns:
        float32 `(images, 3, size, size)`.

    Raises:
        ValueError: If a tensor is something else.
    """
    if isinstance(images, torch.Tensor):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(
                f"images have the dtype {images.dtype} and the shape {tuple(images.shape)}: expected uint8 (images, "
                "height, width, 3)"
            )
        ready = images
        if images.shape[1:3] != (size, size):
            from PIL import Image

            ready = resize_and_crop([Image.fromarray(image) for image in images.numpy()], size)
    else:
        ready = resize_and_crop(images, size)
    mean, std = (torch.tensor(values) for values in (CLIP_MEAN, CLIP_STD))
    return ready.float().div_(255).sub_(mean).div_(std).permute(0, 3, 1, 2).contiguous()
