"""What every next-item recommender of this room shares: full-ranking evaluation and top-k prediction."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric

from zoo.common.artifacts import log_figure, log_table
from zoo.common.predictions import PredictionFile, external_labels
from zoo.common.ranking import FullRankingMetrics, target_ranks
from zoo.ticoserec.figures import plot_uniformity

if TYPE_CHECKING:
    from zoo.ticoserec.types import SequenceBatch, SequenceTable

_GROUPS = 5  # bars of the picture of metrics by uniformity
_SHOWN = 20  # users in the table of recommendations


class SequentialRecommender(LightningModule):
    """Evaluation by full ranking, and top-k lists.

    A subclass implements `score(item_ids, lengths) -> (batch, num_items + 1)`.

    Args:
        num_items: Catalogue size; ids are 1..num_items.
        ks: Cut-offs of the metrics.
        evaluation: "masked" never ranks padding or `seen_ids`; "official" gives them the score 0 and keeps them, as the
            published code does.
        top_k: Length of predicted lists.
        sequences: Training sequences, where the trainer's datamodule has none to offer.
    """

    monitor = "val/ndcg@20"
    monitor_mode = "max"

    def __init__(
        self,
        num_items: int,
        ks: list[int],
        evaluation: str,
        top_k: int,
        sequences: SequenceTable | None,
    ) -> None:
        super().__init__()
        if not ks or min(ks) < 1:
            raise ValueError(f"ks must be cut-offs of at least 1, got {ks}")
        if num_items is None or num_items < 1:
            raise ValueError(f"num_items must be at least 1, got {num_items}: set --model.num_items")
        if evaluation not in ("masked", "official"):
            raise ValueError(f"evaluation must be masked or official, got {evaluation!r}")
        if not 1 <= top_k <= num_items:
            raise ValueError(f"top_k must be between 1 and num_items={num_items}, got {top_k}")
        self.num_items, self.evaluation, self.top_k = num_items, evaluation, top_k
        self._given_sequences = sequences
        self.monitor = f"val/ndcg@{max(ks)}"
        self.val_metrics = FullRankingMetrics(ks, ("hr", "ndcg", "mrr"))
        self.test_metrics = FullRankingMetrics(ks, ("hr", "ndcg", "mrr"))
        # Not nan_strategy="disable", which makes torchmetrics forget the weights.
        self.ndcg_by_uniformity = nn.ModuleList(MeanMetric(nan_strategy=0.0) for _ in range(_GROUPS))
        self._deepest = max(ks)
        self._predictions = PredictionFile(self)

    def score(self, item_ids: Tensor, lengths: Tensor) -> Tensor:
        """Scores of all items `(batch, num_items + 1)` after left-padded histories `(batch, width)`."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Compare the catalogue with the datamodule's.

        Raises:
            ValueError: If the two differ, or the device lacks the double precision that draws and metrics need.
        """
        if self.device.type == "mps":
            raise ValueError(f"{type(self).__name__} needs float64, which mps lacks: set --trainer.accelerator cpu")
        data = getattr(self.trainer, "datamodule", None)
        found = getattr(data, "num_items", None)
        if found is not None and found != self.num_items:
            raise ValueError(
                f"the model was built for num_items={self.num_items}, but {type(data).__name__} "
                f"(source={getattr(data, 'source', None)!r}) has num_items={found}"
            )

    def training_sequences(self) -> SequenceTable:
        """The sequences given to the constructor, or else the datamodule's.

        Raises:
            ValueError: If neither has any.
        """
        table = self._known_sequences()
        if table is None:
            raise ValueError(
                f"{type(self).__name__} needs the training sequences: train it with SequenceData, or pass "
                "sequences=SequenceTable(...) to the constructor"
            )
        return table

    @torch.no_grad()
    def recommend(
        self, item_ids: Tensor, lengths: Tensor, k: int, seen_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Best items of each user.

        Args:
            item_ids: int64 `(batch, width)`, histories left-padded with 0.
            lengths: int64 `(batch,)`.
            k: Items to return.
            seen_ids: int64 `(batch, any)`, items never to recommend, padded with 0; `item_ids` by default.

        Returns:
            Item ids `(batch, k)`, best first, and their scores.
        """
        scores = self._ranked_scores(item_ids, lengths, item_ids if seen_ids is None else seen_ids, masked=True)
        best = scores.topk(k, dim=-1)
        return best.indices, best.values

    def _ranked_scores(self, item_ids: Tensor, lengths: Tensor, seen_ids: Tensor | None, masked: bool) -> Tensor:
        scores = self.score(item_ids, lengths).float()
        excluded = -torch.inf if masked else 0.0
        if seen_ids is not None:
            scores.scatter_(1, seen_ids, excluded)
        scores[:, 0] = excluded
        return scores

    def _evaluate(self, batch: SequenceBatch, metrics: FullRankingMetrics) -> Tensor:
        scores = self._ranked_scores(batch.item_ids, batch.lengths, batch.seen_ids, self.evaluation == "masked")
        try:
            metrics.update(scores, batch.target_ids)
        except ValueError as error:
            users = batch.user_ids[~(scores.amax(1) < torch.inf)].tolist()
            if not users:
                raise
            raise ValueError(f"step {self.global_step}, users {users[:5]}: {error}") from error
        nothing = scores.amax(1) == -torch.inf
        if bool(nothing.any()):
            users = batch.user_ids[nothing].tolist()
            raise ValueError(f"step {self.global_step}, users {users[:5]}: no item has a score above -inf")
        return scores

    def validation_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        """Rank the last but one item of each user."""
        self._evaluate(batch, self.val_metrics)

    def test_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        """Rank the last item of each user."""
        scores = self._evaluate(batch, self.test_metrics)
        table = self._known_sequences()
        if table is not None:
            ranks = target_ranks(scores, batch.target_ids)
            gains = torch.where(ranks < self._deepest, 1 / (ranks + 2.0).log2(), 0.0)
            order = table.uniformity_rank.to(self.device)
            groups = torch.where(batch.user_ids >= 0, order[batch.user_ids] * _GROUPS // len(order), -1)
            for group, metric in enumerate(self._group_metrics()):
                metric.update(gains, weight=(groups == group).float())
        if batch_idx == 0 and self.trainer.is_global_zero:
            self._show_recommendations(batch, scores)

    def _show_recommendations(self, batch: SequenceBatch, scores: Tensor) -> None:
        labels, users = external_labels(self, "item_labels"), external_labels(self, "user_labels")
        rows = []
        for row in range(min(_SHOWN, len(scores))):
            history = [i for i in batch.item_ids[row, -5:].tolist() if i]
            best = scores[row].topk(min(5, self.num_items)).indices.tolist()
            target = int(batch.target_ids[row])
            lists = [" ".join(labels(i) for i in ids) for ids in (history, [target], best)]
            user = int(batch.user_ids[row])
            rows.append([users(user) if user >= 0 else "not in training", *lists, target in best])
        columns = ["user", "last items", "target", "recommended", "hit"]
        log_table(self, "test/recommendations", columns, rows)

    def _log_metrics(self, stage: str, metrics: FullRankingMetrics) -> None:
        for name, value in metrics.compute().items():
            key = f"{stage}/{name}"
            self.log(key, value, prog_bar=key == self.monitor)
        metrics.reset()

    def on_validation_epoch_end(self) -> None:
        """Log `val/*`."""
        self._log_metrics("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Log `test/*` and draw the metric by uniformity of the users' gaps."""
        self._log_metrics("test", self.test_metrics)
        table = self._known_sequences()
        if table is None:
            return
        values = []
        for metric in self._group_metrics():
            values.append(float(metric.compute().nan_to_num()))
            metric.reset()
        # A rank beyond the last user says that a user's gaps are not known.
        groups = table.uniformity_rank * _GROUPS // len(table.uniformity_rank)
        counts = groups.bincount(minlength=_GROUPS)[:_GROUPS].tolist()
        log_figure(self, "test/uniformity", plot_uniformity(values, counts, f"test NDCG@{self._deepest}"))

    def _group_metrics(self) -> list[MeanMetric]:
        return [metric for metric in self.ndcg_by_uniformity if isinstance(metric, MeanMetric)]

    def _known_sequences(self) -> SequenceTable | None:
        """The training sequences, if any are at hand."""
        if self._given_sequences is not None:
            return self._given_sequences
        table: SequenceTable | None = getattr(getattr(self.trainer, "datamodule", None), "sequences", None)
        return table

    def on_predict_start(self) -> None:
        """Open `predictions.jsonl` in the run's folder (one file per process, if there are several)."""
        self._predictions.open()

    def predict_step(self, batch: SequenceBatch, batch_idx: int) -> dict[str, Tensor]:
        """Best `top_k` items of each user: `user_ids` (batch,), `item_ids` and `scores` (batch, top_k).

        The lists are also written as lines `{"user": ..., "items": [...], "scores": [...]}` with external ids.
        """
        item_ids, scores = self.recommend(batch.item_ids, batch.lengths, self.top_k, batch.seen_ids)
        self._predictions.write_top_k(batch.user_ids, item_ids, scores)
        return {"user_ids": batch.user_ids, "item_ids": item_ids, "scores": scores}

    def on_predict_end(self) -> None:
        """Close the file."""
        self._predictions.close()
