"""The method's pictures: what the operators do to real sequences, and for whom the model ranks well."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.ticoserec.augment import CROP, INSERT, MASK, ORIGINAL, REORDER, SUBSTITUTE, Sequences, ViewPolicy, make_views
from zoo.ticoserec.jagged import row_and_position, row_starts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMES = {
    ORIGINAL: "original",
    SUBSTITUTE: "substitute",
    INSERT: "insert",
    MASK: "mask",
    REORDER: "reorder",
    CROP: "crop",
}
_DAY = 86_400.0


def view_times(sources: Tensor, inserted: Tensor, times: Tensor, gaps: Tensor) -> Tensor:
    """Time of each item of a batch of views, float64 `(items,)`.

    Args:
        sources: int64 `(items,)`, each item's source in the input batch.
        inserted: bool `(items,)`; an inserted item stands half way to its source's next neighbour.
        times: int64 `(source items,)`, seconds.
        gaps: int64 `(source items,)`, gap to the right of each source item in seconds.
    """
    return times[sources].double() + torch.where(inserted, gaps[sources] / 2, 0.0)


def gap_deviation(times: Tensor, lengths: Tensor) -> Tensor:
    """Population standard deviation of each row's gaps in seconds, float64 `(rows,)`; 0 without two gaps.

    Args:
        times: `(times,)`, seconds, row after row.
        lengths: int64 `(rows,)`.
    """
    rows, positions = row_and_position(lengths)
    inner = positions < lengths[rows] - 1
    here = (row_starts(lengths)[rows] + positions)[inner]
    gaps, owner = (times[here + 1] - times[here]).double(), rows[inner]
    count = (lengths - 1).clamp(min=1)
    zeros = torch.zeros(len(lengths), dtype=torch.float64)
    mean = zeros.index_add(0, owner, gaps) / count
    variance = zeros.index_add(0, owner, (gaps - mean[owner]).square()) / count
    return variance.sqrt()


def example_users(lengths: Tensor, exempt: Tensor, count: int = 3) -> Tensor:
    """Users whose sequences are long enough to show every operator and short enough to draw, int64 `(<= count,)`."""
    for low, high in ((8, 14), (4, 20)):
        fitting = ((lengths >= low) & (lengths <= high) & ~exempt).nonzero().squeeze(1)
        if len(fitting) >= count:
            return fitting[torch.linspace(0, len(fitting) - 1, count).long()]
    return fitting[:count]


def plot_views(
    policy: ViewPolicy, sequences: Sequences, times: Tensor, gaps: Tensor, most_similar: Tensor, labels: list[str]
) -> Figure:
    """Timelines of a few sequences under each operator.

    Args:
        policy: Ratios and modes.
        sequences: The rows to draw.
        times: int64 `(items,)`, seconds.
        gaps: int64 `(items,)`, gap to the right of each item in seconds.
        most_similar: int64 `(num_items + 1,)`.
        labels: Name of each row.
    """
    from matplotlib.figure import Figure

    count = len(sequences.lengths)
    figure = Figure(figsize=(4.2 * count, 3.0), layout="constrained")
    axes: Any = figure.subplots(1, count, squeeze=False)[0]
    keys = torch.arange(count) + 1
    starts = row_starts(sequences.lengths)
    for line, (operator, _name) in enumerate(_NAMES.items()):
        views = make_views(policy, sequences, torch.full((count,), operator), keys, most_similar)
        places = view_times(views.sources, views.inserted, times, gaps)
        changed = views.item_ids != sequences.item_ids[views.sources]
        for row, axis in enumerate(axes):
            mine = torch.repeat_interleave(views.lengths) == row
            days = ((places[mine] - times[starts[row]]) / _DAY).numpy()
            if operator == REORDER:
                # A reordered item takes the time of the place it moved to.
                first, length = int(starts[row]), int(sequences.lengths[row])
                days = ((times[first : first + length] - times[first]) / _DAY).numpy()
                altered = (views.sources[mine] != torch.arange(first, first + length)).numpy()
            else:
                altered = (changed | views.inserted)[mine].numpy()
            masked = (views.item_ids[mine] == 0).numpy()
            axis.plot(days, [-line] * len(days), "-", color="0.85", zorder=0)
            axis.scatter(days[~altered], [-line] * int((~altered).sum()), s=22, color="tab:blue")
            plain = altered & ~masked
            axis.scatter(days[plain], [-line] * int(plain.sum()), s=22, color="tab:orange")
            axis.scatter(days[masked], [-line] * int(masked.sum()), s=22, facecolors="white", edgecolors="tab:red")
    for row, axis in enumerate(axes):
        axis.set_title(labels[row], fontsize=9)
        axis.set_xlabel("days since the first item")
        axis.set_yticks(
            [-line for line in range(len(_NAMES))], list(_NAMES.values()) if row == 0 else [""] * len(_NAMES)
        )
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(left=False)
    figure.suptitle("views: orange = new, replaced or moved; hollow = masked", fontsize=9)
    return figure


def plot_uniformity(values: list[float], counts: list[int], metric: str) -> Figure:
    """Bars of a metric by how even the users' gaps are.

    Args:
        values: Mean metric of each group, most even users first.
        counts: Users of each group.
        metric: Name for the axis.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0, 3.0), layout="constrained")
    axis = figure.subplots()
    places = range(len(values))
    axis.bar(places, values, color="tab:blue")
    names = [f"{i + 1}\n({count})" for i, count in enumerate(counts)]
    axis.set_xticks(list(places), names)
    axis.set_xlabel("users from the most even to the most uneven gaps (number of users)")
    axis.set_ylabel(metric)
    axis.spines[["top", "right"]].set_visible(False)
    return figure
