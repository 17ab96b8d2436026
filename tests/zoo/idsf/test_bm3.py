"""BM3: its equations in float64, its losses by hand, and what it learns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lightning import Trainer, seed_everything
from torch import Tensor

from tests.zoo.idsf.clusters import NUM_ITEMS, NUM_USERS, Loader, batches, clusters, popularity_recall
from zoo.idsf.bm3 import BM3, BM3Network, cosine_distance
from zoo.idsf.graph import BipartiteGraph


def tiny(**options: object) -> BM3:
    edges, _, features, _ = clusters()
    seed_everything(0, verbose=False)
    model = BM3(
        NUM_USERS, NUM_ITEMS, ["text", "image"], [4, 4], hidden_size=8, ks=[10],
        train_edges=edges, features=features, **options,  # type: ignore[arg-type]
    )  # fmt: skip
    model.setup("fit")
    return model


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_the_network_equals_its_equations_in_float64(layers: int) -> None:
    edges = torch.tensor([[0, 0, 1, 2, 3, 3, 3], [0, 1, 1, 4, 0, 2, 4]])
    network = BM3Network(4, 6, [], hidden_size=5, num_layers=layers)
    users, items = network(BipartiteGraph(edges, 4, 6))
    adjacency = torch.zeros(10, 10, dtype=torch.float64)
    adjacency[edges[0], 4 + edges[1]] = adjacency[4 + edges[1], edges[0]] = 1
    degrees = adjacency.sum(1).clamp(min=1)
    adjacency /= (degrees[:, None] * degrees).sqrt()
    start = torch.cat([network.user_id, network.item_id]).double()
    mean = torch.stack([torch.linalg.matrix_power(adjacency, power) @ start for power in range(layers + 1)]).mean(0)
    torch.testing.assert_close(users.double(), mean[:4], atol=1e-6, rtol=0)
    torch.testing.assert_close(items.double(), mean[4:] + start[4:], atol=1e-6, rtol=0)


def test_losses_equal_those_by_hand_in_float64() -> None:
    torch.manual_seed(1)
    network = BM3Network(4, 6, [3, 2], hidden_size=5, dropout=0.0).double()
    users, items = torch.randn(7, 5).double(), torch.randn(7, 5).double()
    features = [torch.randn(7, 3).double(), torch.randn(7, 2).double()]
    losses = network.losses(users, items, features)
    predict = network.predictor
    reconstruction = (1 - cosine(predict(users), items)).mean() + (1 - cosine(predict(items), users)).mean()
    inter = intra = torch.zeros(())
    for layer, values in zip(network.projection, features, strict=True):
        projected = layer(values)
        inter = inter + (1 - cosine(predict(projected), items)).mean()
        intra = intra + (1 - cosine(predict(projected), projected)).mean()
    for mine, theirs in zip(losses, (reconstruction, inter, intra), strict=True):
        assert float(mine.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)


def test_the_module_weighs_the_losses_and_adds_the_norms() -> None:
    model = tiny(dropout=0.0, cl_weight=3.0, reg_weight=0.5)
    users, items = torch.tensor([0, 1, 5]), torch.tensor([3, 30, 3])
    all_users, all_items = (part.detach() for part in model.network(model.graph))
    losses = model.network.losses(all_users[users], all_items[items], [x[items] for x in model.feature_list()])
    parts = {name: float(part.detach()) for name, part in model.loss_parts(users, items, items[:, None]).items()}
    expected = {
        "reconstruction": float(losses.reconstruction.detach()),
        "inter": 3 * float(losses.inter.detach()),
        "intra": 3 * float(losses.intra.detach()),
        "reg": 0.5 * float(all_users.square().sum().sqrt() + all_items.square().sum().sqrt()) / NUM_ITEMS,
    }
    assert parts == pytest.approx(expected, rel=1e-5)


def test_no_gradient_goes_through_the_target() -> None:
    online, target = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    cosine_distance(online, target).backward()
    assert online.grad is not None and target.grad is None
    assert float(cosine_distance(online, 5 * online).detach()) == pytest.approx(0, abs=1e-6)
    assert float(cosine_distance(online, -online).detach()) == pytest.approx(2, abs=1e-6)


def test_without_dropout_negatives_and_chance_play_no_part() -> None:
    model = tiny(dropout=0.0)
    ids = torch.arange(5)
    first = model.loss_parts(ids, ids, ids[:, None])
    second = model.loss_parts(ids, ids, ids[:, None] + 9)
    assert all(first[name].equal(second[name]) for name in first)


def test_dropout_leaves_entries_out_of_targets_in_training_alone() -> None:
    network = BM3Network(4, 6, [3], hidden_size=5, dropout=0.5)
    users, items, features = torch.randn(9, 5), torch.randn(9, 5), [torch.randn(9, 3)]
    plain = network.eval().losses(users, items, features)
    network.train()
    torch.manual_seed(4)
    dropped = network.losses(users, items, features)
    torch.manual_seed(4)
    user_target, item_target = F.dropout(users, 0.5), F.dropout(items, 0.5)
    projected = network.projection[0](features[0])
    feature_target = F.dropout(projected, 0.5)
    predict = network.predictor
    expected = cosine_distance(predict(users), item_target) + cosine_distance(predict(items), user_target)
    torch.testing.assert_close(dropped.reconstruction, expected)
    torch.testing.assert_close(dropped.inter, cosine_distance(predict(projected), item_target))
    torch.testing.assert_close(dropped.intra, cosine_distance(predict(projected), feature_target))
    assert all(not a.equal(b) for a, b in zip(plain, dropped, strict=True))


def test_scores_are_of_predicted_vectors() -> None:
    model = tiny()
    users, items = model.network(model.graph)
    expected = model.network.predictor(users)[2] @ model.network.predictor(items)[7]
    torch.testing.assert_close(model(torch.tensor([2]), torch.tensor([7])), expected[None].detach())


@pytest.mark.parametrize("weights", [(2.0, 0.1), (0.0, 0.0)])
def test_every_weight_has_a_gradient(weights: tuple[float, float]) -> None:
    model = tiny(cl_weight=weights[0], reg_weight=weights[1])
    ids = torch.arange(5)
    torch.stack(list(model.loss_parts(ids, ids, ids[:, None]).values())).sum().backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


def test_learns_the_two_groups() -> None:
    edges, targets, _, ranking = clusters()
    model = tiny(lr=0.01)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=15, num_sanity_val_steps=0, check_val_every_n_epoch=15,
    )  # fmt: skip
    trainer.fit(model, batches(edges), Loader([ranking]))
    recall = float(trainer.callback_metrics["val/recall@10"])
    assert recall > popularity_recall(edges, targets) + 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 1.0}, "dropout must be in"),
        ({"cl_weight": -1.0}, "cl_weight"),
        ({"reg_weight": -1.0}, "reg_weight"),
        ({"num_layers": -1}, "num_layers"),
    ],
    ids=["dropout", "cl", "reg", "layers"],
)
def test_a_wrong_value_is_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BM3(20, 20, ["image", "text"], [3, 3], **options)  # type: ignore[arg-type]


def test_without_a_modality_the_way_out_is_named() -> None:
    with pytest.raises(ValueError, match="use LightGCN"):
        BM3(20, 20, [], [])
