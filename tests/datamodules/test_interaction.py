from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from datamodules.interaction import InteractionBatch, InteractionData, InteractionTable, RankingBatch

if TYPE_CHECKING:
    from pathlib import Path


def some_table(split: bool = False, num_users: int = 80, num_items: int = 50, seed: int = 0) -> InteractionTable:
    rng = np.random.default_rng(seed)
    user_ids, item_ids = np.nonzero(rng.random((num_users, num_items)) < 0.25)
    return InteractionTable(
        "toy",
        np.array([f"u{k}" for k in range(num_users)]),
        np.arange(num_items) * 10,
        user_ids,
        item_ids,
        rng.choice([0, 0, 0, 0, 1, 2], len(user_ids)).astype(np.int8) if split else None,
        {
            "text": rng.normal(size=(num_items, 6)).astype(np.float32),
            "image": rng.normal(1, 2, size=(num_items, 4)).astype(np.float32),
        },
        rng.integers(0, 255, (num_items, 4, 4, 3)).astype(np.uint8),
        [f"item {k}" for k in range(num_items)],
    )


def pairs_of(edges: torch.Tensor) -> set[tuple[int, int]]:
    pairs = [(user, item) for user, item in edges.T.tolist()]
    assert len(set(pairs)) == len(pairs)
    return set(pairs)


def table_pairs(table: InteractionTable, part: int | None = None) -> set[tuple[int, int]]:
    chosen = slice(None) if part is None else table.split == part
    return set(zip(table.user_ids[chosen].tolist(), table.item_ids[chosen].tolist(), strict=True))


def ranked(loader: Any) -> tuple[list[int], set[tuple[int, int]], set[tuple[int, int]]]:
    """Users, target pairs and masked pairs of all batches."""
    users: list[int] = []
    targets, seen = set(), set()
    for batch in loader:
        assert isinstance(batch, RankingBatch)
        users += batch.user_ids.tolist()
        for user, items in zip(batch.user_ids.tolist(), batch.target_ids.tolist(), strict=True):
            targets |= {(user, item) for item in items if item >= 0}
        seen |= set(zip(batch.user_ids[batch.seen_rows].tolist(), batch.seen_ids.tolist(), strict=True))
    assert len(set(users)) == len(users)
    return users, targets, seen


def test_a_published_split_is_kept_and_only_the_training_is_masked() -> None:
    table = some_table(split=True)
    data = InteractionData.from_table(table, eval_batch_size=17)
    train, validation, test = (table_pairs(table, part) for part in range(3))
    assert pairs_of(data.train_edges) == train
    assert pairs_of(data.held_out_edges) == validation | test
    for loader, targets in ((data.val_dataloader(), validation), (data.test_dataloader(), test)):
        users, found, seen = ranked(loader)
        assert found == targets
        assert set(users) == {user for user, _ in targets}
        assert seen == {(user, item) for user, item in train if user in set(users)}, "validation items are not masked"
    users, found, seen = ranked(data.predict_dataloader())
    assert (users, found, seen) == (list(range(80)), set(), train)


@pytest.mark.parametrize("sampling", ["interaction", "user"])
def test_training_batches_are_of_training_pairs_and_differ_from_epoch_to_epoch(sampling: str) -> None:
    data = InteractionData.from_table(some_table(split=True), sampling=sampling, batch_size=32, seed=1)
    train = pairs_of(data.train_edges)
    loader = data.train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        batches = list(loader)
        assert isinstance(batches[0], InteractionBatch)
        assert {field.dtype for field in batches[0]} == {torch.int64}
        epochs.append([pair for b in batches for pair in zip(b.user_ids.tolist(), b.item_ids.tolist(), strict=True)])
        assert set(epochs[-1]) <= train
        assert len(batches) == (-(-len(train) // 32) if sampling == "interaction" else len(train) // 32 + 1)
    assert epochs[0] != epochs[1]
    again = InteractionData.from_table(some_table(split=True), sampling=sampling, batch_size=32, seed=1)
    first = [p for b in again.train_dataloader() for p in zip(b.user_ids.tolist(), b.item_ids.tolist(), strict=True)]
    assert first == epochs[0]


@pytest.mark.parametrize("sampling", ["interaction", "user"])
def test_a_training_loader_continues_in_the_middle_of_an_epoch(sampling: str) -> None:
    loaders = [
        InteractionData.from_table(some_table(), sampling=sampling, batch_size=32, seed=1).train_dataloader()
        for _ in range(2)
    ]
    whole = list(loaders[0])
    list(itertools.islice(loaders[0], 4))
    loaders[1].load_state_dict(loaders[0].state_dict())
    rest = list(loaders[1])
    assert len(rest) == len(whole) - 4
    assert all(torch.equal(a.keys, b.keys) and torch.equal(a.item_ids, b.item_ids) for a, b in zip(rest, whole[4:]))  # noqa: B905


def test_the_split_does_not_depend_on_the_order_of_the_file() -> None:
    table = some_table()
    order = np.random.default_rng(1).permutation(len(table.user_ids))
    shuffled = table._replace(user_ids=table.user_ids[order], item_ids=table.item_ids[order])
    left, right = (InteractionData.from_table(t, split="mmrec", split_seed=2) for t in (table, shuffled))
    assert torch.equal(left.train_edges, right.train_edges)
    assert pairs_of(left.train_edges) | pairs_of(left.held_out_edges) == table_pairs(table)
    other = InteractionData.from_table(table, split="mmrec", split_seed=3)
    assert not torch.equal(left.train_edges, other.train_edges)


def test_what_belongs_to_users_and_items_is_there_by_its_id() -> None:
    table = some_table()
    data = InteractionData.from_table(table)
    assert (data.num_users, data.num_items) == (80, 50)
    assert data.user_labels[3] == "u3" and data.item_labels[3] == "30"
    assert data.item_names is not None and data.item_names[3] == "item 3"
    assert data.images is not None and data.images.shape == (50, 4, 4, 3)
    assert data.modalities == list(data.features) == ["image", "text"]
    assert data.feature_sizes == [4, 6]
    assert all(np.array_equal(data.features[name], table.features[name]) for name in data.modalities)
    assert data.cold_item_ids.tolist() == []
    assert data.features["text"].dtype == torch.float32


def test_cold_items_leave_the_training_and_are_ranked_alone() -> None:
    table = some_table()
    data = InteractionData.from_table(table, cold_fraction=0.2)
    cold = set(data.cold_item_ids.tolist())
    assert len(cold) == 10
    train = pairs_of(data.train_edges)
    assert not cold & {item for _, item in train}
    halves = []
    for loader in (data.val_dataloader(), data.test_dataloader()):
        batch = next(iter(loader))
        assert batch.candidate_ids is not None
        halves.append(set(batch.candidate_ids.tolist()))
        _, targets, _ = ranked(loader)
        trained = {user for user, _ in train}
        assert targets == {(u, i) for u, i in table_pairs(table) if i in halves[-1] and u in trained}
    assert halves[0] | halves[1] == cold and not halves[0] & halves[1]
    assert next(iter(data.predict_dataloader())).candidate_ids is None
    warm = InteractionData.from_table(table)
    assert train == {(user, item) for user, item in pairs_of(warm.train_edges) if item not in cold}
    assert next(iter(warm.test_dataloader())).candidate_ids is None


def test_the_core_and_the_sparse_regime_are_options() -> None:
    data = InteractionData.from_table(some_table(), min_user_interactions=10, min_item_interactions=5)
    edges = torch.cat([data.train_edges, data.held_out_edges], 1)
    assert int(edges[0].bincount().min()) >= 10 and int(edges[1].bincount().min()) >= 5
    assert 0 < data.num_users < 80
    assert all(len(rows) == data.num_items for rows in data.features.values())
    sparse = InteractionData.from_table(some_table(), keep_train_per_user=3)
    assert sparse.train_edges[0].bincount().tolist() == [3] * 80
    assert pairs_of(sparse.held_out_edges) == pairs_of(InteractionData.from_table(some_table()).held_out_edges)


def test_users_without_training_items_are_skipped_and_counted_once(caplog: pytest.LogCaptureFixture) -> None:
    table = some_table(split=True)
    assert table.split is not None
    split = np.where(np.isin(table.user_ids, [4, 9]), 2, table.split).astype(np.int8)
    data = InteractionData.from_table(table._replace(split=split))
    with caplog.at_level(logging.INFO):
        users, _, _ = ranked(data.test_dataloader())
        data.test_dataloader()
    assert not {4, 9} & set(users)
    assert caplog.text.count("users of the test have no training interaction and are skipped") == 1
    assert "toy: 2 of " in caplog.text
    nobody = table._replace(split=np.where(table.user_ids < 40, 0, 1 + table.user_ids % 2).astype(np.int8))
    with pytest.raises(ValueError, match="toy: no user has interactions both to train and to validate"):
        InteractionData.from_table(nobody).val_dataloader()


def test_modalities_are_chosen_by_name(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        data = InteractionData.from_table(some_table(), modalities=["text"])
        assert (data.modalities, data.feature_sizes) == (["text"], [6])
    assert "only one modality: text" in caplog.text
    for names in (["txt"], []):
        with pytest.raises(ValueError, match=r"modalities=\[.*\]: toy has image, text; name one or more"):
            InteractionData.from_table(some_table(), modalities=names).modalities  # noqa: B018
    assert InteractionData.from_table(some_table()._replace(features={})).modalities == []


def test_read_only_features_can_be_used() -> None:
    table = some_table()
    for rows in table.features.values():
        rows.flags.writeable = False
    assert set(InteractionData.from_table(table).features) == {"image", "text"}


def test_other_pairs_are_tested_with_the_ids_of_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = some_table(split=True)
    train = table_pairs(table, 0)
    fresh = [(user, item) for user in (5, 2) for item in range(50) if (user, item) not in train]
    path = tmp_path / "new.csv"
    lines = [f"u{user},{item * 10}" for user, item in fresh]
    path.write_text("\n".join(["user_id,item_id", *lines, lines[0], "u999,10", "u3,11", "u3,12"]) + "\n")
    data = InteractionData.from_table(table, test_path=str(path))
    with caplog.at_level(logging.INFO):
        users, targets, _ = ranked(data.test_dataloader())
    assert targets == set(fresh) and sorted(users) == [2, 5]
    assert "1 users and 2 items are unknown, 3 of " in caplog.text
    assert ranked(data.val_dataloader())[1] == table_pairs(table, 1)
    plain = InteractionData.from_table(table)
    data.load_state_dict(plain.state_dict())
    user, item = next(iter(train))
    path.write_text(f"user_id,item_id\nu{user},{item * 10}\n")
    with pytest.raises(ValueError, match=r"new.csv: 1 test pairs are also in the training"):
        InteractionData.from_table(table, test_path=str(path)).test_dataloader()
    path.write_text("user_id,item_id\nx,10\ny,77\n")
    with pytest.raises(ValueError, match=r"none of 2 pairs can be tested: 2 users and 1 items are unknown; .*user u0"):
        InteractionData.from_table(table, test_path=str(path)).test_dataloader()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"min_item_interactions": 16}, "items"),
        ({"split_seed": 1}, "training edges"),
        ({"feature_norm": "l2"}, "features"),
        ({"modalities": ["text"]}, "features"),
        ({"missing_rate": 0.02}, "features"),
        ({"keep_train_per_user": 3}, "training edges"),
    ],
    ids=["items", "seed", "norm", "modalities", "missing", "sparse"],
)
def test_a_checkpoint_of_other_data_is_refused(options: dict[str, Any], what: str) -> None:
    first = InteractionData.from_table(some_table())
    state = first.state_dict()
    first.load_state_dict(state)
    InteractionData.from_table(some_table(), sampling="user", batch_size=3).load_state_dict(state)
    second = InteractionData.from_table(some_table(), **options)
    with pytest.raises(ValueError, match=rf"trained on other data, its {what} differ: .* of source='toy', here "):
        second.load_state_dict(state)


def test_a_checkpoint_of_other_users_or_swapped_features_is_refused() -> None:
    table = some_table()
    state = InteractionData.from_table(table).state_dict()
    renamed = table._replace(user_labels=np.roll(table.user_labels, 1))
    with pytest.raises(ValueError, match="its users differ"):
        InteractionData.from_table(renamed).load_state_dict(state)
    rows = table.features["text"].copy()
    rows[[3, 4]] = rows[[4, 3]]
    swapped = table._replace(features={**table.features, "text": rows})
    with pytest.raises(ValueError, match="its features differ"):
        InteractionData.from_table(swapped).load_state_dict(state)
    rounded = table._replace(features={name: rows * np.float32(1 + 1e-6) for name, rows in table.features.items()})
    InteractionData.from_table(rounded).load_state_dict(state)


def test_a_model_that_trains_the_features_in_place_does_not_change_what_the_checkpoint_remembers() -> None:
    data = InteractionData.from_table(some_table())
    data.setup("fit")
    state = data.state_dict()
    data.features["text"] += 1
    assert data.state_dict() == state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "movie"}, "source must be one of embedded, movielens, .* got 'movie'"),
        ({"path": "x", "source": "baby"}, "path=x and source='baby' contradict"),
        ({"source": "files"}, "source='files' needs path"),
        ({"layout": "mmrec"}, "layout='mmrec' says how to read path, but source='embedded'"),
        ({"path": "x", "layout": "csv"}, "layout must be one of auto, mmrec, lattice, table, got 'csv'"),
        ({"data_dir": "d"}, r"data_dir belongs to the published sets \(movielens, .*\), source='embedded'"),
        ({"min_rating": 4.0}, "min_rating belongs to the published sets"),
        ({"path": "x", "feature_encoders": {"text": "y"}}, "feature_encoders belongs to .* source='files'"),
        ({"cache_dir": "d"}, "cache_dir belongs to the published sets"),
        ({"split": "random"}, "split must be one of None, published, official, mmrec, got 'random'"),
        ({"sampling": "item"}, "sampling must be one of interaction, user, got 'item'"),
        ({"feature_norm": "l1"}, "feature_norm must be one of None, l2, standardize, got 'l1'"),
        ({"missing_rate": 1.5}, "missing_rate must be at least 0 and at most 1, got 1.5"),
        ({"cold_fraction": -0.1}, "cold_fraction must be at least 0, got -0.1"),
        ({"cold_fraction": 0.1, "test_path": "x"}, "test_path and cold_fraction contradict"),
        ({"keep_train_per_user": 0}, "keep_train_per_user must be at least 1, got 0"),
        ({"min_user_interactions": 0}, "min_user_interactions must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"eval_batch_size": 0}, "eval_batch_size must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"sample_users": 0}, "sample_users must be at least 1, got 0"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_contradictory_options_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InteractionData(**options)


def test_a_table_in_memory_excludes_other_sources() -> None:
    with pytest.raises(ValueError, match="from_table reads table: remove path='x'"):
        InteractionData.from_table(some_table(), path="x")
