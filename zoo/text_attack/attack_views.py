"""A victim as an attack sees it: users, their thresholds, and what a title of an item would reach."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from zoo.text_attack.exposure import TopScores, exposure, thresholds, top_scores, top_scores_of
from zoo.text_attack.goals import check_goal, goal_function

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from zoo.text_attack.exposure import Ties
    from zoo.text_attack.goals import Goal
    from zoo.text_attack.types import RecBatch
    from zoo.text_attack.victim import TextRecVictim


def rows_of(batch: Any, rows: Tensor | slice) -> Any:
    """Some rows of a batch."""
    return type(batch)(*(field[rows] for field in batch))


def choose(count: int, share: float, seed: int) -> Tensor:
    """A share of `count` rows, at least one, drawn without replacement; ascending int64.

    Raises:
        ValueError: If the share is not in (0, 1], or there is no row.
    """
    if not 0 < share <= 1:
        raise ValueError(f"anchor_share must be above 0 and at most 1, got {share}")
    if count < 1:
        raise ValueError("there is no user to attack for: the anchor set is empty")
    generator = torch.Generator().manual_seed(seed)
    wanted = max(1, math.floor(share * count + 1e-9))  # 0.29 * 100 is less than 29
    return torch.randperm(count, generator=generator)[:wanted].sort().values


class ExposureView:
    """Exposure of titles over all users, and over the anchor users that a search may ask (section 2.3).

    What does not depend on the attacked title is computed here, once: user states, and for each user the best K + 1
    items, from which the thresholds of every target follow.

    Args:
        victim: Recommender, with its catalogue.
        batch: All users, with their histories.
        anchor_share: Share of users that a search sees.
        k: Length K of a user's list.
        ties: What a tie with the K-th best item counts as.
        mask_seen: Whether items of a user's history are not ranked (retrieval).
        num_candidates: Items that each user of a pointwise victim ranks the target against; 0 for the whole catalogue.
        seed: Of the choice of anchors and candidates.
        repair: What attacked titles alone pass through before the victim reads them, if anything.

    Raises:
        ValueError: If the victim does not read titles, K is too large, or an argument is out of its range.
    """

    def __init__(
        self,
        victim: TextRecVictim,
        batch: RecBatch,
        *,
        anchor_share: float = 0.4,
        k: int = 50,
        ties: Ties = "pessimistic",
        mask_seen: bool = False,
        num_candidates: int = 99,
        seed: int = 42,
        repair: Callable[[list[str]], list[str]] | None = None,
    ) -> None:
        self.victim, self.ties, self.repair = victim, ties, repair
        anchors = choose(len(batch.item_ids), anchor_share, seed)
        # All of them: the states of the others' rows serve for both.
        everyone = len(anchors) == len(batch.item_ids)
        self.users = victim.user_state(batch)
        self.anchors = self.users if everyone else victim.user_state(rows_of(batch, anchors))
        check_reads_titles(victim, self.anchors)
        self.top = self._top(batch, k, mask_seen, num_candidates, seed)
        self.anchor_top = self.top.of_users(anchors)

    def _top(self, batch: RecBatch, k: int, mask_seen: bool, num_candidates: int, seed: int) -> TopScores:
        victim, count = self.victim, len(self.victim.titles)
        if victim.kind == "retrieval":
            seen = None
            if mask_seen:
                rows, columns = (batch.history >= 0).nonzero(as_tuple=True)
                seen = torch.stack([rows, batch.history[rows, columns]], 1).to(victim.device)
            items: Tensor = victim.encode_items()  # type: ignore[operator]
            return top_scores(self.users, items, k, seen=seen)
        users = len(batch.item_ids)
        whole = not num_candidates or num_candidates >= count
        if whole:
            candidates = torch.arange(count).expand(users, count)
        else:
            if k >= num_candidates:
                raise ValueError(f"k ({k}) must be below num_candidates ({num_candidates}) for a pointwise victim")
            generator = torch.Generator().manual_seed(seed)
            candidates = torch.stack(
                [torch.randperm(count, generator=generator)[:num_candidates] for _ in range(users)]
            )
        scores = victim.score_items(self.users, candidates.to(victim.device))
        best = top_scores_of([scores], k)
        return best._replace(ids=candidates.to(best.ids.device).gather(1, best.ids))

    def score(self, users: Any, item_id: int, texts: list[str]) -> Tensor:
        """Scores `(users, texts)` of titles of an item."""
        texts = texts if self.repair is None else self.repair(texts)
        return self.victim.score(users, texts, torch.full((len(texts),), item_id))

    def exposures(self, item_id: int, texts: list[str]) -> Tensor:
        """Exposure of titles of an item over all users, float64 `(texts,)`."""
        return exposure(self.score(self.users, item_id, texts), thresholds(self.top, item_id), self.ties)

    def propensities(self, item_id: int, texts: list[str]) -> Tensor:
        """Mean score of titles of an item over all users, float64 `(texts,)`: purchasing propensity (pointwise)."""
        return self.score(self.users, item_id, texts).double().mean(0)

    def goal(self, goal: Goal, item_id: int) -> Callable[[list[str]], Tensor]:
        """What a search asks about titles of an item: the goal on the anchor users.

        Raises:
            ValueError: If the goal does not fit the victim.
        """
        check_goal(goal, self.victim.kind, has_candidates=True)
        tau = thresholds(self.anchor_top, item_id)
        return goal_function(goal, lambda texts: self.score(self.anchors, item_id, texts), tau)


def check_reads_titles(victim: TextRecVictim, users: Any) -> None:
    """Refuse a victim to which all titles are the same.

    Raises:
        ValueError: If two different titles of an item have equal scores for all users; the text says what to change.
    """
    probe = ["Game of the year edition", "Xq zvw 7"]
    scores = victim.score(users, probe, torch.zeros(2, dtype=torch.int64))
    if torch.equal(scores[:, 0], scores[:, 1]):
        prompt = getattr(getattr(victim, "prompt", None), "name", None)
        raise ValueError(
            f"{type(victim).__name__} never reads the title{f' with prompt={prompt!r}' if prompt else ''}: two "
            "different titles have the same scores, so there is nothing to attack; choose a prompt that holds the title"
        )
