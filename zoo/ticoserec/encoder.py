"""Sequence encoders: SASRec (post-norm, BERT style) and GRU4Rec, both over jagged batches.

Shape legend: B rows, W places of a padded row, T real items of a batch, S places of a packed buffer, H hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.ticoserec.buckets import DEFAULT_CUTS, Bucket, plan_buckets
from zoo.ticoserec.dropout import FastDropout
from zoo.ticoserec.jagged import pad_left, unpad_left


def _visible_keys(item_ids: Tensor, pad_rows: str) -> Tensor:
    """Which key each query sees, bool `(rows, 1, width, width)`: earlier or same place, and not padding.

    A query without any such key (a padded place, or a masked item at the left end) sees itself only, so that the
    result does not depend on the width; with `pad_rows="official"` it sees every place of the row.
    """
    width = item_ids.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=item_ids.device).tril()
    visible = causal & (item_ids != 0)[:, None, :]
    blind = ~visible.any(-1, keepdim=True)
    instead = blind if pad_rows == "official" else blind & torch.eye(width, dtype=torch.bool, device=item_ids.device)
    return (visible | instead)[:, None]


class _Block(nn.Module):
    """One transformer block with the normalisation after each residual sum (spec of BERT)."""

    def __init__(self, hidden_size: int, inner_size: int, num_heads: int, hidden_dropout: float, attn_dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.attention_output = nn.Linear(hidden_size, hidden_size)
        self.attention_norm = nn.LayerNorm(hidden_size, eps=1e-12)
        self.inner = nn.Linear(hidden_size, inner_size)
        self.outer = nn.Linear(inner_size, hidden_size)
        self.output_norm = nn.LayerNorm(hidden_size, eps=1e-12)
        self.hidden_dropout = FastDropout(hidden_dropout)
        self.attn_dropout = FastDropout(attn_dropout)

    def _attend(self, qkv: Tensor, visible: Tensor) -> Tensor:
        """Multi-head attention inside one bucket: `(rows, width, 3H)` to `(rows * width, H)`."""
        rows, width, _ = qkv.shape
        query, key, value = qkv.view(rows, width, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if qkv.device.type == "cpu":
            logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
            weights = logits.float().masked_fill(~visible, -torch.inf).softmax(-1)
            mixed = self.attn_dropout(weights).to(value.dtype) @ value
        else:
            p = self.attn_dropout.p if self.training else 0.0
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, dropout_p=p)
        joined: Tensor = mixed.transpose(1, 2).reshape(rows * width, -1)
        return joined

    def forward(self, x: Tensor, buckets: list[Bucket], visible: list[Tensor]) -> Tensor:
        """`(S, H)` to `(S, H)`."""
        qkv: Tensor = self.query_key_value(x)
        parts = torch.split(qkv, [b.rows * b.width for b in buckets])
        mixed = torch.cat(
            [
                self._attend(part.view(b.rows, b.width, -1), mask)
                for part, b, mask in zip(parts, buckets, visible, strict=True)
            ]
        )
        x = self.attention_norm(self.hidden_dropout(self.attention_output(mixed), x))
        out: Tensor = self.output_norm(self.hidden_dropout(self.outer(F.gelu(self.inner(x))), x))
        return out


class SASRecEncoder(nn.Module):
    """Self-attentive sequence encoder with one item table for input, targets and scores.

    Args:
        num_items: Number of items; ids are 1..num_items, 0 is padding.
        max_length: Longest row.
        hidden_size: Width H of item vectors and states.
        num_layers: Transformer blocks.
        num_heads: Attention heads; must divide `hidden_size`.
        inner_size: Width of the feed-forward layer.
        hidden_dropout: Dropout after embedding, attention and feed-forward.
        attn_dropout: Dropout of attention weights.
        cuts: Bucket widths on a CPU (see `plan_buckets`); None always pads to `max_length`.

    Raises:
        ValueError: If `hidden_size` is not a multiple of `num_heads`, or a size is not positive.

    Example:
        >>> import torch
        >>> encoder = SASRecEncoder(num_items=9, max_length=5, hidden_size=8, inner_size=16).eval()
        >>> states = encoder(torch.tensor([[0, 0, 3], [4, 1, 2]]), torch.tensor([1, 3]))
        >>> states.shape
        torch.Size([2, 3, 8])
    """

    def __init__(
        self,
        num_items: int,
        max_length: int = 50,
        hidden_size: int = 128,
        num_layers: int = 2,
        num_heads: int = 2,
        inner_size: int = 256,
        hidden_dropout: float = 0.5,
        attn_dropout: float = 0.2,
        cuts: tuple[int, ...] | None = DEFAULT_CUTS,
    ) -> None:
        super().__init__()
        for name, value in {
            "num_items": num_items,
            "max_length": max_length,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "inner_size": inner_size,
        }.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size={hidden_size} is not a multiple of num_heads={num_heads}")
        self.max_length, self.hidden_size, self.cuts = max_length, hidden_size, cuts
        self.item_embedding = nn.Embedding(num_items + 1, hidden_size, padding_idx=0)
        self.position_embedding = nn.Embedding(max_length, hidden_size)
        self.input_norm = nn.LayerNorm(hidden_size, eps=1e-12)
        self.input_dropout = FastDropout(hidden_dropout)
        self.blocks = nn.ModuleList(
            _Block(hidden_size, inner_size, num_heads, hidden_dropout, attn_dropout) for _ in range(num_layers)
        )
        init_weights(self)

    def encode(
        self, item_ids: Tensor, lengths: Tensor, extra_ids: Tensor | None = None, pad_rows: str = "zero"
    ) -> tuple[Tensor, Tensor]:
        """States of a jagged batch, and vectors of further items from the same look-up.

        Args:
            item_ids: int64 `(T,)`, row after row, oldest first; 0 inside a row is a masked item.
            lengths: int64 `(B,)`, each at most `max_length`.
            extra_ids: int64 `(E,)`; one look-up for all ids of a step means one dense gradient of the table.
            pad_rows: "zero" computes real places only. "official" computes all `max_length` places of every row, and
                lets a place without a visible key attend to the whole row, as the published code does.

        Returns:
            States `(T, H)` ("zero") or `(B, max_length, H)` ("official"), and vectors `(E, H)` (empty without
            `extra_ids`).
        """
        full = pad_rows == "official"
        cuts = None if full or lengths.device.type != "cpu" else self.cuts
        plan = plan_buckets(lengths, self.max_length, cuts, len(item_ids))
        packed = item_ids.new_zeros(plan.size)
        packed[plan.slots] = item_ids
        ids = packed if extra_ids is None else torch.cat([packed, extra_ids])
        vectors = self.item_embedding(ids)
        x = vectors[: plan.size] + self.position_embedding(plan.positions)
        x = self.input_dropout(self.input_norm(x))
        visible = [
            _visible_keys(packed[b.start : b.start + b.rows * b.width].view(b.rows, b.width), pad_rows)
            for b in plan.buckets
        ]
        if plan.buckets:
            for block in self.blocks:
                x = block(x, plan.buckets, visible)
        states = x.view(len(lengths), self.max_length, -1) if full else x[plan.slots]
        return states, vectors[plan.size :]

    def forward(self, item_ids: Tensor, lengths: Tensor) -> Tensor:
        """States `(B, W, H)` of left-padded rows `item_ids` `(B, W)` with `lengths` `(B,)`; zeros at padding."""
        states, _ = self.encode(unpad_left(item_ids, lengths), lengths)
        return pad_left(states, lengths, item_ids.shape[1])


class GRU4RecEncoder(nn.Module):
    """Gated recurrent encoder behind the same calls as `SASRecEncoder`.

    Args:
        num_items: Number of items; ids are 1..num_items, 0 is padding.
        max_length: Longest row.
        hidden_size: Width H of item vectors and states.
        num_layers: GRU layers.
        hidden_dropout: Dropout of the item vectors.
    """

    def __init__(
        self,
        num_items: int,
        max_length: int = 50,
        hidden_size: int = 128,
        num_layers: int = 1,
        hidden_dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.max_length, self.hidden_size = max_length, hidden_size
        self.item_embedding = nn.Embedding(num_items + 1, hidden_size, padding_idx=0)
        self.input_dropout = FastDropout(hidden_dropout)
        self.gru = nn.GRU(hidden_size, hidden_size, num_layers, batch_first=True)
        self.output = nn.Linear(hidden_size, hidden_size)
        init_weights(self)

    def encode(
        self, item_ids: Tensor, lengths: Tensor, extra_ids: Tensor | None = None, pad_rows: str = "zero"
    ) -> tuple[Tensor, Tensor]:
        """As `SASRecEncoder.encode`; a recurrent encoder has no padded places, so `pad_rows` must be "zero".

        Raises:
            ValueError: If `pad_rows` is not "zero".
        """
        if pad_rows != "zero":
            raise ValueError(f'the GRU encoder has no padded places: pad_outputs must be "zero", got "{pad_rows}"')
        count = len(item_ids)
        ids = item_ids if extra_ids is None else torch.cat([item_ids, extra_ids])
        vectors = self.item_embedding(ids)
        kept = lengths > 0
        if not bool(kept.any()):
            return vectors[:count], vectors[count:]
        sizes = lengths[kept]
        real = torch.arange(int(sizes.max()), device=lengths.device) < sizes[:, None]
        padded = vectors.new_zeros(*real.shape, self.hidden_size)
        padded[real] = self.input_dropout(vectors[:count])
        packed = nn.utils.rnn.pack_padded_sequence(padded, sizes.cpu(), batch_first=True, enforce_sorted=False)
        padded, _ = nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        return self.output(padded[real]), vectors[count:]

    def forward(self, item_ids: Tensor, lengths: Tensor) -> Tensor:
        """States `(B, W, H)` of left-padded rows `item_ids` `(B, W)` with `lengths` `(B,)`; zeros at padding."""
        states, _ = self.encode(unpad_left(item_ids, lengths), lengths)
        return pad_left(states, lengths, item_ids.shape[1])


def init_weights(module: nn.Module) -> None:
    """Normal(0, 0.02) for linear and embedding weights, Xavier for those of a GRU, zero biases and padding rows."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=0.02)
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)
        if isinstance(part, nn.Embedding) and part.padding_idx is not None:
            with torch.no_grad():
                part.weight[part.padding_idx].zero_()
        if isinstance(part, nn.GRU):
            for name, weight in part.named_parameters():
                nn.init.zeros_(weight) if "bias" in name else nn.init.xavier_uniform_(weight)
