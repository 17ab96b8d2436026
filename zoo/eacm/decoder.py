"""The decoder: a recurrent one with attention, whose first layer and attention an emotion may shift."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.eacm.attention import EmotionAttention
from zoo.eacm.cells import BiasedGRUCell, input_parts

BLOCK = 8
"""Replies leave the decoder's steps in groups of so many: each departure has its own cost."""


class Setting(NamedTuple):
    """What stays the same in all steps of a reply.

    Attributes:
        memory: `(batch, length, hidden_size)`, the post's states.
        keys: `(batch, length, hidden_size)`, those of the attention.
        mask: bool `(batch, length)`, False on the post's padding.
        shift: `(batch, 3 * hidden_size)`, what the emotion adds to the first layer's gates; None without.
    """

    memory: Tensor
    keys: Tensor
    mask: Tensor
    shift: Tensor | None

    def rows(self, rows: Tensor) -> Setting:
        """That of chosen rows, int64 `(n,)`."""
        shift = None if self.shift is None else self.shift[rows]
        return Setting(self.memory[rows], self.keys[rows], self.mask[rows], shift)

    def first(self, count: int) -> Setting:
        """That of the first rows."""
        shift = None if self.shift is None else self.shift[:count]
        return Setting(self.memory[:count], self.keys[:count], self.mask[:count], shift)


class Decoded(NamedTuple):
    """What a decoder makes of given replies.

    Attributes:
        outputs: `(batch, reply length, 2 * hidden_size)`, last state and context at each word.
        weights: float32 `(batch, reply length, post length)`, attention at each word.
    """

    outputs: Tensor
    weights: Tensor


class EmotionDecoder(nn.Module):
    """GRU layers over `[previous word; previous context]`, with attention after each step (EACM, response generator).

    The input of the first layer is a sum of products: that of the words is one matrix product for a whole reply, that
    of the emotion one for all steps. The output layer is one product after the last step.

    Args:
        vocab_size: Number of words of replies.
        embedding_size: Size of a word vector.
        hidden_size: Size of a state.
        num_layers: Layers; the encoder has as many, and its last states are where they begin.
        emotion_size: Size of the emotion vector; 0 for a decoder without.
        cell: "ecm" or "torch" (see `BiasedGRUCell`).
        gate_bias: Whether the emotion shifts the first layer's gates.
        attention_bias: Whether it shifts the attention's query.
        dropout: On word vectors, between layers and before the output layer.
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_size: int,
        hidden_size: int,
        num_layers: int = 1,
        emotion_size: int = 0,
        cell: str = "ecm",
        gate_bias: bool = True,
        attention_bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding_size)
        nn.init.normal_(self.embedding.weight, std=embedding_size**-0.5)
        self.word_parts = input_parts(embedding_size, hidden_size)
        self.context_parts = input_parts(hidden_size, hidden_size, bias=False)
        biased = bool(emotion_size) and gate_bias
        self.emotion_parts = nn.Linear(emotion_size, 3 * hidden_size, bias=False) if biased else None
        self.layer_parts = nn.ModuleList(input_parts(hidden_size, hidden_size) for _ in range(num_layers - 1))
        self.cells = nn.ModuleList(BiasedGRUCell(hidden_size, cell) for _ in range(num_layers))
        self.attention = EmotionAttention(hidden_size, num_layers, emotion_size if attention_bias else 0)
        self.readout = nn.Linear(2 * hidden_size, hidden_size)
        self.vocabulary = nn.Linear(hidden_size, vocab_size)
        self.dropout = nn.Dropout(dropout)

    def setting(self, memory: Tensor, mask: Tensor, emotion: Tensor | None) -> Setting:
        """Prepare what all steps share.

        Args:
            memory: `(batch, length, hidden_size)`, the post's states.
            mask: bool `(batch, length)`, False on its padding.
            emotion: `(batch, emotion_size)`, the emotion vector; None without.
        """
        shift = None
        if self.emotion_parts is not None and emotion is not None:
            shift = self.emotion_parts(emotion)
        return Setting(memory, self.attention.keys(memory, emotion), mask, shift)

    def step(self, parts: Tensor, states: Tensor, context: Tensor, setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
        """One word on.

        Args:
            parts: `(batch, 3 * hidden_size)`, what the previous word and the emotion add to the first layer.
            states: `(batch, num_layers, hidden_size)`.
            context: `(batch, hidden_size)`, the previous one.
            setting: See `setting`.

        Returns:
            The new states and context, and the attention's weights, float32 `(batch, length)`.
        """
        parts = parts + self.context_parts(context)
        new: list[Tensor] = []
        for layer, cell in enumerate(self.cells):
            if layer:
                parts = self.layer_parts[layer - 1](self.dropout(new[-1]))
            new.append(cell(parts, states[:, layer]))
        states = torch.stack(new, dim=1)
        context, weights = self.attention(states, setting.memory, setting.keys, setting.mask)
        return states, context, weights

    def first(self, states: Tensor, setting: Setting) -> Tensor:
        """The context before the first word, from the first states `(batch, num_layers, hidden_size)`."""
        context: Tensor = self.attention(states, setting.memory, setting.keys, setting.mask)[0]
        return context

    def parts_of(self, tokens: Tensor, setting: Setting) -> Tensor:
        """What words and emotion add to the first layer.

        Args:
            tokens: int64 `(batch,)` or `(batch, reply length)`.
            setting: See `setting`.

        Returns:
            `(..., 3 * hidden_size)`.
        """
        parts: Tensor = self.word_parts(self.dropout(self.embedding(tokens)))
        if setting.shift is not None:
            parts = parts + (setting.shift if tokens.dim() == 1 else setting.shift[:, None])
        return parts

    def forward(self, tokens: Tensor, states: Tensor, setting: Setting, mask: Tensor | None = None) -> Decoded:
        """All steps of given replies.

        Args:
            tokens: int64 `(batch, reply length)`, each reply from GO on.
            states: `(batch, num_layers, hidden_size)`, the encoder's last.
            setting: See `setting`.
            mask: bool `(batch, reply length)`, False on padding, which is on the right. Replies that have ended take no
                part in further steps: outputs and weights are 0 on padding, or what padding makes of them. None if no
                reply has any.
        """
        parts = self.parts_of(tokens, setting)
        rows, length = tokens.shape
        counts, order = [rows] * length, None
        if mask is not None:
            lengths = mask.sum(1)
            counts = (lengths[:, None] > torch.arange(length, device=tokens.device)).sum(0).tolist()
            # The longest first: those that go on are the first rows of all tensors.
            order = lengths.argsort(descending=True, stable=True)
            parts, states, setting = parts[order], states[order], setting.rows(order)
        context = self.first(states, setting)
        outputs, weights = [], []
        for now, count in zip(parts.unbind(1), counts, strict=True):
            going = min(-(-count // BLOCK) * BLOCK, len(context))
            if going < len(context):
                states, context, setting = states[:going], context[:going], setting.first(going)
            states, context, weight = self.step(now[:going], states, context, setting)
            ended = (0, 0, 0, rows - going)
            outputs.append(F.pad(torch.cat((states[:, -1], context), dim=-1), ended))
            weights.append(F.pad(weight, ended))
        decoded = Decoded(torch.stack(outputs, 1), torch.stack(weights, 1))
        return decoded if order is None else Decoded(*(part[order.argsort()] for part in decoded))

    def logits(self, outputs: Tensor) -> Tensor:
        """Logits of words `(..., vocab_size)` from states and contexts `(..., 2 * hidden_size)`."""
        out: Tensor = self.vocabulary(self.readout(self.dropout(outputs)))
        return out
