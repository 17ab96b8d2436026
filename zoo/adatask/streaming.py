"""Updates of the accumulators during the backward pass, without keeping a gradient per task."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoo.adatask.gradients import infer_membership
from zoo.adatask.slots import JOINT, Entry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zoo.adatask.optimizer import AdaTask


class Streaming:
    """The low-memory variant: one gradient at a time goes into its accumulators and into a common update.

    Beyond the accumulators this needs one gradient and one update, whatever the number of tasks.

    Args:
        optimizer: The optimizer.

    Attributes:
        membership: By parameter, the tasks that reach it.
    """

    def __init__(self, optimizer: AdaTask) -> None:
        self._optimizer = optimizer
        self.membership: list[tuple[int, ...]] = []
        self.clear()

    def clear(self) -> None:
        """Forget what was computed since the last step; the accumulators keep what they have seen."""
        self._updates: dict[Tensor, Tensor] = {}
        self._joint: dict[Tensor, Tensor] = {}

    @property
    def empty(self) -> bool:
        """Whether there is nothing to apply."""
        return not self._updates and not self._joint

    def backward(self, losses: Sequence[Tensor | None]) -> None:
        """Advance the accumulators by the gradients of the losses, one task after the other.

        Raises:
            RuntimeError: If called twice before a step.
        """
        if not self.empty:
            raise RuntimeError(
                "low_memory=True advances the moments in backward(), so gradients of several batches cannot be "
                "accumulated before a step"
            )
        optimizer = self._optimizer
        parameters = optimizer.gradients.parameters
        # From the graph and at once: accumulators that grew task by task would be copied each time.
        self.membership = infer_membership(losses, parameters)
        last = max(k for k, loss in enumerate(losses) if loss is not None)
        for k, loss in enumerate(losses):
            if loss is None and optimizer.missing == "skip":
                continue
            self._advance(k, loss, retain=k < last)

    def _advance(self, task: int, loss: Tensor | None, retain: bool) -> None:
        optimizer = self._optimizer
        parameters = optimizer.gradients.parameters
        reached = [i for i, ids in enumerate(self.membership) if task in ids]
        row: list[Tensor | None] = [None] * len(parameters)
        if loss is not None and reached:
            found = torch.autograd.grad(loss, [parameters[i] for i in reached], retain_graph=retain, allow_unused=True)
            for i, gradient in zip(reached, found, strict=True):
                row[i] = gradient
            del found
        optimizer.refuse_sparse(row)
        with torch.no_grad():
            self._consume(task, loss is None, row)

    def _consume(self, task: int, absent: bool, row: list[Tensor | None]) -> None:
        optimizer, start = self._optimizer, 0
        for group in optimizer.param_groups:
            batches: dict[float, list[Entry]] = {}
            for position, parameter in enumerate(group["params"]):
                i = start + position
                gradient, row[i] = row[i], None
                ids = group["task_ids"][position]
                if gradient is None and absent and task in ids:
                    gradient = torch.zeros_like(parameter)
                if gradient is None:
                    continue
                if not group["shared"]:
                    before = self._joint.get(parameter)
                    self._joint[parameter] = gradient if before is None else before + gradient
                    continue
                slots = optimizer.slots.ensure(group, position, [k for k in self.membership[i] if k not in ids])
                if parameter not in self._updates:
                    self._updates[parameter] = torch.zeros_like(parameter)
                entry = (self._updates[parameter], gradient, slots[ids.index(task)])
                batches.setdefault(optimizer.factor(task, len(ids)), []).append(entry)
            start += len(group["params"])
            for factor, entries in batches.items():
                optimizer.slots.apply(group, entries, factor)

    def step(self) -> None:
        """Decay the weights and apply the common update."""
        optimizer = self._optimizer
        for group in optimizer.param_groups:
            changed = [p for p in group["params"] if p in self._updates or p in self._joint]
            if group["weight_decay"] and changed:
                torch._foreach_mul_(changed, 1 - float(group["lr"]) * group["weight_decay"])
            for position, parameter in enumerate(group["params"]):
                if parameter in self._updates:
                    parameter.add_(self._updates[parameter])
                elif parameter in self._joint:
                    slots = optimizer.slots.ensure(group, position, [JOINT])
                    optimizer.slots.apply(group, [(parameter, self._joint[parameter], slots[0])], 1.0)
        self.clear()
