"""The three update rules, each on lists of tensors by torch's own kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adagrad import adagrad
from torch.optim.adam import adam
from torch.optim.rmsprop import rmsprop

if TYPE_CHECKING:
    from collections.abc import Sequence

RULES = ("adam", "rmsprop", "adagrad")
DEFAULT_EPS = {"adam": 1e-8, "rmsprop": 1e-8, "adagrad": 1e-10}
FUSED_DEVICES = {"adam": ("cpu", "cuda", "mps", "xpu"), "adagrad": ("cpu",), "rmsprop": ()}
"""Where torch has fused kernels of a rule."""

STATES = {"adam": ("exp_avg", "exp_avg_sq"), "rmsprop": ("square_avg",), "adagrad": ("sum",)}
"""Names of a rule's accumulators, those of torch's own optimizers."""


def has_fused_kernel(rule: str, tensor: Tensor) -> bool:
    """Whether torch has a fused kernel of the rule for such a tensor."""
    single = tensor.dtype in (torch.float32, torch.float64) or tensor.is_cuda
    return single and tensor.device.type in FUSED_DEVICES[rule]


class Accumulators(NamedTuple):
    """One task's accumulators, a tensor per parameter.

    Attributes:
        steps: float32 `()`, the clocks.
        first: First moments m_k ("adam" only).
        second: G_k: second moments, or sums of squares ("adagrad").
        largest: Largest second moments so far ("adam" with amsgrad only).
    """

    steps: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    largest: list[Tensor]


def new_state(rule: str, parameter: Tensor, slots: int, amsgrad: bool, first_dtype: torch.dtype | None,
              steps_on_device: bool) -> dict[str, Tensor]:  # fmt: skip
    """Empty accumulators of a parameter, `(slots, *shape)`, and clocks `(slots,)`."""
    device = parameter.device if steps_on_device else torch.device("cpu")
    state = {"step": torch.zeros(slots, dtype=torch.float32, device=device)}
    names = [*STATES[rule], *(["max_exp_avg_sq"] if amsgrad else [])]
    for name in names:
        dtype = first_dtype if name == "exp_avg" and first_dtype is not None else parameter.dtype
        state[name] = torch.zeros((slots, *parameter.shape), dtype=dtype, device=parameter.device)
    return state


def apply_rule(
    rule: str,
    targets: Sequence[Tensor],
    gradients: Sequence[Tensor],
    accumulators: Accumulators,
    options: dict[str, Any],
    lr: float | Tensor,
    fused: bool,
) -> None:
    """Update the accumulators with gradients g_k and add `-lr * u_k` to the targets.

    The direction of all three rules does not depend on the target. One kernel can therefore be applied once per task to
    the same targets, which gives the sum over the tasks of Algorithm 2.

    Args:
        rule: "adam", "rmsprop" or "adagrad".
        targets: What the update is added to, in place: parameters, or a zeroed buffer to learn the update itself.
        gradients: Gradients, of the shapes of the targets.
        accumulators: The task's accumulators, updated in place.
        options: The parameter group: betas, alpha, eps, amsgrad, maximize.
        lr: Learning rate, times whatever weighs this task.
        fused: Use the fused kernel, which reads memory as it lies: everything must be contiguous and of one type.
    """
    first, second = accumulators.first, accumulators.second
    common: dict[str, Any] = {
        # Only the fused kernels take a learning rate in a tensor without further conditions.
        "lr": lr if fused else float(lr),
        "eps": options["eps"],
        "weight_decay": 0.0,
        "maximize": options["maximize"],
        "foreach": not fused,
    }
    inputs, steps = list(gradients), accumulators.steps
    if rule == "adam":
        common |= {"amsgrad": options["amsgrad"], "fused": fused}
        beta1, beta2 = options["betas"]
        largest = accumulators.largest
        adam(list(targets), inputs, first, second, largest, steps, beta1=beta1, beta2=beta2, **common)
    elif rule == "adagrad":
        adagrad(list(targets), inputs, second, steps, fused=fused, lr_decay=0.0, **common)
    else:
        common |= {"alpha": options["alpha"], "momentum": 0.0, "centered": False}
        rmsprop(list(targets), inputs, second, [], [], steps, **common)
