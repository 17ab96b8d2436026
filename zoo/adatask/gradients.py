"""Gradients of several losses with respect to the same parameters, kept apart."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

Rows = list[list["Tensor | None"]]
"""By task and parameter: the gradient, or None where the task does not reach the parameter."""

MODES = ("loop", "cut", "batched")


def per_task_grads(
    losses: Sequence[Tensor | None],
    parameters: Sequence[Tensor],
    features: Tensor | Sequence[Tensor] | None = None,
    mode: str = "loop",
) -> Rows:
    """Gradient of each loss with respect to each parameter; `.grad` is not touched.

    K losses cost K backward passes through what they share, the least that an exact method can do, and one through
    each head:

    - "loop": one pass per loss through the whole graph; for any model.
    - "cut": one pass per loss down to `features`, which frees the heads, then one per loss from there. The lowest
      peak memory.
    - "batched": like "cut", with the K passes below the features done as one under vmap. Falls back to "cut" with a
      warning where an operation has no batching rule.

    Hooks of tensors run once per pass. A compiled head is passed through for every loss that its compiled region
    holds: compile the trunk alone. Activation checkpoints must be the non-reentrant ones.

    Args:
        losses: One scalar per task; None for a task that has no label in this batch.
        parameters: Parameters, each once; one that requires no gradient has none.
        features: The tensors between trunk and heads, for "cut" and "batched": none is computed from another, and
            heads reach nothing of the trunk but through these.
        mode: How to pass.

    Returns:
        A list per task with one gradient, or None, per parameter.

    Raises:
        ValueError: If `mode` is unknown, or `features` is missing or not what it must be.
        RuntimeError: If autograd fails; after an in-place change of a parameter the message says what to do.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if mode != "loop" and features is None:
        raise ValueError(f"mode={mode!r} needs features, the tensors between the trunk and the heads")
    active = [i for i, parameter in enumerate(parameters) if parameter.requires_grad]
    wanted = [parameters[i] for i in active]
    if mode == "loop" or not wanted:
        found = _loop(losses, wanted)
    else:
        given = [features] if isinstance(features, Tensor) else list(features or ())
        found = _cut(losses, wanted, [feature for feature in given if feature.requires_grad], mode)
    rows: Rows = [[None] * len(parameters) for _ in losses]
    for row, gradients in zip(rows, found, strict=True):
        for i, gradient in zip(active, gradients, strict=True):
            row[i] = gradient
    return rows


def scaled_grads(
    losses: Sequence[Tensor | None],
    parameters: Sequence[Tensor],
    features: Tensor | Sequence[Tensor] | None,
    mode: str,
    scaler: torch.amp.GradScaler | None,
) -> tuple[Rows, float | None]:
    """`per_task_grads` of losses that a GradScaler, if there is one, has scaled.

    Returns:
        The scaled gradients, and the scale; None without a scaler.
    """
    if scaler is None:
        return per_task_grads(losses, parameters, features, mode), None
    scaler.scale(torch.zeros((), device=parameters[0].device))  # makes its scale, also where no loss is
    scaled = [None if loss is None else scaler.scale(loss) for loss in losses]
    return per_task_grads(scaled, parameters, features, mode), scaler.get_scale()


def grad(
    outputs: Any, inputs: Sequence[Tensor], retain: bool, grad_outputs: Any = None, batched: bool = False
) -> list[Tensor | None]:
    """`torch.autograd.grad` with None for what is not reached, and a hint where a tensor was changed in place.

    Raises:
        RuntimeError: If autograd fails.
    """
    if not inputs:
        return []
    try:
        return list(
            torch.autograd.grad(
                outputs, inputs, grad_outputs, retain_graph=retain, allow_unused=True, is_grads_batched=batched
            )
        )
    except RuntimeError as error:
        if "modified by an inplace operation" in str(error):
            raise RuntimeError(
                f"{error}\nA parameter or activation changed between the forward pass and the gradients of all tasks: "
                "call step() once, after the backward of all losses"
            ) from error
        raise


def _loop(losses: Sequence[Tensor | None], parameters: list[Tensor]) -> Rows:
    last = max((k for k, loss in enumerate(losses) if loss is not None), default=-1)
    return [
        [None] * len(parameters) if loss is None else grad(loss, parameters, retain=k < last)
        for k, loss in enumerate(losses)
    ]


def _cut(losses: Sequence[Tensor | None], parameters: list[Tensor], features: list[Tensor], mode: str) -> Rows:
    present = [k for k, loss in enumerate(losses) if loss is not None]
    nodes: dict[int, set[Any]] = {}
    heads: dict[int, list[int]] = {}
    place = {id(parameter): i for i, parameter in enumerate(parameters)}
    stops = {(feature.grad_fn, feature.output_nr) for feature in features}
    below_features = _check_features(features, stops)
    for k in present:
        nodes[k], leaves = _walk([losses[k]], stops)
        if nodes[k] & below_features:
            raise ValueError(
                f"loss {k} reaches the trunk beside features, by a skip connection or a shared weight, where it cannot "
                "be cut: add what the head takes there to features, or use mode='loop'"
            )
        heads[k] = sorted(place[leaf] for leaf in leaves if leaf in place)
    rows: Rows = [[None] * len(parameters) for _ in losses]
    cotangents: dict[int, list[Tensor | None]] = {}
    for position, k in enumerate(present):
        # A node that a later head needs as well must keep what it saved.
        retain = any(nodes[k] & nodes[later] for later in present[position + 1 :])
        found = grad(losses[k], [*features, *(parameters[i] for i in heads[k])], retain=retain)
        cotangents[k] = found[: len(features)]
        for i, gradient in zip(heads[k], found[len(features) :], strict=True):
            rows[k][i] = gradient
    below = {k: [i for i, v in enumerate(cotangents[k]) if v is not None] for k in present}
    reaching = [k for k in present if below[k]]
    trunk = None
    if mode == "batched" and reaching:
        trunk = _batched_trunk(parameters, features, cotangents, below, reaching)
    if trunk is None:
        trunk = {}
        for k in reaching:
            outputs = [features[i] for i in below[k]]
            vectors = [cotangents[k][i] for i in below[k]]
            trunk[k] = grad(outputs, parameters, retain=k != reaching[-1], grad_outputs=vectors)
    for k, gradients in trunk.items():
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                rows[k][i] = gradient
    return rows


def _check_features(features: Sequence[Tensor], stops: set[Any]) -> set[Any]:
    """The nodes of the trunk; a ValueError if a feature is there twice or computed from another."""
    if len(stops) < len(features):
        raise ValueError("features holds a tensor twice: its gradient would count twice")
    trunk: set[Any] = set()
    for number, feature in enumerate(features):
        own = (feature.grad_fn, feature.output_nr)
        nodes, _ = _walk([feature], set())
        if any(node in nodes for node, output in stops if node is not None and (node, output) != own
               and node is not feature.grad_fn):  # fmt: skip
            raise ValueError(
                f"feature {number} is computed from another one: its gradient would count twice. Give the tensors "
                "that the heads take, none of which is made of another"
            )
        trunk |= nodes
    return trunk


def _batched_trunk(
    parameters: list[Tensor],
    features: list[Tensor],
    cotangents: dict[int, list[Tensor | None]],
    below: dict[int, list[int]],
    reaching: list[int],
) -> dict[int, list[Tensor | None]] | None:
    """Gradients through the trunk by one pass under vmap; None if an operation refuses."""
    used = sorted({i for k in reaching for i in below[k]})
    vectors = []
    for i in used:
        rows = [cotangents[k][i] for k in reaching]
        vectors.append(torch.stack([torch.zeros_like(features[i]) if row is None else row for row in rows]))
    try:
        stacked = grad([features[i] for i in used], parameters, retain=True, grad_outputs=vectors, batched=True)
    except RuntimeError as error:
        warnings.warn(
            f"mode='batched' does not work for this model ({str(error).splitlines()[0]}); 'cut' is used instead",
            stacklevel=5,
        )
        return None
    trunk: dict[int, list[Tensor | None]] = {}
    for position, k in enumerate(reaching):
        trunk[k] = [None if gradient is None else gradient[position] for gradient in stacked]
        if len(below[k]) < len(used):
            # The zeros put for features that a head does not use are no gradients.
            _, leaves = _walk([features[i] for i in below[k]], set())
            for i, parameter in enumerate(parameters):
                if id(parameter) not in leaves:
                    trunk[k][i] = None
    return trunk


def _walk(tensors: Sequence[Tensor | None], stops: set[Any]) -> tuple[set[Any], set[int]]:
    """Nodes of the graph above some tensors, and the ids of the leaves that they reach.

    Args:
        tensors: Where to start.
        stops: Pairs of a node and the number of one of its outputs, where to go no further.
    """
    stack: list[Any] = []
    seen: set[Any] = set()
    leaves: set[int] = set()
    for tensor in tensors:
        if tensor is not None and tensor.grad_fn is not None:
            stack.append((tensor.grad_fn, tensor.output_nr))
        elif tensor is not None and tensor.requires_grad:
            leaves.add(id(tensor))
    while stack:
        edge = stack.pop()
        node = edge[0]
        if edge in stops or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves.add(id(variable))
        stack.extend(above for above in node.next_functions if above[0] is not None)
    return seen, leaves


def infer_membership(losses: Sequence[Tensor | None], parameters: Iterable[Tensor]) -> list[tuple[int, ...]]:
    """Tasks whose losses reach each parameter, found in the autograd graph without a backward pass.

    Args:
        losses: One scalar per task, or None.
        parameters: The parameters.

    Returns:
        For each parameter, the sorted indices of the tasks: two or more of them share it, one owns it, and none
        leaves it without a gradient.
    """
    reached = [_walk([loss], set())[1] for loss in losses]
    return [tuple(k for k, leaves in enumerate(reached) if id(parameter) in leaves) for parameter in parameters]


def check_losses(
    losses: Mapping[str, Tensor | None] | Sequence[Tensor | None], names: Sequence[str], nonfinite: str = "error"
) -> list[Tensor | None]:
    """The losses in the order of the tasks.

    Args:
        losses: By name, or in the order of `names`; None for a task without a label in this batch.
        names: The tasks.
        nonfinite: What to do with NaN and infinite losses: "error", "skip" (the task is absent from this step), or
            "ignore" (needs no look at the values, which on an accelerator means waiting for them).

    Raises:
        ValueError: If a loss is missing, superfluous, not a scalar, not attached to a graph or not finite, or all
            are None.
    """
    count = len(names)
    if isinstance(losses, Tensor):
        raise ValueError(
            f"expected {count} losses ({', '.join(names)}), got one tensor of shape {tuple(losses.shape)}: pass the "
            "losses of the tasks unsummed, as a list or a dict"
        )
    if isinstance(losses, Mapping):
        missing = [name for name in names if name not in losses]
        extra = [str(name) for name in losses if name not in names]
        if missing or extra:
            parts = [f"missing: {', '.join(missing)}"] * bool(missing) + [f"unknown: {', '.join(extra)}"] * bool(extra)
            raise ValueError(
                f"losses and tasks differ ({'; '.join(parts)}); the tasks are {', '.join(names)}. Pass None for a "
                "task without a label in this batch"
            )
        ordered = [losses[name] for name in names]
    else:
        ordered = list(losses)
        if len(ordered) != count:
            raise ValueError(f"expected {count} losses ({', '.join(names)}), got {len(ordered)}")
    for name, loss in zip(names, ordered, strict=True):
        if loss is None:
            continue
        if not isinstance(loss, Tensor):
            raise ValueError(f"the loss of task {name} is {loss!r}, expected a tensor")
        if loss.numel() != 1:
            raise ValueError(f"the loss of task {name} has shape {tuple(loss.shape)}, expected a scalar")
        if not loss.requires_grad:
            raise ValueError(f"the loss of task {name} does not require a gradient: it is detached from the model")
    present = [k for k, loss in enumerate(ordered) if loss is not None]
    if not present:
        raise ValueError(f"no task has a loss: all of {', '.join(names)} are None")
    if nonfinite != "ignore":
        values = torch.stack([ordered[k].detach().float().reshape(()) for k in present])  # type: ignore[union-attr]
        for k, finite in zip(present, values.isfinite().tolist(), strict=True):
            if finite:
                continue
            if nonfinite == "error":
                value = float(ordered[k].detach())  # type: ignore[union-attr]
                raise ValueError(
                    f"the loss of task {names[k]} is {value}; nonfinite='skip' leaves such a task out of the step"
                )
            ordered[k] = None
    return [None if loss is None else loss.reshape(()) for loss in ordered]


def task_names(tasks: int | Sequence[str]) -> tuple[str, ...]:
    """Names of tasks, made up for a number of them.

    Raises:
        ValueError: If there is none, or a name is there twice.
    """
    names = tuple(f"task {k}" for k in range(tasks)) if isinstance(tasks, int) else tuple(map(str, tasks))
    if not names or isinstance(tasks, str):
        raise ValueError(f"tasks must be a positive number or a list of names, got {tasks!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"tasks has a name twice: {', '.join(names)}")
    return names
