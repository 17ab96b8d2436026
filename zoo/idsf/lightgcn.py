"""LightGCN: IDs smoothed along the graph."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.idsf.graph import NORMS, BipartiteGraph
from zoo.idsf.losses import batch_penalty, ranking_loss
from zoo.idsf.network import id_table
from zoo.idsf.recommender import TopNRecommender


def light_convolution(start: Tensor, graph: BipartiteGraph, num_layers: int) -> Tensor:
    """Mean of x, A x, ..., A^L x for x `(users + items, d)` (He et al., 2020, equations 7 and 8)."""
    return graph.convolve(start, num_layers) / (num_layers + 1)


class LightGCN(TopNRecommender):
    """Light graph convolution over the IDs of users and items (He et al., 2020, arXiv 2002.02126).

    Args:
        num_users: Number of users.
        num_items: Number of items.
        hidden_size: Width of the vectors.
        num_layers: Steps along the graph.
        norm: Normalisation of the graph (see `BipartiteGraph`).
        reg_weight: Penalty on the IDs of the batch, before the graph.
        lr: Learning rate of Adam.
        lr_decay: Its factor in `lr_decay_epochs` epochs.
        lr_decay_epochs: See above.
        num_negatives: Negative items of each interaction.
        ks: Cut-offs of the metrics.
        ndcg_variant: "standard" or "hits".
        top_k: Length of predicted lists.
        train_edges: int64 `(2, interactions)` for use without `InteractionData`.

    Raises:
        ValueError: If a value is out of its range.
    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        hidden_size: int = 64,
        num_layers: int = 3,
        norm: str = "sym",
        reg_weight: float = 1e-4,
        lr: float = 1e-3,
        lr_decay: float = 1.0,
        lr_decay_epochs: int = 50,
        num_negatives: int = 1,
        ks: list[int] = [10, 20],  # noqa: B006 - read only, and a plain YAML value
        ndcg_variant: str = "standard",
        top_k: int = 20,
        train_edges: Tensor | None = None,
    ) -> None:
        super().__init__(
            num_users, num_items, [], [], lr, lr_decay, lr_decay_epochs, num_negatives, ks, ndcg_variant, top_k,
            train_edges, None,
        )  # fmt: skip
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
        if reg_weight < 0 or hidden_size < 1 or num_layers < 0:
            raise ValueError(
                f"reg_weight and num_layers must be at least 0 and hidden_size 1, got {reg_weight}, {num_layers} and "
                f"{hidden_size}"
            )
        self.save_hyperparameters(ignore=["train_edges"])
        self.num_layers, self.norm, self.reg_weight = num_layers, norm, reg_weight
        self.user_id = id_table(num_users, hidden_size)
        self.item_id = id_table(num_items, hidden_size)
        self.graph: BipartiteGraph | None = None

    def prepare(self, edges: Tensor) -> None:
        """Build the graph."""
        self.graph = BipartiteGraph(edges, self.num_users, self.num_items, self.norm)

    def encode(self) -> tuple[Tensor, Tensor]:
        """Vectors of all users and items, each the mean over the layers."""
        assert self.graph is not None
        vectors = light_convolution(torch.cat([self.user_id, self.item_id]), self.graph, self.num_layers)
        return vectors[: self.num_users], vectors[self.num_users :]

    def loss_parts(self, user_ids: Tensor, item_ids: Tensor, negative_ids: Tensor) -> dict[str, Tensor]:
        """BPR and penalty: `bpr` and `reg`."""
        all_users, all_items = self.encode()
        users, positives, negatives = all_users[user_ids], all_items[item_ids], all_items[negative_ids]
        own = self.user_id[user_ids], self.item_id[item_ids], self.item_id[negative_ids]
        return {
            "bpr": ranking_loss(users, positives, negatives),
            "reg": self.reg_weight * batch_penalty(*own),
        }
