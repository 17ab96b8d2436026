from __future__ import annotations

import json
import logging
import shutil
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from datamodules.sources.feature_encoders import encoded_features, mean_pooling
from tests.datamodules.sources.encoder_folders import (
    SIZES,
    TEXTS,
    image_encoder,
    pictures,
    text_encoder,
    text_features,
    tokenizer,
)

if TYPE_CHECKING:
    from pathlib import Path

transformers = pytest.importorskip("transformers")


def alone(folder: Path, texts: list[str], pool: Any) -> np.ndarray:
    """Each text by itself, without padding."""
    network = transformers.BertModel.from_pretrained(folder).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        states = [network(**tokens(text, return_tensors="pt")).last_hidden_state[0] for text in texts]
    return np.stack([pool(one).numpy() for one in states])


def by_hand(folder: Path, images: np.ndarray, loader: Any, features: Any) -> np.ndarray:
    """Pictures of the network's own size, which the processor only rescales."""
    network = loader.from_pretrained(folder).eval()
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    pixels = (images / 255 - np.array(settings["image_mean"])) / np.array(settings["image_std"])
    with torch.no_grad():
        return features(network, torch.from_numpy(pixels).permute(0, 3, 1, 2).float()).numpy()  # type: ignore[no-any-return]


def test_mean_pooling_ignores_padding() -> None:
    states = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert mean_pooling(states, mask).tolist() == [[1, 2], [8, 9]]
    states[0, 2] = 1e6
    assert mean_pooling(states, mask)[0].tolist() == [1, 2]


def test_text_features_are_means_over_the_tokens_of_each_text_alone(tmp_path: Path) -> None:
    folder = text_encoder(tmp_path / "bert")
    features = text_features(folder, tmp_path)
    assert features.dtype == np.float32 and features.shape == (6, 32)
    assert np.allclose(features, alone(folder, TEXTS, lambda states: states.mean(0)), atol=1e-5)


def test_batch_size_does_not_change_text_features(tmp_path: Path) -> None:
    folder = text_encoder(tmp_path / "bert")
    results = [text_features(folder, tmp_path / str(size), batch_size=size) for size in (1, 2, 4, 64)]
    for other in results[1:]:
        assert np.allclose(results[0], other, atol=1e-5)


@pytest.mark.parametrize("limit", ["positions", "tokenizer", "sentence"])
def test_long_texts_are_cut_to_the_least_limit(tmp_path: Path, limit: str) -> None:
    tokens = tokenizer(model_max_length=8) if limit == "tokenizer" else tokenizer()
    folder = text_encoder(tmp_path / "bert", tokens, positions=8 if limit == "positions" else 20)
    if limit == "sentence":
        (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 8}')
    long, cut = " ".join(["red cup toy"] * 50), " ".join(["red cup toy"] * 2)
    features = text_features(folder, tmp_path, [long, cut])
    assert np.allclose(features[0], features[1], atol=1e-6)


def test_positions_that_roberta_keeps_for_padding_are_no_room_for_tokens(tmp_path: Path) -> None:
    config = transformers.RobertaConfig(vocab_size=12, max_position_embeddings=10, pad_token_id=0, bos_token_id=2,
                                        eos_token_id=3, type_vocab_size=2, **SIZES)  # fmt: skip
    transformers.RobertaModel(config).save_pretrained(tmp_path / "roberta")
    tokenizer().save_pretrained(tmp_path / "roberta")
    assert np.isfinite(text_features(tmp_path / "roberta", tmp_path, ["red " * 50])).all()


def test_files_of_sentence_transformers_are_obeyed(tmp_path: Path) -> None:
    folder = text_encoder(tmp_path / "bert")
    plain = text_features(folder, tmp_path)
    kinds = ["Transformer", "Pooling", "Normalize"]
    modules = [{"idx": place, "type": f"sentence_transformers.models.{kind}"} for place, kind in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(modules))
    unit = text_features(folder, tmp_path)
    assert np.allclose(unit, plain / np.linalg.norm(plain, axis=1, keepdims=True), atol=1e-6)
    (folder / "modules.json").write_text(json.dumps(modules[:2]))
    (folder / "1_Pooling").mkdir()
    pooling = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    assert np.allclose(text_features(folder, tmp_path), alone(folder, TEXTS, lambda states: states[0]), atol=1e-5)


def test_steps_of_sentence_transformers_that_are_left_out_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = text_encoder(tmp_path / "bert")
    (folder / "modules.json").write_text('[{"type": "sentence_transformers.models.Dense"}]')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    text_features(folder, tmp_path)
    assert "Dense, pooling_mode_max_tokens of sentence-transformers is not applied" in caplog.text
    (folder / "modules.json").write_text("[")
    with pytest.raises(ValueError, match=r"modules\.json is not valid JSON"):
        text_features(folder, tmp_path)


def test_decoders_are_left_out_of_encoder_decoders(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=12, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
                                   pad_token_id=0, eos_token_id=3, decoder_start_token_id=0)  # fmt: skip
    transformers.T5Model(config).save_pretrained(tmp_path / "t5")
    tokenizer(model_input_names=["input_ids", "attention_mask"]).save_pretrained(tmp_path / "t5")
    assert text_features(tmp_path / "t5", tmp_path).shape == (6, 32)


def test_empty_texts_are_counted_and_encoded_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = text_encoder(tmp_path / "bert")
    with caplog.at_level(logging.INFO):
        features = text_features(folder, tmp_path)
    assert "1 of 6 texts are empty" in caplog.text
    assert np.allclose(features[[2]], alone(folder, [""], lambda states: states.mean(0)), atol=1e-5)


def test_texts_without_any_token_are_zeros_and_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = text_encoder(tmp_path / "bert", tokenizer(special=False))
    features = text_features(folder, tmp_path, batch_size=1)
    assert not features[2].any() and features[[0, 1, 3, 4, 5]].any(1).all()
    assert "1 of 6 texts have no token" in caplog.text
    with pytest.raises(ValueError, match="none of 2 texts has a token"):
        text_features(folder, tmp_path, ["", " "])


@pytest.mark.parametrize("kind", ["vit", "vision", "clip", "classifier", "resnet"])
def test_image_features_are_what_the_network_pools(tmp_path: Path, kind: str) -> None:
    folder = image_encoder(tmp_path / kind, kind)
    images = pictures(size=16)
    loader, pool = {
        "vit": (transformers.ViTModel, lambda net, pixels: net(pixels).pooler_output),
        "vision": (transformers.CLIPVisionModel, lambda net, pixels: net(pixels).pooler_output),
        "clip": (transformers.CLIPModel, lambda net, pixels: net.get_image_features(pixels).pooler_output),
        # Its checkpoint has no pooling: that of a ViTModel would be random.
        "classifier": (
            transformers.ViTForImageClassification,
            lambda net, pixels: net(pixels, output_hidden_states=True) and net.vit(pixels).last_hidden_state[:, 0],
        ),
        "resnet": (transformers.ResNetModel, lambda net, pixels: net(pixels).last_hidden_state.mean((2, 3))),
    }[kind]
    features = encoded_features("image", images, str(folder), str(tmp_path), 2)
    assert features.dtype == np.float32
    assert features.shape == (5, {"clip": 24, "resnet": 16}.get(kind, 32))
    assert np.allclose(features, by_hand(folder, images, loader, pool), atol=2e-5)


def test_batch_size_does_not_change_image_features(tmp_path: Path) -> None:
    folder = image_encoder(tmp_path / "vit")
    first, *others = (
        encoded_features("image", pictures(), str(folder), str(tmp_path / str(size)), size) for size in (1, 2, 64)
    )
    for other in others:
        assert np.allclose(first, other, atol=1e-5)


def test_clip_encodes_texts_too(tmp_path: Path) -> None:
    folder = image_encoder(tmp_path / "clip", "clip")
    tokens = tokenizer(model_input_names=["input_ids", "attention_mask"])
    tokens.save_pretrained(folder)
    features = text_features(folder, tmp_path, TEXTS, 2)
    network = transformers.CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        one = network.get_text_features(**tokens(TEXTS[3], return_tensors="pt")).pooler_output
    assert features.shape == (6, 24)
    assert np.allclose(features[3], one[0].numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "payload", "message"),
    [
        ("audio", TEXTS, "kind is 'audio': expected one of text, image"),
        ("text", [], "there is no text to encode"),
        ("text", ["red", None], "item 1 is None: expected a text"),
        ("image", TEXTS, "expected uint8"),
        ("image", pictures()[0], r"images are uint8 \(12, 12, 3\): expected uint8 \(items, height, width, 3\)"),
        ("image", pictures() / 255, "images are float64"),
    ],
    ids=["kind", "nothing", "none", "texts", "one", "float"],
)
def test_payload_of_another_kind_is_refused(kind: str, payload: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoded_features(kind, payload, "x")


def test_batch_size_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        encoded_features("text", TEXTS, "x", batch_size=0)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "has no config.json: put config.json, model.safetensors and tokenizer.json"),
        ("model.safetensors", "has no weights"),
        ("tokenizer.json", "has no tokenizer"),
    ],
)
def test_folders_that_lack_a_file_are_named(tmp_path: Path, missing: str, message: str) -> None:
    folder = text_encoder(tmp_path / "bert")
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"bert {message}"):
        text_features(folder, tmp_path)


def test_folder_of_texts_is_no_encoder_of_images(tmp_path: Path) -> None:
    folder = text_encoder(tmp_path / "bert")
    with pytest.raises(FileNotFoundError, match=r"has no image processor: put .*preprocessor_config\.json"):
        encoded_features("image", pictures(), str(folder), str(tmp_path))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_path_that_is_no_folder_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"{name} is not a folder; give a folder with config.json"):
        encoded_features("text", TEXTS, name, str(tmp_path))


def test_hub_that_does_not_answer_gives_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"some/encoder is no local folder.*`hf download some/encoder --local"):
        encoded_features("text", TEXTS, "some/encoder", str(tmp_path))


def test_encoder_of_the_hub_is_read_from_its_cache_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE
    folder = text_encoder(tmp_path / "bert")
    (folder / "modules.json").write_text('[{"type": "sentence_transformers.models.Normalize"}]')
    # Set by the time that the module is imported.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--zoo--tiny-sentences"
    shutil.copytree(folder, repository / "snapshots" / "0123abcd")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    features = encoded_features("text", TEXTS, "zoo/tiny-sentences", str(tmp_path))
    assert np.allclose(features, text_features(folder, tmp_path), atol=1e-6)
    assert np.allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)


def test_transformers_missing_gives_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-method-zoo\[hub\]'"):
        encoded_features("text", TEXTS, "some/encoder")


def test_damaged_or_unfitting_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = text_encoder(tmp_path / "bert")
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights.pop("encoder.layer.1.output.dense.weight")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of BertModel.*encoder\.layer\.1\.output\.dense\.weight"):
        text_features(folder, tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"bert cannot be read, AutoModel says"):
        text_features(folder, tmp_path)


def test_tokenizer_without_padding_is_refused_with_a_way_out(tmp_path: Path) -> None:
    folder = text_encoder(tmp_path / "bert", tokenizer(pad=False))
    with pytest.raises(ValueError, match=r"has no padding token: set one"):
        text_features(folder, tmp_path)


def test_features_that_are_not_finite_are_refused_and_not_kept(tmp_path: Path) -> None:
    folder = text_encoder(tmp_path / "bert")
    network = transformers.BertModel.from_pretrained(folder)
    with torch.no_grad():
        network.embeddings.word_embeddings.weight[5] = torch.nan
    network.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"gives 1 items features that are not finite, the first is item 1"):
        text_features(folder, tmp_path)
    assert not list(tmp_path.glob("features-*.safetensors"))
