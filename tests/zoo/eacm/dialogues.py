"""Small dialogues for the tests of this room."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

NUM_EMOTIONS = 3
WORDS = 12


class Batch(NamedTuple):
    """What the room's models read of a batch."""

    post_ids: Tensor
    post_mask: Tensor
    reply_in: Tensor
    reply_out: Tensor
    reply_mask: Tensor
    post_emotion: Tensor
    reply_emotion: Tensor
    post_emotion_known: Tensor
    reply_emotion_known: Tensor
    keys: Tensor
    post_text: list[str]
    reply_text: list[str]


def dialogues(rows: int = 6, post: int = 5, reply: int = 4, seed: int = 0, emotions: int = NUM_EMOTIONS) -> Batch:
    """Random dialogues of different lengths over words 4 to `WORDS` - 1; every reply ends."""
    draw = torch.Generator().manual_seed(seed)

    def ids(longest: int) -> tuple[Tensor, Tensor]:
        lengths = torch.randint(1, longest + 1, (rows,), generator=draw)
        lengths[0] = longest
        mask = torch.arange(longest) < lengths[:, None]
        return torch.randint(4, WORDS, (rows, longest), generator=draw) * mask, mask

    post_ids, post_mask = ids(post)
    words, mask = ids(reply)
    ends = mask.sum(1)
    out = torch.cat((words, words.new_zeros(rows, 1)), 1).scatter(1, ends[:, None], 2)
    start = torch.full((rows, 1), 3)
    kinds = torch.nn.functional.one_hot(torch.randint(0, emotions, (2, rows), generator=draw), emotions).float()
    known = torch.ones(rows, dtype=torch.bool)
    text = [" ".join(f"w{token}" for token in row if token) for row in post_ids.tolist()]
    return Batch(
        post_ids, post_mask, torch.cat((start, words), 1), out, torch.cat((torch.ones(rows, 1).bool(), mask), 1),
        kinds[0], kinds[1], known, known, torch.arange(rows) * 7919, text, text,
    )  # fmt: skip


def widened(batch: Batch, by: int = 3) -> Batch:
    """The same with more padding."""

    def wide(x: Tensor) -> Tensor:
        return torch.cat((x, x.new_zeros(len(x), by)), 1)

    names = ("post_ids", "post_mask", "reply_in", "reply_out", "reply_mask")
    wider: dict[str, Any] = {name: wide(getattr(batch, name)) for name in names}
    return batch._replace(**wider)


def rows_of(batch: Batch, rows: list[int]) -> Batch:
    """Some rows of a batch."""
    parts = (part[rows] if isinstance(part, Tensor) else [part[row] for row in rows] for part in batch)
    return Batch(*parts)  # type: ignore[arg-type]
