"""Two processes compute what one does at the same global batch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.methods import METHODS, TOY, UNTRAINED, VARIANTS, Method

TWO = ("--trainer.strategy", "ddp_fork", "--trainer.devices", "2")
pytestmark = pytest.mark.filterwarnings("ignore:.*it is recommended to use `Trainer\\(devices=1")


def halved(method: Method) -> tuple[str, ...]:
    return ("--data.batch_size", str(method.batch_size // 2))


@pytest.mark.parametrize("method", [*METHODS, *UNTRAINED], ids=lambda method: method.name)
def test_two_processes_score_the_same_weights_alike(run, method: Method):
    one = run(*method.command, "--trainer.max_epochs", "1")
    path = next(path for name in ("best.ckpt", "last.ckpt") if (path := one.run_folder / name).exists())
    for subcommand in ("test", "validate"):
        if subcommand == "validate":
            one = run(subcommand, *method.command, "--ckpt_path", str(path))
        two = run(subcommand, *method.command, *halved(method), *TWO, "--ckpt_path", str(path))
        assert two.trainer.num_devices == 2
        expected, actual = one.trainer.callback_metrics, two.trainer.callback_metrics
        assert expected.keys() == actual.keys() and expected
        for name, value in expected.items():
            # Sums of the same numbers in another order.
            assert float(actual[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("method", [*METHODS, *VARIANTS], ids=lambda method: method.name)
def test_two_processes_take_the_same_first_step(first_step, full_first_step, method: Method):
    one, two = full_first_step(method), first_step("two", method, *halved(method), *TWO)
    assert len(two) == 2 and one.keys() == two[0].keys() == two[1].keys()
    for name, gradient in one.items():
        assert torch.equal(two[0][name], two[1][name]), name
        error, scale = (two[0][name] - gradient).abs().max(), gradient.abs().max()
        assert error <= 1e-5 * scale + 1e-9, f"{name}: off by {error:.2g} of {scale:.2g}"


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_two_processes_end_with_one_set_of_files(run, method: Method):
    cli = run(*method.command, *halved(method), *TWO, "--trainer.max_epochs", "1")
    runs = list(cli.run_folder.parent.iterdir())
    assert [path.name for path in runs] == ["version_0"]
    assert {"config.yaml", "metrics.csv", "last.ckpt", "result.json"} <= {path.name for path in runs[0].iterdir()}


def test_the_ddp_strategy_runs_from_the_shell(tmp_path):
    method = METHODS[-1] if METHODS[-1] is not TOY else TOY
    arguments = [*method.command, *halved(method), "--trainer.strategy", "ddp", "--trainer.devices", "2"]
    arguments += ["--trainer.max_epochs", "1", "--trainer.default_root_dir", str(tmp_path)]
    environment = {**os.environ, "MASTER_PORT": ""}
    del environment["MASTER_PORT"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        # Ranks outlive a parent that was killed.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    (result,) = Path(tmp_path).glob("*/version_0/result.json")
    assert json.loads(result.read_text())["metrics"]
