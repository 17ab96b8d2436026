"""Generated cloze questions on short passages, whose answer takes both the place of the gap and the passage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from datamodules.cloze_rows import UNLABELLED, ClozeRows

if TYPE_CHECKING:
    from collections.abc import Iterator

PARTS = ("train", "validation", "test", "predict")
Part = Literal["train", "validation", "test", "predict"]
NUM_OPTIONS = 5
QUESTIONS_PER_PASSAGE = 6

BAYES_ACCURACY = {
    "option_only": 1 / 5,
    "passage_and_option": 1 / 5,
    "summary_only": 2 / 5,
    "passage_words_and_summary": 2 / 5,
    "passage_and_summary": 1.0,
}
"""Accuracy of the best answer to what a part of a row tells, in expectation; see `cloze_sample`."""

_PEOPLE = (
    "Anna", "Boris", "Clara", "David", "Emma", "Felix", "Greta", "Henry", "Irene", "Jonas", "Karla", "Louis",
)  # fmt: skip
_VERBS = ("drinks", "carries")
_THINGS = (
    ("tea", "milk", "water", "juice", "cocoa", "coffee", "cider", "beer", "wine", "soda", "broth", "lemonade"),
    ("books", "ropes", "boxes", "lamps", "flags", "tools", "coins", "maps", "shoes", "bags", "bells", "cups"),
)
_KINDS = ("quiet", "warm", "cold", "long")
_TIMES = ("day", "morning", "evening")
_CAST = 3
_MAX_FILLERS = 2


class _Statement(NamedTuple):
    person: str
    verb: str
    thing: str

    def __str__(self) -> str:
        return f"{self.person} {self.verb} {self.thing}"


class _Passage(NamedTuple):
    text: str
    statements: list[_Statement]  # in the order of the text


def cloze_sample(num_rows: int, seed: int = 0, part: Part = "train") -> ClozeRows:
    """Generate questions with five options.

    A passage tells in shuffled order what three people drink and what they carry, with up to two sentences between that
    say nothing: "Emma carries maps. It was a cold day. Boris drinks tea. ...". A question joins two of the six
    statements and hides the thing of one: "Boris drinks @placeholder and Emma carries maps ." (or the other way
    round). The options are the five things that the question does not tell, so each is in the passage exactly once:
    the same person's other thing, and other people's things of both kinds.

    Each passage is asked for each of its six things once, and each of them is told beside the gap once. So every word
    is gold, distractor and mentioned in the same proportion; no place in the passage, no label and no passage has a
    prior. Labels are balanced to within one question. `BAYES_ACCURACY` has what the best solver of a part of the input
    reaches:

    - "option_only": 1/5, any option is gold as often as any other;
    - "passage_and_option": 1/5, with the passage but no question;
    - "summary_only": 2/5. The verb before the gap tells the kind of thing, of which two options are left (2 of 5
      questions) or three (3 of 5): 2/5 * 1/2 + 3/5 * 1/3;
    - "passage_words_and_summary": 2/5, as words without their places do not tell who has what;
    - "passage_and_summary": 1.

    Args:
        num_rows: Questions; six in a row have the same passage.
        seed: Of numpy's generator.
        part: "train", "validation", "test" or "predict": other passages each; "predict" has no labels.

    Raises:
        ValueError: If the part is not one of these, or there is no question.
    """
    if num_rows < 1:
        raise ValueError(f"num_rows must be at least 1, got {num_rows}")
    passages, rng = _passages(seed, part), _generator(seed, part, 1)
    labels = _generator(seed, part, 2).permutation(np.arange(num_rows) % NUM_OPTIONS)
    articles: list[str] = []
    questions: list[str] = []
    options: list[list[str]] = []
    while len(questions) < num_rows:
        passage = next(passages)
        circle = rng.permutation(QUESTIONS_PER_PASSAGE)
        for asked, told in zip(circle.tolist(), np.roll(circle, -1).tolist(), strict=True):
            if len(questions) == num_rows:
                break
            hidden = passage.statements[asked]
            clauses = [f"{hidden.person} {hidden.verb} @placeholder", str(passage.statements[told])]
            if rng.random() < 0.5:
                clauses.reverse()
            others = [other.thing for place, other in enumerate(passage.statements) if place not in (asked, told)]
            offered = [others[place] for place in rng.permutation(len(others))]
            offered.insert(int(labels[len(questions)]), hidden.thing)
            articles.append(passage.text)
            questions.append(f"{clauses[0]} and {clauses[1]} .")
            options.append(offered)
    return ClozeRows(
        name=f"embedded sample {part}",
        articles=articles,
        questions=questions,
        options=options,
        labels=np.full(num_rows, UNLABELLED) if part == "predict" else labels,
        ids=[f"{part}-{row}" for row in range(num_rows)],
        places=[f"embedded sample {part}, question {row + 1}" for row in range(num_rows)],
    )


def _generator(seed: int, part: str, stream: int) -> np.random.Generator:
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    return np.random.default_rng([seed, PARTS.index(part), stream])


def _passages(seed: int, part: str) -> Iterator[_Passage]:
    rng = _generator(seed, part, 0)
    turns = [_in_turn(rng, things) for things in _THINGS]
    people = _in_turn(rng, _PEOPLE)
    while True:
        statements = [
            _Statement(person, verb, next(turn))
            for person in [next(people) for _ in range(_CAST)]
            for verb, turn in zip(_VERBS, turns, strict=True)
        ]
        statements = [statements[place] for place in rng.permutation(len(statements))]
        sentences = [f"{statement}." for statement in statements]
        for _ in range(int(rng.integers(_MAX_FILLERS + 1))):
            filler = f"It was a {_KINDS[rng.integers(len(_KINDS))]} {_TIMES[rng.integers(len(_TIMES))]}."
            sentences.insert(int(rng.integers(len(sentences) + 1)), filler)
        yield _Passage(" ".join(sentences), statements)


def _in_turn(rng: np.random.Generator, words: tuple[str, ...]) -> Iterator[str]:
    """Words in random order, all of them before any comes again; the three of a passage always differ."""
    while True:
        yield from (words[place] for place in rng.permutation(len(words)))
