"""A title as a list of words that keep their places while they are edited."""

from __future__ import annotations

import re

# An apostrophe, hyphen or the like between letters belongs to the word.
_WORD = re.compile(r"\w+(?:['’\-_*@]\w+)*")  # noqa: RUF001 - the typographic apostrophe is meant


class Words:
    """A text cut once into words and the separators between them; an edit never cuts it again.

    Word `i` stays word `i` whatever is put in its place, even a text with a blank in it.

    Attributes:
        words: The words.
        starts: Character offset of each word in the text that was cut, not in the edited one.
        text: The whole text.

    Example:
        >>> words = Words.of("Mario Kart: Double-Dash!!")
        >>> words.words
        ('Mario', 'Kart', 'Double-Dash')
        >>> words.replaced(1, "Ka rt").replaced(2, "Dash").text
        'Mario Ka rt: Dash!!'
    """

    __slots__ = ("_gaps", "starts", "text", "words")

    def __init__(self, words: tuple[str, ...], gaps: tuple[str, ...], starts: tuple[int, ...]) -> None:
        self.words, self._gaps, self.starts = words, gaps, starts
        self.text = gaps[0] + "".join([word + gap for word, gap in zip(words, gaps[1:], strict=True)])

    @classmethod
    def of(cls, text: str) -> Words:
        """Cut a text."""
        spans = [match.span() for match in _WORD.finditer(text)]
        ends = [0, *(end for _, end in spans)]
        starts = [*(start for start, _ in spans), len(text)]
        gaps = tuple(text[end:start] for end, start in zip(ends, starts, strict=True))
        return cls(tuple(text[start:end] for start, end in spans), gaps, tuple(starts[:-1]))

    def replaced(self, index: int, word: str) -> Words:
        """The text with another word in a place."""
        return Words((*self.words[:index], word, *self.words[index + 1 :]), self._gaps, self.starts)

    def without(self, index: int) -> Words:
        """The text without a word and one blank beside it; punctuation stays, later words move down by one."""
        before, after = self._gaps[index], self._gaps[index + 1]
        if not before or before[-1].isspace():
            after = after.lstrip()
        if not after and index == len(self.words) - 1:
            before = before.rstrip()
        return Words(
            self.words[:index] + self.words[index + 1 :],
            (*self._gaps[:index], before + after, *self._gaps[index + 2 :]),
            self.starts[:index] + self.starts[index + 1 :],
        )

    def sides(self, index: int) -> tuple[str, str, str]:
        """The text before a word, the word, and the text after it."""
        head = self._gaps[0] + "".join(
            [word + gap for word, gap in zip(self.words[:index], self._gaps[1 : index + 1], strict=True)]
        )
        return head, self.words[index], self.text[len(head) + len(self.words[index]) :]

    def window(self, index: int, size: int) -> str:
        """The text of the at most `size` words around a word, moved inwards at the ends of the text."""
        first = max(0, min(index - size // 2, len(self.words) - size))
        last = min(len(self.words), first + size)
        pieces = [
            word + gap for word, gap in zip(self.words[first : last - 1], self._gaps[first + 1 : last], strict=True)
        ]
        return "".join(pieces) + self.words[last - 1]

    def changed(self, other: Words) -> list[int]:
        """Places where two edits of one text differ."""
        return [i for i, (a, b) in enumerate(zip(self.words, other.words, strict=True)) if a != b]

    def __len__(self) -> int:
        """Number of words."""
        return len(self.words)

    def __eq__(self, other: object) -> bool:
        """Whether two texts have the same words and separators."""
        return isinstance(other, Words) and self.words == other.words and self._gaps == other._gaps

    def __hash__(self) -> int:
        """Hash of the text."""
        return hash(self.text)

    def __repr__(self) -> str:
        """The text with its words in brackets."""
        return f"Words({self.text!r}: {list(self.words)})"
