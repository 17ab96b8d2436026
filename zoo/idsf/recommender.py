"""What every recommender of this room shares: pairwise training, full-ranking evaluation, top-k lists."""

from __future__ import annotations

import math
import zlib
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningModule
from torch import Tensor

from zoo.common.negatives import NegativeSampler
from zoo.common.predictions import PredictionFile
from zoo.common.ranking import FullRankingMetrics
from zoo.idsf.features import checked_features, feature_fingerprint, same_features, shown_fingerprint
from zoo.idsf.graph import check_edges
from zoo.idsf.lists import show_recommendations

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning.pytorch.utilities.types import OptimizerLRScheduler

    from zoo.idsf.types import InteractionBatch, RankingBatch

METRICS = ("recall", "ndcg", "precision", "hr")


class TopNRecommender(LightningModule):
    """Users and items as vectors whose inner product is the score; trained on pairs, ranked over the whole catalogue.

    A subclass implements `prepare(edges)`, `encode() -> (users, items)` and `loss_parts(users, positives, negatives)`.

    A checkpoint also holds the vectors of all users and items, so that a loaded model recommends without graph and
    features.

    Args:
        num_users: Number of users.
        num_items: Number of items.
        modalities: Names of the features, sorted; empty for a model without.
        feature_sizes: Their widths.
        lr: Learning rate of Adam.
        lr_decay: Factor of the learning rate in `lr_decay_epochs` epochs; 1 for a constant one.
        lr_decay_epochs: See above.
        num_negatives: Negative items of each interaction.
        ks: Cut-offs of the metrics; the checkpoint of the best recall at the largest is kept.
        ndcg_variant: "standard", or "hits" as the published code has it (see `FullRankingMetrics`).
        top_k: Length of predicted lists.
        train_edges: int64 `(2, interactions)`, where the trainer's datamodule has none to offer.
        features: `(num_items, D_m)` by modality, likewise.

    Raises:
        ValueError: If a value is out of its range.
    """

    monitor = "val/recall@20"
    monitor_mode = "max"
    draws_negatives = True

    def __init__(
        self,
        num_users: int,
        num_items: int,
        modalities: list[str],
        feature_sizes: list[int],
        lr: float,
        lr_decay: float,
        lr_decay_epochs: int,
        num_negatives: int,
        ks: list[int],
        ndcg_variant: str,
        top_k: int,
        train_edges: Tensor | None,
        features: Mapping[str, Tensor] | None,
    ) -> None:
        super().__init__()
        for name, size in (("num_users", num_users), ("num_items", num_items)):
            if size is None or size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}: set --model.{name}")
        if not ks or min(ks) < 1 or max(ks) > num_items:
            raise ValueError(f"ks must be cut-offs between 1 and num_items={num_items}, got {ks}: set --model.ks")
        if not 1 <= top_k <= num_items:
            raise ValueError(f"top_k must be between 1 and num_items={num_items}, got {top_k}: set --model.top_k")
        if not lr > 0 or not 0 < lr_decay <= 1 or lr_decay_epochs < 1 or num_negatives < 1:
            raise ValueError(
                "lr must be above 0, lr_decay in (0, 1], lr_decay_epochs and num_negatives at least 1, got "
                f"{lr}, {lr_decay}, {lr_decay_epochs}, {num_negatives}"
            )
        if len(modalities) != len(feature_sizes):
            raise ValueError(f"got {len(feature_sizes)} feature_sizes for {len(modalities)} modalities")
        self.num_users, self.num_items, self.top_k = num_users, num_items, top_k
        # The order of modalities must not matter, and the datamodule's is sorted.
        self.feature_sizes = dict(sorted(zip(modalities, feature_sizes, strict=True)))
        self.modalities = list(self.feature_sizes)
        self.lr, self.lr_decay, self.lr_decay_epochs = lr, lr_decay, lr_decay_epochs
        self.num_negatives = num_negatives
        self.monitor = f"val/recall@{max(ks)}"
        self.val_metrics = FullRankingMetrics(ks, METRICS, ndcg_variant=ndcg_variant)
        self.test_metrics = FullRankingMetrics(ks, METRICS, ndcg_variant=ndcg_variant)
        self._given_edges, self._given_features = train_edges, features
        self.negatives: NegativeSampler | None = None
        self._prepared = False
        self._edges_checksum = 0
        # Of the features of the checkpoint, or of those at hand.
        self._fingerprint: dict[str, list[float]] | None = None
        self._restored: tuple[Tensor, Tensor] | None = None
        self._encoded: tuple[Tensor, Tensor] | None = None
        self._predictions = PredictionFile(self)

    # What a model is.

    def prepare(self, edges: Tensor) -> None:
        """Build what depends on the training interactions `(2, interactions)`, such as graphs."""

    def encode(self) -> tuple[Tensor, Tensor]:
        """Vectors of all users `(num_users, d)` and all items `(num_items, d)`, float32."""
        raise NotImplementedError

    def loss_parts(self, user_ids: Tensor, item_ids: Tensor, negative_ids: Tensor) -> dict[str, Tensor]:
        """Parts of the loss, weighted, by name; their sum is minimised.

        Args:
            user_ids: int64 `(batch,)`.
            item_ids: int64 `(batch,)`, what they chose.
            negative_ids: int64 `(batch, num_negatives)`, what they did not.
        """
        raise NotImplementedError

    # Data.

    def setup(self, stage: str) -> None:
        """Take interactions and features from the constructor or the datamodule, and prepare.

        Raises:
            ValueError: If something is missing, or differs in size or content from what the model was made for.
        """
        precision = str(getattr(self._trainer, "precision", ""))
        if precision in ("16-true", "bf16-true"):
            raise ValueError(
                f"precision {precision} would rank in half precision, which ties most items: use bf16-mixed"
            )
        if "FSDP" in type(getattr(self._trainer, "strategy", None)).__name__:
            raise ValueError("fsdp would split the vectors that every process needs whole: use ddp")
        data = getattr(self._trainer, "datamodule", None)
        for name in ("num_users", "num_items"):
            found = getattr(data, name, None)
            if found is not None and found != getattr(self, name):
                raise ValueError(
                    f"the model was built for {name}={getattr(self, name)}, but {type(data).__name__} "
                    f"(source={getattr(data, 'source', None)!r}) has {name}={found}"
                )
        edges = self._given_edges if self._given_edges is not None else getattr(data, "train_edges", None)
        features = self._given_features if self._given_features is not None else getattr(data, "features", None)
        if edges is not None and (features is not None or not self.modalities):
            if not self._prepared:
                self._prepare(edges, features or {}, getattr(data, "cold_item_ids", None))
            elif zlib.crc32(edges.cpu().numpy().tobytes()) != self._edges_checksum:
                raise ValueError(
                    f"{type(self).__name__} was set up with other training interactions than those of this "
                    f"{type(data).__name__}: give the data options of the training, and test_path for other "
                    "interactions to test on"
                )
            elif self.modalities:
                own = checked_features(features or {}, self.feature_sizes, self.num_items)
                _compare(self._fingerprint or {}, feature_fingerprint(own))
        if not self._prepared and (stage == "fit" or self._restored is None):
            what = "training interactions" if edges is None else f"features of {', '.join(self.modalities)}"
            raise ValueError(
                f"{type(self).__name__} needs the {what}: train it with InteractionData, or pass train_edges= "
                f"{'and features= ' if self.modalities else ''}to the constructor"
            )

    @torch.no_grad()
    def _prepare(self, edges: Tensor, features: Mapping[str, Tensor], cold: Tensor | None) -> None:
        check_edges(edges, self.num_users, self.num_items)
        self._edges_checksum = zlib.crc32(edges.cpu().numpy().tobytes())
        if self.modalities:
            self._take_features(features)
        before = {name for name, _ in self.named_buffers()}
        if self.draws_negatives:
            pool = None
            if cold is not None and len(cold):
                # What is not in the catalogue yet cannot be a negative.
                warm = torch.ones(self.num_items, dtype=torch.bool)
                warm[cold] = False
                pool = warm.nonzero().flatten()
            self.negatives = NegativeSampler(edges[0], edges[1], self.num_items, pool=pool)
        self.prepare(edges)
        # Tables that never change stay out of DDP's broadcast of buffers before every step.
        added = {name for name, _ in self.named_buffers()} - before
        ignored = getattr(self, "_ddp_params_and_buffers_to_ignore", [])
        self._ddp_params_and_buffers_to_ignore = sorted({*ignored, *added})
        self.to(self.device)
        self._prepared = True

    def _take_features(self, features: Mapping[str, Tensor]) -> None:
        """Check features, and hand them to `fill_features`."""
        own = checked_features(features, self.feature_sizes, self.num_items)
        fingerprint = feature_fingerprint(own)
        fresh = self._fingerprint is None
        if self._fingerprint is not None:
            _compare(self._fingerprint, fingerprint)
        self._fingerprint = fingerprint
        self.fill_features(own, fresh)

    def fill_features(self, features: Mapping[str, Tensor], fresh: bool) -> None:
        """Keep the features.

        Args:
            features: float32 `(num_items, D_m)` by modality.
            fresh: Whether the weights come from no checkpoint, so that trainable features start here.
        """
        for place, name in enumerate(self.modalities):
            self.register_buffer(f"features_{place}", features[name], persistent=False)

    def feature_list(self) -> list[Tensor]:
        """Features `(num_items, D_m)` in the order of `modalities`.

        Raises:
            ValueError: If there are none: a loaded model has the vectors of users and items alone.
        """
        if self.modalities and not hasattr(self, "features_0"):
            self.setup("fit")
        return [getattr(self, f"features_{place}") for place in range(len(self.modalities))]

    # Training.

    def training_step(self, batch: InteractionBatch, batch_idx: int) -> Tensor:
        """Loss of a batch; logs `train/loss` and its parts."""
        if not self._prepared:
            raise RuntimeError("graph and negatives are prepared in setup('fit'): call it before training steps")
        if self.negatives is None:
            negative_ids = batch.item_ids.new_empty(len(batch.item_ids), 0)
        else:
            negative_ids = self.negatives(batch.user_ids, batch.keys, self.num_negatives)
        parts = self.loss_parts(batch.user_ids, batch.item_ids, negative_ids)
        loss = torch.stack([part.float() for part in parts.values()]).sum()
        # Looking at a value waits for an accelerator, so there it is done as often as losses are logged.
        if loss.device.type == "cpu" or self.global_step % max(1, getattr(self.trainer, "log_every_n_steps", 50)) == 0:
            self._check_finite(loss, parts)
        count = len(batch.user_ids)
        self.log("train/loss", loss, prog_bar=True, batch_size=count)
        if len(parts) > 1:
            self.log_dict({f"train/{name}": part for name, part in parts.items()}, batch_size=count)
        return loss

    def _check_finite(self, loss: Tensor, parts: Mapping[str, Tensor]) -> None:
        if not math.isfinite(float(loss.detach())):
            shown = ", ".join(f"{name}={float(part.detach()):.4g}" for name, part in parts.items())
            raise ValueError(
                f"epoch {self.current_epoch}, step {self.global_step}: the loss is {float(loss.detach())} ({shown}): "
                "lower --model.lr or look at the scale of the features (--data.feature_norm standardize)"
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam without weight decay; the learning rate decays smoothly by epochs."""
        # torch's fused Adam cannot be combined with gradient clipping under mixed precision.
        fused = not getattr(self._trainer, "gradient_clip_val", None)
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr, fused=fused)
        decay, every = self.lr_decay, self.lr_decay_epochs
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: decay ** (epoch / every))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}

    # Ranking.

    @torch.no_grad()
    def vectors(self) -> tuple[Tensor, Tensor]:
        """Vectors of users `(num_users, d)` and items `(num_items, d)`: of the weights, or those of the checkpoint.

        Raises:
            ValueError: If there is neither a graph nor a checkpoint.
        """
        if not self._prepared:
            if self._restored is None:
                self.setup("predict")
            else:
                users, items = (part.to(self.device) for part in self._restored)
                return users, items
        was_training = self.training
        self.eval()
        try:
            with torch.autocast(self.device.type, enabled=False):
                users, items = self.encode()
                return users.detach(), items.detach()
        finally:
            self.train(was_training)

    def forward(self, user_ids: Tensor, item_ids: Tensor) -> Tensor:
        """Scores of pairs, `(pairs,)` for ids `(pairs,)` each."""
        users, items = self.vectors()
        return (users[user_ids] * items[item_ids]).sum(-1)

    def _start_evaluation(self) -> None:
        # Once for all batches: the graph is the same for each.
        self._encoded = self.vectors()

    on_validation_epoch_start = on_test_epoch_start = on_predict_epoch_start = _start_evaluation

    def _scores(self, user_ids: Tensor, seen_rows: Tensor, seen_ids: Tensor, candidate_ids: Tensor | None) -> Tensor:
        """Scores `(users, num_items)`; -inf for what is not ranked."""
        users, items = self.vectors() if self._encoded is None else self._encoded
        with torch.autocast(users.device.type, enabled=False):
            scores = users[user_ids] @ items.T
        if candidate_ids is not None:
            others = torch.ones(self.num_items, dtype=torch.bool, device=scores.device)
            others[candidate_ids] = False
            scores.masked_fill_(others, -torch.inf)
        scores[seen_rows, seen_ids] = -torch.inf
        return scores

    @torch.no_grad()
    def recommend(self, user_ids: Tensor, k: int = 20, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Best items of some users.

        Args:
            user_ids: int64 `(users,)`.
            k: Items to return.
            seen: int64 `(2, pairs)`, user ids and item ids never to recommend.

        Returns:
            Item ids `(users, k)`, best first, and their scores.

        Raises:
            ValueError: If fewer than `k` items are left for a user.
        """
        empty = torch.empty(0, dtype=torch.int64, device=user_ids.device)
        rows, items = (empty, empty) if seen is None else _rows_of(seen, user_ids)
        scores = self._scores(user_ids, rows, items, None)
        left = int((scores > -torch.inf).sum(1).min()) if len(scores) else self.num_items
        if not 1 <= k <= left:
            raise ValueError(f"k must be between 1 and {left}, the items left for a user without those seen, got {k}")
        best = scores.topk(k, dim=1)
        return best.indices, best.values

    def _evaluate(self, batch: RankingBatch, metrics: FullRankingMetrics) -> Tensor:
        scores = self._scores(batch.user_ids, batch.seen_rows, batch.seen_ids, batch.candidate_ids)
        metrics.update(scores, batch.target_ids)
        return scores

    def validation_step(self, batch: RankingBatch, batch_idx: int) -> None:
        """Rank the validation items of users."""
        self._evaluate(batch, self.val_metrics)

    def test_step(self, batch: RankingBatch, batch_idx: int) -> None:
        """Rank the test items of users."""
        scores = self._evaluate(batch, self.test_metrics)
        if batch_idx == 0 and self.trainer.is_global_zero:
            show_recommendations(self, batch, scores)

    def _end_evaluation(self, stage: str, metrics: FullRankingMetrics) -> None:
        for name, value in metrics.compute().items():
            key = f"{stage}/{name}"
            self.log(key, value, prog_bar=key == self.monitor)
        metrics.reset()
        self._encoded = None

    def on_validation_epoch_end(self) -> None:
        """Log `val/*`."""
        self._end_evaluation("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Log `test/*`."""
        self._end_evaluation("test", self.test_metrics)

    # Lists for people.

    def on_predict_start(self) -> None:
        """Open `predictions.jsonl` in the run's folder (one file per process, if there are several)."""
        self._predictions.open()

    def predict_step(self, batch: RankingBatch, batch_idx: int) -> dict[str, Tensor]:
        """Best `top_k` items of each user: `user_ids` (batch,), `item_ids` and `scores` (batch, top_k).

        The lists are also written as lines `{"user": ..., "items": [...], "scores": [...]}` with external ids.
        """
        best = self._scores(batch.user_ids, batch.seen_rows, batch.seen_ids, batch.candidate_ids).topk(self.top_k)
        self._predictions.write_top_k(batch.user_ids, best.indices, best.values)
        return {"user_ids": batch.user_ids, "item_ids": best.indices, "scores": best.values}

    def on_predict_end(self) -> None:
        """Close the file."""
        self._predictions.close()
        self._encoded = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the vectors of users and items, and what the features were."""
        if self._prepared or self._restored is not None:
            users, items = self.vectors()
            checkpoint["recommender"] = {"users": users.cpu(), "items": items.cpu(), "features": self._fingerprint}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them.

        Raises:
            ValueError: If features that are already at hand are others than those of the checkpoint.
        """
        found = checkpoint.get("recommender")
        if found is None:
            return
        if self._prepared:
            _compare(found["features"] or {}, self._fingerprint or {})
        self._fingerprint = found["features"]
        self._restored = found["users"], found["items"]


def _compare(trained: Mapping[str, list[float]], given: Mapping[str, list[float]]) -> None:
    if not same_features(trained, given):
        raise ValueError(
            f"the model was trained on other features (norm/checksum: {shown_fingerprint(trained)}) than those given "
            f"({shown_fingerprint(given)}): give the features, and options, of the training"
        )


def _rows_of(pairs: Tensor, user_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs (user id, item id) of the users asked for, as rows of `user_ids` and item ids."""
    owners, order = pairs[0].to(user_ids.device).sort()
    starts = torch.searchsorted(owners, user_ids)
    counts = torch.searchsorted(owners, user_ids, right=True) - starts
    rows = torch.repeat_interleave(counts)
    within = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    return rows, pairs[1].to(user_ids.device)[order[starts[rows] + within]]


__all__ = ["METRICS", "TopNRecommender"]
