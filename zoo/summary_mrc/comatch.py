"""Two-way bilinear matching of a summary and a passage, with a gate between the two views."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.summary_mrc.masked import at_least_float32, masked_max, masked_mean, masked_softmax


class _Comparison(nn.Module):
    """max over tokens of ReLU(LN(W [h; m; h - m; h * m] + b)), h a token's state and m what it attended to.

    W is one matrix of four blocks. Its product is (W1 + W3) h + (W2 - W3) m + W4 (h * m), so that the first term can be
    shared and the second taken from projected states.
    """

    def __init__(self, hidden_size: int, match_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(4 * hidden_size, match_dim)
        self.norm = nn.LayerNorm(match_dim)

    def blocks(self) -> tuple[Tensor, Tensor, Tensor]:
        """Matrices `(match_dim, hidden_size)` of h, of m and of h * m."""
        of_state, of_other, of_difference, of_product = self.linear.weight.chunk(4, 1)
        return of_state + of_difference, of_other - of_difference, of_product

    def normed(self, compared: Tensor) -> Tensor:
        """LN of `(..., length, match_dim)`, in float32 at least."""
        weight, bias = at_least_float32(self.norm.weight), at_least_float32(self.norm.bias)
        return F.layer_norm(at_least_float32(compared), self.norm.normalized_shape, weight, bias, self.norm.eps)

    def pooled(self, compared: Tensor, mask: Tensor) -> Tensor:
        """`(..., length, match_dim)` and bool `(..., length)` to `(..., match_dim)`, in float32 at least."""
        # ReLU is monotone: after the maximum it touches one vector in place of all tokens.
        return masked_max(self.normed(compared), mask).relu()


class CoMatch(nn.Module):
    """Each text attends to the other, is compared with what it found, and is pooled; a gate mixes the two (our design).

    With H^s of the summary's tokens and H^p of the passage's:
    A = H^s W_a H^pT / sqrt(d), M^s = softmax_p(A) H^p, M^p = softmax_s(A^T) H^s,
    U = ReLU(LN(W [H; M; H - M; H * M] + b)) with weights for each side, u = max over tokens of U,
    g = sigmoid(W_g [u^s; u^p] + b_g), v = g * u^s + (1 - g) * u^p.

    W_a starts as the identity, so that equal tokens attend to each other from the first step.

    Args:
        hidden_size: Width d of the states.
        match_dim: Width of the result; None for `hidden_size`.
    """

    def __init__(self, hidden_size: int, match_dim: int | None = None) -> None:
        super().__init__()
        self.out_dim = self.span_dim = match_dim or hidden_size
        self.align = nn.Linear(hidden_size, hidden_size, bias=False)
        nn.init.eye_(self.align.weight)
        self.compare_summary = _Comparison(hidden_size, self.out_dim)
        self.compare_passage = _Comparison(hidden_size, self.out_dim)
        self.gate = nn.Linear(2 * self.out_dim, self.out_dim)

    def _alignment(self, summary: Tensor, passage: Tensor) -> Tensor:
        """A `(passages, options, summary length, passage length)`; no passage is copied per option."""
        passages, length = passage.shape[:2]
        queries = self.align(summary / math.sqrt(summary.shape[-1]))
        scores: Tensor = queries.reshape(passages, -1, passage.shape[-1]) @ passage.transpose(1, 2)
        return scores.view(passages, -1, summary.shape[1], length)

    def attention(self, summary: Tensor, summary_mask: Tensor, passage: Tensor, passage_mask: Tensor) -> Tensor:
        """Weights of each summary token over the passage, softmax_p(A).

        Args:
            summary: `(rows, summary length, hidden_size)`.
            summary_mask: bool `(rows, summary length)`.
            passage: `(passages, passage length, hidden_size)`; rows = passages * options.
            passage_mask: bool `(passages, passage length)`.

        Returns:
            `(rows, summary length, passage length)` in float32 at least, 0 for padding of both texts.
        """
        weights = masked_softmax(self._alignment(summary, passage), passage_mask[:, None, None])
        return weights.flatten(0, 1).masked_fill(~summary_mask[..., None], 0)

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
            span: bool `(rows, summary length)`, tokens whose own comparison matters most: the filled option's.

        Returns:
            `(rows, out_dim)`; with `span` the mean of U^s over it follows, `(rows, 2 * out_dim)`.
        """
        scores = self._alignment(summary, passage)
        grouped = summary.reshape(*scores.shape[:3], summary.shape[-1])
        kept = summary_mask.reshape(scores.shape[:3])
        over_passage = masked_softmax(scores, passage_mask[:, None, None]).to(passage.dtype)
        over_summary = masked_softmax(scores, kept[..., None], dim=-2).to(summary.dtype)

        of_state, of_other, of_product = self.compare_summary.blocks()
        found = (over_passage.flatten(1, 2) @ passage).view_as(grouped)
        compared = F.linear(grouped, of_state, self.compare_summary.linear.bias)
        compared = compared + F.linear(found, of_other) + F.linear(grouped * found, of_product)
        compared = self.compare_summary.normed(compared)
        from_summary = masked_max(compared, kept).relu().to(summary.dtype)
        at_span = None if span is None else masked_mean(compared.flatten(0, 1).relu(), span).to(summary.dtype)

        # A passage has far more tokens than a summary: its own term is computed once for all options, and the term of
        # what it found is a weighted sum of the few summary tokens, projected before.
        of_state, of_other, of_product = self.compare_passage.blocks()
        carried = torch.cat([grouped, F.linear(grouped, of_other)], -1)
        carried = over_summary.transpose(-1, -2) @ carried
        found, projected = torch.split_with_sizes(carried, [summary.shape[-1], self.out_dim], -1)
        compared = F.linear(passage, of_state, self.compare_passage.linear.bias)[:, None] + projected
        compared = compared + F.linear(passage[:, None] * found, of_product)
        from_passage = self.compare_passage.pooled(compared, passage_mask[:, None]).to(summary.dtype)

        gate = self.gate(torch.cat([from_summary, from_passage], -1)).sigmoid()
        mixed: Tensor = gate * from_summary + (1 - gate) * from_passage
        mixed = mixed.flatten(0, 1)
        return mixed if at_span is None else torch.cat([mixed, at_span], -1)
