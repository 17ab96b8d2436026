"""Perplexity of titles under a language model: exp of the mean negative log-likelihood of a token."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.text_attack.token_batches import device_of, frame, load_network, longest_input, padded_batches

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from typing_extensions import Self

_WORD = re.compile(r"\w+(?:['\u2019\-_*@]\w+)*|[^\w\s]")
# Longer than a character, and never cut as a word: no symbol of a title can be one of them.
_START, _END, _UNKNOWN = "<start>", "<end>", "<unknown>"
_WAY_OUT = "An n-gram model of the catalogue (NGramLanguageModel) needs no file and no network"


@runtime_checkable
class LanguageModel(Protocol):
    """Scores how expected a text is."""

    @property
    def name(self) -> str:
        """What result files call the model."""
        ...

    def perplexity(self, texts: Sequence[str]) -> Tensor:
        """exp(mean token NLL) of each text, `(texts,)` float64; NaN where a text has nothing to score."""
        ...


class NGramLanguageModel:
    """An n-gram model of a catalogue with add-k smoothing: p(w | h) = (n(h, w) + k) / (n(h) + k V).

    The V symbols are those of the catalogue, one for the end of a title, and one for all unknown ones. The end is
    scored like a symbol, so that every text has a perplexity.

    Args:
        titles: The catalogue.
        order: Length of the n-grams.
        level: Symbols are the characters as they are ("char"), or words in lower case and punctuation marks ("word").
        k: What is added to each count, above 0; inf for the uniform distribution, whose perplexity is V.

    Raises:
        ValueError: If there are no titles, or an argument is out of its range.
    """

    def __init__(
        self, titles: Sequence[str], order: int = 3, level: Literal["char", "word"] = "char", k: float = 0.1
    ) -> None:
        if order < 1:
            raise ValueError(f"order={order}, expected 1 or more")
        if level not in ("char", "word"):
            raise ValueError(f"level={level!r}, expected 'char' or 'word'")
        if not k > 0:
            raise ValueError(f"k={k}, expected a number above 0")
        if not len(titles):
            raise ValueError("no titles to count n-grams in")
        self.name = f"{level} {order}-gram, add-{k:g}, fitted on {len(titles)} titles"
        self._order, self._level, self._k = order, level, k
        self._symbols: set[str] = {_END, _UNKNOWN}
        for title in titles:
            self._symbols.update(self._cut(title))
        self._grams: Counter[tuple[str, ...]] = Counter()
        self._histories: Counter[tuple[str, ...]] = Counter()
        for title in titles:
            for gram in self._grams_of(title):
                self._grams[gram] += 1
                self._histories[gram[:-1]] += 1

    @property
    def vocab_size(self) -> int:
        """Number of symbols, with the end and the unknown one."""
        return len(self._symbols)

    def perplexity(self, texts: Sequence[str]) -> Tensor:
        """Perplexity of each text, `(texts,)` float64."""
        return torch.tensor([self._perplexity(text) for text in texts], dtype=torch.float64)

    def _perplexity(self, text: str) -> float:
        if math.isinf(self._k):
            return float(self.vocab_size)
        grams = self._grams_of(text)
        total = 0.0
        for gram in grams:
            count, history = self._grams[gram], self._histories[gram[:-1]]
            total -= math.log((count + self._k) / (history + self._k * self.vocab_size))
        return math.exp(total / len(grams))

    def _cut(self, text: str) -> list[str]:
        return list(text) if self._level == "char" else _WORD.findall(text.lower())

    def _grams_of(self, text: str) -> list[tuple[str, ...]]:
        known = [symbol if symbol in self._symbols else _UNKNOWN for symbol in self._cut(text)]
        padded = [_START] * (self._order - 1) + known + [_END]
        return [tuple(padded[place : place + self._order]) for place in range(len(known) + 1)]


class CausalPerplexity:
    """Perplexity under a causal language model of transformers, such as GPT-2.

    A text follows the tokenizer's start token, where it has one, so that the first token is scored too; without one,
    a text of one token has nothing to score.

    Args:
        name: A folder of `save_pretrained`, or a hub id.
        batch_size: Texts of a forward pass.

    Raises:
        FileNotFoundError: If there is no such folder, or the hub cannot be reached.
        ValueError: If the checkpoint is damaged.
    """

    def __init__(self, name: str | Path, *, batch_size: int = 16) -> None:
        from zoo.common.pretrained import transformers_library

        self.name = str(name)
        self._batch_size = batch_size
        loader = transformers_library().AutoModelForCausalLM
        self._network, self._tokenizer = load_network(name, loader, _WAY_OUT)
        start = self._tokenizer.bos_token_id
        self._before = [start] if start is not None else frame(self._tokenizer)[0]
        self._longest = longest_input(self._network, self._tokenizer)

    def to(self, device: torch.device | str) -> Self:
        """Move the network."""
        self._network.to(device)
        return self

    @torch.no_grad()
    def perplexity(self, texts: Sequence[str]) -> Tensor:
        """Perplexity of each text, `(texts,)` float64 on the CPU; NaN where there is no token to score.

        Raises:
            ValueError: If a text is too long for the network.
        """
        values = torch.full((len(texts),), torch.nan, dtype=torch.float64)
        if not len(texts):
            return values
        inner = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        rows = [[*self._before, *ids] for ids in inner]
        for text, row in zip(texts, rows, strict=True):
            if self._longest is not None and len(row) > self._longest:
                raise ValueError(
                    f"the title {text[:60]!r} has {len(row)} tokens with the start, {self.name} reads {self._longest}"
                )
        scored = [place for place, row in enumerate(rows) if len(row) > 1]
        wanted = [rows[place] for place in scored]
        for places, ids, mask in padded_batches(wanted, self._batch_size, device_of(self._network)):
            logits = self._network(input_ids=ids, attention_mask=mask).logits[:, :-1]
            losses = F.cross_entropy(logits.double().transpose(1, 2), ids[:, 1:], reduction="none")
            counts = mask[:, 1:].double()
            means = (losses * counts).sum(1) / counts.sum(1)
            values[[scored[place] for place in places]] = means.exp().cpu()
        return values


def language_model(name: str | Path, titles: Sequence[str]) -> LanguageModel:
    """A language model by name.

    Args:
        name: "ngram", fitted on `titles`; or a folder or hub id of a causal one.
        titles: The catalogue.

    Raises:
        FileNotFoundError: If a model is not on disk, and the hub cannot be reached.
    """
    return NGramLanguageModel(titles) if str(name) == "ngram" else CausalPerplexity(name)
