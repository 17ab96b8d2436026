"""AdaMerging against the merge and the entropies written out, and all ways in and out of the module."""

from __future__ import annotations

import copy
import logging
from typing import NamedTuple

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import CombinedLoader
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.func import functional_call
from torch.utils.data import DataLoader

from tests.zoo.merging.small_experts import (
    CLASSES,
    DIM,
    QUIET,
    TASKS,
    Net,
    clip,
    encoder,
    equal,
    expert_folder,
    image_data,
    images,
    moved,
    net,
    rows,
    states,
    stream,
    task_loaders,
    trainer,
    weights,
)
from tests.zoo.merging.small_experts import adamerging as module
from zoo.merging import AdaMerging, CosineHead, MergedClassifier, TaskVectorStore, Ties
from zoo.merging.backbones import build_encoder
from zoo.merging.layers import group
from zoo.merging.one_shot import task_arithmetic

pytestmark = QUIET


class Steps(Callback):
    """Keeps the coefficients and their gradient of every optimizer step."""

    def __init__(self):
        self.raw, self.gradient = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        raw = pl_module.coefficients_.raw
        self.raw.append(raw.detach().clone())
        self.gradient.append(raw.grad.clone())


class Step(NamedTuple):
    raw: Tensor
    gradient: Tensor


def first_step(model, loader, folder):
    seen = Steps()
    trainer(folder, max_steps=1, callbacks=[seen]).fit(model, loader)
    return Step(seen.raw[0], seen.gradient[0])


def batches(loader, count):
    found = [batch for batch, _, _ in loader]
    return found[:count]


def expected_gradient(raw, base, experts, drawn, constraint="clamp", granularity="layer", objective=None):
    """The gradient by autograd through the sum over task vectors and the loss of every batch, in float64."""
    raw = raw.double().requires_grad_()
    effective = {"sigmoid": torch.sigmoid, "none": lambda x: x}.get(constraint, lambda x: x.clamp(0, 1))(raw)
    theta = {name: value.double() for name, value in base.state_dict().items() if value.is_floating_point()}
    names = [name for name, _ in base.named_parameters()]
    layer_of = {name: row for row, members in enumerate(group(names, granularity).values()) for name in members}
    merged = dict(theta)
    for name in names:
        for k, task in enumerate(experts):
            tau = experts[task][name].double() - theta[name]
            merged[name] = merged[name] + effective[layer_of[name], k] * tau
    total = torch.zeros((), dtype=torch.float64)
    double = copy.deepcopy(base).double().eval()
    for batch in drawn:
        for task, inputs in batch.items():
            head = CosineHead(weights()[task].double())

            def logits(state, inputs=inputs, head=head):
                return head(functional_call(double, state, (inputs["pixel_values"].double(),)))

            found = logits(merged)
            if objective is None:
                total = total + Categorical(logits=found).entropy().mean()
            else:
                target = logits({n: v.double() for n, v in experts[task].items() if v.is_floating_point()}).detach()
                total = total + objective(found, target)
    return torch.autograd.grad(total, raw)[0]


@pytest.mark.parametrize("batches_per_step", [1, 2])
@pytest.mark.parametrize("granularity", ["layer", "module", "task"])
def test_the_gradient_is_that_of_the_summed_entropies_through_the_merge(tmp_path, granularity, batches_per_step):
    base = net()
    model = module(base, granularity=granularity, batches_per_step=batches_per_step)
    seen = first_step(model, stream(), tmp_path)
    assert seen.gradient.shape == ({"layer": 4, "module": 2, "task": 1}[granularity], 3)
    drawn = batches(stream(), batches_per_step)
    expected = expected_gradient(seen.raw, base, states(base), drawn, granularity=granularity)
    torch.testing.assert_close(seen.gradient.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batches_per_step", [1, 2])
def test_every_step_has_the_gradient_of_its_own_batches_and_coefficients(tmp_path, batches_per_step):
    base = net()
    seen = Steps()
    model = module(base, batches_per_step=batches_per_step, lr=0.05)
    trainer(tmp_path, max_steps=2, callbacks=[seen]).fit(model, stream())
    assert not torch.equal(*seen.raw)
    drawn = batches(stream(), 2 * batches_per_step)[batches_per_step:]
    expected = expected_gradient(seen.raw[1], base, states(base), drawn)
    torch.testing.assert_close(seen.gradient[1].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("constraint", ["clamp", "project", "none", "sigmoid"])
def test_the_gradient_is_masked_as_the_constraint_says(tmp_path, constraint):
    base = net()
    model = module(base, constraint=constraint, batches_per_step=1)
    start = torch.tensor([[-0.2, 0.0, 1.0], [1.3, 0.5, -0.1], [0.2, 2.0, 0.3], [0.0, -1.0, 0.9]])
    model.coefficients_.raw.data = start.clone()
    seen = first_step(model, stream(), tmp_path)
    expected = expected_gradient(seen.raw, base, states(base), batches(stream(), 1), constraint)
    torch.testing.assert_close(seen.gradient.double(), expected, rtol=1e-4, atol=1e-6)
    outside = (start < 0) | (start > 1)
    assert bool((seen.gradient[outside] == 0).all()) == (constraint in ("clamp", "project"))
    assert bool((seen.gradient[~outside] != 0).all())
    bounded = constraint in ("project", "clamp", "sigmoid")
    assert bool(((model.coefficients() >= 0) & (model.coefficients() <= 1)).all()) == bounded
    raw = model.coefficients_.raw
    assert bool(((raw >= 0) & (raw <= 1)).all()) == (constraint == "project")


def test_the_gradient_of_a_task_is_the_row_sum_of_its_layers(tmp_path):
    by_layer = first_step(module(), stream(), tmp_path).gradient
    by_task = first_step(module(granularity="task"), stream(), tmp_path).gradient
    torch.testing.assert_close(by_task[0], by_layer.sum(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", ["expert_ce", "expert_kl"])
def test_the_experts_predictions_are_the_targets_of_their_objectives(tmp_path, objective):
    def distance(logits, target):
        log_p, q = logits.log_softmax(1), target.softmax(1)
        cross = -(q * log_p).sum(1).mean()
        return cross - (Categorical(probs=q).entropy().mean() if objective == "expert_kl" else 0)

    base = net()
    seen = first_step(module(base, objective=objective, batches_per_step=1), stream(), tmp_path)
    expected = expected_gradient(seen.raw, base, states(base), batches(stream(), 1), objective=distance)
    torch.testing.assert_close(seen.gradient.double(), expected, rtol=1e-4, atol=1e-6)


def test_the_entropy_is_divided_by_that_of_uniform_predictions_on_request(tmp_path):
    logged = {}
    for norm in (False, True):
        fit = trainer(tmp_path, max_steps=1)
        fit.fit(module(entropy_norm=norm, batches_per_step=1), stream())
        logged[norm] = {name: float(value) for name, value in fit.callback_metrics.items()}
    for task, classes in CLASSES.items():
        ratio = logged[False][f"train/entropy/{task}"] / logged[True][f"train/entropy/{task}"]
        assert ratio == pytest.approx(float(torch.tensor(float(classes)).log()), rel=1e-5)
    assert logged[True]["train/loss"] == pytest.approx(
        sum(logged[True][f"train/entropy/{task}"] for task in CLASSES) / 3, rel=1e-5
    )


def test_nothing_but_the_coefficients_is_registered_trained_or_saved(tmp_path):
    base = net(dropout=0.5)
    experts = {task: moved(base, 10 + k) for k, task in enumerate(CLASSES)}
    before = [copy.deepcopy(one.state_dict()) for one in (base, *experts.values())]
    model = module(base, experts=experts)
    fit = trainer(tmp_path, max_steps=2)
    fit.fit(model, stream())
    assert [name for name, _ in model.named_parameters()] == ["coefficients_.raw"]
    assert [id(p) for group in fit.optimizers[0].param_groups for p in group["params"]] == [id(model.coefficients_.raw)]
    heads = {f"heads.{k}.{name}" for k in range(3) for name in ("weight", "scale")}
    assert set(model.state_dict()) == {"coefficients_.raw", *heads}
    for k, task in enumerate(CLASSES):
        assert torch.equal(model.heads[k].weight, weights()[task])
    for one, old in zip((base, *experts.values()), before, strict=True):
        assert equal(one.state_dict(), old)
        assert all(parameter.grad is None for parameter in one.parameters())
    assert not model.encoder.training
    assert all(not parameter.requires_grad for parameter in model.encoder.parameters())
    path = tmp_path / "one.ckpt"
    fit.save_checkpoint(path)
    assert path.stat().st_size < 20_000


def test_labels_in_the_stream_change_nothing_bit_for_bit(tmp_path):
    results = []
    for labels in ("none", "some", "others"):
        loaders = {}
        for task in CLASSES:
            found = rows(task, 24, labels != "none")
            for number, row in enumerate(found):
                if labels == "others":
                    row["labels"] = torch.tensor((number * 7) % CLASSES[task])
            loaders[task] = DataLoader(found, batch_size=8)
        model = module()
        trainer(tmp_path, max_steps=4).fit(model, CombinedLoader(loaders, "max_size_cycle"))
        results.append(model.coefficients_.raw.detach())
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])
    assert not torch.equal(results[0], torch.full_like(results[0], 0.3))


def test_the_information_that_labels_are_dropped_comes_once_a_task(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, max_steps=3).fit(module(), stream())
    said = [record.message for record in caplog.records if "dropped" in record.message]
    assert said == [f"Labels in the batches of {t} are dropped: adaptation never looks at them." for t in CLASSES]


def test_the_first_model_is_task_arithmetic(tmp_path):
    model = module()
    first = trainer(tmp_path).test(model, task_loaders(), verbose=False)[0]
    other = MergedClassifier(TASKS, experts=states(net()), pretrained=net(), heads=weights())
    assert first == pytest.approx(trainer(tmp_path).test(other, task_loaders(), verbose=False)[0], rel=1e-5)
    expected = task_arithmetic(net().state_dict(), states(net()), coef=0.3)
    for name, tensor in model.export().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)


def test_adamerging_plus_plus_is_adamerging_on_task_vectors_of_ties(tmp_path):
    base = net()
    store = TaskVectorStore.from_checkpoints(base, states(base)).transform(Ties(0.4))
    trimmed = {task: store.state_dict(torch.eye(3)[k]) for k, task in enumerate(CLASSES)}
    plus = module(base, preprocess="ties", density=0.4)
    plain = module(base, experts=trimmed)
    for model in (plus, plain):
        trainer(tmp_path, max_steps=3).fit(model, stream())
    torch.testing.assert_close(plus.coefficients(), plain.coefficients(), rtol=1e-4, atol=1e-6)
    assert not torch.equal(plus.store.tau, module(base).open_experts().tau)
    assert float((plus.store.tau != 0).double().mean()) < 0.41


@pytest.mark.parametrize("options", [{"tau_dtype": "bfloat16"}, {"tau_dtype": "float16"}, {"mmap": "tau.bin"}])
def test_task_vectors_may_be_small_or_on_disk(tmp_path, options):
    if "mmap" in options:
        options = {"mmap": str(tmp_path / options["mmap"])}
    plain, other = module(), module(**options)
    grads = [first_step(model, stream(), tmp_path).gradient for model in (plain, other)]
    torch.testing.assert_close(grads[1], grads[0], rtol=0.02, atol=1e-3)
    assert float(grads[0].abs().max()) > 0.02
    assert other.store.theta0.dtype == torch.float32
    if "mmap" in options:
        assert torch.equal(grads[0], grads[1])
        assert (tmp_path / "tau.bin").exists()


def test_networks_with_dropout_and_batch_norm_stay_in_evaluation_mode(tmp_path):
    base = net(dropout=0.5, batch_norm=True)
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = module(base)
        fit = trainer(tmp_path, max_steps=3, val_check_interval=1)
        fit.fit(model, stream(), task_loaders())
        results.append(model.coefficients())
        assert not any(part.training for part in model.encoder.modules())
        own, old = model.encoder.state_dict(), base.state_dict()
        assert all(torch.equal(own[name], old[name]) for name in own if name.startswith("norm.") and "r" in name[5:])
    assert torch.equal(*results)
    seen = first_step(module(base, batches_per_step=1), stream(), tmp_path)
    expected = expected_gradient(seen.raw, base, states(base), batches(stream(), 1))
    torch.testing.assert_close(seen.gradient.double(), expected, rtol=1e-3, atol=1e-6)


def outputs(model, loaders, folder):
    """Probabilities by loader."""
    found = trainer(folder).predict(model, loaders)
    return [torch.cat(part) for part in found]


@pytest.mark.parametrize("buffers", ["pretrained", "average"])
def test_the_exported_weights_give_the_outputs_of_the_module(tmp_path, buffers):
    base = net(batch_norm=True)
    experts = states(base)
    for k, state in enumerate(experts.values()):
        state["norm.running_mean"] += k + 1
    model = module(base, experts=experts, buffers=buffers)
    trainer(tmp_path, max_steps=3).fit(model, stream())
    found = outputs(model, task_loaders(), tmp_path)
    state = model.export(tmp_path / "merged.safetensors")
    assert equal(state, load_file(tmp_path / "merged.safetensors"))
    assert list(state) == list(base.state_dict())
    plain = Net(batch_norm=True).eval()
    plain.load_state_dict(state, strict=True)
    moves = float((state["norm.running_mean"] - base.norm.running_mean).mean())
    assert moves == pytest.approx(2.0 if buffers == "average" else 0.0, abs=1e-5)
    for (task, weight), loader, probabilities in zip(weights().items(), task_loaders(), found, strict=True):
        inputs = torch.stack([row["pixel_values"] for row in loader.dataset])
        with torch.no_grad():
            expected = CosineHead(weight)(plain(inputs)).softmax(1)
        torch.testing.assert_close(probabilities, expected, rtol=1e-5, atol=1e-6, msg=task)


def test_a_merged_clip_tower_goes_through_from_pretrained(tmp_path):
    from transformers import CLIPVisionModel

    base = clip()
    folder = expert_folder(tmp_path / "experts", base)
    model = AdaMerging(TASKS, experts=str(folder.root), batches_per_step=1)
    data = image_data()
    fit = trainer(tmp_path, max_steps=2)
    fit.fit(model, datamodule=data)
    target = tmp_path / "merged"
    target.mkdir()
    (target / "config.json").write_text((folder.pretrained / "config.json").read_text())
    model.export(target / "model.safetensors")
    loaded = CLIPVisionModel.from_pretrained(target).eval()
    batch = next(iter(data.eval_loader("c", "test")))
    with torch.no_grad():
        expected = loaded(batch.images).pooler_output
        found = model.call(model._merge())(batch.images)
        torch.testing.assert_close(model.encoder.projection(expected), found, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, base.backbone(batch.images).pooler_output, atol=1e-3)
    whole = build_encoder(folder.pretrained)
    whole.backbone.load_state_dict(model.export(), strict=True)


def test_written_coefficients_are_where_the_next_run_starts(tmp_path):
    model = module()
    trainer(tmp_path, max_steps=3).fit(model, stream())
    model.export_coefficients(tmp_path / "coefficients.safetensors")
    again = module(coef_path=str(tmp_path / "coefficients.safetensors"))
    assert torch.equal(again.coefficients(), model.coefficients())
    # By name: another order of the tasks, and a part of them.
    names = ["c", "a.b"]
    part = module(
        merge_tasks=names, coef_path=str(tmp_path / "coefficients.safetensors"), constraint="sigmoid"
    ).coefficients()
    torch.testing.assert_close(part, model.coefficients()[:, [2, 0]])


def test_a_checkpoint_predicts_the_same_without_data_and_refuses_other_experts(tmp_path):
    folder = expert_folder(tmp_path / "experts")
    model = AdaMerging(TASKS, experts=str(folder.root))
    data = image_data()
    fit = trainer(tmp_path, max_steps=2)
    fit.fit(model, datamodule=data)
    fit.save_checkpoint(tmp_path / "run.ckpt")
    loaded = AdaMerging.load_from_checkpoint(tmp_path / "run.ckpt")
    loaders = data.predict_dataloader()
    for one, other in zip(outputs(model, loaders, tmp_path), outputs(loaded, loaders, tmp_path), strict=True):
        assert torch.equal(one, other)
    # The same place, with other experts in it.
    expert_folder(tmp_path / "experts", moved(encoder(), 55))
    with pytest.raises(ValueError, match="not the base and the experts that the checkpoint was made with"):
        trainer(tmp_path).predict(AdaMerging.load_from_checkpoint(tmp_path / "run.ckpt"), loaders)
    with pytest.raises(ValueError, match="not the base and the experts that the checkpoint was made with"):
        trainer(tmp_path).predict(model := AdaMerging(TASKS, experts=str(folder.root)), loaders,
                                  ckpt_path=tmp_path / "run.ckpt")  # fmt: skip


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_checkpoint_that_is_loaded_into_a_merged_module_is_merged_anew(tmp_path, stage):
    model = module(lr=0.5)
    fit = trainer(tmp_path, max_steps=0)
    fit.fit(model, stream())
    fit.save_checkpoint(tmp_path / "start.ckpt")
    expected = getattr(trainer(tmp_path), stage)(module(), task_loaders())
    trainer(tmp_path, max_steps=3).fit(model, stream())
    other = getattr(trainer(tmp_path), stage)(model, task_loaders())
    again = getattr(trainer(tmp_path), stage)(model, task_loaders(), ckpt_path=tmp_path / "start.ckpt")
    assert str(again) == str(expected) != str(other)


def test_a_checkpoint_of_given_modules_is_loaded_with_these_modules(tmp_path):
    base = net()
    model = module(base)
    fit = trainer(tmp_path, max_steps=2)
    fit.fit(model, stream())
    fit.save_checkpoint(tmp_path / "run.ckpt")
    given = {"experts": states(base), "pretrained": base, "heads": weights()}
    loaded = AdaMerging.load_from_checkpoint(tmp_path / "run.ckpt", **given)
    assert equal(loaded.state_dict(), model.state_dict())
    assert equal(loaded.open_experts().state_dict(loaded.coefficients()), model.export())
    with pytest.raises(ValueError, match="experts are missing"):
        AdaMerging.load_from_checkpoint(tmp_path / "run.ckpt")


def test_a_network_of_its_own_takes_the_base_and_what_is_not_merged_from_the_files(tmp_path):
    base, fresh = net(), moved(net(), 77, 1.0)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    for task, state in states(base).items():
        save_file(state, tmp_path / f"{task}.safetensors")
    files = {task: str(tmp_path / f"{task}.safetensors") for task in CLASSES}
    expected = module(base, exclude="out")
    expected.open_experts()
    for source in (str(tmp_path / "base.safetensors"), base.state_dict(), base):
        model = module(encoder=fresh, experts=files, pretrained=source, exclude="out")
        assert model.open_experts().param_names == ["stem.weight", "stem.bias"]
        assert equal(model.export(), expected.export())
        inputs = {"pixel_values": torch.randn(4, 6)}
        assert torch.equal(model.task_logits(inputs, "c"), expected.task_logits(inputs, "c"))


def test_features_of_any_network_come_from_a_function(tmp_path):
    class Classifier(nn.Module):
        """Takes two inputs, gives a dict, and ends in a classifier of its own."""

        def __init__(self, classes=2):
            super().__init__()
            self.body, self.classifier = net(), nn.Linear(DIM, classes)

        def forward(self, left, right):
            hidden = self.body(left + right)
            return {"hidden": hidden, "scores": self.classifier(hidden)}

    def features(model, batch):
        assert "labels" not in batch
        return model(batch["left"], right=batch["right"])["hidden"]

    torch.manual_seed(0)
    base = Classifier()
    experts = {task: moved(Classifier(CLASSES[task]), k).state_dict() for k, task in enumerate(CLASSES)}
    heads = {task: nn.Linear(DIM, CLASSES[task]) for task in CLASSES}
    for task, head in heads.items():
        name = "classifier"
        head.load_state_dict({key: experts[task][f"{name}.{key}"] for key in ("weight", "bias")})
    model = module(base, experts=experts, heads=heads, feature_fn=features, exclude="classifier", encoder=base)
    found = {
        task: DataLoader([{"left": row["pixel_values"], "right": row["pixel_values"], "labels": row["labels"]}
                          for row in rows(task)], 8)
        for task in CLASSES
    }  # fmt: skip
    trainer(tmp_path, max_steps=3).fit(model, CombinedLoader(found, "max_size_cycle"))
    assert not any("classifier" in name for name in model.layer_names)
    assert not torch.equal(model.coefficients(), torch.full((4, 3), 0.3))
    result = trainer(tmp_path).test(model, list(found.values()), verbose=False)[0]
    assert set(result) >= {f"test/acc/{task}" for task in CLASSES}


def test_seen_and_unseen_tasks_have_means_of_their_own(tmp_path):
    seen = ["c", "a.b"]
    model = module(merge_tasks=seen)
    assert model.coefficients().shape == (4, 2)
    fit = trainer(tmp_path, max_steps=2, val_check_interval=1)
    fit.fit(model, stream(tasks=seen), task_loaders())
    for stage, metrics in (
        ("val", {name: float(value) for name, value in fit.callback_metrics.items()}),
        ("test", trainer(tmp_path).test(model, task_loaders(), verbose=False)[0]),
    ):
        accuracies = {task: metrics[f"{stage}/acc/{task}"] for task in CLASSES}
        assert metrics[f"{stage}/acc/seen"] == pytest.approx((accuracies["c"] + accuracies["a.b"]) / 2)
        assert metrics[f"{stage}/acc/unseen"] == pytest.approx(accuracies["keys"])
        assert metrics[f"{stage}/acc/mean"] == pytest.approx(sum(accuracies.values()) / 3)
    assert "test/acc/seen" not in trainer(tmp_path).test(module(), task_loaders(), verbose=False)[0]
    # Unseen tasks have no part in the merge.
    alone = AdaMerging(
        [task for task in TASKS if task["name"] in seen],
        experts={task: states(net())[task] for task in seen},
        pretrained=net(),
        heads={task: weights()[task] for task in seen},
    )
    trainer(tmp_path, max_steps=2).fit(alone, stream(tasks=seen))
    assert torch.equal(alone.coefficients(), model.coefficients())


def test_a_part_of_an_expert_folder_is_merged_on_the_seen_tasks_of_the_data(tmp_path):
    folder = expert_folder(tmp_path / "experts")
    model = AdaMerging(TASKS, experts=str(folder.root), merge_tasks=["keys", "c"])
    fit = trainer(tmp_path, max_steps=2)
    fit.fit(model, datamodule=image_data(seen_tasks=["keys", "c"]))
    assert model.store.task_names == ["keys", "c"]
    assert {"val/acc/seen", "val/acc/unseen"} <= set(fit.callback_metrics)


def test_the_run_leaves_coefficients_as_table_and_figure(tmp_path, figures):
    model = module()
    trainer(tmp_path, max_steps=2).fit(model, stream())
    lines = (tmp_path / "tables/coefficients.jsonl").read_text().splitlines()
    assert len(lines) == len(model.layer_names)
    assert (tmp_path / "figures/coefficients.png").stat().st_size > 1000


def test_the_mean_coefficient_of_each_task_is_logged(tmp_path):
    model = module()
    fit = trainer(tmp_path, max_epochs=1)
    fit.fit(model, stream())
    for k, task in enumerate(CLASSES):
        assert float(fit.callback_metrics[f"coef/{task}"]) == pytest.approx(float(model.coefficients()[:, k].mean()))


def test_a_last_incomplete_group_of_batches_is_a_step(tmp_path):
    # Four batches of the longest stream, three to a step.
    fit = trainer(tmp_path, max_epochs=1)
    model = module(batches_per_step=3)
    fit.fit(model, stream())
    assert fit.global_step == 2


def test_a_validation_between_the_batches_of_a_step_changes_nothing(tmp_path):
    results = []
    for options in ({"val_check_interval": 1}, {"limit_val_batches": 0}):
        model = module(batches_per_step=2)
        trainer(tmp_path, max_steps=3, **options).fit(model, stream(), task_loaders())
        results.append(model.coefficients_.raw.detach())
    assert torch.equal(*results)


class BothGradients(Callback):
    """Saves a rank's own gradient and the one that its optimizer gets."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_start(self, trainer, pl_module):
        original = pl_module.coefficients_.surrogate

        def surrogate(gradient):
            torch.save(gradient, self.folder / f"local-{trainer.global_rank}.pt")
            return original(gradient)

        pl_module.coefficients_.surrogate = surrogate

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        torch.save(pl_module.coefficients_.raw.grad, self.folder / f"used-{trainer.global_rank}.pt")


@pytest.mark.filterwarnings("ignore:.*ddp_fork.*")
def test_each_process_gets_the_mean_of_the_local_gradients(tmp_path):
    folder = expert_folder(tmp_path / "experts")
    model = AdaMerging(TASKS, experts=str(folder.root))
    fit = trainer(
        tmp_path, max_steps=1, strategy="ddp_fork", devices=2, callbacks=[BothGradients(tmp_path)], limit_val_batches=0
    )
    fit.fit(model, datamodule=image_data(images(), batch_size=4))
    local, used = (
        [torch.load(tmp_path / f"{kind}-{rank}.pt", weights_only=True) for rank in (0, 1)] for kind in ("local", "used")
    )
    assert not torch.allclose(local[0], local[1])
    assert torch.equal(used[0], used[1])
    torch.testing.assert_close(used[0], (local[0] + local[1]) / 2)
