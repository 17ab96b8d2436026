"""Folders and hub ids of transformers: what is read, and what the errors say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from zoo.common.pretrained import load_pretrained, local_folder, read_config, transformers_library


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from transformers import BertConfig, BertModel

    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    network = BertModel(BertConfig(**sizes, vocab_size=11, max_position_embeddings=6), add_pooling_layer=False)
    network.bfloat16().save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def load(folder: Path | str) -> Any:
    return load_pretrained(folder, transformers_library().AutoModel, add_pooling_layer=False)


def test_a_network_comes_in_float32_and_in_eval_mode(folder: Path) -> None:
    network = load(folder)
    assert not any(module.training for module in network.modules())
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, saved[name].float()) for name, value in network.state_dict().items())


def test_names_are_folders_or_hub_ids(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert local_folder(folder) == local_folder(str(folder)) == folder
    assert local_folder("bert") == Path("bert")
    assert local_folder("someone/bert") is None
    assert read_config(folder)["hidden_size"] == 8


@pytest.mark.parametrize("name", ["./nothing", "/nothing/here", "~/nothing", "a/b/c", Path("nothing")])
def test_a_missing_folder_says_which_files_belong_there(name: str | Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is not a folder; give a folder with config\.json and model\.safet"):
        local_folder(name)
    with pytest.raises(FileNotFoundError, match=r"is not a folder; give a folder with config\.json, or a hub id"):
        local_folder(name, weights=False)


def test_a_folder_without_weights_serves_where_none_are_needed(folder: Path) -> None:
    config = transformers_library().AutoConfig
    (folder / "model.safetensors").unlink()
    assert load_pretrained(folder, config, weights=False).hidden_size == 8
    for loader in (config, transformers_library().AutoModel):
        with pytest.raises(FileNotFoundError, match=r"has no weights: put config\.json and model\.safetensors"):
            load_pretrained(folder, loader)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json: put config\.json there"):
        load_pretrained(folder, config, weights=False)
    with pytest.raises(FileNotFoundError, match=r"has no config\.json and no weights"):
        load(folder)


def test_damaged_weights_are_named(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match=f"the weights of {folder} are damaged"):
        load(folder)


def test_weights_of_another_shape_than_the_config_says_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 12}))
    with pytest.raises(ValueError, match=r"do not fit its config\.json"):
        load(folder)


def test_weights_that_would_be_random_are_refused(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["embeddings.LayerNorm.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of BertModel, which would be random: embeddings\.LayerN"):
        load(folder)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not valid JSON"), ("[]", "must hold a JSON object, .* a list")]
)
def test_a_config_that_is_no_object_is_refused(text: str, message: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(folder)


def test_a_hub_id_without_a_network_says_how_to_get_a_folder() -> None:
    with pytest.raises(FileNotFoundError, match=r"nobody/nothing is no local folder.*hf download nobody/nothing"):
        load("nobody/nothing")


def test_missing_transformers_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-method-zoo\[hub\]'"):
        transformers_library()
