"""LeNet with one head per task, for small images such as MultiMNIST."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from zoo.adatask.backbones.outputs import MultiTaskOutput, check_outputs, check_sizes, differentiable

if TYPE_CHECKING:
    from collections.abc import Mapping


class LeNet(nn.Module):
    """Two convolutions and a linear layer, shared; a linear head per task (as for MultiMNIST, Sener and Koltun, 2018).

    The second pooling is adaptive, so that images of any size give the same parameters.

    Args:
        outputs: Output count by task name.
        in_channels: Image channels.
        width: Channels of the first convolution; the second has twice as many.
        hidden_size: Width of the shared linear layer.
        pooled_size: Height and width after the second pooling; images need at least twice as much.

    Raises:
        ValueError: If the tasks are not valid or a size is not positive.
    """

    def __init__(
        self,
        outputs: Mapping[str, int],
        in_channels: int = 1,
        width: int = 10,
        hidden_size: int = 50,
        pooled_size: int = 4,
    ) -> None:
        super().__init__()
        outputs = check_outputs(outputs)
        check_sizes(in_channels=in_channels, width=width, hidden_size=hidden_size, pooled_size=pooled_size)
        self.smallest = 2 * pooled_size
        self.trunk = nn.Sequential(
            nn.Conv2d(in_channels, width, kernel_size=5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, kernel_size=5, padding=2),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(pooled_size),
            nn.Flatten(),
            nn.Linear(2 * width * pooled_size**2, hidden_size),
            nn.ReLU(),
        )
        self.heads = nn.ModuleDict({name: nn.Linear(hidden_size, n) for name, n in outputs.items()})

    def forward(self, images: Tensor) -> MultiTaskOutput:
        """Outputs `(batch, num_outputs)` by task and the trunk's output as the feature.

        Args:
            images: float `(batch, in_channels, height, width)`.

        Raises:
            ValueError: If the images are too small.
        """
        height, width = images.shape[-2:]
        if min(height, width) < self.smallest:
            raise ValueError(
                f"images of {height} x {width} are too small: LeNet needs at least {self.smallest} x {self.smallest}"
            )
        hidden = self.trunk(images)
        return MultiTaskOutput({name: head(hidden) for name, head in self.heads.items()}, differentiable(hidden))
