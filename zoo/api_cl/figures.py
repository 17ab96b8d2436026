"""Pictures of a stream of services: accuracies, generated images, queries and training curves."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.api_cl.continual_metrics import ContinualMetrics
from zoo.api_cl.ledger import PURPOSES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NUMBERED = 12
_NOISY = 100
_SHOWN, _ACROSS = 16, 8
_NAMES = {
    "gen_base": "generators, base points",
    "gen_dirs": "generators, directions",
    "student": "CL model",
    "real": "real images",
    "probe": "probe",
}


def plot_accuracy_matrices(
    matrices: Mapping[str, Tensor | Sequence[Sequence[float]]],
    task_names: Sequence[str] | None = None,
    title: str = "accuracy over the stream",
) -> Figure:
    """A heat map for each scenario: a row after each task, a column for the accuracy on each.

    Tasks that had not come yet are faint and unknown accuracies grey. Below stand the mean accuracy and the backward
    transfer after the last task whose row is known.

    Args:
        matrices: R, `(T, T)`, by name, such as "task-incremental"; fractions, NaN where unknown.
        task_names: T names; "task 0" and so on without.
        title: Above the picture.

    Raises:
        ValueError: If there is no matrix, or sizes do not fit.
    """
    from matplotlib.figure import Figure

    if not matrices:
        raise ValueError("there is no accuracy matrix to draw")
    values = {name: torch.as_tensor(matrix, dtype=torch.float64).detach().cpu() for name, matrix in matrices.items()}
    tasks = len(next(iter(values.values())))
    names = list(task_names) if task_names is not None else [f"task {task}" for task in range(tasks)]
    for name, matrix in values.items():
        if matrix.shape != (len(names), len(names)):
            raise ValueError(f"{name}: {len(names)} tasks need a square matrix of them, got {tuple(matrix.shape)}")
    # Cells with numbers need the room.
    side = max((0.46 if tasks <= _NUMBERED else 0.26) * tasks, 1.9)
    longest = 0.075 * max(map(len, names))
    figure = Figure(figsize=((side + 0.5) * len(values) + longest + 1.2, side + longest + 1.6), layout="constrained")
    axes: Any = figure.subplots(1, len(values), squeeze=False, sharey=True)[0]
    image: Any = None
    for axis, (name, matrix) in zip(axes, values.items(), strict=True):
        image = _draw_matrix(axis, matrix, names)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel(_summary(matrix), fontsize=8)
    axes[0].set_yticks(range(tasks), [f"after {name}" for name in names], fontsize=7)
    bar = figure.colorbar(image, ax=list(axes), fraction=0.05, pad=0.02, aspect=20, shrink=0.75)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    figure.suptitle(title, fontsize=10)
    return figure


def plot_generated(
    images: Mapping[tuple[int, str], Tensor],
    task_names: Sequence[str] | None = None,
    title: str = "generated images",
) -> Figure:
    """Samples of each generator (columns) for each task (rows); the first 16 images of each.

    Args:
        images: `(n, c, h, w)` in [-1, 1], by task and generator, such as `(0, "A")`; c is 1 or 3.
        task_names: Names by task; "task 0" and so on without.
        title: Above the picture.

    Raises:
        ValueError: If there is no image, or images are not of one of these shapes.
    """
    from matplotlib.figure import Figure

    images = {key: batch for key, batch in images.items() if len(batch)}
    if not images:
        raise ValueError("there is no generated image to draw")
    for (task, name), batch in images.items():
        if batch.ndim != 4 or batch.shape[1] not in (1, 3):
            raise ValueError(f"task {task}, generator {name}: expected (n, 1 or 3, h, w), got {tuple(batch.shape)}")
    tasks, generators = sorted({task for task, _ in images}), sorted({name for _, name in images})
    mosaics = {key: _mosaic(batch) for key, batch in images.items()}
    height, width = (max(mosaic.shape[place] for mosaic in mosaics.values()) for place in (0, 1))
    across = 2.9
    down = across * height / width
    figure = Figure(figsize=(across * len(generators) + 0.6, (down + 0.12) * len(tasks) + 0.7), layout="constrained")
    axes: Any = figure.subplots(len(tasks), len(generators), squeeze=False)
    for row, task in zip(axes, tasks, strict=True):
        for axis, name in zip(row, generators, strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
            if (task, name) in mosaics:
                axis.imshow(mosaics[task, name].numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            if task == tasks[0]:
                axis.set_title(f"generator {name}", fontsize=9)
        row[0].set_ylabel(task_names[task] if task_names is not None else f"task {task}", fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def plot_queries(rows: Sequence[Mapping[str, int | float | str]], title: str = "queries") -> Figure:
    """A bar of the rows that each service answered, stacked by purpose, with their sum.

    Args:
        rows: What `QueryLedger.summary` returns.
        title: Above the picture.

    Raises:
        ValueError: If there is no service.
    """
    from matplotlib.figure import Figure

    if not rows:
        raise ValueError("there is no service whose queries could be drawn")
    names = [str(row["api"]) for row in rows]
    purposes = [purpose for purpose in PURPOSES if any(float(row.get(purpose, 0)) for row in rows)]
    # Room for the names, the bars, and the numbers behind them.
    width = 5.2 + 0.07 * max(map(len, names))
    figure = Figure(figsize=(width, 0.32 * len(rows) + 1.5), layout="constrained")
    axis: Axes = figure.subplots()
    starts = [0.0] * len(rows)
    for place, purpose in enumerate(purposes):
        lengths = [float(row.get(purpose, 0)) for row in rows]
        colour = f"C{PURPOSES.index(purpose)}"
        axis.barh(range(len(rows)), lengths, left=starts, height=0.7, color=colour, label=_NAMES[purpose], zorder=place)
        starts = [start + length for start, length in zip(starts, lengths, strict=True)]
    for place, total in enumerate(starts):
        axis.annotate(f"{total:,.0f}", (total, place), (3, 0), textcoords="offset points", va="center", fontsize=7)
    axis.set_yticks(range(len(rows)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, max(*starts, 1.0) * 1.16)
    axis.set_xlabel(f"rows answered; {sum(starts):,.0f} in all", fontsize=8)
    axis.locator_params("x", nbins=5, integer=True)
    axis.xaxis.set_major_formatter(_thousands)
    _plain(axis)
    axis.tick_params(axis="y", length=0)
    if purposes:
        figure.legend(loc="outside lower center", ncols=min(3, len(purposes)), fontsize=7, frameon=False)
    figure.suptitle(title, fontsize=10)
    return figure


def plot_curves(
    history: Mapping[str, Sequence[float]],
    task_starts: Sequence[int] = (),
    title: str = "training",
) -> Figure:
    """A small panel for each quantity over the iterations, with a line where each task begins.

    Long noisy curves are drawn faint below their running mean, which begins anew with each task.

    Args:
        history: A value for each iteration by name, such as "gap"; NaN where there is none.
        task_starts: The iterations at which the tasks begin.
        title: Above the picture.

    Raises:
        ValueError: If there is no curve.
    """
    from matplotlib.figure import Figure

    curves = {name: [float(value) for value in values] for name, values in history.items()}
    curves = {name: values for name, values in curves.items() if any(map(math.isfinite, values))}
    if not curves:
        raise ValueError(f"there is no curve to draw: the history of {list(history)} holds no values")
    across = min(3, len(curves))
    down = -(-len(curves) // across)
    figure = Figure(figsize=(3.1 * across + 0.3, 1.9 * down + 0.6), layout="constrained")
    axes: Any = figure.subplots(down, across, squeeze=False, sharex=True).ravel()
    for axis, (name, values) in zip(axes, curves.items(), strict=False):
        _draw_curve(axis, values, task_starts)
        axis.set_title(name, fontsize=9)
        _plain(axis)
    for place, axis in enumerate(axes):
        axis.set_visible(place < len(curves))
        # The lowest panel of a column carries the axis: the last row may be shorter than the others.
        lowest = place + across >= len(curves)
        axis.tick_params(labelbottom=lowest)
        if lowest:
            axis.set_xlabel("iteration", fontsize=8)
            axis.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title, fontsize=10)
    return figure


def _draw_matrix(axis: Axes, matrix: Tensor, names: Sequence[str]) -> Any:
    from matplotlib import colormaps

    colours = colormaps["YlGnBu"].with_extremes(bad="0.85")
    tasks = len(names)
    ahead = torch.ones_like(matrix).triu(1).bool()
    opacity = torch.where(ahead & ~matrix.isnan(), 0.25, 1.0)
    shown = matrix.numpy()
    image = axis.imshow(shown, cmap=colours, vmin=0, vmax=1, alpha=opacity.numpy(), interpolation="nearest")
    if tasks <= _NUMBERED:
        for k in range(tasks):
            for j in range(tasks):
                value = float(matrix[k, j])
                if math.isfinite(value):
                    colour = "0.45" if j > k else "white" if value > 0.6 else "black"
                    axis.text(j, k, _short(value), ha="center", va="center", fontsize=7, color=colour)
    slanted = max(map(len, names)) > 6
    axis.set_xticks(range(tasks), names, fontsize=7, rotation=40 if slanted else 0, ha="right" if slanted else "center")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return image


def _summary(matrix: Tensor) -> str:
    metrics = ContinualMetrics(len(matrix))
    for k, row in enumerate(matrix):
        metrics.add_row(k, row)
    known = [k for k in range(len(matrix)) if math.isfinite(metrics.acc(k))]
    if not known:
        return ""
    transfer = metrics.bwt(known[-1])
    return f"ACC {_short(metrics.acc(known[-1]))}" + (f"   BWT {_short(transfer)}" if math.isfinite(transfer) else "")


def _mosaic(images: Tensor) -> Tensor:
    """Images side by side with a white line between them, `(H, W)` or `(H, W, 3)` in [0, 1]."""
    images = images[:_SHOWN].detach().float().cpu().clamp(-1, 1) / 2 + 0.5
    gap = max(1, images.shape[-1] // 16)
    framed = torch.nn.functional.pad(images, (0, gap, 0, gap), value=1.0)
    lines = [torch.cat(list(framed[start : start + _ACROSS]), -1) for start in range(0, len(framed), _ACROSS)]
    width = max(line.shape[-1] for line in lines)
    whole = torch.cat([torch.nn.functional.pad(line, (0, width - line.shape[-1]), value=1.0) for line in lines], -2)
    return whole[0] if len(whole) == 1 else whole.permute(1, 2, 0)


def _draw_curve(axis: Axes, values: Sequence[float], task_starts: Sequence[int]) -> None:
    for start in task_starts:
        axis.axvline(start, color="0.8", linewidth=0.8, zorder=0)
    noisy = len(values) >= _NOISY
    axis.plot(range(len(values)), values, color="C0", linewidth=0.8 if noisy else 1.3, alpha=0.3 if noisy else 1.0)
    if noisy:
        bounds = sorted({0, *(start for start in task_starts if 0 < start < len(values)), len(values)})
        window = max(5, len(values) // 50)
        for start, end in pairwise(bounds):
            axis.plot(range(start, end), _running_mean(values[start:end], window), color="C0", linewidth=1.5)


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of up to `window` values about each, of those that are finite; NaN where there is none."""
    series = torch.tensor(values, dtype=torch.float64)
    finite = series.isfinite()
    kernel = torch.ones(1, 1, 2 * (window // 2) + 1, dtype=torch.float64)
    stacked = torch.stack([series.nan_to_num(0, 0, 0), finite.double()]).unsqueeze(1)
    total, count = torch.nn.functional.conv1d(stacked, kernel, padding=window // 2).squeeze(1)
    return torch.where(finite, total / count, math.nan).tolist()


def _thousands(value: float, _: object) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _short(value: float) -> str:
    """A fraction in two decimals without its leading zero."""
    return f"{value:.2f}".replace("-0.00", "0.00").replace("0.", ".", 1).replace("-", "\N{MINUS SIGN}")


def _plain(axis: Axes) -> None:
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
