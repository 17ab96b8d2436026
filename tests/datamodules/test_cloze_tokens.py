import logging
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from datamodules.cloze_batches import PairBatch, SlotBatch
from datamodules.cloze_rows import ClozeRows
from datamodules.cloze_tokens import ClozeTokens
from datamodules.loading import Draw
from datamodules.token_table import distinct, tokenize, tokenize_spans
from tests.datamodules.cloze_examples import FAMILIES, LONG, example_rows, tokenizer_of


def rows_of(*questions: tuple[str, str, list[str]]) -> ClozeRows:
    articles, texts, options = map(list, zip(*questions, strict=True))
    names = [str(row) for row in range(len(texts))]
    places = [f"mine.csv, line {row + 2}" for row in range(len(texts))]
    return ClozeRows("mine", articles, texts, options, np.zeros(len(texts), np.int64), names, places)


def tokenizer_without(*missing: str) -> PreTrainedTokenizerFast:
    names = {"pad_token": "[PAD]", "mask_token": "[MASK]", "sep_token": "[SEP]"}
    given = {kind: token for kind, token in names.items() if kind not in missing}
    backend = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "[MASK]": 2, "[SEP]": 3, "fox": 4, "hens": 5}))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **given)


@pytest.mark.parametrize("family", FAMILIES)
def test_table_holds_the_tokens_of_every_text(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datamodules.token_table._CHUNK", 2)
    tokenizer = tokenizer_of(family)
    texts = ["A fox", "", "it's the hens of Café Zoë", LONG, "x"]
    table = tokenize(tokenizer, texts)
    for text, low, high in zip(texts, table.offsets, table.offsets[1:], strict=False):
        assert table.ids[low:high].tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert table.ids.dtype == torch.int32 and table.offsets.dtype == torch.int64
    spans = [(0, 1), (0, 0), (11, 15), (12, 15), (0, 1)]
    again, first, count = tokenize_spans(tokenizer, list(zip(texts, spans, strict=True)))
    assert torch.equal(again.ids, table.ids) and torch.equal(again.offsets, table.offsets)
    for text, (start, end), low, size in zip(texts, spans, first.tolist(), count.tolist(), strict=True):
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        covering = [place for place, (left, right) in enumerate(offsets) if left < end and right > start]
        assert list(range(low, low + size)) == covering
    assert count[1] == 0


def test_distinct_values_keep_their_order() -> None:
    values, which = distinct(["b", "a", "b", "c", "a"])
    assert values == ["b", "a", "c"]
    assert which.tolist() == [0, 1, 0, 2, 1]


def test_a_passage_of_several_questions_is_kept_once() -> None:
    tokenizer = tokenizer_of("bert")
    once = ClozeTokens(rows_of((LONG, "@placeholder", ["fox"])), tokenizer)
    twice = ClozeTokens(rows_of((LONG, "@placeholder", ["fox"]), (LONG, "a @placeholder", ["fox"])), tokenizer)
    assert torch.equal(once._passages.ids, twice._passages.ids)


def test_a_draw_and_its_indices_give_the_same_batch_also_after_pickling() -> None:
    tokens = ClozeTokens(example_rows(), tokenizer_of("bert"))
    indices = torch.tensor([2, 0])
    batches = [tokens[indices], tokens[Draw(indices, 7)], pickle.loads(pickle.dumps(tokens))[indices]]
    assert len(tokens) == 5
    for batch in batches:
        for left, right in zip(batch, batches[0], strict=True):
            assert torch.equal(left, right)
    assert batches[0].rows.tolist() == [2, 0]
    assert batches[0].labels.tolist() == [4, 0]
    assert {field.dtype for field in batches[0]} == {torch.int64, torch.bool}


def test_accepted_options_follow_leniency_and_unlabelled_rows_have_none() -> None:
    tokenizer = tokenizer_of("bert")
    strict = ClozeTokens(example_rows(), tokenizer)[torch.tensor([3])]
    lenient = ClozeTokens(example_rows(), tokenizer, lenient=True)[torch.tensor([3])]
    assert strict.accepted.tolist() == [[False, False, False, True, False]]
    assert lenient.accepted.tolist() == [[False, False, False, True, True]]
    unknown = ClozeTokens(example_rows(labelled=False), tokenizer, lenient=True)[torch.tensor([3, 1])]
    assert unknown.labels.tolist() == [-100, -100]
    assert not unknown.accepted.any()


def test_marks_are_tokens_just_outside_the_option() -> None:
    for family in FAMILIES:
        tokenizer = tokenizer_of(family, marks=True)
        batch = ClozeTokens(example_rows(), tokenizer, mark_option=True)[torch.tensor([0])]
        assert isinstance(batch, PairBatch)
        ids = batch.input_ids.gather(-1, batch.summary_index)[0]
        for option in range(5):
            tokens = tokenizer.convert_ids_to_tokens(ids[option])
            places = batch.option_mask[0, option].nonzero()[:, 0].tolist()
            assert tokens[places[-1] + 1] == "[/OPTION]"
            # A small vocabulary has the space before a word as a token of its own.
            before = tokens[tokens.index("[OPTION]") + 1 : places[0]]
            assert before in ([], ["\u0120"], ["\u2581"])


def test_capitals_and_detokenising_change_the_text_that_is_read() -> None:
    tokenizer = tokenizer_of("roberta")
    for encode in ("joint", "cloze"):
        rows = rows_of((LONG, "@placeholder is , it 's said .", ["fox"]), (LONG, "It 's @placeholder", ["fox"]))
        plain = rows_of((LONG, "@placeholder is, it's said.", ["Fox"]), (LONG, "It's @placeholder", ["fox"]))
        changed = ClozeTokens(rows, tokenizer, encode=encode, capitalize_initial=True, detokenize=True)
        expected = ClozeTokens(plain, tokenizer, encode=encode)
        for left, right in zip(changed[torch.arange(2)], expected[torch.arange(2)], strict=True):
            assert torch.equal(left, right)


def test_rows_without_any_passage_are_read_without_one() -> None:
    rows = rows_of(("", "a @placeholder", ["fox"]), ("", "@placeholder", ["hens"]))
    tokens = ClozeTokens(rows, tokenizer_of("bert"))
    assert not tokens.with_passage
    bare = ClozeTokens(rows, tokenizer_of("bert"), with_passage=False)
    for left, right in zip(tokens[torch.arange(2)], bare[torch.arange(2)], strict=True):
        assert torch.equal(left, right)
    with pytest.raises(ValueError, match="encode='reader' needs passages"):
        ClozeTokens(rows, tokenizer_of("bert"), encode="reader")


def test_a_mask_token_in_the_text_is_not_taken_for_the_slot() -> None:
    tokenizer = tokenizer_of("bert")
    rows = rows_of(("A [MASK] fox", "[MASK] of @placeholder [MASK]", ["hens"]))
    batch = ClozeTokens(rows, tokenizer, encode="cloze", masks="first")[torch.tensor([0])]
    assert isinstance(batch, SlotBatch)
    masks = (batch.input_ids[0] == tokenizer.mask_token_id).nonzero()[:, 0].tolist()
    assert len(masks) == 4
    assert batch.mask_index.tolist() == [[masks[2]]]


def test_cut_passages_are_counted_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        tokens = ClozeTokens(example_rows(), tokenizer_of("bert"), max_length=100)
    assert tokens.truncated == 1
    assert "examples: 1 of 3 passages are cut to fit max_length=100" in caplog.text


def test_a_question_that_leaves_too_little_to_a_cut_passage_names_its_place() -> None:
    tokenizer = tokenizer_of("bert")
    rows = rows_of(
        ("A fox", "@placeholder", ["hens", "fox"]), (LONG, "fox " * 20 + "@placeholder", ["hens", "fox fox"])
    )
    beside = len(tokenizer("fox " * 20 + "fox fox", add_special_tokens=False)["input_ids"])
    assert ClozeTokens(rows, tokenizer, max_length=beside + 3 + 16).truncated == 1
    with pytest.raises(ValueError, match=r"mine.csv, line 3: 22 tokens .* option 1 .* keeps at least 16, here 15"):
        ClozeTokens(rows, tokenizer, max_length=beside + 3 + 15)
    with pytest.raises(ValueError, match=r"mine.csv, line 3: .*max_length=40"):
        ClozeTokens(rows, tokenizer, encode="cloze", max_length=40)
    # What is whole needs no room to spare.
    whole = rows_of(("A fox", "@placeholder", ["hens"]))
    length = int(ClozeTokens(whole, tokenizer).lengths[0])
    assert ClozeTokens(whole, tokenizer, max_length=length).truncated == 0
    for encode in ("joint", "separate"):
        with pytest.raises(ValueError, match=r"line 3: 21 tokens .* too many for max_length=22$"):
            ClozeTokens(rows, tokenizer, encode=encode, max_length=22, with_passage=False)
    for encode in ("separate", "reader"):
        with pytest.raises(ValueError, match=r"line 3: 2\d tokens .* max_length=20"):
            ClozeTokens(rows, tokenizer, encode=encode, max_length=20)
        with pytest.raises(ValueError, match=r"line 2: .* here \d"):
            ClozeTokens(rows_of((LONG, "@placeholder", ["fox"])), tokenizer, encode=encode, max_length=8)


@pytest.mark.parametrize("encode", ["joint", "cloze"])
def test_an_option_without_a_token_names_its_place(encode: str) -> None:
    rows = rows_of((LONG, "@placeholder", ["fox", "hens"]), (LONG, "the @placeholder", ["fox", "\u200d"]))
    with pytest.raises(ValueError, match=r"mine.csv, line 3: option 1, .* gives no token"):
        ClozeTokens(rows, tokenizer_of("bert"), encode=encode)


def test_an_empty_passage_among_others_names_its_place() -> None:
    rows = rows_of((LONG, "@placeholder", ["fox"]), (" ", "@placeholder", ["fox"]))
    with pytest.raises(ValueError, match=r"mine.csv, line 3: the passage gives no token"):
        ClozeTokens(rows, tokenizer_of("bert"))
    assert len(ClozeTokens(rows, tokenizer_of("bert"), with_passage=False)) == 2


@pytest.mark.parametrize("encode", ["joint", "cloze"])
def test_a_question_without_slot_names_its_place(encode: str) -> None:
    rows = rows_of((LONG, "@placeholder", ["fox"]), (LONG, "no slot", ["fox"]))
    with pytest.raises(ValueError, match=r"mine.csv, line 3: expected exactly one @placeholder"):
        ClozeTokens(rows, tokenizer_of("bert"), encode=encode)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encode": "both"}, "encode must be one of joint, separate, cloze, reader, got 'both'"),
        ({"mode": "filled"}, "mode must be one of fill, .* got 'filled'"),
        ({"masks": "last"}, "masks must be one of first, each, got 'last'"),
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"encode": "cloze", "mode": "concat"}, "takes no mode='concat'"),
        ({"encode": "reader", "mark_option": True}, "takes no mark_option"),
        ({"encode": "reader", "with_passage": False}, "needs passages"),
        ({"mark_option": True}, r"mark_option needs the tokens \[OPTION\] and"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClozeTokens(example_rows(), tokenizer_of("bert"), **options)


@pytest.mark.parametrize(
    ("missing", "options", "message"),
    [
        ("pad_token", {}, "no padding token"),
        ("mask_token", {"mode": "concat"}, "no mask token"),
        ("mask_token", {"encode": "cloze"}, "no mask token"),
        ("sep_token", {"mode": "concat_sep"}, "no separator token: use mode='concat'"),
    ],
)
def test_a_tokenizer_without_a_needed_token_is_refused(missing: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClozeTokens(rows_of(("fox", "@placeholder", ["hens"])), tokenizer_without(missing), **options)
    other = tokenizer_without("mask_token", "sep_token")
    assert len(ClozeTokens(rows_of(("fox", "@placeholder", ["hens"])), other)) == 1


@pytest.mark.real
def test_recam_questions_equal_those_of_the_tokenizer() -> None:
    from datamodules.cloze_tokenizer import load_tokenizer
    from datamodules.sources.cloze_files import ClozeColumns, read_cloze

    path = Path(os.environ["ZOO_DATA"]) / "recam_semeval2021_task4" / "task1_dev.jsonl.gz"
    rows = read_cloze(path, ClozeColumns(), 5, "validation").select(range(0, 816, 8))
    tokenizer = load_tokenizer("words", lambda: rows.articles + rows.questions, 4_000)
    tokens = ClozeTokens(rows, tokenizer, max_length=300)
    batch = tokens[torch.arange(len(rows))]
    assert isinstance(batch, PairBatch)
    for row, (article, question) in enumerate(zip(rows.articles, rows.questions, strict=True)):
        filled = [question.replace("@placeholder", option) for option in rows.options[row]]
        expected = tokenizer([article] * 5, filled, truncation="only_first", max_length=300)["input_ids"]
        for option in range(5):
            length = int(batch.attention_mask[row, option].sum())
            assert batch.input_ids[row, option, :length].tolist() == expected[option]
            words = tokenizer.tokenize(rows.options[row][option])
            places = batch.summary_index[row, option][batch.option_mask[row, option]]
            assert tokenizer.convert_ids_to_tokens(batch.input_ids[row, option][places].tolist()) == words
    assert (batch.option_mask.sum(-1) >= 1).all()
    assert tokens.lengths.max() == 300 and tokens.truncated > 0
