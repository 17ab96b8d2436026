"""What AdaMerging refuses or warns of, and what the message says."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.utils.data import DataLoader

from tests.zoo.merging.small_experts import (
    DIM,
    QUIET,
    TASKS,
    encoder,
    expert_folder,
    image_data,
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
from zoo.merging import AdaMerging
from zoo.merging.coefficient_files import save_coefficients

pytestmark = QUIET


def without(mapping, *names):
    return {name: value for name, value in mapping.items() if name not in names}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": None}, "experts are missing: give --model.experts, a folder .* or a recipe"),
        ({"recipe": {"epochs": 1}}, "experts and recipe exclude each other"),
        ({"experts": {}}, r"experts has , but not a.b, keys, c of the tasks"),
        ({"experts": without(states(net()), "c")}, "experts has a.b, keys, but not c of the tasks .* merge_tasks"),
        ({"experts": {**states(net()), "d": net()}}, "'d', but the tasks of the data are a.b, keys, c"),
        ({"merge_tasks": ["c", "c"]}, r"merge_tasks must name at least one task, each once, got \['c', 'c'\]"),
        ({"merge_tasks": ["d"]}, "merge_tasks entry 'd', but the tasks of the data are a.b, keys, c"),
        ({"heads": without(weights(), "keys")}, "there is no head for keys: heads has a.b, c"),
        ({"heads": None}, "heads are missing: give a file of save_heads, or a head for each task"),
        ({"heads": {**weights(), "c": torch.ones(3, DIM)}}, "the head of c has 3 classes, the data 4"),
        ({"pretrained": None}, "need the base they were fine-tuned from: give pretrained"),
        ({"pretrained": net().state_dict()}, "a base given as a state dict needs the network: give encoder="),
        ({"tau_dtype": "int8"}, "tau_dtype must be one of float32, bfloat16, float16, float64, got 'int8'"),
        ({"granularity": "tensor"}, "tensor"),
        ({"include": "nothing"}, "no parameter is left to merge: include='nothing', exclude=None"),
        ({"exclude": ["stem", "out"]}, "no parameter is left to merge"),
        ({"preprocess": "dare"}, "preprocess must be empty or 'ties', got 'dare'"),
        ({"preprocess": "ties", "density": 0.0}, "density"),
        ({"preprocess": "ties", "density": 1.5}, "density"),
        ({"objective": "loss"}, "objective"),
        ({"constraint": "clip"}, "constraint must be one of clamp, project, sigmoid, none, got 'clip'"),
        ({"init": 1.2}, r"init=1.2 lies outside of \[0, 1\], the bounds of constraint='clamp'"),
        ({"init": 0.0, "constraint": "sigmoid"}, "init=0.0 is not a value of a sigmoid"),
        ({"batches_per_step": 0}, "batches_per_step must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
    ],
)
def test_an_option_that_cannot_be_is_refused_when_the_module_is_built(options, message):
    with pytest.raises(ValueError, match=message):
        module(**options)


@pytest.mark.parametrize(("tasks", "message"), [([], "at least one"), ([TASKS[0], TASKS[0]], "name of its own")])
def test_tasks_must_be_there_and_differ(tasks, message):
    with pytest.raises(ValueError, match=message):
        AdaMerging(tasks, experts=states(net()), pretrained=net(), heads=weights())


def test_a_head_for_other_features_than_the_encoder_gives_is_refused_with_both_numbers(tmp_path):
    folder = expert_folder(tmp_path / "experts")
    with pytest.raises(ValueError, match=r"the head of a.b takes 5 features, the encoder gives 8"):
        AdaMerging(TASKS, experts=str(folder.root), heads=weights())
    # Of a network without a `dim` it shows in the first batch.
    model = module(heads=weights(7))
    with pytest.raises(ValueError, match="head takes features of dimension 7, the encoder gave 5"):
        trainer(tmp_path, max_steps=1).fit(model, stream())


def changed(name, change):
    experts = states(net())
    experts["keys"] = change(dict(experts["keys"]), name)
    return experts


@pytest.mark.parametrize(
    ("experts", "messages"),
    [
        (changed("out.bias", without), ["keys", "out.bias", "missing"]),
        (changed("out.bias", lambda s, n: {**s, n: torch.ones(9)}), ["keys", "out.bias", r"\(9,\)", r"\(5,\)"]),
        (changed("stem.weight", lambda s, n: {**s, n: s[n] * torch.nan}), ["keys", "stem.weight", "NaN"]),
        (changed("stem.weight", lambda s, n: {**s, n: s[n] / 0}), ["keys", "stem.weight", "infinite"]),
    ],
    ids=["missing", "shape", "nan", "infinite"],
)  # fmt: skip
def test_experts_that_do_not_fit_are_refused_by_name(tmp_path, experts, messages):
    with pytest.raises(ValueError, match=messages[0]) as info:
        trainer(tmp_path, max_steps=1).fit(module(experts=experts), stream())
    for message in messages:
        assert info.match(message)


def test_an_experts_own_head_is_named_with_the_way_out(tmp_path):
    base = net()
    experts = states(base)
    for state in experts.values():
        state["classifier.weight"] = torch.ones(2, 5)
    with pytest.raises(ValueError, match=r'classifier.weight \(2, 5\) is not in .* exclude="\^classifier"'):
        module(base, experts=experts).open_experts()
    module(base, experts=experts, exclude="classifier").open_experts()


def test_whole_modules_in_a_pickle_are_refused_with_the_way_to_save_a_state_dict(tmp_path):
    torch.save(net(), tmp_path / "whole.pt")
    experts = {**states(net()), "c": str(tmp_path / "whole.pt")}
    with pytest.raises(ValueError, match="state_dict"):
        module(experts=experts).open_experts()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone.safetensors"):
        module(experts={**states(net()), "c": str(tmp_path / "gone.safetensors")}).open_experts()
    with pytest.raises(FileNotFoundError, match=r"is no folder of experts: experts.json is missing"):
        AdaMerging(TASKS, experts=str(tmp_path))


def test_experts_that_are_far_equal_or_the_base_are_warned_of():
    base = net()
    near = states(base)
    with pytest.warns(UserWarning, match=r"expert c is far from the pre-trained model: .* [0-9.]+ times the norm"):
        module(base, experts={**near, "c": moved(base, 1, 3.0)}).open_experts()
    with pytest.warns(UserWarning, match="expert c equals the pre-trained model"):
        module(base, experts={**near, "c": copy.deepcopy(base)}).open_experts()
    with pytest.warns(UserWarning, match=r"experts a.b and c are identical"):
        module(base, experts={**near, "c": near["a.b"]}).open_experts()


def test_integers_are_the_bases_and_mixed_types_are_upcast():
    base = net(batch_norm=True)
    experts = states(base)
    for state in experts.values():
        state["norm.num_batches_tracked"] = torch.tensor(99)
    experts["c"] = {name: t.bfloat16() if t.is_floating_point() else t for name, t in experts["c"].items()}
    model = module(base, experts=experts)
    with pytest.warns(UserWarning, match="bfloat16") as caught:
        store = model.open_experts()
    assert len(caught) == 1
    exported = model.export()
    assert exported["norm.num_batches_tracked"].item() == 1
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32, torch.int64}
    assert torch.allclose(store.expert("c")["out.bias"], experts["c"]["out.bias"].float(), atol=1e-6)


class OneLogit(nn.Module):
    def forward(self, features):
        return features[:, :1]


class ThreeAxes(nn.Module):
    def forward(self, features):
        return features[:, None]


@pytest.mark.parametrize(("head", "message"), [(OneLogit(), "two"), (ThreeAxes(), "classes")])
def test_logits_without_an_entropy_are_refused(tmp_path, head, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, max_steps=1).fit(module(heads={**weights(), "c": head}), stream())


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (stream(["a.b", "c"]), "the training batch has the tasks a.b, c, the merged experts are a.b, keys, c"),
        (
            DataLoader(rows("c"), batch_size=8),
            "the training batch has the tasks pixel_values, labels, the merged experts are",
        ),
        (DataLoader([torch.ones(6)] * 4, batch_size=2), "must be a mapping from tasks to inputs, got Tensor: use"),
    ],
    ids=["lacking", "one task", "tensor"],
)
def test_a_stream_of_other_tasks_is_refused(tmp_path, loader, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, max_steps=1).fit(module(), loader)


def test_a_stream_of_more_tasks_is_refused_with_the_option_that_cuts_it(tmp_path):
    with pytest.raises(ValueError, match=r"for a part of the tasks: --data.seen_tasks \[c, a.b\]"):
        trainer(tmp_path, max_steps=1).fit(module(merge_tasks=["c", "a.b"]), stream())


def test_a_batch_of_an_unknown_task_is_refused_in_evaluation(tmp_path):
    with pytest.raises(ValueError, match=r"came from loader 3, the tasks are a.b, keys, c: give one loader per task"):
        trainer(tmp_path).test(module(), [*task_loaders(), *task_loaders(["c"])], verbose=False)


def test_coefficients_for_other_layers_or_tasks_are_refused_by_name(tmp_path):
    layers, tasks, path = module().layer_names, ["a.b", "keys", "c"], tmp_path / "coef.safetensors"
    save_coefficients(path, torch.ones(2, 3), layers[:2], tasks)
    with pytest.raises(ValueError, match=f"has no layer '{layers[2]}' .2 missing.: it has .*; expected {layers[0]}"):
        module(coef_path=str(path))
    save_coefficients(path, torch.ones(4, 2), layers, tasks[:2])
    with pytest.raises(ValueError, match="has no task 'c'"):
        module(coef_path=str(path))
    save_coefficients(path, torch.ones(3, 4), layers, tasks)
    with pytest.raises(ValueError, match=r"shape \(3, 4\) for the 4 layers stem.weight, .* transposed: save coef.T"):
        module(coef_path=str(path))
    with pytest.raises(FileNotFoundError, match=r"expected coefficients of AdaMerging.export_coefficients"):
        module(coef_path=str(tmp_path / "gone.safetensors"))


@pytest.mark.filterwarnings("ignore:.*GradScaler.*", "ignore:.*not supported on CPU.*")
def test_half_precision_with_a_scaler_is_refused(tmp_path):
    fit = trainer(tmp_path, max_steps=1)
    model = module()
    model.trainer = fit
    fit.strategy.precision_plugin.precision = "16-mixed"
    with pytest.raises(MisconfigurationException, match=r"precision=16-mixed: .* Use bf16-mixed or 32-true"):
        model.setup("fit")


def test_strategies_that_shard_parameters_are_refused(tmp_path):
    fit = trainer(tmp_path, max_steps=1)
    model = module()
    model.trainer = fit
    fit._accelerator_connector.strategy = FSDPStrategy()
    with pytest.raises(MisconfigurationException, match=r"FSDPStrategy cuts registered parameters .* Use ddp"):
        model.setup("fit")


def test_too_small_a_stream_is_refused():
    with pytest.raises(ValueError, match=r"has 2 images to draw from, fewer than the 8 .*adapt_fraction"):
        image_data(adapt_fraction=0.1).train_loader(alone=True)


def test_task_vectors_before_the_experts_are_read_are_refused_with_the_way_to_read_them():
    with pytest.raises(RuntimeError, match=r"call open_experts\(\) outside of a Trainer"):
        module().export()


def test_zero_shot_heads_need_the_prompts_of_the_data(tmp_path):
    folder = expert_folder(tmp_path / "experts", encoder())
    model = AdaMerging(TASKS, experts=str(folder.root), heads="zero_shot")
    with pytest.raises(ValueError, match="heads: zero_shot needs the class names and the prompt templates"):
        trainer(tmp_path, max_steps=1).fit(model, stream())


def test_the_command_line_says_what_is_missing(refused):
    line = ("--model", "AdaMerging", "--data", "ClassificationTasksData", "--data.stream", "test")
    assert "experts are missing: give --model.experts" in refused(2, *line)
    assert "nowhere is no folder of experts" in refused(2, *line, "--model.experts", "nowhere")
