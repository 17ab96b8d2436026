"""Histories of titled items and the item asked about, as flat tensors, and the gathering of whole batches from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.loading import Draw, keyed_ids, keyed_uniform, mix

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

EVALUATION_KEY = mix(0, 0)
"""What the random numbers of evaluation depend on: the same in every run."""
_CANDIDATE_KEY = 0x7E57


class TextRecBatch(NamedTuple):
    """Histories of some users, and an item to ask about for each.

    Attributes:
        user_ids: int64 `(batch,)`, rows of the user table, 0..num_users - 1; -1 for a user of `test_path` who is not in
            it.
        history: int64 `(batch, length)`, item ids, newest first, padded with -1 at the end.
        liked: bool `(batch, length)`, whether the user liked that item: True in data without ratings, False on padding.
        item_ids: int64 `(batch,)`, the item asked about: the next item in "sequence", the candidate in "yesno".
        labels: float32 `(batch,)`, 1 for liked or bought next, 0 for not.
        candidate_ids: int64 `(batch, candidates)`, other items to rank `item_ids` against, in the evaluation of "yesno"
            made from sequences; `(batch, 0)` elsewhere.
        keys: int64 `(batch,)` in `[0, 2**63)`, what further random choices of these samples may depend on.
    """

    user_ids: Tensor
    history: Tensor
    liked: Tensor
    item_ids: Tensor
    labels: Tensor
    candidate_ids: Tensor
    keys: Tensor


class TargetBatch(NamedTuple):
    """One item whose title is attacked.

    Attributes:
        item_ids: int64 `(1,)`.
        texts: Its title, a list of one.
    """

    item_ids: Tensor
    texts: list[str]


class Questions(NamedTuple):
    """Questions of a set that comes with them: one for each history.

    Attributes:
        item_ids: int64 `(questions,)`, the item asked about.
        labels: bool `(questions,)`, whether it is liked.
        parts: int8 `(questions,)`, 0 training, 1 validation, 2 test.
    """

    item_ids: NDArray[np.int64]
    labels: NDArray[np.bool_]
    parts: NDArray[np.int8]


class TextCorpus(NamedTuple):
    """A catalogue of titles and what users did with its items.

    Attributes:
        name: What the data is called in messages.
        titles: Title of item k at k.
        item_labels: External id of item k at k.
        user_labels: External id of each user.
        item_ids: int64 `(interactions,)`, 0..num_items - 1, user after user and oldest first.
        offsets: int64 `(num_users + 1,)`; user u has `item_ids[offsets[u] : offsets[u + 1]]`.
        liked: bool `(interactions,)`; None for data without ratings.
        split: int8 `(interactions,)`, 0 training, 1 validation, 2 test; None for data that is split by leave-one-out.
        questions: One for each user; None for data that is sequences.
    """

    name: str
    titles: list[str]
    item_labels: list[str]
    user_labels: list[str]
    item_ids: NDArray[np.int64]
    offsets: NDArray[np.int64]
    liked: NDArray[np.bool_] | None = None
    split: NDArray[np.int8] | None = None
    questions: Questions | None = None

    @property
    def num_items(self) -> int:
        """Size of the catalogue."""
        return len(self.item_labels)

    @property
    def num_users(self) -> int:
        """Number of users."""
        return len(self.user_labels)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Interactions of each user."""
        lengths: NDArray[np.int64] = self.offsets[1:] - self.offsets[:-1]
        return lengths


class Sequences(NamedTuple):
    """Items of users, one user after the other and oldest first.

    Attributes:
        item_ids: int64 `(interactions,)`.
        liked: bool `(interactions,)`.
        offsets: int64 `(users + 1,)`.
    """

    item_ids: Tensor
    liked: Tensor
    offsets: Tensor

    def rows(self) -> Tensor:
        """Row of the user of each interaction, int64 `(interactions,)`."""
        return torch.repeat_interleave(self.offsets.diff())


class Asked(NamedTuple):
    """Items asked about, and where the history before each lies in some `Sequences`.

    Attributes:
        starts: int64 `(rows,)`, place of the oldest item of the history.
        ends: int64 `(rows,)`, place after its newest.
        user_ids: int64 `(rows,)`.
        item_ids: int64 `(rows,)`.
        labels: float32 `(rows,)`.
    """

    starts: Tensor
    ends: Tensor
    user_ids: Tensor
    item_ids: Tensor
    labels: Tensor


class UnseenItems:
    """The items that users have not met, found by their rank without a list of them.

    With a user's own items sorted as s_0 < s_1 < ..., the unseen item of rank r is r plus the number of j with
    s_j - j <= r.

    Args:
        rows: int64 `(pairs,)`, users 0..num_users - 1.
        item_ids: int64 `(pairs,)`, an item of each; repeated pairs count once.
        num_users: Number of users.
        num_items: Size of the catalogue.

    Attributes:
        counts: int64 `(num_users,)`, unseen items of each user.
    """

    def __init__(self, rows: Tensor, item_ids: Tensor, num_users: int, num_items: int) -> None:
        pairs = torch.unique(rows * num_items + item_ids)
        users = pairs // num_items
        met = torch.bincount(users, minlength=num_users)
        self.counts = num_items - met
        self._before = met.cumsum(0) - met
        self._stride = num_items + 1
        within = torch.arange(len(pairs)) - self._before[users]
        self._places = users * self._stride + pairs % num_items - within

    def at(self, rows: Tensor, ranks: Tensor) -> Tensor:
        """The unseen items of some ranks.

        Args:
            rows: int64 `(rows,)`.
            ranks: int64 `(rows,)` or `(rows, columns)`, below `counts[rows]`.

        Returns:
            int64, of the shape of `ranks`.
        """
        if ranks.dim() == 2:
            rows = rows[:, None]
        below = torch.searchsorted(self._places, (rows * self._stride + ranks).contiguous(), right=True)
        return ranks + below - self._before[rows]

    def sample(self, rows: Tensor, count: int, key: int) -> Tensor:
        """Different unseen items for each row, uniformly drawn: a function of the key and the row's number alone.

        Floyd's algorithm, one column for all rows at a time.

        Args:
            rows: int64 `(rows,)`.
            count: How many, at most `counts[rows]`.
            key: Key of the random numbers.

        Returns:
            int64 `(rows, count)`.
        """
        ranks = torch.full((len(rows), count), -1)
        for column in range(count):
            highest = self.counts[rows] - count + column
            rank = (keyed_uniform(mix(key, column), torch.arange(len(rows))) * (highest + 1)).long()
            taken = (ranks[:, :column] == rank[:, None]).any(1)
            ranks[:, column] = torch.where(taken, highest, rank)
        return self.at(rows, ranks)


class TextRecRows(Dataset[TextRecBatch]):
    """Questions about items, each after a history.

    Args:
        sequences: Where the histories lie.
        asked: One row a question.
        max_history: Longest history; the newest items are kept.
        candidate_ids: int64 `(rows, candidates)`, what to rank each item against; nothing by default.
        unseen: With it a row is asked about its own item with probability 0.5, and otherwise, with label 0, about one
            that its user has not met: drawn anew for each key (P5). Rows of `unseen` are `asked.user_ids`.
    """

    def __init__(
        self,
        sequences: Sequences,
        asked: Asked,
        max_history: int,
        candidate_ids: Tensor | None = None,
        unseen: UnseenItems | None = None,
    ) -> None:
        self.sequences, self.asked, self.max_history, self.unseen = sequences, asked, max_history, unseen
        self.lengths = (asked.ends - asked.starts).clamp(max=max_history)
        self.candidate_ids = torch.zeros(len(asked.ends), 0, dtype=torch.int64)
        if candidate_ids is not None:
            self.candidate_ids = candidate_ids

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.asked.ends)

    def __getitem__(self, draw: Draw) -> TextRecBatch:
        """The batch of the rows `draw.indices`."""
        batch = self.positives(draw.indices)._replace(keys=keyed_ids(draw.key, draw.indices))
        if self.unseen is None:
            return batch
        users = batch.user_ids
        negative = keyed_uniform(mix(draw.key, 1), draw.indices) >= 0.5
        ranks = (keyed_uniform(mix(draw.key, 2), draw.indices) * self.unseen.counts[users]).long()
        return batch._replace(
            item_ids=torch.where(negative, self.unseen.at(users, ranks), batch.item_ids),
            labels=batch.labels.masked_fill(negative, 0.0),
        )

    def positives(self, rows: Tensor) -> TextRecBatch:
        """The batch of some rows as they are, without negatives, and with keys of 0.

        Args:
            rows: int64 `(batch,)`.
        """
        _, ends, user_ids, item_ids, labels = (values[rows] for values in self.asked)
        lengths = self.lengths[rows]
        # A column of padding stands where nobody has a history: models need no case for width 0.
        columns = torch.arange(max(int(lengths.max()) if len(rows) else 0, 1))
        filled = columns < lengths[:, None]
        places = (ends[:, None] - 1 - columns).where(filled, 0)
        history, liked = torch.full(places.shape, -1), torch.zeros(places.shape, dtype=torch.bool)
        if len(self.sequences.item_ids):
            history = self.sequences.item_ids[places].where(filled, -1)
            liked = self.sequences.liked[places] & filled
        return TextRecBatch(
            user_ids, history, liked, item_ids, labels, self.candidate_ids[rows], torch.zeros_like(user_ids)
        )

    def drawn(self, count: int, seed: int) -> TextRecRows:
        """At most `count` of these rows, in their order, drawn by a seed."""
        if count >= len(self):
            return self
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count].sort().values
        asked = Asked(*(values[chosen] for values in self.asked))
        return TextRecRows(self.sequences, asked, self.max_history, self.candidate_ids[chosen], self.unseen)

    def by_length(self) -> Tensor:
        """Rows from the shortest history to the longest, int64 `(rows,)`: equal lengths need no padding."""
        return self.lengths.argsort(stable=True)


class TargetRows(Dataset[TargetBatch]):
    """The items whose titles are attacked.

    Args:
        target_ids: int64 `(targets,)`.
        titles: Titles of the catalogue.
    """

    def __init__(self, target_ids: Tensor, titles: list[str]) -> None:
        self.target_ids, self.titles = target_ids, titles

    def __len__(self) -> int:
        """Number of targets."""
        return len(self.target_ids)

    def __getitem__(self, draw: Draw) -> TargetBatch:
        """The targets `draw.indices`."""
        item_ids = self.target_ids[draw.indices]
        return TargetBatch(item_ids, [self.titles[item] for item in item_ids.tolist()])


def training_rows(sequences: Sequences) -> Asked:
    """Every item but a user's first, each after what came before it; labels are whether it is liked."""
    users = sequences.rows()
    starts = sequences.offsets[users]
    places = torch.arange(len(users))
    kept = places > starts
    return Asked(
        starts[kept], places[kept], users[kept], sequences.item_ids[kept], sequences.liked[kept].to(torch.float32)
    )


def candidates(unseen: UnseenItems, rows: Tensor, count: int, name: str, part: int) -> Tensor:
    """Items to rank each row's item against, the same in every run.

    Args:
        unseen: What each user has not met.
        rows: int64 `(rows,)`, users.
        count: Items of each row.
        name: What the data is called in messages.
        part: Number of the part: other parts get other items.

    Returns:
        int64 `(rows, count)`.

    Raises:
        ValueError: If a user has not that many unseen items.
    """
    fewest = int(unseen.counts[rows].min()) if len(rows) else count
    if fewest < count:
        raise ValueError(
            f"num_candidates={count}, but a user of {name} has only {fewest} items outside of the history: "
            "expected no more than that; keep more items or lower num_candidates"
        )
    return unseen.sample(rows, count, mix(_CANDIDATE_KEY, part))


def sequences_of(item_ids: NDArray[Any], liked: NDArray[Any] | None, offsets: NDArray[Any]) -> Sequences:
    """Tensors of numpy sequences; without ratings every item counts as liked."""
    items = torch.from_numpy(item_ids).to(torch.int64)
    flags = torch.ones(len(items), dtype=torch.bool) if liked is None else torch.from_numpy(liked)
    return Sequences(items, flags, torch.from_numpy(offsets))
