"""The method's pictures: attention by level, likeness of items beside the truth, recommendations, and ablations."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BINS = 40
_BLUE, _LIGHT, _GREEN, _GREY = "#3b6ea8", "#a9c4e2", "#2e9e4f", "0.75"


class ItemCard(NamedTuple):
    """An item to show.

    Attributes:
        title: Its name.
        image: uint8 `(height, width, 3)`, if there is one.
    """

    title: str
    image: np.ndarray | None = None


class RecommendationRow(NamedTuple):
    """A user's recommendations.

    Attributes:
        user: Name of the user.
        history: Items of training to show.
        recommended: Items recommended, the best first.
        hits: Whether each recommended item is one of the held-out ones.
    """

    user: str
    history: Sequence[ItemCard]
    recommended: Sequence[ItemCard]
    hits: Sequence[bool]


def plot_attention(weights: Mapping[str, Tensor], names: Mapping[str, Sequence[str]]) -> Figure:
    """Distribution of the attention weights of each level, by input, with medians, on a scale of its own.

    Args:
        weights: `(rows, inputs)` by level, such as "text: content or ID", "modalities", "structure of users".
        names: Name of each input by level, such as ("content", "ID") or the modalities.

    Raises:
        ValueError: If there is no level or row, a level has no names or another number of them, or a weight lies
            outside [0, 1].
    """
    from matplotlib.figure import Figure

    if not weights:
        raise ValueError("there is no level of attention to draw")
    lines, columns = _grid(len(weights), 5)
    figure = Figure(figsize=(2.1 * columns + 0.5, 2.7 * lines + 0.4), layout="constrained")
    axes: Any = figure.subplots(lines, columns, squeeze=False)
    for axis, (level, found) in zip(axes.flat, weights.items(), strict=False):
        own, labels = found.detach().double().cpu(), names.get(level, ())
        if own.ndim != 2 or own.shape[1] != len(labels) or len(own) == 0:
            raise ValueError(f"level {level!r}: expected rows of a weight for each of {list(labels)}, got {own.shape}")
        if not bool(((own >= 0) & (own <= 1)).all()):
            raise ValueError(
                f"level {level!r}: weights must be in [0, 1], got {float(own.min())} to {float(own.max())}"
            )
        _draw_weights(axis, own.numpy(), labels)
        axis.set_title(f"{level}\n{len(own):,} rows", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("attention weight", fontsize=8)
    _hide(axes, len(weights))
    figure.suptitle("weights of attention (line: median; dotted: all inputs alike; scales differ)", fontsize=10)
    return figure


def plot_similarity(matrices: Mapping[str, Tensor], groups: Tensor) -> Figure:
    """Matrices over the same items side by side, the items sorted by user, with a line where the user changes.

    Colours go from 0 (white; values below too) to the largest of each matrix off its diagonal, which its title tells.

    Args:
        matrices: `(items, items)` by name, such as the truth, the IDs of each modality, and content.
        groups: int64 `(items,)`, the user of each item.

    Raises:
        ValueError: If there is no matrix or item, or a shape does not fit.
    """
    from matplotlib.figure import Figure

    number = len(groups)
    if not matrices or number == 0:
        raise ValueError(f"expected at least one matrix and one item, got {len(matrices)} and {number}")
    order = groups.cpu().argsort(stable=True)
    users, counts = torch.unique_consecutive(groups.cpu()[order], return_counts=True)
    ends = counts.cumsum(0)
    borders = (ends[:-1] - 0.5).tolist()
    centres = (ends - (counts + 1) / 2).tolist()
    lines, columns = _grid(len(matrices), 4)
    # An item takes a pixel or more up to some 400 items.
    figure = Figure(figsize=(2.9 * columns + 0.3, 3.2 * lines + 0.4), dpi=160, layout="constrained")
    axes: Any = figure.subplots(lines, columns, squeeze=False)
    for axis, (name, matrix) in zip(axes.flat, matrices.items(), strict=False):
        if matrix.shape != (number, number):
            raise ValueError(f"{name!r}: expected a matrix {(number, number)}, got {tuple(matrix.shape)}")
        shown = matrix.detach().float().cpu()[order][:, order]
        top = float(shown.masked_fill(torch.eye(number, dtype=torch.bool), 0).max())
        axis.imshow(shown.numpy(), cmap="Blues", vmin=0, vmax=top if top > 0 else 1, interpolation="nearest")
        for border in borders:
            axis.axhline(border, color="#e07b39", linewidth=0.4)
            axis.axvline(border, color="#e07b39", linewidth=0.4)
        axis.set_title(f"{name}\n0 to {top:.2g}", fontsize=8)
        axis.set_xticks(centres, [])
        axis.set_yticks(centres, [])
        axis.tick_params(length=2)
    labels = [str(user) for user in users.tolist()]
    for axis in axes[:, 0]:
        axis.set_yticks(centres, labels, fontsize=6)
        axis.set_ylabel("items by user", fontsize=8)
    _hide(axes, len(matrices))
    figure.suptitle(f"likeness of {number} items of {len(users)} users", fontsize=10)
    return figure


def plot_embedding(vectors: Mapping[str, Tensor], labels: Tensor, seed: int = 0) -> Figure:
    """Items in a plane for each representation, coloured by user.

    t-SNE of scikit-learn, on rows of length 1, stands in for the paper's UMAP, which would be a further dependency;
    fewer than 4 items are placed by their principal components.

    Args:
        vectors: `(items, d)` by name.
        labels: int64 `(items,)`, the user of each item.
        seed: Of t-SNE.

    Raises:
        ValueError: If there is no representation or item, a shape does not fit, or a value is not finite.
    """
    from matplotlib.figure import Figure

    number = len(labels)
    if not vectors or number == 0:
        raise ValueError(f"expected at least one representation and one item, got {len(vectors)} and {number}")
    users = torch.unique(labels.cpu()).tolist()
    colours = _palette(len(users))
    lines, columns = _grid(len(vectors), 4)
    figure = Figure(figsize=(2.6 * columns + 0.9, 2.75 * lines + 0.4), dpi=130, layout="constrained")
    axes: Any = figure.subplots(lines, columns, squeeze=False)
    dots: list[Any] = []
    for axis, (name, own) in zip(axes.flat, vectors.items(), strict=False):
        if own.ndim != 2 or len(own) != number:
            raise ValueError(f"{name!r}: expected a row for each of {number} labels, got {tuple(own.shape)}")
        if not own.isfinite().all():
            raise ValueError(f"{name!r}: the vectors have NaN or infinity")
        places = _plane(F.normalize(own.detach().float().cpu(), dim=1), seed)
        dots = [
            axis.scatter(*places[labels.cpu() == user].T.numpy(), s=14, color=colour, linewidths=0, alpha=0.8)
            for user, colour in zip(users, colours, strict=True)
        ]
        axis.set_title(name, fontsize=9)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_color("0.8")
    _hide(axes, len(vectors))
    figure.legend(
        dots, [str(user) for user in users], title="user", loc="outside right center", fontsize=7, frameon=False
    )
    method = "t-SNE (in place of UMAP)" if number >= 4 else "principal components"
    figure.suptitle(f"{number} items of {len(users)} users, {method}", fontsize=10)
    return figure


def plot_recommendations(rows: Sequence[RecommendationRow]) -> Figure:
    """A line per user: items of training, then what is recommended, with a green frame on hits.

    An item without an image is a box with its title.

    Args:
        rows: The users.

    Raises:
        ValueError: If there is no user or item, or a recommendation has no word on whether it is a hit.
    """
    from matplotlib.figure import Figure

    for row in rows:
        if len(row.hits) != len(row.recommended):
            raise ValueError(f"user {row.user}: {len(row.recommended)} recommendations, {len(row.hits)} hits")
    before = max((len(row.history) for row in rows), default=0)
    after = max((len(row.recommended) for row in rows), default=0)
    if not before + after:
        raise ValueError("there is no item to show")
    with_images = any(card.image is not None for row in rows for card in (*row.history, *row.recommended))
    height = 1.75 if with_images else 1.12
    figure = Figure(figsize=(1.05 * (before + after) + 0.6, height * len(rows) + 0.6), dpi=130, layout="constrained")
    # A narrow column parts the two.
    widths = [1.0] * before + [0.15] + [1.0] * after
    axes: Any = figure.subplots(len(rows), len(widths), squeeze=False, width_ratios=widths)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for line, row in zip(axes, rows, strict=True):
        for axis, card in zip(line[:before], row.history, strict=False):
            _draw_card(axis, card, False)
        for axis, card, hit in zip(line[before + 1 :], row.recommended, row.hits, strict=False):
            _draw_card(axis, card, bool(hit))
        line[0].set_ylabel(f"user {row.user}", fontsize=8, parse_math=False)
    for place, title in ((0, "items of training"), (before + 1, "recommended, best first")):
        if place < len(widths) and (place or before):
            axes[0, place].set_title(title, fontsize=9, loc="left")
    figure.suptitle("recommendations (green: held-out items of the user)", fontsize=10)
    return figure


def plot_ablation(results: Mapping[str, tuple[float, float]], metric: str) -> Figure:
    """A bar per variant with its spread; the first is the one that the others are compared with.

    Args:
        results: Mean and spread (standard deviation over seeds; 0 for one seed) by variant.
        metric: Name for the axis.

    Raises:
        ValueError: If there is no variant, or a mean or spread is not finite or a spread negative.
    """
    from matplotlib.figure import Figure

    if not results:
        raise ValueError("there is no variant to draw")
    for name, (mean, spread) in results.items():
        if not (math.isfinite(mean) and math.isfinite(spread) and spread >= 0):
            raise ValueError(f"variant {name!r}: expected a mean and a spread of 0 or more, got {mean} and {spread}")
    figure = Figure(figsize=(6.4, 0.36 * len(results) + 1.1), dpi=130, layout="constrained")
    axis: Axes = figure.subplots()
    means, spreads = [mean for mean, _ in results.values()], [spread for _, spread in results.values()]
    places = list(range(len(results)))
    axis.barh(places, means, height=0.66, color=[_BLUE] + [_LIGHT] * (len(results) - 1), zorder=1)
    # Without a spread there is no cap to see.
    wide = [place for place in places if spreads[place] > 0]
    axis.errorbar(
        [means[place] for place in wide],
        wide,
        xerr=[spreads[place] for place in wide],
        fmt="none",
        ecolor="0.25",
        elinewidth=1,
        capsize=2.5,
        zorder=3,
    )
    axis.axvline(means[0], color="0.35", linewidth=0.8, linestyle=":", zorder=2)
    for place, (mean, spread) in enumerate(results.values()):
        text = f"{mean:.4f}" + (f" \N{PLUS-MINUS SIGN} {spread:.4f}" if spread else "")
        if place and means[0] > 0:
            text += f"  ({100 * (mean / means[0] - 1):+.1f} %)"
        end = max(mean + spread, 0.0)
        # Beside the bar, and beyond the dotted line where that would run through the text.
        start = means[0] if place and end < means[0] < end + 0.6 * max(means) else end
        axis.annotate(text, (start, place), (4, 0), textcoords="offset points", va="center", fontsize=7)
    axis.set_yticks(places, list(results), fontsize=8)
    axis.invert_yaxis()
    low = min(0.0, *(mean - spread for mean, spread in results.values()))
    high = max(0.0, *(mean + spread for mean, spread in results.values()))
    # Room for the numbers.
    axis.set_xlim(low, high + 0.42 * (high - low) or 1)
    note = ", standard deviation over seeds" if wide else ""
    axis.set_xlabel(f"{metric} (mean{note})", fontsize=8)
    axis.tick_params(axis="x", labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def _grid(number: int, most: int) -> tuple[int, int]:
    lines = math.ceil(number / most)
    return lines, math.ceil(number / lines)


def _hide(axes: Any, used: int) -> None:
    for axis in list(axes.flat)[used:]:
        axis.set_visible(False)


def _palette(number: int) -> list[Any]:
    from matplotlib import colormaps

    if number <= 10:
        return [colormaps["tab10"](place) for place in range(number)]
    if number <= 20:
        return [colormaps["tab20"](place) for place in range(number)]
    return [colormaps["turbo"](place / (number - 1)) for place in range(number)]


def _draw_weights(axis: Axes, weights: np.ndarray, labels: Sequence[str]) -> None:
    """A histogram per input, mirrored at its place; near-constant weights, which have no density, draw well too."""
    even = 1 / len(labels)
    low, high = min(float(weights.min()), even), max(float(weights.max()), even)
    margin = max(0.06 * (high - low), 0.004)
    low, high = max(low - margin, 0.0), min(high + margin, 1.0)
    edges = np.linspace(low, high, _BINS + 1)
    digits = 2 if high - low > 0.1 else 4
    for place, label in enumerate(labels):
        own = weights[:, place]
        counts, _ = np.histogram(own, edges)
        half = 0.4 * np.append(counts, counts[-1]) / counts.max()
        axis.fill_betweenx(
            edges, place - half, place + half, step="post", color=f"C{place}", alpha=0.55, linewidth=0, label=label
        )
        middle = float(np.median(own))
        axis.hlines(middle, place - 0.42, place + 0.42, color="0.15", linewidth=1)
        axis.annotate(
            f"{middle:.{digits}f}", (place + 0.42, middle), (0, 2), textcoords="offset points", ha="right", fontsize=7
        )
    axis.axhline(even, color="0.4", linewidth=0.8, linestyle=":")
    axis.set_xticks(range(len(labels)), list(labels), fontsize=8)
    axis.set_xlim(-0.6, len(labels) - 0.4)
    axis.set_ylim(low, high)
    axis.tick_params(axis="y", labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)


def _plane(points: Tensor, seed: int) -> Tensor:
    """Places `(points, 2)`."""
    if len(points) < 4:
        left, scale, _ = torch.linalg.svd(points - points.mean(0), full_matrices=False)
        return F.pad(left * scale, (0, 2))[:, :2]
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    # Principal components need two dimensions, and a spread to scale by.
    start = "pca" if points.shape[1] > 1 and bool(points.std(0).any()) else "random"
    tsne = TSNE(perplexity=min(30.0, (len(points) - 1) / 3), init=start, random_state=seed)
    # Several threads are slower for so few points, by far so beside other processes.
    with threadpool_limits(1):
        return torch.from_numpy(tsne.fit_transform(points.numpy()))


def _draw_card(axis: Axes, card: ItemCard, hit: bool) -> None:
    """The image with its title below, or a box with the title in it."""
    short = textwrap.wrap(card.title, 16, max_lines=3, placeholder=" \N{HORIZONTAL ELLIPSIS}") or [""]
    axis.spines[:].set(visible=True, color=_GREEN if hit else _GREY, linewidth=3 if hit else 0.8)
    if card.image is None:
        axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", facecolor="#e8f5ec" if hit else "0.96")
        axis.text(0.5, 0.5, "\n".join(short), fontsize=6, ha="center", va="center", parse_math=False)
    else:
        axis.imshow(card.image)
        axis.set_xlabel("\n".join(short), fontsize=6, parse_math=False)
