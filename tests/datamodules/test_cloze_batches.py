from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from datamodules.cloze_batches import PairBatch, ReaderBatch, Run, SeparateBatch, SlotBatch, lay, places, read_template
from datamodules.cloze_text import MARKS, PLACEHOLDER, second_segment
from datamodules.cloze_tokens import ClozeTokens
from tests.datamodules.cloze_examples import FAMILIES, example_rows, tokenizer_of

ALL = torch.arange(5)
MODES = ("fill", "concat", "concat_sep", "option_only")


def segment(tokenizer: Any, mode: str, row: int, option: int, **options: Any) -> tuple[str, tuple[int, int]]:
    rows = example_rows()
    return second_segment(
        mode,
        rows.questions[row],
        rows.options[row][option],
        mask_token=tokenizer.mask_token,
        sep_token=tokenizer.sep_token,
        **options,
    )


def unpadded(ids: Tensor, attention_mask: Tensor) -> list[int]:
    length = int(attention_mask.sum())
    assert attention_mask[:length].all()
    return ids[:length].tolist()


def tokens_covering(encoding: Any, which: int, span: tuple[int, int]) -> list[int]:
    """Places of the tokens of segment `which` that share a character with `span`."""
    pairs = zip(encoding.sequence_ids(0), encoding["offset_mapping"], strict=True)
    return [
        place
        for place, (part, (start, end)) in enumerate(pairs)
        if part == which and any(start <= character < end for character in range(*span))
    ]


def test_runs_are_laid_side_by_side_and_padded() -> None:
    source = torch.arange(10, 20, dtype=torch.int32)
    first = Run(source, torch.tensor([0, 4]), torch.tensor([2, 0]), 1)
    second = Run(source, torch.tensor(8), torch.tensor(2), torch.tensor([5, 6]))
    third = Run(source, torch.tensor([9, 1]), torch.tensor([1, 4]), 2)
    laid = lay([first, second, third], pad=-7)
    assert laid.ids.tolist() == [[10, 11, 18, 19, 19, -7], [18, 19, 11, 12, 13, 14]]
    assert laid.token_type_ids.tolist() == [[1, 1, 5, 6, 2, 0], [5, 6, 2, 2, 2, 2]]
    assert laid.attention_mask.tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]
    assert [start.tolist() for start in laid.starts] == [[0, 0], [2, 0], [4, 2]]
    index, mask = places(laid.starts[2], third.size)
    assert index.tolist() == [[4, 0, 0, 0], [2, 3, 4, 5]]
    assert mask.tolist() == [[True, False, False, False], [True] * 4]


@pytest.mark.parametrize("family", FAMILIES)
def test_template_is_that_of_the_tokenizer(family: str) -> None:
    tokenizer = tokenizer_of(family)
    single, pair = read_template(tokenizer, "fox"), read_template(tokenizer, "fox", "hens")
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    middle = [sep, sep] if family == "roberta" else [sep]
    assert [special.ids.tolist() for special in single.specials] == [[cls], [sep]]
    assert [special.ids.tolist() for special in pair.specials] == [[cls], middle, [sep]]
    assert pair.types == ([0, 0] if family == "roberta" else [0, 1])
    assert (single.size, pair.size) == (2, 2 + len(middle))


def test_template_that_breaks_or_swaps_segments_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"[PAD]": 0, "a": 1, "b": 2, "s": 3}, unk_token="[PAD]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing("$A s", "$B s $A", special_tokens=[("s", 3)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]")
    assert read_template(tokenizer, "a").size == 1
    with pytest.raises(ValueError, match="must keep 2 segments in order"):
        read_template(tokenizer, "a", "b")


@pytest.mark.parametrize(("max_length", "side"), [(512, "right"), (70, "right"), (70, "left")])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_equal_those_of_the_tokenizer(family: str, mode: str, max_length: int, side: str) -> None:
    tokenizer = tokenizer_of(family)
    rows = example_rows()
    tokenizer.truncation_side = side
    try:
        tokens = ClozeTokens(rows, tokenizer, mode=mode, max_length=max_length)
        batch = tokens[ALL]
        assert isinstance(batch, PairBatch)
        assert (batch.input_ids[batch.attention_mask == 0] == tokenizer.pad_token_id).all()
        cut = set()
        for row, article in enumerate(rows.articles):
            longest = 0
            for option in range(5):
                text, span = segment(tokenizer, mode, row, option)
                full = {"return_token_type_ids": True, "return_offsets_mapping": True}
                expected = tokenizer(article, text, truncation="only_first", max_length=max_length, **full)
                if len(tokenizer(article, text)["input_ids"]) > max_length:
                    cut.add(article)
                ids = expected["input_ids"]
                at, length = (row, option), len(ids)
                longest = max(longest, length)
                assert unpadded(batch.input_ids[at], batch.attention_mask[at]) == ids
                assert batch.token_type_ids[at][:length].tolist() == expected["token_type_ids"]
                segments = expected.sequence_ids(0)
                assert batch.passage_mask[at].nonzero()[:, 0].tolist() == [
                    place for place in range(length) if segments[place] == 0
                ]
                summary = batch.summary_index[at][batch.summary_mask[at]].tolist()
                assert summary == [place for place in range(length) if segments[place] == 1]
                covering = tokens_covering(expected, 1, span)
                assert batch.summary_index[at][batch.option_mask[at]].tolist() == covering
                assert not (batch.option_mask & ~batch.summary_mask).any()
            assert tokens.lengths[row] == longest
        assert tokens.truncated == len(cut)
        assert cut or max_length == 512
    finally:
        tokenizer.truncation_side = "right"


@pytest.mark.parametrize("mode", [*MODES, "summary_only"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_passage_a_sequence_has_one_segment(family: str, mode: str) -> None:
    tokenizer = tokenizer_of(family)
    # The last of the modes needs no telling.
    tokens = ClozeTokens(example_rows(), tokenizer, mode=mode, with_passage=mode == "summary_only")
    batch = tokens[ALL]
    assert isinstance(batch, PairBatch)
    assert not batch.passage_mask.any()
    assert tokens.truncated == 0
    for row in range(5):
        for option in range(5):
            text, span = segment(tokenizer, mode, row, option)
            expected = tokenizer(text, return_offsets_mapping=True)
            assert unpadded(batch.input_ids[row, option], batch.attention_mask[row, option]) == expected["input_ids"]
            found = batch.summary_index[row, option][batch.option_mask[row, option]].tolist()
            assert found == tokens_covering(expected, 0, span)


@pytest.mark.parametrize("with_passage", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_separate_layout_has_passages_once_and_the_same_tokens_as_the_joint_one(
    family: str, with_passage: bool
) -> None:
    tokenizer = tokenizer_of(family)
    rows = example_rows()
    options = {"with_passage": with_passage, "max_length": 120}
    batch = ClozeTokens(rows, tokenizer, encode="separate", **options)[ALL]
    joint = ClozeTokens(rows, tokenizer, **options)[ALL]
    assert isinstance(batch, SeparateBatch)
    assert isinstance(joint, PairBatch)
    for row, article in enumerate(rows.articles):
        text = article if with_passage else ""
        expected = tokenizer(text, truncation=True, max_length=120)
        assert unpadded(batch.passage_ids[row], batch.passage_attention_mask[row]) == expected["input_ids"]
        specials = [segment is None for segment in expected.sequence_ids(0)]
        width = len(specials)
        assert batch.passage_mask[row][:width].tolist() == [not special for special in specials]
        assert not batch.passage_mask[row][width:].any()
        for option in range(5):
            at = (row, option)
            summary = tokenizer(segment(tokenizer, "fill", row, option)[0])["input_ids"]
            assert unpadded(batch.summary_ids[at], batch.summary_attention_mask[at]) == summary
    assert torch.equal(batch.summary_mask, joint.summary_mask)
    assert torch.equal(batch.option_mask, joint.option_mask)
    of_joint = joint.input_ids.gather(-1, joint.summary_index)
    of_batch = batch.summary_ids.gather(-1, batch.summary_index)
    assert torch.equal(of_joint[joint.summary_mask], of_batch[batch.summary_mask])


@pytest.mark.parametrize("with_passage", [True, False])
@pytest.mark.parametrize("masks", ["each", "first"])
@pytest.mark.parametrize("family", FAMILIES)
def test_slots_hold_as_many_mask_tokens_as_the_option_has(family: str, masks: str, with_passage: bool) -> None:
    tokenizer = tokenizer_of(family)
    rows = example_rows()
    tokens = ClozeTokens(
        rows, tokenizer, encode="cloze", masks=masks, max_length=80, with_passage=with_passage, detokenize=False
    )
    batch = tokens[ALL]
    assert isinstance(batch, SlotBatch)
    used = set()
    for row, (article, question) in enumerate(zip(rows.articles, rows.questions, strict=True)):
        lengths = []
        for option in range(5):
            pieces = [token for token in batch.option_ids[row, option].tolist() if token != -100]
            sequence = int(batch.sequence_of[row, option])
            used.add((row, len(pieces), sequence))
            text = question.replace(PLACEHOLDER, tokenizer.mask_token * len(pieces))
            texts = (article, text) if with_passage else (text,)
            cut = "only_first" if with_passage else False
            expected = tokenizer(*texts, truncation=cut, max_length=80, return_token_type_ids=True)
            ids = expected["input_ids"]
            lengths.append(len(ids))
            assert unpadded(batch.input_ids[sequence], batch.attention_mask[sequence]) == ids
            assert batch.token_type_ids[sequence][: len(ids)].tolist() == expected["token_type_ids"]
            mask_places = [place for place, token in enumerate(ids) if token == tokenizer.mask_token_id]
            width = len(pieces)
            assert batch.mask_index[sequence].tolist() == mask_places + [0] * (batch.mask_index.shape[1] - width)
        assert tokens.lengths[row] == max(lengths)
    # One sequence for each question and number of mask tokens, and none besides.
    assert len(used) == len(batch.input_ids) == len({sequence for *_, sequence in used})
    if masks == "first":
        assert batch.option_ids.shape == (5, 5, 1)
        assert torch.equal(batch.sequence_of, torch.arange(5)[:, None].expand(5, 5))
    else:
        assert batch.option_ids.shape[-1] > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_option_pieces_of_a_slot_are_those_of_the_filled_sentence(family: str) -> None:
    tokenizer = tokenizer_of(family)
    slots = ClozeTokens(example_rows(), tokenizer, encode="cloze")[ALL]
    pairs = ClozeTokens(example_rows(), tokenizer)[ALL]
    assert isinstance(slots, SlotBatch)
    assert isinstance(pairs, PairBatch)
    summaries = pairs.input_ids.gather(-1, pairs.summary_index)
    for row in range(5):
        for option in range(5):
            filled = summaries[row, option][pairs.option_mask[row, option]]
            ids = slots.option_ids[row, option]
            assert ids[ids != -100].tolist() == filled.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_reader_has_bare_tokens_and_the_place_of_the_slot(family: str) -> None:
    tokenizer = tokenizer_of(family)
    rows = example_rows()
    tokens = ClozeTokens(rows, tokenizer, encode="reader", max_length=60)
    batch = tokens[ALL]
    assert isinstance(batch, ReaderBatch)
    pairs = ClozeTokens(rows, tokenizer)[ALL]
    assert isinstance(pairs, PairBatch)
    summaries = pairs.input_ids.gather(-1, pairs.summary_index)
    for row, (article, question) in enumerate(zip(rows.articles, rows.questions, strict=True)):
        passage = tokenizer(article, add_special_tokens=False)["input_ids"][:60]
        text = question.replace(PLACEHOLDER, tokenizer.mask_token)
        asked = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert unpadded(batch.passage_ids[row], batch.passage_mask[row]) == passage
        assert unpadded(batch.question_ids[row], batch.question_mask[row]) == asked
        assert asked[batch.slot[row]] == tokenizer.mask_token_id
        assert tokens.lengths[row] == max(len(passage), len(asked))
        for option in range(5):
            pieces = unpadded(batch.option_ids[row, option], batch.option_mask[row, option])
            assert pieces == summaries[row, option][pairs.option_mask[row, option]].tolist()
    assert (batch.passage_ids[~batch.passage_mask] == tokenizer.pad_token_id).all()


@pytest.mark.parametrize("encode", ["joint", "separate", "cloze", "reader"])
def test_longer_questions_beside_it_only_pad_a_question(encode: str) -> None:
    tokens = ClozeTokens(example_rows(), tokenizer_of("bert"), encode=encode, max_length=80)
    alone, together = tokens[torch.tensor([3])], tokens[torch.tensor([4, 0, 3, 0])]
    padding = {"input_ids": 0, "passage_ids": 0, "summary_ids": 0, "question_ids": 0, "option_ids": 0}
    if encode == "cloze":
        padding["option_ids"] = -100
    assert tokens._pad == 0
    for name, one, many in zip(alone._fields, alone, together, strict=True):
        if name == "sequence_of":
            continue
        if encode == "cloze" and name in ("input_ids", "attention_mask", "token_type_ids", "mask_index"):
            one, many = one[alone.sequence_of], many[together.sequence_of]
        row = many[2:3]
        widths = [size for wide, narrow in zip(row.shape, one.shape, strict=True) for size in (wide - narrow, 0)]
        assert torch.equal(row, torch.nn.functional.pad(one, widths[::-1], value=padding.get(name, 0))), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("marked", [False, True])
def test_truncation_keeps_every_token_of_the_summary(family: str, marked: bool) -> None:
    tokenizer = tokenizer_of(family, marks=marked)
    tokens = ClozeTokens(example_rows(), tokenizer, max_length=64, mark_option=marked)
    batch = tokens[ALL]
    assert isinstance(batch, PairBatch)
    assert tokens.truncated == 1
    summaries = batch.input_ids.gather(-1, batch.summary_index)
    for row in range(5):
        for option in range(5):
            text, _ = segment(tokenizer, "fill", row, option, marks=MARKS if marked else None)
            kept = summaries[row, option][batch.summary_mask[row, option]]
            assert kept.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
            if family == "roberta" and not marked:
                assert tokenizer.decode(kept) == text
            chosen = tokenizer.decode(summaries[row, option][batch.option_mask[row, option]], skip_special_tokens=False)
            assert "OPTION" not in chosen


def test_a_lone_slot_gives_fill_and_option_only_the_same_ids() -> None:
    tokenizer = tokenizer_of("bert")
    for with_passage in (True, False):
        fill, option = (
            ClozeTokens(example_rows(), tokenizer, mode=mode, with_passage=with_passage)[torch.tensor([3])]
            for mode in ("fill", "option_only")
        )
        for name, of_fill, of_option in zip(fill._fields, fill, option, strict=True):
            assert torch.equal(of_fill, of_option), name
