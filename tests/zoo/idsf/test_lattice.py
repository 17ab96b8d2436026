"""LATTICE: its equations in float64, the reuse of its graph, and what it learns."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning import Callback, Trainer, seed_everything
from torch import Tensor

from tests.zoo.idsf.clusters import NUM_ITEMS, NUM_USERS, Loader, batches, clusters, popularity_recall
from zoo.idsf.graph import BipartiteGraph
from zoo.idsf.lattice import LATTICE, ItemGraph, LATTICENetwork, similarity_graph
from zoo.idsf.sparse import SparseMatrix

QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "num_sanity_val_steps": 0,
}  # fmt: skip


def tiny(**options: object) -> LATTICE:
    edges, _, features, _ = clusters()
    seed_everything(0, verbose=False)
    model = LATTICE(
        NUM_USERS, NUM_ITEMS, ["text", "image"], [4, 4], hidden_size=8, num_neighbors=5, ks=[10],
        train_edges=edges, features=features, **options,  # type: ignore[arg-type]
    )  # fmt: skip
    model.setup("fit")
    return model


def dense(graph: ItemGraph) -> Tensor:
    count = len(graph.ids)
    total = torch.zeros(count, count, dtype=torch.float64)
    for row in range(count):
        for column, value in zip(graph.ids[row].tolist(), graph.values[row].tolist(), strict=True):
            total[row, column] += value
    return total


def dense_similarity(features: Tensor, k: int) -> Tensor:
    """Cosines with the k nearest, the item itself among them; 0 for the others."""
    unit = features.double() / features.double().norm(dim=1, keepdim=True)
    cosines = unit @ unit.T
    return torch.where(cosines >= cosines.sort(dim=1, descending=True).values[:, k - 1 : k], cosines, 0)


def dense_normalized(adjacency: Tensor) -> Tensor:
    scale = torch.diag(adjacency.sum(1) ** -0.5)
    return scale @ adjacency @ scale


def toy() -> tuple[list[Tensor], LATTICENetwork, Tensor]:
    generator = torch.Generator().manual_seed(5)
    # Positive features: cosines, and with them sums of rows, are positive.
    features = [torch.rand(8, 4, generator=generator), torch.rand(8, 3, generator=generator)]
    torch.manual_seed(0)
    network = LATTICENetwork(4, 8, [4, 3], hidden_size=6, num_neighbors=3, skip_weight=0.7)
    with torch.no_grad():
        network.modality_logits.copy_(torch.tensor([0.4, -0.8]))
        for layer in network.projection:
            layer.weight.abs_()
            layer.bias.abs_()
    return features, network, torch.tensor([[0, 0, 1, 2, 3, 3], [0, 1, 5, 2, 3, 7]])


def reference_graph(features: list[Tensor], network: LATTICENetwork) -> Tensor:
    """The item graph by dense matrices in float64, with a gradient for the weights of `network`."""
    weights = network.modality_logits.double().softmax(0)
    learnt, raw = torch.zeros(8, 8, dtype=torch.float64), torch.zeros(8, 8, dtype=torch.float64)
    for weight, layer, values in zip(weights, network.projection, features, strict=True):
        projected = values.double() @ layer.weight.double().T + layer.bias.double()
        learnt = learnt + weight * dense_similarity(projected, 3)
        raw = raw + weight * dense_normalized(dense_similarity(values, 3))
    return 0.3 * dense_normalized(learnt) + 0.7 * raw


def frozen(features: list[Tensor]) -> list[ItemGraph]:
    return [similarity_graph(values, 3).normalized() for values in features]


def test_the_item_graph_equals_its_equations_in_float64() -> None:
    features, network, _ = toy()
    graph = network.item_graph(features, frozen(features))
    assert graph.ids.shape == graph.values.shape == (8, 2 * 2 * 3)
    torch.testing.assert_close(dense(graph), reference_graph(features, network).detach(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("item_layers", [1, 2])
def test_vectors_equal_the_equations_in_float64(item_layers: int) -> None:
    features, network, edges = toy()
    network.num_item_layers = item_layers
    users, items = network(BipartiteGraph(edges, 4, 8, "rw_self"), network.item_graph(features, frozen(features)))
    adjacency = torch.eye(12, dtype=torch.float64)
    adjacency[edges[0], 4 + edges[1]] = adjacency[4 + edges[1], edges[0]] = 1
    adjacency /= adjacency.sum(1, keepdim=True)
    start = torch.cat([network.user_id, network.item_id]).double()
    mean = (start + adjacency @ start + adjacency @ adjacency @ start) / 3
    similar = torch.linalg.matrix_power(reference_graph(features, network), item_layers) @ start[4:]
    torch.testing.assert_close(users.double(), mean[:4], atol=1e-6, rtol=0)
    torch.testing.assert_close(items.double(), mean[4:] + F.normalize(similar, dim=1), atol=1e-6, rtol=0)


def test_the_gradient_through_the_graph_equals_that_of_dense_matrices() -> None:
    features, network, _ = toy()
    towards = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    (network.item_graph(features, frozen(features)).smooth(network.item_id) * towards).sum().backward()
    other = copy.deepcopy(network)
    other.zero_grad()
    ((reference_graph(features, other) @ other.item_id.double()) * towards).sum().backward()
    for (name, mine), theirs in zip(network.named_parameters(), other.parameters(), strict=True):
        if name != "user_id":
            assert mine.grad is not None and float(mine.grad.abs().max()) > 1e-5, name
            torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_a_graph_kept_as_a_constant_smooths_alike() -> None:
    features, network, _ = toy()
    graph = network.item_graph(features, frozen(features))
    torch.testing.assert_close(graph.constant().matmul(network.item_id), graph.smooth(network.item_id))


def test_a_row_whose_sum_is_not_positive_is_empty() -> None:
    values = torch.tensor([[1.0, -1.0], [1.0, 0.5]], requires_grad=True)
    graph = ItemGraph(torch.tensor([[0, 1], [1, 0]]), values).normalized()
    assert graph.values[0].tolist() == [0, 0] and graph.values[1].tolist() == pytest.approx([1 / 1.5, 0])
    graph.values.sum().backward()
    assert values.grad is not None and bool(values.grad.isfinite().all())


def train_step(model: LATTICE, batch_idx: int) -> float:
    """Gradients and loss of one batch, as a trainer would have them."""
    model.zero_grad()
    model._builds_graph = batch_idx == 0
    parts = model.loss_parts(torch.arange(6), torch.arange(6), torch.arange(20, 26)[:, None])
    loss = torch.stack(list(parts.values())).sum()
    loss.backward()
    return float(loss.detach())


def test_the_first_batch_builds_the_graph_and_the_others_reuse_it() -> None:
    model = tiny(skip_weight=0.2)
    assert float(model.kept_values.abs().sum()) == 0
    first = train_step(model, 0)
    kept = model.kept_values.clone()
    graph = model.item_graph()
    assert kept.equal(graph.values) and model.kept_ids.equal(graph.ids)
    assert float(model.network.projection[0].weight.grad.abs().max()) > 0
    # The same weights, so the same loss, but no gradient for what made the graph.
    assert train_step(model, 1) == pytest.approx(first, rel=1e-6)
    assert float(model.network.projection[0].weight.grad.abs().max()) == 0
    assert float(model.network.item_id.grad.abs().max()) > 0
    with torch.no_grad():
        for layer in model.network.projection:
            layer.weight.normal_()
    train_step(model, 2)
    assert model.kept_values.equal(kept)
    assert isinstance(model.kept_graph, SparseMatrix)
    train_step(model, 0)
    assert not model.kept_values.equal(kept) and model.kept_graph is None
    renewed = train_step(model, 1)
    assert renewed != pytest.approx(first, rel=1e-6)


def test_the_trainer_builds_the_graph_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    edges, _, _, ranking = clusters()
    model, built = tiny(), []
    original = model.item_graph
    monkeypatch.setattr(model, "item_graph", lambda: built.append(model.global_step) or original())
    Trainer(max_epochs=2, limit_val_batches=0, **QUIET).fit(model, batches(edges), Loader([ranking]))
    assert built == [0, 4]


@pytest.mark.parametrize("batch_idx", [0, 1])
def test_every_weight_has_a_gradient_in_every_batch(batch_idx: int) -> None:
    model = tiny()
    train_step(model, batch_idx)
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


def test_evaluation_builds_the_graph_of_the_weights_as_they_are() -> None:
    model = tiny(skip_weight=0.0)
    train_step(model, 0)
    kept, before = model.kept_values.clone(), model.encode()[1].detach()
    with torch.no_grad():
        for layer in model.network.projection:
            layer.weight.normal_()
    assert not model.encode()[1].allclose(before)
    assert model.kept_values.equal(kept)


def test_a_run_resumed_in_mid_epoch_ends_with_the_same_weights(tmp_path: Any) -> None:
    edges, _, _, ranking = clusters()
    whole, part, resumed = (tiny(lr=0.05, skip_weight=0.2) for _ in range(3))
    Trainer(max_epochs=3, limit_val_batches=0, **QUIET).fit(whole, batches(edges), Loader([ranking]))
    saving = SaveAt(6, tmp_path / "middle.ckpt")
    Trainer(max_steps=7, limit_val_batches=0, callbacks=[saving], **QUIET).fit(
        part, StatefulLoader(batches(edges)), Loader([ranking])
    )
    # Other weights at the start, so that nothing but the checkpoint can have made the graph.
    with torch.no_grad():
        for weight in resumed.parameters():
            weight.normal_()
    train_step(resumed, 0)
    train_step(resumed, 1)
    loader = StatefulLoader(batches(edges))
    Trainer(max_epochs=3, limit_val_batches=0, **QUIET).fit(
        resumed, loader, Loader([ranking]), ckpt_path=str(tmp_path / "middle.ckpt"), weights_only=True
    )
    for (name, mine), theirs in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert mine.equal(theirs), name


class SaveAt(Callback):
    def __init__(self, step: int, path: Any) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class StatefulLoader:
    """Begins after the second batch, once, when it is restored."""

    def __init__(self, batches: Loader) -> None:
        self.batches, self.skip = batches, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        skip, self.skip = self.skip, 0
        yield from self.batches[skip:]

    def state_dict(self) -> dict[str, Any]:
        return {"skip": 2}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skip = state["skip"]


def test_learns_the_two_groups() -> None:
    edges, targets, _, ranking = clusters()
    model = tiny(lr=0.02)
    trainer = Trainer(max_epochs=15, check_val_every_n_epoch=15, **QUIET)
    trainer.fit(model, batches(edges), Loader([ranking]))
    recall = float(trainer.callback_metrics["val/recall@10"])
    assert recall > popularity_recall(edges, targets) + 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "none"}, "norm must be one of sym"),
        ({"skip_weight": 1.5}, "skip_weight must be in"),
        ({"num_neighbors": 1}, "between 2 and num_items=20"),
        ({"num_neighbors": 21}, "between 2 and num_items=20"),
        ({"num_item_layers": 0}, "num_item_layers"),
        ({"reg_weight": -1.0}, "reg_weight"),
    ],
    ids=["norm", "skip", "one-neighbor", "many-neighbors", "item-layers", "reg"],
)
def test_a_wrong_value_is_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LATTICE(20, 20, ["image", "text"], [3, 3], **options)  # type: ignore[arg-type]


def test_without_a_modality_the_way_out_is_named() -> None:
    with pytest.raises(ValueError, match="use LightGCN"):
        LATTICE(20, 20, [], [])
