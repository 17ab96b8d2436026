"""Words that a masked language model puts in a word's place."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

from zoo.text_attack.masked_lm import MaskedLanguageModel

if TYPE_CHECKING:
    from pathlib import Path

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WHOLE = ["red", "blue", "green", "game", "wheel", "Red", "dark", "co", "op", "play"]
LATER = ["##game", "##wheel", "##ing", "##er", "##y"]
TOKENS = [*SPECIAL, *WHOLE, *LATER, "!", "-", "##!"]
SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def piece_tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordPiece({token: at for at, token in enumerate(TOKENS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=inner, **dict(zip(names, SPECIAL, strict=True)))


def save(folder: Path, scores: dict[str, float] | None = None) -> Path:
    """A random network, or one that gives each token its score wherever it stands, and all others nothing."""
    torch.manual_seed(0)
    config = BertConfig(**SIZES, vocab_size=len(TOKENS), max_position_embeddings=20, initializer_range=0.7)
    network = BertForMaskedLM(config).eval()
    if scores is not None:
        bias = torch.full((len(TOKENS),), -999.0)
        for token, score in scores.items():
            bias[TOKENS.index(token)] = score
        for parameter in network.parameters():
            parameter.data.zero_()
        network.cls.predictions.bias.data = bias
    network.save_pretrained(folder)
    piece_tokenizer().save_pretrained(folder)
    return folder


def spread(*tokens: str) -> dict[str, float]:
    return {token: -0.5 * at for at, token in enumerate(tokens)}


# The mask


def test_bae_takes_the_most_likely_whole_words_other_than_the_word(tmp_path: Path) -> None:
    order = ("##game", "[SEP]", "red", "!", "blue", "game", "Red", "##ing", "wheel")
    model = MaskedLanguageModel(save(tmp_path, spread(*order)))
    context = ("play ", "game", " wheel")
    assert model.word_candidates([context], min_prob=0) == [["red", "blue", "wheel"]]
    assert model.word_candidates([context], max_candidates=2, min_prob=0) == [["red", "blue"]]
    assert model.word_candidates([("", "Blue", "")], min_prob=0) == [["red", "game", "wheel"]]
    assert model.word_candidates([]) == []
    assert model.name == str(tmp_path)


def test_bae_leaves_out_words_below_the_least_probability(tmp_path: Path) -> None:
    model = MaskedLanguageModel(save(tmp_path, spread("red", "blue", "game")))
    shares = torch.tensor([0.0, -0.5, -1.0]).softmax(-1).tolist()
    for least, count in ((shares[1] - 1e-3, 2), (shares[1] + 1e-3, 1), (0.9, 0)):
        [words] = model.word_candidates([("", "wheel", "")], min_prob=least)
        assert words == ["red", "blue", "game"][:count]


def test_bae_reads_the_mask_in_its_own_place_also_in_batches(tmp_path: Path) -> None:
    model = MaskedLanguageModel(save(tmp_path), batch_size=2)
    network = BertForMaskedLM.from_pretrained(tmp_path).eval()
    cut = piece_tokenizer()
    contexts = [
        ("play ", "game", " wheel"),
        ("", "game", " red dark wheel playing"),
        ("red [MASK] blue ", "game", ""),
        ("", "game", ""),
        ("green ", "gaming", "!"),
    ]
    found = model.word_candidates(contexts, max_candidates=4, min_prob=0.01)
    assert len({tuple(words) for words in found}) > 1
    for (before, word, after), words in zip(contexts, found, strict=True):
        ids = cut(f"{before}[MASK]{after}")["input_ids"]
        place = [at for at, token in enumerate(ids) if token == 4][-1]
        with torch.no_grad():
            shares = network(torch.tensor([ids])).logits[0, place].softmax(-1)
        ranked = [TOKENS[token] for token in shares.argsort(descending=True).tolist() if shares[token] >= 0.01]
        expected = dict.fromkeys(token.lower() for token in ranked if token in WHOLE and token.lower() != word)
        assert words == list(expected)[:4]


def test_a_title_too_long_for_the_network_is_read_around_the_word(tmp_path: Path) -> None:
    model = MaskedLanguageModel(save(tmp_path))
    filler = "red blue " * 20
    for method in ("bae", "bert-attack"):
        for before, after in ((filler, ""), ("", f" {filler}"), (filler, f" {filler}")):
            [words] = model.word_candidates([(before, "game", after)], method, 3, 0)  # type: ignore[arg-type]
            assert len(words) == 3
    # 18 tokens beside [CLS] and [SEP]: what lies further away changes nothing.
    one, two = model.word_candidates([(f"{filler}green " * 2, "game", ""), (f"{filler}green ", "game", "")], min_prob=0)
    assert one == two


# The word left in


def test_bert_attack_reads_at_the_word_itself(tmp_path: Path) -> None:
    model = MaskedLanguageModel(save(tmp_path))
    network = BertForMaskedLM.from_pretrained(tmp_path).eval()
    contexts = [("play ", word, " wheel") for word in ("game", "green", "dark")]
    found = model.word_candidates(contexts, "bert-attack", min_prob=0)
    assert found != model.word_candidates(contexts, "bae", min_prob=0)
    for (before, word, after), words in zip(contexts, found, strict=True):
        ids = piece_tokenizer()(before + word + after)["input_ids"]
        with torch.no_grad():
            scores = network(torch.tensor([ids])).logits[0, 2]
        ranked = [TOKENS[token] for token in scores.argsort(descending=True).tolist()]
        expected = dict.fromkeys(token.lower() for token in ranked if token in WHOLE and token.lower() != word)
        assert words == list(expected)


@pytest.mark.parametrize("count", [1, 3, 48])
def test_bert_attack_multiplies_the_pieces_of_a_word_by_probability(tmp_path: Path, count: int) -> None:
    model = MaskedLanguageModel(save(tmp_path))
    network = BertForMaskedLM.from_pretrained(tmp_path).eval()
    text = "red playinger wheel"
    ids = piece_tokenizer()(text)["input_ids"]
    assert [TOKENS[token] for token in ids[2:5]] == ["play", "##ing", "##er"]
    with torch.no_grad():
        shares = network(torch.tensor([ids])).logits[0, 2:5].double().softmax(-1)
    best = []
    for values, allowed in zip(shares, (WHOLE, LATER, LATER), strict=True):
        ranked = sorted(((float(values[TOKENS.index(token)]), token) for token in allowed), reverse=True)[:8]
        best.append([(share, token) for share, token in ranked if share > 0])
    products = [
        (math.prod(share for share, _ in combination), "".join(token.removeprefix("##") for _, token in combination))
        for combination in itertools.product(*best)
    ]
    assert len(products) == 8 * 5 * 5
    expected = dict.fromkeys(word.lower() for _, word in sorted(products, reverse=True))
    expected.pop("playinger", None)
    [words] = model.word_candidates([("red ", "playinger", " wheel")], "bert-attack", count, 0)
    assert words == list(expected)[:count]


def test_bert_attack_keeps_a_hyphen_within_a_word(tmp_path: Path) -> None:
    model = MaskedLanguageModel(save(tmp_path, spread("red", "-", "blue", "##y")))
    [words] = model.word_candidates([("play ", "co-op", "")], "bert-attack", min_prob=0)
    assert words == ["red-red", "red-blue", "blue-red", "blue-blue"]


def test_bert_attack_has_no_words_for_unknown_pieces(tmp_path: Path) -> None:
    model = MaskedLanguageModel(save(tmp_path, spread("red", "blue")))
    assert model.word_candidates([("play ", "co-zzz", "")], "bert-attack", min_prob=0) == [[]]


# Byte-level vocabularies, whose mark is at the start of words


def byte_level(folder: Path, scores: dict[str, float]) -> Path:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["red", "dark", "game", "caf\u00c3\u00a9"]
    tokens = [*special, *letters, *words, *(f"\u0120{word}" for word in words)]
    inner = Tokenizer(models.WordLevel({token: at for at, token in enumerate(tokens)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    mask = AddedToken("<mask>", lstrip=True, special=True)
    PreTrainedTokenizerFast(tokenizer_object=inner, mask_token=mask, **names).save_pretrained(folder)
    config = RobertaConfig(**SIZES, vocab_size=len(tokens), max_position_embeddings=20)
    network = RobertaForMaskedLM(config)
    for parameter in network.parameters():
        parameter.data.zero_()
    bias = torch.full((len(tokens),), -999.0)
    for token, score in scores.items():
        bias[tokens.index(token)] = score
    network.lm_head.bias.data = bias
    network.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["bae", "bert-attack"])
def test_byte_level_words_start_with_a_mark_but_at_the_start_of_a_title(tmp_path: Path, method: Any) -> None:
    order = ("game", "\u0120dark", "\u0120caf\u00c3\u00a9", "red")
    model = MaskedLanguageModel(byte_level(tmp_path, spread(*order)))
    contexts = [("dark ", "red", " game"), ("", "red", " game")]
    found = model.word_candidates(contexts, method, min_prob=0)
    assert found == [["dark", "caf\u00e9"], ["game", "dark", "caf\u00e9"]]


# Errors


@pytest.mark.parametrize("name", ["/nothing/here", "nobody/nothing"])
def test_a_network_that_is_not_on_disk_names_a_recipe_without_one(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"recipe=\"deepwordbug\""):
        MaskedLanguageModel(name)


def test_a_tokenizer_without_a_mask_is_refused(tmp_path: Path) -> None:
    save(tmp_path)
    PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no mask token"):
        MaskedLanguageModel(tmp_path)


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    model = MaskedLanguageModel(save(tmp_path))
    context = ("", "game", "")
    with pytest.raises(ValueError, match="method='bert'"):
        model.word_candidates([context], "bert")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_candidates=0"):
        model.word_candidates([context], max_candidates=0)
    with pytest.raises(ValueError, match="min_prob=1"):
        model.word_candidates([context], min_prob=1)
    with pytest.raises(ValueError, match="no word between 'a ' and ' b'"):
        model.word_candidates([("a ", " ", " b")])
