from __future__ import annotations

import numpy as np

from datamodules.sources.interactions import gap_variance, rank_of
from datamodules.sources.sequence_sample import sequence_sample


def test_the_sample_is_reproducible_and_of_real_shape() -> None:
    data, _ = sequence_sample()
    again, _ = sequence_sample()
    other, _ = sequence_sample(seed=1)
    assert data.item_ids.tobytes() == again.item_ids.tobytes() != other.item_ids.tobytes()
    assert data.num_users == 1000
    assert data.lengths.min() >= 5
    assert data.lengths.max() <= 60
    assert 7 <= np.median(data.lengths) <= 12
    assert set(data.item_ids.tolist()) == set(range(1, data.num_items + 1))
    assert data.timestamps is not None
    assert not ((np.diff(data.timestamps) < 0) & (np.diff(data.rows()) == 0)).any()
    pairs = data.rows() * (data.num_items + 1) + data.item_ids
    assert len(np.unique(pairs)) == len(pairs), "nobody takes an item twice"


def test_times_tell_where_the_taste_changes_and_who_is_steady() -> None:
    data, truth = sequence_sample()
    assert data.timestamps is not None
    rows = data.rows()
    inside = np.diff(rows) == 0
    gaps, drifts = np.diff(data.timestamps)[inside], truth.drifts[1:][inside]
    bursty = ~truth.steady[rows[1:][inside]]
    long = gaps > 86_400
    assert drifts[bursty & long].mean() > 0.6
    assert drifts[bursty & ~long].mean() < 0.02
    same = truth.family[data.item_ids[1:] - 1] == truth.family[data.item_ids[:-1] - 1]
    assert np.array_equal(same[inside], ~drifts)
    follows = (truth.successor[data.item_ids[:-1] - 1] == data.item_ids[1:])[inside]
    assert follows[~drifts].mean() > 0.55
    uniform = rank_of(gap_variance(data.timestamps, data.offsets), data.user_labels) < 400
    assert truth.steady[uniform].mean() > 2 * truth.steady[~uniform].mean()
