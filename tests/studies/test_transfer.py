"""The study of transfer reads what the runs of a study have left, and sorts lifts by who was asked."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import yaml
from lightning.pytorch import Trainer

from datamodules import TextRecData
from studies.text_attack import transfer as study
from zoo import RecFormerRec, TextAttackModule
from zoo.common.study import StudyError, load_study, plan
from zoo.common.tables import rebuild
from zoo.text_attack.transfer import TransferMatrix

DATA = {"sample_users": 40, "sample_items": 60, "num_targets": 3, "eval_batch_size": 16}
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
STUDY = {
    "title": "Small",
    "seeds": [0, 1],
    "variants": {
        "deepwordbug": {
            "config": "attack.yaml",
            "first": {"config": "victim.yaml"},
            "hand": {"model.victim_checkpoint": "best.ckpt"},
        }
    },
}
ATTACK = {"k": 10, "recipe": "deepwordbug"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study whose runs are finished: fresh victims, and attacks on them."""
    root = tmp_path_factory.mktemp("study")
    for name, content in (
        ("victim", {"model": {"class_path": "RecFormerRec"}}),
        ("attack", {"model": {"class_path": "TextAttackModule"}}),
        ("small", STUDY),
    ):
        (root / f"{name}.yaml").write_text(yaml.safe_dump(content))
    found = plan(load_study(root / "small.yaml", root), root, [0, 1])
    for run in found:
        torch.manual_seed(run.seed)
        victim = RecFormerRec(max_attr_length=12, max_items=3, max_tokens=40)
        folders = [one.folder / "Model" / "version_0" for one in (run.first, run)]
        for folder in folders:
            folder.mkdir(parents=True)
            config = {"model": {"init_args": ATTACK}, "data": {"init_args": DATA}}
            (folder / "result.json").write_text(json.dumps({"config": config}))
        trainer = Trainer(**QUIET, enable_checkpointing=False, default_root_dir=root / "lightning")
        trainer.validate(victim, TextRecData(**DATA), verbose=False)
        trainer.save_checkpoint(folders[0] / "best.ckpt")
        attack = TextAttackModule(
            victim_checkpoint=str(folders[0] / "best.ckpt"), results=str(folders[1] / "attacks.jsonl"), **ATTACK
        )
        trainer = Trainer(**QUIET, enable_checkpointing=False, default_root_dir=root / "lightning")
        trainer.test(attack, TextRecData(**DATA), verbose=False)
    return root, found


@pytest.fixture
def content(finished, monkeypatch):
    """The result on these runs."""
    monkeypatch.setattr(study, "run_study", lambda *_: None)
    root, _ = finished
    return study.transfer(root / "small.yaml", root=root)


def test_titles_of_finished_runs_are_scored_on_both_victims(content, finished):
    assert content["targets"] == 3 and content["seeds"] == [0, 1]
    row = content["summary"]["deepwordbug"]
    own = [row[f"lift/{seed}_on_{seed}"]["mean"] for seed in (0, 1)]
    other = [row["lift/0_on_1"]["mean"], row["lift/1_on_0"]["mean"]]
    assert row["lift/white"]["values"] == own and row["lift/transferred"]["values"] == other
    assert own[0] != other[1] and own[1] != other[0]
    # The white entries are what the runs reported: same victims, users, lists and titles.
    reported = content["checks"][0]
    assert reported["right"] == 0 and reported["holds"]
    root, runs = finished
    for run, lift in zip(runs, own, strict=True):
        results = study.left_by(run, root)[1]
        assert lift == pytest.approx(sum(r.exposure_post for r in results) / sum(r.exposure_pre for r in results))


def test_its_result_can_be_shown_as_a_table(content, tmp_path):
    (tmp_path / "transfer.json").write_text(json.dumps(content))
    page = tmp_path / "README.md"
    page.write_text("<!-- table: transfer.json lift/white lift/transferred lift/0_on_1 -->\n<!-- /table -->\n")
    rebuild(tmp_path)
    assert "| deepwordbug |" in page.read_text()


def test_a_run_without_attacked_titles_and_a_single_seed_are_refused(finished, tmp_path):
    root, runs = finished
    with pytest.raises(StudyError, match=r"deepwordbug, seed 1: no attacks\.jsonl"):
        study.left_by(replace(runs[1], folder=tmp_path), root)
    with pytest.raises(ValueError, match=r"at least 2 seeds, got \[1\]"):
        study.transfer(root / "small.yaml", [1], root=root)


def test_white_is_the_diagonal_and_transferred_the_mean_of_the_others():
    names = ("0", "1", "2")
    lifts = torch.tensor([[2.0, 1.0, 1.5], [1.2, 3.0, 1.4], [0.5, 0.7, 4.0]]).double()
    matrix = TransferMatrix(names, names, torch.ones(3, 3).double(), lifts, (lifts > 1).double())
    row = study.summarise({"punc": matrix})["punc"]
    assert row["lift/white"]["values"] == [2, 3, 4] and row["lift/white"]["mean"] == 3
    assert row["lift/transferred"]["values"] == pytest.approx([1.25, 1.3, 0.6])
    assert row["win_rate/transferred"]["values"] == [0.5, 1, 0]
    assert row["lift/2_on_0"]["mean"] == 0.5


def test_claims_that_do_not_hold_are_told():
    def row(white, moved):
        return {"lift/white": {"mean": white}, "lift/transferred": {"mean": moved}}

    found = study.checks({"deepwordbug": row(2.0, 1.2), "punc": row(0.9, 1.0), "random": row(1.0, 1.0)}, 0.2)
    assert [check["holds"] for check in found] == [False, True, True, False, False]
