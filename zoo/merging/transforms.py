"""What is done to task vectors before they are merged: trimming, electing signs, dropping at random."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from zoo.common.keyed_random import mix_keys
from zoo.merging.thresholds import columns, magnitude_thresholds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from zoo.merging.thresholds import Blocks

Scope = Literal["global", "layer"]


class Transform(Protocol):
    """A change of task vectors that may depend on all of them and is applied to one parameter tensor at a time."""

    def fit(self, blocks: Blocks) -> Callable[[str, Tensor], Tensor]:
        """Learn from all task vectors how to change those of one parameter.

        Args:
            blocks: Gives, at each call, names of parameters and their task vectors, float32 `(K, n)`; these are not
                to be written to, and may be gone when the next ones are given.

        Returns:
            A function from a name and the task vectors `(K, n)` of that parameter to the changed ones, a new tensor.
        """
        ...


class BlockFunction(Protocol):
    """What the transforms here learn."""

    def __call__(self, name: str, block: Tensor, out: Tensor | None = None) -> Tensor:
        """Change the task vectors of one parameter.

        Args:
            name: The parameter.
            block: Its task vectors `(K, n)`.
            out: `(K, n)` to write to, which may be `block` itself; a new tensor by default.

        Returns:
            The changed task vectors.
        """
        ...


@dataclass(frozen=True)
class Magnitude:
    """Keep the entries of largest magnitude of each task vector, and set the others to 0.

    Args:
        density: Share of entries to keep, in (0, 1]; see `magnitude_thresholds` for the exact number. **It counts all
            parameters that are merged, also those that fine-tuning has not moved.** 20 % of a checkpoint in which
            25.6 of 113.4 million parameters (CLIP's text side) never moved is 25.83 % of the others alone: for the
            same result on an image tower without the text side, give 0.2583.
        scope: "global" ranks the entries of a whole task vector, "layer" those of each parameter tensor by itself.

    Raises:
        ValueError: If an argument is outside its range.
    """

    density: float = 0.2
    scope: Scope = "global"

    def __post_init__(self) -> None:
        """Check the arguments."""
        _check_density(self.density, self.scope)

    def fit(self, blocks: Blocks) -> BlockFunction:
        """Find the thresholds; see `Transform.fit`. Two passes for the global scope."""
        if self.scope == "layer":
            return partial(_by_layer, Magnitude(self.density))
        return partial(_change, partial(_trim, magnitude_thresholds(blocks, self.density)))


@dataclass(frozen=True)
class Ties:
    """Trim, elect signs and drop what disagrees (Yadav et al., arXiv 2306.01708), with one vector left for each task.

    Trimming is that of `Magnitude`. The elected sign of a parameter is that of the sum of its trimmed entries; where
    they cancel, it is the sign that most parameters have; if there is none either, nothing is kept. Entries of another
    sign become 0. The vectors are not summed: AdaMerging++ learns coefficients for them.

    Args:
        density: See `Magnitude`, in particular before comparing with published numbers.
        scope: "global", or "layer": every parameter tensor has thresholds and a majority of its own.

    Raises:
        ValueError: If an argument is outside its range.
    """

    density: float = 0.2
    scope: Scope = "global"

    def __post_init__(self) -> None:
        """Check the arguments."""
        _check_density(self.density, self.scope)

    def fit(self, blocks: Blocks) -> BlockFunction:
        """Find the thresholds and the majority's sign; see `Transform.fit`. Three passes for the global scope."""
        if self.scope == "layer":
            return partial(_by_layer, Ties(self.density))
        thresholds = magnitude_thresholds(blocks, self.density)
        balance = 0
        for _, block in blocks():
            for part in columns(block):
                balance += int(_elected(_trim(thresholds, block[:, part])).sum())
        return partial(_change, partial(_agreeing, thresholds, (balance > 0) - (balance < 0)))


@dataclass(frozen=True)
class Dare:
    """Drop each entry with a probability and rescale the others by 1 / (1 - drop) (Yu et al., arXiv 2311.03099).

    What is dropped depends on the seed, the task, the parameter's name and the place in it, and on nothing else: it
    is the same for any order of tensors, in memory or streamed, on any device.

    Args:
        drop: Probability, in [0, 1).
        seed: Another one drops other entries.
        rescale: Whether the expected task vector is the one given.
        task_names: Names of the K tasks, which then choose what is dropped; by default their places in the order do.

    Raises:
        ValueError: If the probability is outside its range.
    """

    drop: float = 0.5
    seed: int = 0
    rescale: bool = True
    task_names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop must be a probability in [0, 1), got {self.drop}")

    def fit(self, blocks: Blocks) -> BlockFunction:
        """Nothing is to be learned: no pass."""
        return self._thin

    def _thin(self, name: str, block: Tensor, out: Tensor | None = None) -> Tensor:
        tasks = [str(row) for row in range(len(block))] if self.task_names is None else self.task_names
        if len(tasks) != len(block):
            raise ValueError(f"{name} has {len(block)} task vectors for the tasks {', '.join(tasks)}")
        out = torch.empty_like(block) if out is None else out
        scale = 1 / (1 - self.drop) if self.rescale else 1.0
        # One word of 64 random bits serves two neighbours; signed halves are uniform around zero.
        limit = math.floor((self.drop - 0.5) * 2**32)
        parameter = _word(name)
        for part in columns(block):
            pairs = torch.arange(part.start // 2, (part.stop + 1) // 2, device=block.device)
            for task, row, target in zip(tasks, block[:, part], out[:, part], strict=True):
                halves = mix_keys(self.seed, _word(task), parameter, pairs).view(torch.int32)
                halves = halves[part.start % 2 :][: len(row)]
                # Products with 0.0 and 1.0: choosing by a boolean mask takes several times as long.
                kept = torch.ge(halves, limit, out=torch.empty_like(row, dtype=torch.float32))
                torch.mul(row, kept, out=target).mul_(scale)
        return out


def _check_density(density: float, scope: str) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"density must be a share in (0, 1], got {density}")
    if scope not in ("global", "layer"):
        raise ValueError(f"scope must be 'global' or 'layer', got {scope!r}")


def _word(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def _change(change: Callable[[Tensor], Tensor], name: str, block: Tensor, out: Tensor | None = None) -> Tensor:
    out = torch.empty_like(block) if out is None else out
    for part in columns(block):
        out[:, part] = change(block[:, part])
    return out


def _by_layer(transform: Magnitude | Ties, name: str, block: Tensor, out: Tensor | None = None) -> Tensor:
    def alone() -> Iterator[tuple[str, Tensor]]:
        yield name, block

    return transform.fit(alone)(name, block, out=out)


def _trim(thresholds: Tensor, vectors: Tensor) -> Tensor:
    """Entries that reach the thresholds `(K,)`, and zeros, float32 `(K, n)`."""
    if len(vectors) != len(thresholds):
        raise ValueError(f"{len(vectors)} task vectors for a transform that was fitted to {len(thresholds)}")
    return vectors.float().abs().ge_(thresholds.to(vectors.device)[:, None]).mul_(vectors)


def _elected(trimmed: Tensor) -> Tensor:
    # In float64, so that what cancels does not depend on the order of the tasks.
    return trimmed.sum(0, dtype=torch.float64).sign()


def _agreeing(thresholds: Tensor, majority: int, vectors: Tensor) -> Tensor:
    trimmed = _trim(thresholds, vectors)
    signs = _elected(trimmed)
    signs.masked_fill_(signs == 0, majority)
    return (trimmed * signs.float()).gt_(0).mul_(trimmed)
