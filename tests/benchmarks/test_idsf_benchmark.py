"""Both sides of the benchmark of IDSF compute the same, every case runs, and its formulas count what is there."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import idsf_memory
from benchmarks.idsf import TIMED, Bench
from benchmarks.idsf_memory import memory_record, published_contrast_bytes, step_bytes
from benchmarks.idsf_steps import BABY, Size, completed, new_data, new_model, random_table, trainer
from benchmarks.runner import run_case
from zoo.idsf.attention import AttentionFusion

SIZE = Size(num_users=40, num_items=30, num_train=200, num_validation=60)
FEATURES = {"image": 6, "text": 5}


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(new_data(random_table(SIZE, FEATURES), batch_size=16), hidden_size=8, steps=2, batches=5)


@pytest.mark.parametrize("path", TIMED)
def test_each_path_times_both_sides(bench: Bench, path: str) -> None:
    for case in getattr(bench, path)():
        record = run_case(case, threads=1, repeats=1)
        assert record["cpu_ratio"] > 0
        assert record["ours_wall_seconds"] > 0


def copy_attention(unit: Any, plain: Any) -> None:
    assert isinstance(unit, AttentionFusion)
    plain.score[0].load_state_dict(unit.hidden.state_dict())
    plain.score[2].load_state_dict(unit.score.state_dict())


@torch.no_grad()
def copy_weights(model: Any, plain: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Give the plain model the weights of ours; the tables of both by name."""
    network = model.network
    tables: dict[str, tuple[Tensor, Tensor]] = {"user_id": (network.user_id, plain.user_id)}
    for place, name in enumerate(model.modalities):
        tables[f"preference of {name}"] = network.user_preference[place], plain.user_preference[name]
        tables[f"ids of {name}"] = network.item_id[place], plain.item_id[name]
        tables[f"features of {name}"] = model.trained_features[place], plain.features[name]
        tables[f"projection of {name}"] = network.projection[place].weight, plain.projection[name].weight
        plain.projection[name].load_state_dict(network.projection[place].state_dict())
        copy_attention(network.id_attention[place], plain.id_attention[name])
    for ours, other in tables.values():
        other.copy_(ours)
    copy_attention(network.content_attention, plain.content_attention)
    copy_attention(network.item_attention, plain.item_attention)
    copy_attention(network.user_attention, plain.user_attention)
    return tables


def test_both_training_steps_have_one_loss_and_gradient(bench: Bench) -> None:
    torch.manual_seed(0)
    model = new_model(bench.data, 8, contrast_scope="all", trainable_features=True)
    trainer(max_epochs=0, limit_train_batches=1, limit_val_batches=0).fit(model, bench.data)
    plain, _ = Bench(bench.data, hidden_size=8).plain
    tables = copy_weights(model, plain)
    users, positives, negatives = bench.plain_sampler.sample(16)
    loss = torch.stack(list(model.loss_parts(users, positives, negatives[:, None]).values())).sum()
    expected = plain.loss(users, positives, negatives)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    found = torch.autograd.grad(loss, [ours for ours, _ in tables.values()])
    wanted = torch.autograd.grad(expected, [other for _, other in tables.values()])
    for name, one, other in zip(tables, found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6, msg=name)


def test_both_evaluations_find_the_same(bench: Bench) -> None:
    everyone = Bench(bench.data, hidden_size=8, ranked_users=SIZE.num_users)
    found, _ = everyone.rank(ks=(2, 5))
    wanted, _ = everyone.plain_rank(ks=(2, 5))
    assert len(wanted) == 4
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-6)
    assert wanted["recall@5"] > 0


def test_both_products_are_the_same(bench: Bench) -> None:
    ours, plain = bench.products()
    x = torch.randn(SIZE.num_users + SIZE.num_items, 8)
    torch.testing.assert_close(ours(x), plain(x))


def test_both_samplers_draw_distinct_users_with_an_item_and_one_they_lack(bench: Bench) -> None:
    pairs = set(zip(*bench.data.train_edges.tolist(), strict=True))
    batch = next(iter(bench.data.train_dataloader()))
    ours = batch.user_ids, batch.item_ids, bench.negatives(batch.user_ids, batch.keys)[:, 0]
    for users, positives, negatives in (ours, bench.plain_sampler.sample(16)):
        assert len(set(users.tolist())) == 16
        assert set(zip(users.tolist(), positives.tolist(), strict=True)) <= pairs
        assert not set(zip(users.tolist(), negatives.tolist(), strict=True)) & pairs


def test_the_graph_has_all_training_interactions() -> None:
    table = random_table(SIZE, FEATURES)
    data = new_data(table, 16)
    assert data.train_edges.shape == (2, SIZE.num_train)
    assert data.held_out_edges.shape == (2, SIZE.num_validation)
    assert sorted(completed(table, FEATURES).features) == data.modalities


@pytest.mark.parametrize("features", [FEATURES, {"image": 6}, {"audio": 3, **FEATURES}], ids=["two", "one", "three"])
def test_formula_counts_the_parameters(features: dict[str, int]) -> None:
    model = new_model(new_data(random_table(SIZE, features), 16), 8)
    parts = step_bytes(SIZE, list(features.values()), 8, 20, 20)
    assert parts["parameters"] == 4 * sum(part.numel() for part in model.parameters())
    assert parts["adam"] == 2 * parts["gradients"] == 2 * parts["parameters"]


def test_formula_of_chunks_grows_with_the_items_and_not_with_their_square() -> None:
    def contrast(items: int) -> int:
        return step_bytes(BABY._replace(num_items=items), [8, 8], 8, items, items)["contrast"]

    assert contrast(40_000) == 2 * contrast(20_000)
    assert contrast(4000) == pytest.approx(4 * contrast(2000), rel=0.02)


def test_published_loss_takes_over_two_gigabytes_on_baby() -> None:
    assert published_contrast_bytes(BABY.num_items, 2) == pytest.approx(2.4e9, rel=0.01)


@pytest.mark.parametrize("scope", ["batch", "all"])
def test_memory_stands_beside_its_formula(monkeypatch: pytest.MonkeyPatch, scope: str) -> None:
    def here(function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
        return function(*args)

    monkeypatch.setattr(idsf_memory, "_in_new_process", here)
    monkeypatch.setattr(idsf_memory, "quiet", lambda: None)
    options: Mapping[str, Any] = {"contrast_scope": scope}
    record = memory_record("tiny", SIZE, options, FEATURES, hidden_size=8, batch_size=16, limit=10**9)
    assert record["peak_bytes"] > record["peak_added_bytes"] >= 0
    assert record["formula_bytes"] == sum(record["formula_parts"].values())
    assert 10 < record["batch_items"] <= 30
    idsf_memory.show_memory([record])
