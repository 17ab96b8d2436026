"""What a fit of the stream does: every method, every option, and who may change what."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from datamodules.class_stream import ClassStreamData
from tests.zoo.api_cl.small_stream import (
    QUIET,
    SHAPE,
    TASKS,
    AtStep,
    Sealed,
    apis,
    counted,
    data,
    different,
    fit,
    images,
    network,
    stream,
    trainer,
    weights,
)
from zoo.api_cl import APIStreamCL, ModuleAPI, build_classifier
from zoo.api_cl.options import METHODS, MODES, OPTIMIZERS, SCHEDULES, WITHOUT_API
from zoo.api_cl.similarity import SIMILARITIES

pytestmark = QUIET
TWO = ((0, 1, 2), (3, 4, 5))
ITERATIONS = 2


def two_tasks(folder: Any, boxes: Any = None, source: Any = None, **options: Any) -> APIStreamCL:
    """A stream of two tasks with some real images, as short as it can be."""
    if source is None:
        source = data(num_tasks=2, iterations_per_task=ITERATIONS, real_fraction=0.5, min_per_class=2)
    # At the default margin the images of two fresh generators are far enough apart.
    options.setdefault("coop_margin", 2.0)
    model = stream(apis(TWO) if boxes is None else boxes, TWO, **options)
    fit(folder, model, source, max_epochs=2)
    return model


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights of the learner after two tasks with the settings of all tests here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(APIStreamCL, "on_fit_end", lambda self: None)
        return weights(two_tasks(tmp_path_factory.mktemp("usual")).learner)


def test_a_fit_runs_the_whole_stream_and_fills_both_matrices(tmp_path, monkeypatch, pictures):
    source = ClassStreamData(num_tasks=3, classes_per_task=2, iterations_per_task=3, max_images=64)
    settings = {"api_archs": ["mlp", "logistic"], "api_epochs": 2, "student_steps": 1, "seed": 0}
    module = APIStreamCL(
        source.task_classes, source.num_classes, source.image_shape, latent_dim=8, base_channels=4,
        generator_batch_size=4, student_batch_size=8, memory_size=24, **settings,
    )  # fmt: skip
    run = fit(tmp_path, module, source, limit_val_batches=1.0)
    assert run.current_epoch == 3 and run.global_step == 9
    til, cil = (module.matrices[kind].matrix for kind in ("til", "cil"))
    assert til.isfinite().all() and cil.isfinite().all()
    assert (cil <= til).all()
    # Within its two classes an untrained learner is right half of the time; a stream of 3 tasks has 6 classes at last.
    assert til.mean() > 0.4
    run.test(module, source, verbose=False)
    scores = {name: float(value) for name, value in run.callback_metrics.items()}
    for kind, matrix in (("til", til), ("cil", cil)):
        own = [scores[f"test/{kind}/acc/{task}"] for task in range(3)]
        assert own == pytest.approx(matrix[-1].tolist(), abs=1e-6)
        assert scores[f"test/{kind}/acc"] == pytest.approx(float(matrix[-1].mean()), abs=1e-6)
        assert scores[f"test/{kind}/bwt"] == pytest.approx(module.matrices[kind].bwt(), abs=1e-6)
    assert scores["test/queries"] == module.ledger.spent() > 0
    assert 0 <= scores["test/fidelity"] <= 1 and scores["test/api/acc"] > 0.5
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "accuracy.png", "generated.png", "course.png", "queries.png",
    }  # fmt: skip
    # What was trained once is read again by a later run.
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "apis").glob("*.safetensors")}
    assert len(files) == 3
    monkeypatch.setattr("zoo.api_cl.apis.train_api", None)
    monkeypatch.setattr(APIStreamCL, "on_fit_end", lambda self: None)
    fit(tmp_path, stream("train", **settings), source, max_steps=1)
    assert {path: path.stat().st_mtime_ns for path in files} == files


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_a_stream(tmp_path, method: str):
    boxes = apis(TWO)
    model = two_tasks(tmp_path, boxes, method=method)
    start = stream(apis(TWO), TWO, method=method)
    assert set(different(weights(start.learner), weights(model.learner))) >= {"head.weight", "head.bias"}
    assert all(tensor.isfinite().all() for tensor in weights(model).values())
    asks = method not in WITHOUT_API
    assert [rows > 0 for rows in counted(boxes)] == [asks, asks]
    assert len(model.memory) == (0 if method in ("sequential", "lwf", "ewc") else 24)
    assert len(model.generators) == {"single_generator": 1}.get(method, 2 * (asks and method != "noise"))
    moved = different(weights(start.generators), weights(model.generators))
    trained = any(name.endswith("weight") for name in moved)
    # Frozen generators are drawn anew with each task, too.
    assert trained == bool(len(model.generators))
    assert model.samples.keys() == {f"{task}/{'AB'[k]}" for task in range(2) for k in range(len(model.generators))}


def test_frozen_generators_keep_their_weights_within_a_task(tmp_path):
    model = stream(method="frozen_generator", reset_generators=False)
    before = {name: parameter.clone() for name, parameter in model.generators.named_parameters()}
    fit(tmp_path, model)
    assert not different(before, dict(model.generators.named_parameters()))


VARIANTS: list[dict[str, Any]] = [
    *({"gen_grad": mode} for mode in MODES if mode not in ("zo", "whitebox")),
    {"gen_grad": "whitebox", "api": {"expose_gradient": True}},
    *({"similarity": kind, "similarity_weight": 5.0} for kind in SIMILARITIES if kind != "cka"),
    *({"optimizer": name} for name in OPTIMIZERS if name != "adam"),
    {"lr": 0.01},
    *({"schedule": name} for name in SCHEDULES if name != "none"),
    {"scenario": "cil"},
    {"scenario": "cil", "cil_target": "padded"},
    {"base_channels": 6},
    {"num_directions": 8, "directions": "orthonormal"},
    {"num_directions": 8, "directions": "sphere"},
    {"central": True},
    {"eps": 0.5},
    {"generator_gap": "kl"},
    {"generator_gap": "kl", "tau": 2.0},
    {"generator_gap": "l1_prob"},
    {"student_gap": "l1"},
    {"student_gap": "l1_prob"},
    {"tau": 3.0},
    {"adv_weight": 0.0},
    {"balance_weight": 0.0},
    {"conf_weight": 1.0},
    {"coop_weight": 0.0},
    {"coop_margin": 0.5},
    {"coop": "feature"},
    {"coop": "none"},
    {"real_weight": 0.0},
    {"memory_weight": 0.0},
    {"similarity_weight": 0.0},
    {"distill_real": False},
    {"memory_size": 12},
    {"memory_size": 0, "similarity": "none"},
    {"memory_batch_size": 4},
    {"balanced_memory": False},
    {"store_real": False},
    {"generator_steps": 2},
    {"generator_steps": 0},
    {"student_steps": 3},
    {"reuse_base": True},
    {"reset_generators": False},
    {"weight_decay": 0.1},
    {"generator_lr": 0.01},
    {"clip_norm": 0.01},
    {"latent_dim": 5},
    {"model": "lenet", "model_options": {"width": 2}},
    {"api": {"decimals": 4}},
    {"api": {"topk": 1}},
    {"seed": 4},
]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()))
def test_every_option_runs_a_stream_and_matters(tmp_path, usual, options: dict[str, Any]):
    options = dict(options)
    boxes = apis(TWO, **options.pop("api", {}))
    model = two_tasks(tmp_path, boxes, **options)
    assert all(tensor.isfinite().all() for tensor in weights(model).values())
    assert model.done == ITERATIONS and not model.exhausted
    found = weights(model.learner)
    assert found.keys() != usual.keys() or different(found, usual)


def test_what_the_other_tests_compare_with_is_reproducible(tmp_path, usual):
    torch.manual_seed(99)
    assert not different(weights(two_tasks(tmp_path).learner), usual)


def test_a_learner_may_be_a_module(tmp_path):
    learner = build_classifier("lenet", SHAPE, 6, width=2)
    model = two_tasks(tmp_path, model=learner)
    assert model.learner is learner and "model" not in model.hparams


def test_dcgan_generators_make_larger_images(tmp_path):
    sets = {part: (torch.zeros(12, 16, 16, dtype=torch.uint8), torch.arange(12) % 6) for part in ("train", "test")}
    source = ClassStreamData.from_datasets(sets, num_tasks=2, iterations_per_task=1)
    boxes = [
        ModuleAPI(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 3)), classes, name=str(classes))
        for classes in TWO
    ]
    model = APIStreamCL(
        [list(classes) for classes in TWO], 6, [1, 16, 16], apis=boxes, generator="dcgan", latent_dim=4,
        base_channels=2, generator_batch_size=4, student_batch_size=4, student_steps=1, memory_size=12, seed=0,
    )  # fmt: skip
    fit(tmp_path, model, source, max_epochs=2)
    (made,) = model.generate(3, "B")
    assert made.shape == (3, 1, 16, 16) and made.abs().max() <= 1


def test_no_gradient_leaves_a_service_and_nothing_of_it_enters_the_module(tmp_path):
    boxes = apis(wrap=Sealed)
    for box in boxes:
        box.module.train()
    before = [weights(box.module) for box in boxes]
    model = stream(boxes)
    fit(tmp_path, model, data(real_fraction=0.5, min_per_class=2))
    for box, old in zip(boxes, before, strict=True):
        assert not box.module.training and not different(old, weights(box.module))
    strangers = {id(tensor) for box in boxes for tensor in (*box.module.parameters(), *box.module.buffers())}
    own = [*model.parameters(), *model.buffers()]
    assert not strangers & {id(tensor) for tensor in own}
    assert {name.split(".")[0] for name in model.state_dict()} == {"learner", "previous", "generators"}
    trained = {id(parameter) for optimizer in model._optimizers() for parameter in optimizer.param_groups[0]["params"]}
    assert trained == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    path = tmp_path / "whole.ckpt"
    model.trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    values = [box.module.network[0].weight for box in boxes]

    def tensors(part: Any) -> list[torch.Tensor]:
        if isinstance(part, torch.Tensor):
            return [part]
        parts = part.values() if isinstance(part, dict) else part if isinstance(part, (list, tuple)) else ()
        return [tensor for one in parts for tensor in tensors(one)]

    held = tensors(checkpoint)
    assert len(held) > 20
    assert not [1 for tensor in held for value in values if tensor.shape == value.shape and torch.equal(tensor, value)]


def test_each_phase_changes_its_own_networks_only(tmp_path, monkeypatch):
    rounds: list[str] = []

    def watched(name: str, still: str, own: str) -> None:
        plain = getattr(APIStreamCL, name)

        def step(self: APIStreamCL, *arguments: Any) -> Any:
            kept, moving, old = getattr(self, still), getattr(self, own), weights(self.previous)
            training = kept.training
            if name == "_student_step":
                before = {key: value.clone() for key, value in kept.named_parameters()}
            else:
                before = weights(kept)
            first = {key: value.clone() for key, value in moving.named_parameters()}
            result = plain(self, *arguments)
            after = dict(kept.named_parameters()) if name == "_student_step" else weights(kept)
            assert not different(before, after), name
            assert not different(old, weights(self.previous)) and kept.training == training
            assert different(first, dict(moving.named_parameters()))
            rounds.append(name)
            return result

        monkeypatch.setattr(APIStreamCL, name, step)

    watched("_student_step", "generators", "learner")
    watched("_generator_step", "learner", "generators")
    two_tasks(tmp_path, coop="feature", model="lenet", model_options={"width": 2})
    assert rounds == (["_generator_step"] + 2 * ["_student_step"]) * 2 * ITERATIONS


def test_the_frozen_copy_is_the_learner_of_the_former_task_all_task_long(tmp_path):
    ends: list[dict[str, torch.Tensor]] = []

    def after(model: APIStreamCL, batch: Any) -> None:
        if batch.task:
            assert not different(weights(model.previous), ends[batch.task - 1])
        if batch.last:
            ends.append(weights(model.learner))

    model = stream(model="lenet", model_options={"width": 2})
    fit(tmp_path, model, callbacks=[AtStep(after=after)])
    assert len(ends) == 3 and different(ends[1], ends[2])
    assert not any(parameter.requires_grad for parameter in model.previous.parameters())


def test_a_new_task_gives_its_head_rows_new_weights_and_keeps_old_logits_bitwise(tmp_path, monkeypatch):
    plain, seen = APIStreamCL._open_task, []
    some = torch.rand(5, *SHAPE) * 2 - 1

    def watched(self: APIStreamCL, task: int) -> None:
        self.learner.eval()
        before, head = self.learner(some), self.learner.head.weight.clone()
        plain(self, task)
        after = self.learner(some)
        fresh = list(TASKS[task])
        others = [label for label in range(6) if label not in fresh]
        assert torch.equal(before[:, others], after[:, others])
        assert (self.learner.head.weight[fresh] != head[fresh]).any(1).all()
        assert all(not optimizer.state for optimizer in self._optimizers())
        seen.append(task)

    monkeypatch.setattr(APIStreamCL, "_open_task", watched)
    fit(tmp_path, stream())
    assert seen == [0, 1, 2]


def test_without_real_images_no_pixel_of_the_data_matters(tmp_path, monkeypatch):
    def run(seed: int, **options: Any) -> APIStreamCL:
        model = stream()
        fit(tmp_path, model, data(seed), **options)
        return model

    first = run(0, limit_val_batches=1.0)
    monkeypatch.setattr(ClassStreamData, "private", None)
    second = run(1, limit_val_batches=1.0)
    assert not torch.equal(images("train", 0)[0], images("train", 1)[0])
    assert not different(weights(first), weights(second))
    assert first.ledger.state_dict() == second.ledger.state_dict()
    assert not different(first.memory.export(), second.memory.export())
    # And evaluation itself leaves no trace.
    assert not different(weights(run(0)), weights(first))


def test_not_a_number_in_the_training_pixels_of_a_data_free_stream_is_never_met(tmp_path, monkeypatch):
    straight = stream()
    fit(tmp_path, straight)
    monkeypatch.setattr("datamodules.class_stream_batches.to_canonical", lambda x: torch.full(x.shape, torch.nan))
    spoilt = stream()
    fit(tmp_path, spoilt)
    assert not different(weights(straight), weights(spoilt))
    # Real images are met: the same patch ruins a stream that has some.
    with pytest.raises(ValueError, match="nan"):
        fit(tmp_path, stream(), data(real_fraction=0.5, min_per_class=2))


def test_predictions_are_written_for_every_image_of_every_task(tmp_path):
    source, model = data(), stream()
    fit(tmp_path, model, source)
    answers = trainer(tmp_path).predict(model, source)
    assert answers is not None
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [line["task"] for line in lines] == [str(task) for task in range(3) for _ in range(20)]
    pixels, labels = images("test")
    for task, group in enumerate(answers):
        rows = torch.isin(labels, torch.tensor(TASKS[task]))
        logits = model.eval()(data().to_canonical(pixels[rows])).detach()
        (found,) = group if isinstance(group, list) else (group,)
        assert torch.allclose(found["logits"], logits)
        assert torch.equal(found["pred"], logits.argmax(1))
        own = torch.tensor(TASKS[task])[logits[:, list(TASKS[task])].argmax(1)]
        assert torch.equal(found["task_pred"], own)
        assert [(line["pred"], line["task_pred"]) for line in lines if line["task"] == str(task)] == list(
            zip(logits.argmax(1).tolist(), own.tolist(), strict=True)
        )


def test_generators_make_images_by_name():
    model = stream()
    first, second = model.generate(5)
    assert first.shape == second.shape == (5, *SHAPE)
    assert first.abs().max() <= 1 and not torch.equal(first, second)
    assert torch.equal(model.generate(5, "A")[0], first) and torch.equal(model.generate(5, "B")[0], second)
    assert model.generators.training and not first.requires_grad
    with pytest.raises(ValueError, match="which must be one of both, A, got 'B'"):
        stream(method="single_generator").generate(2, "B")
    with pytest.raises(ValueError, match="got 'A'"):
        stream(method="noise").generate(2, "A")


def test_the_forward_pass_gives_all_logits_or_those_of_some_classes():
    model = stream()
    some = torch.rand(4, *SHAPE)
    assert model(some).shape == (4, 6)
    assert torch.equal(model(some, (4, 1)), model(some)[:, [4, 1]])


def test_responses_come_in_the_order_of_the_tasks_classes(tmp_path):
    """A service that lists its classes the other way round teaches the same."""

    class Reversed(torch.nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.network = network(seed)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.network(x).flip(1)

    turned = [
        ModuleAPI(Reversed(task), classes[::-1], name=f"service{task}", input_shape=SHAPE)
        for task, classes in enumerate(TASKS)
    ]
    first, second = stream(), stream(turned)
    fit(tmp_path, first, max_steps=6)
    fit(tmp_path, second, max_steps=6)
    for name, tensor in first.learner.named_parameters():
        assert torch.allclose(tensor, second.learner.get_parameter(name), atol=1e-3), name
