"""Image tasks without a file: pairs of scikit-learn's digits, and generated scenes with exact dense labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from datamodules.sources.image_task_sets import ArrayTable, NpyLayout
from datamodules.sources.multi_mnist import Pictures, hold_out, paired, read_npz_pictures

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

DIGIT_SIZE, DIGIT_SHIFT, DIGIT_WHITE = 8, 2, 16
_HELD_OUT_DIGITS = 300
SCENE_CLASSES = ("ground", "wall", "panel", "ball", "disc")
_COLOURS = np.array([(90, 110, 70), (120, 130, 160), (180, 110, 60), (190, 70, 80), (80, 150, 170)], dtype=np.float64)
_OBJECTS = (2, 2, 3, 3, 4)  # classes of the objects that a scene may have
_NO_DEPTH = 0.05  # share of pixels without a depth


def digit_parts() -> dict[str, Pictures]:
    """scikit-learn's 1,797 digits (8 x 8, 0..16), cut by a fixed draw: 300 for validation, 300 for test, the others."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    digits = Pictures(images.reshape(-1, DIGIT_SIZE, DIGIT_SIZE).astype(np.uint8), labels.astype(np.int64))
    rest, test = hold_out(digits, _HELD_OUT_DIGITS, seed=0)
    train, validation = hold_out(rest, _HELD_OUT_DIGITS, seed=1)
    return {"train": train, "validate": validation, "test": test}


def digit_pairs(part: str, count: int | None) -> ArrayTable:
    """Two digits in opposite corners of a 12 x 12 canvas, overlaid by maximum; tasks `left` and `right`.

    Args:
        part: "train", "validate" or "test": no digit is in two of them.
        count: Number of pairs; by default one for each digit of the part.
    """
    digits = digit_parts()[part]
    seed = ("train", "validate", "test").index(part)
    return paired(digits, digits, count, seed, DIGIT_SHIFT, DIGIT_WHITE)


def read_digit_test(path: Path, count: int | None) -> ArrayTable:
    """Pairs of the digits of an `.npz` file: `x_test` uint8 `(digits, 8, 8)` in 0..16, `y_test`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is malformed.
    """
    digits = read_npz_pictures(path, "test", DIGIT_SIZE, DIGIT_WHITE)
    return paired(digits, digits, count, 2, DIGIT_SHIFT, DIGIT_WHITE)


def scene_layout(size: int) -> NpyLayout:
    """The three tasks of the scenes, and what a folder of such scenes looks like."""
    folders = {"segmentation": "label", "depth": "depth", "normals": "normals"}
    return NpyLayout(folders, len(SCENE_CLASSES), size, size)


class SceneTruth(NamedTuple):
    """What a camera sees in every scene.

    Attributes:
        classes: int8 `(scenes, size, size)`, no pixel ignored.
        depth: float64 `(scenes, size, size)`, along the optical axis, all defined.
        normals: float64 `(scenes, size, size, 3)`, unit vectors towards the camera; x right, y up, z backwards.
        things: int8 `(scenes, size, size)`, 0 for ground and wall, else the number of the object.
    """

    classes: NDArray[np.int8]
    depth: Floats
    normals: Floats
    things: NDArray[np.int8]


def scene_rays(size: int) -> Floats:
    """Directions of the pixels, `(size, size, 3)`, with -1 along z: the point at depth t is t times the direction."""
    axis = (np.arange(size) + 0.5) / size * 1.2 - 0.6
    x, y = np.meshgrid(axis, -axis)
    return np.stack([x, y, -np.ones_like(x)], axis=-1)


def _dot(first: Floats, second: Floats) -> Floats:
    # A product `(1, size, size, 3)` by `(scenes, 1, 1, 3)`.
    total: Floats = (first * second).sum(-1)
    return total


def _hit(label: int, rays: Floats, centre: Floats, facing: Floats, radius: Floats) -> tuple[Floats, Floats]:
    """Depth at which the rays meet one object of each scene (infinite where they do not), and its normals there."""
    if label == 3:
        length, towards = _dot(rays, rays), _dot(rays, centre)
        under = towards**2 - length * (_dot(centre, centre) - radius**2)
        depth = np.where(under > 0, (towards - np.sqrt(np.maximum(under, 0))) / length, np.inf)
        met = np.where(np.isfinite(depth), depth, 0.0)
        normals = (met[..., None] * rays - centre) / radius[..., None]
        return depth, normals
    depth = _dot(centre, facing) / _dot(rays, facing)
    offset = depth[..., None] * rays - centre
    if label == 4:
        inside = _dot(offset, offset) <= radius**2
    else:
        # A panel stands upright: its sides run along y and along the horizontal at right angles to its normal.
        along = np.stack([facing[..., 2], np.zeros_like(facing[..., 0]), -facing[..., 0]], axis=-1)
        inside = (np.abs(_dot(offset, along)) <= 0.8 * radius) & (np.abs(offset[..., 1]) <= radius)
    return np.where(inside & (depth > 0), depth, np.inf), np.broadcast_to(facing, offset.shape)


def scene_truth(count: int, size: int, rng: np.random.Generator) -> tuple[SceneTruth, Floats]:
    """Draw scenes and look at them.

    A camera 1 to 1.5 m above an endless level ground sees a wall across, 7 to 12 m away, and up to five objects 2 to
    5.5 m away: upright panels turned by up to 48 degrees, balls on the ground, and tilted discs in the air. Each pixel
    shows the nearest surface on its ray, by exact intersection.

    Args:
        count: Number of scenes.
        size: Rows and columns.
        rng: Where the scenes come from.

    Returns:
        What is seen, and the height of each camera, `(scenes, 1, 1)`.
    """
    rays = scene_rays(size)[None]
    shape = (count, 1, 1)
    height, wall = rng.uniform(1.0, 1.5, shape), rng.uniform(7.0, 12.0, shape)
    down = np.minimum(rays[..., 1], -1e-9)
    ground = -height / down
    on_ground = (ground < wall) & (rays[..., 1] < 0)
    depth = np.where(on_ground, ground, wall)
    normals = np.where(on_ground[..., None], np.array([0.0, 1.0, 0.0]), np.array([0.0, 0.0, 1.0]))
    classes = np.where(on_ground, 0, 1).astype(np.int8)
    things = np.zeros_like(classes)
    for number, label in enumerate(_OBJECTS, start=1):
        present = rng.random(shape) < 0.6
        away, radius = rng.uniform(2.0, 5.5, shape), rng.uniform(0.35, 0.9, shape)
        x, up = rng.uniform(-0.5, 0.5, shape) * away, rng.uniform(0.3, 0.9, shape)
        y = up * 0.5 * away - 0.2 if label == 4 else radius - height
        centre = np.stack([x, y, -away], axis=-1)
        # With these turns no ray in view meets a surface from behind, or along it.
        yaw, pitch = rng.uniform(-0.85, 0.85, shape), rng.uniform(-0.25, 0.25, shape) * (label == 4)
        facing = np.stack([np.sin(yaw) * np.cos(pitch), np.sin(pitch), np.cos(yaw) * np.cos(pitch)], axis=-1)
        found, slopes = _hit(label, rays, centre, facing, radius)
        nearer = present & (found < depth)
        depth = np.where(nearer, found, depth)
        normals = np.where(nearer[..., None], slopes, normals)
        classes = np.where(nearer, np.int8(label), classes)
        things = np.where(nearer, np.int8(number), things)
    return SceneTruth(classes, depth, normals, things), height


def _paint(truth: SceneTruth, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Pictures `(scenes, size, size, 3)`: a colour for each object near that of its class, a checked ground, light."""
    count, size = truth.classes.shape[:2]
    tints = rng.uniform(0.75, 1.25, (count, len(_OBJECTS) + 1, 3))
    scene = np.arange(count)[:, None, None]
    colour = _COLOURS[truth.classes] * tints[scene, truth.things]
    points = truth.depth[..., None] * scene_rays(size)
    checks = (np.floor(points[..., 0] / 0.5) + np.floor(points[..., 2] / 0.5)) % 2
    colour *= np.where(truth.classes == 0, 0.75 + 0.5 * checks, 1.0)[..., None]
    light = np.array([0.4, 0.8, 0.45]) / np.linalg.norm([0.4, 0.8, 0.45])
    colour *= (0.45 + 0.65 * np.maximum(truth.normals @ light, 0))[..., None]
    colour += rng.normal(0, 6, colour.shape)
    painted: NDArray[np.uint8] = np.clip(np.rint(colour), 0, 255).astype(np.uint8)
    return painted


def scenes(count: int, size: int = 32, part: str = "train", seed: int = 0) -> ArrayTable:
    """Generated scenes (see `scene_truth`) with three dense tasks.

    - `segmentation`, 5 classes (ground, wall, panel, ball, disc); a pixel whose right or lower neighbour belongs to
      another surface class or object is ignored (-1);
    - `depth` in metres; a random 5 % of the pixels are undefined (0);
    - `normals`, unit vectors towards the camera, x right, y up, z backwards.

    Args:
        count: Number of scenes.
        size: Rows and columns.
        part: "train", "validate" or "test", each with scenes of its own.
        seed: Of the generator.
    """
    rng = np.random.default_rng([seed, ("train", "validate", "test").index(part)])
    truth, _ = scene_truth(count, size, rng)
    surface = truth.things.astype(np.int16) * len(SCENE_CLASSES) + truth.classes
    border = np.zeros(surface.shape, dtype=bool)
    border[:, :, :-1] |= surface[:, :, :-1] != surface[:, :, 1:]
    border[:, :-1] |= surface[:, :-1] != surface[:, 1:]
    depth = np.where(rng.random(truth.depth.shape) < _NO_DEPTH, 0, truth.depth).astype(np.float32)
    targets = {
        "segmentation": np.where(border, np.int8(-1), truth.classes),
        "depth": depth[:, None],
        "normals": np.ascontiguousarray(truth.normals.transpose(0, 3, 1, 2), dtype=np.float32),
    }
    images = np.ascontiguousarray(_paint(truth, rng).transpose(0, 3, 1, 2))
    return ArrayTable(torch.from_numpy(images), {name: torch.from_numpy(array) for name, array in targets.items()})


def scene_tasks() -> list[dict[str, Any]]:
    """Segmentation, depth and normals."""
    return scene_layout(0).tasks()
