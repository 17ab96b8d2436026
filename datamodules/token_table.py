"""Tokens of many texts in one flat table."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from datamodules.cloze_batches import Run

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence
    from typing import TypeVar

    import numpy.typing as npt

    from datamodules.cloze_text import Span

    Key = TypeVar("Key", bound=Hashable)

_CHUNK = 1_024  # texts whose encodings are in memory at once


class TokenTable(NamedTuple):
    """Tokens of texts without special tokens, text after text.

    Attributes:
        ids: int32 `(tokens,)`.
        offsets: int64 `(texts + 1,)`; text t has `ids[offsets[t] : offsets[t + 1]]`.
    """

    ids: Tensor
    offsets: Tensor

    @property
    def lengths(self) -> Tensor:
        """Tokens of each text, int64 `(texts,)`."""
        return self.offsets.diff()

    def sizes(self, texts: Tensor) -> Tensor:
        """Tokens of some texts, `texts` being indices of any shape."""
        return self.offsets[texts + 1] - self.offsets[texts]

    def run(self, texts: Tensor, types: int = 0) -> Run:
        """The whole of some texts, `texts` being indices of any shape."""
        return Run(self.ids, self.offsets[texts], self.sizes(texts), types)


def tokenize(tokenizer: Any, texts: Sequence[str]) -> TokenTable:
    """Tokens of texts, without special tokens."""
    return _tokenized(tokenizer, texts, None)[0]


def tokenize_spans(tokenizer: Any, segments: Sequence[tuple[str, Span]]) -> tuple[TokenTable, Tensor, Tensor]:
    """Tokens of texts, and which of them cover a span of characters.

    Args:
        tokenizer: A fast tokenizer of transformers.
        segments: Texts, each with the characters `[start, end)` of its span.

    Returns:
        The tokens; and int64 `(texts,)` each, the first token of the span in its text and the number of its tokens, 0
        where its characters give none.
    """
    bounds = np.array([span for _, span in segments], dtype=np.int64).reshape(-1, 2)
    table, first, count = _tokenized(tokenizer, [text for text, _ in segments], bounds)
    return table, torch.from_numpy(first), torch.from_numpy(count)


def _tokenized(
    tokenizer: Any, texts: Sequence[str], bounds: npt.NDArray[np.int64] | None
) -> tuple[TokenTable, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    ids, lengths = [], []
    first, count = np.zeros(len(texts), np.int64), np.zeros(len(texts), np.int64)
    for low in range(0, len(texts), _CHUNK):
        encoding = tokenizer(
            list(texts[low : low + _CHUNK]),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=bounds is not None,
            verbose=False,  # a text longer than the encoder takes is cut later
        )
        sizes = [len(tokens) for tokens in encoding["input_ids"]]
        ids.append(np.fromiter(chain.from_iterable(encoding["input_ids"]), np.int32, sum(sizes)))
        lengths += sizes
        if bounds is not None:
            part = slice(low, low + len(sizes))
            first[part], count[part] = _covering(encoding["offset_mapping"], np.array(sizes), bounds[part])
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    flat = np.concatenate(ids) if ids else np.zeros(0, np.int32)
    return TokenTable(torch.from_numpy(flat), torch.from_numpy(offsets)), first, count


def _covering(
    mapping: list[list[tuple[int, int]]], sizes: npt.NDArray[np.int64], bounds: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """First token and number of tokens that share characters with `bounds`, for each text."""
    total = int(sizes.sum())
    numbers = chain.from_iterable(chain.from_iterable(mapping))
    characters = np.fromiter(numbers, np.int64, 2 * total).reshape(-1, 2)
    text = np.repeat(np.arange(len(sizes)), sizes)
    place = np.arange(total) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    start, end = np.maximum(characters, bounds[text, :1])[:, 0], np.minimum(characters, bounds[text, 1:])[:, 1]
    inside = np.flatnonzero(start < end)
    first, last = np.zeros(len(sizes), np.int64), np.full(len(sizes), -1)
    # Of assignments to one place the last stays.
    first[text[inside[::-1]]] = place[inside[::-1]]
    last[text[inside]] = place[inside]
    return first, last + 1 - first


def distinct(values: Iterable[Key]) -> tuple[list[Key], Tensor]:
    """Each value once, in order of appearance; and int64 `(values,)`, where each value is in that list."""
    index: dict[Key, int] = {}
    which = [index.setdefault(value, len(index)) for value in values]
    return list(index), torch.tensor(which, dtype=torch.int64)
