from __future__ import annotations

import numpy as np
import pytest

from datamodules.cloze_rows import UNLABELLED, ClozeRows


def rows(labels, options=None, name="few"):
    count = len(labels)
    options = options or [[f"{place}{letter}" for letter in "abc"] for place in range(count)]
    return ClozeRows(
        name,
        [f"article {place}" for place in range(count)],
        [f"question {place} @placeholder" for place in range(count)],
        options,
        np.array(labels, dtype=np.int64),
        [str(place) for place in range(count)],
        [f"few.jsonl, line {place + 1}" for place in range(count)],
    )


def test_columns_stay_together_when_rows_are_chosen_and_joined():
    few = rows([0, 1, 2, 1])
    chosen = few.select([3, 0])
    assert (chosen.labels.tolist(), chosen.ids, chosen.places[0]) == ([1, 0], ["3", "0"], "few.jsonl, line 4")
    assert (chosen.articles[0], chosen.questions[0], chosen.options[0]) == (
        "article 3",
        "question 3 @placeholder",
        ["3a", "3b", "3c"],
    )
    masked = few.select(np.array([True, False, False, True]))
    assert masked.ids == ["0", "3"]
    joined = ClozeRows.concatenate([masked, few], "both")
    assert joined.name == "both"
    assert joined.ids == ["0", "3", "0", "1", "2", "3"]
    assert joined.labels.tolist() == [0, 1, 0, 1, 2, 1]
    assert joined.labels.dtype == np.int64
    assert (len(joined), joined.num_options, joined.labelled) == (6, 3, True)


def test_the_gold_alone_is_accepted_and_leniently_its_equals_too():
    few = rows([0, 2, 1], [["x", "y", "X"], ["x", "x", "z"], ["x", "y", "z"]])
    assert few.accepted(False).tolist() == [[True, False, False], [False, False, True], [False, True, False]]
    assert few.accepted(True).tolist() == [[True, False, True], [False, False, True], [False, True, False]]


def test_nothing_is_accepted_without_labels():
    few = rows([UNLABELLED, UNLABELLED])
    assert not few.labelled
    assert not few.accepted(True).any()
    assert few.accepted(False).shape == (2, 3)


def test_rows_that_contradict_each_other_are_refused_with_their_place():
    with pytest.raises(ValueError, match=r"line 2: no label, while other questions of few have one"):
        rows([0, UNLABELLED])
    with pytest.raises(ValueError, match=r"line 2: label 3 out of range 0\.\.2"):
        rows([0, 3])
    with pytest.raises(ValueError, match=r"line 2: 2 options, but few\.jsonl, line 1 has 3"):
        rows([0, 1], [["a", "b", "c"], ["a", "b"]])
    with pytest.raises(ValueError, match=r"few: no question"):
        rows([0]).select([])
    with pytest.raises(ValueError, match=r"few: 1 questions, but 2 labels"):
        ClozeRows("few", ["a"], ["q"], [["x", "y"]], np.array([0, 1]), ["0"], ["p"])
    with pytest.raises(ValueError, match=r"few: a mask of shape \(1,\) for 2 questions"):
        rows([0, 1]).select(np.array([True]))
    with pytest.raises(ValueError, match=r"both: no part"):
        ClozeRows.concatenate([], "both")
    with pytest.raises(ValueError, match=r"no label, while other questions of both"):
        ClozeRows.concatenate([rows([0]), rows([UNLABELLED])], "both")
