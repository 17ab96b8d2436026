"""Sequences of interactions as flat arrays, and the rules that choose among them. Every rule reports what it drops."""

from __future__ import annotations

import ctypes
import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Interactions:
    """Users' sequences, user after user and oldest first.

    Attributes:
        item_ids: int32 `(interactions,)`, 1..number of items.
        timestamps: int64 `(interactions,)`, or None.
        offsets: int64 `(users + 1,)`.
        item_labels: `(items,)`, external id of item k + 1 at k; integers or strings.
        user_labels: `(users,)`, external id of each user; integers or strings.
        name: What the data is called in messages.
    """

    item_ids: NDArray[np.int32]
    timestamps: Ints | None
    offsets: Ints
    item_labels: NDArray[Any]
    user_labels: NDArray[Any]
    name: str

    @property
    def num_items(self) -> int:
        """Size of the catalogue."""
        return len(self.item_labels)

    @property
    def num_users(self) -> int:
        """Number of sequences."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Ints:
        """Length of each sequence."""
        return np.diff(self.offsets)

    def rows(self) -> Ints:
        """Row of the user of each interaction, int64 `(interactions,)`."""
        return np.repeat(np.arange(self.num_users), self.lengths)


def return_memory() -> None:
    """Give freed memory back to the system: reading a large file leaves as much free as the data takes."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        log.debug("this C library has no malloc_trim")


def offsets_of(lengths: NDArray[Any]) -> Ints:
    """Offsets `(rows + 1,)` of rows of these lengths."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def take_users(data: Interactions, users: Ints) -> Interactions:
    """The sequences of some users, in the order given; the catalogue stays."""
    lengths = data.lengths[users]
    offsets = offsets_of(lengths)
    places = np.repeat(data.offsets[users] - offsets[:-1], lengths) + np.arange(offsets[-1])
    return replace(
        data,
        item_ids=data.item_ids[places],
        timestamps=None if data.timestamps is None else data.timestamps[places],
        offsets=offsets,
        user_labels=data.user_labels[users],
    )


def take_interactions(data: Interactions, kept: NDArray[np.bool_]) -> Interactions:
    """The interactions marked in `kept` and the users who have any; the catalogue stays."""
    lengths = np.bincount(data.rows()[kept], minlength=data.num_users)
    users = np.flatnonzero(lengths)
    return replace(
        data,
        item_ids=data.item_ids[kept],
        timestamps=None if data.timestamps is None else data.timestamps[kept],
        offsets=offsets_of(lengths[users]),
        user_labels=data.user_labels[users],
    )


def drop_absent_items(data: Interactions) -> Interactions:
    """The same sequences over a catalogue of the items that occur, in the same order."""
    present = np.bincount(data.item_ids, minlength=data.num_items + 1) > 0
    if present[1:].all():
        return data
    new_ids = np.cumsum(present, dtype=np.int32)
    return replace(data, item_ids=new_ids[data.item_ids], item_labels=data.item_labels[present[1:]])


def core(data: Interactions, min_user: int, min_item: int) -> Interactions:
    """The largest part in which every user has `min_user` interactions and every item `min_item`.

    Users and items below the limit are removed in turns until none is left. Interactions are counted, repeated ones
    included.

    Raises:
        ValueError: If nothing is left.
    """
    before = data
    while True:
        item_counts = np.bincount(data.item_ids, minlength=data.num_items + 1)
        kept = (item_counts >= min_item)[data.item_ids] & (data.lengths >= min_user)[data.rows()]
        if kept.all():
            break
        data = take_interactions(data, kept)
    data = drop_absent_items(data)
    if data.num_users == 0:
        raise ValueError(
            f"{data.name}: nothing is left of {before.num_users} users and {before.num_items} items when every user "
            f"has {min_user} interactions and every item {min_item}: lower min_user_interactions or "
            "min_item_interactions"
        )
    log.info(
        "%s: kept %d of %d users, %d of %d items, %d of %d interactions with at least %d per user and %d per item",
        data.name, data.num_users, before.num_users, data.num_items, before.num_items,
        len(data.item_ids), len(before.item_ids), min_user, min_item,
    )  # fmt: skip
    return data


def limit_length(data: Interactions, min_length: int | None) -> Interactions:
    """Users with at least 4 interactions: a training input and target, and one target each for validation and test.

    Args:
        data: The sequences.
        min_length: Shorter users are dropped; with None a user with fewer than 4 is an error.

    Raises:
        ValueError: If a user is too short and none may be dropped, or if no user is left.
    """
    short = data.lengths < (4 if min_length is None else min_length)
    count = int(short.sum())
    if not count:
        return data
    first = data.user_labels[np.argmax(short)]
    if min_length is None:
        raise ValueError(
            f"{data.name}: {count} of {data.num_users} users have fewer than 4 interactions, the first is user {first} "
            f"with {data.lengths[np.argmax(short)]}: training, validation and test need 4. Set min_length=4 to drop "
            "such users"
        )
    if count == data.num_users:
        raise ValueError(f"{data.name}: none of the {count} users has min_length={min_length} interactions")
    log.info("%s: dropped %d of %d users with fewer than %d interactions", data.name, count, len(short), min_length)
    return drop_absent_items(take_users(data, np.flatnonzero(~short)))


def sample_users(data: Interactions, fraction: float) -> Interactions:
    """A random share of the users, the same in every run: the catalogue must not depend on the seed of training."""
    if fraction == 1.0:
        return data
    count = max(1, round(fraction * data.num_users))
    users = np.sort(np.random.default_rng(0).permutation(data.num_users)[:count])
    part = drop_absent_items(take_users(data, users))
    log.info("%s: %d of %d users, %d of %d items", data.name, count, data.num_users, part.num_items, data.num_items)
    return part


def sort_by_time(data: Interactions) -> Interactions:
    """Every sequence in the order of its times; equal times keep their order."""
    if data.timestamps is None:
        return data
    order = np.lexsort((data.timestamps, data.rows()))
    return replace(data, item_ids=data.item_ids[order], timestamps=data.timestamps[order])


def gap_variance(timestamps: Ints, offsets: Ints) -> NDArray[np.float64]:
    """Population variance of the gaps between each user's distinct times; 0 with fewer than two gaps.

    Args:
        timestamps: int64 `(interactions,)`, non-decreasing per user.
        offsets: int64 `(users + 1,)`.

    Returns:
        float64 `(users,)`, squared seconds.
    """
    users = len(offsets) - 1
    rows = np.repeat(np.arange(users), np.diff(offsets))
    gaps = np.diff(timestamps)
    counted = (rows[1:] == rows[:-1]) & (gaps != 0)
    gaps, rows = gaps[counted].astype(np.float64), rows[1:][counted]
    counts = np.maximum(np.bincount(rows, minlength=users), 1)
    mean = np.bincount(rows, weights=gaps, minlength=users) / counts
    variance: NDArray[np.float64] = np.bincount(rows, weights=(gaps - mean[rows]) ** 2, minlength=users) / counts
    return variance


def rank_of(values: NDArray[Any], labels: NDArray[Any]) -> Ints:
    """Place of each value in ascending order, from 0; equal values by their labels, whatever the order of the rows."""
    rank = np.empty(len(values), dtype=np.int64)
    rank[np.lexsort((labels, values))] = np.arange(len(values))
    return rank


def half(data: Interactions, part: str, split_by: str) -> Interactions:
    """The users with the most even gaps between times, or the others.

    Args:
        data: The sequences, with times.
        part: "uniform" or "nonuniform".
        split_by: Cut at half of the "users" or where half of the "interactions" is reached.

    Raises:
        ValueError: If there are no times.
    """
    if data.timestamps is None:
        raise ValueError(f"{data.name} has no times: split={part!r} needs them")
    order = np.argsort(gap_variance(data.timestamps, data.offsets), kind="stable")
    if split_by == "users":
        cut = data.num_users // 2
    else:
        cut = int(np.searchsorted(np.cumsum(data.lengths[order]), len(data.item_ids) / 2, side="right"))
    users = np.sort(order[:cut] if part == "uniform" else order[cut:])
    return drop_absent_items(take_users(data, users))
