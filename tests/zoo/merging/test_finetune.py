"""Parts of the supervised training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from datamodules import ClassificationBatch
from tests.zoo.merging.small_experts import CLASSES, encoder, moved
from zoo.common.schedules import WarmupCosine
from zoo.merging.finetune import build_optimizer, joint_features, labels_of, prototype_heads, task_losses


def batch(task, count=5, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, size, size, generator=generator)
    labels = torch.randint(0, CLASSES[task], (count,), generator=generator)
    return ClassificationBatch(images, labels, torch.arange(count), task)


LABELS = torch.tensor([1, 0])


@pytest.mark.parametrize(
    "found",
    [
        ClassificationBatch(torch.ones(2, 3, 4, 4), LABELS, torch.arange(2), "c"),
        {"pixel_values": torch.ones(2, 3), "labels": LABELS},
        {"image": torch.ones(2, 3), "label": LABELS},
        (torch.ones(2, 3), LABELS),
        [torch.ones(2, 3), LABELS],
    ],
)
def test_labels_are_found_in_the_usual_batches(found):
    assert labels_of(found) is LABELS


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        (ClassificationBatch(torch.ones(2, 3, 4, 4), None, torch.arange(2), "c"), "ClassificationBatch"),
        ({"pixel_values": torch.ones(2, 3)}, "dict"),
        (torch.ones(2), "Tensor"),
        ((torch.ones(2), LABELS, LABELS), "tuple"),
        ((torch.ones(2), [1, 0]), "tuple"),
    ],
)
def test_a_batch_without_labels_is_refused_with_its_kind(found, kind):
    with pytest.raises(ValueError, match=f"a batch of type {kind} has no labels: .*--data.stream none"):
        labels_of(found)


def test_losses_are_mean_cross_entropies_by_one_encoder_or_by_one_each():
    base = encoder()
    heads = prototype_heads(CLASSES, base.dim, 16.0)
    batches = {task: batch(task, 3 + k, seed=k) for k, task in enumerate(CLASSES)}
    own = {task: moved(base, k) for k, task in enumerate(CLASSES)}
    for one, of in ((base, dict.fromkeys(CLASSES, base)), (own, own)):
        found = task_losses(one, heads, batches)
        assert list(found) == list(CLASSES)
        for task, part in batches.items():
            expected = F.cross_entropy(heads[task](of[task](part.images)), part.labels)
            torch.testing.assert_close(found[task], expected)


def test_one_encoder_sees_images_of_one_size_in_one_pass_and_others_apart():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = []

        def forward(self, images):
            self.seen.append(len(images))
            return images.mean((2, 3))

    for sizes, expected in (((8, 8), [7]), ((8, 4), [3, 4]), ((8,), [3])):
        model = Counting()
        batches = {task: batch(task, 3 + k, size) for k, (task, size) in enumerate(zip(CLASSES, sizes, strict=False))}
        found = joint_features(model, batches)
        assert model.seen == expected
        for task, part in batches.items():
            torch.testing.assert_close(found[task], part.images.mean((2, 3)))
    model = Counting()
    plain = {task: {"images": batch(task).images} for task in CLASSES}
    assert list(joint_features(model, plain)) == list(CLASSES)
    assert model.seen == [5, 5, 5]


def test_the_optimizer_is_adamw_with_the_schedule():
    parameter = nn.Parameter(torch.ones(2))
    optimizer, scheduler = build_optimizer([parameter], 0.1, 0.3, WarmupCosine(1, 4))
    assert isinstance(optimizer, torch.optim.AdamW)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        parameter.grad = torch.zeros(2)
        before = parameter.detach().clone()
        optimizer.step()
        torch.testing.assert_close(parameter.detach(), before * (1 - 0.3 * rates[-1]))
        scheduler.step()
    assert rates == pytest.approx([0.05, 0.1, 0.075, 0.025])


def test_prototypes_are_unit_vectors_that_depend_on_the_task_alone():
    heads = prototype_heads(CLASSES, 8, 5.0)
    for task, count in CLASSES.items():
        weight = heads[task].weight
        assert weight.shape == (count, 8)
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(count))
        assert float(heads[task].scale) == 5
        assert torch.equal(prototype_heads({task: count}, 8, 5.0)[task].weight, weight)
    assert not torch.equal(heads["a.b"].weight[:2], heads["keys"].weight)
