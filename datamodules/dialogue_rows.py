"""Posts and replies with their emotions as flat tensors, and the gathering of whole batches from them."""

from __future__ import annotations

import logging
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.dialogue_vocabulary import EOS_ID, GO_ID, SEP_ID
from datamodules.loading import Draw, keyed_ids, mix

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)

EVALUATION_KEY = mix(0, 0)
"""What the random numbers of evaluation depend on: the same in every run."""
_CHUNK = 8_192  # texts whose encodings are in memory at once


class DialogueBatch(NamedTuple):
    """Posts, their replies and the emotions of both.

    Attributes:
        post_ids: int64 `(batch, post length)`, in reading order, filled with 0 on the right; turns have `[SEP]` between
            them.
        post_mask: bool `(batch, post length)`, False on padding.
        reply_in: int64 `(batch, reply length)`: GO, then the reply; 0 after it.
        reply_out: int64 `(batch, reply length)`: the reply, then EOS if it ended within the longest reply; 0 after it.
        reply_mask: bool `(batch, reply length)`, where `reply_out` counts; all False for a post without a reply.
        post_emotion: float32 `(batch, num_emotions)`, multi-hot; all 0 where unknown.
        reply_emotion: float32 `(batch, num_emotions)`, multi-hot; all 0 where unknown.
        post_emotion_known: bool `(batch,)`.
        reply_emotion_known: bool `(batch,)`.
        keys: int64 `(batch,)` in `[0, 2**63)`, what random choices of these rows may depend on.
        indices: int64 `(batch,)`, the row in its part.
        post_text: The posts as written, turns joined by ` [SEP] `.
        reply_text: The replies as written; empty for a post without one.
    """

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
    indices: Tensor
    post_text: list[str]
    reply_text: list[str]


def emotion_targets(primary: Tensor, secondary: Tensor, num_emotions: int) -> Tensor:
    """Multi-hot targets of a primary and a secondary emotion, of which 0 is none (equation of section 2.1).

    With a = onehot(primary) + onehot(secondary) - onehot(0) the target is a, clipped to [0, 1]: (2, 0) gives {2},
    (0, 0) gives {0}, (1, 5) gives {1, 5}, (0, 3) gives {3}, (1, 1) gives {1}.

    Args:
        primary: int64 `(rows,)`.
        secondary: int64 `(rows,)`, 0 for data with one label.
        num_emotions: Number of classes.

    Returns:
        float32 `(rows, num_emotions)`.

    Raises:
        ValueError: If an id is negative or too large.

    Example:
        >>> emotion_targets(torch.tensor([2, 0, 1]), torch.tensor([0, 0, 2]), 3).tolist()
        [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]
    """
    for ids in (primary, secondary):
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= num_emotions):
            raise ValueError(
                f"emotion ids go from {int(ids.min())} to {int(ids.max())}, but num_emotions={num_emotions}: expected "
                f"0..{num_emotions - 1}"
            )
    targets = torch.zeros(len(primary), num_emotions)
    rows = torch.arange(len(primary))
    # Adding one to class 0 and taking it away again is the same as adding only ids that are not 0, but where both are.
    targets[rows, primary] = 1.0
    targets[rows, secondary] = 1.0
    targets[:, 0] = ((primary == 0) & (secondary == 0)).to(torch.float32)
    return targets


class TurnTokens(NamedTuple):
    """Words of turns, one after the other, each followed by `[SEP]`: neighbours are a post already.

    Attributes:
        ids: int32 `(tokens,)`.
        offsets: int64 `(turns + 1,)`; turn t has `ids[offsets[t] : offsets[t + 1]]`, of which the last is `[SEP]`.
            A turn without a word has nothing, not even `[SEP]`.
    """

    ids: Tensor
    offsets: Tensor


def turn_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> TurnTokens:
    """Encode turns, all at once."""
    ids, lengths = [], []
    for low in range(0, len(texts), _CHUNK):
        encodings = tokenizer.encode_batch_fast(list(texts[low : low + _CHUNK]), add_special_tokens=False)
        rows = [[*row, SEP_ID] if row else row for row in (encoding.ids for encoding in encodings)]
        sizes = [len(row) for row in rows]
        ids.append(np.fromiter(chain.from_iterable(rows), np.int32, sum(sizes)))
        lengths += sizes
    flat = np.concatenate(ids) if ids else np.zeros(0, np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return TurnTokens(torch.from_numpy(flat), torch.from_numpy(offsets))


class Labels(NamedTuple):
    """Emotions of rows.

    Attributes:
        classes: int64 `(rows,)`, the primary emotion: the secondary one where the primary is 0, -1 where unknown.
        targets: float32 `(rows, num_emotions)`, all 0 where unknown.
    """

    classes: Tensor
    targets: Tensor


def labels_of(primary: NDArray[np.int64], secondary: NDArray[np.int64], num_emotions: int) -> Labels:
    """Classes and targets of emotion ids.

    Args:
        primary: int64 `(rows,)`, -1 where unknown.
        secondary: int64 `(rows,)`, 0 for none.
        num_emotions: Number of classes.
    """
    first, second = torch.from_numpy(primary), torch.from_numpy(secondary)
    known = first >= 0
    targets = torch.zeros(len(first), num_emotions)
    targets[known] = emotion_targets(first[known], second[known], num_emotions)
    return Labels(torch.where((first == 0) & (second > 0), second, first), targets)


class DialogueRows(Dataset[DialogueBatch]):
    """Rows of one part.

    Args:
        name: What messages call it.
        texts: All turns.
        posts: Words of these turns by the tokenizer of posts.
        replies: Words of these turns by the tokenizer of replies.
        first: int64 `(rows,)`, first turn of the post.
        reply: int64 `(rows,)`, the turn that is the reply; the post ends before it.
        post_labels: Emotions of the posts.
        reply_labels: Emotions of the replies.
        max_post_length: Longest post; the last words are kept.
        max_reply_length: Longest reply with its EOS; the first words are kept.
    """

    def __init__(
        self,
        name: str,
        texts: list[str],
        posts: TurnTokens,
        replies: TurnTokens,
        first: NDArray[np.int64],
        reply: NDArray[np.int64],
        post_labels: Labels,
        reply_labels: Labels,
        max_post_length: int,
        max_reply_length: int,
    ) -> None:
        begin, turn = torch.from_numpy(first), torch.from_numpy(reply)
        self.post_words, self.reply_words = posts.ids, replies.ids
        self.post_labels, self.reply_labels = post_labels, reply_labels
        # The last [SEP] of a slice stands after its post.
        self._post_ends = posts.offsets[turn] - 1
        sizes = self._post_ends - posts.offsets[begin]
        self.post_lengths = sizes.clamp(max=max_post_length)
        self._reply_starts = replies.offsets[turn]
        self._reply_sizes = (replies.offsets[turn + 1] - self._reply_starts - 1).clamp(min=0)
        ended = self._reply_sizes + (self._reply_sizes > 0)
        self.reply_lengths = ended.clamp(max=max_reply_length)
        self.post_text = [
            texts[low] if high - low == 1 else " [SEP] ".join(text for text in texts[low:high] if text.strip())
            for low, high in zip(first.tolist(), reply.tolist(), strict=True)
        ]
        self.reply_text = [texts[place] for place in reply.tolist()]
        cut = int((sizes > max_post_length).sum()), int((ended > max_reply_length).sum())
        log.info(
            "%s: %d of %d posts (%.1f %%) are cut to their last %d words, %d replies (%.1f %%) to their first %d",
            name, cut[0], len(first), 100 * cut[0] / max(len(first), 1), max_post_length, cut[1],
            100 * cut[1] / max(len(first), 1), max_reply_length,
        )  # fmt: skip

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.post_text)

    def __getitem__(self, draw: Draw) -> DialogueBatch:
        """The batch of the rows `draw.indices`."""
        rows = draw.indices
        post_lengths, reply_lengths = self.post_lengths[rows], self.reply_lengths[rows]
        post_columns, reply_columns = _columns(post_lengths), _columns(reply_lengths)
        post_mask = post_columns < post_lengths[:, None]
        reply_mask = reply_columns < reply_lengths[:, None]
        starts = self._post_ends[rows] - post_lengths
        post_ids = self.post_words[(starts[:, None] + post_columns).where(post_mask, 0)].long() * post_mask
        places = (self._reply_starts[rows, None] + reply_columns).where(reply_mask, 0)
        reply_out = self.reply_words[places].long() * reply_mask
        reply_out.masked_fill_(reply_mask & (reply_columns == self._reply_sizes[rows, None]), EOS_ID)
        reply_in = torch.full_like(reply_out, GO_ID)
        reply_in[:, 1:] = reply_out[:, :-1] * reply_mask[:, 1:]
        chosen = rows.tolist()
        return DialogueBatch(
            post_ids,
            post_mask,
            reply_in,
            reply_out,
            reply_mask,
            self.post_labels.targets[rows],
            self.reply_labels.targets[rows],
            self.post_labels.classes[rows] >= 0,
            self.reply_labels.classes[rows] >= 0,
            keyed_ids(draw.key, rows),
            rows,
            [self.post_text[row] for row in chosen],
            [self.reply_text[row] for row in chosen],
        )

    @property
    def lengths(self) -> Tensor:
        """Words of post and reply together, int64 `(rows,)`."""
        return self.post_lengths + self.reply_lengths

    def by_length(self) -> Tensor:
        """Rows from the shortest to the longest, int64 `(rows,)`: equal lengths need no padding."""
        return self.lengths.argsort(stable=True)


def _columns(lengths: Tensor) -> Tensor:
    # One column stands where everything is empty: models need no case for width 0.
    return torch.arange(max(int(lengths.max()) if len(lengths) else 0, 1))
