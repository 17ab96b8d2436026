"""Checkpoints on the command line: tested, refused, resumed; on a model and data of a few lines."""

from __future__ import annotations

import csv
import errno
import os

import torch

from tests.test_cli import COMMAND
from tests.toy import ToyModel, ToyModelWithoutMetric
from zoo.common.checkpoints import load_checkpoint


def test_a_test_takes_the_settings_that_were_not_typed_from_the_checkpoint(run, capsys):
    first = run(*COMMAND, "--model.hidden_size", "5")
    again = run("test", *COMMAND, "--ckpt_path", str(first.run_folder / "best.ckpt"))
    assert again.model.layers[0].out_features == 5
    assert again.trainer.callback_metrics["test/loss"] == first.trainer.callback_metrics["test/loss"]
    assert "hidden_size=5" in capsys.readouterr().err


def test_settings_that_contradict_the_checkpoint_are_refused_with_their_list(run, refused):
    first = run("fit", *COMMAND, "--model.hidden_size", "5")
    path = str(first.run_folder / "last.ckpt")
    error = refused(2, "test", *COMMAND, "--model.hidden_size", "6", "--model.lr", "0.5", "--ckpt_path", path)
    assert "hidden_size: 5 there, 6 here" in error and "lr: 0.1 there, 0.5 here" in error and path in error


def test_a_checkpoint_of_another_model_is_refused_with_both_names(run, refused):
    path = str(run("fit", *COMMAND).run_folder / "last.ckpt")
    error = refused(2, "test", "--model", "tests.toy.ToyModelWithoutMetric", *COMMAND[2:], "--ckpt_path", path)
    assert "tests.toy.ToyModel," in error and "tests.toy.ToyModelWithoutMetric" in error


def test_a_checkpoint_for_data_of_another_size_is_refused(run, refused):
    path = str(run("fit", *COMMAND).run_folder / "last.ckpt")
    error = refused(2, "test", *COMMAND, "--data.classes", "4", "--ckpt_path", path)
    assert "trained with num_classes = 3" in error and "ToyData has 4" in error


def test_a_missing_checkpoint_names_those_that_are_there(run, refused):
    folder = run("fit", *COMMAND).run_folder
    error = refused(2, "test", *COMMAND, "--ckpt_path", str(folder / "none.ckpt"))
    assert "no such checkpoint" in error and "best.ckpt, last.ckpt" in error


def test_a_truncated_checkpoint_is_refused(run, refused):
    path = run("fit", *COMMAND).run_folder / "last.ckpt"
    path.write_bytes(path.read_bytes()[:-200])
    assert "cut short" in refused(2, "fit", *COMMAND, "--ckpt_path", str(path))


def test_weights_of_another_shape_are_refused_with_the_shapes(run, refused, tmp_path):
    checkpoint = load_checkpoint(run("fit", *COMMAND, "--model.hidden_size", "5").run_folder / "last.ckpt")
    del checkpoint["hyper_parameters"]
    path = tmp_path / "foreign.ckpt"
    for subcommand in ("test", "fit"):
        torch.save(checkpoint, path)
        error = refused(1, subcommand, *COMMAND, "--model.hidden_size", "6", "--ckpt_path", str(path))
        assert f"{path}: its weights do not fit this ToyModel: layers.0.weight is [5, 4] there and [6, 4] here" in error
    checkpoint["state_dict"] = {"other": torch.zeros(1)}
    torch.save(checkpoint, path)
    error = refused(1, "test", *COMMAND, "--ckpt_path", str(path))
    assert "layers.0.weight is here only" in error and "and 2 more" in error


def test_a_file_that_no_trainer_wrote_is_refused(refused, tmp_path):
    torch.save({"layers.0.weight": torch.zeros(2)}, tmp_path / "bare.ckpt")
    error = refused(2, "test", *COMMAND, "--ckpt_path", str(tmp_path / "bare.ckpt"))
    assert "no checkpoint of a Lightning run; it holds layers.0.weight" in error


def test_weights_alone_can_be_tested_but_not_resumed(run, refused, tmp_path):
    cli = run(*COMMAND)
    path = tmp_path / "weights.ckpt"
    cli.trainer.save_checkpoint(path, weights_only=True)
    again = run("test", *COMMAND, "--ckpt_path", str(path))
    assert again.trainer.callback_metrics["test/loss"] == cli.trainer.callback_metrics["test/loss"]
    assert "holds the weights alone" in refused(2, "fit", *COMMAND, "--ckpt_path", str(path))


def test_a_full_disk_is_one_paragraph_with_status_1(refused, monkeypatch):
    def full(checkpoint, file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    error = refused(1, "fit", *COMMAND)
    assert "best.ckpt: the checkpoint could not be written (No space left on device" in error and "Make room" in error


def test_a_checkpoint_that_could_run_code_is_refused(refused, tmp_path):
    torch.save({"hyper_parameters": {}, "state_dict": {}, "path": tmp_path}, tmp_path / "foreign.ckpt")
    assert "could run code" in refused(2, "test", *COMMAND, "--ckpt_path", str(tmp_path / "foreign.ckpt"))


def test_the_model_of_a_run_loads_without_data(run):
    cli = run(*COMMAND)
    loaded = ToyModel.load_from_checkpoint(cli.run_folder / "best.ckpt")
    for name, value in cli.model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])


def test_a_model_made_outside_the_command_line_can_be_tested_by_it(run, tmp_path):
    from lightning.pytorch import Trainer

    from tests.toy import ToyData

    trainer = Trainer(
        default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(ToyModel(3, hidden_size=6), datamodule=ToyData())
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    cli = run("test", *COMMAND, "--ckpt_path", str(tmp_path / "own.ckpt"))
    assert cli.model.layers[0].out_features == 6


# Going on from the last checkpoint


def test_last_finds_the_newest_run_of_the_same_configuration_and_goes_on_in_its_folder(run):
    straight = run("fit", *COMMAND, "--trainer.max_epochs", "4", "--seed_everything", "1")
    run("fit", *COMMAND, "--model.lr", "0.2")
    first = run("fit", *COMMAND, "--seed_everything", "1")
    os.utime(straight.run_folder / "last.ckpt", (1, 1))
    resumed = run("fit", *COMMAND, "--seed_everything", "1", "--trainer.max_epochs", "4", "--ckpt_path", "last")
    assert resumed.run_folder == first.run_folder
    assert load_checkpoint(first.run_folder / "last.ckpt")["epoch"] == 3
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])


def test_the_metrics_of_a_resumed_run_go_on_where_its_checkpoint_was_saved(run):
    setting = (*COMMAND, "--save_every_n_steps", "4")
    folder = run("run", *setting, "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "5").run_folder
    run("run", *setting, "--ckpt_path", "last")
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    validated = [int(row["step"]) for row in rows if row["val/loss"]]
    assert validated == sorted(set(validated)) and len(validated) == 2
    assert [row["test/loss"] != "" for row in rows].count(True) == 1
    assert sorted(path.name for path in folder.iterdir() if path.suffix in (".csv", ".tmp", ".kept")) == ["metrics.csv"]


def test_last_without_a_run_of_that_configuration_names_the_closest(run, refused):
    assert "no run under" in refused(2, "fit", *COMMAND, "--ckpt_path", "last")
    path = run("fit", *COMMAND).run_folder / "last.ckpt"
    error = refused(2, "fit", *COMMAND, "--model.lr", "0.2", "--ckpt_path", "last")
    assert "no run under" in error and str(path) in error and "model.lr: 0.1, now 0.2" in error


def test_best_is_found_for_a_test_in_the_same_way(run):
    first = run(*COMMAND)
    again = run("test", *COMMAND, "--ckpt_path", "best")
    assert again.result["metrics"]["test/loss"] == first.result["metrics"]["test/loss"]


def test_a_resumed_run_remembers_the_best_score(run):
    # With this step size the first epochs are the best ones, and the later ones must not replace them.
    setting = (*COMMAND, "--model.lr", "3", "--model.dropout", "0")
    first = run("fit", *setting)
    best = load_checkpoint(first.run_folder / "best.ckpt")
    score = next(v["best_model_score"] for k, v in best["callbacks"].items() if k.startswith("BestCheckpoint"))
    run("fit", *setting, "--trainer.max_epochs", "3", "--ckpt_path", "last")
    after = load_checkpoint(first.run_folder / "best.ckpt")
    new = next(v["best_model_score"] for k, v in after["callbacks"].items() if k.startswith("BestCheckpoint"))
    assert new <= score


def test_predict_runs_from_the_best_checkpoint(run):
    run("fit", *COMMAND)
    cli = run("predict", *COMMAND, "--ckpt_path", "best")
    assert isinstance(cli.model, ToyModel) and not isinstance(cli.model, ToyModelWithoutMetric)
