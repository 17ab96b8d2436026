"""Features of several models of the same images in one plane."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.merging.drawing import palette

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKS = (("o", 8, "filled"), ("o", 26, "hollow"), ("x", 10, "filled"), ("^", 10, "filled"))
"""Shape, size and filling of the first, second ... source: seen through each other where points fall together."""


def joint_tsne(features: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Places in a plane of the features of several models, found together (t-SNE of scikit-learn).

    Some 500 points take about a second, and the time grows a little faster than their number.

    Args:
        features: `(images, dimension)` by source, of the same dimension.
        seed: Of the start.

    Returns:
        `(images, 2)` by source.

    Raises:
        ValueError: If there are fewer than 4 points, shapes disagree, or a feature is not finite.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    points = {source: torch.as_tensor(found).detach().float().cpu() for source, found in features.items()}
    shapes = {source: tuple(found.shape) for source, found in points.items()}
    if any(len(shape) != 2 for shape in shapes.values()) or len({shape[1] for shape in shapes.values()}) != 1:
        raise ValueError(f"expected features (images, dimension) of one dimension, got {shapes}")
    for source, found in points.items():
        if not found.isfinite().all():
            raise ValueError(f"the features of {source!r} have NaN or infinity")
    joint = torch.cat(list(points.values()))
    if len(joint) < 4:
        raise ValueError(f"t-SNE needs 4 points or more, got {len(joint)}")
    # Principal components need two dimensions, and a spread to scale by.
    start = "pca" if joint.shape[1] > 1 and bool(joint.std(0).any()) else "random"
    tsne = TSNE(perplexity=min(30.0, (len(joint) - 1) / 3), init=start, random_state=seed)
    # Several threads are slower for so few points, by far so beside other processes.
    with threadpool_limits(1):
        places = torch.from_numpy(tsne.fit_transform(joint.numpy()))
    sizes = [len(own) for own in points.values()]
    return dict(zip(points, torch.split(places, sizes), strict=True))


def plot_tsne(
    features: Mapping[str, Tensor], labels: Tensor | None = None, seed: int = 0, title: str = "features, joint t-SNE"
) -> Figure:
    """Features of the same images from several models in one plane, coloured by source (see `joint_tsne`).

    Args:
        features: `(images, dimension)` by source, such as "merged", "individual" and "repaired".
        labels: int `(images,)`: a second panel coloured by class.
        seed: Of the embedding.
        title: Above the picture.

    Raises:
        ValueError: As `joint_tsne`, or if the number of labels is not that of the images.
    """
    from matplotlib.figure import Figure

    counts = {source: len(found) for source, found in features.items()}
    if labels is not None and set(counts.values()) != {len(labels)}:
        raise ValueError(f"expected a label for each image, got {len(labels)} for {counts}")
    places = joint_tsne(features, seed)
    panels = 1 if labels is None else 2
    figure = Figure(figsize=(3.4 * panels, 3.7), layout="constrained")
    axes: Any = figure.subplots(1, panels, squeeze=False)[0]
    dots = _draw_sources(axes[0], places, list(places))
    figure.legend(
        list(dots.values()), list(dots), loc="outside lower center", ncols=len(places), fontsize=8, frameon=False
    )
    if labels is not None:
        classes = sorted(set(labels.tolist()))
        for label, colour in zip(classes, palette(len(classes)), strict=True):
            own = torch.cat([found[labels.cpu() == label] for found in places.values()])
            axes[1].scatter(*own.T.numpy(), s=7, color=colour, alpha=0.6, linewidths=0, label=str(label))
        axes[1].set_title("by class", fontsize=9)
        axes[0].set_title("by source", fontsize=9)
        axes[1].set(xticks=[], yticks=[])
        axes[1].spines[:].set_color("0.8")
        if len(classes) <= 10:
            axes[1].legend(fontsize=7, markerscale=2, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.suptitle(title, fontsize=10)
    return figure


def plot_tsne_grid(
    features: Mapping[str, Mapping[str, Tensor]], seed: int = 0, title: str = "features, joint t-SNE by task"
) -> Figure:
    """A panel per task with the features of the same images from several models, coloured by source.

    Args:
        features: `(images, dimension)` by task and source (see `plot_tsne`).
        seed: Of the embeddings.
        title: Above the picture.

    Raises:
        ValueError: As `joint_tsne`, or if there is no task.
    """
    from matplotlib.figure import Figure

    if not features:
        raise ValueError("there is no task to draw")
    lines = math.ceil(len(features) / 4)
    columns = math.ceil(len(features) / lines)
    figure = Figure(figsize=(max(2.3 * columns, 3.4), 2.4 * lines + 0.8), layout="constrained")
    axes: Any = figure.subplots(lines, columns, squeeze=False)
    legend: dict[str, Any] = {}
    sources = list(dict.fromkeys(source for own in features.values() for source in own))
    for axis, (task, own) in zip(axes.flat, features.items(), strict=False):
        legend |= _draw_sources(axis, joint_tsne(own, seed), sources)
        axis.set_title(task, fontsize=9)
    for axis in list(axes.flat)[len(features) :]:
        axis.set_visible(False)
    figure.legend(
        [legend[source] for source in sources],
        sources,
        loc="outside lower center",
        ncols=len(sources),
        fontsize=8,
        frameon=False,
        markerscale=2,
    )
    figure.suptitle(title, fontsize=10)
    return figure


def _draw_sources(axis: Axes, places: Mapping[str, Tensor], sources: Sequence[str]) -> dict[str, Any]:
    dots = {}
    for source, own in places.items():
        place = sources.index(source)
        marker, size, filling = _MARKS[place % len(_MARKS)]
        colour = [palette(len(sources))[place]]
        style: dict[str, Any] = (
            {"facecolors": "none", "edgecolors": colour} if filling == "hollow" else {"color": colour}
        )
        dots[source] = axis.scatter(
            own[:, 0].numpy(), own[:, 1].numpy(), s=size, marker=marker, alpha=0.7, linewidths=0.9, **style
        )
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_color("0.8")
    return dots
