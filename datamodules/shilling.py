"""Fake users among the training sequences: the attack on the data that text attacks are compared with."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

_POPULAR = 0.1
"""Share of the catalogue that counts as popular, and share of a bandwagon profile that is of it."""


class ProfileGenerator(Protocol):
    """What fills the profiles of fake users."""

    def __call__(
        self, target_ids: Tensor, count: int, item_ids: Tensor, offsets: Tensor, num_items: int, seed: int
    ) -> Tensor:
        """Filler items.

        Args:
            target_ids: int64 `(fakes,)`, the item that each profile promotes.
            count: Fillers of a profile.
            item_ids: int64 `(interactions,)`, the real training sequences.
            offsets: int64 `(users + 1,)` of them.
            num_items: Size of the catalogue.
            seed: Of the random numbers.

        Returns:
            int64 `(fakes, count)`, oldest first.
        """
        ...


class Injection(NamedTuple):
    """Training sequences with fake users behind the real ones.

    Attributes:
        item_ids: int64 `(interactions,)`.
        offsets: int64 `(users + fakes + 1,)`.
        target_ids: int64 `(fakes,)`, the item that each fake user promotes.
    """

    item_ids: Tensor
    offsets: Tensor
    target_ids: Tensor


def random_fillers(
    target_ids: Tensor, count: int, item_ids: Tensor, offsets: Tensor, num_items: int, seed: int
) -> Tensor:
    """Fillers drawn uniformly from the catalogue, none twice in a profile and never the target."""
    rng = np.random.default_rng(seed)
    rows = [_other_items(rng, [target], count, num_items) for target in target_ids.tolist()]
    return torch.from_numpy(np.stack(rows))


def bandwagon_fillers(
    target_ids: Tensor, count: int, item_ids: Tensor, offsets: Tensor, num_items: int, seed: int
) -> Tensor:
    """A tenth of the fillers from the tenth of the items with the most interactions, the others uniformly drawn.

    Where a tenth of `count` is no whole number, profiles have the next lower or higher one, a tenth on average. The
    popular items stand at random places. No item comes twice in a profile, and never the target.
    """
    rng = np.random.default_rng(seed)
    counts = torch.bincount(item_ids, minlength=num_items)
    popular = counts.argsort(descending=True, stable=True)[: max(1, int(_POPULAR * num_items))].numpy()
    rows = []
    for target in target_ids.tolist():
        pool = popular[popular != target]
        wanted = int(_POPULAR * count + rng.random())
        leading = rng.choice(pool, size=min(wanted, len(pool)), replace=False)
        rest = _other_items(rng, [target, *leading.tolist()], count - len(leading), num_items)
        rows.append(rng.permutation(np.concatenate([leading, rest])))
    return torch.from_numpy(np.stack(rows))


def _other_items(rng: np.random.Generator, taken: list[int], count: int, num_items: int) -> NDArray[np.int64]:
    """Different items, none of those taken, uniformly drawn."""
    ranks = rng.choice(num_items - len(taken), size=count, replace=False)
    places = np.sort(np.array(taken)) - np.arange(len(taken))
    items: NDArray[np.int64] = ranks + np.searchsorted(places, ranks, side="right")
    return items


GENERATORS: dict[str, ProfileGenerator] = {"bandwagon": bandwagon_fillers, "random": random_fillers}
"""Generators by name."""


class ShillingInjector:
    """Adds fake users, each of whom promotes one target, to training sequences.

    There are `floor(share * users)` of them in total, at least one; targets take turns. A profile is as long as the
    mean sequence (rounded) and has the target at its end.

    Args:
        generator: "random", "bandwagon", or a `ProfileGenerator` of your own.
        share: Fake users per real user.
        seed: Of the profiles.

    Raises:
        ValueError: If there is no such generator, or the share is not in (0, 1].
    """

    def __init__(self, generator: str | ProfileGenerator = "random", share: float = 0.01, seed: int = 42) -> None:
        if isinstance(generator, str) and generator not in GENERATORS:
            raise ValueError(f"shilling must be one of {', '.join(GENERATORS)}, got {generator!r}")
        if not 0 < share <= 1:
            raise ValueError(f"shilling_share must be above 0 and at most 1, got {share}")
        self.generator = GENERATORS[generator] if isinstance(generator, str) else generator
        self.share, self.seed = share, seed

    def __call__(self, item_ids: Tensor, offsets: Tensor, target_ids: Tensor, num_items: int) -> Injection:
        """Add fake users.

        Args:
            item_ids: int64 `(interactions,)`, 0..num_items - 1, the training sequences, oldest first.
            offsets: int64 `(users + 1,)` of them.
            target_ids: int64 `(targets,)`, the items to promote.
            num_items: Size of the catalogue.

        Raises:
            ValueError: If there is no target or no user, a target is not in the catalogue, or the generator gives
                profiles of another shape or items that are not in it.
        """
        users = len(offsets) - 1
        if not users or not len(target_ids):
            raise ValueError(f"shilling needs users and targets, got {users} and {len(target_ids)}")
        if bool(((target_ids < 0) | (target_ids >= num_items)).any()):
            raise ValueError(f"target ids {target_ids.tolist()}: expected 0..{num_items - 1}")
        fakes = max(1, int(self.share * users + 1e-9))  # 0.29 * 100 is less than 29
        # A filler must differ from the target and from the others.
        count = min(max(round(len(item_ids) / users) - 1, 1), num_items - 1)
        promoted = target_ids[torch.arange(fakes) % len(target_ids)]
        fillers = self.generator(promoted, count, item_ids, offsets, num_items, self.seed)
        if fillers.shape != (fakes, count):
            raise ValueError(f"the profile generator gave fillers {tuple(fillers.shape)}, expected {(fakes, count)}")
        if bool(((fillers < 0) | (fillers >= num_items)).any()):
            raise ValueError(f"the profile generator gave an item that is not in 0..{num_items - 1}")
        profiles = torch.cat([fillers.to(item_ids), promoted[:, None].to(item_ids)], 1)
        added = offsets[-1] + (count + 1) * torch.arange(1, fakes + 1)
        log.info("shilling: %d fake users of %d items each promote %d targets", fakes, count + 1,
                 min(fakes, len(target_ids)))  # fmt: skip
        return Injection(torch.cat([item_ids, profiles.flatten()]), torch.cat([offsets, added]), promoted)
