"""Merges without a training, by every rule, against the functions that make them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call

from tests.zoo.merging.small_experts import (
    CLASSES,
    QUIET,
    TASKS,
    clip,
    encoder,
    equal,
    expert_folder,
    image_data,
    moved,
    net,
    states,
    task_loaders,
    trainer,
    weights,
)
from zoo.merging import AdaMerging, CosineHead, MergedClassifier, one_shot
from zoo.merging.backbones import build_encoder
from zoo.merging.rules import RULES
from zoo.merging.task_vectors import TaskVectorStore

pytestmark = QUIET

ONE_SHOT = {
    "average": (one_shot.weight_average, {}),
    "task_arithmetic": (one_shot.task_arithmetic, {"coef": 0.4}),
    "magnitude": (one_shot.magnitude_merge, {"density": 0.5, "coef": 0.2}),
    "ties": (one_shot.ties_merge, {"density": 0.3, "coef": 0.5, "merge_func": "mean"}),
    "dare": (one_shot.dare_merge, {"drop": 0.7, "seed": 3}),
    "dare_ties": (one_shot.dare_merge, {"drop": 0.2, "ties_density": 0.4}),
}


def classifier(**options):
    base = net()
    return MergedClassifier(TASKS, **{"experts": states(base), "pretrained": base, "heads": weights(), **options})


def accuracies(model, data_or_loaders, folder):
    kind = "dataloaders" if isinstance(data_or_loaders, list) else "datamodule"
    found = trainer(folder).test(model, verbose=False, **{kind: data_or_loaders})[0]
    return {task: found[f"test/acc/{task}"] for task in CLASSES}


def accuracy(features_of, loader, weight):
    right = total = 0
    for batch in loader:
        with torch.no_grad():
            logits = CosineHead(weight)(features_of(batch))
        right += int((logits.argmax(1) == batch["labels"]).sum())
        total += len(logits)
    return right / total


@pytest.mark.parametrize("rule", ONE_SHOT)
def test_a_rule_is_the_one_shot_merge_of_that_name(tmp_path, rule):
    function, options = ONE_SHOT[rule]
    base = net(batch_norm=True)
    model = classifier(
        pretrained=base, experts=states(base), rule=rule, rule_options=options, exclude="stem.bias", buffers="average"
    )
    found = accuracies(model, task_loaders(), tmp_path)
    expected = function(base.state_dict(), states(base), exclude="stem.bias", buffers="average", **options)
    exported = model.export(tmp_path / "merged.safetensors")
    assert list(exported) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(exported[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    assert equal(exported, load_file(tmp_path / "merged.safetensors"))
    for task, loader in zip(CLASSES, task_loaders(), strict=True):
        own = accuracy(lambda b: functional_call(base, expected, (b["pixel_values"],)), loader, weights()[task])
        assert found[task] == pytest.approx(own, abs=1e-6)


def test_dare_with_ties_keeps_a_fifth_unless_told(tmp_path):
    model = classifier(rule="dare_ties")
    accuracies(model, task_loaders(), tmp_path)
    expected = one_shot.dare_merge(net().state_dict(), states(net()), ties_density=0.2)
    assert all(torch.allclose(tensor, expected[name]) for name, tensor in model.export().items())


def test_individual_runs_each_expert_on_its_task_and_the_base_on_others(tmp_path):
    base, experts = net(), states(net())
    model = classifier(rule="individual", merge_tasks=["c", "a.b"])
    found = accuracies(model, task_loaders(), tmp_path)
    for task, loader in zip(CLASSES, task_loaders(), strict=True):
        state = base.state_dict() if task == "keys" else experts[task]
        own = accuracy(lambda b, s=state: functional_call(base, s, (b["pixel_values"],)), loader, weights()[task])
        assert found[task] == pytest.approx(own, abs=1e-6)
    with pytest.raises(ValueError, match="individual experts are not merged"):
        model.export()


def test_pretrained_is_the_base_bit_for_bit(tmp_path):
    model = classifier(rule="pretrained")
    accuracies(model, task_loaders(), tmp_path)
    assert equal(model.export(), net().state_dict())


@pytest.mark.parametrize("rule", ["fisher", "regmean"])
def test_rules_with_data_use_the_stream_of_the_data_module(tmp_path, rule):
    folder = expert_folder(tmp_path / "experts")
    options = {"num_examples": 16}
    model = MergedClassifier(TASKS, rule=rule, rule_options=options, experts=str(folder.root))
    accuracies(model, image_data(), tmp_path)
    merged = model.export()
    store = model.store
    average = store.state_dict(1 / 3)
    assert any(not torch.allclose(merged[name], average[name], atol=1e-5) for name in merged)
    # Weighted means of the experts cannot leave the range between them; for RegMean, of what it only averages.
    for name in store.param_names:
        three = torch.stack([store.expert(task)[name] for task in CLASSES])
        if rule == "fisher":
            low, high = three.amin(0) - 1e-5, three.amax(0) + 1e-5
            assert bool(((merged[name] >= low) & (merged[name] <= high)).all()), name
        elif merged[name].ndim == 1:
            torch.testing.assert_close(merged[name], three.mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["fisher", "regmean"])
def test_rules_with_data_are_refused_without(tmp_path, rule):
    with pytest.raises(ValueError, match="this merge needs inputs of each task: give the Trainer"):
        accuracies(classifier(rule=rule), task_loaders(), tmp_path)


def test_joint_is_the_encoder_of_the_folder_or_an_error(tmp_path):
    folder = expert_folder(tmp_path / "with", joint=True)
    model = MergedClassifier(TASKS, rule="joint", experts=str(folder.root))
    accuracies(model, image_data(), tmp_path)
    assert equal(model.export(), build_encoder(folder.joint).backbone.state_dict())
    model = MergedClassifier(TASKS, rule="joint", experts=str(expert_folder(tmp_path / "without").root))
    with pytest.raises(ValueError, match=r"there is no encoder trained on all tasks.*joint_epochs"):
        accuracies(model, image_data(), tmp_path)


@pytest.mark.parametrize("options", [{}, {"preprocess": "ties", "density": 0.4}, {"granularity": "task"}])
def test_coefficients_of_an_earlier_run_are_a_rule(tmp_path, options):
    folder = expert_folder(tmp_path / "experts")
    learnt = AdaMerging(TASKS, experts=str(folder.root), **options)
    fit = trainer(tmp_path, max_steps=3)
    fit.fit(learnt, datamodule=image_data())
    fit.save_checkpoint(tmp_path / "run.ckpt")
    learnt.export_coefficients(tmp_path / "coef.safetensors")
    expected = learnt.export()
    for name in ("run.ckpt", "coef.safetensors"):
        rule = {"rule": "adamerging", "rule_options": {"coef_path": str(tmp_path / name)}}
        model = MergedClassifier(TASKS, experts=str(folder.root), **rule)
        accuracies(model, image_data(), tmp_path)
        merged = model.export()
        assert merged.keys() == expected.keys()
        assert all(torch.allclose(merged[key], expected[key], rtol=1e-6, atol=1e-7) for key in merged)


@pytest.mark.parametrize("kind", ["clip", "vit"])
@pytest.mark.parametrize("rule", ["average", "ties"])
def test_networks_of_transformers_are_merged_from_their_folders(tmp_path, kind, rule):
    base = clip()
    if kind == "vit":
        torch.manual_seed(0)
        base = build_encoder("tiny", kind="vit", image_size=8, patch_size=4, hidden_size=16, num_layers=1, num_heads=2)
    folder = expert_folder(tmp_path / "experts", base)
    model = MergedClassifier(TASKS, rule=rule, experts=str(folder.root))
    accuracies(model, image_data(), tmp_path)
    experts = {task: build_encoder(path).backbone for task, path in folder.experts.items()}
    function = one_shot.weight_average if rule == "average" else one_shot.ties_merge
    expected = function(base.backbone, experts)
    for name, tensor in model.export().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def test_a_fit_ends_after_its_first_step_with_the_merge(tmp_path):
    folder = expert_folder(tmp_path / "experts")
    model = MergedClassifier(TASKS, experts=str(folder.root))
    fit = trainer(tmp_path, max_epochs=5)
    fit.fit(model, datamodule=image_data())
    assert fit.current_epoch <= 1
    expected = TaskVectorStore.from_checkpoints(
        build_encoder(folder.pretrained).backbone,
        {task: build_encoder(path).backbone for task, path in folder.experts.items()},
    )
    for name, tensor in expected.state_dict(0.3).items():
        torch.testing.assert_close(model.export()[name], tensor)
    assert list(model.parameters()) == []


def test_a_wrapper_of_the_merged_network_serves_as_the_network(tmp_path):
    base = encoder()
    experts = {task: moved(base, k).backbone.state_dict() for k, task in enumerate(CLASSES)}
    options = {"experts": experts, "heads": weights(8)}
    wrapped = MergedClassifier(TASKS, pretrained=base.backbone.state_dict(), encoder=base, **options)
    plain = MergedClassifier(TASKS, pretrained=base, **options)
    data = image_data()
    assert accuracies(wrapped, data, tmp_path) == accuracies(plain, data, tmp_path)
    assert equal(wrapped.export(), plain.export())


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("mean", {}, f"rule must be one of individual, {', '.join(RULES)}, got 'mean'"),
        ("ties", {"drop": 0.5}, "ties has no option 'drop': it has density, coef, merge_func"),
        ("average", {"coef": 0.5}, "average has no option 'coef': it has none"),
        ("individual", {"coef": 0.5}, "individual has no options, got coef"),
        ("adamerging", {}, "adamerging needs coef_path"),
    ],
)
def test_unknown_rules_and_options_are_refused_when_the_module_is_built(rule, options, message):
    with pytest.raises(ValueError, match=message):
        classifier(rule=rule, rule_options=options)


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [("ties", {"density": 0}, "density"), ("dare", {"drop": 1.0}, "drop"), ("ties", {"merge_func": "x"}, "merge_func")],
)
def test_options_out_of_range_are_refused(tmp_path, rule, options, message):
    with pytest.raises(ValueError, match=message):
        accuracies(classifier(rule=rule, rule_options=options), task_loaders(), tmp_path)
