"""What a task is: its name, the kind of its labels, and the size and scale of its head."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Kind = Literal["binary", "multiclass", "regression", "segmentation", "depth", "normals"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Outputs of a head, smallest and largest.
_NUM_OUTPUTS: dict[str, tuple[int, float]] = {
    "binary": (1, 1),
    "multiclass": (2, math.inf),
    "regression": (1, math.inf),
    "segmentation": (2, math.inf),
    "depth": (1, 1),
    "normals": (3, 3),
}


@dataclass(frozen=True)
class TaskSpec:
    """One task of a multi-task model, in plain values.

    Args:
        name: Name in logs and of the task's head; neither empty nor with a dot or slash.
        kind: What the labels are: "binary", "multiclass", "regression" (one label a row or image), "segmentation",
            "depth" or "normals" (one label a pixel).
        num_outputs: Width of the head: 1 (binary, depth), 3 (normals), the number of classes (multiclass,
            segmentation), the number of targets (regression).
        target_mean: Mean of the training targets (regression alone). A head puts out z; z * `target_std` +
            `target_mean` is the prediction in natural units.
        target_std: Standard deviation of the training targets (regression alone).

    Raises:
        ValueError: If a field is not valid; the text names the field and its value.
    """

    name: str
    kind: Kind
    num_outputs: int = 1
    target_mean: float = 0.0
    target_std: float = 1.0

    def __post_init__(self) -> None:
        """Check the fields."""
        name = self.name
        if not isinstance(name, str) or not name.strip() or "." in name or "/" in name:
            raise ValueError(f"a task's name must be a text without dots and slashes, got name={name!r}")
        if hasattr(nn.ModuleDict(), name):
            raise ValueError(f"name={name!r} is an attribute of torch's modules and cannot name a task's head")
        if self.kind not in KINDS:
            raise ValueError(f"task {name!r}: kind must be one of {list(KINDS)}, got kind={self.kind!r}")
        self._check_num_outputs()
        for field in ("target_mean", "target_std"):
            value = getattr(self, field)
            if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
                raise ValueError(f"task {name!r}: {field} must be a finite number, got {field}={value!r}")
            # Checkpoints take no NumPy scalars.
            object.__setattr__(self, field, float(value))
        if self.target_std <= 0:
            raise ValueError(f"task {name!r}: target_std must be above 0, got target_std={self.target_std!r}")
        if self.kind != "regression" and (self.target_mean, self.target_std) != (0.0, 1.0):
            raise ValueError(
                f"task {name!r}: target_mean and target_std belong to regression, got kind={self.kind!r} with "
                f"target_mean={self.target_mean!r}, target_std={self.target_std!r}"
            )

    def _check_num_outputs(self) -> None:
        value = self.num_outputs
        lowest, highest = _NUM_OUTPUTS[self.kind]
        if not isinstance(value, Integral) or isinstance(value, bool) or not lowest <= value <= highest:
            expected = f"{lowest}" if lowest == highest else f"an integer of at least {lowest}"
            raise ValueError(
                f"task {self.name!r}: num_outputs of a {self.kind} task must be {expected}, got num_outputs={value!r}"
            )
        object.__setattr__(self, "num_outputs", int(value))

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> TaskSpec:
        """The task that a mapping (a YAML block) describes.

        Raises:
            ValueError: If a key is unknown or missing, or a value is not valid.
        """
        known = [field.name for field in fields(cls)]
        unknown = [key for key in mapping if key not in known]
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r} in task {dict(mapping)!r}; the keys are {known}")
        missing = [key for key in ("name", "kind") if key not in mapping]
        if missing:
            raise ValueError(f"key {missing[0]!r} is missing in task {dict(mapping)!r}")
        return cls(**mapping)

    def as_dict(self) -> dict[str, Any]:
        """All fields as plain values; `from_mapping` takes them back."""
        return asdict(self)


def task_specs(tasks: Sequence[TaskSpec | Mapping[str, Any]]) -> tuple[TaskSpec, ...]:
    """Tasks given as `TaskSpec` or as mappings, checked.

    Raises:
        ValueError: If there is no task, a name occurs twice, or a description is not valid.
    """
    specs = tuple(task if isinstance(task, TaskSpec) else TaskSpec.from_mapping(task) for task in tasks)
    if not specs:
        raise ValueError("tasks must name at least one task, got none")
    names = [spec.name for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"tasks must have distinct names, {twice[0]!r} occurs {names.count(twice[0])} times")
    return specs
