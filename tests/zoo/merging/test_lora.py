"""LoRA adapters of peft as experts, against peft's own merge."""

from __future__ import annotations

import copy
import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zoo.merging.weights import Weights, match_weights, open_weights

if TYPE_CHECKING:
    from pathlib import Path

LIBRARY = "the extra hub is not installed"
# peft's own question to transformers.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


class Net(nn.Module):
    """One of each kind of layer that LoRA adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.conv = nn.Conv2d(3, 6, 3)
        self.first = nn.Linear(6, 6)
        self.attention = nn.MultiheadAttention(6, 2)
        self.norm = nn.BatchNorm1d(6)
        self.second = nn.Linear(6, 4)
        self.classifier = nn.Linear(4, 3)


def trained(model: nn.Module, folder: Path, **options: Any) -> dict[str, Tensor]:
    """Saves an adapter whose factors are not zero; returns what peft itself makes of it."""
    peft = pytest.importorskip("peft", reason=LIBRARY)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, "lora_alpha": 6, **options}))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    merged: dict[str, Tensor] = adapted.merge_and_unload().state_dict()
    return {name: tensor.clone() for name, tensor in merged.items()}


def opened(model: nn.Module, folder: Path, **options: Any) -> tuple[Weights, dict[str, Tensor], dict[str, Tensor]]:
    """The expert, what it must be, and the base."""
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = trained(model, folder, **options)
    pretrained = open_weights(base, "pretrained")
    expert = open_weights(folder, "expert x", base=pretrained)
    assert set(match_weights(pretrained, {"x": expert})) == {n for n, t in base.items() if t.is_floating_point()}
    return expert, expected, base


def changed(expert: Weights, expected: dict[str, Tensor], base: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that differ from the base, after a comparison of all with what they must be."""
    assert expert.names == list(base)
    for name in expert:
        torch.testing.assert_close(expert[name], expected[name], rtol=1e-5, atol=1e-5)
    return {name for name in base if not torch.equal(expert[name], base[name])}


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"r": 3}, {"lora_alpha": 1, "lora_dropout": 0.5}])
def test_an_expert_is_base_plus_scaling_times_b_a(tmp_path: Path, options: dict[str, Any]) -> None:
    expert, expected, base = opened(Net(), tmp_path, target_modules=["first", "second"], **options)
    assert changed(expert, expected, base) == {"first.weight", "second.weight"}
    factors = load_file(tmp_path / "adapter_model.safetensors")
    up, down = (factors[f"base_model.model.first.lora_{side}.weight"].double() for side in "BA")
    rank, alpha = options.get("r", 2), options.get("lora_alpha", 6)
    scaling = alpha / math.sqrt(rank) if options.get("use_rslora") else alpha / rank
    exact = base["first.weight"].double() + scaling * up @ down
    torch.testing.assert_close(expert["first.weight"].double(), exact, rtol=1e-6, atol=1e-5)
    # It is computed anew and may be written to.
    expert["first.weight"].zero_()
    assert expert["first.weight"].any()


def test_convolutions_and_embeddings_are_adapted(tmp_path: Path) -> None:
    expert, expected, base = opened(Net(), tmp_path, target_modules=["conv", "embed"])
    assert changed(expert, expected, base) == {"conv.weight", "embed.weight"}


def test_attention_of_torch_which_peft_adapts_in_its_own_way_is_refused(tmp_path: Path) -> None:
    base = open_weights(Net(), "pretrained")
    trained(Net(), tmp_path, target_modules=["attention"])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: .* adapts a torch.nn.MultiheadAttention"):
        open_weights(tmp_path, "expert x", base=base)


def test_patterns_of_ranks_and_alphas_are_followed(tmp_path: Path) -> None:
    options = {"rank_pattern": {"second": 3}, "alpha_pattern": {"^first": 1, "sec.*d": 9, "second": 1}}
    expert, expected, base = opened(Net(), tmp_path, target_modules=["first", "second", "conv"], **options)
    assert changed(expert, expected, base) == {"first.weight", "second.weight", "conv.weight"}


def test_modules_to_save_and_biases_take_the_base_s_place(tmp_path: Path) -> None:
    options = {"modules_to_save": ["classifier"], "bias": "lora_only"}
    expert, expected, base = opened(Net(), tmp_path, target_modules=["first"], **options)
    assert changed(expert, expected, base) == {"first.weight", "first.bias", "classifier.weight", "classifier.bias"}


def tiny_gpt() -> Any:
    transformers = pytest.importorskip("transformers", reason="the extra hub is not installed")
    size = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 12, "n_positions": 6}
    config = transformers.GPT2Config(**size, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    return transformers.GPT2LMHeadModel(config)


def test_weights_stored_as_in_out_get_the_transposed_product(tmp_path: Path) -> None:
    # c_proj of the attention is square: only the adapter's config tells which way round it is.
    expert, expected, base = opened(tiny_gpt(), tmp_path, target_modules=["c_attn", "attn.c_proj"], fan_in_fan_out=True)
    start = "transformer.h.0.attn."
    assert changed(expert, expected, base) == {f"{start}c_attn.weight", f"{start}c_proj.weight"}
    assert expert[f"{start}c_proj.weight"].is_contiguous()


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.")
def test_an_adapted_embedding_is_no_longer_tied_to_the_head(tmp_path: Path) -> None:
    model = tiny_gpt()
    pretrained = open_weights(copy.deepcopy(model), "pretrained")
    trained(model, tmp_path, target_modules=["wte"])
    expert = open_weights(tmp_path, "expert x", base=pretrained)
    with pytest.raises(ValueError, match=r"different values for transformer.wte.weight and lm_head.weight"):
        match_weights(pretrained, {"x": expert})


def test_an_adapter_of_transformers_4_fits_a_base_of_5(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra hub is not installed")
    size = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**size, image_size=8, patch_size=4))
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = trained(model, tmp_path, target_modules=["q_proj", "v_proj"])
    path = tmp_path / "adapter_model.safetensors"
    start = "base_model.model."
    renamed = {key.replace(start, f"{start}vision_model.", 1): tensor for key, tensor in load_file(path).items()}
    assert not renamed.keys() & load_file(path).keys()
    # Of an adapter of a whole CLIP model the text side is left out.
    renamed |= {key.replace("vision_model", "text_model"): tensor + 1 for key, tensor in renamed.items()}
    save_file(renamed, path)
    expert = open_weights(tmp_path, "expert x", base=open_weights(base, "pretrained"))
    assert len(changed(expert, expected, base)) == 4


def test_a_base_in_half_precision_keeps_the_whole_difference(tmp_path: Path) -> None:
    model = Net()
    trained(model, tmp_path, target_modules=["first"])
    base = {name: tensor.clone() for name, tensor in model.bfloat16().state_dict().items()}
    expert = open_weights(tmp_path, "expert x", base=open_weights(base, "pretrained"))
    factors = load_file(tmp_path / "adapter_model.safetensors")
    up, down = (factors[f"base_model.model.first.lora_{side}.weight"] for side in "BA")
    assert expert.dtype("first.weight") == expert["first.weight"].dtype == torch.float32
    torch.testing.assert_close(expert["first.weight"] - base["first.weight"].float(), 3.0 * up @ down)
    assert expert.dtype("second.weight") == torch.bfloat16


def by_hand(folder: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
    """An adapter's folder written without peft."""
    folder.mkdir(exist_ok=True)
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["first"], "qalora_group_size": 16}
    (folder / "adapter_config.json").write_text(json.dumps({**plain, **config}))
    factors = {"base_model.model.first.lora_A.weight": torch.ones(2, 6)}
    factors |= {"base_model.model.first.lora_B.weight": torch.ones(6, 2)}
    save_file(factors if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


def expert_of(folder: Path, base: nn.Module | None = None) -> Weights:
    return open_weights(folder, "expert x", base=open_weights(base or Net(), "pretrained"))


def test_an_adapter_is_read_without_peft(tmp_path: Path) -> None:
    base = Net()
    expected = base.first.weight.detach() + 6.0
    torch.testing.assert_close(expert_of(by_hand(tmp_path), base)["first.weight"], expected)
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.testing.assert_close(expert_of(tmp_path, base)["first.weight"], expected)


def test_a_product_is_added_to_the_adapter_s_own_base_layer_where_it_has_one(tmp_path: Path) -> None:
    tensors = load_file(by_hand(tmp_path) / "adapter_model.safetensors")
    tensors["base_model.model.first.base_layer.weight"] = torch.full((6, 6), 2.0)
    assert (expert_of(by_hand(tmp_path, tensors))["first.weight"] == 8.0).all()


def test_the_base_is_read_when_the_expert_is(tmp_path: Path) -> None:
    model = Net()
    weights = expert_of(by_hand(tmp_path), model)
    with torch.no_grad():
        model.first.weight.fill_(1.0)
    assert (weights["first.weight"] == 7.0).all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora=True is more than base"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"target_parameters": ["experts.up"]}, "target_parameters="),
        ({"trainable_token_indices": [3]}, "trainable_token_indices="),
        ({"layer_replication": [[0, 2]]}, "layer_replication="),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens="),
        ({"an_option_of_tomorrow": 1}, "an_option_of_tomorrow=1"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"peft_type": "IA3"}, "peft_type is IA3, expected LORA"),
    ],
)
def test_what_is_more_than_plain_lora_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        expert_of(by_hand(tmp_path, **config))
    assert str(tmp_path / "adapter_config.json") in str(caught.value)


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva", None])
def test_starts_that_leave_the_base_alone_are_accepted(tmp_path: Path, start: object) -> None:
    assert "first.weight" in expert_of(by_hand(tmp_path, init_lora_weights=start))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"first.lora_A.weight": torch.ones(2, 6)}, "lora_A or lora_B of 'first.weight' is missing"),
        ({}, "holds nothing"),
        ({"first.lora_magnitude_vector": torch.ones(6)}, "'.*lora_magnitude_vector' is no part of a plain LoRA"),
        ({"gone.lora_A.weight": torch.ones(2, 6), "gone.lora_B.weight": torch.ones(6, 2)}, "has not: gone.weight"),
        (
            {"first.lora_A.weight": torch.ones(2, 5), "first.lora_B.weight": torch.ones(6, 2)},
            r"'first.weight' is torch.float32 \(6, 6\) in the base, which lora_A \(2, 5\) and lora_B \(6, 2\) do",
        ),
        ({"first.lora_A.weight": torch.ones(3, 6), "first.lora_B.weight": torch.ones(6, 2)}, "do not fit"),
        ({"conv.lora_A.weight": torch.ones(2, 3, 3, 3), "conv.lora_B.weight": torch.ones(6, 2, 3, 3)}, "do not fit"),
    ],
)
def test_an_adapter_must_fit_itself_and_the_base(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    folder = by_hand(tmp_path, {f"base_model.model.{name}": tensor for name, tensor in tensors.items()})
    with pytest.raises(ValueError, match=message) as caught:
        expert_of(folder)
    assert str(tmp_path) in str(caught.value)


def test_folders_that_are_no_adapter_of_a_known_base_are_reported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a LoRA adapter, which is an expert only together with its base"):
        open_weights(by_hand(tmp_path / "a"), "pretrained")
    (by_hand(tmp_path / "b") / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json: not valid JSON"):
        expert_of(tmp_path / "b")
    (by_hand(tmp_path / "c") / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected adapter_model.safetensors or adapter_model.bin"):
        expert_of(tmp_path / "c")
    save_file({"a": torch.ones(1)}, by_hand(tmp_path / "d") / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds an adapter and whole weights; give the path of model.safetensors"):
        expert_of(tmp_path / "d")


def test_a_new_head_of_an_adapter_is_an_extra_key(tmp_path: Path) -> None:
    model = Net()
    trained(model, tmp_path, target_modules=["first"], modules_to_save=["classifier"])
    base = {name: tensor for name, tensor in Net().state_dict().items() if not name.startswith("classifier")}
    pretrained = open_weights(base, "pretrained")
    expert = open_weights(tmp_path, "expert x", base=pretrained)
    with pytest.raises(ValueError, match=r"classifier.weight \(3, 4\) is not in pretrained.*exclude=.\^classifier"):
        match_weights(pretrained, {"x": expert})
