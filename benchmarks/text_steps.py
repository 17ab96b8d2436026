"""Passes and training steps of text encoders on random words, for benchmarks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from benchmarks.runner import Timing, timed
from datamodules.cloze_rows import ClozeRows
from datamodules.cloze_tokenizer import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn


class Size(NamedTuple):
    """An encoder's size; heads are 32 wide, and the inner layers 4 times as wide as the outer ones."""

    layers: int
    width: int

    def __str__(self) -> str:
        """Layers by width."""
        return f"{self.layers} x {self.width}"

    def options(self, dropout: float = 0.1) -> dict[str, Any]:
        """Options of the encoder "tiny"."""
        return {
            "hidden_size": self.width,
            "num_layers": self.layers,
            "num_heads": self.width // 32,
            "intermediate_size": 4 * self.width,
            "max_length": 512,
            "dropout": dropout,
        }


def side(function: Callable[[], object], scale: float = 1.0) -> Callable[[], Timing]:
    """A side of a case that is one call, its time scaled."""
    once = timed(function)
    return lambda: once() * scale


def forward(model: nn.Module, scores: Callable[[Any], Tensor], batch: Any) -> Callable[[], None]:
    """A pass over a batch in eval mode, without gradients."""

    def run() -> None:
        model.eval()
        with torch.no_grad():
            scores(batch)

    return run


def training_steps(model: nn.Module, loss: Callable[[Any], Tensor], batches: Sequence[Any]) -> Callable[[], None]:
    """For each batch loss, backward pass and AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def run() -> None:
        model.train()
        for batch in batches:
            optimizer.zero_grad()
            torch.autograd.backward(loss(batch))
            optimizer.step()

    return run


class RandomWords:
    """Texts of random words, each a token.

    Args:
        vocab_size: Of the tokenizer.
    """

    def __init__(self, vocab_size: int) -> None:
        self.generator = np.random.default_rng(0)
        self.words = [f"w{number}" for number in range(vocab_size - 5)]  # beside 5 special tokens
        self.tokenizer = load_tokenizer("words", lambda: [" ".join(self.words)], vocab_size)

    def text(self, tokens: int) -> str:
        """So many words."""
        return " ".join(self.generator.choice(self.words, tokens))

    def questions(self, count: int, passage: int, summary: int, options: int = 5) -> ClozeRows:
        """Questions with the slot in the middle.

        Args:
            count: Questions.
            passage: Tokens of each passage.
            summary: Tokens of a question with an option in its slot.
            options: Options of each question, one token each.
        """
        before = summary // 2
        return ClozeRows(
            "random words",
            [self.text(passage) for _ in range(count)],
            [f"{self.text(before)} @placeholder {self.text(summary - 1 - before)}" for _ in range(count)],
            [[self.text(1) for _ in range(options)] for _ in range(count)],
            self.generator.integers(0, options, count),
            [str(row) for row in range(count)],
            [f"row {row}" for row in range(count)],
        )
