"""Embedding of tables, shared bottom, single-task baseline and experts against loops."""

from __future__ import annotations

import pytest
import torch

from zoo.adatask.backbones import PLE, MMoE, SeparateBackbones, SharedBottom, SingleTask, TableEmbedding

TASKS = {"income": 1, "age": 2}
CARDINALITIES, NUM_NUMERIC = [5, 3, 4], 2


def batch(size=7):
    generator = torch.Generator().manual_seed(1)
    categories = torch.stack([torch.randint(0, n, (size,), generator=generator) for n in CARDINALITIES], dim=1)
    return categories, torch.randn(size, NUM_NUMERIC, generator=generator, dtype=torch.float64)


def test_each_column_has_its_own_rows_of_the_one_table():
    embedding = TableEmbedding(CARDINALITIES, NUM_NUMERIC, embedding_size=3).double()
    categories, numbers = batch()
    tables = embedding.table.weight.split(CARDINALITIES)
    expected = torch.stack(
        [torch.cat([*(tables[c][categories[r, c]] for c in range(3)), numbers[r]]) for r in range(len(categories))]
    )
    assert embedding.output_size == 11
    assert torch.equal(embedding(categories, numbers), expected)


@pytest.mark.parametrize(("column", "code", "limit"), [(0, 5, 4), (1, 3, 2), (2, 4, 3), (1, -1, 2)])
def test_a_code_outside_its_column_is_an_error_that_names_it(column, code, limit):
    embedding = TableEmbedding(CARDINALITIES, NUM_NUMERIC).double()
    categories, numbers = batch()
    categories[4, column] = code
    with pytest.raises(ValueError, match=f"column {column} has the code {code} in row 4, expected 0 to {limit} "):
        embedding(categories, numbers)


@pytest.mark.parametrize("code", [3, -1])
def test_where_the_check_would_stall_a_wrong_code_still_reads_no_other_column(code, monkeypatch):
    embedding = TableEmbedding(CARDINALITIES, NUM_NUMERIC).double()
    categories, numbers = batch()
    categories[4, 1] = code
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(IndexError, match="out of range"):
        embedding(categories, numbers)


def test_a_table_may_lack_one_kind_of_column_but_not_both():
    categories, numbers = batch()
    assert torch.equal(TableEmbedding([], 2)(categories[:, :0], numbers), numbers)
    assert TableEmbedding([5], 0)(categories[:, :1], numbers[:, :0].float()).shape == (7, 4)
    with pytest.raises(ValueError, match="at least one column, got 0 categorical and 0 numeric"):
        TableEmbedding([], 0)


def test_wrong_column_counts_are_named():
    categories, numbers = batch()
    with pytest.raises(ValueError, match=r"\(batch, 3\) and numbers \(batch, 2\), got \(7, 2\) and \(7, 2\)"):
        SharedBottom(TASKS, CARDINALITIES, NUM_NUMERIC)(categories[:, :2], numbers)


def test_the_embedding_follows_no_checkpoint_key_but_the_table():
    assert list(TableEmbedding(CARDINALITIES, NUM_NUMERIC).state_dict()) == ["table.weight"]


def test_adult_shared_bottom_is_31_32_8_with_three_linear_heads():
    cardinalities = [9, 17, 15, 6, 3, 43, 7]
    backbone = SharedBottom({"income": 1, "hours": 1, "age": 1}, cardinalities, num_numeric=3)
    sizes = {name: tuple(p.shape) for name, p in backbone.named_parameters()}
    assert backbone.embedding.output_size == 31
    assert [shape for name, shape in sizes.items() if name.startswith("trunk") and "weight" in name] == [
        (32, 31),
        (8, 32),
    ]
    count = sum(p.numel() for p in backbone.parameters())
    assert count == 4 * sum(cardinalities) + (31 * 32 + 32) + (32 * 8 + 8) + 3 * (8 + 1)


def test_shared_bottom_equals_its_equations():
    torch.manual_seed(0)
    backbone = SharedBottom(TASKS, CARDINALITIES, NUM_NUMERIC, hidden_sizes=(6, 4), tower_sizes=(3,)).double()
    weights = dict(backbone.named_parameters())
    x = backbone.embedding(*batch())
    for layer in (0, 3):
        x = (x @ weights[f"trunk.{layer}.weight"].T + weights[f"trunk.{layer}.bias"]).clamp(min=0)
    y = (x @ weights["towers.age.0.weight"].T + weights["towers.age.0.bias"]).clamp(min=0)
    y = y @ weights["towers.age.3.weight"].T + weights["towers.age.3.bias"]
    output = backbone(*batch())
    assert torch.allclose(output.outputs["age"], y, atol=1e-12)
    assert torch.allclose(output.features[0], x, atol=1e-12)


def test_single_task_backbones_share_nothing():
    backbone = SingleTask(TASKS, CARDINALITIES, NUM_NUMERIC).double()
    output = backbone(*batch())
    parameters = dict(backbone.named_parameters())
    storages = [p.untyped_storage().data_ptr() for p in parameters.values()]
    assert len(set(storages)) == len(storages)
    for task, values in output.outputs.items():
        gradients = torch.autograd.grad(values.sum(), list(parameters.values()), retain_graph=True, allow_unused=True)
        reached = {name for name, g in zip(parameters, gradients, strict=True) if g is not None}
        assert reached == {name for name in parameters if name.startswith(f"backbones.{task}.")}


def test_single_task_equals_one_shared_bottom_per_task():
    torch.manual_seed(0)
    alone = [SharedBottom({task: n}, CARDINALITIES, NUM_NUMERIC).double() for task, n in TASKS.items()]
    torch.manual_seed(0)
    together = SingleTask(TASKS, CARDINALITIES, NUM_NUMERIC).double()
    for task, part in zip(TASKS, alone, strict=True):
        assert torch.equal(together(*batch()).outputs[task], part(*batch()).outputs[task])


def expert_outputs(experts, x):
    """Outputs `(E, B, O)` of stacked experts on x `(B, I)`, expert by expert and row by row."""
    layers = [part for part in experts if hasattr(part, "weight")]
    results = []
    for e in range(len(layers[0].weight)):
        rows = []
        for h in x:
            for layer in layers:
                h = (h @ layer.weight[e] + layer.bias[e, 0]).clamp(min=0)
            rows.append(h)
        results.append(torch.stack(rows))
    return results


def mixture(gate, x, experts):
    rows = []
    for r in range(len(x)):
        weights = torch.exp(gate.weight @ x[r])
        weights = weights / weights.sum()
        rows.append(sum(w * expert[r] for w, expert in zip(weights, experts, strict=True)))
    return torch.stack(rows)


def test_mmoe_equals_a_loop_over_experts_and_rows():
    torch.manual_seed(0)
    backbone = MMoE(TASKS, CARDINALITIES, NUM_NUMERIC, num_experts=3, expert_sizes=(6, 5), tower_sizes=(4,)).double()
    x = backbone.embedding(*batch())
    experts = expert_outputs(backbone.experts, x)
    output = backbone(*batch())
    for task in TASKS:
        expected = backbone.towers[task](mixture(backbone.gates[task], x, experts))
        assert torch.allclose(output.outputs[task], expected, atol=1e-12)


@pytest.mark.parametrize("num_levels", [1, 2, 3])
def test_ple_equals_a_loop_over_levels_experts_and_rows(num_levels):
    torch.manual_seed(0)
    backbone = PLE(
        TASKS,
        CARDINALITIES,
        NUM_NUMERIC,
        num_levels=num_levels,
        num_shared_experts=3,
        num_task_experts=2,
        expert_sizes=(6, 5),
    ).double()
    x = backbone.embedding(*batch())
    inputs = {**dict.fromkeys(TASKS, x), "shared": x}
    for level in backbone.levels:
        experts = {task: expert_outputs(level.task_experts[task], inputs[task]) for task in TASKS}
        shared = expert_outputs(level.shared_experts, inputs["shared"])
        following = {task: mixture(level.gates[task], inputs[task], experts[task] + shared) for task in TASKS}
        if level is not backbone.levels[-1]:
            everything = experts["income"] + experts["age"] + shared
            following["shared"] = mixture(level.shared_gate, inputs["shared"], everything)
        inputs = following
    output = backbone(*batch())
    for task in TASKS:
        assert torch.allclose(output.outputs[task], backbone.towers[task](inputs[task]), atol=1e-12)


def test_experts_start_like_linear_layers_of_their_width():
    torch.manual_seed(0)
    experts = MMoE(TASKS, [], 100, num_experts=8, expert_sizes=(64,)).experts
    linear = torch.nn.Linear(100, 64)
    for name in ("weight", "bias"):
        ours, theirs = getattr(experts[0], name), getattr(linear, name)
        assert ours.abs().max() <= 0.1 and ours.std().item() == pytest.approx(theirs.std().item(), rel=0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embedding_size": 0}, "embedding_size must be at least 1, got 0"),
        ({"tower_sizes": [4, 0]}, r"tower_sizes must be at least 1, got \[4, 0\]"),
        ({"expert_sizes": []}, "expert_sizes is empty"),
        ({"outputs": {}}, "outputs is empty"),
        ({"outputs": {"income": 0}}, "'income' must have at least 1 output, got 0"),
        ({"outputs": {"a.b": 1}}, "task name 'a.b' cannot name a submodule"),
        ({"outputs": {"items": 1}}, "task name 'items' cannot name a submodule"),
        ({"cardinalities": [3, 0]}, r"cardinalities must be at least 1, got \[3, 0\]"),
    ],
)
@pytest.mark.parametrize("cls", [MMoE, PLE])
def test_wrong_arguments_are_named(cls, options, message):
    arguments = {"outputs": TASKS, "cardinalities": CARDINALITIES, "num_numeric": NUM_NUMERIC, **options}
    with pytest.raises(ValueError, match=message):
        cls(**arguments)


@pytest.mark.parametrize("name", ["", "a.b", "type", "keys", "forward", "to", "training", "_modules"])
def test_names_that_torch_refuses_for_submodules_are_refused_in_words(name):
    with pytest.raises(KeyError):
        torch.nn.ModuleDict({name: torch.nn.Identity()})
    with pytest.raises(ValueError, match=f"task name '{name}' cannot name a submodule"):
        SeparateBackbones({name: 1}, lambda one: SharedBottom(one, CARDINALITIES, NUM_NUMERIC))


@pytest.mark.parametrize("name", ["weight", "like", "hours-per-week", "Arbeit und Lohn", "0"])
def test_other_names_of_tasks_work(name):
    categories, numbers = batch()
    backbone = SeparateBackbones({name: 1}, lambda one: SharedBottom(one, CARDINALITIES, NUM_NUMERIC))
    assert list(backbone(categories, numbers.float()).outputs) == [name]
