"""Posts and replies of dialogues, and which of them are for training, validation and test."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from datamodules.sources.dialogue_turns import Dialogues, emotion_ids

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from datamodules.sources.dialogue_sets import Parts

log = logging.getLogger(__name__)


class Pairs(NamedTuple):
    """Posts and replies of some dialogues.

    Attributes:
        dialogues: Where the turns lie.
        primary: int64 `(turns,)`, -1 where unknown.
        secondary: int64 `(turns,)`, 0 for none.
        groups: int64 `(pairs,)`: pairs of one group never lie in different parts.
        first: int64 `(pairs,)`, first turn of the post.
        reply: int64 `(pairs,)`, the turn that is the reply; the post ends before it.
    """

    dialogues: Dialogues
    primary: NDArray[np.int64]
    secondary: NDArray[np.int64]
    groups: NDArray[np.int64]
    first: NDArray[np.int64]
    reply: NDArray[np.int64]

    @property
    def classes(self) -> NDArray[np.int64]:
        """Emotion of each reply: the primary one, or the secondary where that is 0; -1 where unknown."""
        primary, secondary = self.primary[self.reply], self.secondary[self.reply]
        return np.where((primary == 0) & (secondary > 0), secondary, primary)

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> Pairs:
        """Some of the pairs."""
        return self._replace(groups=self.groups[rows], first=self.first[rows], reply=self.reply[rows])


def pairs_of(
    dialogues: Dialogues, label_names: Sequence[str], context_turns: int, fixed: bool = True, replies: bool = True
) -> Pairs:
    """All posts and replies; those without a word on one side are dropped and counted.

    A dialogue of two turns belongs to the group of its post: a post with several replies is in one part only. Others
    are groups of their own.

    Args:
        dialogues: The turns.
        label_names: Names of the emotions by id.
        context_turns: Turns before the reply that make the post.
        fixed: See `emotion_ids`.
        replies: Whether replies must have words.

    Raises:
        ValueError: If an emotion is unknown, or no pair is left.
    """
    primary, secondary = emotion_ids(dialogues, label_names, fixed)
    offsets = dialogues.offsets
    sizes = np.diff(offsets)
    owners = np.repeat(np.arange(len(sizes)), sizes)
    turns = np.arange(len(owners))
    is_reply = turns == offsets[owners + 1] - 1 if dialogues.last_only else turns > offsets[owners]
    reply = turns[is_reply & (turns > offsets[owners])]
    first = np.maximum(reply - context_turns, offsets[owners[reply]])
    filled = np.array([bool(text.strip()) for text in dialogues.texts], dtype=bool)
    words_before = np.concatenate([[0], np.cumsum(filled)])
    has_post = words_before[reply] > words_before[first]
    has_reply = filled[reply] if replies else np.ones(len(reply), dtype=bool)
    kept = has_post & has_reply
    if not kept.all():
        log.info("%s: %d of %d pairs are dropped, %d without a word in the post, %d without one in the reply",
                 dialogues.name, int((~kept).sum()), len(kept), int((~has_post).sum()),
                 int((~has_reply).sum()))  # fmt: skip
    if not kept.any():
        raise ValueError(
            f"{dialogues.name}: none of {len(kept)} pairs of post and reply in {len(dialogues)} dialogues has a word "
            "on both sides"
        )
    reply, first = reply[kept], first[kept]
    return Pairs(dialogues, primary, secondary, _groups(dialogues, sizes)[owners[reply]], first, reply)


def _groups(dialogues: Dialogues, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    if not len(sizes) or not (sizes == 2).all():
        return np.arange(len(sizes))
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(post, len(numbers)) for post in dialogues.texts[::2]], dtype=np.int64)


def held_out(pairs: Pairs, share: float, seed: int, part: str) -> tuple[Pairs, Pairs]:
    """Cut a part off: that share of the groups, at least one, by a shuffle.

    Raises:
        ValueError: If there are too few groups.
    """
    groups = np.unique(pairs.groups)
    count = max(1, int(share * len(groups)))
    if count >= len(groups):
        raise ValueError(
            f"{pairs.dialogues.name}: {len(groups)} dialogues are too few to hold {count} out for {part}: give a file "
            f"in {part}_path"
        )
    chosen = np.random.default_rng((seed, 1 if part == "val" else 2)).permutation(groups)[:count]
    away = np.isin(pairs.groups, chosen)
    log.info("%s: %d of %d dialogues (%d of %d pairs) are the %s part", pairs.dialogues.name, count, len(groups),
             int(away.sum()), len(away), {"val": "validation"}.get(part, part))  # fmt: skip
    return pairs.take(~away), pairs.take(away)


def per_class(pairs: Pairs, most: int, seed: int) -> NDArray[np.int64]:
    """Rows of the first so many pairs of each reply emotion after a shuffle, in their old order.

    Pairs of unknown reply emotion are left out.
    """
    classes = pairs.classes
    order = np.random.default_rng((seed, 0)).permutation(len(classes))
    taken = [order[classes[order] == value][:most] for value in np.unique(classes[classes >= 0])]
    return np.sort(np.concatenate([np.zeros(0, dtype=np.int64), *taken]))


class Split(NamedTuple):
    """The pairs of each part.

    Attributes:
        train: For training.
        val: For validation.
        test: For test; None where there is no file for it and no slice was wanted.
    """

    train: Pairs
    val: Pairs
    test: Pairs | None


class Rules(NamedTuple):
    """How pairs are shared out; see `DialogueData`.

    Attributes:
        val_share: Share of the dialogues for validation.
        test_share: Share of the dialogues for test.
        keep_per_class: Most training pairs of a reply emotion.
        eval_per_class: Most pairs of a reply emotion in validation and in test.
        eval_from_train: Most pairs of a reply emotion that leave training to fill up the test part.
        seed: Of all draws.
    """

    val_share: float = 0.1
    test_share: float = 0.1
    keep_per_class: int | None = None
    eval_per_class: int | None = None
    eval_from_train: int = 0
    seed: int = 0


def split(parts: Parts, label_names: Sequence[str], context_turns: int, fixed: bool, rules: Rules) -> Split:
    """Share pairs out.

    In this order: pairs that fill up the test part leave training, then the test slice and the validation slice where
    they have no file, then training keeps so many of a class.

    Args:
        parts: The files.
        label_names: Names of the emotions by id.
        context_turns: Turns before the reply that make the post.
        fixed: See `emotion_ids`.
        rules: How to share.

    Raises:
        ValueError: If an emotion is unknown or a part is empty.
    """
    train = pairs_of(parts.train, label_names, context_turns, fixed)
    test = None if parts.test is None else pairs_of(parts.test, label_names, context_turns, fixed)
    if test is None and rules.test_share:
        train, test = held_out(train, rules.test_share, rules.seed, "test")
    elif test is not None and rules.eval_per_class is not None and rules.eval_from_train:
        train, test = _filled(train, test, rules, len(label_names))
    if parts.val is None:
        train, val = held_out(train, rules.val_share, rules.seed, "val")
    else:
        val = pairs_of(parts.val, label_names, context_turns, fixed)
    if rules.eval_per_class is not None:
        val = fewer(val, rules.eval_per_class, rules.seed)
        test = None if test is None else fewer(test, rules.eval_per_class, rules.seed)
    if rules.keep_per_class is not None:
        train = fewer(train, rules.keep_per_class, rules.seed)
    return Split(train, val, test)


def fewer(pairs: Pairs, most: int, seed: int) -> Pairs:
    """The pairs of `per_class`.

    Raises:
        ValueError: If the reply emotion of none is known.
    """
    rows = per_class(pairs, most, seed)
    log.info("%s: %d of %d pairs are kept, at most %d of a reply emotion", pairs.dialogues.name, len(rows),
             len(pairs.reply), most)  # fmt: skip
    if not len(rows):
        raise ValueError(f"{pairs.dialogues.name}: no pair has a known reply emotion to choose {most} of each by")
    return pairs.take(rows)


def _filled(train: Pairs, test: Pairs, rules: Rules, num_emotions: int) -> tuple[Pairs, Pairs]:
    assert rules.eval_per_class is not None
    classes, has = train.classes, np.bincount(test.classes[test.classes >= 0], minlength=num_emotions)
    order = np.random.default_rng((rules.seed, 3)).permutation(len(classes))
    wanted = np.clip(rules.eval_per_class - has, 0, rules.eval_from_train)
    rows = np.sort(np.concatenate([order[classes[order] == value][: wanted[value]] for value in range(num_emotions)]))
    away = np.isin(train.groups, train.groups[rows])
    log.info("%s: %d pairs are held out of training for the test part, %d others of their dialogues are left out",
             train.dialogues.name, len(rows), int(away.sum()) - len(rows))  # fmt: skip
    return train.take(~away), _joined(test, train.take(rows))


def _joined(pairs: Pairs, others: Pairs) -> Pairs:
    """Pairs of two files in one, of the second only the turns that its pairs need."""
    source = others.dialogues
    marks = np.zeros(len(source.texts) + 1, dtype=np.int64)
    np.add.at(marks, others.first, 1)
    np.add.at(marks, others.reply + 1, -1)
    used = np.cumsum(marks[:-1]) > 0
    shift = len(pairs.dialogues.texts)
    places = np.cumsum(used) - 1 + shift
    texts = [text for text, taken in zip(source.texts, used.tolist(), strict=True) if taken]
    both = Dialogues(f"{pairs.dialogues.name} and {source.name}", texts=[*pairs.dialogues.texts, *texts])
    return Pairs(
        both,
        np.concatenate([pairs.primary, others.primary[used]]),
        np.concatenate([pairs.secondary, others.secondary[used]]),
        np.concatenate([pairs.groups, others.groups + int(pairs.groups.max()) + 1]),
        np.concatenate([pairs.first, places[others.first]]),
        np.concatenate([pairs.reply, places[others.reply]]),
    )
