"""A stream that was stopped goes on as if it had not been; what a checkpoint holds, and what it is good for."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.zoo.api_cl.small_stream import (
    ITERATIONS,
    QUIET,
    SHAPE,
    apis,
    counted,
    data,
    different,
    fit,
    stream,
    trainer,
    weights,
)
from zoo.api_cl import APIStreamCL

if TYPE_CHECKING:
    from pathlib import Path

    from datamodules.class_stream import ClassStreamData

pytestmark = QUIET

LENET = {"model": "lenet", "model_options": {"width": 2}}
SETTINGS: dict[str, dict[str, Any]] = {
    "data-free": {"method": "ours", "num_directions": 2, "schedule": "cosine", **LENET},
    "real images": {"method": "ours", "scenario": "cil", "optimizer": "sgd"},
    "budget": {"method": "ours", "budget_per_api": 2 * 48 + 30, "reset_generators": False},
    "ewc": {"method": "ewc"},
    "derpp": {"method": "derpp"},
}


def source(name: str) -> ClassStreamData:
    return data() if name in ("data-free", "budget") else data(real_fraction=0.5)


def same(first: APIStreamCL, second: APIStreamCL) -> None:
    assert not different(weights(first), weights(second))
    assert first.ledger.state_dict() == second.ledger.state_dict()
    assert not different(first.memory.export(), second.memory.export())
    assert first.history.keys() == second.history.keys()
    for values, others in zip(first.history.values(), second.history.values(), strict=True):
        assert torch.equal(torch.stack(values), torch.stack(others))


def saving(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder / "steps", filename="{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.mark.filterwarnings("ignore:task . ends after")
@pytest.mark.parametrize("name", SETTINGS)
def test_a_resumed_stream_equals_one_that_was_never_stopped(tmp_path, monkeypatch, name: str):
    boxes = apis()
    straight = stream(boxes, **SETTINGS[name])
    options = {"callbacks": [saving(tmp_path)], "enable_checkpointing": True, "limit_val_batches": 1.0}
    fit(tmp_path, straight, source(name), **options)
    # In the middle of the second task, and between it and the third; a task that its budget ended has fewer steps.
    done = 2 if name == "budget" else ITERATIONS
    for step in (done + 1, 2 * done):
        path = tmp_path / "steps" / f"step={step}.ckpt"
        torch.load(path, weights_only=True)
        again = apis()
        monkeypatch.setattr(APIStreamCL, "look", lambda self, images, task: None)
        resumed = stream(again, **SETTINGS[name])
        fit(tmp_path, resumed, source(name), ckpt_path=path, limit_val_batches=1.0)
        same(straight, resumed)
        # Nothing of the first task was asked again.
        assert [row["rows"] for row in resumed.ledger.summary()] == [row["rows"] for row in straight.ledger.summary()]
        assert counted(again)[0] == 0
        # Lightning validates no more after the last step of a task: its row is filled all the same.
        for kind in ("til", "cil"):
            assert torch.equal(straight.matrices[kind].matrix, resumed.matrices[kind].matrix)


def test_a_checkpoint_tells_whether_the_precision_was_found_out(tmp_path):
    from tests.zoo.api_cl.test_stream_budget import strangers

    straight = stream(strangers(4))
    options = {"callbacks": [saving(tmp_path)], "enable_checkpointing": True}
    fit(tmp_path, straight, **options)
    boxes = strangers(4)
    resumed = stream(boxes)
    fit(tmp_path, resumed, ckpt_path=tmp_path / "steps" / "step=6.ckpt")
    same(straight, resumed)
    # Two iterations of the second task, without another probe, and the third with one.
    assert [box.rows for box in boxes] == [0, 2 * 48, 4 * 48 + 32]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished stream."""
    folder = tmp_path_factory.mktemp("stream")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(APIStreamCL, "on_fit_end", lambda self: None)
        one = fit(folder, stream(task_names=["a", "b", "c"]), limit_val_batches=1.0)
        one.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def test_a_learner_is_loaded_without_data_or_services(checkpoint):
    model = APIStreamCL.load_from_checkpoint(checkpoint)
    assert model(torch.rand(2, *SHAPE)).shape == (2, 6)
    assert model.generate(2, "A")[0].shape == (2, *SHAPE)
    assert model.ledger.spent() == 3 * ITERATIONS * 48 and len(model.memory) == 24
    assert model.matrices["til"].matrix.isfinite().all() and model.task == 2
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert not different(weights(model), state)
    assert "service" not in str(dict(model.hparams))


def test_a_stored_stream_is_tested_as_it_was_validated(tmp_path, checkpoint):
    model = APIStreamCL.load_from_checkpoint(checkpoint)
    run = trainer(tmp_path)
    run.test(model, data(), verbose=False)
    scores = {name: float(value) for name, value in run.callback_metrics.items()}
    for kind in ("til", "cil"):
        row = model.matrices[kind].matrix[-1].tolist()
        assert [scores[f"test/{kind}/acc/{name}"] for name in "abc"] == pytest.approx(row, abs=1e-6)
        assert scores[f"test/{kind}/bwt"] == pytest.approx(model.matrices[kind].bwt(), abs=1e-6)
    assert scores["test/queries"] == 3 * ITERATIONS * 48


@pytest.fixture
def of_two(tmp_path, checkpoint) -> Path:
    """The checkpoint of a stream of two processes, each with half of the memory."""
    state = torch.load(checkpoint, weights_only=True)
    (own,) = state["stream"]["ranks"]
    half = copy.deepcopy(own)
    half["memory"]["size"] //= 2
    state["stream"]["ranks"] = [half, copy.deepcopy(half)]
    torch.save(state, tmp_path / "two.ckpt")
    return tmp_path / "two.ckpt"


def test_the_stream_of_two_processes_cannot_go_on_with_one(tmp_path, of_two):
    with pytest.raises(ValueError, match=r"of a run with 2 processes.*with 1. Set --trainer.devices 2"):
        fit(tmp_path, stream(task_names=["a", "b", "c"]), ckpt_path=of_two)


def test_the_stream_of_two_processes_is_loaded_and_tested_by_one(tmp_path, of_two):
    model = APIStreamCL.load_from_checkpoint(of_two)
    run = trainer(tmp_path)
    run.test(model, data(), verbose=False)
    assert run.callback_metrics["test/queries"] == 2 * 3 * ITERATIONS * 48
    other = stream([], task_names=["a", "b", "c"])
    trainer(tmp_path).test(other, data(), ckpt_path=of_two, verbose=False)
    assert not different(weights(model), weights(other))
