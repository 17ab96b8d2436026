"""Parameters are grouped by their names."""

from __future__ import annotations

import pytest

from zoo.merging.layers import GRANULARITIES, group

NAMES = [
    "embeddings.patch.weight",
    "embeddings.patch.bias",
    "encoder.layers.0.mlp.fc1.weight",
    "encoder.layers.0.mlp.fc1.bias",
    "encoder.layers.0.mlp.fc2.weight",
    "encoder.layers.1.mlp.fc1.weight",
    "logit_scale",
]


def test_each_granularity_has_its_layers():
    assert list(group(NAMES, "layer")) == NAMES
    assert list(group(NAMES, "task")) == ["all"]
    assert list(group(NAMES, "block")) == ["embeddings.patch", "encoder.layers.0", "encoder.layers.1", "logit_scale"]
    assert list(group(NAMES, "module")) == [
        "embeddings.patch",
        "encoder.layers.0.mlp.fc1",
        "encoder.layers.0.mlp.fc2",
        "encoder.layers.1.mlp.fc1",
        "logit_scale",
    ]


def test_no_parameter_is_lost_or_double():
    for granularity in (*GRANULARITIES, lambda name: name[-1]):
        members = [name for layer in group(NAMES, granularity).values() for name in layer]
        assert sorted(members) == sorted(NAMES)


def test_blocks_of_a_list_at_the_top_are_told_apart():
    assert list(group(["0.weight", "0.bias", "10.weight"], "block")) == ["0", "10"]


def test_an_unknown_granularity_is_refused():
    with pytest.raises(ValueError, match="one of task, block, module, layer or a function, got 'head'"):
        group(NAMES, "head")
