"""MTAN on SegNet: a shared encoder-decoder that every task reads through attention masks of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adatask.backbones.outputs import MultiTaskOutput, check_outputs
from zoo.adatask.backbones.segnet import (
    DEFAULT_FILTERS,
    SegNetStates,
    SegNetTrunk,
    conv_block,
    init_convolutions,
    prediction_head,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def attention_mask(in_channels: int, out_channels: int) -> nn.Sequential:
    """Two 1x1 convolutions with batch norm; a sigmoid makes the mask."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=1),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(out_channels, out_channels, kernel_size=1),
        nn.BatchNorm2d(out_channels),
        nn.Sigmoid(),
    )


class TaskAttention(nn.Module):
    """One task's attention masks, a mask per encoder and decoder level.

    Args:
        filters: Channels by level.
    """

    def __init__(self, filters: Sequence[int]) -> None:
        super().__init__()
        below = [filters[0], *filters[:-1]]
        self.encoder = nn.ModuleList(
            attention_mask(2 * size if level else size, size) for level, size in enumerate(filters)
        )
        self.decoder = nn.ModuleList(
            attention_mask(size + less, less) for size, less in zip(filters, below, strict=True)
        )


class MTAN(nn.Module):
    """Multi-task attention network on SegNet (Liu, Johns and Davison, CVPR 2019).

    The masks and prediction heads belong to a task. The convolutions that carry a task's masked states to the next
    level are shared, and with them their batch norms, which see one pass per task.

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
        self.encoder_carry = nn.ModuleList(map(conv_block, filters, [*filters[1:], filters[-1]]))
        self.decoder_carry = nn.ModuleList(map(conv_block, filters, [filters[0], *filters[:-1]]))
        self.attention = nn.ModuleDict({name: TaskAttention(filters) for name in outputs})
        self.heads = nn.ModuleDict({name: prediction_head(filters[0], n) for name, n in outputs.items()})
        init_convolutions(self)

    def _attend(self, attention: TaskAttention, states: SegNetStates) -> Tensor:
        """What one task reads from the shared states, `(batch, filters[0], height, width)`."""
        x: Tensor | None = None
        for level, mask in enumerate(attention.encoder):
            entered = states.entered[level]
            seen = entered if x is None else torch.cat([entered, x], dim=1)
            x = F.max_pool2d(self.encoder_carry[level](mask(seen) * states.encoded[level]), 2)
        assert x is not None
        for level in reversed(range(len(attention.decoder))):
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
            seen = torch.cat([states.unpooled[level], self.decoder_carry[level](x)], dim=1)
            x = attention.decoder[level](seen) * states.decoded[level]
        return x

    def forward(self, images: Tensor) -> MultiTaskOutput:
        """Raw outputs `(batch, num_outputs, height, width)` by task; no features, as masks read every level.

        Args:
            images: float `(batch, in_channels, height, width)`, height and width multiples of `2 ** len(filters)`.

        Raises:
            ValueError: If height or width is not such a multiple.
        """
        states = self.trunk(images)
        outputs = {}
        for name, head in self.heads.items():
            attention = self.attention[name]
            assert isinstance(attention, TaskAttention)
            outputs[name] = head(self._attend(attention, states))
        return MultiTaskOutput(outputs, None)
