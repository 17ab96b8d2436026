"""Learning-rate schedules."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from zoo.common.schedules import WarmupCosine, WarmupLinear, fit_schedule


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


def test_the_cosine_schedule_ends_at_its_floor():
    schedule, to_zero = WarmupCosine(4, 24, floor=0.1), WarmupCosine(4, 24)
    assert schedule(24) == schedule(100) == pytest.approx(0.1)
    assert [schedule(step) for step in range(5)] == [to_zero(step) for step in range(5)], "the way up is the same"
    assert schedule(14) == pytest.approx(0.1 + 0.9 * 0.5), "halfway between 1 and the floor"
    assert [WarmupCosine(2, 10, floor=1.0)(step) for step in range(2, 12)] == pytest.approx([1] * 10)


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


def fitted(schedule, factors, steps, at=0):
    """Rates of two groups with base rates 0.1 and 0.4, when a training of so many steps begins at one of them."""
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in (0.1, 0.4)]
    optimizer = torch.optim.SGD(groups)
    scheduler = LambdaLR(optimizer, factors)
    scheduler.last_epoch = at
    trainer = SimpleNamespace(estimated_stepping_batches=steps)
    fit_schedule(SimpleNamespace(trainer=trainer, lr_schedulers=lambda: scheduler), schedule)
    return [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("at", [0, 3])
def test_a_schedule_is_fitted_to_the_training_at_the_step_where_it_begins(at):
    schedule = WarmupLinear(0.5)
    factor = WarmupLinear(0.5, 6)(at)
    assert fitted(schedule, schedule, 6.0, at) == pytest.approx([0.1 * factor, 0.4 * factor])
    assert schedule.total_steps == 6
    assert isinstance(schedule.total_steps, int)


@pytest.mark.parametrize("at", [0, 3])
def test_every_group_is_fitted_with_its_own_factor(at):
    schedule = WarmupCosine(1)
    factor = WarmupCosine(1, 6)(at)
    factors = [schedule, lambda step: 1 - schedule(step)]
    assert fitted(schedule, factors, 6, at) == pytest.approx([0.1 * factor, 0.4 * (1 - factor)])


def test_the_factors_may_follow_what_is_no_factor_itself():
    timed = SimpleNamespace(total_steps=0)
    factors = [lambda step: timed.total_steps / 10, lambda step: 0.0]
    assert fitted(timed, factors, 5) == pytest.approx([0.05, 0.0])


def test_a_training_without_an_end_is_of_no_steps():
    schedule = WarmupLinear(0.5, 6)
    assert fitted(schedule, schedule, math.inf) == pytest.approx([0.1, 0.4])
    assert schedule.total_steps == 0
