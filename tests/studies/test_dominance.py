"""The study of dominance on a table of known shares, and its claims on the real data."""

import sys
from pathlib import Path

import pandas
import pytest

from studies.adatask.dominance import checks, shares, summarise

TASKS = ["income", "hours"]


def table(income: float) -> pandas.DataFrame:
    layer = "backbone.trunk.0.weight"
    rows = [(layer, "income", income, income), (layer, "hours", 1 - income, 0.5)]
    return pandas.DataFrame(rows, columns=["layer", "task", "mean", "last"])


def found(adam: float, adatask: float) -> list[bool]:
    tables = {("adam", 0): table(adam), ("adam", 1): table(adam / 2), ("adatask", 0): table(adatask)}
    tables["adatask", 1] = table(0.5)
    return [check["holds"] for check in checks(summarise(tables, [0, 1]), TASKS, "income")]


def test_the_claims_are_asked_of_every_seed() -> None:
    assert found(0.009, 0.46) == [True, True, True]
    assert found(0.011, 0.46) == [False, True, True]
    assert found(0.009, 0.14) == [True, False, False]


def test_means_and_deviations_are_over_the_seeds() -> None:
    tables = {(name, seed): table(value) for name, value in (("adam", 0.2), ("adatask", 0.4)) for seed in (0, 1)}
    tables["adam", 1] = table(0.4)
    cell = summarise(tables, [0, 1])["trunk.0.weight"]["adam/income"]
    assert cell["mean"] == pytest.approx(0.3)
    assert cell["std"] == pytest.approx(0.02**0.5)
    assert cell["values"] == [0.2, 0.4]


@pytest.mark.real
def test_two_epochs_of_adult_show_who_owns_the_trunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    quiet += ["--trainer.enable_model_summary", "false", "--trainer.max_epochs", "2"]
    tables = {(name, 0): shares(name, 0, quiet, tmp_path) for name in ("adam", "adatask")}
    holds = checks(summarise(tables, [0]), ["income", "hours", "age"], "income")
    assert [check["holds"] for check in holds] == [True, True, True], holds
