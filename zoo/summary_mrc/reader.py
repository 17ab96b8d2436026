"""Gated-attention reader: recurrent states of the passage, gated by the question, against each option.

Shape legend: B questions, K options, P passage tokens, Q question tokens, O tokens of an option, H hidden size.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from zoo.summary_mrc.masked import at_least_float32, masked_mean, masked_softmax

if TYPE_CHECKING:
    from collections.abc import Mapping


class GatedAttentionReader(nn.Module):
    """GA-Reader (Dhingra et al., ACL 2017) for options that need not stand in the passage.

    Each hop has its own bidirectional LSTMs and gates the passage, X = D * (softmax(D Q^T) Q). Then the question's
    state at the slot attends to the passage, and score_i = o_i^T W [passage; slot], with o_i the mean state of option
    i's tokens. The scorer is one for all options, so that their order changes nothing, and padding counts in no softmax
    and in no mean.

    Args:
        vocab_size: Number of tokens.
        embedding_size: Width of word vectors.
        hidden_size: Width H of each direction of the LSTMs.
        hops: Gated-attention layers.
        dropout: Of the inputs of each LSTM, and of nothing else.

    Raises:
        ValueError: If a size is not positive, or `dropout` is not in [0, 1).

    Example:
        >>> import torch
        >>> reader = GatedAttentionReader(vocab_size=9, embedding_size=4, hidden_size=3).eval()
        >>> passage, question, options = torch.tensor([[5, 6, 0]]), torch.tensor([[7, 4]]), torch.tensor([[[5], [8]]])
        >>> reader(passage, passage != 0, question, question != 0, torch.tensor([1]), options, options != 0).shape
        torch.Size([1, 2])
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_size: int = 300,
        hidden_size: int = 128,
        hops: int = 1,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        sizes = {"vocab_size": vocab_size, "embedding_size": embedding_size, "hidden_size": hidden_size, "hops": hops}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        width = 2 * hidden_size
        self.embedding = nn.Embedding(vocab_size, embedding_size)
        # PyTorch's own deviation, 1, is several times that of published word vectors, and saturates the LSTMs.
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.dropout = nn.Dropout(dropout)
        inputs = [embedding_size, *[width] * hops]
        self.passage_lstms = nn.ModuleList(_BidirectionalLSTM(size, hidden_size) for size in inputs)
        self.question_lstms = nn.ModuleList(_BidirectionalLSTM(embedding_size, hidden_size) for _ in inputs)
        self.option_lstm = _BidirectionalLSTM(embedding_size, hidden_size)
        self.slot_attention = nn.Linear(width, width, bias=False)
        self.scorer = nn.Linear(2 * width, width, bias=False)

    def forward(
        self,
        passage_ids: Tensor,
        passage_mask: Tensor,
        question_ids: Tensor,
        question_mask: Tensor,
        slot: Tensor,
        option_ids: Tensor,
        option_mask: Tensor,
    ) -> Tensor:
        """Scores of the options.

        Masks are True for tokens, which stand before the padding.

        Args:
            passage_ids: int64 `(B, P)`.
            passage_mask: bool `(B, P)`; a row without tokens is a question without a passage.
            question_ids: int64 `(B, Q)`.
            question_mask: bool `(B, Q)`.
            slot: int64 `(B,)`, the slot's place in the question.
            option_ids: int64 `(B, K, O)`.
            option_mask: bool `(B, K, O)`.

        Returns:
            `(B, K)`, float32 also under autocast.
        """
        if passage_ids.shape[1] == 0:
            # LSTMs take no sequences without places; one of padding changes nothing.
            passage_ids, passage_mask = (field.new_zeros(len(slot), 1) for field in (passage_ids, passage_mask))
        passage, question = self.embedding(passage_ids), self.embedding(question_ids)
        *hops, last = zip(self.passage_lstms, self.question_lstms, strict=True)
        for passage_lstm, question_lstm in hops:
            states = passage_lstm(self.dropout(passage), passage_mask)
            asked = question_lstm(self.dropout(question), question_mask)
            weights = masked_softmax(states @ asked.transpose(1, 2), question_mask[:, None])
            passage = states * (weights.to(asked.dtype) @ asked)
        states = last[0](self.dropout(passage), passage_mask)
        asked = last[1](self.dropout(question), question_mask)
        at_slot = asked[torch.arange(len(slot), device=slot.device), slot]
        weights = masked_softmax((states @ self.slot_attention(at_slot)[..., None])[..., 0], passage_mask)
        read = (weights.to(states.dtype)[:, None] @ states)[:, 0]
        wanted = at_least_float32(self.scorer(torch.cat([read, at_slot], -1)))
        # Not a matrix product, which autocast would round: scores in bfloat16 would often be ties.
        scores: Tensor = (self._options(option_ids, option_mask) * wanted[:, None]).sum(-1)
        return scores

    def _options(self, option_ids: Tensor, option_mask: Tensor) -> Tensor:
        """Mean states `(B, K, 2H)` of the options' tokens."""
        ids, mask = option_ids.flatten(0, 1), option_mask.flatten(0, 1)
        states = self.option_lstm(self.dropout(self.embedding(ids)), mask)
        return masked_mean(states, mask).view(*option_ids.shape[:2], -1)


class _BidirectionalLSTM(nn.Module):
    """An LSTM in each direction that starts at a row's own end: `(N, L, in)` to `(N, L, 2H)`.

    States of padding are finite, and mean nothing. Rows are turned round by indices and not packed: packing waits for
    the lengths from the device, and on a CPU it takes several times as long.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.onward = nn.LSTM(input_size, hidden_size, batch_first=True)
        self.back = nn.LSTM(input_size, hidden_size, batch_first=True)

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        places = torch.arange(mask.shape[1], device=mask.device)
        turned = torch.where(mask, mask.sum(1, keepdim=True) - 1 - places, places)[..., None]
        onward = self.onward(inputs)[0]
        back = self.back(inputs.gather(1, turned.expand_as(inputs)))[0]
        return torch.cat([onward, back.gather(1, turned.expand_as(back))], -1)


def read_word_vectors(path: str | Path, vocabulary: Mapping[str, int], width: int) -> dict[int, Tensor]:
    """Word vectors of a vocabulary from a file of GloVe's text format: a word and its numbers in each line.

    A first line with the number of words and the width, as word2vec and fastText write it, is passed over. Of a word
    that stands there more than once, the first vector is taken; lines of other words are not looked at.

    Args:
        path: The file, UTF-8, not packed.
        vocabulary: Words and their ids; case counts.
        width: Length of the vectors.

    Returns:
        float32 vectors `(width,)` by id, for the words that the file has.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the vectors have another length, a number is damaged, or no word is in the vocabulary.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path} of word vectors: give one in GloVe's text format, unpacked")
    ids = {word.encode(): index for word, index in vocabulary.items()}
    found: dict[int, Tensor] = {}
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1 and _check_first_line(path, line, width):
                continue
            word = line.partition(b" ")[0]
            if word not in ids or ids[word] in found:
                continue
            # From the right: in some files there are words with spaces.
            fields = line.rstrip().rsplit(b" ", width)
            if len(fields) <= width:
                raise ValueError(
                    f"{path}, line {number}: {len(fields) - 1} numbers after {word.decode()!r}, expected {width}"
                )
            if fields[0] == word:
                found[ids[word]] = _vector(path, number, fields[1:])
    if not found:
        raise ValueError(f"{path} has no word of the vocabulary ({len(vocabulary)} words, case counts)")
    return found


def _check_first_line(path: str | Path, line: bytes, width: int) -> bool:
    """Whether the first line is a header."""
    fields = line.split()
    header = len(fields) == 2 and all(field.isdigit() for field in fields)
    given = int(fields[1]) if header else len(fields) - 1
    if given != width:
        raise ValueError(
            f"{path}, line 1: a text line with a word and {width} numbers was expected, there are {max(given, 0)}; "
            f"set embedding_size to the width of the vectors, or give another file"
        )
    return header


def _vector(path: str | Path, number: int, fields: list[bytes]) -> Tensor:
    try:
        values = [float(field) for field in fields]
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}") from error
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{path}, line {number}: a number is not finite")
    return torch.tensor(values)
