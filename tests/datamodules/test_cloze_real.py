from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from datamodules import ClozeData
from datamodules.sources.slot_cloze import FUNCTION_WORDS

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.real

CONFIG = Path(__file__).parents[2] / "configs" / "summary_mrc" / "slot_cloze.yaml"


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, [913 + 1025 + 981, 816, 816, 1000]),
        ({"intersection": False}, [913 + 1025, 816, 816, 1000]),
        ({"subtask": 2, "intersection": False}, [987, 851, 851, 851]),
        ({"eval_subtask": 2, "intersection": False}, [913 + 1025, 851, 851, 851]),
        ({"subtask": 2, "eval_subtask": 1, "intersection": False}, [987, 816, 1025, 1000]),
    ],
    ids=str,
)
def test_recam_has_the_documented_counts(options: dict[str, Any], sizes: list[int]) -> None:
    data = ClozeData(source="recam", drop_overlap=False, **options)
    assert [len(data.questions(part)) for part in ("fit", "validate", "test", "predict")] == sizes
    assert data.num_options == 5
    shares = np.bincount(data.questions("validate").labels) / sizes[1]
    assert shares == pytest.approx([0.2] * 5, abs=0.03)


def test_what_needs_no_reading_answers_recam_as_measured() -> None:
    data = ClozeData(source="recam")
    held_out = {*data.questions("validate").articles, *data.questions("test").articles}
    assert held_out.isdisjoint(data.questions("fit").articles)
    priors = data.priors("validate")
    assert priors["chance"] == 0.2
    assert priors["majority"] == pytest.approx(0.2, abs=0.02)
    assert priors["rarest"] == pytest.approx(0.346, abs=0.005)
    assert priors["count"] == pytest.approx(0.154, abs=0.005)


def test_slot_cloze_has_the_size_of_the_proof_and_no_word_is_right_more_often_than_another() -> None:
    data = ClozeData(source="slot_cloze", tokenizer="words")
    train, validate, test = (data.questions(part) for part in ("fit", "validate", "test"))
    assert len(train) + len(validate) == 8_370
    assert len(validate) == 837
    assert len(test) == 1_470
    gold = Counter(options[label] for options, label in zip(test.options, test.labels.tolist(), strict=True))
    offered = Counter(option for options in test.options for option in options)
    assert gold == dict.fromkeys(FUNCTION_WORDS, 49)
    assert offered == dict.fromkeys(FUNCTION_WORDS, 5 * 49)
    assert np.bincount(test.labels).tolist() == [294] * 5
    # The share that is validated on is drawn, so training is balanced up to that draw.
    priors = data.priors("test")
    assert all(value == pytest.approx(0.2, abs=0.03) for value in priors.values()), priors


def test_the_slot_cloze_config_runs(run: Callable[..., Any]) -> None:
    cli = run("fit", "--config", str(CONFIG), "--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu")
    assert cli.datamodule.vocab_size == 6_000
    assert not cli.model.with_passage
