"""What the pictures share: names of rows and columns, colours, numbers in cells."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from torch import Tensor

NAMED = 0.13
"""Least height of a row, in inches, that has room for a name."""

_LONGEST = 40


def block_of(layer: str) -> str:
    """The block that a layer belongs to: its name up to the first number, or its first module where it has none.

    Args:
        layer: A dotted name, such as "encoder.layers.3.mlp.fc1.weight" (which is in "encoder.layers.3").
    """
    parts = layer.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else parts[0]


def row_labels(layers: Sequence[str], row: float) -> tuple[list[str], list[float]]:
    """Labels of the rows and where they stand: of each row where there is room, else of each block."""
    if row >= NAMED:
        return _shortened(layers), [float(place) for place in range(len(layers))]
    starts = [0, *edges(layers)]
    ends = [*starts[1:], len(layers)]
    spans: list[tuple[int, int]] = []
    for start, end in zip(starts, ends, strict=True):
        # Neighbours that would be written over each other share a label.
        near = spans and (end - spans[-1][0]) / 2 * row < NAMED
        spans = [*spans[:-1], (spans[-1][0], end)] if near else [*spans, (start, end)]
    blocks = _shortened([block_of(layer) for layer in layers])
    labels = []
    for start, end in spans:
        inside = list(dict.fromkeys(blocks[start:end]))
        labels.append(", ".join(inside) if len(inside) <= 2 else f"{inside[0]} … {inside[-1]}")
    return labels, [(start + end - 1) / 2 for start, end in spans]


def edges(layers: Sequence[str]) -> list[int]:
    """Rows at which another block begins."""
    blocks = [block_of(layer) for layer in layers]
    return [place for place in range(1, len(blocks)) if blocks[place] != blocks[place - 1]]


def _shortened(names: Sequence[str]) -> list[str]:
    """Names from the list that a numbered block lies in, and without the middle of what is still long."""
    short = []
    for name in names:
        parts = name.split(".")
        number = next((place for place, part in enumerate(parts) if part.isdigit()), 1)
        short.append(".".join(parts[max(number - 1, 0) :]))
    if len(set(short)) < len(set(names)):
        short = list(names)
    half = (_LONGEST - 1) // 2
    cut = [name if len(name) <= _LONGEST else f"{name[:half]}…{name[-half:]}" for name in short]
    return cut if len(set(cut)) == len(set(names)) else short


def colour_scale(values: Tensor) -> tuple[Any, Any]:
    """Norm and colour map: from 0 to the largest, or red and blue about 0 where there are negative numbers."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize, TwoSlopeNorm

    known = values[~values.isnan()]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)
    if low < 0:
        far = max(-low, high)
        return TwoSlopeNorm(0.0, -far, far), colormaps["RdBu"].with_extremes(bad="0.8")
    return Normalize(0.0, high or 1.0), colormaps["viridis"].with_extremes(bad="0.8")


def write_numbers(axis: Axes, values: Tensor, image: Any) -> None:
    """Write the numbers `(rows, columns)` of an image into its cells, but for NaN."""
    for line, row in enumerate(values.tolist()):
        for column, value in enumerate(row):
            if not math.isnan(value):
                write(axis, image, (column, line), value, short_number(value))


def write(axis: Axes, image: Any, place: tuple[int, int], value: float, text: str, weight: str = "normal") -> None:
    """A number in a cell, in black or white, whichever stands out."""
    red, green, blue, _ = image.cmap(image.norm(value if not math.isnan(value) else 0.0))
    dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 and not math.isnan(value)
    colour = "white" if dark else "black"
    axis.text(*place, text, ha="center", va="center", fontsize=7, color=colour, fontweight=weight)


def short_number(value: float) -> str:
    """Two decimals without the leading zero, with a true minus sign."""
    text = f"{abs(value):.2f}"
    sign = "\N{MINUS SIGN}" if value < 0 and float(text) else ""
    return sign + (text[1:] if text.startswith("0") else text)


def name_columns(axis: Axes, names: Sequence[str], slanted: bool) -> None:
    """Put a name at each column, above or below as the axis has its ticks."""
    axis.set_xticks(range(len(names)), names, fontsize=8)
    if slanted:
        above = bool(axis.xaxis.get_ticks_position() == "top")
        axis.tick_params(axis="x", labelrotation=35)
        for label in axis.get_xticklabels():
            label.set(horizontalalignment="left" if above else "right", rotation_mode="anchor")


def palette(count: int) -> list[Any]:
    """That many colours that are told apart."""
    from matplotlib import colormaps

    if count <= 10:
        return [colormaps["tab10"](place) for place in range(count)]
    return [colormaps["turbo"](place / (count - 1)) for place in range(count)]
