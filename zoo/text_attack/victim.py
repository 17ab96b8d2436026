"""What the victims share: a catalogue of titles, a tokenizer, scores of users for texts, and the steps of training."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from zoo.common.evaluation import evaluation
from zoo.common.predictions import PredictionFile
from zoo.common.schedules import fit_schedule
from zoo.text_attack.tokenizers import build_tokenizer, encode_plain, tokenizer_from_text, tokenizer_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lightning.pytorch.utilities.types import OptimizerLRScheduler
    from torchmetrics import Metric

    from zoo.common.schedules import Schedule
    from zoo.text_attack.types import RecBatch

log = logging.getLogger(__name__)


class RecommenderModule(LightningModule):
    """The steps of training and evaluating a recommender that reads titles: itself, or the one that it holds."""

    monitor_mode = "max"

    @property
    def recommender(self) -> TextRecVictim:
        """What is trained and evaluated."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Give the recommender the catalogue's titles, and a tokenizer if it has none.

        Raises:
            ValueError: If there is neither a datamodule with `titles` nor a catalogue.
        """
        self.recommender.prepare(getattr(self.trainer, "datamodule", None))

    def on_train_start(self) -> None:
        """Fit the schedule to the length of the training."""
        fit_schedule(self, self.recommender.schedule)

    def on_train_batch_start(self, batch: RecBatch, batch_idx: int) -> None:
        """Do what an epoch begins with."""
        # Not when the epoch starts: a run resumed from the last batch of an epoch begins the next one without that.
        if not batch_idx:
            self.recommender.begin_epoch()

    def training_step(self, batch: RecBatch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        loss = self.recommender.loss(batch)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch.item_ids))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Do once what does not depend on the batch."""
        self.recommender.begin_evaluation("val")

    def validation_step(self, batch: RecBatch, batch_idx: int) -> None:
        """Count a batch of the validation."""
        self.recommender.evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Log `val/*`, and stop where the recommender says so."""
        values = self.recommender.end_evaluation()
        self.log_metrics("val", values)
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self.trainer.should_stop = self.trainer.should_stop or self.recommender.after_validation(values)

    def log_metrics(self, stage: str, values: dict[str, Tensor]) -> None:
        """Log values that all processes agree on."""
        for name, value in values.items():
            key = f"{stage}/{name}"
            self.log(key, value, prog_bar=key == self.recommender.monitor)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The recommender's optimizer, with a schedule by step."""
        optimizer, schedule = self.recommender.optimizer(), self.recommender.schedule
        # Resolved here: a schedule belongs to its module, and not to a copy in the scheduler's state.
        scheduler = LambdaLR(optimizer, schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class TextRecVictim(RecommenderModule):
    """A recommender that reads the titles of items, and can be asked how a title would do.

    A subclass sets `kind` and has `loss`, `user_state`, `score`, `new_metrics`, `update_metrics` and `optimizer`.

    Args:
        tokenizer: "train" for byte pairs learnt from the catalogue's titles, or a folder or hub id.
        vocab_size: Most tokens of a tokenizer that is learnt.
        schedule: Factor of the learning rate at a step.
        extra_tokens: Special tokens that the tokenizer needs besides.
        extra_texts: Texts beside the titles that a tokenizer is learnt from.

    Attributes:
        kind: "retrieval" (a vector for each user and item) or "pointwise" (a prompt for each pair).
        titles: The catalogue, by item id.
        defense: What titles pass through before they are read, if anything.
    """

    kind: ClassVar[Literal["retrieval", "pointwise"]]
    monitor = "val/ndcg@10"

    def __init__(
        self,
        tokenizer: str,
        vocab_size: int,
        schedule: Schedule,
        extra_tokens: Sequence[str] = (),
        extra_texts: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.tokenizer_name, self.max_vocab_size = tokenizer, vocab_size
        self.schedule = schedule
        self.extra_tokens, self.extra_texts = tuple(extra_tokens), tuple(extra_texts)
        self.titles: list[str] = []
        self.defense: Callable[[list[str]], list[str]] | None = None
        self._replaced: dict[int, str] = {}
        self._replaced_in_history = False
        self._tokenizer: Any = None
        self._metrics: dict[str, dict[str, Metric]] = {}
        self._stage = "val"
        self._predictions = PredictionFile(self)
        # From a checkpoint or a hub it is the same for all data; a learnt one waits for the titles.
        if tokenizer != "train":
            self.tokenizer = build_tokenizer(tokenizer, extra_tokens=extra_tokens)

    @property
    def recommender(self) -> TextRecVictim:
        """Itself."""
        return self

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers.

        Raises:
            RuntimeError: If it is to be learnt and no titles have come yet.
        """
        if self._tokenizer is None:
            raise RuntimeError(
                f"{type(self).__name__} has no tokenizer yet: it learns one from the titles of the datamodule or of "
                "set_titles(titles), or takes that of a checkpoint"
            )
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.tokenizer_changed()

    def tokenizer_changed(self) -> None:
        """Called when there is a tokenizer: for what depends on it alone."""

    def prepare(self, data: Any) -> None:
        """Take the catalogue of a datamodule.

        Raises:
            ValueError: If it has none and none was set before.
        """
        titles = getattr(data, "titles", None)
        wanted = {"retrieval": "sequence", "pointwise": "yesno"}[self.kind]
        mode = getattr(data, "mode", wanted)
        if mode != wanted:
            raise ValueError(f"{type(self).__name__} needs --data.mode {wanted}, got {mode}")
        if titles is not None:
            if titles != self.titles:
                self.set_titles(titles)
        elif not self.titles:
            raise ValueError(
                f"{type(self).__name__} reads titles: give a datamodule that has them (such as TextRecData), or call "
                "set_titles(titles)"
            )

    def set_titles(self, titles: Sequence[str]) -> None:
        """Take a catalogue: titles by item id. A tokenizer that is to be learnt is learnt from the first one.

        Raises:
            ValueError: If it is empty.
        """
        if not titles:
            raise ValueError("a catalogue needs a title at least")
        self.titles, self._replaced = list(titles), {}
        if self._tokenizer is None:
            self.tokenizer = build_tokenizer(
                self.tokenizer_name, [*self.titles, *self.extra_texts], self.max_vocab_size, self.extra_tokens
            )
        self._read()

    def _read(self) -> None:
        # What is made in a test must serve a later training, which cannot use tensors of inference mode.
        with torch.inference_mode(False):
            self.read_titles()

    def read_titles(self) -> None:
        """Called when titles, tokenizer or defence have changed: cut the titles into tokens, once.

        `item_titles` are those of items by themselves, `history_titles` those of items in histories.
        """
        raise NotImplementedError

    def put_titles(self, replaced: Mapping[int, str] | None, in_history: bool = False) -> None:
        """Give items other titles, or all of them their own back.

        Args:
            replaced: Titles by item id; None for the catalogue's own.
            in_history: Whether histories hold them as well.

        Raises:
            ValueError: If an item is not in the catalogue.
        """
        unknown = [item for item in replaced or {} if not 0 <= item < len(self.titles)]
        if unknown:
            raise ValueError(f"items {unknown} are not in the catalogue, whose ids are 0..{len(self.titles) - 1}")
        self._replaced, self._replaced_in_history = dict(replaced or {}), in_history
        self._read()

    @property
    def item_titles(self) -> list[str]:
        """Titles of items by themselves."""
        return [self._replaced.get(item, title) for item, title in enumerate(self.titles)]

    @property
    def history_titles(self) -> list[str]:
        """Titles of items in histories."""
        return self.item_titles if self._replaced_in_history else self.titles

    def defended(self, texts: Sequence[str]) -> list[str]:
        """Texts as the victim sees them."""
        return list(texts) if self.defense is None else self.defense(list(texts))

    def with_defense(self, defense: Callable[[list[str]], list[str]] | None) -> TextRecVictim:
        """Put a defence before the titles, or take it away; returns itself.

        Args:
            defense: From titles to titles, for the catalogue's and for those that are scored.
        """
        self.defense = defense
        if self.titles:
            self._read()
        return self

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of defended texts, without special tokens."""
        return encode_plain(self.tokenizer, self.defended(texts))

    def readable(self, text: str) -> int:
        """How many characters of a title the victim reads: what comes later changes nothing."""
        raise NotImplementedError

    def readable_characters(self, text: str, max_pieces: int) -> int:
        """Characters of a text that its first `max_pieces` pieces cover; all of them behind a defence."""
        if self.defense is not None:
            return len(text)
        encoding = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )
        spans = encoding["offset_mapping"]
        return len(text) if len(spans) <= max_pieces else (int(spans[max_pieces - 1][1]) if max_pieces > 0 else 0)

    def loss(self, batch: RecBatch) -> Tensor:
        """Training loss of a batch."""
        raise NotImplementedError

    def begin_epoch(self) -> None:
        """Called before the first batch of an epoch of training."""

    def after_validation(self, values: dict[str, Tensor]) -> bool:
        """Called with the values of a validation during training; whether the training is over."""
        return False

    def user_state(self, batch: RecBatch) -> Any:
        """What `score` needs of the users of a batch; no gradient, evaluation mode."""
        raise NotImplementedError

    def score(self, users: Any, texts: list[str], item_ids: Tensor | None = None) -> Tensor:
        """How users would like items of these titles: float32 `(users, texts)`, higher is better.

        No gradient, evaluation mode, the same every time.

        Args:
            users: Of `user_state`.
            texts: Titles.
            item_ids: int64 `(texts,)`, the items whose titles they are, for victims that know more of an item.
        """
        raise NotImplementedError

    def score_items(self, users: Any, item_ids: Tensor) -> Tensor:
        """Scores `(users, M)` of items of the catalogue, `item_ids` int64 `(users, M)`."""
        raise NotImplementedError

    def new_metrics(self) -> dict[str, Metric]:
        """Metrics of an evaluation, by the name of their value; those that return a dict name their values."""
        raise NotImplementedError

    def update_metrics(self, metrics: dict[str, Metric], batch: RecBatch) -> None:
        """Count a batch."""
        raise NotImplementedError

    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of its parameters."""
        raise NotImplementedError

    def begin_evaluation(self, stage: str) -> None:
        """Start metrics anew."""
        self._stage = stage
        if stage not in self._metrics:
            self._metrics[stage] = self.new_metrics()
        for metric in self._metrics[stage].values():
            metric.reset()
            metric.to(self.device)

    @torch.no_grad()
    def evaluate(self, batch: RecBatch) -> None:
        """Count a batch of the evaluation that has begun."""
        with evaluation(self):
            self.update_metrics(self._metrics[self._stage], batch)

    def end_evaluation(self) -> dict[str, Tensor]:
        """Values by name, over all processes."""
        values: dict[str, Tensor] = {}
        for name, metric in self._metrics[self._stage].items():
            value = metric.compute()
            values.update(value if isinstance(value, dict) else {name: value})
            metric.reset()
        return values

    def on_test_epoch_start(self) -> None:
        """Do once what does not depend on the batch."""
        self.begin_evaluation("test")

    def test_step(self, batch: RecBatch, batch_idx: int) -> None:
        """Count a batch of the test."""
        self.evaluate(batch)

    def on_test_epoch_end(self) -> None:
        """Log `test/*`."""
        self.log_metrics("test", self.end_evaluation())

    def on_predict_start(self) -> None:
        """Start `predictions.jsonl`."""
        self._predictions.open()
        self.begin_evaluation("val")

    def on_predict_end(self) -> None:
        """End `predictions.jsonl`."""
        self._predictions.close()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the tokenizer, the catalogue's titles, and what kind of victim this is."""
        checkpoint["victim"] = type(self).__name__
        checkpoint["titles"] = list(self.titles)
        if self._tokenizer is not None:
            checkpoint["tokenizer"] = tokenizer_text(self._tokenizer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the tokenizer of the checkpoint, and its titles where there are no others."""
        text = checkpoint.get("tokenizer")
        if text is not None:
            self.tokenizer = tokenizer_from_text(text)
        self.titles = self.titles or list(checkpoint.get("titles") or [])
        if self.titles and self._tokenizer is not None:
            self._read()


def decay_groups(parameters: Sequence[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: `weight_decay` for matrices, none for vectors (biases and norms)."""
    trained = [parameter for _, parameter in parameters if parameter.requires_grad]
    groups = (
        ([parameter for parameter in trained if parameter.ndim > 1], weight_decay),
        ([parameter for parameter in trained if parameter.ndim <= 1], 0.0),
    )
    return [{"params": chosen, "weight_decay": decay} for chosen, decay in groups if chosen]
