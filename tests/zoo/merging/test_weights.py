"""Weights from modules, state dicts, folders of transformers, under the names of the base."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zoo.merging.weights import Weights, match_weights, open_weights

if TYPE_CHECKING:
    from pathlib import Path

LIBRARY = "the extra hub is not installed"


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def tiny_clip() -> Any:
    transformers = pytest.importorskip("transformers", reason=LIBRARY)
    size = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        **size,
        "vocab_size": 20,
        "max_position_embeddings": 6,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    vision = {**size, "image_size": 8, "patch_size": 4}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def tiny_vit(labels: int = 3) -> Any:
    transformers = pytest.importorskip("transformers", reason=LIBRARY)
    size = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(**size, image_size=8, patch_size=4, num_labels=labels)
    return transformers.ViTForImageClassification(config)


def nudged(module: Any, by: float = 1.0) -> Any:
    """A copy whose weights are all larger, as an expert's would be."""
    expert = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter += by
    return expert


def equal(weights: Weights, tensors: dict[str, Tensor]) -> bool:
    return weights.keys() == tensors.keys() and all(torch.equal(weights[name], tensors[name]) for name in tensors)


def test_a_module_and_its_state_dict_are_the_same_weights() -> None:
    model = network()
    for source in (model, model.state_dict(), open_weights(model, "pretrained")):
        weights = open_weights(source, "pretrained")
        assert weights.names == list(model.state_dict()) == list(weights) and len(weights) == len(model.state_dict())
        assert equal(weights, model.state_dict())
        assert not weights["0.weight"].requires_grad
        assert weights["0.weight"].data_ptr() == model[0].weight.data_ptr()  # type: ignore[index, union-attr]
    assert weights.shape("0.weight") == (3, 4) and weights.dtype("1.num_batches_tracked") == torch.int64


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    save_file(network().state_dict(), tmp_path / "w.safetensors")
    weights = open_weights(tmp_path / "w.safetensors", "pretrained")
    (tmp_path / "w.safetensors").unlink()
    assert weights.shape("0.weight") == (3, 4) and "0.weight" in weights and "0.mass" not in weights
    with pytest.raises(FileNotFoundError, match=r"w\.safetensors"):
        weights["0.weight"]


def test_an_unknown_name_is_answered_with_the_label() -> None:
    weights = open_weights(network(), "expert mnist")
    for call in (weights.__getitem__, weights.shape, weights.dtype, weights.finite):
        with pytest.raises(KeyError, match="expert mnist: there is no tensor 'mass'"):
            call("mass")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_reported_with_expert_and_key(dtype: torch.dtype, bad: float) -> None:
    values = torch.randn(7, 5).to(dtype)
    weights = open_weights({"a": values, "n": torch.arange(3), "e": torch.empty(0)}, "expert mnist")
    assert torch.equal(weights.finite("a"), values) and weights.finite("n").sum() == 3 and not len(weights.finite("e"))
    values[4, 2] = bad
    count = "1 NaN and 0 infinite" if bad != bad else "0 NaN and 1 infinite"
    with pytest.raises(ValueError, match=rf"expert mnist: 'a' holds {count} of 35 values"):
        weights.finite("a")


def test_values_on_the_meta_device_are_asked_for_in_vain() -> None:
    with torch.device("meta"):
        model = network()
    weights = open_weights(model, "pretrained")
    assert weights.shape("0.weight") == (3, 4)
    with pytest.raises(ValueError, match=r"pretrained: '0.weight' is on the meta device"):
        weights["0.weight"]


def test_ties_are_seen_on_the_meta_device_too() -> None:
    model = nn.Module()
    model.embed, model.other = (nn.Parameter(torch.empty(6, 4, device="meta")) for _ in range(2))
    model.head = model.embed
    assert open_weights(model, "x").tied == {"head": "embed"}


def test_a_module_keeps_its_names_and_files_lose_wrappers(tmp_path: Path) -> None:
    wrapped = nn.Module()
    wrapped.module = network()
    names = list(wrapped.state_dict())
    assert all(name.startswith("module.") for name in names)
    assert open_weights(wrapped, "pretrained").names == names
    torch.save(wrapped.state_dict(), tmp_path / "w.pt")
    assert open_weights(tmp_path / "w.pt", "pretrained").names == list(network().state_dict())
    assert open_weights(tmp_path / "w.pt", "pretrained", key_map="none").names == names


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.model."])
def test_experts_in_wrappers_fit_the_base(prefix: str) -> None:
    model = network()
    base = open_weights(model, "pretrained")
    expert = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    assert equal(open_weights(expert, "expert x", base=base), model.state_dict())
    reversed_base = open_weights(expert, "pretrained", key_map="none")
    assert equal(open_weights(model, "expert x", base=reversed_base), expert)


def test_files_take_the_names_of_the_model_they_are_for(tmp_path: Path) -> None:
    holder = nn.Module()
    holder.backbone = network()
    save_file(network().state_dict(), tmp_path / "w.safetensors")
    assert open_weights(tmp_path / "w.safetensors", "pretrained", model=holder).keys() == holder.state_dict().keys()


@pytest.mark.parametrize("kept", ["embed.weight", "head.weight"])
def test_a_file_that_kept_one_of_two_tied_names_answers_to_both(kept: str) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["embed"].weight
    base = open_weights(model, "pretrained")
    expert = open_weights({kept: torch.zeros(6, 4)}, "expert x", base=base)
    assert match_weights(base, {"x": expert}) == ["embed.weight"]
    assert not expert["embed.weight"].any() and not expert["head.weight"].any()
    assert len(expert.tied) == 1


def test_weights_with_an_adapter_inside_are_refused() -> None:
    names = ("base_model.model.q.base_layer.weight", "base_model.model.q.lora_A.default.weight")
    with pytest.raises(
        ValueError, match=r"expert x: '.*lora_A.default.weight' belongs to a LoRA adapter; give the fold"
    ):
        open_weights({name: torch.ones(1) for name in names}, "expert x")


def on_disk_before_5(model: Any, folder: Path) -> Path:
    """A folder as transformers 4 wrote it: with the tower's prefix and position numbers."""
    model.save_pretrained(folder)
    plain = {
        name.removeprefix("vision_model."): tensor for name, tensor in load_file(folder / "model.safetensors").items()
    }
    old = {f"vision_model.{name}": tensor for name, tensor in plain.items()}
    old["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(old, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_clip_of_transformers_4_and_5_fit_each_other_in_both_directions(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason=LIBRARY)
    vision = transformers.CLIPVisionModel(tiny_clip().config.vision_config)
    expert = nudged(vision)
    old, new = on_disk_before_5(vision, tmp_path / "old"), tmp_path / "new"
    expert.save_pretrained(new)
    old_expert = on_disk_before_5(expert, tmp_path / "old_expert")
    for base_source, expert_source in ((vision, old_expert), (old, new), (new, old_expert), (old, expert)):
        base = open_weights(base_source, "pretrained")
        opened = open_weights(expert_source, "expert x", base=base)
        names = match_weights(base, {"x": opened})
        assert len(names) == len(vision.state_dict())
        for name in names:
            torch.testing.assert_close(opened[name], base[name] + (0 if base_source == new else 1))


def test_a_whole_clip_serves_as_expert_and_base_of_a_vision_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason=LIBRARY)
    clip = tiny_clip()
    vision = transformers.CLIPVisionModel(clip.config.vision_config)
    clip.save_pretrained(tmp_path / "clip")
    expected = {name.removeprefix("vision_model."): tensor for name, tensor in clip.vision_model.state_dict().items()}
    base = open_weights(vision, "pretrained")
    for source in (clip, tmp_path / "clip"):
        expert = open_weights(source, "expert x", base=base)
        assert equal(expert, expected)
        assert match_weights(base, {"x": expert}) == list(vision.state_dict())
    assert equal(open_weights(tmp_path / "clip", "pretrained", model=vision), expected)
    whole = open_weights(clip, "pretrained")
    part = open_weights(vision, "expert x", base=whole)
    assert len(match_weights(whole, {"x": part}, include="^vision_model")) == len(expected)
    with pytest.raises(ValueError, match=r"logit_scale \(\) is missing"):
        match_weights(whole, {"x": part})


def test_a_folder_with_other_names_on_disk_is_loaded_like_the_model(tmp_path: Path) -> None:
    vit = tiny_vit()
    expert = nudged(vit)
    expert.save_pretrained(tmp_path / "expert")
    on_disk = load_file(tmp_path / "expert" / "model.safetensors")
    assert on_disk.keys() != vit.state_dict().keys()
    base = open_weights(vit, "pretrained")
    opened = open_weights(tmp_path / "expert", "expert x", base=base, model=vit)
    assert equal(opened, expert.state_dict())
    assert match_weights(base, {"x": opened}) == list(vit.state_dict())
    # Two folders with the same names need no model.
    vit.save_pretrained(tmp_path / "base")
    disk = open_weights(tmp_path / "base", "pretrained")
    assert len(match_weights(disk, {"x": open_weights(tmp_path / "expert", "expert x", base=disk)})) == len(on_disk)


def test_a_model_inside_another_loads_folders_for_it(tmp_path: Path) -> None:
    vit = tiny_vit()
    expert = nudged(vit)
    expert.save_pretrained(tmp_path)
    holder = nn.Module()
    holder.net, holder.projection = vit, nn.Linear(3, 2)
    opened = open_weights(tmp_path, "expert x", model=holder)
    assert equal(opened, {f"net.{name}": tensor for name, tensor in expert.state_dict().items()})


def test_what_a_folder_lacks_is_missing_rather_than_random(tmp_path: Path) -> None:
    vit = tiny_vit()
    vit.vit.save_pretrained(tmp_path / "headless")
    base = open_weights(vit, "pretrained")
    opened = open_weights(tmp_path / "headless", "expert x", base=base, model=vit)
    assert set(base) - set(opened) == {"classifier.weight", "classifier.bias"}
    with pytest.raises(ValueError, match=r"classifier.weight \(3, 8\) is missing"):
        match_weights(base, {"x": opened})
    assert len(match_weights(base, {"x": opened}, exclude="^classifier")) == len(base) - 2


def test_a_head_of_another_size_is_reported_with_both_shapes(tmp_path: Path) -> None:
    vit = tiny_vit()
    tiny_vit(labels=7).save_pretrained(tmp_path)
    base = open_weights(vit, "pretrained")
    opened = open_weights(tmp_path, "expert x", base=base, model=vit)
    with pytest.raises(
        ValueError, match=r"classifier.weight is \(7, 8\), \(3, 8\) in pretrained.*exclude=.\^classifier"
    ):
        match_weights(base, {"x": opened})


def test_a_folder_that_does_not_fit_its_own_config_is_named(tmp_path: Path) -> None:
    vit = tiny_vit()
    vit.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(
        (tmp_path / "config.json").read_text().replace('"hidden_size": 8', '"hidden_size": 4')
    )
    with pytest.raises(ValueError, match=r"ViTForImageClassification.from_pretrained cannot load it") as caught:
        open_weights(tmp_path, "expert x", model=vit)
    assert str(tmp_path) in str(caught.value)


def test_a_model_with_tied_weights_on_disk_fits_itself(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason=LIBRARY)
    size = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 12, "n_positions": 6}
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**size, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    )
    nudged(model).save_pretrained(tmp_path)
    base = open_weights(model, "pretrained")
    assert base.tied == {"lm_head.weight": "transformer.wte.weight"}
    expert = open_weights(tmp_path, "expert x", base=base)
    names = match_weights(base, {"x": expert})
    assert "transformer.wte.weight" in names and "lm_head.weight" not in names and len(names) == len(base) - 1
    torch.testing.assert_close(expert["lm_head.weight"], base["lm_head.weight"] + 1)
