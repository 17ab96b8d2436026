"""The multi-task module: options, weightings, missing labels, selection, predictions, pictures."""

from __future__ import annotations

import json

import pytest
import torch

from datamodules import ImageTaskData, TabularTaskData
from datamodules.task_batches import TabularTaskBatch
from tests.methods import COMMON
from zoo.adatask import AdaTask, MTAdam, MultiTaskModule, TaskSpec, per_task_grads
from zoo.adatask.metrics import score

TASKS = [
    {"name": "click", "kind": "binary"},
    {"name": "age", "kind": "regression", "target_mean": 40, "target_std": 10},
]


def module(**options):
    torch.manual_seed(0)
    return MultiTaskModule(TASKS, cardinalities=[4, 3], num_numeric=2, **options)


def batch(size=16, missing=()):
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randn(size, 2, generator=generator)
    categories = torch.stack([torch.randint(0, n, (size,), generator=generator) for n in (4, 3)], 1)
    targets = {"click": (numbers[:, 0] > 0).float(), "age": 40 + 10 * numbers[:, 1]}
    masks = {name: torch.rand(size, generator=generator) < 0.5 for name in targets}
    masks |= {name: torch.zeros(size, dtype=torch.bool) for name in missing}
    return TabularTaskBatch(categories, numbers, targets, masks if missing else {})


def weighted_losses(model, data):
    found = model._run(data)
    losses, counts = model._losses_of(data, found.outputs)
    present = [bool(count > 0) for count in counts]
    return losses, model._weighted(losses, counts, present)


@pytest.mark.parametrize("name", ["equal", "uncertainty", "dwa", "rlw", "imtl_l", "famo", "gradnorm"])
def test_a_weighted_loss_reaches_its_own_head_only_and_is_scaled_by_its_weight(name):
    model = module(weighting=name)
    torch.manual_seed(0)
    losses, weighted = weighted_losses(model, batch())
    parameters = list(model.backbone.parameters())
    plain = per_task_grads(losses, parameters)
    losses, weighted = weighted_losses(model, batch())
    scaled = per_task_grads(weighted, parameters)
    for before, after in zip(plain, scaled, strict=True):
        ratios = []
        for g, h in zip(before, after, strict=True):
            assert (g is None) == (h is None)
            if g is not None and float(g.norm()) > 0:
                ratios.append(float(h.norm() / g.norm()))
        assert max(ratios) == pytest.approx(min(ratios), rel=1e-4)
        assert max(ratios) > 0


def test_uncertainty_weighting_learns_from_the_tasks_losses_in_a_group_of_its_own():
    model = module(weighting="uncertainty", weighting_lr=0.5)
    optimizer = model.configure_optimizers()
    assert optimizer.param_groups[1]["lr"] == 0.5
    assert optimizer.param_groups[1]["shared"] is False
    losses, weighted = weighted_losses(model, batch())
    optimizer.backward(weighted)
    s = model.weighting.log_variances
    expected = [float(-loss.detach() * torch.exp(torch.tensor(0.5)) / 2 + 0.5) for loss in losses]
    assert s.grad.tolist() == pytest.approx(expected, rel=1e-5)
    optimizer.step()
    assert optimizer.state[s]["exp_avg"].shape == (1, 2)


def test_loss_weights_multiply_the_losses_of_plain_optimizers_and_warn_with_adatask():
    model = module(loss_weights=[2.0, 0.5], optimizer="adam")
    losses, weighted = weighted_losses(model, batch())
    assert [float((w / x).detach()) for w, x in zip(weighted, losses, strict=True)] == pytest.approx([2.0, 0.5])
    with pytest.warns(UserWarning, match=r"loss_weights=\[2.0, 0.5\] are cancelled by AdaTask.*use task_weights"):
        module(loss_weights=[2.0, 0.5])
    with pytest.raises(ValueError, match="loss_weights has 1 values for 2 tasks"):
        module(loss_weights=[2.0])


def test_the_standardised_scale_divides_by_the_variance_of_the_target():
    natural = weighted_losses(module(), batch())[0]
    standardised = weighted_losses(module(loss_scale="standardised"), batch())[0]
    natural, standardised = ([loss.detach() for loss in losses] for losses in (natural, standardised))
    assert float(standardised[0]) == pytest.approx(float(natural[0]))
    assert float(standardised[1]) == pytest.approx(float(natural[1]) / 100)


@pytest.mark.parametrize(("optimizer", "absent"), [("adatask", None), ("adam", 0.0)])
def test_a_task_without_labels_is_absent_for_adatask_and_zero_for_a_sum(optimizer, absent):
    model = module(optimizer=optimizer)
    _, weighted = weighted_losses(model, batch(missing=["click"]))
    assert (weighted[0] is None) if absent is None else float(weighted[0].detach()) == 0
    assert float(weighted[1].detach()) > 0


def test_the_optimizer_is_built_by_name_with_its_options():
    optimizer = module(
        rule="adam",
        reduction="mean",
        task_weights=[2.0, 1.0],
        optimizer_options={"betas": [0.0, 0.9], "first_moment_dtype": "bfloat16", "weight_decay": 0.1},
        joint_parameters="embedding",
        aggregator="nash_mtl",
    ).configure_optimizers()
    assert isinstance(optimizer, AdaTask)
    assert optimizer.tasks == ("click", "age")
    assert optimizer.param_groups[0]["betas"] == (0.0, 0.9)
    assert [group["shared"] for group in optimizer.param_groups] == [True, False]
    assert optimizer.compose == "post"
    assert module(aggregator="pcgrad").configure_optimizers().compose == "pre"
    assert isinstance(module(optimizer="mtadam").configure_optimizers(), MTAdam)
    for name, kind in (
        ("adam", "Adam"),
        ("adamw", "AdamW"),
        ("rmsprop", "RMSprop"),
        ("adagrad", "Adagrad"),
        ("sgd", "SGD"),
    ):
        assert type(module(optimizer=name).configure_optimizers()).__name__ == kind
    found = module(lr_step_epochs=3, lr_gamma=0.1).configure_optimizers()
    assert (found["lr_scheduler"].step_size, found["lr_scheduler"].gamma) == (3, 0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "lion"}, "optimizer must be one of adatask, mtadam, adam"),
        ({"optimizer_options": {"momentum": 0.9}}, "optimizer 'adatask' has no option momentum; it has"),
        ({"optimizer_options": {"first_moment_dtype": "half precision"}}, "unknown floating-point type"),
        ({"joint_parameters": "tables"}, "joint_parameters='tables' is in no parameter's name"),
        ({"weighting": "gls"}, "unknown weighting 'gls'"),
        ({"aggregator": "mean"}, "unknown aggregator 'mean'"),
        ({"backbone": "resnet"}, "unknown backbone 'resnet'"),
        ({"backbone": "lenet"}, "takes images"),
        ({"clip_mode": "sum"}, "clip_mode must be one of task, joint"),
        ({"select": "first"}, "select must be one of best, last"),
        ({"rule": "lion"}, "rule must be one of"),
        ({"optimizer": "adam", "rule": "rmsprop"}, "rule belongs to optimizer='adatask', not to 'adam'"),
        ({"optimizer": "adam", "task_weights": [1.0, 2.0]}, "task_weights belongs to optimizer='adatask'"),
        ({"backward_mode": "both"}, "backward_mode must be one of loop, cut, batched"),
        ({"loss_weights": [1.0, -1.0]}, "loss_weights must be positive"),
        ({"lr_step_epochs": -1}, "lr_step_epochs must not be negative, got -1"),
        ({"weighting_options": {"alpha": 1}}, "weighting 'equal' has no option alpha; it has"),
        ({"joint_parameters": "("}, "joint_parameters='\\(' is no regular expression"),
        (
            {"weighting": "gradnorm", "optimizer_options": {"low_memory": True}},
            "gradients that low_memory does not keep",
        ),
        ({"optimizer": "mtadam", "aggregator": "pcgrad"}, "'mtadam' brings .* takes no aggregator"),
        ({"optimizer_options": {"low_memory": True}, "aggregator": "pcgrad"}, "no aggregator can see both"),
    ],
)
def test_an_unknown_option_is_refused_when_the_module_is_built(options, message):
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_a_checkpoint_needs_no_description_of_the_tasks(tmp_path):
    model = module()
    assert model.hparams["tasks"][1] == TaskSpec("age", "regression", 1, 40.0, 10.0).as_dict()


def test_the_best_epoch_is_chosen_where_every_task_has_a_score():
    assert module().monitor == "val/score"
    assert module(select="last").monitor is None
    dense = [{"name": "depth", "kind": "depth"}, {"name": "seg", "kind": "segmentation", "num_outputs": 4}]
    assert MultiTaskModule(dense, backbone="segnet", backbone_options={"filters": [4, 8]}).monitor is None


TABULAR = ("--model", "MultiTaskModule", "--data", "TabularTaskData", "--data.sample_rows", "96", "--data.batch_size",
           "32", *COMMON, "--trainer.max_epochs", "1")  # fmt: skip


def test_predictions_are_written_row_by_row(run):
    cli = run("fit", *TABULAR)
    cli = run("predict", *TABULAR, "--ckpt_path", str(cli.run_folder / "last.ckpt"))
    (path,) = (cli.run_folder.parent).glob("*/predictions.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 32
    assert set(lines[0]) == {"row", "task_1", "task_2"}
    assert [line["row"] for line in lines] == list(range(32))
    assert len(lines[0]["task_1"]) == 16


def test_a_baseline_gives_delta_m_and_an_unknown_metric_is_named(run, refused):
    cli = run(*TABULAR, "--model.baseline", "{mse/task_1: 1.0, mse/task_2: 10000.0}")
    metrics = cli.result["metrics"]
    expected = 100 * ((metrics["test/mse/task_1"] - 1) + (metrics["test/mse/task_2"] / 10000 - 1)) / 2
    assert metrics["test/delta_m"] == pytest.approx(expected, rel=1e-4)
    message = refused(2, *TABULAR, "--model.baseline", "{mse/task_9: 1.0}")
    assert "baseline names 'mse/task_9', expected 'metric/task' of task_1, task_2" in message
    message = refused(1, *TABULAR, "--model.baseline", "{auc/task_1: 1.0}")
    assert "baseline has auc/task_1, the test has" in message


def test_the_table_of_metrics_lies_with_the_run(run):
    cli = run(*TABULAR)
    rows = [json.loads(line) for line in (cli.run_folder / "tables/test/metrics.jsonl").read_text().splitlines()]
    assert {"task": "task_1", "metric": "r2"}.items() <= rows[0].items()


IMAGES = ("--model", "MultiTaskModule", "--data", "ImageTaskData", *COMMON, "--trainer.max_epochs", "1")


@pytest.mark.parametrize(
    ("source", "model"),
    [
        (("--data.num_pairs", "64", "--data.num_eval", "32"), ("--model.backbone", "lenet")),
        (
            ("--data.source", "embedded_scenes", "--data.num_scenes", "16", "--data.num_eval", "8"),
            ("--model.backbone", "segnet", "--model.backbone_options", "{filters: [4, 8]}"),
        ),
        (
            ("--data.source", "embedded_scenes", "--data.num_scenes", "16", "--data.num_eval", "8"),
            ("--model.backbone", "mtan", "--model.backbone_options", "{filters: [4, 8]}"),
        ),
    ],
    ids=["pairs", "segnet", "mtan"],
)
def test_images_are_trained_on_and_drawn(run, source, model):
    cli = run(*IMAGES, *source, *model)
    assert all(value is not None for value in cli.result["metrics"].values())
    assert (cli.run_folder / "figures/test/examples.png").stat().st_size > 1_000


def test_a_module_is_usable_with_the_loaders_of_another_project(tmp_path):
    data = TabularTaskData(sample_rows=96, batch_size=32)
    model = MultiTaskModule(data.tasks, data.cardinalities, data.num_numeric)
    outputs = model(*[next(iter(data.test_dataloader()))[i] for i in (0, 1)])
    assert {name: value.shape for name, value in outputs.items()} == {"task_1": (32, 16), "task_2": (32, 16)}
    images = ImageTaskData(num_pairs=64, num_eval=32)
    model = MultiTaskModule(images.tasks, in_channels=images.in_channels, backbone="lenet")
    assert model(next(iter(images.test_dataloader())).images)["left"].shape == (32, 10)


def test_low_memory_trains_like_the_default(run):
    options = (*TABULAR, "--data.missing_fraction", "0.3")
    one = run("fit", *options)
    two = run("fit", *options, "--model.optimizer_options.low_memory", "true")
    for left, right in zip(one.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_a_monitor_changes_nothing_where_labels_are_missing(run):
    options = (*TABULAR, "--model.optimizer", "adam", "--data.missing_fraction", "0.8", "--data.batch_size", "4")
    one = run("fit", *options)
    two = run("fit", *options, "--trainer.callbacks+=zoo.adatask.TaskDominanceMonitor")
    for left, right in zip(one.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize(
    "options", [("--data.tasks", "[task_1]"), ("--data.missing_fraction", "0.85", "--data.batch_size", "4")]
)
def test_gradnorm_passes_over_steps_with_a_single_task(run, options):
    cli = run("fit", *TABULAR, "--model.weighting", "gradnorm", "--model.optimizer", "adam", *options)
    assert bool(cli.model.weighting.weights.isfinite().all())


def test_gradnorm_forgets_a_step_that_overflowed():
    weighting = module(weighting="gradnorm").weighting
    weighting(torch.tensor([1.0, 2.0]))
    weighting.after_backward(torch.tensor([torch.inf, 1.0]))
    assert weighting.weights.tolist() == [1.0, 1.0]


def test_a_task_without_a_score_leaves_the_choice_to_the_others():
    model = module()
    values = {"auc/click": torch.tensor(torch.nan), "r2/age": torch.tensor(0.5)}
    assert float(score(values, model.specs)) == 0.5
