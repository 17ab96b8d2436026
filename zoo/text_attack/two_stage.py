"""RecFormer's fine-tuning in two stages: the second keeps the items' vectors of the first one's best epoch."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger(__name__)


class TwoStage(nn.Module):
    """Which stage a fine-tuning is in, and its best state so far; part of the checkpoint.

    Args:
        network: What is fine-tuned.
        table: Vectors of the items.
        patience: Validations without improvement that end the first and the second stage.

    Raises:
        ValueError: If these are not two positive numbers.
    """

    stage: Tensor
    best: Tensor
    bad: Tensor
    best_table: Tensor

    def __init__(self, network: nn.Module, table: Tensor, patience: Sequence[int]) -> None:
        super().__init__()
        if len(patience) != 2 or min(patience) < 1:
            raise ValueError(f"patience must be two positive numbers, one for each stage, got {list(patience)}")
        self.patience = tuple(patience)
        self.best_network = copy.deepcopy(network).requires_grad_(False)
        self.register_buffer("best_table", table.clone())
        # As exact as the values: a rounded best would make the same value better than itself.
        self.register_buffer("best", torch.tensor(-torch.inf, dtype=torch.float64))
        self.register_buffer("stage", torch.tensor(1))
        self.register_buffer("bad", torch.tensor(0))

    @property
    def frozen(self) -> bool:
        """Whether the items' vectors stay as they are."""
        return bool(self.stage > 1)

    @property
    def over(self) -> bool:
        """Whether both stages are."""
        return bool(self.stage > 2)

    @torch.no_grad()
    def step(self, value: float, network: nn.Module, table: Tensor) -> None:
        """Take the value of a validation, and go to the next stage if it is time.

        Args:
            value: Higher is better.
            network: The network in training; at the end of a stage it gets its best weights back.
            table: The items' vectors in training; likewise.
        """
        if self.over:
            return
        if value > float(self.best):
            self.best.fill_(value)
            self.bad.zero_()
            self.best_network.load_state_dict(network.state_dict())
            self.best_table.copy_(table)
            return
        self.bad += 1
        if int(self.bad) < self.patience[int(self.stage) - 1]:
            return
        log.info("Stage %d ends after %d validations without improvement; best %.4f", int(self.stage), int(self.bad),
                 float(self.best))  # fmt: skip
        network.load_state_dict(self.best_network.state_dict())
        table.copy_(self.best_table)
        self.stage += 1
        self.bad.zero_()
