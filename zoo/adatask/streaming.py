"""Updates of the accumulators during the backward pass, without keeping a gradient per task."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoo.adatask.gradients import grad, infer_membership
from zoo.adatask.slots import JOINT, Entry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zoo.adatask.optimizer import AdaTask


PENDING_BYTES = 8 * 2**20
"""Gradients that may wait for a common kernel call: many small ones, or one large."""


class Streaming:
    """The low-memory variant: one gradient at a time goes into its accumulators and into a common update.

    Beyond the accumulators this needs one update and a few gradients, whatever the number of tasks.

    Args:
        optimizer: The optimizer.

    Attributes:
        membership: By parameter, the tasks that reach it.
        present: By task, whether it had a loss since the last step.
    """

    def __init__(self, optimizer: AdaTask) -> None:
        self._optimizer = optimizer
        self.membership: list[tuple[int, ...]] = []
        self.clear()

    def clear(self) -> None:
        """Forget what was computed since the last step; the accumulators keep what they have seen."""
        self._updates: dict[Tensor, Tensor] = {}
        self._joint: dict[Tensor, Tensor] = {}
        self.present = [False] * len(self._optimizer.tasks)

    def backward(self, losses: Sequence[Tensor | None]) -> None:
        """Advance the accumulators by the gradients of the losses, one task after the other.

        Raises:
            RuntimeError: If called twice before a step, or autograd fails.
        """
        if any(self.present):
            raise RuntimeError(
                "low_memory=True advances the moments in backward(), so gradients of several batches cannot be "
                "accumulated before a step"
            )
        optimizer = self._optimizer
        self.present = [loss is not None for loss in losses]
        # From the graph and at once: accumulators that grew task by task would be copied each time.
        self.membership = infer_membership(losses, optimizer.gradients.parameters)
        last = max((k for k, there in enumerate(self.present) if there), default=-1)
        for k, loss in enumerate(losses):
            if loss is not None:
                self._advance(k, loss, retain=k < last)
            elif optimizer.missing == "zero":
                ids = [ids for group in optimizer.param_groups for ids in group["task_ids"]]
                parameters = enumerate(optimizer.gradients.parameters)
                self._consume(k, {i: torch.zeros_like(p) for i, p in parameters if k in ids[i] and p.requires_grad})

    def _advance(self, task: int, loss: Tensor, retain: bool) -> None:
        """Give the accumulators a task's gradients, a few at a time as the pass brings them."""
        optimizer = self._optimizer
        parameters = optimizer.gradients.parameters
        reached = [i for i, ids in enumerate(self.membership) if task in ids]
        pending: dict[int, Tensor] = {}
        waiting = 0

        def take(i: int, gradient: Tensor | None) -> Tensor | None:
            nonlocal waiting
            if gradient is None:
                return None
            optimizer.refuse_sparse(i, gradient)
            pending[i] = gradient
            waiting += gradient.nbytes
            if waiting >= PENDING_BYTES:
                self._consume(task, pending)
                waiting = 0
            # In place of the gradient, which autograd would keep until the end of its pass.
            return gradient.new_zeros(()).expand_as(gradient)

        hooks = [parameters[i].register_hook(partial(take, i)) for i in reached]  # type: ignore[no-untyped-call]
        try:
            grad(loss, [parameters[i] for i in reached], retain)
        finally:
            for hook in hooks:
                hook.remove()
        self._consume(task, pending)

    @torch.no_grad()
    def _consume(self, task: int, pending: dict[int, Tensor]) -> None:
        """Put gradients, by the number of their parameter, into the accumulators, and forget them."""
        optimizer, start = self._optimizer, 0
        for group in optimizer.param_groups:
            batches: dict[float, list[Entry]] = {}
            for i in [i for i in pending if start <= i < start + len(group["params"])]:
                gradient, position = pending.pop(i), i - start
                parameter, ids = group["params"][position], group["task_ids"][position]
                if not group["shared"]:
                    before = self._joint.get(parameter)
                    self._joint[parameter] = gradient if before is None else before + gradient
                    continue
                slots = optimizer.slots.ensure(group, position, self.membership[i])
                if parameter not in self._updates:
                    self._updates[parameter] = torch.zeros_like(parameter)
                entry = (self._updates[parameter], gradient, slots[ids.index(task)])
                batches.setdefault(optimizer.factor(task, len(ids)), []).append(entry)
            start += len(group["params"])
            for factor, entries in batches.items():
                optimizer.slots.apply(group, entries, factor)

    @torch.no_grad()
    def step(self) -> None:
        """Decay the weights and apply the common update."""
        optimizer = self._optimizer
        for group in optimizer.param_groups:
            for position, parameter in enumerate(group["params"]):
                ids = group["task_ids"][position]
                zero = optimizer.missing == "zero" and JOINT in optimizer.absent(ids, self.present)
                if zero and parameter not in self._joint and parameter.requires_grad:
                    self._joint[parameter] = torch.zeros_like(parameter)
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
