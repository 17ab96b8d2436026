"""Words of emotions: whether a reply says the emotion that it should."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from zoo.common.text_lines import read_lines

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor
    from typing_extensions import Self

log = logging.getLogger(__name__)

NEUTRAL = frozenset({"neutral", "none", "null", "other", "others", "no emotion"})
"""Names of classes that stand for no emotion."""

SYNONYMS: dict[str, frozenset[str]] = {
    "happiness": frozenset({"happiness", "happy", "joy", "joyful", "excited"}),
    "sadness": frozenset({"sadness", "sad"}),
    "anger": frozenset({"anger", "angry", "furious"}),
    "fear": frozenset({"fear", "afraid", "scared", "terrified"}),
    "disgust": frozenset({"disgust", "disgusted"}),
    "surprise": frozenset({"surprise", "surprised"}),
}
"""Names that a class may have, by the name of its words in `DEFAULT_WORDS`."""

DEFAULT_WORDS: dict[str, str] = {
    "happiness": "happy happily glad joy joyful great wonderful love lovely nice fun funny enjoy enjoyed delighted "
    "pleased excited smile laugh cheerful congratulations awesome haha",
    "sadness": "sad sadly sorry unhappy cry crying tears miss lonely alone lost hurt hurts pain upset depressed grief "
    "disappointed heartbroken unfortunately regret",
    "anger": "angry anger mad hate furious annoyed annoying rude stupid idiot damn outrageous unfair fault blame "
    "irritating rage nonsense",
    "fear": "afraid fear scared scary frightened frightening terrified terrible worry worried nervous danger dangerous "
    "panic anxious horror threat nightmare",
    "disgust": "disgust disgusting disgusted gross nasty filthy dirty awful sick sickening ugly yuck stink stinks "
    "revolting rotten horrible vomit",
    "surprise": "surprise surprised surprising wow really unbelievable incredible amazing amazed astonished shocked "
    "suddenly unexpected gosh goodness seriously",
}
"""Plain English words of six emotions, written for this package; a word has one emotion."""

_EXPECTED = "lines word<TAB>emotion, or word<TAB>emotion<TAB>0 or 1"


class EmotionLexicon:
    """The words of each emotion class, and which replies hold one of them.

    Names of classes are compared in lower case and by `SYNONYMS`, so that words of "joy" serve a class "happy". Classes
    that stand for no emotion (`NEUTRAL`) take no words and are no targets. An emotion class without words is logged,
    and replies with that target are left out of what is counted: no reply could ever be right.

    Args:
        words: Words of each emotion, by the emotion's name. Emotions that are no class are logged; words are taken in
            lower case, and those of several words, which no token equals, are logged and left out.
        label_names: Names of the classes, by id.

    Raises:
        ValueError: If no class that is an emotion has a word.
    """

    def __init__(self, words: Mapping[str, Iterable[str]], label_names: Sequence[str]) -> None:
        self.label_names = [str(name) for name in label_names]
        classes: dict[str, list[int]] = {}
        for index, name in enumerate(self.label_names):
            if not is_neutral(name):
                classes.setdefault(_canonical(name), []).append(index)
        self._words: list[set[str]] = [set() for _ in self.label_names]
        unused: list[str] = []
        spaced = 0
        for emotion, entries in words.items():
            indices = classes.get(_canonical(emotion))
            if indices is None:
                unused.append(emotion)
                continue
            lowered = {entry.strip().lower() for entry in entries} - {""}
            single = {entry for entry in lowered if len(entry.split()) == 1}
            spaced += len(lowered) - len(single)
            for index in indices:
                self._words[index] |= single
        emotions = [index for indices in classes.values() for index in indices]
        missing = [self.label_names[index] for index in sorted(emotions) if not self._words[index]]
        if len(missing) == len(emotions):
            raise ValueError(
                f"the lexicon has words for {', '.join(sorted(words)) or 'no emotion'}, and none of the classes "
                f"{', '.join(self.label_names)} is one of them: name the classes as the lexicon does, or give one of "
                f"your own ({_EXPECTED})"
            )
        if missing:
            log.info("no lexicon words for %s: replies with these targets are not counted", ", ".join(missing))
        if unused:
            log.info("the lexicon's words for %s are not used: no such class", ", ".join(sorted(unused)))
        if spaced:
            log.info("%d lexicon entries of several words are left out", spaced)

    @classmethod
    def default(cls, label_names: Sequence[str]) -> Self:
        """The small English lexicon of this package (`DEFAULT_WORDS`).

        Raises:
            ValueError: If it has no word for any class.
        """
        return cls({emotion: words.split() for emotion, words in DEFAULT_WORDS.items()}, label_names)

    @classmethod
    def read(cls, path: str | Path, label_names: Sequence[str]) -> Self:
        """A lexicon from a file of lines `word<TAB>emotion`, or `word<TAB>emotion<TAB>0/1` as NRC's (1: it counts).

        Args:
            path: UTF-8 text, plain or `.gz`.
            label_names: Names of the classes, by id.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If a line has another form, or no class has a word.
        """
        path = Path(path).expanduser()
        words: dict[str, set[str]] = {}
        for number, line in read_lines(path, _EXPECTED):
            fields = [field.strip() for field in line.split("\t")]
            if len(fields) not in (2, 3) or not all(fields) or (len(fields) == 3 and fields[2] not in ("0", "1")):
                raise ValueError(f"{path}, line {number}: {line[:60]!r}, expected {_EXPECTED}")
            entries = words.setdefault(fields[1].lower(), set())
            if len(fields) == 2 or fields[2] == "1":
                entries.add(fields[0])
        try:
            return cls(words, label_names)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def words_of(self, label: int) -> frozenset[str]:
        """Words of a class; none for a neutral one."""
        return frozenset(self._words[label])

    @property
    def has_words(self) -> Tensor:
        """Which classes have words, bool `(classes,)`."""
        return torch.tensor([bool(words) for words in self._words])

    def said(self, replies: Sequence[Sequence[str]], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Which replies hold a word of their target's emotion, and which replies count.

        Args:
            replies: Words of each reply.
            targets: int64 `(replies,)`.

        Returns:
            bool `(replies,)` twice: holds a word (never where it does not count), and counts: the target is an emotion
            that has words.

        Raises:
            ValueError: If there is not one target for each reply, or one is no class.
        """
        if targets.shape != (len(replies),):
            raise ValueError(f"targets must have shape ({len(replies)},), one a reply, got {tuple(targets.shape)}")
        labels: list[int] = targets.tolist()
        wrong = [label for label in labels if not 0 <= label < len(self._words)]
        if wrong:
            raise ValueError(f"target {wrong[0]} is no class, expected 0 to {len(self._words) - 1}")
        counts = [bool(self._words[label]) for label in labels]
        pairs = zip(replies, labels, strict=True)
        holds = [not self._words[label].isdisjoint(word.lower() for word in reply) for reply, label in pairs]
        return torch.tensor(holds, dtype=torch.bool), torch.tensor(counts, dtype=torch.bool)


def emotion_w(replies: Sequence[Sequence[str]], targets: Tensor, lexicon: EmotionLexicon) -> float:
    """Share of replies with at least one word of the emotion that they should have (emotion-w of the EmoDS paper).

    Over replies whose target is an emotion with words in the lexicon; 0 without one. `EmotionMetrics` counts the same
    over several batches and processes.

    Args:
        replies: Words of each reply.
        targets: int64 `(replies,)`, classes.
        lexicon: The words.

    Example:
        >>> lexicon = EmotionLexicon({"joy": ["glad"]}, ["neutral", "happy"])
        >>> emotion_w([["i", "am", "glad"], ["oh"], ["glad"]], torch.tensor([1, 1, 0]), lexicon)
        0.5
    """
    holds, counts = lexicon.said(replies, targets)
    return int(holds.sum()) / max(int(counts.sum()), 1)


def is_neutral(name: str) -> bool:
    """Whether a class's name stands for no emotion."""
    return _plain(name) in NEUTRAL


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())


def _canonical(name: str) -> str:
    plain = _plain(name)
    return next((emotion for emotion, names in SYNONYMS.items() if plain in names), plain)
