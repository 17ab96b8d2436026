"""Cloze questions with options, as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

UNLABELLED = -100


@dataclass(frozen=True)
class ClozeRows:
    """Questions with one placeholder and K options each, as text.

    Attributes:
        name: what messages call these questions, such as `recam task 1 train`.
        articles: the passage of each question; empty where there is none.
        questions: the questions, each with exactly one placeholder.
        options: the K options of each question.
        labels: `(rows,)`, the gold option, -100 in every row where the file has no labels.
        ids: what identifies each question.
        places: where each question stands, such as `train.jsonl, line 12`, for messages.
    """

    name: str
    articles: list[str]
    questions: list[str]
    options: list[list[str]]
    labels: npt.NDArray[np.int64]
    ids: list[str]
    places: list[str]

    def __post_init__(self) -> None:
        """Check that the columns fit each other.

        Raises:
            ValueError: columns of different lengths, rows of different numbers of options, a label out of range, or
                rows with a label beside rows without.
        """
        rows = len(self.questions)
        columns = {
            "articles": len(self.articles),
            "options": len(self.options),
            "labels": len(self.labels),
            "ids": len(self.ids),
            "places": len(self.places),
        }
        for column, length in columns.items():
            if length != rows:
                raise ValueError(f"{self.name}: {rows} questions, but {length} {column}")
        if not rows:
            raise ValueError(f"{self.name}: no question; expected at least one")
        width = self.num_options
        for row, options in enumerate(self.options):
            if len(options) != width:
                raise ValueError(
                    f"{self.places[row]}: {len(options)} options, but {self.places[0]} has {width}; every question of "
                    f"{self.name} needs the same number"
                )
        missing = self.labels == UNLABELLED
        if missing.any() and not missing.all():
            first = int(np.argmax(missing))
            raise ValueError(
                f"{self.places[first]}: no label, while other questions of {self.name} have one; label all or none"
            )
        wrong = ~missing & ((self.labels < 0) | (self.labels >= width))
        if wrong.any():
            first = int(np.argmax(wrong))
            raise ValueError(f"{self.places[first]}: label {int(self.labels[first])} out of range 0..{width - 1}")

    def __len__(self) -> int:
        """Number of questions."""
        return len(self.questions)

    @property
    def labelled(self) -> bool:
        """Whether the gold options are known."""
        return bool(self.labels[0] != UNLABELLED)

    @property
    def num_options(self) -> int:
        """Number of options K of every question."""
        return len(self.options[0])

    def select(self, indices: Sequence[int] | npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> ClozeRows:
        """Questions at `indices` (or where a boolean mask is true), in that order.

        Raises:
            ValueError: no question is left, or the mask is of another length.
            IndexError: an index out of range.
        """
        chosen = np.asarray(indices)
        if chosen.dtype == np.bool_:
            if chosen.shape != (len(self),):
                raise ValueError(f"{self.name}: a mask of shape {chosen.shape} for {len(self)} questions")
            chosen = np.flatnonzero(chosen)
        places = [int(index) for index in chosen]
        return ClozeRows(
            name=self.name,
            articles=[self.articles[index] for index in places],
            questions=[self.questions[index] for index in places],
            options=[self.options[index] for index in places],
            labels=self.labels[np.asarray(places, dtype=np.int64)],
            ids=[self.ids[index] for index in places],
            places=[self.places[index] for index in places],
        )

    @staticmethod
    def concatenate(parts: Sequence[ClozeRows], name: str) -> ClozeRows:
        """All questions of `parts`, in order.

        Raises:
            ValueError: no part, parts of different numbers of options, or labelled beside unlabelled parts.
        """
        if not parts:
            raise ValueError(f"{name}: no part to join; expected at least one")
        return ClozeRows(
            name=name,
            articles=[article for part in parts for article in part.articles],
            questions=[question for part in parts for question in part.questions],
            options=[options for part in parts for options in part.options],
            labels=np.concatenate([part.labels for part in parts]),
            ids=[identity for part in parts for identity in part.ids],
            places=[place for part in parts for place in part.places],
        )

    def accepted(self, lenient: bool) -> npt.NDArray[np.bool_]:
        """Answers that count as right: `(rows, options)`, all false where there are no labels.

        Args:
            lenient: whether options with the same text as the gold one, whatever its case, count as right, too.
        """
        chosen = np.zeros((len(self), self.num_options), dtype=np.bool_)
        if not self.labelled:
            return chosen
        chosen[np.arange(len(self)), self.labels] = True
        if lenient:
            for row, (options, label) in enumerate(zip(self.options, self.labels.tolist(), strict=True)):
                # A lower-cased vocabulary cannot tell `Warning` from `warning`.
                gold = options[label].casefold()
                chosen[row] |= np.array([option.casefold() == gold for option in options])
        return chosen
