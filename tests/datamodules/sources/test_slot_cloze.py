from __future__ import annotations

import gzip
import json
import logging
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from datamodules.sources.slot_cloze import FUNCTION_WORDS, slot_cloze

NOUNS = ("river", "garden", "teacher", "window", "market", "doctor", "winter", "bridge", "letter", "island")


def passages(count: int, seed: int, per_sentence: int = 3) -> list[str]:
    """Sentences of 12 words, some of them function words, that no other passage has."""
    rng = np.random.default_rng(seed)
    texts = []
    for number in range(count):
        sentences = []
        for place in range(4):
            words = ["The", *rng.choice(NOUNS, 8 - per_sentence), *rng.choice(FUNCTION_WORDS, per_sentence)]
            middle = rng.permutation(words[1:]).tolist()
            sentences.append(f"The {' '.join(middle)} saw number{seed}x{number}x{place} there.")
        texts.append(" ".join(sentences))
    return texts


def test_every_word_is_gold_and_distractor_equally_often_and_every_place_is_right_equally_often() -> None:
    for rows, count in zip(slot_cloze(passages(400, 0), passages(200, 1), 0, 20, 10), (20, 10), strict=True):
        assert len(rows) == count * len(FUNCTION_WORDS)
        gold = Counter(options[label] for options, label in zip(rows.options, rows.labels.tolist(), strict=True))
        offered = Counter(option for options in rows.options for option in options)
        assert gold == dict.fromkeys(FUNCTION_WORDS, count)
        assert offered == dict.fromkeys(FUNCTION_WORDS, 5 * count)
        assert np.bincount(rows.labels).tolist() == [len(rows) // 5] * 5
        assert all(len(set(options)) == 5 for options in rows.options)


def test_each_pair_of_gold_and_distractor_is_about_equally_frequent() -> None:
    rows, _ = slot_cloze(passages(1_200, 0), passages(100, 1), 0, 100, 5)
    pairs: Counter[tuple[str, str]] = Counter()
    for options, label in zip(rows.options, rows.labels.tolist(), strict=True):
        pairs.update((options[label], option) for option in options if option != options[label])
    counts = np.array([pairs[a, b] for a in FUNCTION_WORDS for b in FUNCTION_WORDS if a != b])
    expected = 100 * 4 / 29
    assert counts.sum() == 4 * len(rows)
    assert ((counts - expected) ** 2 / expected).mean() < 1.2, "as uniform draws have it"


def test_the_gap_is_where_the_gold_word_was() -> None:
    train, test = passages(300, 0), passages(150, 1)
    found = slot_cloze(train, test, 0, 10, 5)
    for rows, texts in zip(found, (train, test), strict=True):
        sentences = {re.sub(r"([.])$", r" \1", sentence) for text in texts for sentence in re.split(r"(?<=\.) ", text)}
        filled = [
            question.replace("@placeholder", options[label])
            for question, options, label in zip(rows.questions, rows.options, rows.labels.tolist(), strict=True)
        ]
        assert all(question.count("@placeholder") == 1 for question in rows.questions)
        assert set(filled) <= sentences
        assert len(set(filled)) == len(filled), "no sentence serves twice"
        assert rows.articles == [""] * len(rows)


def test_a_sentence_of_training_is_not_in_the_test() -> None:
    shared = passages(300, 0)
    train, test = slot_cloze(shared, [*shared, *passages(150, 1)], 0, 10, 5)
    assert len(train) == 300
    assert all("number1x" in question for question in test.questions)


def test_only_sentences_of_8_to_24_tokens_serve() -> None:
    short = [f"We saw {word} there now ." for word in FUNCTION_WORDS]
    long = [f"The {word} " + "river " * 23 + "." for word in FUNCTION_WORDS]
    with pytest.raises(ValueError, match=r"no sentence of 8 to 24 tokens with 'of' in the train passages \(0 sent"):
        slot_cloze(short + long, short)
    fitting = [f"The {word} bank saw one big river ." for word in FUNCTION_WORDS]
    widest = [f"The {word} " + "river " * 21 + "." for word in FUNCTION_WORDS]
    train, test = slot_cloze(fitting, widest, 0, 1, 1)
    assert {len(question.split()) for question in train.questions} == {8}
    assert {len(question.split()) for question in test.questions} == {24}


def test_a_first_word_with_a_capital_is_never_cut_out() -> None:
    texts = [f"The big bank saw one river {word} there." for word in FUNCTION_WORDS]
    capital = [f"{word.capitalize()} big banks saw one more river there." for word in FUNCTION_WORDS]
    train, _ = slot_cloze(texts + capital, ["Some bank " + text for text in texts], 0, 1, 1)
    assert not any(question.startswith("@placeholder") for question in train.questions)


def test_rare_words_choose_first_so_that_common_ones_leave_them_enough() -> None:
    rare = [f"The bank of one river saw it{number} or so." for number in range(30)]
    rest = [text for word in FUNCTION_WORDS if word != "or" for text in _many(word, 60)]
    train, _ = slot_cloze(
        rare + rest, rare + rest + [text for word in FUNCTION_WORDS for text in _many(word, 62)], 0, 30, 1
    )
    golds = Counter(options[label] for options, label in zip(train.options, train.labels.tolist(), strict=True))
    assert set(golds.values()) == {30}


def _many(word: str, count: int) -> list[str]:
    return [f"The big bank {word} one river{count}x{number} there now." for number in range(count)]


def test_by_default_the_rarest_word_limits_all_and_a_warning_says_so(caplog: pytest.LogCaptureFixture) -> None:
    texts = [text for word in FUNCTION_WORDS for text in _many(word, 3 if word == "who" else 6)]
    other = [text for word in FUNCTION_WORDS for text in _many(word, 7)]
    with caplog.at_level(logging.WARNING, "datamodules.sources.slot_cloze"):
        train, test = slot_cloze(texts, other)
    assert len(train) == 3 * len(FUNCTION_WORDS)
    assert len(test) == 7 * len(FUNCTION_WORDS)
    assert "slot cloze train: 3 questions per function word instead of 279" in caplog.text
    assert "with 'who'" in caplog.text


def test_a_number_that_the_passages_lack_is_refused_with_the_word() -> None:
    texts = [text for word in FUNCTION_WORDS for text in _many(word, 3 if word == "who" else 6)]
    with pytest.raises(ValueError, match=r"train_per_word=5, but the train passages leave only 3 .* with 'who'"):
        slot_cloze(texts, texts, 0, 5)
    with pytest.raises(ValueError, match="test_per_word must be at least 1, got 0"):
        slot_cloze(texts, texts, 0, 3, 0)


def test_the_same_seed_gives_the_same_questions_and_another_seed_others() -> None:
    train, test = passages(300, 0), passages(150, 1)
    first, again, other = (slot_cloze(train, test, seed, 10, 5)[0] for seed in (0, 0, 1))
    assert first.questions == again.questions != other.questions
    assert first.options == again.options
    assert np.array_equal(first.labels, again.labels)


@pytest.mark.real
def test_recams_passages_give_the_size_of_the_proof() -> None:
    folder = Path(os.environ["ZOO_DATA"]) / "recam_semeval2021_task4"

    def read(*names: str) -> list[str]:
        return [json.loads(line)["article"] for name in names for line in gzip.open(folder / f"{name}.jsonl.gz", "rt")]

    train, test = slot_cloze(read("task1_trial", "task1_test_a"), read("task1_dev"))
    assert len(train) == 8_370
    assert len(test) == 1_470
    train.concatenate([train, test], "both")
