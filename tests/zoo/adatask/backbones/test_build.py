"""Backbones by name."""

from __future__ import annotations

import pytest
import torch

from zoo.adatask.backbones import (
    BACKBONES,
    MTAN,
    PLE,
    LeNet,
    MMoE,
    SegNet,
    SeparateBackbones,
    SharedBottom,
    SingleTask,
    build_backbone,
)

TASKS = {"one": 1, "two": 2}
KINDS = {
    "shared_bottom": SharedBottom,
    "single_task": SeparateBackbones,
    "mmoe": MMoE,
    "ple": PLE,
    "lenet": LeNet,
    "segnet": SegNet,
    "mtan": MTAN,
}
DENSE = ("segnet", "mtan")


def data_of(name):
    return {"in_channels": 2} if name in ("lenet", *DENSE) else {"cardinalities": [3, 4], "num_numeric": 1}


def run(backbone, name):
    if name in ("lenet", *DENSE):
        return backbone(torch.randn(2, 2, 32, 32))
    return backbone(torch.ones(2, 2, dtype=torch.int64), torch.zeros(2, 1))


@pytest.mark.parametrize("name", BACKBONES)
def test_every_name_builds_its_backbone_and_hands_options_on(name):
    options = {"filters": [4, 6]} if name in DENSE else {"width": 3} if name == "lenet" else {"tower_sizes": [5]}
    backbone = build_backbone(name, TASKS, **data_of(name), **options)
    assert type(backbone) is KINDS[name]
    assert {k: v.shape[:2] for k, v in run(backbone, name).outputs.items()} == {"one": (2, 1), "two": (2, 2)}
    default = build_backbone(name, TASKS, **data_of(name))
    assert [p.shape for p in backbone.parameters()] != [p.shape for p in default.parameters()]


@pytest.mark.parametrize("base", [name for name in BACKBONES if name != "single_task"])
def test_single_task_wraps_any_other_backbone(base):
    options = {"filters": (4, 6)} if base in DENSE else {}
    backbone = build_backbone("single_task", TASKS, base=base, **data_of(base), **options)
    assert all(type(part) is KINDS[base] for part in backbone.backbones.values())
    assert run(backbone, base).features is None


def test_single_task_by_name_loads_the_weights_of_the_class():
    build_backbone("single_task", TASKS, cardinalities=[3, 4], num_numeric=1).load_state_dict(
        SingleTask(TASKS, [3, 4], 1).state_dict()
    )


def test_a_table_needs_no_categorical_column():
    for cardinalities in (None, []):
        backbone = build_backbone("ple", TASKS, cardinalities=cardinalities, num_numeric=3)
        assert backbone(torch.zeros(2, 0, dtype=torch.int64), torch.randn(2, 3)).outputs["two"].shape == (2, 2)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet", {}, "unknown backbone 'resnet', expected one of shared_bottom, single_task, mmoe, ple, lenet"),
        ("lenet", {"filters": (4,)}, "unknown option 'filters' of backbone 'lenet', expected one of width, hidden"),
        ("mmoe", {"num_numeric": 1, "num_expert": 4}, "unknown option 'num_expert' of backbone 'mmoe', expected one"),
        ("single_task", {"num_numeric": 1, "base": "resnet"}, "unknown base 'resnet' of single_task"),
        ("single_task", {"num_numeric": 1, "width": 3}, "unknown option 'width' of backbone 'shared_bottom'"),
        ("shared_bottom", {}, "'shared_bottom' needs the columns of a table"),
        ("segnet", {"cardinalities": [3]}, "'segnet' takes images, not the columns of a table"),
    ],
)
def test_wrong_names_options_and_data_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(name, TASKS, **options)
