"""LATTICE: a graph of items that is learnt from their features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.idsf.graph import NORMS, BipartiteGraph, item_neighbors
from zoo.idsf.lightgcn import light_convolution
from zoo.idsf.losses import batch_penalty, ranking_loss
from zoo.idsf.network import id_table
from zoo.idsf.recommender import TopNRecommender
from zoo.idsf.sparse import SparseMatrix

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from zoo.idsf.types import InteractionBatch


class ItemGraph(NamedTuple):
    """A graph with a fixed number of neighbours of each item; one that is named twice counts with the sum.

    Attributes:
        ids: int64 `(num_items, neighbours)`.
        values: float32 of the same shape.
    """

    ids: Tensor
    values: Tensor

    def smooth(self, items: Tensor) -> Tensor:
        """Sum over the neighbours of vectors `(num_items, d)`, with a gradient for the values, too."""
        return (self.values[:, None].to(items.dtype) @ F.embedding(self.ids, items)).squeeze(1)

    def normalized(self) -> ItemGraph:
        """D^-1/2 A D^-1/2 with the row sums D; an item whose sum is not positive has no neighbours."""
        degrees = self.values.sum(1)
        scale = torch.where(degrees > 0, degrees.clamp(min=1e-12).rsqrt(), 0)
        return ItemGraph(self.ids, scale[:, None] * self.values * scale[self.ids])

    def constant(self) -> SparseMatrix:
        """The same as a constant, for many products."""
        count, neighbors = self.ids.shape
        rows = torch.arange(count, device=self.ids.device).repeat_interleave(neighbors)
        return SparseMatrix(rows, self.ids.flatten(), self.values.detach().flatten(), (count, count))


def similarity_graph(features: Tensor, num_neighbors: int) -> ItemGraph:
    """Each item's neighbours of the largest cosine, itself among them, weighted by it.

    The choice of neighbours has no gradient, the cosines have one.

    Args:
        features: `(num_items, width)`.
        num_neighbors: k.
    """
    ids, cosines = item_neighbors(features.detach(), num_neighbors)
    if features.requires_grad:
        unit = F.normalize(features, dim=1)
        cosines = (unit[ids] @ unit[:, :, None]).squeeze(2)
    return ItemGraph(ids, cosines)


class LATTICENetwork(nn.Module):
    """The learnt item graph, and item vectors smoothed along it beside those of a light graph convolution.

    Args:
        num_users: U.
        num_items: I.
        feature_sizes: Width of each modality, in the order in which features are given.
        hidden_size: d.
        num_layers: Steps along interactions.
        num_item_layers: Steps along the item graph.
        num_neighbors: k, the item itself among them.
        skip_weight: lambda, what the graphs of the raw features weigh.
    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        feature_sizes: Sequence[int],
        hidden_size: int = 64,
        num_layers: int = 2,
        num_item_layers: int = 1,
        num_neighbors: int = 10,
        skip_weight: float = 0.9,
    ) -> None:
        super().__init__()
        self.num_users, self.num_layers, self.num_item_layers = num_users, num_layers, num_item_layers
        self.num_neighbors, self.skip_weight = num_neighbors, skip_weight
        self.user_id = id_table(num_users, hidden_size)
        self.item_id = id_table(num_items, hidden_size)
        self.projection = nn.ModuleList(nn.Linear(size, hidden_size) for size in feature_sizes)
        self.modality_logits = nn.Parameter(torch.zeros(len(feature_sizes)))

    def item_graph(self, features: Sequence[Tensor], frozen: Sequence[ItemGraph]) -> ItemGraph:
        """The graph of this moment: lambda of raw features, the rest learnt; `(I, 2 modalities k)`, float32.

        Args:
            features: `(I, D_m)` by modality.
            frozen: Normalised graph of the raw features, by modality.
        """
        with torch.autocast(features[0].device.type, enabled=False):
            lam, weights = self.skip_weight, self.modality_logits.float().softmax(0)
            projected = [layer(values) for layer, values in zip(self.projection, features, strict=True)]
            graphs = [similarity_graph(values.float(), self.num_neighbors) for values in projected]
            learnt = ItemGraph(
                torch.cat([graph.ids for graph in graphs], dim=1),
                torch.cat([weight * graph.values for weight, graph in zip(weights, graphs, strict=True)], dim=1),
            ).normalized()
            skipped = [weight * graph.values for weight, graph in zip(weights, frozen, strict=True)]
            return ItemGraph(
                torch.cat([learnt.ids, *(graph.ids for graph in frozen)], dim=1),
                torch.cat([(1 - lam) * learnt.values, *(lam * values for values in skipped)], dim=1),
            )

    def forward(self, graph: BipartiteGraph, item_graph: ItemGraph | SparseMatrix) -> tuple[Tensor, Tensor]:
        """Vectors of all users `(U, d)` and items `(I, d)`, float32."""
        with torch.autocast(self.item_id.device.type, enabled=False):
            similar = self.item_id.float()
            for _ in range(self.num_item_layers):
                similar = (
                    item_graph.smooth(similar) if isinstance(item_graph, ItemGraph) else item_graph.matmul(similar)
                )
            vectors = light_convolution(torch.cat([self.user_id, self.item_id]), graph, self.num_layers)
            return vectors[: self.num_users], vectors[self.num_users :] + F.normalize(similar, dim=1)


class LATTICE(TopNRecommender):
    """Mining latent structures between items (Zhang et al., 2021, arXiv 2104.09036).

    The item graph is built, with its gradient, in the first batch of an epoch and kept as a constant for the others.
    Evaluation builds that of the weights as they are. The features are not trained, which the published code does.

    Args:
        num_users: Number of users.
        num_items: Number of items.
        modalities: Names of the features.
        feature_sizes: Their widths.
        hidden_size: Width of the vectors.
        num_layers: Steps along the graph of interactions.
        num_item_layers: Steps along the graph of items.
        num_neighbors: Neighbours of an item in the graph of a modality, itself among them.
        skip_weight: lambda, what the graphs of the raw features weigh beside the learnt one.
        norm: Normalisation of the graph of interactions (see `BipartiteGraph`); the default is the published code's.
        reg_weight: Penalty on the final vectors of the batch.
        lr: Learning rate of Adam.
        lr_decay: Its factor in `lr_decay_epochs` epochs.
        lr_decay_epochs: See above.
        num_negatives: Negative items of each interaction.
        ks: Cut-offs of the metrics.
        ndcg_variant: "standard" or "hits" (the published code's).
        top_k: Length of predicted lists.
        train_edges: int64 `(2, interactions)` for use without `InteractionData`.
        features: `(num_items, D_m)` by modality, likewise.

    Raises:
        ValueError: If a value is out of its range.
    """

    kept_ids: Tensor
    kept_values: Tensor

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
        skip_weight: float = 0.9,
        norm: str = "rw_self",
        reg_weight: float = 1e-5,
        lr: float = 5e-4,
        lr_decay: float = 0.96,
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
            raise ValueError("LATTICE needs a modality at least; for interactions alone use LightGCN")
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
        # Without a step along the item graph no gradient would reach its weights.
        if reg_weight < 0 or hidden_size < 1 or num_layers < 0 or num_item_layers < 1:
            raise ValueError(
                "reg_weight and num_layers must be at least 0, num_item_layers and hidden_size 1, got "
                f"{reg_weight}, {num_layers}, {num_item_layers} and {hidden_size}"
            )
        if not 2 <= num_neighbors <= num_items:
            raise ValueError(f"num_neighbors must be between 2 and num_items={num_items}, got {num_neighbors}")
        if not 0 <= skip_weight <= 1:
            raise ValueError(f"skip_weight must be in [0, 1], got {skip_weight}")
        self.save_hyperparameters(ignore=["train_edges", "features"])
        self.num_neighbors, self.norm, self.reg_weight = num_neighbors, norm, reg_weight
        self.network = LATTICENetwork(
            num_users, num_items, list(self.feature_sizes.values()), hidden_size, num_layers, num_item_layers,
            num_neighbors, skip_weight,
        )  # fmt: skip
        self.graph: BipartiteGraph | None = None
        # In the checkpoint, for a run resumed in mid-epoch. A graph without edges until the first batch of all.
        shape = (num_items, 2 * len(modalities) * num_neighbors)
        self.register_buffer("kept_ids", torch.zeros(shape, dtype=torch.int64))
        self.register_buffer("kept_values", torch.zeros(shape))
        # All processes build the same.
        self._ddp_params_and_buffers_to_ignore = ["kept_ids", "kept_values"]
        self.kept_graph: SparseMatrix | None = None
        self._builds_graph = True

    def prepare(self, edges: Tensor) -> None:
        """Build the graph of interactions, and the item graphs of the raw features."""
        self.graph = BipartiteGraph(edges, self.num_users, self.num_items, self.norm)
        for place, features in enumerate(self.feature_list()):
            graph = similarity_graph(features, self.num_neighbors).normalized()
            self.register_buffer(f"frozen_ids_{place}", graph.ids, persistent=False)
            self.register_buffer(f"frozen_values_{place}", graph.values, persistent=False)

    def item_graph(self) -> ItemGraph:
        """The item graph of the weights as they are."""
        frozen = [
            ItemGraph(getattr(self, f"frozen_ids_{place}"), getattr(self, f"frozen_values_{place}"))
            for place in range(len(self.modalities))
        ]
        graph: ItemGraph = self.network.item_graph(self.feature_list(), frozen)
        return graph

    def encode(self) -> tuple[Tensor, Tensor]:
        """Vectors of all users and items."""
        users, items = self.network(self.graph, self.item_graph())
        return users, items

    def training_step(self, batch: InteractionBatch, batch_idx: int) -> Tensor:
        """Loss of a batch; the first of an epoch builds the item graph."""
        # By the number of the batch and in no hook: a run resumed in mid-epoch skips the hooks of its start.
        self._builds_graph = batch_idx == 0
        return super().training_step(batch, batch_idx)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Forget the graph of other weights."""
        super().on_load_checkpoint(checkpoint)
        self.kept_graph = None

    def _graph_of_batch(self) -> ItemGraph | SparseMatrix:
        """The graph with its gradient, or the one that was kept."""
        if self._builds_graph:
            graph = self.item_graph()
            self.kept_ids.copy_(graph.ids)
            self.kept_values.copy_(graph.values.detach())
            self.kept_graph = None
            return graph
        if self.kept_graph is None:
            self.kept_graph = ItemGraph(self.kept_ids, self.kept_values).constant().to(self.device)
        return self.kept_graph

    def loss_parts(self, user_ids: Tensor, item_ids: Tensor, negative_ids: Tensor) -> dict[str, Tensor]:
        """BPR and penalty: `bpr` and `reg`."""
        all_users, all_items = self.network(self.graph, self._graph_of_batch())
        users, positives, negatives = all_users[user_ids], all_items[item_ids], all_items[negative_ids]
        bpr = ranking_loss(users, positives, negatives)
        if not self._builds_graph:
            # A gradient of zero: DDP takes none for an error, and Adam's means move the weights on as published.
            idle = [self.network.modality_logits, *self.network.projection.parameters()]
            bpr = bpr + 0 * torch.stack([weight.float().sum() for weight in idle]).sum()
        return {"bpr": bpr, "reg": self.reg_weight * batch_penalty(users, positives, negatives)}
