"""Cloze questions, and tokenizers of several families built without a network."""

from functools import cache

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from datamodules.cloze_rows import ClozeRows
from datamodules.cloze_tokenizer import load_tokenizer

FAMILIES = ("bert", "roberta", "albert")

LONG = "The council met on Monday. " + "Nobody of the board had read the report before the vote, it's said. " * 12
SHORT = "A fox, two hens: the farm was quiet."
QUESTIONS = (
    (LONG, "The board @placeholder the report , it 's said .", ["ignored", "read", "praised", "burnt", "quietly sold"]),
    (SHORT, "@placeholder is what reigned on the farm", ["silence", "noise", "chaos", "fox", "hens"]),
    (LONG, 'They met to "@placeholder" the vote.', ["delay", "hold", "win", "Unsettledness", "lose"]),
    (SHORT, "@placeholder", ["quiet", "fox", "hen", "farm", "farm"]),
    ("Ünïcode façade — “quoted” text №5.", "The naïve @placeholder 's façade", ["café", "Zoë", "x-ray", "a", "U.S."]),
)


def example_rows(labelled: bool = True) -> ClozeRows:
    articles, questions, options = zip(*QUESTIONS, strict=True)
    labels = np.array([0, 1, 4, 3, 2]) if labelled else np.full(5, -100)
    places = [f"examples.jsonl, line {line}" for line in range(1, 6)]
    return ClozeRows("examples", list(articles), list(questions), list(options), labels, list("abcde"), places)


def corpus() -> list[str]:
    rows = example_rows()
    filled = [
        question.replace("@placeholder", option)
        for question, options in zip(rows.questions, rows.options, strict=True)
        for option in options
    ]
    return [*rows.articles, *filled]


@cache
def tokenizer_of(family: str, marks: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer with the template and the way of a family; "roberta" and "albert" cover all characters."""
    if family == "bert":
        return load_tokenizer("train", corpus, 250, marks)
    build = _byte_level if family == "roberta" else _sentence_pieces
    tokenizer = build()
    if marks:
        tokenizer.add_tokens([AddedToken(mark, lstrip=True, normalized=False, special=True)
                              for mark in ("[OPTION]", "[/OPTION]")], special_tokens=True)  # fmt: skip
    return tokenizer


def _byte_level() -> PreTrainedTokenizerFast:
    names = ["<s>", "<pad>", "</s>", "<unk>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=names,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    backend.train_from_iterator(corpus(), trainer)
    backend.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token=AddedToken("<mask>", lstrip=True, special=True),
    )


def _sentence_pieces() -> PreTrainedTokenizerFast:
    names = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=200, show_progress=False, special_tokens=names, unk_token="<unk>")
    backend.train_from_iterator(corpus(), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token=AddedToken("[MASK]", lstrip=True, special=True),
    )
