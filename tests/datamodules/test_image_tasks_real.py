from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.image_tasks import ImageTaskData
from datamodules.sources.multi_mnist import read_pictures

pytestmark = pytest.mark.real


@pytest.mark.parametrize("source", ["multi_mnist", "multi_fashion", "multi_fashion_mnist"])
def test_pairs_of_the_real_sets_have_their_sizes_and_even_classes(source: str) -> None:
    data = ImageTaskData(source, batch_size=3_600, eval_batch_size=1_000)
    for loader, count in (
        (data.train_dataloader(), 3_600),
        (data.val_dataloader(), 400),
        (data.test_dataloader(), 1_000),
    ):
        (batch,) = list(loader)
        assert batch.images.shape == (count, 1, 36, 36)
        assert float(batch.images.max()) == 1
        for name in ("left", "right"):
            shares = batch.targets[name].bincount(minlength=10) / count
            assert shares.tolist() == pytest.approx([0.1] * 10, abs=0.05)
        assert float((batch.targets["left"] == batch.targets["right"]).double().mean()) == pytest.approx(0.1, abs=0.05)


def test_the_corners_of_real_pairs_are_the_pictures() -> None:
    data = ImageTaskData("multi_fashion_mnist", eval_batch_size=1_000)
    (batch,) = list(data.test_dataloader())
    root = Path(os.environ["ZOO_DATA"])
    grey = (batch.images[:, 0] * 255).round().to(torch.uint8).numpy()
    for name, side, rows, columns in (("mnist", "left", slice(0, 8), slice(0, 28)),
                                      ("fashion_mnist", "right", slice(-8, None), slice(-28, None))):  # fmt: skip
        pictures = read_pictures(name, "test", root, flat=False)
        inner = slice(0, 8) if side == "left" else slice(-8, None)
        for row in range(0, 1_000, 83):
            agree = (pictures.images[:, inner] == grey[row, rows, columns]).all((1, 2))
            assert int(batch.targets[side][row]) in pictures.labels[agree]


def test_camvid_has_eleven_classes_and_distances_within_the_picture() -> None:
    data = ImageTaskData("camvid", batch_size=400, eval_batch_size=400)
    train, validation, test = (
        next(iter(loader)) for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    )
    assert [len(batch.images) for batch in (train, validation, test)] == [323, 44, 101]
    for batch in (train, validation, test):
        labels, boundary = batch.targets["segmentation"], batch.targets["boundary"][:, 0]
        assert batch.images.shape[1:] == (3, 48, 64)
        assert (int(labels.min()), int(labels.max())) == (-1, 10)
        assert torch.equal(boundary == 0, labels == -1)
        assert float(boundary[labels >= 0].min()) == 1
        assert float(boundary.max()) < np.hypot(48, 64)
    shares = torch.cat([train.targets["segmentation"], validation.targets["segmentation"]]).add(1).flatten().bincount()
    assert (shares / shares.sum())[[1, 2, 4]].tolist() == pytest.approx([0.1682, 0.2329, 0.3167], abs=1e-4)
    augmented = next(iter(ImageTaskData("camvid", batch_size=400, augment=True).train_dataloader()))
    assert augmented.targets["segmentation"].unique().tolist() == list(range(-1, 11))
