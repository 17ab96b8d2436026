"""Exposure by thresholds against a ranking of all items for each user, written as a loop."""

from __future__ import annotations

import pytest
import torch

from tests.ranks import run_ranks
from zoo.text_attack.exposure import (
    ExposureRate,
    candidate_thresholds,
    exposure,
    thresholds,
    top_scores,
    top_scores_of,
)

NUM_USERS, NUM_ITEMS = 37, 23


def exposure_by_ranking(scores, item, new_scores, k, ties="pessimistic", seen=()):
    """Share of users for whom fewer than k other items beat the new score."""
    shown = counted = 0
    for user, row in enumerate(scores.tolist()):
        if (user, item) in seen:
            continue
        counted += 1
        others = [s for j, s in enumerate(row) if j != item and (user, j) not in seen]
        new = float(new_scores[user])
        shown += sum(s >= new if ties == "pessimistic" else s > new for s in others) < k
    return shown / counted


def random_scores(seed=0, levels=None):
    generator = torch.Generator().manual_seed(seed)
    if levels:
        return torch.randint(levels, (NUM_USERS, NUM_ITEMS), generator=generator).float()
    return torch.randn(NUM_USERS, NUM_ITEMS, generator=generator)


@pytest.mark.parametrize("ties", ["pessimistic", "optimistic"])
@pytest.mark.parametrize("k", [1, 5, NUM_ITEMS - 1])
@pytest.mark.parametrize("levels", [None, 4], ids=["distinct", "ties"])
def test_exposure_equals_a_full_ranking_for_every_item(levels, k, ties):
    scores = random_scores(levels=levels)
    candidates = torch.stack([random_scores(seed, levels)[:, 0] for seed in (1, 2, 3)], dim=1)
    top = top_scores_of(scores.split(10), k)
    inside = 0
    for item in range(NUM_ITEMS):
        inside += bool((top.ids[:, :k] == item).any())
        texts = torch.cat([scores[:, item : item + 1], candidates], dim=1)
        expected = [exposure_by_ranking(scores, item, texts[:, c], k, ties) for c in range(4)]
        torch.testing.assert_close(
            exposure(texts, thresholds(top, item), ties), torch.tensor(expected, dtype=torch.float64), atol=0, rtol=0
        )
    assert inside  # both cases of the threshold were met
    assert k == NUM_ITEMS - 1 or bool((top.ids[:, :k] != NUM_ITEMS - 1).all(1).any())


@pytest.mark.parametrize("k", [1, 7, NUM_ITEMS - 1])
def test_exposures_of_all_items_sum_to_the_length_of_the_list(k):
    scores = random_scores()
    top = top_scores_of([scores], k)
    total = sum(float(exposure(scores[:, [item]], thresholds(top, item))) for item in range(NUM_ITEMS))
    assert total == pytest.approx(k, abs=1e-12)


def test_equal_scores_expose_nothing_pessimistically_and_everything_optimistically():
    scores = torch.ones(NUM_USERS, NUM_ITEMS)
    tau = thresholds(top_scores_of([scores], 5), 3)
    assert float(exposure(scores[:, :1], tau)) == 0
    assert float(exposure(scores[:, :1], tau, "optimistic")) == 1


@pytest.mark.parametrize("block", [1, 10, 1000, None])
def test_lists_do_not_depend_on_the_size_of_a_block(block):
    users, items = torch.randn(NUM_USERS, 8).double(), torch.randn(NUM_ITEMS, 8).double()
    scores = users @ items.T
    top = top_scores(users, items, 4, block)
    torch.testing.assert_close(top.values, scores.topk(5).values)
    assert torch.equal(top.ids, scores.topk(5).indices)
    assert top.k == 4


@pytest.mark.parametrize("block", [1, 10, 50])
def test_seen_items_are_not_ranked_and_their_users_not_counted(block):
    scores = random_scores()
    pairs = torch.unique(torch.randint(0, NUM_ITEMS, (150, 2)) % torch.tensor([NUM_USERS, NUM_ITEMS]), dim=0)
    pairs = pairs[torch.randperm(len(pairs))]
    seen = {tuple(pair) for pair in pairs.tolist()}
    top = top_scores_of(scores.split(block), 4, pairs)
    new = random_scores(1)[:, :1]
    for item in range(NUM_ITEMS):
        got = float(exposure(new, thresholds(top, item)))
        assert got == pytest.approx(exposure_by_ranking(scores, item, new[:, 0], 4, seen=seen), abs=1e-12)


def test_seen_items_change_no_score_of_the_caller():
    scores = random_scores()
    before = scores.clone()
    top_scores_of([scores], 4, torch.tensor([[0, 1], [3, 2]]))
    assert torch.equal(scores, before)


def test_lists_of_chosen_users_are_those_of_a_pass_over_them_alone():
    scores = random_scores()
    rows = torch.tensor([30, 2, 11, 5])
    pairs = torch.tensor([[2, 7], [3, 7], [5, 1], [30, 4], [36, 7]])
    chosen = top_scores_of([scores], 4, pairs).of_users(rows)
    direct = top_scores_of([scores[rows]], 4, torch.tensor([[1, 7], [3, 1], [0, 4]]))
    for item in range(NUM_ITEMS):
        torch.testing.assert_close(thresholds(chosen, item), thresholds(direct, item), equal_nan=True, atol=0, rtol=0)


@pytest.mark.parametrize("rows", [[], [0, 0], [-1], [NUM_USERS]], ids=["none", "twice", "negative", "beyond"])
def test_bad_rows_of_users_are_refused(rows):
    with pytest.raises(ValueError, match=r"empty|distinct|0\.\.36"):
        top_scores_of([random_scores()], 4).of_users(torch.tensor(rows, dtype=torch.int64))


@pytest.mark.parametrize("k", [NUM_ITEMS, NUM_ITEMS + 5])
def test_a_list_as_long_as_the_catalogue_is_refused_with_both_numbers(k):
    with pytest.raises(ValueError, match=rf"k = {k} .* {NUM_ITEMS}"):
        top_scores_of([random_scores()], k)
    with pytest.raises(ValueError, match=rf"k = {k} .* {NUM_ITEMS}"):
        top_scores(torch.ones(3, 2), torch.ones(NUM_ITEMS, 2), k)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        top_scores_of([random_scores()], 0)


def test_thresholds_of_candidates_are_the_kth_best_of_them():
    scores = random_scores()
    for k in (1, 10, NUM_ITEMS):
        expected = scores.sort(dim=1, descending=True).values[:, k - 1]
        assert torch.equal(candidate_thresholds(scores, k), expected)
    with pytest.raises(ValueError, match=f"k = {NUM_ITEMS + 1} .* {NUM_ITEMS + 1}"):
        candidate_thresholds(scores, NUM_ITEMS + 1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scores_that_are_no_numbers_are_refused_with_their_user(value):
    scores = random_scores()
    scores[17, 20] = value
    with pytest.raises(ValueError, match=r"1 users .* row 17"):
        top_scores_of(scores.split(10), 4)
    with pytest.raises(ValueError, match=r"1 users .* row 17"):
        candidate_thresholds(scores, 4)
    with pytest.raises(ValueError, match=r"1 of 23 titles .* column 20"):
        exposure(scores, torch.zeros(NUM_USERS))
    users = torch.ones(NUM_USERS, 2)
    users[5, 1] = value
    with pytest.raises(ValueError, match=r"users are not finite.*row 5"):
        top_scores(users, torch.ones(NUM_ITEMS, 2), 4)


def test_a_title_that_scores_minus_infinity_is_refused():
    scores = torch.zeros(3, 2)
    scores[1, 1] = -torch.inf
    with pytest.raises(ValueError, match="column 1"):
        exposure(scores, torch.zeros(3))


@pytest.mark.parametrize("pair", [[0, NUM_ITEMS], [NUM_USERS, 0], [0, -1], [-1, 0]])
def test_seen_pairs_outside_the_data_are_refused(pair):
    with pytest.raises(ValueError, match=r"seen must lie in 0\.\."):
        top_scores_of([random_scores()], 4, torch.tensor([pair]))


def test_an_empty_set_of_users_is_refused():
    with pytest.raises(ValueError, match="empty"):
        top_scores_of([], 4)
    with pytest.raises(ValueError, match="none of the 2 users"):
        exposure(torch.zeros(2, 1), torch.full((2,), torch.nan))


def test_wrong_shapes_and_rules_are_refused():
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        exposure(torch.zeros(3, 2), torch.zeros(2))
    with pytest.raises(ValueError, match="one width"):
        top_scores(torch.ones(3, 2), torch.ones(4, 3), 1)
    with pytest.raises(ValueError, match="pessimistic"):
        exposure(torch.zeros(3, 2), torch.zeros(3), "neither")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must have shape"):
        ExposureRate().update(torch.zeros(3), torch.zeros(2))


def rate_of_part(rank, scores, tau):
    metric = ExposureRate()
    # The ranks have 30 and 7 users.
    part = slice(0, 30) if rank == 0 else slice(30, None)
    metric.update(scores[part], tau[part])
    return metric.compute()


def test_the_rate_in_parts_equals_the_exposure_in_one():
    scores = random_scores()
    tau = thresholds(top_scores_of([scores], 4, torch.tensor([[0, 2], [9, 2]])), 2)
    metric = ExposureRate()
    for part in range(0, NUM_USERS, 10):
        metric.update(scores[part : part + 10, 2], tau[part : part + 10])
    assert float(metric.compute()) == float(exposure(scores[:, [2]], tau))


def test_the_rate_over_several_items_is_the_mean_of_their_exposures():
    scores = random_scores()
    top = top_scores_of([scores], 4)
    items = [3, 8, 20]
    tau = torch.stack([thresholds(top, item) for item in items], dim=1)
    metric = ExposureRate()
    metric.update(scores[:, items], tau)
    expected = torch.cat([exposure(scores[:, [i]], tau[:, c]) for c, i in enumerate(items)]).mean()
    torch.testing.assert_close(metric.compute(), expected)


def test_the_rate_on_two_processes_with_unlike_shares_equals_that_of_one(tmp_path):
    scores = random_scores()
    tau = thresholds(top_scores_of([scores], 4), 2)
    expected = exposure(scores[:, [2]], tau)[0]
    assert all(torch.equal(rate, expected) for rate in run_ranks(tmp_path, rate_of_part, scores[:, 2], tau))
