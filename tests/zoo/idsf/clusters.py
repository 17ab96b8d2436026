"""Two groups of users with items of their own, for the siblings' tests."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_USERS, NUM_ITEMS = 40, 40


class Pairs(NamedTuple):
    user_ids: Tensor
    item_ids: Tensor
    keys: Tensor


class Ranking(NamedTuple):
    user_ids: Tensor
    target_ids: Tensor
    seen_rows: Tensor
    seen_ids: Tensor
    candidate_ids: Tensor | None


class Loader(list[Any]):
    """Batches in order: a plain list would be taken for several loaders."""


def clusters() -> tuple[Tensor, Tensor, dict[str, Tensor], Ranking]:
    """Two groups of users, each with items of its own: training edges, held-out items, features, what to rank."""
    generator = torch.Generator().manual_seed(0)
    own = torch.stack([torch.randperm(20, generator=generator)[:9] + 20 * (user % 2) for user in range(NUM_USERS)])
    users = torch.arange(NUM_USERS)
    edges = torch.stack([users.repeat_interleave(6), own[:, :6].flatten()])
    group = F.one_hot(torch.arange(NUM_ITEMS) // 20, 2).float()
    features = {
        name: torch.cat([group, torch.zeros(NUM_ITEMS, 2)], 1) + 0.3 * torch.randn(NUM_ITEMS, 4, generator=generator)
        for name in ("image", "text")
    }
    return edges, own[:, 6:], features, Ranking(users, own[:, 6:], edges[0], edges[1], None)


def batches(edges: Tensor) -> Loader:
    """The training edges in one random order."""
    order = torch.randperm(edges.shape[1], generator=torch.Generator().manual_seed(1))
    return Loader(Pairs(edges[0, rows], edges[1, rows], rows) for rows in order.split(60))


def popularity_recall(edges: Tensor, targets: Tensor) -> float:
    """Recall@10 of the most popular items that a user does not have."""
    scores = edges[1].bincount(minlength=NUM_ITEMS).float().repeat(NUM_USERS, 1)
    scores[edges[0], edges[1]] = -torch.inf
    best = scores.topk(10).indices
    return float((targets[:, :, None] == best[:, None]).any(2).float().mean())
