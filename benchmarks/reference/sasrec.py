"""SASRec and its training as the family of published codes does it: every row padded to the full length.

Post-norm blocks in the style of BERT, a dense score matrix, losses over all positions, one pass of the encoder for the
sequences and one for each set of views, and a ranking loop over users.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterable

# Added to the logits of hidden keys.
_HIDDEN = -10_000.0


class PlainBlock(nn.Module):
    """Multi-head self-attention and a feed-forward layer, each normalised after its residual sum."""

    def __init__(self, hidden: int, inner: int, heads: int, hidden_dropout: float, attn_dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))
        self.attention_output = nn.Linear(hidden, hidden)
        self.attention_norm = nn.LayerNorm(hidden, eps=1e-12)
        self.inner, self.outer = nn.Linear(hidden, inner), nn.Linear(inner, hidden)
        self.output_norm = nn.LayerNorm(hidden, eps=1e-12)
        self.hidden_dropout, self.attn_dropout = nn.Dropout(hidden_dropout), nn.Dropout(attn_dropout)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`(batch, length, hidden)` to the same; `mask` `(batch, 1, length, length)` is added to the logits."""
        query, key, value = self._split(self.query(x)), self._split(self.key(x)), self._split(self.value(x))
        logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + mask
        weights = self.attn_dropout(logits.softmax(-1))
        mixed = (weights @ value).transpose(1, 2).reshape(x.shape)
        x = self.attention_norm(x + self.hidden_dropout(self.attention_output(mixed)))
        out: Tensor = self.output_norm(x + self.hidden_dropout(self.outer(nn.functional.gelu(self.inner(x)))))
        return out


class PlainSASRec(nn.Module):
    """The encoder on rows of the full length, padding included."""

    def __init__(
        self,
        num_items: int,
        max_length: int = 50,
        hidden: int = 128,
        layers: int = 2,
        heads: int = 2,
        inner: int = 256,
        hidden_dropout: float = 0.5,
        attn_dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.item_embedding = nn.Embedding(num_items + 1, hidden, padding_idx=0)
        self.position_embedding = nn.Embedding(max_length, hidden)
        self.input_norm = nn.LayerNorm(hidden, eps=1e-12)
        self.input_dropout = nn.Dropout(hidden_dropout)
        self.blocks = nn.ModuleList(
            PlainBlock(hidden, inner, heads, hidden_dropout, attn_dropout) for _ in range(layers)
        )
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                nn.init.normal_(part.weight, std=0.02)
            if isinstance(part, nn.Linear):
                nn.init.zeros_(part.bias)

    def forward(self, item_ids: Tensor) -> Tensor:
        """States `(batch, max_length, hidden)` of left-padded `item_ids` `(batch, max_length)`."""
        length = item_ids.shape[1]
        visible = (item_ids != 0)[:, None, None, :] & torch.ones(length, length, dtype=torch.bool).tril()
        mask = (~visible).float() * _HIDDEN
        positions = torch.arange(length).expand_as(item_ids)
        x = self.item_embedding(item_ids) + self.position_embedding(positions)
        x = self.input_dropout(self.input_norm(x))
        for block in self.blocks:
            x = block(x, mask)
        states: Tensor = x
        return states


def bce_loss(model: PlainSASRec, states: Tensor, target_ids: Tensor, negative_ids: Tensor) -> Tensor:
    """Binary cross-entropy with one negative at every position, padded ones multiplied by 0."""
    flat = states.view(-1, states.shape[-1])
    positive = (model.item_embedding(target_ids).view_as(flat) * flat).sum(-1)
    negative = (model.item_embedding(negative_ids).view_as(flat) * flat).sum(-1)
    real = (target_ids > 0).view(-1).float()
    losses = -torch.log(positive.sigmoid() + 1e-24) - torch.log(1 - negative.sigmoid() + 1e-24)
    return (losses * real).sum() / real.sum()


def nt_xent_loss(first: Tensor, second: Tensor, temperature: float = 1.0) -> Tensor:
    """NT-Xent between flattened views."""
    views = torch.cat([first.flatten(1), second.flatten(1)])
    similarity = views @ views.T / temperature
    similarity.fill_diagonal_(-torch.inf)
    batch = len(first)
    labels = torch.cat([torch.arange(batch, 2 * batch), torch.arange(batch)])
    return nn.functional.cross_entropy(similarity, labels)


def joint_loss(model: PlainSASRec, batch: Iterable[Tensor], cl_weight: float = 0.1) -> Tensor:
    """Loss of a batch of `TrainSamples`, with or without views: one pass of the encoder for each."""
    inputs, targets, negatives, *views = batch
    loss = bce_loss(model, model(inputs), targets, negatives)
    if views:
        first, second = (model(view) for view in views)
        loss = loss + cl_weight * nt_xent_loss(first, second)
    return loss


def train_step(model: PlainSASRec, optimizer: torch.optim.Optimizer, batch: Iterable[Tensor]) -> float:
    """One step of the optimiser; the loss is read back, as the published loops do for their progress bars."""
    loss = joint_loss(model, batch)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.item()


@torch.no_grad()
def evaluate(
    model: PlainSASRec,
    batches: Iterable[tuple[Tensor, ...]],
    seen: np.ndarray | None,
    ks: tuple[int, ...] = (5, 10, 20),
) -> dict[str, float]:
    """Full ranking: a top list per user by partial sorting, then hits and gains user by user.

    Args:
        model: The encoder.
        batches: Batches of `EvalSamples`.
        seen: A scipy CSR matrix `(users, num_items + 1)` with ones at items never to recommend.
        ks: Cut-offs, ascending.
    """
    model.eval()
    lists, answers = [], []
    for users, inputs, targets in batches:
        scores = (model(inputs)[:, -1] @ model.item_embedding.weight.T).numpy().copy()
        scores[:, 0] = -np.inf
        if seen is not None:
            scores[seen[users.numpy()].toarray() > 0] = -np.inf
        longest = ks[-1]
        best = np.argpartition(scores, -longest)[:, -longest:]
        rows = np.arange(len(best))[:, None]
        order = np.argsort(scores[rows, best])[:, ::-1]
        lists.append(best[rows, order])
        answers.append(targets.numpy())
    ranked, wanted = np.concatenate(lists), np.concatenate(answers)
    values = {}
    for k in ks:
        hits, gains = 0.0, 0.0
        for user in range(len(wanted)):
            top = list(ranked[user][:k])
            if wanted[user] in top:
                hits += 1
                gains += 1 / math.log2(top.index(wanted[user]) + 2)
        values[f"hr@{k}"], values[f"ndcg@{k}"] = hits / len(wanted), gains / len(wanted)
    model.train()
    return values
