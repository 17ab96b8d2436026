from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from datamodules.interaction_rows import (
    InteractionBatch,
    InteractionTable,
    RankingBatch,
    RankingRows,
    TrainInteractions,
    TrainUsers,
    UserSampler,
    gather_ragged,
)
from datamodules.loading import BatchLoader, Draw, KeyedSampler, keyed_ids


def some_edges(num_users: int = 40, num_items: int = 30, share: float = 0.2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(num_users, num_items, generator=generator) < share
    chosen[3] = False
    edges = chosen.nonzero().T
    return edges[:, torch.randperm(edges.shape[1], generator=generator)]


def items_of(edges: torch.Tensor) -> dict[int, list[int]]:
    items: dict[int, list[int]] = {}
    for user, item in edges.T.tolist():
        items.setdefault(user, []).append(item)
    return items


def user_loader(edges: torch.Tensor, batch_size: int, seed: int = 7, world: int = 1, rank: int = 0) -> BatchLoader:
    rows = TrainUsers(edges)
    sampler = UserSampler(len(rows), edges.shape[1], batch_size, seed=seed, num_replicas=world, rank=rank)
    return BatchLoader(rows, sampler=sampler)


def same(left: list[InteractionBatch], right: list[InteractionBatch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a, b) for pair in zip(left, right, strict=True) for a, b in zip(*pair, strict=True)
    )


def joined(parts: list[list[InteractionBatch]]) -> list[InteractionBatch]:
    return [
        InteractionBatch(*(torch.cat(fields) for fields in zip(*ranks, strict=True)))
        for ranks in zip(*parts, strict=True)
    ]


def test_tables_and_batches_are_what_models_import() -> None:
    assert InteractionTable._fields == (
        "name", "user_labels", "item_labels", "user_ids", "item_ids", "split", "features", "images", "item_names",
    )  # fmt: skip
    assert InteractionBatch._fields == ("user_ids", "item_ids", "keys")
    assert RankingBatch._fields == ("user_ids", "target_ids", "seen_rows", "seen_ids", "candidate_ids")


def test_keys_are_distinct_not_negative_and_depend_on_the_key_and_the_index_alone() -> None:
    indices = torch.arange(100_000)
    keys = keyed_ids(11, indices)
    assert keys.dtype == torch.int64
    assert int(keys.min()) >= 0
    assert len(keys.unique()) == len(keys)
    assert torch.equal(keyed_ids(11, indices.flip(0)), keys.flip(0))
    assert not (keyed_ids(12, indices) == keys).any()
    # Each of the 63 bits is a fair coin: four standard deviations of 100,000 throws are 0.0063.
    ones = torch.stack([(keys >> bit) & 1 for bit in range(63)]).double().mean(1)
    assert float((ones - 0.5).abs().max()) < 0.0085


def test_an_epoch_of_interactions_has_every_pair_once_and_new_keys_in_the_next() -> None:
    edges = some_edges()
    rows = TrainInteractions(edges)
    loader = BatchLoader(rows, sampler=KeyedSampler(len(rows), 16, shuffle=True, seed=1))
    epochs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        batches = list(loader)
        pairs = [
            pair for batch in batches for pair in zip(batch.user_ids.tolist(), batch.item_ids.tolist(), strict=True)
        ]
        assert sorted(pairs) == sorted(map(tuple, edges.T.tolist()))
        epochs.append(dict(zip(pairs, torch.cat([b.keys for b in batches]).tolist(), strict=True)))
    assert len(set(epochs[0].values())) == edges.shape[1]
    assert all(epochs[0][pair] != epochs[1][pair] for pair in epochs[0])
    batch = rows[Draw(torch.tensor([5, 2]), 9)]
    assert torch.equal(batch.keys[1:], rows[Draw(torch.tensor([2]), 9)].keys)


def test_batches_of_users_are_full_and_their_users_distinct_with_one_of_their_own_items() -> None:
    edges = some_edges()
    items = items_of(edges)
    batches = list(user_loader(edges, 16))
    assert len(batches) == edges.shape[1] // 16 + 1
    for batch in batches:
        users = batch.user_ids.tolist()
        assert len(users) == len(set(users)) == 16
        assert all(item in items[user] for user, item in zip(users, batch.item_ids.tolist(), strict=True))
    assert 3 not in torch.cat([batch.user_ids for batch in batches])


def test_an_epoch_has_one_more_batch_also_where_the_interactions_fill_whole_batches() -> None:
    edges = some_edges()[:, :64]
    assert len(list(user_loader(edges, 16))) == 5


def test_users_and_their_items_are_drawn_uniformly() -> None:
    edges = some_edges()
    items = items_of(edges)
    loader = user_loader(edges, 8)
    counts: dict[tuple[int, int], int] = {}
    steps = 0
    for epoch in range(100):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            steps += 1
            for pair in zip(batch.user_ids.tolist(), batch.item_ids.tolist(), strict=True):
                counts[pair] = counts.get(pair, 0) + 1
    expected = {(user, item): steps * 8 / len(items) / len(own) for user, own in items.items() for item in own}
    assert counts.keys() == expected.keys()
    statistic = sum((counts[pair] - mean) ** 2 / mean for pair, mean in expected.items())
    freedom = len(expected) - 1
    assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5


def test_a_user_who_comes_again_draws_anew() -> None:
    edges = torch.stack([torch.zeros(50, dtype=torch.int64), torch.arange(50)])
    batches = list(user_loader(edges, 1))
    assert len({int(batch.item_ids) for batch in batches}) > 20
    assert len({int(batch.keys) for batch in batches}) == len(batches)


def test_a_batch_larger_than_the_number_of_users_repeats_users_with_other_keys() -> None:
    edges = some_edges()
    batch = next(iter(user_loader(edges, 100)))
    assert len(batch.user_ids) == 100
    assert len(batch.user_ids.unique()) < 40
    assert len(batch.keys.unique()) == 100
    whole = next(iter(user_loader(edges, 39)))
    assert sorted(whole.user_ids.tolist()) == [user for user in range(40) if user != 3]


def test_the_key_of_a_row_does_not_depend_on_the_positive_that_was_drawn() -> None:
    few = torch.tensor([[0, 0, 1], [4, 5, 6]])
    many = torch.tensor([[0, 0, 0, 0, 1], [1, 2, 3, 4, 6]])
    draw = Draw(torch.arange(40), 3)
    assert torch.equal(TrainUsers(few)[draw].keys, TrainUsers(many)[draw].keys)
    batch = TrainUsers(many)[Draw(torch.arange(0, 20_000, 2), 3)]
    for item in range(1, 5):
        # The same hash for both would tie an item to a range of keys.
        share = (batch.keys[batch.item_ids == item].double() / 2**63).mean()
        assert abs(float(share) - 0.5) < 0.03


@pytest.mark.parametrize("batch_size", [3, 5, 60])
def test_two_ranks_with_half_of_the_users_see_what_one_with_all_sees(batch_size: int) -> None:
    edges = some_edges()
    one = user_loader(edges, 2 * batch_size)
    two = [user_loader(edges, batch_size, world=2, rank=rank) for rank in range(2)]
    for epoch in (0, 3):
        for loader in (one, *two):
            loader.sampler.set_epoch(epoch)
        assert same(list(one), joined([list(loader) for loader in two]))


def test_a_loader_of_users_continues_in_the_middle_of_an_epoch() -> None:
    edges = some_edges()
    whole = user_loader(edges, 16)
    whole.sampler.set_epoch(2)
    expected = list(whole)
    assert len(expected) > 6
    first = user_loader(edges, 16)
    first.sampler.set_epoch(2)
    had = list(itertools.islice(first, 5))
    second = user_loader(edges, 16)
    second.load_state_dict(first.state_dict())
    assert same([*had, *second], expected)
    assert whole.state_dict() == {"epoch": 3, "batches": 0}
    second.sampler.set_epoch(3)
    assert not same(list(second), expected)
    assert not same(list(user_loader(edges, 16, seed=8)), list(user_loader(edges, 16)))


def test_ragged_rows_are_gathered_in_the_order_asked() -> None:
    flat, offsets = torch.tensor([10, 20, 21, 22, 40]), torch.tensor([0, 1, 4, 4, 5])
    values, positions, within = gather_ragged(flat, offsets, torch.tensor([3, 2, 1, 1]))
    assert values.tolist() == [40, 20, 21, 22, 20, 21, 22]
    assert positions.tolist() == [0, 2, 2, 2, 3, 3, 3]
    assert within.tolist() == [0, 0, 1, 2, 0, 1, 2]
    assert [len(part) for part in gather_ragged(flat, offsets, torch.tensor([2]))] == [0, 0, 0]


def test_rows_to_rank_equal_a_plain_loop_and_come_from_the_fewest_targets_to_the_most() -> None:
    seen, targets = some_edges(), some_edges(share=0.15).flip(1)
    seen_of, targets_of = items_of(seen), items_of(targets)
    users = torch.tensor(sorted(targets_of))
    rows = RankingRows(users, targets, seen, 40, torch.tensor([1, 2]))
    visited, most = [], 0
    for batch in BatchLoader(rows, sampler=KeyedSampler(len(rows), 7, order=rows.by_targets())):
        assert {field.dtype for field in batch} == {torch.int64}
        assert batch.candidate_ids.tolist() == [1, 2]
        widths = [len(targets_of[user]) for user in batch.user_ids.tolist()]
        assert batch.target_ids.shape == (len(widths), max(widths))
        assert most <= min(widths)
        most = max(widths)
        for row, user in enumerate(batch.user_ids.tolist()):
            own = batch.target_ids[row].tolist()
            assert sorted(own[: widths[row]]) == sorted(targets_of[user])
            assert own[widths[row] :] == [-1] * (max(widths) - widths[row])
            masked = batch.seen_ids[batch.seen_rows == row].tolist()
            assert sorted(masked) == sorted(seen_of.get(user, []))
        assert len(batch.seen_rows) == len(batch.seen_ids)
        visited += batch.user_ids.tolist()
    assert sorted(visited) == users.tolist()


def test_prediction_has_a_column_of_padding_and_all_candidates() -> None:
    rows = RankingRows(torch.arange(40), None, some_edges(), 40)
    batch = rows[Draw(torch.tensor([3, 0]), 0)]
    assert batch.target_ids.tolist() == [[-1], [-1]]
    assert batch.candidate_ids is None
    assert set(batch.seen_rows.tolist()) == {1}
    assert rows.by_targets().tolist() == list(range(40))


def test_fewer_interactions_than_processes_are_refused() -> None:
    with pytest.raises(ValueError, match="1 samples cannot be shared by 2 processes"):
        UserSampler(1, 1, 4, num_replicas=2, rank=0)


def test_random_numbers_of_the_sampler_are_those_of_its_batch_alone() -> None:
    sampler = UserSampler(30, 100, 10, seed=5)
    state = np.random.get_state()[1].tolist()  # noqa: NPY002 - the global generator must not move
    draws = list(sampler)
    assert np.random.get_state()[1].tolist() == state  # noqa: NPY002
    sampler.first_batch = 4
    assert torch.equal(next(iter(sampler)).indices, draws[4].indices)
    places = draws[4].indices // 30
    assert places.tolist() == list(range(40, 50))
