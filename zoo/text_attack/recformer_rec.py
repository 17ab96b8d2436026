"""RecFormerRec: recommendation by the cosine of a history's vector and an item's, both read from titles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.common.contrastive import info_nce
from zoo.common.evaluation import evaluation
from zoo.common.schedules import WarmupLinear
from zoo.text_attack.masked_titles import MaskedTitles
from zoo.text_attack.recformer import ItemSequence, RecFormer, item_sequences
from zoo.text_attack.retrieval_metrics import RetrievalMetrics
from zoo.text_attack.two_stage import TwoStage
from zoo.text_attack.victim import TextRecVictim, decay_groups

if TYPE_CHECKING:
    from torchmetrics import Metric

    from zoo.text_attack.types import RecBatch

OBJECTIVES = ("inbatch", "full_softmax")
ATTRIBUTE = "title"


class RecFormerRec(TextRecVictim):
    """RecFormer on titles (Li et al. 2023; victim of arXiv 2402.14836): score(user, item) = cosine of two vectors.

    Args:
        num_items: Items of the catalogue; needed by "full_softmax", which keeps a table of their vectors.
        backbone: "tiny" (fresh, small), or a folder or hub id of a Longformer or RoBERTa.
        backbone_options: Of "tiny" (see `RecFormer`).
        tokenizer: "train" for byte pairs learnt from the titles, or a folder or hub id; that of the backbone where it
            has one and none is given.
        vocab_size: Most tokens of a learnt tokenizer.
        max_attr_length: Tokens of an item, the attribute's name included.
        max_items: Newest items of a history that are read.
        max_tokens: Tokens of a history.
        temperature: Divides cosines in the loss.
        objective: "inbatch" (the other items of the batch are negatives, on all processes; trains from scratch) or
            "full_softmax" (all items are, by vectors that are computed anew in each epoch; fine-tunes).
        two_stage: With "full_softmax": when validation stops improving, go back to the best epoch, keep the items'
            vectors of then, and train on (section 3.4 of RecFormer's paper).
        patience: Validations without improvement after which the first stage, and the second, ends.
        mlm_weight: Weight of a masked language model's loss on histories and items (0.1 in pre-training).
        mlm_probability: Share of words that are masked for it.
        mask_seen: Whether evaluation takes items of the history out of the ranking.
        length_groups: Groups of about one length in which the histories of a training batch go through the encoder: the
            same loss with less padding. Pays where a step is long against the start of its operations.
        encode_batch: Sequences that go through the encoder at once where no gradient is needed.
        top_k: Length of predicted lists.
        lr: Highest learning rate of AdamW.
        weight_decay: Decoupled; not on vectors.
        warmup_ratio: Share of the steps in which the rate rises; it falls to 0 in the others.

    Raises:
        ValueError: If an argument is out of its range.
    """

    kind = "retrieval"
    monitor = "val/ndcg@10"

    title_ids: Tensor
    title_lengths: Tensor
    item_ids: Tensor
    item_lengths: Tensor
    item_table: Tensor

    def __init__(
        self,
        num_items: int | None = None,
        backbone: str = "tiny",
        backbone_options: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        vocab_size: int = 2000,
        max_attr_length: int = 32,
        max_items: int = 50,
        max_tokens: int = 1024,
        temperature: float = 0.05,
        objective: str = "inbatch",
        two_stage: bool = False,
        patience: list[int] = [5, 3],  # noqa: B006 - a plain value, never changed
        mlm_weight: float = 0.0,
        mlm_probability: float = 0.15,
        mask_seen: bool = False,
        length_groups: int = 1,
        encode_batch: int = 512,
        top_k: int = 10,
        lr: float = 5e-5,
        weight_decay: float = 0.0,
        warmup_ratio: float = 0.05,
    ) -> None:
        if tokenizer is None:
            tokenizer = "train" if backbone == "tiny" else backbone
        super().__init__(tokenizer, vocab_size, WarmupLinear(warmup_ratio), extra_texts=[ATTRIBUTE])
        self.save_hyperparameters()
        if objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
        if two_stage and objective != "full_softmax":
            raise ValueError("two_stage keeps the items' vectors of the best epoch: it needs objective='full_softmax'")
        if objective == "full_softmax" and (num_items is None or num_items < 1):
            raise ValueError("objective='full_softmax' needs num_items, the size of the catalogue")
        for name, value in (("temperature", temperature), ("lr", lr)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if min(mlm_weight, weight_decay) < 0:
            raise ValueError(f"mlm_weight and weight_decay must not be negative, got {mlm_weight}, {weight_decay}")
        if min(length_groups, encode_batch, top_k) < 1 or max_attr_length < 2:
            raise ValueError(
                f"length_groups, encode_batch and top_k must be at least 1 and max_attr_length 2, got {length_groups}, "
                f"{encode_batch}, {top_k}, {max_attr_length}"
            )
        self.max_attr_length, self.max_items, self.max_tokens = max_attr_length, max_items, max_tokens
        self.temperature, self.objective, self.mask_seen = temperature, objective, mask_seen
        self.length_groups, self.encode_batch, self.top_k = length_groups, encode_batch, top_k
        self.lr, self.weight_decay = lr, weight_decay
        pad_id, size = 0, vocab_size
        if tokenizer != "train":
            pad_id, size = int(self.tokenizer.pad_token_id), len(self.tokenizer)
            if mlm_weight and self.tokenizer.mask_token_id is None:
                raise ValueError(f"mlm_weight needs a tokenizer with a mask token, that of {tokenizer} has none")
        self.recformer = RecFormer(backbone, backbone_options, size, max_items, max_tokens, pad_id)
        self.mlm_weight = mlm_weight
        self.masked_titles = MaskedTitles(self.recformer, mlm_probability) if mlm_weight else None
        for name in ("title", "item"):
            self.register_buffer(f"{name}_ids", torch.zeros(0, max_attr_length, dtype=torch.int64), persistent=False)
            self.register_buffer(f"{name}_lengths", torch.zeros(0, dtype=torch.int64), persistent=False)
        table = torch.zeros(num_items or 0, self.recformer.hidden_size) if objective == "full_softmax" else None
        self.register_buffer("item_table", table)
        self.stages = TwoStage(self.recformer, table, patience) if two_stage and table is not None else None
        self._item_vectors: Tensor | None = None

    def tokenizer_changed(self) -> None:
        """Cut the attribute's name into tokens."""
        tokenizer = self.tokenizer
        self._start_id = next(i for i in (tokenizer.bos_token_id, tokenizer.cls_token_id, 0) if i is not None)
        self._key = tokenizer(ATTRIBUTE, add_special_tokens=False)["input_ids"]

    def read_titles(self) -> None:
        """Cut the titles into tokens.

        Raises:
            ValueError: If nothing but the attribute's name fits into `max_attr_length`.
        """
        if len(self._key) >= self.max_attr_length:
            raise ValueError(
                f"max_attr_length is {self.max_attr_length}, but the attribute's name {ATTRIBUTE!r} takes "
                f"{len(self._key)} tokens of it and leaves none to the titles: make it larger"
            )
        self.title_ids, self.title_lengths = self._on_device(self.history_titles)
        own = self.item_titles
        same = own == self.history_titles
        self.item_ids, self.item_lengths = (self.title_ids, self.title_lengths) if same else self._on_device(own)
        self._item_vectors = None

    def _on_device(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        ids, lengths = self.title_tokens(texts)
        return ids.to(self.device), lengths.to(self.device)

    def title_tokens(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Tokens `(texts, max_attr_length)` of items with these titles, the attribute's name first, and how many."""
        rows = [[*self._key, *pieces][: self.max_attr_length] for pieces in self.pieces(texts)]
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        ids = torch.full((len(rows), self.max_attr_length), self.recformer.pad_id)
        flat = torch.tensor([i for row in rows for i in row], dtype=torch.int64)
        ids[torch.arange(self.max_attr_length) < lengths[:, None]] = flat
        return ids, lengths

    def readable(self, text: str) -> int:
        """Characters before the cut at `max_attr_length` tokens."""
        return self.readable_characters(text, self.max_attr_length - len(self._key))

    def history_sequences(self, history: Tensor) -> ItemSequence:
        """Token sequences of histories `(batch, length)` of item ids, newest first, -1 for none."""
        history = history[:, : self.max_items]
        items = history.clamp(min=0)
        lengths = self.title_lengths[items].masked_fill(history < 0, 0)
        return self._sequences(self.title_ids[items], lengths)

    def _sequences(self, tokens: Tensor, lengths: Tensor) -> ItemSequence:
        return item_sequences(tokens, lengths, len(self._key), self.max_tokens, self._start_id, self.recformer.pad_id)

    def item_sequences(self, tokens: Tensor, lengths: Tensor) -> ItemSequence:
        """Sequences of one item each, from `(batch, width)` tokens."""
        return self._sequences(tokens[:, None], lengths[:, None])

    def vectors(self, sequence: ItemSequence) -> Tensor:
        """Unit vectors `(batch, hidden_size)`, in float32 also under autocast."""
        return F.normalize(self.recformer(sequence).float(), dim=-1)

    def history_vectors(self, history: Tensor, groups: int) -> Tensor:
        """Unit vectors `(batch, hidden_size)` of histories (see `history_sequences`), encoded in groups by length."""
        history = history[:, : self.max_items]
        tokens = self.title_lengths[history.clamp(min=0)].masked_fill(history < 0, 0).sum(1)
        order = tokens.argsort(stable=True)
        parts = order.tensor_split(max(1, min(groups, len(order))))
        found = torch.cat([self.vectors(self.history_sequences(history[rows])) for rows in parts])
        return found[order.argsort()]

    def _cosines(self, users: Tensor, items: Tensor) -> Tensor:
        # In float32 also under autocast: rounded cosines tie.
        with torch.autocast(self.device.type, enabled=False):
            return users @ items.float().T

    def loss(self, batch: RecBatch) -> Tensor:
        """Cross-entropy of the next item; with `mlm_weight` also of masked words."""
        # The weights are about to change.
        self._item_vectors = None
        users = self.history_vectors(batch.history, self.length_groups)
        if self.objective == "inbatch":
            alone = self.item_sequences(self.item_ids[batch.item_ids], self.item_lengths[batch.item_ids])
            items = self.vectors(alone)
            # In-batch negatives, equal items no negatives of each other.
            loss = info_nce(users, items, self.temperature, gather_distributed=True, sample_ids=batch.item_ids)
        else:
            alone = None
            loss = F.cross_entropy(self._cosines(users, self.item_table) / self.temperature, batch.item_ids)
        if self.masked_titles is not None:
            histories = self.history_sequences(batch.history)
            sequences = [histories] if alone is None else [histories, alone]
            masked = torch.stack([self.masked_titles(sequence, self.tokenizer) for sequence in sequences]).mean()
            loss = loss + self.mlm_weight * masked
        return loss

    def begin_epoch(self) -> None:
        """Compute the table of the items' vectors, unless the first stage is over.

        Raises:
            ValueError: If `num_items` is not the size of the catalogue.
        """
        if self.objective == "full_softmax" and (self.stages is None or not self.stages.frozen):
            if len(self.item_table) != len(self.titles):
                raise ValueError(
                    f"num_items is {len(self.item_table)}, but the catalogue has {len(self.titles)} titles"
                )
            self.item_table.copy_(self.encode_items())

    @torch.no_grad()
    def encode_items(self, texts: list[str] | None = None) -> Tensor:
        """Unit vectors `(items, hidden_size)` of the catalogue, or of texts; float32, evaluation mode."""
        if texts is None:
            ids, lengths = self.item_ids, self.item_lengths
        else:
            ids, lengths = self._on_device(texts)
        with evaluation(self), torch.autocast(self.device.type, enabled=False):
            parts = zip(torch.split(ids, self.encode_batch), torch.split(lengths, self.encode_batch), strict=True)
            return torch.cat([self.vectors(self.item_sequences(*part)) for part in parts])

    @torch.no_grad()
    def user_state(self, batch: RecBatch) -> Tensor:
        """Unit vectors `(users, hidden_size)` of histories; float32, evaluation mode."""
        history = batch.history.to(self.device)
        with evaluation(self), torch.autocast(self.device.type, enabled=False):
            return self.history_vectors(history, -(-len(history) // self.encode_batch))

    def score(self, users: Tensor, texts: list[str], item_ids: Tensor | None = None) -> Tensor:
        """Cosines `(users, texts)`."""
        return self._cosines(users, self.encode_items(texts))

    def item_vectors(self) -> Tensor:
        """`encode_items()`, kept until weights or titles change."""
        if self._item_vectors is None:
            self._item_vectors = self.encode_items()
        return self._item_vectors

    @torch.no_grad()
    def score_items(self, users: Tensor, item_ids: Tensor) -> Tensor:
        """Cosines `(users, M)`."""
        return (self.item_vectors()[item_ids] * users[:, None]).sum(-1)

    def begin_evaluation(self, stage: str) -> None:
        """Forget the items' vectors of earlier weights."""
        self._item_vectors = None
        super().begin_evaluation(stage)

    def new_metrics(self) -> dict[str, Metric]:
        """Ranking metrics over the catalogue."""
        return {"ranking": RetrievalMetrics()}

    def update_metrics(self, metrics: dict[str, Metric], batch: RecBatch) -> None:
        """Rank the catalogue for each user."""
        metrics["ranking"].update(self.catalogue_scores(batch), batch.item_ids)

    def catalogue_scores(self, batch: RecBatch) -> Tensor:
        """Scores `(users, items)` of the whole catalogue, `-inf` for what `mask_seen` leaves out."""
        scores = self._cosines(self.user_state(batch), self.item_vectors())
        if self.mask_seen:
            # The item that is asked about stays, also where the user had it before; padding goes to one more column.
            own = scores.gather(1, batch.item_ids[:, None])
            seen = torch.where(batch.history < 0, scores.shape[1], batch.history)
            scores = F.pad(scores, (0, 1)).scatter(1, seen, -torch.inf)[:, :-1].scatter(1, batch.item_ids[:, None], own)
        return scores

    def after_validation(self, values: dict[str, Tensor]) -> bool:
        """Go to the next stage where it is time; whether the training is over."""
        if self.stages is None:
            return False
        self.stages.step(float(values["ndcg@10"]), self.recformer, self.item_table)
        return self.stages.over

    def predict_step(self, batch: RecBatch, batch_idx: int) -> dict[str, Tensor]:
        """The `top_k` best items of each user: `item_ids` and `scores` `(batch, top_k)`."""
        with evaluation(self):
            scores = self.catalogue_scores(batch)
        best = scores.topk(min(self.top_k, scores.shape[1]), dim=1)
        self._predictions.write_top_k(batch.user_ids, best.indices, best.values)
        return {"user_ids": batch.user_ids, "item_ids": best.indices, "scores": best.values}

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(decay_groups(list(self.named_parameters()), self.weight_decay), lr=self.lr)
