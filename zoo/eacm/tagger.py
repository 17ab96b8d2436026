"""A classifier of emotions: labels corpora, and judges the emotion of replies."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from lightning import LightningModule
from torch import Tensor, nn

from zoo.common.distributed import global_mean
from zoo.common.evaluation import evaluation
from zoo.common.predictions import PredictionFile
from zoo.eacm.emotion_metrics import Head, SelectorMetrics
from zoo.eacm.pooling import SelfAttentionPooling
from zoo.eacm.selector import HEADS, emotion_losses
from zoo.eacm.text_encoders import WORD_ENCODERS, PretrainedEncoder, WordEncoder
from zoo.eacm.types import EOS_ID
from zoo.eacm.vocabulary import DialogueVocabulary

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zoo.eacm.types import Dialogues

log = logging.getLogger(__name__)

SIDES = ("post", "reply", "both")


class Tags(NamedTuple):
    """Emotions of texts.

    Attributes:
        primary: int64 `(texts,)`, the class with the highest probability.
        secondary: int64 `(texts,)`, the second one where its probability is above the threshold, otherwise 0 (none).
        probabilities: float32 `(texts, num_emotions)`.
    """

    primary: Tensor
    secondary: Tensor
    probabilities: Tensor


class EmotionTagger(LightningModule):
    """Says which emotions a text has: an encoder, self-attention pooling, and a linear head.

    Trained on one side of dialogues or on both, from any batch with the attributes of `Dialogues`; rows whose emotion
    is not known are left out of loss and metrics. A checkpoint holds the tokenizers and the names of the classes, so
    that `EmotionTagger.load_from_checkpoint(path).tag(texts)` needs no data. Data with another vocabulary than that of
    the training are read through their texts.

    Args:
        num_emotions: Number of classes; taken from the data.
        post_vocab_size: Words of posts; taken from the data.
        reply_vocab_size: Words of replies; taken from the data.
        encoder: "gru" (word embeddings and a bidirectional GRU) or "tiny" (word embeddings and a small BERT), which
            read words of the dialogue vocabulary; or a folder or hub id of an encoder of transformers, which reads
            `post_text` and `reply_text` with its own tokenizer, and must be in reach when a checkpoint is loaded.
        side: What is read: "reply", "post", or "both", each as an example of its own.
        head: "softmax" (one emotion a text; of two labels each has half) or "sigmoid" (several).
        hidden_size: Size of the states of "gru" (both directions together) and "tiny"; even.
        embedding_size: Size of word embeddings of "gru".
        dropout: Of embeddings and of the pooled vector.
        lr: Learning rate of Adam.
        secondary_threshold: Probability above which the second class is a text's secondary emotion. A softmax gives
            the second class at most 0.5.
        max_length: Most tokens of a text for an encoder of transformers.

    Raises:
        ValueError: If an argument is out of its range or unknown, or a size is missing.
    """

    monitor = "val/macro_f1"
    monitor_mode = "max"

    def __init__(
        self,
        num_emotions: int | None = None,
        post_vocab_size: int | None = None,
        reply_vocab_size: int | None = None,
        encoder: str = "gru",
        side: str = "reply",
        head: str = "softmax",
        hidden_size: int = 192,
        embedding_size: int = 96,
        dropout: float = 0.3,
        lr: float = 2e-3,
        secondary_threshold: float = 0.5,
        max_length: int = 64,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        for name, value, allowed in (("side", side, SIDES), ("head", head, HEADS)):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if num_emotions is None or num_emotions < 2:
            raise ValueError(f"--model.num_emotions must be at least 2, got {num_emotions}")
        for name, number in (("embedding_size", embedding_size), ("max_length", max_length)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if hidden_size < 2 or hidden_size % 2:
            raise ValueError(f"hidden_size must be even and at least 2, got {hidden_size}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        if not lr > 0:
            raise ValueError(f"lr must be positive, got {lr}")
        if not 0 <= secondary_threshold < 1:
            raise ValueError(f"secondary_threshold must be at least 0 and below 1, got {secondary_threshold}")
        self.num_emotions, self.lr, self.head = num_emotions, lr, head
        self.secondary_threshold = secondary_threshold
        self.sides = ("post", "reply") if side == "both" else (side,)
        self.encoder: WordEncoder | PretrainedEncoder
        if encoder in WORD_ENCODERS:
            given = {"post": post_vocab_size, "reply": reply_vocab_size}
            sizes: dict[str, int] = {}
            for name in self.sides:
                size = given[name]
                if size is None or size < 1:
                    raise ValueError(f"--model.{name}_vocab_size must be at least 1, got {size}")
                sizes[name] = size
            self.encoder = WordEncoder(encoder, sizes, embedding_size, hidden_size, dropout)
        else:
            self.encoder = PretrainedEncoder(encoder, max_length)
        self.pooling = SelfAttentionPooling(self.encoder.hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(self.encoder.hidden_size, num_emotions)
        self.metrics = SelectorMetrics(num_emotions, cast("Head", head))
        self.vocabulary: DialogueVocabulary | None = None
        self._foreign: bool | None = None
        self._predictions = PredictionFile(self)

    @property
    def label_names(self) -> list[str]:
        """Names of the classes: the data's, or their numbers."""
        names = self.vocabulary.label_names if self.vocabulary is not None else []
        return names or [str(index) for index in range(self.num_emotions)]

    # Words.

    def setup(self, stage: str) -> None:
        """Take the tokenizers of the datamodule, if there are none yet.

        Raises:
            ValueError: If they have more words than the embeddings, or other names of classes than those trained with.
        """
        self._foreign = None
        found = self._data_vocabulary()
        if found is None:
            return
        if self.vocabulary is None:
            self.vocabulary = found
            self._check_sizes()
        elif found.label_names and self.vocabulary.label_names not in ([], found.label_names):
            raise ValueError(
                f"the tagger was trained with the classes {', '.join(self.vocabulary.label_names)}, the data have "
                f"{', '.join(found.label_names)}"
            )

    def _data_vocabulary(self) -> DialogueVocabulary | None:
        trainer = self._trainer
        return None if trainer is None else DialogueVocabulary.of(getattr(trainer, "datamodule", None))

    def _check_sizes(self) -> None:
        if self.vocabulary is None or not isinstance(self.encoder, WordEncoder):
            return
        for side in self.sides:
            size = self._tokenizer(side).get_vocab_size()
            rows = cast("nn.Embedding", self.encoder.embeddings[side]).num_embeddings
            if size != rows:
                raise ValueError(f"--model.{side}_vocab_size is {rows}, the data's tokenizer has {size} words")

    def _tokenizer(self, side: str) -> Any:
        if self.vocabulary is None:
            raise RuntimeError(
                "EmotionTagger knows no words yet: train it with a datamodule that has `post_tokenizer` and "
                "`reply_tokenizer` (such as DialogueData), load a checkpoint, or set `vocabulary`"
            )
        return self.vocabulary.post if side == "post" else self.vocabulary.reply

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the tokenizers, as text, and the names of the classes."""
        if self.vocabulary is not None:
            checkpoint["dialogue_vocabulary"] = self.vocabulary.to_dict()
        if isinstance(self.encoder, PretrainedEncoder):
            checkpoint["tokenizer"] = self.encoder.tokenizer_text()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them back."""
        self._foreign = None
        content = checkpoint.get("dialogue_vocabulary")
        if content is not None:
            self.vocabulary = DialogueVocabulary.from_dict(content)
        text = checkpoint.get("tokenizer")
        if text is not None and isinstance(self.encoder, PretrainedEncoder):
            self.encoder.restore_tokenizer(text)

    def _reads_texts(self) -> bool:
        """Whether ids of batches are of no use: the encoder has its own tokens, or the data have other words."""
        if isinstance(self.encoder, PretrainedEncoder):
            return True
        if self._foreign is None:
            found = self._data_vocabulary()
            self._foreign = False
            if found is not None and self.vocabulary is not None:
                theirs, ours = (
                    [(part.post if side == "post" else part.reply).get_vocab() for side in self.sides]
                    for part in (found, self.vocabulary)
                )
                self._foreign = theirs != ours
            if self._foreign:
                log.warning("the data have another vocabulary than the tagger: their texts are cut into words anew")
        return self._foreign

    # The network.

    def encode(self, texts: Sequence[str], side: str) -> tuple[Tensor, Tensor]:
        """Ids and mask `(texts, length)` of texts.

        Args:
            texts: Posts or replies.
            side: Which of these they are: the vocabulary that a word encoder reads.

        Raises:
            RuntimeError: If there is no tokenizer yet.
            ValueError: If the tagger reads the other side only.
        """
        if side not in self.sides:
            raise ValueError(f"side must be one of {', '.join(self.sides)}, which this tagger reads, got {side!r}")
        if isinstance(self.encoder, PretrainedEncoder):
            return self.encoder.encode(texts)
        rows = [encoding.ids for encoding in self._tokenizer(side).encode_batch(list(texts))]
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        mask = torch.arange(max(map(len, rows), default=0)) < lengths[:, None]
        ids = torch.zeros(mask.shape, dtype=torch.int64)
        ids[mask] = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
        return ids, mask

    def _inputs(self, batch: Dialogues, side: str) -> tuple[Tensor, Tensor]:
        if self._reads_texts():
            ids, mask = self.encode(batch.post_text if side == "post" else batch.reply_text, side)
            return ids.to(self.device), mask.to(self.device)
        if side == "post":
            return batch.post_ids, batch.post_mask
        # Without the end, which a text that is tagged later has not.
        return batch.reply_out, batch.reply_mask & (batch.reply_out != EOS_ID)

    def forward(self, ids: Tensor, mask: Tensor, side: str) -> Tensor:
        """Logits of texts.

        Args:
            ids: int64 `(batch, length)`.
            mask: bool `(batch, length)`, False on padding, which comes after the words. A text without words is read as
                an end.
            side: "post" or "reply".

        Returns:
            float32 `(batch, num_emotions)`.
        """
        if not ids.shape[1]:
            ids, mask = ids.new_zeros(len(ids), 1), mask.new_zeros(len(ids), 1)
        empty = ~mask.any(1)
        start = torch.arange(ids.shape[1], device=ids.device) == 0
        filled = empty[:, None] & start
        ids, mask = ids.masked_fill(filled, EOS_ID), mask | filled
        pooled, _ = self.pooling(self._states(ids, mask, side), mask)
        logits: Tensor = self.classifier(self.dropout(pooled))
        return logits.float()

    def _states(self, ids: Tensor, mask: Tensor, side: str) -> Tensor:
        if not len(ids):
            return ids.new_zeros(*ids.shape, self.encoder.hidden_size, dtype=torch.float32)
        extra = (side,) if isinstance(self.encoder, WordEncoder) else ()
        states: Tensor = self.encoder(ids, mask, *extra)
        return states

    def examples(self, batch: Dialogues) -> tuple[Tensor, Tensor, Tensor]:
        """Logits and multi-hot targets `(examples, num_emotions)`, and which targets are known, bool `(examples,)`."""
        logits = torch.cat([self(*self._inputs(batch, side), side) for side in self.sides])
        targets = {"post": batch.post_emotion, "reply": batch.reply_emotion}
        known = {"post": batch.post_emotion_known, "reply": batch.reply_emotion_known}
        return (
            logits,
            torch.cat([targets[side] for side in self.sides]),
            torch.cat([known[side] for side in self.sides]),
        )

    # Steps.

    def training_step(self, batch: Dialogues, batch_idx: int) -> Tensor:
        """The mean loss of the examples whose emotion is known; 0 without one."""
        logits, targets, known = self.examples(batch)
        loss = global_mean(emotion_losses(logits, targets, self.head), known)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch.post_ids))
        return loss

    def validation_step(self, batch: Dialogues, batch_idx: int) -> None:
        """Count a batch."""
        self.metrics.update(*self.examples(batch))

    def test_step(self, batch: Dialogues, batch_idx: int) -> None:
        """Count a batch."""
        self.metrics.update(*self.examples(batch))

    def _log_metrics(self, stage: str) -> None:
        for name, value in self.metrics.compute().items():
            self.log(f"{stage}/{name}", value.float(), prog_bar=name == "macro_f1")
        self.metrics.reset()

    def on_validation_epoch_end(self) -> None:
        """Log `val/acc`, `val/macro_f1` and `val/multilabel_f1`."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the same as `test/*`."""
        self._log_metrics("test")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over what is trained."""
        return torch.optim.Adam([weight for weight in self.parameters() if weight.requires_grad], lr=self.lr)

    # Labels.

    @torch.no_grad()
    def tag(self, texts: Sequence[str], side: str | None = None, batch_size: int = 256) -> Tags:
        """Emotions of texts, in float32 and in evaluation mode.

        Args:
            texts: Posts or replies.
            side: Which of these they are; by default the side that the tagger was trained on, and "reply" of both.
            batch_size: Texts that are read at a time.

        Raises:
            RuntimeError: If there is no tokenizer yet.
            ValueError: If the tagger reads the other side only.
        """
        side = self.sides[-1] if side is None else side
        parts = [torch.zeros(0, self.num_emotions, device=self.device)]
        with evaluation(self), torch.autocast(self.device.type, enabled=False):
            for first in range(0, len(texts), batch_size):
                ids, mask = self.encode(texts[first : first + batch_size], side)
                parts.append(self(ids.to(self.device), mask.to(self.device), side))
        return self._tags(torch.cat(parts))

    def _tags(self, logits: Tensor) -> Tags:
        probabilities = self.metrics.probabilities(logits)
        values, classes = probabilities.topk(2, dim=1)
        secondary = torch.where(values[:, 1] > self.secondary_threshold, classes[:, 1], 0)
        return Tags(classes[:, 0], secondary, probabilities)

    def on_predict_start(self) -> None:
        """Open `predictions.jsonl` in the run's folder (one file per process, if there are several)."""
        self._predictions.open()

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tags]:
        """Emotions of each side that the tagger reads, also written as lines.

        A line has `index` (row of the part), `side`, `text`, `primary`, `secondary` (null for none), `probabilities`.
        """
        result = {}
        names = self.label_names
        for side in self.sides:
            tags = self._tags(self(*self._inputs(batch, side), side))
            result[side] = tags
            texts = batch.post_text if side == "post" else batch.reply_text
            columns = (batch.indices.tolist(), texts, *(part.tolist() for part in tags))
            self._predictions.write(
                {
                    "index": index,
                    "side": side,
                    "text": text,
                    "primary": names[primary],
                    "secondary": names[secondary] if secondary else None,
                    "probabilities": probabilities,
                }
                for index, text, primary, secondary, probabilities in zip(*columns, strict=True)
            )
        return result

    def on_predict_end(self) -> None:
        """Close the file."""
        self._predictions.close()
