from __future__ import annotations

import pytest
import torch

from datamodules.classification_tasks import ClassificationTasksData
from datamodules.sources.classification_sets import EIGHT_TASKS

pytestmark = pytest.mark.real

# Training images, test images, classes; mean and deviation of training pixels, as published with the sets.
SETS = {
    "mnist": (4_000, 1_000, 10, (0.1337,), (0.3117,)),
    "fashion_mnist": (4_000, 1_000, 10, (0.2846,), (0.3520,)),
    "kmnist": (4_000, 1_000, 10, (0.1828,), (0.3402,)),
    "notmnist": (4_000, 1_000, 10, (0.4172,), (0.4567,)),
    "cifar10": (5_000, 1_000, 10, (0.4937, 0.4844, 0.4475), (0.2464, 0.2434, 0.2604)),
    "gtsrb": (4_300, 1_032, 43, (0.3435, 0.3193, 0.3302), (0.2737, 0.2644, 0.2728)),
    "eurosat": (4_000, 1_000, 10, (0.3470, 0.3844, 0.4106), (0.1996, 0.1333, 0.1131)),
    "fer2013": (3_981, 939, 7, (0.5145,), (0.2997,)),
    "sign_digits": (1_300, 350, 10, (0.6750, 0.6462, 0.6166), (0.1346, 0.1512, 0.1791)),
    "scene15": (1_498, 900, 15, (0.4556,), (0.2319,)),
}


@pytest.mark.parametrize("task", SETS)
def test_a_real_set_has_its_sizes_classes_and_pixels(task: str) -> None:
    train, test, classes, mean, std = SETS[task]
    data = ClassificationTasksData("zoo", tasks=[task])
    assert data.tasks == [{"name": task, "num_classes": classes}]
    assert len(set(data.class_names[task])) == classes
    found = {part: data.images(task, part) for part in ("all", "validate", "test")}
    assert [len(images) for images, _ in found.values()] == [train - round(train / 10), round(train / 10), test]
    for images, labels in found.values():
        assert images.shape[1:] == (3, 32, 32) and images.dtype == torch.uint8
        assert labels.bincount(minlength=classes).shape == (classes,) and (labels.bincount() > 0).all()
    pixels = torch.cat([found["all"][0], found["validate"][0]]).double() / 255
    if task in ("mnist", "fashion_mnist", "kmnist", "notmnist"):
        assert float(pixels[:, :, 2:-2, 2:-2].sum() / pixels.sum()) == pytest.approx(1), "the frame is black"
        pixels = pixels[:, :, 2:-2, 2:-2]
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx(list(mean) * (3 // len(mean)), abs=1e-4)
    assert pixels.transpose(0, 1).flatten(1).std(1).tolist() == pytest.approx(list(std) * (3 // len(std)), abs=1e-4)


def test_the_eight_tasks_adapt_together_and_hold_their_images_apart() -> None:
    data = ClassificationTasksData("zoo", stream="test", holdout=True, pretrain_images=200, batch_size=32, seed=0)
    assert data.task_names == list(EIGHT_TASKS)
    loader = data.train_loader()
    assert len(loader) == -(-1_032 // 2 // 32)
    for step in loader:
        assert list(step) == list(EIGHT_TASKS)
        assert {(*batch.images.shape, batch.labels) for batch in step.values()} == {(32, 3, 32, 32, None)}
    for task in EIGHT_TASKS:
        parts = ["pretrain", "finetune", "validate", "stream", "test"]
        pictures = [{image.numpy().tobytes() for image in data.images(task, part)[0]} for part in parts]
        assert len(set.union(*pictures)) == sum(map(len, pictures)) == sum(SETS[task][:2]), "none is in two parts"
        images, labels = data.images(task, "pretrain")
        counts = labels.bincount()
        assert len(images) == 200
        if task != "fer2013":  # which has a rare class
            assert counts.max() - counts.min() <= 2


def test_sets_can_be_disturbed_and_a_linear_classifier_sees_the_classes() -> None:
    clean, noisy = (ClassificationTasksData("zoo", tasks=["mnist", "cifar10"], max_images=300, corruption=corruption)
                    for corruption in (None, "gaussian_noise"))  # fmt: skip
    for task, least in (("mnist", 0.7), ("cifar10", 0.2)):
        plain, changed = (data.images(task, "test")[0].double() / 255 for data in (clean, noisy))
        assert 0.01 < float((plain - changed).square().mean().sqrt()) < 0.06, "deviation 0.06, less where it is cut off"
        images, labels = clean.images(task, "train")
        # Every other pixel, to be fast.
        features, shown = (x[:, :, ::2, ::2].flatten(1) for x in (images.double() / 255, plain))
        penalty = 10 * torch.eye(features.shape[1], dtype=torch.double)
        targets = torch.nn.functional.one_hot(labels, 10).double() - 0.1
        weights = torch.linalg.solve(features.T @ features + penalty, features.T @ targets)
        accuracy = ((shown @ weights).argmax(1) == clean.images(task, "test")[1]).double().mean()
        assert float(accuracy) > least
