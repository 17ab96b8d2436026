"""Merging and its gradient are what the sums over task vectors say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo.merging.task_vectors import TaskVectorStore
from zoo.merging.transforms import Ties

TASKS = ["a", "b", "c"]


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


def models(count: int = 3) -> tuple[nn.Module, dict[str, nn.Module]]:
    base = network(0)
    experts = {}
    for number, task in enumerate(TASKS[:count]):
        expert = network(0)
        generator = torch.Generator().manual_seed(number + 1)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        experts[task] = expert
    return base, experts


def make(**options) -> tuple[TaskVectorStore, nn.Module, dict[str, nn.Module]]:
    base, experts = models()
    return TaskVectorStore.from_checkpoints(base, experts, **options), base, experts


def test_no_coefficient_gives_the_base_one_gives_an_expert_and_equal_ones_the_mean():
    store, base, experts = make()
    for name, tensor in base.named_parameters():
        assert torch.equal(store.merge(0.0)[name], tensor)
        mean = torch.stack([dict(expert.named_parameters())[name] for expert in experts.values()]).mean(0)
        torch.testing.assert_close(store.merge(1 / 3)[name], mean, atol=1e-6, rtol=1e-5)
    for task, expert in experts.items():
        for name, tensor in expert.named_parameters():
            torch.testing.assert_close(store.expert(task)[name], tensor, atol=1e-6, rtol=1e-5)


def test_merging_is_affine():
    store, _, _ = make(dtype=torch.float64)
    u, v = torch.rand(2, len(store.layer_names), 3, dtype=torch.float64)
    merged = store.merge_flat(0.7 * u + 1.8 * v)
    expected = 0.7 * store.merge_flat(u) + 1.8 * store.merge_flat(v) - 1.5 * store.theta0
    torch.testing.assert_close(merged, expected)


@pytest.mark.parametrize("granularity", ["layer", "module", "block", "task"])
def test_the_gradient_is_the_one_of_autograd_through_the_sum(granularity):
    store, _, _ = make(dtype=torch.float64, layer_fn=granularity)
    coef = torch.rand(len(store.layer_names), 3, dtype=torch.float64, requires_grad=True)
    target = torch.randn(store.num_parameters, dtype=torch.float64)
    merged = torch.cat(
        [store.theta0[low:high] + coef[row] @ store.tau[:, low:high] for row, (low, high) in enumerate(store.segments)]
    )
    torch.testing.assert_close(store.merge_flat(coef.detach()), merged.detach(), atol=1e-12, rtol=1e-12)
    loss = (merged.sin() * target).sum()
    (expected,) = torch.autograd.grad(loss, coef)
    found = store.coef_grad(merged.detach().cos() * target)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    assert found.shape == (len(store.layer_names), 3)


def test_the_gradient_agrees_with_finite_differences():
    store, _, _ = make(dtype=torch.float64)
    coef = torch.rand(len(store.layer_names), 3, dtype=torch.float64)

    def loss(value):
        return store.merge_flat(value).square().sum()

    found = store.coef_grad(2 * store.merge_flat(coef))
    for row, column in ((0, 0), (2, 1), (5, 2)):
        step = torch.zeros_like(coef)
        step[row, column] = 1e-5
        difference = (loss(coef + step) - loss(coef - step)) / 2e-5
        torch.testing.assert_close(found[row, column], difference, rtol=1e-6, atol=1e-6)


def test_one_coefficient_a_task_has_the_sum_of_the_layers_gradients():
    layered, _, _ = make()
    single = layered.regrouped("task")
    gradient = torch.randn(layered.num_parameters)
    torch.testing.assert_close(single.coef_grad(gradient)[0], layered.coef_grad(gradient).sum(0))


def test_layers_larger_than_a_piece_are_merged_whole():
    size = (1 << 16) + 1000
    theta0, tau = torch.randn(size), torch.randn(2, size)
    store = TaskVectorStore(theta0, tau, ["a", "b"], {"w": ["w"]}, {"w": (size,)})
    coef = torch.tensor([[0.3, 0.8]])
    torch.testing.assert_close(store.merge_flat(coef), theta0 + 0.3 * tau[0] + 0.8 * tau[1])
    torch.testing.assert_close(store.coef_grad(theta0), (tau @ theta0)[None], rtol=1e-4, atol=1e-2)


def test_the_order_of_keys_in_a_state_dict_does_not_matter():
    base, experts = models()
    straight = TaskVectorStore.from_checkpoints(base, experts)
    shuffled = {task: dict(reversed(list(expert.state_dict().items()))) for task, expert in experts.items()}
    other = TaskVectorStore.from_checkpoints(base, shuffled)
    assert torch.equal(straight.tau, other.tau) and straight.param_names == other.param_names


def test_permuting_the_experts_permutes_the_columns():
    base, experts = models()
    store = TaskVectorStore.from_checkpoints(base, experts)
    turned = TaskVectorStore.from_checkpoints(base, {task: experts[task] for task in reversed(TASKS)})
    coef = torch.rand(len(store.layer_names), 3)
    torch.testing.assert_close(store.merge_flat(coef), turned.merge_flat(coef.flip(1)))
    gradient = torch.randn(store.num_parameters)
    torch.testing.assert_close(store.coef_grad(gradient), turned.coef_grad(gradient).flip(1))


def test_parameters_of_a_layer_that_lie_apart_are_brought_together():
    store, _, experts = make(layer_fn=lambda name: name.rpartition(".")[2])
    assert store.layer_names == ["weight", "bias"]
    coef = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])
    merged = store.merge(coef)
    for name, tensor in merged.items():
        expert = experts["a" if name.endswith("weight") else "b"]
        torch.testing.assert_close(tensor, dict(expert.named_parameters())[name])
    by_hand = store.regrouped("layer")
    torch.testing.assert_close(by_hand.merge(0.5)["0.bias"], store.merge(0.5)["0.bias"])


def test_integers_and_statistics_stay_those_of_the_base():
    base, experts = models()
    base[1].num_batches_tracked.fill_(7)
    base[1].running_mean.fill_(2.0)
    experts["a"][1].running_mean.fill_(5.0)
    state = TaskVectorStore.from_checkpoints(base, experts).state_dict(0.3)
    assert state["1.num_batches_tracked"].dtype == torch.int64 and int(state["1.num_batches_tracked"]) == 7
    assert bool((state["1.running_mean"] == 2).all())
    base.load_state_dict(state)
    averaged = TaskVectorStore.from_checkpoints(base, experts, buffers="average").state_dict(0.3)
    torch.testing.assert_close(averaged["1.running_mean"], torch.full((4,), 5 / 3))


def test_bf16_vectors_are_accumulated_in_float32():
    store, _, _ = make()
    half, _, _ = make(dtype=torch.bfloat16)
    assert half.tau.dtype == torch.bfloat16 and half.theta0.dtype == torch.float32
    exact = TaskVectorStore(half.theta0, half.tau.float(), TASKS, half.layers, half.shapes)
    coef = torch.rand(len(store.layer_names), 3)
    assert torch.equal(half.merge_flat(coef), exact.merge_flat(coef))
    gradient = torch.randn(store.num_parameters)
    assert torch.equal(half.coef_grad(gradient), exact.coef_grad(gradient))
    torch.testing.assert_close(half.merge_flat(coef), store.merge_flat(coef), atol=2e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mapped_vectors_merge_as_those_in_memory(tmp_path, dtype):
    store, _, _ = make(dtype=dtype)
    mapped, _, _ = make(dtype=dtype, mmap=tmp_path / "tau.bin")
    assert (tmp_path / "tau.bin").stat().st_size == store.tau.numel() * store.tau.element_size()
    coef = torch.rand(len(store.layer_names), 3)
    assert torch.equal(store.merge_flat(coef), mapped.merge_flat(coef))


def test_a_merge_writes_into_the_buffer_that_it_is_given():
    store, _, _ = make()
    out = torch.empty_like(store.theta0)
    views = store.merge(0.3, out)
    assert views["0.weight"].data_ptr() == out[slice(*store.ranges["0.weight"])].data_ptr()
    assert torch.equal(out, store.merge_flat(0.3))


def test_a_saved_merge_is_the_state_dict(tmp_path):
    from safetensors.torch import load_file

    store, base, _ = make()
    store.save(tmp_path / "merged.safetensors", 0.3)
    saved = load_file(tmp_path / "merged.safetensors")
    base.load_state_dict(saved)
    for name, tensor in store.state_dict(0.3).items():
        assert torch.equal(saved[name], tensor)


def test_tied_weights_are_merged_once_and_stay_tied():
    def tied(shift: float) -> nn.Module:
        model = nn.ModuleDict({"first": nn.Linear(3, 3, bias=False), "second": nn.Linear(3, 3, bias=False)})
        model["second"].weight = model["first"].weight
        with torch.no_grad():
            model["first"].weight.fill_(1 + shift)
        return model

    store = TaskVectorStore.from_checkpoints(tied(0), {"a": tied(0.5)})
    assert store.param_names == ["first.weight"]
    state = store.state_dict(1.0)
    assert set(state) == {"first.weight", "second.weight"}
    assert bool((state["second.weight"] == 1.5).all())


def test_a_transformed_store_has_the_changed_vectors():
    theta0 = torch.zeros(4)
    tau = torch.tensor([[1.0, -4, 3, 0.1], [-2, 5, 1, 0.2]])
    store = TaskVectorStore(theta0, tau, ["a", "b"], {"w": ["w"]}, {"w": (4,)}).transform(Ties(0.3))
    assert torch.equal(store.tau, torch.tensor([[0.0, 0, 3, 0], [-2, 5, 0, 0]]))


def test_norms_and_cosines_are_those_of_the_vectors():
    store, _, _ = make()
    torch.testing.assert_close(
        store.cosine(), nn.functional.cosine_similarity(store.tau[:, None], store.tau[None], dim=2)
    )
    low, high = store.segments[2]
    torch.testing.assert_close(store.norms()[2], store.tau[:, low:high].norm(dim=1))


def test_a_subset_keeps_the_columns_of_its_tasks():
    store, _, _ = make()
    part = store.subset(["c", "a"])
    assert torch.equal(part.tau, store.tau[[2, 0]]) and part.task_names == ["c", "a"]
    with pytest.raises(ValueError, match="no expert 'x': the tasks are a, b, c"):
        store.subset(["x"])


def test_a_fingerprint_tells_stores_apart():
    store, base, experts = make()
    assert store.fingerprint() == TaskVectorStore.from_checkpoints(base, experts).fingerprint()
    with torch.no_grad():
        experts["b"][0].weight[1, 2] += 1
    assert store.fingerprint() != TaskVectorStore.from_checkpoints(base, experts).fingerprint()


def test_an_expert_equal_to_the_base_is_reported():
    base, experts = models(1)
    with pytest.warns(UserWarning, match="expert b equals the pre-trained model"):
        TaskVectorStore.from_checkpoints(base, {**experts, "b": base})


def test_identical_experts_are_reported():
    base, experts = models(1)
    with pytest.warns(UserWarning, match="experts a and b are identical"):
        TaskVectorStore.from_checkpoints(base, {**experts, "b": experts["a"]})


def test_an_expert_of_another_base_is_reported():
    base, _ = models()
    with pytest.warns(UserWarning, match=r"far from the pre-trained model: .* [\d.]+ times the norm"):
        TaskVectorStore.from_checkpoints(base, {"a": {name: 5 * t for name, t in base.state_dict().items()}})


def test_coefficients_of_another_shape_are_refused():
    store, _, _ = make()
    with pytest.raises(ValueError, match=r"\(6, 3\).*got \(3, 6\)\. This one is transposed: give coef\.T"):
        store.merge(torch.zeros(3, 6))
    with pytest.raises(ValueError, match=r"got \(4,\)"):
        store.merge(torch.zeros(4))


def test_no_expert_and_double_names_are_refused():
    with pytest.raises(ValueError, match="no expert"):
        TaskVectorStore.from_checkpoints(network(0), {})
    with pytest.raises(ValueError, match="must differ"):
        TaskVectorStore(torch.zeros(1), torch.zeros(2, 1), ["a", "a"], {"w": ["w"]}, {"w": (1,)})


def test_sizes_that_disagree_are_refused():
    with pytest.raises(ValueError, match=r"need theta0 \(4,\) and tau \(1, 4\)"):
        TaskVectorStore(torch.zeros(4), torch.zeros(1, 3), ["a"], {"w": ["w"]}, {"w": (4,)})


def test_a_value_that_is_not_finite_is_refused_with_its_key():
    base, experts = models(1)
    with torch.no_grad():
        experts["a"][2].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"expert a.*2\.weight"):
        TaskVectorStore.from_checkpoints(base, experts)


def test_a_mapped_file_in_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        make(mmap=tmp_path / "nowhere" / "tau.bin")
    with pytest.raises(ValueError, match="float64, float32, bfloat16 or float16"):
        make(mmap=tmp_path / "tau.bin", dtype=torch.int32)
