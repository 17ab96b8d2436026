"""IDSF, its sampler and its evaluation as the family of published codes does them.

Features are trained, the graph is a COO matrix that each modality is sent through on its own, all items are contrasted
with all others in blocks whose exponentials stay in the graph, a batch is drawn user by user, and the evaluation ranks
a dictionary per user.
"""

from __future__ import annotations

import heapq
import math
import random
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence


class PlainAttention(nn.Module):
    """Convex mix of inputs of one shape, weighted by one small scoring network."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.score = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.Tanh(), nn.Linear(hidden_size, 1, bias=False)
        )

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Inputs `(n, hidden_size)` to one output of that shape."""
        weights = torch.cat([self.score(x) for x in inputs], dim=1).softmax(1)
        mixed = weights[:, :1] * inputs[0]
        for place in range(1, len(inputs)):
            mixed = mixed + weights[:, place : place + 1] * inputs[place]
        return mixed


class PlainOutput(NamedTuple):
    """What a pass over the whole graph gives.

    Attributes:
        users: `(num_users, hidden_size)`.
        items: `(num_items, hidden_size)`.
        projected: By modality the projected features c_m, `(num_items, hidden_size)` like the following.
        corrected: By modality the features corrected by the modality's item ids, s_m.
        content: The content of all modalities, f.
    """

    users: Tensor
    items: Tensor
    projected: dict[str, Tensor]
    corrected: dict[str, Tensor]
    content: Tensor


class PlainIDSF(nn.Module):
    """The network and its loss, on all users and items in every step.

    Args:
        num_users: U.
        num_items: I.
        features: By modality `(I, D_m)`.
        train_edges: Distinct training pairs `(2, E)`, rows user and item id.
        hidden_size: d.
        num_layers: Layers of the graph, L.
        id_weight: Weight of the ids in each layer, gamma.
        cl_weight: Weight of the contrastive loss, alpha.
        reg_weight: Weight of the squared embeddings of the batch, lambda.
        temperature: Of the contrastive loss, tau.
        readout: "sum_norm" (structure and normalised content) or "mlp_ln" (a head for each).
        trainable_features: Train the features too.
        block: Items contrasted at once.

    Raises:
        ValueError: If the readout is unknown.
    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        features: Mapping[str, Tensor],
        train_edges: Tensor,
        hidden_size: int = 128,
        num_layers: int = 2,
        id_weight: float = 0.3,
        cl_weight: float = 0.3,
        reg_weight: float = 1e-5,
        temperature: float = 0.5,
        readout: str = "sum_norm",
        trainable_features: bool = True,
        block: int = 4096,
    ) -> None:
        super().__init__()
        if readout not in ("sum_norm", "mlp_ln"):
            raise ValueError(f"readout must be 'sum_norm' or 'mlp_ln', got {readout!r}")
        self.num_users, self.num_items, self.num_layers = num_users, num_items, num_layers
        self.id_weight, self.cl_weight, self.reg_weight = id_weight, cl_weight, reg_weight
        self.temperature, self.readout, self.block = temperature, readout, block
        self.modalities = list(features)
        self.adjacency = row_normalised_graph(train_edges, num_users, num_items)
        self.user_id = new_table(num_users, hidden_size)
        self.user_preference = nn.ParameterDict({m: new_table(num_users, hidden_size) for m in features})
        self.item_id = nn.ParameterDict({m: new_table(num_items, hidden_size) for m in features})
        self.features = nn.ParameterDict(
            {m: nn.Parameter(x.clone(), requires_grad=trainable_features) for m, x in features.items()}
        )
        self.projection = nn.ModuleDict({m: nn.Linear(x.shape[1], hidden_size) for m, x in features.items()})
        self.id_attention = nn.ModuleDict({m: PlainAttention(hidden_size) for m in features})
        self.content_attention = PlainAttention(hidden_size)
        self.item_attention, self.user_attention = PlainAttention(hidden_size), PlainAttention(hidden_size)
        if readout == "mlp_ln":
            self.content_head, self.structure_head = (
                nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.ReLU(), nn.LayerNorm(hidden_size, eps=1e-6))
                for _ in range(2)
            )

    def propagate(self, modality: str, projected: Tensor) -> tuple[Tensor, Tensor]:
        """The graph of one modality: the mean of its layers for users and for items."""
        ego = F.normalize(torch.cat([self.user_preference[modality], projected]))
        ids = torch.cat([self.user_id, self.item_id[modality]])
        layers = [ego]
        for _ in range(self.num_layers):
            ego = torch.sparse.mm(self.adjacency.to(ego.dtype), ego) + self.id_weight * ids
            layers.append(ego)
        mean = torch.stack(layers, dim=1).mean(1)
        return mean[: self.num_users], mean[self.num_users :]

    def forward(self) -> PlainOutput:
        """Embeddings of all users and items, and the views to contrast."""
        projected, corrected, users, items = {}, {}, [], []
        for m in self.modalities:
            projected[m] = self.projection[m](self.features[m])
            corrected[m] = self.id_attention[m]([projected[m], self.item_id[m]])
        content = self.content_attention(list(corrected.values()))
        for m in self.modalities:
            of_users, of_items = self.propagate(m, projected[m])
            users.append(of_users)
            items.append(of_items)
        structure = self.item_attention(items)
        if self.readout == "sum_norm":
            item = structure + F.normalize(content)
        else:
            item = self.structure_head(structure) + self.content_head(content)
        return PlainOutput(self.user_attention(users), item, projected, corrected, content)

    def contrastive_loss(self, output: PlainOutput) -> Tensor:
        """L_cl: three terms for each modality, over all items."""
        total = output.content.new_zeros(())
        for m in self.modalities:
            corrected = output.corrected[m]
            total = total + all_item_nce(output.projected[m], corrected, self.temperature, self.block)
            total = total + all_item_nce(self.item_id[m], corrected, self.temperature, self.block)
            total = total + all_item_nce(corrected, output.content, self.temperature, self.block)
        return total

    def loss(self, user_ids: Tensor, positive_ids: Tensor, negative_ids: Tensor) -> Tensor:
        """BPR, the regulariser on the batch's final embeddings, and the contrastive loss; ids are `(batch,)`."""
        output: PlainOutput = self()
        users, positive, negative = output.users[user_ids], output.items[positive_ids], output.items[negative_ids]
        margin = (users * positive).sum(1) - (users * negative).sum(1)
        squares = users.square().sum() + positive.square().sum() + negative.square().sum()
        penalty = self.reg_weight * squares / (2 * len(user_ids))
        ranking = -F.logsigmoid(margin).mean()
        return ranking + penalty + self.cl_weight * self.contrastive_loss(output)


def new_table(num_rows: int, hidden_size: int) -> nn.Parameter:
    """A trained table `(num_rows, hidden_size)`."""
    return nn.Parameter(nn.init.xavier_uniform_(torch.empty(num_rows, hidden_size)))


def row_normalised_graph(train_edges: Tensor, num_users: int, num_items: int) -> Tensor:
    """The bipartite graph with self loops, each row divided by its sum, as a COO matrix over users and then items."""
    user_ids, item_ids = train_edges[0], train_edges[1] + num_users
    loops = torch.arange(num_users + num_items)
    rows, columns = torch.cat([user_ids, item_ids, loops]), torch.cat([item_ids, user_ids, loops])
    values = 1 / torch.bincount(rows)[rows].float()
    return torch.sparse_coo_tensor(
        torch.stack([rows, columns]), values, (len(loops), len(loops)), check_invariants=True
    ).coalesce()


def all_item_nce(anchors: Tensor, views: Tensor, temperature: float, block: int = 4096) -> Tensor:
    """NCE(A, B): the same row of the other view against all other rows of both, `(num_items, d)` each."""
    first, second = F.normalize(anchors), F.normalize(views)
    losses = []
    for start in range(0, len(first), block):
        rows = first[start : start + block]
        own = torch.exp(rows @ first.T / temperature)
        other = torch.exp(rows @ second.T / temperature)
        same = other.diagonal(start)
        losses.append(-torch.log(same / (other.sum(1) + own.sum(1) - own.diagonal(start))))
    return torch.cat(losses).mean()


def train_step(
    model: PlainIDSF, optimizer: torch.optim.Optimizer, user_ids: Tensor, positive_ids: Tensor, negative_ids: Tensor
) -> float:
    """One step of the optimiser; the loss is read back, as the published loops do for their log."""
    loss = model.loss(user_ids, positive_ids, negative_ids)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.item()


class PlainSampler:
    """Batches drawn one user at a time, each number as an array of one, as the published code of this family does.

    Args:
        train_edges: `(2, E)`, rows user and item id.
        num_items: I.
        seed: Of the draws.

    Raises:
        ValueError: If a user has all items, so that no negative exists.
    """

    def __init__(self, train_edges: Tensor, num_items: int, seed: int = 0) -> None:
        self.num_items, self.random, self.numbers = num_items, random.Random(seed), np.random.default_rng(seed)
        self.items: dict[int, list[int]] = {}
        for user, item in train_edges.T.tolist():
            self.items.setdefault(user, []).append(item)
        self.users = list(self.items)
        for user, owned in self.items.items():
            if len(set(owned)) == num_items:
                raise ValueError(f"no negative exists for user {user}, who has all {num_items} items")

    def sample(self, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Users, an item of each and an item that it does not have, `(batch_size,)` each.

        The users differ, unless there are fewer than `batch_size`.
        """
        if batch_size <= len(self.users):
            users = self.random.sample(self.users, batch_size)
        else:
            users = [self.random.choice(self.users) for _ in range(batch_size)]
        positive, negative = [], []
        for user in users:
            place = self.numbers.integers(low=0, high=len(self.items[user]), size=1)[0]
            positive.append(self.items[user][place])
            item = self.numbers.integers(low=0, high=self.num_items, size=1)[0]
            while item in self.items[user]:
                item = self.numbers.integers(low=0, high=self.num_items, size=1)[0]
            negative.append(item)
        return torch.tensor(users), torch.tensor(positive), torch.tensor(negative)


def ndcg_of_hits(hits: Sequence[int], k: int) -> float:
    """NDCG at `k` of a list of zeros and ones, against the same list in its best order."""

    def gain(ordered: Sequence[int]) -> float:
        return sum(hit / math.log2(place + 2) for place, hit in enumerate(ordered[:k]))

    best = gain(sorted(hits, reverse=True))
    return gain(hits) / best if best else 0.0


@torch.no_grad()
def evaluate(
    users: Tensor,
    items: Tensor,
    train_items: Mapping[int, Collection[int]],
    test_items: Mapping[int, Collection[int]],
    ks: Sequence[int] = (10, 20),
    batch_size: int = 2048,
) -> dict[str, float]:
    """Recall and NDCG by full ranking, from a dictionary and a heap for each user.

    Args:
        users: `(num_users, d)`.
        items: `(num_items, d)`.
        train_items: By user the items that are not ranked.
        test_items: By user those to find; users without any are left out.
        ks: Cut-offs; the ideal list of NDCG is made of the hits at the largest.
        batch_size: Users scored at once.

    Returns:
        Means over users, `{"recall@10": ..., "ndcg@10": ..., "recall@20": ...}`.
    """
    wanted_by = {user: set(wanted) for user, wanted in test_items.items() if wanted}
    known, totals = list(wanted_by), {f"{name}@{k}": 0.0 for k in ks for name in ("recall", "ndcg")}
    every = set(range(len(items)))
    for start in range(0, len(known), batch_size):
        batch = known[start : start + batch_size]
        for user, scores in zip(batch, (users[batch] @ items.T).tolist(), strict=True):
            candidates = {item: scores[item] for item in every - set(train_items.get(user, ()))}
            best = heapq.nlargest(max(ks), candidates, key=candidates.__getitem__)
            hits = [int(item in wanted_by[user]) for item in best]
            for k in ks:
                totals[f"recall@{k}"] += sum(hits[:k]) / len(wanted_by[user])
                totals[f"ndcg@{k}"] += ndcg_of_hits(hits, k)
    return {name: total / len(known) for name, total in totals.items()}
