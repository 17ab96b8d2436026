"""A run that was killed and resumed ends with the weights of one that was never stopped."""

from __future__ import annotations

import multiprocessing
import signal

import pytest
import torch

from tests.methods import METHODS, VARIANTS, Method
from zoo.common.checkpoints import load_checkpoint


@pytest.mark.parametrize("method", [*METHODS, *VARIANTS], ids=lambda method: method.name)
def test_killed_and_resumed_equals_uninterrupted(run, tmp_path, method: Method):
    straight = run("fit", *method.command, "--trainer.default_root_dir", str(tmp_path / "straight"))
    steps = straight.trainer.global_step // 2

    command = ("fit", *method.command, "--save_every_n_steps", "2")
    resume: tuple[str, ...] = ()
    # A run killed between epochs is resumed and killed again in mid-epoch: what either loses shows in the weights at
    # the end. In mid-epoch is the harder of the two; variants of a method have no state of their own between epochs.
    for batch in (0, 3) if method in METHODS else (3,):
        kill = (
            "--trainer.callbacks+=tests.callbacks.KillAt",
            "--trainer.callbacks.epoch=1",
            f"--trainer.callbacks.batch={batch}",
        )
        process = multiprocessing.get_context("fork").Process(target=run, args=(*command, *resume, *kill))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        (last,) = (tmp_path / "runs").glob("*/*/last.ckpt")
        # Mid-epoch, the kill came one step after the last save: that step is trained on again.
        done = load_checkpoint(last)["global_step"]
        assert done == steps if batch == 0 else steps < done <= steps + batch
        resume = ("--ckpt_path", "last")

    resumed = run(*command, *resume)
    assert resumed.trainer.global_step == straight.trainer.global_step
    expected, actual = straight.model.state_dict(), resumed.model.state_dict()
    assert expected.keys() == actual.keys()
    different = [name for name in expected if not torch.equal(expected[name], actual[name])]
    assert not different


@pytest.mark.parametrize("name", ["ToyModel", "SASRec", "IDSF"])
def test_a_run_that_ended_in_mid_epoch_goes_on_as_if_it_had_not(run, tmp_path, name: str):
    (method,) = (method for method in METHODS if method.name == name)
    straight = run("fit", *method.command, "--trainer.default_root_dir", str(tmp_path / "straight"))
    run("fit", *method.command, "--trainer.max_steps", "3")
    resumed = run("fit", *method.command, "--ckpt_path", "last")
    assert resumed.trainer.global_step == straight.trainer.global_step > 2 * 3
    expected, actual = straight.model.state_dict(), resumed.model.state_dict()
    assert not [key for key in expected if not torch.equal(expected[key], actual[key])]
