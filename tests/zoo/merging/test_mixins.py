"""A module with the mixin adapts to inputs without labels, and tells entropy and accuracy of each task."""

from __future__ import annotations

import csv
import math
from typing import NamedTuple

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.utils.data import DataLoader

from zoo.merging.mixins import EntropyAdaptation
from zoo.merging.objectives import expert_kl, information_maximisation

TASKS = ["mnist", "svhn.cropped"]
SIZES = {"mnist": 9, "svhn.cropped": 6}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*it is recommended to use `Trainer\\(devices=1"),
]


class Batch(NamedTuple):
    images: Tensor
    labels: Tensor | None
    task: str


def rows(task):
    generator = torch.Generator().manual_seed(len(task))
    inputs = torch.randn(SIZES[task], 4, generator=generator)
    return inputs, (inputs @ torch.randn(4, 3, generator=generator)).argmax(1)


def batches(task, size=4, labels=True):
    inputs, targets = rows(task)
    pairs = zip(inputs.split(size), targets.split(size), strict=True)
    return [Batch(own, target if labels else None, task) for own, target in pairs]


class Model(EntropyAdaptation, LightningModule):
    task_names = TASKS

    def __init__(self, labels=True):
        super().__init__()
        self.net, self.labels = nn.Linear(4, 3), labels
        with torch.no_grad():
            self.net.weight.copy_(torch.arange(12.0).reshape(3, 4).cos())
            self.net.bias.zero_()

    def training_step(self, batch, batch_idx):
        return sum(self.adaptation_loss(self.net(own.images), task=task) for task, own in batch.items())

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.score(self.net(batch.images), batch.labels, task=batch.task)

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader([{task: batches(task)[0] for task in TASKS}] * 3, batch_size=None)

    def val_dataloader(self):
        return [DataLoader(batches(task, labels=self.labels), batch_size=None) for task in TASKS]

    test_dataloader = val_dataloader


def trainer(tmp_path, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    quiet |= {"logger": CSVLogger(tmp_path), "accelerator": "cpu", "max_epochs": 1, "log_every_n_steps": 1}
    return Trainer(**{**quiet, **options})


@torch.no_grad()
def expected(net, stage):
    found = {}
    for task in TASKS:
        inputs, labels = rows(task)
        logits = net(inputs)
        found[f"{stage}/entropy/{task}"] = float(Categorical(logits=logits).entropy().mean())
        found[f"{stage}/acc/{task}"] = float((logits.argmax(1) == labels).float().mean())
    for key in ("entropy", "acc"):
        found[f"{stage}/{key}/mean"] = sum(found[f"{stage}/{key}/{task}"] for task in TASKS) / 2
    return found


@pytest.mark.parametrize("stage", ["val", "test"])
def test_entropy_and_accuracy_of_each_task_are_over_all_inputs(stage, tmp_path):
    run, model = trainer(tmp_path), Model()
    (run.validate if stage == "val" else run.test)(model, verbose=False)
    found = {name: float(value) for name, value in run.callback_metrics.items()}
    assert found == pytest.approx(expected(model.net, stage), abs=1e-6)


def test_without_labels_the_entropy_is_told_alone(tmp_path):
    run = trainer(tmp_path)
    run.validate(Model(labels=False), verbose=False)
    assert set(run.callback_metrics) == {f"val/entropy/{task}" for task in (*TASKS, "mean")}


def test_training_minimises_the_entropy_and_logs_it_by_task(tmp_path):
    run, model = trainer(tmp_path, limit_val_batches=0), Model()
    with torch.no_grad():
        first = {task: float(Categorical(logits=model.net(batches(task)[0].images)).entropy().mean()) for task in TASKS}
    run.fit(model)
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open() as file:
        logged = list(csv.DictReader(file))
    assert len(logged) == 3
    for task in TASKS:
        assert float(logged[0][f"train/entropy/{task}"]) == pytest.approx(first[task])
    total = [sum(float(row[f"train/entropy/{task}"]) for task in TASKS) for row in logged]
    assert total[0] > total[1] > total[2]


def test_labels_change_nothing(tmp_path):
    class Shuffled(Model):
        def train_dataloader(self):
            made = {task: batches(task)[0] for task in TASKS}
            return DataLoader([{t: b._replace(labels=b.labels.flip(0)) for t, b in made.items()}] * 3, batch_size=None)

    models = Model(), Shuffled()
    for model in models:
        trainer(tmp_path).fit(model)
    assert torch.equal(models[0].net.weight, models[1].net.weight)
    assert not torch.equal(models[0].net.weight, Model().net.weight)


def test_the_course_of_a_fit_is_kept_and_drawn(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("zoo.merging.mixins.log_figure", lambda module, key, figure: drawn.append((key, figure)))
    run, model = trainer(tmp_path, max_epochs=2), Model()
    run.fit(model)
    history = model.adaptation_history
    assert {key: list(own) for key, own in history.items()} == {"entropy": TASKS, "acc": TASKS}
    # The sanity check before the first step is none of it.
    assert [step for step, _ in history["acc"]["mnist"]] == [3, 6]
    assert history["entropy"]["mnist"][1][1] == pytest.approx(expected(model.net, "val")["val/entropy/mnist"])
    ((key, figure),) = drawn
    assert key == "adaptation"
    assert [axis.get_title() for axis in figure.axes] == ["entropy in nats", "accuracy"]
    assert [name.get_text() for name in figure.legends[0].get_texts()] == [*TASKS, "mean"]


def test_a_validation_before_the_fit_is_the_start_of_its_course(tmp_path):
    run, model = trainer(tmp_path), Model()
    run.validate(model, verbose=False)
    run.fit(model)
    run.test(model, verbose=False)
    assert [step for step, _ in model.adaptation_history["entropy"]["mnist"]] == [0, 3]
    assert list(tmp_path.rglob("adaptation.png"))


@pytest.mark.parametrize("options", [{"max_epochs": 1}, {"fast_dev_run": True}])
def test_one_validation_makes_no_picture(options, tmp_path):
    trainer(tmp_path, **options).fit(Model())
    assert not list(tmp_path.rglob("*.png"))


def test_hooks_of_the_module_still_run(tmp_path):
    called = []

    class Base(LightningModule):
        def on_validation_epoch_end(self):
            called.append("val")

        def on_test_epoch_end(self):
            called.append("test")

        def on_train_end(self):
            called.append("train")

    class Hooked(Model, Base):
        pass

    run, model = trainer(tmp_path, num_sanity_val_steps=0), Hooked()
    run.fit(model)
    run.test(model, verbose=False)
    assert called == ["val", "train", "test"]


def test_nothing_of_it_is_in_the_checkpoint(tmp_path):
    model = Model()
    before = list(model.state_dict())
    trainer(tmp_path).fit(model)
    assert list(model.state_dict()) == before == ["net.weight", "net.bias"]


def test_other_objectives_are_those_of_the_room(tmp_path):
    logits, other = torch.randn(5, 3), torch.randn(5, 3)

    class Several(Model):
        def training_step(self, batch, batch_idx):
            self.found = [
                self.adaptation_loss(logits, "im", task="mnist"),
                self.adaptation_loss(logits, "expert_kl", task="mnist", expert_logits=other),
                self.adaptation_loss(logits, task="mnist", normalize=True),
            ]
            return self.net.bias.sum()

    run, model = trainer(tmp_path, limit_train_batches=1, limit_val_batches=0), Several()
    run.fit(model)
    im, kl, share = (float(value) for value in model.found)
    assert im == pytest.approx(float(information_maximisation(logits)))
    assert kl == pytest.approx(float(expert_kl(logits, other)))
    assert share == pytest.approx(float(Categorical(logits=logits).entropy().mean()) / math.log(3))
    assert {"train/im/mnist", "train/expert_kl/mnist", "train/entropy/mnist"} <= set(run.callback_metrics)


def test_a_module_with_one_task_need_not_name_it(tmp_path):
    class One(Model):
        task_names = ("all",)

        def training_step(self, batch, batch_idx):
            return self.adaptation_loss(self.net(batch["mnist"].images))

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.score(self.net(batch.images), batch.labels)

    run = trainer(tmp_path)
    run.fit(One())
    assert {"train/entropy/all", "val/entropy/all", "val/acc/mean"} <= set(run.callback_metrics)
    assert EntropyAdaptation.task_names == ("all",)


def test_the_history_of_one_module_is_not_that_of_another(tmp_path):
    first, second = Model(), Model()
    trainer(tmp_path).fit(first)
    assert first.adaptation_history["acc"] and second.adaptation_history == {"entropy": {}, "acc": {}}


def test_two_processes_score_as_one(tmp_path):
    class Shared(Model):
        # The first process has all of one task and a part of the other, the second the rest of that one alone.
        def val_dataloader(self):
            parts = [batches("mnist"), batches("svhn.cropped", 2)[:1]]
            if self.trainer.global_rank:
                parts = [[batch] for batch in batches("svhn.cropped", 2)[1:]]
            return [DataLoader(part, batch_size=None) for part in parts]

        def on_validation_end(self):
            found = {name: float(value) for name, value in self.trainer.callback_metrics.items() if "val" in name}
            torch.save(found, tmp_path / f"{self.global_rank}.pt")
            torch.save(self.net.state_dict(), tmp_path / "net.pt")

    options = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False, "num_sanity_val_steps": 0}
    trainer(tmp_path, **options).fit(Shared())
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    model = Model()
    model.net.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    assert first == second == pytest.approx(expected(model.net, "val"), abs=1e-6)


def test_tasks_that_are_not_named_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"one of task_names \(mnist, svhn\.cropped\), got 'svhn'"):
        Model().adaptation_loss(torch.rand(2, 3), task="svhn")
    with pytest.raises(ValueError, match="got None"):
        Model().adaptation_loss(torch.rand(2, 3))
    with pytest.raises(ValueError, match="unknown objective 'tent'; known: entropy, im"):
        Model().adaptation_loss(torch.rand(2, 3), "tent", task="mnist")


def test_training_batches_are_not_scored(tmp_path):
    class Wrong(Model):
        def training_step(self, batch, batch_idx):
            self.score(self.net(batch["mnist"].images), task="mnist")

    with pytest.raises(RuntimeError, match="counts batches of validation and test steps"):
        trainer(tmp_path).fit(Wrong())


def test_the_mixin_must_stand_first():
    with pytest.raises(TypeError, match="class Late: EntropyAdaptation must stand before LightningModule"):

        class Late(LightningModule, EntropyAdaptation):
            pass
