"""Perplexity against closed forms: a uniform model's is the size of its vocabulary."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from zoo.text_attack.perplexity import CausalPerplexity, LanguageModel, NGramLanguageModel

if TYPE_CHECKING:
    from pathlib import Path

TITLES = ["red game", "red wheel", "blue game", "a much longer title of a game"]


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("level", ["char", "word"])
def test_a_uniform_model_s_perplexity_is_its_vocabulary_size(order: int, level: Literal["char", "word"]) -> None:
    model = NGramLanguageModel(TITLES, order, level, k=math.inf)
    symbols = set("".join(TITLES)) if level == "char" else set(" ".join(TITLES).split())
    assert model.vocab_size == len(symbols) + 2
    texts = ["red game", "", "unseen \u00fc"]
    assert model.perplexity(texts).tolist() == [model.vocab_size] * 3
    near = NGramLanguageModel(TITLES, order, level, k=1e15)
    assert near.perplexity(texts).tolist() == pytest.approx([model.vocab_size] * 3, rel=1e-12)
    assert isinstance(model, LanguageModel)


@pytest.mark.parametrize("order", [2, 3])
def test_histories_never_seen_are_uniform(order: int) -> None:
    model = NGramLanguageModel(["ab"], order, k=0.1)
    # a, b, the end, the unknown. Every history of "zzzz" but the first is unseen.
    assert model.vocab_size == 4
    first = math.log((0 + 0.1) / (1 + 0.1 * 4))
    expected = math.exp(-(first + 4 * math.log(1 / 4)) / 5)
    assert model.perplexity(["zzzz"]).tolist() == pytest.approx([expected], rel=1e-12)


def test_n_grams_are_counted_as_the_formula_says() -> None:
    model = NGramLanguageModel(["aab", "ab"], order=2, k=0.5)
    # start-a 2, a-a 1, a-b 2, b-end 2; V = 4.
    p = [(2 + 0.5) / (2 + 2), (2 + 0.5) / (3 + 2), (2 + 0.5) / (2 + 2)]
    assert model.perplexity(["ab"]).tolist() == pytest.approx([math.prod(p) ** (-1 / 3)], rel=1e-12)
    unigram = NGramLanguageModel(["aab", "ab"], order=1, k=0.5)
    p = [(3 + 0.5) / (7 + 2), (2 + 0.5) / (7 + 2)]
    assert unigram.perplexity(["a"]).tolist() == pytest.approx([math.prod(p) ** (-1 / 2)], rel=1e-12)
    assert model.perplexity(["ab"]).dtype == torch.float64
    assert model.perplexity([]).shape == (0,)


def test_probabilities_of_a_history_sum_to_one() -> None:
    model = NGramLanguageModel(TITLES, order=3, k=0.3)
    singles = [symbol for symbol in model._symbols if len(symbol) == 1]
    # p(x, end | "re") / p(x, end | ...) is taken apart through the counts that the text "re" + x adds.
    history = ("r", "e")
    total = sum(
        (model._grams[(*history, symbol)] + 0.3) / (model._histories[history] + 0.3 * model.vocab_size)
        for symbol in [*singles, "<end>", "<unknown>"]
    )
    assert total == pytest.approx(1, rel=1e-12)


def test_titles_of_the_catalogue_are_expected_and_misspelt_ones_are_not() -> None:
    for level in ("char", "word"):
        model = NGramLanguageModel(TITLES, level=level)  # type: ignore[arg-type]
        clean, edited = model.perplexity(["red game", "rde gmae"]).tolist()
        assert clean < edited
    words = NGramLanguageModel(["Red Game!"], level="word")
    assert words.perplexity(["red game!"]).tolist() == words.perplexity(["RED GAME !"]).tolist()
    assert words.name == "word 3-gram, add-0.1, fitted on 1 titles"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"order": 0}, "order=0"), ({"level": "byte"}, "level='byte'"), ({"k": 0}, "k=0"), ({"k": math.nan}, "k=nan")],
)
def test_wrong_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NGramLanguageModel(TITLES, **options)
    with pytest.raises(ValueError, match="no titles"):
        NGramLanguageModel([])


def save(folder: Path, *, start: bool = True, zero: bool = False) -> Path:
    inner = Tokenizer(models.WordLevel(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.train_from_iterator(TITLES, trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>"], show_progress=False))
    if start:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>"} if start else {}
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=31, n_positions=16, initializer_range=0.5)
    network = GPT2LMHeadModel(config)
    if zero:
        network.transformer.wte.weight.data.zero_()
    network.save_pretrained(folder)
    return folder


def test_a_uniform_network_s_perplexity_is_its_vocabulary_size(tmp_path: Path) -> None:
    model = CausalPerplexity(save(tmp_path, zero=True))
    assert model.perplexity(TITLES).tolist() == pytest.approx([31] * 4, rel=1e-12)
    assert model.name == str(tmp_path)


@pytest.mark.parametrize("start", [True, False])
def test_a_text_s_perplexity_is_that_of_the_text_alone(tmp_path: Path, start: bool) -> None:
    model = CausalPerplexity(save(tmp_path, start=start), batch_size=2)
    network = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    cut = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    texts = [*TITLES, "red"]
    values = model.perplexity(texts)
    for text, value in zip(texts, values.tolist(), strict=True):
        ids = cut(text)["input_ids"]
        assert (ids[0] == 1) is start
        with torch.no_grad():
            scores = network(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        losses = [-float(scores[place, token]) for place, token in enumerate(ids[1:])]
        if losses:
            assert value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
        else:
            assert math.isnan(value)
    assert math.isnan(values[-1]) is not start
    assert bool(model.perplexity([""]).isnan().all())
    assert model.perplexity([]).shape == (0,)


def test_a_text_too_long_for_the_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has 21 tokens with the start, .* reads 16"):
        CausalPerplexity(save(tmp_path)).perplexity(["red " * 20])


def test_a_network_that_is_not_on_disk_names_the_n_gram_model() -> None:
    with pytest.raises(FileNotFoundError, match="NGramLanguageModel"):
        CausalPerplexity("nobody/nothing")
