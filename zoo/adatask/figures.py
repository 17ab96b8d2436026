"""Pictures of which task moves which layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LONGEST = 34
_MOST_HISTOGRAMS = 48
_ROW = 0.24
_COLUMN = 0.62


def mean_matrix(rows: Iterable[Mapping[str, Any]], tasks: Sequence[str]) -> tuple[list[list[float]], list[str]]:
    """Mean shares of `TaskDominance.table()` as layers x tasks, and the layers.

    Args:
        rows: Rows with `layer`, `task` and `mean`.
        tasks: Order of the columns; a task that does not reach a layer has NaN there.
    """
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        found.setdefault(row["layer"], {})[row["task"]] = row["mean"]
    return [[own.get(task, math.nan) for task in tasks] for own in found.values()], list(found)


def plot_dominance(
    means: Sequence[Sequence[float]], layers: Sequence[str], tasks: Sequence[str], title: str = "share of the updates"
) -> Figure:
    """Heat map of mean rAU, layers x tasks, the layers in the order of the module's parameters; white is balance.

    Args:
        means: A row per layer, a number or NaN per task.
        layers: Names of the rows.
        tasks: Names of the columns.
        title: Above the picture.

    Raises:
        ValueError: If the sizes do not fit.
    """
    return _heat_maps([means], layers, tasks, [title])


def plot_balance_comparison(
    left: Sequence[Sequence[float]],
    right: Sequence[Sequence[float]],
    layers: Sequence[str],
    tasks: Sequence[str],
    titles: Sequence[str] = ("Adam", "AdaTask"),
) -> Figure:
    """Two heat maps of mean rAU side by side (see `plot_dominance`).

    Args:
        left: A row per layer, a number or NaN per task.
        right: The same of another run.
        layers: Names of the rows.
        tasks: Names of the columns.
        titles: Above the two.

    Raises:
        ValueError: If the sizes do not fit.
    """
    return _heat_maps([left, right], layers, tasks, titles)


def plot_histograms(
    histograms: Mapping[str, Sequence[int]],
    num_tasks: int,
    first_task: str = "task 1",
    title: str = "shares in the updates of each weight, dashed: balance",
) -> Figure:
    """Small histograms of rAU in [0, 1], one per layer, the first layer first; of many layers evenly spaced ones.

    Args:
        histograms: Elements per bin by layer (see `TaskDominance.histograms`).
        num_tasks: Number of tasks; a dashed line shows balance.
        first_task: Whose share is counted, of two tasks; of more it is the largest share.
        title: Above the picture.

    Raises:
        ValueError: If there is no layer.
    """
    from matplotlib.figure import Figure

    if not histograms:
        raise ValueError("there is no layer to draw")
    layers = list(histograms)
    if len(layers) > _MOST_HISTOGRAMS:
        step = (len(layers) - 1) / (_MOST_HISTOGRAMS - 1)
        layers = [layers[round(i * step)] for i in range(_MOST_HISTOGRAMS)]
    names = dict(zip(layers, _shortened(layers, 28), strict=True))
    columns = min(len(layers), 4 if len(layers) <= 16 else 6)
    lines = math.ceil(len(layers) / columns)
    width = max(1.9 * columns, 4.0)
    figure = Figure(figsize=(width, 1.35 * lines + 0.7), layout="constrained")
    grid: Any = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    axes = list(grid.flat)
    for axis, layer in zip(axes, layers, strict=False):
        counts = histograms[layer]
        total = max(sum(counts), 1)
        places = [i / len(counts) for i in range(len(counts))]
        axis.bar(places, [count / total for count in counts], 1 / len(counts), align="edge", color="tab:blue")
        axis.axvline(1 / num_tasks, color="0.3", linestyle="--", linewidth=0.8)
        axis.set_title(names[layer], fontsize=7)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    for place in range(len(layers), len(axes)):
        axes[place].set_visible(False)
        # The numbers of a column stand below its last histogram.
        axes[place - columns].tick_params(labelbottom=True)
    axes[0].set_xlim(0, 1)
    axes[0].set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    counted = f"share of {first_task}" if num_tasks == 2 else "largest share of a task"
    figure.supxlabel(counted, fontsize=8)
    figure.supylabel("part of the weights", fontsize=8)
    left_out = "" if len(layers) == len(histograms) else f"\n({len(layers)} of {len(histograms)} layers)"
    figure.suptitle(title + left_out, fontsize=9)
    return figure


def _heat_maps(
    matrices: Sequence[Sequence[Sequence[float]]], layers: Sequence[str], tasks: Sequence[str], titles: Sequence[str]
) -> Figure:
    from matplotlib import colormaps
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    for means in matrices:
        if len(means) != len(layers) or any(len(row) != len(tasks) for row in means) or not layers or not tasks:
            sizes = sorted({len(row) for row in means})
            raise ValueError(
                f"expected means of {len(layers)} layers x {len(tasks)} tasks, got {len(means)} rows of {sizes}"
            )
    if len(titles) != len(matrices):
        raise ValueError(f"expected {len(matrices)} titles, got {len(titles)}")
    names, columns = _shortened(layers), _shortened(tasks, 16)
    balance = 1 / len(tasks) if len(tasks) > 1 else 0.5
    norm, colours = TwoSlopeNorm(vmin=0.0, vcenter=balance, vmax=1.0), colormaps["RdBu_r"].with_extremes(bad="0.85")
    margin = 0.075 * max(len(name) for name in names) + 0.9
    width = margin + len(matrices) * (max(_COLUMN * len(tasks), 1.5) + 0.15)
    # Long names of tasks are slanted.
    slanted = max(len(name) for name in columns) > 8
    height = _ROW * len(layers) + 0.9 + (0.5 if slanted else 0.0)
    figure = Figure(figsize=(width, max(height, 1.8)), layout="constrained")
    axes: Any = figure.subplots(1, len(matrices), squeeze=False, sharey=True)[0]
    for axis, means, title in zip(axes, matrices, titles, strict=True):
        image = axis.imshow(means, norm=norm, cmap=colours, aspect="auto", interpolation="nearest")
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(len(tasks)), columns, fontsize=8)
        if slanted:
            axis.tick_params(axis="x", labelrotation=35)
            for label in axis.get_xticklabels():
                label.set_horizontalalignment("right")
                label.set_rotation_mode("anchor")
        axis.set_yticks(range(len(layers)), names, fontsize=7)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        _write_numbers(axis, means, balance)
    bar = figure.colorbar(image, ax=list(axes), fraction=0.06, pad=0.02, aspect=max(8, min(30, 2 * len(layers))))
    bar.set_ticks([0, balance, 1], labels=["0", f"1/{len(tasks)}", "1"])
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    return figure


def _write_numbers(axis: Axes, means: Sequence[Sequence[float]], balance: float) -> None:
    for line, row in enumerate(means):
        for column, value in enumerate(row):
            if math.isnan(value):
                continue
            far = (value - balance) / (1 - balance) if value > balance else (balance - value) / balance
            text = f"{value:.2f}" if value >= 0.005 or value == 0 else "<.01"
            colour = "white" if far > 0.6 else "black"
            axis.text(column, line, text, ha="center", va="center", fontsize=7, color=colour)


def _shortened(names: Sequence[str], longest: int = _LONGEST) -> list[str]:
    """Names without the modules that all of them lie in, and without the middle of what is still long."""
    parts = [name.split(".") for name in names]
    common = 0
    if len(names) > 1:
        while all(len(part) > common + 1 for part in parts) and len({part[common] for part in parts}) == 1:
            common += 1
    # A number says little without the name of what it counts.
    if common and any(part[common].isdigit() for part in parts):
        whole = [".".join(part[common - 1 :]) for part in parts]
        if max(map(len, whole)) <= longest:
            return whole
    short = [".".join(part[common:]) for part in parts]
    half = (longest - 1) // 2
    cut = [name if len(name) <= longest else f"{name[:half]}…{name[-half:]}" for name in short]
    return cut if len(set(cut)) == len(set(short)) else short
