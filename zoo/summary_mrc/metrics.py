"""Accuracy over the options of a question: ties and NaN count as wrong, and ties are counted."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassF1Score


def answered_right(scores: Tensor, accepted: Tensor) -> Tensor:
    """Whether an accepted option beats every other one, bool `(batch,)`.

    The best accepted score must be finite and strictly above each score that is not accepted, so that a constant output
    or one with NaN is never right. Accepted options may tie with each other: two options of the same text must. A row
    without an accepted option is wrong.

    Args:
        scores: Floating point `(batch, options)`.
        accepted: bool `(batch, options)`, answers that count as right.

    Raises:
        ValueError: If shapes or types do not fit.
    """
    _check(scores)
    if accepted.shape != scores.shape or accepted.dtype != torch.bool:
        raise ValueError(
            f"accepted must be bool of the shape of scores {tuple(scores.shape)}, "
            f"got {accepted.dtype} {tuple(accepted.shape)}"
        )
    # The maximum propagates NaN, and no comparison with NaN holds.
    best = scores.masked_fill(~accepted, -torch.inf).amax(1)
    rival = scores.masked_fill(accepted, -torch.inf).amax(1)
    return best.isfinite() & (best > rival)


def tied(scores: Tensor) -> Tensor:
    """Whether two or more options hold the highest score, bool `(batch,)`; NaN ranks below every number.

    Args:
        scores: Floating point `(batch, options)`.

    Raises:
        ValueError: If it is not of that form.
    """
    return _highest(scores).sum(1) > 1


def predictions(scores: Tensor) -> Tensor:
    """Index of the highest score, int64 `(batch,)`: the lowest of equals, and NaN only where there is nothing else.

    Args:
        scores: Floating point `(batch, options)`.

    Raises:
        ValueError: If it is not of that form.

    Example:
        >>> import torch
        >>> predictions(torch.tensor([[0.1, 0.7, 0.7], [torch.nan, -1.0, -2.0]])).tolist()
        [1, 1]
    """
    highest = _highest(scores)
    places = torch.arange(scores.shape[1], device=scores.device)
    # `argmax` promises no order among equals.
    return torch.where(highest, places, scores.shape[1]).amin(1)


class ChoiceAccuracy(Metric):
    """Share of questions that are answered right (`answered_right`)."""

    full_state_update = False
    higher_is_better = True
    correct: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("correct", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, scores: Tensor, accepted: Tensor) -> None:
        """Count.

        Args:
            scores: Floating point `(batch, options)`.
            accepted: bool `(batch, options)`, answers that count as right.
        """
        # Not in place: states that an evaluation in inference mode made may not be written to by a fit.
        self.correct = self.correct + answered_right(scores, accepted).sum()
        self.total = self.total + len(scores)

    def compute(self) -> Tensor:
        """In [0, 1], float64; NaN without a question."""
        return self.correct.double() / self.total


class TieRate(Metric):
    """Share of questions whose highest score is held by two or more options; 1 for a constant scorer."""

    full_state_update = False
    higher_is_better = False
    ties: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("ties", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, scores: Tensor) -> None:
        """Count the ties of `scores`, floating point `(batch, options)`."""
        self.ties = self.ties + tied(scores).sum()
        self.total = self.total + len(scores)

    def compute(self) -> Tensor:
        """In [0, 1], float64; NaN without a question."""
        return self.ties.double() / self.total


class ChoiceMetrics(nn.Module):
    """Loss, accuracy, rate of ties and macro-F1 of an evaluation.

    F1 says little here, as a label is a place among the options; it is what some others report.

    Args:
        num_options: Options K of every question.
    """

    def __init__(self, num_options: int) -> None:
        super().__init__()
        self.loss, self.acc, self.ties = MeanMetric(), ChoiceAccuracy(), TieRate()
        self.macro_f1 = MulticlassF1Score(num_options, average="macro")

    def update(self, scores: Tensor, loss: Tensor, labels: Tensor, accepted: Tensor) -> None:
        """Count a batch.

        Args:
            scores: Floating point `(batch, options)`.
            loss: Their mean loss.
            labels: int64 `(batch,)`.
            accepted: bool `(batch, options)`.
        """
        self.loss.update(loss, len(labels))
        self.acc.update(scores, accepted)
        self.ties.update(scores)
        self.macro_f1.update(predictions(scores), labels)

    def compute(self) -> dict[str, Tensor]:
        """All four by name."""
        return {name: metric.compute() for name, metric in self._metrics().items()}

    def reset(self) -> None:
        """Forget what was counted."""
        for metric in self._metrics().values():
            metric.reset()

    def _metrics(self) -> dict[str, Metric]:
        return {"loss": self.loss, "acc": self.acc, "ties": self.ties, "macro_f1": self.macro_f1}


def _check(scores: Tensor) -> None:
    if scores.ndim != 2 or scores.shape[1] == 0 or not scores.is_floating_point():
        raise ValueError(
            f"scores must be floating point of shape (batch, options), got {scores.dtype} {tuple(scores.shape)}"
        )


def _highest(scores: Tensor) -> Tensor:
    """Where the options with the highest score of their row are, bool `(batch, options)`."""
    _check(scores)
    known = ~scores.isnan()
    # A row of nothing but NaN is compared as if its scores were equal; elsewhere -inf must still beat NaN.
    candidates = known | ~known.any(1, keepdim=True)
    numbers = scores.masked_fill(~known, -torch.inf)
    return candidates & (numbers == numbers.amax(1, keepdim=True))
