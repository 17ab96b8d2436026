"""The gradients of several tasks between their backward passes and the step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from zoo.adatask.gradients import Rows


class TaskGradients:
    """The gradients of K tasks between `backward` and `step`.

    Args:
        parameters: The parameters, each once.
        names: The tasks.
        joint: Indices of parameters whose gradients are summed in the end, and which aggregators leave alone.

    Attributes:
        rows: By task and parameter.
        present: By task, whether it had a loss since `clear`.
        counts: float32 `(tasks,)`, valid labels of each task since `clear`; None without counts.
    """

    def __init__(self, parameters: Iterable[Tensor], names: Sequence[str], joint: Iterable[int] = ()) -> None:
        self.parameters = list(parameters)
        self.names = tuple(names)
        self._joint = frozenset(joint)
        self._slots: list[tuple[int, int]] = []  # what the processes have agreed to exchange
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.rows: Rows = [[None] * len(self.parameters) for _ in self.names]
        self.present = [False] * len(self.names)
        self.counts: Tensor | None = None

    @property
    def empty(self) -> bool:
        """Whether no task has had a loss since `clear`."""
        return not any(self.present)

    def accumulate(
        self, rows: Rows, present: Sequence[bool], counts: Tensor | None = None, factor: float | None = None
    ) -> None:
        """Add the gradients of another batch.

        Without counts they are summed, as `loss.backward()` does. With them, each task's gradient becomes the mean
        over all its labels so far.

        Args:
            rows: Gradients, as `per_task_grads` returns them.
            present: Tasks that had a loss in this batch.
            counts: float `(tasks,)`, valid labels of each task in this batch.
            factor: What the gradients are multiplied with.
        """
        if (counts is None) is not (self.counts is None) and not self.empty:
            raise ValueError("counts were given for one of several backward calls and not for another")
        if factor is not None:
            rows = [_scaled(row, factor) for row in rows]
        shares: list[float | Tensor] = [1.0] * len(rows)
        if counts is not None:
            counts = counts.detach().float() * counts.new_tensor(present)
            total = counts if self.counts is None else self.counts + counts
            shares = list((counts / total.clamp(min=1e-12)).unbind())
            self.counts = total
        for k, row in enumerate(rows):
            if not present[k]:
                continue
            own, seen = self.rows[k], self.present[k]
            self.present[k] = True
            if not seen:
                self.rows[k] = list(row)
                continue
            for i, gradient in enumerate(row):
                before = own[i]
                if counts is None:
                    if gradient is not None:
                        # Not in place: autograd may hand out one tensor for two parameters.
                        own[i] = gradient if before is None else before + gradient
                elif gradient is not None or before is not None:
                    zero = torch.zeros_like(self.parameters[i])
                    start, end = (zero if g is None else g for g in (before, gradient))
                    own[i] = torch.lerp(start, end, torch.as_tensor(shares[k], dtype=end.dtype, device=end.device))

    def joint(self) -> list[Tensor | None]:
        """Sum over the tasks, by parameter."""
        found = [[row[i] for row in self.rows if row[i] is not None] for i in range(len(self.parameters))]
        return [total(gradients) if gradients else None for gradients in found]  # type: ignore[arg-type]

    def write_grad(self, factor: float | None = None) -> None:
        """Set `.grad` of the parameters to the sum over the tasks, for loggers, scalers and other optimizers.

        Args:
            factor: What the sum is multiplied with.
        """
        own = {id(gradient) for row in self.rows for gradient in row}
        for parameter, gradient in zip(self.parameters, self.joint(), strict=True):
            if gradient is not None and factor is not None:
                gradient = gradient * factor
            elif gradient is not None and id(gradient) in own:
                # Whoever changes `.grad` in place must not change what one task alone has.
                gradient = gradient.clone()
            parameter.grad = gradient

    def clip(self, max_norm: float, mode: str = "task") -> None:
        """Bound norms.

        Args:
            max_norm: The bound.
            mode: "task": the whole gradient of each task; "joint": that of all tasks side by side; "sum": that of
                the sum over the tasks.
        """
        if mode == "sum":
            norms = [self._norm(self.joint())] * len(self.rows)
        else:
            norms = [self._norm(row) for row in self.rows]
            if mode == "joint":
                norms = [torch.stack(norms).norm()] * len(self.rows)
        for k, (row, norm) in enumerate(zip(self.rows, norms, strict=True)):
            self.rows[k] = _scaled(row, (max_norm / (norm + 1e-6)).clamp(max=1.0))

    def _norm(self, row: Sequence[Tensor | None]) -> Tensor:
        found = [gradient for gradient in row if gradient is not None]
        if not found:
            return torch.zeros((), device=self.parameters[0].device)
        return torch.nn.utils.get_total_norm(found)

    def clip_value(self, bound: float) -> None:
        """Bound each number."""
        self.rows = [[None if g is None else g.clamp(-bound, bound) for g in row] for row in self.rows]

    def shared(self) -> list[int]:
        """Indices of the parameters that two or more tasks reach, without the joint ones."""
        candidates = (i for i in range(len(self.parameters)) if i not in self._joint)
        return [i for i in candidates if sum(row[i] is not None for row in self.rows) > 1]

    @classmethod
    def of_groups(cls, groups: Iterable[dict[str, Any]], names: Sequence[str]) -> TaskGradients:
        """For the parameters of an optimizer's groups; those of a group with `shared: False` are joint."""
        parameters: list[Tensor] = []
        joint: list[int] = []
        for group in groups:
            if not group.get("shared", True):
                joint += range(len(parameters), len(parameters) + len(group["params"]))
            parameters += group["params"]
        return cls(parameters, names, joint)

    def matrix(self, indices: Sequence[int]) -> Tensor:
        """Gradients of some parameters as one matrix `(tasks, elements)`, zero where a task does not reach."""
        return torch.stack([flatten(row, self.parameters, indices) for row in self.rows])

    def replace(self, indices: Sequence[int], matrix: Tensor) -> None:
        """Put a matrix back, where there was a gradient."""
        for k, row in enumerate(self.rows):
            for i, part in zip(indices, unflatten(matrix[k], self.parameters, indices), strict=True):
                if row[i] is not None:
                    row[i] = part.to(self.parameters[i].dtype)

    def all_reduce(self, group: Any = None) -> None:
        """Average over the processes, before anything is squared, by one collective call.

        With counts the average of a task is over all its labels; without, over the processes, as
        `DistributedDataParallel` does. The first call, and one in which a task reaches a parameter for the first
        time, exchange in addition who reaches what.
        """
        import torch.distributed as dist

        own = [(k, i) for k, row in enumerate(self.rows) for i, g in enumerate(row) if g is not None]
        known = set(self._slots)
        flat = self._exchange(group, grown=any(slot not in known for slot in own))
        if flat is None:
            reached = torch.zeros(len(self.names), len(self.parameters), dtype=torch.int32)
            for k, i in {*own, *self._slots}:
                reached[k, i] = 1
            reached = reached.to(self.parameters[0].device)
            dist.all_reduce(reached, op=dist.ReduceOp.MAX, group=group)
            self._slots = [(k, i) for k, i in reached.nonzero().tolist()]
            flat = self._exchange(group, grown=False)
            assert flat is not None
        self.rows = [[None] * len(self.parameters) for _ in self.names]
        for (k, i), gradient in flat.items():
            self.rows[k][i] = gradient

    def _exchange(self, group: Any, grown: bool) -> dict[tuple[int, int], Tensor] | None:
        """Reduce the known gradients, counts and flags in one buffer; None if a process knows more than that."""
        import torch.distributed as dist

        tasks, slots, world = len(self.names), self._slots, dist.get_world_size(group)
        device = self.parameters[0].device
        dtype = torch.float32
        for _, i in slots:
            dtype = torch.promote_types(dtype, self.parameters[i].dtype)
        present = torch.tensor(self.present, dtype=dtype, device=device)
        # A process without any loss knows no counts, where others do.
        counted = self.counts is not None
        counts = present if self.counts is None else self.counts.to(device, dtype)
        held = [self.rows[k][i] for k, i in slots]
        flags = [float(grown), float(counted), *(float(g is not None) for g in held)]
        parts = [torch.tensor(flags, dtype=dtype, device=device), present, counts]
        for (k, i), gradient in zip(slots, held, strict=True):
            if gradient is None:
                parts.append(torch.zeros(self.parameters[i].numel(), dtype=dtype, device=device))
            else:
                weighted = gradient if self.counts is None else gradient * counts[k]
                parts.append(weighted.flatten().to(dtype))
        flat = torch.cat(parts)
        dist.all_reduce(flat, group=group)
        start = 2 + len(slots) + tasks
        flags = flat[:start].tolist()
        if flags[0]:
            return None
        self.present = [bool(flag) for flag in flags[2 + len(slots) :]]
        totals = flat[start : start + tasks]
        start += tasks
        if not flags[1]:
            divisors = torch.full((tasks,), float(world), dtype=dtype, device=device)
        else:
            # A copy: a view would hold the whole buffer.
            self.counts, divisors = totals.float().clone(), totals.clamp(min=1e-12)
        reduced = {}
        for (k, i), reached in zip(slots, flags[2 : 2 + len(slots)], strict=True):
            parameter = self.parameters[i]
            part = flat[start : start + parameter.numel()]
            start += parameter.numel()
            if reached:
                reduced[k, i] = (part / divisors[k]).view_as(parameter).to(parameter.dtype)
        return reduced


def flatten(row: Sequence[Tensor | None], parameters: Sequence[Tensor], indices: Sequence[int]) -> Tensor:
    """Some tensors of a row as one vector, with zeros for None."""
    found = ((row[i], parameters[i]) for i in indices)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in found])


def unflatten(vector: Tensor, parameters: Sequence[Tensor], indices: Sequence[int]) -> list[Tensor]:
    """The inverse of `flatten`: views of the vector."""
    parts = torch.split(vector, [parameters[i].numel() for i in indices])
    return [part.view_as(parameters[i]) for part, i in zip(parts, indices, strict=True)]


def total(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of tensors; a single one as it is."""
    result = tensors[0]
    for number, tensor in enumerate(tensors[1:]):
        result = result.add_(tensor) if number else result + tensor
    return result


def _scaled(row: Sequence[Tensor | None], factor: float | Tensor) -> list[Tensor | None]:
    return [None if gradient is None else gradient * factor for gradient in row]
