"""MTAdam, the closest relative of AdaTask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.adatask.optimizer import AdaTask

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.optim.optimizer import ParamsT


class MTAdam(AdaTask):
    """MTAdam (Malkiel and Wolf, 2021): gradients brought to the norm of the first task's, one denominator for all.

    Per tensor, with n_k a moving average of |g_k|: g_k <- g_k n_1 / n_k; then m_k and G_k as in AdaTask, and
    p <- p - lr Σ_k m_k / (√(max_k G_k) + eps). Used like `AdaTask`; what one task alone reaches gets plain Adam.

    Args:
        params: Parameters or parameter groups.
        tasks: Number of tasks, or their names; the first one sets the scale.
        lr: Learning rate.
        betas: Decays of first and second moment.
        norm_decay: Decay beta_3 of the norms.
        eps: Added to the root.
        weight_decay: Decoupled decay.

    Raises:
        ValueError: If an option is out of its range.
    """

    extra_states = ("norm",)

    def __init__(
        self,
        params: ParamsT,
        tasks: int | Sequence[str],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        norm_decay: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if not 0 <= norm_decay < 1:
            raise ValueError(f"norm_decay must be at least 0 and below 1, got {norm_decay}")
        self.norm_decay = norm_decay
        super().__init__(params, tasks, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def _step_group(self, group: dict[str, Any], start: int, updates: dict[Tensor, Tensor] | None) -> None:
        rows, shared = self.gradients.rows, set(self.gradients.shared())
        changed = []
        for position, parameter in enumerate(group["params"]):
            i = start + position
            if i in shared or len(group["task_ids"][position]) > 1:
                shared.add(i)
                found = {k: gradient for k, row in enumerate(rows) if (gradient := row[i]) is not None}
                changed.append((parameter, self._shared_update(group, position, found)))
        if group["weight_decay"] and changed:
            torch._foreach_mul_([parameter for parameter, _ in changed], 1 - group["lr"] * group["weight_decay"])
        for parameter, moved in changed:
            if updates is None:
                parameter.add_(moved.sum(0))
            else:
                updates[parameter] = moved
        # What is left is plain Adam.
        self.gradients.rows = [[None if i in shared else g for i, g in enumerate(row)] for row in rows]
        super()._step_group(group, start, updates)
        self.gradients.rows = rows

    def _shared_update(self, group: dict[str, Any], position: int, found: dict[int, Tensor]) -> Tensor:
        """What each slot adds to a shared parameter, `(slots, *shape)`."""
        self.slots.ensure(group, position, list(found))
        parameter, ids = group["params"][position], group["task_ids"][position]
        state = self.state[parameter]
        slots = [ids.index(k) for k in found]
        gradients = torch.stack(list(found.values()))
        columns = (-1, *[1] * parameter.ndim)
        norms = gradients.reshape(len(found), -1).norm(dim=1)
        average = state["norm"]
        fresh = state["step"][slots].to(norms.device) == 0
        average[slots] = torch.where(fresh, norms, torch.lerp(norms, average[slots], self.norm_decay))
        # The first task's scale, also where that task has no label now.
        anchor = average[ids.index(min(ids))]
        scale = torch.where(average[slots] > 0, anchor / average[slots].clamp(min=1e-30), 1.0)
        gradients = gradients * scale.view(columns)
        beta1, beta2 = group["betas"]
        state["step"][slots] += 1
        state["exp_avg"][slots] = state["exp_avg"][slots].lerp(gradients, 1 - beta1)
        state["exp_avg_sq"][slots] = state["exp_avg_sq"][slots].lerp(gradients.square(), 1 - beta2)
        steps = state["step"][slots].to(gradients).view(columns)
        means = state["exp_avg"][slots] / (1 - beta1**steps)
        squares = state["exp_avg_sq"][slots] / (1 - beta2**steps)
        moved: Tensor = parameter.new_zeros((len(ids), *parameter.shape))
        sign = 1 if group["maximize"] else -1
        moved[slots] = sign * group["lr"] * means / (squares.amax(0).sqrt() + group["eps"])
        return moved
