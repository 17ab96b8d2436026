"""Word vectors in text format, and the nearest neighbours of a word among them."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from zoo.common.text_lines import read_lines

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)


class WordVectors:
    """Words by the cosine of their vectors, as in TextFooler (counter-fitted vectors) or from GloVe.

    A file has lines `word number number ...`, or starts with word2vec's line `words dimensions`. Words are taken in
    lower case; of several lines of a word the first counts. Neighbours come from one product of the whole matrix with
    the word's vector, which is kept.

    Args:
        path: The file, plain or `.gz`.
        limit: Only so many lines (files list frequent words first); None for all.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line has not the first line's number of dimensions, or a number that is not finite.
    """

    def __init__(self, path: str | Path, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"limit={limit}, expected a positive number of lines, or None")
        self.path = Path(path).expanduser()
        self.name = f"vectors:{self.path.name}" + (f"[:{limit}]" if limit else "")
        self._words, self._matrix = _read(self.path, limit)
        self._rows = {word: row for row, word in enumerate(self._words)}
        self._nearest: dict[str, list[str]] = {}

    def __len__(self) -> int:
        """Number of words."""
        return len(self._words)

    def neighbours(self, word: str, count: int) -> list[str]:
        """The words with the largest cosine, ties in the file's order; none for a word that has no vector."""
        word = word.lower()
        row = self._rows.get(word)
        if row is None or count < 1:
            return []
        known = self._nearest.get(word)
        wanted = min(count, len(self._words) - 1)
        if known is None or len(known) < wanted:
            cosines = self._matrix @ self._matrix[row]
            cosines[row] = -np.inf
            best = np.argsort(-cosines, kind="stable")[:wanted]
            self._nearest[word] = known = [self._words[int(place)] for place in best]
        return known[:count]

    def cosine(self, a: str, b: str) -> float | None:
        """Cosine of two words; None where one has no vector."""
        first, second = self._rows.get(a.lower()), self._rows.get(b.lower())
        if first is None or second is None:
            return None
        return 1.0 if first == second else float(self._matrix[first].astype(np.float64) @ self._matrix[second])


def _read(path: Path, limit: int | None) -> tuple[list[str], NDArray[np.float32]]:
    expected = "word vectors, one a line: word number number ..."
    words: dict[str, None] = {}
    vectors: list[NDArray[np.float32]] = []
    size = repeated = spaced = empty = lines = 0
    for number, line in read_lines(path, expected):
        fields = line.split()
        if number == 1 and len(fields) == 2 and all(field.isdecimal() for field in fields):
            size = int(fields[1])
            continue
        if limit is not None and lines == limit:
            break
        lines += 1
        size = size or len(fields) - 1
        try:
            vector = np.array(fields[len(fields) - size :], dtype=np.float32) if 0 < size < len(fields) else None
        except ValueError:
            vector = None
        if vector is None or not np.isfinite(vector).all():
            raise ValueError(f"{path}, line {number}: {line[:60]!r}, expected a word and {size} finite numbers")
        length = math.sqrt(float(np.square(vector, dtype=np.float64).sum()))
        word = fields[0].lower()
        if len(fields) > size + 1:
            spaced += 1
        elif word in words:
            repeated += 1
        elif length == 0:
            empty += 1
        else:
            words[word] = None
            vectors.append((vector / length).astype(np.float32))
    if not vectors:
        raise ValueError(f"{path} has no word with a vector, expected {expected}")
    log.info(
        "%s: %d words of %d dimensions; left out: %d repeated, %d of several words, %d vectors of zeros",
        path,
        len(words),
        size,
        repeated,
        spaced,
        empty,
    )
    return list(words), np.stack(vectors)
