"""Defences: what a title passes through before the recommender reads it."""

from __future__ import annotations

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from zoo.text_attack.stealth import levenshtein
from zoo.text_attack.words import Words

if TYPE_CHECKING:
    from collections.abc import Iterable

_log = logging.getLogger(__name__)

# Repairs that are remembered; far more than the words of a catalogue and of the attacks on it.
_CACHE_WORDS = 2**17


class TextDefense(Protocol):
    """Makes titles safer to read, whether they were attacked or not."""

    def __call__(self, titles: list[str]) -> list[str]:
        """The repaired titles, in order."""
        ...


class SpellDefense:
    """Spelling repair with the words of the catalogue as the dictionary.

    A known word stays, in any case. Of an unknown one the apostrophes and hyphens inside are dropped, if that makes it
    known; else it becomes the nearest known word within `max_edit` edits, the more frequent one on ties and then the
    first in the alphabet; else it stays. A new word is written as the catalogue writes it, or in the case of the old
    one, whichever is fewer edits away from it. Repairing twice changes nothing more.

    Near words are found through what is left of the known words without up to `max_edit` of their letters: two words
    within so many edits have such a remainder in common. Repairs are remembered.

    Args:
        words: Clean titles, or the number of occurrences of each word as it is written.
        max_edit: Most edits (insertion, deletion, substitution of a letter) that a repair undoes.

    Raises:
        ValueError: If `max_edit` is below 0, a count is below 1, or there is no word.

    Example:
        >>> defense = SpellDefense(["Super Mario Kart", "Mario Party"])
        >>> defense(["Supr Mar'io Krat 8"])
        ['Super Mario Kart 8']
    """

    def __init__(self, words: Iterable[str] | Mapping[str, int], max_edit: int = 2) -> None:
        if max_edit < 0:
            raise ValueError(f"max_edit must be at least 0, got {max_edit}")
        self.max_edit = max_edit
        self._spellings: dict[str, Counter[str]] = defaultdict(Counter)
        for word, count in _count(words).items():
            self._spellings[word.lower()][word] += count
        if not self._spellings:
            raise ValueError("the catalogue has no word: give titles, or counts of words")
        self._counts = {word: forms.total() for word, forms in self._spellings.items()}
        self._remainders: dict[str, list[str]] = defaultdict(list)
        for word in self._counts:
            for rest in _remainders(word, max_edit):
                self._remainders[rest].append(word)
        # Looking a word up must not add it.
        self._spellings, self._remainders = dict(self._spellings), dict(self._remainders)
        self._repaired: dict[str, str] = {}

    @property
    def num_words(self) -> int:
        """Number of known words, their cases not told apart."""
        return len(self._counts)

    def knows(self, word: str) -> bool:
        """Whether a word, in any case, is one of the catalogue."""
        return word.lower() in self._counts

    def __call__(self, titles: list[str]) -> list[str]:
        """Repair the words of titles; what stands between words stays.

        Args:
            titles: Titles.

        Returns:
            As many titles.
        """
        return [self._repair_title(title) for title in titles]

    def _repair_title(self, title: str) -> str:
        words = Words.of(title)
        for place, word in enumerate(words.words):
            repaired = self._repaired.get(word)
            if repaired is None:
                repaired = self._repair(word)
                if len(self._repaired) >= _CACHE_WORDS:
                    self._repaired.clear()
                self._repaired[word] = repaired
            if repaired != word:
                words = words.replaced(place, repaired)
        return words.text

    def _repair(self, word: str) -> str:
        lower = word.lower()
        if lower in self._counts:
            return word
        plain = word.translate(_INNER_MARKS)
        if plain.lower() in self._counts:
            return plain
        near = self._nearest(lower)
        return word if near is None else self._spelling(near, word)

    def _nearest(self, word: str) -> str | None:
        candidates = {known for rest in _remainders(word, self.max_edit) for known in self._remainders.get(rest, ())}
        ranked = ((levenshtein(word, known), -self._counts[known], known) for known in candidates)
        # A common remainder bounds the distance from below only.
        best = min((entry for entry in ranked if entry[0] <= self.max_edit), default=None)
        return None if best is None else best[2]

    def _spelling(self, known: str, written: str) -> str:
        """How to write a known word in place of another one that was written."""
        forms = self._spellings[known]
        choices = {*forms, _cased_like(known, written)}
        return min(choices, key=lambda form: (levenshtein(form, written), -forms[form], form))


_INNER_MARKS = str.maketrans("", "", "'’-")  # noqa: RUF001 - the typographic apostrophe is meant


def _count(words: Iterable[str] | Mapping[str, int]) -> Counter[str]:
    if not isinstance(words, Mapping):
        return Counter(word for title in words for word in Words.of(title).words)
    counts: Counter[str] = Counter()
    for word, count in words.items():
        if count < 1:
            raise ValueError(f"the word {word!r} must occur at least once, got {count}")
        if Words.of(word).words == (word,):
            counts[word] += count
    if len(counts) < len(words):
        _log.info("%d of %d entries are no single word and are not used", len(words) - len(counts), len(words))
    return counts


def _remainders(word: str, max_edit: int) -> set[str]:
    """The word without each choice of up to `max_edit` of its letters."""
    found = {word}
    longest = found
    for _ in range(max_edit):
        longest = {rest[:i] + rest[i + 1 :] for rest in longest for i in range(len(rest))}
        found = found | longest
    return found


def _cased_like(word: str, pattern: str) -> str:
    if len(pattern) > 1 and pattern.isupper():
        return word.upper()
    return word[:1].upper() + word[1:] if pattern[:1].isupper() else word


def recovery(
    clean: Tensor | Sequence[float] | float,
    attacked: Tensor | Sequence[float] | float,
    defended: Tensor | Sequence[float] | float,
) -> float:
    """Share of an attack's effect that a defence undoes: 1 - (defended - clean) / (attacked - clean).

    Args:
        clean: Exposure of the original titles, one a target, or its mean.
        attacked: Exposure of the attacked titles.
        defended: Exposure of the attacked titles behind the defence.

    Returns:
        1 if all is undone, 0 if nothing is; below 0 or above 1 where the defence overshoots. Of the means, since the
        ratio of a target on which the attack failed has no number. If the attack had no effect on the means: 1 if the
        defence had none either, else NaN.

    Raises:
        ValueError: If the three do not hold as many targets, or a number is NaN or infinite.
    """
    given = {"clean": clean, "attacked": attacked, "defended": defended}
    values = {name: torch.as_tensor(value, dtype=torch.float64).flatten() for name, value in given.items()}
    lengths = {name: len(value) for name, value in values.items()}
    if len(set(lengths.values())) != 1 or not lengths["clean"]:
        raise ValueError(f"clean, attacked and defended must hold one number a target, got {lengths}")
    for name, value in values.items():
        if not bool(value.isfinite().all()):
            raise ValueError(f"{name} must be finite, got {value.tolist()}")
    before, after, repaired = (float(value.mean()) for value in values.values())
    if after == before:
        return 1.0 if repaired == before else math.nan
    return 1 - (repaired - before) / (after - before)
