"""The comparison has a row for each method, reuses what was run, and checks the papers' claims."""

from __future__ import annotations

import pytest
import yaml

from studies.merging import compare as study
from tests.conftest import ROOT
from tests.methods import MERGING


@pytest.fixture
def config(tmp_path, monkeypatch):
    content = yaml.safe_load((ROOT / "configs" / "merging" / "demo.yaml").read_text())
    content["model"]["init_args"] |= {
        "recipe": {**yaml.safe_load(MERGING[3]), "joint_epochs": 1},
        "encoder_options": yaml.safe_load(MERGING[5]),
    }
    content["data"]["init_args"] |= {"steps_per_epoch": 3, "max_images": 160}
    content["trainer"] |= {"max_epochs": 1, "log_every_n_steps": 1}
    monkeypatch.setattr(study, "ROOT", tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_every_merge_has_a_row_with_and_without_surgery_and_finished_rows_are_kept(config, tmp_path, monkeypatch):
    methods = ["individual", "joint", "task_arithmetic", "adamerging_task", "adamerging_layer"]
    content = study.compare(config, [0], "small", tmp_path / "runs", methods, surgery_steps=3)
    names = [*methods[:3], *(f"{name}_surgery" for name in methods[2:]), *methods[3:]]
    assert set(content["summary"]) == set(names)
    for row in content["summary"].values():
        assert {f"test/acc/{task}" for task in ("upright", "noisy", "mean")} <= set(row)
    checked = [check["check"] for check in content["checks"]]
    assert "layer-wise AdaMerging >= Task Arithmetic + 0.03" in checked
    assert "task_arithmetic: L1 bias falls by >= 40 %" in checked
    monkeypatch.setattr(study, "run_config", None)
    again = study.compare(config, [0], "small", tmp_path / "runs", methods, surgery_steps=3)
    assert again["summary"] == content["summary"]


def row(accuracy: float, before: float = 1.0, after: float = 0.5) -> dict[str, dict[str, float]]:
    metrics = {"test/acc/mean": accuracy, "test/bias_l1_before/mean": before, "test/bias_l1/mean": after}
    return {name: {"mean": value} for name, value in metrics.items()}


def test_claims_that_do_not_hold_are_told():
    summary = {
        "task_arithmetic": row(0.5),
        "task_arithmetic_surgery": row(0.6),
        "adamerging_task": row(0.56),
        "adamerging_layer": row(0.55),
        "adamerging_layer_surgery": row(0.57, after=0.7),
    }
    found = {check["check"]: check["holds"] for check in study.checks(summary)}
    assert found["layer-wise AdaMerging >= Task Arithmetic + 0.03"]
    assert not found["layer-wise AdaMerging >= task-wise"]
    assert found["task_arithmetic: accuracy with Surgery >= without + 0.03"]
    assert not found["adamerging_layer: accuracy with Surgery >= without + 0.03"]
    assert not found["adamerging_layer: L1 bias falls by >= 40 %"]
    assert not found["the spread between the published bases at least halves"]
