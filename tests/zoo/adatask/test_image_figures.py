"""The picture of images with labels and predictions."""

from __future__ import annotations

import torch

from datamodules.task_batches import ImageTaskBatch
from zoo.adatask.image_figures import plot_examples
from zoo.adatask.tasks import TaskSpec

SPECS = (
    TaskSpec("seg", "segmentation", 3),
    TaskSpec("depth", "depth"),
    TaskSpec("normals", "normals", 3),
    TaskSpec("day", "binary"),
    TaskSpec("digit", "multiclass", 4),
)


def example(count):
    generator = torch.Generator().manual_seed(0)
    seg = torch.randint(-1, 3, (count, 6, 8), generator=generator)
    depth = torch.rand(count, 1, 6, 8, generator=generator)
    normals = torch.randn(count, 3, 6, 8, generator=generator)
    targets = {"seg": seg, "depth": depth, "normals": normals, "day": torch.ones(count),
               "digit": torch.arange(count) % 4}  # fmt: skip
    images = torch.arange(count)[:, None, None, None].expand(count, 3, 6, 8) / count
    outputs = {"seg": torch.randn(count, 3, 6, 8), "depth": depth, "normals": normals, "day": torch.zeros(count, 1),
               "digit": torch.eye(4)[torch.arange(count) % 4]}  # fmt: skip
    return ImageTaskBatch(images, targets, {"day": torch.arange(count) > 0}), outputs


def test_a_row_holds_an_image_with_label_and_prediction_of_every_dense_task():
    batch, outputs = example(9)
    figure = plot_examples(SPECS, batch, outputs, count=3)
    assert len(figure.axes) == 3 * 7
    titles = [axis.get_title() for axis in figure.axes[:7]]
    assert titles == ["image", "seg, label", "seg, prediction", "depth, label", "depth, prediction", "normals, label",
                      "normals, prediction"]  # fmt: skip


def test_examples_are_spread_over_the_batch_with_their_own_labels():
    batch, outputs = example(9)
    figure = plot_examples(SPECS, batch, outputs, count=3)
    texts = [axis.get_xlabel().splitlines() for axis in figure.axes[::7]]
    # Images 0, 4 and 8.
    assert [lines[1] for lines in texts] == ["digit: 0, label 0"] * 3
    assert [lines[0] for lines in texts] == ["day: 0.50, label missing", "day: 0.50, label 1", "day: 0.50, label 1"]
    shown = figure.axes[14 + 3].images[0].get_array()
    torch.testing.assert_close(torch.as_tensor(shown), batch.targets["depth"][8, 0])


def test_a_small_batch_is_shown_whole():
    batch, outputs = example(2)
    assert len(plot_examples(SPECS, batch, outputs).axes) == 2 * 7
