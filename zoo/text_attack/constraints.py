"""Which words an attack may touch, and which texts are still close enough to the original."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from zoo.text_attack.word_lists import PROTECTED_WORDS, STOPWORDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from zoo.text_attack.part_of_speech import PartOfSpeechTagger
    from zoo.text_attack.sentence_encoders import SentenceEncoder
    from zoo.text_attack.synonyms import SynonymSource
    from zoo.text_attack.words import Words

METRICS = ("angular", "cosine")
REFERENCES = ("original", "previous")


@runtime_checkable
class PreConstraint(Protocol):
    """Says which words may be edited at all."""

    def modifiable(self, words: Words) -> set[int]:
        """Places of the words that may be edited, in the original text."""
        ...


@runtime_checkable
class Constraint(Protocol):
    """Says which edited texts may be submitted."""

    def accept(self, original: Words, previous: Words, candidates: list[Words], index: int) -> list[bool]:
        """One answer for each candidate.

        Args:
            original: The text before any edit.
            previous: The text that the candidates are edits of.
            candidates: Texts that differ from `previous` in one word; at least one.
            index: Place of that word.
        """
        ...


class Stopwords:
    """Leaves function words alone, however they are capitalised.

    Args:
        words: The list, in lower case; None leaves none alone.
        case_sensitive: Compare words as they are, as the official code does: "The" may then be edited.
    """

    def __init__(self, words: Iterable[str] | None = STOPWORDS, *, case_sensitive: bool = False) -> None:
        self.words, self.case_sensitive = frozenset(words or ()), case_sensitive

    def modifiable(self, words: Words) -> set[int]:
        """See `PreConstraint`."""
        return {i for i, word in enumerate(words.words) if self._plain(word) not in self.words}

    def _plain(self, word: str) -> str:
        return word if self.case_sensitive else word.lower().replace("’", "'")  # noqa: RUF001


class ProtectedWords:
    """Leaves given words alone wherever they stand and however they are capitalised, such as a brand's.

    Args:
        words: The words.
    """

    def __init__(self, words: Iterable[str] = PROTECTED_WORDS) -> None:
        self.words = frozenset(word.lower() for word in words)

    def modifiable(self, words: Words) -> set[int]:
        """See `PreConstraint`."""
        return {i for i, word in enumerate(words.words) if word.lower() not in self.words}


class ReadableWords:
    """Leaves words alone that begin after what a victim reads: editing them costs queries and changes nothing.

    Args:
        limit: Characters of the original text that the victim reads.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def modifiable(self, words: Words) -> set[int]:
        """See `PreConstraint`."""
        return {i for i, start in enumerate(words.starts) if start < self.limit}


class EditDistance:
    """Limits the Levenshtein distance between the whole text and the original one.

    Args:
        max_distance: The largest one allowed.

    Raises:
        ValueError: If that is below 1.
    """

    def __init__(self, max_distance: int = 30) -> None:
        if max_distance < 1:
            raise ValueError(f"the largest edit distance must be at least 1, got {max_distance}")
        self.max_distance = max_distance

    def accept(self, original: Words, previous: Words, candidates: list[Words], index: int) -> list[bool]:
        """See `Constraint`."""
        return [self._near(original, candidate) for candidate in candidates]

    def _near(self, original: Words, candidate: Words) -> bool:
        from zoo.text_attack.stealth import levenshtein

        # Rewriting each changed word whole is one way to make the edit, so its cost bounds the distance.
        pairs = [(original.words[i], candidate.words[i]) for i in original.changed(candidate)]
        if sum(max(len(old), len(new)) for old, new in pairs) <= self.max_distance:
            return True
        return levenshtein(original.text, candidate.text) <= self.max_distance


class WordCosine:
    """Asks for a least cosine between a new word and the original word in its place; unknown words pass.

    Args:
        source: Where the vectors are.
        min_cosine: The least cosine, in -1..1.
    """

    def __init__(self, source: SynonymSource, min_cosine: float = 0.6) -> None:
        self.source, self.min_cosine = source, _checked("min_cosine", min_cosine, -1.0)

    def accept(self, original: Words, previous: Words, candidates: list[Words], index: int) -> list[bool]:
        """See `Constraint`."""
        word = original.words[index].lower()
        cosines = [self.source.cosine(word, candidate.words[index].lower()) for candidate in candidates]
        return [cosine is None or cosine >= self.min_cosine for cosine in cosines]


class PartOfSpeech:
    """Asks that a new word has the universal part of speech of the original word in its place.

    Words are tagged among the four words on each side of them.

    Args:
        tagger: Tags words.
        noun_is_verb: Let nouns and verbs replace one another, as TextFooler does.
    """

    def __init__(self, tagger: PartOfSpeechTagger, *, noun_is_verb: bool = True) -> None:
        self.tagger, self.noun_is_verb = tagger, noun_is_verb

    def accept(self, original: Words, previous: Words, candidates: list[Words], index: int) -> list[bool]:
        """See `Constraint`."""
        from zoo.text_attack.part_of_speech import same_part_of_speech

        first = max(0, index - 4)
        before, after = list(original.words[first:index]), list(original.words[index + 1 : index + 5])
        new_words = [original.words[index], *(candidate.words[index] for candidate in candidates)]
        tags = [tagged[index - first] for tagged in self.tagger.tags([[*before, new, *after] for new in new_words])]
        return [same_part_of_speech(tags[0], tag, noun_is_verb=self.noun_is_verb) for tag in tags[1:]]


class SentenceSimilarity:
    """Asks that an edited text keeps a least similarity to its reference under a sentence encoder.

    All candidates of a word are encoded in one call.

    Args:
        encoder: The sentence encoder.
        min_similarity: The least similarity.
        metric: "angular", 1 - arccos(cos) / pi, or "cosine".
        reference: Compare with the "original" text, or with the "previous" one as TextFooler does: small steps may
            then add up.
        window: Compare the so many words around the edit; the whole texts if None.
        skip_under: Accept every edit of a text with fewer words, as the official TextFooler does under 15; None
            always compares.

    Raises:
        ValueError: If an argument is not one of those named, or a number is out of its range.
    """

    def __init__(
        self,
        encoder: SentenceEncoder,
        min_similarity: float = 0.8,
        metric: Literal["angular", "cosine"] = "angular",
        reference: Literal["original", "previous"] = "original",
        window: int | None = None,
        skip_under: int | None = None,
    ) -> None:
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}; got {metric!r}")
        if reference not in REFERENCES:
            raise ValueError(f"reference must be one of {', '.join(REFERENCES)}; got {reference!r}")
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1 word or None, got {window}")
        self.encoder, self.metric, self.reference = encoder, metric, reference
        self.min_similarity = _checked("min_similarity", min_similarity, 0.0 if metric == "angular" else -1.0)
        self.window, self.skip_under = window, skip_under

    def accept(self, original: Words, previous: Words, candidates: list[Words], index: int) -> list[bool]:
        """See `Constraint`."""
        similarities = self.similarities(original, previous, candidates, index)
        if similarities is None:
            return [True] * len(candidates)
        accepted: list[bool] = (similarities >= self.min_similarity).tolist()
        return accepted

    def similarities(self, original: Words, previous: Words, candidates: Sequence[Words], index: int) -> Tensor | None:
        """Similarity of each candidate to the reference, `(candidates,)`, or None where the text is too short."""
        if self.skip_under is not None and len(original) < self.skip_under:
            return None
        reference = original if self.reference == "original" else previous
        vectors = self.encoder.encode([self._part(words, index) for words in (reference, *candidates)])
        if self.metric == "cosine":
            return vectors[1:] @ vectors[0]
        from zoo.text_attack.sentence_encoders import angular_similarity

        return angular_similarity(vectors[1:], vectors[:1].expand_as(vectors[1:]))

    def _part(self, words: Words, index: int) -> str:
        return words.text if self.window is None else words.window(index, self.window)


def accepted(
    constraints: Iterable[Constraint], original: Words, previous: Words, candidates: list[Words], index: int
) -> list[Words]:
    """The candidates that pass every constraint; each constraint sees those that passed the ones before it."""
    for constraint in constraints:
        if not candidates:
            break
        answers = constraint.accept(original, previous, candidates, index)
        candidates = [candidate for candidate, yes in zip(candidates, answers, strict=True) if yes]
    return candidates


def _checked(name: str, value: float, least: float) -> float:
    if not least <= value <= 1.0:
        raise ValueError(f"{name} must lie in {least:g}..1, got {value}")
    return value
