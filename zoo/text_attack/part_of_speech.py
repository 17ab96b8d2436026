"""Universal parts of speech of a title's words, so that a swap can keep a word's class."""

from __future__ import annotations

import logging
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from zoo.text_attack.synonyms import read_wordnet, synonym_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

log = logging.getLogger(__name__)

_CLOSED = {
    "DET": "a an the this that these those each every either neither some any no all both half another such",
    "PRON": (
        "i me my mine myself you your yours yourself yourselves he him his himself she her hers herself it its itself "
        "we us our ours ourselves they them their theirs themselves who whom whose which what someone anyone everyone "
        "nobody something anything everything nothing"
    ),
    "ADP": (
        "of in on at by for with without from to into onto upon over under above below between among through during "
        "before after since until about against around across along behind beside besides beyond inside outside near "
        "off out up down via per within toward towards"
    ),
    "CONJ": "and or but nor so yet if because although though while whereas unless than as when where",
    "PRT": "not n't 's",
}
_CLOSED_WORDS = {word: tag for tag, words in _CLOSED.items() for word in words.split()}
# Endings that an inflected word has in place of its base form's, by part of speech.
_ENDINGS = {
    "NOUN": (("ies", "y"), ("ves", "f"), ("ves", "fe"), ("men", "man"), ("es", ""), ("s", "")),
    "VERB": (("ies", "y"), ("ied", "y"), ("es", ""), ("s", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")),
    "ADJ": (("ier", "y"), ("iest", "y"), ("er", "e"), ("est", "e"), ("er", ""), ("est", "")),
}
_ORDER = ("NOUN", "VERB", "ADJ", "ADV")


@runtime_checkable
class PartOfSpeechTagger(Protocol):
    """Tags words."""

    @property
    def name(self) -> str:
        """What result files call the tagger."""
        ...

    def tags(self, texts: Sequence[Sequence[str]]) -> list[list[str]]:
        """The universal tag (NOUN, VERB, ADJ, ADV, NUM, X ...) of each word of each text, given as its words.

        A tagger that does not read the context joins what a word can be: `ADJ|NOUN`. Compare tags with
        `same_part_of_speech`.
        """
        ...


def same_part_of_speech(a: str, b: str, *, noun_is_verb: bool = True) -> bool:
    """Whether words of two tags may replace one another: whether the tags have an alternative in common.

    Args:
        a: A tag, or several joined by `|`.
        b: The same.
        noun_is_verb: Whether nouns and verbs may replace one another, as in TextFooler.
    """
    first, second = set(a.split("|")), set(b.split("|"))
    either = {"NOUN", "VERB"}
    return bool(first & second) or (noun_is_verb and bool(first & either) and bool(second & either))


class NLTKTagger:
    """NLTK's averaged perceptron, which reads the context.

    Raises:
        ImportError: If nltk is not installed.
        FileNotFoundError: If its data is not on disk.
    """

    name = "nltk"

    def __init__(self) -> None:
        way_out = 'part_of_speech="wordnet" tags with the WordNet list, part_of_speech=None does without'
        try:
            self._library: Any = import_module("nltk")
        except ImportError as error:
            raise ImportError(f"this tagger needs nltk: pip install nltk. Otherwise {way_out}") from error
        try:
            self._library.pos_tag_sents([["word"]], tagset="universal")
        except LookupError as error:
            raise FileNotFoundError(
                "NLTK has no tagger on disk: `nltk.download('averaged_perceptron_tagger_eng')` and "
                f"`nltk.download('universal_tagset')` get it. Otherwise {way_out}"
            ) from error

    def tags(self, texts: Sequence[Sequence[str]]) -> list[list[str]]:
        """One tag a word."""
        # The perceptron has no tag for an empty sentence.
        tagged = self._library.pos_tag_sents([list(words) for words in texts if words], tagset="universal")
        rows = iter([[tag for _, tag in row] for row in tagged])
        return [next(rows) if words else [] for words in texts]


class WordNetTagger:
    """The classes that a word, or its base form, has in WordNet, whatever stands around it.

    A word of several classes has them all, joined by `|`. Function words come from a closed list, what has digits is
    NUM, punctuation is `.`, and the rest, such as brands, is X: no known word may replace it.

    Args:
        words: The parts of speech of each word in lower case, or a path that `WordNetSynonyms` takes.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read.
    """

    name = "wordnet"

    def __init__(self, words: Mapping[str, frozenset[str]] | str | Path) -> None:
        if isinstance(words, (str, Path)):
            table = read_wordnet(Path(words).expanduser())
            words = {word: frozenset(parts) for word, parts in table.items()}
        self._words = words
        self._known: dict[str, str] = {}

    def tags(self, texts: Sequence[Sequence[str]]) -> list[list[str]]:
        """The tags that each word can have."""
        return [[self._tag(word.lower()) for word in words] for words in texts]

    def _tag(self, word: str) -> str:
        if word not in self._known:
            self._known[word] = self._look_up(word)
        return self._known[word]

    def _look_up(self, word: str) -> str:
        if word in _CLOSED_WORDS:
            return _CLOSED_WORDS[word]
        parts = set(self._words.get(word, ()))
        for part, endings in _ENDINGS.items():
            if any(part in self._words.get(base, ()) for base in _bases(word, endings)):
                parts.add(part)
        if parts:
            return "|".join(part for part in _ORDER if part in parts)
        if any(character.isdigit() for character in word):
            return "NUM"
        return "X" if any(character.isalpha() for character in word) else "."


def tagger(name: str | Path | None, data_dir: str | Path | None = None) -> PartOfSpeechTagger | None:
    """A tagger by name.

    Args:
        name: "nltk", "wordnet", or the path of a WordNet list; None for no tagger, with a warning.
        data_dir: Where "wordnet" is looked for, and in its folder `synonyms`; `$ZOO_DATA` by default.

    Raises:
        FileNotFoundError: If its data is not on disk.
        ValueError: If the name is unknown.
    """
    if name is None:
        log.warning("no part-of-speech tagger: a swap may turn a noun into an adjective")
        return None
    if str(name) == "nltk":
        return NLTKTagger()
    if str(name) == "wordnet":
        return WordNetTagger(synonym_folder("wordnet", data_dir))
    if not Path(name).expanduser().exists():
        raise ValueError(f"part_of_speech={str(name)!r}, expected 'nltk', 'wordnet', a WordNet list's path, or None")
    return WordNetTagger(name)


def _bases(word: str, endings: Sequence[tuple[str, str]]) -> Iterator[str]:
    for ending, base in endings:
        stem = word.removesuffix(ending)
        if stem != word and len(stem) > 1:
            yield stem + base
            # running, bigger: a doubled consonant before the ending.
            if not base and ending != "s" and len(stem) > 2 and stem[-1] == stem[-2]:
                yield stem[:-1]
