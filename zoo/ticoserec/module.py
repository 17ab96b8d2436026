"""TiCoSeRec and its siblings: contrastive sequential recommendation with augmented views."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from zoo.common.artifacts import log_figure
from zoo.common.contrastive import nt_xent, nt_xent_from_similarity
from zoo.common.keyed_random import mix_keys
from zoo.ticoserec.augment import ViewPolicy, describe
from zoo.ticoserec.figures import example_users, plot_views
from zoo.ticoserec.gaps import right_gaps
from zoo.ticoserec.jagged import gather_rows, row_starts, unpad_left
from zoo.ticoserec.losses import view_gram, view_vectors
from zoo.ticoserec.sasrec import Passes, SASRec
from zoo.ticoserec.similarity import (
    METHODS,
    ItemSimilarity,
    hybrid_similarity,
    online_similarity,
    random_neighbours,
)
from zoo.ticoserec.views import ViewTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from zoo.ticoserec.types import SequenceBatch, SequenceTable

_VIEW_STREAM, _SIMILARITY_STREAM = 12, 13


class TiCoSeRec(SASRec):
    """Time-interval-aware contrastive sequential recommendation (Dang et al., AAAI 2023, arXiv 2212.08262).

    L = rec_weight * L_rec + cl_weight * L_cl, where L_cl is NT-Xent between two augmented views of each sequence. Views
    are made where they even out the gaps in time; the users whose gaps are the most even already are left alone.

    Args:
        num_items: Catalogue size V; ids are 1..V and 0 is padding.
        max_length: Longest input L; older items are cut off (after augmentation).
        hidden_size: Width of item vectors and states.
        num_layers: Transformer blocks (GRU layers for "gru4rec").
        num_heads: Attention heads.
        inner_size: Width of the feed-forward layer.
        hidden_dropout: Dropout after embedding, attention and feed-forward.
        attn_dropout: Dropout of attention weights.
        encoder: "sasrec" or "gru4rec".
        rec_loss: "bce", "ce", "gbce" or "sampled_softmax".
        num_negatives: Negatives per position of all losses but "ce".
        gbce_calibration: Calibration t of "gbce".
        exclude_negatives: Items never drawn as negatives: "all" of the user's, or those in "train".
        lr: Learning rate of Adam.
        weight_decay: L2 penalty inside Adam.
        ks: Cut-offs of the metrics.
        evaluation: "masked" or "official" (see `SequentialRecommender`).
        top_k: Length of predicted lists.
        sequences: Training sequences for use without `SequenceData`.
        rec_weight: Weight of the recommendation loss.
        cl_weight: Weight lambda of the contrastive loss; 0 switches it off.
        temperature: Temperature tau of NT-Xent.
        view_repr: What of a view is compared: its states "flatten"ed, the "last" or their "mean".
        pad_outputs: States left of a view's items: "zero", or as in the "official" code, where they attend to the whole
            row (this computes all `max_length` places).
        gather_negatives: Take the other processes' views as negatives too.
        model_warm_up_epochs: First epochs E_m with the recommendation loss alone.
        augmentation_warm_up_epochs: Epochs E_a with the offline similarity; later ones use the hybrid.
        similarity: Offline similarity: "itemcf_iuf", "itemcf", "item2vec" or "random".
        hybrid: "most" compares neighbours by normalised similarity; "official" has the published code's reversed scale.
        exempt_ratio: Share r of users, those with the most even gaps, that is not augmented.
        exempt_mode: Views of an exempt user: the "original" sequence twice, or "zero".
        crop_ratio: Ratio eta of Ti-Crop.
        mask_ratio: Ratio gamma of Ti-Mask.
        reorder_ratio: Ratio beta of Ti-Reorder.
        substitute_ratio: Ratio rho of Ti-Substitute.
        insert_ratio: Ratio mu of Ti-Insert.
        crop_mode: "minimum" or "maximum" gap variance of the kept window.
        reorder_mode: "minimum" or "maximum" gap variance of the shuffled window.
        mask_mode: Masked items: those with the "minimum" or "maximum" right gap, or "random" ones.
        substitute_mode: Replaced items, likewise.
        insert_mode: Items after which one is inserted, likewise.
        short_ops: Operators for users with at most `augment_threshold` items, letters out of SIMRC.
        long_ops: Operators for all other users.
        augment_threshold: Longest short sequence K; -1 gives everybody `long_ops`.
        positions: Places chosen by "time", or "random" (CoSeRec).
        insert_side: New items stand "after" the chosen one, or "before" it (CoSeRec).
        window: Gaps of a window that count: "full", or as in the "official" code.

    Raises:
        ValueError: If a value is out of its range.
    """

    most_similar: Tensor
    similarity_epoch: Tensor
    offline_most_similar: Tensor
    offline_scores: Tensor
    offline_limits: Tensor

    def __init__(
        self,
        num_items: int,
        max_length: int = 50,
        hidden_size: int = 128,
        num_layers: int = 2,
        num_heads: int = 2,
        inner_size: int = 256,
        hidden_dropout: float = 0.5,
        attn_dropout: float = 0.2,
        encoder: str = "sasrec",
        rec_loss: str = "bce",
        num_negatives: int = 1,
        gbce_calibration: float = 0.75,
        exclude_negatives: str = "all",
        lr: float = 1e-3,
        weight_decay: float = 1e-6,
        ks: list[int] = [5, 10, 20],  # noqa: B006 - read only, and a plain YAML value
        evaluation: str = "masked",
        top_k: int = 20,
        sequences: SequenceTable | None = None,
        rec_weight: float = 1.0,
        cl_weight: float = 0.1,
        temperature: float = 1.0,
        view_repr: str = "flatten",
        pad_outputs: str = "zero",
        gather_negatives: bool = True,
        model_warm_up_epochs: int = 40,
        augmentation_warm_up_epochs: int = 80,
        similarity: str = "itemcf_iuf",
        hybrid: str = "most",
        exempt_ratio: float = 0.15,
        exempt_mode: str = "original",
        crop_ratio: float = 0.7,
        mask_ratio: float = 0.5,
        reorder_ratio: float = 0.2,
        substitute_ratio: float = 0.1,
        insert_ratio: float = 0.5,
        crop_mode: str = "minimum",
        reorder_mode: str = "minimum",
        mask_mode: str = "random",
        substitute_mode: str = "minimum",
        insert_mode: str = "maximum",
        short_ops: str = "SIM",
        long_ops: str = "SIMRC",
        augment_threshold: int = 12,
        positions: str = "time",
        insert_side: str = "after",
        window: str = "full",
    ) -> None:
        super().__init__(
            num_items,
            max_length,
            hidden_size,
            num_layers,
            num_heads,
            inner_size,
            hidden_dropout,
            attn_dropout,
            encoder,
            rec_loss,
            num_negatives,
            gbce_calibration,
            exclude_negatives,
            lr,
            weight_decay,
            ks,
            evaluation,
            top_k,
            sequences,
        )
        for name, value, allowed in (
            ("view_repr", view_repr, ("flatten", "last", "mean")),
            ("pad_outputs", pad_outputs, ("zero", "official")),
            ("similarity", similarity, METHODS),
            ("hybrid", hybrid, ("most", "official")),
            ("exempt_mode", exempt_mode, ("original", "zero")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if not 0 <= exempt_ratio <= 1:
            raise ValueError(f"exempt_ratio must lie between 0 and 1, got {exempt_ratio}")
        for name, number in (
            ("rec_weight", rec_weight),
            ("cl_weight", cl_weight),
            ("model_warm_up_epochs", model_warm_up_epochs),
            ("augmentation_warm_up_epochs", augmentation_warm_up_epochs),
        ):
            if number < 0:
                raise ValueError(f"{name} must be at least 0, got {number}")
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if pad_outputs == "official" and encoder != "sasrec":
            raise ValueError('pad_outputs="official" needs encoder="sasrec"')
        self.save_hyperparameters(ignore=["sequences"])
        self.policy = ViewPolicy(
            crop=crop_ratio,
            mask=mask_ratio,
            reorder=reorder_ratio,
            substitute=substitute_ratio,
            insert=insert_ratio,
            crop_mode=crop_mode,
            reorder_mode=reorder_mode,
            mask_mode=mask_mode,
            substitute_mode=substitute_mode,
            insert_mode=insert_mode,
            short_ops=short_ops,
            long_ops=long_ops,
            threshold=augment_threshold,
            positions=positions,
            insert_side=insert_side,
            window=window,
        )
        self.rec_weight, self.cl_weight, self.temperature = rec_weight, cl_weight, temperature
        self.view_repr, self.pad_outputs, self.gather_negatives = view_repr, pad_outputs, gather_negatives
        self.model_warm_up_epochs = model_warm_up_epochs
        self.augmentation_warm_up_epochs = augmentation_warm_up_epochs
        self.similarity, self.hybrid = similarity, hybrid
        self.exempt_ratio, self.exempt_mode = exempt_ratio, exempt_mode
        self.register_buffer("similarity_epoch", torch.tensor(-1))
        self.register_buffer("most_similar", torch.zeros(num_items + 1, dtype=torch.int64))
        self.register_buffer("offline_most_similar", torch.zeros(num_items + 1, dtype=torch.int64))
        self.register_buffer("offline_scores", torch.zeros(num_items + 1))
        self.register_buffer("offline_limits", torch.zeros(2))
        self.views: ViewTable | None = None

    def setup(self, stage: str) -> None:
        """Prepare similarity, gap ranks, windows and exempt users.

        Raises:
            ValueError: If catalogue or lengths differ from the datamodule's, or time stamps are missing.
        """
        super().setup(stage)
        if stage != "fit" or self.cl_weight == 0:
            return
        self._check_schedule()
        table = self.training_sequences()
        times = table.timestamps
        if times is None and self.policy.positions == "time":
            raise ValueError(
                "cl_weight > 0 with positions='time' needs time stamps: give the data a time file or column, or set "
                "--model.positions random"
            )
        # Views are as long as the sequences beside them.
        longest = min(
            self.max_length, getattr(getattr(self.trainer, "datamodule", None), "max_length", self.max_length)
        )
        views = ViewTable(
            table, self.policy, self.num_items, longest, self.exempt_ratio, blank=self.exempt_mode == "zero"
        )
        if self.exempt_ratio > 0 and not bool(views.exempt.any()):
            rank_zero_warn(f"exempt_ratio={self.exempt_ratio} leaves nobody alone: no user's evenness is known")
        item_ids, lengths = views.sequences()
        self.views = views.to(self.device)
        self._leave_to_each_process("views")
        if times is not None and self.policy.positions == "time":
            changes = times.diff()
            changes[table.offsets[1:-1] - 1] = 0
            if not bool(changes.any()):
                rank_zero_warn("all time stamps of every user are equal: choosing by time degenerates to ties")
        self.similarity_epoch.fill_(-1)
        if not self._uses_neighbours():
            return
        offline = ItemSimilarity.fit(item_ids, lengths, self.num_items, self.similarity, int(self.draw_key) % 2**31)
        self.offline_most_similar.copy_(offline.most_similar)
        self.offline_scores.copy_(offline.scores)
        self.offline_limits.copy_(torch.tensor([offline.minimum, offline.maximum]))
        self.most_similar.copy_(offline.most_similar)

    def _uses_neighbours(self) -> bool:
        """Whether any view can hold a substituted or inserted item."""
        operators = {*self.policy.short_ops, *self.policy.long_ops}
        return bool({"S", "I"} & operators) and self.exempt_ratio < 1

    def _check_schedule(self) -> None:
        epochs = self.trainer.max_epochs
        if epochs is not None and 0 <= epochs <= self.model_warm_up_epochs:
            rank_zero_warn(
                f"model_warm_up_epochs={self.model_warm_up_epochs} is not below max_epochs={epochs}: the contrastive "
                "loss never starts"
            )
        if self.augmentation_warm_up_epochs < self.model_warm_up_epochs:
            rank_zero_warn(
                f"augmentation_warm_up_epochs={self.augmentation_warm_up_epochs} is below "
                f"model_warm_up_epochs={self.model_warm_up_epochs}: the offline similarity is never used alone"
            )

    def on_train_start(self) -> None:
        """Draw what each operator does to a few training sequences."""
        super().on_train_start()
        table = self._known_sequences()
        if self.views is None or table is None or table.timestamps is None or not self.trainer.is_global_zero:
            return
        users = example_users(table.train_lengths - 1, self.views.exempt.cpu())
        if len(users):
            log_figure(self, "views", self._plot_views(users, table, table.timestamps))

    def _plot_views(self, users: Tensor, table: SequenceTable, timestamps: Tensor) -> Figure:
        time_lengths, lengths = table.train_lengths[users], table.train_lengths[users] - 1
        times = gather_rows(timestamps, table.offsets[users], time_lengths)
        items = gather_rows(table.item_ids, table.offsets[users], lengths).long()
        sequences = describe(self.policy, items, lengths, times, time_lengths)
        own_times = gather_rows(times, row_starts(time_lengths), lengths)
        gaps = right_gaps(times, time_lengths, lengths).values
        labels = [f"user {user}, {length} items" for user, length in zip(users.tolist(), lengths.tolist(), strict=True)]
        return plot_views(self.policy, sequences, own_times, gaps, self.most_similar.cpu(), labels)

    def on_train_epoch_start(self) -> None:
        """After the similarity warm-up, choose neighbours by the hybrid of offline and current similarity."""
        # A run resumed inside this epoch has the epoch's table in its checkpoint.
        ready = int(self.similarity_epoch) == self.current_epoch
        if ready or self.cl_weight == 0 or self.current_epoch < self.model_warm_up_epochs:
            return
        self.similarity_epoch.fill_(self.current_epoch)
        if not self._uses_neighbours():
            return
        assert self.views is not None
        offline = ItemSimilarity(self.offline_most_similar, self.offline_scores, *self.offline_limits.tolist())
        if self.similarity == "random":
            key = int(mix_keys(_SIMILARITY_STREAM, self.current_epoch, self.draw_key))
            offline = random_neighbours(self.views.sequences()[0], self.num_items, key)
            self.most_similar.copy_(offline.most_similar)
        if self.current_epoch > self.augmentation_warm_up_epochs:
            reverse = self.hybrid == "official"
            online = online_similarity(self.encoder.item_embedding.weight, least=reverse)
            self.most_similar.copy_(hybrid_similarity(offline, online, reverse))

    def draw_views(self, user_ids: Tensor) -> Passes:
        """Two views of each user's training sequence for the current epoch.

        Args:
            user_ids: int64 `(batch,)`, rows of the training table.

        Returns:
            Jagged rows, the first view of every user and then the second of every user, `2 * batch` rows of at most
            `max_length` items.
        """
        if self.views is None:
            raise RuntimeError("the views are prepared in setup('fit'): call it before training steps")
        return Passes(*self.views(user_ids, self.current_epoch, self._key, self.most_similar))

    def _contrastive_loss(self, states: Tensor, lengths: Tensor) -> Tensor:
        """NT-Xent of the views' states, `(items, hidden)` or, with official padding, `(rows, max_length, hidden)`."""
        alone = not self.gather_negatives or self.trainer.world_size == 1
        if alone and self.pad_outputs == "zero" and self.view_repr == "flatten":
            return nt_xent_from_similarity(view_gram(states, lengths, self.max_length) / self.temperature)
        if self.pad_outputs == "zero":
            vectors = view_vectors(states, lengths, self.max_length, self.view_repr)
        elif self.view_repr == "flatten":
            vectors = states.flatten(1)
        else:
            vectors = states[:, -1] if self.view_repr == "last" else states.mean(1)
        first, second = vectors.chunk(2)
        return nt_xent(first, second, self.temperature, gather_distributed=self.gather_negatives)

    def training_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        """Joint loss of the batch; logs `train/*`. Views are built once the model's warm-up is over."""
        item_ids, size = unpad_left(batch.item_ids, batch.lengths), len(batch.lengths)
        if self.cl_weight == 0 or self.current_epoch < self.model_warm_up_epochs:
            rec_loss, _ = self._step(batch, Passes(item_ids, batch.lengths))
            loss = self.rec_weight * rec_loss
            self.log("train/loss", loss, prog_bar=True, batch_size=size)
            self.log("train/rec_loss", rec_loss, batch_size=size)
            return loss
        if size == 1 and not (self.gather_negatives and self.trainer.world_size > 1):
            rank_zero_warn("a batch of one user has no negatives: its contrastive loss is 0")
        views = self.draw_views(batch.user_ids)
        if self.pad_outputs == "zero":
            passes = Passes(torch.cat([item_ids, views.item_ids]), torch.cat([batch.lengths, views.lengths]))
            rec_loss, states = self._step(batch, passes)
        else:
            rec_loss, _ = self._step(batch, Passes(item_ids, batch.lengths))
            states, _ = self.encoder.encode(views.item_ids, views.lengths, pad_rows="official")
        cl_loss = self._contrastive_loss(states, views.lengths)
        loss = self.rec_weight * rec_loss + self.cl_weight * cl_loss
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        self.log("train/rec_loss", rec_loss, batch_size=size)
        self.log("train/cl_loss", cl_loss, prog_bar=True, batch_size=size)
        return loss
