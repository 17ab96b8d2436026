import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from zoo.common.study import (
    Check,
    StudyError,
    evaluate_check,
    load_study,
    plan,
    results_path,
    run_study,
    summarise,
    write_study,
)

# Stands in for train.py: "trains" in milliseconds, scores seed + lr, and counts its calls.
TRAIN = """
import json, pathlib, sys
options, words = {}, sys.argv[1:]
while words:
    word = words.pop(0)
    key, found, value = word.partition("=")
    options[key] = value if found else words.pop(0)
folder = pathlib.Path(options["--trainer.default_root_dir"]) / "Toy" / "version_0"
folder.mkdir(parents=True, exist_ok=True)
calls = pathlib.Path("calls.txt")
calls.write_text(calls.read_text() + json.dumps(options) + "\\n" if calls.exists() else json.dumps(options) + "\\n")
(folder / "last.ckpt").touch()
if options.get("--model.lr") == "broken":
    sys.exit("error: lr is broken")
seed = int(options["--seed_everything"])
metrics = {"test/hr@5": seed + float(options.get("--model.lr", 0))}
record = {"metrics": metrics, "seconds": {"fit": 2.0}, "peak_rss_bytes": 100, "seed": seed}
(folder / "result.json").write_text(json.dumps(record))
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "toy.yaml").write_text("model: Toy\n")
    return tmp_path


def study_file(root: Path, **changed: Any) -> Path:
    content: dict[str, Any] = {
        "title": "A comparison",
        "seeds": [1, 3],
        "variants": {
            "plain": {"config": "configs/toy.yaml"},
            "tuned": {"config": "configs/toy.yaml", "overrides": {"model.lr": 0.5}},
        },
        "smoke": {"trainer.max_epochs": 1},
        "checks": [{"test/hr@5": "tuned >= 1.2 * plain"}],
    }
    path = root / "studies" / "toy" / "compare.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**content, **changed}, sort_keys=False))
    return path


def calls(root: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (root / "calls.txt").read_text().splitlines()]


def test_every_variant_is_trained_with_every_seed_and_summarised(root: Path) -> None:
    content = run_study(load_study(study_file(root), root), root)
    made = [(call.get("--model.lr"), call["--seed_everything"]) for call in calls(root)]
    assert made == [(None, "1"), (None, "3"), ("0.5", "1"), ("0.5", "3")]
    assert [(run["variant"], run["seed"]) for run in content["runs"]] == [
        ("plain", 1),
        ("plain", 3),
        ("tuned", 1),
        ("tuned", 3),
    ]
    cell = content["summary"]["tuned"]["test/hr@5"]
    assert cell == {"mean": 2.5, "std": pytest.approx(2**0.5), "values": [1.5, 3.5]}
    assert content["summary"]["plain"]["seconds/fit"]["mean"] == 2.0
    assert content["checks"] == [
        {
            "check": "test/hr@5: tuned >= 1.2 * plain",
            "left": 2.5,
            "right": 2.0,
            "ratio": 1.25,
            "ratios": [1.5, 3.5 / 3],
            "holds": True,
        }
    ]


def test_shared_overrides_hold_for_all_variants_unless_one_has_its_own(root: Path) -> None:
    run_study(load_study(study_file(root, overrides={"model.lr": 0.1, "data.rows": [1, 2]}), root), root, seeds=[1])
    assert [(call["--model.lr"], call["--data.rows"]) for call in calls(root)] == [("0.1", "[1, 2]"), ("0.5", "[1, 2]")]


def test_finished_runs_are_kept_and_only_missing_ones_made(root: Path) -> None:
    study = load_study(study_file(root), root)
    run_study(study, root, seeds=[1])
    run_study(study, root)
    assert len(calls(root)) == 4
    next((root / "runs").glob("**/tuned/seed_3*/Toy/version_0/result.json")).unlink()
    run_study(study, root)
    assert len(calls(root)) == 5
    assert calls(root)[-1]["--ckpt_path"] == "last", "an interrupted run goes on"
    assert "--ckpt_path" not in calls(root)[0]


def test_changed_settings_make_new_runs_and_old_ones_are_found_again(root: Path) -> None:
    path = study_file(root)
    run_study(load_study(path, root), root)
    (root / "configs" / "toy.yaml").write_text("model: Other\n")
    run_study(load_study(path, root), root)
    assert len(calls(root)) == 8
    (root / "configs" / "toy.yaml").write_text("# The same as at first.\nmodel: Toy\n")
    run_study(load_study(path, root), root)
    assert len(calls(root)) == 8


def test_smoke_takes_one_seed_and_stays_away_from_the_results(root: Path) -> None:
    study = load_study(study_file(root), root)
    content = run_study(study, root, smoke=True)
    assert [call["--trainer.max_epochs"] for call in calls(root)] == ["1", "1"]
    assert content["seeds"] == [1]
    assert results_path(study, root, smoke=True).is_relative_to(root / "runs")
    assert results_path(study, root) == root / "results" / "toy" / "compare.json"
    full, quick = (plan(study, root, [1], smoke) for smoke in (False, True))
    assert not {run.folder for run in full} & {run.folder for run in quick}


def test_failed_run_is_reported_with_its_output_after_the_others_are_finished(root: Path) -> None:
    variants = {
        "bad": {"config": "configs/toy.yaml", "overrides": {"model.lr": "broken"}},
        "good": {"config": "configs/toy.yaml"},
    }
    study = load_study(study_file(root, variants=variants, checks=[]), root)
    with pytest.raises(StudyError, match=r"(?s)bad, seed 1: status 1;.*error: lr is broken.*bad, seed 3"):
        run_study(study, root)
    assert all(run.result() for run in plan(study, root, [1, 3]) if run.variant == "good")


def test_jobs_run_side_by_side_and_give_the_same(root: Path) -> None:
    study = load_study(study_file(root), root)
    together = run_study(study, root, jobs=2)
    (root / "calls.txt").unlink()
    assert run_study(study, root) == together
    assert not (root / "calls.txt").exists()


SUMMARY = summarise(
    [
        {"variant": "a", "metrics": {"hr": 0.3, "nan": None}, "seconds": {}, "peak_rss_bytes": 1},
        {"variant": "b", "metrics": {"hr": 0.2, "nan": 0.1}, "seconds": {}, "peak_rss_bytes": 1},
    ]
)


def test_mean_over_some_of_the_seeds_is_no_mean() -> None:
    records = [{"variant": "a", "metrics": {"hr": value}, "seconds": {}, "peak_rss_bytes": 1} for value in (0.3, None)]
    assert summarise(records)["a"]["hr"] == {"mean": None, "std": None, "values": [0.3, None]}


@pytest.mark.parametrize(
    ("check", "holds"),
    [
        (Check("hr", "a", ">=", 1.5, "b"), True),
        (Check("hr", "a", ">", 1.6, "b"), False),
        (Check("hr", "b", "<", 1.0, "a"), True),
        (Check("hr", "a", "<=", 1.0, "b"), False),
        (Check("hr", "a", ">=", 1.0, "0.25"), True),
        (Check("hr", "b", ">=", 1.0, "0.25"), False),
        (Check("nan", "a", "<", 1.0, "b"), False),
        (Check("nan", "b", "<", 1.0, "a"), False),
    ],
)
def test_check_holds_only_where_the_numbers_say_so(check: Check, holds: bool) -> None:
    # Three times 0.1 is more than 0.3 in binary fractions: the first case must not hang on a rounding error.
    summary = {**SUMMARY, "a": {**SUMMARY["a"], "hr": {"mean": 0.31, "values": [0.31]}}}
    assert evaluate_check(check, summary)["holds"] is holds


def test_single_seed_has_no_spread() -> None:
    assert SUMMARY["a"]["hr"] == {"mean": 0.3, "std": None, "values": [0.3]}


def test_check_of_a_metric_that_was_not_measured_names_those_that_were() -> None:
    with pytest.raises(StudyError, match=r"a has no ndcg; it has hr, nan"):
        evaluate_check(Check("ndcg", "a", ">", 1.0, "b"), SUMMARY)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"variants": None}, "expected a mapping with `variants`"),
        ({"colour": "red"}, "unknown key colour"),
        ({"variants": {"a": {"config": "configs/toy.yaml", "seed": 1}}}, "unknown key variants.a.seed"),
        ({"variants": {"a": {"config": "configs/none.yaml"}}}, r"variants.a.config: no file 'configs/none.yaml'"),
        ({"variants": {"a": None}}, "variants.a: expected a mapping"),
        ({"seeds": "0"}, "seeds: expected a list of integers, got '0'"),
        ({"checks": [{"test/hr@5": "tuned beats plain"}]}, "'tuned beats plain' is not of the form"),
        ({"checks": [{"test/hr@5": "tuned > plan"}]}, "no variant 'plan'; there are plain, tuned"),
        ({"checks": [{"test/hr@5": "0.5 > plain"}]}, "no variant '0.5'"),
    ],
)
def test_mistake_in_a_study_is_named(root: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        load_study(study_file(root, **changed), root)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "studies").glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_studies_of_the_zoo_can_be_planned(path: Path) -> None:
    study = load_study(path, ROOT)
    assert len(plan(study, ROOT, study.seeds)) == len(study.variants) * len(study.seeds)
    assert study.smoke, "a study should be quick to try out"


def test_written_study_reads_back(root: Path) -> None:
    content = run_study(load_study(study_file(root), root), root)
    write_study(root / "results" / "toy" / "compare.json", content)
    assert json.loads((root / "results" / "toy" / "compare.json").read_text()) == content


def test_command_answers_a_mistake_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "study.py"), str(tmp_path / "none.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "none.yaml: cannot be read" in done.stderr
    assert "Traceback" not in done.stderr


SEEDS = summarise(
    [
        {"variant": variant, "metrics": {"auc": value}, "seconds": {}, "peak_rss_bytes": 1}
        for variant, values in {"new": (0.9, 0.8), "old": (0.8, 0.78)}.items()
        for value in values
    ]
)


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("new >= old + 0.05", True),
        ("new >= old + 0.05 each seed", False),
        ("new >= old + 0.015 each seed", True),
        ("old >= new - 0.11 each seed", True),
        ("old >= new - 0.09 each seed", False),
        ("new >= 0.75 each seed", True),
        ("new >= 0.85 each seed", False),
        ("new < 1.2 * old - 0.01 each seed", True),
    ],
)
def test_a_check_may_have_an_offset_and_be_asked_of_every_seed(root: Path, text: str, holds: bool) -> None:
    variants = {name: {"config": "configs/toy.yaml"} for name in ("new", "old")}
    study = load_study(study_file(root, variants=variants, checks=[{"auc": text}]), root)
    assert str(study.checks[0]) == f"auc: {text}"
    assert evaluate_check(study.checks[0], SEEDS)["holds"] is holds
