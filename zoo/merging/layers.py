"""Which parameters share a merging coefficient."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

GRANULARITIES = ("task", "block", "module", "layer")
"""From one coefficient a task to one a parameter tensor and task."""

LayerFn = Callable[[str], str]
"""The layer that a parameter's name belongs to."""

_BLOCK = re.compile(r"^(.*?\.)?\d+(?=\.)")


def _parameter(name: str) -> str:
    return name


def _module(name: str) -> str:
    return name.rpartition(".")[0] or name


def _block(name: str) -> str:
    found = _BLOCK.match(name)
    return found.group(0) if found else _module(name)


def _all(name: str) -> str:
    return "all"


_BY_NAME: dict[str, LayerFn] = {
    "task": _all,
    "block": _block,
    "module": _module,
    "layer": _parameter,
    "parameter": _parameter,
}


def layer_function(granularity: str | LayerFn) -> LayerFn:
    """The grouping of a granularity.

    In AdaMerging (arXiv 2310.02575) a "layer" is one parameter tensor: weight and bias are two layers.

    >>> layer_function("block")("encoder.layers.3.mlp.fc1.weight"), layer_function("module")("norm.bias")
    ('encoder.layers.3', 'norm')

    Args:
        granularity: "task" (one layer), "block" (the first numbered module of a name; what is outside of any, by
            module), "module" (weight and bias together), "layer" or "parameter" (each tensor), or a function from
            names of parameters to names of layers.

    Raises:
        ValueError: If the name is unknown.
    """
    if callable(granularity):
        return granularity
    if granularity not in _BY_NAME:
        raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)} or a function, got {granularity!r}")
    return _BY_NAME[granularity]


def group(names: Sequence[str], granularity: str | LayerFn) -> dict[str, list[str]]:
    """Parameters of each layer: layers by their first parameter, parameters in the order given."""
    layer_of = layer_function(granularity)
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(layer_of(name), []).append(name)
    return layers
