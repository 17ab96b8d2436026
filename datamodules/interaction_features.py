"""Features of items: the choice among them, vectors that are missing, and scaling."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import torch

from datamodules.loading import keyed_uniform, mix

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

log = logging.getLogger(__name__)

Features = dict[str, "NDArray[np.float32]"]
NORMS = (None, "l2", "standardize")


def check_features(features: Mapping[str, NDArray[np.floating]], num_items: int, source: str) -> Features:
    """Features as float32, one finite row an item.

    Args:
        features: Modality to `(num_items, size)`, of any floating type.
        num_items: Size of the catalogue.
        source: What the data is called in messages.

    Raises:
        ValueError: If a modality has another shape, or a value that is no number or beyond float32.
    """
    checked = {}
    for name in sorted(features):
        rows = np.asarray(features[name])
        if rows.ndim != 2 or rows.shape[1] == 0:
            raise ValueError(f"{source}: modality {name!r}: shape {rows.shape}, expected (num_items, size)")
        if len(rows) != num_items:
            raise ValueError(
                f"{source}: modality {name!r}: {len(rows):,} rows, expected num_items={num_items:,}; features must be "
                "row-aligned with item ids"
            )
        # float16 overflows in a sum, and float64 in the cast: no statistic before it, no check but after it.
        with np.errstate(over="ignore"):
            rows = np.require(rows, np.float32, ["C", "W"])
        bad = ~np.isfinite(rows).all(axis=1)
        if bad.any():
            first = int(bad.argmax())
            value = rows[first][~np.isfinite(rows[first])][0]
            raise ValueError(
                f"{source}: modality {name!r}: {np.count_nonzero(bad)} of {num_items} rows are not finite, the first "
                f"is row {first} with {value}; give items without content the mean vector of the others"
            )
        low, high = rows.min(axis=1), rows.max(axis=1)
        zero = int(np.count_nonzero((low == 0) & (high == 0)))
        # A row of one value is constant by itself: there only zero is suspicious.
        constant = int(np.count_nonzero((low == high) & (low != 0))) if rows.shape[1] > 1 else 0
        if zero + constant > 0.01 * num_items:
            log.warning(
                "%s: modality %r: %d rows of %d are all zero and %d constant: normalised, they are undefined or "
                "identical. Give items without content the mean vector of the others",
                source, name, zero, num_items, constant,
            )  # fmt: skip
        checked[name] = rows
    if len(checked) == 1:
        log.info("only one modality: %s", *checked)
    return checked


def choose_modalities(features: Features, names: list[str] | None, source: str) -> Features:
    """The modalities named, or all.

    Raises:
        ValueError: If one is not there, or none is named.
    """
    if names is None:
        return features
    missing = sorted(set(names) - set(features))
    if missing or not names:
        raise ValueError(
            f"modalities={names}: {source} has {', '.join(sorted(features)) or 'none'}; name one or more of these, or "
            "leave modalities out for all"
        )
    return {name: features[name] for name in sorted(set(names))}


def replace_missing(features: Features, rate: float, seed: int) -> Features:
    """Take one modality from some items: its vector becomes the mean over the items that keep theirs.

    Args:
        features: Modality to float32 `(num_items, size)`.
        rate: Share of the items, chosen at random; each loses one random modality.
        seed: What the choice depends on.

    Raises:
        ValueError: If no item keeps its vector in some modality.
    """
    if rate == 0 or not features:
        return features
    names = sorted(features)
    num_items = len(features[names[0]])
    items = torch.arange(num_items)
    # Keys 5 and 6: beside those of the splits, which may have the same seed.
    order = np.argsort(keyed_uniform(mix(5, seed), items).numpy(), kind="stable")
    lost = np.full(num_items, -1)
    chosen = order[: round(rate * num_items)]
    lost[chosen] = (keyed_uniform(mix(6, seed), items).numpy()[chosen] * len(names)).astype(np.int64)
    result = {}
    for place, name in enumerate(names):
        missing = lost == place
        if missing.all():
            raise ValueError(f"missing_rate={rate} leaves no item with modality {name!r}: lower it")
        rows = features[name].copy()
        rows[missing] = rows[~missing].mean(axis=0, dtype=np.float64)
        result[name] = rows
        log.info("missing_rate=%s: %d of %d items have the mean as modality %r",
                 rate, np.count_nonzero(missing), num_items, name)  # fmt: skip
    return result


def normalise(rows: NDArray[np.float32], norm: str | None) -> NDArray[np.float32]:
    """Scale features.

    Args:
        rows: float32 `(num_items, size)`.
        norm: "l2": rows of length 1, and zero rows stay; "standardize": columns of mean 0 and standard deviation 1,
            and constant columns become 0; None: as they are.
    """
    if norm == "l2":
        lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))[:, None]
        return (rows / np.where(lengths == 0, 1, lengths)).astype(np.float32)
    if norm == "standardize":
        centred = rows - rows.mean(axis=0, dtype=np.float64).astype(np.float32)
        deviations = np.sqrt(np.einsum("ij,ij->j", centred, centred, dtype=np.float64) / len(rows))
        # The mean of equal numbers may miss them by a rounding, which the division would blow up.
        constant = rows.min(axis=0) == rows.max(axis=0)
        centred[:, constant] = 0
        scaled: NDArray[np.float32] = (centred / np.where(constant, 1, deviations)).astype(np.float32)
        return scaled
    return rows
