"""Pictures of dialogue: how emotions follow each other, where attention goes, what the gate lets through."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.figure import Figure
    from torch import Tensor

_COLOUR = "#33638d"


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def draw_transitions(counts: Mapping[str, Tensor], names: Sequence[str]) -> Figure:
    """Share of each reply's emotion after each post's: a matrix for each of several sources of replies.

    Args:
        counts: By title, counts `(emotions, emotions)` of post (row) and reply (column).
        names: Names of the emotions.
    """
    side = 1.4 + 0.55 * len(names)
    figure, axes = _figure(1, len(counts), side * len(counts) + 0.6, side)
    for axis, (title, matrix) in zip(axes[0], counts.items(), strict=True):
        shares = (matrix / matrix.sum(1, keepdim=True).clamp(min=1)).tolist()
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for row, values in enumerate(shares):
            for column, value in enumerate(values):
                axis.text(
                    column, row, f"{value:.2f}"[1:] if value < 0.995 else "1", ha="center", va="center", fontsize=7,
                    color="white" if value > 0.55 else "black",
                )  # fmt: skip
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("emotion of the reply")
    axes[0][0].set_ylabel("emotion of the post")
    return figure


def draw_gates(values: Tensor, bins: int = 40) -> Figure:
    """Histogram of the fusion gate: 0 lets only the emotional reading through, 1 only the semantic one.

    Args:
        values: Gates of any shape.
        bins: Number of bins over [0, 1].
    """
    figure, axes = _figure(1, 1, 5.2, 3.2)
    axis = axes[0][0]
    axis.hist(values.flatten().tolist(), bins=bins, range=(0, 1), color=_COLOUR, density=True)
    axis.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    axis.set_xlim(0, 1)
    axis.set_xlabel("fusion gate (0: emotion alone, 1: meaning alone)")
    axis.set_ylabel("density")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def draw_attention(maps: Mapping[str, Tensor], post: Sequence[str], reply: Sequence[str]) -> Figure:
    """Attention of a reply's words over the post's, a map for each of several settings.

    Args:
        maps: By title, weights `(reply words, post words)`.
        post: Words of the post.
        reply: Words of the reply.
    """
    width, height = 1.4 + 0.36 * len(post), 1.4 + 0.3 * len(reply)
    figure, axes = _figure(1, len(maps), width * len(maps), height)
    highest = max(float(weights.max()) for weights in maps.values())
    for axis, (title, weights) in zip(axes[0], maps.items(), strict=True):
        axis.imshow(weights.tolist(), cmap="Blues", vmin=0, vmax=highest, aspect="auto")
        axis.set_xticks(range(len(post)), post, rotation=60, ha="right", fontsize=8)
        axis.set_yticks(range(len(reply)), reply, fontsize=8)
        axis.set_title(title, fontsize=10)
    return figure
