"""Whether titles that were crafted against one recommender work on another, which was never asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoo.text_attack.aggregate import lift_of
from zoo.text_attack.exposure import Ties, TopScores, check_ties, exposure, thresholds

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from zoo.text_attack.attack import AttackResult


@dataclass(frozen=True)
class TransferMatrix:
    """Effect of titles crafted on a source (row) upon a target victim (column); the diagonal is the white entry.

    Attributes:
        sources: Names of the rows.
        victims: Names of the columns.
        pre: Mean exposure of the original titles, float64 `(sources, victims)`.
        post: Mean exposure of the crafted titles, of the same shape.
        win_rate: Share of titles that raised the exposure, of the same shape.
    """

    sources: tuple[str, ...]
    victims: tuple[str, ...]
    pre: Tensor
    post: Tensor
    win_rate: Tensor

    @property
    def lift(self) -> Tensor:
        """The factor mean post / mean pre, float64 `(sources, victims)` (see `summarise`)."""
        return lift_of(self.pre, self.post)

    @property
    def gain(self) -> Tensor:
        """Mean post less mean pre, float64 `(sources, victims)`."""
        return self.post - self.pre

    def to_dict(self) -> dict[str, dict[str, float]]:
        """The lifts by name of source and of victim, as result files keep them."""
        lifts = self.lift.tolist()
        return {
            source: dict(zip(self.victims, row, strict=True)) for source, row in zip(self.sources, lifts, strict=True)
        }


class TransferStudy:
    """Titles crafted on source victims, scored on target victims without a search.

    Args:
        victims: By name, a function `(item id, titles) -> (titles,)` that gives the exposure of titles of an item in
            that victim over all of its users, as `exposure_scorer` makes.
        results: By name of the source, the attacks against it. Victims need a common catalogue, not common users.

    Raises:
        ValueError: If there is no victim, no source, or a source has no result.
    """

    def __init__(
        self,
        victims: Mapping[str, Callable[[int, list[str]], Tensor]],
        results: Mapping[str, Sequence[AttackResult]],
    ) -> None:
        if not victims or not results:
            raise ValueError(f"a study needs a source and a victim, got {len(results)} and {len(victims)}")
        for source, attacks in results.items():
            if not attacks:
                raise ValueError(f"the source {source!r} has no result")
        self.victims, self.results = dict(victims), dict(results)

    def matrix(self) -> TransferMatrix:
        """Score every source's titles on every victim.

        Raises:
            ValueError: If a victim does not give one finite number a title.
        """
        pre, post, wins = [], [], []
        for attacks in self.results.values():
            # One order, so that sums are equal to the last bit however the attacks were ordered.
            ordered = sorted(attacks, key=lambda result: (result.item_id, result.perturbed))
            for name, victim in self.victims.items():
                values = torch.stack([_exposures(name, victim, result) for result in ordered])
                pre.append(values[:, 0].mean())
                post.append(values[:, 1].mean())
                wins.append((values[:, 1] > values[:, 0]).double().mean())
        shape = (len(self.results), len(self.victims))
        return TransferMatrix(
            tuple(self.results),
            tuple(self.victims),
            torch.stack(pre).view(shape),
            torch.stack(post).view(shape),
            torch.stack(wins).view(shape),
        )


def _exposures(name: str, victim: Callable[[int, list[str]], Tensor], result: AttackResult) -> Tensor:
    values = victim(result.item_id, [result.original, result.perturbed])
    if values.shape != (2,) or not bool(values.isfinite().all()):
        raise ValueError(
            f"the victim {name!r} must give a finite number for each of 2 titles of item {result.item_id}, got "
            f"{values.tolist()}"
        )
    return values.detach().double().cpu()


def exposure_scorer(
    score: Callable[[list[str]], Tensor], top: TopScores, ties: Ties = "pessimistic"
) -> Callable[[int, list[str]], Tensor]:
    """A victim as `TransferStudy` asks for, from what it scores and its lists of the best items.

    Args:
        score: From titles to scores `(users, titles)`, users as in `top`.
        top: Lists of all users (see `top_scores`).
        ties: "pessimistic" or "optimistic" (see `exposure`).

    Raises:
        ValueError: If `ties` is neither.
    """
    check_ties(ties)
    return lambda item_id, titles: exposure(score(titles), thresholds(top, item_id), ties)
