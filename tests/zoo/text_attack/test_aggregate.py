"""Means over targets, their interval, and groups by popularity."""

from __future__ import annotations

import math

import pytest
import torch

from zoo.text_attack.aggregate import lift_of, popularity_fifths, summarise
from zoo.text_attack.attack import AttackResult


def result(item_id, pre, post, n_queries=10, goal=(0.1, 0.2)):
    return AttackResult(
        item_id=item_id,
        original="Mario",
        perturbed=f"Mar{item_id}o",
        recipe="deepwordbug",
        goal_pre=goal[0],
        goal_post=goal[1],
        n_queries=n_queries,
        n_scored=n_queries + 2,
        words_changed=1.0,
        edit_distance=1,
        rouge_l=0.0,
        stop="goal",
        synonym_source=None,
        encoder=None,
        seed=42,
        exposure_pre=pre,
        exposure_post=post,
    )


RESULTS = [result(0, 0.0, 0.1), result(4, 0.1, 0.12, 20), result(7, 0.2, 0.2, 30), result(9, 0.1, 0.38, 40)]


def test_means_rates_and_lift_are_those_of_the_targets():
    summary = summarise(RESULTS)
    expected = {
        "exposure/pre": 0.1,
        "exposure/post": 0.2,
        "exposure/gain": 0.1,
        "lift": 2.0,
        "win_rate": 0.75,
        "success_rate": 0.5,
        "queries": 25,
        "scored": 27,
        "targets": 4,
    }
    assert {name: summary[name] for name in expected} == pytest.approx(expected)
    assert summarise(RESULTS, delta=0.2)["success_rate"] == 0.25


def test_the_lift_is_a_ratio_of_means_not_a_mean_of_ratios():
    summary = summarise([result(0, 0.01, 0.1), result(1, 0.99, 0.99)])
    assert summary["lift"] == pytest.approx(1.09)


def test_the_goal_over_anchor_users_is_summarised_under_its_own_name():
    summary = summarise([result(0, None, None), result(1, None, None, goal=(0.3, 0.6))], measure="goal")
    assert summary["goal/pre"] == pytest.approx(0.2)
    assert summary["lift"] == pytest.approx(2)
    assert not any(name.startswith("exposure") for name in summary)


def test_no_edit_has_exactly_no_gain_and_a_lift_of_exactly_one():
    summary = summarise([result(i, pre, pre) for i, pre in enumerate((0.1, 0.3, 1 / 3))])
    assert summary["exposure/gain"] == summary["exposure/gain_low"] == summary["exposure/gain_high"] == 0
    assert summary["lift"] == summary["lift_low"] == summary["lift_high"] == 1
    assert summary["win_rate"] == summary["success_rate"] == 0


def test_targets_that_start_at_zero_have_an_infinite_lift_only_if_they_rise():
    assert summarise([result(0, 0.0, 0.0), result(1, 0.0, 0.0)])["lift"] == 1
    assert summarise([result(0, 0.0, 0.1)])["lift"] == math.inf
    summary = summarise([result(0, 0.0, 0.1), result(1, 0.0, 0.0), result(2, 0.1, 0.1)])
    assert not any(math.isnan(value) for value in summary.values())
    assert lift_of(torch.tensor([0.0, 0.0, 2.0]), torch.tensor([0.0, 1.0, 1.0])).tolist() == [1, math.inf, 0.5]


def test_the_summary_is_the_same_to_the_bit_for_any_order_of_targets():
    results = [result(i, 1 / (i + 3), 1 / (i + 2), n_queries=i) for i in range(30)]
    assert summarise(results, torch.arange(30)) == summarise(results[::-1], torch.arange(30))


def test_the_interval_covers_the_true_gain_at_about_its_rate():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for seed in range(200):
        gains = 0.2 + 0.05 * torch.randn(40, generator=generator)
        summary = summarise(
            [result(i, 0.3, 0.3 + float(gain)) for i, gain in enumerate(gains)], resamples=400, seed=seed
        )
        covered += summary["exposure/gain_low"] <= 0.2 <= summary["exposure/gain_high"]
        assert summary["lift_low"] == pytest.approx(1 + summary["exposure/gain_low"] / 0.3)
    # Binomial with p = 0.93 (a percentile interval of 40 values is a little narrow) has a spread of 0.018.
    assert 0.87 <= covered / 200 <= 0.99


def test_the_interval_depends_on_the_seed_alone():
    assert summarise(RESULTS) == summarise(RESULTS)
    many = [result(i, 0.1, 0.1 + i / 100) for i in range(30)]
    assert summarise(many)["lift_low"] != summarise(many, seed=1)["lift_low"]


def test_fifths_hold_a_fifth_of_the_catalogue_from_the_least_popular_up():
    popularity = torch.tensor([9, 1, 8, 2, 7, 3, 6, 4, 5, 0])
    assert popularity_fifths(popularity).tolist() == [5, 1, 5, 2, 4, 2, 4, 3, 3, 1]
    assert popularity_fifths(torch.zeros(10)).tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert popularity_fifths(torch.rand(13)).bincount()[1:].tolist() == [3, 3, 2, 3, 2]


def test_groups_by_popularity_hold_their_targets_only():
    summary = summarise(RESULTS, torch.arange(10))
    assert {name for name in summary if name.startswith("targets/")} == {
        "targets/fifth1",
        "targets/fifth3",
        "targets/fifth4",
        "targets/fifth5",
    }
    assert summary["exposure/post/fifth5"] == pytest.approx(0.38)
    assert summary["lift/fifth3"] == pytest.approx(1.2)
    assert summary["win_rate/fifth4"] == 0
    assert sum(summary[f"targets/fifth{i}"] for i in (1, 3, 4, 5)) == 4


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="no attack"):
        summarise([])
    with pytest.raises(ValueError, match="exposure_post of item 3 is None"):
        summarise([result(3, 0.1, None)])
    with pytest.raises(ValueError, match="exposure_pre of item 3 is nan"):
        summarise([result(3, math.nan, 0.1)])
    with pytest.raises(ValueError, match=r"0\.\.4, found 9"):
        summarise(RESULTS, torch.arange(5))
    with pytest.raises(ValueError, match="measure must be"):
        summarise(RESULTS, measure="both")
    with pytest.raises(ValueError, match="resamples"):
        summarise(RESULTS, resamples=0)
    with pytest.raises(ValueError, match="popularity"):
        popularity_fifths(torch.zeros(0))
