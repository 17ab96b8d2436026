"""Similarity of two networks' features on the same images: centred kernel alignment (CKA), and losses made of it.

The paper names a regulariser based on network similarity. The paper's text beyond its abstract could not be read; this
is a documented reconstruction. The usual CKA of features that have nothing in common is far above 0 when there are more
features than images, .89 for 512 features of 64 images; the debiased one is about 0 and therefore the default.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

SIMILARITIES = ("cka", "cka_biased", "cosine", "logit_l2", "none")
# Alignments of features scaled to length 1 below this are rounding; independent features give 1 / width.
_FLOOR = 1e-12


class DebiasedCKA:
    """Linear CKA with the unbiased estimator of HSIC: 1 for equal features, about 0 for independent ones.

    It can be slightly negative. Rotating, scaling or shifting either features changes nothing. Without any
    variation in one of them it is 0 and has gradient 0.
    """

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """CKA, a scalar in float32 or wider.

        Args:
            x: Features `(n, d)`, n >= 4.
            y: Features `(n, d')` of the same images.

        Raises:
            ValueError: If there are fewer than 4 images, or the shapes do not fit.
        """
        if len(x) < 4:
            raise ValueError(f"debiased CKA needs at least 4 images, got {len(x)}; raise the batch that it is taken on")
        gram_x, gram_y = (gram - torch.diag(gram.diagonal()) for gram in _grams(x, y))
        own = _unbiased_hsic(gram_x, gram_x), _unbiased_hsic(gram_y, gram_y)
        return _aligned(_unbiased_hsic(gram_x, gram_y), *own)


class BiasedCKA:
    """Linear CKA as usual: between 0 and 1, and nearly blind for more features than images.

    Rotating, scaling or shifting either features changes nothing. Without any variation in one of them it is 0 and has
    gradient 0.
    """

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """CKA, a scalar in float32 or wider.

        Args:
            x: Features `(n, d)`, n >= 2.
            y: Features `(n, d')` of the same images.

        Raises:
            ValueError: If there are fewer than 2 images, or the shapes do not fit.
        """
        if len(x) < 2:
            raise ValueError(f"CKA needs at least 2 images, got {len(x)}; raise the batch that it is taken on")
        gram_x, gram_y = _grams(x, y)
        return _aligned((gram_x * gram_y).sum(), gram_x.square().sum(), gram_y.square().sum())


def similarity_loss(kind: str, features: Tensor, old_features: Tensor, logits: Tensor, old_logits: Tensor) -> Tensor:
    """Penalty for a network that departs from its former self, a scalar in float32 or wider.

    Args:
        kind: "cka" (1 - debiased CKA), "cka_biased", "cosine" (1 - mean cosine of rows), "logit_l2" (mean squared
            difference of logits) or "none" (0).
        features: `(n, d)`, of the network.
        old_features: `(n, d)`, of the former network on the same images.
        logits: `(n, C)`.
        old_logits: `(n, C)`; pass only the classes that the former network knew.

    Returns:
        The loss. CKA of features without any variation is no number: the term is then 0 with gradient 0, and warns.

    Raises:
        ValueError: If the kind is unknown or the shapes do not fit.
    """
    if kind not in SIMILARITIES:
        raise ValueError(f"similarity must be one of {', '.join(SIMILARITIES)}, got {kind!r}")
    new, old = (logits, old_logits) if kind == "logit_l2" else (features, old_features)
    if kind in ("cosine", "logit_l2") and new.shape != old.shape:
        raise ValueError(
            f"similarity={kind!r} compares row by row, but the shapes are {tuple(new.shape)} and {tuple(old.shape)}"
        )
    dtype = _dtype(new, old)
    if kind == "none":
        return new.new_zeros((), dtype=dtype)
    with torch.autocast(new.device.type, enabled=False):
        new, old = new.to(dtype), old.to(dtype)
        if kind == "logit_l2":
            return F.mse_loss(new, old)
        if kind == "cosine":
            return 1 - F.cosine_similarity(new, old, dim=1).mean()
        varies = ~(_constant(new) | _constant(old))
        cka = DebiasedCKA() if kind == "cka" else BiasedCKA()
        loss = torch.where(varies, 1 - cka(new, old), 0)
    # Waits for the device once; the API's responses have been waited for in the same step.
    if not bool(varies):
        warnings.warn(
            f"similarity={kind!r} was skipped: all images have the same features, in the network or its former copy",
            stacklevel=2,
        )
    return loss


def _grams(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(
            f"features must be (n, d) and (n, d') of the same n images, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    dtype = _dtype(x, y)
    with torch.autocast(x.device.type, enabled=False):
        return _gram(x.to(dtype)), _gram(y.to(dtype))


def _gram(x: Tensor) -> Tensor:
    """Inner products `(n, n)` of centred features, scaled to trace 1; zeros if the features are constant.

    Both kinds of CKA ignore shift and scale, but float32 does not: large means and lengths would cost digits.
    """
    flat = _constant(x)
    centred = x - x.mean(0)
    squares = centred.square().sum()
    # Two wheres: the gradient of the root at 0 would be infinite, and infinity times 0 is no number.
    scaled = centred * torch.where(flat, 0, torch.where(flat, 1, squares).rsqrt())
    return scaled @ scaled.T


def _constant(x: Tensor) -> Tensor:
    """Whether the rows differ by no more than rounding."""
    x = x.detach()
    rounding = 8 * torch.finfo(x.dtype).eps
    return (x - x.mean(0)).square().sum() <= rounding**2 * x.square().sum()


def _unbiased_hsic(gram_x: Tensor, gram_y: Tensor) -> Tensor:
    """Of Gram matrices with zeros on the diagonal."""
    n = len(gram_x)
    sums_x, sums_y = gram_x.sum(0), gram_y.sum(0)
    means = sums_x.sum() * sums_y.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (sums_x * sums_y).sum()
    return ((gram_x * gram_y).sum() + means) / (n * (n - 3))


def _aligned(both: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return both / (one.clamp_min(_FLOOR) * other.clamp_min(_FLOOR)).sqrt()


def _dtype(x: Tensor, y: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
