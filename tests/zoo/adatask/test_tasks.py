from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from zoo.adatask.tasks import KINDS, TaskSpec, task_specs

WIDTHS = {"binary": 1, "multiclass": 4, "regression": 2, "segmentation": 7, "depth": 1, "normals": 3}


@pytest.mark.parametrize("kind", KINDS)
def test_plain_values_go_there_and_back(kind: str) -> None:
    scale = {"target_mean": 3.5, "target_std": 2.0} if kind == "regression" else {}
    spec = TaskSpec.from_mapping({"name": "a task", "kind": kind, "num_outputs": WIDTHS[kind], **scale})
    plain = spec.as_dict()
    assert list(plain) == ["name", "kind", "num_outputs", "target_mean", "target_std"]
    assert TaskSpec.from_mapping(plain) == spec


def test_numbers_of_numpy_become_plain_ones(tmp_path: Any) -> None:
    spec = TaskSpec("age", "regression", np.int64(2), np.float32(38.5), np.float64(13.5))
    assert [type(value) for value in spec.as_dict().values()] == [str, str, int, float, float]
    torch.save(spec.as_dict(), tmp_path / "task.pt")
    assert torch.load(tmp_path / "task.pt", weights_only=True) == spec.as_dict()


def test_a_task_does_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        TaskSpec("age", "regression").target_std = 2.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "name=''"),
        ({"name": "  "}, "name='  '"),
        ({"name": "a.b"}, r"name='a\.b'"),
        ({"name": "a/b"}, "name='a/b'"),
        ({"name": 3}, "name=3"),
        ({"kind": "ranking"}, "kind='ranking'"),
        ({"kind": "binary", "num_outputs": 2}, "num_outputs=2"),
        ({"kind": "depth", "num_outputs": 3}, "num_outputs=3"),
        ({"kind": "normals", "num_outputs": 1}, "num_outputs=1"),
        ({"kind": "multiclass", "num_outputs": 1}, "num_outputs=1"),
        ({"kind": "segmentation", "num_outputs": 1}, "num_outputs=1"),
        ({"num_outputs": 0}, "num_outputs=0"),
        ({"num_outputs": 1.5}, "num_outputs=1.5"),
        ({"num_outputs": True}, "num_outputs=True"),
        ({"target_std": 0.0}, r"target_std=0\.0"),
        ({"target_std": -1}, r"target_std=-1\.0"),
        ({"target_std": float("nan")}, "target_std=nan"),
        ({"target_mean": "12"}, "target_mean='12'"),
        ({"target_mean": float("inf")}, "target_mean=inf"),
        ({"kind": "depth", "target_std": 2.0}, r"kind='depth'.*target_std=2\.0"),
        ({"weight": 2.0}, "unknown key 'weight'"),
    ],
)
def test_wrong_fields_are_refused_by_name_and_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskSpec.from_mapping({"name": "age", "kind": "regression", **changes})


@pytest.mark.parametrize("name", ["keys", "type", "training", "forward"])
def test_a_name_that_no_module_can_have_is_refused(name: str) -> None:
    with pytest.raises(KeyError, match="already exists"):
        nn.ModuleDict({name: nn.Identity()})
    with pytest.raises(ValueError, match=f"name='{name}'"):
        TaskSpec(name, "binary")


@pytest.mark.parametrize("missing", ["name", "kind"])
def test_a_missing_key_is_named(missing: str) -> None:
    mapping = {"name": "age", "kind": "regression"}
    del mapping[missing]
    with pytest.raises(ValueError, match=f"key '{missing}' is missing"):
        TaskSpec.from_mapping(mapping)


def test_tasks_come_as_specs_or_mappings_in_their_order() -> None:
    specs = task_specs([{"name": "income", "kind": "binary"}, TaskSpec("age", "regression")])
    assert specs == (TaskSpec("income", "binary"), TaskSpec("age", "regression"))


def test_no_task_and_two_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one task"):
        task_specs([])
    with pytest.raises(ValueError, match="'age' occurs 2 times"):
        task_specs([TaskSpec("age", "regression"), TaskSpec("income", "binary"), TaskSpec("age", "binary")])
