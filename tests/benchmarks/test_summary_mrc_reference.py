"""The plain references and the room compute the same: the benchmark compares like with like."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from benchmarks.reference.summary_mrc import PlainPairs, plain_masked_lm_loss, plain_slot_scores
from benchmarks.summary_mrc import (
    LARGE,
    OPTIONS,
    PASSAGE,
    SUMMARY,
    TINY,
    Bucketing,
    encoding_cases,
    masked_lm_case,
    measure,
    random_batch,
    tokenisation_cases,
)
from benchmarks.text_steps import RandomWords
from datamodules.cloze import ClozeData
from datamodules.cloze_tokenizer import load_tokenizer
from datamodules.cloze_tokens import ClozeTokens
from datamodules.loading import Draw
from datamodules.passage_pieces import PassagePieces
from datamodules.sources.cloze_sample import cloze_sample
from zoo.summary_mrc import ClozeScorer, MaskedLM, SummaryMRC

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

pytest.importorskip("transformers")
ROWS = cloze_sample(24)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One so small that words have several pieces."""
    return load_tokenizer("train", lambda: [*ROWS.articles, *(word for words in ROWS.options for word in words)], 70)


@pytest.mark.parametrize("max_length", [512, 96])
def test_both_sides_give_the_same_batches(tokenizer: PreTrainedTokenizerFast, max_length: int) -> None:
    tokens = ClozeTokens(ROWS, tokenizer, max_length=max_length)
    assert (tokens.truncated > 0) == (max_length == 96)
    pairs = PlainPairs(ROWS.articles, ROWS.questions, ROWS.options, tokenizer, max_length)
    rows = torch.tensor([5, 0, 17])
    batch, expected = tokens[rows], pairs.batch(rows.tolist())
    assert expected.keys() == set(batch._fields) - {"labels", "accepted", "rows"}
    for field, tensor in expected.items():
        torch.testing.assert_close(getattr(batch, field).long(), tensor)


def test_logits_at_every_place_and_at_the_masks_give_the_same_scores(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = ClozeTokens(ROWS, tokenizer, encode="cloze")[torch.arange(6)]
    assert (batch.option_ids >= 0).sum(-1).unique().numel() > 1
    torch.manual_seed(0)
    model = ClozeScorer("tiny", encoder_options=TINY.options(), vocab_size=len(tokenizer)).eval()
    torch.testing.assert_close(plain_slot_scores(model.scorer.network, batch), model(batch))


def test_logits_at_every_place_and_at_the_masks_give_the_same_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = PassagePieces(ROWS.articles, tokenizer)[Draw(torch.arange(8), key=3)]
    torch.manual_seed(0)
    model = MaskedLM("tiny", encoder_options=TINY.options(), vocab_size=len(tokenizer)).eval()
    logits, labels = model(batch)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(plain_masked_lm_loss(model.scorer.network, batch), loss)


def test_both_layouts_hold_the_same_questions_in_the_lengths_given() -> None:
    joint, separate = (random_batch(2, layout, 300) for layout in ("joint", "separate"))
    assert joint.input_ids.shape == (2, OPTIONS, PASSAGE + SUMMARY + 3)
    assert separate.passage_ids.shape == (2, PASSAGE + 2)
    assert separate.summary_ids.shape == (2, OPTIONS, SUMMARY + 2)
    assert joint.summary_mask.all()
    torch.testing.assert_close(
        joint.input_ids.gather(-1, joint.summary_index), separate.summary_ids.gather(-1, separate.summary_index)
    )
    for option in range(OPTIONS):
        torch.testing.assert_close(joint.input_ids[:, option, : PASSAGE + 1], separate.passage_ids[:, :-1])


def test_steps_of_both_layouts_ask_for_their_ratio_at_the_large_size(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Counted(SummaryMRC):
        def __init__(self, *args: object, **kwargs: object) -> None:
            kwargs["encoder_options"] = TINY.options()
            made.append(kwargs["encode"])
            super().__init__(*args, **kwargs)

    monkeypatch.setattr("benchmarks.summary_mrc.SummaryMRC", Counted)
    assert [case.required for case in encoding_cases(LARGE, 1)] == [3, 3]
    assert [case.required for case in encoding_cases(TINY, 1)] == [None, None]
    assert made == ["separate", "joint"] * 2


def test_padding_is_counted_over_an_epoch_and_steps_over_its_real_tokens(tmp_path: Path) -> None:
    data = ClozeData(sample_rows=90, tokenizer="words", batch_size=4, seed=0)
    data.setup("fit")
    bucketing = Bucketing(data, TINY, steps=2)
    tokens = bucketing.orders["ours"][0]
    every = tokens[torch.arange(len(tokens))].attention_mask
    assert bucketing.facts["tokens_of_epoch"] == every.sum()
    assert 0 <= bucketing.facts["ours_padding"] < bucketing.facts["reference_padding"] < 1
    for _, draws in bucketing.orders.values():
        assert sorted(torch.cat([draw.indices for draw in draws]).tolist()) == list(range(len(tokens)))
        longest = [int(tokens.lengths[draw.indices].max()) for draw in draws]
        assert longest == sorted(longest)
    [record] = measure("bucketing", tmp_path, quick=True, data=data, threads=[1], repeats=1)
    assert record["ours_tokens_per_cpu_second"] == round(
        bucketing.facts["tokens_of_epoch"] / record["ours_cpu_seconds"]
    )
    assert json.loads((tmp_path / "benchmark_bucketing.json").read_text())["cases"][0] == record
    assert record["required_ratio"] == 1.3


def test_cases_run_and_say_what_was_timed() -> None:
    words = RandomWords(200)
    rows = words.questions(9, passage=20, summary=8)
    cases = [*tokenisation_cases(rows, words.tokenizer, batch_size=4), masked_lm_case(TINY, 200, 2, length=32)]
    for case in cases:
        assert case.ours().cpu >= 0
        assert case.reference().wall > 0
        assert "reference:" in case.note
    assert "2 batches" in cases[1].note
    assert np.unique(rows.labels).max() < OPTIONS
