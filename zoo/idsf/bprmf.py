"""BPR-MF: matrix factorisation trained on pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoo.idsf.losses import batch_penalty, ranking_loss
from zoo.idsf.network import id_table
from zoo.idsf.recommender import TopNRecommender

if TYPE_CHECKING:
    from torch import Tensor


class BPRMF(TopNRecommender):
    """Matrix factorisation with Bayesian personalised ranking (Rendle et al., 2009): IDs alone.

    Args:
        num_users: Number of users.
        num_items: Number of items.
        hidden_size: Width of the vectors.
        reg_weight: Penalty on the vectors of the batch.
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
        if reg_weight < 0 or hidden_size < 1:
            raise ValueError(f"reg_weight must be at least 0 and hidden_size 1, got {reg_weight} and {hidden_size}")
        self.save_hyperparameters(ignore=["train_edges"])
        self.reg_weight = reg_weight
        self.user_id = id_table(num_users, hidden_size)
        self.item_id = id_table(num_items, hidden_size)

    def encode(self) -> tuple[Tensor, Tensor]:
        """The two tables."""
        return self.user_id.float(), self.item_id.float()

    def loss_parts(self, user_ids: Tensor, item_ids: Tensor, negative_ids: Tensor) -> dict[str, Tensor]:
        """BPR and penalty: `bpr` and `reg`."""
        users, positives, negatives = self.user_id[user_ids], self.item_id[item_ids], self.item_id[negative_ids]
        return {
            "bpr": ranking_loss(users, positives, negatives),
            "reg": self.reg_weight * batch_penalty(users, positives, negatives),
        }
