"""Multi-head co-attention of a summary and a passage (DUMA), pooled over real tokens only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.summary_mrc.masked import at_least_float32, masked_mean, masked_softmax

_HEAD_WIDTH = 64  # of the published network


class DualCoAttention(nn.Module):
    """The summary attends to the passage and the passage to the summary, by the same multi-head block.

    Each side is LN(H + MultiHead(H, other, other)), then the mean over its tokens; the two means are concatenated.

    Args:
        hidden_size: Width of the states.
        num_heads: Number of heads; None for heads of width 64, or the nearest number below that divides `hidden_size`.

    Raises:
        ValueError: If `num_heads` does not divide `hidden_size`.
    """

    def __init__(self, hidden_size: int, num_heads: int | None = None) -> None:
        super().__init__()
        if num_heads is None:
            most = max(1, hidden_size // _HEAD_WIDTH)
            num_heads = max(heads for heads in range(1, most + 1) if hidden_size % heads == 0)
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(f"num_heads must divide hidden_size ({hidden_size}), got {num_heads}")
        self.out_dim, self.span_dim = 2 * hidden_size, hidden_size
        self.num_heads = num_heads
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)

    def _heads(self, projected: Tensor) -> Tensor:
        """`(rows, length, hidden_size)` to `(rows, heads, length, head width)`."""
        return projected.view(*projected.shape[:2], self.num_heads, -1).transpose(1, 2)

    def _attended(self, states: Tensor, heads: Tensor) -> Tensor:
        """LN(states + projected heads).

        Args:
            states: `(passages, options or 1, length, hidden_size)`.
            heads: `(any rows, heads, any length, head width)`, as many tokens in the same order.

        Returns:
            `(passages, options, length, hidden_size)` in float32 at least.
        """
        found = self.output(heads.transpose(1, 2).flatten(2))
        total = at_least_float32(states + found.view(len(states), -1, *states.shape[2:]))
        weight, bias = at_least_float32(self.norm.weight), at_least_float32(self.norm.bias)
        return F.layer_norm(total, self.norm.normalized_shape, weight, bias, self.norm.eps)

    def attention(self, summary: Tensor, summary_mask: Tensor, passage: Tensor, passage_mask: Tensor) -> Tensor:
        """Weights of each summary token over the passage, mean of the heads.

        Args:
            summary: `(rows, summary length, hidden_size)`.
            summary_mask: bool `(rows, summary length)`.
            passage: `(passages, passage length, hidden_size)`; rows = passages * options.
            passage_mask: bool `(passages, passage length)`.

        Returns:
            `(rows, summary length, passage length)` in float32 at least, 0 for padding of both texts.
        """
        queries = self._heads(self.query(summary.reshape(len(passage), -1, summary.shape[-1])))
        scores = queries @ self._heads(self.key(passage)).transpose(-1, -2) / queries.shape[-1] ** 0.5
        weights = masked_softmax(scores, passage_mask[:, None, None]).mean(1)
        return weights.view(*summary.shape[:2], -1).masked_fill(~summary_mask[..., None], 0)

    def forward(
        self,
        summary: Tensor,
        summary_mask: Tensor,
        passage: Tensor,
        passage_mask: Tensor,
        span: Tensor | None = None,
    ) -> Tensor:
        """One vector per summary.

        Args:
            summary: `(rows, summary length, hidden_size)`.
            summary_mask: bool `(rows, summary length)`; no row is all False.
            passage: `(passages, passage length, hidden_size)`; rows = passages * options, those of a passage together.
            passage_mask: bool `(passages, passage length)`; no row is all False.
            span: bool `(rows, summary length)`, tokens whose own state matters most: the filled option's.

        Returns:
            `(rows, 2 * hidden_size)`, the summary's side first; with `span` the mean over it follows,
            `(rows, 3 * hidden_size)`.
        """
        passages, rows = len(passage), len(summary)
        grouped = summary.reshape(passages, rows // passages, *summary.shape[1:])
        heads = F.scaled_dot_product_attention(
            self._heads(self.query(grouped.flatten(1, 2))),
            self._heads(self.key(passage)),
            self._heads(self.value(passage)),
            attn_mask=passage_mask[:, None, None],
        )
        attended = self._attended(grouped, heads).flatten(0, 1)
        vectors = [masked_mean(attended, summary_mask)]
        queries = self._heads(self.query(passage))
        heads = F.scaled_dot_product_attention(
            queries.repeat_interleave(rows // passages, 0) if rows > passages else queries,
            self._heads(self.key(summary)),
            self._heads(self.value(summary)),
            attn_mask=summary_mask[:, None, None],
        )
        vectors.append(masked_mean(self._attended(passage[:, None], heads), passage_mask[:, None]).flatten(0, 1))
        if span is not None:
            vectors.append(masked_mean(attended, span))
        return torch.cat(vectors, -1).to(summary.dtype)
