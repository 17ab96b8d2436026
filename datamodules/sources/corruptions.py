"""Corruptions of images by Hendrycks and Dietterich (arXiv 1903.12261): formulae and severities as published.

Their generators have a table of severities for each of three sizes of images: CIFAR-10-C (32 x 32), Tiny-ImageNet-C
(64 x 64) and ImageNet-C (224 x 224). Here any size is taken, with the table of the nearest of the three sizes, or with
the one that is asked for. (The corrupted splits of the public merging benchmark come from the table of CIFAR-10-C at
each set's own size, but for "pixelate", which there shrinks every image to 28 x 28 and then 32 x 32.)

What the generators leave to ImageMagick (motion blur) and OpenCV (the edges of drops of water) is done here with numpy
and scipy. The one difference is that distances from an edge are Euclidean, where OpenCV approximates them.
"""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import ndimage, special

from datamodules.loading import keyed_uniform, mix

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    Bytes = NDArray[np.uint8]  # (images, height, width, 3)
    Rows = NDArray[np.int64]  # (images,)

TABLES = {"cifar": 32, "tiny_imagenet": 64, "imagenet": 224}
"""Tables of severities, and the rows and columns of the images that each was made for."""

SEVERITIES: dict[str, dict[str, tuple[tuple[float, ...], ...]]] = {
    # Radius and standard deviation of the blur, in pixels.
    "motion_blur": {
        "cifar": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        "tiny_imagenet": ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
        "imagenet": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    },
    # Share of the values that become 0 or 255.
    "impulse_noise": {
        "cifar": ((0.01,), (0.02,), (0.03,), (0.05,), (0.07,)),
        "tiny_imagenet": ((0.01,), (0.02,), (0.05,), (0.08,), (0.14,)),
        "imagenet": ((0.03,), (0.06,), (0.09,), (0.17,), (0.27,)),
    },
    # Standard deviation; white is 1.
    "gaussian_noise": {
        "cifar": ((0.04,), (0.06,), (0.08,), (0.09,), (0.10,)),
        "tiny_imagenet": ((0.04,), (0.08,), (0.12,), (0.15,), (0.18,)),
        "imagenet": ((0.08,), (0.12,), (0.18,), (0.26,), (0.38,)),
    },
    # Share of the rows and columns that is kept.
    "pixelate": {
        "cifar": ((0.95,), (0.9,), (0.85,), (0.75,), (0.65,)),
        "tiny_imagenet": ((0.9,), (0.8,), (0.7,), (0.6,), (0.5,)),
        "imagenet": ((0.6,), (0.5,), (0.4,), (0.3,), (0.25,)),
    },
    # Mean and deviation of the noise, its blur, the threshold, the strength of water or the blur of mud, is it mud.
    "spatter": {
        "cifar": (
            (0.62, 0.1, 0.7, 0.7, 0.5, 0),
            (0.65, 0.1, 0.8, 0.7, 0.5, 0),
            (0.65, 0.3, 1, 0.69, 0.5, 0),
            (0.65, 0.1, 0.7, 0.69, 0.6, 1),
            (0.65, 0.1, 0.5, 0.68, 0.6, 1),
        ),
        "tiny_imagenet": (
            (0.62, 0.1, 0.7, 0.7, 0.6, 0),
            (0.65, 0.1, 0.8, 0.7, 0.6, 0),
            (0.65, 0.3, 1, 0.69, 0.6, 0),
            (0.65, 0.1, 0.7, 0.68, 0.6, 1),
            (0.65, 0.1, 0.5, 0.67, 0.6, 1),
        ),
        "imagenet": (
            (0.65, 0.3, 4, 0.69, 0.6, 0),
            (0.65, 0.3, 3, 0.68, 0.6, 0),
            (0.65, 0.3, 2, 0.68, 0.5, 0),
            (0.65, 0.3, 1, 0.65, 1.5, 1),
            (0.67, 0.4, 1, 0.65, 1.5, 1),
        ),
    },
    # Factor of the differences from the mean.
    "contrast": {
        "cifar": ((0.75,), (0.5,), (0.4,), (0.3,), (0.15,)),
        "tiny_imagenet": ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,)),
        "imagenet": ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,)),
    },
    # JPEG's quality.
    "jpeg_compression": {
        "cifar": ((80,), (65,), (58,), (50,), (40,)),
        "tiny_imagenet": ((65,), (58,), (50,), (40,), (25,)),
        "imagenet": ((25,), (18,), (15,), (10,), (7,)),
    },
}
"""By corruption and table, the published parameters of severities 1 to 5."""

CORRUPTIONS = tuple(SEVERITIES)
"""Names of the corruptions."""

_WATER, _MUD = (175, 238, 238), (63, 42, 20)
_MUD_LEAST = 0.8  # thinner mud is not there
_FAR = 20  # pixels from an edge of water, after which it makes no difference
_EDGE_LOW, _EDGE_HIGH = 50, 150
_TAN_22 = 13573 / 2**15  # tan(22.5 degrees), as rounded by OpenCV
_PIECE = 1 << 22  # values corrupted at a time, as floats take eight times the memory


def table_for(height: int, width: int) -> str:
    """The table that was made for the size next to this one, by the ratio of their shorter sides."""
    side = math.log(max(min(height, width), 1))
    return min(TABLES, key=lambda name: abs(math.log(TABLES[name]) - side))


def corrupt(
    images: Tensor, name: str, severity: int, key: int, rows: Tensor | None = None, table: str = "auto"
) -> Tensor:
    """Corrupted copies of images.

    What an image becomes depends on the image, the key and its row alone, not on the others of its batch. Random
    numbers are the same for all severities.

    Args:
        images: uint8 `(images, height, width, 3)`, in 0..255, on the CPU.
        name: One of `CORRUPTIONS`.
        severity: From 1 to 5.
        key: Key of the random numbers.
        rows: int64 `(images,)`, number of each image in its data set; by default 0, 1, ...
        table: One of `TABLES`, or "auto" for the one made for the size next to that of the images.

    Returns:
        uint8 `(images, height, width, 3)`.

    Raises:
        ValueError: If there is no such corruption, severity or table, or the images or rows are something else.
    """
    if name not in SEVERITIES:
        raise ValueError(f"corruption must be one of {', '.join(CORRUPTIONS)}, got {name!r}")
    if severity not in range(1, 6):
        raise ValueError(f"severity must be 1, 2, 3, 4 or 5, got {severity!r}")
    if table != "auto" and table not in TABLES:
        raise ValueError(f"table must be auto, {', '.join(TABLES)}, got {table!r}")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape[1:3]:
        raise ValueError(
            f"images to corrupt have the dtype {images.dtype} and the shape {tuple(images.shape)}: expected uint8 "
            "(images, height, width, 3); repeat a grey channel three times"
        )
    rows = torch.arange(len(images)) if rows is None else rows
    if rows.shape != images.shape[:1] or rows.dtype != torch.int64:
        raise ValueError(
            f"rows have the dtype {rows.dtype} and the shape {tuple(rows.shape)}: expected int64 ({len(images)},), one "
            "for each image"
        )
    _, height, width, _ = images.shape
    level = SEVERITIES[name][table_for(height, width) if table == "auto" else table][severity - 1]
    out = torch.empty(images.shape, dtype=torch.uint8)
    piece = max(_PIECE // (height * width * 3), 1)
    for start in range(0, len(images), piece):
        part = slice(start, start + piece)
        out[part] = torch.from_numpy(_FUNCTIONS[name](images[part].numpy(), level, key, rows[part].numpy()))
    return out


def _uniform(key: int, rows: Rows, shape: Sequence[int]) -> NDArray[np.float64]:
    """Numbers in [0, 1), `(rows, *shape)`, each a function of the key, its row and its place."""
    size = math.prod(shape)
    places = torch.from_numpy(rows)[:, None] * size + torch.arange(size)
    return keyed_uniform(mix(key), places).numpy().reshape(-1, *shape)


def _normal(key: int, rows: Rows, shape: Sequence[int]) -> NDArray[np.float64]:
    """Standard normal numbers, `(rows, *shape)`."""
    normal: NDArray[np.float64] = special.ndtri(np.maximum(_uniform(key, rows, shape), 2.0**-54))
    return normal


def _truncated(values: NDArray[Any]) -> Bytes:
    # The generators cut fractions off, they do not round.
    out: Bytes = np.clip(values, 0, 255).astype(np.uint8)
    return out


def _gaussian_noise(images: Bytes, level: tuple[float, ...], key: int, rows: Rows) -> Bytes:
    return _truncated(images + (255 * level[0]) * _normal(key, rows, images.shape[1:]))


def _impulse_noise(images: Bytes, level: tuple[float, ...], key: int, rows: Rows) -> Bytes:
    draw = _uniform(key, rows, images.shape[1:])
    # The half that the draw is in says black or white: the same at all severities.
    hit = draw * 2 % 1 < level[0]
    out: Bytes = np.where(hit, np.where(draw < 0.5, 0, 255), images).astype(np.uint8)
    return out


def _contrast(images: Bytes, level: tuple[float, ...], key: int, rows: Rows) -> Bytes:
    means = images.mean((1, 2), keepdims=True, dtype=np.float64)
    return _truncated((images - means) * level[0] + means)


def _motion_blur(images: Bytes, level: tuple[float, ...], key: int, rows: Rows) -> Bytes:
    """A mean along a half line from each pixel, weighted by half a Gaussian; its angle is in [-45, 45) degrees."""
    radius, sigma = level
    count, height, width, _ = images.shape
    angles = np.deg2rad(90 * _uniform(key, rows, ()) - 45)
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights /= weights.sum()
    right, down = (np.ceil(steps[:, None] * f(angles) - 0.5).astype(np.int64) for f in (np.cos, np.sin))
    # A pixel as one number of four bytes: a gather of those is several times faster.
    pixels = np.pad(images, ((0, 0), (0, 0), (0, 0), (0, 1))).view(np.uint32).ravel()
    blurred = np.zeros((count, height, width, 4), dtype=np.float32)
    lines = height * np.arange(count)[:, None]
    for weight, dx, dy in zip(weights, right, down, strict=True):
        ys = np.clip(np.arange(height) + dy[:, None], 0, height - 1)
        xs = np.clip(np.arange(width) + dx[:, None], 0, width - 1)
        taken = np.take(pixels, (width * (lines + ys))[:, :, None] + xs[:, None, :])
        blurred += np.float32(weight) * taken.view(np.uint8).reshape(blurred.shape)
    return np.rint(blurred[..., :3]).astype(np.uint8)


def _pixelate(images: Bytes, level: tuple[float, ...], key: int, rows: Rows) -> Bytes:
    from PIL import Image

    _, height, width, _ = images.shape
    small = (max(int(width * level[0]), 1), max(int(height * level[0]), 1))
    box = Image.Resampling.BOX
    # PIL takes one image at a time; its rounding is part of what is published.
    resized = [Image.fromarray(image).resize(small, box).resize((width, height), box) for image in images]
    return np.stack([np.asarray(image) for image in resized])


def _jpeg_compression(images: Bytes, level: tuple[float, ...], key: int, rows: Rows) -> Bytes:
    from PIL import Image

    out = np.empty_like(images)
    # A codec takes one image at a time.
    for place, image in enumerate(images):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=int(level[0]))
        out[place] = np.asarray(Image.open(file))
    return out


def _spatter(images: Bytes, level: tuple[float, ...], key: int, rows: Rows) -> Bytes:
    mean, deviation, blur, threshold, last, muddy = level
    liquid = _blurred(mean + deviation * _normal(key, rows, images.shape[1:3]), blur)
    if muddy:
        mud = _blurred((liquid > threshold).astype(np.float64), last)
        mud = np.where(mud < _MUD_LEAST, 0, mud)[..., None]
        return _truncated(images * (1 - mud) + mud * np.array(_MUD))
    water = _relief(_truncated(255 * np.where(liquid < threshold, 0, liquid)))
    return _truncated(images + last * water[..., None] * np.array(_WATER))


def _blurred(values: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
    out: NDArray[np.float64] = ndimage.gaussian_filter(values, (0, sigma, sigma), mode="nearest", truncate=4)
    return out


def _relief(layers: Bytes) -> NDArray[np.float64]:
    """How brightly drops of water shine, in 0..1 with 1 the brightest of an image: lit from the top left.

    Args:
        layers: `(images, height, width)`, thickness of the water.

    Returns:
        `(images, height, width)`; 0 where there is no water.
    """
    depth = np.minimum(_distances(_edges(layers)), _FAR)
    depth = _equalised(_mean_3x3(depth).astype(np.uint8)).astype(np.float64)
    slope = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])[None]
    lit = np.clip(ndimage.correlate(depth, slope, mode="mirror"), 0, 255)
    shine = layers * np.rint(_mean_3x3(lit))
    out: NDArray[np.float64] = shine / np.maximum(shine.max((1, 2), keepdims=True), 1)
    return out


def _mean_3x3(values: NDArray[np.float64]) -> NDArray[np.float64]:
    # A sum of three by three, divided once: exact for integers.
    for axis in (1, 2):
        values = ndimage.correlate1d(values, [1, 1, 1], axis=axis, mode="mirror")
    return values / 9


def _distances(edges: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Pixels from the nearest edge of the same image; a large number where there is none."""
    if not edges.any():
        return np.full(edges.shape, np.inf)
    # Other images of the batch are too far away to count.
    out: NDArray[np.float64] = ndimage.distance_transform_edt(~edges, sampling=(1e6, 1, 1))
    return out


def _edges(layers: Bytes) -> NDArray[np.bool_]:
    """Canny's edges, with the L1 norm of Sobel's gradient and hysteresis between two thresholds."""
    across, down = (_sobel(layers, axis) for axis in (2, 1))
    height = np.abs(across) + np.abs(down)
    padded = np.pad(height, ((0, 0), (1, 1), (1, 1)))
    rows, columns = layers.shape[1:]

    def neighbour(dy: int, dx: int) -> NDArray[np.int32]:
        return padded[:, 1 + dy : 1 + dy + rows, 1 + dx : 1 + dx + columns]

    flat = np.abs(down) < _TAN_22 * np.abs(across)
    steep = np.abs(down) > (_TAN_22 + 2) * np.abs(across)
    rising = (across ^ down) < 0
    # Of two equal neighbours along the gradient one is an edge; on a diagonal none is, as in OpenCV.
    peak = np.select(
        [flat, steep, rising],
        [
            (height > neighbour(0, -1)) & (height >= neighbour(0, 1)),
            (height > neighbour(-1, 0)) & (height >= neighbour(1, 0)),
            (height > neighbour(-1, 1)) & (height > neighbour(1, -1)),
        ],
        (height > neighbour(-1, -1)) & (height > neighbour(1, 1)),
    )
    peak &= height > _EDGE_LOW
    within = np.zeros((3, 3, 3), dtype=bool)
    within[1] = True
    lines, count = ndimage.label(peak, within)
    kept = np.zeros(count + 1, dtype=bool)
    kept[lines[peak & (height > _EDGE_HIGH)]] = True
    found: NDArray[np.bool_] = kept[lines]
    return found


def _sobel(layers: Bytes, axis: int) -> NDArray[np.int32]:
    # Not scipy's own: it also smooths over the images.
    values = ndimage.correlate1d(layers.astype(np.int32), [1, 2, 1], axis=3 - axis, mode="nearest")
    gradient: NDArray[np.int32] = ndimage.correlate1d(values, [-1, 0, 1], axis=axis, mode="nearest")
    return gradient


def _equalised(values: Bytes) -> Bytes:
    """Histogram equalisation of each image; an image of one value stays as it is."""
    count, size = len(values), math.prod(values.shape[1:])
    flat = values.reshape(count, size)
    shifted = flat + 256 * np.arange(count)[:, None]
    totals = np.bincount(shifted.ravel(), minlength=256 * count).reshape(count, 256).cumsum(1)
    lowest = np.take_along_axis(totals, flat.min(1, keepdims=True).astype(np.int64), 1)
    levels = np.rint((totals - lowest) * (255 / np.maximum(size - lowest, 1))).clip(0)
    levels = np.where(lowest == size, np.arange(256), levels)
    return np.take_along_axis(levels, flat.astype(np.int64), 1).astype(np.uint8).reshape(values.shape)


_FUNCTIONS: dict[str, Callable[[Bytes, tuple[float, ...], int, Rows], Bytes]] = {
    "motion_blur": _motion_blur,
    "impulse_noise": _impulse_noise,
    "gaussian_noise": _gaussian_noise,
    "pixelate": _pixelate,
    "spatter": _spatter,
    "contrast": _contrast,
    "jpeg_compression": _jpeg_compression,
}
