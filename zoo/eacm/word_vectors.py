"""Word vectors in text format, and how alike two replies are by them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.common.text_lines import read_lines

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger(__name__)

_EXPECTED = "word vectors, one a line: word number number ..."


def read_word_vectors(path: str | Path, words: Sequence[str], size: int | None = None) -> tuple[Tensor, Tensor]:
    """The vectors of a vocabulary.

    A file has lines `word number number ...` with a blank or a tab between, and may start with word2vec's line
    `words dimensions`. A word takes the vector of its own spelling; without one, the first whose lower-cased spelling
    is the word's. Only lines of words that are asked for are turned into numbers. Coverage and lines of several words,
    which no vocabulary holds, are logged.

    Args:
        path: The file, plain or `.gz`.
        words: The vocabulary, by id; a word may occur more than once.
        size: Dimensions that the vectors must have; by default those of the file's first line.

    Returns:
        Vectors, float32 `(words, size)`, zeros for words that the file lacks, and which words it has, bool `(words,)`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file's vectors have another size, a line is too short, or a number is not finite.
    """
    if size is not None and size < 1:
        raise ValueError(f"size of word vectors must be at least 1, got {size}")
    path = Path(path).expanduser()
    rows: dict[str, list[int]] = {}
    for row, word in enumerate(words):
        rows.setdefault(word, []).append(row)
    exact: dict[str, Tensor] = {}
    lowered: dict[str, Tensor] = {}
    first, repeated, spaced = True, 0, 0
    for number, line in read_lines(path, _EXPECTED):
        # At ASCII blanks only: some words of public files are made of other ones.
        fields = line.replace("\t", " ").rstrip(" ").split(" ")
        if first:
            first = False
            header = size != 1 and len(fields) == 2 and all(field.isdecimal() for field in fields)
            found = int(fields[1]) if header else len(fields) - 1
            size = found if size is None else size
            if found != size:
                raise ValueError(
                    f"{path} has vectors of {found} dimensions, expected {size}: take another file, or set the "
                    f"embedding size to {found}"
                )
            if header:
                continue
        assert size is not None
        if len(fields) < size + 1:
            raise ValueError(f"{path}, line {number}: {len(fields) - 1} numbers after {fields[0]!r}, expected {size}")
        if len(fields) > size + 1:
            # A word with blanks in it has numbers in the last places, and something else in one before them.
            if all(_is_number(field) for field in fields[1:]):
                raise ValueError(
                    f"{path}, line {number}: {len(fields) - 1} numbers after {fields[0]!r}, expected {size}"
                )
            spaced += 1
            continue
        word = fields[0]
        if word in rows:
            if word in exact:
                repeated += 1
            else:
                exact[word] = _vector(path, number, fields)
        elif (lower := word.lower()) in rows and lower not in lowered:
            lowered[lower] = _vector(path, number, fields)
    vectors, known = torch.zeros(len(words), size or 0), torch.zeros(len(words), dtype=torch.bool)
    for word, vector in (lowered | exact).items():
        vectors[rows[word]] = vector
        known[rows[word]] = True
    report = log.info if bool(known.any()) else log.warning
    report(
        "%s: vectors of %d of %d words (coverage %.3f); left out: %d repeated lines, %d of several words",
        path, int(known.sum()), len(words), coverage(known), repeated, spaced,
    )  # fmt: skip
    return vectors, known


def coverage(known: Tensor) -> float:
    """Share of words that have a vector; 0 without words.

    Args:
        known: bool `(words,)`, as `read_word_vectors` gives it.
    """
    return float(known.sum()) / max(len(known), 1)


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _vector(path: Path, number: int, fields: list[str]) -> Tensor:
    try:
        values = [float(field) for field in fields[1:]]
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}, expected {_EXPECTED}") from error
    vector = torch.tensor(values)
    if not bool(vector.isfinite().all()):
        place = int(vector.isfinite().int().argmin())
        raise ValueError(f"{path}, line {number}: {fields[1 + place]} of {fields[0]!r} is not a finite float32")
    return vector


def embedding_similarities(
    replies: Tensor, reply_known: Tensor, references: Tensor, reference_known: Tensor
) -> dict[str, Tensor]:
    """Cosines of replies with their references by word vectors (Liu et al., EMNLP 2016).

    - average: of the two mean vectors.
    - greedy: each word with the nearest word of the other side, the mean over words; the mean of both directions.
    - extrema: of the two vectors that hold in each dimension the value farthest from 0 (of equals the positive one).

    Args:
        replies: Vectors of the words, `(batch, length, size)`.
        reply_known: bool `(batch, length)`: the words that count.
        references: `(batch, reference length, size)`.
        reference_known: bool `(batch, reference length)`.

    Returns:
        float64 `(batch,)` by name; 0 where either side has no word that counts.
    """
    # In float64, which autocast leaves alone.
    replies, references = replies.double(), references.double()
    result = {
        "average": F.cosine_similarity(_mean(replies, reply_known), _mean(references, reference_known)),
        "extrema": F.cosine_similarity(_extrema(replies, reply_known), _extrema(references, reference_known)),
    }
    both = reply_known.any(1) & reference_known.any(1)
    if not replies.shape[1] or not references.shape[1]:
        return {name: torch.zeros_like(both, dtype=torch.float64) for name in ("average", "greedy", "extrema")}
    cosines = torch.bmm(F.normalize(replies, dim=-1), F.normalize(references, dim=-1).mT)
    forth = _best(cosines, reference_known, reply_known)
    result["greedy"] = (forth + _best(cosines.mT, reply_known, reference_known)) / 2
    return {name: torch.where(both, values, 0.0) for name, values in result.items()}


def _mean(vectors: Tensor, known: Tensor) -> Tensor:
    return (vectors * known[..., None]).sum(1) / known.sum(1, keepdim=True).clamp(min=1)


def _extrema(vectors: Tensor, known: Tensor) -> Tensor:
    if not vectors.shape[1]:
        return vectors.sum(1)
    # Zero in place of a word that does not count can be an extreme only where no word is farther from it.
    kept = vectors * known[..., None]
    highest, lowest = kept.amax(1), kept.amin(1)
    return torch.where(highest >= -lowest, highest, lowest)


def _best(cosines: Tensor, candidates: Tensor, counted: Tensor) -> Tensor:
    """Mean over the rows that count of the largest value among the candidates."""
    best = cosines.masked_fill(~candidates[:, None], -torch.inf).amax(2)
    return torch.where(counted, best, 0.0).sum(1) / counted.sum(1).clamp(min=1)
