"""Evaluation task by task: metrics, which task a batch is of, predictions."""

from __future__ import annotations

import json

import pytest
import torch
from torch.distributions import Categorical
from torch.utils.data import DataLoader

from datamodules import ClassificationBatch
from tests.zoo.merging.small_experts import CLASSES, QUIET, image_data, trainer
from zoo.merging.evaluation import TaskEvaluation
from zoo.merging.features import without_labels

pytestmark = QUIET

NAMES = list(CLASSES)


class Fixed(TaskEvaluation):
    """Logits that are the inputs' own numbers."""

    def __init__(self, groups=None):
        super().__init__(NAMES)
        self.raw = torch.nn.Parameter(torch.zeros(()))
        self.own = groups or {}

    def task_logits(self, batch, task):
        inputs = without_labels(batch)
        inputs = inputs["logits"] if isinstance(inputs, dict) else inputs
        inputs = getattr(inputs, "images", inputs)
        return inputs.flatten(1)[:, : CLASSES[task]] + self.raw

    def groups(self):
        return self.own

    def training_step(self, batch, batch_idx):
        return self.raw**2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(task, count=7, labels=True):
    generator = torch.Generator().manual_seed(NAMES.index(task))
    logits = torch.randn(count, CLASSES[task], generator=generator)
    found = torch.randint(0, CLASSES[task], (count,), generator=generator)
    return [{"logits": x, "labels": y} if labels else {"logits": x} for x, y in zip(logits, found, strict=True)]


def loaders(names=NAMES, labels=True):
    return [DataLoader(data(task, labels=labels), batch_size=3) for task in names]


def test_accuracy_entropy_and_their_plain_means_are_logged(tmp_path):
    groups = {"seen": ["a.b", "c"], "unseen": ["keys"], "none": ["gone"]}
    found = trainer(tmp_path).test(Fixed(groups), loaders(), verbose=False)[0]
    accuracies, entropies = {}, {}
    for task in NAMES:
        logits = torch.stack([row["logits"] for row in data(task)])
        labels = torch.stack([row["labels"] for row in data(task)])
        accuracies[task] = float((logits.argmax(1) == labels).double().mean())
        entropies[task] = float(Categorical(logits=logits).entropy().mean())
        assert found[f"test/acc/{task}"] == pytest.approx(accuracies[task])
        assert found[f"test/entropy/{task}"] == pytest.approx(entropies[task], rel=1e-5)
    assert found["test/acc/mean"] == pytest.approx(sum(accuracies.values()) / 3)
    assert found["test/entropy/mean"] == pytest.approx(sum(entropies.values()) / 3, rel=1e-5)
    assert found["test/acc/seen"] == pytest.approx((accuracies["a.b"] + accuracies["c"]) / 2)
    assert found["test/acc/unseen"] == pytest.approx(accuracies["keys"])
    assert "test/acc/none" not in found
    rows = [json.loads(line) for line in (tmp_path / "tables/test/tasks.jsonl").read_text().splitlines()]
    assert [row["task"] for row in rows] == NAMES
    assert rows[2]["accuracy"] == pytest.approx(accuracies["c"])


def test_without_labels_there_is_an_entropy_and_no_accuracy(tmp_path):
    found = trainer(tmp_path).test(Fixed(), loaders(labels=False), verbose=False)[0]
    assert {name for name in found if "acc" in name} == set()
    assert {f"test/entropy/{task}" for task in NAMES} <= set(found)


def test_a_test_is_not_mixed_with_an_earlier_one(tmp_path):
    model = Fixed()
    fewer = [DataLoader(data(task)[:2], batch_size=2) for task in NAMES]
    trainer(tmp_path).test(model, loaders(), verbose=False)
    second = trainer(tmp_path).test(model, fewer, verbose=False)[0]
    assert second == trainer(tmp_path).test(Fixed(), fewer, verbose=False)[0]


def test_the_course_of_the_validation_is_kept_without_the_sanity_check(tmp_path):
    model = Fixed()
    train = DataLoader(data("c"), batch_size=1)
    trainer(tmp_path, max_steps=4, val_check_interval=2).fit(model, train, loaders())
    for key in ("acc", "entropy"):
        assert set(model.history[key]) == set(NAMES)
        assert [step for step, _ in model.history[key]["c"]] == [2, 4]


def batch(task, labels=None):
    return ClassificationBatch(torch.ones(2, 3, 2, 2), labels, torch.arange(2), task)


def test_the_task_is_the_batchs_own_or_that_of_the_loaders_place():
    model = Fixed()
    assert model.task_of(batch("c"), 0) == "c"
    assert model.task_of({"task": "keys", "x": 1}, 0) == "keys"
    assert model.task_of({"x": 1}, 2) == "c"
    assert model.task_of(torch.ones(2), 1) == "keys"
    assert model.task_of((torch.ones(2), None), 1) == "keys"
    for given, place, name in ((batch("d"), 0, "'d'"), ({"task": "d"}, 1, "'d'"), (torch.ones(2), 3, "None")):
        with pytest.raises(ValueError, match=f"task {name} came from loader {place}, the tasks are a.b, keys, c: give"):
            model.task_of(given, place)


def test_predictions_are_probabilities_and_lines_with_task_row_and_label(tmp_path):
    data = image_data()
    model = Fixed()
    found = trainer(tmp_path).predict(model, data.predict_dataloader())
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * 24
    assert [line["row"] for line in lines] == 3 * list(range(24))
    flat = [row for part in found for probabilities in part for row in probabilities]
    assert all(float(row.sum()) == pytest.approx(1, abs=1e-5) for row in flat)
    for line, row in zip(lines, flat, strict=True):
        assert line["label"] == int(row.argmax())
        assert line["probability"] == pytest.approx(float(row.max()), abs=1e-5)
    assert [line["task"] for line in lines] == [task for task in NAMES for _ in range(24)]


def test_rows_of_batches_without_numbers_are_empty(tmp_path):
    trainer(tmp_path).predict(Fixed(), loaders())
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert {line["row"] for line in lines} == {None}


@pytest.mark.parametrize("names", [[], ["a", "a"]])
def test_tasks_must_be_there_and_differ(names):
    with pytest.raises(ValueError, match="at least one, each with a name of its own"):
        TaskEvaluation(names)
