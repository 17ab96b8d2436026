import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from zoo.common.study import StudyError, load_study, plan, results_path, run_study, write_study

# Stands in for train.py: "trains" in milliseconds, scores seed + lr and what it starts from, and notes its calls.
TRAIN = """
import json, pathlib, sys, time
options, words = {}, sys.argv[1:]
while words:
    word = words.pop(0)
    key, found, value = word.partition("=")
    options[key] = value if found else words.pop(0)
folder = pathlib.Path(options["--trainer.default_root_dir"]) / "Toy" / "version_0"
folder.mkdir(parents=True, exist_ok=True)
with open("calls.txt", "a") as calls:
    calls.write(json.dumps(options) + "\\n")
(folder / "last.ckpt").touch()
if options.get("--model.lr") == "broken":
    sys.exit("error: lr is broken")
seed = int(options["--seed_everything"])
metrics = {"test/hr@5": seed + float(options.get("--model.lr", 0))}
if "--model.init_from" in options:
    metrics["test/start"] = float((pathlib.Path(options["--model.init_from"]) / "weights").read_text())
time.sleep(float(options.get("--model.pause", 0)))
(folder / "encoder").mkdir(exist_ok=True)
(folder / "encoder" / "weights").write_text(str(metrics["test/hr@5"]))
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


def first_and_hand(lr: float | str = 0.25, **changed: Any) -> dict[str, Any]:
    """A variant with a run before it."""
    first = {"config": "configs/toy.yaml", "overrides": {"model.lr": lr}}
    return {"config": "configs/toy.yaml", "first": first, "hand": {"model.init_from": "encoder"}, **changed}


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


def test_a_run_before_another_has_its_seed_and_own_settings_and_hands_on_what_it_leaves(root: Path) -> None:
    variants = {"tuned": first_and_hand(overrides={"model.lr": 0.5})}
    path = study_file(root, variants=variants, checks=[], overrides={"model.size": 8})
    content = run_study(load_study(path, root), root)
    made = [(call["--model.lr"], call["--seed_everything"], call.get("--model.size")) for call in calls(root)]
    assert made == [("0.25", "1", None), ("0.25", "3", None), ("0.5", "1", "8"), ("0.5", "3", "8")]
    assert content["summary"]["tuned"]["test/start"]["values"] == [1.25, 3.25]
    assert content["summary"]["tuned"]["test/hr@5"]["values"] == [1.5, 3.5]
    assert list(content["summary"]) == ["tuned"], "runs before others are no rows"
    assert not any("--model.init_from" in call for call in calls(root)[:2])
    for call in calls(root)[2:]:
        handed = Path(call["--model.init_from"])
        assert not handed.is_absolute(), "moved with its folder, the run is still the same"
        assert (root / handed / "weights").is_file()


def test_the_record_holds_the_run_before_and_its_seconds(root: Path) -> None:
    content = run_study(load_study(study_file(root, variants={"tuned": first_and_hand()}, checks=[]), root), root)
    assert [run["first"]["metrics"]["test/hr@5"] for run in content["runs"]] == [1.25, 3.25]
    assert content["runs"][0]["seconds"] == {"fit": 2.0, "first": 2.0}
    assert content["summary"]["tuned"]["seconds/first"]["mean"] == 2.0


def test_equal_runs_before_others_are_one(root: Path) -> None:
    variants = {
        "tuned": first_and_hand(),
        "wide": first_and_hand(overrides={"model.size": 16}),
        "other": first_and_hand(0.75),
    }
    content = run_study(load_study(study_file(root, variants=variants, checks=[]), root), root)
    made = [(call.get("--model.lr"), call["--seed_everything"]) for call in calls(root)]
    assert made[:4] == [("0.25", "1"), ("0.25", "3"), ("0.75", "1"), ("0.75", "3")]
    assert len(made) == 10
    starts = {name: row["test/start"]["values"] for name, row in content["summary"].items()}
    assert starts == {"tuned": [1.25, 3.25], "wide": [1.25, 3.25], "other": [1.75, 3.75]}


def test_study_stopped_in_either_run_goes_on_there(root: Path) -> None:
    study = load_study(study_file(root, variants={"tuned": first_and_hand()}, checks=[]), root)
    whole = run_study(study, root, seeds=[1])
    (run,) = plan(study, root, [1])
    assert run.first is not None
    (run.folder / "Toy" / "version_0" / "result.json").unlink()
    assert run_study(study, root, seeds=[1]) == whole
    assert len(calls(root)) == 3, "the run before is finished"
    assert calls(root)[2] == {**calls(root)[1], "--ckpt_path": "last"}
    for one in (run, run.first):
        (one.folder / "Toy" / "version_0" / "result.json").unlink()
    assert run_study(study, root, seeds=[1]) == whole
    assert calls(root)[3:] == [{**call, "--ckpt_path": "last"} for call in calls(root)[:2]]


def test_finished_run_needs_the_one_before_it_no_more(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = load_study(study_file(root, variants={"tuned": first_and_hand()}, checks=[]), root)
    run_study(study, root, seeds=[1])
    shutil.rmtree(root / "runs" / "studies" / "toy" / "first")
    content = run_study(study, root, seeds=[1])
    assert len(calls(root)) == 2
    assert content["runs"][0]["first"] is None
    assert content["summary"]["tuned"]["seconds/first"]["values"] == [None], "unknown, not zero"
    assert "tuned, seed 1: the run before it is gone" in capsys.readouterr().out


def test_what_is_handed_on_is_of_the_version_that_was_finished(root: Path) -> None:
    study = load_study(study_file(root, variants={"tuned": first_and_hand()}, checks=[]), root)
    run_study(study, root, seeds=[1])
    (run,) = plan(study, root, [1])
    assert run.first is not None
    (run.first.folder / "Toy" / "version_1" / "encoder").mkdir(parents=True)
    assert [Path(argument).parent.name for argument in run.handed(root)] == ["version_0"]


def test_changed_run_before_makes_all_anew_and_a_changed_run_itself_alone(root: Path) -> None:
    def run(**variant: Any) -> int:
        run_study(load_study(study_file(root, variants={"tuned": variant}, checks=[]), root), root, seeds=[1])
        return len(calls(root))

    assert run(**first_and_hand()) == 2
    assert run(**first_and_hand(overrides={"model.size": 8})) == 3
    assert run(**first_and_hand(0.5)) == 5
    assert run(**first_and_hand(hand={"model.init_from": "./encoder", "model.other": "last.ckpt"})) == 6
    assert run(config="configs/toy.yaml") == 7
    assert run(**first_and_hand()) == 7


def test_failed_run_before_others_keeps_from_training_only_those_that_wait_for_it(root: Path) -> None:
    variants = {"tuned": first_and_hand("broken"), "wide": first_and_hand("broken", overrides={"model.size": 16})}
    others = {"good": first_and_hand(), "plain": {"config": "configs/toy.yaml"}}
    study = load_study(study_file(root, variants={**variants, **others}, checks=[]), root)
    with pytest.raises(StudyError) as caught:
        run_study(study, root, seeds=[1])
    message = str(caught.value)
    assert message.startswith("the run before tuned and wide, seed 1: status 1; the end of ")
    assert message.endswith("error: lr is broken")
    assert message.count("status 1") == 1, "reported once, and for what it is"
    assert {run.variant: run.result() is not None for run in plan(study, root, [1])} == {
        "tuned": False,
        "wide": False,
        "good": True,
        "plain": True,
    }
    assert not list((root / "runs").glob("**/tuned/**/last.ckpt"))


def test_what_the_run_before_has_not_left_is_named_after_the_others_are_finished(root: Path) -> None:
    bad = first_and_hand(hand={"model.init_from": "decoder"})
    study = load_study(study_file(root, variants={"bad": bad, "good": first_and_hand()}, checks=[]), root)
    with pytest.raises(
        StudyError,
        match=r"^bad, seed 1: hand.model.init_from: the run before bad has left no 'decoder' in "
        r"\S+version_0; there are encoder, last.ckpt, result.json$",
    ):
        run_study(study, root, seeds=[1])
    assert [run.result() is not None for run in plan(study, root, [1])] == [False, True]


def test_side_by_side_a_run_waits_for_the_one_before_it(root: Path) -> None:
    slow = first_and_hand()
    slow["first"]["overrides"]["model.pause"] = 0.3
    path = study_file(root, variants={"tuned": slow, "wide": slow, "plain": {"config": "configs/toy.yaml"}}, checks=[])
    content = run_study(load_study(path, root), root, jobs=4)
    assert content["summary"]["wide"]["test/start"]["values"] == [1.25, 3.25]
    assert len(calls(root)) == 8


def test_smoke_reaches_the_run_before_where_the_classes_are_the_same(root: Path) -> None:
    def smoke_of_first(config: dict[str, Any]) -> set[str]:
        (root / "configs" / "pretrain.yaml").write_text(yaml.safe_dump(config))
        variant = first_and_hand(first={"config": "configs/pretrain.yaml"})
        smoke = {"trainer.max_epochs": 1, "model.size": 2, "data.rows": 3}
        (run,) = plan(
            load_study(study_file(root, variants={"a": variant}, checks=[], smoke=smoke), root), root, [1], True
        )
        assert run.first is not None
        found = [{key for key in smoke if f"--{key}={smoke[key]}" in one.arguments} for one in (run, run.first)]
        assert found[0] == set(smoke)
        return found[1]

    (root / "configs" / "toy.yaml").write_text(yaml.safe_dump({"model": "Toy", "data": {"class_path": "ToyData"}}))
    assert smoke_of_first({"model": {"class_path": "zoo.Toy"}, "data": "ToyData"}) == {
        "trainer.max_epochs",
        "model.size",
        "data.rows",
    }
    assert smoke_of_first({"model": "Other", "data": "ToyData"}) == {"trainer.max_epochs", "data.rows"}
    assert smoke_of_first({"model": "Toy", "data": "OtherData"}) == {"trainer.max_epochs", "model.size"}


def test_smoke_and_full_runs_before_others_are_apart(root: Path) -> None:
    study = load_study(study_file(root, variants={"tuned": first_and_hand()}, checks=[]), root)
    run_study(study, root, smoke=True)
    assert [call["--trainer.max_epochs"] for call in calls(root)] == ["1", "1"]
    run_study(study, root, seeds=[1])
    assert len(calls(root)) == 4


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
        (
            {"variants": {"a": {"config": "configs/toy.yaml", "overrides": [1]}}},
            r"variants.a.overrides: expected a map",
        ),
        ({"variants": {"first": {"config": "configs/toy.yaml"}}}, "variants.first: the name is taken"),
        (
            {"variants": {"a": {"config": "configs/toy.yaml", "first": {}}}},
            "variants.a: first and hand belong together",
        ),
        ({"variants": {"a": {"config": "configs/toy.yaml", "hand": {"x": "y"}}}}, "first and hand belong together"),
        ({"variants": {"a": first_and_hand(first="configs/toy.yaml")}}, "variants.a.first: expected a mapping"),
        ({"variants": {"a": first_and_hand(first=first_and_hand())}}, "unknown key variants.a.first.first"),
        (
            {"variants": {"a": first_and_hand(first={"config": "no.yaml"})}},
            r"variants.a.first.config: no file 'no.yaml'",
        ),
        ({"variants": {"a": first_and_hand(hand="encoder")}}, "variants.a.hand: expected a mapping .*, got 'encoder'"),
        ({"variants": {"a": first_and_hand(hand={})}}, "variants.a.hand: expected a mapping .*, got {}"),
        ({"variants": {"a": first_and_hand(hand={"x": None})}}, r"variants.a.hand.x: expected the name .*, got None"),
        (
            {"variants": {"a": first_and_hand(hand={"x": "/etc"})}},
            r"variants.a.hand.x: expected the name .*, got '/etc'",
        ),
        (
            {"variants": {"a": first_and_hand(hand={"x": "../b"})}},
            r"variants.a.hand.x: expected the name .*, got '../b'",
        ),
        (
            {"variants": {"a": first_and_hand(overrides={"model.init_from": "b"})}},
            r"variants.a.hand.model.init_from: it is given by variants.a.overrides, too",
        ),
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
