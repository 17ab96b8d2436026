"""A generated set of sequences with known truth: bursts in one taste, and long gaps at which the taste drifts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from datamodules.sources.interactions import Interactions, Ints, offsets_of, take_users

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MINUTE = 60.0
_DAY = 86_400.0
_START = 1_577_836_800  # 2020-01-01


class SampleTruth(NamedTuple):
    """What the generator knows.

    Attributes:
        family: int64 `(items,)`, family of item k + 1 at k.
        successor: int64 `(items,)`, id of the item that most often follows item k + 1 in its family.
        steady: bool `(users,)`, users of one lasting taste and even gaps.
        drifts: bool `(interactions,)`, whether it is of another family than the user's previous one.
    """

    family: Ints
    successor: Ints
    steady: NDArray[np.bool_]
    drifts: NDArray[np.bool_]


def sequence_sample(
    num_users: int = 1_000, num_families: int = 20, family_size: int = 16, seed: int = 0
) -> tuple[Interactions, SampleTruth]:
    """Generate sequences.

    Items come in families of a fixed inner order. A user is in one family at a time, and takes the next item in the
    family's order (60 %) or one by its popularity there (Zipf). Two kinds of users:

    - bursty (70 %): some interactions minutes apart, then a gap of a month or so (log-normal). At such a gap the taste
      drifts (70 %), mostly to the family that follows in a fixed ring, otherwise to any family;
    - steady (30 %): an interaction every so many days, within a tenth of it, and hardly any drift.

    So the time stamps carry information that the order alone lacks: items within a burst belong together, a large gap
    parts two tastes, and users with even gaps are the predictable ones. Nobody takes an item twice. Lengths are 5 to
    60, most of them short.

    Args:
        num_users: Users drawn; every one has at least 5 interactions.
        num_families: Families.
        family_size: Items of a family.
        seed: Of numpy's generator.

    Returns:
        The sequences, and what is true of them.
    """
    rng = np.random.default_rng(seed)
    num_items = num_families * family_size
    # A few more users than wanted: those who come out shorter than 5 are left out at the end.
    wanted_users, num_users = num_users, num_users + num_users // 100 + 8
    steady = rng.random(num_users) < 0.3
    # Drawn longer than wanted: an item that a user had before is left out afterwards.
    wanted = np.minimum(4 + rng.geometric(0.16, num_users), 60)
    draws = (wanted * 1.6 + 8).astype(np.int64)
    offsets = offsets_of(draws)
    items = np.empty(offsets[-1], dtype=np.int64)
    seconds = np.empty(offsets[-1], dtype=np.int64)

    popularity = 1.0 / np.arange(1, family_size + 1)
    popularity = np.cumsum(popularity / popularity.sum())
    family = rng.integers(num_families, size=num_users)
    place = np.searchsorted(popularity, rng.random(num_users))
    clock = rng.random(num_users) * 365 * _DAY
    period = rng.uniform(3, 21, num_users) * _DAY
    users = np.arange(num_users)
    for step in range(int(draws.max())):
        users = users[draws[users] > step]
        count = len(users)
        if step:
            calm = steady[users]
            pause = ~calm & (rng.random(count) < 0.35)
            gap = rng.exponential(40 * _MINUTE, count) + 1
            gap[pause] = np.exp(rng.normal(np.log(30 * _DAY), 0.9, int(pause.sum())))
            gap[calm] = period[users][calm] * rng.uniform(0.9, 1.1, int(calm.sum()))
            clock[users] += gap
            drift = (rng.random(count) < 0.7) & pause | (rng.random(count) < 0.06) & calm
            ring = (family[users] + 1) % num_families
            other = np.where(rng.random(count) < 0.75, ring, rng.integers(num_families, size=count))
            family[users] = np.where(drift, other, family[users])
            by_popularity = np.searchsorted(popularity, rng.random(count))
            follow = ~drift & (rng.random(count) < 0.6)
            place[users] = np.where(follow, (place[users] + 1) % family_size, by_popularity)
        items[offsets[users] + step] = family[users] * family_size + place[users]
        seconds[offsets[users] + step] = _START + clock[users]

    rows = np.repeat(np.arange(num_users), draws)
    first = np.zeros(len(items), dtype=bool)
    first[np.unique(rows * num_items + items, return_index=True)[1]] = True
    # Place among the user's first-time items, to cut each user at the length wanted.
    nth = np.cumsum(first) - 1
    nth -= nth[offsets[:-1]][rows]
    kept = first & (nth < wanted[rows])
    lengths = np.bincount(rows[kept], minlength=num_users)

    # Ids in a random order: neither the family nor the popularity can be read off an id.
    new_ids = rng.permutation(num_items) + 1
    flat = np.arange(num_items)
    family_of, successor = np.empty_like(flat), np.empty_like(flat)
    family_of[new_ids - 1] = flat // family_size
    successor[new_ids - 1] = new_ids[flat // family_size * family_size + (flat + 1) % family_size]
    data = Interactions(
        new_ids[items[kept]].astype(np.int32),
        seconds[kept],
        offsets_of(lengths),
        np.arange(1, num_items + 1),
        np.arange(1, num_users + 1),
        "embedded",
    )
    users = np.flatnonzero(lengths >= 5)[:wanted_users]
    data = replace(take_users(data, users), user_labels=np.arange(1, wanted_users + 1))
    families = family_of[data.item_ids - 1]
    drifts = np.zeros(len(families), dtype=bool)
    drifts[1:] = (np.diff(data.rows()) == 0) & (families[1:] != families[:-1])
    return data, SampleTruth(family_of, successor, steady[users], drifts)
