"""Rules that say which interactions are for training. Each is a function of its seed alone and reports what it drops.

Parts are numbered as in `InteractionTable.split`: 0 training, 1 validation, 2 test.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from datamodules.loading import keyed_uniform, mix

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from datamodules.interaction_rows import InteractionTable

log = logging.getLogger(__name__)

TRAIN, VALIDATION, TEST = 0, 1, 2
LEFT_OUT = -1
RULES = ("official", "mmrec")
# The first key of each rule's random numbers: one seed must not give two rules the same order.
_SPLIT, _HOLD_OUT, _COLD, _KEEP = range(1, 5)


def random_ranks(user_ids: NDArray[np.int64], num_users: int, key: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A random order of the interactions of each user.

    Args:
        user_ids: int64 `(interactions,)`.
        num_users: Number of users.
        key: What the order depends on, together with the places of the interactions.

    Returns:
        int64 `(interactions,)`, 0 for the first of each user; and int64 `(num_users,)`, the interactions of each.
    """
    counts = np.bincount(user_ids, minlength=num_users)
    order = np.lexsort((keyed_uniform(key, torch.arange(len(user_ids))).numpy(), user_ids))
    ranks = np.empty(len(user_ids), dtype=np.int64)
    ranks[order] = np.arange(len(user_ids)) - np.repeat(np.cumsum(counts) - counts, counts)
    return ranks, counts


def _held_out(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Interactions that the published rule holds out of `counts`: 2 below 10, else a fifth, and never all."""
    return np.minimum(np.where(counts < 10, 2, counts // 5), np.maximum(counts - 1, 0))


def per_user_split(user_ids: NDArray[np.int64], num_users: int, seed: int, rule: str = "official") -> NDArray[np.int8]:
    """Hold out some interactions of each user at random: h = 2 of n < 10, else h = floor(0.2 n).

    "official" (IDSF, LATTICE, MICRO) gives floor(h / 2) of them to the test and the rest to the validation, "mmrec"
    floor(h / 2) to the validation and the rest to the test. A user of one or two interactions keeps one for training.

    Args:
        user_ids: int64 `(interactions,)`.
        num_users: Number of users.
        seed: What the choice depends on, together with the order of the interactions.
        rule: "official" or "mmrec".

    Returns:
        int8 `(interactions,)`: 0 training, 1 validation, 2 test.

    Raises:
        ValueError: If the rule is none of these.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    ranks, counts = random_ranks(user_ids, num_users, mix(_SPLIT, seed))
    held = _held_out(counts)
    short = int(np.count_nonzero((counts > 0) & (counts < 3)))
    if short:
        log.info("%d of %d users have fewer than 3 interactions: they keep one to train and hold out the rest",
                 short, num_users)  # fmt: skip
    first, second = (TEST, VALIDATION) if rule == "official" else (VALIDATION, TEST)
    split = np.full(len(user_ids), TRAIN, dtype=np.int8)
    split[ranks < held[user_ids]] = second
    split[ranks < held[user_ids] // 2] = first
    return split


def hold_out_test(
    user_ids: NDArray[np.int64], split: NDArray[np.int8], num_users: int, seed: int, part: int = TEST
) -> NDArray[np.int8]:
    """Make up for the missing part of a published split: take it from the training part, user by user.

    Of a user with n interactions in all, floor(h / 2) training interactions leave, h of the published rule
    (`per_user_split`), and at least one stays. The part that is there is left as published.

    Args:
        user_ids: int64 `(interactions,)`.
        split: int8 `(interactions,)`, the published parts.
        num_users: Number of users.
        seed: What the choice depends on, together with the order of the interactions.
        part: The part that is missing: 2 for the test, 1 for the validation.

    Returns:
        int8 `(interactions,)`, `split` with the part filled.
    """
    train = np.flatnonzero(split == TRAIN)
    ranks, counts = random_ranks(user_ids[train], num_users, mix(_HOLD_OUT, seed))
    held = _held_out(np.bincount(user_ids, minlength=num_users)) // 2
    held = np.minimum(held, np.maximum(counts - 1, 0))
    split = split.copy()
    split[train[ranks < held[user_ids[train]]]] = part
    log.info("the published split has no %s part: %d of %d training interactions of %d users were held out for it",
             "test" if part == TEST else "validation", int(held.sum()), len(train), np.count_nonzero(held))  # fmt: skip
    return split


def cold_split(item_ids: NDArray[np.int64], num_items: int, share: float, seed: int) -> NDArray[np.int8]:
    """Items that training must not see, a random choice of those with interactions.

    Args:
        item_ids: int64 `(interactions,)`.
        num_items: Size of the catalogue.
        share: Share of the items if below 1, else their number.
        seed: What the choice depends on.

    Returns:
        int8 `(num_items,)`: 0 for a warm item; half of the cold ones have 1 (validation), the others 2 (test), and one
        more than the first if their number is odd.

    Raises:
        ValueError: If the share makes no item for each of the two parts, or leaves none to train.
    """
    present = np.flatnonzero(np.bincount(item_ids, minlength=num_items))
    count = round(share * len(present)) if share < 1 else int(share)
    if not 2 <= count < len(present):
        raise ValueError(
            f"cold items: {share} of {len(present)} items is {count}, expected at least 2 (one to validate, one to "
            "test) and fewer than all"
        )
    order = np.argsort(keyed_uniform(mix(_COLD, seed), torch.from_numpy(present)).numpy(), kind="stable")
    parts = np.full(num_items, TRAIN, dtype=np.int8)
    parts[present[order[: count // 2]]] = VALIDATION
    parts[present[order[count // 2 : count]]] = TEST
    return parts


def apply_cold(item_ids: NDArray[np.int64], split: NDArray[np.int8], parts: NDArray[np.int8]) -> NDArray[np.int8]:
    """The split of the cold-item protocol.

    Args:
        item_ids: int64 `(interactions,)`.
        split: int8 `(interactions,)`, the split of the warm items.
        parts: int8 `(num_items,)`, of `cold_split`.

    Returns:
        int8 `(interactions,)`: all interactions of a cold item are in its part; those of a warm item are in training
        or, where they were in validation or test, -1: nowhere.
    """
    cold = parts[item_ids] != TRAIN
    result = np.where(cold, parts[item_ids], np.where(split == TRAIN, TRAIN, LEFT_OUT)).astype(np.int8)
    log.info(
        "cold items: %d to validate and %d to test; their %d training interactions leave the training, and %d "
        "validation and test interactions of warm items are left out",
        np.count_nonzero(parts == VALIDATION), np.count_nonzero(parts == TEST),
        np.count_nonzero(cold & (split == TRAIN)), np.count_nonzero(result == LEFT_OUT),
    )  # fmt: skip
    return result


def keep_per_user(user_ids: NDArray[np.int64], count: int, seed: int) -> NDArray[np.bool_]:
    """A random choice of at most `count` interactions of each user.

    Args:
        user_ids: int64 `(interactions,)`.
        count: Most interactions of a user.
        seed: What the choice depends on, together with the order of the interactions.

    Returns:
        bool `(interactions,)`, True where kept.
    """
    num_users = int(user_ids.max(initial=-1)) + 1
    ranks, _ = random_ranks(user_ids, num_users, mix(_KEEP, seed))
    kept: NDArray[np.bool_] = ranks < count
    log.info("sparse regime: kept %d of %d training interactions, at most %d a user",
             np.count_nonzero(kept), len(kept), count)  # fmt: skip
    return kept


def assign_parts(
    table: InteractionTable,
    rule: str | None,
    seed: int,
    cold_parts: NDArray[np.int8] | None = None,
    keep_train: int | None = None,
) -> NDArray[np.int8]:
    """The part of each interaction.

    Args:
        table: Interactions, with or without a published split.
        rule: "published", "official" or "mmrec"; None for the published split, or else the official rule.
        seed: What every choice depends on.
        cold_parts: int8 `(num_items,)` of `cold_split`; None without the cold-item protocol.
        keep_train: Most training interactions of a user; None for all.

    Returns:
        int8 `(interactions,)`: 0 training, 1 validation, 2 test, -1 nowhere.

    Raises:
        ValueError: If the published split is wanted and there is none, or nothing is left to train.
    """
    rule = rule or ("official" if table.split is None else "published")
    if rule != "published":
        parts = per_user_split(table.user_ids, table.num_users, seed, rule)
    elif table.split is None:
        raise ValueError(f"split='published': {table.name} has no split, use one of {', '.join(RULES)}")
    else:
        parts = table.split
        for part in (VALIDATION, TEST):
            if not (table.split == part).any():
                parts = hold_out_test(table.user_ids, parts, table.num_users, seed, part)
    if cold_parts is not None:
        parts = apply_cold(table.item_ids, parts, cold_parts)
    if keep_train is not None:
        train = np.flatnonzero(parts == TRAIN)
        parts = parts.copy()
        parts[train[~keep_per_user(table.user_ids[train], keep_train, seed)]] = LEFT_OUT
    if not (parts == TRAIN).any():
        raise ValueError(f"{table.name}: no interaction is left for training")
    return parts


def iterated_core(table: InteractionTable, min_user: int, min_item: int) -> InteractionTable:
    """The largest part of a table where every user and every item has enough interactions.

    Args:
        table: Users, items and all that belongs to them.
        min_user: Fewest interactions of a user.
        min_item: Fewest interactions of an item.

    Returns:
        The table with new ids in the old order; labels, features, images and names follow.

    Raises:
        ValueError: If nothing is left.
    """
    kept = np.ones(len(table.user_ids), dtype=np.bool_)
    left = len(kept) + 1
    while kept.sum() < left:
        left = int(kept.sum())
        users = np.bincount(table.user_ids[kept], minlength=table.num_users) >= min_user
        items = np.bincount(table.item_ids[kept], minlength=table.num_items) >= min_item
        kept &= users[table.user_ids] & items[table.item_ids]
    users = np.bincount(table.user_ids[kept], minlength=table.num_users) > 0
    items = np.bincount(table.item_ids[kept], minlength=table.num_items) > 0
    if not kept.any():
        raise ValueError(
            f"{table.name}: nothing is left of {table.num_users} users and {table.num_items} items when every user has "
            f"{min_user} interactions and every item {min_item}: lower min_user_interactions or min_item_interactions"
        )
    log.info("%s: core of %d interactions a user and %d an item: kept %d of %d users, %d of %d items, %d of %d "
             "interactions", table.name, min_user, min_item, np.count_nonzero(users), table.num_users,
             np.count_nonzero(items), table.num_items, np.count_nonzero(kept), len(kept))  # fmt: skip
    return take(table, kept, users, items)


def take(
    table: InteractionTable, kept: NDArray[np.bool_], users: NDArray[np.bool_], items: NDArray[np.bool_]
) -> InteractionTable:
    """Some interactions, users and items of a table, in the old order with new ids.

    Args:
        table: The table.
        kept: bool `(interactions,)`; none of a user or item that leaves.
        users: bool `(num_users,)`.
        items: bool `(num_items,)`.
    """
    rows = np.flatnonzero(items)
    names: list[Any] | None = None if table.item_names is None else [table.item_names[row] for row in rows]
    return table._replace(
        user_labels=table.user_labels[users],
        item_labels=table.item_labels[items],
        user_ids=(np.cumsum(users) - 1)[table.user_ids[kept]],
        item_ids=(np.cumsum(items) - 1)[table.item_ids[kept]],
        split=None if table.split is None else table.split[kept],
        features={name: rows_[items] for name, rows_ in table.features.items()},
        images=None if table.images is None else table.images[items],
        item_names=names,
    )
