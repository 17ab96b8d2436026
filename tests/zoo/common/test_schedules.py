"""Learning-rate schedules."""

from __future__ import annotations

import math

import pytest

from zoo.common.schedules import WarmupCosine, WarmupLinear


def test_the_cosine_schedule_rises_in_a_line_and_falls_along_a_cosine_to_zero():
    schedule = WarmupCosine(4, 24)
    assert [schedule(step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert schedule(4) == 1
    assert schedule(14) == pytest.approx(0.5)
    assert schedule(9) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert schedule(24) == schedule(100) == pytest.approx(0)
    # A short training has a short warm-up, one of no steps at all does no harm.
    assert [WarmupCosine(100, 4)(step) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert WarmupCosine(100)(0) == 1


def test_the_linear_schedule_rises_and_falls_in_lines():
    schedule = WarmupLinear(0.2, 20)
    factors = [schedule(step) for step in range(21)]
    assert factors[:4] == pytest.approx([1 / 5, 2 / 5, 3 / 5, 4 / 5])
    assert factors[4:] == pytest.approx([(20 - step) / 16 for step in range(4, 21)])
    assert schedule(25) == 0


def test_a_training_without_an_end_keeps_its_rate():
    assert [WarmupLinear(0.1)(step) for step in (0, 7, 10_000)] == [1, 1, 1]


@pytest.mark.parametrize("ratio", [-0.1, 1.0])
def test_a_ratio_of_warm_up_out_of_range_is_refused(ratio):
    with pytest.raises(ValueError, match=f"warmup_ratio must be at least 0 and below 1, got {ratio}"):
        WarmupLinear(ratio)
