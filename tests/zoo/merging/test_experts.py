"""Fine-tuning of bases and experts, and the folders that it leaves."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from tests.zoo.merging.small_experts import (
    CLASSES,
    QUIET,
    SIZE,
    TASKS,
    encoder,
    equal,
    expert_folder,
    image_data,
    moved,
    stream,
    trainer,
)
from zoo.merging import AdaMerging, MergedClassifier, TaskExperts, load_heads, save_encoder, save_heads
from zoo.merging.backbones import build_encoder
from zoo.merging.expert_folder import read_expert_folder
from zoo.merging.finetune import prototype_heads

pytestmark = QUIET

TINY = {"kind": "mlp", "image_size": SIZE, "hidden_size": 16, "num_layers": 1, "output_size": 8}


def module(tasks=CLASSES, **options):
    torch.manual_seed(2)
    chosen = [task for task in TASKS if task["name"] in tasks]
    settings = {"encoder_options": TINY, "warmup_steps": 2, "lr": 1e-3, "mode": "separate"}
    if "encoder" in options:
        del settings["encoder_options"]
    return TaskExperts(chosen, **{**settings, **options})


def trained(folder, steps=6, data=None, **options):
    model = module(**options)
    trainer(folder, max_steps=steps).fit(model, datamodule=data or image_data(stream="none"))
    return model


def test_experts_side_by_side_are_each_one_trained_alone(tmp_path):
    together = trained(tmp_path / "together")
    for task in CLASSES:
        data = image_data(stream="none", tasks=[task])
        alone = trained(tmp_path / task, data=data, tasks=[task])
        for name, tensor in alone.encoder_of(task).state_dict().items():
            torch.testing.assert_close(together.encoder_of(task).state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
    one, other = (together.encoder_of(task).state_dict() for task in ("a.b", "c"))
    assert not equal(one, other)


def test_the_loss_is_the_sum_of_the_tasks_cross_entropies(tmp_path):
    for mode in ("separate", "joint"):
        model = module(mode=mode)
        start = copy.deepcopy(model)
        fit = trainer(tmp_path, max_steps=1)
        data = image_data(stream="none")
        fit.fit(model, datamodule=data)
        loader = data.train_loader(alone=True)
        loader.sampler.set_epoch(0)
        batch = next(iter(loader))
        total = 0.0
        for task in CLASSES:
            with torch.no_grad():
                loss = F.cross_entropy(start.task_logits(batch[task], task), batch[task].labels)
            assert float(fit.callback_metrics[f"train/loss/{task}"]) == pytest.approx(float(loss), rel=1e-4)
            total += float(loss)
        assert float(fit.callback_metrics["train/loss"]) == pytest.approx(total, rel=1e-4)


def test_what_separate_experts_leave_is_what_merges_read(tmp_path):
    base = encoder()
    save_encoder(base, tmp_path / "base")
    model = trained(tmp_path, encoder=str(tmp_path / "base"))
    folder = read_expert_folder(tmp_path)
    assert list(folder.experts) == list(CLASSES)
    assert equal(build_encoder(folder.pretrained).state_dict(), base.state_dict())
    for task, path in folder.experts.items():
        assert equal(build_encoder(path).state_dict(), model.encoder_of(task).state_dict())
    heads = load_heads(folder.heads)
    for task, head in prototype_heads(CLASSES, 8, 16.0).items():
        assert torch.equal(heads[task].weight, head.weight)
    # The run's folder, or the folder in it.
    for path in (tmp_path, tmp_path / "experts"):
        merged = AdaMerging(TASKS, experts=str(path))
        trainer(tmp_path / "merge", max_steps=1).fit(merged, datamodule=image_data())
        assert merged.store.task_names == list(CLASSES)
    data = image_data()
    individual = trainer(tmp_path).test(
        MergedClassifier(TASKS, rule="individual", experts=str(tmp_path)), datamodule=data, verbose=False
    )[0]
    own = trainer(tmp_path).test(model, datamodule=data, verbose=False)[0]
    assert individual == pytest.approx(own, rel=1e-5)


def test_joint_training_has_one_encoder_and_leaves_a_base_for_experts(tmp_path):
    model = trained(tmp_path, mode="joint")
    assert len(model.encoders) == 1
    assert model.encoder_of("a.b") is model.encoder_of("c")
    assert equal(build_encoder(tmp_path / "encoder").state_dict(), model.encoder_of("c").state_dict())
    options = {"encoder": str(tmp_path / "encoder"), "heads": str(tmp_path / "heads.safetensors")}
    experts = module(**options)
    for task in CLASSES:
        assert equal(experts.encoder_of(task).state_dict(), model.encoder_of("c").state_dict())
    batch = next(iter(image_data().eval_loader("c", "test")))
    with torch.no_grad():
        torch.testing.assert_close(experts.eval().task_logits(batch, "c"), model.eval().task_logits(batch, "c"))


def test_linear_heads_are_trained_and_frozen_in_the_folder(tmp_path):
    model = module(heads="linear")
    before = copy.deepcopy(model.heads.state_dict())
    trainer(tmp_path, max_steps=3).fit(model, datamodule=image_data(stream="none"))
    assert not any(torch.equal(before[name], tensor) for name, tensor in model.heads.state_dict().items())
    heads = load_heads(tmp_path / "experts/heads.safetensors")
    for task, head in zip(CLASSES, model.heads, strict=True):
        assert torch.equal(heads[task].weight, head.weight) and torch.equal(heads[task].bias, head.bias)
        assert list(heads[task].parameters()) == []


@pytest.mark.parametrize("heads", ["prototypes", "file"])
def test_other_heads_and_the_projection_stay_as_they_are(tmp_path, heads):
    given = heads
    if heads == "file":
        made = {task: torch.randn(count, 4) for task, count in CLASSES.items()}
        given = str(save_heads(tmp_path / "heads.safetensors", made))
    torch.manual_seed(0)
    options = {"kind": "vit", "image_size": SIZE, "patch_size": 4, "hidden_size": 16, "num_layers": 1, "num_heads": 2}
    model = module(heads=given, encoder_options={**options, "projection_dim": 4})
    before = copy.deepcopy(model.state_dict())
    trainer(tmp_path, max_steps=2).fit(model, datamodule=image_data(stream="none"))
    frozen = {name for name, tensor in model.state_dict().items() if torch.equal(before[name], tensor)}
    expected = {name for name in before if name.split(".")[2:3] == ["projection"] or name.startswith("heads.")}
    assert len(expected) == 3 + 6
    assert expected <= frozen
    assert not any("layer" in name and "weight" in name for name in frozen - expected)


def test_a_seed_gives_the_same_heads_for_a_part_of_the_tasks():
    assert torch.equal(module(tasks=["c"]).heads[0].weight, module().heads[2].weight)


def test_the_learning_rate_warms_up_and_decays_over_the_whole_training(tmp_path):
    class Rates:
        found: list[float] = []  # noqa: RUF012

    from lightning.pytorch import Callback

    class Seen(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            Rates.found.append(trainer.optimizers[0].param_groups[0]["lr"])

    model = module(warmup_steps=3)
    trainer(tmp_path, max_steps=12, callbacks=[Seen()]).fit(model, datamodule=image_data(stream="none"))
    rates = Rates.found
    assert len(rates) == 12
    assert rates[:4] == pytest.approx([1e-3 / 4, 2e-3 / 4, 3e-3 / 4, 1e-3])
    assert all(later < earlier for earlier, later in pairwise(rates[3:]))
    assert 0 < rates[-1] < 0.1e-3


def test_training_uses_the_training_mode_and_evaluation_does_not(tmp_path):
    model = module()
    assert all(part.training for part in model.encoders.modules())
    trainer(tmp_path, max_steps=1).fit(model, datamodule=image_data(stream="none"))
    assert not any(part.training for part in build_encoder(tmp_path / "experts/pretrained").modules())


def test_a_dry_run_leaves_no_folder(tmp_path):
    fit = trainer(tmp_path, fast_dev_run=True)
    fit.fit(module(), datamodule=image_data(stream="none"))
    assert not (tmp_path / "experts").exists()


def test_a_later_run_replaces_the_experts(tmp_path):
    expert_folder(tmp_path / "experts", moved(encoder(), 1), ["c"])
    trained(tmp_path, steps=1)
    assert list(read_expert_folder(tmp_path).experts) == list(CLASSES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "both"}, "mode must be one of joint, separate, got 'both'"),
        ({"lr": 0}, "lr must be positive, got 0"),
        ({"encoder_options": {"kind": "cnn"}}, "kind must be one of clip, vit, mlp, got 'cnn'"),
        ({"encoder_options": {"width": 3}}, "has no width"),
    ],
)
def test_an_option_that_cannot_be_is_refused_when_the_module_is_built(options, message):
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_heads_must_be_there_for_all_tasks(tmp_path):
    save_heads(tmp_path / "heads.safetensors", {"c": torch.ones(4, 8)})
    with pytest.raises(ValueError, match=r"heads.safetensors has no head for a.b, keys: it has c"):
        module(heads=str(tmp_path / "heads.safetensors"))
    with pytest.raises(FileNotFoundError, match="there is no file"):
        module(heads=str(tmp_path / "gone.safetensors"))


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({**CLASSES, "c": 3}, "c has 3 classes, the data 4"),
        (dict.fromkeys(CLASSES, 4), "a.b has 4 classes, the data 3"),
    ],
)
def test_heads_for_other_classes_are_refused(tmp_path, heads, message):
    save_heads(tmp_path / "heads.safetensors", {task: torch.ones(count, 8) for task, count in heads.items()})
    with pytest.raises(ValueError, match=message):
        module(heads=str(tmp_path / "heads.safetensors"))


def test_batches_without_labels_or_of_other_tasks_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no labels: .*--data.stream none"):
        trainer(tmp_path, max_steps=1).fit(module(), datamodule=image_data(stream="test"))
    with pytest.raises(ValueError, match=r"must be a mapping from the tasks c to labelled batches, got a.b, keys, c"):
        trainer(tmp_path, max_steps=1).fit(module(tasks=["c"]), stream())
