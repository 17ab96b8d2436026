"""Checks of item features, and telling whether two are the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

_TOLERANCE = 1e-3  # of the norm: features computed on another machine differ in their last digits


def checked_features(features: Mapping[str, Tensor], sizes: Mapping[str, int], num_items: int) -> dict[str, Tensor]:
    """The features of a model, float32.

    Args:
        features: `(num_items, D_m)` by modality; others than those wanted are left aside.
        sizes: Width D_m by modality.
        num_items: Number of items.

    Raises:
        ValueError: If a modality is missing, has another shape, or holds NaN or Inf.
    """
    found = {}
    for name, size in sizes.items():
        if name not in features:
            raise ValueError(f"modality {name!r} is missing: the data has {', '.join(sorted(features)) or 'none'}")
        values = features[name].float()
        if values.ndim != 2 or values.shape[1] != size:
            raise ValueError(f"modality {name!r}: shape {tuple(values.shape)}, expected width {size}")
        if len(values) != num_items:
            raise ValueError(
                f"modality {name!r}: {len(values):,} rows, expected n_items={num_items:,}; features must be "
                "row-aligned with item ids"
            )
        bad = (~values.isfinite().all(1)).nonzero().flatten()
        if len(bad):
            raise ValueError(f"modality {name!r}: row {int(bad[0])} holds NaN or Inf ({len(bad)} such rows)")
        found[name] = values
    return found


def feature_fingerprint(features: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """By modality the norm of the features, and a sum with weights that differ from place to place."""
    found = {}
    for name, values in features.items():
        exact = values.double()
        rows, columns = (torch.arange(1, size + 1, dtype=torch.float64).cos().to(exact.device) for size in exact.shape)
        found[name] = [float(exact.norm()), float(rows @ exact @ columns)]
    return found


def same_features(left: Mapping[str, list[float]], right: Mapping[str, list[float]]) -> bool:
    """Whether two fingerprints are of the same features, up to the last digits."""
    if left.keys() != right.keys():
        return False
    return all(
        abs(one - other) <= _TOLERANCE * max(1e-12, left[name][0])
        for name in left
        for one, other in zip(left[name], right[name], strict=True)
    )


def shown_fingerprint(fingerprint: Mapping[str, list[float]]) -> str:
    """A fingerprint for a message."""
    return ", ".join(f"{name} {norm:.6g}/{check:.6g}" for name, (norm, check) in fingerprint.items()) or "none"
