"""Deep surgery against a loop written out, on toy encoders and on networks of transformers."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from zoo.merging.deep_surgery import DeepSurgery
from zoo.merging.features import default_features
from zoo.merging.heads import CosineHead
from zoo.merging.merged_model import MergedModel
from zoo.merging.surgery import SurgeryBank, SurgeryModule
from zoo.merging.task_model import task_model
from zoo.merging.task_vectors import TaskVectorStore

TASKS = ["a.b", "c"]


class Output(NamedTuple):
    hidden: Tensor
    extra: str


class Block(nn.Module):
    """Mixes tokens and channels; returns what `kind` says."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = nn.Linear(width, width), kind

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        x = x + scale * torch.tanh(self.inner(x) + x.mean(1, keepdim=True))
        kinds = {"tensor": x, "tuple": (x, None), "list": [x, 1], "named": Output(x, "kept"), "dict": {"x": x}}
        return kinds[self.kind]


class Encoder(nn.Module):
    """Tokens `(batch, 5, width)` to features `(batch, dim)`."""

    def __init__(self, kinds: tuple[str, ...] = ("tensor", "tuple", "named"), width: int = 40, dim: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width, kind) for kind in kinds)
        self.head = nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, scale=0.5)
            if isinstance(x, tuple):
                assert (type(x) is Output and x.extra == "kept") or (type(x) is tuple and x[1] is None)
            x = x if isinstance(x, Tensor) else x[0]
        features: Tensor = self.head(x[:, 0])
        return features


def build(seed: int = 0, **options: Any) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(**options).double().requires_grad_(False).eval()


def tokens(rows: int = 4, width: int = 40) -> Tensor:
    return torch.randn(rows, 5, width, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def trained(deep: DeepSurgery, size: float = 0.2) -> DeepSurgery:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in deep.parameters():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return deep


def written_out(encoder: Encoder, deep: DeepSurgery, x: Tensor, task: str) -> tuple[list[Tensor], Tensor]:
    means = []
    for layer, bank in zip(encoder.layers, deep.blocks, strict=True):
        x = x + 0.5 * torch.tanh(layer.inner(x) + x.mean(1, keepdim=True))
        module = bank[task]
        x = x - F.relu(x @ module.down.weight.T) @ module.up.weight.T
        means.append(sum(x[:, token] for token in range(5)) / 5)
    z = encoder.head(x[:, 0])
    module = deep.final[task]
    return means, z - F.relu(z @ module.down.weight.T) @ module.up.weight.T


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_new_modules_change_nothing_and_detach_leaves_no_trace() -> None:
    encoder, x = build(), tokens()
    plain = encoder(x)
    deep = DeepSurgery.for_model(encoder, x, TASKS, 3).double()
    with deep.task("c"):
        deep.attach(encoder)
        assert hooks(encoder) == 3
        assert torch.equal(deep(encoder(x)), plain)
        trained(deep)
        assert not torch.equal(encoder(x), plain)
        deep.detach()
    assert hooks(encoder) == 0 and torch.equal(encoder(x), plain)
    with pytest.raises(RuntimeError, match="stop"), deep.attach(encoder):
        raise RuntimeError("stop")
    assert hooks(encoder) == 0
    deep.detach()


def test_weights_are_as_many_as_published_and_as_one_module_of_rank_304() -> None:
    deep = DeepSurgery(["a", "b"], [768] * 12, 512)
    assert sum(p.numel() for p in deep.only("a").parameters()) == 311_296
    assert sum(p.numel() for p in deep.parameters()) == 2 * 311_296
    assert sum(p.numel() for p in SurgeryModule(512, 304).parameters()) == 311_296


@pytest.mark.parametrize("kinds", [("tensor",) * 3, ("tuple",) * 3, ("list", "named")])
def test_all_tokens_of_all_blocks_are_repaired_for_the_next_one(kinds: tuple[str, ...]) -> None:
    encoder, x = build(kinds=kinds), tokens()
    deep = trained(DeepSurgery(TASKS, [40] * len(kinds), 6, 4).double())
    for task in TASKS:
        means, z_hat = written_out(encoder, deep, x, task)
        with deep.attach(encoder), deep.task(task):
            torch.testing.assert_close(deep(encoder(x)), z_hat)
            torch.testing.assert_close(deep.token_means, means)


def test_the_loss_is_the_sum_of_the_mean_distances_from_the_expert() -> None:
    encoder, expert, x = build(), build(1), tokens()
    deep = trained(DeepSurgery(TASKS, [40] * 3, 6, 4).double())
    nothing = DeepSurgery(TASKS, [40] * 3, 6, 4).double()
    with torch.no_grad():
        wanted, z_ind = written_out(expert, nothing, x, "c")
    targets = deep.targets(expert.requires_grad_(), x)
    torch.testing.assert_close(list(targets), [*wanted, z_ind])
    assert not any(target.requires_grad for target in targets) and hooks(expert) == 0
    found, z_hat = written_out(encoder, deep, x, "c")
    terms = [(f - w).abs().mean() for f, w in zip([*found, z_hat], [*wanted, z_ind], strict=True)]
    squares = [(f - w).square().mean() for f, w in zip([*found, z_hat], [*wanted, z_ind], strict=True)]
    with deep.attach(encoder), deep.task("c"):
        z = deep(encoder(x))
        torch.testing.assert_close(deep.loss(z, targets), torch.stack(terms).sum())
        torch.testing.assert_close(deep.loss(z, targets, "mse"), torch.stack(squares).sum())


def test_gradients_reach_the_first_block_through_the_last_and_stay_off_the_encoder_and_other_tasks() -> None:
    encoder, expert, x = build(), build(1), tokens()
    before = copy.deepcopy(encoder.state_dict())
    deep = trained(DeepSurgery(TASKS, [40] * 3, 6, 4).double())
    with deep.attach(encoder), deep.task("c"):
        z_hat = deep(encoder(x))
        (z_hat - deep.targets(expert, x)[-1]).abs().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in deep.only("c").parameters())
    assert all(p.grad is None for p in [*deep.only("a.b").parameters(), *encoder.parameters(), *expert.parameters()])
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())


def test_a_planted_drift_of_every_block_is_removed() -> None:
    encoder, x = build(), tokens(64)
    planted = trained(DeepSurgery(TASKS, [40] * 3, 6, 2).double())
    with planted.attach(encoder), planted.task("c"), torch.no_grad():
        z = planted(encoder(x))
        targets = [*planted.token_means, z]
    torch.manual_seed(0)
    deep = DeepSurgery(TASKS, [40] * 3, 6, 5).double()
    optimizer = torch.optim.Adam(deep.only("c").parameters(), lr=1e-2, fused=True)
    gaps = []
    with deep.attach(encoder), deep.task("c"):
        for _ in range(100):
            optimizer.zero_grad()
            z_hat = deep(encoder(x))
            found = [*deep.token_means, z_hat]
            gaps.append([(f - t).detach().abs().mean() for f, t in zip(found, targets, strict=True)])
            deep.loss(z_hat, targets).backward()
            optimizer.step()
    assert all(last < 0.2 * first for first, last in zip(gaps[0], gaps[-1], strict=True))


def test_a_functional_call_with_other_weights_is_repaired() -> None:
    encoder, other, x = build(), build(1), tokens()
    deep = trained(DeepSurgery(TASKS, [40] * 3, 6, 4).double())
    _, z_hat = written_out(other, deep, x, "c")
    with deep.attach(encoder), deep.task("c"):
        torch.testing.assert_close(deep(functional_call(encoder, dict(other.named_parameters()), (x,))), z_hat)


def test_a_merged_model_is_repaired_in_its_skeleton() -> None:
    encoder, expert, x = build(), build(1), tokens()
    names = [name for name, _ in encoder.named_parameters()]
    theta0, theta = (torch.cat([p.flatten() for p in model.parameters()]) for model in (encoder, expert))
    shapes = {name: tuple(p.shape) for name, p in encoder.named_parameters()}
    store = TaskVectorStore(theta0, (theta - theta0)[None], ["a.b"], {name: [name] for name in names}, shapes)
    merged = MergedModel(encoder, store, 1.0)
    deep = trained(DeepSurgery.for_model(merged, x, TASKS, 4).double())
    _, z_hat = written_out(expert, deep, x, "c")
    with deep.attach(merged), deep.task("c"):
        torch.testing.assert_close(deep(merged(x)), z_hat)
        # The skeleton with other weights is another model's expert: no repair, though its hooks are on.
        torch.testing.assert_close(deep.targets(merged, x)[-1], expert(x))
        assert deep.token_means[0].shape == (4, 40)


@pytest.mark.parametrize("kind", ["clip", "vit"])
def test_networks_of_transformers_of_any_depth_and_width(kind: str) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTModel

    sizes = {"num_attention_heads": 4, "intermediate_size": 48, "image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    for depth, width in ((3, 40), (5, 24)):
        options = {**sizes, "hidden_size": width, "num_hidden_layers": depth}
        models = [
            CLIPVisionModel(CLIPVisionConfig(**options)) if kind == "clip" else ViTModel(ViTConfig(**options))
            for _ in range(2)
        ]
        merged, expert = (model.eval().requires_grad_(False) for model in models)
        images = torch.randn(2, 3, 8, 8)
        plain = default_features(merged, images)
        deep = DeepSurgery.for_model(merged, images, TASKS, 4)
        assert deep.widths == (width,) * depth and deep.dim == width
        with deep.attach(merged), deep.task("c"):
            assert torch.equal(deep(default_features(merged, images)), plain)
            targets = deep.targets(expert, images)
            states = expert(images, output_hidden_states=True).hidden_states
            torch.testing.assert_close(list(targets[:-1]), [state.mean(1) for state in states[1:]])
            torch.testing.assert_close(targets[-1], default_features(expert, images))
            trained(deep)
            deep.loss(deep(default_features(merged, images)), targets).backward()
        assert all(p.grad is not None and p.grad.any() for p in deep.only("c").parameters())
        assert torch.equal(default_features(merged, images), plain)


def test_maps_and_token_first_layouts_are_averaged_over_the_right_dimensions() -> None:
    torch.manual_seed(0)
    maps = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    images = torch.randn(4, 3, 9, 9, dtype=torch.float64)
    deep = trained(DeepSurgery.for_model(maps, images, TASKS, 2, channel_dim=1, blocks=["0", "1"]).double())
    assert deep.widths == (8, 8)
    first = maps[0](images)
    torch.testing.assert_close(deep.targets(maps, images, blocks=["0", "1"])[0], first.mean((2, 3)))
    with deep.attach(maps, ["0", "1"]), deep.task("c"):
        maps(images)
        module = deep.blocks[0]["c"]
        rows = first.permute(0, 2, 3, 1)
        rows = rows - F.relu(rows @ module.down.weight.T) @ module.up.weight.T
        torch.testing.assert_close(deep.token_means[0], rows.mean((1, 2)))

    mixer = nn.Sequential(nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 7))).double()
    first_tokens = torch.randn(5, 4, 7, dtype=torch.float64)

    def pooled(model: Any, batch: Tensor) -> Tensor:
        output: Tensor = model(batch)
        return output.mean(0)

    deep = DeepSurgery(TASKS, [7, 7], 7, 2, batch_dim=1).double()
    targets = deep.targets(mixer, first_tokens, pooled, "0")
    torch.testing.assert_close(targets[0], mixer[0][0](first_tokens).mean(0))
    assert [tuple(target.shape) for target in targets] == [(4, 7)] * 3
    assert not torch.allclose(targets[0], mixer[0][0](first_tokens).mean(1)[:4])


def test_blocks_without_tokens_are_their_own_mean() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 6))
    deep = DeepSurgery.for_model(plain, torch.zeros(2, 7), TASKS, 2, blocks="")
    assert deep.widths == (5, 6)
    x = torch.randn(3, 7)
    torch.testing.assert_close(deep.targets(plain, x, blocks="")[0], plain[0](x))


def test_half_precision_blocks_are_averaged_in_float32() -> None:
    encoder = build().bfloat16()
    deep = DeepSurgery(TASKS, [40] * 3, 6, 4)
    x = tokens().bfloat16()
    with deep.attach(encoder), deep.task("c"):
        assert deep(encoder(x)).dtype == torch.bfloat16
        assert {mean.dtype for mean in deep.token_means} == {torch.float32}


def test_a_copy_can_be_made_after_a_forward_pass() -> None:
    encoder, x = build(), tokens()
    deep = trained(DeepSurgery(TASKS, [40] * 3, 6, 4).double())
    with deep.attach(encoder), deep.task("c"):
        encoder(x)
        twin = copy.deepcopy(deep)
        assert deep.token_means[0].requires_grad
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), deep.parameters(), strict=True))


def test_the_state_dict_restores_all_tasks() -> None:
    deep, other = trained(DeepSurgery(TASKS, [40] * 3, 6, 4)), DeepSurgery(TASKS, [40] * 3, 6, 4)
    other.load_state_dict(deep.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(deep.only("c").parameters(), other.only("c").parameters(), strict=True)
    )
    assert deep.only("c").blocks[1]["c"] is deep.blocks[1]["c"] and deep.only("c").task_names == ("c",)


@pytest.mark.parametrize("depth", ["last", "all"])
def test_a_task_model_is_the_encoder_the_repair_and_the_head(depth: str) -> None:
    encoder, x, head = build(), tokens(), CosineHead(torch.randn(3, 6, dtype=torch.float64), 10)
    if depth == "all":
        deep = trained(DeepSurgery(TASKS, [40] * 3, 6, 4).double())
        _, z_hat = written_out(encoder, deep, x, "c")
        model, size = task_model(encoder, deep, head, "c"), 3 * 2 * 40 * 4 + 2 * 6 * 4
    else:
        bank = trained_bank()
        z_hat = bank(encoder(x), "c")
        model, size = task_model(encoder, bank, head, "c"), 2 * 6 * 2
        assert torch.equal(task_model(encoder, bank["c"], head, "c")(x), model(x))
    assert not any(part.training for part in model.modules())
    torch.testing.assert_close(model(x), head(z_hat))
    assert torch.equal(model((x, torch.zeros(4))), model(x))
    assert hooks(encoder) == 0
    assert sum(p.numel() for p in model.surgery.parameters()) == size
    with pytest.raises(ValueError, match=r"no surgery module for task 'd'.*\['a.b', 'c'\]"):
        task_model(encoder, deep if depth == "all" else bank, head, "d")


def trained_bank() -> SurgeryBank:
    torch.manual_seed(3)
    bank = SurgeryBank(TASKS, 6, 2).double()
    for parameter in bank.parameters():
        nn.init.normal_(parameter)
    return bank


def test_running_without_a_task_lists_the_tasks() -> None:
    encoder, deep = build(), DeepSurgery(TASKS, [40] * 3, 6, 4).double()
    with deep.attach(encoder), pytest.raises(ValueError, match=r"must know the task.*\['a.b', 'c'\]"):
        encoder(tokens())
    with pytest.raises(ValueError, match=r"must know the task"):
        deep(torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"no surgery module for task 'd'"), deep.task("d"):
        pass
    with deep.task("c"), deep.attach(encoder):
        with deep.task("a.b"):
            pass
        encoder(tokens())


def test_the_loss_before_a_forward_pass_is_refused() -> None:
    encoder, x = build(), tokens()
    deep = DeepSurgery(TASKS, [40] * 3, 6, 4).double()
    targets = deep.targets(build(1), x)
    with deep.task("c"), pytest.raises(ValueError, match=r"blocks \[0, 1, 2\] of 3 have not run"):
        deep.loss(deep(encoder(x)), targets)
    with deep.attach(encoder):
        with deep.task("a.b"):
            encoder(x)
        with deep.task("c"), pytest.raises(ValueError, match="have not run"):
            deep.loss(deep(torch.zeros(4, 6).double()), targets)
        with deep.task("c"), pytest.raises(ValueError, match=r"3 targets for 3 blocks.*4 are needed"):
            deep.loss(deep(encoder(x)), targets[:-1])


def test_a_second_attachment_is_refused() -> None:
    encoder, deep = build(), DeepSurgery(TASKS, [40] * 3, 6, 4)
    with deep.attach(encoder), pytest.raises(ValueError, match=r"attached to a model already; call detach\(\)"):
        deep.attach(encoder)
    deep.attach(encoder).detach()


def test_blocks_that_cannot_be_told_are_asked_for() -> None:
    deep = DeepSurgery(TASKS, [40] * 3, 6, 4)
    with pytest.raises(ValueError, match=r"cannot be told \(lists of like modules: none\).*blocks='encoder.layers'"):
        deep.attach(nn.Sequential(nn.Linear(2, 2)))
    twice = nn.ModuleDict({"text": build(), "vision": build()})
    with pytest.raises(ValueError, match=r"\['text.layers', 'vision.layers'\]"):
        deep.attach(twice)
    assert list(deep.attach(twice, "vision.layers").found_at) == [f"vision.layers.{i}" for i in range(3)]
    deep.detach()
    nested = build()
    nested.layers[1].experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    nested.other = nn.ModuleList([nn.Linear(2, 2), nn.Tanh()])
    deep.attach(nested).detach()


def test_blocks_that_are_not_there_are_refused() -> None:
    encoder, deep = build(), DeepSurgery(TASKS, [40] * 3, 6, 4)
    with pytest.raises(ValueError, match=r"no module 'blocks'; its lists of modules are \['layers'\]"):
        deep.attach(encoder, "blocks")
    with pytest.raises(ValueError, match=r"blocks='head' is a Linear, not an nn.ModuleList"):
        deep.attach(encoder, "head")
    with pytest.raises(ValueError, match=r"has 2 blocks \(layers.0, layers.2\), but there are surgery modules for 3"):
        deep.attach(encoder, ["layers.0", "layers.2"])
    with pytest.raises(ValueError, match="each only once"):
        deep.attach(encoder, ["layers.0", "layers.2", "layers.0"])
    with pytest.raises(ValueError, match="at least one module"):
        deep.attach(encoder, [])
    assert hooks(encoder) == 0


def test_blocks_of_another_kind_or_not_run_are_refused() -> None:
    odd = build(kinds=("tensor", "dict"))
    with pytest.raises(ValueError, match=r"block 1 \(Block\) returned a dict"):
        DeepSurgery.for_model(odd, tokens(), TASKS, 4)
    assert hooks(odd) == 0
    encoder = build()
    encoder.spare = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"did not run its blocks \['spare'\]"):
        DeepSurgery.for_model(encoder, tokens(), TASKS, 4, blocks=["layers.0", "spare"])


def test_experts_of_another_shape_are_refused_with_both_widths() -> None:
    deep = DeepSurgery(TASKS, [40] * 3, 6, 4).double()
    with pytest.raises(ValueError, match=r"layers.0: the expert has 24 channels .*\(4, 24\)\), the merged encoder 40"):
        deep.targets(build(width=24), tokens(width=24))
    with pytest.raises(ValueError, match=r"final features: the expert has 5 channels .*the merged encoder 6; give"):
        deep.targets(build(dim=5), tokens())
    with pytest.raises(ValueError, match="has 2 blocks"):
        deep.targets(build(kinds=("tensor", "tensor")), tokens())


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="rank must lie between 1 and the 40 channels"):
        DeepSurgery(TASKS, [40], 60, 41)
    with pytest.raises(ValueError, match="at least one block"):
        DeepSurgery(TASKS, [], 6, 4)
