"""Texts in the tokens of a pre-trained backbone, and back in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from datamodules.dialogue_vocabulary import word_tokenizer
from tests.zoo.eacm.dialogues import NUM_EMOTIONS, Batch
from tests.zoo.eacm.folders import KINDS, POSTS, REPLIES, folder_of, texts
from zoo.eacm.backbones import ReplyTokenizer, first_words, last_to_end, surface_words
from zoo.eacm.steered import SteeredLM

if TYPE_CHECKING:
    from pathlib import Path


def reader(path: Path, kind: str, **options: Any) -> tuple[SteeredLM, Batch]:
    known, batch = texts()
    size = known.post.get_vocab_size()
    machine = SteeredLM(size, size, NUM_EMOTIONS, backbone=str(folder_of(path, kind)), **options)
    machine.vocabulary_ = known
    return machine, batch


@pytest.mark.parametrize("kind", KINDS)
def test_texts_become_the_tokens_of_the_backbone(kind: str, tmp_path: Path) -> None:
    machine, batch = reader(tmp_path, kind)
    pieces, tokenizer = machine.pieces(batch), machine.tokenizer
    plain = tokenizer.tokenizer
    for row, (post, reply) in enumerate(zip(POSTS, REPLIES, strict=True)):
        before = pieces.post_ids[row][pieces.post_mask[row]].tolist()
        ids = [*before, *pieces.reply_in[row, :1].tolist()] if kind in ("gpt2", "llama") else before
        end = "\n" if kind in ("gpt2", "llama") else "</s>"
        assert plain.decode(ids) == post.replace(" [SEP] ", "\n") + end
        said = pieces.reply_out[row][pieces.reply_mask[row]].tolist()
        # The dialogue's words: "No", "idea" and ","; this reply was cut, so that its end does not count.
        assert plain.decode(said) == ("No idea," if row == 4 else f"{reply}</s>")
        inputs = pieces.reply_in[row][pieces.reply_mask[row]].tolist()
        assert inputs[1:] == said[:-1]
    if kind in ("t5", "bart"):
        assert pieces.reply_in[:, 0].tolist() == [0 if kind == "t5" else 2] * 6


def test_a_long_post_keeps_its_last_tokens(tmp_path: Path) -> None:
    machine, batch = reader(tmp_path, "llama", max_tokens=2)
    tokenizer: ReplyTokenizer = machine.tokenizer
    ids, mask = tokenizer.posts(batch.post_text)
    assert int(mask.sum(1).max()) == 2 + len(tokenizer.begin) + len(tokenizer.between)
    whole = tokenizer.tokenizer(POSTS[3], add_special_tokens=False)["input_ids"]
    assert ids[3][mask[3]].tolist() == [*tokenizer.begin, *whole[-2:], *tokenizer.between]


def test_words_of_a_reply_are_those_of_the_dialogue_tokenizer_known_or_not() -> None:
    tokenizer = word_tokenizer()
    assert surface_words(tokenizer, " Wa isn\u2019t\nthere,WB 42!") == ["wa", "isn't", "there", ",", "wb", "00", "!"]
    assert first_words(tokenizer, "Hm, I'm  not 42.", 4) == "Hm, I'm  not"
    assert first_words(tokenizer, "Hm", 0) == ""


def test_rows_are_filled_on_the_left() -> None:
    ids = torch.tensor([[5, 6, 0], [7, 0, 0], [8, 9, 4]])
    moved, mask = last_to_end(ids, ids.ne(0))
    assert mask.tolist() == [[False, True, True], [False, False, True], [True, True, True]]
    assert moved[mask].tolist() == [5, 6, 7, 8, 9, 4]
