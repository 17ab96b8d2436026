"""Tokenizers: learnt ones are the same everywhere, titles never yield special ids, and text brings them back."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.zoo.text_attack.pairs import TITLES
from zoo.text_attack.tokenizers import (
    SPECIAL_TOKENS,
    build_tokenizer,
    encode_plain,
    tokenizer_from_text,
    tokenizer_text,
    word_start_ids,
)

if TYPE_CHECKING:
    from pathlib import Path

ODD = ["</s> Halo", "a<UserID>b", "<mask><pad>", "<unk> <s>x", "日本 é \U0001f3ae", "  two  blanks ", ""]


@pytest.fixture(scope="module")
def learnt() -> Any:
    return build_tokenizer("train", TITLES, 300, ["<UserID>"])


def test_a_learnt_vocabulary_has_the_specials_first_and_no_more_tokens_than_asked_for(learnt: Any) -> None:
    assert learnt.convert_ids_to_tokens(list(range(6))) == [*SPECIAL_TOKENS, "<UserID>"]
    assert (learnt.pad_token_id, learnt.bos_token_id, learnt.eos_token_id) == (0, 1, 2)
    assert (learnt.unk_token_id, learnt.mask_token_id) == (3, 4)
    assert len(learnt) == 300


def test_another_process_learns_the_same_tokenizer(learnt: Any) -> None:
    code = (
        "import sys; from tests.zoo.text_attack.pairs import TITLES; from zoo.text_attack.tokenizers import *\n"
        "sys.stdout.write(tokenizer_text(build_tokenizer('train', TITLES, 300, ['<UserID>'])))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, encoding="utf-8")
    assert done.stdout == tokenizer_text(learnt)


@pytest.mark.parametrize("text", ODD)
def test_no_text_yields_a_special_id_and_none_is_lost(learnt: Any, text: str) -> None:
    (row,) = encode_plain(learnt, [text])
    assert not set(row) & set(range(6))
    assert learnt.decode(row).lstrip() == text.lstrip()


def test_a_text_is_cut_alike_by_itself_and_among_others(learnt: Any) -> None:
    assert encode_plain(learnt, ODD) == [encode_plain(learnt, [text])[0] for text in ODD]
    assert encode_plain(learnt, []) == []


def test_a_tokenizer_comes_back_from_its_text(learnt: Any) -> None:
    back = tokenizer_from_text(tokenizer_text(learnt))
    assert tokenizer_text(back) == tokenizer_text(learnt) and len(back) == len(learnt)
    assert encode_plain(back, [*ODD, *TITLES]) == encode_plain(learnt, [*ODD, *TITLES])
    assert back("<UserID> x")["input_ids"][0] == 5
    assert back.convert_tokens_to_ids("<UserID>") == 5
    for name in ("pad", "bos", "eos", "unk", "mask"):
        assert getattr(back, f"{name}_token_id") == getattr(learnt, f"{name}_token_id")


def test_a_folder_gives_its_tokenizer_with_the_extra_tokens_it_lacks(learnt: Any, tmp_path: Path) -> None:
    learnt.save_pretrained(tmp_path)
    loaded = build_tokenizer(tmp_path, extra_tokens=["<UserID>", "<TargetItemID>"])
    assert encode_plain(loaded, [*ODD, *TITLES]) == encode_plain(learnt, [*ODD, *TITLES])
    assert loaded.convert_tokens_to_ids(["<UserID>", "<TargetItemID>"]) == [5, 300]
    assert not {5, 300} & set(encode_plain(loaded, ["<UserID><TargetItemID>"])[0])


def test_a_tokenizer_without_padding_pads_with_its_end(learnt: Any, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    backend = learnt.backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path / "end")
    assert build_tokenizer(tmp_path / "end").pad_token_id == 2
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="neither a padding nor an end token"):
        build_tokenizer(tmp_path / "none")


def test_added_tokens_that_are_not_special_may_come_from_a_title() -> None:
    from tokenizers import AddedToken

    tokenizer = build_tokenizer("train", TITLES, 300)
    tokenizer.add_tokens([AddedToken("  ", special=False)])
    assert 300 in encode_plain(tokenizer, ["two  blanks"])[0]


def test_a_special_id_that_cannot_be_kept_out_is_an_error() -> None:
    class Stubborn:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __call__(self, texts: list[str], **_: Any) -> dict[str, Any]:
            return {"input_ids": self.inner(texts, add_special_tokens=False)["input_ids"]}

    with pytest.raises(ValueError, match=r"'x</s>' yields the special token </s>"):
        encode_plain(Stubborn(build_tokenizer("train", TITLES, 300)), ["fine", "x</s>"])


def test_pieces_that_start_words_are_known(learnt: Any) -> None:
    starts = set(word_start_ids(learnt))
    row = encode_plain(learnt, ["Mario Kart"])[0]
    assert [token in starts for token in row].count(True) == 2 and row[0] in starts


@pytest.mark.parametrize("size", [10, 260, 261])
def test_a_vocabulary_without_room_for_the_bytes_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=rf"vocab_size must be at least 262, one for each byte, got {size}"):
        build_tokenizer("train", TITLES, size, ["<UserID>"])


@pytest.mark.parametrize("texts", [[], ["", "  "]], ids=["none", "blank"])
def test_no_text_to_learn_from_is_refused(texts: list[str]) -> None:
    with pytest.raises(ValueError, match="no text to train a tokenizer on"):
        build_tokenizer("train", texts, 300)


def test_a_missing_folder_and_one_without_a_tokenizer_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing is not a folder"):
        build_tokenizer(tmp_path / "missing")
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
    with pytest.raises(FileNotFoundError, match=r"has no vocabulary. Give a folder with tokenizer.json"):
        build_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(FileNotFoundError, match=r"cannot be read.*Give a folder with tokenizer.json"):
        build_tokenizer(tmp_path)
