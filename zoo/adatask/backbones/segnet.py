"""SegNet: an encoder-decoder over pixels that all tasks share up to their prediction heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adatask.backbones.outputs import MultiTaskOutput, check_outputs, check_sizes, differentiable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DEFAULT_FILTERS = (64, 128, 256, 512, 512)


class SegNetStates(NamedTuple):
    """What `SegNetTrunk` computes, by level; level 0 has the images' resolution.

    Attributes:
        entered: After the first convolution of an encoder level, `(batch, filters[i], height / 2^i, width / 2^i)`.
        encoded: After all convolutions of an encoder level, same shape.
        unpooled: What a decoder level takes, same shape.
        decoded: What a decoder level gives, with `filters[max(i - 1, 0)]` channels.
    """

    entered: list[Tensor]
    encoded: list[Tensor]
    unpooled: list[Tensor]
    decoded: list[Tensor]


def conv_block(in_channels: int, out_channels: int) -> nn.Sequential:
    """3x3 convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def prediction_head(in_channels: int, num_outputs: int) -> nn.Sequential:
    """3x3 and 1x1 convolution to raw predictions, without an activation in between as in the published model."""
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, kernel_size=3, padding=1),
        nn.Conv2d(in_channels, num_outputs, kernel_size=1),
    )


def init_convolutions(module: nn.Module) -> None:
    """Xavier normal weights and zero biases for convolutions, ones and zeros for batch norms."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.xavier_normal_(part.weight)
        elif isinstance(part, nn.BatchNorm2d):
            nn.init.ones_(part.weight)
        if isinstance(part, nn.Conv2d | nn.BatchNorm2d) and part.bias is not None:
            nn.init.zeros_(part.bias)


class SegNetTrunk(nn.Module):
    """SegNet with two to three convolutions a level, pooled and unpooled by the same indices.

    Args:
        in_channels: Image channels.
        filters: Channels by level; the two levels next to the image have two convolutions, the others three.

    Raises:
        ValueError: If `filters` is empty or a size is not positive.
    """

    def __init__(self, in_channels: int, filters: Sequence[int]) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, filters=filters)
        if not filters:
            raise ValueError("filters is empty: SegNet needs at least one level")
        below = [filters[0], *filters[:-1]]
        repeats = [1 if level < 2 else 2 for level in range(len(filters))]
        self.num_levels = len(filters)
        self.encoder_first = nn.ModuleList(map(conv_block, [in_channels, *filters[:-1]], filters))
        self.decoder_first = nn.ModuleList(map(conv_block, filters, below))
        self.encoder_rest, self.decoder_rest = (
            nn.ModuleList(
                nn.Sequential(*(conv_block(size, size) for _ in range(n)))
                for size, n in zip(sizes, repeats, strict=True)
            )
            for sizes in (filters, below)
        )

    def forward(self, images: Tensor) -> SegNetStates:
        """All levels' states.

        Args:
            images: float `(batch, in_channels, height, width)`.

        Raises:
            ValueError: If height or width is not a multiple of 2 to the number of levels.
        """
        height, width = images.shape[-2:]
        step = 2**self.num_levels
        if not height or not width or height % step or width % step:
            raise ValueError(
                f"images of {height} x {width}: height and width must be multiples of {step}, for there are "
                f"{self.num_levels} levels of filters"
            )
        entered, encoded, indices, unpooled, decoded = [], [], [], [], []
        x = images
        for first, rest in zip(self.encoder_first, self.encoder_rest, strict=True):
            entered.append(first(x))
            encoded.append(rest(entered[-1]))
            x, index = F.max_pool2d(encoded[-1], 2, return_indices=True)
            indices.append(index)
        for level in reversed(range(self.num_levels)):
            unpooled.append(F.max_unpool2d(x, indices[level], (2, 2)))
            x = self.decoder_rest[level](self.decoder_first[level](unpooled[-1]))
            decoded.append(x)
        return SegNetStates(entered, encoded, unpooled[::-1], decoded[::-1])


class SegNet(nn.Module):
    """SegNet split at its end: the whole encoder-decoder is shared, a prediction head belongs to each task.

    Args:
        outputs: Output count by task name: classes for segmentation, 1 for depth, 3 for normals.
        in_channels: Image channels.
        filters: Channels by level; each level halves height and width.

    Raises:
        ValueError: If the tasks are not valid, `filters` is empty or a size is not positive.
    """

    def __init__(
        self, outputs: Mapping[str, int], in_channels: int = 3, filters: Sequence[int] = DEFAULT_FILTERS
    ) -> None:
        super().__init__()
        outputs = check_outputs(outputs)
        self.trunk = SegNetTrunk(in_channels, filters)
        self.heads = nn.ModuleDict({name: prediction_head(filters[0], n) for name, n in outputs.items()})
        init_convolutions(self)

    def forward(self, images: Tensor) -> MultiTaskOutput:
        """Raw outputs `(batch, num_outputs, height, width)` by task and the trunk's output as the feature.

        Args:
            images: float `(batch, in_channels, height, width)`, height and width multiples of `2 ** len(filters)`.

        Raises:
            ValueError: If height or width is not such a multiple.
        """
        features = self.trunk(images).decoded[0]
        return MultiTaskOutput({name: head(features) for name, head in self.heads.items()}, differentiable(features))
