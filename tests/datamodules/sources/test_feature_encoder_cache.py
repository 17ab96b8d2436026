from __future__ import annotations

import logging
import shutil
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from datamodules.sources import feature_encoders
from datamodules.sources.feature_encoders import encoded_features
from tests.datamodules.sources.encoder_folders import SIZES, TEXTS, image_encoder, pictures, text_encoder, text_features

if TYPE_CHECKING:
    from pathlib import Path

transformers = pytest.importorskip("transformers")


def test_second_call_reads_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors import safe_open

    folder = text_encoder(tmp_path / "bert")
    first = text_features(folder, tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("features-*.safetensors")
    with safe_open(path, framework="numpy") as file:
        about = file.metadata()
    assert about["kind"] == "text" and about["encoder"] == str(folder)
    assert path.name == f"features-{about['fingerprint']}.safetensors"
    monkeypatch.setattr(feature_encoders, "_network", None)
    with caplog.at_level(logging.INFO):
        second = text_features(folder, tmp_path / "cache", batch_size=3)
    assert (first == second).all()
    assert f"are read from {path}" in caplog.text
    assert not list((tmp_path / "cache").glob("*.part"))


def test_cache_is_the_users_own_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    encoded_features("text", TEXTS, str(text_encoder(tmp_path / "bert")))
    assert len(list((tmp_path / "home" / "lightning-method-zoo" / "features").glob("features-*.safetensors"))) == 1


def test_cache_is_keyed_by_texts_and_the_content_of_the_encoder(tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def kept() -> int:
        return len(list(cache.glob("features-*.safetensors")))

    folder = text_encoder(tmp_path / "bert")
    first = text_features(folder, cache)
    text_features(folder, cache, [*TEXTS[:4], "soft", "toy" + TEXTS[5]])
    text_features(folder, cache, TEXTS[::-1])
    # The same characters, cut in other places.
    text_features(folder, cache, ["red cup" + "green", *TEXTS[2:], ""])
    assert kept() == 4
    shutil.copytree(folder, tmp_path / "moved")
    text_features(tmp_path / "moved", cache)
    assert kept() == 4
    text_encoder(folder, seed=1)  # trained further, with the same config
    assert not np.allclose(text_features(folder, cache), first, atol=0.1)
    assert kept() == 5


def test_cache_is_keyed_by_images_and_kind(tmp_path: Path) -> None:
    folder = image_encoder(tmp_path / "vit")
    cases = (pictures(), pictures()[::-1], pictures().reshape(5, 24, 6, 3), pictures())
    results = [encoded_features("image", images, str(folder), str(tmp_path)) for images in cases]
    assert len(list(tmp_path.glob("features-*.safetensors"))) == 3
    assert np.allclose(results[0][::-1], results[1], atol=1e-5) and (results[0] == results[3]).all()


def test_encoders_of_the_hub_are_told_apart_by_name_config_and_commit() -> None:
    config = transformers.BertConfig(**SIZES)
    sentence = feature_encoders._Sentence()

    def key(name: str = "a/b", sentence: Any = sentence) -> str:
        return feature_encoders._fingerprint("text", TEXTS, None, name, config, sentence)

    keys = [key(), key("a/c"), key(sentence=feature_encoders._Sentence(unit=True))]
    config.hidden_size = 64
    keys.append(key())
    config._commit_hash = "f00"
    keys.append(key())
    assert len(set(keys)) == 5 and keys[-1] == key()


@pytest.mark.parametrize("damage", ["truncated", "shape", "dtype", "nan", "name", "foreign"])
def test_damaged_cache_is_computed_again_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    from safetensors.numpy import save_file

    folder = text_encoder(tmp_path / "bert")
    expected = text_features(folder, tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("features-*.safetensors")
    about = {"fingerprint": path.stem.removeprefix("features-")}
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "foreign":
        save_file({"features": expected + 1}, path, metadata={"fingerprint": "0"})
    else:
        wrong = {
            "shape": expected[1:],
            "dtype": expected.astype(np.float16),
            "nan": expected * np.nan,
            "name": expected,
        }
        save_file({"other" if damage == "name" else "features": wrong[damage]}, path, metadata=about)
    assert (text_features(folder, tmp_path / "cache") == expected).all()
    assert f"{path} is damaged" in caplog.text
    caplog.clear()
    text_features(folder, tmp_path / "cache")
    assert "is damaged" not in caplog.text


def test_features_are_computed_once_when_several_want_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = text_encoder(tmp_path / "bert")
    calls: list[int] = []
    compute = feature_encoders._encode_texts

    def counted(*arguments: Any) -> np.ndarray:
        calls.append(1)
        return compute(*arguments)

    monkeypatch.setattr(feature_encoders, "_encode_texts", counted)
    results: list[np.ndarray] = []
    threads = [
        threading.Thread(target=lambda: results.append(text_features(folder, tmp_path / "cache"))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(results) == 3 and len(calls) == 1
    assert (results[0] == results[1]).all() and (results[0] == results[2]).all()


def test_cache_that_cannot_be_written_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match=r"file/cache: features cannot be kept there.*cache_dir"):
        text_features(text_encoder(tmp_path / "bert"), tmp_path / "file" / "cache")
