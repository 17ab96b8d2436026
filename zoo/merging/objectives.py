"""What is minimised on inputs without labels, from the logits of one task's batch.

All are means over the batch in natural units, computed from log-softmax in float32 or wider. They need no epsilon and
are finite for all finite logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Callable


def entropy(logits: Tensor, normalize: bool = False) -> Tensor:
    """Shannon entropy of the predictions, H(z) = -sum_c p_c log p_c with p = softmax(z) (AdaMerging, eq. 5).

    Args:
        logits: `(batch, classes)`, two classes or more.
        normalize: Divide by log(classes), so that uniform predictions give 1 for every task.

    Returns:
        Scalar in nats, float32 or wider.

    Raises:
        ValueError: If the logits are empty, malformed or not finite.
    """
    log_p = _log_softmax(logits, "logits")
    return _scaled(_entropies(log_p).mean(), log_p, normalize)


def information_maximisation(logits: Tensor, normalize: bool = False) -> Tensor:
    """Entropy of the predictions minus the entropy of their mean: confident, but not all for one class.

    It is minus the mutual information of input and class as the batch shows it, so it depends on the batch size: B
    inputs show at most log B.

    Args:
        logits: `(batch, classes)`, two classes or more.
        normalize: Divide by log(classes).

    Returns:
        Scalar in nats, float32 or wider, from -log(classes) to 0.

    Raises:
        ValueError: If the logits are empty, malformed or not finite.
    """
    log_p = _log_softmax(logits, "logits")
    log_mean = torch.logsumexp(log_p, 0) - math.log(len(log_p))
    return _scaled(_entropies(log_p).mean() - _entropies(log_mean), log_p, normalize)


def expert_cross_entropy(logits: Tensor, expert_logits: Tensor, normalize: bool = False) -> Tensor:
    """Cross-entropy to the expert's predictions, -sum_c q_c log p_c with q = softmax of the expert's logits.

    Args:
        logits: `(batch, classes)` of the merged model, two classes or more.
        expert_logits: `(batch, classes)` of the task's expert on the same inputs; no gradient enters them.
        normalize: Divide by log(classes).

    Returns:
        Scalar in nats, float32 or wider. Its least value is the expert's own entropy.

    Raises:
        ValueError: If logits are empty, malformed or not finite, or the two shapes differ.
    """
    log_p, log_q = _both(logits, expert_logits)
    return _scaled(-(log_q.exp() * log_p).sum(1).mean(), log_p, normalize)


def expert_kl(logits: Tensor, expert_logits: Tensor, normalize: bool = False) -> Tensor:
    """Divergence from the expert's predictions, KL(q || p) = sum_c q_c (log q_c - log p_c).

    It has the gradient of `expert_cross_entropy` and is 0 where the merged model predicts what the expert does, which
    makes the tasks' values comparable.

    Args:
        logits: `(batch, classes)` of the merged model, two classes or more.
        expert_logits: `(batch, classes)` of the task's expert on the same inputs; no gradient enters them.
        normalize: Divide by log(classes).

    Returns:
        Scalar in nats, float32 or wider.

    Raises:
        ValueError: If logits are empty, malformed or not finite, or the two shapes differ.
    """
    log_p, log_q = _both(logits, expert_logits)
    return _scaled((log_q.exp() * (log_q - log_p)).sum(1).mean(), log_p, normalize)


@dataclass(frozen=True)
class Objective:
    """One objective behind one signature, whether it looks at an expert or not.

    Attributes:
        name: Its name in `OBJECTIVES`.
        function: The function of the logits, and of the expert's where it needs them.
        needs_expert: Whether a call takes the logits of the task's expert.
    """

    name: str
    function: Callable[..., Tensor]
    needs_expert: bool

    def __call__(self, logits: Tensor, expert_logits: Tensor | None = None, *, normalize: bool = False) -> Tensor:
        """The objective's value on one batch of one task.

        Args:
            logits: `(batch, classes)` of the merged model.
            expert_logits: `(batch, classes)` of the task's expert, exactly where `needs_expert`.
            normalize: Divide by log(classes).

        Returns:
            Scalar in nats, float32 or wider.

        Raises:
            ValueError: If the expert's logits are missing or not used, or logits are malformed or not finite.
        """
        if self.needs_expert is (expert_logits is None):
            verb = "needs" if self.needs_expert else "does not use"
            raise ValueError(f"objective {self.name!r} {verb} the expert's logits")
        if expert_logits is None:
            return self.function(logits, normalize=normalize)
        return self.function(logits, expert_logits, normalize=normalize)


OBJECTIVES: dict[str, Objective] = {
    "entropy": Objective("entropy", entropy, needs_expert=False),
    "im": Objective("im", information_maximisation, needs_expert=False),
    "expert_ce": Objective("expert_ce", expert_cross_entropy, needs_expert=True),
    "expert_kl": Objective("expert_kl", expert_kl, needs_expert=True),
}


def objective(name: str) -> Objective:
    """An objective by name.

    Args:
        name: "entropy", "im" (`information_maximisation`), "expert_ce" (`expert_cross_entropy`) or "expert_kl".

    Raises:
        ValueError: If the name is unknown.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; known: {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def check_logits(logits: Tensor, label: str = "logits") -> None:
    """Refuse what has no softmax over classes. Looks at the values, which on a GPU waits for them.

    Args:
        logits: Expected to be `(batch, classes)`, at least one row and two classes, finite.
        label: What they are called in messages.

    Raises:
        ValueError: If they are not.
    """
    if logits.ndim != 2 or not len(logits) or logits.shape[1] < 2 or not logits.is_floating_point():
        raise ValueError(
            f"{label} must be floating (batch, classes) with at least one row and two classes, "
            f"got {logits.dtype} of shape {tuple(logits.shape)}: is it the right head?"
        )
    finite = logits.detach().isfinite()
    if not finite.all():
        row, column = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"{label} are not finite: {int((~finite).sum())} of {logits.numel()} values, such as {logits[row, column]} "
            f"for input {row} of the batch, class {column}; look for NaN in inputs or weights, or too large a step"
        )


def _log_softmax(logits: Tensor, label: str) -> Tensor:
    check_logits(logits, label)
    return F.log_softmax(logits, 1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _entropies(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(-1)


def _both(logits: Tensor, expert_logits: Tensor) -> tuple[Tensor, Tensor]:
    if logits.shape != expert_logits.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and the expert's logits {tuple(expert_logits.shape)} must have one shape: "
            "the same inputs through the same head"
        )
    return _log_softmax(logits, "logits"), _log_softmax(expert_logits.detach(), "the expert's logits")


def _scaled(value: Tensor, log_p: Tensor, normalize: bool) -> Tensor:
    return value / math.log(log_p.shape[1]) if normalize else value
