"""Item similarity against double loops, and the rule that joins two sources."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from zoo.ticoserec import ItemSimilarity, similarity
from zoo.ticoserec.similarity import hybrid_similarity, online_similarity, random_neighbours


def toy(seed=0, users=30, num_items=15):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(1, num_items + 1, rng.integers(1, 8)).tolist() for _ in range(users)]
    return rows, torch.tensor([v for row in rows for v in row]), torch.tensor([len(row) for row in rows]), num_items


def dense_similarity(rows, num_items, inverse_user_frequency):
    table = np.zeros((num_items + 1, num_items + 1))
    number = np.zeros(num_items + 1)
    for row in rows:
        items = set(row)
        for i in items:
            number[i] += 1
            for j in items - {i}:
                table[i, j] += 1 / math.log(1 + len(items)) if inverse_user_frequency else 1
    for i in range(num_items + 1):
        for j in range(num_items + 1):
            if table[i, j]:
                table[i, j] /= math.sqrt(number[i] * number[j])
    return table


@pytest.mark.parametrize("block", [4, 2048])
@pytest.mark.parametrize("method", ["itemcf_iuf", "itemcf"])
def test_co_occurrence_equals_the_double_loop(method, block, monkeypatch):
    monkeypatch.setattr(similarity, "_BLOCK", block)
    rows, item_ids, lengths, num_items = toy()
    expected = dense_similarity(rows, num_items, method == "itemcf_iuf")
    assert np.allclose(expected, expected.T) and expected.diagonal().max() == 0
    found = ItemSimilarity.fit(item_ids, lengths, num_items, method)
    assert np.allclose(found.scores.numpy(), expected.max(1), atol=1e-6)
    assert np.array_equal(found.most_similar.numpy()[1:], expected[1:].argmax(1))
    assert found.minimum == pytest.approx(expected[expected > 0].min())
    assert found.maximum == pytest.approx(expected.max())


def test_an_item_without_neighbours_gets_a_stand_in_of_score_zero():
    found = ItemSimilarity.fit(torch.tensor([1, 2, 3]), torch.tensor([2, 1]), 4)
    assert found.most_similar[:3].tolist() == [0, 2, 1]
    assert set(found.most_similar[3:].tolist()) <= {1, 2} and found.scores[3:].abs().max() == 0
    with pytest.raises(ValueError, match="no two items occur together"):
        ItemSimilarity.fit(torch.tensor([1, 2]), torch.tensor([1, 1]), 2)


def test_unknown_similarity_is_named_with_the_known_ones():
    with pytest.raises(
        ValueError, match="similarity must be one of itemcf_iuf, itemcf, item2vec, random, got 'cosine'"
    ):
        ItemSimilarity.fit(torch.tensor([1]), torch.tensor([1]), 1, "cosine")


@pytest.mark.parametrize("least", [False, True])
def test_online_neighbours_equal_the_full_product_without_padding_and_self(least):
    torch.manual_seed(0)
    table = torch.randn(50, 8)
    table[0] = 100.0
    products = table @ table.T
    products[:, 0] = products[0] = torch.nan
    products.fill_diagonal_(torch.nan)
    found = online_similarity(table, block=7, least=least)
    pick = np.nanargmin if least else np.nanargmax
    assert np.array_equal(found.most_similar.numpy()[1:], pick(products.numpy()[1:], axis=1))
    assert found.minimum == pytest.approx(np.nanmin(products), rel=1e-5)
    assert found.maximum == pytest.approx(np.nanmax(products), rel=1e-5)


def test_hybrid_takes_the_more_similar_neighbour_after_normalising():
    offline = ItemSimilarity(torch.tensor([0, 2, 1, 1]), torch.tensor([0.0, 0.9, 0.2, 0.5]), 0.0, 1.0)
    online = ItemSimilarity(torch.tensor([0, 3, 3, 2]), torch.tensor([0.0, 0.0, 8.0, 0.0]), -10.0, 10.0)
    # normalised online scores are 0.5, 0.9, 0.5: lower than, above, and equal to the offline ones
    assert hybrid_similarity(offline, online).tolist() == [0, 2, 3, 1]
    assert hybrid_similarity(offline, online, reverse=True).tolist()[1:3] == [3, 1]


def test_random_neighbours_come_from_the_training_items_and_change_with_the_key():
    first, second = (random_neighbours(torch.tensor([3, 5, 5, 9]), 200, key).most_similar for key in (1, 2))
    assert set(first[1:].tolist()) == {3, 5, 9} and not torch.equal(first, second)
    assert torch.equal(first, random_neighbours(torch.tensor([3, 5, 5, 9]), 200, 1).most_similar)


def test_item2vec_finds_items_of_the_same_kind():
    pytest.importorskip("gensim", reason="the extra item2vec is not installed")
    rng = np.random.default_rng(0)
    rows = [rng.choice(np.arange(10) + 10 * (u % 2) + 1, 6, replace=False) for u in range(200)]
    found = ItemSimilarity.fit(torch.tensor(np.concatenate(rows)), torch.full((200,), 6), 20, "item2vec")
    same = (found.most_similar[1:] > 10) == (torch.arange(1, 21) > 10)
    assert same.float().mean() > 0.9
