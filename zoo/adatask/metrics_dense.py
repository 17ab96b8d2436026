"""Metrics of tasks with a label for each pixel: segmentation, depth, surface normals.

All are sums over the split, never means of batch means, so neither batch sizes nor processes matter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchmetrics import Metric

from zoo.adatask.losses import IGNORED, labelled

if TYPE_CHECKING:
    from zoo.adatask.tasks import TaskSpec

_WITHIN = (11.25, 22.5, 30.0)
_BINS_PER_DEGREE = 1000


def classes_against_ties(spec: TaskSpec, logits: Tensor, target: Tensor) -> Tensor:
    """Predicted classes: a label is hit only by a logit above all others, so that constant or NaN logits hit none.

    Args:
        spec: A multiclass or segmentation task.
        logits: `(batch, classes, ...)`.
        target: int64 `(batch, ...)`, -1 without a label.

    Returns:
        int64 `(batch, ...)`: the largest logit's class, the target's rival where the two tie.

    Raises:
        ValueError: If a target is no class.
    """
    lowest, highest = (int(x) for x in torch.aminmax(target)) if target.numel() else (0, 0)
    if lowest < IGNORED or highest >= spec.num_outputs:
        wrong = lowest if lowest < IGNORED else highest
        raise ValueError(f"task {spec.name!r}: target must lie in 0..{spec.num_outputs - 1}, or be -1; found {wrong}")
    column = target.clamp(min=0).unsqueeze(1)
    # Finite, so that the target's own place, at -inf, is never the best of the others; NaN stays and is the best.
    logits = logits.clamp(min=torch.finfo(logits.dtype).min)
    own = logits.gather(1, column)[:, 0]
    other, rival = logits.scatter(1, column, -torch.inf).max(1)
    return torch.where(own > other, column[:, 0], rival)


class SegmentationMetrics(Metric):
    """miou and pixel_accuracy from one confusion matrix over the split.

    miou is the mean over classes of diagonal / (row + column - diagonal); classes that occur neither among the labels
    nor among the predictions of labelled pixels are left out. pixel_accuracy is trace / sum.

    Args:
        spec: A segmentation task.
    """

    full_state_update = False
    is_differentiable = False

    confusion: Tensor

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__()
        self.spec = spec
        classes = spec.num_outputs
        self.add_state("confusion", torch.zeros(classes, classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, output: Tensor, target: Tensor, mask: Tensor | None = None) -> None:
        """Count a batch; shapes as in `task_loss`."""
        logits, target, valid = labelled(self.spec, output, target, mask)
        predicted = classes_against_ties(self.spec, logits, target)
        classes = self.spec.num_outputs
        # Place 0 takes the pixels without a label.
        cells = torch.where(valid, 1 + target * classes + predicted, 0)
        counts = torch.bincount(cells.flatten(), minlength=classes**2 + 1)[1:]
        self.confusion += counts.view(classes, classes)

    def compute(self) -> dict[str, Tensor]:
        """Shares in [0, 1], NaN without labels."""
        matrix = self.confusion.double()
        hits = matrix.diagonal()
        unions = matrix.sum(0) + matrix.sum(1) - hits
        present = unions > 0
        return {"miou": (hits[present] / unions[present]).mean(), "pixel_accuracy": hits.sum() / matrix.sum()}


class DepthMetrics(Metric):
    """abs_err, mean |d^ - d|, and rel_err, mean |d^ - d| / d, over the pixels with d > 0; inf for a NaN output.

    Args:
        spec: A depth task.
    """

    full_state_update = False
    is_differentiable = False

    absolute: Tensor
    relative: Tensor
    count: Tensor

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__()
        self.spec = spec
        self.add_state("absolute", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("relative", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, output: Tensor, target: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch; shapes as in `task_loss`."""
        depth, target, valid = labelled(self.spec, output, target, mask)
        errors = (depth.double() - target).abs().nan_to_num(torch.inf, torch.inf)
        self.absolute += torch.where(valid, errors, 0.0).sum()
        self.relative += torch.where(valid, errors / torch.where(valid, target, 1.0), 0.0).sum()
        self.count += valid.sum()

    def compute(self) -> dict[str, Tensor]:
        """In units of the target and as a ratio (not percent); NaN without labels."""
        return {"abs_err": self.absolute / self.count, "rel_err": self.relative / self.count}


class NormalsMetrics(Metric):
    """Angles in degrees between predicted and true normals over the pixels with a true one.

    mean_angle is exact; median_angle comes from a histogram of 0.001 degree bins and is off by half a bin at most; a
    within_x is the share of angles below x. An output that is NaN, infinite or without a direction is 180 degrees off.

    Args:
        spec: A normals task.
    """

    full_state_update = False
    is_differentiable = False

    total: Tensor
    within: Tensor
    histogram: Tensor

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__()
        self.spec = spec
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("within", torch.zeros(len(_WITHIN), dtype=torch.int64), dist_reduce_fx="sum")
        bins = torch.zeros(180 * _BINS_PER_DEGREE, dtype=torch.int64)
        self.add_state("histogram", bins, dist_reduce_fx="sum")

    def update(self, output: Tensor, target: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch; shapes as in `task_loss`."""
        normals, target, valid = labelled(self.spec, output, target, mask)
        angles = _angles(normals.double(), target.double())
        self.total += torch.where(valid, angles, 0.0).sum()
        self.within += torch.stack([(valid & (angles < limit)).sum() for limit in _WITHIN])
        places = (angles * _BINS_PER_DEGREE).long().clamp(max=len(self.histogram) - 1)
        cells = torch.where(valid, places + 1, 0)
        self.histogram += torch.bincount(cells.flatten(), minlength=len(self.histogram) + 1)[1:]

    def compute(self) -> dict[str, Tensor]:
        """Degrees and shares in [0, 1], NaN without labels."""
        reached = self.histogram.cumsum(0)
        count = reached[-1]
        middle = torch.searchsorted(reached, torch.stack([(count + 1) // 2, count // 2 + 1]))
        median = (middle.double() + 0.5).mean() / _BINS_PER_DEGREE
        values = {"mean_angle": self.total / count, "median_angle": torch.where(count > 0, median, torch.nan)}
        for limit, inside in zip(_WITHIN, self.within, strict=True):
            values[f"within_{limit:g}"] = inside.double() / count
        return values


def _angles(normals: Tensor, target: Tensor) -> Tensor:
    """Angle of each pair of vectors `(batch, 3, height, width)` in degrees, `(batch, height, width)`."""
    along = (normals * target).sum(1)
    # The arc cosine has no digits left where the vectors agree; the arc tangent has all of them.
    across = torch.linalg.vector_norm(torch.linalg.cross(normals, target, dim=1), dim=1)
    angles = torch.rad2deg(torch.atan2(across, along))
    # atan2(0, 0) is 0, which would reward an output of zeros.
    directed = normals.isfinite().all(1) & (normals != 0).any(1)
    return torch.where(directed, angles, 180.0)
