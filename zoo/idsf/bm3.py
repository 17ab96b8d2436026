"""BM3: recommendation without negatives, by views of the same vectors with dropout."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.idsf.graph import BipartiteGraph
from zoo.idsf.lightgcn import light_convolution
from zoo.idsf.network import id_table
from zoo.idsf.recommender import TopNRecommender

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class BM3Losses(NamedTuple):
    """Parts of the loss, unweighted.

    Attributes:
        reconstruction: Users against items and the reverse (graph reconstruction).
        inter: Features against items, over the modalities (alignment between modalities).
        intra: Features against themselves, over the modalities (masked features).
    """

    reconstruction: Tensor
    inter: Tensor
    intra: Tensor


def cosine_distance(online: Tensor, target: Tensor) -> Tensor:
    """1 - the mean cosine of rows `(batch, d)`; no gradient for the target."""
    return 1 - F.cosine_similarity(online.float(), target.detach().float(), dim=-1).mean()


class BM3Network(nn.Module):
    """IDs smoothed along interactions, projected features, and the predictor of the other view.

    Args:
        num_users: U.
        num_items: I.
        feature_sizes: Width of each modality that takes part in the loss, in order.
        hidden_size: d.
        num_layers: Steps along interactions.
        dropout: Share of the entries that are left out of the targets.
    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        feature_sizes: Sequence[int],
        hidden_size: int = 64,
        num_layers: int = 1,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.num_users, self.num_layers = num_users, num_layers
        self.user_id = id_table(num_users, hidden_size)
        self.item_id = id_table(num_items, hidden_size)
        self.projection = nn.ModuleList(nn.Linear(size, hidden_size) for size in feature_sizes)
        self.predictor = nn.Linear(hidden_size, hidden_size)
        for layer in (self.predictor, *self.projection):
            nn.init.xavier_normal_(layer.weight)
        self.drop = nn.Dropout(dropout)

    def forward(self, graph: BipartiteGraph) -> tuple[Tensor, Tensor]:
        """Vectors of all users `(U, d)` and items `(I, d)` before the predictor, float32."""
        vectors = light_convolution(torch.cat([self.user_id, self.item_id]), graph, self.num_layers)
        return vectors[: self.num_users], vectors[self.num_users :] + self.item_id

    def losses(self, users: Tensor, items: Tensor, features: Sequence[Tensor]) -> BM3Losses:
        """Losses of a batch.

        Args:
            users: `(batch, d)`, before the predictor.
            items: `(batch, d)`, likewise, what they chose.
            features: X_m `(batch, D_m)` of these items, by modality.
        """
        user_target, item_target = self.drop(users), self.drop(items)
        reconstruction = cosine_distance(self.predictor(users), item_target)
        reconstruction = reconstruction + cosine_distance(self.predictor(items), user_target)
        inter, intra = users.new_zeros(()), users.new_zeros(())
        for layer, values in zip(self.projection, features, strict=True):
            projected = layer(values)
            predicted = self.predictor(projected)
            inter = inter + cosine_distance(predicted, item_target)
            intra = intra + cosine_distance(predicted, self.drop(projected))
        return BM3Losses(reconstruction, inter, intra)


class BM3(TopNRecommender):
    """Bootstrapped multimodal recommendation (Zhou et al., 2023, arXiv 2207.05969).

    A user's vector, seen through a predictor, is drawn to that of the item with dropout, and the reverse; the features
    of the item are drawn to it and to themselves. There are no negatives. The features are not trained, which the
    published code does. The defaults are those published for Amazon Baby.

    Args:
        num_users: Number of users.
        num_items: Number of items.
        modalities: Names of the features.
        feature_sizes: Their widths.
        hidden_size: Width of the vectors.
        num_layers: Steps along the graph.
        dropout: Share of the entries that are left out of the targets; 0 makes the loss a function of the weights.
        cl_weight: Weight of the losses of the features; 0 leaves them out.
        reg_weight: Penalty on the vectors: their Frobenius norms, those of all users and of all items, over the number
            of items, as published.
        lr: Learning rate of Adam.
        lr_decay: Its factor in `lr_decay_epochs` epochs.
        lr_decay_epochs: See above.
        ks: Cut-offs of the metrics.
        ndcg_variant: "standard" or "hits".
        top_k: Length of predicted lists.
        train_edges: int64 `(2, interactions)` for use without `InteractionData`.
        features: `(num_items, D_m)` by modality, likewise.

    Raises:
        ValueError: If a value is out of its range.
    """

    draws_negatives = False

    def __init__(
        self,
        num_users: int,
        num_items: int,
        modalities: list[str],
        feature_sizes: list[int],
        hidden_size: int = 64,
        num_layers: int = 1,
        dropout: float = 0.5,
        cl_weight: float = 2.0,
        reg_weight: float = 0.1,
        lr: float = 1e-3,
        lr_decay: float = 1.0,
        lr_decay_epochs: int = 50,
        ks: list[int] = [10, 20],  # noqa: B006 - read only, and a plain YAML value
        ndcg_variant: str = "standard",
        top_k: int = 20,
        train_edges: Tensor | None = None,
        features: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(
            num_users, num_items, modalities, feature_sizes, lr, lr_decay, lr_decay_epochs, 1, ks, ndcg_variant, top_k,
            train_edges, features,
        )  # fmt: skip
        if not modalities:
            raise ValueError("BM3 needs a modality at least; for interactions alone use LightGCN")
        if reg_weight < 0 or cl_weight < 0 or hidden_size < 1 or num_layers < 0:
            raise ValueError(
                "reg_weight, cl_weight and num_layers must be at least 0 and hidden_size 1, got "
                f"{reg_weight}, {cl_weight}, {num_layers} and {hidden_size}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.save_hyperparameters(ignore=["train_edges", "features"])
        self.cl_weight, self.reg_weight = cl_weight, reg_weight
        sizes = list(self.feature_sizes.values()) if cl_weight > 0 else []
        self.network = BM3Network(num_users, num_items, sizes, hidden_size, num_layers, dropout)
        self.graph: BipartiteGraph | None = None

    def prepare(self, edges: Tensor) -> None:
        """Build the graph."""
        self.graph = BipartiteGraph(edges, self.num_users, self.num_items)

    def encode(self) -> tuple[Tensor, Tensor]:
        """Vectors of all users and items, after the predictor."""
        users, items = self.network(self.graph)
        return self.network.predictor(users), self.network.predictor(items)

    def loss_parts(self, user_ids: Tensor, item_ids: Tensor, negative_ids: Tensor) -> dict[str, Tensor]:
        """`reconstruction`, `inter`, `intra` and `reg`; the negatives are not looked at."""
        users, items = self.network(self.graph)
        features = [values[item_ids] for values in self.feature_list()] if self.cl_weight > 0 else []
        losses = self.network.losses(users[user_ids], items[item_ids], features)
        parts = {"reconstruction": losses.reconstruction}
        if self.cl_weight > 0:
            parts |= {"inter": self.cl_weight * losses.inter, "intra": self.cl_weight * losses.intra}
        if self.reg_weight > 0:
            parts["reg"] = self.reg_weight * (users.norm() + items.norm()) / self.num_items
        return parts
