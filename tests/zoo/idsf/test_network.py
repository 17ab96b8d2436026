"""The network of IDSF against loops in float64, the plain form of the method, and what must not change it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.reference.idsf import PlainIDSF
from zoo.idsf.graph import BipartiteGraph
from zoo.idsf.module import IDSF
from zoo.idsf.network import IDSFNetwork

NUM_USERS, NUM_ITEMS, HIDDEN = 7, 5, 4
WIDTHS = {"audio": 3, "image": 6, "text": 2}
# User 6 and item 4 have nobody.
EDGES = torch.tensor([[0, 0, 1, 2, 3, 3, 4, 5, 5], [0, 1, 2, 0, 3, 1, 3, 2, 0]])


def new_network(modalities: int = 2, num_layers: int = 2, id_weight: float = 0.3, **options: Any) -> IDSFNetwork:
    torch.manual_seed(0)
    sizes = {name: WIDTHS[name] for name in sorted(WIDTHS)[:modalities]}
    network = IDSFNetwork(NUM_USERS, NUM_ITEMS, sizes, HIDDEN, num_layers, id_weight, **options)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(torch.randn_like(weight) * 0.7)
    return network


def features_of(network: IDSFNetwork) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    every = {name: torch.randn(NUM_ITEMS, width, generator=generator) for name, width in WIDTHS.items()}
    return [every[name] for name in network.modalities]


def new_graph(norm: str = "rw_self") -> BipartiteGraph:
    return BipartiteGraph(EDGES, NUM_USERS, NUM_ITEMS, norm)


def dense_graph() -> Tensor:
    """D^-1 (A + I) by loops, float64."""
    adjacency = torch.eye(NUM_USERS + NUM_ITEMS, dtype=torch.float64)
    for user, item in EDGES.T.tolist():
        adjacency[user, NUM_USERS + item] = adjacency[NUM_USERS + item, user] = 1
    for row in adjacency:
        row /= row.sum()
    return adjacency


def linear(layer: Any, x: Tensor) -> Tensor:
    product: Tensor = layer.weight.detach().double() @ x
    return product if layer.bias is None else product + layer.bias.detach().double()


def fuse(unit: Any, inputs: list[Tensor]) -> Tensor:
    """Attention (or, without parameters, the mean) row by row."""
    if unit is None:
        return inputs[0]
    rows = []
    for row in range(len(inputs[0])):
        powers = [torch.ones(1, dtype=torch.float64) for _ in inputs]
        if list(unit.parameters()):
            powers = [torch.exp(linear(unit.score, torch.tanh(linear(unit.hidden, x[row])))) for x in inputs]
        rows.append(sum(p / sum(powers) * x[row] for p, x in zip(powers, inputs, strict=True)))
    return torch.stack(rows)  # type: ignore[arg-type]


def head(layers: Any, x: Tensor) -> Tensor:
    rows = []
    for row in x:
        hidden = linear(layers[0], row).clamp(min=0)
        scaled = (hidden - hidden.mean()) / ((hidden - hidden.mean()).square().mean() + 1e-6).sqrt()
        rows.append(layers[2].weight.detach().double() * scaled + layers[2].bias.detach().double())
    return torch.stack(rows)


def unit_rows(x: Tensor) -> Tensor:
    return torch.stack([row / (row * row).sum().sqrt() for row in x])


def oracle(network: IDSFNetwork, id_weight: float = 0.3) -> tuple[Tensor, Tensor]:
    """Users and items by sections 2.2 to 2.6, with powers of the dense graph."""
    adjacency, layers = dense_graph(), network.num_layers
    ids = [table.detach().double() for table in network.ids()]
    users, items, specific = [], [], []
    for place, features in enumerate(features_of(network)):
        content = torch.stack([linear(network.projection[place], row.double()) for row in features])
        units = network.id_attention
        specific.append(content if units is None else fuse(units[place], [content, ids[place]]))
        start = torch.cat([unit_rows(network.user_preference[place].detach().double()), unit_rows(content)])
        added = torch.zeros_like(start)
        if network.user_id is not None:
            added = id_weight * torch.cat([network.user_id.detach().double(), ids[place]])
        powers = [torch.linalg.matrix_power(adjacency, power) for power in range(layers + 1)]
        steps = [
            powers[step] @ start + sum((powers[earlier] @ added for earlier in range(step)), 0 * added)
            for step in range(layers + 1)
        ]
        mean = sum(steps, 0 * start) / (layers + 1)
        users.append(mean[:NUM_USERS])
        items.append(mean[NUM_USERS:])
    structure, fused = fuse(network.item_attention, items), fuse(network.content_attention, specific)
    if network.readout == "mlp_ln":
        structure = head(network.structure_head, structure) if network.use_structure else structure
        fused = head(network.content_head, fused) if network.use_content else fused
    else:
        fused = unit_rows(fused)
    combined = network.use_structure * structure + network.use_content * fused
    return fuse(network.user_attention, users), combined


def compare(network: IDSFNetwork, id_weight: float = 0.3) -> None:
    found = network(features_of(network), new_graph())
    users, items = oracle(network, id_weight)
    torch.testing.assert_close(found.users.double(), users, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.items.double(), items, atol=5e-6 if network.readout == "mlp_ln" else 1e-6, rtol=0)


@pytest.mark.parametrize("readout", ["sum_norm", "mlp_ln"])
@pytest.mark.parametrize("modalities", [1, 2, 3])
@pytest.mark.parametrize("num_layers", [0, 1, 2, 3])
def test_users_and_items_equal_the_equations_in_float64(readout: str, modalities: int, num_layers: int) -> None:
    compare(new_network(modalities, num_layers, readout=readout))


ABLATIONS = {
    "shared": {"id_mode": "shared"},
    "no-ids": {"id_mode": "none"},
    "no-content": {"use_content": False},
    "no-structure": {"use_structure": False},
    "no-id-content": {"use_id_content": False},
    "no-ids-in-graph": {"id_weight": 0.0},
    "no-ids-left": {"id_weight": 0.0, "use_id_content": False},
    "mean": {"fusion": "mean"},
    "mean-no-structure": {"fusion": "mean", "use_structure": False},
    "no-content-no-layers": {"use_content": False, "num_layers": 0},
    "one": {"modalities": 1},
    "one-no-ids": {"modalities": 1, "id_mode": "none"},
}
each_ablation = pytest.mark.parametrize("options", ABLATIONS.values(), ids=list(ABLATIONS))
each_readout = pytest.mark.parametrize("readout", ["sum_norm", "mlp_ln"])


@each_readout
@each_ablation
def test_every_ablation_equals_the_equations_in_float64(options: dict[str, Any], readout: str) -> None:
    compare(new_network(**options, readout=readout), options.get("id_weight", 0.3))


@each_readout
@each_ablation
def test_no_ablation_has_a_weight_that_no_gradient_reaches(options: dict[str, Any], readout: str) -> None:
    network = new_network(**options, readout=readout)
    found = network(features_of(network), new_graph(), torch.arange(2), torch.arange(3))
    (found.users.sum() + found.items.square().sum()).backward()
    assert [name for name, weight in network.named_parameters() if weight.grad is None] == []


@pytest.mark.parametrize("modalities", [1, 2, 3])
def test_each_modality_has_three_pairs_of_views_to_contrast_and_one_without_ids(modalities: int) -> None:
    network = new_network(modalities)
    views = network.content(network.project(features_of(network)))
    found = {(id(anchors), id(others)) for anchors, others in views.pairs()}
    expected = set()
    for place in range(modalities):
        specific = id(views.specific[place])
        expected |= {(id(views.projected[place]), specific), (specific, id(views.fused))}
        expected.add((id(network.item_id[place]), specific))
    assert len(views.pairs()) == 3 * modalities and found == expected
    for options in ({"id_mode": "none"}, {"use_id_content": False}):
        network = new_network(modalities, **options)
        views = network.content(network.project(features_of(network)))
        assert len(views.pairs()) == modalities
        assert all(anchors is own for (anchors, _), own in zip(views.pairs(), views.projected, strict=True))


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_the_last_layer_has_its_closed_form(num_layers: int) -> None:
    network = new_network(1, num_layers)
    shorter = new_network(1, num_layers - 1)
    shorter.load_state_dict(network.state_dict(), strict=num_layers > 1)
    projected = network.project(features_of(network))
    means = [x.structure(projected, new_graph())[:, 0].double() for x in (network, shorter)]
    last = means[0] * (num_layers + 1) - means[1] * num_layers
    adjacency = dense_graph()
    start = torch.cat([unit_rows(network.user_preference[0].double()), unit_rows(projected[0].double())])
    assert network.user_id is not None
    ids = torch.cat([network.user_id, network.item_id[0]]).double()
    expected = torch.linalg.matrix_power(adjacency, num_layers) @ start
    for power in range(num_layers):
        expected = expected + 0.3 * torch.linalg.matrix_power(adjacency, power) @ ids
    torch.testing.assert_close(last, expected, atol=5e-6, rtol=0)


def test_the_graph_branch_is_linear_in_the_weight_of_the_ids() -> None:
    network = new_network(2)
    projected, found = network.project(features_of(network)), []
    for weight in (0.0, 0.5, 1.0):
        network.id_weight = weight
        found.append(network.structure(projected, new_graph()))
    torch.testing.assert_close(found[1], (found[0] + found[2]) / 2)
    assert not torch.allclose(found[0], found[2])


@each_readout
@each_ablation
def test_some_users_and_items_are_rows_of_all(options: dict[str, Any], readout: str) -> None:
    network = new_network(**options, readout=readout)
    users, items = torch.tensor([5, 0, 5]), torch.tensor([4, 1])
    every, some = (network(features_of(network), new_graph(), *ids) for ids in ((), (users, items)))
    torch.testing.assert_close(some.users, every.users[users])
    torch.testing.assert_close(some.items, every.items[items])
    if every.content is not None:
        for (first, second), (wanted_first, wanted_second) in zip(
            some.content.pairs(), every.content.pairs(), strict=True
        ):
            torch.testing.assert_close(first, wanted_first[items])
            torch.testing.assert_close(second, wanted_second[items])


def copied(network: IDSFNetwork, plain: PlainIDSF) -> None:
    """Give the network the weights of the plain form."""
    with torch.no_grad():
        assert network.user_id is not None and network.id_attention is not None
        network.user_id.copy_(plain.user_id)
        units = [(network.content_attention, plain.content_attention), (network.item_attention, plain.item_attention)]
        units.append((network.user_attention, plain.user_attention))
        for place, name in enumerate(network.modalities):
            network.user_preference[place].copy_(plain.user_preference[name])
            network.item_id[place].copy_(plain.item_id[name])
            network.projection[place].load_state_dict(plain.projection[name].state_dict())
            units.append((network.id_attention[place], plain.id_attention[name]))  # type: ignore[arg-type]
        for unit, source in units:
            assert unit is not None
            unit.hidden.load_state_dict(source.score[0].state_dict())  # type: ignore[union-attr]
            unit.score.load_state_dict(source.score[2].state_dict())  # type: ignore[union-attr]
        if network.content_head is not None and network.structure_head is not None:
            network.content_head.load_state_dict(plain.content_head.state_dict())
            network.structure_head.load_state_dict(plain.structure_head.state_dict())


@each_readout
def test_with_the_weights_of_the_plain_form_vectors_and_loss_are_its(readout: str) -> None:
    torch.manual_seed(0)
    features = {name: torch.randn(NUM_ITEMS, width) for name, width in WIDTHS.items()}
    plain = PlainIDSF(NUM_USERS, NUM_ITEMS, features, EDGES, HIDDEN, reg_weight=0.1, readout=readout)
    model = IDSF(
        NUM_USERS, NUM_ITEMS, list(WIDTHS), list(WIDTHS.values()), hidden_size=HIDDEN, reg_weight=0.1, readout=readout,
        contrast_scope="all", ks=[2], top_k=2, train_edges=EDGES, features=features,
    )  # fmt: skip
    model.setup("fit")
    copied(model.network, plain)
    wanted, (users, items) = plain(), model.vectors()
    torch.testing.assert_close(users, wanted.users)
    torch.testing.assert_close(items, wanted.items)
    batch = torch.tensor([0, 3, 5, 5]), torch.tensor([1, 3, 2, 0]), torch.tensor([4, 0, 1, 3])
    parts = model.loss_parts(batch[0], batch[1], batch[2][:, None])
    torch.testing.assert_close(torch.stack(list(parts.values())).sum(), plain.loss(*batch))
    torch.testing.assert_close(parts["cl"], 0.3 * plain.contrastive_loss(wanted))


@pytest.mark.parametrize("modalities", [1, 2, 3])
@each_readout
def test_the_number_of_weights_is_that_of_the_formula(modalities: int, readout: str) -> None:
    network, d = new_network(modalities, readout=readout), HIDDEN
    # A unit of attention for each modality, and three across modalities where there are several.
    units = modalities + (3 if modalities > 1 else 0)
    expected = (1 + modalities) * NUM_USERS * d + modalities * NUM_ITEMS * d + units * (d * d + 2 * d)
    expected += sum(d * (WIDTHS[name] + 1) for name in network.modalities)
    expected += 2 * (d * d + 3 * d) if readout == "mlp_ln" else 0
    assert sum(weight.numel() for weight in network.parameters()) == expected


def test_baby_in_the_published_setting_has_ten_million_weights() -> None:
    with torch.device("meta"):
        network = IDSFNetwork(19_445, 7_050, {"image": 4096, "text": 1024})
    assert sum(weight.numel() for weight in network.parameters()) / 1e6 == pytest.approx(10.0, abs=0.05)


@each_readout
def test_new_labels_of_items_permute_their_vectors_and_leave_users_alone(readout: str) -> None:
    network, order = new_network(readout=readout), torch.tensor([3, 0, 4, 1, 2])
    before = network(features_of(network), new_graph())
    features = [values[order] for values in features_of(network)]
    with torch.no_grad():
        for table in network.item_id:
            table.copy_(table[order].clone())
    edges = torch.stack([EDGES[0], order.argsort()[EDGES[1]]])
    after = network(features, BipartiteGraph(edges, NUM_USERS, NUM_ITEMS, "rw_self"))
    torch.testing.assert_close(after.users, before.users)
    torch.testing.assert_close(after.items, before.items[order])


def test_the_order_in_which_modalities_are_named_changes_nothing() -> None:
    found = []
    for names in (["audio", "image", "text"], ["text", "audio", "image"]):
        torch.manual_seed(0)
        network = IDSFNetwork(NUM_USERS, NUM_ITEMS, {name: WIDTHS[name] for name in names}, HIDDEN)
        assert network.modalities == ["audio", "image", "text"]
        found.append(network(features_of(network), new_graph()))
    assert found[0].users.equal(found[1].users) and found[0].items.equal(found[1].items)


def test_sum_norm_adds_content_of_unit_length_to_the_structure() -> None:
    network = new_network()
    without = new_network(use_content=False)
    without.load_state_dict(network.state_dict(), strict=False)
    structure = without(features_of(network), new_graph()).items
    items = network(features_of(network), new_graph()).items
    torch.testing.assert_close((items - structure).norm(dim=1), torch.ones(NUM_ITEMS))


@pytest.mark.parametrize("options", [{}, {"use_content": False}, {"use_structure": False}], ids=["both", "s", "c"])
def test_mlp_ln_starts_with_rows_of_mean_zero(options: dict[str, bool]) -> None:
    network = IDSFNetwork(NUM_USERS, NUM_ITEMS, WIDTHS, 8, readout="mlp_ln", **options)  # type: ignore[arg-type]
    items = network(features_of(network), new_graph()).items
    torch.testing.assert_close(items.mean(1), torch.zeros(NUM_ITEMS), atol=1e-6, rtol=0)
    assert float(items.detach().abs().max()) > 0.5


def test_attention_weights_are_those_of_the_forward_pass_and_sum_to_one() -> None:
    network = new_network(3)
    weights = network.attention_weights(features_of(network), new_graph())
    assert list(weights) == ["id/audio", "id/image", "id/text", "content", "items", "users"]
    for name, values in weights.items():
        assert values.shape == (NUM_USERS if name == "users" else NUM_ITEMS, 2 if name.startswith("id/") else 3)
        torch.testing.assert_close(values.sum(1), torch.ones(len(values)))
    hidden = network.structure(network.project(features_of(network)), new_graph())[:NUM_USERS]
    users = (weights["users"][:, :, None] * hidden).sum(1)
    torch.testing.assert_close(users, network(features_of(network), new_graph()).users)
    views = network.content(network.project(features_of(network)))
    for place, name in enumerate(network.modalities):
        both = torch.stack([views.projected[place], views.ids[place]], dim=1)
        torch.testing.assert_close((weights[f"id/{name}"][:, :, None] * both).sum(1), views.specific[place])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"modalities": 1}, ["id/audio"]),
        ({"modalities": 1, "id_mode": "none"}, []),
        ({"use_content": False}, ["items", "users"]),
        ({"use_structure": False, "use_id_content": False}, ["content", "users"]),
    ],
    ids=["one", "one-no-ids", "no-content", "no-structure"],
)
def test_there_are_weights_only_where_there_is_attention(options: dict[str, Any], expected: list[str]) -> None:
    network = new_network(**options)
    assert list(network.attention_weights(features_of(network), new_graph())) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"readout": "sum"}, "readout must be one of sum_norm, mlp_ln, got 'sum'"),
        ({"id_mode": "some"}, "id_mode must be one of per_modality, shared, none, got 'some'"),
        ({"fusion": "max"}, "fusion must be one of attention, mean, got 'max'"),
        ({"id_weight": -0.1}, "id_weight and num_layers must be at least 0"),
        ({"num_layers": -1}, "id_weight and num_layers must be at least 0"),
        ({"modalities": 0}, "a modality at least; for interactions alone use LightGCN"),
        ({"use_content": False, "use_structure": False}, "use_content and use_structure are both off"),
    ],
    ids=["readout", "id_mode", "fusion", "id_weight", "num_layers", "no-modality", "nothing"],
)
def test_a_wrong_value_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        new_network(**options)
