"""Networks with one output per task; each tells where its shared part ends (`MultiTaskOutput.features`)."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from zoo.adatask.backbones.experts import PLE, MMoE
from zoo.adatask.backbones.lenet import LeNet
from zoo.adatask.backbones.mtan import MTAN
from zoo.adatask.backbones.outputs import MultiTaskOutput, SeparateBackbones
from zoo.adatask.backbones.segnet import SegNet
from zoo.adatask.backbones.tabular import SharedBottom, SingleTask, TableEmbedding

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

__all__ = [
    "BACKBONES",
    "MTAN",
    "PLE",
    "LeNet",
    "MMoE",
    "MultiTaskOutput",
    "SegNet",
    "SeparateBackbones",
    "SharedBottom",
    "SingleTask",
    "TableEmbedding",
    "build_backbone",
]

_TABLES: dict[str, type[nn.Module]] = {"shared_bottom": SharedBottom, "mmoe": MMoE, "ple": PLE}
_IMAGES: dict[str, type[nn.Module]] = {"lenet": LeNet, "segnet": SegNet, "mtan": MTAN}

BACKBONES = ("shared_bottom", "single_task", "mmoe", "ple", "lenet", "segnet", "mtan")
"""Names that `build_backbone` knows."""


def build_backbone(
    name: str,
    outputs: Mapping[str, int],
    *,
    cardinalities: Sequence[int] | None = None,
    num_numeric: int = 0,
    in_channels: int = 3,
    **options: Any,
) -> nn.Module:
    """A backbone by name.

    Args:
        name: One of `BACKBONES`. "single_task" is one backbone per task, of the kind that its option `base` names
            ("shared_bottom" unless given).
        outputs: Output count by task name.
        cardinalities: Codes per categorical column of a table.
        num_numeric: Numeric columns of a table.
        in_channels: Channels of images.
        options: Further constructor arguments of the backbone.

    Returns:
        A module from `(categories, numbers)` (tables) or `images` to `MultiTaskOutput`.

    Raises:
        ValueError: An unknown name or option, columns of a table for a network of images, or no columns for one of
            tables.
    """
    if name == "single_task":
        base = options.pop("base", "shared_bottom")
        if base not in _TABLES and base not in _IMAGES:
            raise ValueError(f"unknown base {base!r} of single_task, expected one of {', '.join([*_TABLES, *_IMAGES])}")

        def build(one: dict[str, int]) -> nn.Module:
            return build_backbone(
                base, one, cardinalities=cardinalities, num_numeric=num_numeric, in_channels=in_channels, **options
            )

        return SeparateBackbones(outputs, build)
    kind = _TABLES.get(name) or _IMAGES.get(name)
    if kind is None:
        raise ValueError(f"unknown backbone {name!r}, expected one of {', '.join(BACKBONES)}")
    has_table = bool(cardinalities) or num_numeric > 0
    if has_table != (name in _TABLES):
        given = f"cardinalities={cardinalities} and num_numeric={num_numeric}"
        needs = "needs the columns of a table" if name in _TABLES else "takes images, not the columns of a table"
        raise ValueError(
            f"backbone {name!r} {needs}, got {given}; backbones of tables are {', '.join(_TABLES)}, of images "
            f"{', '.join(_IMAGES)}"
        )
    data: dict[str, Any] = {"in_channels": in_channels}
    if name in _TABLES:
        data = {"cardinalities": list(cardinalities or ()), "num_numeric": num_numeric}
    accepted = [option for option in inspect.signature(kind).parameters if option not in ("outputs", *data)]
    for option in options:
        if option not in accepted:
            raise ValueError(f"unknown option {option!r} of backbone {name!r}, expected one of {', '.join(accepted)}")
    return kind(outputs, **data, **options)
