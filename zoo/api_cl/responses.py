"""Responses of an API, whatever it returns, as probabilities; and their logarithms.

The paper's text beyond its abstract could not be read; this is a documented reconstruction.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

OUTPUTS = ("probs", "logits", "topk", "label")
# How far a row of probabilities may be from a sum of 1, or an entry from [0, 1], and still be one.
TOLERANCE = 1e-2
# Smallest probability that has a logarithm of its own, where the API does not round.
SMALLEST = 1e-6
_EXACT = 1e-5


def to_probabilities(
    raw: Tensor,
    output: str,
    num_classes: int,
    *,
    name: str = "API",
    label_smoothing: float = 0.1,
    decimals: int | None = None,
) -> Tensor:
    """Probabilities from what an API returned (reconstruction).

    - "probs": clamped to [0, 1]. Rows that miss a sum of 1 by at most 0.01 are renormalised, with a warning; rows
      that miss it because each entry was rounded stay on their grid, which `grid_decimals` looks for.
    - "logits": their softmax.
    - "topk": what is missing from a sum of 1 is spread evenly over the classes with a score of 0, the unlisted ones.
    - "label": 1 - label_smoothing for the label, the rest spread evenly over the other classes.

    Args:
        raw: Floating point `(N, C)`; integer columns `(N,)` if `output` is "label".
        output: One of `OUTPUTS`.
        num_classes: C.
        name: The API's name, for errors.
        label_smoothing: Probability that a label leaves to the other classes, from 0 to below 1.
        decimals: Decimals to which the API rounds, if known: a row of many rounded entries may miss a sum of 1 by more
            than 0.01.

    Returns:
        `(N, C)` in float32, or float64 if `raw` is. It has the gradient of `raw`, if that has one.

    Raises:
        ValueError: If shape or type do not fit, a value is not finite, or the rows are no probabilities.
    """
    if output not in OUTPUTS:
        raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")
    if output == "label":
        return _smoothed(raw, num_classes, name, label_smoothing)
    if raw.ndim != 2:
        raise ValueError(f"{_api(name)} returned responses of shape {tuple(raw.shape)}, expected (N, {num_classes})")
    if raw.shape[1] != num_classes:
        raise ValueError(f"{_api(name)} returned {raw.shape[1]} columns for {num_classes} declared classes")
    scores = raw.to(torch.promote_types(raw.dtype, torch.float32))
    if not len(scores):
        return scores
    sums = scores.detach().sum(dim=1)
    excess = (sums - 1).clamp(min=0) if output == "topk" else (sums - 1).abs()
    # One transfer for all checks; NaN and infinities survive the reductions.
    low, high, off = torch.stack([scores.detach().amin(), scores.detach().amax(), excess.amax()]).tolist()
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        row = int((~scores.isfinite().all(dim=1)).nonzero()[0])
        raise ValueError(f"{_api(name)} returned {scores[row].tolist()} in row {row}, expected finite numbers")
    if output == "logits":
        return scores.softmax(dim=1)
    rounding = 0.0 if decimals is None else _rounding(num_classes, decimals)
    if low < -TOLERANCE or high > 1 + TOLERANCE or off > max(TOLERANCE, rounding):
        raise ValueError(_not_probabilities(scores, sums, excess, output, name))
    if output == "topk":
        return _filled(scores.clamp(0, 1))
    return _normalised(scores.clamp(0, 1), off, rounding, name)


def log_responses(probs: Tensor, decimals: int | None = None) -> Tensor:
    """Log-responses log max(p, p_min), with p_min = 10^-decimals, or 1e-6 if the API does not round (reconstruction).

    Args:
        probs: `(..., C)`.
        decimals: Decimals to which the API rounds.

    Returns:
        A tensor like `probs`, finite.
    """
    return probs.clamp(min=SMALLEST if decimals is None else 10.0**-decimals).log()


def centred(log_probs: Tensor) -> Tensor:
    """Logarithms minus their mean over the classes.

    Of log softmax(s) these are the centred logits s themselves: softmax destroys no more than a constant.

    Args:
        log_probs: `(..., C)`.
    """
    return log_probs - log_probs.mean(dim=-1, keepdim=True)


def grid_decimals(probs: Tensor, most: int = 7) -> int | None:
    """Number of decimals to which an API seems to round.

    Args:
        probs: Responses of a batch, of any shape; the more, the surer.
        most: Largest number that is tried. Above 7, float32 itself is coarser.

    Returns:
        The smallest r >= 1 for which all responses are multiples of 10^-r, as exactly as their dtype can be; None if
        there is none, or no response.
    """
    values = probs.detach()
    if not values.numel():
        return None
    wide = values.double()
    for decimals in range(1, most + 1):
        on_grid = (torch.round(wide * 10**decimals) / 10**decimals).to(values.dtype)
        if torch.equal(on_grid, values):
            return decimals
    return None


def _api(name: str) -> str:
    return name if name == "API" else f"API {name!r}"


def _rounding(num_classes: int, decimals: int) -> float:
    """Most by which a row of rounded probabilities can miss a sum of 1, with a margin for float32."""
    return num_classes * 0.5 * 10.0**-decimals + _EXACT


def _smoothed(raw: Tensor, num_classes: int, name: str, label_smoothing: float) -> Tensor:
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie from 0 to below 1, got {label_smoothing}")
    if raw.ndim != 1 or raw.is_floating_point() or raw.is_complex() or raw.dtype == torch.bool:
        raise ValueError(
            f"{_api(name)} returned {raw.dtype} of shape {tuple(raw.shape)}, expected the column of each label as "
            "integers (N,); set output='probs' or output='logits' if it returns scores"
        )
    columns = raw.long()
    wrong = ((columns < 0) | (columns >= num_classes)).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"{_api(name)} returned label {int(columns[wrong[0]])} in row {wrong[0]}, expected a column from 0 to "
            f"{num_classes - 1} of its {num_classes} declared classes"
        )
    if num_classes == 1:
        return torch.ones(len(columns), 1, device=raw.device)
    probs = torch.full((len(columns), num_classes), label_smoothing / (num_classes - 1), device=raw.device)
    return probs.scatter_(1, columns[:, None], 1 - label_smoothing)


def _filled(scores: Tensor) -> Tensor:
    unlisted = scores == 0
    missing = (1 - scores.sum(dim=1, keepdim=True)).clamp(min=0)
    count = unlisted.sum(dim=1, keepdim=True)
    probs = torch.where(unlisted, missing / count.clamp(min=1), scores)
    # Where every class is listed, or the listed ones exceed 1 a little, nothing else brings the sum to 1.
    return probs / probs.sum(dim=1, keepdim=True)


def _normalised(probs: Tensor, off: float, rounding: float, name: str) -> Tensor:
    if off <= max(_EXACT, rounding):
        return probs
    found = grid_decimals(probs, most=6)
    if found is not None and off <= _rounding(probs.shape[1], found):
        return probs
    # The text holds no numbers: Python then shows it once for each API.
    warnings.warn(
        f"{_api(name)}: rows of its probabilities sum to 1 only within {TOLERANCE}; they are renormalised", stacklevel=3
    )
    return probs / probs.sum(dim=1, keepdim=True)


def _not_probabilities(scores: Tensor, sums: Tensor, excess: Tensor, output: str, name: str) -> str:
    outside = torch.maximum(-scores.amin(dim=1), scores.amax(dim=1) - 1)
    row = int(torch.maximum(excess, outside).argmax())
    low, high, total = float(scores[row].min()), float(scores[row].max()), float(sums[row])
    told = f"(min {low:.3g}, row sum {total:.3g})"
    if low < -TOLERANCE or high > 1 + TOLERANCE or output == "topk":
        return f"{_api(name)}: row {row} looks like logits {told}; set output='logits'"
    return (
        f"{_api(name)}: row {row} does not sum to 1 {told}; set decimals if the API rounds to few, output='topk' if it "
        "lists only its best classes, output='logits' if these are logits"
    )
