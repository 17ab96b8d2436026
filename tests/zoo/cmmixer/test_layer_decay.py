from typing import Any

import pytest
import torch
from torch import nn

from zoo.cmmixer.layer_decay import layer_decay_groups


class Encoder(nn.Module):
    def __init__(self, depth: int = 3, size: int = 4) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(8, size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size))
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm1": nn.LayerNorm(size), "mlp": nn.Sequential(nn.Linear(size, size), nn.GELU())})
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(size)


def settings(groups: list[dict[str, Any]]) -> dict[int, tuple[float, float]]:
    """Learning rate and weight decay by the parameter's identity; fails if one is in two groups."""
    found: dict[int, tuple[float, float]] = {}
    for group in groups:
        for parameter in group["params"]:
            assert id(parameter) not in found
            found[id(parameter)] = (group["lr"], group["weight_decay"])
    return found


def test_each_layer_has_its_rate_and_vectors_have_no_weight_decay() -> None:
    encoder, head = Encoder(depth=3), nn.Linear(4, 2)
    found = settings(layer_decay_groups([encoder], head.parameters(), 0.1, 0.05, 0.5))
    expected = {
        encoder.patch_embedding.weight: (0.1 * 0.5**4, 0.05),
        encoder.patch_embedding.bias: (0.1 * 0.5**4, 0.0),
        encoder.cls_token: (0.1 * 0.5**4, 0.0),
        encoder.norm.weight: (0.1, 0.0),
        encoder.norm.bias: (0.1, 0.0),
        head.weight: (0.1, 0.05),
        head.bias: (0.1, 0.0),
    }
    for index, block in enumerate(encoder.blocks):
        for parameter in block.parameters():
            expected[parameter] = (0.1 * 0.5 ** (3 - index), 0.05 if parameter.ndim == 2 else 0.0)
    assert len(found) == len(expected) == len([*encoder.parameters(), *head.parameters()])
    for parameter, (lr, weight_decay) in expected.items():
        assert found[id(parameter)] == (pytest.approx(lr), weight_decay)


def test_without_layer_decay_all_have_one_rate_in_two_groups() -> None:
    encoder, head = Encoder(), nn.Linear(4, 2)
    groups = layer_decay_groups([encoder], head.parameters(), 0.1, 0.05)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.1, 0.05), (0.1, 0.0)]
    assert len(settings(groups)) == len([*encoder.parameters(), *head.parameters()])


def test_towers_of_different_depth_meet_at_the_head() -> None:
    shallow, deep = Encoder(1), Encoder(3)
    found = settings(layer_decay_groups([shallow, deep], [], 1.0, 0.0, 0.5))
    assert found[id(shallow.blocks[-1]["mlp"][0].weight)][0] == found[id(deep.blocks[-1]["mlp"][0].weight)][0] == 0.5
    assert found[id(shallow.cls_token)][0] == 0.25
    assert found[id(deep.cls_token)][0] == 0.0625


def test_what_is_shared_is_there_once_and_what_is_frozen_is_left_out() -> None:
    encoder, other, temperature = Encoder(), Encoder(), nn.Parameter(torch.ones(()))
    other.blocks[0] = encoder.blocks[0]
    encoder.patch_embedding.requires_grad_(False)
    head = [temperature, encoder.norm.weight]
    found = settings(layer_decay_groups([encoder, encoder, other], head, 0.1, 0.05, 0.75))
    wanted = {id(p) for p in (*encoder.parameters(), *other.parameters(), temperature) if p.requires_grad}
    assert set(found) == wanted
    assert found[id(temperature)] == (0.1, 0.0)
    assert id(encoder.patch_embedding.weight) not in found


def test_groups_come_in_one_order_and_adamw_steps_each_at_its_rate() -> None:
    def groups() -> list[dict[str, Any]]:
        torch.manual_seed(0)
        return layer_decay_groups([Encoder(), Encoder()], nn.Linear(4, 2).parameters(), 0.1, 0.05, 0.75)

    ours = groups()
    assert [group["lr"] for group in ours] == sorted(group["lr"] for group in ours)
    assert [[p.shape for p in group["params"]] for group in ours] == [
        [p.shape for p in group["params"]] for group in groups()
    ]
    optimizer = torch.optim.AdamW(ours, lr=1.0)
    before = [[p.detach().clone() for p in group["params"]] for group in ours]
    for group in ours:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for group, old in zip(ours, before, strict=True):
        for parameter, start in zip(group["params"], old, strict=True):
            expected = start * (1 - group["lr"] * group["weight_decay"]) - group["lr"]
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-6)


def test_wrong_input_is_refused() -> None:
    for wrong in (0.0, 1.5, -0.5):
        with pytest.raises(ValueError, match=r"layer_decay must be in \(0, 1\]"):
            layer_decay_groups([Encoder()], [], 0.1, 0.05, wrong)
    with pytest.raises(ValueError, match="lr must be positive"):
        layer_decay_groups([Encoder()], [], 0.0, 0.05)
    with pytest.raises(ValueError, match="Linear lacks one"):
        layer_decay_groups([nn.Linear(2, 2)], [], 0.1, 0.05)
