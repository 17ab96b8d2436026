"""AdaTask in Lightning: accumulation, clipping, precision and processes behave as a Lightning user expects."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from tests.zoo.adatask.problems import TwoHeads
from zoo.adatask import AdaTask, TaskGradMixin, aggregator

ROWS = 64


class Batch(NamedTuple):
    inputs: Tensor
    targets: Tensor
    labelled: Tensor


class Rows(Dataset):
    def __init__(self, missing: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(ROWS, 5, generator=generator)
        self.targets = torch.randn(ROWS, 3, generator=generator)
        self.labelled = torch.rand(ROWS, 3, generator=generator) < 0.6 if missing else torch.ones(ROWS, 3).bool()

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, rows: list[int]) -> Batch:
        return Batch(self.inputs[rows], self.targets[rows], self.labelled[rows])


class Slices(DistributedSampler):
    """Consecutive global batches, cut among the ranks."""

    def __init__(self, batch_size: int) -> None:
        running = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.world = torch.distributed.get_world_size() if running else 1
        rank = torch.distributed.get_rank() if running else 0
        super().__init__(range(ROWS), num_replicas=self.world, rank=rank, shuffle=False)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return ROWS // (self.world * self.batch_size)

    def __iter__(self):
        for start in range(0, ROWS, self.world * self.batch_size):
            own = start + self.rank * self.batch_size
            yield list(range(own, own + self.batch_size))


class Model(TaskGradMixin, LightningModule):
    def __init__(self, batch_size=16, missing=False, optimizer=None, mode="loop", dtype=torch.float64, **options):
        super().__init__()
        self.net = TwoHeads().to(dtype)
        self.batch_size, self.missing, self.make, self.options = batch_size, missing, optimizer, options
        self.backward_mode = mode
        self.norms: list[float] = []

    def training_step(self, batch, batch_idx):
        dtype = self.net.trunk[0].weight.dtype
        outputs, features = self.net(batch.inputs.to(dtype))
        losses, counts = {}, batch.labelled.sum(0)
        for k, output in enumerate(outputs):
            error = (output.to(dtype) - batch.targets[:, k].to(dtype)).square() * batch.labelled[:, k]
            losses[str(k)] = error.sum() / counts[k].clamp(min=1) if counts[k] else None
        return self.joint_loss(losses, counts if self.missing else None, features)

    def on_before_optimizer_step(self, optimizer):
        gradient = self.net.trunk[0].weight.grad
        self.norms += [] if gradient is None else [float(gradient.norm())]

    def configure_optimizers(self):
        if self.make is not None:
            return self.make(self.parameters())
        return AdaTask(self.parameters(), ["0", "1", "2"], lr=1e-2, **self.options)

    def train_dataloader(self):
        return DataLoader(Rows(self.missing), batch_size=None, sampler=Slices(self.batch_size))


def fit(model, steps=20, **options):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    options = {"accelerator": "cpu", "max_steps": steps, "max_epochs": -1, "log_every_n_steps": 1, **quiet, **options}
    trainer = Trainer(**options)
    trainer.fit(model)
    return model.net


def distance(left, right):
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*it is recommended to use `Trainer\\(devices=1"),
    pytest.mark.filterwarnings("ignore:.*Total length of `CombinedLoader`.*"),
]


@pytest.mark.parametrize("missing", [False, True])
def test_accumulated_batches_equal_the_large_batch(missing):
    large = fit(Model(16, missing))
    small = fit(Model(8, missing), accumulate_grad_batches=2)
    assert distance(large, small) < 1e-6
    assert distance(large, TwoHeads()) > 0.01


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("mode", ["loop", "cut"])
def test_two_processes_equal_one(missing, mode):
    one = fit(Model(16, missing, mode=mode))
    two = fit(Model(8, missing, mode=mode), strategy="ddp_fork", devices=2)
    assert distance(one, two) < 1e-6
    assert distance(one, TwoHeads()) > 0.01


def test_two_processes_with_accumulation_equal_one():
    one = fit(Model(16, missing=True))
    two = fit(Model(4, missing=True), strategy="ddp_fork", devices=2, accumulate_grad_batches=2)
    assert distance(one, two) < 1e-6


def project(matrix):
    # Something that depends on all tasks at once.
    return matrix * (matrix * matrix.roll(1, 0)).sum(1, keepdim=True).sign()


@pytest.mark.parametrize("aggregator", [project, lambda matrix: torch.tensor([0.5, 2.0, 1.0])])
def test_an_aggregator_works_on_the_average_gradients_before_any_optimizer(aggregator):
    def build(batch_size):
        model = Model(batch_size, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2))
        model.aggregator = aggregator
        return model

    one = fit(build(16))
    two = fit(build(8), strategy="ddp_fork", devices=2)
    assert distance(one, two) < 1e-6
    plain = fit(Model(16, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2)))
    assert distance(one, plain) > 1e-3


def test_another_optimizer_without_aggregator_trains_as_ever():
    adam = lambda parameters: torch.optim.Adam(parameters, lr=1e-2)  # noqa: E731
    watched = Model(16, optimizer=adam)
    watched.watch_tasks = True
    assert distance(fit(watched), fit(Model(16, optimizer=adam))) < 1e-14


@pytest.mark.parametrize("mode", ["task", "joint"])
def test_clipping_reaches_the_tasks_gradients(mode):
    free, clipped = Model(16, rule="adagrad"), Model(16, rule="adagrad")
    clipped.clip_mode = mode
    fit(free, steps=3)
    fit(clipped, steps=3, gradient_clip_val=1e-3)
    assert distance(free.net, clipped.net) > 1e-4
    state = clipped.optimizers(use_pl_optimizer=False).state
    sums = {p: value["sum"] for p, value in state.items()}
    # The accumulators of "adagrad" hold the squares of what was stepped with.
    if mode == "joint":
        assert sum(float(v.sum()) for v in sums.values()) == pytest.approx(3 * 1e-6, rel=1e-2)
    else:
        shared = [sums[p] for p in clipped.net.trunk.parameters()]
        for k, head in enumerate(clipped.net.heads):
            own = sum(float(v[k].sum()) for v in shared) + sum(float(sums[p].sum()) for p in head.parameters())
            assert own == pytest.approx(3 * 1e-6, rel=1e-2)


def test_clipping_by_value_reaches_the_tasks_gradients():
    model = Model(16, rule="adagrad")
    fit(model, steps=1, gradient_clip_val=1e-3, gradient_clip_algorithm="value")
    state = model.optimizers(use_pl_optimizer=False).state
    assert max(float(value["sum"].max()) for value in state.values()) == pytest.approx(1e-6)


def test_clipping_another_optimizer_bounds_the_norm_of_its_gradient():
    model = Model(16, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-2))
    model.watch_tasks = True
    plain = Model(16, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-2))
    assert distance(fit(model, gradient_clip_val=0.1), fit(plain, gradient_clip_val=0.1)) < 1e-12


def test_loggers_see_the_sum_of_the_gradients():
    model, plain = Model(16), Model(16, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    fit(model, steps=1)
    fit(plain, steps=1)
    assert model.norms[0] == pytest.approx(plain.norms[0])


def test_bf16_mixed_is_close_to_full_precision():
    full = fit(Model(16, dtype=torch.float32), steps=5)
    half = fit(Model(16, dtype=torch.float32), steps=5, precision="bf16-mixed")
    assert all(p.dtype == torch.float32 for p in half.parameters())
    assert 0 < distance(full, half) < 0.05


def test_16_mixed_feeds_unscaled_gradients_to_the_moments():
    full, half = Model(16, dtype=torch.float32), Model(16, dtype=torch.float32)
    fit(full, steps=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
    fit(half, steps=4, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert scaler.get_scale() == 1024.0
    states = [model.optimizers(use_pl_optimizer=False).state[model.net.trunk[0].weight] for model in (full, half)]
    torch.testing.assert_close(states[0]["exp_avg_sq"], states[1]["exp_avg_sq"], rtol=0.05, atol=1e-6)
    assert distance(full.net, half.net) < 0.03


def test_a_step_that_overflows_leaves_weights_and_moments_alone():
    model = Model(16, dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38, growth_interval=1000)
    before = [p.detach().clone() for p in model.parameters()]
    fit(model, steps=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert not model.optimizers(use_pl_optimizer=False).state
    assert scaler.get_scale() == pytest.approx(5e37)


def test_strategies_that_shard_gradients_are_refused():
    class Fake:
        strategy = FSDPStrategy()

    model = Model(16)
    model._trainer = Fake()
    with pytest.raises(RuntimeError, match=r"FSDPStrategy shards gradients.*use strategy='ddp'"):
        model.setup("fit")


def test_a_step_that_returns_a_sum_is_explained():
    class Wrong(Model):
        def training_step(self, batch, batch_idx):
            return self.net(batch.inputs.double())[0][0].mean()

    with pytest.raises(RuntimeError, match=r"must return self.joint_loss\(\{task: loss, ...\}\)"):
        fit(Wrong(16))


def test_lbfgs_is_refused():
    model = Model(16, optimizer=lambda parameters: torch.optim.LBFGS(parameters))
    model.watch_tasks = True
    with pytest.raises(RuntimeError, match="LBFGS evaluates the summed loss several times a step"):
        fit(model)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"accumulate_grad_batches": 2}, "accumulate_grad_batches"), ({"gradient_clip_val": 1.0}, "gradient_clip_val")],
)
def test_the_streaming_variant_refuses_what_needs_all_gradients(options, named):
    with pytest.raises(RuntimeError, match=f"low_memory=True keeps no gradient until the step, which {named} needs"):
        fit(Model(16, low_memory=True), **options)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_batch_without_any_label_is_left_out():
    class Sparse(Model):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                return self.joint_loss({"0": None, "1": None, "2": None})
            return super().training_step(batch, batch_idx)

    model = Sparse(16)
    fit(model, steps=-1, max_epochs=1)
    state = model.optimizers(use_pl_optimizer=False).state[model.net.trunk[0].weight]
    assert state["step"].tolist() == [ROWS // 16 - 1] * 3


class LastUnlabelled(Model):
    """No label in every second batch."""

    def training_step(self, batch, batch_idx):
        if batch_idx % 2:
            return self.joint_loss({"0": None, "1": None, "2": None})
        return super().training_step(batch, batch_idx)


def test_a_window_whose_last_batch_has_no_label_is_stepped_with_by_any_optimizer():
    moved = []
    for optimizer in (None, lambda parameters: torch.optim.Adam(parameters, lr=1e-2)):
        model = LastUnlabelled(8, optimizer=optimizer)
        model.aggregator = project if optimizer else None
        fit(model, steps=2, accumulate_grad_batches=2)
        moved.append(distance(model.net, TwoHeads()))
    assert min(moved) > 1e-3


@pytest.mark.parametrize("name", ["pcgrad", "cagrad"])
def test_an_overflow_before_an_aggregator_is_left_to_the_scaler(name):
    model = Model(16, dtype=torch.float32, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2))
    model.aggregator = aggregator(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38, growth_interval=1000)
    fit(model, steps=3, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert scaler.get_scale() < 1e38
    assert all(bool(p.isfinite().all()) for p in model.parameters())


class Thawing(BaseFinetuning):
    """Freezes the trunk for an epoch."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net.trunk)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net.trunk, optimizer, lr=1e-2)


def test_layers_that_thaw_during_a_fit_are_trained():
    def trainable(parameters):
        return torch.optim.Adam([p for p in parameters if p.requires_grad], lr=1e-2)

    model = Model(16, optimizer=trainable)
    model.watch_tasks = True
    before = model.net.trunk[0].weight.detach().clone()
    fit(model, steps=-1, max_epochs=2, callbacks=[Thawing()])
    assert float((model.net.trunk[0].weight - before).detach().abs().max()) > 1e-3


def test_the_mixin_must_stand_first():
    with pytest.raises(TypeError, match="class Wrong: TaskGradMixin must stand before LightningModule"):
        type("Wrong", (LightningModule, TaskGradMixin), {})


def test_a_users_own_zero_grad_does_not_add_gradients_up():
    class Own(Model):
        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            for parameter in self.parameters():
                parameter.grad = None

    assert distance(fit(Own(16)), fit(Model(16))) == 0
