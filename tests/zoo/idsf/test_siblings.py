"""The recommenders beside IDSF: matrix factorisation, LightGCN and VBPR, against loops in float64."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from zoo.idsf.bprmf import BPRMF
from zoo.idsf.graph import BipartiteGraph
from zoo.idsf.lightgcn import LightGCN, light_convolution
from zoo.idsf.vbpr import VBPR

if TYPE_CHECKING:
    from zoo.idsf.recommender import TopNRecommender

NUM_USERS, NUM_ITEMS, HIDDEN = 5, 6, 3
# User 4 and item 5 have nobody.
EDGES = torch.tensor([[0, 0, 1, 2, 2, 3], [0, 1, 1, 2, 3, 4]])
SIZES = {"image": 4, "text": 2}
USERS, ITEMS = torch.tensor([0, 3, 2]), torch.tensor([1, 4, 1])
NEGATIVES = torch.tensor([[2, 5], [1, 0], [5, 5]])


def features() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(NUM_ITEMS, width, generator=generator) for name, width in SIZES.items()}


def new_model(kind: type[TopNRecommender], **options: Any) -> Any:
    torch.manual_seed(0)
    given: dict[str, Any] = {"hidden_size": HIDDEN, "ks": [2], "top_k": 2, "train_edges": EDGES, "reg_weight": 0.2}
    if kind is VBPR:
        given |= {"modalities": list(SIZES), "feature_sizes": list(SIZES.values()), "features": features()}
    model = kind(num_users=NUM_USERS, num_items=NUM_ITEMS, **given | options)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.7)
    model.setup("fit")
    return model


def dense(table: Tensor) -> Tensor:
    return table.detach().double()


def light_vectors(model: Any) -> Tensor:
    """Mean over the layers, node by node."""
    neighbors: dict[int, list[int]] = {node: [] for node in range(NUM_USERS + NUM_ITEMS)}
    for user, item in EDGES.T.tolist():
        neighbors[user].append(NUM_USERS + item)
        neighbors[NUM_USERS + item].append(user)
    layers = [list(torch.cat([dense(model.user_id), dense(model.item_id)]))]
    for _ in range(model.num_layers):
        layer = []
        for others in neighbors.values():
            total = torch.zeros(HIDDEN, dtype=torch.float64)
            for other in others:
                total += layers[-1][other] / math.sqrt(len(others) * len(neighbors[other]))
            layer.append(total)
        layers.append(layer)
    return torch.stack([sum(rows) / len(rows) for rows in zip(*layers, strict=True)])


def projected_items(model: Any) -> Tensor:
    """[ID ; W x + b], item by item, for x = [image ; text]."""
    rows = []
    for item in range(NUM_ITEMS):
        x = torch.cat([features()[name][item] for name in ("image", "text")]).double()
        rows.append(torch.cat([dense(model.item_id)[item], dense(model.projection.weight) @ x]))
    return torch.stack(rows)


def expected_parts(users: Tensor, items: Tensor, own_users: Tensor, own_items: Tensor) -> dict[str, float]:
    """BPR of final vectors and the penalty on `own_*`, row by row."""
    ranking = penalty = 0.0
    for row in range(3):
        user, positive = int(USERS[row]), int(ITEMS[row])
        penalty += float(own_users[user] @ own_users[user] + own_items[positive] @ own_items[positive]) / 2
        for negative in NEGATIVES[row].tolist():
            ranking += math.log1p(math.exp(-float(users[user] @ (items[positive] - items[negative])))) / 2
            penalty += float(own_items[negative] @ own_items[negative]) / 4
    return {"bpr": ranking / 3, "reg": 0.2 * penalty / 3}


def compare(model: Any, users: Tensor, items: Tensor, own_users: Tensor, own_items: Tensor) -> None:
    found_users, found_items = model.vectors()
    assert found_users.dtype == found_items.dtype == torch.float32
    assert not found_users.requires_grad and not found_items.requires_grad
    torch.testing.assert_close(found_users.double(), users, atol=1e-6, rtol=0)
    torch.testing.assert_close(found_items.double(), items, atol=1e-6, rtol=0)
    parts = {name: float(part.detach()) for name, part in model.loss_parts(USERS, ITEMS, NEGATIVES).items()}
    assert parts == pytest.approx(expected_parts(users, items, own_users, own_items), rel=1e-5)


def test_matrix_factorisation_is_its_two_tables() -> None:
    model = new_model(BPRMF)
    users, items = dense(model.user_id), dense(model.item_id)
    compare(model, users, items, users, items)


@pytest.mark.parametrize("num_layers", [0, 1, 3])
def test_lightgcn_is_the_mean_over_layers_and_penalises_the_ids_before_them(num_layers: int) -> None:
    model = new_model(LightGCN, num_layers=num_layers)
    every = light_vectors(model)
    compare(model, every[:NUM_USERS], every[NUM_USERS:], dense(model.user_id), dense(model.item_id))


def test_lightgcn_has_the_norm_that_it_is_given() -> None:
    model = new_model(LightGCN, norm="rw_self", num_layers=2)
    graph = BipartiteGraph(EDGES, NUM_USERS, NUM_ITEMS, "rw_self").to_dense()
    start = torch.cat([model.user_id, model.item_id])
    expected = (start + graph @ start + graph @ graph @ start) / 3
    torch.testing.assert_close(torch.cat(model.vectors()), expected.detach())


def test_the_light_convolution_can_be_used_alone() -> None:
    x, graph = torch.randn(11, 2), BipartiteGraph(EDGES, NUM_USERS, NUM_ITEMS)
    assert light_convolution(x, graph, 0).equal(x)
    torch.testing.assert_close(light_convolution(x, graph, 1), (x + graph.to_dense() @ x) / 2)


def test_vbpr_joins_ids_and_projected_features() -> None:
    model = new_model(VBPR)
    users, items = dense(model.user_id), projected_items(model)
    assert users.shape[1] == items.shape[1] == 2 * HIDDEN
    compare(model, users, items, users, items)


def test_vbpr_projects_each_item_of_a_batch_once() -> None:
    model, rows = new_model(VBPR), []

    def count(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        rows.append(len(inputs[0]))

    model.projection.register_forward_hook(count)
    model.loss_parts(USERS, ITEMS, NEGATIVES)
    assert rows == [len({*ITEMS.tolist(), *NEGATIVES.flatten().tolist()})]


def test_the_order_of_the_modalities_of_vbpr_changes_nothing() -> None:
    first = new_model(VBPR)
    second = new_model(VBPR, modalities=["text", "image"], feature_sizes=[2, 4])
    for found, wanted in zip(second.vectors(), first.vectors(), strict=True):
        assert found.equal(wanted)


@pytest.mark.parametrize("kind", [BPRMF, LightGCN, VBPR])
def test_every_weight_has_a_gradient(kind: type[TopNRecommender]) -> None:
    model = new_model(kind)
    sum(model.loss_parts(USERS, ITEMS, NEGATIVES).values()).backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


@pytest.mark.parametrize("kind", [BPRMF, LightGCN, VBPR])
def test_under_autocast_vectors_stay_float32_and_the_loss_is_close(kind: type[TopNRecommender]) -> None:
    model = new_model(kind)
    users, items = model.vectors()
    full = model.loss_parts(USERS, ITEMS, NEGATIVES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(found.equal(wanted) for found, wanted in zip(model.vectors(), (users, items), strict=True))
        half = model.loss_parts(USERS, ITEMS, NEGATIVES)
    for name, part in full.items():
        torch.testing.assert_close(half[name], part, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("kind", [BPRMF, LightGCN, VBPR])
def test_in_double_precision_losses_and_scores_are_close(kind: type[TopNRecommender]) -> None:
    model = new_model(kind)
    losses, scores = model.loss_parts(USERS, ITEMS, NEGATIVES), model.recommend(USERS, 3)[1]
    model.double()
    for name, part in model.loss_parts(USERS, ITEMS, NEGATIVES).items():
        torch.testing.assert_close(part, losses[name], check_dtype=False)
    torch.testing.assert_close(model.recommend(USERS, 3)[1], scores, check_dtype=False)


@pytest.mark.parametrize("kind", [BPRMF, LightGCN, VBPR])
def test_the_best_items_are_those_of_the_largest_scores(kind: type[TopNRecommender]) -> None:
    model = new_model(kind)
    users, items = model.vectors()
    found, scores = model.recommend(torch.tensor([2, 0]), 3, seen=EDGES)
    for row, user in enumerate([2, 0]):
        seen = set(EDGES[1][EDGES[0] == user].tolist())
        rated = {item: float(users[user] @ items[item]) for item in range(NUM_ITEMS) if item not in seen}
        expected = sorted(rated, key=lambda item: -rated[item])[:3]
        assert found[row].tolist() == expected
        assert scores[row].tolist() == pytest.approx([rated[item] for item in expected], abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (BPRMF, {"reg_weight": -1.0}, "reg_weight must be at least 0"),
        (BPRMF, {"hidden_size": 0}, "hidden_size 1, got 0.2 and 0"),
        (LightGCN, {"norm": "left"}, "norm must be one of sym, sym_self, rw, rw_self, got 'left'"),
        (LightGCN, {"num_layers": -1}, "num_layers must be at least 0"),
        (VBPR, {"reg_weight": -1.0}, "reg_weight must be at least 0"),
        (VBPR, {"modalities": [], "feature_sizes": []}, "a modality at least; for interactions alone use BPRMF"),
    ],
    ids=["mf-reg", "mf-size", "lightgcn-norm", "lightgcn-layers", "vbpr-reg", "vbpr-no-modality"],
)
def test_a_wrong_value_is_named(kind: type[TopNRecommender], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        new_model(kind, **options)


def test_without_interactions_the_way_out_is_named_without_features() -> None:
    model = LightGCN(NUM_USERS, NUM_ITEMS, ks=[2], top_k=2)
    with pytest.raises(ValueError, match=r"training interactions: train it .* or pass train_edges= to the constructor"):
        model.setup("fit")
