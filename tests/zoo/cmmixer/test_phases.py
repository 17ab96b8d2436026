import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from zoo.cmmixer.phases import TwoPhases
from zoo.common.schedules import WarmupCosine


def phases(boundary: int, total_steps: int, warmup_steps: int = 0, floor: float = 0.0) -> TwoPhases:
    made = TwoPhases(floor)
    made.boundary, made.total_steps, made.warmup_steps = boundary, total_steps, warmup_steps
    return made


def test_only_one_part_is_trained_at_a_time() -> None:
    made = phases(8, 20, warmup_steps=2, floor=0.1)
    assert all(made.first(step) > 0 and made.second(step) == 0 for step in range(8))
    assert all(made.first(step) == 0 and made.second(step) > 0 for step in range(8, 21))


def test_each_part_has_a_warm_up_and_a_cosine_of_its_own_length() -> None:
    made = phases(8, 20, warmup_steps=3, floor=0.1)
    first, second = WarmupCosine(3, 8, 0.1), WarmupCosine(3, 12, 0.1)
    assert [made.first(step) for step in range(8)] == [first(step) for step in range(8)]
    assert [made.second(step) for step in range(8, 21)] == [second(step) for step in range(13)]
    assert made.second(8) == pytest.approx(1 / 4), "the second part warms up anew"
    assert made.second(20) == pytest.approx(0.1)


def test_a_part_shorter_than_two_warm_ups_has_a_shorter_one_than_the_other() -> None:
    made = phases(4, 40, warmup_steps=6)
    assert [made.first(step) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert [step for step in range(4, 40) if made.second(step) == 1] == [10]


def test_without_a_first_part_the_second_is_the_whole_training() -> None:
    made = phases(0, 12, warmup_steps=2)
    whole = WarmupCosine(2, 12)
    assert [made.second(step) for step in range(13)] == [whole(step) for step in range(13)]
    assert made.first(0) == 0


def test_before_the_lengths_are_known_an_optimizer_can_be_built() -> None:
    made = TwoPhases()
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in (0.1, 0.4)]
    scheduler = LambdaLR(torch.optim.SGD(groups), [made.first, made.second])
    assert scheduler.get_last_lr() == [0.0, 0.4]
