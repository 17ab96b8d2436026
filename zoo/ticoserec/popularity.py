"""The floor that every recommender must pass: the most popular items."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoo.ticoserec.jagged import gather_rows
from zoo.ticoserec.recommender import SequentialRecommender

if TYPE_CHECKING:
    from zoo.ticoserec.types import SequenceBatch, SequenceTable


class Popularity(SequentialRecommender):
    """Ranks items by how many training interactions they have; nothing is learnt by gradient.

    Args:
        num_items: Catalogue size V.
        ks: Cut-offs of the metrics.
        evaluation: "masked" or "official" (see `SequentialRecommender`).
        top_k: Length of predicted lists.
        sequences: Training sequences for use without `SequenceData`.
    """

    popularity: Tensor

    def __init__(
        self,
        num_items: int,
        ks: list[int] = [5, 10, 20],  # noqa: B006 - read only, and a plain YAML value
        evaluation: str = "masked",
        top_k: int = 20,
        sequences: SequenceTable | None = None,
    ) -> None:
        super().__init__(num_items, ks, evaluation, top_k, sequences)
        self.save_hyperparameters(ignore=["sequences"])
        # There is nothing to optimize, and Lightning need not warn about it in every step.
        self.automatic_optimization = False
        self.register_buffer("popularity", torch.zeros(num_items + 1))

    def setup(self, stage: str) -> None:
        """Count the training interactions.

        Raises:
            ValueError: If the catalogue differs from the datamodule's.
        """
        super().setup(stage)
        if stage == "fit":
            table = self.training_sequences()
            item_ids = gather_rows(table.item_ids, table.offsets[:-1], table.train_lengths)
            self.popularity.copy_(item_ids.bincount(minlength=self.num_items + 1))

    def score(self, item_ids: Tensor, lengths: Tensor) -> Tensor:
        """The same counts for every user, `(batch, num_items + 1)`; equal counts are told apart by the id."""
        tie_break = torch.linspace(0.5, 0, len(self.popularity), device=self.popularity.device)
        return (self.popularity + tie_break).repeat(len(lengths), 1)

    def training_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        """End the training: the counts are complete after `setup`."""
        self.trainer.should_stop = True

    def configure_optimizers(self) -> None:
        """No optimizer."""
