"""Checks of interactions at the door, and what a checkpoint remembers of them."""

from __future__ import annotations

import logging
import math
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from datamodules.interaction_features import check_features
from datamodules.interaction_split import TEST, TRAIN, VALIDATION
from datamodules.loading import keyed_uniform

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from datamodules.interaction_rows import InteractionTable

log = logging.getLogger(__name__)


def check_table(table: InteractionTable) -> InteractionTable:
    """Check interactions and features, whoever made them.

    Duplicate pairs of one part are dropped, counted and warned about; features become float32. Warns of features that
    are zero or constant in more than 1 % of the items.

    Args:
        table: The table.

    Returns:
        The table with its pairs sorted by user and item, so that what follows does not depend on the order of a file.

    Raises:
        ValueError: If ids are out of range, features are not one finite row an item, something else is not one an item
            or an interaction, or a validation or test pair is in the training, too.
    """
    name = table.name
    for what, ids, size in (("user", table.user_ids, table.num_users), ("item", table.item_ids, table.num_items)):
        _check_ids(name, what, ids, size)
    for what, values, size in (
        ("item_ids", table.item_ids, len(table.user_ids)),
        ("split", table.split, len(table.user_ids)),
        ("images", table.images, table.num_items),
        ("item_names", table.item_names, table.num_items),
    ):
        if values is not None and len(values) != size:
            raise ValueError(f"{name}: {what} has {len(values)} entries, expected {size}")
    if table.split is not None and not np.isin(table.split, (TRAIN, VALIDATION, TEST)).all():
        raise ValueError(f"{name}: split has {np.unique(table.split).tolist()}, expected 0 (train), 1 or 2 (test)")
    user_ids, item_ids = table.user_ids.astype(np.int64), table.item_ids.astype(np.int64)
    pairs = (user_ids * table.num_items + item_ids) * 3
    if table.split is not None:
        pairs += table.split
    pairs, places = np.unique(pairs, return_index=True)
    if len(pairs) < len(user_ids):
        log.warning("%s: dropped %d duplicates of %d interactions", name, len(user_ids) - len(pairs), len(user_ids))
    if table.split is not None:
        _check_leak(name, pairs // 3, pairs % 3)
    return table._replace(
        user_ids=user_ids[places],
        item_ids=item_ids[places],
        split=None if table.split is None else table.split[places].astype(np.int8),
        features=check_features(table.features, table.num_items, name),
    )


def _check_ids(name: str, what: str, ids: NDArray[np.int64], size: int) -> None:
    if not len(ids):
        raise ValueError(f"{name}: no interactions, expected at least one")
    if ids.dtype.kind not in "iu":
        raise ValueError(f"{name}: {what} ids are {ids.dtype}, expected integers 0..{size - 1}")
    outside = int(np.count_nonzero((ids < 0) | (ids >= size)))
    if outside:
        raise ValueError(
            f"{name}: {outside} of {len(ids)} {what} ids are out of range: they go from {ids.min()} to {ids.max()}, "
            f"expected 0..{size - 1}"
        )


def _check_leak(name: str, pairs: NDArray[np.int64], parts: NDArray[np.int64]) -> None:
    # Sorted and distinct within a part: a pair that comes again is in the next part that has it.
    again = np.flatnonzero(pairs[1:] == pairs[:-1])
    leaks = int(np.count_nonzero(parts[again] == TRAIN))
    if leaks:
        raise ValueError(
            f"{name}: {leaks} validation or test pairs are also in the training: take them out of one of the two"
        )
    if len(again):
        log.warning("%s: %d pairs are both in the validation and in the test", name, len(again))


def map_labels(labels: NDArray[Any], known: NDArray[Any]) -> NDArray[np.int64]:
    """The places of labels among those that are known, compared as text; -1 for an unknown one.

    Args:
        labels: `(values,)`.
        known: `(labels,)`, distinct.
    """
    texts, wanted = known.astype(str), labels.astype(str)
    order = np.argsort(texts, kind="stable")
    places = order[np.searchsorted(texts, wanted, sorter=order).clip(max=len(texts) - 1)]
    return np.where(texts[places] == wanted, places, -1)


def known_pairs(
    name: str, labels: tuple[NDArray[Any], NDArray[Any]], table: InteractionTable, train_edges: Tensor
) -> Tensor:
    """Pairs of another file by the ids of a table; those of unknown users or items are counted and left out.

    Args:
        name: What the pairs are called in messages.
        labels: External ids of the users and of the items, `(pairs,)` each.
        table: The users and items that are known.
        train_edges: int64 `(2, interactions)`, the training pairs.

    Returns:
        int64 `(2, known pairs)`: user and item ids, without duplicates.

    Raises:
        ValueError: If no pair is known, or one is in the training.
    """
    known_labels = (table.user_labels, table.item_labels)
    user_ids, item_ids = (map_labels(*both) for both in zip(labels, known_labels, strict=True))
    known = (user_ids >= 0) & (item_ids >= 0)
    users, items = (len(np.unique(own[ids < 0])) for own, ids in zip(labels, (user_ids, item_ids), strict=True))
    if not known.any():
        raise ValueError(
            f"{name}: none of {len(known)} pairs can be tested: {users} users and {items} items are unknown; expected "
            f"labels of the training, as user {table.user_labels[0]} and item {table.item_labels[0]}"
        )
    if not known.all():
        log.info("%s: %d users and %d items are unknown, %d of %d pairs left out",
                 name, users, items, np.count_nonzero(~known), len(known))  # fmt: skip
    keys = user_ids[known] * table.num_items + item_ids[known]
    pairs = np.unique(keys)
    if len(pairs) < len(keys):
        log.warning("%s: dropped %d duplicates of %d pairs", name, len(keys) - len(pairs), len(keys))
    trained = int(np.isin(pairs, (train_edges[0] * table.num_items + train_edges[1]).numpy()).sum())
    if trained:
        raise ValueError(f"{name}: {trained} test pairs are also in the training: take them out of one of the two")
    return torch.from_numpy(np.stack(np.divmod(pairs, table.num_items)))


def _crc(values: Sequence[Any]) -> int:
    return zlib.crc32("\n".join(map(str, values)).encode())


def fingerprint(
    source: str, user_labels: list[str], item_labels: list[str], features: Mapping[str, Tensor], train_edges: Tensor
) -> dict[str, Any]:
    """What of the data must stay the same for a model trained on it, in plain values.

    Args:
        source: Where the data comes from.
        user_labels: External ids of the users.
        item_labels: External ids of the items.
        features: Modality to float32 `(num_items, size)`.
        train_edges: int64 `(2, interactions)`.
    """
    return {
        "source": source,
        "items": [len(item_labels), _crc(item_labels)],
        "users": [len(user_labels), _crc(user_labels)],
        "features": {name: _sketch(rows) for name, rows in sorted(features.items())},
        "training edges": [train_edges.shape[1], zlib.crc32(train_edges.contiguous().numpy().tobytes())],
    }


def _sketch(rows: Tensor) -> list[int | float]:
    """Shape, norm and a random bilinear form: features that were computed may differ in their last digits."""
    size = rows.shape[1]
    weights = keyed_uniform(0, torch.arange(len(rows))).float()
    directions = keyed_uniform(1, torch.arange(size)).float() - 0.5
    return [*rows.shape, float(rows.norm()), float(weights @ (rows @ directions))]


def check_fingerprint(own: Mapping[str, Any], trained: Mapping[str, Any]) -> None:
    """Compare the data of a checkpoint with the data at hand.

    Raises:
        ValueError: If they differ.
    """
    for what in ("items", "users", "features", "training edges"):
        same = _same_features(own[what], trained[what]) if what == "features" else own[what] == trained[what]
        if not same:
            was, now = (f"{state[what]} of source={state['source']!r}" for state in (trained, own))
            raise ValueError(
                f"the checkpoint was trained on other data, its {what} differ: {was}, here {now}. Use the data options "
                "of the training, split_seed included, and test_path for other interactions to test on"
            )


def _same_features(own: Mapping[str, list[float]], trained: Mapping[str, list[float]]) -> bool:
    return own.keys() == trained.keys() and all(
        own[name][:2] == trained[name][:2]
        and all(
            math.isclose(left, right, abs_tol=1e-4 * own[name][2])
            for left, right in zip(own[name][2:], trained[name][2:], strict=True)
        )
        for name in own
    )
