"""SASRec: a self-attentive recommender trained on every position of every sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from zoo.common.keyed_random import mix_keys
from zoo.common.negatives import NegativeSampler
from zoo.ticoserec.encoder import GRU4RecEncoder, SASRecEncoder
from zoo.ticoserec.jagged import gather_rows, row_and_position, unpad_left
from zoo.ticoserec.losses import (
    REC_LOSSES,
    bce_next_item,
    full_softmax_next_item,
    gbce_next_item,
    sampled_softmax_next_item,
)
from zoo.ticoserec.recommender import SequentialRecommender

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler

    from zoo.ticoserec.types import SequenceBatch, SequenceTable

_NEGATIVE_STREAM = 11


class Passes(NamedTuple):
    """What one training step sends through the encoder.

    Attributes:
        item_ids: int64 `(items,)`, the sequences, then the views, if any.
        lengths: int64 `(rows,)`.
    """

    item_ids: Tensor
    lengths: Tensor


class SASRec(SequentialRecommender):
    """Self-attentive sequential recommendation (Kang and McAuley, 2018) in the form of the CoSeRec family.

    Post-norm transformer blocks with GELU, one item table for input and scores, one sampled negative per position and
    binary cross-entropy by default.

    Args:
        num_items: Catalogue size V; ids are 1..V and 0 is padding.
        max_length: Longest input L; older items are cut off.
        hidden_size: Width of item vectors and states.
        num_layers: Transformer blocks (GRU layers for "gru4rec").
        num_heads: Attention heads.
        inner_size: Width of the feed-forward layer.
        hidden_dropout: Dropout after embedding, attention and feed-forward.
        attn_dropout: Dropout of attention weights.
        encoder: "sasrec" or "gru4rec".
        rec_loss: "bce", "ce" (softmax over the whole catalogue), "gbce" or "sampled_softmax".
        num_negatives: Negatives per position of all losses but "ce".
        gbce_calibration: Calibration t of "gbce".
        exclude_negatives: Items never drawn as negatives: "all" of the user's, validation and test items included (as
            the published code does), or those in "train" only.
        lr: Learning rate of Adam.
        weight_decay: L2 penalty inside Adam.
        ks: Cut-offs of the metrics.
        evaluation: "masked" or "official" (see `SequentialRecommender`).
        top_k: Length of predicted lists.
        sequences: Training sequences for use without `SequenceData`.

    Raises:
        ValueError: If a value is out of its range.
    """

    draw_key: Tensor

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
    ) -> None:
        super().__init__(num_items, ks, evaluation, top_k, sequences)
        if rec_loss not in REC_LOSSES:
            raise ValueError(f"rec_loss must be one of {', '.join(REC_LOSSES)}, got {rec_loss!r}")
        if encoder not in ("sasrec", "gru4rec"):
            raise ValueError(f"encoder must be sasrec or gru4rec, got {encoder!r}")
        if exclude_negatives not in ("all", "train"):
            raise ValueError(f"exclude_negatives must be all or train, got {exclude_negatives!r}")
        if num_negatives < 1:
            raise ValueError(f"num_negatives must be at least 1, got {num_negatives}")
        if not 0 <= gbce_calibration <= 1:
            raise ValueError(f"gbce_calibration must lie between 0 and 1, got {gbce_calibration}")
        if lr <= 0 or weight_decay < 0:
            raise ValueError(f"lr must be positive and weight_decay at least 0, got {lr} and {weight_decay}")
        self.save_hyperparameters(ignore=["sequences"])
        self.max_length, self.lr, self.weight_decay = max_length, lr, weight_decay
        self.rec_loss, self.num_negatives, self.gbce_calibration = rec_loss, num_negatives, gbce_calibration
        self.exclude_negatives = exclude_negatives
        self.encoder: SASRecEncoder | GRU4RecEncoder
        if encoder == "sasrec":
            self.encoder = SASRecEncoder(
                num_items, max_length, hidden_size, num_layers, num_heads, inner_size, hidden_dropout, attn_dropout
            )
        else:
            self.encoder = GRU4RecEncoder(num_items, max_length, hidden_size, num_layers, hidden_dropout)
        # Key of all keyed draws: from the seed at construction, and the same again in a resumed run.
        self.register_buffer("draw_key", torch.randint(2**62, ()))
        self._key = int(self.draw_key)
        self.negatives: NegativeSampler | None = None

    def setup(self, stage: str) -> None:
        """Prepare the negatives.

        Raises:
            ValueError: If catalogue or input length differ from the datamodule's.
        """
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        longest = getattr(data, "max_length", self.max_length)
        if longest > self.max_length:
            raise ValueError(
                f"the model takes at most max_length={self.max_length} items, but the data has max_length={longest}: "
                f"set --data.max_length {self.max_length} or train with --model.max_length {longest}"
            )
        if stage == "fit" and self.rec_loss != "ce":
            table = self.training_sequences()
            lengths = table.offsets.diff()
            item_ids = table.item_ids
            if self.exclude_negatives == "train":
                item_ids = gather_rows(item_ids, table.offsets[:-1], table.train_lengths)
                lengths = table.train_lengths
            users, _ = row_and_position(lengths)
            self.negatives = NegativeSampler(users, item_ids, self.num_items, first_item=1).to(self.device)
            self._leave_to_each_process("negatives")

    def _leave_to_each_process(self, name: str) -> None:
        """Keep tables that never change out of DDP's broadcast of buffers before every step."""
        ignored = getattr(self, "_ddp_params_and_buffers_to_ignore", [])
        names = [key for key, _ in self.named_buffers() if key.startswith(f"{name}.")]
        self._ddp_params_and_buffers_to_ignore = sorted({*ignored, *names})

    def on_train_start(self) -> None:
        """Take the key of all draws from the module or its checkpoint, once, as reading it waits for the device."""
        self._key = int(self.draw_key)

    def forward(self, item_ids: Tensor, lengths: Tensor) -> Tensor:
        """States `(batch, width, hidden)` of left-padded histories `(batch, width)`; zeros at padding.

        Of histories longer than `max_length` the last `max_length` items count, and the width is `max_length`.
        """
        item_ids, lengths = self._newest(item_ids, lengths)
        states: Tensor = self.encoder(item_ids, lengths)
        return states

    def encode(self, item_ids: Tensor, lengths: Tensor) -> Tensor:
        """State after the last item, `(batch, hidden)`; zeros for an empty history."""
        item_ids, lengths = self._newest(item_ids, lengths)
        states, _ = self.encoder.encode(unpad_left(item_ids, lengths), lengths)
        if not len(states):
            return states.new_zeros(len(lengths), self.encoder.hidden_size)
        last = states[(lengths.cumsum(0) - 1).clamp(min=0)]
        return torch.where(lengths[:, None] > 0, last, 0.0)

    def _newest(self, item_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return item_ids[:, -self.max_length :], lengths.clamp(max=self.max_length)

    def score(self, item_ids: Tensor, lengths: Tensor) -> Tensor:
        """Scores of all items `(batch, num_items + 1)` in fp32: in bf16 most of them would tie."""
        states = self.encode(item_ids, lengths)
        with torch.autocast(states.device.type, enabled=False):
            return states.float() @ self.encoder.item_embedding.weight.float().T

    def _rec_loss(self, states: Tensor, target_ids: Tensor, vectors: Tensor) -> Tensor:
        """Recommendation loss of positions: states `(T, H)`, vectors of targets and negatives `(T * (1 + K), H)`."""
        if self.rec_loss == "ce":
            return full_softmax_next_item(states, self.encoder.item_embedding.weight, target_ids)
        count, width = states.shape
        states, vectors = states.float(), vectors.float()
        positive = (states * vectors[:count]).sum(-1)
        negative = (states[:, None] * vectors[count:].view(count, -1, width)).sum(-1)
        if self.rec_loss == "bce":
            return bce_next_item(positive, negative)
        if self.rec_loss == "gbce":
            return gbce_next_item(positive, negative, self.num_items, self.gbce_calibration)
        return sampled_softmax_next_item(positive, negative)

    def _lookups(self, batch: SequenceBatch, target_ids: Tensor, positions: Tensor) -> Tensor | None:
        """Ids of targets `(T,)` and their negatives `(T * K,)`, in one tensor; None where the loss needs neither.

        `positions` `(T,)` are the targets' places in the jagged batch.
        """
        if self.rec_loss == "ce":
            return None
        if self.negatives is None:
            raise RuntimeError("the negatives are prepared in setup('fit'): call it before training steps")
        rows, places = row_and_position(batch.lengths)
        users = batch.user_ids[rows[positions]]
        keys = mix_keys(self._key, _NEGATIVE_STREAM, self.current_epoch, users, places[positions])
        drawn = self.negatives(users, keys, self.num_negatives)
        return torch.cat([target_ids, drawn.flatten()])

    def training_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        """Loss of the batch's positions; logs `train/*`."""
        loss, _ = self._step(batch, Passes(unpad_left(batch.item_ids, batch.lengths), batch.lengths))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.lengths))
        return loss

    def _step(self, batch: SequenceBatch, passes: Passes) -> tuple[Tensor, Tensor]:
        """Recommendation loss, and the states of the rows of `passes` that follow the batch's own."""
        all_targets = unpad_left(batch.target_ids, batch.lengths)
        positions = all_targets.nonzero().squeeze(1)
        target_ids = all_targets[positions]
        lookups = self._lookups(batch, target_ids, positions)
        states, vectors = self.encoder.encode(passes.item_ids, passes.lengths, lookups)
        loss = self._rec_loss(states[positions], target_ids, vectors) * self._share(len(positions))
        return loss, states[len(all_targets) :]

    def _share(self, positions: int) -> Tensor | float:
        """Weight that makes the mean over processes the mean over all their positions, which differ in number."""
        if self.trainer.world_size == 1:
            return 1.0
        local = torch.tensor(float(positions), device=self.device)
        mean: Tensor = self.trainer.strategy.reduce(local.clone(), reduce_op="mean")
        return local / mean

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam with L2 weight decay inside, as published."""
        # torch's fused Adam cannot be combined with gradient clipping under mixed precision.
        fused = not getattr(self._trainer, "gradient_clip_val", None)
        return torch.optim.Adam(self.parameters(), lr=self.lr, weight_decay=self.weight_decay, fused=fused)
