"""FREEDOM: a frozen graph of similar items, and a graph of interactions without much of its popular edges."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from zoo.common.keyed_random import keyed_uniform, mix_keys
from zoo.idsf.graph import BipartiteGraph, item_neighbors
from zoo.idsf.lightgcn import light_convolution
from zoo.idsf.losses import ranking_loss
from zoo.idsf.network import id_table
from zoo.idsf.recommender import TopNRecommender
from zoo.idsf.sparse import SparseMatrix

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_IMAGES = ("image", "poster", "visual")


def frozen_item_graph(features: Sequence[Tensor], weights: Sequence[float], num_neighbors: int) -> SparseMatrix:
    """Weighted sum of the item graphs of the modalities (the method's frozen item-item graph).

    An item graph is S with a 1 for each neighbour of an item, normalised to D^-1/2 S D^-1/2.

    Args:
        features: `(num_items, D_m)` by modality.
        weights: One of each modality, used as they are.
        num_neighbors: k, the item itself among them.
    """
    count = len(features[0])
    columns = torch.cat([item_neighbors(values, num_neighbors)[0].flatten() for values in features])
    rows = torch.arange(count, device=columns.device).repeat_interleave(num_neighbors).repeat(len(features))
    # Every row of S has k ones, so that D = k I.
    values = torch.tensor(weights, device=columns.device).repeat_interleave(count * num_neighbors) / num_neighbors
    return SparseMatrix(rows, columns, values, (count, count))


def degree_weights(edges: Tensor) -> Tensor:
    """1 / sqrt(d_u d_i) of distinct edges `(2, E)`, float64 `(E,)`, the chances of degree-sensitive pruning."""
    degrees = [ids.bincount()[ids].double() for ids in edges]
    weights: Tensor = 1 / (degrees[0] * degrees[1]).sqrt()
    return weights


def kept_edges(weights: Tensor, keys: Tensor, count: int, epoch: int) -> Tensor:
    """Edges drawn one after the other without replacement, each with a chance proportional to its weight.

    The largest of log(weight) + Gumbel noise are such a draw. The noise is a function of epoch and key, so that the
    draw is the same on every rank and in a resumed run.

    Args:
        weights: float64 `(E,)`, positive.
        keys: int64 `(E,)`, different for different edges.
        count: Edges to keep.
        epoch: Another epoch draws others.

    Returns:
        int64 `(count,)`, ascending places.
    """
    noise = -(-keyed_uniform(keys, epoch).log()).log()
    return (weights.log() + noise).topk(count).indices.sort().values


class FREEDOMNetwork(nn.Module):
    """IDs smoothed along interactions, and item IDs smoothed along the item graph besides.

    Args:
        num_users: U.
        num_items: I.
        feature_sizes: Width of each modality that takes part in the loss, in order.
        hidden_size: d.
        num_layers: Steps along interactions.
        num_item_layers: Steps along the item graph.
    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        feature_sizes: Sequence[int],
        hidden_size: int = 64,
        num_layers: int = 2,
        num_item_layers: int = 1,
    ) -> None:
        super().__init__()
        self.num_users, self.num_layers, self.num_item_layers = num_users, num_layers, num_item_layers
        self.user_id = id_table(num_users, hidden_size)
        self.item_id = id_table(num_items, hidden_size)
        self.projection = nn.ModuleList(nn.Linear(size, hidden_size) for size in feature_sizes)

    def forward(self, graph: BipartiteGraph, item_graph: SparseMatrix) -> tuple[Tensor, Tensor]:
        """Vectors of all users `(U, d)` and items `(I, d)`, float32."""
        similar: Tensor = self.item_id
        for _ in range(self.num_item_layers):
            similar = item_graph.matmul(similar)
        vectors = light_convolution(torch.cat([self.user_id, self.item_id]), graph, self.num_layers)
        return vectors[: self.num_users], vectors[self.num_users :] + similar

    def project(self, features: Sequence[Tensor], item_ids: Tensor) -> list[Tensor]:
        """Projected features of some items, `(..., d)` by modality."""
        return [layer(values[item_ids]) for layer, values in zip(self.projection, features, strict=True)]


class FREEDOM(TopNRecommender):
    """Freezing the item graph and denoising the interactions (Zhou and Shen, 2023, arXiv 2211.06924).

    In every epoch most of the interactions leave the graph, those of popular users and items rather than others;
    evaluation has them all. The features are not trained, which the published code does.

    Args:
        num_users: Number of users.
        num_items: Number of items.
        modalities: Names of the features.
        feature_sizes: Their widths.
        hidden_size: Width of the vectors.
        num_layers: Steps along the graph of interactions.
        num_item_layers: Steps along the graph of items.
        num_neighbors: Neighbours of an item in its graph, itself among them.
        modality_weights: Weight of each modality in the graph of items, in sorted order of names. By default 0.1 for
            images (image, poster or visual) beside 0.9 for text, where there are exactly these two, and equal ones
            that sum to 1 otherwise.
        dropout: Share of the interactions that leave the graph in an epoch.
        reg_weight: Weight of the ranking losses of projected features (published: searched from 0 to 1e-3); 0 leaves
            them out.
        lr: Learning rate of Adam.
        lr_decay: Its factor in `lr_decay_epochs` epochs.
        lr_decay_epochs: See above.
        num_negatives: Negative items of each interaction.
        ks: Cut-offs of the metrics.
        ndcg_variant: "standard" or "hits".
        top_k: Length of predicted lists.
        train_edges: int64 `(2, interactions)` for use without `InteractionData`.
        features: `(num_items, D_m)` by modality, likewise.

    Raises:
        ValueError: If a value is out of its range.
    """

    edges: Tensor
    edge_weights: Tensor
    draw_key: Tensor

    def __init__(
        self,
        num_users: int,
        num_items: int,
        modalities: list[str],
        feature_sizes: list[int],
        hidden_size: int = 64,
        num_layers: int = 2,
        num_item_layers: int = 1,
        num_neighbors: int = 10,
        modality_weights: list[float] | None = None,
        dropout: float = 0.8,
        reg_weight: float = 1e-5,
        lr: float = 1e-3,
        lr_decay: float = 1.0,
        lr_decay_epochs: int = 50,
        num_negatives: int = 1,
        ks: list[int] = [10, 20],  # noqa: B006 - read only, and a plain YAML value
        ndcg_variant: str = "standard",
        top_k: int = 20,
        train_edges: Tensor | None = None,
        features: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(
            num_users, num_items, modalities, feature_sizes, lr, lr_decay, lr_decay_epochs, num_negatives, ks,
            ndcg_variant, top_k, train_edges, features,
        )  # fmt: skip
        if not modalities:
            raise ValueError("FREEDOM needs a modality at least; for interactions alone use LightGCN")
        if reg_weight < 0 or hidden_size < 1 or num_layers < 0 or num_item_layers < 0:
            raise ValueError(
                "reg_weight, num_layers and num_item_layers must be at least 0 and hidden_size 1, got "
                f"{reg_weight}, {num_layers}, {num_item_layers} and {hidden_size}"
            )
        if not 2 <= num_neighbors <= num_items:
            raise ValueError(f"num_neighbors must be between 2 and num_items={num_items}, got {num_neighbors}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.save_hyperparameters(ignore=["train_edges", "features"])
        self.modality_weights = _weights(self.modalities, modality_weights)
        self.num_neighbors, self.dropout, self.reg_weight = num_neighbors, dropout, reg_weight
        sizes = list(self.feature_sizes.values()) if reg_weight > 0 else []
        self.network = FREEDOMNetwork(num_users, num_items, sizes, hidden_size, num_layers, num_item_layers)
        # Key of the pruning: from the seed at construction, and the same again in a resumed run.
        self.register_buffer("draw_key", torch.randint(2**62, ()))
        self.graph: BipartiteGraph | None = None
        self.item_graph: SparseMatrix | None = None
        self.pruned: BipartiteGraph | None = None
        self._pruned_epoch = -1

    def prepare(self, edges: Tensor) -> None:
        """Build the graph of all interactions and that of items."""
        edges = torch.unique(edges, dim=1)
        self.graph = BipartiteGraph(edges, self.num_users, self.num_items)
        self.item_graph = frozen_item_graph(self.feature_list(), self.modality_weights, self.num_neighbors)
        self.register_buffer("edges", edges, persistent=False)
        self.register_buffer("edge_weights", degree_weights(edges), persistent=False)

    def encode(self) -> tuple[Tensor, Tensor]:
        """Vectors of all users and items, from all interactions."""
        users, items = self.network(self.graph, self.item_graph)
        return users, items

    @torch.no_grad()
    def pruned_graph(self) -> BipartiteGraph:
        """The graph of what is left of the interactions in this epoch, normalised anew."""
        assert self.graph is not None
        if self.dropout == 0:
            return self.graph
        # By a look at the epoch and in no hook: a run resumed in mid-epoch skips the hooks of its start.
        if self.pruned is None or self._pruned_epoch != self.current_epoch:
            count = max(1, round(self.edges.shape[1] * (1 - self.dropout)))
            keys = mix_keys(int(self.draw_key), self.edges[0] * self.num_items + self.edges[1])
            kept = kept_edges(self.edge_weights, keys, count, self.current_epoch)
            self.pruned = BipartiteGraph(self.edges[:, kept], self.num_users, self.num_items).to(self.device)
            self._pruned_epoch = self.current_epoch
        return self.pruned

    def loss_parts(self, user_ids: Tensor, item_ids: Tensor, negative_ids: Tensor) -> dict[str, Tensor]:
        """BPR of the vectors, and of users with projected features: `bpr` and `modalities`."""
        all_users, all_items = self.network(self.pruned_graph(), self.item_graph)
        users = all_users[user_ids]
        parts = {"bpr": ranking_loss(users, all_items[item_ids], all_items[negative_ids])}
        if self.reg_weight > 0:
            positives = self.network.project(self.feature_list(), item_ids)
            negatives = self.network.project(self.feature_list(), negative_ids)
            losses = [ranking_loss(users, *pair) for pair in zip(positives, negatives, strict=True)]
            parts["modalities"] = self.reg_weight * torch.stack(losses).sum()
        return parts


def _weights(modalities: Sequence[str], given: Sequence[float] | None) -> list[float]:
    """Weight of each modality, in order."""
    if given is not None:
        if len(given) != len(modalities) or not all(math.isfinite(w) and w >= 0 for w in given) or not sum(given) > 0:
            raise ValueError(
                f"modality_weights must be {len(modalities)} weights of {', '.join(modalities)}, none negative and not "
                f"all 0, got {list(given)}"
            )
        return [float(weight) for weight in given]
    if len(modalities) == 2 and modalities[0] in _IMAGES and modalities[1] == "text":
        return [0.1, 0.9]
    if len(modalities) == 2 and modalities[0] == "text" and modalities[1] in _IMAGES:
        return [0.9, 0.1]
    return [1 / len(modalities)] * len(modalities)
