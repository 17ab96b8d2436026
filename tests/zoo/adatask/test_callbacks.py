"""The monitor of a Lightning run: it sees what TaskDominance sees, changes nothing, and survives a restart."""

from __future__ import annotations

import json

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from tests.zoo.adatask.problems import TwoHeads
from zoo.adatask import AdaTask, TaskDominanceMonitor, TaskGradMixin

ROWS, LR = 32, 1e-2
TASKS = ["0", "1", "2"]
OPTIMIZERS = {
    "adatask": lambda p: AdaTask(p, TASKS, lr=LR),
    "adam": lambda p: torch.optim.Adam(p, lr=LR),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, nesterov=True, foreach=True),
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*it is recommended to use `Trainer\\(devices=1"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


@pytest.fixture(autouse=True)
def _no_pictures(request, monkeypatch):
    """Drawing takes longer than these fits."""
    if "pictures" not in request.node.name:
        monkeypatch.setattr("zoo.adatask.callbacks.log_figure", lambda module, key, figure: None)
        for name in ("plot_dominance", "plot_histograms"):
            monkeypatch.setattr(f"zoo.adatask.callbacks.{name}", lambda *arguments: None)


class Global(DistributedSampler):
    """Consecutive global batches, cut among the ranks."""

    def __init__(self, batch_size):
        running = torch.distributed.is_available() and torch.distributed.is_initialized()
        world = torch.distributed.get_world_size() if running else 1
        rank = torch.distributed.get_rank() if running else 0
        super().__init__(range(ROWS), num_replicas=world, rank=rank, shuffle=False)
        self.size = batch_size

    def __len__(self):
        return ROWS // (self.num_replicas * self.size)

    def __iter__(self):
        for start in range(self.rank * self.size, ROWS, self.num_replicas * self.size):
            yield list(range(start, start + self.size))


class Model(TaskGradMixin, LightningModule):
    def __init__(self, optimizer="adatask", batch_size=8, scale=10.0):
        super().__init__()
        self.net = TwoHeads()
        self.make, self.batch_size, self.scale = OPTIMIZERS[optimizer], batch_size, scale

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        losses, features = self.net.losses(inputs, targets.T)
        return self.joint_loss({str(k): loss * self.scale**k for k, loss in enumerate(losses)}, features=features)

    def configure_optimizers(self):
        return self.make(self.parameters())

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        rows = TensorDataset(*(torch.randn(ROWS, n, generator=generator, dtype=torch.float64) for n in (5, 3)))
        return DataLoader(rows, batch_size=None, sampler=Global(self.batch_size))


def fit(model, monitor=None, epochs=2, ckpt_path=None, callbacks=(), **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    options = {**quiet, "accelerator": "cpu", "enable_checkpointing": bool(callbacks), **options}
    trainer = Trainer(max_epochs=epochs, callbacks=[*([monitor] if monitor else []), *callbacks], **options)
    trainer.fit(model, ckpt_path=ckpt_path)
    return trainer


def distance(left, right):
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_monitor_does_not_change_the_training(optimizer, clip, tmp_path):
    watched, alone = Model(optimizer), Model(optimizer)
    options = {"gradient_clip_val": clip, "default_root_dir": tmp_path}
    fit(watched, TaskDominanceMonitor(), **options)
    fit(alone, **options)
    assert distance(watched, alone) < 1e-12
    assert distance(watched.net, TwoHeads()) > 1e-4
    assert not watched.watch_tasks


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipped_steps_are_split_completely(algorithm, tmp_path):
    changes = []

    class Checked(TaskDominanceMonitor):
        def on_train_start(self, trainer, pl_module):
            super().on_train_start(trainer, pl_module)
            inner, before = self._dominance.observe, {p: p.detach().clone() for p in pl_module.parameters()}

            def observe(parameter, updates, task_ids):
                change = (parameter - before[parameter]).detach().flatten()
                changes.append(float((updates.sum(0) - change).abs().max()))
                before[parameter] = parameter.detach().clone()
                inner(parameter, updates, task_ids)

            self._dominance.observe = observe

    fit(Model("adam"), Checked(), gradient_clip_val=0.05, gradient_clip_algorithm=algorithm, default_root_dir=tmp_path)
    assert len(changes) == 4 * 8 and max(changes) < 1e-12


def test_adam_is_owned_by_the_large_loss_and_adatask_by_nobody(tmp_path):
    found = {}
    for optimizer in ("adam", "adatask"):
        monitor = TaskDominanceMonitor(decay=0.9)
        fit(Model(optimizer, scale=100.0), monitor, epochs=4, default_root_dir=tmp_path)
        found[optimizer] = monitor.table().set_index(["layer", "task"])["mean"]
    assert list(found["adam"].index) == [(f"net.trunk.{i}", task) for i in (0, 2) for task in TASKS]
    # Losses of 1 : 100 : 10000.
    assert found["adam"]["net.trunk.0", "2"] > 0.9 and found["adam"]["net.trunk.0", "0"] < 0.01
    assert found["adatask"].between(0.1, 0.6).all()


def test_metrics_pictures_and_table_lie_with_the_run(tmp_path):
    monitor = TaskDominanceMonitor(log=["mean", "median", "dominated", "entropy"], groups="parameter")
    logger = CSVLogger(tmp_path)
    trainer = fit(Model(), monitor, logger=logger)
    folder = tmp_path / "lightning_logs" / "version_0"
    assert {p.name for p in (folder / "figures" / "rau").iterdir()} == {"heatmap.png", "histograms.png"}
    rows = [json.loads(line) for line in (folder / "tables" / "rau.jsonl").read_text().splitlines()]
    assert rows == monitor.table().to_dict("records")
    assert len(rows) == 4 * 3 and rows[0]["layer"] == "net.trunk.0.weight"
    for row in rows:
        logged = {
            "mean": trainer.callback_metrics[f"rau/{row['layer']}/{row['task']}"],
            "median": trainer.callback_metrics[f"rau_median/{row['layer']}/{row['task']}"],
            "dominated": trainer.callback_metrics[f"rau_dominated/{row['layer']}"],
            "entropy": trainer.callback_metrics[f"rau_entropy/{row['layer']}"],
        }
        assert {name: float(value) for name, value in logged.items()} == pytest.approx({n: row[n] for n in logged})
    header = (folder / "metrics.csv").read_text().splitlines()[0]
    assert "rau_entropy/net.trunk.0.bias" in header and "heads" not in header


def test_only_what_was_asked_for_is_logged(tmp_path):
    trainer = fit(Model(), TaskDominanceMonitor(log=["entropy"]), default_root_dir=tmp_path)
    assert set(trainer.callback_metrics) == {"rau_entropy/net.trunk.0", "rau_entropy/net.trunk.2"}


@pytest.mark.parametrize(("every", "expected"), [(0, 1), (1, 5), (2, 3), (5, 1)])
def test_pictures_are_drawn_every_so_many_epochs_and_at_the_end(every, expected, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("zoo.adatask.callbacks.log_figure", lambda module, key, figure: drawn.append(key))
    fit(Model(), TaskDominanceMonitor(histogram_every_n_epochs=every), epochs=5, default_root_dir=tmp_path)
    assert drawn == ["rau/heatmap", "rau/histograms"] * expected


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_has_the_averages_of_one_that_was_never_stopped(optimizer, every, tmp_path):
    def options(folder):
        saver = ModelCheckpoint(dirpath=tmp_path / folder, filename="last", enable_version_counter=False)
        return {"callbacks": [saver], "default_root_dir": tmp_path}

    def monitor():
        return TaskDominanceMonitor(mode="exact", every_n_steps=every)

    whole, resumed = monitor(), monitor()
    model, other = Model(optimizer), Model(optimizer)
    fit(model, whole, epochs=4, **options("whole"))
    fit(Model(optimizer), monitor(), epochs=2, **options("part"))
    file = tmp_path / "part" / "last.ckpt"
    assert torch.load(file, weights_only=True)["callbacks"][whole.state_key]["steps"] == 8
    fit(other, resumed, epochs=4, ckpt_path=file, **options("resumed"))
    assert distance(model, other) == 0
    for p, q in zip(model.net.trunk.parameters(), other.net.trunk.parameters(), strict=True):
        assert torch.equal(whole._dominance.rau(p), resumed._dominance.rau(q))


@pytest.mark.parametrize("optimizer", ["adatask", "adam"])
def test_two_processes_see_the_shares_of_one(optimizer, tmp_path):
    class Saved(TaskDominanceMonitor):
        def on_train_end(self, trainer, pl_module):
            super().on_train_end(trainer, pl_module)
            self.table().to_json(tmp_path / f"{trainer.world_size}-{trainer.global_rank}.json", orient="records")

    one = fit(Model(optimizer, 8), Saved(), default_root_dir=tmp_path / "one")
    two = fit(Model(optimizer, 4), Saved(), default_root_dir=tmp_path / "two", strategy="ddp_fork", devices=2)
    tables = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1")]
    assert tables[1] == tables[2] and len(tables[0]) == 6
    for row, other in zip(tables[0], tables[1], strict=True):
        assert {n: row[n] for n in ("layer", "task", "elements")} == {
            n: other[n] for n in ("layer", "task", "elements")
        }
        assert row["mean"] == pytest.approx(other["mean"], abs=1e-5)
    assert set(one.callback_metrics) == set(two.callback_metrics)
    assert (tmp_path / "two" / "tables" / "rau.jsonl").read_text().count("\n") == 6


@pytest.mark.parametrize(
    ("optimizer", "every", "mode"),
    [("adam", 1, "exact"), ("adam", 4, "instant"), ("adatask", 1, "exact"), ("adatask", 4, "exact")],
)
def test_auto_leaves_momentum_out_where_a_plain_optimizer_is_sampled(optimizer, every, mode, tmp_path):
    monitor = TaskDominanceMonitor(every_n_steps=every, subsample=0.5, device="cpu")
    fit(Model(optimizer), monitor, epochs=1, default_root_dir=tmp_path)
    state = monitor.state_dict()
    assert state["options"]["mode"] == mode and state["steps"] == 4
    assert len(monitor.table()) == 6


def test_accumulated_batches_are_one_step(tmp_path):
    large, small = TaskDominanceMonitor(), TaskDominanceMonitor()
    fit(Model("adam", 16), large, default_root_dir=tmp_path)
    fit(Model("adam", 8), small, accumulate_grad_batches=2, default_root_dir=tmp_path)
    assert small.state_dict()["steps"] == 4
    assert small.table()["mean"].tolist() == pytest.approx(large.table()["mean"].tolist(), abs=1e-9)


def test_two_monitors_of_one_run_have_a_state_each(tmp_path):
    fast, slow = TaskDominanceMonitor(decay=0.5), TaskDominanceMonitor(groups=str.upper)
    fit(Model(), fast, callbacks=[slow], default_root_dir=tmp_path)
    assert fast.state_key != slow.state_key
    assert slow.table()["layer"][0] == "NET.TRUNK.0.WEIGHT" and fast.table()["layer"][0] == "net.trunk.0"


def test_fitting_again_starts_anew_and_nothing_stays_on_the_optimizer(tmp_path):
    monitor, model = TaskDominanceMonitor(), Model()
    trainer = fit(model, monitor, default_root_dir=tmp_path)
    assert monitor.state_dict()["steps"] == 8 and not trainer.optimizers[0]._hooks
    fit(model, monitor, epochs=1, default_root_dir=tmp_path)
    assert monitor.state_dict()["steps"] == 4


def test_a_module_without_gradients_by_task_is_refused():
    class Plain(LightningModule):
        pass

    with pytest.raises(TypeError, match=r"derive Plain from zoo.adatask.TaskGradMixin, and return self.joint_loss"):
        TaskDominanceMonitor().setup(None, Plain(), "fit")
    TaskDominanceMonitor().setup(None, Plain(), "test")


def test_an_optimizer_that_cannot_be_split_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "lbfgs", torch.optim.LBFGS)
    with pytest.raises(RuntimeError, match="the step of LBFGS cannot be split by task: use AdaTask, or one of torch's"):
        fit(Model("lbfgs"), TaskDominanceMonitor(), default_root_dir=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "quick"}, "mode must be one of auto, exact, instant, got 'quick'"),
        ({"log": ["mean", "max"]}, r"log must be a list of mean, median, dominated, entropy, got \['mean', 'max'\]"),
        ({"log": "mean"}, "log must be a list of mean, median, dominated, entropy, got 'mean'"),
        ({"histogram_every_n_epochs": -1}, "histogram_every_n_epochs must not be negative, got -1"),
        ({"decay": 1.5}, r"decay must be in \[0, 1\), got 1.5"),
        ({"groups": "block"}, "groups must be 'module', 'parameter' or a function of a name, got 'block'"),
    ],
)
def test_options_out_of_range_are_named_before_the_fit(options, message):
    with pytest.raises(ValueError, match=message):
        TaskDominanceMonitor(**options)


def test_there_is_no_table_before_a_fit():
    with pytest.raises(RuntimeError, match="nothing to show before a fit"):
        TaskDominanceMonitor().table()


def test_the_monitor_is_built_from_plain_yaml_values():
    parser = ArgumentParser()
    parser.add_argument("--callbacks", type=list[Callback])
    line = ["--callbacks+=zoo.adatask.TaskDominanceMonitor", "--callbacks.decay=0.9", "--callbacks.log=[mean,median]"]
    options = ["--callbacks.groups=parameter", "--callbacks.every_n_steps=5", "--callbacks.device=cpu"]
    (monitor,) = parser.instantiate_classes(parser.parse_args([*line, *options])).callbacks
    assert isinstance(monitor, TaskDominanceMonitor)
    assert monitor.state_key == TaskDominanceMonitor(0.9, every_n_steps=5, groups="parameter").state_key
