"""Images beside the labels and predictions of their tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.adatask.predictions import readable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.figure import Figure

    from zoo.adatask.tasks import TaskSpec
    from zoo.adatask.types import TaskBatch


def plot_examples(specs: Sequence[TaskSpec], batch: TaskBatch, outputs: Mapping[str, Tensor], count: int = 4) -> Figure:
    """A few images; dense labels and predictions beside them, labels of whole images as text.

    Args:
        specs: The tasks.
        batch: Images and labels.
        outputs: What the heads put out for them.
        count: Images to show.
    """
    from matplotlib.figure import Figure

    dense = [spec for spec in specs if spec.kind in ("segmentation", "depth", "normals")]
    whole = [spec for spec in specs if spec not in dense]
    count = min(count, len(batch.images))
    columns = 1 + 2 * len(dense)
    figure = Figure(figsize=(1.9 * columns, 1.7 * count), layout="constrained")
    axes: Any = figure.subplots(count, columns, squeeze=False)
    # Neighbours of a film or a sorted set look alike.
    chosen = torch.linspace(0, len(batch.images) - 1, count).long().tolist()
    found = {spec.name: readable(spec, outputs[spec.name][chosen]).cpu() for spec in specs}
    for row, place in enumerate(chosen):
        image = batch.images[place].detach().float().cpu()
        _show(axes[row][0], _picture(image), "image" if row == 0 else "")
        if whole:
            lines = [f"{s.name}: {_label(s, found[s.name][row])}, label {_known(s, batch, place)}" for s in whole]
            axes[row][0].set_xlabel("\n".join(lines), fontsize=7)
        for column, spec in enumerate(dense):
            target = batch.targets[spec.name][place].detach().cpu()
            limits = _limits(spec, target)
            pairs = ((target, "label"), (found[spec.name][row], "prediction"))
            for side, (value, what) in enumerate(pairs):
                axis = axes[row][1 + 2 * column + side]
                _show(axis, _dense_picture(spec, value), f"{spec.name}, {what}" if row == 0 else "", **limits)
    return figure


def _show(axis: Any, picture: Any, title: str, **options: Any) -> None:
    axis.imshow(picture, interpolation="nearest", **options)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(title, fontsize=8)


def _picture(image: Tensor) -> Any:
    if len(image) not in (1, 3):
        image = image.mean(0, keepdim=True)
    low, high = image.amin(), image.amax()
    image = ((image - low) / (high - low).clamp(min=1e-6)).expand(3, -1, -1)
    return image.permute(1, 2, 0).numpy()


def _dense_picture(spec: TaskSpec, value: Tensor) -> Any:
    if spec.kind == "segmentation":
        # Pixels without a label stay white.
        return torch.where(value < 0, torch.nan, value.float()).numpy()
    if spec.kind == "depth":
        return value[0].float().numpy()
    return ((value.float() + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy()


def _limits(spec: TaskSpec, target: Tensor) -> dict[str, Any]:
    if spec.kind == "segmentation":
        return {"cmap": "tab20", "vmin": 0, "vmax": max(spec.num_outputs - 1, 1)}
    if spec.kind == "depth":
        return {"cmap": "viridis", "vmin": 0.0, "vmax": float(target.max()) or 1.0}
    return {}


def _label(spec: TaskSpec, value: Tensor) -> str:
    return str(int(value.argmax())) if spec.kind == "multiclass" else ", ".join(f"{x:.2f}" for x in value.reshape(-1))


def _known(spec: TaskSpec, batch: TaskBatch, row: int) -> str:
    if spec.name in batch.masks and not batch.masks[spec.name][row]:
        return "missing"
    value = batch.targets[spec.name][row]
    return ", ".join(f"{x:g}" for x in value.reshape(-1).tolist())
