"""AdaTask: adaptive learning rates with separate accumulators for each task."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from zoo.adatask.composition import aggregate_gradients, aggregate_updates
from zoo.adatask.gradients import check_losses, scaled_grads, task_names
from zoo.adatask.options import check_group, check_options
from zoo.adatask.rules import DEFAULT_EPS
from zoo.adatask.slots import JOINT, Entry, Slots
from zoo.adatask.streaming import Streaming
from zoo.adatask.task_gradients import TaskGradients, total

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT

Losses: TypeAlias = "Mapping[str, Tensor | None] | Sequence[Tensor | None]"
UpdateHook: TypeAlias = Callable[[Tensor, Tensor, list[int]], None]


class AdaTask(Optimizer):
    """Adam, RMSProp or AdaGrad with one set of accumulators per task on shared parameters (Algorithm 2).

    For task k with gradient g_k: m_k <- beta1 m_k + (1 - beta1) g_k, G_k <- beta2 G_k + (1 - beta2) g_k², both
    corrected for their bias, and p <- p - lr Σ_k m_k / (√G_k + eps); "rmsprop" and "adagrad" likewise. What one task
    alone reaches gets the ordinary rule. Which tasks reach a parameter is learnt from the gradients.

        optimizer = AdaTask(model.parameters(), ["click", "like"], lr=1e-3)
        optimizer.zero_grad()
        optimizer.backward({"click": click_loss, "like": like_loss})
        optimizer.step()

    A constant factor in a loss changes nothing on shared parameters, so a weight belongs into `task_weights`. Where
    tasks agree the step is K times that of the base rule; `reduction="mean"` divides it. A step need not decrease the
    sum of the losses: gradients (1, 1, 1, -4) move a parameter by -2 lr.

    Parameter groups take `lr`, `betas`, `alpha`, `eps`, `weight_decay` and `shared`: with `shared=False` the gradients
    of a group are summed and get one set of accumulators, which saves memory on large embedding tables; aggregators
    leave such a group alone.

    Args:
        params: Parameters or parameter groups.
        tasks: Number of tasks, or their names.
        rule: "adam", "rmsprop" or "adagrad".
        lr: Learning rate.
        betas: Decays of first and second moment ("adam"; the paper's gamma_2 and gamma_1).
        alpha: Decay of the squares ("rmsprop"; the paper's gamma_1).
        eps: Added to the root; 1e-8, and 1e-10 for "adagrad", by default.
        weight_decay: Decoupled decay, applied once per step.
        amsgrad: Divide by the largest second moment so far of each task ("adam").
        reduction: "sum" of the tasks' updates, as published, or their "mean".
        task_weights: Factor of each task's update on shared parameters, applied after the preconditioning.
        missing: A task without a loss: "skip" leaves its accumulators and clock alone, "zero" takes a gradient of
            zero for it, "error" refuses.
        nonfinite: A loss that is NaN or infinite: "error", "skip" (the task is missing), or "ignore".
        aggregator: Function of a matrix `(tasks, elements)` that returns a matrix of that shape, or weights `(tasks,)`.
        compose: Where the aggregator works: "pre" on the gradients, "post" on the tasks' updates, where weights are
            scaled to a mean of 1 over the tasks that are present.
        first_moment_dtype: Type of the first moments, such as `torch.bfloat16`; that of the parameters by default.
        low_memory: Update each task's accumulators during `backward` and drop its gradients as they come. About one
            copy of the shared parameters in place of K + 1. Refuses what needs all gradients at the step: aggregators,
            several backward calls per step, a GradScaler; `TaskGradMixin` refuses clipping and several processes.
        fused: Use torch's fused kernels; by default where there are some.
        maximize: Ascend.

    Raises:
        ValueError: If an option is out of its range.
        RuntimeError: If `fused=True` and there is no fused kernel.
    """

    extra_states: tuple[str, ...] = ()
    """What a subclass keeps per slot beside the accumulators: one number each."""

    def __init__(
        self,
        params: ParamsT,
        tasks: int | Sequence[str],
        *,
        rule: str = "adam",
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        alpha: float = 0.99,
        eps: float | None = None,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        reduction: str = "sum",
        task_weights: Sequence[float] | None = None,
        missing: str = "skip",
        nonfinite: str = "error",
        aggregator: Callable[[Tensor], Tensor] | None = None,
        compose: str = "pre",
        first_moment_dtype: torch.dtype | None = None,
        low_memory: bool = False,
        fused: bool | None = None,
        maximize: bool = False,
    ) -> None:
        self.tasks = task_names(tasks)
        self.rule, self.reduction, self.missing, self.nonfinite = rule, reduction, missing, nonfinite
        self.aggregator, self.compose, self.low_memory = aggregator, compose, low_memory
        self.first_moment_dtype = first_moment_dtype
        self.task_weights = tuple(map(float, [1.0] * len(self.tasks) if task_weights is None else task_weights))
        check_options(self, first_moment_dtype)
        defaults = {
            "lr": lr, "betas": tuple(betas), "alpha": alpha, "eps": DEFAULT_EPS[rule] if eps is None else eps,
            "weight_decay": weight_decay, "amsgrad": amsgrad, "maximize": maximize, "fused": fused, "shared": True,
        }  # fmt: skip
        self._seen = [False] * len(self.tasks)
        self._checked = self._ready = False
        self.weights_warned = False
        super().__init__(params, defaults)
        self._build()
        if len(self.tasks) == 1:
            warnings.warn(f"AdaTask with one task is plain {rule}", stacklevel=2)

    def _build(self) -> None:
        """What is made of the groups and not kept in copies."""
        self._hooks: OrderedDict[int, UpdateHook] = OrderedDict()
        self.gradients = TaskGradients.of_groups(self.param_groups, self.tasks)
        self.slots = Slots(self, self.first_moment_dtype)
        self.streaming = Streaming(self) if self.low_memory else None

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: everything but gradients and hooks."""
        dropped = ("gradients", "slots", "streaming", "_hooks")
        own = {name: value for name, value in vars(self).items() if name not in dropped and "_optimizer_" not in name}
        return {**own, **super().__getstate__()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, or put a loaded state in place."""
        super().__setstate__(state)
        if "tasks" in state:
            self._build()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; which tasks reach its parameters is learnt at the next step."""
        if self._ready:
            raise RuntimeError("a parameter group was added between backward() and step()")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_group(self.rule, group)
        group |= {"task_ids": [[] for _ in group["params"]], "tasks": list(self.tasks)}
        if hasattr(self, "gradients"):
            self.gradients = TaskGradients.of_groups(self.param_groups, self.tasks)
            self._checked = False

    def add_update_hook(self, hook: UpdateHook) -> RemovableHandle:
        """Call `hook(parameter, updates, task_ids)` in every step.

        `updates` is `(slots, *shape)`: what each of the tasks adds to the parameter, whose sum is the change of the
        parameter without weight decay. A parameter whose gradients are summed has the task id `JOINT`.

        Returns:
            A handle with `remove()`.

        Raises:
            RuntimeError: With `low_memory`, which does not keep the tasks' updates.
        """
        if self.low_memory:
            raise RuntimeError("low_memory=True does not keep the update of each task: watch without it")
        handle = RemovableHandle(self._hooks)
        self._hooks[handle.id] = hook
        return handle

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, summed and by task."""
        super().zero_grad(set_to_none)
        self.gradients.clear()
        self._ready = False
        if self.streaming is not None:
            self.streaming.clear()

    def backward(
        self,
        losses: Losses,
        features: Tensor | Sequence[Tensor] | None = None,
        mode: str = "loop",
        counts: Tensor | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """Compute the gradient of each task, instead of `loss.backward()`.

        The gradients stay with the optimizer; `.grad` is set to their sum for loggers (not with `low_memory`). Several
        calls before a step add up, as in torch. If a call with `low_memory` fails half way, some accumulators have
        advanced: continue from a checkpoint.

        Args:
            losses: A scalar per task, by name or in order, unsummed; None for a task without a label in this batch.
            features: The tensors between trunk and heads, for `mode` "cut" and "batched".
            mode: How to pass backwards (see `per_task_grads`).
            counts: float `(tasks,)`, valid labels behind each loss. Several calls, and several processes, are then
                averaged over the labels instead of summed, as one large batch would be.
            scaler: A GradScaler: losses are scaled for the pass, and the gradients that the moments see are not.

        Raises:
            ValueError: If losses and tasks do not fit, or a loss is not finite.
            RuntimeError: If autograd fails, or a gradient is sparse.
        """
        nonfinite = "ignore" if scaler is not None and self.nonfinite == "error" else self.nonfinite
        ordered = check_losses(losses, self.tasks, nonfinite)
        present = [loss is not None for loss in ordered]
        self._ready = True
        if self.missing == "error" and not all(present):
            absent = ", ".join(name for name, there in zip(self.tasks, present, strict=True) if not there)
            raise ValueError(f"no loss for {absent}, and missing='error'")
        if self.streaming is not None:
            if scaler is not None or counts is not None or mode != "loop":
                raise RuntimeError(
                    "low_memory=True updates the moments during backward(): no GradScaler, no counts, mode='loop' only"
                )
            self.streaming.backward(ordered)
            return
        rows, factor = scaled_grads(ordered, self.gradients.parameters, features, mode, scaler)
        for row in rows:
            for i, gradient in enumerate(row):
                if gradient is not None:
                    self.refuse_sparse(i, gradient)
        self.gradients.accumulate(rows, present, counts, None if factor is None else 1 / factor)
        self.gradients.write_grad(factor)
        if scaler is not None and not any(present):
            # A scaler refuses a step for which it has seen no gradient at all.
            self.gradients.parameters[0].grad = torch.zeros_like(self.gradients.parameters[0])

    def mark_ready(self) -> None:
        """Let `step` do nothing where no process had a loss; otherwise that is an error."""
        self._ready = True

    def refuse_sparse(self, index: int, gradient: Tensor) -> None:
        """Raise a RuntimeError if the gradient of parameter number `index` is sparse."""
        if gradient.layout != torch.strided:
            raise RuntimeError(
                f"the gradient of {self._name(index)} is sparse, which AdaTask does not support: build the embedding "
                "with sparse=False, or give it an optimizer of its own"
            )

    def _name(self, index: int) -> str:
        """What parameter number `index` is called."""
        for number, group in enumerate(self.param_groups):
            if index < len(group["params"]):
                shape = tuple(group["params"][index].shape)
                return f"{group['param_names'][index]}" if "param_names" in group else (
                    f"parameter {index} of group {number} (shape {shape})")  # fmt: skip
            index -= len(group["params"])
        raise IndexError(index)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters from the gradients that `backward` left.

        Args:
            closure: Computes losses and calls `backward`; run first, with gradients enabled.

        Returns:
            What the closure returns.

        Raises:
            RuntimeError: If there are no gradients of the tasks.
            ValueError: If no parameter is shared by two tasks, or the aggregator returns another shape.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        ready, self._ready = self._ready, False
        present = self.gradients.present if self.streaming is None else self.streaming.present
        if not any(present):
            # Nothing to do without a single loss, as in a batch that Lightning leaves out.
            if not ready and (closure is None or result is not None):
                self._explain_empty()
            return result
        self._seen = [a or b for a, b in zip(self._seen, present, strict=True)]
        if self.streaming is not None:
            self._check_reach(self.streaming.membership)
            self.streaming.step()
            return result
        shared = self.gradients.shared()
        self._check_reach()
        if self.aggregator is not None and self.compose == "pre" and shared:
            aggregate_gradients(self, shared)
        materialise = bool(self._hooks) or (self.aggregator is not None and self.compose == "post")
        updates: dict[Tensor, Tensor] | None = {} if materialise else None
        start = 0
        for group in self.param_groups:
            self._step_group(group, start, updates)
            start += len(group["params"])
        if updates is not None:
            self._apply_updates(updates, shared)
        return result

    def _explain_empty(self) -> None:
        if any(parameter.grad is not None for parameter in self.gradients.parameters):
            raise RuntimeError(
                "there are no gradients by task, only .grad: a joint gradient cannot be split. Call "
                "optimizer.backward(losses) in place of loss.backward()"
            )
        raise RuntimeError("no task gradients on shared parameters; call optimizer.backward(losses) before step()")

    def _check_reach(self, membership: Sequence[Sequence[int]] | None = None) -> None:
        """Once all tasks have been seen: is anything shared, and is anything not reached at all?"""
        if self._checked or not all(self._seen):
            return
        if membership is None:
            rows = self.gradients.rows
            membership = [[k for k, row in enumerate(rows) if row[i] is not None] for i in range(len(rows[0]))]
        known = [ids for group in self.param_groups for ids in group["task_ids"]]
        union = [{*now, *before} for now, before in zip(membership, known, strict=True)]
        if len(self.tasks) > 1 and not any(len(ids) > 1 or JOINT in ids for ids in union):
            raise ValueError(
                "no parameter is shared by two or more tasks, so there is nothing to separate: use the base "
                f"optimizer ({self.rule}) on the summed loss"
            )
        unreached = [self._name(i) for i, ids in enumerate(union) if not ids]
        if unreached:
            shown = ", ".join(unreached[:5]) + (", ..." if len(unreached) > 5 else "")
            warnings.warn(f"no loss reaches {shown} ({len(unreached)} in all): left as they are", stacklevel=4)
        self._checked = True

    def _step_group(self, group: dict[str, Any], start: int, updates: dict[Tensor, Tensor] | None) -> None:
        rows = self.gradients.rows
        batches: dict[tuple[int, float], list[Entry]] = {}
        changed: list[Tensor] = []
        for position, parameter in enumerate(group["params"]):
            i = start + position
            found = {k: gradient for k, row in enumerate(rows) if (gradient := row[i]) is not None}
            if found and not group["shared"]:
                found = {JOINT: total(list(found.values()))}
            ids = group["task_ids"][position]
            if self.missing == "zero" and parameter.requires_grad:
                absent = self.absent(ids, self.gradients.present)
                found |= {k: torch.zeros_like(parameter) for k in absent if k not in found}
            if not found:
                continue
            slots = self.slots.ensure(group, position, list(found))
            changed.append(parameter)
            if updates is not None:
                updates[parameter] = parameter.new_zeros((len(ids), *parameter.shape))
            for k, gradient in found.items():
                slot = ids.index(k)
                target = parameter if updates is None else updates[parameter][slot]
                batches.setdefault((k, self.factor(k, len(ids))), []).append((target, gradient, slots[slot]))
        if group["weight_decay"] and changed:
            torch._foreach_mul_(changed, 1 - float(group["lr"]) * group["weight_decay"])
        for (_, factor), entries in batches.items():
            self.slots.apply(group, entries, factor)

    @staticmethod
    def absent(ids: Sequence[int], present: Sequence[bool]) -> list[int]:
        """Which of a parameter's slots had no loss; `JOINT` where any task had none."""
        return [k for k in ids if (not all(present) if k == JOINT else not present[k])]

    def factor(self, task: int, sharing: int) -> float:
        """What multiplies the learning rate of a task's slot on a parameter that so many tasks share."""
        if sharing < 2:
            return 1.0
        return self.task_weights[task] / (sharing if self.reduction == "mean" else 1)

    def _apply_updates(self, updates: dict[Tensor, Tensor], shared: Sequence[int]) -> None:
        """Add the tasks' updates to the parameters, after the aggregator and the hooks have had them."""
        if self.aggregator is not None and self.compose == "post":
            aggregate_updates(self, updates, shared)
        for group in self.param_groups:
            for parameter, ids in zip(group["params"], group["task_ids"], strict=True):
                if parameter in updates:
                    for hook in self._hooks.values():
                        hook(parameter, updates[parameter], ids)
                    parameter.add_(updates[parameter].sum(0))

    def state_dict(self) -> dict[str, Any]:
        """State as torch's optimizers have it: per parameter accumulators `(slots, *shape)` and clocks `(slots,)`.

        A group's `task_ids` holds, by parameter, the tasks of the slots; `aggregator` what an aggregator remembers.
        """
        state = super().state_dict()
        remembered = getattr(self.aggregator, "state_dict", None)
        if remembered is not None:
            state["aggregator"] = remembered()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state.

        Raises:
            ValueError: If the state is of another optimizer, of other tasks, or of another rule.
        """
        self.slots.check(state_dict)
        super().load_state_dict(state_dict)
        self.slots.restored()
        self.gradients = TaskGradients.of_groups(self.param_groups, self.tasks)
        remember = getattr(self.aggregator, "load_state_dict", None)
        if remember is not None and "aggregator" in state_dict:
            remember(state_dict["aggregator"])
        self._checked = False

    def load_adam_state(self, state_dict: dict[str, Any], copy: str = "zeros") -> None:
        """Continue from a checkpoint of torch's Adam, AdamW, RMSprop or Adagrad on the same parameters.

        Learning rates, decays and `eps` of the groups are taken over; weight decay, which may be of another kind, is
        not. The accumulators are filled in the first step, so a state saved before it does not hold them.

        Args:
            state_dict: State of that optimizer.
            copy: "zeros" starts the accumulators anew; "shared" gives every task the accumulated squares, and an equal
                part of the first moment.

        Raises:
            ValueError: If `copy` is unknown, the parameters differ, or this optimizer has made a step.
        """
        self.slots.adopt(state_dict, copy)
