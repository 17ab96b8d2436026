from __future__ import annotations

import math

import pytest
import torch

from zoo.common.negatives import NegativeSampler


def toy(users: int, num_items: int = 30, first_item: int = 0) -> tuple[list[set[int]], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = [
        set((first_item + torch.randperm(num_items, generator=generator)[: 3 + 5 * user]).tolist())
        for user in range(users)
    ]
    user_ids = torch.repeat_interleave(torch.tensor([len(row) for row in rows]))
    return rows, user_ids, torch.tensor([item for row in rows for item in row])


@pytest.mark.parametrize("first_item", [0, 1])
@pytest.mark.parametrize("pool", [None, 20], ids=["catalogue", "pool"])
def test_negatives_are_unmet_items_and_cover_the_rest_evenly(first_item, pool):
    rows, user_ids, item_ids = toy(4, first_item=first_item)
    allowed = torch.arange(30) + first_item
    items = None if pool is None else allowed[allowed % 3 != 0]
    sampler = NegativeSampler(user_ids, item_ids, 30, first_item, items)
    users = torch.arange(4).repeat_interleave(13_000)
    drawn = sampler(users, torch.arange(len(users)), 2)
    for user, row in enumerate(rows):
        mine = drawn[users == user].flatten()
        free = sorted(set((allowed if items is None else items).tolist()) - row)
        counts = mine.bincount(minlength=31)[free].double()
        assert int(counts.sum()) == len(mine)
        chi_square = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
        assert chi_square < len(free) + 5 * math.sqrt(2 * len(free))


def test_negatives_do_not_depend_on_the_batch():
    _, user_ids, item_ids = toy(5)
    sampler = NegativeSampler(user_ids, item_ids, 30)
    users, keys = torch.arange(5), torch.arange(5) * 11
    assert torch.equal(sampler(users, keys, 3)[3:], sampler(users[3:], keys[3:], 3))


def test_a_user_who_met_everything_is_named():
    with pytest.raises(ValueError, match="user 1 has met all 2 items"):
        NegativeSampler(torch.tensor([0, 1, 1]), torch.tensor([1, 1, 2]), 2, first_item=1)
    with pytest.raises(ValueError, match="user 1 has met all 2 items"):
        NegativeSampler(torch.tensor([0, 1, 1]), torch.tensor([1, 1, 2]), 9, pool=torch.tensor([1, 2]))
