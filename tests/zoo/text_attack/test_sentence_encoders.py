"""Vectors of titles, and the angles between them."""

from __future__ import annotations

import json
import math
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5Model,
)

from zoo.text_attack.sentence_encoders import (
    SentenceEncoder,
    SentenceTransformerEncoder,
    TfidfEncoder,
    TransformerEncoder,
    angular_similarity,
    sentence_encoder,
)

if TYPE_CHECKING:
    from pathlib import Path

TITLES = ["Red Racing Game", "Blue Racing Wheel", "Game Controller", "Wireless Headset with Mic", "Red Headset"]
SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def tokenizer() -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.train_from_iterator(
        TITLES, trainers.WordPieceTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    )
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(**SIZES, vocab_size=90, max_position_embeddings=24, initializer_range=0.5)
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


# Angles


def test_angular_similarity_is_one_half_or_nothing_exactly() -> None:
    a = torch.randn(50, 33, generator=torch.Generator().manual_seed(0))
    assert angular_similarity(a, a).tolist() == [1.0] * 50
    assert angular_similarity(a, -a).tolist() == [0.0] * 50
    eye = torch.eye(4)
    assert angular_similarity(eye, eye.roll(1, 0)).tolist() == [0.5] * 4
    assert angular_similarity(torch.zeros(1, 4), torch.zeros(1, 4)).tolist() == [0.5]
    assert angular_similarity(torch.zeros(4), eye).tolist() == [0.5] * 4


def test_angular_similarity_is_one_minus_the_angle_over_pi_of_any_lengths() -> None:
    angles = torch.tensor([1e-6, 0.1, 1.0, 2.0, 3.1], dtype=torch.float64)
    b = 7 * torch.stack((angles.cos(), angles.sin()), dim=-1)
    similarity = angular_similarity(torch.tensor([0.01, 0.0], dtype=torch.float64), b)
    torch.testing.assert_close(similarity, 1 - angles / math.pi, rtol=0, atol=1e-14)
    assert angular_similarity(b[:1].float(), b[:3].float()).shape == (3,)


# Weighted words and n-grams


@pytest.mark.parametrize("titles", [None, TITLES])
def test_tfidf_rows_are_units_whatever_the_text(titles: list[str] | None) -> None:
    encoder = TfidfEncoder(titles)
    vectors = encoder.encode([*TITLES, "", "!!", "\u043f\u0440\u0438\u0432\u0435\u0442", "red racing game"])
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(vectors)))
    assert torch.equal(vectors[0], vectors[-1])
    assert float(vectors[5] @ vectors[0]) == 0
    assert torch.equal(encoder.encode(["Red Headset", "x"])[0], vectors[4])
    assert encoder.encode([]).shape == (0, vectors.shape[1])
    assert encoder.name == ("hashed" if titles is None else "tfidf")
    assert isinstance(encoder, SentenceEncoder)


def test_tfidf_falls_with_each_edit_and_a_typing_error_counts_less_than_another_word() -> None:
    encoder = TfidfEncoder(TITLES)
    original, typo, two, other, unlike = encoder.encode(
        ["Red Racing Game", "Red Racimg Game", "Red Racimg Gane", "Red Zyxwvu Game", "Wireless Mic"]
    )
    order = [float(original @ vector) for vector in (typo, two, unlike)]
    assert 1 > order[0] > order[1] > order[2] >= 0
    assert order[0] > float(original @ other) + 0.05


def test_tfidf_weighs_rare_words_more() -> None:
    titles = [f"game word{number}" for number in range(50)]
    common, rare, text = TfidfEncoder(titles).encode(["game", "word7", "game word7"])
    assert float(rare @ text) > float(common @ text) + 0.1
    common, rare, text = TfidfEncoder().encode(["game", "gate", "game gate"])
    assert float(rare @ text) == pytest.approx(float(common @ text), abs=0.02)


def test_tfidf_refuses_no_titles_and_no_columns() -> None:
    with pytest.raises(ValueError, match="no titles"):
        TfidfEncoder([])
    with pytest.raises(ValueError, match="num_features=0"):
        TfidfEncoder(num_features=0)


# Networks


def test_a_network_s_vector_is_the_unit_mean_over_the_tokens_of_the_text_alone(folder: Path) -> None:
    encoder = TransformerEncoder(folder, batch_size=2)
    network = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    cut = AutoTokenizer.from_pretrained(folder)
    vectors = encoder.encode([*TITLES, ""])
    assert not vectors.requires_grad and not vectors.is_inference()
    for title, vector in zip([*TITLES, ""], vectors, strict=True):
        with torch.no_grad():
            hidden = network(torch.tensor([cut(title)["input_ids"]])).last_hidden_state[0]
        mean = hidden.mean(0)
        torch.testing.assert_close(vector, mean / mean.norm(), rtol=0, atol=1e-5)
    assert encoder.encode([]).shape == (0, 16)
    assert encoder.name == str(folder)


def test_texts_too_long_for_a_network_are_cut(folder: Path) -> None:
    long = "red " * 60
    one, two = TransformerEncoder(folder).encode([long, "red " * 22])
    torch.testing.assert_close(one, two)


def test_a_text_without_tokens_is_refused(folder: Path) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    bare._tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    bare.save_pretrained(folder)
    with pytest.raises(ValueError, match="the title '' has no tokens"):
        TransformerEncoder(folder).encode(["red", ""])


def test_names_give_encoders(folder: Path) -> None:
    assert isinstance(sentence_encoder("tfidf", TITLES), TfidfEncoder)
    assert isinstance(sentence_encoder(folder), TransformerEncoder)
    assert isinstance(sentence_encoder(str(folder), TITLES), TransformerEncoder)
    with pytest.raises(ValueError, match="library='spacy'"):
        sentence_encoder(folder, library="spacy")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["/nothing/here", "nobody/nothing"])
def test_an_encoder_that_is_not_on_disk_names_tfidf(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"sentence_encoder=\"tfidf\""):
        sentence_encoder(name)


def test_a_folder_that_wants_more_than_a_mean_is_refused(folder: Path) -> None:
    (folder / "1_Pooling").mkdir()
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}))
    (folder / "2_Normalize").mkdir()
    TransformerEncoder(folder)
    pooling.write_text(json.dumps({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}))
    with pytest.raises(ValueError, match=r"pooling_mode_cls_token.*library=\"sentence-transformers\""):
        TransformerEncoder(folder)


def test_an_encoder_and_decoder_is_refused(tmp_path: Path) -> None:
    T5Model(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=90)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is an encoder and decoder"):
        TransformerEncoder(tmp_path)


def test_sentence_transformers_pools_by_itself_and_its_absence_names_tfidf(monkeypatch: pytest.MonkeyPatch) -> None:
    class Network:
        def __init__(self, name: str, device: str) -> None:
            if name == "gone":
                raise OSError("not found\nmore")

        def to(self, device: str) -> None: ...

        def encode(self, texts: list[str], **options: Any) -> torch.Tensor:
            assert options["convert_to_tensor"] is True
            return torch.tensor([[3.0, 4.0]]).repeat(len(texts), 1)

    library: Any = ModuleType("sentence_transformers")
    library.SentenceTransformer = Network
    monkeypatch.setitem(sys.modules, "sentence_transformers", library)
    encoder = sentence_encoder("some/model", library="sentence-transformers")
    torch.testing.assert_close(encoder.encode(["a", "b"]), torch.tensor([[0.6, 0.8]] * 2))
    with pytest.raises(FileNotFoundError, match="gone cannot be read"):
        SentenceTransformerEncoder("gone")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"pip install sentence-transformers.*tfidf"):
        SentenceTransformerEncoder("some/model")
