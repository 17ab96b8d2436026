"""The published attack on titles in plain form: one title at a time, each ranked among all items for all users."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from zoo.text_attack.words import Words

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor


def plain_exposure(users: Tensor, items: Tensor, item_id: int, k: int = 50, rows: int = 1024) -> float:
    """Share of users who find an item among their best K, by ranking all items for each of them.

    Args:
        users: Vectors `(users, size)`.
        items: Vectors `(items, size)`, that of the attacked title in its item's row.
        item_id: The item.
        k: Length of a list.
        rows: Users whose scores are held at once; all of the work is done for any number.
    """
    hits = 0
    columns = F.normalize(items, dim=-1).T
    for part in torch.split(F.normalize(users, dim=-1), rows):
        cosines = (part @ columns).numpy()
        lists = np.argpartition(cosines, -k, axis=1)[:, -k:]
        hits += int((lists == item_id).any(1).sum())
    return hits / len(users)


class PlainGoal:
    """What a title of an item reaches: it goes through the encoder alone, then all items are ranked.

    Args:
        encode: From titles to vectors `(titles, size)`.
        users: Vectors `(users, size)`.
        items: Vectors of the clean catalogue `(items, size)`.
        item_id: The item.
        k: Length of a list.

    Attributes:
        queries: Titles that were scored; a title counts as often as it is asked for.
    """

    def __init__(
        self, encode: Callable[[list[str]], Tensor], users: Tensor, items: Tensor, item_id: int, k: int
    ) -> None:
        self.encode, self.users, self.items, self.item_id, self.k = encode, users, items, item_id, k
        self.queries = 0

    def __call__(self, text: str) -> float:
        """The exposure of a title."""
        self.queries += 1
        items = self.items.clone()
        items[self.item_id] = self.encode([text])[0]
        return plain_exposure(self.users, items, self.item_id, self.k)


class PlainResult(NamedTuple):
    """Where a search ended.

    Attributes:
        text: The attacked title.
        before: What the title reached.
        after: What the attacked title reaches.
        queries: Titles that were scored.
    """

    text: str
    before: float
    after: float
    queries: int


def plain_attack(
    text: str, places: Sequence[int], goal: PlainGoal, edits: Callable[[Words, int], Sequence[Words]]
) -> PlainResult:
    """Greedy word swap without early stop (section 2.5 of the method), asking for one title after the other.

    Args:
        text: The title.
        places: Its words that may be edited.
        goal: What a title reaches.
        edits: The candidates of a word, which keep to the constraints.
    """
    words = Words.of(text)
    before = after = goal(text)
    worth = {place: goal(words.without(place).text) for place in places}
    for place in sorted(places, key=lambda one: worth[one], reverse=True):
        better = None
        candidates = {candidate.text: candidate for candidate in edits(words, place)}
        for new in sorted(candidates):
            if new == words.text:
                continue
            value = goal(new)
            if value > after:
                better, after = candidates[new], value
        words = words if better is None else better
    return PlainResult(words.text, before, after, goal.queries)


@torch.no_grad()
def plain_probabilities(decoder: Any, prompts: Sequence[Sequence[int]], yes_id: int, no_id: int) -> Tensor:
    """Probabilities of yes `(prompts,)`: each prompt is read by itself and as a whole."""
    values = []
    for prompt in prompts:
        logits = decoder(input_ids=torch.tensor([list(prompt)])).logits[0, -1]
        values.append(torch.stack([logits[yes_id], logits[no_id]]).softmax(0)[0])
    return torch.stack(values)
