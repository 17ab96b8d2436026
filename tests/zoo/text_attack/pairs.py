"""Titles and batches for the victims that are asked about pairs."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
from torch import Tensor

WORDS = [
    "Super",
    "Mario",
    "Kart",
    "Zelda",
    "Halo",
    "Quest",
    "Dragon",
    "World",
    "Star",
    "Deluxe",
    "(PS3)",
    "Pro-2",
    "Pokémon",
]
VOCABULARY = 400
NUM_USERS = 20


class Batch(NamedTuple):
    user_ids: Tensor
    history: Tensor
    liked: Tensor
    item_ids: Tensor
    labels: Tensor
    candidate_ids: Tensor
    keys: Tensor


def catalogue(count: int = 40) -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 5))) for _ in range(count)]


TITLES = catalogue()


def batch(size: int = 6, length: int = 5, candidates: int = 3, num_items: int = len(TITLES)) -> Batch:
    draw = torch.Generator().manual_seed(1)
    history = torch.randint(num_items, (size, length), generator=draw)
    history[torch.arange(length) >= torch.arange(size)[:, None] % (length + 1)] = -1
    return Batch(
        user_ids=torch.arange(size),
        history=history,
        liked=(torch.rand(size, length, generator=draw) < 0.6) & (history >= 0),
        item_ids=torch.randint(num_items, (size,), generator=draw),
        labels=(torch.arange(size) % 2).float(),
        candidate_ids=torch.randint(num_items, (size, candidates), generator=draw),
        keys=torch.zeros(size, dtype=torch.int64),
    )


def victim(kind: type[Any], titles: list[str] = TITLES, seed: int = 0, **options: Any) -> Any:
    """A victim whose weights are all away from their first values, with titles."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_heads": 2, "intermediate_size": 48}
    values: dict[str, Any] = {"vocab_size": VOCABULARY, "backbone_options": sizes, "max_tokens": 256, **options}
    made = kind(**values)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    made.set_titles(titles)
    return made
