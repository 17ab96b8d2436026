"""Cloze questions without labels of people: function words cut out of the sentences of real passages."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

import numpy as np

from datamodules.cloze_rows import ClozeRows
from datamodules.cloze_text import PLACEHOLDER

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

log = logging.getLogger(__name__)

FUNCTION_WORDS = (
    "of", "in", "to", "for", "on", "with", "at", "by", "from", "as",
    "that", "was", "is", "have", "has", "been", "will", "would", "were", "are",
    "he", "it", "they", "we", "who", "but", "and", "or", "not", "after",
)  # fmt: skip
TRAIN_PER_WORD = 279
TEST_PER_WORD = 49
MIN_TOKENS, MAX_TOKENS = 8, 24
NUM_OPTIONS = 5

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\u201d\u2019]*\s+(?=[\"'(\u201c\u2018]*[A-Z0-9])")
_TOKEN = re.compile(r"\w+(?:[-'\u2019]\w+)*|[^\w\s]")


def slot_cloze(
    train_passages: Sequence[str],
    test_passages: Sequence[str],
    seed: int = 0,
    train_per_word: int | None = None,
    test_per_word: int | None = None,
) -> tuple[ClozeRows, ClozeRows]:
    """Make questions out of passages: which of five function words was cut out here?

    A question is a sentence of 8 to 24 tokens, with spaces between tokens, in which `@placeholder` stands for one of 30
    function words. Its options are that word and four of the other 29, each four equally likely. Every word is gold
    equally often and distractor equally often, and every place of the gold option is equally frequent to within one
    question, so that neither words nor places have a prior: chance is 0.200, and only the sentence around the gap
    helps. A sentence serves once, and none of the test is in training. There are no articles.

    Args:
        train_passages: Texts to train on.
        test_passages: Texts to test on.
        seed: Of numpy's generator.
        train_per_word: Training questions per function word. By default 279 (8,370 questions), or as many as there are
            for the rarest word.
        test_per_word: Test questions per function word. By default 49 (1,470 questions), or as many as there are.

    Returns:
        Training and test questions.

    Raises:
        ValueError: If a word has fewer sentences than wanted, or none.
    """
    train = _sentences(train_passages)
    test = {key: tokens for key, tokens in _sentences(test_passages).items() if key not in train}
    return (
        _questions(train, np.random.default_rng([seed, 0]), train_per_word, TRAIN_PER_WORD, "train"),
        _questions(test, np.random.default_rng([seed, 1]), test_per_word, TEST_PER_WORD, "test"),
    )


def _sentences(passages: Iterable[str]) -> dict[str, list[str]]:
    """Tokens of each sentence of the wanted length, by its text in lower case."""
    found: dict[str, list[str]] = {}
    for passage in passages:
        for sentence in _SENTENCE_END.split(passage.replace(PLACEHOLDER, " ")):
            tokens = _TOKEN.findall(sentence)
            if MIN_TOKENS <= len(tokens) <= MAX_TOKENS:
                found.setdefault(" ".join(tokens).lower(), tokens)
    return found


def _questions(
    sentences: dict[str, list[str]], rng: np.random.Generator, wanted: int | None, usual: int, part: str
) -> ClozeRows:
    if wanted is not None and wanted < 1:
        raise ValueError(f"{part}_per_word must be at least 1, got {wanted}")
    tokens = list(sentences.values())
    chosen = _equal_shares(tokens, rng, wanted, usual, part)
    count, num_words = len(chosen[0]), len(FUNCTION_WORDS)
    options = _balanced_options(count, rng)
    labels = rng.permutation(np.arange(count * num_words) % NUM_OPTIONS)
    questions, offered, sources = [], [], []
    # The file's order must not tell the word.
    for row, drawn in enumerate(rng.permutation(count * num_words)):
        word, nth = divmod(int(drawn), count)
        sentence, gold = tokens[chosen[word][nth]], FUNCTION_WORDS[word]
        gap = int(rng.choice([place for place, token in enumerate(sentence) if token == gold]))
        questions.append(" ".join([*sentence[:gap], PLACEHOLDER, *sentence[gap + 1 :]]))
        others = [FUNCTION_WORDS[other] for other in options[nth, word]]
        others.insert(int(labels[row]), gold)
        offered.append(others)
        sources.append(f"slot cloze {part}, question {row + 1}")
    return ClozeRows(
        name=f"slot cloze {part}",
        articles=[""] * len(questions),
        questions=questions,
        options=offered,
        labels=labels,
        ids=[f"{part}-{row}" for row in range(len(questions))],
        places=sources,
    )


def _equal_shares(
    tokens: list[list[str]], rng: np.random.Generator, wanted: int | None, usual: int, part: str
) -> list[list[int]]:
    """Sentences of each word, equally many and none twice."""
    # Capitals would tell the first word of a sentence: only words in lower case are cut out.
    having = [[place for place, sentence in enumerate(tokens) if word in sentence] for word in FUNCTION_WORDS]
    order = sorted(range(len(having)), key=lambda word: (len(having[word]), word))
    shuffled = [[places[draw] for draw in rng.permutation(len(places))] for places in having]
    count = usual if wanted is None else wanted
    scarcest = order[0]
    while count:
        taken: set[int] = set()
        chosen: list[list[int]] = [[] for _ in having]
        # The rarest word chooses first: the others have sentences enough without it.
        for word in order:
            chosen[word] = [place for place in shuffled[word] if place not in taken][:count]
            taken.update(chosen[word])
        scarcest = min(order, key=lambda word: len(chosen[word]))
        found = len(chosen[scarcest])
        if found == count:
            if count < usual and wanted is None:
                log.warning(
                    "slot cloze %s: %d questions per function word instead of %d: the passages have no more sentences "
                    "with %r",
                    part, count, usual, FUNCTION_WORDS[scarcest],
                )  # fmt: skip
            return chosen
        if wanted is not None:
            raise ValueError(
                f"{part}_per_word={wanted}, but the {part} passages leave only {found} sentences of {MIN_TOKENS} to "
                f"{MAX_TOKENS} tokens with {FUNCTION_WORDS[scarcest]!r}: give more passages or a smaller number"
            )
        count = found
    raise ValueError(
        f"no sentence of {MIN_TOKENS} to {MAX_TOKENS} tokens with {FUNCTION_WORDS[scarcest]!r} in the {part} passages "
        f"({len(tokens)} sentences of that length): give more passages"
    )


def _balanced_options(count: int, rng: np.random.Generator) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Four distractors for each word, `count` times: `(count, words, 4)`.

    Each time the words stand in a random circle, and everyone gets the words at the same four random distances. So
    every word is distractor four times, and each four are equally likely.
    """
    num_words = len(FUNCTION_WORDS)
    options = np.empty((count, num_words, NUM_OPTIONS - 1), dtype=np.int64)
    for nth in range(count):
        circle = rng.permutation(num_words)
        steps = 1 + rng.permutation(num_words - 1)[: NUM_OPTIONS - 1]
        options[nth, circle] = circle[(np.arange(num_words)[:, None] + steps) % num_words]
    return options
