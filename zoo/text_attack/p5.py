"""P5 (Geng et al. 2022, arXiv 2203.13366): a T5 that is asked whether an item is a good choice for a user."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.common.schedules import WarmupLinear
from zoo.text_attack.answer_scores import answer_probability
from zoo.text_attack.language_models import build_t5, num_tokens
from zoo.text_attack.pointwise import Block, PointwiseRec
from zoo.text_attack.prompts import assemble, p5_prompts, prompt_of
from zoo.text_attack.tokenizers import word_start_ids

if TYPE_CHECKING:
    from zoo.text_attack.types import RecBatch

NUM_WORDS = 512
"""Rows of the table of whole words."""


class P5Rec(PointwiseRec):
    """P5 on prompts that hold the title: the encoder reads, one step of the decoder says yes or no.

    Args:
        backbone: "tiny" (a small T5 with fresh weights), or a folder or hub id of a T5.
        backbone_options: Of "tiny" (see `build_t5`).
        prompt: "p5_history", "p5_direct" (P5's 5-4), "p5_recommend" (5-3), "p5_ids" (5-1, which reads no title and
            so cannot be attacked), or the attributes of a `Prompt`.
        answers: What stands for yes and for no.
        whole_word: Whether pieces of one word share an embedding that is added to their own.
        tokenizer: "train" for byte pairs learnt from the titles, or a folder or hub id; by default the backbone's,
            for "tiny" a learnt one.
        vocab_size: Most tokens of a learnt tokenizer.
        max_tokens: Most tokens of a prompt; histories are shortened to it, their oldest titles first.
        max_history: Most titles of a history.
        max_title_tokens: Most tokens of a title; the rest is cut off.
        score_batch: Prompts that go through the network at once where no gradient is needed.
        lr: Highest learning rate of AdamW.
        weight_decay: Decoupled; not on vectors.
        warmup_ratio: Share of the steps in which the rate rises; it falls to 0 in the others.

    Raises:
        FileNotFoundError: If a folder lacks files.
        ImportError: If transformers is missing.
        ValueError: If an argument is out of its range.
    """

    answer_follows = False
    starts_word: Tensor

    def __init__(
        self,
        backbone: str = "tiny",
        backbone_options: dict[str, Any] | None = None,
        prompt: str | dict[str, Any] = "p5_history",
        answers: list[str] = ["yes", "no"],  # noqa: B006 - a plain value, never changed
        whole_word: bool = True,
        tokenizer: str | None = None,
        vocab_size: int = 2000,
        max_tokens: int = 512,
        max_history: int = 10,
        max_title_tokens: int = 32,
        score_batch: int = 256,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup_ratio: float = 0.05,
    ) -> None:
        if tokenizer is None:
            tokenizer = "train" if backbone == "tiny" else backbone
        chosen = prompt_of(prompt, p5_prompts())
        if chosen.slots:
            raise ValueError(f"the prompt {chosen.name} has places for vectors, which P5 has not: use CoLLMRec")
        super().__init__(
            chosen, answers, tokenizer, vocab_size, WarmupLinear(warmup_ratio), max_tokens, max_history,
            max_title_tokens, score_batch, lr, weight_decay,
        )  # fmt: skip
        self.save_hyperparameters()
        size = vocab_size if tokenizer == "train" else len(self.tokenizer)
        self.t5 = build_t5(backbone, backbone_options, size)
        if size > num_tokens(self.t5):
            raise ValueError(
                f"the tokenizer {tokenizer} has {size} tokens, {backbone} has {num_tokens(self.t5)}: give the one that "
                "belongs to it"
            )
        config: Any = self.t5.config
        self.start_id = int(config.decoder_start_token_id)
        self.whole_words = nn.Embedding(NUM_WORDS, config.d_model) if whole_word else None
        if self.whole_words is not None:
            nn.init.normal_(self.whole_words.weight, std=config.initializer_factor)

    @property
    def network(self) -> nn.Module:
        """The T5."""
        return self.t5

    def tokenizer_changed(self) -> None:
        """Cut the answers into tokens, and note which tokens begin a word."""
        super().tokenizer_changed()
        starts = torch.zeros(len(self.tokenizer), dtype=torch.bool)
        starts[word_start_ids(self.tokenizer)] = True
        # Follows from the tokenizer, which the checkpoint holds.
        self.register_buffer("starts_word", starts.to(self.device), persistent=False)

    def endings(self) -> list[list[int]]:
        """The token that ends a prompt; answers are the decoder's."""
        return [[int(self.tokenizer.eos_token_id)]]

    def answer_rows(self) -> Tensor:
        """Tokens of the answers yes and no with the end, int64 `(2, length)`, -100 where one is shorter."""
        end = int(self.tokenizer.eos_token_id)
        rows = [torch.tensor([*self.answers.lead, *row, end], device=self.device) for row in self.answers.rows]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)

    def whole_word_ids(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Numbers of words, int64 `(batch, length)`: each piece that begins one counts up; 0 for end and padding."""
        words = self.starts_word[ids].long().cumsum(1).clamp(max=NUM_WORDS - 1)
        inside: Tensor = mask * (ids != self.tokenizer.eos_token_id)
        return words * inside

    def vectors(self, ids: Tensor, mask: Tensor) -> Tensor:
        """What the encoder is given: float `(batch, length, hidden_size)`."""
        model: Any = self.t5
        out: Tensor = model.get_input_embeddings()(ids)
        if self.whole_words is not None:
            out = out + self.whole_words(self.whole_word_ids(ids, mask))
        return out

    def _logits(self, pieces: Tensor, table: Any, decoder_ids: Tensor) -> Tensor:
        ending = self.tables.endings(torch.zeros(len(pieces), 1, dtype=torch.int64, device=pieces.device))
        ids, mask = assemble(table, torch.cat((pieces, ending), 1), self.pad_id, left=False)
        logits: Tensor = self.t5(
            inputs_embeds=self.vectors(ids, mask),
            attention_mask=mask,
            decoder_input_ids=decoder_ids,
            use_cache=False,
        ).logits
        return logits.float()

    def loss(self, batch: RecBatch) -> Tensor:
        """Cross-entropy of the answer's tokens: mean over an answer, then over the batch."""
        # Before `tables` is read: new users add rows to them.
        pieces = self.training_pieces(batch)
        labels = self.answer_rows()[(batch.labels <= 0.5).long()]
        start = torch.full_like(labels[:, :1], self.start_id)
        shifted = torch.cat((start, labels[:, :-1].clamp(min=0)), dim=1)
        logits = self._logits(pieces, self.tables.table, shifted)
        losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
        return (losses.sum(1) / (labels >= 0).sum(1)).mean()

    def whole_block_scores(self, block: Block) -> Tensor:
        """Probabilities of yes, by one step of the decoder."""
        users, items = block.tails.shape
        prompts = block.prompts()
        start = torch.tensor([[self.start_id, *self.answers.lead]], device=prompts.device).expand(len(prompts), -1)
        logits = self._logits(prompts, block.table, start)[:, -1]
        return answer_probability(logits, self.answers, self.double_softmax).view(users, items)
