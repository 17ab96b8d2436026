"""Weights & Biases, offline: what a run logged is read back from its folder."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.methods import METHODS, Method

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:wandb")


def inspect(folder: Path, *flags: str) -> str:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", *flags, "--json", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.fixture(autouse=True)
def _finished():
    yield
    import wandb

    # Without it the next logger of this process goes on writing to this run.
    wandb.finish()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_run_leaves_its_metrics_config_figures_and_tables(run, method: Method):
    import wandb

    cli = run(*method.command, "--logger", "wandb")
    wandb.finish()
    (folder,) = cli.run_folder.glob("wandb/offline-run-*")

    records = [json.loads(line) for line in inspect(folder).splitlines()]
    rows = [record["history"]["item"] for record in records if record.get("type") == "history"]
    logged = set().union(*rows)
    assert {"train/loss", *cli.trainer.callback_metrics} <= logged
    assert cli.model.monitor is None or cli.model.monitor in logged

    summary = inspect(folder, "--summary")
    assert method.name in summary and "data.init_args.batch_size" in summary and "trainer.max_epochs" in summary

    if method.figures:
        assert list((folder / "files" / "media" / "images").rglob("*.png"))
        assert list((cli.run_folder / "figures").rglob("*.png"))
    if method.tables:
        (table, *_) = (folder / "files" / "media" / "table").rglob("*.table.json")
        content = json.loads(table.read_text())
        assert content["columns"] and content["data"]
    assert (cli.run_folder / "metrics.csv").exists()


def test_wandb_named_as_the_trainers_logger_logs_and_csv_stays(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    method = METHODS[0]
    cli = run(*method.command, "--trainer.logger", "WandbLogger", "--trainer.logger.project", "mine")
    import wandb

    wandb.finish()
    assert list(tmp_path.glob("wandb/offline-run-*")) and (cli.run_folder / "metrics.csv").exists()


def test_a_resumed_run_goes_on_in_the_same_run(run):
    import wandb

    method = METHODS[0]
    ids = []
    for more in ((), ("--ckpt_path", "last", "--trainer.max_epochs", "3"), ("--trainer.max_epochs", "1")):
        cli = run("fit", *method.command, "--logger", "wandb", *more)
        ids.append(cli.trainer.loggers[1].experiment.id)
        wandb.finish()
    assert ids[0] == ids[1] != ids[2]
    # `wandb sync` uploads both parts into one run.
    parts = list((cli.run_folder.parent / "version_0").glob(f"wandb/offline-run-*/run-{ids[0]}.wandb"))
    assert len(parts) == 2
