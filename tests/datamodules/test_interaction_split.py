from __future__ import annotations

import logging
import os
import subprocess
import sys

import numpy as np
import pytest

from datamodules.interaction_rows import InteractionTable
from datamodules.interaction_split import (
    TEST,
    TRAIN,
    VALIDATION,
    apply_cold,
    assign_parts,
    cold_split,
    hold_out_test,
    iterated_core,
    keep_per_user,
    per_user_split,
)


def some_table(split: bool = False, num_users: int = 60, num_items: int = 40, seed: int = 0) -> InteractionTable:
    rng = np.random.default_rng(seed)
    chosen = rng.random((num_users, num_items)) < rng.random(num_items) * 0.5
    user_ids, item_ids = np.nonzero(chosen)
    return InteractionTable(
        "toy",
        np.array([f"u{k}" for k in range(num_users)]),
        np.arange(num_items) * 10,
        user_ids,
        item_ids,
        rng.choice([0, 0, 0, 0, 1, 2], len(user_ids)).astype(np.int8) if split else None,
        {"text": rng.normal(size=(num_items, 6)).astype(np.float32)},
        rng.integers(0, 255, (num_items, 4, 4, 3)).astype(np.uint8),
        [f"item {k}" for k in range(num_items)],
    )


@pytest.mark.parametrize("rule", ["official", "mmrec"])
def test_split_sizes_follow_the_published_rule(rule: str) -> None:
    sizes = np.arange(5, 31)
    user_ids = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    split = per_user_split(user_ids, len(sizes), 3, rule)
    for user, n in enumerate(sizes.tolist()):
        held = 2 if n < 10 else int(0.2 * n)
        small, large = held // 2, held - held // 2
        validation, test = (large, small) if rule == "official" else (small, large)
        assert np.bincount(split[user_ids == user], minlength=3).tolist() == [n - held, validation, test]


def test_users_of_few_interactions_keep_one_to_train_and_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    user_ids = np.array([0, 1, 1, 2, 2, 2, 4])
    with caplog.at_level(logging.INFO):
        split = per_user_split(user_ids, 5, 0)
    parts = [np.bincount(split[user_ids == user], minlength=3).tolist() for user in range(5)]
    assert parts == [[1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0], [1, 0, 0]]
    assert "3 of 5 users have fewer than 3 interactions" in caplog.text


def test_the_choice_of_the_split_is_uniform_and_depends_on_the_seed() -> None:
    user_ids = np.repeat(np.arange(2_000), 10)
    split = per_user_split(user_ids, 2_000, 0).reshape(2_000, 10)
    for part in (VALIDATION, TEST):
        # 200 expected at each of 10 places, standard deviation 13.4.
        assert np.abs((split == part).sum(0) - 200).max() < 60
    other = per_user_split(user_ids, 2_000, 1).reshape(2_000, 10)
    assert 0.05 < ((split == TEST) & (other == TEST)).any(1).mean() < 0.15
    with pytest.raises(ValueError, match="rule must be one of official, mmrec, got 'lattice'"):
        per_user_split(user_ids, 2_000, 0, "lattice")


_CHOICES = """
import numpy as np, zlib
from datamodules.interaction_split import *
users = np.repeat(np.arange(50), np.arange(50) % 20 + 1)
items = (np.arange(len(users)) * 7) % 31
split = per_user_split(users, 50, 5)
print([zlib.crc32(np.ascontiguousarray(a).tobytes()) for a in (
    split, per_user_split(users, 50, 5, "mmrec"), hold_out_test(users, np.minimum(split, 1), 50, 5),
    cold_split(items, 31, 0.3, 5), keep_per_user(users, 3, 5))])
"""


def test_every_choice_is_the_same_in_a_process_with_another_hash_seed() -> None:
    outputs = {
        subprocess.run(
            [sys.executable, "-c", _CHOICES],
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    # The values, too: the split of a seed is a part of every number that was measured on it.
    assert outputs == {"[3486504538, 1214574864, 829688726, 3139863526, 1804607319]\n"}


def test_a_missing_test_part_is_held_out_of_the_training_only() -> None:
    sizes = np.array([5, 10, 25, 2, 1, 30])
    user_ids = np.repeat(np.arange(6), sizes)
    published = np.zeros(len(user_ids), dtype=np.int8)
    published[np.cumsum(sizes)[:3] - 1] = VALIDATION
    split = hold_out_test(user_ids, published, 6, seed=1)
    assert np.array_equal(split == VALIDATION, published == VALIDATION)
    assert np.bincount(user_ids[split == TEST], minlength=6).tolist() == [1, 1, 2, 0, 0, 3]
    assert not (published == TEST).any(), "the input must stay"
    other = hold_out_test(user_ids, np.where(published == VALIDATION, TEST, TRAIN), 6, seed=1, part=VALIDATION)
    assert np.array_equal(other == VALIDATION, split == TEST)


def test_one_training_interaction_stays_where_a_published_split_left_few() -> None:
    user_ids = np.zeros(30, dtype=np.int64)
    split = np.array([TRAIN] * 2 + [VALIDATION] * 28, dtype=np.int8)
    assert (hold_out_test(user_ids, split, 1, 0) == TRAIN).sum() == 1


def test_cold_items_are_a_random_half_each_of_those_with_interactions() -> None:
    item_ids = np.arange(20)
    parts = cold_split(item_ids, 25, 0.25, seed=0)
    assert np.bincount(parts).tolist() == [20, 2, 3]
    assert not parts[20:].any(), "items without interactions cannot be tested"
    assert np.bincount(cold_split(item_ids, 25, 6, seed=0)).tolist() == [19, 3, 3]
    assert not np.array_equal(parts, cold_split(item_ids, 25, 0.25, seed=1))
    for share, count in ((0.05, 1), (20, 20), (1, 1)):
        with pytest.raises(ValueError, match=rf"{share} of 20 items is {count}, expected at least 2"):
            cold_split(item_ids, 25, share, seed=0)


def test_cold_interactions_leave_the_training_and_warm_targets_the_evaluation() -> None:
    item_ids = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2])
    split = np.array([0, 1, 2] * 3, dtype=np.int8)
    parts = apply_cold(item_ids, split, np.array([TRAIN, VALIDATION, TEST], dtype=np.int8))
    assert parts.tolist() == [0, -1, -1, 1, 1, 1, 2, 2, 2]


def test_the_sparse_regime_keeps_a_random_choice_of_each_user() -> None:
    user_ids = np.random.default_rng(0).permutation(np.repeat(np.arange(5), [1, 2, 3, 10, 100]))
    kept = keep_per_user(user_ids, 3, seed=0)
    assert np.bincount(user_ids[kept]).tolist() == [1, 2, 3, 3, 3]
    assert not np.array_equal(kept, keep_per_user(user_ids, 3, seed=1))


def test_the_sparse_regime_takes_from_the_training_only_and_comes_after_the_cold_items() -> None:
    table = some_table(split=True)
    whole = assign_parts(table, None, 0)
    assert np.array_equal(whole, table.split)
    sparse = assign_parts(table, None, 0, keep_train=2)
    assert np.array_equal(sparse == TEST, whole == TEST) and np.array_equal(sparse == VALIDATION, whole == VALIDATION)
    assert np.bincount(table.user_ids[sparse == TRAIN]).max() == 2
    cold = cold_split(table.item_ids, table.num_items, 0.2, 0)
    both = assign_parts(table, None, 0, cold, 2)
    warm = (whole == TRAIN) & (cold[table.item_ids] == TRAIN)
    counts = np.bincount(table.user_ids[warm], minlength=60)
    assert np.bincount(table.user_ids[both == TRAIN], minlength=60).tolist() == np.minimum(counts, 2).tolist()


def test_the_rule_of_the_split_is_the_published_one_where_there_is_one() -> None:
    plain, published = some_table(), some_table(split=True)
    official = per_user_split(plain.user_ids, 60, 4)
    assert np.array_equal(assign_parts(plain, None, 4), official)
    assert np.array_equal(assign_parts(published, "official", 4), per_user_split(published.user_ids, 60, 4))
    with pytest.raises(ValueError, match="split='published': toy has no split, use one of official, mmrec"):
        assign_parts(plain, "published", 4)
    assert published.split is not None
    for lost, kept in ((TEST, VALIDATION), (VALIDATION, TEST)):
        without = published._replace(split=np.where(published.split == lost, TRAIN, published.split).astype(np.int8))
        parts = assign_parts(without, None, 4)
        assert np.array_equal(parts == kept, published.split == kept)
        assert (parts == lost).any()
    with pytest.raises(ValueError, match="no interaction is left for training"):
        assign_parts(published._replace(split=np.full_like(published.split, TEST)), None, 4)


def naive_core(pairs: list[tuple[str, int]], min_user: int, min_item: int) -> list[tuple[str, int]]:
    while True:
        users, items = ([pair[k] for pair in pairs] for k in range(2))
        kept = [(u, i) for u, i in pairs if users.count(u) >= min_user and items.count(i) >= min_item]
        if len(kept) == len(pairs):
            return kept
        pairs = kept


def labelled(table: InteractionTable) -> list[tuple[str, int]]:
    users, items = table.user_labels[table.user_ids], table.item_labels[table.item_ids]
    return list(zip(users.tolist(), items.tolist(), strict=True))


def test_the_core_equals_a_plain_loop_and_all_that_belongs_to_an_item_follows_it() -> None:
    table = some_table(split=True, num_users=30, num_items=40)
    pairs = labelled(table)
    counts = (np.bincount(table.user_ids, minlength=30), np.bincount(table.item_ids, minlength=40))
    one_round = int(((counts[0][table.user_ids] >= 9) & (counts[1][table.item_ids] >= 3)).sum())
    found = iterated_core(table, 9, 3)
    expected = naive_core(pairs, 9, 3)
    assert 0 < len(expected) < one_round, "the sample must need several rounds"
    assert labelled(found) == expected
    assert set(found.user_ids.tolist()) == set(range(found.num_users))
    assert set(found.item_ids.tolist()) == set(range(found.num_items))
    assert table.images is not None and found.images is not None
    assert table.split is not None and found.split is not None
    assert found.split.tolist() == [int(table.split[pairs.index(pair)]) for pair in expected]
    for k, label in enumerate(found.item_labels.tolist()):
        row = label // 10
        assert np.array_equal(found.features["text"][k], table.features["text"][row])
        assert np.array_equal(found.images[k], table.images[row])
        assert found.item_names is not None and found.item_names[k] == f"item {row}"
    with pytest.raises(ValueError, match=r"nothing is left of 30 users and 40 items .* 99 interactions"):
        iterated_core(table, 99, 1)
