"""Metrics of generated replies: perplexity, BLEU, diversity, likeness by word vectors."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from zoo.eacm.emotion_metrics import EmotionMetrics, SelectorMetrics
from zoo.eacm.word_vectors import embedding_similarities

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["CorpusPerplexity", "DialogueMetrics", "EmotionMetrics", "SelectorMetrics"]

ORDERS = (1, 2, 3, 4)
"""Lengths of the n-grams of BLEU."""
SIMILARITIES = ("average", "greedy", "extrema")


class CorpusPerplexity(Metric):
    """exp(total negative log-likelihood / total tokens) of a corpus: batches weigh by their tokens.

    Infinite, the worst, without a token and where the likelihood is not a number.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False

    nll: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nll_sum: Tensor, num_tokens: Tensor | int) -> None:
        """Count a batch.

        Args:
            nll_sum: Sum over its tokens of the negative log-likelihood, in nats.
            num_tokens: Number of its tokens that are no padding, ends of replies included.
        """
        # Not in place: states that an evaluation in inference mode made may not be written to by a fit.
        self.nll = self.nll + nll_sum.detach().double()
        self.tokens = self.tokens + num_tokens

    def compute(self) -> Tensor:
        """The perplexity, float64."""
        value = torch.exp(self.nll / self.tokens)
        return torch.where(value.isnan() | (self.tokens == 0), torch.inf, value)


class DialogueMetrics(Metric):
    """How replies compare with their references, and how they differ from each other.

    - `bleu1` ... `bleu4`: BLEU of the corpus (Papineni et al., 2002): n-grams clipped to their number in the reference,
      geometric mean of the precisions of the orders up to n with equal weights, brevity penalty, one reference, NO
      smoothing: 0 where an order has no match, also where replies are too short to have n-grams. As `BLEUScore(n)` of
      torchmetrics.
    - `distinct1`, `distinct2`: different n-grams over all n-grams of all replies (Li et al., 2016).
    - `mean_length`: words of a reply.
    - `embedding_average`, `embedding_greedy`, `embedding_extrema`, where word vectors are given: means over replies of
      `embedding_similarities`; words without a vector are skipped, and a pair of which one side has none scores 0.

    n-grams are counted by 64-bit hashes, the same in every process. All values are 0 without a reply.

    Args:
        words: Words that have a row in `vectors`.
        vectors: float `(words, size)`; without it, or without `words`, there are no embedding metrics.
        known: bool `(words,)`: which rows are vectors (`read_word_vectors`); all by default.
        embedding_name: What the names of the embedding metrics begin with; say so where vectors are a model's own.

    Raises:
        ValueError: If words and vectors do not fit.

    Example:
        >>> metric = DialogueMetrics()
        >>> metric.update([["i", "am", "glad"]], [["i", "am", "sad"]])
        >>> round(float(metric.compute()["bleu1"]), 3)
        0.667
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    matches: Tensor
    totals: Tensor
    lengths: Tensor
    replies: Tensor
    similarities: Tensor
    unigrams: list[Tensor]
    bigrams: list[Tensor]
    vectors: Tensor | None
    known: Tensor | None

    def __init__(
        self,
        words: Sequence[str] | None = None,
        vectors: Tensor | None = None,
        known: Tensor | None = None,
        embedding_name: str = "embedding",
    ) -> None:
        super().__init__()
        if (words is None) != (vectors is None):
            raise ValueError("embedding metrics need words and their vectors: give both, or neither")
        if words is not None and vectors is not None:
            if vectors.ndim != 2 or len(vectors) != len(words):
                raise ValueError(f"vectors must be (words, size), got {tuple(vectors.shape)} for {len(words)} words")
            known = torch.ones(len(words), dtype=torch.bool) if known is None else known
            if known.shape != (len(words),) or known.dtype != torch.bool:
                raise ValueError(f"known must be bool ({len(words)},), got {known.dtype} {tuple(known.shape)}")
            vectors = vectors.detach()
        self.embedding_name = embedding_name
        # Of equal words the first row counts.
        self._rows = {word: row for row, word in reversed(list(enumerate(words or ())))}
        self.register_buffer("vectors", vectors, persistent=False)
        self.register_buffer("known", known if vectors is not None else None, persistent=False)
        for name, shape in (("matches", 4), ("totals", 4), ("lengths", 2)):
            self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("replies", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("similarities", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("unigrams", [], dist_reduce_fx="cat")
        self.add_state("bigrams", [], dist_reduce_fx="cat")
        self._start_lists()

    def _start_lists(self) -> None:
        # A process without a reply would otherwise send floats to those that send integers.
        self.unigrams, self.bigrams = ([torch.zeros(0, dtype=torch.int64, device=self.device)] for _ in range(2))

    def reset(self) -> None:
        """Forget what was counted."""
        super().reset()
        self._start_lists()

    def update(self, replies: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> None:
        """Count a batch.

        Args:
            replies: Words of each reply, without its end.
            references: Words of each reference.

        Raises:
            ValueError: If there is not one reference for each reply.
        """
        if len(replies) != len(references):
            raise ValueError(f"each reply needs its reference, got {len(replies)} and {len(references)}")
        hashes: dict[str, int] = {}
        said, expected = _Corpus(replies, hashes), _Corpus(references, hashes)
        matches, totals = [], []
        for order in ORDERS:
            ours, rows = said.ngrams(order)
            theirs, reference_rows = expected.ngrams(order)
            if order == 1:
                self.unigrams.append(torch.unique(ours).to(self.device))
            elif order == 2:
                self.bigrams.append(torch.unique(ours).to(self.device))
            totals.append(len(ours))
            matches.append(_clipped(_with_row(ours, rows), _with_row(theirs, reference_rows)))
        self.matches = self.matches + torch.tensor(matches, device=self.device)
        self.totals = self.totals + torch.tensor(totals, device=self.device)
        self.lengths = self.lengths + torch.tensor([len(said.words), len(expected.words)], device=self.device)
        self.replies = self.replies + len(replies)
        if self.vectors is not None and len(replies):
            values = embedding_similarities(*self._embed(replies), *self._embed(references))
            sums = torch.stack([values[name].sum() for name in SIMILARITIES])
            self.similarities = self.similarities + sums.to(self.device)

    def _embed(self, texts: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
        """Vectors of the known words `(texts, length, size)`, and where there are any, bool `(texts, length)`."""
        assert self.vectors is not None
        assert self.known is not None
        found = [[row for word in text if (row := self._rows.get(word)) is not None] for text in texts]
        ids = torch.full((len(texts), max(map(len, found), default=0)), -1)
        lengths = torch.tensor([len(row) for row in found])
        ids[torch.arange(ids.shape[1]) < lengths[:, None]] = torch.tensor(
            [row for part in found for row in part]
        ).long()
        ids = ids.to(self.vectors.device)
        present = (ids >= 0) & self.known[ids.clamp(min=0)]
        return self.vectors[ids.clamp(min=0)], present

    def compute(self) -> dict[str, Tensor]:
        """Values by name, float64."""
        reply_length, reference_length = self.lengths.double()
        # Equal where replies are longer, and 1 / 0 without a word, where no order has a match.
        brevity = torch.exp(1 - torch.clamp(reference_length / reply_length, min=1))
        logs = torch.log(self.matches / self.totals.double())
        result = {}
        for order in ORDERS:
            some = bool((self.matches[:order] > 0).all())
            value = brevity * logs[:order].mean().exp()
            result[f"bleu{order}"] = value if some else torch.zeros_like(brevity)
        for name, parts, total in (("distinct1", self.unigrams, 0), ("distinct2", self.bigrams, 1)):
            different = len(torch.unique(dim_zero_cat(parts)))
            result[name] = different / self.totals[total].double().clamp(min=1)
        count = self.replies.double().clamp(min=1)
        result["mean_length"] = reply_length / count
        if self.vectors is not None:
            for name, total_similarity in zip(SIMILARITIES, self.similarities, strict=True):
                result[f"{self.embedding_name}_{name}"] = total_similarity / count
        return result


class _Corpus:
    """Texts as one row of hashed words, with the text that each word is from."""

    def __init__(self, texts: Sequence[Sequence[str]], hashes: dict[str, int]) -> None:
        flat = [word for text in texts for word in text]
        for word in set(flat).difference(hashes):
            digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
            hashes[word] = int.from_bytes(digest, "little", signed=True)
        self.words = torch.tensor([hashes[word] for word in flat], dtype=torch.int64)
        lengths = torch.tensor([len(text) for text in texts], dtype=torch.int64)
        self.rows = torch.arange(len(texts)).repeat_interleave(lengths)

    def ngrams(self, order: int) -> tuple[Tensor, Tensor]:
        """Hashes of the n-grams, and the text of each: int64 `(n-grams,)` twice."""
        count = max(len(self.words) - order + 1, 0)
        mixed = torch.zeros(count, dtype=torch.int64)
        for place in range(order):
            # Integers wrap around, which makes this a random linear hash of words that are random numbers themselves.
            mixed = mixed * _MULTIPLIER + self.words[place : place + count]
        within = self.rows[:count] == self.rows[order - 1 :][:count]
        return mixed[within], self.rows[:count][within]


_MULTIPLIER = 0x5851F42D4C957F2D
_ROW_MULTIPLIER = 0x2545F4914F6CDD1D


def _with_row(hashes: Tensor, rows: Tensor) -> Tensor:
    return hashes + rows * _ROW_MULTIPLIER


def _clipped(ours: Tensor, theirs: Tensor) -> int:
    """Number of elements that two bags share."""
    different, place = torch.unique(torch.cat((ours, theirs)), return_inverse=True)
    counts = [part.bincount(minlength=len(different)) for part in place.split((len(ours), len(theirs)))]
    return int(torch.minimum(*counts).sum())
