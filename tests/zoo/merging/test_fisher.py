"""Fisher information against brute force and closed forms in float64, and the merge against its formula."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zoo.merging.fisher import fisher_information, fisher_merge
from zoo.merging.heads import CosineHead, LinearHead

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TASKS = ("red", "blue")
MODES = ("vmap", "loop")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Batch(NamedTuple):
    images: Tensor
    labels: Tensor | None
    task: str


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    with torch.no_grad():
        net[2].running_mean.uniform_(-1, 1)
        net[2].running_var.uniform_(0.5, 2)
    return net


def inputs(count: int = 10, seed: int = 0) -> Tensor:
    return torch.randn(count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def head(classes: int = 5, seed: int = 0) -> LinearHead:
    generator = torch.Generator().manual_seed(seed)
    return LinearHead(torch.randn(classes, 3, dtype=torch.float64, generator=generator))


def moved(base: nn.Module, other: nn.Module) -> Any:
    """The base a bit nearer to another network, as a fine-tuned one is."""
    with torch.no_grad():
        for own, move in zip(base.parameters(), other.parameters(), strict=True):
            own += 0.3 * move
    return base


def experts() -> dict[str, nn.Sequential]:
    return {task: moved(network(), network(k + 1)) for k, task in enumerate(TASKS)}


def data() -> dict[str, list[Tensor]]:
    return {task: list(inputs(10, k).split(4)) for k, task in enumerate(TASKS)}


def heads() -> dict[str, LinearHead]:
    return {task: head(4 + k, k) for k, task in enumerate(TASKS)}


def brute_force(net: nn.Module, x: Tensor, to_logits: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """E_x sum_c p_c (d log p_c / d theta)^2, one example and one class at a time."""
    net = copy.deepcopy(net).eval()
    total = {name: torch.zeros_like(parameter) for name, parameter in net.named_parameters()}
    for row in x:
        log_p = to_logits(net(row[None])).log_softmax(1)[0]
        for value in log_p:
            gradients = torch.autograd.grad(value, list(net.parameters()), retain_graph=True)
            for name, gradient in zip(total, gradients, strict=True):
                total[name] += value.exp().detach() * gradient**2 / len(x)
    return total


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **tolerance)


@pytest.mark.parametrize("mode", MODES)
def test_information_is_that_of_brute_force(mode: Any) -> None:
    found = fisher_information(network(), inputs().split(4), head(), per_example=mode)
    assert_same(found, brute_force(network(), inputs(), head()), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("mode", MODES)
def test_information_of_a_linear_model_has_its_closed_form(mode: Any) -> None:
    net = nn.Linear(4, 3).double()
    found = fisher_information(net, [inputs()], LinearHead(torch.eye(3, dtype=torch.float64)), per_example=mode)
    p = net(inputs()).softmax(1)
    variances = (p * (1 - p)).detach()
    torch.testing.assert_close(found["weight"], variances.T @ inputs().square() / 10)
    torch.testing.assert_close(found["bias"], variances.mean(0))


@pytest.mark.parametrize("options", [{"chunk_size": 1}, {"chunk_size": 3}, {"chunk_size": 100}, {"max_classes": 5}])
def test_chunks_and_batches_do_not_matter(options: dict[str, int]) -> None:
    expected = fisher_information(network(), [inputs()], head())
    assert_same(fisher_information(network(), inputs().split(7), head(), **options), expected)


@pytest.mark.parametrize("count", [6, 8])
def test_only_the_examples_that_are_asked_for_are_read(count: int) -> None:
    def endless() -> Any:
        yield from inputs().split(4)[:2]
        raise AssertionError("read on")

    found = fisher_information(network(), endless(), head(), num_examples=count)
    assert_same(found, brute_force(network(), inputs()[:count], head()))


def test_drawn_labels_give_the_information_in_expectation() -> None:
    net, x = nn.Linear(4, 3).double(), inputs(6)
    exact = fisher_information(net, [x], head())
    many = [x.repeat(200, 1)]
    drawn = fisher_information(net, many, head(), num_examples=1200, max_classes=4)
    for name, tensor in exact.items():
        torch.testing.assert_close(drawn[name], tensor, rtol=0.1, atol=0.02 * float(tensor.max()))


def test_draws_depend_on_the_seed_alone() -> None:
    calls = [fisher_information(network(), [inputs()], head(), max_classes=2, seed=seed) for seed in (0, 0, 1)]
    assert_same(calls[0], calls[1], rtol=0, atol=0)
    assert not torch.equal(calls[0]["4.weight"], calls[2]["4.weight"])
    other_chunks = fisher_information(network(), [inputs()], head(), max_classes=2, chunk_size=100, per_example="loop")
    assert_same(other_chunks, calls[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["pair", "mapping", "named tuple"])
def test_labels_do_not_matter_in_any_kind_of_batch(kind: str, mode: Any) -> None:
    x, labels = inputs(), torch.full((10,), -7)
    batch: Any = {
        "pair": (x, labels),
        "mapping": {"pixel_values": x, "labels": labels},
        "named tuple": Batch(x, labels, "red"),
    }[kind]
    expected = fisher_information(network(), [x], head(), per_example=mode)
    assert_same(fisher_information(network(), [batch], head(), per_example=mode), expected, rtol=0, atol=0)


def test_a_feature_function_gets_no_labels() -> None:
    def features(model: Any, batch: dict[str, Tensor]) -> Tensor:
        assert list(batch) == ["x"]
        out: Tensor = model(batch["x"])
        return out

    found = fisher_information(network(), [{"x": inputs(), "labels": torch.ones(10)}], head(), features=features)
    assert_same(found, fisher_information(network(), [inputs()], head()))


@pytest.mark.parametrize("mode", MODES)
def test_the_model_is_left_as_it_was(mode: Any) -> None:
    net = network().train()
    net[2].eval()
    modes, before = [module.training for module in net.modules()], copy.deepcopy(net.state_dict())
    fisher_information(net, [inputs()], head(), per_example=mode)
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_some_parameters_and_other_weights(mode: Any) -> None:
    other = network(7)
    found = fisher_information(
        network(), [inputs()], head(), per_example=mode, parameters=["4.weight"], weights=other.state_dict()
    )
    assert_same(found, {"4.weight": brute_force(other, inputs(), head())["4.weight"]})


@pytest.mark.parametrize("mode", MODES)
def test_frozen_parameters_are_looked_at_too(mode: Any) -> None:
    expected = fisher_information(network(), [inputs()], head(), per_example=mode)
    assert_same(fisher_information(network().requires_grad_(False), [inputs()], head(), per_example=mode), expected)


@pytest.mark.parametrize("mode", MODES)
def test_half_precision_is_squared_and_summed_in_float32(mode: Any) -> None:
    net = nn.Linear(4, 3)
    with torch.no_grad():
        net.weight.mul_(0.01)
        net.bias.mul_(0.01)
    weight = 1e-3 * torch.eye(3)
    exact = fisher_information(net, [inputs().float()], LinearHead(weight), per_example=mode)
    half = fisher_information(net.half(), [inputs().half()], LinearHead(weight.half()), per_example=mode)
    # The squares, of about 1e-7, would have one or two digits in float16.
    assert half["weight"].dtype == torch.float32
    torch.testing.assert_close(half["weight"], exact["weight"], rtol=0.02, atol=0)


def test_attention_runs_under_vmap() -> None:
    pytest.importorskip("transformers", reason="the extra text is not installed")
    from zoo.merging.backbones import build_encoder

    torch.manual_seed(0)
    options = {"image_size": 8, "patch_size": 4, "hidden_size": 8, "num_layers": 1, "num_heads": 2}
    encoder = build_encoder("tiny", projection_dim=5, **options).double()
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    to_logits = CosineHead(torch.randn(3, 5, dtype=torch.float64), scale=10.0)
    wanted = [name for name, _ in encoder.named_parameters() if name.startswith("backbone.")]
    found, looped = (
        fisher_information(encoder, [images], to_logits, per_example=mode, parameters=wanted) for mode in MODES
    )
    assert_same(found, looped, rtol=1e-8, atol=1e-12)
    assert sum(float(tensor.sum()) for tensor in found.values()) > 0


class Branching(nn.Module):
    """Looks at values, which vmap cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if float(x.sum()) > 0 else self.linear(-x)


def test_a_model_that_vmap_cannot_run_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"vmap cannot run Branching \(.*\); use per_example='loop'"):
        fisher_information(Branching(), [inputs()], head())
    net = Branching()
    found = fisher_information(net, [inputs()], head(), per_example="loop")
    assert_same(found, brute_force(net, inputs(), head()))


def merged_by_formula(eps: float, normalize: bool) -> dict[str, Tensor]:
    weights = []
    for task, net in experts().items():
        information = brute_force(net, torch.cat(data()[task]), heads()[task])
        norm = torch.cat([f.flatten() for f in information.values()]).norm() if normalize else 1.0
        weights.append({name: f / norm + eps for name, f in information.items()})
    found = {}
    for name in weights[0]:
        thetas = [net.state_dict()[name] for net in experts().values()]
        above = sum(w[name] * theta for w, theta in zip(weights, thetas, strict=True))
        found[name] = above / sum(w[name] for w in weights)
    return found


@pytest.mark.parametrize("eps", [1e-6, 0.1])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_merge_is_the_average_weighted_by_information(normalize: bool, eps: float) -> None:
    found = fisher_merge(network(), experts(), network(9), data(), heads(), normalize=normalize, eps=eps)
    for name, tensor in merged_by_formula(eps, normalize).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-12)


def test_equal_information_reduces_to_averaging() -> None:
    base = nn.Linear(4, 3).double()
    both = {"red": moved(copy.deepcopy(base), nn.Linear(4, 3))}
    both["blue"] = copy.deepcopy(both["red"])
    with torch.no_grad():
        # The same number on top of all logits changes no probability.
        both["blue"].weight += torch.tensor([0.1, -0.1, 0.05, 0.2], dtype=torch.float64)
    same = LinearHead(torch.eye(3, dtype=torch.float64))
    found = fisher_merge(base, both, base, {task: [inputs()] for task in TASKS}, dict.fromkeys(TASKS, same))
    average = (both["red"].weight + both["blue"].weight) / 2
    torch.testing.assert_close(found["weight"], average.detach(), rtol=1e-12, atol=1e-14)


def test_parameters_that_no_prediction_depends_on_are_averaged() -> None:
    class WithSpare(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.net, self.spare = network(seed), nn.Parameter(torch.full((2,), seed).double())

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.net(x)
            return out

    base = WithSpare(0)
    two = {"red": moved(WithSpare(0), WithSpare(1)), "blue": moved(WithSpare(0), WithSpare(2))}
    for mode in MODES:
        found = fisher_merge(base, two, base, data(), heads(), per_example=mode)  # type: ignore[call-overload]
        torch.testing.assert_close(found["spare"], torch.full((2,), 0.45, dtype=torch.float64))


def test_one_expert_is_its_own_merge_and_order_does_not_matter() -> None:
    one = {"red": experts()["red"]}
    found = fisher_merge(network(), one, network(), {"red": data()["red"]}, {"red": heads()["red"]})
    for name, parameter in one["red"].named_parameters():
        assert torch.equal(found[name], parameter)
    there = fisher_merge(network(), experts(), network(), data(), heads())
    back = fisher_merge(network(), dict(reversed(experts().items())), network(), data(), heads())
    assert_same(back, there)


def test_the_result_has_the_bases_names_types_and_statistics() -> None:
    base = network().float()
    with pytest.warns(UserWarning, match="several types"):
        found = fisher_merge(base, experts(), network(), data(), heads())
    assert list(found) == list(base.state_dict())
    base.load_state_dict(found)
    assert all(found[name].dtype == tensor.dtype for name, tensor in base.state_dict().items())
    assert torch.equal(found["2.running_mean"], network().float()[2].running_mean)
    changed = experts()
    changed["red"][2].running_mean.fill_(1.0)
    changed["blue"][2].running_mean.fill_(2.0)
    found = fisher_merge(network(), changed, network(), data(), heads(), buffers="average")
    torch.testing.assert_close(found["2.running_mean"], torch.full((6,), 1.5, dtype=torch.float64))


def test_an_expert_runs_with_its_own_statistics() -> None:
    changed = experts()
    changed["red"][2].running_mean.fill_(3.0)
    found = fisher_merge(network(), changed, network(), data(), heads())
    plain = fisher_merge(network(), experts(), network(), data(), heads())
    assert not torch.allclose(found["4.weight"], plain["4.weight"], rtol=1e-3)


def test_excluded_parameters_are_the_bases_and_have_no_part_in_the_norm() -> None:
    found = fisher_merge(network(), experts(), network(), data(), heads(), exclude=r"^0\.")
    assert torch.equal(found["0.weight"], network()[0].weight)
    whole = fisher_merge(network(), experts(), network(), data(), heads())
    assert not torch.equal(found["4.weight"], whole["4.weight"])


def test_files_give_what_memory_gives_and_the_result_can_be_one(tmp_path: Path) -> None:
    paths = {}
    for name, net in {"base": network(), **experts()}.items():
        paths[name] = tmp_path / f"{name}.safetensors"
        save_file(net.state_dict(), paths[name])
    expected = fisher_merge(network(), experts(), network(), data(), heads())
    sources = {task: paths[task] for task in TASKS}
    out = fisher_merge(paths["base"], sources, network(), data(), heads(), out=tmp_path / "merged.safetensors")
    assert_same(load_file(out), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="choose another place"):
        fisher_merge(paths["base"], sources, network(), data(), heads(), out=paths["red"])


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.after = network(5), nn.Linear(3, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.after(self.backbone(x))
        return out


def test_a_module_around_the_network_serves_as_well() -> None:
    around = Encoder()
    with torch.no_grad():
        around.after.weight.copy_(torch.eye(3))
        around.after.bias.zero_()
    expected = fisher_merge(network(), experts(), network(), data(), heads())
    assert_same(fisher_merge(network(), experts(), around, data(), heads()), expected)


class Shared(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).tanh())[:, :3]
        return out


@pytest.mark.parametrize("copies", [False, True])
def test_a_shared_parameter_stays_shared_even_where_sources_hold_copies(copies: bool) -> None:
    red, blue = (moved(Shared(0), Shared(seed)) for seed in (1, 2))
    sources: list[Any] = [Shared(0), red, blue]
    if copies:
        sources = [{name: tensor.clone() for name, tensor in net.state_dict().items()} for net in sources]
    found = fisher_merge(sources[0], dict(zip(TASKS, sources[1:], strict=True)), Shared(0), data(), heads())
    assert torch.equal(found["first.weight"], found["second.weight"])
    average = (red.first.weight + blue.first.weight).detach() / 2
    assert not torch.allclose(found["second.weight"], average)
    Shared(0).load_state_dict(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0.0}, "eps must be a positive number, got 0.0"),
        ({"eps": math.inf}, "eps must be a positive number, got inf"),
        ({"num_examples": 0}, "num_examples must be at least 1, got 0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"max_classes": 0}, "max_classes must be at least 1, got 0"),
        ({"per_example": "batch"}, "per_example must be 'vmap' or 'loop', got 'batch'"),
        ({"buffers": "mean"}, "buffers must be"),
        ({"heads": {"red": head()}}, r"heads has no blue \(experts: red, blue\)"),
        ({"heads": {**heads(), "green": head()}}, r"heads has also green"),
        ({"batches": {"red": [inputs()]}}, "batches has no blue"),
        ({"batches": {"red": [inputs()], "blue": []}}, "task blue: the batches hold no example"),
        ({"experts": {}}, "experts is empty"),
        ({"heads": dict.fromkeys(TASKS, head(1))}, "two classes"),
        ({"model": nn.Linear(3, 3)}, "Linear has no parameter"),
        ({"model": nn.Sequential(nn.Linear(4, 7), *network()[1:])}, r"0\.weight has the shape \(6, 4\) .* \(7, 4\)"),
        ({"features": lambda model, batch: batch[:, :3]}, "task red: the predictions do not depend"),
        ({"features": lambda model, batch: model(batch).sum(0, keepdim=True)}, "4 examples gave logits for 1"),
        ({"batches": {task: [torch.full((2, 4), math.nan).double()] for task in TASKS}}, "not finite"),
        (
            {"batches": {task: [{"x": inputs(), "ids": torch.zeros(2)}] for task in TASKS}},
            r"shapes \(10, 4\), \(2,\): expected one row an example",
        ),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], message: str) -> None:
    given = {"experts": experts(), "model": network(), "batches": data(), "heads": heads(), **options}
    with pytest.raises(ValueError, match=message):
        fisher_merge(network(), **given)


def test_an_unknown_parameter_is_named() -> None:
    with pytest.raises(ValueError, match=r"no floating parameter 'head\.weight'"):
        fisher_information(network(), [inputs()], head(), parameters=["4.weight", "head.weight"])
