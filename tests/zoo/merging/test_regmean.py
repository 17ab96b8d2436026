"""RegMean as the minimiser it claims to be, against Gram matrices computed by hand."""

from __future__ import annotations

import copy
import gc
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zoo.merging.one_shot import weight_average
from zoo.merging.regmean import input_grams, linear_weights, regmean_merge

if TYPE_CHECKING:
    from pathlib import Path

TASKS = ("red", "blue", "green")
LINEAR = ("0.weight", "3.weight")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3, bias=False), nn.Flatten()).double()
    with torch.no_grad():
        net[2].weight.uniform_(0.5, 2)
    return net


def tokens(count: int = 12, seed: int = 0) -> Tensor:
    """Examples of four tokens whose features are correlated."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(5, 5, dtype=torch.float64, generator=generator)
    return torch.randn(count, 4, 5, dtype=torch.float64, generator=generator) @ mix


def moved(base: nn.Module, other: nn.Module) -> Any:
    """The base a bit nearer to another network, as a fine-tuned one is."""
    with torch.no_grad():
        for own, move in zip(base.parameters(), other.parameters(), strict=True):
            own += 0.3 * move
    return base


def experts(count: int = 3) -> dict[str, nn.Sequential]:
    return {task: moved(network(), network(k + 1)) for k, task in enumerate(TASKS[:count])}


def data(count: int = 3) -> dict[str, list[Tensor]]:
    return {task: list(tokens(12, k).split(5)) for k, task in enumerate(TASKS[:count])}


def layer_inputs(net: nn.Sequential, x: Tensor) -> dict[str, Tensor]:
    """Rows that enter each linear layer."""
    with torch.no_grad():
        return {"0.weight": x.flatten(0, 1), "3.weight": net[:3](x).flatten(0, 1)}


def grams_by_hand(off_diagonal: float) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {name: [] for name in LINEAR}
    for task, net in experts().items():
        for name, rows in layer_inputs(net, torch.cat(data()[task])).items():
            gram = rows.T @ rows / len(rows)
            found[name].append(off_diagonal * gram + (1 - off_diagonal) * gram.diagonal().diag())
    return found


def relative_gradient(weight: Tensor, name: str, off_diagonal: float) -> float:
    """|gradient| of sum_k tr (W - W_k) G_k (W - W_k)^T, in units of its largest term."""
    terms = [
        (weight.double() - net.state_dict()[name]) @ gram
        for net, gram in zip(experts().values(), grams_by_hand(off_diagonal)[name], strict=True)
    ]
    total: Tensor = sum(terms[1:], terms[0])
    return float(total.norm() / max(term.norm() for term in terms))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("off_diagonal", [0.0, 0.5, 0.95, 1.0])
def test_the_gradient_of_the_objective_is_zero_at_the_solution(off_diagonal: float, dtype: torch.dtype) -> None:
    found = regmean_merge(network(), experts(), network(9), data(), off_diagonal=off_diagonal, dtype=dtype)
    average = weight_average(network(), experts())
    for name in LINEAR:
        bound = 1e-12 if dtype == torch.float64 else 1e-5
        assert relative_gradient(found[name], name, off_diagonal) < bound
        assert relative_gradient(average[name], name, off_diagonal) > 1e-2


def test_off_diagonal_is_095_by_default() -> None:
    expected = regmean_merge(network(), experts(), network(), data(), off_diagonal=0.95)
    assert torch.equal(regmean_merge(network(), experts(), network(), data())["3.weight"], expected["3.weight"])


def test_the_first_layers_outputs_are_closer_to_the_experts_than_with_any_other_weight() -> None:
    found = regmean_merge(network(), experts(), network(), data(), off_diagonal=1.0)["0.weight"]

    def distance(weight: Tensor) -> float:
        return sum(
            float((torch.cat(data()[task]) @ (weight - net[0].weight.detach()).T).square().sum())
            for task, net in experts().items()
        )

    for seed in range(5):
        step = 1e-3 * torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert distance(found + step) > distance(found)
    assert distance(found) < 0.9 * distance(weight_average(network(), experts())["0.weight"])


def test_everything_else_is_averaged() -> None:
    found = regmean_merge(network(), experts(), network(), data())
    average = weight_average(network(), experts())
    for name in found.keys() - set(LINEAR):
        torch.testing.assert_close(found[name], average[name], rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_gram_matrices_reduce_to_averaging(dtype: torch.dtype) -> None:
    same = {task: [tokens()] for task in TASKS}
    found = regmean_merge(network(), experts(), network(), same, dtype=dtype)
    bound = 1e-5 if dtype == torch.float32 else 1e-13
    average = weight_average(network(), experts())["0.weight"]
    torch.testing.assert_close(found["0.weight"], average, rtol=bound, atol=bound)
    assert not torch.allclose(found["3.weight"], weight_average(network(), experts())["3.weight"], rtol=1e-3)


def test_without_the_off_diagonal_each_input_is_weighted_by_its_mean_square() -> None:
    found = regmean_merge(network(), experts(), network(), data(), off_diagonal=0.0, dtype=torch.float64)
    squares = [torch.cat(data()[task]).flatten(0, 1).square().mean(0) for task in TASKS]
    above = sum(net[0].weight.detach() * s for net, s in zip(experts().values(), squares, strict=True))
    torch.testing.assert_close(found["0.weight"], above / sum(squares))


def test_tasks_count_the_same_however_many_examples_they_have() -> None:
    more = {**data(), "red": data()["red"] * 3}
    found = regmean_merge(network(), experts(), network(), more)
    torch.testing.assert_close(found["0.weight"], regmean_merge(network(), experts(), network(), data())["0.weight"])


def test_one_expert_is_its_own_merge_and_order_does_not_matter() -> None:
    found = regmean_merge(network(), experts(1), network(), data(1))
    for name, parameter in experts(1)["red"].named_parameters():
        torch.testing.assert_close(found[name], parameter.detach(), rtol=1e-6, atol=1e-7)
    there = regmean_merge(network(), experts(), network(), data(), dtype=torch.float64)
    back = regmean_merge(network(), dict(reversed(experts().items())), network(), data(), dtype=torch.float64)
    for name, tensor in there.items():
        torch.testing.assert_close(back[name], tensor)


def test_inputs_that_are_always_zero_keep_the_average_without_a_warning() -> None:
    silent = {task: [batch * torch.tensor([1, 1, 0, 1, 1]) for batch in batches] for task, batches in data().items()}
    average = weight_average(network(), experts())["0.weight"]
    for off_diagonal in (0.95, 1.0):
        found = regmean_merge(network(), experts(), network(), silent, off_diagonal=off_diagonal)["0.weight"]
        torch.testing.assert_close(found[:, 2], average[:, 2], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(found[:, 1], average[:, 1], rtol=1e-3)


def test_inputs_too_few_for_the_weights_are_reported_and_leave_the_average_where_they_say_nothing() -> None:
    few = {task: [batches[0][:1, :1]] for task, batches in data().items()}
    with pytest.warns(UserWarning, match=r"inputs of 2 layers .* the diagonal was added .* 0\.weight, 3\.weight"):
        found = regmean_merge(network(), experts(), network(), few, off_diagonal=1.0, dtype=torch.float64)
    average = weight_average(network(), experts())["0.weight"]
    seen = torch.cat([batches[0][0] for batches in few.values()])
    # Three inputs of five: in the two directions left only the jitter acts, and it pulls to the average.
    distance, nothing = found["0.weight"] - average, torch.linalg.svd(seen)[2][3:].T
    pull = distance * seen.square().sum(0) @ nothing
    torch.testing.assert_close(pull, torch.zeros_like(pull), atol=1e-6, rtol=0)
    for task, net in experts().items():
        x = few[task][0][0]
        torch.testing.assert_close(x @ found["0.weight"].T, (x @ net[0].weight.T).detach(), rtol=1e-5, atol=1e-5)
    regmean_merge(network(), experts(), network(), few)  # warns of nothing


@pytest.mark.parametrize("seed", range(6))
def test_nearly_singular_matrices_do_not_blow_up_rounding_errors(seed: int) -> None:
    mixed = {}
    for k, task in enumerate(TASKS):
        # The last input is the first but for less than float32 can tell; whether a factorisation fails is up to chance.
        x = tokens(12, 10 * seed + k)
        mixed[task] = [torch.cat([x[..., :4], x[..., :1] + 1e-6 * x[..., 4:]], -1)]
    with pytest.warns(UserWarning, match=r"was added to the Gram matrices of 0\.weight\."):
        found = regmean_merge(network(), experts(), network(), mixed, off_diagonal=1.0)["0.weight"]
    assert float((found - weight_average(network(), experts())["0.weight"]).abs().max()) < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gram_matrices_are_those_of_the_flattened_inputs(dtype: torch.dtype) -> None:
    net = network()
    found = input_grams(net, tokens().split(5), dtype=dtype)
    assert list(found) == list(LINEAR)
    for name, rows in layer_inputs(net, tokens()).items():
        assert found[name].dtype == dtype
        torch.testing.assert_close(found[name], (rows.T @ rows / len(rows)).to(dtype), rtol=1e-5, atol=1e-5)


def test_only_the_examples_that_are_asked_for_are_read() -> None:
    def endless() -> Any:
        yield from tokens().split(5)[:2]
        raise AssertionError("read on")

    rows = tokens()[:7].flatten(0, 1)
    found = input_grams(network(), endless(), num_examples=7, dtype=torch.float64)
    torch.testing.assert_close(found["0.weight"], rows.T @ rows / len(rows))


def test_a_layer_that_runs_twice_counts_all_its_inputs() -> None:
    layer = nn.Linear(5, 5).double()
    x = tokens()[:, 0]
    found = input_grams(nn.Sequential(layer, layer), [x], dtype=torch.float64)
    rows = torch.cat([x, layer(x).detach()])
    torch.testing.assert_close(found, {"0.weight": rows.T @ rows / len(rows)})


def test_autocast_and_half_precision_inputs_do_not_lower_the_precision() -> None:
    net, x = network().float(), tokens().float()
    expected = input_grams(net, [x])["0.weight"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(input_grams(net, [x])["0.weight"], expected)
    half = input_grams(copy.deepcopy(net).bfloat16(), [x.bfloat16()])["0.weight"]
    rows = x.bfloat16().float().flatten(0, 1)
    torch.testing.assert_close(half, rows.T @ rows / len(rows))
    outside = regmean_merge(network(), experts(), network(), data())
    with torch.autocast("cpu", torch.bfloat16):
        inside = regmean_merge(network(), experts(), network(), data())
    assert torch.equal(inside["0.weight"], outside["0.weight"])


@pytest.mark.parametrize("kind", ["pair", "mapping"])
def test_labels_do_not_matter(kind: str) -> None:
    def labelled(x: Tensor) -> Any:
        labels = torch.full((len(x),), -7)
        return (x, labels) if kind == "pair" else {"pixel_values": x, "labels": labels}

    found = regmean_merge(
        network(), experts(), network(), {task: map(labelled, batches) for task, batches in data().items()}
    )
    assert torch.equal(found["3.weight"], regmean_merge(network(), experts(), network(), data())["3.weight"])


def test_the_model_is_left_as_it_was() -> None:
    net = nn.Sequential(network(9), nn.Dropout(0.5)).train()
    net[0][2].eval()
    modes, before = [module.training for module in net.modules()], copy.deepcopy(net.state_dict())
    regmean_merge(network(), experts(), net, data())
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not any(module._forward_pre_hooks for module in net.modules())
    with pytest.raises(ValueError, match=r"task red: the inputs of the layer of '0\.0\.weight' are NaN or infinite"):
        regmean_merge(network(), experts(), net, {**data(), "red": [tokens() * math.inf]})
    assert not any(module._forward_pre_hooks for module in net.modules())
    assert [module.training for module in net.modules()] == modes


def test_memory_does_not_grow_with_the_experts() -> None:
    def wide() -> nn.Linear:
        return nn.Linear(41, 1)

    alive = []

    def count(model: Any, batch: Tensor) -> Tensor:
        objects = gc.get_objects()
        alive.append(sum(type(thing) is Tensor and thing.shape == (41, 41) for thing in objects))
        out: Tensor = model(batch)
        return out

    base = wide()
    many = {name: moved(copy.deepcopy(base), wide()) for name in "abcd"}
    x = {name: [torch.randn(100, 41)] for name in many}
    regmean_merge(base, many, base, x, features=count)
    # When an expert starts, there is the sum over those before it, and nothing else of that size.
    assert alive == [0, 1, 1, 1]


class Attention(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.attention, self.out = nn.MultiheadAttention(4, 2, batch_first=True).double(), nn.Linear(4, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.attention(x, x, x)[0].mean(1))
        return out


def test_layers_that_do_not_run_as_modules_are_averaged_and_named() -> None:
    x = {task: [tokens(6, k)[..., :4]] for k, task in enumerate(TASKS[:2])}
    two = {"red": moved(Attention(), Attention(1)), "blue": moved(Attention(), Attention(2))}
    with pytest.warns(UserWarning, match=r"^averaged, as their layers did not run: attention\.out_proj\.weight$"):
        found = regmean_merge(Attention(), two, Attention(), x)
    average = (two["red"].attention.out_proj.weight + two["blue"].attention.out_proj.weight) / 2
    torch.testing.assert_close(found["attention.out_proj.weight"], average.detach())


class Tied(nn.Module):
    """An embedding shared with the output layer, and two linear layers that share a weight."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(7, 4)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.output = nn.Linear(4, 7, bias=False)
        self.output.weight, self.second.weight = self.embedding.weight, self.first.weight
        self.double()

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.output(self.second(self.first(self.embedding(input_ids))).mean(1))
        return out


@pytest.mark.parametrize("copies", [False, True])
def test_shared_weights_stay_shared_and_an_embeddings_is_averaged(copies: bool) -> None:
    assert list(linear_weights(Tied())) == ["first.weight"]
    red, blue = (moved(Tied(), Tied(seed)) for seed in (1, 2))
    sources: list[Any] = [Tied(), red, blue]
    if copies:
        sources = [{name: tensor.clone() for name, tensor in net.state_dict().items()} for net in sources]
    ids = {task: [{"input_ids": torch.randint(7, (9, 3))}] for task in TASKS[:2]}
    found = regmean_merge(sources[0], dict(zip(TASKS, sources[1:], strict=False)), Tied(), ids)
    assert torch.equal(found["first.weight"], found["second.weight"])
    assert not torch.allclose(found["first.weight"], (red.first.weight + blue.first.weight).detach() / 2)
    average = (red.embedding.weight + blue.embedding.weight).detach() / 2
    for name in ("embedding.weight", "output.weight"):
        torch.testing.assert_close(found[name], average)
    Tied().load_state_dict(found)


def test_a_weight_that_is_used_in_both_layouts_is_no_linear_weight() -> None:
    library = pytest.importorskip("transformers.pytorch_utils", reason="the extra text is not installed")
    net = nn.Sequential(nn.Linear(4, 4), library.Conv1D(4, 4))
    assert list(linear_weights(net)) == ["0.weight", "1.weight"]
    net[1].weight = net[0].weight
    assert not linear_weights(net)


def transformers_network(kind: str, seed: int) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="the extra text is not installed")
    torch.manual_seed(seed)
    if kind == "clip":
        config = transformers.CLIPVisionConfig(
            hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
        )
        net: nn.Module = transformers.CLIPVisionModel(config)
    else:
        config = transformers.GPT2Config(
            vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1
        )
        net = transformers.GPT2Model(config)
    return net.double().eval()


@pytest.mark.parametrize("kind", ["clip", "gpt2"])
def test_layers_of_transformers_are_solved_whatever_the_layout_of_their_weights(kind: str) -> None:
    base = transformers_network(kind, 0)
    two = {task: moved(copy.deepcopy(base), transformers_network(kind, k)) for k, task in enumerate("ab", 1)}
    torch.manual_seed(5)
    batches: dict[str, list[Any]] = {
        task: [torch.randn(9, 3, 8, 8).double() if kind == "clip" else {"input_ids": torch.randint(11, (9, 6))}]
        for task in two
    }
    names = list(linear_weights(base))
    ends = {"clip": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"], "gpt2": ["c_attn", "c_proj", "c_fc"]}
    assert {name.split(".")[-2] for name in names} == set(ends[kind])
    assert len(names) == (6 if kind == "clip" else 4)
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    for task, net in two.items():
        handles = [
            net.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
                lambda module, args, name=name: rows[name].append(args[0].detach().flatten(0, -2))
            )
            for name in names
        ]
        net(**batches[task][0]) if kind == "gpt2" else net(batches[task][0])
        for handle in handles:
            handle.remove()
    found = regmean_merge(base, two, base, batches, dtype=torch.float64, off_diagonal=0.9)
    base.load_state_dict(found)
    for name in names:
        terms = []
        for net, x in zip(two.values(), rows[name], strict=True):
            gram = x.T @ x / len(x)
            gram = 0.9 * gram + 0.1 * gram.diagonal().diag()
            distance = found[name] - net.state_dict()[name]
            terms.append(gram @ (distance if kind == "gpt2" else distance.T))
        assert float((terms[0] + terms[1]).norm() / terms[0].norm()) < 1e-9, name


def test_the_result_has_the_bases_names_types_and_statistics() -> None:
    def normed(seed: int = 0) -> nn.Sequential:
        return nn.Sequential(network(seed), nn.BatchNorm1d(12)).double()

    three = {task: nn.Sequential(net, nn.BatchNorm1d(12)).double() for task, net in experts().items()}
    three["red"][1].running_mean.fill_(3.0)
    base = normed().bfloat16()
    with pytest.warns(UserWarning, match="several types"):
        found = regmean_merge(base, three, normed(), data())
    assert list(found) == list(base.state_dict())
    base.load_state_dict(found)
    assert all(found[name].dtype == tensor.dtype for name, tensor in base.state_dict().items())
    assert not found["1.running_mean"].any()
    found = regmean_merge(normed(), three, normed(), data(), buffers="average")
    torch.testing.assert_close(found["1.running_mean"], torch.ones(12, dtype=torch.float64))


def test_excluded_weights_are_the_bases() -> None:
    found = regmean_merge(network(), experts(), network(), data(), exclude=r"^0\.")
    assert torch.equal(found["0.weight"], network()[0].weight)
    assert relative_gradient(found["3.weight"], "3.weight", 0.95) < 1e-5


def test_files_give_what_memory_gives_and_the_result_can_be_one(tmp_path: Path) -> None:
    paths = {}
    for name, net in {"base": network(), **experts()}.items():
        paths[name] = tmp_path / f"{name}.safetensors"
        save_file(net.state_dict(), paths[name])
    expected = regmean_merge(network(), experts(), network(), data())
    sources = {task: paths[task] for task in TASKS}
    out = regmean_merge(paths["base"], sources, network(), data(), out=tmp_path / "merged.safetensors")
    found = load_file(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with pytest.raises(ValueError, match="choose another place"):
        regmean_merge(paths["base"], sources, network(), data(), out=paths["red"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"off_diagonal": 1.1}, r"off_diagonal must be from 0 to 1, got 1\.1"),
        ({"off_diagonal": math.nan}, "off_diagonal must be from 0 to 1, got nan"),
        ({"num_examples": 0}, "num_examples must be at least 1, got 0"),
        ({"dtype": torch.bfloat16}, r"dtype must be torch\.float32 or torch\.float64, got torch\.bfloat16"),
        ({"batches": data(2)}, r"batches has no green \(experts: red, blue, green\)"),
        ({"batches": {**data(), "blue": []}}, "task blue: the batches hold no example"),
        ({"experts": {}}, "experts is empty"),
        ({"model": nn.Linear(3, 3)}, "Linear has no parameter"),
        (
            {"batches": {task: [tokens() * 1e160] for task in TASKS}, "dtype": torch.float64},
            r"task red: the inputs of the layer of '0\.weight' .* overflow torch\.float64",
        ),
        (
            {"batches": {task: [torch.full((1, 1, 5), 1.8e19).double()] for task in TASKS}},
            r"Gram matrices of '0\.weight' overflow in their sum",
        ),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], message: str) -> None:
    given = {"experts": experts(), "model": network(), "batches": data(), **options}
    with pytest.raises(ValueError, match=message):
        regmean_merge(network(), **given)


def test_a_name_that_is_no_linear_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not the weights of linear layers: 2\.weight"):
        input_grams(network(), [tokens()], parameters=["0.weight", "2.weight"])
