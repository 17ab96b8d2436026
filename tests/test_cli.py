"""The command line, on a model and data of a few lines."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger

import datamodules
import train
import zoo
from tests.conftest import ROOT
from tests.toy import ToyModel
from zoo.common.checkpoints import load_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

TOY = ("--model", "tests.toy.ToyModel", "--data", "tests.toy.ToyData")
FAST = ("--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1", "--trainer.accelerator", "cpu")
QUIET = ("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false")
COMMAND = (*TOY, *FAST, *QUIET)


def shell(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments], cwd=folder, capture_output=True, text=True, timeout=120
    )


# Help and names


def test_help_lists_names_and_commands_without_loading_torch():
    code = (
        "import sys; sys.argv = ['train.py', '--help']; import train; train.main(); "
        "assert not {'torch', 'lightning', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in (*zoo.MODELS, *train.DATA):
        assert f"\n  {name}" in done.stdout
    assert "python train.py --config configs/" in done.stdout
    assert all(len(line) <= 120 for line in done.stdout.splitlines())


def test_importing_the_packages_loads_no_torch():
    code = "import sys, zoo, datamodules, zoo.common; assert not {'torch', 'lightning', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_every_public_name_loads_and_the_models_are_the_lightning_modules():
    lightning_modules = set()
    for name in zoo.__all__:
        value = getattr(zoo, name)
        if isinstance(value, type) and issubclass(value, LightningModule):
            lightning_modules.add(name)
    assert lightning_modules == set(zoo.MODELS)
    data = {name for name in datamodules.__all__ if _is_data_module(getattr(datamodules, name))}
    assert data == set(train.DATA)


def _is_data_module(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, LightningDataModule)


def test_type_checkers_see_the_names_that_the_tables_list():
    source = (ROOT / "zoo" / "__init__.py").read_text()
    for name, module in {**zoo.MODELS, **zoo.PARTS}.items():
        assert f"    from {module} import {name} as {name}\n" in source
    assert source.count("\n    from ") == len(zoo.__all__)


def test_an_unknown_public_name_is_answered_with_the_known_ones():
    with pytest.raises(AttributeError, match="SASRec"):
        zoo.SASRek  # noqa: B018


@pytest.mark.parametrize("spelling", ["flag", "equals", "yaml", "yaml class_path"])
@pytest.mark.parametrize(("kind", "name", "nearest"), [("model", "TiCoSeRek", "TiCoSeRec"), ("data", "Sequence", None)])
def test_an_unknown_class_is_answered_with_the_known_ones_and_the_nearest(
    refused, tmp_path, spelling, kind, name, nearest
):
    config = tmp_path / "config.yaml"
    config.write_text(f"{kind}: {name}" if spelling == "yaml" else f"{kind}:\n  class_path: {name}\n")
    given = {
        "flag": [f"--{kind}", name],
        "equals": [f"--{kind}={name}"],
        "yaml": ["--config", str(config)],
        "yaml class_path": ["--config", str(config)],
    }[spelling]
    other = ["--data", "SequenceData"] if kind == "model" else ["--model", "SASRec"]
    error = refused(2, *other, *given)
    assert name in error and (nearest or "SequenceData") in error and "Did you mean" in error
    for known in zoo.MODELS if kind == "model" else train.DATA:
        assert known in error


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "nowhere.Model"], ["nowhere.Model", "package.module.Class"]),
        (["--model.hidden_sise", "4"], ["hidden_sise", "Did you mean hidden_size"]),
        (["--model.hidden_size", "abc"], ["--model", "int", "abc"]),
        (["--trainer.max_epoch", "4"], ["--trainer.max_epoch 4", "Did you mean --trainer.max_epochs"]),
        (["--trainer.max_epochs", "many"], ["--trainer.max_epochs", "many"]),
        (["--logger", "tensorboard"], ["--logger", "tensorboard", "wandb"]),
        (["--config", "absent.yaml"], ["absent.yaml"]),
        (["--config", "."], ["not a file"]),
        (["--model.hidden_size", "0"], ["hidden_size is 0, expected at least 1"]),
        (["--data.fault", "constructor"], ["rows.csv, line 3: label 'x', expected an integer"]),
        (["--data.fault", "property"], ["ToyData.num_classes failed", "'NoneType' object has no attribute 'max'"]),
        (["--model.num_classes", "5"], ["--model.num_classes is 5, but ToyData has 3"]),
        (["--data", "tests.toy.ToyDataWithoutSizes"], ["ToyModel needs num_classes", "--model.num_classes"]),
        (["--trainer.devices", "0"], ["devices"]),
    ],
)
def test_a_mistake_in_the_command_is_one_paragraph_with_status_2(refused, arguments, expected):
    error = refused(2, *COMMAND, *arguments)
    for text in expected:
        assert text in error


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("model: [unclosed", "config.yaml"),
        ("trainr:\n  max_epochs: 3\n", "trainr"),
        ("model:\n  class_path: tests.toy.ToyModel\n  init_args:\n    lr: fast\n", "fast"),
        ("\x00\x01", "config.yaml"),
        ("", "config.yaml: expected options"),
        ("- 1\n- 2\n", "config.yaml: expected options"),
        ("just text", "found just text"),
        (b"\xff\xfe\x00", "config.yaml: not a text file in UTF-8"),
    ],
)
@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
def test_an_unreadable_config_is_one_paragraph_with_status_2(refused, tmp_path, content, expected, form):
    config = tmp_path / "config.yaml"
    config.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert expected in refused(2, *COMMAND, *form.format(config).split())


def test_missing_model_and_data_are_asked_for_by_name(refused):
    assert "--model is missing" in refused(2, "--data", "tests.toy.ToyData")
    assert "SequenceData" in refused(2, "--model", "tests.toy.ToyModel")


def test_an_unknown_subcommand_is_answered_with_the_known_ones(refused):
    assert "run, fit, validate, test, predict" in refused(2, "fitt", *COMMAND)


def test_an_error_of_the_data_while_running_is_one_paragraph_with_status_1(refused):
    assert "rows.csv: no such file; put it under data/" in refused(1, *COMMAND, "--data.fault", "setup")


def test_debug_shows_the_error_itself(run, monkeypatch):
    monkeypatch.setenv("ZOO_DEBUG", "")
    with pytest.raises(FileNotFoundError, match=r"rows\.csv"):
        run(*COMMAND, "--data.fault", "setup", "--debug")


# What a run leaves


def test_a_run_fits_tests_with_the_best_checkpoint_and_leaves_its_files(run, capsys):
    cli = run(*COMMAND, "--trainer.max_epochs", "3", "--model.lr", "0.3")
    folder = cli.run_folder
    assert folder.parent.name == "ToyModel" and folder.name == "version_0"
    assert {"config.yaml", "metrics.csv", "best.ckpt", "last.ckpt", "result.json"} <= {p.name for p in folder.iterdir()}
    best, last = load_checkpoint(folder / "best.ckpt"), load_checkpoint(folder / "last.ckpt")
    assert last["epoch"] == 2
    for name, value in cli.model.state_dict().items():
        assert torch.equal(value, best["state_dict"][name])
    output = capsys.readouterr().out
    assert "test/loss" in output and f"{cli.trainer.callback_metrics['test/loss']:.4g}" in output
    result = json.loads((folder / "result.json").read_text())
    assert result["seed"] == 42
    assert result["metrics"]["test/loss"] == pytest.approx(float(cli.trainer.callback_metrics["test/loss"]))
    assert "val/loss" in result["metrics"] and result["seconds"]["fit"] > 0
    assert result["config"]["model"]["init_args"]["lr"] == 0.3


def test_the_last_checkpoint_is_the_last_epoch_even_when_it_was_worse(run):
    cli = run(*COMMAND, "--trainer.max_epochs", "4", "--model.lr", "30", "--model.dropout", "0")
    scores = [
        float(row.split(",")[-1]) for row in (cli.run_folder / "metrics.csv").read_text().split() if row[-1:].isdigit()
    ]
    assert scores  # the run logged its validation loss
    assert load_checkpoint(cli.run_folder / "last.ckpt")["epoch"] == 3


def test_without_a_metric_the_last_checkpoint_is_tested(run):
    cli = run("--model", "tests.toy.ToyModelWithoutMetric", *COMMAND[2:])
    assert not (cli.run_folder / "best.ckpt").exists() and (cli.run_folder / "last.ckpt").exists()
    assert "test/loss" in cli.result["metrics"]


def test_without_validation_the_last_checkpoint_is_tested(run):
    cli = run(*COMMAND, "--trainer.limit_val_batches", "0")
    assert not (cli.run_folder / "best.ckpt").exists()
    assert "test/loss" in cli.result["metrics"]


def test_the_last_checkpoint_is_written_in_epochs_without_validation(run):
    cli = run(*COMMAND, "--trainer.max_epochs", "3", "--trainer.check_val_every_n_epoch", "2")
    assert load_checkpoint(cli.run_folder / "last.ckpt")["epoch"] == 2


def test_the_saved_config_runs_again_and_gives_the_same_result(run):
    first = run(*COMMAND)
    again = run("--config", str(first.run_folder / "config.yaml"))
    assert again.run_folder.name == "version_1"
    assert again.result["metrics"] == first.result["metrics"]
    saved = [yaml.safe_load((c.run_folder / "config.yaml").read_text()) for c in (first, again)]
    assert saved[0]["model"] == saved[1]["model"] and saved[0]["data"] == saved[1]["data"]


def test_the_seed_is_42_and_another_seed_gives_another_result(run):
    assert run(*COMMAND).result["metrics"] != run(*COMMAND, "--seed_everything", "7").result["metrics"]


def test_callbacks_of_the_user_are_kept_beside_the_zoos(run):
    cli = run(
        *COMMAND,
        "--trainer.callbacks+=EarlyStopping",
        "--trainer.callbacks.monitor=val/loss",
        "--trainer.callbacks+=ModelCheckpoint",
        "--trainer.callbacks.filename=mine",
    )
    assert any(isinstance(callback, EarlyStopping) for callback in cli.trainer.callbacks)
    assert list(cli.run_folder.rglob("mine.ckpt")) and (cli.run_folder / "best.ckpt").exists()


def test_csv_is_written_beside_a_logger_that_the_user_names(run, tmp_path):
    cli = run(*COMMAND, "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(tmp_path / "mine"))
    assert (cli.run_folder / "metrics.csv").exists()
    assert list((tmp_path / "mine").rglob("metrics.csv"))
    assert all(isinstance(logger, CSVLogger) for logger in cli.trainer.loggers)


def test_fast_dev_run_passes_and_leaves_nothing(run, tmp_path):
    cli = run(*COMMAND, "--trainer.fast_dev_run", "1")
    assert cli.result is None and not (tmp_path / "runs").exists()


def test_run_config_gives_the_result_to_python_code(tmp_path):
    before = list(sys.argv)
    cli = train.run_config([*COMMAND, "--trainer.default_root_dir", str(tmp_path)])
    assert "test/loss" in cli.result["metrics"] and sys.argv == before


def test_pipes_get_one_line_per_epoch(tmp_path):
    done = shell(*TOY, *FAST, "--trainer.default_root_dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "epoch 2/2" in done.stdout and "val/loss" in done.stdout and "test/loss" in done.stdout
    assert "\r" not in done.stdout


def test_what_the_data_logs_is_shown_in_one_line_each_and_once(run, capsys):
    command = ("--model", "Popularity", "--data", "SequenceData", "--data.sample_users", "60", *FAST, *QUIET)
    for _ in range(2):
        run(*command)
        lines = capsys.readouterr().err.splitlines()
        assert [line for line in lines if line.startswith("embedded: 60 users, ")]
        assert len(lines) == len(set(lines)), lines


def test_only_the_first_process_shows_what_is_logged(run, capfd):
    two = ("--trainer.strategy", "ddp_fork", "--trainer.devices", "2")
    run("fit", "--model", "tests.toy.ToyModel", "--data", "tests.toy.TalkingData", *FAST, *QUIET, *two)
    # The other process runs the same code.
    assert capfd.readouterr().err.count("warning: 48 rows\n") == 1


def test_a_model_that_only_counts_runs_one_epoch_without_alarm_and_leaves_its_checkpoints(run, capsys):
    # Every warning is an error here.
    cli = run("--model", "Popularity", "--data", "SequenceData", "--data.sample_users", "60", *QUIET, *FAST[2:])
    assert "optimizer" not in capsys.readouterr().err
    assert load_checkpoint(cli.run_folder / "last.ckpt")["epoch"] == 0
    assert load_checkpoint(cli.run_folder / "best.ckpt")["state_dict"]["popularity"].sum() > 0


# Sizes taken from the data


def test_sizes_of_the_data_reach_the_model_and_its_checkpoint_as_plain_numbers(run):
    cli = run("fit", *COMMAND, "--data.classes", "4")
    assert cli.model.layers[-1].out_features == 4
    hparams = load_checkpoint(cli.run_folder / "last.ckpt")["hyper_parameters"]
    assert hparams["num_classes"] == 4 and type(hparams["num_classes"]) is int
    assert not {"num_items", "num_users", "vocab_size", "task_names"} & set(hparams)
    assert ToyModel.load_from_checkpoint(cli.run_folder / "last.ckpt").layers[-1].out_features == 4


def test_a_size_given_by_hand_is_taken_where_the_data_does_not_know_it(run):
    cli = run(
        "fit",
        "--model",
        "tests.toy.ToyModel",
        "--data",
        "tests.toy.ToyDataWithoutSizes",
        *FAST,
        *QUIET,
        "--model.num_classes",
        "3",
    )
    assert cli.model.layers[-1].out_features == 3


def test_the_arguments_default_serves_where_neither_knows_it(run):
    cli = run(
        "fit", "--model", "tests.toy.ToyModelWithoutMetric", "--data", "tests.toy.ToyDataWithoutSizes", *FAST, *QUIET
    )
    assert cli.model.layers[-1].out_features == 3


def test_a_size_given_by_hand_that_agrees_is_accepted(run):
    assert run("fit", *COMMAND, "--model.num_classes", "3").model.layers[-1].out_features == 3
