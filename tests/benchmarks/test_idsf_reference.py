"""The plain form of IDSF computes what the equations say, and its sampler and evaluation what they promise."""

import math
from collections.abc import Collection

import pytest
import torch
from torch import Tensor

from benchmarks.reference.idsf import (
    PlainAttention,
    PlainIDSF,
    PlainSampler,
    all_item_nce,
    evaluate,
    ndcg_of_hits,
    row_normalised_graph,
    train_step,
)
from zoo.common.ranking import FullRankingMetrics

NUM_USERS, NUM_ITEMS, HIDDEN = 12, 9, 6
WIDTHS = {"text": 5, "image": 4, "audio": 3}
# Every user has one to four items; user 11 and item 8 have none.
EDGES = torch.tensor([(u, (u * step + step) % 8) for u in range(11) for step in range(1, 2 + u % 4)]).unique(dim=0).T


def new_model(modalities: Collection[str] = ("text", "image"), **options: object) -> PlainIDSF:
    """A float64 model with parameters far from their small initial values."""
    torch.manual_seed(0)
    features = {m: torch.randn(NUM_ITEMS, WIDTHS[m]) for m in modalities}
    model = PlainIDSF(NUM_USERS, NUM_ITEMS, features, EDGES, HIDDEN, **options)  # type: ignore[arg-type]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.7
    model = model.double()
    # Rows exact to float64: a graph of float32 reciprocals is not.
    model.adjacency = dense_graph().to_sparse_coo()
    return model


def dense_graph() -> Tensor:
    """D^-1 (A + I), entry by entry, as float64."""
    total = NUM_USERS + NUM_ITEMS
    dense = torch.zeros(total, total, dtype=torch.float64)
    for user, item in EDGES.T.tolist():
        dense[user, NUM_USERS + item] = dense[NUM_USERS + item, user] = 1
    for node in range(total):
        dense[node, node] = 1
        dense[node] /= dense[node].sum()
    return dense


def unit(row: Tensor) -> Tensor:
    return row / (row * row).sum().sqrt()


def mixed_rows(unit_of: PlainAttention, inputs: list[Tensor]) -> Tensor:
    """Attention row by row."""
    weight, bias, last = unit_of.score[0].weight, unit_of.score[0].bias, unit_of.score[2].weight[0]
    rows = []
    for row in range(len(inputs[0])):
        powers = [torch.exp(last @ torch.tanh(weight @ x[row] + bias)) for x in inputs]
        rows.append(sum(power / sum(powers) * x[row] for power, x in zip(powers, inputs, strict=True)))
    return torch.stack(rows)


def nce_by_pairs(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """The mean of l_i, similarity by similarity."""
    a, b = [unit(row) for row in first], [unit(row) for row in second]
    losses = []
    for i in range(len(a)):
        below = sum(torch.exp(a[i] @ row / temperature) for row in b)
        below = below + sum(torch.exp(a[i] @ a[j] / temperature) for j in range(len(a)) if j != i)
        losses.append(-torch.log(torch.exp(a[i] @ b[i] / temperature) / below))
    return sum(losses) / len(losses)


def head_rows(head: torch.nn.Sequential, x: Tensor) -> Tensor:
    rows = []
    for row in x:
        y = (head[0].weight @ row + head[0].bias).clamp(min=0)
        rows.append((y - y.mean()) / torch.sqrt(((y - y.mean()) ** 2).mean() + 1e-6) * head[2].weight + head[2].bias)
    return torch.stack(rows)


def brute_force(model: PlainIDSF, batch: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Users, items and loss from the equations: dense matrices, powers of the graph, loops over rows and pairs."""
    graph = dense_graph()
    projected, corrected, by_users, by_items = {}, {}, [], []
    for m in model.modalities:
        weight, bias = model.projection[m].weight, model.projection[m].bias
        projected[m] = torch.stack([weight @ row + bias for row in model.features[m]])
        corrected[m] = mixed_rows(model.id_attention[m], [projected[m], model.item_id[m]])
    content = mixed_rows(model.content_attention, [corrected[m] for m in model.modalities])
    for m in model.modalities:
        start = torch.stack([unit(row) for row in [*model.user_preference[m], *projected[m]]])
        ids = torch.cat([model.user_id, model.item_id[m]])
        total = torch.zeros_like(start)
        for layer in range(model.num_layers + 1):
            # e^(l) = A^l e^(0) + gamma sum_{k<l} A^k ids
            total = total + torch.linalg.matrix_power(graph, layer) @ start
            for power in range(layer):
                total = total + model.id_weight * torch.linalg.matrix_power(graph, power) @ ids
        mean = total / (model.num_layers + 1)
        by_users.append(mean[:NUM_USERS])
        by_items.append(mean[NUM_USERS:])
    users, structure = mixed_rows(model.user_attention, by_users), mixed_rows(model.item_attention, by_items)
    if model.readout == "sum_norm":
        items = torch.stack([s + unit(f) for s, f in zip(structure, content, strict=True)])
    else:
        items = head_rows(model.structure_head, structure) + head_rows(model.content_head, content)
    loss = torch.zeros((), dtype=torch.float64)
    for user, positive, negative in batch:
        u, i, j = users[user], items[positive], items[negative]
        loss = loss + torch.log(1 + torch.exp(u @ j - u @ i)) / len(batch)
        loss = loss + model.reg_weight / (2 * len(batch)) * (u @ u + i @ i + j @ j)
    for m in model.modalities:
        terms = [(projected[m], corrected[m]), (model.item_id[m], corrected[m]), (corrected[m], content)]
        loss = loss + model.cl_weight * sum(nce_by_pairs(*views, model.temperature) for views in terms)
    return users, items, loss


@pytest.mark.parametrize("readout", ["sum_norm", "mlp_ln"])
@pytest.mark.parametrize("num_layers", [0, 1, 3])
@pytest.mark.parametrize("num_modalities", [1, 2, 3])
def test_embeddings_loss_and_gradients_are_those_of_the_equations(
    readout: str, num_layers: int, num_modalities: int
) -> None:
    model = new_model(
        list(WIDTHS)[:num_modalities],
        readout=readout,
        num_layers=num_layers,
        id_weight=0.4,
        cl_weight=0.6,
        reg_weight=0.2,
        temperature=0.3,
        block=4,
    )
    batch = [(0, 1, 5), (3, 4, 8), (7, 2, 0), (3, 6, 1), (11, 0, 8)]
    users, items, expected = brute_force(model, batch)
    output = model()
    torch.testing.assert_close(output.users, users, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(output.items, items, rtol=1e-10, atol=1e-10)
    loss = model.loss(*torch.tensor(batch).T)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    parameters = dict(model.named_parameters())
    assert sum(name.startswith("features.") for name in parameters) == num_modalities
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    wanted = torch.autograd.grad(expected, list(parameters.values()), allow_unused=True)
    for name, one, other in zip(parameters, found, wanted, strict=True):
        if num_layers == 0 and name == "user_id":
            assert one is None and other is None
        else:
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_graph_has_rows_of_means_over_neighbours_and_oneself() -> None:
    graph = row_normalised_graph(EDGES, NUM_USERS, NUM_ITEMS)
    assert graph.layout == torch.sparse_coo
    torch.testing.assert_close(graph.to_dense(), dense_graph().float())


@pytest.mark.parametrize("block", [1, 4, 9, 4096])
def test_blocks_of_anchors_change_nothing(block: int) -> None:
    first, second = torch.randn(2, 9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(all_item_nce(first, second, 0.5, block), nce_by_pairs(first, second, 0.5))


def test_parameters_are_as_many_as_the_published_model_has() -> None:
    for readout, heads in (("sum_norm", 0), ("mlp_ln", 2 * (HIDDEN**2 + 3 * HIDDEN))):
        model = new_model(readout=readout)
        tables = 3 * NUM_USERS * HIDDEN + 2 * NUM_ITEMS * HIDDEN + NUM_ITEMS * (5 + 4)
        layers = HIDDEN * (5 + 1) + HIDDEN * (4 + 1) + 5 * (HIDDEN**2 + 2 * HIDDEN)
        assert sum(p.numel() for p in model.parameters()) == tables + layers + heads


@pytest.mark.parametrize("trainable_features", [True, False])
def test_steps_lower_the_loss_and_train_the_features_if_asked(trainable_features: bool) -> None:
    model = new_model(trainable_features=trainable_features).float()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    features = model.features["text"].detach().clone()
    batch = PlainSampler(EDGES, NUM_ITEMS).sample(8)
    first = model.loss(*batch).item()
    losses = [train_step(model, optimizer, *batch) for _ in range(20)]
    assert losses[0] == pytest.approx(first, rel=1e-6)
    assert losses[-1] < 0.9 * first
    assert (not torch.equal(model.features["text"], features)) is trainable_features


def test_unknown_readout_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'sum_norm' or 'mlp_ln', got 'concat'"):
        new_model(readout="concat")


def test_batches_hold_distinct_users_an_item_of_each_and_one_it_lacks() -> None:
    sampler = PlainSampler(EDGES, NUM_ITEMS, seed=3)
    pairs = set(map(tuple, EDGES.T.tolist()))
    users_seen, positives_seen = set(), set()
    for _ in range(300):
        users, positive, negative = (ids.tolist() for ids in sampler.sample(7))
        assert len(set(users)) == len(users) == 7
        assert all(pair in pairs for pair in zip(users, positive, strict=True))
        assert not any(pair in pairs for pair in zip(users, negative, strict=True))
        users_seen.update(users)
        positives_seen.update(zip(users, positive, strict=True))
    assert users_seen == set(range(11))
    assert positives_seen == pairs


def test_users_repeat_where_the_batch_is_larger_than_they_are_many() -> None:
    users, positive, negative = PlainSampler(EDGES, NUM_ITEMS).sample(40)
    assert len(users) == len(positive) == len(negative) == 40
    assert set(users.tolist()) <= set(range(11))


def test_negatives_are_uniform_over_what_the_user_lacks() -> None:
    edges = torch.tensor([[0, 0, 0], [1, 4, 7]])
    sampler = PlainSampler(edges, NUM_ITEMS, seed=1)
    draws = 6000
    counts = torch.bincount(sampler.sample(draws)[2], minlength=NUM_ITEMS).double()
    allowed = [0, 2, 3, 5, 6, 8]
    assert counts.sum() == counts[allowed].sum()
    chi_square = ((counts[allowed] - draws / 6) ** 2 / (draws / 6)).sum()
    # The 99.9th percentile of chi-square with 5 degrees of freedom.
    assert chi_square < 20.5


def test_seed_fixes_the_batches() -> None:
    first, again, other = (PlainSampler(EDGES, NUM_ITEMS, seed).sample(10) for seed in (4, 4, 5))
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


def test_user_with_every_item_is_refused_instead_of_drawn_for_ever() -> None:
    edges = torch.stack([torch.full((NUM_ITEMS,), 2), torch.arange(NUM_ITEMS)])
    with pytest.raises(ValueError, match="no negative exists for user 2, who has all 9 items"):
        PlainSampler(edges, NUM_ITEMS)


def test_lists_of_hits_are_compared_with_their_best_order() -> None:
    gain = [1 / math.log2(place + 2) for place in range(4)]
    assert ndcg_of_hits([0, 1, 0, 1], 4) == pytest.approx((gain[1] + gain[3]) / (gain[0] + gain[1]))
    assert ndcg_of_hits([0, 1, 0, 1], 2) == pytest.approx(gain[1] / (gain[0] + gain[1]))
    assert ndcg_of_hits([0, 0, 0, 1], 3) == ndcg_of_hits([0, 0], 2) == 0


@pytest.mark.parametrize("batch_size", [4, 2048])
def test_dictionaries_and_heaps_find_what_counting_ranks_finds(batch_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    num_users, num_items = 30, 60
    users = torch.randn(num_users, 8, generator=generator, dtype=torch.float64)
    items = torch.randn(num_items, 8, generator=generator, dtype=torch.float64)
    order = torch.rand(num_users, num_items, generator=generator).argsort(1).tolist()
    train = {user: row[: user % 9] for user, row in enumerate(order)}
    # Users 0, 7, 14 ... have nothing to find.
    test = {user: row[30 : 30 + user % 7] for user, row in enumerate(order)}
    del train[9]
    found = evaluate(users, items, train, test, ks=(3, 10, 20), batch_size=batch_size)
    metric = FullRankingMetrics((3, 10, 20), ("recall", "ndcg"), ndcg_variant="hits")
    for user, wanted in test.items():
        if wanted:
            scores = (users[user] @ items.T)[None]
            scores[0, train.get(user, [])] = -torch.inf
            metric.update(scores, torch.tensor([wanted]))
    assert found == pytest.approx({name: float(value) for name, value in metric.compute().items()}, abs=1e-12)
    assert 0.1 < found["ndcg@10"] < 0.9
