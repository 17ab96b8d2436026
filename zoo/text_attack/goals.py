"""What an attack raises: the share of users who see the item, a smooth form of it, or how likely users are to buy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from zoo.text_attack.exposure import Ties, check_cut, check_scores, check_ties, counted_users, exposure

if TYPE_CHECKING:
    from collections.abc import Callable

VictimKind = Literal["retrieval", "pointwise"]
_KINDS = ("retrieval", "pointwise")


@dataclass(frozen=True)
class ExposureGoal:
    """Share of users who find the item among their best K.

    Attributes:
        k: Length K of the list that a user is shown.
        delta: How much the goal has to rise for the attack to have succeeded and to end; None to try every word.
        ties: "pessimistic" or "optimistic" (see `exposure`).
        mask_seen: Whether items that a user has had are not ranked, and the user not counted for them.

    Raises:
        ValueError: If a value is out of its range.
    """

    k: int = 50
    delta: float | None = 0.05
    ties: Ties = "pessimistic"
    mask_seen: bool = False
    kind: ClassVar[VictimKind] = "retrieval"
    needs_thresholds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the values."""
        _check_length(self.k)
        _check_delta(self.delta)
        check_ties(self.ties)

    def value(self, scores: Tensor, tau: Tensor | None) -> Tensor:
        """Exposure of each title, float64 `(titles,)`.

        Args:
            scores: Scores `(users, titles)`.
            tau: Thresholds `(users,)` of the item at this K.

        Raises:
            ValueError: If there are no thresholds, shapes do not fit, or a score is NaN or infinite.
        """
        return exposure(scores, _given(tau, self), self.ties)


@dataclass(frozen=True)
class SoftExposureGoal:
    """Mean over users of sigmoid((s - tau) / temperature), which moves where exposure is flat.

    An item that no user is shown has exposure 0 whatever one word does, and a greedy search sees no progress there.

    Attributes:
        k: Length K of the list that a user is shown.
        temperature: In units of the score; 0.05 suits a cosine.
        delta: How much the goal has to rise for the attack to have succeeded and to end; None to try every word.
        mask_seen: Whether items that a user has had are not ranked, and the user not counted for them.

    Raises:
        ValueError: If a value is out of its range.
    """

    k: int = 50
    temperature: float = 0.05
    delta: float | None = 0.05
    mask_seen: bool = False
    kind: ClassVar[VictimKind] = "retrieval"
    needs_thresholds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the values."""
        _check_length(self.k)
        _check_delta(self.delta)
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be a number above 0, got {self.temperature}")

    def value(self, scores: Tensor, tau: Tensor | None) -> Tensor:
        """The smooth exposure of each title, float64 `(titles,)`.

        Args:
            scores: Scores `(users, titles)`.
            tau: Thresholds `(users,)` of the item at this K.

        Raises:
            ValueError: If there are no thresholds, shapes do not fit, or a score is NaN or infinite.
        """
        tau = _given(tau, self)
        check_scores(scores, tau)
        margins = (scores.double() - tau.double()[:, None]) / self.temperature
        return torch.sigmoid(margins).nan_to_num(nan=0.0).sum(0) / counted_users(tau)


@dataclass(frozen=True)
class PropensityGoal:
    """Mean over users of p(yes): how likely they are to like the item or to buy it.

    Attributes:
        delta: How much the goal has to rise for the attack to have succeeded and to end; None to try every word.

    Raises:
        ValueError: If `delta` is below 0.
    """

    delta: float | None = 0.05
    kind: ClassVar[VictimKind] = "pointwise"
    needs_thresholds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the values."""
        _check_delta(self.delta)

    def value(self, scores: Tensor, tau: Tensor | None = None) -> Tensor:
        """Mean propensity of each title, float64 `(titles,)`.

        Args:
            scores: Probabilities `(users, titles)`.
            tau: Not used; there so that all goals are called alike.

        Raises:
            ValueError: If a score is no probability.
        """
        check_scores(scores)
        if scores.numel():
            lowest, highest = (float(bound) for bound in torch.aminmax(scores))
            if lowest < 0 or highest > 1:
                wrong = lowest if lowest < 0 else highest
                raise ValueError(f"propensity is a mean of probabilities, and a score of {wrong:g} is outside [0, 1]")
        return scores.double().mean(0)


Goal = ExposureGoal | SoftExposureGoal | PropensityGoal


def check_goal(goal: Goal, kind: str, has_candidates: bool = False) -> None:
    """Refuse a goal that a victim of this kind has no numbers for.

    Args:
        goal: What an attack raises.
        kind: "retrieval": scores of the whole catalogue are one product; "pointwise": a probability per pair.
        has_candidates: Whether users have lists of other items to rank the target against.

    Raises:
        ValueError: If the two do not fit; the message says what would.
    """
    if kind not in _KINDS:
        raise ValueError(f"the kind of a victim must be one of {list(_KINDS)}, got {kind!r}")
    name = type(goal).__name__
    if kind == "pointwise" and goal.needs_thresholds and not has_candidates:
        raise ValueError(
            f"{name} ranks the target against other items, and a pointwise victim scores none by itself: give "
            "candidate items for the ranking, or use PropensityGoal"
        )
    if kind == "retrieval" and not goal.needs_thresholds:
        raise ValueError(
            f"{name} is a mean of probabilities, and the score of a retrieval victim is a similarity: use ExposureGoal "
            "or SoftExposureGoal"
        )


def goal_function(
    goal: Goal, score: Callable[[list[str]], Tensor], tau: Tensor | None = None
) -> Callable[[list[str]], Tensor]:
    """A goal as a function of titles, as `TextAttack` asks for.

    Args:
        goal: What the attack raises.
        score: From titles of the target to scores `(users, titles)`, users in the order of `tau`.
        tau: Thresholds `(users,)` of the target; not used by `PropensityGoal`.

    Returns:
        A function from titles to float64 `(titles,)`. It raises ValueError with the title if a score is NaN or
        infinite, and if the scores do not have one column a title.

    Raises:
        ValueError: If the goal needs thresholds and there are none.

    Example:
        >>> import torch
        >>> def likes_short_titles(titles):
        ...     return torch.tensor([[1 / len(title) for title in titles]] * 2)
        >>> goal = goal_function(ExposureGoal(k=1), likes_short_titles, torch.tensor([0.2, 0.4]))
        >>> goal(["Mario", "Go"]).tolist()
        [0.0, 1.0]
    """
    if goal.needs_thresholds:
        counted_users(_given(tau, goal))

    def of_titles(titles: list[str]) -> Tensor:
        if not titles:
            return torch.zeros(0, dtype=torch.float64)
        scores = score(titles)
        if scores.ndim != 2 or scores.shape[1] != len(titles):
            raise ValueError(
                f"{len(titles)} titles must get scores of shape (users, {len(titles)}), got {tuple(scores.shape)}"
            )
        bad = (~scores.isfinite().all(0)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"the score of the title {titles[bad[0]]!r} is NaN or infinite for "
                f"{int((~scores[:, bad[0]].isfinite()).sum())} of {len(scores)} users"
            )
        return goal.value(scores, tau)

    return of_titles


def _given(tau: Tensor | None, goal: Goal) -> Tensor:
    if tau is None:
        raise ValueError(f"{type(goal).__name__} compares scores with thresholds, and there are none")
    return tau


def _check_length(k: int) -> None:
    check_cut(k, k + 1)


def _check_delta(delta: float | None) -> None:
    if delta is not None and not 0 <= delta < math.inf:
        raise ValueError(f"delta must be None or a number of at least 0, got {delta}")
