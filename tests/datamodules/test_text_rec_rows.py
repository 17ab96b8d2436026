from __future__ import annotations

import numpy as np
import pytest
import torch

from datamodules import TargetBatch, TextRecBatch
from datamodules.loading import Draw, keyed_ids
from datamodules.text_rec_rows import (
    Asked,
    Sequences,
    TargetRows,
    TextCorpus,
    TextRecRows,
    UnseenItems,
    candidates,
    sequences_of,
    training_rows,
)
from datamodules.text_rec_split import choose_targets, eval_rows

SEQUENCES = [[3, 1, 4], [0], [2, 6, 5, 3, 1, 0, 4], [], [7, 7, 2]]
NUM_ITEMS = 9


def ragged(rows: list[list[int]], liked: list[bool] | None = None) -> Sequences:
    offsets = np.cumsum([0, *map(len, rows)])
    flags = None if liked is None else np.array(liked)
    return sequences_of(np.array([item for row in rows for item in row]), flags, offsets)


def unseen() -> UnseenItems:
    sequences = ragged(SEQUENCES)
    return UnseenItems(sequences.rows(), sequences.item_ids, len(SEQUENCES), NUM_ITEMS)


@pytest.mark.parametrize("max_history", [1, 2, 50])
def test_training_rows_equal_a_plain_loop_with_the_newest_item_first(max_history: int) -> None:
    liked = [bool(place % 3) for place in range(sum(map(len, SEQUENCES)))]
    sequences = ragged(SEQUENCES, liked)
    rows = TextRecRows(sequences, training_rows(sequences), max_history)
    expected, place = [], 0
    for user, items in enumerate(SEQUENCES):
        flags = liked[place : place + len(items)]
        place += len(items)
        expected += [
            (user, items[:p][::-1][:max_history], flags[:p][::-1][:max_history], items[p], float(flags[p]))
            for p in range(1, len(items))
        ]
    assert len(rows) == len(expected)
    batch = rows[Draw(torch.arange(len(rows)), 5)]
    width = batch.history.shape[1]
    assert width == max(len(row[1]) for row in expected)
    found = zip(*(values.tolist() for values in batch[:5]), strict=True)
    for (user, history, flags, item, label), wanted in zip(found, expected, strict=True):
        padding = width - len(wanted[1])
        assert (user, item, label) == (wanted[0], wanted[3], wanted[4])
        assert history == wanted[1] + [-1] * padding
        assert flags == wanted[2] + [False] * padding


def test_a_batch_has_the_documented_types_and_keys() -> None:
    sequences = ragged(SEQUENCES)
    rows = TextRecRows(sequences, training_rows(sequences), 50)
    indices = torch.tensor([4, 1])
    batch = rows[Draw(indices, 77)]
    assert isinstance(batch, TextRecBatch)
    assert [values.dtype for values in batch] == [
        torch.int64, torch.int64, torch.bool, torch.int64, torch.float32, torch.int64, torch.int64,
    ]  # fmt: skip
    assert batch.candidate_ids.shape == (2, 0)
    assert torch.equal(batch.keys, keyed_ids(77, indices))
    assert not rows.positives(indices).keys.any()
    assert batch.liked[batch.history >= 0].all()


def test_a_history_is_padded_to_one_column_where_nobody_has_any() -> None:
    sequences = ragged([[1, 2]])
    asked = training_rows(sequences)
    rows = TextRecRows(sequences, asked._replace(ends=asked.starts), 50)
    batch = rows[Draw(torch.tensor([0]), 0)]
    assert batch.history.tolist() == [[-1]]
    assert batch.liked.tolist() == [[False]]


def test_rows_are_ordered_by_the_length_of_the_history_as_cut() -> None:
    sequences = ragged(SEQUENCES)
    rows = TextRecRows(sequences, training_rows(sequences), 3)
    lengths = [(rows[Draw(rows.by_length()[k : k + 1], 0)].history >= 0).sum().item() for k in range(len(rows))]
    assert lengths == sorted(lengths)
    assert set(lengths) == {1, 2, 3}


def test_unseen_items_by_rank_are_the_sorted_complement() -> None:
    found = unseen()
    for user, items in enumerate(SEQUENCES):
        complement = sorted(set(range(NUM_ITEMS)) - set(items))
        assert int(found.counts[user]) == len(complement)
        ranks = torch.arange(len(complement))
        rows = torch.full_like(ranks, user)
        assert found.at(rows, ranks).tolist() == complement
        assert found.at(torch.tensor([user]), ranks[None]).tolist() == [complement]


def test_samples_of_unseen_items_are_different_uniform_and_the_same_for_the_same_key() -> None:
    found = unseen()
    rows = torch.full((6_000,), 2)  # this user has 2 of 9 unseen
    assert found.sample(rows, 2, 0).sort(1).values.unique(dim=0).tolist() == [[7, 8]]
    rows = torch.full((6_000,), 0)  # and this one 6: 0, 2, 5, 6, 7, 8
    drawn = found.sample(rows, 3, 1)
    assert torch.equal(drawn, found.sample(rows, 3, 1))
    assert not torch.equal(drawn, found.sample(rows, 3, 2))
    assert all(len(set(row)) == 3 for row in drawn.tolist())
    subsets, counts = drawn.sort(1).values.unique(dim=0, return_counts=True)
    assert len(subsets) == 20
    # 300 of each are expected, with a standard deviation of 17.
    assert counts.min() > 230 and counts.max() < 370
    assert set(drawn.unique().tolist()) == {0, 2, 5, 6, 7, 8}


def test_candidates_that_are_too_many_are_refused_with_the_number_there_is() -> None:
    assert candidates(unseen(), torch.tensor([0, 1]), 6, "x", 1).shape == (2, 6)
    with pytest.raises(ValueError, match=r"num_candidates=3, but a user of x has only 2 items outside of the history"):
        candidates(unseen(), torch.tensor([0, 2]), 3, "x", 1)


def test_validation_and_test_have_other_candidates() -> None:
    rows = torch.tensor([0, 1, 3])
    assert not torch.equal(candidates(unseen(), rows, 4, "x", 1), candidates(unseen(), rows, 4, "x", 2))


def test_half_of_the_drawn_rows_ask_about_an_item_that_the_user_has_not_met() -> None:
    sequences = ragged(SEQUENCES)
    rows = TextRecRows(sequences, training_rows(sequences), 50, unseen=unseen())
    everything = torch.arange(len(rows))
    truth = rows.positives(everything)
    labels, negatives = [], set()
    for key in range(1_000):
        batch = rows[Draw(everything, key)]
        assert torch.equal(batch.history, truth.history)
        own = batch.labels == 1
        assert torch.equal(batch.item_ids[own], truth.item_ids[own])
        for user, item in zip(batch.user_ids[~own].tolist(), batch.item_ids[~own].tolist(), strict=True):
            assert item not in SEQUENCES[user]
            negatives.add((user, item))
        labels.append(batch.labels)
    assert torch.stack(labels).mean() == pytest.approx(0.5, abs=0.02)
    assert {item for user, item in negatives if user == 0} == {0, 2, 5, 6, 7, 8}
    # The label of a row says nothing about the next epoch's, nor about its neighbour's.
    drawn = torch.stack(labels)
    assert torch.corrcoef(torch.stack([drawn[:-1].flatten(), drawn[1:].flatten()]))[0, 1].abs() < 0.05
    assert torch.corrcoef(torch.stack([drawn[:, 0], drawn[:, 1]]))[0, 1].abs() < 0.15


def test_a_drawn_row_depends_on_its_index_and_the_key_alone() -> None:
    sequences = ragged(SEQUENCES)
    rows = TextRecRows(sequences, training_rows(sequences), 50, unseen=unseen())
    whole = rows[Draw(torch.arange(len(rows)), 9)]
    part = rows[Draw(torch.tensor([7, 2]), 9)]
    for field in ("user_ids", "item_ids", "labels", "keys"):
        assert torch.equal(getattr(part, field), getattr(whole, field)[[7, 2]])


def test_targets_come_with_their_titles() -> None:
    rows = TargetRows(torch.tensor([4, 0]), list("abcde"))
    batch = rows[Draw(torch.tensor([0]), 0)]
    assert isinstance(batch, TargetBatch)
    assert (batch.item_ids.tolist(), batch.texts) == ([4], ["e"])
    assert len(rows) == 2


def test_a_share_of_the_items_is_as_many_targets_as_it_says() -> None:
    counts = torch.zeros(100, dtype=torch.int64)
    # 0.29 * 100 is less than 29 in floating point.
    assert len(choose_targets("random", 0.29, None, 1, counts)) == 29
    assert len(choose_targets("random", 0.001, None, 1, counts)) == 1


def test_drawn_rows_keep_their_own_candidates() -> None:
    count = torch.arange(6)
    rows = TextRecRows(
        Sequences(count, count >= 0, torch.arange(7)), Asked(count, count + 1, count, count, count.float()), 3,
        count[:, None] + 10,
    )  # fmt: skip
    batch = rows.drawn(3, 1).positives(torch.arange(3))
    assert batch.candidate_ids[:, 0].tolist() == (batch.user_ids + 10).tolist()
    assert batch.user_ids.tolist() != [0, 1, 2]


def test_candidates_are_new_to_their_users_where_users_are_too_short_to_be_asked() -> None:
    lists = [[0], [1, 2, 3, 4], [5], [6, 7, 8, 9]]
    items = np.array([item for row in lists for item in row])
    labels = [str(item) for item in range(10)]
    corpus = TextCorpus("short", labels, labels, list("abcd"), items, np.cumsum([0, *map(len, lists)]))
    batch = eval_rows(corpus, "test", 3, 6).positives(torch.arange(2))
    assert batch.user_ids.tolist() == [1, 3]
    for user, row in zip(batch.user_ids.tolist(), batch.candidate_ids.tolist(), strict=True):
        assert sorted(row) == sorted(set(range(10)) - set(lists[user]))
