"""Networks in evaluation mode for a while."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn


@contextmanager
def evaluation(*networks: nn.Module) -> Iterator[None]:
    """Networks in evaluation mode inside the block; every module's own mode comes back after it."""
    parts = [part for network in networks for part in network.modules()]
    # One by one: `train()` would put the modules below into the same mode.
    modes = [(part, part.training) for part in parts]
    for part in parts:
        part.training = False
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
