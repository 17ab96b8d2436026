"""FREEDOM: its equations in float64, the pruning of edges, and what it learns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lightning import Trainer, seed_everything
from torch import Tensor

from tests.zoo.idsf.clusters import NUM_ITEMS, NUM_USERS, Loader, batches, clusters, popularity_recall
from zoo.idsf.freedom import (
    FREEDOM,
    FREEDOMNetwork,
    degree_weights,
    frozen_item_graph,
    kept_edges,
)
from zoo.idsf.graph import BipartiteGraph, item_neighbors


def tiny(**options: object) -> FREEDOM:
    edges, _, features, _ = clusters()
    seed_everything(0, verbose=False)
    model = FREEDOM(
        NUM_USERS, NUM_ITEMS, ["text", "image"], [4, 4], hidden_size=8, num_neighbors=5, ks=[10],
        train_edges=edges, features=features, **options,  # type: ignore[arg-type]
    )  # fmt: skip
    model.setup("fit")
    return model


def dense_item_graph(features: list[Tensor], weights: list[float], k: int) -> Tensor:
    """The item graph by loops: a one for each neighbour, normalised by the sums of rows."""
    total = torch.zeros(len(features[0]), len(features[0]), dtype=torch.float64)
    for values, weight in zip(features, weights, strict=True):
        unit = values.double() / values.double().norm(dim=1, keepdim=True)
        adjacency = torch.zeros_like(total)
        for item in range(len(unit)):
            for other in sorted(range(len(unit)), key=lambda o: -float(unit[item] @ unit[o]))[:k]:
                adjacency[item, other] = 1
        sums = adjacency.sum(1)
        total += weight * adjacency / (sums[:, None] * sums).sqrt()
    return total


def dense_graph(edges: Tensor, num_users: int, num_items: int) -> Tensor:
    adjacency = torch.zeros(num_users + num_items, num_users + num_items, dtype=torch.float64)
    adjacency[edges[0], num_users + edges[1]] = 1
    adjacency[num_users + edges[1], edges[0]] = 1
    degrees = adjacency.sum(1).clamp(min=1)
    return adjacency / (degrees[:, None] * degrees).sqrt()


def test_an_item_is_the_first_of_its_own_neighbors() -> None:
    features = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    ids, cosines = item_neighbors(features, 3)
    assert ids.shape == cosines.shape == (7, 3)
    assert ids[:, 0].tolist() == list(range(7)) and cosines[:, 0].tolist() == [1.0] * 7
    assert bool((cosines.diff(dim=1) <= 1e-6).all()) and all(len(set(row)) == 3 for row in ids.tolist())


def test_the_item_graph_is_the_weighted_sum_of_normalised_neighborhoods() -> None:
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(9, 4, generator=generator), torch.randn(9, 3, generator=generator)]
    graph = frozen_item_graph(features, [0.1, 0.9], 4).to_dense()
    torch.testing.assert_close(graph.double(), dense_item_graph(features, [0.1, 0.9], 4), atol=1e-7, rtol=0)


@pytest.mark.parametrize(("layers", "item_layers"), [(0, 0), (2, 1), (1, 2)])
def test_the_network_equals_its_equations_in_float64(layers: int, item_layers: int) -> None:
    generator = torch.Generator().manual_seed(3)
    features = [torch.randn(6, 4, generator=generator)]
    edges = torch.tensor([[0, 0, 1, 2, 3, 3, 3], [0, 1, 1, 4, 0, 2, 4]])
    network = FREEDOMNetwork(4, 6, [], hidden_size=5, num_layers=layers, num_item_layers=item_layers)
    users, items = network(BipartiteGraph(edges, 4, 6), frozen_item_graph(features, [1.0], 3))
    adjacency, item_graph = dense_graph(edges, 4, 6), dense_item_graph(features, [1.0], 3)
    start = torch.cat([network.user_id, network.item_id]).double()
    mean = torch.stack([torch.linalg.matrix_power(adjacency, power) @ start for power in range(layers + 1)]).mean(0)
    similar = torch.linalg.matrix_power(item_graph, item_layers) @ start[4:]
    torch.testing.assert_close(users.double(), mean[:4], atol=1e-6, rtol=0)
    torch.testing.assert_close(items.double(), mean[4:] + similar, atol=1e-6, rtol=0)


def test_the_weight_of_an_edge_is_one_over_the_root_of_the_product_of_degrees() -> None:
    edges = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 0, 0]])
    expected = [1 / 3, 3**-0.5, 3**-0.5, 3**-0.5, 3**-0.5]
    torch.testing.assert_close(degree_weights(edges), torch.tensor(expected, dtype=torch.float64))


def test_edges_are_kept_as_successive_draws_by_weight_without_replacement_would_keep_them() -> None:
    weights = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    draws = torch.stack(
        [torch.zeros(4).index_fill(0, kept_edges(weights, torch.arange(4), 2, epoch), 1) for epoch in range(4000)]
    )
    share = weights / weights.sum()
    # P(i among two) = p_i + sum over j of p_j p_i / (1 - p_j).
    expected = [
        float(share[i] + sum(share[j] * share[i] / (1 - share[j]) for j in range(4) if j != i)) for i in range(4)
    ]
    assert bool((draws.sum(1) == 2).all())
    torch.testing.assert_close(draws.mean(0), torch.tensor(expected), atol=0.03, rtol=0)


def test_a_draw_depends_on_epoch_and_edge_alone() -> None:
    weights, keys = torch.rand(50, dtype=torch.float64) + 0.1, torch.arange(50) * 7
    first = kept_edges(weights, keys, 10, 3)
    torch.manual_seed(99)
    assert first.equal(kept_edges(weights, keys, 10, 3))
    assert not first.equal(kept_edges(weights, keys, 10, 4))
    order = torch.randperm(50)
    assert set(keys[first].tolist()) == set(keys[order][kept_edges(weights[order], keys[order], 10, 3)].tolist())


def test_pruning_keeps_the_share_and_normalises_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(dropout=0.75)
    assert model.graph is not None
    pruned = model.pruned_graph()
    assert model.graph.num_entries == 2 * 240 and pruned.num_entries == 2 * 60
    left = pruned.to_dense()[:NUM_USERS, NUM_USERS:].nonzero().T
    expected = dense_graph(left, NUM_USERS, NUM_ITEMS)
    torch.testing.assert_close(pruned.to_dense().double(), expected, atol=1e-6, rtol=0)


def test_pruning_is_the_same_within_an_epoch_and_another_in_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = tiny(), tiny()
    epoch = [0]
    monkeypatch.setattr(FREEDOM, "current_epoch", property(lambda _: epoch[0]))
    first = model.pruned_graph()
    assert model.pruned_graph() is first
    epoch[0] = 1
    second = model.pruned_graph()
    assert not second.to_dense().equal(first.to_dense())
    # A run that starts in epoch 1 has the graph of epoch 1.
    assert other.pruned_graph().to_dense().equal(second.to_dense())


def test_edges_of_high_degree_leave_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(dropout=0.5)
    epoch = [0]
    monkeypatch.setattr(FREEDOM, "current_epoch", property(lambda _: epoch[0]))
    kept = torch.zeros(NUM_USERS, NUM_ITEMS)
    for epoch[0] in range(150):
        kept += model.pruned_graph().to_dense()[:NUM_USERS, NUM_USERS:] > 0
    share = kept[model.edges[0], model.edges[1]] / 150
    low, high = model.edge_weights.median() > model.edge_weights, model.edge_weights > model.edge_weights.median()
    assert float(share[high].mean()) > float(share[low].mean()) + 0.04


def test_training_prunes_and_evaluation_has_all_edges() -> None:
    model = tiny(dropout=0.9, reg_weight=0.0)
    assert model.graph is not None
    users, items = model.network(model.graph, model.item_graph)
    found = model.encode()
    assert found[0].equal(users) and found[1].equal(items)
    ids = torch.arange(20), torch.arange(20), torch.arange(20, 40)[:, None]
    users, items = model.network(model.pruned_graph(), model.item_graph)
    expected = -F.logsigmoid((users[ids[0]] * (items[ids[1]] - items[ids[2][:, 0]])).sum(1)).mean()
    torch.testing.assert_close(model.loss_parts(*ids)["bpr"], expected)


def test_without_dropout_training_has_all_edges() -> None:
    model = tiny(dropout=0.0)
    assert model.pruned_graph() is model.graph


def test_projected_features_are_ranked_by_the_users_vectors() -> None:
    model = tiny(reg_weight=0.5)
    users, items = torch.arange(4), torch.arange(4)
    negatives = torch.tensor([[9, 8], [7, 6], [5, 4], [3, 2]])
    vectors, _ = model.network(model.pruned_graph(), model.item_graph)
    total = 0.0
    for layer, values in zip(model.network.projection, model.feature_list(), strict=True):
        projected = layer(values)
        rows = []
        for row in range(4):
            for column in range(2):
                difference = projected[items[row]] - projected[negatives[row, column]]
                rows.append(-F.logsigmoid(vectors[users[row]] @ difference))
        total += float(torch.stack(rows).mean().detach())
    found = model.loss_parts(users, items, negatives)["modalities"].detach()
    assert float(found) == pytest.approx(0.5 * total, rel=1e-5)


@pytest.mark.parametrize("reg_weight", [0.0, 1e-3])
def test_every_weight_has_a_gradient(reg_weight: float) -> None:
    model = tiny(reg_weight=reg_weight)
    parts = model.loss_parts(torch.arange(4), torch.arange(4), torch.arange(4, 8)[:, None])
    torch.stack(list(parts.values())).sum().backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["text", "image"], [0.1, 0.9]),
        (["visual", "text"], [0.9, 0.1]),
        (["text"], [1.0]),
        (["audio", "text"], [0.5, 0.5]),
        (["audio", "image", "text"], [1 / 3] * 3),
    ],
    ids=["image-text", "text-visual", "one", "audio-text", "three"],
)
def test_images_weigh_a_tenth_beside_text_and_all_others_alike(names: list[str], expected: list[float]) -> None:
    model = FREEDOM(20, 20, names, [3] * len(names))
    assert model.modality_weights == pytest.approx(expected)


def test_learns_the_two_groups() -> None:
    edges, targets, _, ranking = clusters()
    model = tiny(lr=0.02, dropout=0.5)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=20, num_sanity_val_steps=0, check_val_every_n_epoch=20,
    )  # fmt: skip
    trainer.fit(model, batches(edges), Loader([ranking]))
    recall = float(trainer.callback_metrics["val/recall@10"])
    assert recall > popularity_recall(edges, targets) + 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modality_weights": [1.0]}, "2 weights of image, text"),
        ({"modality_weights": [0.0, 0.0]}, "not all 0"),
        ({"modality_weights": [-1.0, 2.0]}, "none negative"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"num_neighbors": 1}, "between 2 and num_items=20"),
        ({"num_neighbors": 21}, "between 2 and num_items=20"),
        ({"reg_weight": -1.0}, "reg_weight"),
    ],
    ids=["few-weights", "zero-weights", "negative-weight", "dropout", "one-neighbor", "many-neighbors", "reg"],
)
def test_a_wrong_value_is_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FREEDOM(20, 20, ["image", "text"], [3, 3], **options)  # type: ignore[arg-type]


def test_without_a_modality_the_way_out_is_named() -> None:
    with pytest.raises(ValueError, match="use LightGCN"):
        FREEDOM(20, 20, [], [])
