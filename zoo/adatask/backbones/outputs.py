"""What every backbone returns, what its tasks may be called, and one backbone per task side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


class MultiTaskOutput(NamedTuple):
    """Predictions of all tasks, and where autograd can be cut between shared and task-specific parameters.

    Attributes:
        outputs: By task, raw logits or raw values: `(batch, num_outputs)`, or `(batch, num_outputs, height, width)`
            for dense tasks.
        features: The tensors through which every task reaches the shared parameters; every task reaches each of them,
            none is computed from another, and each parameter that one task alone reaches lies behind them. So
            `g = grad(loss, features)` followed by `grad(features, shared, g)` is the gradient of the shared
            parameters. Tensors without a gradient are left out (numbers of a table, everything under `no_grad`).
            None where shared and task-specific layers interleave.
    """

    outputs: dict[str, Tensor]
    features: list[Tensor] | None


def differentiable(*features: Tensor) -> list[Tensor]:
    """Those of the tensors at which autograd can be cut."""
    return [feature for feature in features if feature.requires_grad]


def check_outputs(outputs: Mapping[str, int]) -> dict[str, int]:
    """The tasks and their output counts, checked.

    Args:
        outputs: Output count by task name.

    Raises:
        ValueError: No task, a count below 1, or a name that cannot name a submodule.
    """
    if not outputs:
        raise ValueError("outputs is empty: a backbone needs at least one task")
    empty = nn.ModuleDict()
    for name, count in outputs.items():
        if not name or "." in name or hasattr(empty, name):
            raise ValueError(
                f"task name {name!r} cannot name a submodule: it must not be empty, contain a dot, or be an attribute "
                "of torch.nn.ModuleDict"
            )
        if count < 1:
            raise ValueError(f"task {name!r} must have at least 1 output, got {count}")
    return dict(outputs)


def check_sizes(**sizes: int | Sequence[int]) -> None:
    """Check that all numbers, alone or in sequences, are positive.

    Raises:
        ValueError: With the argument's name and value.
    """
    for name, value in sizes.items():
        if any(size < 1 for size in ([value] if isinstance(value, int) else value)):
            raise ValueError(f"{name} must be at least 1, got {value}")


class SeparateBackbones(nn.Module):
    """One independent backbone per task: the single-task baseline of all tasks in one run.

    Args:
        outputs: Output count by task name.
        build: Builds the backbone of the one task in the mapping that it is given.

    Raises:
        ValueError: If the tasks are not valid (see `check_outputs`).
    """

    def __init__(self, outputs: Mapping[str, int], build: Callable[[dict[str, int]], nn.Module]) -> None:
        super().__init__()
        self.backbones = nn.ModuleDict({name: build({name: n}) for name, n in check_outputs(outputs).items()})

    def forward(self, *inputs: Tensor) -> MultiTaskOutput:
        """The outputs of all backbones on the same `inputs`; no features, for nothing is shared."""
        return MultiTaskOutput({name: part(*inputs).outputs[name] for name, part in self.backbones.items()}, None)
