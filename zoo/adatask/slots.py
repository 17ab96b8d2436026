"""The accumulators of an AdaTask optimizer: one slot per parameter and task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from zoo.adatask.rules import STATES, Accumulators, apply_rule, has_fused_kernel, new_state

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zoo.adatask.optimizer import AdaTask

JOINT = -1
"""In place of a task: the slot of a parameter whose gradients are summed before the rule."""


class Slot(NamedTuple):
    """The accumulators of one parameter and task.

    Attributes:
        tensors: Clock, moments, and what else the rule has.
        narrow: Whether the first moment is of another type than the second.
        kernel: Whether torch has a fused kernel for the parameter.
    """

    tensors: tuple[Tensor, ...]
    narrow: bool
    kernel: bool


Entry: TypeAlias = "tuple[Tensor, Tensor, Slot]"
"""What an update is added to, a gradient, and its slot."""


class Slots:
    """Makes, extends, hands out and restores accumulators; they lie in the optimizer's `state`.

    Args:
        optimizer: The optimizer.
        first_moment_dtype: Type of the first moments; that of the parameters by default.
    """

    def __init__(self, optimizer: AdaTask, first_moment_dtype: torch.dtype | None) -> None:
        self._optimizer = optimizer
        self._first_moment_dtype = first_moment_dtype
        self._adopted: dict[Tensor, dict[str, Tensor]] = {}
        self._cut: dict[Tensor, tuple[Tensor, list[Slot]]] = {}

    def forget(self) -> None:
        """Let go of the tensors of the state, which somebody may want to move and free."""
        self._cut.clear()

    def _names(self, group: dict[str, Any]) -> list[str]:
        return ["step", *STATES[self._optimizer.rule], *(["max_exp_avg_sq"] if group["amsgrad"] else [])]

    def ensure(self, group: dict[str, Any], position: int, tasks: Sequence[int]) -> list[Slot]:
        """A parameter's slots, in the order of its `task_ids`.

        Args:
            group: A parameter group.
            position: Which of its parameters.
            tasks: Tasks that need a slot; those without one get an empty one.
        """
        parameter, ids = group["params"][position], group["task_ids"][position]
        state = self._optimizer.state[parameter]
        if "step" not in state:
            ids.clear()  # somebody has cleared the optimizer's state
        fresh = [k for k in tasks if k not in ids]
        rule = self._optimizer.rule
        if fresh:
            on_device = group["fused"] is not False and parameter.is_cuda and has_fused_kernel(rule, parameter)
            new = new_state(rule, parameter, len(fresh), group["amsgrad"], self._first_moment_dtype, on_device)
            new |= {name: parameter.new_zeros(len(fresh)) for name in self._optimizer.extra_states}
            if parameter in self._adopted:
                self._fill(new, self._adopted.pop(parameter), len(fresh))
            for name, value in new.items():
                state[name] = torch.cat([state[name], value]) if ids else value
            ids.extend(fresh)
        # Cutting the state anew in every step takes longer than the arithmetic on small tensors.
        cached, last = self._cut.get(parameter), state[STATES[rule][-1]]
        if cached is None or cached[0] is not last:
            kernel = group["fused"] is not False and has_fused_kernel(rule, parameter)
            narrow = rule == "adam" and state["exp_avg"].dtype != last.dtype
            columns = (state[name].unbind() for name in self._names(group))
            slots = [Slot(tensors, narrow, kernel) for tensors in zip(*columns, strict=True)]
            cached = self._cut[parameter] = (last, slots)
        return cached[1]

    def apply(self, group: dict[str, Any], entries: Sequence[Entry], factor: float) -> None:
        """Add `-lr * factor * u_k` to the targets of some slots, and advance the slots: one kernel call, as a rule."""
        fused: list[Entry] = []
        plain: list[Entry] = []
        for entry in entries:
            target, gradient, slot = entry
            kernel = slot.kernel and target.is_contiguous()
            if kernel and not gradient.is_contiguous():
                # The fused kernels read memory as it lies; autograd's gradients may be expanded or permuted.
                entry = (target, gradient.contiguous(), slot)
            if slot.narrow:
                step, first, second, *more = slot.tensors
                wide = first.to(second.dtype)
                self._call(
                    group, [(target, entry[1], slot._replace(tensors=(step, wide, second, *more)))], factor, kernel
                )
                first.copy_(wide)
            else:
                (fused if kernel else plain).append(entry)
        if fused:
            self._call(group, fused, factor, True)
        if plain:
            self._call(group, plain, factor, False)

    def _call(self, group: dict[str, Any], entries: Sequence[Entry], factor: float, fused: bool) -> None:
        targets, gradients, slots = zip(*entries, strict=True)
        columns = [list(column) for column in zip(*(slot.tensors for slot in slots), strict=True)]
        steps, moments = columns[0], columns[1:]
        rule = self._optimizer.rule
        first = moments.pop(0) if rule == "adam" else []
        accumulators = Accumulators(steps, first, moments[0], moments[1] if len(moments) > 1 else [])
        apply_rule(rule, targets, gradients, accumulators, group, group["lr"] * factor, fused)

    def check(self, state_dict: dict[str, Any]) -> None:
        """Raise a ValueError if a state does not belong to such an optimizer."""
        optimizer = self._optimizer
        for number, group in enumerate(state_dict["param_groups"]):
            if "task_ids" not in group:
                raise ValueError(
                    "the state is that of an optimizer with one accumulator per parameter, AdaTask has one per task: "
                    "use load_adam_state(state_dict, copy='zeros'), or copy='shared'"
                )
            if list(group["tasks"]) != list(optimizer.tasks):
                raise ValueError(
                    f"the state has the tasks {', '.join(group['tasks'])}, this optimizer {', '.join(optimizer.tasks)}"
                )
            expected = {*self._names(group), *optimizer.extra_states}
            for position, ids in zip(group["params"], group["task_ids"], strict=True):
                state = state_dict["state"].get(position)
                if state is not None and (set(state) != expected or len(state["step"]) != len(ids)):
                    raise ValueError(
                        f"group {number}, parameter {position}: the state holds {', '.join(sorted(state))} for "
                        f"{len(ids)} tasks; rule={optimizer.rule!r} needs {', '.join(sorted(expected))}"
                    )

    def restored(self) -> None:
        """After a state was loaded: put the types right, which torch has made those of the parameters."""
        self._adopted.clear()
        self._cut.clear()
        rule = self._optimizer.rule
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                state = self._optimizer.state.get(parameter)
                if not state:
                    continue
                if self._first_moment_dtype is not None:
                    state["exp_avg"] = state["exp_avg"].to(self._first_moment_dtype)
                if parameter.is_cuda and group["fused"] is not False and has_fused_kernel(rule, parameter):
                    state["step"] = state["step"].to(parameter.device)

    def adopt(self, state_dict: dict[str, Any], copy: str) -> None:
        """Take over the state of an optimizer with one accumulator per parameter (see `AdaTask.load_adam_state`)."""
        if copy not in ("zeros", "shared"):
            raise ValueError(f"copy must be 'zeros' or 'shared', got {copy!r}")
        optimizer = self._optimizer
        if optimizer.state:
            raise ValueError("load_adam_state is for an optimizer that has not made a step yet")
        groups = optimizer.param_groups
        sizes = [[len(group["params"]) for group in side] for side in (groups, state_dict["param_groups"])]
        if sizes[0] != sizes[1]:
            raise ValueError(f"the state has groups of {sizes[1]} parameters, this optimizer of {sizes[0]}")
        adopted = {}
        for group, saved in zip(groups, state_dict["param_groups"], strict=True):
            for parameter, position in zip(group["params"], saved["params"], strict=True):
                state = state_dict["state"].get(position, {})
                if copy == "shared" and state:
                    missing = [name for name in self._names(group) if name not in state]
                    if missing:
                        raise ValueError(f"parameter {position}: the state has no {', '.join(missing)}")
                    adopted[parameter] = state
        self._adopted = adopted
        for group, saved in zip(groups, state_dict["param_groups"], strict=True):
            group |= {name: saved[name] for name in ("lr", "betas", "alpha", "eps", "initial_lr") if name in saved}

    def _fill(self, new: dict[str, Tensor], state: dict[str, Tensor], slots: int) -> None:
        for name, value in new.items():
            if name in self._optimizer.extra_states:
                continue
            # Old releases of torch have the step as a number.
            value.copy_(torch.as_tensor(state[name]).to(value.device) / (slots if name == "exp_avg" else 1))
