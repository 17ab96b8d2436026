"""Passages as token sequences of bounded length, masked for a language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.cloze_batches import Run, Template, frame, lay, read_template
from datamodules.loading import Draw, keyed_uniform, mix
from datamodules.token_table import tokenize

if TYPE_CHECKING:
    from collections.abc import Sequence

LEAST_PIECE = 16
"""Tokens that a piece of a passage has room for at least, beside a question."""
_MASKED, _RANDOM = 0.8, 0.1  # of the chosen tokens; the rest stays as it is (BERT, arXiv 1810.04805)


class PassageBatch(NamedTuple):
    """Pieces of passages with some tokens hidden.

    Attributes:
        input_ids: int64 `(batch, length)`, padded with the tokenizer's pad id to the longest.
        attention_mask: int64 `(batch, length)`, 1 for all tokens, special ones included.
        token_type_ids: int64 `(batch, length)`, as the tokenizer's template has them; 0 in padding.
        labels: int64 `(batch, length)`, the token where one is to be predicted, -100 elsewhere.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor
    labels: Tensor


class PassagePieces(Dataset[PassageBatch]):
    """Passages, tokenised once and cut into pieces; `dataset[Draw(indices, key)]` is a batch.

    A passage of n tokens gives ceil(n / room) pieces of about equal length, one after the other, and no token is lost.
    With questions about it, each piece is followed by one of them as second segment, in turn, and there are as many
    sequences as it takes for every piece and every question to be in one.

    A token is chosen with probability `mlm_probability`, special tokens never, and at least one in a sequence. Of the
    chosen ones 80 % become the mask token, 10 % a random token, and 10 % stay. What is chosen depends on the key, the
    sequence and the place in it alone.

    Args:
        passages: Texts.
        tokenizer: A fast tokenizer of transformers, with a mask token.
        max_length: Longest sequence, special tokens included.
        mlm_probability: Share of the tokens to predict.
        questions: Questions of each passage; none by default.
        key: Of the choice of tokens, instead of the draw's: the same in every epoch.

    Attributes:
        lengths: int64 `(sequences,)`, tokens, special ones included.
        left_out: Passages without any token.

    Raises:
        ValueError: If the tokenizer has no mask token, no passage has a token, or too little room is left for passages.
    """

    def __init__(
        self,
        passages: Sequence[str],
        tokenizer: Any,
        *,
        max_length: int = 512,
        mlm_probability: float = 0.15,
        questions: Sequence[Sequence[str]] | None = None,
        key: int | None = None,
    ) -> None:
        if tokenizer.mask_token_id is None:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path} has no mask token, which a masked language model predicts from"
            )
        self.max_length, self.mlm_probability, self.key = max_length, mlm_probability, key
        self._pad, self._mask, self._vocab_size = tokenizer.pad_token_id, tokenizer.mask_token_id, len(tokenizer)
        self._special = torch.tensor(sorted(set(tokenizer.all_special_ids)))
        self._passages = tokenize(tokenizer, passages)
        asked = questions or [()] * len(passages)
        self._questions = tokenize(tokenizer, [question for several in asked for question in several])
        probe = next((text for text, size in zip(passages, self._passages.lengths.tolist(), strict=True) if size), None)
        if probe is None:
            raise ValueError(f"none of the {len(passages)} passages has a token of the tokenizer")
        self._single = read_template(tokenizer, probe)
        self._pair = read_template(tokenizer, probe, probe) if len(self._questions.lengths) else self._single
        self._cut(torch.tensor([len(several) for several in asked]))

    def _cut(self, counts: Tensor) -> None:
        """Lay out the sequences: a piece of a passage each, and maybe a question of it."""
        lengths = self._passages.lengths
        firsts = counts.cumsum(0) - counts
        # Pieces of a passage leave room for the longest of its questions.
        longest = torch.zeros_like(counts)
        passage_of = torch.arange(len(counts)).repeat_interleave(counts)
        longest.scatter_reduce_(0, passage_of, self._questions.lengths, "amax")
        specials = torch.where(counts > 0, self._pair.size, self._single.size)
        room = self.max_length - specials - longest
        if (short := room < torch.where(counts > 0, LEAST_PIECE, 1)).any():
            worst = int(short.nonzero()[0])
            raise ValueError(
                f"max_length={self.max_length} leaves {int(room[worst])} tokens to passages beside "
                f"{int(specials[worst])} special tokens and {int(longest[worst])} of a question, expected at least "
                f"{LEAST_PIECE if counts[worst] else 1}: give a larger max_length"
            )
        pieces = -(-lengths // room.clamp(min=1))
        self.left_out = int((pieces == 0).sum())
        sequences = torch.where(pieces > 0, torch.maximum(pieces, counts), 0)
        passage = torch.arange(len(counts)).repeat_interleave(sequences)
        turn = torch.arange(len(passage)) - (sequences.cumsum(0) - sequences)[passage]
        piece, split, total = turn % pieces[passage], pieces[passage], lengths[passage]
        low, high = piece * total // split, (piece + 1) * total // split
        self._start, self._size = self._passages.offsets[passage] + low, high - low
        self._paired = counts[passage] > 0
        self._question = torch.where(self._paired, firsts[passage] + turn % counts[passage].clamp(min=1), 0)
        second = self._questions.sizes(self._question[self._paired])
        self.lengths = self._size + specials[passage]
        self.lengths[self._paired] += second

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self._start)

    def __getitem__(self, draw: Draw) -> PassageBatch:
        """The batch of some sequences, with tokens hidden by `draw.key`, or by the dataset's own key."""
        rows = draw.indices
        paired = self._paired[rows]
        runs: list[Run] = []
        if not paired.all():
            runs += _only(~paired, self._single, [self._piece(rows, self._single)])
        if paired.any():
            question = self._questions.run(self._question[rows], self._pair.types[-1])
            runs += _only(paired, self._pair, [self._piece(rows, self._pair), question])
        laid = lay(runs, self._pad)
        chosen, draws = self._choose(laid.ids, rows, mix(draw.key if self.key is None else self.key))
        labels = laid.ids.masked_fill(~chosen, -100)
        fate, word = draws
        hidden = torch.where(chosen & (fate < _MASKED), self._mask, laid.ids)
        random = chosen & (fate >= _MASKED) & (fate < _MASKED + _RANDOM)
        hidden = torch.where(random, (word * self._vocab_size).long(), hidden)
        return PassageBatch(hidden, laid.attention_mask, laid.token_type_ids, labels)

    def _piece(self, rows: Tensor, template: Template) -> Run:
        return Run(self._passages.ids, self._start[rows], self._size[rows], template.types[0])

    def _choose(self, ids: Tensor, rows: Tensor, key: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Which tokens are to be predicted, and two more uniform numbers for each token."""
        # Numbered by sequence and place, so that neither the batch nor its padding has a say.
        places = rows[:, None] * self.max_length + torch.arange(ids.shape[1])
        first, *others = (keyed_uniform(mix(key, stream), places) for stream in range(3))
        first = first.masked_fill(torch.isin(ids, self._special), 2.0)
        # A sequence without anything to predict has no loss: its lowest draw is chosen in any case.
        lowest = first == first.min(1, keepdim=True).values
        chosen = (first < self.mlm_probability) | (lowest & (first < 1))
        return chosen, (others[0], others[1])


def _only(chosen: Tensor, template: Template, segments: list[Run]) -> list[Run]:
    """The runs of a template for some sequences, empty for the others."""
    runs = frame(template, [[segment] for segment in segments])
    return [run._replace(size=run.size * chosen) for run in runs]
