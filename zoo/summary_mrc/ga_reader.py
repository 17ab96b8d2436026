"""GA-Reader as a sibling: a recurrent reader with gated attention, the task's own neural baseline."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.summary_mrc.choice_module import ChoiceModule
from zoo.summary_mrc.reader import GatedAttentionReader, read_word_vectors

if TYPE_CHECKING:
    from zoo.summary_mrc.types import ReaderBatch

log = logging.getLogger(__name__)


class GAReader(ChoiceModule):
    """Gated-attention reader (the baseline of SemEval 2021 task 4), with one scorer for all options.

    Args:
        vocab_size: Size of the tokenizer's vocabulary.
        num_options: Options K of every question.
        encode: Layout of the data, "reader".
        embedding_size: Width of word vectors.
        hidden_size: Width of each direction of the LSTMs.
        hops: Gated-attention layers.
        dropout: Of the inputs of each LSTM.
        word_vectors: A file of word vectors in GloVe's text format; words that it lacks keep fresh vectors.
        lr: Highest learning rate of AdamW.
        weight_decay: Decoupled; not on biases.
        warmup_ratio: Share of the steps in which the rate rises; it falls to 0 in the others.
        label_smoothing: Of the cross-entropy over options.

    Raises:
        ValueError: If an option is out of its range, or the data has another layout.
    """

    vectors_read: Tensor

    def __init__(
        self,
        vocab_size: int,
        num_options: int = 5,
        encode: str = "reader",
        embedding_size: int = 300,
        hidden_size: int = 128,
        hops: int = 1,
        dropout: float = 0.5,
        word_vectors: str | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        warmup_ratio: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(num_options, lr, weight_decay, warmup_ratio, label_smoothing)
        self.save_hyperparameters()
        if encode != "reader":
            raise ValueError(f"GAReader needs --data.encode reader, got {encode!r}")
        self.word_vectors = word_vectors
        self.reader = GatedAttentionReader(vocab_size, embedding_size, hidden_size, hops, dropout)
        # A run that goes on from a checkpoint must not read the vectors over what it has learnt.
        self.register_buffer("vectors_read", torch.tensor(False))

    def on_fit_start(self) -> None:
        """Read the word vectors, if no checkpoint was restored that has them.

        Raises:
            ValueError: If the data has no tokenizer, or the file is damaged or of another width.
        """
        if self.word_vectors is None or bool(self.vectors_read):
            return
        tokenizer: Any = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is None:
            raise ValueError("word_vectors needs a datamodule with a tokenizer, whose words they are for")
        weight = self.reader.embedding.weight
        found = read_word_vectors(self.word_vectors, tokenizer.get_vocab(), weight.shape[1])
        with torch.no_grad():
            weight[list(found)] = torch.stack(list(found.values())).to(weight)
        self.vectors_read.fill_(True)
        log.info("%s: vectors of %d of %d words", self.word_vectors, len(found), weight.shape[0])

    def forward(self, batch: ReaderBatch) -> Tensor:
        """Scores `(batch, options)`."""
        scores: Tensor = self.reader(
            batch.passage_ids,
            batch.passage_mask,
            batch.question_ids,
            batch.question_mask,
            batch.slot,
            batch.option_ids,
            batch.option_mask,
        )
        return scores
