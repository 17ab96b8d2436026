"""Rewriting by tiny networks with random weights: what is asked, and when a title keeps its text."""

from __future__ import annotations

import logging

import pytest
import torch

from zoo.text_attack.rewriting import DEFENSE_PROMPT, LMRewriteDefense

TITLES = ["Super Mario Kart", "Zelda", "The Legend of Heroes: Trails", "Halo 3"]


def save_tokenizer(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate(["<pad>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    return len(vocab)


@pytest.fixture(scope="module", params=["decoder", "encoder-decoder"])
def folder(request, tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    path = tmp_path_factory.mktemp(request.param)
    size = save_tokenizer(path)
    torch.manual_seed(0)
    if request.param == "decoder":
        network = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=size,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                initializer_range=0.3,
                pad_token_id=0,
                bos_token_id=None,
                eos_token_id=1,
            )
        )
    else:
        network = T5ForConditionalGeneration(
            T5Config(
                vocab_size=size,
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                initializer_factor=2.0,
                pad_token_id=0,
                eos_token_id=1,
                decoder_start_token_id=0,
            )
        )
    network.save_pretrained(path)
    return path


def test_titles_in_a_batch_are_written_as_each_alone(folder):
    defense = LMRewriteDefense(folder, "Fix: {title} Fixed:", max_new_tokens=6)
    together = defense._answers(TITLES)
    assert together == [defense._answers([title])[0] for title in TITLES]
    assert len(set(together)) > 1
    assert not any("Fix" in answer for answer in together)


def with_answers(monkeypatch, answers):
    defense = LMRewriteDefense("nowhere", batch_size=2)
    asked = []

    def answer(titles):
        asked.append(titles)
        return [answers[title] for title in titles]

    monkeypatch.setattr(defense, "_answers", answer)
    return defense, asked


def test_a_title_keeps_its_text_if_the_answer_is_empty_or_more_than_twice_as_long(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "zoo.text_attack.rewriting")
    answers = {"Mairo": "Mario", "Zelda": " \n ", "Halo": "Halo Halo", "Doom": "Doom 6789", "Kart": 'x"', "Myst": '""'}
    defense, _ = with_answers(monkeypatch, answers | {"Doom": "Doom 678"})
    assert defense(list(answers)) == ["Mario", "Zelda", "Halo", "Doom 678", 'x"', "Myst"]
    assert defense.num_kept == 3
    assert "3 of 6 titles keep their text" in caplog.text


def test_the_first_line_is_taken_without_quotes(monkeypatch):
    defense, _ = with_answers(monkeypatch, {"Super Mairo": '\n "Super Mario" \nThis title was corrected.'})
    assert defense(["Super Mairo"]) == ["Super Mario"]


def test_each_title_is_asked_for_once_in_batches_of_like_length(monkeypatch):
    titles = ["ccc", "a", "ccc", "dddd", "bb"]
    defense, asked = with_answers(monkeypatch, {title: title.upper() for title in titles})
    assert defense(titles) == ["CCC", "A", "CCC", "DDDD", "BB"]
    assert defense(["a", "bb"]) == ["A", "BB"]
    assert asked == [["a", "bb"], ["ccc", "dddd"]]
    assert defense([]) == []


@pytest.mark.parametrize(
    "options", [{"prompt": "no place"}, {"prompt": "{title} {title}"}, {"max_new_tokens": 0}, {"batch_size": 0}]
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=r"\{title\} once|at least 1"):
        LMRewriteDefense("nowhere", **options)
    assert DEFENSE_PROMPT.count("{title}") == 1


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        LMRewriteDefense(tmp_path / "missing")(["Mario"])
