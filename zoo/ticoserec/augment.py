"""The five time-interval-aware operators, as one pass of tensor operations over a whole batch.

An operator needs little of a sequence: the rank of each item's right gap, and where the most even windows start. Both
are fixed, so they are computed once for all users; a batch of views is then a handful of gathers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoo.common.keyed_random import keyed_integers, keyed_uniform
from zoo.ticoserec.gaps import even_window, gap_ranks, right_gaps
from zoo.ticoserec.jagged import keep_last, pad_left, row_and_position, row_starts, unpad_left

OPERATORS = "SIMRC"  # substitute, insert, mask, reorder, crop
SUBSTITUTE, INSERT, MASK, REORDER, CROP, ORIGINAL, BLANK = range(7)
_MODES = ("minimum", "maximum", "random")
# Independent random numbers are told apart by these words of their keys.
_OPERATOR_STREAM, _START_STREAM, _CHOICE_STREAM, _SHUFFLE_STREAM = range(4)


@dataclass(frozen=True)
class ViewPolicy:
    """Which operators a view may use, how strongly, and where.

    Attributes:
        crop, mask, reorder, substitute, insert: Ratio of items that the operator touches, in (0, 1).
        crop_mode, reorder_mode: "minimum" or "maximum" variance of the chosen window.
        mask_mode, substitute_mode, insert_mode: Items with the smallest gaps ("minimum"), the largest ("maximum"), or
            "random" items.
        short_ops, long_ops: Letters out of SIMRC for users with at most `threshold` items and for all others.
        threshold: Longest short sequence; -1 gives everybody `long_ops`.
        positions: "time" as above; "random" draws every position and window, as CoSeRec does.
        insert_side: New items stand "after" the chosen item (this paper) or "before" it (CoSeRec).
        window: "full" or "official" (see `even_window`).

    Raises:
        ValueError: If a value is out of its range; the message names it.
    """

    crop: float = 0.7
    mask: float = 0.5
    reorder: float = 0.2
    substitute: float = 0.1
    insert: float = 0.5
    crop_mode: str = "minimum"
    reorder_mode: str = "minimum"
    mask_mode: str = "random"
    substitute_mode: str = "minimum"
    insert_mode: str = "maximum"
    short_ops: str = "SIM"
    long_ops: str = "SIMRC"
    threshold: int = 12
    positions: str = "time"
    insert_side: str = "after"
    window: str = "full"

    def __post_init__(self) -> None:
        """Check every value."""
        for name in ("crop", "mask", "reorder", "substitute", "insert"):
            ratio = getattr(self, name)
            if not 0 < ratio < 1:
                raise ValueError(f"{name} ratio must lie strictly between 0 and 1, got {ratio}")
        choices = {
            "crop_mode": _MODES[:2],
            "reorder_mode": _MODES[:2],
            "mask_mode": _MODES,
            "substitute_mode": _MODES,
            "insert_mode": _MODES,
            "positions": ("time", "random"),
            "insert_side": ("after", "before"),
            "window": ("full", "official"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("short_ops", "long_ops"):
            letters = getattr(self, name)
            if not letters or set(letters) - set(OPERATORS) or len(set(letters)) < len(letters):
                raise ValueError(f"{name} must be different letters out of {OPERATORS}, got {letters!r}")
        if self.threshold < -1 or self.threshold == 0:
            raise ValueError(f"threshold must be -1 (everybody is long) or at least 1, got {self.threshold}")


class Sequences(NamedTuple):
    """A jagged batch of sequences with all that the operators need.

    Attributes:
        item_ids: int64 `(items,)`.
        lengths: int64 `(rows,)`.
        rows: int64 `(items,)`, the row of each item.
        positions: int64 `(items,)`, its place in the row.
        ranks: `(items,)`, place of the item's right gap in the ascending order of its row.
        known: int64 `(rows,)`, items of the row that have a known gap.
        crop_starts, reorder_starts: int64 `(rows,)`, first item of the operator's window.
    """

    item_ids: Tensor
    lengths: Tensor
    rows: Tensor
    positions: Tensor
    ranks: Tensor
    known: Tensor
    crop_starts: Tensor
    reorder_starts: Tensor


class Views(NamedTuple):
    """A jagged batch of views.

    Attributes:
        item_ids: int64 `(items,)`; 0 is a masked item.
        lengths: int64 `(rows,)`.
        sources: int64 `(items,)`, the item of the input batch each one came from (for an inserted or substituted item
            the one whose neighbour it is).
        inserted: bool `(items,)`, items that Ti-Insert added.
    """

    item_ids: Tensor
    lengths: Tensor
    sources: Tensor
    inserted: Tensor


def counts_of(ratio: float, lengths: Tensor) -> Tensor:
    """floor(ratio * n)."""
    return (lengths.double() * ratio).floor().long()


def describe(
    policy: ViewPolicy, item_ids: Tensor, lengths: Tensor, timestamps: Tensor | None, time_lengths: Tensor | None
) -> Sequences:
    """Precompute gap ranks and windows of a jagged batch (see `right_gaps` for the shapes of the times).

    Raises:
        ValueError: If the policy chooses by time and there are no times.
    """
    if timestamps is None or time_lengths is None:
        if policy.positions == "time":
            raise ValueError("choosing positions by time needs timestamps: give them, or set positions='random'")
        zeros = torch.zeros_like(lengths)
        ranks = torch.zeros_like(item_ids)
        return Sequences(item_ids, lengths, *row_and_position(lengths), ranks, lengths, zeros, zeros)
    gaps = right_gaps(timestamps, time_lengths, lengths)
    return Sequences(
        item_ids,
        lengths,
        *row_and_position(lengths),
        gap_ranks(gaps),
        gaps.known,
        even_window(gaps, counts_of(policy.crop, lengths), policy.crop_mode, policy.window),
        even_window(gaps, counts_of(policy.reorder, lengths), policy.reorder_mode, policy.window),
    )


def draw_operators(policy: ViewPolicy, lengths: Tensor, keys: Tensor) -> Tensor:
    """One operator per row, uniform over the set for its length (control strategy), int64 `(rows,)`."""
    is_short = lengths <= policy.threshold
    sizes = torch.where(is_short, len(policy.short_ops), len(policy.long_ops))
    letters = [OPERATORS.index(letter) for letter in policy.long_ops + policy.short_ops]
    table = torch.tensor(letters, device=lengths.device)
    return table[keyed_integers(sizes, keys, _OPERATOR_STREAM) + is_short * len(policy.long_ops)]


class _Plan(NamedTuple):
    """What happens to each row, all int64 `(rows,)`.

    An item is chosen if its rank lies in [first_rank, end_rank); the window is [window_start, window_end).
    """

    operator: Tensor
    first_rank: Tensor
    end_rank: Tensor
    window_start: Tensor
    window_end: Tensor
    by_chance: Tensor  # 1 where items are chosen by random ranks


def _plan_rows(policy: ViewPolicy, sequences: Sequences, operators: Tensor, keys: Tensor) -> _Plan:
    lengths, device = sequences.lengths, operators.device
    ratios = [policy.substitute, policy.insert, policy.mask, policy.reorder, policy.crop, 0.0, 0.0]
    at_least = [1, 1, 0, 0, 0, 0, 0]
    counts = (torch.tensor(ratios, dtype=torch.float64, device=device)[operators] * lengths).floor().long()
    counts = torch.maximum(counts, torch.tensor(at_least, device=device)[operators])

    # Ti-Substitute, Ti-Insert and Ti-Mask choose items by rank.
    modes = [policy.substitute_mode, policy.insert_mode, policy.mask_mode]
    if policy.positions == "random":
        modes = ["random"] * 3
    rest = [0] * 4
    by_chance = torch.tensor([int(mode == "random") for mode in modes] + rest, device=device)[operators]
    from_top = torch.tensor([int(mode == "maximum") for mode in modes] + rest, device=device)[operators]
    known = torch.where(by_chance == 1, lengths, sequences.known)
    chooses = (operators <= MASK) & ((operators == INSERT) | (lengths > 1))
    chosen = torch.minimum(counts, known) * chooses
    first_rank = from_top * (known - chosen)

    # Ti-Crop and Ti-Reorder have a window; a short crop is one item drawn from U{0..n-c-1}.
    random_windows = policy.positions == "random"
    is_crop = operators == CROP
    shrunk = is_crop & (counts < 1 if random_windows else counts <= 2)
    drawn = keyed_integers((lengths - counts).clamp(min=1), keys, _START_STREAM)
    fixed = torch.where(is_crop, sequences.crop_starts, sequences.reorder_starts)
    window_start = drawn if random_windows else torch.where(shrunk, drawn, fixed)
    width = torch.where(shrunk, 1, counts)
    return _Plan(operators, first_rank, first_rank + chosen, window_start, window_start + width, by_chance)


def _random_ranks(rows: Tensor, positions: Tensor, lengths: Tensor, keys: Tensor) -> Tensor:
    """A random permutation of 0..n-1 in each row, `(items,)`."""
    order = (rows + keyed_uniform(keys[rows], _CHOICE_STREAM, positions)).argsort()
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order), device=order.device) - row_starts(lengths)[rows]
    return ranks


def make_views(
    policy: ViewPolicy, sequences: Sequences, operators: Tensor, keys: Tensor, most_similar: Tensor
) -> Views:
    """Apply one operator to each row.

    Args:
        policy: Ratios and modes.
        sequences: The rows at their full length (see `describe`).
        operators: int64 `(rows,)`, numbers of the operators.
        keys: int64 `(rows,)`, random keys; equal keys give equal views.
        most_similar: int64 `(num_items + 1,)`, the nearest item of each item.

    Returns:
        Views at their full length.
    """
    items, rows, positions = sequences.item_ids, sequences.rows, sequences.positions
    plan = _plan_rows(policy, sequences, operators, keys)
    # One gather spreads the whole plan over the items.
    operator, first_rank, end_rank, start, end, by_chance = torch.stack(plan, -1)[rows].unbind(-1)
    ranks = sequences.ranks
    if "random" in (policy.positions, policy.mask_mode, policy.substitute_mode, policy.insert_mode):
        ranks = torch.where(by_chance == 1, _random_ranks(rows, positions, sequences.lengths, keys), ranks)
    chosen = (ranks >= first_rank) & (ranks < end_rank)
    in_window = (positions >= start) & (positions < end)

    sources = torch.arange(len(rows), device=rows.device)
    places = (in_window & (operator == REORDER)).nonzero().squeeze(1)
    window_rows = rows[places]
    shuffled = (window_rows + keyed_uniform(keys[window_rows], _SHUFFLE_STREAM, positions[places])).argsort()
    sources[places] = places[shuffled]

    values = torch.where(chosen & (operator == SUBSTITUTE), most_similar[items], items[sources])
    values.masked_fill_(chosen & (operator == MASK), 0)
    doubled = chosen & (operator == INSERT)
    kept = (in_window | (operator != CROP)) & (operator != BLANK)
    copies = kept.long() + doubled
    ends = copies.cumsum(0)
    index = torch.repeat_interleave(copies)
    # Of the two copies of a doubled item, the new one is the last, or with "before" the first.
    new_places = ends[doubled] - (1 if policy.insert_side == "after" else 2)
    inserted = torch.zeros(len(index), dtype=torch.bool, device=rows.device)
    inserted[new_places] = True
    view_items = values[index]
    view_items[new_places] = most_similar[items[doubled]]
    lengths = torch.zeros_like(sequences.lengths).index_add_(0, rows, copies)
    return Views(view_items, lengths, sources[index], inserted)


class TiAugmenter(nn.Module):
    """Time-interval-aware augmentation of padded sequences, for any model and training loop.

    Args:
        most_similar: int64 `(num_items + 1,)`, the nearest item of each item (`ItemSimilarity.most_similar`).
        policy: Operators, ratios and modes.

    Example:
        >>> import torch
        >>> nearest = torch.tensor([0, 2, 1, 4, 3])
        >>> augment = TiAugmenter(nearest, ViewPolicy(short_ops="I", insert=0.4))
        >>> items, times = torch.tensor([[0, 1, 3, 4]]), torch.tensor([[0, 0, 9, 10]])
        >>> views, lengths = augment(items, times, torch.tensor([3]))
        >>> views.tolist(), lengths.tolist()
        ([[1, 2, 3, 4]], [4])
    """

    most_similar: Tensor

    def __init__(self, most_similar: Tensor, policy: ViewPolicy | None = None) -> None:
        super().__init__()
        self.policy = policy or ViewPolicy()
        self.register_buffer("most_similar", most_similar, persistent=False)

    def forward(
        self,
        item_ids: Tensor,
        timestamps: Tensor | None,
        lengths: Tensor,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One view of every row, cut to its last `width` items.

        Args:
            item_ids: int64 `(batch, width)`, left-padded with 0.
            timestamps: int64 `(batch, width)`, the items' times in seconds, left-padded; or `(batch, width + 1)` where
                the last column is the time of the item that follows. None will do for a policy with random positions.
            lengths: int64 `(batch,)`, items of each row.
            generator: Source of the random keys; torch's global one by default.

        Returns:
            Views `(batch, width)`, left-padded with 0, and their lengths `(batch,)`.

        Raises:
            ValueError: If shapes or dtypes do not agree, or times are missing.
        """
        batch, width = item_ids.shape
        if lengths.shape != (batch,) or bool((lengths > width).any()):
            raise ValueError(f"lengths must be {(batch,)} with values up to {width}, got {lengths.tolist()[:8]}")
        times = time_lengths = None
        if timestamps is not None:
            if timestamps.shape not in ((batch, width), (batch, width + 1)):
                raise ValueError(
                    f"timestamps must be {(batch, width)} or {(batch, width + 1)} for items {(batch, width)}, "
                    f"got {tuple(timestamps.shape)}"
                )
            if timestamps.is_floating_point():
                raise ValueError(f"timestamps must be whole seconds (int64), got {timestamps.dtype}")
            time_lengths = lengths + (timestamps.shape[1] - width)
            times = unpad_left(timestamps, time_lengths)
        sequences = describe(self.policy, unpad_left(item_ids, lengths), lengths, times, time_lengths)
        home = item_ids.device if generator is None else generator.device
        keys = torch.randint(torch.iinfo(torch.int64).max, (batch,), generator=generator, device=home)
        keys = keys.to(item_ids.device)
        operators = draw_operators(self.policy, lengths, keys)
        views = make_views(self.policy, sequences, operators, keys, self.most_similar)
        values, view_lengths = keep_last(views.item_ids, views.lengths, width)
        return pad_left(values, view_lengths, width), view_lengths
