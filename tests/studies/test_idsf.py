"""The studies of IDSF that are programs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import yaml

from datamodules import InteractionData
from studies.idsf import pictures, search, semantics

if TYPE_CHECKING:
    from pathlib import Path


def test_each_model_has_the_same_number_of_distinct_trials_in_every_run() -> None:
    for model, space in search.SPACES.items():
        found = search.trials(model, 6)
        assert found == search.trials(model, 6) and len(found) == 6
        assert all(first != second for place, first in enumerate(found) for second in found[:place])
        assert all(settings[name] in values for settings in found for name, values in space.items())


@pytest.mark.filterwarnings("ignore")
def test_a_trial_is_scored_on_the_validation_part_and_becomes_a_config(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "configs" / "idsf").mkdir(parents=True)
    monkeypatch.setattr(search, "ROOT", tmp_path)
    data = InteractionData(sample_users=60, batch_size=64)
    settings = search.trials("LightGCN", 1)[0]
    found = search.run("LightGCN", settings, data, epochs=5)
    assert 0 <= found["val/recall@20"] <= 1 and found["epoch"] == 4 and found["settings"] == settings
    path = search.write_config("tiktok", "LightGCN", settings, 50)
    config = yaml.safe_load(path.read_text())
    assert config["model"] == {"class_path": "LightGCN", "init_args": settings}
    assert config["data"]["init_args"] == search.DATA["tiktok"] and config["trainer"]["max_epochs"] == 50


@pytest.mark.filterwarnings("ignore")
def test_the_study_of_ids_measures_every_representation() -> None:
    data = InteractionData(sample_users=80, batch_size=128)
    found = semantics.measure(0, data, epochs=1)
    names = {
        "bprmf",
        "lightgcn",
        "untrained",
        *(f"idsf {kind}/{m}" for kind in ("id", "projected", "raw") for m in data.modalities),
    }
    assert found.keys() == names
    assert all({"spearman/image", "spearman/text", "spearman/structure"} <= scores.keys() for scores in found.values())
    # The features' own cosine is the reference, so it agrees with itself.
    assert found["idsf raw/text"]["spearman/text"] == pytest.approx(1)


def test_the_picture_of_ablations_is_drawn_from_the_results_file(tmp_path: Path) -> None:
    summary = {name: {"test/recall@20": {"mean": value, "std": None}} for name, value in (("idsf", 0.2), ("none", 0.1))}
    (tmp_path / "study.json").write_text(json.dumps({"summary": summary}))
    pictures.ablation(tmp_path / "study.json", tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 1000
