"""TiCoSeRec's data side as the family of published codes does it: one user at a time, in Python.

A sample is built in `Dataset.__getitem__`: it is padded to the full length, its negatives are drawn one by one, and its
two views are made by loops over its items that look up the nearest item in a sorted dictionary. Times are lists of
seconds, with one entry more than there are items: the gap to the right of item i is `times[i + 1] - times[i]`.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset


@dataclass(frozen=True)
class Ratios:
    """The share of items that each operator touches, and the modes that are no constants of the method."""

    crop: float = 0.4
    mask: float = 0.7
    reorder: float = 0.5
    substitute: float = 0.2
    insert: float = 0.5
    mask_mode: str = "maximum"


class Similarity(Protocol):
    """Anything that knows the nearest item."""

    def most_similar(self, item: int) -> tuple[int, float]:
        """Nearest item and its similarity, in [0, 1]."""


def right_gaps(items: list[int], times: list[int]) -> list[int]:
    """Gap to the right of each item; without the time that follows the last item, that one has none."""
    return [abs(after - before) for before, after in itertools.pairwise(times)][: len(items)]


def positions_by_gap(gaps: list[int], count: int, mode: str) -> list[int]:
    """Positions of the `count` smallest or largest gaps, ties in favour of the earlier or the later item."""
    order = sorted(range(len(gaps)), key=lambda position: gaps[position])
    count = min(count, len(order))
    return order[:count] if mode == "minimum" else order[len(order) - count :]


def most_even_window(gaps: list[int], length: int, count: int) -> int:
    """Start of the window of `count` items whose inner gaps vary least; the latest of equals."""
    best_start, best = 0, math.inf
    for start in range(length - count, -1, -1):
        inner = gaps[start : start + count - 1]
        # The variance times the squared number of gaps: whole numbers, so that equal windows tie.
        spread = len(inner) * sum(gap * gap for gap in inner) - sum(inner) ** 2
        if spread < best:
            best_start, best = start, spread
    return best_start


def ti_crop(items: list[int], times: list[int], ratio: float) -> list[int]:
    """Keep the most even window; of a window of up to two items, one random item."""
    count = math.floor(ratio * len(items))
    if count <= 2:
        return [items[random.randint(0, len(items) - count - 1)]]
    start = most_even_window(right_gaps(items, times), len(items), count)
    return items[start : start + count]


def ti_reorder(items: list[int], times: list[int], ratio: float) -> list[int]:
    """Shuffle the most even window."""
    count = math.floor(ratio * len(items))
    if count < 2:
        return items[:]
    start = most_even_window(right_gaps(items, times), len(items), count)
    window = items[start : start + count]
    random.shuffle(window)
    return items[:start] + window + items[start + count :]


def ti_mask(items: list[int], times: list[int], ratio: float, mode: str = "maximum") -> list[int]:
    """Set items to 0: those with the smallest or the largest gaps, or random ones."""
    count = math.floor(ratio * len(items))
    if count == 0 or len(items) <= 1:
        return items[:]
    if mode == "random":
        chosen = random.sample(range(len(items)), count)
    else:
        chosen = positions_by_gap(right_gaps(items, times), count, mode)
    view = items[:]
    for position in chosen:
        view[position] = 0
    return view


def ti_substitute(items: list[int], times: list[int], ratio: float, similarity: Similarity) -> list[int]:
    """Replace the items with the smallest gaps by their nearest items."""
    if len(items) <= 1:
        return items[:]
    view = items[:]
    for position in positions_by_gap(right_gaps(items, times), max(math.floor(ratio * len(items)), 1), "minimum"):
        view[position] = similarity.most_similar(view[position])[0]
    return view


def ti_insert(items: list[int], times: list[int], ratio: float, similarity: Similarity) -> list[int]:
    """Put the nearest item of each item with one of the largest gaps to its right."""
    chosen = positions_by_gap(right_gaps(items, times), max(math.floor(ratio * len(items)), 1), "maximum")
    view = []
    for position, item in enumerate(items):
        view.append(item)
        if position in chosen:
            view.append(similarity.most_similar(item)[0])
    return view


@dataclass
class OfflineSimilarity:
    """ItemCF-IUF in nested dictionaries; every look-up sorts the neighbours of its item."""

    users: list[list[int]]
    neighbours: dict[int, dict[int, float]] = field(default_factory=dict)
    minimum: float = math.inf
    maximum: float = -math.inf

    def __post_init__(self) -> None:
        """Count co-occurrences, user by user and pair by pair."""
        counts: dict[int, int] = {}
        for items in self.users:
            unique = set(items)
            for left in unique:
                counts[left] = counts.get(left, 0) + 1
                row = self.neighbours.setdefault(left, {})
                for right in unique:
                    if left != right:
                        row[right] = row.get(right, 0.0) + 1 / math.log(1 + len(unique))
        for left, row in self.neighbours.items():
            for right in row:
                row[right] /= math.sqrt(counts[left] * counts[right])
                self.minimum = min(self.minimum, row[right])
                self.maximum = max(self.maximum, row[right])
        self.known = [item for item, row in self.neighbours.items() if row]

    def most_similar(self, item: int) -> tuple[int, float]:
        """Nearest item by co-occurrence; a random one for an item without neighbours."""
        ordered = sorted(self.neighbours.get(item, {}).items(), key=lambda pair: pair[1], reverse=True)
        if not ordered:
            return random.choice(self.known), 0.0
        nearest, score = ordered[0]
        return nearest, (score - self.minimum) / max(self.maximum - self.minimum, 1e-12)


class OnlineSimilarity:
    """Nearest item by inner product of the model's vectors, searched at every look-up."""

    def __init__(self, item_vectors: Tensor) -> None:
        self.vectors = item_vectors.detach().clone()
        self.minimum, self.maximum = math.inf, -math.inf
        for item in range(1, len(self.vectors)):
            products = self._products(item)
            self.maximum = max(self.maximum, float(products.max()))
            products[item - 1] = torch.inf
            self.minimum = min(self.minimum, float(products.min()))

    def _products(self, item: int) -> Tensor:
        products = self.vectors[1:] @ self.vectors[item]
        products[item - 1] = -torch.inf
        return products

    def most_similar(self, item: int) -> tuple[int, float]:
        """Nearest item by the model."""
        score, index = self._products(item).topk(1)
        return int(index) + 1, (float(score) - self.minimum) / max(self.maximum - self.minimum, 1e-12)


@dataclass
class HybridSimilarity:
    """The more similar one of the two nearest items."""

    offline: OfflineSimilarity
    online: OnlineSimilarity

    def most_similar(self, item: int) -> tuple[int, float]:
        """Nearest item of the source that is surer; the offline one if both are."""
        offline, online = self.offline.most_similar(item), self.online.most_similar(item)
        return online if online[1] > offline[1] else offline


@dataclass
class Sequences:
    """All users as Python lists.

    Attributes:
        items: Everything each user chose.
        times: The times of it, in seconds.
        exempt: Users whose views are the plain sequence.
        num_items: Catalogue size.
        max_length: Length that every row is padded to.
    """

    items: list[list[int]]
    times: list[list[int]]
    exempt: set[int]
    num_items: int
    max_length: int = 50

    def train_items(self) -> list[list[int]]:
        """Training inputs v_1..v_{m-3}."""
        return [items[:-3] for items in self.items]


def pad(items: list[int], length: int) -> list[int]:
    """The last `length` items, with zeros before them."""
    items = items[-length:]
    return [0] * (length - len(items)) + items


class TrainSamples(Dataset[tuple[Tensor, ...]]):
    """Input, targets and negatives of a user, and two views where there is a similarity."""

    def __init__(self, data: Sequences, ratios: Ratios | None = None, threshold: int = 12) -> None:
        self.data, self.ratios, self.threshold = data, ratios or Ratios(), threshold
        self.similarity: Similarity | None = None

    def __len__(self) -> int:
        """Number of users."""
        return len(self.data.items)

    def __getitem__(self, user: int) -> tuple[Tensor, ...]:
        """`(max_length,)` each: input, targets, negatives, and the two views."""
        length, everything = self.data.max_length, self.data.items[user]
        inputs, targets = everything[:-3], everything[1:-2]
        met = set(everything)
        negatives = []
        for _ in targets:
            negative = random.randint(1, self.data.num_items)
            while negative in met:
                negative = random.randint(1, self.data.num_items)
            negatives.append(negative)
        rows = [inputs, targets, negatives]
        if self.similarity is not None:
            rows += [self.view(user), self.view(user)]
        return tuple(torch.tensor(pad(row, length), dtype=torch.long) for row in rows)

    def view(self, user: int) -> list[int]:
        """One view by an operator drawn for the user's length."""
        items = self.data.items[user][:-3]
        if user in self.data.exempt:
            return items[:]
        times = self.data.times[user][:-2]
        operators = "SIM" if len(items) <= self.threshold else "SIMRC"
        return self.augment(random.choice(operators), items, times)

    def augment(self, operator: str, items: list[int], times: list[int]) -> list[int]:
        """The operator with that letter."""
        assert self.similarity is not None
        if operator == "C":
            return ti_crop(items, times, self.ratios.crop)
        if operator == "R":
            return ti_reorder(items, times, self.ratios.reorder)
        if operator == "M":
            return ti_mask(items, times, self.ratios.mask, self.ratios.mask_mode)
        if operator == "S":
            return ti_substitute(items, times, self.ratios.substitute, self.similarity)
        return ti_insert(items, times, self.ratios.insert, self.similarity)


class EvalSamples(Dataset[tuple[Tensor, ...]]):
    """User, input and answer of one evaluation: `ahead` items from the end is what is to be predicted (1 or 2)."""

    def __init__(self, data: Sequences, ahead: int = 2) -> None:
        self.data, self.ahead = data, ahead

    def __len__(self) -> int:
        """Number of users."""
        return len(self.data.items)

    def __getitem__(self, user: int) -> tuple[Tensor, ...]:
        """User `()`, input `(max_length,)`, answer `()`."""
        items = self.data.items[user]
        row = pad(items[: -self.ahead], self.data.max_length)
        return torch.tensor(user), torch.tensor(row, dtype=torch.long), torch.tensor(items[-self.ahead])
