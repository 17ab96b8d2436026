"""Frozen heads: their logits, what stands for one, and their file."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from zoo.merging.heads import CosineHead, LinearHead, as_head, load_heads, prototypes, save_heads

Z = torch.randn(6, 4, dtype=torch.float64)
W = torch.randn(3, 4, dtype=torch.float64)
B = torch.randn(3, dtype=torch.float64)


def test_a_linear_head_is_wz_plus_b() -> None:
    expected = torch.stack([torch.stack([w @ z + b for w, b in zip(W, B, strict=True)]) for z in Z])
    torch.testing.assert_close(LinearHead(W, B)(Z), expected)
    torch.testing.assert_close(LinearHead(W)(Z), expected - B)


def test_a_cosine_head_normalises_features_and_only_these() -> None:
    expected = torch.stack([torch.stack([7.5 * (w @ z) / z.norm() for w in W]) for z in Z])
    torch.testing.assert_close(CosineHead(W, 7.5)(Z), expected)
    torch.testing.assert_close(CosineHead(W, 7.5)(3 * Z), expected)
    torch.testing.assert_close(CosineHead(2 * W, 7.5)(Z), 2 * expected)
    assert torch.equal(CosineHead(W, 1.0)(torch.zeros(1, 4)), torch.zeros(1, 3, dtype=torch.float64))


@pytest.mark.parametrize("head", [LinearHead(W.float(), B.float()), CosineHead(W.float(), 100.0)])
def test_logits_keep_float32_under_bf16_and_for_bf16_features(head: nn.Module) -> None:
    features = Z.bfloat16()
    expected = head(features.float())
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(features)
        assert torch.equal(head(features.float()), expected)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, expected)


@pytest.mark.parametrize(
    "head", [LinearHead(W, B), CosineHead(W), as_head(nn.Linear(4, 3)), as_head(nn.Sequential(nn.Linear(4, 3)))]
)
def test_a_head_is_frozen_but_lets_gradients_through(head: nn.Module) -> None:
    features = Z.to(next(iter(head.state_dict().values())).dtype).clone().requires_grad_()
    head(features).square().sum().backward()
    assert features.grad is not None and features.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in head.parameters())


def test_heads_copy_what_they_are_given() -> None:
    weight = W.clone()
    heads = [LinearHead(weight, weight[:, 0]), CosineHead(weight)]
    before = [head(Z) for head in heads]
    weight.zero_()
    assert all(torch.equal(head(Z), old) for head, old in zip(heads, before, strict=True))


def test_as_head_takes_weights_linears_and_modules_and_leaves_them_alone() -> None:
    head = as_head(W)
    assert isinstance(head, CosineHead) and float(head.scale) == 1
    assert float(as_head(W, scale=50.0).scale) == 50
    assert as_head(head) is head
    linear = nn.Linear(4, 3).double()
    frozen = as_head(linear)
    assert isinstance(frozen, LinearHead) and linear.weight.requires_grad
    torch.testing.assert_close(frozen(Z), linear(Z))
    net = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).double()
    frozen = as_head(net)
    assert not frozen.training and net.training and net[0].weight.requires_grad
    torch.testing.assert_close(frozen(Z), net[0](Z))


def test_a_subclass_of_linear_keeps_its_own_forward() -> None:
    class Scaled(nn.Linear):
        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(features)

    scaled = Scaled(4, 3).double()
    torch.testing.assert_close(as_head(scaled)(Z), scaled(Z))


def test_prototypes_are_unit_vectors_of_their_seed() -> None:
    first = prototypes(5, 8, seed=3)
    assert first.shape == (5, 8)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(5))
    torch.manual_seed(99)
    assert torch.equal(first, prototypes(5, 8, seed=3))
    assert not torch.equal(first, prototypes(5, 8, seed=4))
    state = torch.get_rng_state()
    prototypes(5, 8)
    assert torch.equal(state, torch.get_rng_state())


def test_heads_come_back_from_their_file_in_order_and_bit_for_bit(tmp_path: Path) -> None:
    heads = {
        "svhn.cropped.v2": CosineHead(W.float(), 100.0),
        "a.weight": LinearHead(W, B),
        "mnist": CosineHead(W.bfloat16(), 1 / 3),
        "linear": nn.Linear(4, 3, bias=False),
        "zero-shot": W.float(),
    }
    path = save_heads(tmp_path / "new" / "heads.safetensors", heads)
    assert [file.name for file in path.parent.iterdir()] == ["heads.safetensors"]
    read = load_heads(path)
    assert list(read) == list(heads)
    for task, head in heads.items():
        expected = as_head(head)
        assert type(read[task]) is type(expected)
        for name, tensor in expected.state_dict().items():
            assert torch.equal(read[task].state_dict()[name], tensor), (task, name)
            assert read[task].state_dict()[name].dtype == tensor.dtype
    keys = {"svhn.cropped.v2.weight", "svhn.cropped.v2.scale", "a.weight.weight", "a.weight.bias", "mnist.weight"}
    assert keys <= set(load_file(path))
    assert "linear.bias" not in load_file(path)


def test_tasks_may_share_one_head(tmp_path: Path) -> None:
    head = CosineHead(W, 2.0)
    read = load_heads(save_heads(tmp_path / "h.safetensors", {"mnist": head, "svhn": head}))
    assert torch.equal(read["mnist"](Z), read["svhn"](Z))


def test_a_head_survives_copies_and_state_dicts() -> None:
    head = CosineHead(W, 3.0)
    other = CosineHead(torch.zeros_like(W), 1.0)
    other.load_state_dict(head.state_dict())
    assert torch.equal(other(Z), head(Z))
    assert torch.equal(copy.deepcopy(head)(Z), head(Z))


@pytest.mark.parametrize("head", [LinearHead(W), CosineHead(W)])
def test_a_head_of_another_dimension_names_both(head: nn.Module) -> None:
    with pytest.raises(ValueError, match="takes features of dimension 4, the encoder gave 7"):
        head(torch.zeros(2, 7))


@pytest.mark.parametrize("kind", [LinearHead, CosineHead])
def test_bad_weights_are_refused(kind: type[nn.Module]) -> None:
    for weight in (torch.zeros(3), torch.zeros(3, 2, 2), torch.zeros(3, 2, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"shape \(classes, feature dimension\)"):
            kind(weight)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="NaN or infinite"):
            kind(torch.full((3, 2), value))


def test_bad_biases_scales_and_pairs_are_refused(tmp_path: Path) -> None:
    for bias in (torch.zeros(4), torch.full((3,), float("nan")), torch.zeros(3, 1)):
        with pytest.raises(ValueError, match="must hold 3 finite numbers"):
            LinearHead(W, bias)
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale must be a positive number"):
            CosineHead(W, scale)
    with pytest.raises(ValueError, match=r"scale=2\.0 goes with a head given as a weight, this one is a LinearHead"):
        as_head(LinearHead(W), scale=2.0)
    with pytest.raises(ValueError, match="head of 'x' is a Sequential"):
        save_heads(tmp_path / "h.safetensors", {"x": nn.Sequential()})
    with pytest.raises(ValueError, match="no heads to save"):
        save_heads(tmp_path / "h.safetensors", {})
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_heads_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.safetensors"):
        load_heads(tmp_path / "none.safetensors")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"w": F.normalize(W)}, foreign)
    with pytest.raises(ValueError, match=r"foreign.safetensors does not say what its tensors are \(keys w\)"):
        load_heads(foreign)
    path = save_heads(tmp_path / "h.safetensors", {"a": W})
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"h.safetensors is not a whole safetensors file"):
        load_heads(path)
