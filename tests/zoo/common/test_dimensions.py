"""Sizes and descriptions that a model takes from its data."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningDataModule

from zoo.common.dimensions import plain, resolve_dimension


class Data(LightningDataModule):
    def __init__(self, tasks):
        super().__init__()
        self.tasks = tasks


class Model:
    def __init__(self, tasks: list):
        pass


TASK = {"name": "age", "num_outputs": 1, "target_std": 12.348082168482462}


def test_statistics_may_differ_in_their_last_digits_and_the_trained_ones_count():
    trained = [{**TASK, "target_std": 12.348082168482465}]
    assert resolve_dimension("tasks", Data([TASK]), Model, trained=trained) is trained


@pytest.mark.parametrize("change", [{"target_std": 12.35}, {"name": "hours"}, {"num_outputs": 2}])
def test_other_tasks_than_those_of_the_checkpoint_are_refused(change):
    with pytest.raises(ValueError, match="the checkpoint was trained with tasks = "):
        resolve_dimension("tasks", Data([TASK]), Model, trained=[{**TASK, **change}])


def test_lists_and_descriptions_become_plain_values():
    assert plain([torch.tensor(3), 4], "Data.cardinalities") == [3, 4]
    assert plain(["a", "b"], "Data.names") == ["a", "b"]
    assert plain("fill", "Data.mode") == "fill"
    assert plain(True, "Data.with_passage") is True
    assert plain((TASK,), "Data.tasks") == [TASK]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (2.5, "expected an integer or a list of integers or names"),
        ([2.5], r"Data.x\[0\] is 2.5"),
        ([{"std": torch.tensor(1.0)}], r"Data.x\[0\]\['std'\] is tensor.*expected a plain number or text"),
    ],
)
def test_what_a_checkpoint_cannot_hold_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        plain(value, "Data.x")
