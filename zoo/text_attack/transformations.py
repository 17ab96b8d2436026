"""What may be put in a word's place: typing errors, marks, look-alike letters, synonyms, a language model's words."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable, Sequence

    from zoo.text_attack.masked_lm import MaskedLanguageModel
    from zoo.text_attack.synonyms import SynonymSource
    from zoo.text_attack.words import Words

CHARACTER_EDITS = ("swap", "substitute", "delete", "insert")
MASKED_METHODS = ("bae", "bert-attack")
_LATIN = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ013-"
# The same order in Cyrillic, Greek, Armenian, IPA and full-width look-alikes, one character for one.
_LOOK_ALIKE = "аЬсԁеƒɡһіјκⅼмոоρԛгѕтυνԝхуᴢΑΒϹᎠΕҒԌΗΙЈΚᏞΜΝΟΡԚᎡЅΤՍѴԜΧΥΖОІЗ‑"  # noqa: RUF001
HOMOGLYPHS = dict(zip(_LATIN, _LOOK_ALIKE, strict=True))


@runtime_checkable
class Transformation(Protocol):
    """What the search asks for candidates of one word.

    One that takes words from a source may say which in an attribute `source_name`, for the result file.
    """

    def candidates(self, words: Words, index: int, rng: random.Random) -> list[Words]:
        """Texts that differ from `words` in the word at `index` alone.

        Repeats and the unchanged text are allowed; the search drops them.

        Args:
            words: The text as it is now.
            index: Place of the word.
            rng: The only source of chance.
        """
        ...


class CharacterEdits:
    """DeepWordBug's typing errors: one of each kind, each at one random position of the word.

    Words of one character have none. A swap is of two different neighbours and a substitute is another letter, so
    that every candidate is an edit: at Levenshtein distance 1, or 2 for a swap.

    Args:
        kinds: Of "swap" two neighbours, "substitute" a letter, "delete" a letter, "insert" a letter before one;
            new letters are ASCII letters of both cases.
        inner: Leave the first and the last character where they are, as TextBugger does.

    Raises:
        ValueError: If a kind is unknown, or there is none.
    """

    def __init__(self, kinds: Sequence[str] = CHARACTER_EDITS, *, inner: bool = False) -> None:
        unknown = [kind for kind in kinds if kind not in CHARACTER_EDITS]
        if unknown or not kinds:
            raise ValueError(f"kinds must be some of {', '.join(CHARACTER_EDITS)}; got {list(kinds)}")
        self.kinds, self.inner = tuple(kinds), inner

    def candidates(self, words: Words, index: int, rng: random.Random) -> list[Words]:
        """See `Transformation`."""
        word = words.words[index]
        if len(word) < 2:
            return []
        edited = [self._edit(kind, word, rng) for kind in self.kinds]
        return [words.replaced(index, new) for new in edited if new is not None]

    def _edit(self, kind: str, word: str, rng: random.Random) -> str | None:
        first, last = (1, len(word) - 1) if self.inner else (0, len(word))
        if kind == "swap":
            places = [i for i in range(first, last - 1) if word[i] != word[i + 1]]
        else:
            places = list(range(first, last))
        if not places:
            return None
        i = rng.choice(places)
        if kind == "swap":
            return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
        if kind == "delete":
            return word[:i] + word[i + 1 :]
        if kind == "insert":
            return word[:i] + rng.choice(string.ascii_letters) + word[i:]
        return word[:i] + rng.choice(string.ascii_letters.replace(word[i], "")) + word[i + 1 :]


class InsertMarks:
    """PuncAttack's marks inside a word: each mark at each place between two characters, 2 (len - 1) candidates for two.

    Args:
        marks: The marks, one character each.

    Raises:
        ValueError: If there is none.
    """

    def __init__(self, marks: str = "'-") -> None:
        if not marks:
            raise ValueError("marks must be a text of at least one character, got ''")
        self.marks = marks

    def candidates(self, words: Words, index: int, rng: random.Random) -> list[Words]:
        """See `Transformation`."""
        word = words.words[index]
        return [words.replaced(index, word[:i] + mark + word[i:]) for mark in self.marks for i in range(1, len(word))]


class InsertBlank:
    """TextBugger's blank inside a word, before one random character that is neither the first nor the last."""

    def candidates(self, words: Words, index: int, rng: random.Random) -> list[Words]:
        """See `Transformation`."""
        word = words.words[index]
        if len(word) < 3:
            return []
        place = rng.randrange(1, len(word) - 1)
        return [words.replaced(index, word[:place] + " " + word[place:])]


class Homoglyphs:
    """One random letter of the word becomes a letter of another script that looks alike; the length stays."""

    def candidates(self, words: Words, index: int, rng: random.Random) -> list[Words]:
        """See `Transformation`."""
        word = words.words[index]
        places = [i for i, letter in enumerate(word) if letter in HOMOGLYPHS]
        if not places:
            return []
        place = rng.choice(places)
        return [words.replaced(index, word[:place] + HOMOGLYPHS[word[place]] + word[place + 1 :])]


class SynonymSwap:
    """Words that a source gives for a word, in the word's case.

    Args:
        source: Where they come from.
        max_candidates: At most so many, nearest first.
        min_cosine: Least cosine to the word in its place; words for which the source has none stay.

    Raises:
        ValueError: If `max_candidates` is below 1.
    """

    def __init__(self, source: SynonymSource, max_candidates: int = 50, min_cosine: float | None = None) -> None:
        _check_count(max_candidates)
        self.source, self.max_candidates, self.min_cosine = source, max_candidates, min_cosine

    @property
    def source_name(self) -> str:
        """What result files call the source."""
        return self.source.name

    def candidates(self, words: Words, index: int, rng: random.Random) -> list[Words]:
        """See `Transformation`."""
        word = words.words[index]
        found = self.source.neighbours(word.lower(), self.max_candidates)
        if self.min_cosine is not None:
            found = [new for new in found if _near(self.source.cosine(word.lower(), new), self.min_cosine)]
        return [words.replaced(index, with_case_of(word, new)) for new in found]


class MaskedWordSwap:
    """Words that a masked language model expects in a word's place, in the word's case.

    Args:
        masked_lm: The language model.
        method: "bae" masks the word and takes whole words; "bert-attack" leaves it unmasked and takes the products of
            its pieces' candidates.
        max_candidates: At most so many, most likely first.
        min_prob: Least probability of one.

    Raises:
        ValueError: If the method is unknown, or `max_candidates` is below 1.
    """

    def __init__(
        self,
        masked_lm: MaskedLanguageModel,
        method: Literal["bae", "bert-attack"] = "bae",
        max_candidates: int = 48,
        min_prob: float = 5e-4,
    ) -> None:
        if method not in MASKED_METHODS:
            raise ValueError(f"method must be one of {', '.join(MASKED_METHODS)}; got {method!r}")
        _check_count(max_candidates)
        self.masked_lm, self.max_candidates, self.min_prob = masked_lm, max_candidates, min_prob
        self.method: Literal["bae", "bert-attack"] = method

    @property
    def source_name(self) -> str:
        """What result files call the language model."""
        return self.masked_lm.name

    def candidates(self, words: Words, index: int, rng: random.Random) -> list[Words]:
        """See `Transformation`."""
        word = words.words[index]
        contexts = [words.sides(index)]
        (found,) = self.masked_lm.word_candidates(contexts, self.method, self.max_candidates, self.min_prob)
        return [words.replaced(index, with_case_of(word, new)) for new in found]


class Union:
    """The candidates of several transformations, in their order.

    Args:
        *transformations: At least one.

    Raises:
        ValueError: If there is none.
    """

    def __init__(self, *transformations: Transformation) -> None:
        if not transformations:
            raise ValueError("Union needs at least one transformation")
        self.transformations = transformations

    @property
    def source_name(self) -> str | None:
        """The names of the parts' sources, or None if no part has one."""
        return join_names(getattr(part, "source_name", None) for part in self.transformations)

    def candidates(self, words: Words, index: int, rng: random.Random) -> list[Words]:
        """See `Transformation`."""
        return [new for part in self.transformations for new in part.candidates(words, index, rng)]


def with_case_of(word: str, new: str) -> str:
    """A new word in the case of the one it replaces: lower, UPPER or Capitalised; as it is for a word like iPod.

    Example:
        >>> with_case_of("Turtle", "tortoise"), with_case_of("LEGO", "brick"), with_case_of("iPod", "player")
        ('Tortoise', 'BRICK', 'player')
    """
    if word.islower():
        return new.lower()
    if word.isupper() and len(word) > 1:
        return new.upper()
    return new[:1].upper() + new[1:] if word[:1].isupper() else new


def join_names(names: Iterable[str | None]) -> str | None:
    """The different names that are given, joined by a plus sign; None if none is."""
    return "+".join(dict.fromkeys(name for name in names if name)) or None


def _near(cosine: float | None, least: float) -> bool:
    return cosine is None or cosine >= least


def _check_count(max_candidates: int) -> None:
    if max_candidates < 1:
        raise ValueError(f"max_candidates must be at least 1, got {max_candidates}")
