"""Every backbone: shapes, seeds, precision, and that autograd can be cut at its features."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from zoo.adatask.backbones import MTAN, PLE, LeNet, MMoE, SegNet, SharedBottom, SingleTask

TASKS = {"income": 1, "age": 2, "class": 3}
CARDINALITIES, NUM_NUMERIC = [5, 3, 4], 2
IMAGE_SIZE = 16


def table(cls, **options):
    return lambda: cls(TASKS, CARDINALITIES, NUM_NUMERIC, **options)


def images(cls, **options):
    return lambda: cls(TASKS, **options)


TABLES = {
    "shared_bottom": table(SharedBottom),
    "shared_bottom_towers": table(SharedBottom, hidden_sizes=(7,), tower_sizes=(6, 5)),
    "mmoe": table(MMoE, num_experts=3, expert_sizes=(6, 5)),
    "ple_1": table(PLE, num_levels=1, expert_sizes=(6,)),
    "ple_2": table(PLE, num_levels=2, expert_sizes=(6, 5)),
    "ple_3": table(PLE, num_levels=3, num_shared_experts=1, num_task_experts=3, expert_sizes=(6,), tower_sizes=()),
    "mmoe_numbers": lambda: MMoE(TASKS, [], NUM_NUMERIC, expert_sizes=(6,)),
    "ple_numbers": lambda: PLE(TASKS, [], NUM_NUMERIC, expert_sizes=(6,)),
}
IMAGES = {
    "lenet": images(LeNet, in_channels=3, width=3, hidden_size=7),
    "segnet": images(SegNet, filters=(4, 5, 6)),
}
NOT_CUT = {"single_task": table(SingleTask), "mtan": images(MTAN, filters=(4, 5, 6))}
ALL = {**TABLES, **IMAGES, **NOT_CUT}


def inputs_of(name, batch=6, size=IMAGE_SIZE):
    generator = torch.Generator().manual_seed(1)
    if name in IMAGES or name == "mtan":
        return (torch.randn(batch, 3, size, size, generator=generator),)
    sizes = [] if name.endswith("numbers") else CARDINALITIES
    categories = [torch.randint(0, n, (batch, 1), generator=generator) for n in sizes]
    categories = torch.cat([torch.empty(batch, 0, dtype=torch.int64), *categories], dim=1)
    return categories, torch.randn(batch, NUM_NUMERIC, generator=generator)


def build(name, seed=0):
    torch.manual_seed(seed)
    return ALL[name]()


def double(inputs):
    return [x.double() if x.is_floating_point() else x for x in inputs]


def losses_of(output):
    return {name: ((values + 0.3).square() * (k + 1)).mean() for k, (name, values) in enumerate(output.outputs.items())}


def leaves_above(starts, stops):
    """Parameters that the graph reaches from `starts` without going through the nodes in `stops`."""
    found, seen, pending = set(), set(), [node for node in starts if node not in stops]
    while pending:
        node = pending.pop()
        if node is None or node in seen or node in stops:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        pending += [following for following, _ in node.next_functions]
    return found


@pytest.mark.parametrize("name", [*TABLES, *IMAGES])
def test_gradients_through_the_features_equal_those_of_the_whole_graph(name):
    backbone = build(name).double()
    output = backbone(*double(inputs_of(name)))
    losses = losses_of(output)
    parameters = list(backbone.parameters())
    whole = {
        task: torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for task, loss in losses.items()
    }
    reached = [sum(gradients[i] is not None for gradients in whole.values()) for i in range(len(parameters))]
    assert set(reached) == {1, len(TASKS)}
    shared = [i for i, count in enumerate(reached) if count > 1]
    for task, loss in losses.items():
        at_features = torch.autograd.grad(loss, output.features, retain_graph=True)
        below = torch.autograd.grad(
            output.features, [parameters[i] for i in shared], at_features, retain_graph=True, allow_unused=True
        )
        for i, gradient in zip(shared, below, strict=True):
            assert torch.allclose(gradient, whole[task][i], rtol=1e-10, atol=1e-14), i


@pytest.mark.parametrize("name", [*TABLES, *IMAGES])
def test_features_separate_shared_from_single_task_parameters_and_do_not_depend_on_each_other(name):
    backbone = build(name)
    output = backbone(*inputs_of(name))
    stops = {feature.grad_fn for feature in output.features}
    behind = [leaves_above([loss.grad_fn], stops) for loss in losses_of(output).values()]
    before = leaves_above(stops, set())
    assert sum(map(len, behind)) == len(set.union(*behind)), "a parameter behind the cut belongs to two tasks"
    assert not before & set.union(*behind)
    assert before | set.union(*behind) == {id(parameter) for parameter in backbone.parameters()}
    for one, other in permutations(output.features, 2):
        assert torch.autograd.grad(one.sum(), other, retain_graph=True, allow_unused=True) == (None,)


@pytest.mark.parametrize("name", [*TABLES, *IMAGES])
def test_heads_share_no_graph_node_so_that_each_can_be_freed_alone(name):
    output = build(name)(*inputs_of(name))
    stops = {feature.grad_fn for feature in output.features}
    nodes = []
    for values in output.outputs.values():
        seen, pending = set(), [values.grad_fn]
        while pending:
            node = pending.pop()
            if node is not None and node not in seen and node not in stops:
                seen.add(node)
                pending += [following for following, _ in node.next_functions]
        nodes.append(seen)
    assert sum(map(len, nodes)) == len(set.union(*nodes))


@pytest.mark.parametrize("name", NOT_CUT)
def test_backbones_without_a_place_to_cut_say_so(name):
    assert build(name)(*inputs_of(name)).features is None


@pytest.mark.parametrize("name", ALL)
def test_outputs_have_the_tasks_shapes(name):
    output = build(name)(*inputs_of(name))
    dense = (IMAGE_SIZE, IMAGE_SIZE) if name in ("segnet", "mtan") else ()
    assert {task: tuple(values.shape) for task, values in output.outputs.items()} == {
        task: (6, count, *dense) for task, count in TASKS.items()
    }


@pytest.mark.parametrize("name", ALL)
def test_the_seed_decides_the_weights_and_nothing_else_the_outputs(name):
    one, same, other = build(name), build(name), build(name, seed=1)
    results = [torch.cat([v.flatten() for v in b(*inputs_of(name)).outputs.values()]) for b in (one, same, other)]
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], results[2], atol=1e-3)


@pytest.mark.parametrize("name", ALL)
def test_bf16_autocast_gives_finite_gradients_near_those_of_float32(name):
    gradients = []
    for enabled in (False, True):
        backbone = build(name)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = backbone(*inputs_of(name, batch=24, size=64))
        sum(values.float().square().mean() for values in output.outputs.values()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in backbone.parameters() if p.grad is not None]))
    exact, rounded = gradients
    assert rounded.isfinite().all()
    # Pooling indices that flip change single weights; on this many pixels hardly the direction (0.992 and more).
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.98


@pytest.mark.parametrize("cls", [SharedBottom, SingleTask, MMoE, PLE])
def test_dropout_acts_in_training_only(cls):
    torch.manual_seed(0)
    backbone = cls(TASKS, CARDINALITIES, NUM_NUMERIC, dropout=0.5)
    inputs = inputs_of("mmoe")
    first, second = (backbone(*inputs).outputs["age"] for _ in range(2))
    assert not torch.equal(first, second)
    backbone.eval()
    first, second = (backbone(*inputs).outputs["age"] for _ in range(2))
    assert torch.equal(first, second)
