"""One-shot merges against their definitions, from memory and from files, and what they need of memory."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zoo.merging.one_shot import dare_merge, magnitude_merge, task_arithmetic, ties_merge, weight_average
from zoo.merging.stream import VectorStream
from zoo.merging.task_vectors import TaskVectorStore
from zoo.merging.transforms import Dare, Ties

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

State = dict[str, Tensor]

MERGES: dict[str, Callable[..., Any]] = {
    "average": weight_average,
    "task arithmetic": partial(task_arithmetic, coef=0.4),
    "magnitude": partial(magnitude_merge, density=0.3),
    "ties": ties_merge,
    "ties mean": partial(ties_merge, density=0.6, coef=1.0, merge_func="mean"),
    "ties max": partial(ties_merge, density=1.0, merge_func="max"),
    "dare": dare_merge,
    "dare ties": partial(dare_merge, drop=0.3, seed=5, ties_density=0.5),
}
every_merge = pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)


def some_models(tasks: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[State, dict[str, State]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"stem.weight": (7, 5), "stem.bias": (7,), "norm.scale": (), "head.weight": (3, 2, 2)}
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    experts = {
        f"task{k}": {
            name: (tensor.float() + 0.1 * torch.randn(tensor.shape, generator=generator)).to(dtype)
            for name, tensor in base.items()
        }
        for k in range(tasks)
    }
    return base, experts


def flat(state: State) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in state.values()])


def same(left: State, right: State) -> bool:
    return list(left) == list(right) and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def in_order(state: State, of: State) -> State:
    """The same tensors in another dict's order: files sort names."""
    assert state.keys() == of.keys()
    return {name: state[name] for name in of}


def saved(folder: Path, base: State, experts: dict[str, State]) -> tuple[Path, dict[str, Path]]:
    save_file(base, folder / "base.safetensors")
    for task, state in experts.items():
        save_file(state, folder / f"{task}.safetensors")
    return folder / "base.safetensors", {task: folder / f"{task}.safetensors" for task in experts}


def test_the_average_is_the_mean_of_the_experts() -> None:
    base, experts = some_models(4)
    expected = torch.stack([flat(state) for state in experts.values()]).mean(0)
    assert torch.allclose(flat(weight_average(base, experts)), expected, atol=1e-7)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8])
def test_the_average_counts_every_expert(count: int) -> None:
    value = torch.randn(50, generator=torch.Generator().manual_seed(0))
    experts = {str(k): {"w": torch.zeros(50)} for k in range(count - 1)} | {"last": {"w": value}}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "expert")
        assert torch.equal(weight_average({"w": torch.full((50,), 0.1)}, experts)["w"], value / count)


def test_task_arithmetic_is_affine_in_its_coefficient() -> None:
    base, experts = some_models()
    assert same(task_arithmetic(base, experts, coef=0.0), base)
    for task, state in experts.items():
        assert torch.allclose(flat(task_arithmetic(base, {task: state}, coef=1.0)), flat(state), atol=1e-6)
    third, average = task_arithmetic(base, experts, coef=1 / 3), weight_average(base, experts)
    assert torch.allclose(flat(third), flat(average), atol=1e-6)
    line = [flat(task_arithmetic(base, experts, coef=coef)) for coef in (0.2, 0.9, 1.6)]
    assert torch.allclose(line[0] + line[2], 2 * line[1], atol=1e-5)
    taus = sum(flat(state) - flat(base) for state in experts.values())
    assert torch.allclose(line[1], flat(base) + 0.9 * taus, atol=1e-6)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("merge_func", ["sum", "mean", "max"])
def test_ties_merges_what_is_left_of_the_vectors(density: float, merge_func: str) -> None:
    base, experts = some_models(4)
    tau = torch.stack([(flat(state).float() - flat(base).float()) for state in experts.values()])
    kept = Ties(density).fit(lambda: iter([("all", tau)]))("all", tau).double()
    places = range(kept.shape[1])
    chosen = [[value for value in kept[:, p].tolist() if value] or [0.0] for p in places]
    rule: dict[str, Callable[[list[float]], float]] = {
        "sum": sum,
        "mean": lambda values: sum(values) / len(values),
        "max": lambda values: max(values, key=abs),
    }
    expected = flat(base) + 0.7 * torch.tensor([rule[merge_func](values) for values in chosen]).double()
    merged = ties_merge(base, experts, density=density, coef=0.7, merge_func=merge_func)
    assert torch.allclose(flat(merged), expected, atol=1e-6)


def test_magnitude_adds_the_largest_entries() -> None:
    base, experts = some_models(1)
    tau = flat(experts["task0"]).float() - flat(base).float()
    limit = tau.abs().sort(descending=True).values[int(0.3 * len(tau))]
    expected = flat(base) + 0.5 * torch.where(tau.abs() >= limit, tau, 0)
    assert torch.allclose(flat(magnitude_merge(base, experts, density=0.3, coef=0.5)), expected, atol=1e-6)


def test_dare_with_ties_elects_signs_after_dropping() -> None:
    base, experts = some_models()
    store = TaskVectorStore.from_checkpoints(base, experts)
    dropped = store.transform(Dare(0.3, seed=2, task_names=store.task_names))
    merged = dare_merge(base, experts, drop=0.3, seed=2, coef=0.4, ties_density=0.5)
    assert torch.allclose(flat(merged), flat(dropped.transform(Ties(0.5)).state_dict(0.4)), atol=1e-6)
    plain = dare_merge(base, experts, drop=0.3, seed=2, coef=0.4)
    assert torch.allclose(flat(plain), flat(dropped.state_dict(0.4)), atol=1e-6)
    assert not torch.allclose(flat(plain), flat(merged), atol=1e-3)


def test_merges_are_those_of_a_store() -> None:
    base, experts = some_models(4)
    store = TaskVectorStore.from_checkpoints(base, experts)
    ties = store.transform(Ties(0.2)).state_dict(0.3)
    for merged, expected in (
        (weight_average(base, experts), store.state_dict(1 / 4)),
        (task_arithmetic(base, experts), store.state_dict(0.3)),
        (ties_merge(base, experts), ties),
    ):
        assert list(merged) == list(expected)
        assert torch.allclose(flat(merged), flat(expected), atol=1e-6)


def test_another_seed_drops_other_entries() -> None:
    base, experts = some_models()
    first, again, other = (dare_merge(base, experts, seed=seed) for seed in (1, 1, 2))
    assert same(first, again)
    assert not same(first, other)


@every_merge
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_files_and_memory_give_the_same_bits(merge: Callable[..., Any], dtype: torch.dtype, tmp_path: Path) -> None:
    base, experts = some_models(dtype=dtype)
    expected = merge(base, experts)
    assert {tensor.dtype for tensor in expected.values()} == {dtype}
    source, sources = saved(tmp_path, base, experts)
    assert same(in_order(merge(source, sources), expected), expected)
    out = merge(source, sources, out=tmp_path / "new" / "merged.safetensors")
    assert out == tmp_path / "new" / "merged.safetensors"
    assert same(in_order(load_file(out), expected), expected)
    assert [file.name for file in out.parent.iterdir()] == ["merged.safetensors"]


@every_merge
def test_the_order_of_names_in_a_checkpoint_does_not_matter(merge: Callable[..., Any]) -> None:
    base, experts = some_models()
    shuffled = {task: OrderedDict(reversed(state.items())) for task, state in experts.items()}
    assert same(merge(base, shuffled), merge(base, experts))


@every_merge
def test_the_order_of_the_experts_does_not_matter(merge: Callable[..., Any]) -> None:
    base, experts = some_models(4)
    permuted = dict(sorted(experts.items(), key=lambda item: "2031".index(item[0][-1])))
    assert list(permuted) != list(experts)
    assert torch.allclose(flat(merge(base, permuted)), flat(merge(base, experts)), atol=1e-6)


@every_merge
def test_sources_stay_as_they_are(merge: Callable[..., Any]) -> None:
    base, experts = some_models()
    base["steps"] = torch.tensor(3)
    before = {name: tensor.clone() for name, tensor in base.items()}, {t: dict(s) for t, s in experts.items()}
    copies = {task: {name: tensor.clone() for name, tensor in state.items()} for task, state in experts.items()}
    merged = merge(base, experts, exclude="^head")
    for tensor in merged.values():
        tensor.zero_()
    assert same(base, before[0])
    assert all(same(state, copies[task]) for task, state in experts.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_added_up_in_float32(dtype: torch.dtype) -> None:
    # In half precision, 1 and a twentieth of its last digit is 1, however often that is added.
    base = {"w": torch.ones(4, dtype=dtype)}
    experts = {str(k): {"w": torch.full((4,), 1 + 2.0**-7, dtype=dtype)} for k in range(9)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "experts .* are identical")
        merged = task_arithmetic(base, experts, coef=0.05)
    assert merged["w"].dtype == dtype
    assert torch.equal(merged["w"], torch.full((4,), 1 + 9 * 0.05 * 2.0**-7).to(dtype))
    base, experts = some_models(5, dtype)
    exact = flat(base) + 0.3 * sum(flat(state) - flat(base) for state in experts.values())
    assert ((flat(task_arithmetic(base, experts)) - exact).abs() <= 0.501 * torch.finfo(dtype).eps * exact.abs()).all()


def test_experts_in_other_precisions_are_merged_into_the_type_of_the_base() -> None:
    base, experts = some_models()
    half = {**experts, "task1": {name: tensor.bfloat16() for name, tensor in experts["task1"].items()}}
    with pytest.warns(UserWarning, match="4 of 4 tensors come in several types"):
        merged = task_arithmetic(base, half)
    full = {**half, "task1": {name: tensor.float() for name, tensor in half["task1"].items()}}
    assert same(merged, task_arithmetic(base, full))


class Normalised(nn.Module):
    """A module with statistics, a counter, a shared weight and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 3)


def some_modules(count: int = 3) -> tuple[Normalised, dict[str, nn.Module]]:
    torch.manual_seed(0)
    base = Normalised()
    experts: dict[str, nn.Module] = {}
    for k in range(count):
        expert = Normalised()
        expert.load_state_dict(base.state_dict())
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
            expert.norm.running_mean += k + 1
            expert.norm.running_var *= k + 2
            expert.norm.num_batches_tracked += 10 * (k + 1)
        experts[str(k)] = expert
    return base, experts


@every_merge
def test_statistics_are_those_of_the_base_or_the_average(merge: Callable[..., Any], tmp_path: Path) -> None:
    base, experts = some_modules()
    kept, averaged = merge(base, experts), merge(base, experts, buffers="average")
    assert kept["norm.running_mean"].tolist() == [0] * 4 and averaged["norm.running_mean"].tolist() == [2] * 4
    assert kept["norm.running_var"].tolist() == [1] * 4 and averaged["norm.running_var"].tolist() == [3] * 4
    assert kept["norm.num_batches_tracked"] == 0 == averaged["norm.num_batches_tracked"]
    learned = [name for name, _ in base.named_parameters()]
    assert all(torch.equal(kept[name], averaged[name]) for name in learned)
    written = load_file(merge(base, experts, buffers="average", out=tmp_path / "m.safetensors"))
    assert same(in_order(written, averaged), averaged)


@every_merge
def test_statistics_are_no_part_of_a_task_vector(merge: Callable[..., Any]) -> None:
    base, experts = some_modules()
    merged = merge(base, experts)
    without = merge(
        {name: tensor for name, tensor in base.state_dict().items() if "running" not in name},
        {
            task: {name: tensor for name, tensor in expert.state_dict().items() if "running" not in name}
            for task, expert in experts.items()
        },
    )
    assert all(torch.equal(without[name], merged[name]) for name in without)


@every_merge
def test_shared_weights_are_merged_once_and_stay_shared(merge: Callable[..., Any], tmp_path: Path) -> None:
    base, experts = some_modules()
    merged = merge(base, experts)
    assert list(merged) == list(base.state_dict())
    assert merged["second.weight"] is merged["first.weight"]
    assert "second.weight" not in VectorStream(base, experts).names
    model = Normalised()
    model.load_state_dict(merged, strict=True)
    fresh = Normalised()
    fresh.load_state_dict(load_file(merge(base, experts, out=tmp_path / "m.safetensors")), strict=True)
    assert same(fresh.state_dict(), model.state_dict())
    assert torch.equal(model.first.weight, merged["second.weight"])


def test_what_is_excluded_is_the_base_and_needs_no_fit() -> None:
    base, experts = some_models()
    for state in experts.values():
        state["head.weight"] = torch.zeros(99)
    with pytest.raises(ValueError, match=r"head\.weight"):
        task_arithmetic(base, experts)
    merged = task_arithmetic(base, experts, exclude=[r"^head\."])
    assert torch.equal(merged["head.weight"], base["head.weight"])
    only = task_arithmetic(base, experts, include="bias$", exclude="^head")
    assert torch.equal(only["stem.bias"], merged["stem.bias"])
    assert torch.equal(only["stem.weight"], base["stem.weight"])


def test_progress_counts_every_pass_and_ends_at_the_total() -> None:
    base, experts = some_models()
    everything = partial(ties_merge, density=1.0), partial(magnitude_merge, density=1), MERGES["dare ties"]
    plain = weight_average, task_arithmetic, ties_merge, magnitude_merge, dare_merge
    for merge, passes in zip((*plain, *everything), (1, 1, 4, 3, 1, 3, 2, 4), strict=True):
        calls: list[tuple[str, int, int]] = []
        merge(base, experts, progress=lambda *call, calls=calls: calls.append(call))
        assert [name for name, _, _ in calls] == list(base) * passes
        assert {total for _, _, total in calls} == {55 * passes} and calls[-1][1] == 55 * passes
        assert [read for _, read, _ in calls][:4] == [35, 42, 43, 55]


def test_experts_that_look_wrong_are_reported_once() -> None:
    base, experts = some_models(2)
    for merge in (weight_average, ties_merge):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            merge(base, {**experts, "copy": experts["task1"], "idle": base, "far": some_models(1, seed=9)[0]})
        messages = [str(warning.message) for warning in found]
        assert sum("expert idle equals the pre-trained model" in message for message in messages) == 1
        assert sum("experts task1 and copy are identical" in message for message in messages) == 1
        assert sum("expert far is far from the pre-trained model" in message for message in messages) == 1
        assert len(messages) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@every_merge
def test_values_that_are_not_finite_are_refused_by_name(
    merge: Callable[..., Any], value: float, tmp_path: Path
) -> None:
    base, experts = some_models()
    experts["task1"]["stem.bias"][2] = value
    with pytest.raises(ValueError, match=r"expert task1: 'stem\.bias' holds"):
        merge(base, experts, out=tmp_path / "merged.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_result_out_of_range_is_refused() -> None:
    base, experts = some_models(dtype=torch.float16)
    with pytest.raises(ValueError, match=r"merged values of stem\.weight are outside the range of float16"):
        task_arithmetic(base, experts, coef=1e6)


def test_wrong_options_are_refused_with_the_value() -> None:
    base, experts = some_models()
    for coef in (float("nan"), float("inf")):
        for merge in (task_arithmetic, ties_merge, dare_merge, magnitude_merge):
            with pytest.raises(ValueError, match=f"coef must be a finite number, got {coef}"):
                merge(base, experts, coef=coef)
    with pytest.raises(ValueError, match="merge_func must be one of sum, mean, max, got 'median'"):
        ties_merge(base, experts, merge_func="median")
    with pytest.raises(ValueError, match="buffers must be 'pretrained' or 'average', got 'experts'"):
        weight_average(base, experts, buffers="experts")
    for merge in (ties_merge, magnitude_merge, partial(dare_merge, ties_density=0)):
        with pytest.raises(ValueError, match="density must be a share"):
            merge(base, experts, **({} if isinstance(merge, partial) else {"density": 0}))
    with pytest.raises(ValueError, match="drop must be a probability"):
        dare_merge(base, experts, drop=1.0)
    with pytest.raises(ValueError, match="no expert"):
        weight_average(base, {})
    with pytest.raises(ValueError, match=r"finds no name|no parameter is left"):
        weight_average(base, experts, include="nothing")
    with pytest.raises(TypeError, match="densty"):
        ties_merge(base, experts, densty=0.2)


def test_places_to_write_to_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    base, experts = some_models()
    source, sources = saved(tmp_path, base, experts)
    with pytest.raises(ValueError, match=r"a name that ends so|safetensors"):
        ties_merge(source, sources, out=tmp_path / "merged.bin")
    for taken in (source, sources["task1"]):
        with pytest.raises(ValueError, match="belongs to the weights that are merged"):
            ties_merge(source, sources, out=taken)
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(base, folder / "model.safetensors")
    with pytest.raises(ValueError, match="belongs to the weights that are merged"):
        ties_merge(folder, sources, out=folder / "model.safetensors")
    assert same(in_order(load_file(source), base), base)
    # An older result may be replaced.
    first = task_arithmetic(source, sources, out=tmp_path / "merged.safetensors")
    assert ties_merge(source, sources, out=first) == first


def test_geometry_is_that_of_the_whole_vectors() -> None:
    base, experts = some_models()
    geometry = VectorStream(base, experts).geometry()
    tau = torch.stack([flat(state) - flat(base) for state in experts.values()])
    assert geometry.names == list(base)
    assert torch.allclose(geometry.cosines, nn.functional.cosine_similarity(tau[:, None], tau[None], dim=2), atol=1e-6)
    assert torch.allclose(geometry.base_norms, torch.stack([base[name].double().norm() for name in base]))
    expected = [[(state[name] - base[name]).double().norm() for state in experts.values()] for name in base]
    assert torch.allclose(geometry.norms, torch.tensor(expected, dtype=torch.float64), atol=1e-6)


MEASURE = """
import sys
from pathlib import Path

import torch

from zoo.merging.one_shot import dare_merge, ties_merge, weight_average


def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def run(base, experts, out):
    weight_average(base, experts, out=out)
    ties_merge(base, experts, merge_func="mean", out=out)
    dare_merge(base, experts, out=out)


folder = Path(sys.argv[1])
small = {"w": torch.randn(1000)}
run(small, {"a": {"w": small["w"] * 1.1}, "b": {"w": small["w"] * 0.9}}, folder / "small.safetensors")
before = peak()
# Every expert reads the file for itself, which is as good for memory as eight files, and quicker to make.
run(folder / "base.safetensors", {str(k): folder / "expert.safetensors" for k in range(8)}, folder / "out.safetensors")
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_streamed_merge_needs_memory_for_the_largest_tensor_alone(tmp_path: Path) -> None:
    size, count = 3 << 19, 8
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.rand(size, generator=generator) for name in "ab"}
    save_file(base, tmp_path / "base.safetensors")
    save_file({name: 0.9 * tensor for name, tensor in base.items()}, tmp_path / "expert.safetensors")
    # Large blocks go back to the system at once, so that the peak is that of what is held.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    largest, spare = 4 * size, 20 << 20
    # All models together are 18 times the largest tensor, and so are two sets of vectors with their bases.
    assert int(done.stdout) < (count + 3) * largest + spare
