"""How far the responses of an API and of the continual model lie apart.

The paper maximises this gap over generated images and minimises it over the model. The paper's text beyond its abstract
could not be read; this is a documented reconstruction from methods that extract one model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoo.api_cl.responses import centred, log_responses

GAPS = ("l1", "kl", "l1_prob")


class ResponseGap:
    """Gap per sample, over the classes of one API.

    "l1" is the mean absolute difference of centred log-responses, floored at what the API can still resolve. For
    unrounded responses that is the difference of logits up to a constant. The floor stops the gradient of a class that
    the model puts below it, which "kl" does not. "kl" is tau^2 KL(API || model) at temperature tau; its gradient
    vanishes as the two approach each other. "l1_prob" is the sum of absolute differences of probabilities, for
    responses that are rounded to few decimals.

    Args:
        kind: "l1", "kl" or "l1_prob".
        tau: Temperature of "kl", which alone has one.

    Raises:
        ValueError: If the kind is unknown, or tau is not positive or of no use.
    """

    def __init__(self, kind: str, tau: float = 1.0) -> None:
        if kind not in GAPS:
            raise ValueError(f"the gap must be one of {', '.join(GAPS)}, got {kind!r}")
        if not (math.isfinite(tau) and tau > 0):
            raise ValueError(f"tau must be a positive number, got {tau}")
        if kind != "kl" and tau != 1:
            raise ValueError(f"tau={tau} has no meaning for the gap {kind!r}; leave it at 1, or use 'kl'")
        self.kind, self.tau = kind, tau

    def __call__(self, probs: Tensor, logits: Tensor, decimals: int | None = None) -> Tensor:
        """The gap `(...)`, float32 or wider, with a gradient in both arguments.

        Args:
            probs: Responses of the API `(..., C)`.
            logits: The model's logits of the same classes `(..., C)`.
            decimals: Decimals that the API rounds to; None if it does not.

        Raises:
            ValueError: If the shapes differ.
        """
        if probs.shape != logits.shape:
            raise ValueError(
                f"responses have the shape {tuple(probs.shape)}, logits {tuple(logits.shape)}; "
                "both must hold the classes of this API only"
            )
        dtype = torch.promote_types(torch.promote_types(probs.dtype, logits.dtype), torch.float32)
        # Autocast narrows matrix products only, and there is none here.
        p, s = probs.to(dtype), logits.to(dtype)
        if self.kind == "l1_prob":
            return (p - s.softmax(-1)).abs().sum(-1)
        if self.kind == "kl":
            return self._kl(p, s)
        ours = log_responses(s.softmax(-1), decimals)
        return (centred(log_responses(p, decimals)) - centred(ours)).abs().mean(-1)

    def _kl(self, p: Tensor, s: Tensor) -> Tensor:
        # No floor of what is resolved here: a class with p = 0 drops out of the sum by itself. The smallest normal
        # number keeps the logarithm, and its gradient in p, finite.
        log_p = (p.clamp_min(torch.finfo(p.dtype).tiny).log() / self.tau).log_softmax(-1)
        log_q = (s / self.tau).log_softmax(-1)
        return self.tau**2 * (log_p.exp() * (log_p - log_q)).sum(-1)
