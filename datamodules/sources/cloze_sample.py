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
QUESTIONS_PER_PASSAGE = 2

BAYES_ACCURACY = {
    "option_only": 1 / 5,
    "summary_words": 1 / 5,
    "summary_only": 2 / 5,
    "passage_and_option": 3 / 5,
    "passage_and_summary_words": 3 / 5,
    "passage_and_summary": 1.0,
}
"""Accuracy of the best answer to what a part of a row tells, see `cloze_sample`."""


class _Topic(NamedTuple):
    nouns: tuple[str, str, str, str]
    answers: tuple[str, str]  # to each of the verbs


_VERBS = ("wants", "fears")
_TOPICS = (
    _Topic(("striker", "goalkeeper", "stadium", "referee"), ("victory", "defeat")),
    _Topic(("banker", "market", "factory", "merchant"), ("profit", "debt")),
    _Topic(("doctor", "nurse", "hospital", "patient"), ("recovery", "illness")),
    _Topic(("judge", "lawyer", "jury", "witness"), ("justice", "punishment")),
    _Topic(("pupil", "teacher", "classroom", "library"), ("knowledge", "failure")),
    _Topic(("soldier", "general", "border", "army"), ("peace", "violence")),
    _Topic(("farmer", "field", "harvest", "orchard"), ("abundance", "drought")),
    _Topic(("singer", "orchestra", "theatre", "audience"), ("fame", "oblivion")),
)
_PEOPLE = (
    "Anna", "Boris", "Clara", "David", "Emma", "Felix", "Greta", "Henry", "Irene", "Jonas", "Karla", "Louis",
)  # fmt: skip
_PLACES = ("near", "behind", "beside", "before")
_CLAUSES = 4
_MIN_SENTENCES, _MAX_SENTENCES = 4, 7
# What an option is to the gold one: kind (0 its own, 1 the other) and topic (0 its own, or one of two others).
_ROLES = ((1, 0), (0, 1), (1, 1), (0, 2), (1, 2))


class _Question(NamedTuple):
    topic: int
    kind: int
    distractors: list[tuple[int, int]]  # kind and topic of each


def cloze_sample(num_rows: int, seed: int = 0, part: Part = "train") -> ClozeRows:
    """Generate questions with five options.

    A passage is about one of eight topics: "The judge was near the jury. The lawyer was behind the judge. ...". Each
    topic has one word for what people want there (justice) and one for what they fear (punishment); no passage has
    these words. A question has four clauses in random order, two with each verb, and a gap after one of them: "Anna
    fears nothing , Boris wants @placeholder , Clara fears nothing and David wants nothing .". The options are five of
    the six words of the passage's topic and two others. So it takes the passage to tell the topic, and the verb beside
    the gap to tell the word; a summary's words without their places do not say which verb that is. What belongs to
    which topic and verb is to be learned from training.

    Each passage has two questions, one per verb. Every word is gold equally often and distractor equally often in any
    16 questions from the start, so words have no prior; the labels are balanced to within one question. In any multiple
    of 80 questions the accuracies of `BAYES_ACCURACY` are exact:

    - "option_only": 1/5, and so are "summary_words", the words of the filled question without their places;
    - "summary_only": 2/5. The verb before the gap leaves two options (2 of 5 questions) or three (3 of 5):
      2/5 * 1/2 + 3/5 * 1/3;
    - "passage_and_option": 3/5, and "passage_and_summary_words", too. The topic leaves one option (1 of 5 questions) or
      two: 1/5 * 1 + 4/5 * 1/2;
    - "passage_and_summary": 1.

    Args:
        num_rows: Questions; two in a row have the same passage.
        seed: Of numpy's generator.
        part: "train", "validation", "test" or "predict": other passages each; "predict" has no labels.

    Raises:
        ValueError: If the part is not one of these, or there is no question.
    """
    if num_rows < 1:
        raise ValueError(f"num_rows must be at least 1, got {num_rows}")
    labels = _generator(seed, part, 0).permutation(np.arange(num_rows) % NUM_OPTIONS)
    drawn, wording, order = _questions(seed, part), _generator(seed, part, 2), _generator(seed, part, 3)
    articles: list[str] = []
    questions: list[str] = []
    options: list[list[str]] = []
    for row in range(num_rows):
        question = next(drawn)
        if row % QUESTIONS_PER_PASSAGE == 0:
            article = _passage(wording, question.topic)
        people = [_PEOPLE[person] for person in order.permutation(len(_PEOPLE))[:_CLAUSES]]
        kinds = [(question.kind + place) % 2 for place in range(_CLAUSES)]
        objects = ["@placeholder"] + ["nothing"] * (_CLAUSES - 1)
        clauses = [
            f"{person} {_VERBS[kind]} {thing}" for person, kind, thing in zip(people, kinds, objects, strict=True)
        ]
        clauses = [clauses[place] for place in order.permutation(_CLAUSES)]
        offered = [_TOPICS[topic].answers[kind] for kind, topic in question.distractors]
        offered = [offered[place] for place in order.permutation(len(offered))]
        offered.insert(int(labels[row]), _TOPICS[question.topic].answers[question.kind])
        articles.append(article)
        questions.append(f"{' , '.join(clauses[:-1])} and {clauses[-1]} .")
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


def _questions(seed: int, part: str) -> Iterator[_Question]:
    """Two questions on each topic in random order, again and again."""
    rng = _generator(seed, part, 1)
    num_topics = len(_TOPICS)
    while True:
        for left_out in rng.permutation(len(_ROLES)):
            roles = [role for place, role in enumerate(_ROLES) if place != left_out]
            # The topics stand in a circle, and everyone takes the words of those at two distances from it: so every
            # word is distractor equally often. The distances are drawn for each verb.
            circle = rng.permutation(num_topics).tolist()
            steps = [[0, *(1 + rng.permutation(num_topics - 1)[:2]).tolist()] for _ in _VERBS]
            for place, topic in enumerate(circle):
                for kind in rng.permutation(len(_VERBS)).tolist():
                    topics = [circle[(place + step) % num_topics] for step in steps[kind]]
                    yield _Question(topic, kind, [(abs(kind - other), topics[which]) for other, which in roles])


def _passage(rng: np.random.Generator, topic: int) -> str:
    nouns = _TOPICS[topic].nouns
    sentences = []
    for _ in range(int(rng.integers(_MIN_SENTENCES, _MAX_SENTENCES + 1))):
        subject, other = (nouns[place] for place in rng.permutation(len(nouns))[:2])
        sentences.append(f"The {subject} was {_PLACES[int(rng.integers(len(_PLACES)))]} the {other}.")
    return " ".join(sentences)
