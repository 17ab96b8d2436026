"""What a stream refuses, and of what it warns."""

from __future__ import annotations

import logging
import re
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.zoo.api_cl.small_stream import QUIET, SHAPE, TASKS, apis, counted, data, fit, network, stream, trainer
from zoo.api_cl import ModuleAPI

pytestmark = QUIET


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": "best"}, "method must be one of ours, .*got 'best'"),
        ({"scenario": "dil"}, "scenario must be one of til, cil"),
        ({"gen_grad": "exact"}, "gen_grad must be one of zo, surrogate, whitebox"),
        ({"similarity": "cosinus"}, "similarity must be one of"),
        ({"cil_target": "zero"}, "cil_target must be one of masked, padded"),
        ({"generator": "unet"}, "generator must be one of df, dcgan"),
        ({"optimizer": "lion"}, "optimizer must be one of adam, sgd"),
        ({"schedule": "step"}, "schedule must be one of"),
        ({"generator_gap": "l2"}, "generator_gap must be one of"),
        ({"coop": "cosine"}, "coop must be one of"),
        ({"latent_dim": 0}, "latent_dim must be at least 1, got 0"),
        ({"student_steps": 0}, "student_steps must be at least 1"),
        ({"generator_batch_size": 0}, "generator_batch_size must be at least 1"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"generator_lr": -1.0}, "generator_lr must be positive"),
        ({"adv_weight": -1.0}, "adv_weight must be at least 0"),
        ({"num_directions": 0}, "num_directions"),
        ({"num_directions": 65, "directions": "orthonormal"}, "65"),
        ({"eps": 0.0}, "eps"),
        ({"budget": 0}, "total must be at least 1"),
        ({"on_exhausted": "wait"}, "on_exhausted must be one of stop_task, raise"),
        ({"reuse_base": True, "student_batch_size": 10}, "student_batch_size = 2 x generator_batch_size = 12, got 10"),
        ({"reuse_base": True, "method": "single_generator"}, "= 1 x generator_batch_size = 6, got 12"),
        ({"memory_size": 5}, "memory_size=5 is smaller than the 6 classes"),
        ({"memory_size": -1}, "memory_size must be at least 0"),
        ({"memory_size": 0}, "similarity=cka compares networks on remembered images, but memory_size is 0"),
        ({"memory_batch_size": 3}, "similarity=cka needs 4 remembered images a step, but memory_batch_size is 3"),
        ({"task_names": ["a", "b"]}, "task_names must be 3 different names"),
        ({"task_names": ["a", "b", "a"]}, "task_names must be 3 different names"),
        ({"model": nn.Linear(3, 3)}, "model must have `features`"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_options_that_cannot_work_are_refused_at_once(tmp_path, options: dict[str, Any], text: str):
    with pytest.raises(ValueError, match=text):
        # What depends on the size of the images shows as the stream begins.
        fit(tmp_path, stream(**options))


def test_a_memory_of_none_is_fine_where_nothing_is_compared(tmp_path):
    for options in ({"similarity": "none"}, {"similarity_weight": 0.0}):
        assert stream(memory_size=0, **options).memory_size == 0
    assert stream([], TASKS[:1], memory_size=0).memory_size == 0


@pytest.mark.parametrize("method", ["classic", "real_only", "lwf", "ewc", "derpp"])
def test_methods_on_real_images_say_that_they_need_some(tmp_path, method: str):
    with pytest.raises(ValueError, match=f"method={method} learns from real images: set --data.real_fraction above 0"):
        fit(tmp_path, stream([], method=method))


def test_a_service_that_tells_labels_only_needs_no_gradient_of_it(tmp_path):
    boxes = apis(label_only=True)
    model = stream(boxes)
    with pytest.warns(UserWarning, match="tells labels only.*gen_grad=surrogate is used") as caught:
        fit(tmp_path, model)
    assert _said(caught, "labels only") == 3 and _said(caught, "'service1'") == 1
    # A query for each image, none for directions.
    assert counted(boxes) == [4 * (12 + 24)] * 3


def test_a_step_too_small_for_the_services_precision_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="eps"):
        fit(tmp_path, stream(apis(decimals=4), eps=1e-3), max_steps=1)


def test_whitebox_needs_services_that_expose_their_gradient(tmp_path):
    boxes = apis()
    with pytest.raises(ValueError, match=r"gen_grad=whitebox needs the APIs' gradient.*expose_gradient"):
        fit(tmp_path, stream(boxes, gen_grad="whitebox"))
    assert counted(boxes) == [0, 0, 0]


def test_half_precision_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"precision=bf16-true does not work here.*32-true or bf16-mixed"):
        fit(tmp_path, stream(), precision="bf16-true")
    # Without a GPU the Trainer itself takes bf16-mixed in its place.
    model = stream()
    model._trainer = SimpleNamespace(precision="16-mixed")
    with pytest.raises(ValueError, match="precision=16-mixed does not work here"):
        model.setup("fit")


def test_bfloat16_for_the_learner_leaves_differences_in_single_precision(tmp_path):
    seen: list[torch.dtype] = []
    boxes = apis()
    for box in boxes:
        box.module.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].dtype))
    model = stream(boxes, model="lenet", model_options={"width": 2})
    fit(tmp_path, model, precision="bf16-mixed", max_steps=2)
    assert set(seen) == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_tasks_must_not_go_backwards(tmp_path):
    loader = data().train_dataloader()
    batches = [loader.dataset[SimpleNamespace(indices=[step])] for step in (0, 5, 1)]
    model = stream()
    with pytest.raises(ValueError, match="a batch of task 0 came after task 1: the stream must go forward"):
        _fit_batches(tmp_path, model, batches)


def test_tasks_may_be_skipped(tmp_path):
    loader = data().train_dataloader()
    model = stream()
    _fit_batches(tmp_path, model, [loader.dataset[SimpleNamespace(indices=[step])] for step in (0, 3, 8, 11)])
    assert set(model.memory.tasks) == {0, 2}


def _fit_batches(folder: Any, model: Any, batches: list[Any]) -> None:
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*no `val_dataloader`")
        # One epoch holds all: an epoch need not be a task for a loader of one's own.
        trainer(folder, max_epochs=1).fit(model, loader)


def _said(caught: Any, text: str) -> int:
    return len([warning for warning in caught if text in str(warning.message)])


def test_data_free_class_incremental_learning_is_warned_of_once(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, stream(scenario="cil"))
    assert _said(caught, "scenario=cil without real images") == 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, stream(scenario="cil"), data(real_fraction=0.5), max_steps=1)
        fit(tmp_path, stream(scenario="til"), max_steps=1)
    assert not _said(caught, "scenario=cil")


def test_a_fit_that_ends_before_the_stream_says_so(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        fit(tmp_path, stream(), max_epochs=2)
    assert "max_epochs=2 ends before the stream of 3 tasks: an epoch is a task" in caplog.text


@pytest.mark.parametrize(
    ("boxes", "text"),
    [
        (lambda: apis()[:2], "apis has 2 entries for 3 tasks"),
        (lambda: [apis()[0], apis()[0], apis()[2]], "'service0' and 'service0' both declare the class 0"),
        (lambda: apis()[::-1], "missing [0, 1], unknown [4, 5]"),
        (lambda: [{"type": "http"}, *apis()[1:]], "apis[0] of type http needs a url"),
        (lambda: [{"type": "grpc"}, *apis()[1:]], "apis[0] has the type 'grpc'"),
        (lambda: "bought", "apis must be 'train' or a list"),
    ],
)
def test_services_must_fit_their_tasks(tmp_path, boxes: Any, text: str):
    with pytest.raises(ValueError, match=re.escape(text)):
        fit(tmp_path, stream(boxes()))


def test_a_service_with_the_wrong_number_of_columns_is_named(tmp_path):
    wrong = ModuleAPI(network(0, 10), (0, 1), name="shop", input_shape=SHAPE)
    with pytest.raises(RuntimeError, match="'shop' returned 10 columns for 2 declared classes"):
        fit(tmp_path, stream([wrong, *apis()[1:]]))


@pytest.mark.parametrize("options", [{"gradient_clip_val": 1.0}, {"accumulate_grad_batches": 2}])
def test_options_of_the_trainer_for_automatic_optimization_are_refused(tmp_path, options: dict[str, Any]):
    with pytest.raises(Exception, match="manual optimization"):
        fit(tmp_path, stream(), **options)
