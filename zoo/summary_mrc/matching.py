"""Matchers of a filled sentence ("summary") with its passage, behind one call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.summary_mrc.comatch import CoMatch
from zoo.summary_mrc.duma import DualCoAttention
from zoo.summary_mrc.masked import masked_mean, require_kept

KINDS = ("comatch", "duma", "cls", "mean")


class FirstState(nn.Module):
    """tanh(W h + b) of the first token's state: the usual multiple-choice head, without matching."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)

    def forward(self, first: Tensor) -> Tensor:
        """`(rows, hidden_size)` to the same."""
        out: Tensor = self.dense(first).tanh()
        return out


class SummaryMatcher(nn.Module):
    """One vector for each summary, from the states of its tokens and of its passage's.

    Args:
        kind: "comatch" (two-way bilinear matching with a gate, our design), "duma" (two-way multi-head attention),
            "cls" (the first token's state) or "mean" (mean of the summary's states); the last two do not look at the
            passage.
        hidden_size: Width of the states.
        match_dim: Width of the result of "comatch"; None for `hidden_size`.
        num_heads: Number of heads of "duma"; None for heads of width 64.

    Attributes:
        out_dim: Width of the result.
        span_dim: What `span` adds to it.
        uses_passage: Whether the passage is looked at.

    Raises:
        ValueError: If `kind` is unknown, a size is not positive, or a size is given for a kind that has none.
    """

    def __init__(self, kind: str, hidden_size: int, match_dim: int | None = None, num_heads: int | None = None) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"matcher must be one of {', '.join(KINDS)}, got {kind!r}")
        for name, size, owner in (("match_dim", match_dim, "comatch"), ("num_heads", num_heads, "duma")):
            if size is not None and kind != owner:
                raise ValueError(f"{name} is for matcher {owner!r} only, leave it out for {kind!r}")
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.kind = kind
        self.hidden_size = hidden_size
        self.out_dim = hidden_size
        self.span_dim = 0
        self.uses_passage = kind in ("comatch", "duma")
        self.two_way: CoMatch | DualCoAttention | None = None
        self.first_state: FirstState | None = None
        if kind == "comatch":
            self.two_way = CoMatch(hidden_size, match_dim)
        elif kind == "duma":
            self.two_way = DualCoAttention(hidden_size, num_heads)
        elif kind == "cls":
            self.first_state = FirstState(hidden_size)
        if self.two_way is not None:
            self.out_dim = self.two_way.out_dim
            self.span_dim = self.two_way.span_dim

    def forward(
        self,
        summary: Tensor,
        summary_mask: Tensor,
        passage: Tensor | None = None,
        passage_mask: Tensor | None = None,
        *,
        first: Tensor | None = None,
        span: Tensor | None = None,
    ) -> Tensor:
        """Vectors to score.

        Args:
            summary: `(rows, summary length, hidden_size)`; what stands at masked places, if finite, has no effect.
            summary_mask: bool `(rows, summary length)`.
            passage: `(passages, passage length, hidden_size)`. Rows of one passage are consecutive and each has as
                many: one passage per row, or one for the options of a question. Only where `uses_passage`.
            passage_mask: bool `(passages, passage length)`.
            first: `(rows, hidden_size)`, the first token's states. Needed by "cls" only.
            span: bool `(rows, summary length)`, the filled option's tokens: what they found in the passage is told
                apart. Only where `uses_passage`.

        Returns:
            `(rows, out_dim)`; with `span`, `(rows, out_dim + span_dim)`.

        Raises:
            ValueError: If something needed is missing, shapes do not fit, or a mask keeps nothing in some row.
        """
        if self.first_state is not None:
            if first is None:
                raise ValueError("matcher 'cls' needs first=, the states of the first tokens")
            state: Tensor = self.first_state(first)
            return state
        if self.two_way is not None:
            passage, passage_mask = self._checked(summary, summary_mask, passage, passage_mask)
            matched: Tensor = self.two_way(summary, summary_mask, passage, passage_mask, span)
            return matched
        self._check_states("summary", summary, summary_mask)
        require_kept(summary_mask=summary_mask)
        return masked_mean(summary, summary_mask).to(summary.dtype)

    def attention(self, summary: Tensor, summary_mask: Tensor, passage: Tensor, passage_mask: Tensor) -> Tensor:
        """What each summary token looks at in the passage, for pictures.

        Args:
            summary: As in `forward`.
            summary_mask: As in `forward`.
            passage: As in `forward`.
            passage_mask: As in `forward`.

        Returns:
            `(rows, summary length, passage length)`; rows of tokens sum to 1, places of padding are 0.

        Raises:
            ValueError: As `forward`, and if the kind does not look at the passage.
        """
        if self.two_way is None:
            raise ValueError(f"matcher {self.kind!r} does not look at the passage, so it has no attention to show")
        passage, passage_mask = self._checked(summary, summary_mask, passage, passage_mask)
        return self.two_way.attention(summary, summary_mask, passage, passage_mask)

    def _checked(
        self, summary: Tensor, summary_mask: Tensor, passage: Tensor | None, passage_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The passage and its mask, if all four fit together."""
        if passage is None or passage_mask is None:
            raise ValueError(f"matcher {self.kind!r} needs a passage; 'cls' and 'mean' do without")
        self._check_states("summary", summary, summary_mask)
        self._check_states("passage", passage, passage_mask)
        if not len(passage) or len(summary) % len(passage):
            raise ValueError(f"the rows of summary must be a multiple of passage's {len(passage)}, got {len(summary)}")
        require_kept(summary_mask=summary_mask, passage_mask=passage_mask)
        return passage, passage_mask

    def _check_states(self, name: str, states: Tensor, mask: Tensor) -> None:
        if states.ndim != 3 or states.shape[-1] != self.hidden_size:
            raise ValueError(f"{name} must have shape (rows, length, {self.hidden_size}), got {tuple(states.shape)}")
        if mask.shape != states.shape[:2] or mask.dtype != torch.bool:
            raise ValueError(
                f"{name}_mask must be bool of shape {tuple(states.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}"
            )
