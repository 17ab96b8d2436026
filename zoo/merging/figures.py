"""Pictures of merging coefficients, adaptation, representation bias and accuracies."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.merging.drawing import (
    colour_scale,
    edges,
    name_columns,
    palette,
    row_labels,
    short_number,
    write,
    write_numbers,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HIGHEST = 9.5
_ROW, _NUMBERED, _THINNEST = 0.24, 0.2, 0.024
_NOISY, _MARKED = 60, 25
_NEW, _OLD = "tab:blue", "0.72"
_PANELS = {"acc": "accuracy", "entropy": "entropy in nats"}


def plot_coefficients(
    coef: Tensor | Sequence[Sequence[float]],
    layer_names: Sequence[str],
    task_names: Sequence[str],
    title: str = "merging coefficients",
) -> Figure:
    """Heat map of merging coefficients, the first layer uppermost, below the mean of each task.

    Up to about 70 layers are named one by one, more of them by block. Colours begin at 0, and are red and blue about
    0 if a coefficient is negative; what is not finite is grey.

    Args:
        coef: Coefficients, `(layers, tasks)`.
        layer_names: Names of the rows.
        task_names: Names of the columns.
        title: Above the picture.

    Raises:
        ValueError: If the sizes do not fit.
    """
    from matplotlib.figure import Figure

    values = _matrix(coef, layer_names, task_names)
    row = min(_ROW, max(_HIGHEST / len(layer_names), _THINNEST))
    height = max(row * len(layer_names), 0.4)
    names, ticks = row_labels(layer_names, row)
    slanted = max(map(len, task_names)) > 6
    column = 0.46 if row >= _NUMBERED or not slanted else 0.4
    width = max(column * len(task_names), 1.6) + 0.07 * max(map(len, names)) + 1.1
    figure = Figure(figsize=(width, height + (2.3 if slanted else 1.9)), layout="constrained")
    bars, axis = figure.subplots(2, 1, sharex=True, height_ratios=[0.9, height])
    norm, colours = colour_scale(values)
    image = axis.imshow(values.numpy(), norm=norm, cmap=colours, aspect="auto", interpolation="nearest")
    axis.set_yticks(ticks, names, fontsize=7)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    # The names of the tasks stand between the bars and the map, and again below a map that is long.
    axis.tick_params(labelbottom=height > 4)
    bars.tick_params(labelbottom=True, length=0)
    for panel in (bars, axis):
        name_columns(panel, task_names, slanted)
    borders = edges(layer_names)
    # Where each row is a block of its own, lines would hide what is between them.
    for border in borders if 2 * len(borders) < len(layer_names) else []:
        axis.axhline(border - 0.5, color="0.2" if values.nan_to_num().amin() < 0 else "white", linewidth=0.8)
    if row >= _NUMBERED:
        write_numbers(axis, values, image)
    _draw_means(bars, values)
    bars.set_title(title, fontsize=9)
    bar = figure.colorbar(
        image, ax=axis, fraction=0.08, pad=0.02, aspect=18, shrink=min(1.0, 3 / height), anchor=(0, 1)
    )
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    return figure


def plot_adaptation(
    history: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], title: str = "test-time adaptation"
) -> Figure:
    """Curves by task over the steps, a panel for each quantity; black is the mean over the tasks.

    Long noisy curves are drawn faint below their running mean.

    Args:
        history: Pairs (step, value) by quantity, such as "entropy" and "acc", and task.
        title: Above the picture.

    Raises:
        ValueError: If there is no curve.
    """
    from matplotlib.figure import Figure

    panels = {name: {task: sorted(points) for task, points in own.items() if points} for name, own in history.items()}
    panels = {name: own for name, own in panels.items() if own}
    if not panels:
        raise ValueError(f"there is no curve to draw: the history of {list(history)} holds no points")
    tasks = list(dict.fromkeys(task for own in panels.values() for task in own))
    colours = dict(zip(tasks, palette(len(tasks)), strict=True))
    figure = Figure(figsize=(3.7 * len(panels) + 1.5, 3.1), layout="constrained")
    axes: Any = figure.subplots(1, len(panels), squeeze=False)[0]
    lines: dict[str, Any] = {}
    for axis, (name, own) in zip(axes, panels.items(), strict=True):
        for task in own:
            lines[task] = _draw_curve(axis, own[task], color=colours[task], linewidth=1.3)
        mean = _mean_curve(list(own.values()))
        if mean and len(own) > 1:
            lines["mean"] = _draw_curve(axis, mean, color="black", linewidth=2.0)
        axis.set_title(_PANELS.get(name, name), fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.xaxis.get_major_locator().set_params(integer=True)
        _plain_axis(axis)
    order = [name for name in (*tasks, "mean") if name in lines]
    figure.legend([lines[name] for name in order], order, loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    return figure


def plot_bias(
    before: Mapping[str, float],
    after: Mapping[str, float],
    labels: tuple[str, str] = ("before", "after"),
    title: str = "representation bias",
) -> Figure:
    """Bars of the mean absolute difference from the experts' features, with the change in per cent (arXiv 2402.02705).

    Args:
        before: L1 distance by task.
        after: The same of the same tasks, such as with surgery.
        labels: Names of the two.
        title: Above the picture.

    Raises:
        ValueError: If the two have different tasks.
    """
    from matplotlib.figure import Figure

    if set(before) != set(after) or not before:
        raise ValueError(f"expected the same tasks before and after, got {list(before)} and {list(after)}")
    groups = {task: (float(before[task]), float(after[task])) for task in before}
    if len(groups) > 1:
        groups["mean"] = (_average(old for old, _ in groups.values()), _average(new for _, new in groups.values()))
    figure = Figure(figsize=(max(0.78 * len(groups) + 0.9, 3.2), 3.1), layout="constrained")
    axis = figure.subplots()
    for side, (label, colour) in enumerate(zip(labels, (_OLD, _NEW), strict=True)):
        places = [place + (side - 0.5) * 0.38 for place in range(len(groups))]
        axis.bar(places, [pair[side] for pair in groups.values()], 0.36, color=colour, label=label)
    for place, (old, new) in enumerate(groups.values()):
        if old > 0 and math.isfinite(new / old):
            change = round(100 * (new / old - 1))
            text = f"{change:+d} %".replace("-", "\N{MINUS SIGN}") if change else "0 %"
            axis.annotate(
                text, (place, max(old, new)), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=8
            )
    if len(groups) > 1:
        axis.axvline(len(groups) - 1.5, color="0.8", linewidth=0.8)
    name_columns(axis, list(groups), max(map(len, groups)) > 9)
    axis.set_ylabel("mean |difference| per dimension", fontsize=8)
    axis.margins(y=0.12)
    _plain_axis(axis)
    axis.tick_params(axis="x", length=0)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    axis.set_title(title, fontsize=9)
    return figure


def plot_accuracy_table(rows: Mapping[str, Mapping[str, float]], title: str = "accuracy in per cent") -> Figure:
    """Heat table of accuracies, methods x tasks, with their mean; the best of each column is bold.

    Args:
        rows: Accuracies from 0 to 1 by method and task. A task that a method lacks has a dash, and its mean too.
        title: Above the picture.

    Raises:
        ValueError: If there is nothing to show, or an accuracy is not from 0 to 1.
    """
    from matplotlib import colormaps
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(task for own in rows.values() for task in own))
    if not tasks:
        raise ValueError(f"there is no accuracy to show of {list(rows)}")
    for method, own in rows.items():
        _check_accuracies(method, own)
    table = [[100 * own.get(task, math.nan) for task in tasks] for own in rows.values()]
    columns = [*tasks, "mean"] if len(tasks) > 1 else tasks
    if len(tasks) > 1:
        table = [[*line, _average(line)] for line in table]
    values = torch.tensor(table, dtype=torch.float64)
    slanted = max(map(len, tasks)) > 7
    width = 0.58 * len(columns) + 0.075 * max(map(len, rows)) + 1.1
    figure = Figure(figsize=(width, 0.27 * len(rows) + (1.1 if slanted else 0.8)), layout="constrained")
    axis = figure.subplots()
    colours = colormaps["YlGn"].with_extremes(bad="0.93")
    norm = Normalize(min(float(values.nan_to_num(100).min()), 90.0), 100)
    image = axis.imshow(values.numpy(), cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    best = torch.where(values.isnan(), -1.0, values).round(decimals=1).amax(0)
    for line, row in enumerate(values.tolist()):
        for column, value in enumerate(row):
            weight = "bold" if round(value, 1) == best[column] and len(rows) > 1 else "normal"
            text = "\N{EN DASH}" if math.isnan(value) else f"{value:.1f}"
            write(axis, image, (column, line), value, text, weight)
    axis.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.xaxis.tick_top()
    name_columns(axis, columns, slanted)
    if len(tasks) > 1:
        axis.axvline(len(tasks) - 0.5, color="white", linewidth=4)
    axis.set_title(title, fontsize=9)
    return figure


def plot_surgery_gain(
    bases: Mapping[str, tuple[float, float]],
    individual: float | None = None,
    title: str = "mean accuracy without and with surgery",
) -> Figure:
    """Dots of each base's accuracy without and with surgery, the gain in points between them.

    Args:
        bases: Accuracies from 0 to 1 of a base alone and repaired.
        individual: That of the individual experts, a dashed line.
        title: Above the picture.

    Raises:
        ValueError: If there is no base, or an accuracy is not from 0 to 1.
    """
    from matplotlib.figure import Figure

    if not bases:
        raise ValueError("there is no base to show")
    for base, (alone, repaired) in bases.items():
        _check_accuracies(base, {"alone": alone, "repaired": repaired})
    figure = Figure(figsize=(5.2, 0.42 * len(bases) + 1.4), layout="constrained")
    axis = figure.subplots()
    pairs = [(100 * alone, 100 * repaired) for alone, repaired in bases.values()]
    places = range(len(pairs))
    axis.hlines(
        places, [min(pair) for pair in pairs], [max(pair) for pair in pairs], color="0.8", linewidth=3, zorder=1
    )
    for side, (label, colour) in enumerate((("alone", "0.5"), ("with surgery", _NEW))):
        axis.scatter([pair[side] for pair in pairs], places, color=colour, label=label, s=36, zorder=2)
    for place, (alone, repaired) in enumerate(pairs):
        text = f"{repaired - alone:+.1f}".replace("-", "\N{MINUS SIGN}")
        axis.annotate(
            text,
            ((alone + repaired) / 2, place),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8,
        )
    if individual is not None:
        axis.axvline(100 * individual, color="0.3", linestyle="--", linewidth=1, label="individual")
    axis.set_yticks(places, list(bases), fontsize=8)
    axis.set_ylim(len(pairs) - 0.5, -0.7)
    axis.margins(x=0.08)
    axis.set_xlabel("mean accuracy in per cent", fontsize=8)
    _plain_axis(axis)
    axis.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    axis.set_title(title, fontsize=9)
    return figure


def _matrix(coef: Tensor | Sequence[Sequence[float]], layers: Sequence[str], tasks: Sequence[str]) -> Tensor:
    values = torch.as_tensor(coef).detach().double().cpu()
    if tuple(values.shape) != (len(layers), len(tasks)) or not values.numel():
        hint = ": pass its transpose" if tuple(values.shape) == (len(tasks), len(layers)) else ""
        raise ValueError(
            f"expected coefficients of {len(layers)} layers x {len(tasks)} tasks, got the shape "
            f"{tuple(values.shape)}{hint}"
        )
    return torch.where(values.isfinite(), values, math.nan)


def _draw_means(axis: Axes, values: Tensor) -> None:
    means = [_average(value for value in column if not math.isnan(value)) for column in values.T.tolist()]
    axis.bar(range(len(means)), means, 0.7, color=_OLD)
    for place, mean in enumerate(means):
        offset, vertical = ((0, 1), "bottom") if not mean < 0 else ((0, -1), "top")
        text = "" if math.isnan(mean) else short_number(mean)
        axis.annotate(
            text, (place, mean), xytext=offset, textcoords="offset points", ha="center", va=vertical, fontsize=7
        )
    axis.set_ylabel("mean", fontsize=7)
    axis.set_yticks([])
    axis.margins(y=0.25)
    axis.axhline(0, color="0.3", linewidth=0.8)
    axis.spines[:].set_visible(False)


def _plain_axis(axis: Axes) -> None:
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_curve(axis: Axes, points: Sequence[tuple[int, float]], **style: Any) -> Any:
    """Draw a curve and return the line that stands for it in the legend."""
    steps, values = [step for step, _ in points], [value for _, value in points]
    if len(points) > _NOISY:
        axis.plot(steps, values, color=style["color"], linewidth=0.6, alpha=0.25)
        values = _running_mean(values, max(3, len(points) // 20))
    return axis.plot(steps, values, marker="o" if len(points) <= _MARKED else None, markersize=3, **style)[0]


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean over a window about each value, a shorter one at the ends."""
    half = width // 2
    return [_average(values[max(0, place - half) : place + half + 1]) for place in range(len(values))]


def _mean_curve(curves: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
    """The mean over the curves at the steps that all of them have."""
    known = [dict(curve) for curve in curves]
    steps = sorted(set(known[0]).intersection(*known[1:]))
    return [(step, _average(curve[step] for curve in known)) for step in steps]


def _average(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else math.nan


def _check_accuracies(name: str, accuracies: Mapping[str, float]) -> None:
    wrong = {task: value for task, value in accuracies.items() if value < 0 or value > 1}
    if wrong:
        task, value = next(iter(wrong.items()))
        raise ValueError(f"accuracy of {name!r}, {task!r} is {value}, expected 0 to 1: divide per cent by 100")
