"""Every file in `configs/` runs: the demos nearly in full, the large ones for a batch of the embedded sample."""

from __future__ import annotations

import pytest
import yaml

from tests.conftest import ROOT
from tests.methods import COMMON, embedded, shortened

CONFIGS = sorted((ROOT / "configs").glob("**/*.yaml"))
DEMOS = [path for path in CONFIGS if path.name == "demo.yaml"]
LARGE = [path for path in CONFIGS if path.name != "demo.yaml"]


def name_of(path):
    return str(path.relative_to(ROOT / "configs").with_suffix(""))


def test_every_folder_of_configs_has_a_demo():
    folders = {path.parent for path in CONFIGS}
    assert folders == {path.parent for path in DEMOS}


@pytest.mark.parametrize("path", DEMOS, ids=name_of)
def test_a_demo_runs_without_data_or_network(run, monkeypatch, path):
    monkeypatch.delenv("ZOO_DATA", raising=False)
    epochs = yaml.safe_load(path.read_text())["trainer"]["max_epochs"]
    cli = run("--config", str(path), *COMMON, "--trainer.max_epochs", str(min(epochs, 5)))
    assert cli.result["metrics"] and all(value is not None for value in cli.result["metrics"].values())


# A single epoch is the test's doing, not the config's.
@pytest.mark.filterwarnings("ignore:.*is not below max_epochs=1")
@pytest.mark.parametrize("path", LARGE, ids=name_of)
def test_a_large_config_runs_on_the_embedded_sample(run, monkeypatch, path):
    monkeypatch.delenv("ZOO_DATA", raising=False)
    config = yaml.safe_load(path.read_text())
    settings = config["model"].get("init_args", {})
    small = shortened(config["model"])
    cli = run("--config", str(path), *COMMON, *embedded(config["data"]), *small, "--trainer.fast_dev_run", "1")
    assert cli.trainer.callback_metrics
    for key, value in settings.items():
        if any(argument.partition("=")[0] == f"--model.{key}" for argument in small):
            continue
        assert cli.config["run"]["model"]["init_args"][key] == value
