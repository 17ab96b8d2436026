"""VBPR: matrix factorisation with item features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from zoo.idsf.losses import batch_penalty, ranking_loss
from zoo.idsf.network import id_table
from zoo.idsf.recommender import TopNRecommender

if TYPE_CHECKING:
    from collections.abc import Mapping


class VBPR(TopNRecommender):
    """Matrix factorisation whose item vectors are [ID ; projected features] (He and McAuley, 2016, arXiv 1510.01784).

    Several modalities are projected as one long vector. The original's bias terms are left out, as in the benchmarks of
    multimodal recommendation.

    Args:
        num_users: Number of users.
        num_items: Number of items.
        modalities: Names of the features.
        feature_sizes: Their widths.
        hidden_size: Width of the IDs and of the projected features; users have twice of it.
        reg_weight: Penalty on the vectors of the batch.
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

    def __init__(
        self,
        num_users: int,
        num_items: int,
        modalities: list[str],
        feature_sizes: list[int],
        hidden_size: int = 64,
        reg_weight: float = 1e-4,
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
        if reg_weight < 0 or hidden_size < 1:
            raise ValueError(f"reg_weight must be at least 0 and hidden_size 1, got {reg_weight} and {hidden_size}")
        if not modalities:
            raise ValueError("VBPR needs a modality at least; for interactions alone use BPRMF")
        self.save_hyperparameters(ignore=["train_edges", "features"])
        self.reg_weight = reg_weight
        self.user_id = id_table(num_users, 2 * hidden_size)
        self.item_id = id_table(num_items, hidden_size)
        self.projection = nn.Linear(sum(feature_sizes), hidden_size, bias=False)

    def _items(self, item_ids: Tensor | None = None) -> Tensor:
        """[ID ; projected features] of some items, or of all."""
        features = self.feature_list()
        if item_ids is None:
            return torch.cat([self.item_id, self.projection(torch.cat(features, dim=1))], dim=1).float()
        projected = self.projection(torch.cat([values[item_ids] for values in features], dim=1))
        return torch.cat([self.item_id[item_ids], projected.float()], dim=1)

    def encode(self) -> tuple[Tensor, Tensor]:
        """Vectors of all users and items, `(any, 2 hidden_size)`."""
        return self.user_id.float(), self._items()

    def loss_parts(self, user_ids: Tensor, item_ids: Tensor, negative_ids: Tensor) -> dict[str, Tensor]:
        """BPR and penalty: `bpr` and `reg`."""
        # An item is projected once, however often the batch names it.
        rows, places = torch.unique(torch.cat([item_ids, negative_ids.flatten()]), return_inverse=True)
        users, items = self.user_id[user_ids], self._items(rows)[places]
        positives = items[: len(item_ids)]
        negatives = items[len(item_ids) :].view(*negative_ids.shape, -1)
        return {
            "bpr": ranking_loss(users, positives, negatives),
            "reg": self.reg_weight * batch_penalty(users, positives, negatives),
        }
