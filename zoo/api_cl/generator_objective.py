"""What the two generators minimise: hard, diverse, cooperative images that make learner and API disagree.

The paper's text beyond its abstract could not be read; this is a documented reconstruction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

COOPERATION = ("pixel", "feature", "none")
_TINY = 1e-12


class GeneratorObjective:
    """The generators' objective, in the parts that a black box needs differences for and in those that autograd gives.

    For G generators with B images each, responses p and response gaps d, with the mean response p_bar of a generator:

        J = sum_g [-adv * mean(d) + balance * sum_c p_bar_c log p_bar_c + conf * mean(H(p))]
            + coop * max(0, margin - distance(x_A, x_B))

    Args:
        adv: Weight of the gap, which is maximised: images on which learner and API disagree.
        balance: Weight of the negative entropy of the mean response: all classes of the API are covered.
        conf: Weight of the mean entropy of a response: images that the API is sure of.
        coop: Weight of the cooperation of two generators.
        margin: Distance from which on two images count as different enough; without it, saturated opposites win.
        kind: "pixel", mean absolute difference; "feature", 1 - cosine of the learner's features; or "none".

    Raises:
        ValueError: If a weight is negative, or the kind is unknown.
    """

    def __init__(
        self,
        adv: float = 1.0,
        balance: float = 1.0,
        conf: float = 0.0,
        coop: float = 1.0,
        margin: float = 0.5,
        kind: str = "pixel",
    ) -> None:
        if kind not in COOPERATION:
            raise ValueError(f"coop must be one of {', '.join(COOPERATION)}, got {kind!r}")
        weights = {
            "adv_weight": adv,
            "balance_weight": balance,
            "conf_weight": conf,
            "coop_weight": coop,
            "coop_margin": margin,
        }
        for name, value in weights.items():
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        self.adv, self.balance, self.conf = adv, balance, conf
        self.coop, self.margin, self.kind = coop, margin, kind

    def per_sample(self, probs: Tensor, gaps: Tensor, mean_probs: Tensor) -> Tensor:
        """The black-box loss of each image, with the mean response held fixed.

        The mean response is that of the unperturbed batch. So held, the sum over a batch has the gradient of the
        entropy of the batch's mean, up to the common 1/B, and images do not depend on each other.

        Args:
            probs: `(..., G, B, C)`.
            gaps: `(..., G, B)`.
            mean_probs: `(G, C)`.

        Returns:
            `(..., G, B)`.
        """
        loss = -self.adv * gaps
        if self.balance:
            slope = mean_probs.clamp_min(_TINY).log() + 1
            loss = loss + self.balance * (probs * slope.unsqueeze(-2)).sum(-1)
        if self.conf:
            loss = loss + self.conf * entropy(probs)
        return loss

    def exact(self, probs: Tensor, gaps: Tensor, mean_over_ranks: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The same objective by autograd, for an API whose gradient is at hand.

        Args:
            probs: `(G, B, C)` with their graph.
            gaps: `(G, B)` with their graph.
            mean_over_ranks: See `balance_term`.

        Returns:
            A scalar, the sum over the generators.
        """
        loss = -self.adv * gaps.mean(-1).sum()
        if self.balance:
            loss = loss + self.balance * balance_term(probs, mean_over_ranks)
        if self.conf:
            loss = loss + self.conf * entropy(probs).mean(-1).sum()
        return loss

    def surrogate(
        self, logits: Tensor, labels: Tensor, mean_over_ranks: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """The objective without any gradient of the API, whose answers are constants: for APIs that give labels only.

        The gap is the learner's cross-entropy with the API's label; balance and confidence look at the learner.

        Args:
            logits: `(G, B, C)` with their graph.
            labels: int64 `(G, B)`, the API's classes by their place.
            mean_over_ranks: See `balance_term`.
        """
        gaps = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
        return self.exact(logits.softmax(-1), gaps, mean_over_ranks)

    def cooperation(self, first: Tensor, second: Tensor) -> Tensor:
        """The hinge that keeps the images (or features) of two generators apart, weighted; from the same noise.

        Args:
            first: `(B, ...)` with its graph.
            second: Likewise.
        """
        if self.kind == "feature":
            distance = (1 - F.cosine_similarity(first, second, dim=-1)).mean()
        else:
            distance = (first - second).abs().mean()
        return self.coop * (self.margin - distance).clamp_min(0)

    @property
    def cooperates(self) -> bool:
        """Whether two generators are kept apart."""
        return self.kind != "none" and self.coop > 0


def entropy(probs: Tensor) -> Tensor:
    """Entropy in nats over the last dimension."""
    return -(probs * probs.clamp_min(_TINY).log()).sum(-1)


def balance_term(probs: Tensor, mean_over_ranks: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Negative entropy of the mean response, summed over generators.

    Args:
        probs: `(G, B, C)`.
        mean_over_ranks: Averages a tensor without graph over processes; the gradient is that of this process's part.
    """
    mean = probs.mean(-2)
    if mean_over_ranks is not None:
        # The value of all processes, the gradient of this one's share; averaging gradients puts them together.
        mean = mean + (mean_over_ranks(mean.detach()) - mean.detach())
    return (mean * mean.clamp_min(_TINY).log()).sum()
