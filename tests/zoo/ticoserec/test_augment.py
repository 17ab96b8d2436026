"""The five operators against loops written from the equations, and the properties that define them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.zoo.ticoserec import reference
from zoo.ticoserec import TiAugmenter, ViewPolicy
from zoo.ticoserec.augment import (
    CROP,
    INSERT,
    MASK,
    ORIGINAL,
    REORDER,
    SUBSTITUTE,
    describe,
    draw_operators,
    make_views,
)
from zoo.ticoserec.gaps import even_window, gap_ranks, right_gaps

NUM_ITEMS = 40
NEAREST = [0, *((i * 7 + 3) % NUM_ITEMS + 1 for i in range(1, NUM_ITEMS + 1))]


def jagged(rows):
    return torch.tensor([v for row in rows for v in row]), torch.tensor([len(row) for row in rows])


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return [reference.random_sequence(rng, NUM_ITEMS) for _ in range(1000)]


def views_of(batch, operator, keys=None, with_next_time=True, **policy):
    policy = ViewPolicy(**policy)
    items, lengths = jagged([row for row, _ in batch])
    times, time_lengths = jagged([t if with_next_time else t[:-1] for _, t in batch])
    keys = torch.arange(len(batch)) if keys is None else keys
    described = describe(policy, items, lengths, times, time_lengths)
    views = make_views(policy, described, torch.full((len(batch),), operator), keys, torch.tensor(NEAREST))
    return [row.tolist() for row in views.item_ids.split(views.lengths.tolist())]


@pytest.mark.parametrize("mode", ["minimum", "maximum"])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_deterministic_operators_equal_the_loops_on_a_thousand_sequences(batch, mode, ratio):
    gaps = [reference.right_gaps(times) for _, times in batch]
    pairs = {
        SUBSTITUTE: ("substitute", lambda items, g: reference.substitute(items, g, ratio, mode, NEAREST)),
        INSERT: ("insert", lambda items, g: reference.insert(items, g, ratio, mode, NEAREST)),
        MASK: ("mask", lambda items, g: reference.mask(items, g, ratio, mode)),
    }
    for operator, (name, expected) in pairs.items():
        got = views_of(batch, operator, **{name: ratio, f"{name}_mode": mode})
        assert got == [expected(items, g) for (items, _), g in zip(batch, gaps, strict=True)], name


@pytest.mark.parametrize("mode", ["minimum", "maximum"])
def test_crop_equals_the_loop_and_shrinks_to_one_item_when_short(batch, mode):
    got = views_of(batch, CROP, crop=0.6, crop_mode=mode)
    for (items, times), view in zip(batch, got, strict=True):
        expected = reference.crop(items, reference.right_gaps(times), 0.6, mode)
        if expected is None:
            assert len(view) == 1 and view[0] in items
        else:
            assert view == expected


def test_crop_to_one_item_draws_its_place_uniformly():
    row = ([1, 2, 3, 4], [0, 1, 5, 6, 9])
    counts = torch.zeros(5)
    for view in views_of([row] * 3000, CROP, crop=0.5):
        counts[view[0]] += 1
    # c = 2 of n = 4: the place is drawn from 0 and 1
    assert counts[3:].sum() == 0 and counts[1:3].min() > 1400


def test_reorder_shuffles_the_most_even_window_only(batch):
    got = views_of(batch, REORDER, reorder=0.4)
    moved = 0
    for (items, times), view in zip(batch, got, strict=True):
        c = int(0.4 * len(items))
        start = reference.window_start(reference.right_gaps(times), len(items), c, "minimum")
        assert sorted(view) == sorted(items)
        if c < 2:
            assert view == items
        else:
            assert view[:start] == items[:start] and view[start + c :] == items[start + c :]
            moved += view != items
    assert moved > 300


def test_reorder_gives_every_permutation_equally_often():
    row = ([1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 50, 120, 400])
    seen = {}
    for view in views_of([row] * 6000, REORDER, reorder=0.5):
        seen[tuple(view[:3])] = seen.get(tuple(view[:3]), 0) + 1
    assert len(seen) == 6 and min(seen.values()) > 850


def test_random_mask_hides_exactly_the_asked_number_uniformly():
    row = ([1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5])
    hidden = torch.zeros(5)
    for view in views_of([row] * 4000, MASK, mask=0.5, mask_mode="random"):
        assert view.count(0) == 2
        hidden += torch.tensor([v == 0 for v in view])
    assert (hidden / 4000 - 0.4).abs().max() < 0.04


def test_only_gaps_matter(batch):
    shifted = [(items, [7 * t + 1_000 for t in times]) for items, times in batch]
    for operator in (SUBSTITUTE, INSERT, MASK, REORDER, CROP):
        policy = {"mask_mode": "maximum"}
        assert views_of(batch, operator, **policy) == views_of(shifted, operator, **policy)


def test_without_the_next_time_the_last_item_is_never_chosen(batch):
    got = views_of(batch, INSERT, insert=0.9, with_next_time=False)
    for (items, times), view in zip(batch, got, strict=True):
        n = len(items)
        places = reference.chosen_places(reference.right_gaps(times[:-1]), max(int(0.9 * n), 1), "maximum")
        expected = [v for i, item in enumerate(items) for v in ([item, NEAREST[item]] if i in places else [item])]
        assert view == expected and view[-1] == items[-1]


def test_official_window_ignores_its_last_gap():
    rows = [([1, 2, 3, 4, 5, 6], [0, 10, 20, 500, 510, 523, 600])]
    gaps = reference.right_gaps(rows[0][1])
    for official in (False, True):
        times, time_lengths = jagged([rows[0][1]])
        found = even_window(
            right_gaps(times, time_lengths, torch.tensor([6])),
            torch.tensor([3]),
            window="official" if official else "full",
        )
        assert int(found) == reference.window_start(gaps, 6, 3, "minimum", official)
    # one gap only is left of a window of three items, so all windows tie and the last wins
    assert int(found) == 3


def test_variance_of_long_spans_in_seconds_stays_exact():
    rng = np.random.default_rng(1)
    times = np.cumsum(rng.integers(0, 30_000_000, 60)) + 1
    gaps = right_gaps(torch.tensor(times), torch.tensor([60]), torch.tensor([59]))
    for c in (3, 10, 40):
        expected = reference.window_start(reference.right_gaps(times.tolist()), 59, c, "minimum")
        assert int(even_window(gaps, torch.tensor([c]))) == expected


def test_equal_gaps_rank_the_earlier_item_first():
    gaps = right_gaps(torch.tensor([0, 5, 10, 10, 15]), torch.tensor([5]), torch.tensor([4]))
    assert gap_ranks(gaps).tolist() == [1, 2, 0, 3]


def test_random_positions_follow_coserec():
    row = ([1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 50, 120, 400])
    policy = {"positions": "random", "insert_side": "before", "insert": 0.5}
    firsts = set()
    for view in views_of([row] * 500, INSERT, **policy):
        assert len(view) == 9
        new = [i for i in range(8) if view[i] == NEAREST[view[i + 1]]]
        firsts.update(view[i + 1] for i in new)
        rest = [v for i, v in enumerate(view) if i not in new]
        assert len(new) < 3 or rest == row[0]
    assert firsts == {1, 2, 3, 4, 5, 6}
    starts = {view[0] for view in views_of([row] * 500, CROP, positions="random", crop=0.5)}
    assert starts == {1, 2, 3}


def test_short_users_get_short_operators_and_all_are_equally_likely():
    policy = ViewPolicy(short_ops="SI", long_ops="SIMRC", threshold=12)
    lengths = torch.tensor([12, 13]).repeat(5000)
    drawn = draw_operators(policy, lengths, torch.arange(10_000))
    short, long = drawn[::2].bincount(minlength=5), drawn[1::2].bincount(minlength=5)
    assert short[2:].sum() == 0 and short[:2].min() > 2300
    assert long.min() > 850
    everybody = draw_operators(ViewPolicy(threshold=-1), lengths, torch.arange(10_000))
    assert everybody[::2].bincount(minlength=5).min() > 850


def test_original_is_the_sequence_itself(batch):
    assert views_of(batch, ORIGINAL) == [items for items, _ in batch]


def test_augmenter_keeps_the_newest_items_of_a_longer_view():
    augment = TiAugmenter(torch.tensor(NEAREST), ViewPolicy(short_ops="I", insert=0.5))
    items, times = torch.tensor([[0, 5, 6], [7, 8, 9]]), torch.tensor([[0, 0, 4], [0, 1, 9]])
    views, lengths = augment(items, times, torch.tensor([2, 3]))
    assert views.tolist() == [[5, NEAREST[5], 6], [8, NEAREST[8], 9]] and lengths.tolist() == [3, 3]


def test_augmenter_repeats_with_its_generator():
    augment = TiAugmenter(torch.tensor(NEAREST), ViewPolicy(threshold=-1))
    items = torch.randint(1, NUM_ITEMS, (64, 20))
    times = torch.arange(20).expand(64, 20) ** 2
    lengths = torch.full((64,), 20)
    first, second = (augment(items, times, lengths, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first[0], second[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop": 1.0}, "crop ratio must lie strictly between 0 and 1, got 1.0"),
        ({"short_ops": "SX"}, "short_ops must be different letters out of SIMRC, got 'SX'"),
        ({"threshold": 0}, "threshold must be -1"),
        ({"mask_mode": "median"}, "mask_mode must be one of minimum, maximum, random, got 'median'"),
    ],
)
def test_policy_names_the_bad_value(arguments, message):
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(")):
        ViewPolicy(**arguments)


def test_augmenter_names_disagreeing_shapes():
    with pytest.raises(ValueError, match=r"timestamps must be \(1, 3\) or \(1, 4\)"):
        TiAugmenter(torch.tensor(NEAREST))(torch.ones(1, 3).long(), torch.ones(1, 2).long(), torch.tensor([3]))
