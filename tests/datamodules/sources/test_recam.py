from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from datamodules.sources.recam import passages, read_recam, recam_files

OFFICIAL = [
    "data/training_data/Task_1_train.jsonl",
    "data/training_data/Task_1_dev.jsonl",
    "data/training_data/Task_2_train.jsonl",
    "data/training_data/Task_2_dev.jsonl",
    "data/trail_data/Task_1_Imperceptibility.jsonl",
    "data/trail_data/Task_2_Nonspecificity.jsonl",
    "data/trail_data/Task_3_Intersection.jsonl",
    "data/test_data/Task_1_test.jsonl",
    "data/test_data/Task_2_test.jsonl",
]
FLAT = [
    "task1_trial.jsonl.gz",
    "task1_test_a.jsonl.gz",
    "task1_test_b_unlabelled.jsonl.gz",
    "task1_dev.jsonl.gz",
    "task2_trial.jsonl.gz",
    "task2_dev.jsonl.gz",
    "intersection_trial.jsonl.gz",
]
LABELLED = "data/imperceptibility/test_data/Task_1_test_with_labels.jsonl"


def layout(root, names):
    """Files of one question each, whose article is the file's name, and which is there twice in other case."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        row = {"article": Path(name).name.split(".")[0], "question": "so @placeholder it is"}
        row |= {f"option_{place}": f"word{place}" for place in range(5)}
        if "unlabelled" not in name and not name.endswith("test.jsonl"):
            row["label"] = number % 5
        lines = [json.dumps(row), json.dumps(row | {"article": row["article"].upper()})]
        content = "\n".join(lines).encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return root


def names(files):
    return [path.name.split(".")[0] for path in files]


def parts(root, subtask, **options):
    return {part: names(recam_files(root, subtask, part, **options)) for part in ("train", "validation", "test")}


def test_the_published_folders_give_training_with_trial_and_dev_twice(tmp_path):
    layout(tmp_path, OFFICIAL)
    for root in (tmp_path, tmp_path / "data"):
        assert parts(root, 1) == {
            "train": ["Task_1_train", "Task_1_Imperceptibility"],
            "validation": ["Task_1_dev"],
            "test": ["Task_1_dev"],
        }
        assert parts(root, 2)["train"] == ["Task_2_train", "Task_2_Nonspecificity"]
        assert names(recam_files(root, 2, "predict")) == ["Task_2_test"]
    assert parts(tmp_path, 2, intersection=True)["train"][-1] == "Task_3_Intersection"
    assert read_recam(tmp_path, 1, "test") is None


def test_a_labelled_test_is_the_test_where_there_is_a_training_file(tmp_path):
    layout(tmp_path, [*OFFICIAL, LABELLED])
    assert parts(tmp_path, 1)["test"] == ["Task_1_test_with_labels"]
    assert parts(tmp_path, 1)["train"] == ["Task_1_train", "Task_1_Imperceptibility"]
    rows = read_recam(tmp_path, 1, "test")
    assert rows is not None and rows.articles[0] == "Task_1_test_with_labels"


def test_a_labelled_test_trains_where_there_is_no_training_file(tmp_path):
    layout(tmp_path / "mirror", [LABELLED, OFFICIAL[1], OFFICIAL[4]])
    assert parts(tmp_path / "mirror", 1) == {
        "train": ["Task_1_Imperceptibility", "Task_1_test_with_labels"],
        "validation": ["Task_1_dev"],
        "test": ["Task_1_dev"],
    }
    layout(tmp_path / "flat", FLAT)
    assert parts(tmp_path / "flat", 1)["train"] == ["task1_trial", "task1_test_a"]
    assert parts(tmp_path / "flat", 1)["test"] == ["task1_dev"]
    assert parts(tmp_path / "flat", 2) == {"train": ["task2_trial"], "validation": ["task2_dev"], "test": ["task2_dev"]}
    assert names(recam_files(tmp_path / "flat", 1, "predict")) == ["task1_test_b_unlabelled"]
    assert read_recam(tmp_path / "flat", 2, "predict") is None


def test_a_labelled_test_is_free_when_the_other_subtask_is_trained_on(tmp_path):
    layout(tmp_path, FLAT)
    assert names(recam_files(tmp_path, 1, "test", train_subtask=2)) == ["task1_test_a"]
    assert names(recam_files(tmp_path, 1, "test", train_subtask=1)) == ["task1_dev"]


def test_questions_of_several_files_are_joined_in_order(tmp_path):
    layout(tmp_path, FLAT)
    rows = read_recam(tmp_path, 1, "train", intersection=True)
    assert rows is not None
    assert rows.articles[::2] == ["task1_trial", "task1_test_a", "intersection_trial"]
    assert rows.labels[::2].tolist() == [0, 1, 1]
    assert rows.name == "ReCAM subtask 1 train"
    unlabelled = read_recam(tmp_path, 1, "predict")
    assert unlabelled is not None and not unlabelled.labelled


def test_passages_are_those_of_all_files_once_each(tmp_path):
    layout(tmp_path, FLAT)
    found = passages(tmp_path)
    assert sorted(found) == sorted(name.split(".")[0] for name in FLAT)


def test_the_folder_of_all_data_is_where_files_are_looked_for_by_default(tmp_path, monkeypatch):
    layout(tmp_path / "recam_semeval2021_task4", FLAT)
    monkeypatch.setenv("ZOO_DATA", str(tmp_path))
    assert names(recam_files(None, 1, "validation")) == ["task1_dev"]
    assert names(recam_files(tmp_path, 1, "validation")) == ["task1_dev"]


def test_missing_files_and_folders_are_named_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.delenv("ZOO_DATA", raising=False)
    way_out = r"Task_2_dev\.jsonl \(plain or \.gz\).*boyuanzheng010.*commit 93dff63.*--data\.data_dir"
    with pytest.raises(FileNotFoundError, match=f"ZOO_DATA is not set; get {way_out}"):
        recam_files(None, 2, "validation")
    with pytest.raises(FileNotFoundError, match=f"has no file for validation of subtask 2; get {way_out}"):
        recam_files(tmp_path, 2, "validation")
    with pytest.raises(FileNotFoundError, match=r"data_dir=.*gone is not a folder"):
        recam_files(tmp_path / "gone", 1, "train")
    monkeypatch.setenv("ZOO_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"recam_semeval2021_task4 is not a folder"):
        passages(None)
    with pytest.raises(FileNotFoundError, match=r"has no file of ReCAM; get Task_1_train\.jsonl"):
        passages(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no file for train of subtask 1; get Task_1_train\.jsonl or Task_1_I"):
        read_recam(tmp_path, 1, "train")
    layout(tmp_path, FLAT[:1])
    with pytest.raises(FileNotFoundError, match=r"has no file of intersection questions; get Task_3_Intersection"):
        recam_files(tmp_path, 1, "train", intersection=True)


def test_unknown_subtasks_and_parts_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"subtask 3, expected 1 or 2; subtask 3 trains on one of them"):
        recam_files(tmp_path, 3, "train")
    with pytest.raises(ValueError, match=r"part 'dev', expected one of train, validation, test, predict"):
        recam_files(tmp_path, 1, "dev")


@pytest.mark.real
def test_the_real_files_are_read_whole():
    folder = Path(os.environ["ZOO_DATA"]) / "recam_semeval2021_task4"
    sizes = {
        (subtask, part): read_recam(folder, subtask, part) for subtask in (1, 2) for part in ("train", "validation")
    }
    assert {key: len(rows) for key, rows in sizes.items() if rows is not None} == {
        (1, "train"): 913 + 1025,
        (1, "validation"): 816,
        (2, "train"): 987,
        (2, "validation"): 851,
    }
    assert all(rows is not None and rows.labelled and rows.num_options == 5 for rows in sizes.values())
    unlabelled = read_recam(folder, 1, "predict")
    assert unlabelled is not None and len(unlabelled) == 1000 and not unlabelled.labelled
    assert unlabelled.ids[0] == "task1_test-0000"
