"""Metrics of emotions: of those in generated replies, and of classifiers that predict them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from zoo.common.distributed import world_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zoo.eacm.lexicon import EmotionLexicon

Head = Literal["sigmoid", "softmax", "probabilities"]


class EmotionMetrics(Metric):
    """Whether an independent judge finds in replies the emotion that they should have.

    - `emotion_a`: share of replies whose judged class is their target (emotion-a of the EmoDS paper).
    - `macro_f1`: mean F1 over the classes that occur as a target or as a judgement; a class of which none is right has
      0, and a class that occurs as neither is left out.
    - `acc/<label>`: share of the replies with that target which are judged so; left out for classes without a target.
    - `emotion_w`, where a lexicon is given: share of replies with a word of their target's emotion, over targets that
      are emotions with words (`EmotionLexicon.said`).

    All are 0 without a reply.

    Args:
        num_classes: Number of classes.
        label_names: Names of the classes, by id; their numbers by default.
        lexicon: Words of the classes; with it, `update` needs the replies.

    Raises:
        ValueError: If names or lexicon are not of that many classes.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    confusion: Tensor
    said: Tensor

    def __init__(
        self, num_classes: int, label_names: Sequence[str] | None = None, lexicon: EmotionLexicon | None = None
    ) -> None:
        super().__init__()
        names = [str(index) for index in range(num_classes)] if label_names is None else list(map(str, label_names))
        for what, number in (("label_names", len(names)), ("lexicon", len(lexicon.label_names) if lexicon else None)):
            if number not in (None, num_classes):
                raise ValueError(f"{what} has {number} classes, expected {num_classes}")
        self.label_names, self.lexicon = names, lexicon
        self.add_state("confusion", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("said", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, judged: Tensor, target: Tensor, replies: Sequence[Sequence[str]] | None = None) -> None:
        """Count a batch.

        Args:
            judged: int64 `(batch,)`, the judge's classes.
            target: int64 `(batch,)`, what they should be.
            replies: Words of each reply, where there is a lexicon.

        Raises:
            ValueError: If shapes differ, a class is out of range, or the lexicon has no replies to look at.
        """
        if judged.shape != target.shape or judged.ndim != 1:
            raise ValueError(f"judged and target must be (batch,), got {tuple(judged.shape)} and {tuple(target.shape)}")
        classes = len(self.confusion)
        for name, labels in (("judged", judged), ("target", target)):
            if bool(((labels < 0) | (labels >= classes)).any()):
                raise ValueError(f"{name} must be classes from 0 to {classes - 1}, got {labels.tolist()}")
        self.confusion = self.confusion + _confusion(target, judged, classes, classes)
        if self.lexicon is not None:
            if replies is None:
                raise ValueError("emotion_w needs the replies: give them, or build the metric without a lexicon")
            holds, counts = self.lexicon.said(replies, target.cpu())
            self.said = self.said + torch.stack((holds.sum(), counts.sum())).to(self.said.device)

    def compute(self) -> dict[str, Tensor]:
        """Values by name, float64."""
        right, targets = self.confusion.diag(), self.confusion.sum(1)
        values = {"emotion_a": _share(right.sum(), targets.sum()), "macro_f1": _macro_f1(self.confusion)}
        for name, correct, count in zip(self.label_names, right, targets, strict=True):
            if count > 0:
                values[f"acc/{name}"] = _share(correct, count)
        if self.lexicon is not None:
            values["emotion_w"] = _share(self.said[0], self.said[1])
        return values


class SelectorMetrics(Metric):
    """How well a classifier of emotions finds the labels of a text.

    - `acc`: share of examples whose best class is the primary label. Multi-hot targets do not say which of two labels
      is the primary one: without `primary`, either is right. The best class must be finite and strictly above the
      others, so that a constant output or one with NaN is never right.
    - `macro_f1`: mean F1 over the classes that occur as a target or as a best class; a class of which none is right has
      0. An example that is wrong counts as a miss of its primary label, or else of its first one.
    - `multilabel_f1`: F1 of all decisions, one per example and class (micro), where a class is taken if its probability
      is above the threshold.

    Examples whose labels are not known are left out. All are 0 without an example.

    Args:
        num_classes: Number of classes.
        head: What the scores are: logits of a "sigmoid" per class, logits of a "softmax", or "probabilities". Logits
            are better: probabilities of 1 are ties.
        threshold: Of the probability.

    Raises:
        ValueError: If `head` is none of these.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    confusion: Tensor
    decisions: Tensor

    def __init__(self, num_classes: int, head: Head = "sigmoid", threshold: float = 0.5) -> None:
        super().__init__()
        if head not in ("sigmoid", "softmax", "probabilities"):
            raise ValueError(f"head must be sigmoid, softmax or probabilities, got {head!r}")
        self.head, self.threshold = head, threshold
        # The last column holds examples for which no class is best.
        self.add_state("confusion", torch.zeros(num_classes, num_classes + 1, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("decisions", torch.zeros(3, dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self, scores: Tensor, targets: Tensor, known: Tensor | None = None, primary: Tensor | None = None
    ) -> None:
        """Count a batch.

        Args:
            scores: `(batch, classes)`, as `head` says.
            targets: Multi-hot `(batch, classes)`.
            known: bool `(batch,)`: the examples that have labels; all by default.
            primary: int64 `(batch,)`, the first of an example's labels, where it is known.

        Raises:
            ValueError: If shapes do not fit, or a known example has no label.
        """
        classes = len(self.confusion)
        if scores.shape != targets.shape or scores.ndim != 2 or scores.shape[1] != classes:
            raise ValueError(
                f"scores and targets must be (batch, {classes}), got {tuple(scores.shape)} and {tuple(targets.shape)}"
            )
        scores, positive = scores.detach().float(), targets > 0.5
        if known is not None:
            scores, positive = scores[known], positive[known]
            primary = primary if primary is None else primary[known]
        if not bool(positive.any(1).all()):
            raise ValueError("an example has no label in its multi-hot target: mark it as not known")
        best = scores.max(1) if len(scores) else None
        if best is None:
            return
        highest = scores == best.values[:, None]
        decided = best.values.isfinite() & (highest.sum(1) == 1)
        chosen = torch.where(decided, best.indices, classes)
        # Of a boolean row the first maximum is the first label.
        first = positive.int().argmax(1) if primary is None else primary
        if primary is None:
            hit = positive.gather(1, chosen.clamp(max=classes - 1)[:, None])[:, 0] & decided
            first = torch.where(hit, chosen, first)
        self.confusion = self.confusion + _confusion(first, chosen, classes, classes + 1)
        taken = self.probabilities(scores) > self.threshold
        parts = ((taken & positive).sum(), (taken & ~positive).sum(), (~taken & positive).sum())
        self.decisions = self.decisions + torch.stack(parts)

    def has_rows(self) -> Tensor:
        """Whether an example was counted, in any of the processes, all of which must ask; bool, a scalar."""
        count = self.confusion.sum()
        if world_size() > 1:
            torch.distributed.all_reduce(count)
        return count > 0

    def probabilities(self, scores: Tensor) -> Tensor:
        """Probabilities `(batch, classes)` of scores."""
        if self.head == "softmax":
            return scores.softmax(1)
        return scores.sigmoid() if self.head == "sigmoid" else scores

    def compute(self) -> dict[str, Tensor]:
        """Values by name, float64."""
        both, only_taken, only_true = self.decisions
        return {
            "acc": _share(self.confusion.diag().sum(), self.confusion.sum()),
            "macro_f1": _macro_f1(self.confusion),
            "multilabel_f1": _share(2 * both, 2 * both + only_taken + only_true),
        }


def _confusion(rows: Tensor, columns: Tensor, height: int, width: int) -> Tensor:
    return (rows * width + columns).bincount(minlength=height * width).view(height, width)


def _macro_f1(confusion: Tensor) -> Tensor:
    """Mean F1 over the classes with a row or a column that is not empty."""
    classes = len(confusion)
    right, given = confusion.diag(), confusion.sum(1) + confusion.sum(0)[:classes]
    occurs = given > 0
    return _share((2 * right / given.double().clamp(min=1)).sum(), occurs.sum())


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return part.double() / whole.double().clamp(min=1)
