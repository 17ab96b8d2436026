"""Features of a module beside those of the experts, in a run of a module that knows nothing of them."""

from __future__ import annotations

import logging
from typing import NamedTuple

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from zoo.merging import feature_callbacks
from zoo.merging.feature_callbacks import RepresentationBiasCallback, TSNECallback

TASKS = ["mnist", "svhn"]
SIZES = {"mnist": 10, "svhn": 7, "unseen": 5}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*it is recommended to use `Trainer\\(devices=1"),
]


class Batch(NamedTuple):
    images: Tensor
    labels: Tensor | None
    task: str


def images(task):
    return torch.randn(SIZES[task], 3, generator=torch.Generator().manual_seed(len(task)))


class Rows(Dataset):
    """Images of a task; batches tell their task, or are pairs."""

    def __init__(self, task, named=True):
        self.task, self.named, self.images = task, named, images(task)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        return self.images[row], row

    def collate(self, rows):
        found, labels = torch.stack([image for image, _ in rows]), torch.tensor([label for _, label in rows])
        return Batch(found, labels, self.task) if self.named else (found, labels)


class Model(LightningModule):
    """Features that move by 1 at each step, in all dimensions."""

    def __init__(self, tasks=TASKS, named=True, start=0.5):
        super().__init__()
        self.shift, self.tasks, self.named = nn.Parameter(torch.full((3,), start)), tasks, named
        self.dropout = nn.Dropout(0.5)

    def forward(self, inputs):
        return self.dropout(inputs) + self.shift

    def training_step(self, batch, batch_idx):
        return self.shift.sum()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0, maximize=True)

    def train_dataloader(self):
        return DataLoader(torch.zeros(2, 1), batch_size=2)

    def val_dataloader(self):
        rows = [Rows(task, self.named) for task in self.tasks]
        return [DataLoader(own, batch_size=4, collate_fn=own.collate) for own in rows]


class Expert(nn.Module):
    """Features that are the inputs, but for what evaluation turns off."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale, self.dropout = nn.Parameter(torch.tensor(scale)), nn.Dropout(0.5)

    def forward(self, inputs):
        return self.dropout(inputs) * self.scale


def experts():
    return {"mnist": Expert(), "svhn": Expert(2.0)}


def trainer(*added, tmp_path, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    quiet |= {"logger": CSVLogger(tmp_path), "accelerator": "cpu", "max_epochs": 1, "log_every_n_steps": 1}
    return Trainer(callbacks=list(added), **{**quiet, **options})


def bias(task, shift, scale=None):
    found = images(task)
    return float(F.l1_loss(found + shift, found * ({"svhn": 2.0}.get(task, 1.0) if scale is None else scale)))


@pytest.fixture
def drawn(monkeypatch):
    """Pictures by key, instead of files."""
    found = []
    monkeypatch.setattr(feature_callbacks, "log_figure", lambda module, key, figure: found.append((key, figure)))
    return found


@pytest.fixture
def embedded(monkeypatch, drawn):
    """What would have been embedded."""
    found = []
    monkeypatch.setattr(feature_callbacks, "plot_tsne_grid", lambda features, seed: found.append(features) or seed)
    return found


def test_the_bias_of_a_validation_is_that_of_all_images(tmp_path, drawn):
    run = trainer(RepresentationBiasCallback(experts()), tmp_path=tmp_path)
    run.validate(Model(), verbose=False)
    found = {name: float(value) for name, value in run.callback_metrics.items()}
    expected = {"bias_l1/mnist": 0.5, "bias_l1/svhn": bias("svhn", 0.5)}
    expected["bias_l1/mean"] = sum(expected.values()) / 2
    assert found == pytest.approx(expected, abs=1e-6) and not drawn


def test_a_fit_is_drawn_from_the_first_validation_to_the_last(tmp_path, drawn):
    watch = RepresentationBiasCallback(experts())
    run = trainer(watch, tmp_path=tmp_path, max_epochs=3)
    model = Model()
    run.validate(model, verbose=False)
    run.fit(model)
    assert float(run.callback_metrics["bias_l1/mnist"]) == pytest.approx(3.5)
    ((key, figure),) = drawn
    assert key == "bias_l1"
    assert list(watch.state_dict()["first"]["biases"]) == TASKS
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights[0] == pytest.approx(0.5) and heights[3] == pytest.approx(3.5)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["step 0", "step 3"]


def test_the_sanity_check_does_not_count(tmp_path, drawn):
    watch = RepresentationBiasCallback(experts())
    trainer(watch, tmp_path=tmp_path, num_sanity_val_steps=1).fit(Model())
    assert watch.state_dict()["first"]["step"] == 1


@pytest.mark.parametrize(("every", "first"), [(1, 1), (3, 3), (9, None)])
def test_every_so_many_epochs_count(every, first, tmp_path, drawn):
    watch = RepresentationBiasCallback(experts(), every_n_epochs=every)
    trainer(watch, tmp_path=tmp_path, max_epochs=4).fit(Model())
    assert watch.state_dict()["first"].get("step") == first


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_that_goes_on_keeps_the_first_biases(tmp_path, drawn):
    saver = ModelCheckpoint(dirpath=tmp_path / "kept", filename="last")
    watch, file = RepresentationBiasCallback(experts()), tmp_path / "kept" / "last.ckpt"
    trainer(watch, saver, tmp_path=tmp_path, enable_checkpointing=True).fit(Model())
    torch.load(file, weights_only=True)
    trainer(RepresentationBiasCallback(experts()), tmp_path=tmp_path, max_epochs=3).fit(Model(), ckpt_path=file)
    _, figure = drawn[-1]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["step 1", "step 3"]
    assert figure.axes[0].patches[0].get_height() == pytest.approx(1.5)


def test_experts_are_evaluated_and_left_where_they_were(tmp_path):
    networks = experts()
    trainer(RepresentationBiasCallback(networks), tmp_path=tmp_path).validate(Model(), verbose=False)
    for network in networks.values():
        assert not network.training and network.scale.device.type == "cpu" and network.scale.grad is None


def test_one_expert_at_a_time_is_on_the_device(monkeypatch):
    networks = experts()
    found = feature_callbacks._Experts(networks, lambda expert, inputs: expert(inputs))
    moves = []
    for name, network in networks.items():
        monkeypatch.setattr(
            network, "to", lambda device, name=name, own=network: moves.append((name, str(device))) or own
        )
    for task in ("mnist", "mnist", "svhn"):
        found.features_of(task, images(task), torch.device("meta"))
    found.release()
    found.release()
    assert moves == [("mnist", "meta"), ("mnist", "cpu"), ("svhn", "meta"), ("svhn", "cpu")]


def test_features_of_the_module_may_come_from_elsewhere_and_labels_never_arrive(tmp_path):
    seen = []

    def of_module(module, batch):
        seen.append(batch)
        return batch.images + 7

    watch = RepresentationBiasCallback(experts(), module_features=of_module)
    run = trainer(watch, tmp_path=tmp_path)
    run.validate(Model(), verbose=False)
    assert float(run.callback_metrics["bias_l1/mnist"]) == pytest.approx(7)
    assert {batch.task for batch in seen} == set(TASKS) and all(batch.labels is None for batch in seen)


def test_without_a_field_the_loaders_are_those_of_the_experts(tmp_path):
    run = trainer(RepresentationBiasCallback(experts()), tmp_path=tmp_path)
    run.validate(Model(named=False), verbose=False)
    assert float(run.callback_metrics["bias_l1/svhn"]) == pytest.approx(bias("svhn", 0.5))
    run = trainer(RepresentationBiasCallback({"mnist": Expert()}), tmp_path=tmp_path)
    with pytest.raises(
        ValueError, match=r"does not tell its task, and 2 validation loaders are not those of .* mnist:"
    ):
        run.validate(Model(named=False), verbose=False)


def test_a_mapping_tells_its_task_too(tmp_path):
    class Mapped(Model):
        def val_dataloader(self):
            return DataLoader([{"x": images(task), "task": task} for task in reversed(TASKS)], batch_size=None)

    watch = RepresentationBiasCallback(experts(), lambda model, batch: model(batch["x"]))
    run = trainer(watch, tmp_path=tmp_path)
    run.validate(Mapped(), verbose=False)
    assert float(run.callback_metrics["bias_l1/svhn"]) == pytest.approx(bias("svhn", 0.5))


def test_tasks_without_an_expert_are_left_out_and_said_once(tmp_path, caplog):
    run = trainer(RepresentationBiasCallback({"svhn": Expert(2.0)}), tmp_path=tmp_path)
    with caplog.at_level(logging.INFO):
        run.validate(Model(), verbose=False)
    said = [record.message for record in caplog.records if record.name.startswith("zoo.")]
    assert set(run.callback_metrics) == {"bias_l1/svhn", "bias_l1/mean"}
    assert said == ["There is no expert of mnist: its features are not compared."]


def test_features_of_other_shapes_are_refused(tmp_path):
    watch = RepresentationBiasCallback(experts(), module_features=lambda module, batch: batch.images[:, :2])
    with pytest.raises(ValueError, match=r"features have shape \(4, 2\), the expert's \(4, 3\)"):
        trainer(watch, tmp_path=tmp_path).validate(Model(), verbose=False)


# The second process has one of the tasks only, or none that has an expert.
@pytest.mark.parametrize("others", [["svhn", "svhn"], ["unseen", "unseen"]], ids=["one task", "no task"])
def test_two_processes_find_the_bias_of_one(others, tmp_path, drawn):
    class Saved(RepresentationBiasCallback):
        def on_validation_end(self, trainer, pl_module):
            found = {name: float(value) for name, value in trainer.callback_metrics.items()}
            torch.save(found, tmp_path / f"{trainer.global_rank}.pt")

    class Shifted(Model):
        def val_dataloader(self):
            kept = self.tasks if self.trainer.global_rank == 0 else others
            rows = [Rows(task) for task in kept]
            return [DataLoader(own, batch_size=4, collate_fn=own.collate) for own in rows]

    options = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    trainer(Saved(experts()), tmp_path=tmp_path, **options).fit(Shifted())
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first == second
    assert first["bias_l1/svhn"] == pytest.approx(bias("svhn", 1.5))
    assert first["bias_l1/mnist"] == pytest.approx(bias("mnist", 1.5))


def test_mixed_precision_applies_to_module_and_expert_alike(tmp_path):
    seen = []

    def linear(model, batch):
        out = F.linear(batch.images, torch.eye(3))
        seen.append(out.dtype)
        return out

    run = trainer(RepresentationBiasCallback(experts(), linear), tmp_path=tmp_path, precision="bf16-mixed")
    run.validate(Model(), verbose=False)
    assert set(seen) == {torch.bfloat16} and float(run.callback_metrics["bias_l1/mean"]) == 0


def test_tsne_gets_the_features_of_the_same_images(tmp_path, embedded, drawn):
    sources = {
        "merged": lambda module, batch: module(batch.images),
        "repaired": lambda module, batch: module(batch.images) - module.shift,
    }
    watch = TSNECallback(experts(), sources, max_images=6, seed=4)
    trainer(watch, tmp_path=tmp_path).fit(Model())
    (found,) = embedded
    assert drawn == [("tsne", 4)] and list(found) == TASKS
    for task, features in found.items():
        assert list(features) == ["merged", "individual", "repaired"]
        assert all(tuple(own.shape) == (6, 3) for own in features.values())
        assert torch.allclose(features["merged"], features["repaired"] + 1.5)
        scale = 2.0 if task == "svhn" else 1.0
        assert torch.allclose(features["individual"], features["repaired"] * scale)


def test_the_images_of_tsne_are_spread_over_the_loader(tmp_path, embedded):
    trainer(TSNECallback(experts(), max_images=4), tmp_path=tmp_path).validate(Model(), verbose=False)
    ((found,),) = (embedded,)
    chosen = (found["mnist"]["merged"][:, None] - 0.5 - images("mnist")).abs().sum(2).argmin(1).tolist()
    assert chosen == [0, 3, 4, 7]  # 10 images in batches of 4, of each of which 2 are wanted
    assert len(found["svhn"]["merged"]) == 4


@pytest.mark.parametrize(("every", "pictures"), [(0, 1), (1, 4), (3, 2)])
def test_tsne_is_drawn_every_so_many_epochs_and_at_the_end(every, pictures, tmp_path, embedded):
    watch = TSNECallback(experts(), every_n_epochs=every)
    trainer(watch, tmp_path=tmp_path, max_epochs=4, num_sanity_val_steps=1).fit(Model())
    assert len(embedded) == pictures
    assert torch.allclose(embedded[-1]["mnist"]["merged"], images("mnist") + 4.5)


def test_a_fast_dev_run_embeds_nothing(tmp_path, embedded):
    trainer(TSNECallback(experts()), tmp_path=tmp_path, fast_dev_run=True).fit(Model())
    assert not embedded


def test_tsne_leaves_a_picture(tmp_path):
    trainer(TSNECallback(experts()), tmp_path=tmp_path).validate(Model(), verbose=False)
    assert [path.name for path in tmp_path.rglob("*.png")] == ["tsne.png"]


def test_one_of_two_processes_draws_tsne(tmp_path):
    options = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    trainer(TSNECallback(experts(), max_images=4), tmp_path=tmp_path, **options).fit(Model())
    assert [path.name for path in tmp_path.rglob("*.png")] == ["tsne.png"]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RepresentationBiasCallback({}), "experts is empty"),
        (lambda: TSNECallback({}), "experts is empty"),
        (lambda: RepresentationBiasCallback(experts(), every_n_epochs=0), "every_n_epochs must be at least 1, got 0"),
        (lambda: TSNECallback(experts(), every_n_epochs=-1), "every_n_epochs must not be negative, got -1"),
        (lambda: TSNECallback(experts(), max_images=3), "max_images must be at least 4, got 3"),
        (lambda: TSNECallback(experts(), {"individual": Expert.forward}), "'individual' is that of the experts"),
    ],
    ids=["no expert", "no expert for tsne", "no epoch", "negative", "too few", "taken"],
)
def test_wrong_options_are_named_at_once(build, message):
    with pytest.raises(ValueError, match=message):
        build()
