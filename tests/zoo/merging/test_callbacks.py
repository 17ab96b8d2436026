"""The callbacks of merging, on modules that know nothing of them."""

from __future__ import annotations

import csv

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from zoo.merging import callbacks
from zoo.merging.callbacks import CoefficientLogger, MergeOnFitEnd
from zoo.merging.one_shot import task_arithmetic, ties_merge

LAYERS = ["stem.weight", "stem.bias", "blocks.0.weight"]
TASKS = ["mnist", "svhn"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*it is recommended to use `Trainer\\(devices=1"),
]


class Learnt(LightningModule):
    """Coefficients that grow by 0.1 at each step, those of the first task only."""

    layer_names, task_names = LAYERS, TASKS

    def __init__(self):
        super().__init__()
        self.raw = nn.Parameter(torch.tensor([[0.0, 0.1], [0.1, 0.2], [0.5, 0.9]]))

    def coefficients(self):
        return self.raw

    def training_step(self, batch, batch_idx):
        return -self.raw[:, 0].sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.rand(6, 1)), batch_size=1)


class Network(nn.Module):
    """The base of seed 0, or something near to it."""

    def __init__(self, seed):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        base, own = (torch.Generator().manual_seed(number) for number in (0, seed))
        for parameter in self.layers.parameters():
            near = 0.1 * bool(seed) * torch.randn(parameter.shape, generator=own)
            parameter.data = torch.randn(parameter.shape, generator=base) + near

    def forward(self, x):
        return self.layers(x)


class Trained(LightningModule):
    """A network with a head of its own, which no expert has."""

    def __init__(self, seed=3):
        super().__init__()
        self.backbone, self.head = Network(seed), nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.head(self.backbone(batch[0])).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.rand(4, 3)), batch_size=2)


def fit(module, *added, tmp_path, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    quiet |= {"logger": CSVLogger(tmp_path), "accelerator": "cpu", "max_epochs": 1, "log_every_n_steps": 1}
    trainer = Trainer(callbacks=list(added), **{**quiet, **options})
    trainer.fit(module)
    return trainer


def logged(folder):
    """Rows of the one file of metrics, by step."""
    (path,) = folder.rglob("metrics.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert len({row["step"] for row in rows}) == len(rows)
    return {int(row["step"]): row for row in rows}


@pytest.fixture
def drawn(monkeypatch):
    """Pictures by key, instead of files."""
    found = []
    monkeypatch.setattr(callbacks, "log_figure", lambda module, key, figure: found.append((key, figure)))
    return found


def test_means_by_task_and_by_block_are_logged(tmp_path, drawn):
    trainer = fit(Learnt(), CoefficientLogger(every_n_steps=4), tmp_path=tmp_path, log_every_n_steps=3)
    rows = logged(tmp_path)
    assert sorted(rows) == [0, 4, 6]
    names = {f"coef/{block}{task}" for block in ("", "stem/", "blocks.0/") for task in TASKS}
    assert {name for name in rows[4] if name.startswith("coef")} == names
    assert float(rows[0]["coef/mnist"]) == pytest.approx(0.2)
    assert float(rows[4]["coef/mnist"]) == pytest.approx(0.6)
    assert float(rows[4]["coef/stem/mnist"]) == pytest.approx(0.45)
    assert float(rows[4]["coef/blocks.0/svhn"]) == pytest.approx(0.9)
    assert float(rows[6]["coef/stem/svhn"]) == pytest.approx(0.15)
    # For callbacks that watch a metric.
    assert float(trainer.callback_metrics["coef/mnist"]) == pytest.approx(0.8)


def test_blocks_can_be_left_out(tmp_path, drawn):
    fit(Learnt(), CoefficientLogger(blocks=False), tmp_path=tmp_path)
    assert {name for name in logged(tmp_path)[6] if name.startswith("coef")} == {"coef/mnist", "coef/svhn"}


@pytest.mark.parametrize(("every", "steps"), [(0, [6]), (2, [2, 4, 6]), (4, [4, 6])])
def test_coefficients_are_drawn_every_so_many_steps_and_at_the_end(every, steps, tmp_path, drawn):
    fit(Learnt(), CoefficientLogger(draw_every_n_steps=every), tmp_path=tmp_path)
    assert [figure.axes[0].get_title() for _, figure in drawn] == [f"merging coefficients, step {n}" for n in steps]
    key, figure = drawn[-1]
    assert key == "coefficients"
    assert [text.get_text() for text in figure.axes[1].texts] == [".60", ".10", ".70", ".20", "1.10", ".90"]


def test_batches_without_an_optimizer_step_are_logged_once(tmp_path, drawn):
    logger = CoefficientLogger(every_n_steps=1, draw_every_n_steps=1)
    fit(Learnt(), logger, tmp_path=tmp_path, accumulate_grad_batches=3)
    assert sorted(logged(tmp_path)) == [0, 1, 2] and len(drawn) == 2


def test_the_picture_of_coefficients_lies_with_the_run(tmp_path):
    trainer = fit(Learnt(), CoefficientLogger(), tmp_path=tmp_path)
    (file,) = (tmp_path / "lightning_logs").rglob("*.png")
    assert file.name == "coefficients.png" and str(trainer.logger.log_dir) in str(file)


def test_a_fast_dev_run_draws_nothing(tmp_path, drawn):
    fit(Learnt(), CoefficientLogger(), tmp_path=tmp_path, fast_dev_run=True)
    assert not drawn


def test_merged_tasks_name_the_columns_where_not_all_tasks_are_merged(tmp_path, drawn):
    class Partly(Learnt):
        merge_tasks, task_names = TASKS, ["mnist", "unseen", "svhn"]

    fit(Partly(), CoefficientLogger(), tmp_path=tmp_path)
    assert "coef/svhn" in logged(tmp_path)[6] and "coef/unseen" not in logged(tmp_path)[6]


def test_a_module_without_coefficients_is_refused(tmp_path):
    with pytest.raises(TypeError, match="CoefficientLogger needs coefficients, layer_names, task_names of Trained"):
        fit(Trained(), CoefficientLogger(), tmp_path=tmp_path)
    CoefficientLogger().setup(None, Trained(), "test")


def test_coefficients_that_do_not_fit_the_names_are_refused(tmp_path):
    class Wrong(Learnt):
        task_names = ("mnist",)

    with pytest.raises(ValueError, match=r"Wrong.coefficients\(\) has the shape \(3, 2\), expected 3 layers x 1 tasks"):
        fit(Wrong(), CoefficientLogger(), tmp_path=tmp_path)


@pytest.mark.parametrize("options", [{"every_n_steps": 0}, {"draw_every_n_steps": -1}])
def test_intervals_out_of_range_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name} must .*, got {value}"):
        CoefficientLogger(**options)


def test_the_coefficients_of_two_processes_are_logged_once(tmp_path):
    fit(Learnt(), CoefficientLogger(every_n_steps=1), tmp_path=tmp_path, strategy="ddp_fork", devices=2)
    assert sorted(logged(tmp_path)) == [0, 1, 2, 3]
    assert len(list(tmp_path.rglob("coefficients.png"))) == 1


def source(path, seed):
    save_file(Network(seed).state_dict(), path)
    return path


@pytest.fixture
def sources(tmp_path):
    return source(tmp_path / "base.safetensors", 0), {"mnist": source(tmp_path / "mnist.safetensors", 1)}


@pytest.mark.parametrize("options", [{"coef": 0.4}, {"method": "ties_merge", "density": 0.5, "exclude": "2"}])
def test_the_trained_weights_are_merged_with_the_others(options, sources, tmp_path):
    base, experts = sources
    module, out = Trained(), tmp_path / "out" / "merged.safetensors"
    before = module.backbone.layers[0].weight.clone()
    fit(module, MergeOnFitEnd(base, experts, out=out, **options), tmp_path=tmp_path)
    assert not torch.equal(module.backbone.layers[0].weight, before)
    found = load_file(out)
    given = {name: value for name, value in options.items() if name != "method"}
    merge = ties_merge if "method" in options else task_arithmetic
    expected = merge(base, {**experts, "trained": module.backbone.state_dict()}, **given)
    assert found.keys() == expected.keys() == Network(0).state_dict().keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    Network(0).load_state_dict(found)


def test_a_base_in_memory_and_a_module_that_is_the_network_itself(sources, tmp_path):
    class Itself(Trained):
        def __init__(self):
            LightningModule.__init__(self)
            self.layers, self.head = Network(3).layers, nn.Linear(2, 1)

        def backbone(self, inputs):
            return self.layers(inputs)

    module, out = Itself(), tmp_path / "merged.safetensors"
    fit(module, MergeOnFitEnd(Network(0), sources[1], "weight_average", out=str(out), task="mine"), tmp_path=tmp_path)
    expert = load_file(sources[1]["mnist"])
    own = module.state_dict()
    assert all(torch.allclose(tensor, (expert[name] + own[name]) / 2) for name, tensor in load_file(out).items())


def test_a_fast_dev_run_checks_and_writes_nothing(sources, tmp_path):
    merged = MergeOnFitEnd(*sources, out=tmp_path / "merged.safetensors")
    fit(Trained(), merged, tmp_path=tmp_path, fast_dev_run=True)
    assert not (tmp_path / "merged.safetensors").exists()
    merged = MergeOnFitEnd(sources[0], {"mnist": tmp_path / "none.safetensors"}, out=tmp_path / "merged.safetensors")
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        fit(Trained(), merged, tmp_path=tmp_path, fast_dev_run=True)


def test_what_does_not_fit_is_refused_before_the_fit(sources, tmp_path):
    class Never(Trained):
        def training_step(self, batch, batch_idx):
            raise AssertionError("it has begun")

    wide = Never()
    wide.backbone.layers[2] = nn.Linear(4, 5)
    with pytest.raises(ValueError, match=r"layers\.2\.weight"):
        fit(wide, MergeOnFitEnd(*sources, out=tmp_path / "merged.safetensors"), tmp_path=tmp_path)
    wide.backbone = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"Never has no parameter 'layers\.0\.bias' \(4 of 4"):
        fit(wide, MergeOnFitEnd(*sources, out=tmp_path / "merged.safetensors"), tmp_path=tmp_path)
    assert not list(tmp_path.glob("merged*"))


def test_parameters_that_are_not_merged_may_differ(sources, tmp_path):
    module, out = Trained(), tmp_path / "merged.safetensors"
    module.backbone.layers[2] = nn.Linear(4, 2, bias=False)
    fit(module, MergeOnFitEnd(*sources, out=out, exclude=r"layers\.2"), tmp_path=tmp_path)
    base = load_file(sources[0])
    found = load_file(out)
    assert torch.equal(found["layers.2.bias"], base["layers.2.bias"])
    assert not torch.equal(found["layers.0.bias"], base["layers.0.bias"])


def test_one_of_two_processes_writes_and_the_other_waits(sources, tmp_path):
    out = tmp_path / "merged.safetensors"

    class Looks(Callback):
        def on_fit_end(self, trainer, pl_module):
            assert out.exists()
            (tmp_path / f"seen-{trainer.global_rank}").touch()

    def merged(*arguments, **options):
        (tmp_path / f"merges-{torch.distributed.get_rank()}").touch()
        return task_arithmetic(*arguments, **options)

    writes = MergeOnFitEnd(*sources, out=out)
    writes._merge = merged
    fit(Trained(), writes, Looks(), tmp_path=tmp_path, strategy="ddp_fork", devices=2)
    found = sorted(path.name for path in tmp_path.glob("*-?"))
    assert found == ["merges-0", "seen-0", "seen-1"] and len(list(tmp_path.glob("merged*"))) == 1


def test_strategies_that_cut_parameters_are_refused(sources, tmp_path):
    class FSDPLike:
        strategy = type("FSDPStrategy", (), {})()

    with pytest.raises(MisconfigurationException, match="whole weights under FSDPStrategy: save a full checkpoint"):
        MergeOnFitEnd(*sources, out=tmp_path / "x.safetensors").on_fit_start(FSDPLike(), Trained())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ties"}, "method must be one of weight_average, task_arithmetic, .*, got 'ties'"),
        ({"task": "mnist"}, "there is an expert 'mnist' already"),
        ({"density": 0.2}, "task_arithmetic has no option density; there are buffers, coef, exclude, include, key_map"),
    ],
)
def test_wrong_options_of_a_merge_are_named_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        MergeOnFitEnd("base", {"mnist": "expert"}, out="merged.safetensors", **options)


def test_the_callbacks_are_built_from_plain_yaml_values():
    parser = ArgumentParser()
    parser.add_argument("--callbacks", type=list[Callback])
    line = ["--callbacks+=zoo.merging.callbacks.CoefficientLogger", "--callbacks.every_n_steps=5"]
    line += ["--callbacks+=zoo.merging.callbacks.MergeOnFitEnd", "--callbacks.pretrained=base"]
    line += ["--callbacks.experts={mnist: a.safetensors}", "--callbacks.out=merged.safetensors"]
    line += ["--callbacks.dict_kwargs.coef=0.4"]
    _, merge = parser.instantiate_classes(parser.parse_args(line)).callbacks
    assert merge._experts == {"mnist": "a.safetensors"} and merge._options == {"coef": 0.4}
