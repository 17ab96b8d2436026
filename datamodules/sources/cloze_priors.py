"""How far one gets without reading: accuracies of rules that know words and positions only."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

    from datamodules.cloze_rows import ClozeRows

_WORD = re.compile(r"\w+")


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _frequency(option: str, counts: Counter[str]) -> int:
    """How often an option is in a text; of several words the rarest says."""
    return min((counts[word] for word in _words(option)), default=0)


@dataclass(frozen=True)
class OptionPriors:
    """Rules that choose an option by its word or its position, learned from training questions.

    A model that does not beat all of them need not have read anything. Options that a rule cannot tell apart share the
    credit, so that a rule without a preference is right as often as chance.

    Attributes:
        num_options: Options of a question.
        majority: The most frequent gold position.
        words: How often each word is in the distinct training passages, in lower case.
        gold: How often each option, in lower case, was the right one.
        offered: How often it was among the options.
    """

    num_options: int
    majority: int
    words: Counter[str]
    gold: Counter[str]
    offered: Counter[str]

    @classmethod
    def fit(cls, train: ClozeRows) -> OptionPriors:
        """Count words, options and positions.

        Raises:
            ValueError: If the questions have no labels.
        """
        if not train.labelled:
            raise ValueError(f"{train.name} has no labels, which the priors are counted from: give labelled questions")
        labels = train.labels.tolist()
        return cls(
            train.num_options,
            int(np.argmax(np.bincount(train.labels, minlength=train.num_options))),
            Counter(word for text in dict.fromkeys(train.articles) for word in _words(text)),
            Counter(options[label].lower() for options, label in zip(train.options, labels, strict=True)),
            Counter(option.lower() for options in train.options for option in options),
        )

    def accuracy(self, rows: ClozeRows) -> dict[str, float]:
        """Accuracy of each rule on labelled questions.

        Args:
            rows: Questions of another part.

        Returns:
            `chance`: 1 / K. `majority`: the most frequent gold position of the training questions. `rarest`: the
            option that is least often in the training passages. `gold`: the option that was most often the right one
            when it was offered, (gold + 1) / (offered + K), which is chance for one never offered. `count`: the option
            that is most often in the question's own passage.

        Raises:
            ValueError: If the questions have no labels or another number of options.
        """
        if not rows.labelled:
            raise ValueError(f"{rows.name} has no labels, so that nothing can be right: give labelled questions")
        if rows.num_options != self.num_options:
            raise ValueError(f"{rows.name} has {rows.num_options} options, the training questions {self.num_options}")
        rates = _per_option(rows, ((option, self._rate(option)) for option in _distinct(rows)))
        frequencies = _per_option(rows, ((option, _frequency(option, self.words)) for option in _distinct(rows)))
        return {
            "chance": 1 / self.num_options,
            "majority": float((rows.labels == self.majority).mean()),
            "rarest": _credit(-frequencies, rows.labels),
            "gold": _credit(rates, rows.labels),
            "count": _credit(_own_counts(rows), rows.labels),
        }

    def _rate(self, option: str) -> float:
        option = option.lower()
        return (self.gold[option] + 1) / (self.offered[option] + self.num_options)


def _distinct(rows: ClozeRows) -> list[str]:
    return list(dict.fromkeys(option for options in rows.options for option in options))


def _per_option(rows: ClozeRows, values: Iterable[tuple[str, float]]) -> npt.NDArray[np.float64]:
    known = dict(values)
    return np.array([[known[option] for option in options] for options in rows.options], dtype=np.float64)


def _own_counts(rows: ClozeRows) -> npt.NDArray[np.float64]:
    passages = {text: Counter(_words(text)) for text in set(rows.articles)}
    return np.array(
        [
            [_frequency(option, passages[text]) for option in options]
            for text, options in zip(rows.articles, rows.options, strict=True)
        ],
        dtype=np.float64,
    )


def _credit(scores: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> float:
    best = scores == scores.max(axis=1, keepdims=True)
    return float((best[np.arange(len(labels)), labels] / best.sum(axis=1)).mean())
