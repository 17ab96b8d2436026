"""Image classifiers for learners and for the services that they learn from.

The paper's text beyond its abstract could not be read; which networks it uses is a documented reconstruction.
"""

from __future__ import annotations

import inspect
import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

_SMALLEST = 8


class Classifier(nn.Module):
    """A feature map and one linear head over all classes.

    Several tasks share the head: a task is read through the columns of its classes.

    Args:
        backbone: Images `(N, c, h, w)` to features `(N, d)`.
        dim: d.
        num_classes: Rows of the head, K.
    """

    def __init__(self, backbone: nn.Module, dim: int, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(dim, num_classes)
        self.dim = dim

    def features(self, images: Tensor) -> Tensor:
        """Features `(N, d)` of images `(N, c, h, w)` in [-1, 1]."""
        features: Tensor = self.backbone(images)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(N, K)` of images `(N, c, h, w)` in [-1, 1]."""
        logits: Tensor = self.head(self.features(images))
        return logits


class _Residual(nn.Module):
    """Two 3x3 convolutions and a shortcut; with `pre_activation` as in wide residual networks."""

    def __init__(self, channels: int, out: int, stride: int, pre_activation: bool) -> None:
        super().__init__()
        self.pre_activation = pre_activation
        self.conv1, self.conv2 = _conv3(channels, out, stride), _conv3(out, out)
        self.norm1 = nn.BatchNorm2d(channels if pre_activation else out)
        self.norm2 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module | None = None
        if channels != out or stride != 1:
            projection = nn.Conv2d(channels, out, 1, stride, bias=False)
            self.shortcut = projection if pre_activation else nn.Sequential(projection, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        if self.pre_activation:
            active = F.relu(self.norm1(x))
            kept: Tensor = x if self.shortcut is None else self.shortcut(active)
            change: Tensor = self.conv2(F.relu(self.norm2(self.conv1(active))))
            return kept + change
        kept = x if self.shortcut is None else self.shortcut(x)
        change = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(kept + change)


def build_classifier(name: str, image_shape: Sequence[int], num_classes: int, **options: Any) -> Classifier:
    """Build a classifier by name, for images from 8x8 to 84x84 and more.

    Args:
        name: One of `ARCHITECTURES`. "lenet" has BatchNorm, "resnet18" a 3x3 stem without pooling, "vgg11" pools only
            while the image is large enough, "wrn" is WRN-16-2, "logistic" has the pixels as its features.
        image_shape: `(c, h, w)`.
        num_classes: K.
        **options: `width` (channels of the first stage; lenet, resnet18, vgg11, wrn), `dim` (features; lenet),
            `hidden` and `layers` (mlp), `depth` and `widen` (wrn).

    Raises:
        ValueError: If the name or an option is unknown, or a size is out of range.
    """
    if name not in _BACKBONES:
        raise ValueError(f"arch must be one of {', '.join(ARCHITECTURES)}, got {name!r}")
    if len(image_shape) != 3:
        raise ValueError(f"image_shape must be (channels, height, width), got {tuple(image_shape)}")
    channels, height, width = (int(size) for size in image_shape)
    if channels < 1 or min(height, width) < _SMALLEST:
        raise ValueError(f"image_shape is {(channels, height, width)}: at least 1 channel and 8x8 pixels are needed")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    build = _BACKBONES[name]
    known = list(inspect.signature(build).parameters)[1:]
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}; it takes: {', '.join(known) or 'none'}")
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"option {option!r} of {name} must be a whole number of at least 1, got {value!r}")
    backbone, dim = build((channels, height, width), **options)
    return Classifier(backbone, dim, num_classes)


@torch.no_grad()
def reset_head_rows(head: nn.Linear, rows: Sequence[int], generator: torch.Generator | None = None) -> None:
    """Draw rows of a linear head anew, as `nn.Linear` draws them; the other rows keep every bit.

    Args:
        head: Head with K rows, changed in place.
        rows: Indices of the rows, such as the classes of a new task.
        generator: Source of the numbers; they are drawn on its device, so that all devices get the same ones.

    Raises:
        ValueError: If a row does not exist.
    """
    index = [int(row) for row in rows]
    for row in index:
        if not 0 <= row < head.out_features:
            raise ValueError(f"the head has the rows 0 to {head.out_features - 1}, got {row}")
    bound = 1 / math.sqrt(head.in_features)
    device = generator.device if generator is not None else torch.device("cpu")
    parameters = [head.weight] if head.bias is None else [head.weight, head.bias]
    for parameter in parameters:
        drawn = torch.empty(len(index), *parameter.shape[1:], device=device).uniform_(
            -bound, bound, generator=generator
        )
        parameter[index] = drawn.to(parameter)


def _conv3(channels: int, out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)


def _pooled(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _lenet(shape: tuple[int, int, int], width: int = 16, dim: int = 84) -> tuple[nn.Module, int]:
    grid = (shape[1] // 4, shape[2] // 4)
    layers: list[nn.Module] = []
    for channels, out in ((shape[0], width), (width, 2 * width)):
        convolution = nn.Conv2d(channels, out, 5, padding=2, bias=False)
        layers += [convolution, nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)]
    if max(grid) > 8:
        # Images over 32 px: the first linear layer would dwarf the rest. Fixed windows have a deterministic gradient.
        window = -(-grid[0] // 8), -(-grid[1] // 8)
        layers.append(nn.AvgPool2d(window))
        grid = grid[0] // window[0], grid[1] // window[1]
    layers += [nn.Flatten(), nn.Linear(2 * width * grid[0] * grid[1], 120), nn.ReLU(), nn.Linear(120, dim), nn.ReLU()]
    return nn.Sequential(*layers), dim


def _mlp(shape: tuple[int, int, int], hidden: int = 256, layers: int = 2) -> tuple[nn.Module, int]:
    sizes = [math.prod(shape), *[hidden] * layers]
    modules: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(sizes):
        modules += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*modules), hidden


def _logistic(shape: tuple[int, int, int]) -> tuple[nn.Module, int]:
    return nn.Flatten(), math.prod(shape)


def _resnet18(shape: tuple[int, int, int], width: int = 64) -> tuple[nn.Module, int]:
    layers: list[nn.Module] = [_conv3(shape[0], width), nn.BatchNorm2d(width), nn.ReLU()]
    channels = width
    for stage in range(4):
        out = width * 2**stage
        for block in range(2):
            layers.append(_Residual(channels, out, 2 if stage and not block else 1, pre_activation=False))
            channels = out
    return _pooled(*layers), channels


def _wrn(shape: tuple[int, int, int], depth: int = 16, widen: int = 2, width: int = 16) -> tuple[nn.Module, int]:
    blocks, rest = divmod(depth - 4, 6)
    if rest or blocks < 1:
        raise ValueError(f"option 'depth' of wrn must be 6 n + 4, such as 10, 16 or 28, got {depth}")
    layers: list[nn.Module] = [_conv3(shape[0], width)]
    channels = width
    for stage in range(3):
        out = width * widen * 2**stage
        for block in range(blocks):
            layers.append(_Residual(channels, out, 2 if stage and not block else 1, pre_activation=True))
            channels = out
    return _pooled(*layers, nn.BatchNorm2d(channels), nn.ReLU()), channels


def _vgg11(shape: tuple[int, int, int], width: int = 64) -> tuple[nn.Module, int]:
    layers: list[nn.Module] = []
    channels, side = shape[0], min(shape[1:])
    for multiple, convolutions in ((1, 1), (2, 1), (4, 2), (8, 2), (8, 2)):
        for _ in range(convolutions):
            layers += [_conv3(channels, width * multiple), nn.BatchNorm2d(width * multiple), nn.ReLU()]
            channels = width * multiple
        if side >= 4:
            layers.append(nn.MaxPool2d(2))
            side //= 2
    return _pooled(*layers), channels


_BACKBONES: dict[str, Any] = {
    "lenet": _lenet,
    "mlp": _mlp,
    "resnet18": _resnet18,
    "vgg11": _vgg11,
    "wrn": _wrn,
    "logistic": _logistic,
}
ARCHITECTURES = tuple(_BACKBONES)
