"""Augmentation of whole batches of images with labels for every pixel: crop and zoom, and horizontal flip."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional as F

from datamodules.loading import keyed_uniform, mix

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

SCALES = (1.0, 1.2, 1.5)
DENSE_KINDS = ("segmentation", "depth", "normals")


class CropZoomFlip(NamedTuple):
    """What is done to each image of a batch.

    Attributes:
        choices: int64 `(batch,)`, place of the zoom in the list of scales.
        tops: int64 `(batch,)`, first row of the crop.
        lefts: int64 `(batch,)`, first column of the crop.
        flips: bool `(batch,)`, whether the crop is mirrored.
    """

    choices: Tensor
    tops: Tensor
    lefts: Tensor
    flips: Tensor


def crop_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """Rows and columns that fill the picture after a zoom by `scale`: whole numbers, rounded down."""
    return int(height / scale), int(width / scale)


def draw_crop_zoom_flip(
    key: int, indices: Tensor, height: int, width: int, scales: Sequence[float] = SCALES
) -> CropZoomFlip:
    """Draw a scale, a place for the crop and a flip (p = 0.5), all uniform, for every sample.

    Args:
        key: Key of the draw.
        indices: int64 `(batch,)`. What an image gets depends on the key and its own index alone.
        height: Rows of the images.
        width: Columns of the images.
        scales: Zooms to choose from.
    """
    uniform = [keyed_uniform(mix(key, number), indices) for number in range(4)]
    choices = (uniform[0] * len(scales)).long()
    sizes = torch.tensor([crop_size(height, width, scale) for scale in scales])
    room = torch.tensor([height, width]) + 1 - sizes[choices]
    return CropZoomFlip(choices, (uniform[1] * room[:, 0]).long(), (uniform[2] * room[:, 1]).long(), uniform[3] < 0.5)


@lru_cache(maxsize=64)
def _nearest(size: int, target: int) -> Tensor:
    """Places that nearest interpolation from `size` to `target` reads: from torch itself, to round as it does."""
    places = torch.arange(size, dtype=torch.float32)[None, None]
    return F.interpolate(places, size=target, mode="nearest")[0, 0].long()


def _crops(values: Tensor, rows: Tensor, drawn: CropZoomFlip, height: int, width: int) -> Tensor:
    """Crops of one size, each from a place of its own: `(batch, ..., h, w)` to `(rows, ..., height, width)`."""
    windows = values.unfold(-2, height, 1).unfold(-2, width, 1)
    if values.ndim == 3:
        return windows[rows, drawn.tops[rows], drawn.lefts[rows]]
    return windows[rows, :, drawn.tops[rows], drawn.lefts[rows]]


def apply_crop_zoom_flip(
    images: Tensor,
    targets: Mapping[str, Tensor],
    kinds: Mapping[str, str],
    drawn: CropZoomFlip,
    scales: Sequence[float] = SCALES,
    zoom_powers: Mapping[str, int] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Crop, zoom back to the full size and flip every image and its labels.

    Images are interpolated bilinearly (`align_corners=True`), once for each scale; labels take the nearest pixel. A
    zoom by s divides a depth by s, as what is seen at s times the size is nearer by that factor. A flip negates the
    x component of normals.

    Args:
        images: float32 `(batch, channels, height, width)`.
        targets: By task, as in `ImageTaskBatch`.
        kinds: By task, its kind. Targets of other kinds than segmentation, depth and normals are left as they are.
        drawn: What to do to which image.
        scales: Zooms that `drawn.choices` points into.
        zoom_powers: By task of kind depth, the power of s that a zoom multiplies it by; -1 by default, and 1 for a
            distance within the picture.

    Returns:
        New images and targets.
    """
    height, width = images.shape[-2:]
    new_images = torch.empty_like(images)
    dense = {name: target for name, target in targets.items() if kinds[name] in DENSE_KINDS}
    new_targets = {name: torch.empty_like(target) for name, target in dense.items()}
    for choice, scale in enumerate(scales):
        rows = (drawn.choices == choice).nonzero()[:, 0]
        if not len(rows):
            continue
        size = crop_size(height, width, scale)
        zoomed = _crops(images, rows, drawn, *size)
        if size != (height, width):
            zoomed = F.interpolate(zoomed, size=(height, width), mode="bilinear", align_corners=True)
        new_images[rows] = zoomed
        for name, target in dense.items():
            zoomed = _crops(target, rows, drawn, *size)
            if size != (height, width):
                zoomed = zoomed.index_select(-2, _nearest(size[0], height)).index_select(-1, _nearest(size[1], width))
            if kinds[name] == "depth":
                zoomed = zoomed * scale ** (zoom_powers or {}).get(name, -1)
            new_targets[name][rows] = zoomed
    flipped = drawn.flips.nonzero()[:, 0]
    new_images[flipped] = new_images[flipped].flip(-1)
    for name, target in new_targets.items():
        mirrored = target[flipped].flip(-1)
        if kinds[name] == "normals":
            mirrored[:, 0].neg_()
        target[flipped] = mirrored
    return new_images, {name: new_targets.get(name, target) for name, target in targets.items()}
