"""The operators of the paper as plain loops over one sequence: slow, obvious, written from the equations alone."""

from __future__ import annotations

import itertools

import numpy as np


def right_gaps(times: list[int]) -> list[int]:
    return [abs(b - a) for a, b in itertools.pairwise(times)]


def chosen_places(gaps: list[int], count: int, mode: str) -> set[int]:
    order = sorted(range(len(gaps)), key=lambda i: gaps[i])
    count = min(count, len(gaps))
    return set(order[:count] if mode == "minimum" else order[len(order) - count :])


def window_start(gaps: list[int], n: int, c: int, mode: str, official: bool = False) -> int:
    inner = c - 2 if official else c - 1
    best, at = None, 0
    for start in range(n - c, -1, -1):
        window = gaps[start : start + max(inner, 0)]
        # inner ** 2 times the population variance, in exact integers
        spread = len(window) * sum(d * d for d in window) - sum(window) ** 2
        if best is None or (spread < best if mode == "minimum" else spread > best):
            best, at = spread, start
    return at


def substitute(items: list[int], gaps: list[int], rho: float, mode: str, nearest: list[int]) -> list[int]:
    n = len(items)
    if n <= 1:
        return list(items)
    places = chosen_places(gaps, max(int(rho * n), 1), mode)
    return [nearest[v] if i in places else v for i, v in enumerate(items)]


def insert(items: list[int], gaps: list[int], mu: float, mode: str, nearest: list[int]) -> list[int]:
    places = chosen_places(gaps, max(int(mu * len(items)), 1), mode)
    out = []
    for i, v in enumerate(items):
        out.append(v)
        if i in places:
            out.append(nearest[v])
    return out


def mask(items: list[int], gaps: list[int], gamma: float, mode: str) -> list[int]:
    n = len(items)
    if n <= 1:
        return list(items)
    places = chosen_places(gaps, int(gamma * n), mode)
    return [0 if i in places else v for i, v in enumerate(items)]


def crop(items: list[int], gaps: list[int], eta: float, mode: str) -> list[int] | None:
    """None where the result is one random item."""
    n = len(items)
    c = int(eta * n)
    if c <= 2:
        return None
    start = window_start(gaps, n, c, mode)
    return items[start : start + c]


def random_sequence(rng: np.random.Generator, num_items: int, longest: int = 30) -> tuple[list[int], list[int]]:
    """Items, and times in whole days with many ties; the last time is that of the next item."""
    n = int(rng.integers(1, longest + 1))
    days = np.cumsum(rng.choice([0, 0, 0, 1, 2, 7, 30, 400], n + 1)) * 86_400
    return rng.integers(1, num_items + 1, n).tolist(), (days + 1_300_000_000).tolist()
