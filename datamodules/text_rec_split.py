"""Which users and items of a corpus count, what is for training and what is asked, and which titles are attacked."""

from __future__ import annotations

import html
import logging
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from datamodules.sources.interactions import offsets_of
from datamodules.text_rec_rows import (
    Asked,
    Questions,
    Sequences,
    TextCorpus,
    TextRecRows,
    UnseenItems,
    candidates,
    sequences_of,
    training_rows,
)

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from datamodules.sources.text_rec_files import TextColumns

log = logging.getLogger(__name__)

PARTS = {"train": 0, "val": 1, "test": 2}
"""Numbers of the parts in a published split."""


def liked_only(corpus: TextCorpus) -> TextCorpus:
    """The sequences of what users liked, to be split by leave-one-out; a corpus without ratings stays as it is."""
    if corpus.liked is None:
        return corpus
    log.info("%s: %d of %d interactions are liked", corpus.name, int(corpus.liked.sum()), len(corpus.liked))
    return _take(corpus, corpus.liked)._replace(liked=None, split=None)


def _take(corpus: TextCorpus, kept: NDArray[np.bool_]) -> TextCorpus:
    """Some interactions; users and items stay."""
    rows = np.repeat(np.arange(corpus.num_users), corpus.lengths)
    return corpus._replace(
        item_ids=corpus.item_ids[kept],
        offsets=offsets_of(np.bincount(rows[kept], minlength=corpus.num_users)),
        liked=None if corpus.liked is None else corpus.liked[kept],
        split=None if corpus.split is None else corpus.split[kept],
    )


def _take_users(corpus: TextCorpus, users: NDArray[np.int64]) -> TextCorpus:
    kept = np.zeros(corpus.num_users, dtype=bool)
    kept[users] = True
    taken = _take(corpus, np.repeat(kept, corpus.lengths))
    questions = corpus.questions
    if questions is not None:
        questions = Questions(questions.item_ids[users], questions.labels[users], questions.parts[users])
    return taken._replace(
        user_labels=[corpus.user_labels[user] for user in users],
        offsets=offsets_of(corpus.lengths[users]),
        questions=questions,
    )


def most_popular(corpus: TextCorpus, count: int) -> TextCorpus:
    """The items with the most interactions, ties by the lowest id, in the order of their ids."""
    counts = np.bincount(corpus.item_ids, minlength=corpus.num_items)
    kept = np.sort(np.argsort(-counts, kind="stable")[:count])
    new_ids = np.full(corpus.num_items, -1, dtype=np.int64)
    new_ids[kept] = np.arange(len(kept))
    taken = _take(corpus, new_ids[corpus.item_ids] >= 0)
    log.info(
        "%s: keep_items keeps %d of %d items and %d of %d interactions", corpus.name, len(kept), corpus.num_items,
        len(taken.item_ids), len(corpus.item_ids),
    )  # fmt: skip
    return taken._replace(
        titles=[corpus.titles[item] for item in kept],
        item_labels=[corpus.item_labels[item] for item in kept],
        item_ids=new_ids[taken.item_ids],
    )


def enough_interactions(corpus: TextCorpus, least: int) -> TextCorpus:
    """Users with that many interactions.

    Raises:
        ValueError: If no user is left.
    """
    users = np.flatnonzero(corpus.lengths >= least)
    if len(users) < corpus.num_users:
        log.info("%s: %d of %d users have fewer than %d interactions and are dropped", corpus.name,
                 corpus.num_users - len(users), corpus.num_users, least)  # fmt: skip
    if not len(users):
        raise ValueError(f"{corpus.name}: no user has {least} interactions, the most are {int(corpus.lengths.max())}")
    return _take_users(corpus, users)


def some_users(corpus: TextCorpus, count: int, seed: int) -> TextCorpus:
    """The first so many users after a shuffle, in their old order; of questions, so many of the training part."""
    pool = np.arange(corpus.num_users)
    rest = pool[:0]
    if corpus.questions is not None:
        pool, rest = np.flatnonzero(corpus.questions.parts == 0), np.flatnonzero(corpus.questions.parts)
    chosen = np.random.default_rng(seed).permutation(pool)[:count]
    what = "users" if corpus.questions is None else "training questions"
    log.info("%s: keep_users keeps %d of %d %s", corpus.name, len(chosen), len(pool), what)
    return _take_users(corpus, np.sort(np.concatenate([chosen, rest])))


def chosen(
    corpus: TextCorpus, keep_items: int | None, min_interactions: int | None, keep_users: int | None, seed: int
) -> TextCorpus:
    """The filters in their order; see `TextRecData`. A user without any interaction is dropped in any case."""
    if keep_items is not None:
        corpus = most_popular(corpus, keep_items)
    if corpus.questions is None:
        corpus = enough_interactions(corpus, min_interactions or 1)
    if keep_users is not None:
        corpus = some_users(corpus, keep_users, seed)
    if corpus.questions is None and corpus.split is None and (short := int((corpus.lengths < 3).sum())):
        log.info("%s: %d users with fewer than 3 items are for training only", corpus.name, short)
    return corpus


def unescaped(corpus: TextCorpus) -> TextCorpus:
    """The corpus with `&amp;` and the like in titles as what they stand for."""
    titles = [html.unescape(title) for title in corpus.titles]
    changed = sum(new != old for new, old in zip(titles, corpus.titles, strict=True))
    if changed:
        log.info("%s: %d of %d titles had HTML entities", corpus.name, changed, len(titles))
    return corpus._replace(titles=titles)


def training_part(corpus: TextCorpus) -> Sequences:
    """What training may see of every user: all but the last two of three or more, or the training part of the split.

    For questions, the histories of those for training.
    """
    if corpus.questions is not None:
        kept = np.repeat(corpus.questions.parts == 0, corpus.lengths)
    elif corpus.split is not None:
        kept = corpus.split == 0
    else:
        within = np.arange(len(corpus.item_ids)) - np.repeat(corpus.offsets[:-1], corpus.lengths)
        kept = within < np.repeat(np.where(corpus.lengths >= 3, corpus.lengths - 2, corpus.lengths), corpus.lengths)
    taken = _take(corpus, kept)
    return sequences_of(taken.item_ids, taken.liked, taken.offsets)


def asked_in_training(corpus: TextCorpus, part: Sequences) -> Asked:
    """The rows of training: every item but a user's first, or the questions for training."""
    if corpus.questions is None:
        return training_rows(part)
    return _questions(corpus, part, "train")


def _questions(corpus: TextCorpus, histories: Sequences, part: str) -> Asked:
    assert corpus.questions is not None
    users = np.flatnonzero(corpus.questions.parts == PARTS[part])
    rows = torch.from_numpy(users)
    return Asked(
        histories.offsets[rows],
        histories.offsets[rows + 1],
        rows,
        torch.from_numpy(corpus.questions.item_ids[users]),
        torch.from_numpy(corpus.questions.labels[users]).to(torch.float32),
    )


def evaluation(corpus: TextCorpus, part: str) -> tuple[Sequences, Asked]:
    """What is asked in validation or test, and where the histories lie.

    - questions: those of the part, each after its own history;
    - a published split: every interaction of the part, after all training items of its user;
    - otherwise the last item ("test") or the last but one ("val") of users with three or more, after all before it.

    Args:
        corpus: The data.
        part: "val" or "test".
    """
    whole = sequences_of(corpus.item_ids, corpus.liked, corpus.offsets)
    if corpus.questions is not None:
        return whole, _questions(corpus, whole, part)
    if corpus.split is not None:
        train = training_part(corpus)
        places = torch.from_numpy(np.flatnonzero(corpus.split == PARTS[part]))
        users = whole.rows()[places]
        starts, ends = train.offsets[users], train.offsets[users + 1]
        return train, Asked(starts, ends, users, whole.item_ids[places], whole.liked[places].to(torch.float32))
    users = torch.from_numpy(np.flatnonzero(corpus.lengths >= 3))
    places = whole.offsets[users + 1] - (1 if part == "test" else 2)
    return whole, Asked(
        whole.offsets[users], places, users, whole.item_ids[places], whole.liked[places].to(torch.float32)
    )


def train_rows(
    corpus: TextCorpus, training: Sequences, user_labels: list[str], max_history: int, drawn: bool
) -> TextRecRows:
    """The samples of training.

    Args:
        corpus: The data.
        training: The training sequences, fake users behind the real ones.
        user_labels: External ids of all of these users.
        max_history: Longest history.
        drawn: Whether half of the samples ask about an item that the user has not met in training.

    Raises:
        ValueError: If there is no sample, or a user has met everything.
    """
    asked = asked_in_training(corpus, training)
    if not len(asked.ends):
        raise ValueError(f"{corpus.name} has no training sample: a user needs two items in training")
    if not drawn:
        return TextRecRows(training, asked, max_history)
    unseen = UnseenItems(training.rows(), training.item_ids, len(user_labels), corpus.num_items)
    if int(unseen.counts.min()) < 1:
        user = user_labels[int(unseen.counts.argmin())]
        raise ValueError(f"user {user} has met all {corpus.num_items} items in training: none is left to say no to")
    return TextRecRows(training, asked, max_history, unseen=unseen)


def eval_rows(
    corpus: TextCorpus, part: str, max_history: int, num_candidates: int, other: tuple[Sequences, Asked] | None = None
) -> TextRecRows:
    """The questions of validation or test.

    Args:
        corpus: The data.
        part: "val" or "test".
        max_history: Longest history.
        num_candidates: Items to rank each against, none of which the user has anywhere; 0 for none.
        other: Other users than those of the corpus, from `read_test`.

    Raises:
        ValueError: If there is no question, or a user has not that many other items.
    """
    sequences, asked = evaluation(corpus, part) if other is None else other
    if not len(asked.ends):
        raise ValueError(f"{corpus.name} has nothing for {part}: a user needs three items")
    if not num_candidates:
        return TextRecRows(sequences, asked, max_history)
    # Sequences are split by leave-one-out here, so that these hold all that a user met.
    owners = asked.user_ids if other is None else torch.arange(len(asked.ends))
    unseen = UnseenItems(sequences.rows(), sequences.item_ids, len(sequences.offsets) - 1, corpus.num_items)
    drawn = candidates(unseen, owners, num_candidates, corpus.name, PARTS[part])
    return TextRecRows(sequences, asked, max_history, drawn)


def training_pairs(corpus: TextCorpus, part: Sequences) -> tuple[Tensor, Tensor]:
    """All that users met in training: int64 `(pairs, 2)` of user and item, and bool `(pairs,)` whether it is liked.

    The items that training questions ask about are among it.
    """
    pairs, liked = torch.stack([part.rows(), part.item_ids], 1), part.liked
    if corpus.questions is None:
        return pairs, liked
    asked = _questions(corpus, part, "train")
    return (
        torch.cat([pairs, torch.stack([asked.user_ids, asked.item_ids], 1)]),
        torch.cat([liked, asked.labels > 0]),
    )


def choose_targets(
    targets: str | list[int], share: float, number: int | None, seed: int, item_counts: Tensor
) -> Tensor:
    """The items whose titles are attacked.

    Args:
        targets: "random", "cold" (of the fifth with the fewest interactions), "popular" (of the fifth with the most),
            or item ids.
        share: Targets per item: `floor(share * num_items)`, at least one.
        number: How many; overrides the share.
        seed: Of the draw, which is uniform and without replacement.
        item_counts: int64 `(num_items,)`, training interactions.

    Returns:
        int64 `(targets,)`, in the order of the draw: fewer targets are the first of more.

    Raises:
        ValueError: If an id is not in the catalogue or there twice, or fewer items are there than targets.
    """
    items = len(item_counts)
    if not isinstance(targets, str):
        for item in targets:
            if not 0 <= item < items:
                raise ValueError(f"targets: item {item} is not in the catalogue, expected ids 0..{items - 1}")
        if len(set(targets)) < len(targets):
            raise ValueError(f"targets: {next(item for item in targets if targets.count(item) > 1)} is there twice")
        return torch.tensor(targets, dtype=torch.int64)
    pool = torch.arange(items)
    if targets != "random":
        pool = item_counts.argsort(descending=targets == "popular", stable=True)[: max(1, items // 5)]
    count = max(1, int(share * items + 1e-9)) if number is None else number
    if count > len(pool):
        raise ValueError(f"{count} targets were asked for, but targets={targets!r} has only {len(pool)} items")
    return pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:count]]


def read_test(
    corpus: TextCorpus, path: Path, columns: TextColumns, like_threshold: float, mode: str
) -> tuple[Sequences, Asked]:
    """Other users to test on: the last item of each, or the questions of a file of them, over the items known here.

    Items that are unknown are left out of the histories; where the item asked about is unknown, or no history is left
    of a sequence, the user or question is left out. All of it is counted in the log.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is malformed or nothing is left to test on.
    """
    ids = {label: item for item, label in enumerate(corpus.item_labels)}
    if corpus.questions is not None:
        return _read_test_questions(ids, path)
    from datamodules.sources.text_rec_files import read_table

    if mode == "yesno" and corpus.liked is None:
        columns = columns._replace(rating=None)
    if mode == "yesno" and corpus.liked is not None and columns.rating is None:
        raise ValueError(f"{path}: {corpus.name} has ratings, so test_path needs them: set rating_column")
    table = read_table(path, columns, titled=False)
    if mode == "sequence" and table.ratings is not None:
        table = table.liked_only(like_threshold)
    items = np.array([ids.get(label, -1) for label in table.items.tolist()], dtype=np.int64)
    liked = None if table.ratings is None else table.ratings > like_threshold
    known = items >= 0
    lengths = np.diff(table.offsets)
    last_known = known[table.offsets[1:] - 1]
    known_before = np.add.reduceat(known.astype(np.int64), table.offsets[:-1]) - last_known
    kept = last_known & (known_before > 0)
    rows = {label: user for user, label in enumerate(corpus.user_labels)}
    users = np.array([rows.get(label, -1) for label in table.users], dtype=np.int64)
    log.info(
        "%s: %d of %d users can be tested on; unknown to %s are %d interactions and %d users; left out are %d users "
        "whose last item is unknown and %d without a known item before it",
        path, int(kept.sum()), len(kept), corpus.name, int((~known).sum()), int((users < 0).sum()),
        int((~last_known).sum()), int((last_known & ~kept).sum()),
    )  # fmt: skip
    if not kept.any():
        raise ValueError(f"{path}: none of {len(kept)} users can be tested on: a user needs a last item and one before "
                         f"it that {corpus.name} knows ({int((~known).sum())} of {len(known)} interactions are with "
                         "unknown items)")  # fmt: skip
    taken = known & np.repeat(kept, lengths)
    offsets = offsets_of((known_before + 1)[kept])
    sequences = sequences_of(items[taken], None if liked is None else liked[taken], offsets)
    last = sequences.offsets[1:] - 1
    return sequences, Asked(
        sequences.offsets[:-1],
        last,
        torch.from_numpy(users[kept]),
        sequences.item_ids[last],
        sequences.liked[last].to(torch.float32),
    )


def _read_test_questions(ids: dict[str, int], path: Path) -> tuple[Sequences, Asked]:
    from datamodules.sources.text_rec_sets import histories, read_questions

    questions = read_questions(path)
    known = [question for question in questions if question.target in ids]
    if not known:
        raise ValueError(f"{path}: none of {len(questions)} questions is about a known title")
    items, liked, offsets, unknown = histories(known, ids)
    log.info("%s: %d of %d questions can be tested on, the others ask about unknown titles; %d unknown titles are left "
             "out of histories", path, len(known), len(questions), unknown)  # fmt: skip
    sequences = sequences_of(items, liked, offsets)
    return sequences, Asked(
        sequences.offsets[:-1],
        sequences.offsets[1:],
        torch.full((len(known),), -1),
        torch.tensor([ids[question.target] for question in known]),
        torch.tensor([float(question.label) for question in known]),
    )
