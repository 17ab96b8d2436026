from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.sources.clip_prompts import (
    MERGING_TASKS,
    ROBUSTNESS_TASKS,
    clip_prompts,
    clip_task,
    read_clip_tasks,
    tidy_class_name,
)
from datamodules.sources.corruptions import CORRUPTIONS

ZOO_SETS = ("mnist", "fashion_mnist", "kmnist", "notmnist", "cifar10", "gtsrb", "eurosat", "fer2013")


def test_the_eight_tasks_have_the_published_numbers_of_templates_and_classes() -> None:
    tasks = read_clip_tasks()
    assert [len(tasks[name].templates) for name in MERGING_TASKS] == [2, 8, 18, 3, 1, 3, 1, 8]
    classes = [tasks[name].class_names for name in MERGING_TASKS]
    assert [None if names is None else len(names) for names in classes] == [None, None, 45, 10, 10, 43, 10, 47]
    assert all(task.note for task in tasks.values())


def test_the_eight_tasks_come_from_the_published_sets() -> None:
    tasks = read_clip_tasks()
    ids = [tasks[name].hub.id for name in MERGING_TASKS]
    own = [f"tanganke/{name}" for name in MERGING_TASKS]
    own[4], own[6] = "ufldl-stanford/svhn", "ylecun/mnist"
    assert ids == own
    assert {name: tasks[name].hub.config for name in MERGING_TASKS if tasks[name].hub.config} == {
        "svhn": "cropped_digits"
    }
    for name in MERGING_TASKS:
        parts = {"train", "test"} | (set(CORRUPTIONS) if name in ROBUSTNESS_TASKS else set())
        assert set(tasks[name].hub.splits) == parts
        assert tasks[name].hub.splits["test"] == "test"


def test_digits_of_both_kinds_are_asked_about_alike() -> None:
    assert clip_prompts("mnist") == clip_prompts("svhn")
    names, templates = clip_prompts("mnist")
    assert templates[0].replace("{}", names[7]) == 'a photo of the number: "7".'


def test_templates_of_a_task_differ_and_lists_in_alphabetical_order_are() -> None:
    tasks = read_clip_tasks()
    assert all(len(set(task.templates)) == len(task.templates) for task in tasks.values())
    for name in ("resisc45", "dtd"):
        assert tasks[name].class_names == sorted(tasks[name].class_names)


def test_names_of_a_data_set_lead_to_those_of_the_prompts_in_its_own_order() -> None:
    assert clip_prompts("eurosat", ["SeaLake", "Forest"])[0] == ["lake or sea", "forest"]
    assert clip_prompts("eurosat", ["river", "Highway"])[0] == ["river", "highway or road"]
    assert clip_prompts("fer2013", ["neutral", "fear"])[0] == ["neutral", "fearful"]
    names, templates = clip_prompts("sun397", ["/a/abbey", "/a/apartment_building/outdoor"])
    assert (names, len(templates)) == (["abbey", "apartment building outdoor"], 2)


@pytest.mark.parametrize("task", ZOO_SETS)
def test_sets_of_small_images_have_prompts_for_every_class(task: str) -> None:
    names, templates = clip_prompts(task)
    assert len(names) == len(set(names)) == {"gtsrb": 43, "fer2013": 7}.get(task, 10)
    aliases = clip_task(task).aliases
    assert not aliases or list(aliases.values()) == names
    assert templates


@pytest.mark.real
@pytest.mark.parametrize("task", ZOO_SETS)
def test_classes_of_the_real_files_are_known_and_in_order(task: str) -> None:
    classes = np.load(Path(os.environ["ZOO_DATA"]) / task / f"{task}.npz")["classes"].tolist()
    assert clip_prompts(task, classes)[0] == clip_prompts(task)[0]


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("/a/abbey", "abbey"),
        ("a/apartment_building/outdoor", "apartment building outdoor"),
        ("/s/stadium/baseball", "stadium baseball"),
        ("Ram C/V Cargo Van Minivan 2012", "Ram C/V Cargo Van Minivan 2012"),
        ("  two__words ", "two words"),
        ("polka-dotted", "polka-dotted"),
        ("T-shirt/top", "T-shirt top"),
    ],
)
def test_class_names_become_words(name: str, want: str) -> None:
    assert tidy_class_name(name) == want


def write(path: Path, **changes: Any) -> Path:
    hub = {"id": "a/b", "config": None, "splits": {"test": "test"}, "image_column": "image", "label_column": "label"}
    entry = {"note": "", "hub": hub, "templates": ["a {}."], "class_names": ["x", "y"], "aliases": {"X": "x"}}
    path.write_text(json.dumps({"tasks": {"mine": entry | changes}}), encoding="utf-8")
    return path


def test_a_file_of_the_user_s_own_takes_the_place_of_the_packaged_one(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.json")
    assert clip_prompts("mine", ["y", "X"], path=path) == (["y", "x"], ["a {}."])
    assert list(read_clip_tasks(path)) == ["mine"]


def test_unknown_tasks_and_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no prompts for the task 'imagenet': expected one of sun397, stanford_cars"):
        clip_prompts("imagenet")
    with pytest.raises(ValueError, match=r"'eurosat' has no class 'Sea' \(1 of 2 are unknown\)"):
        clip_prompts("eurosat", ["Forest", "Sea"])
    with pytest.raises(ValueError, match="'sun397' takes its class names from its data set"):
        clip_prompts("sun397")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"templates": []}, "templates is .*expected a list of texts"),
        ({"templates": ["no place"]}, "templates has 'no place': expected {} once"),
        ({"templates": ["{} and {}"]}, "expected {} once"),
        ({"class_names": ["x", "x"]}, "class_names has .*each once"),
        ({"class_names": ["x"]}, "at least two"),
        ({"class_names": "xy"}, "class_names is 'xy'"),
        ({"class_names": ["x", " "]}, "not empty"),
        ({"aliases": {"Z": "z"}}, "aliases lead to 'z'"),
        ({"aliases": {"Z": 1}}, "aliases is .*object of texts"),
        ({"hub": {"id": "a/b"}}, "hub has id: expected config, id"),
        ({"surplus": 1}, "has .*surplus.*expected aliases"),
    ],
)
def test_malformed_entries_are_refused_by_task_and_field(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "mine.json", **changes)
    with pytest.raises(ValueError, match=message) as error:
        read_clip_tasks(path)
    assert f"{path}: mine" in str(error.value)


def test_values_of_the_hub_entry_are_checked(tmp_path: Path) -> None:
    for key, value in (("id", None), ("config", 3), ("label_column", None), ("splits", ["test"])):
        hub = {"id": "a/b", "config": None, "splits": {}, "image_column": "image", "label_column": "label"}
        path = write(tmp_path / "mine.json", hub=hub | {key: value})
        with pytest.raises(ValueError, match=f"mine: hub: {key} is"):
            read_clip_tasks(path)


def test_missing_and_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none.json is missing"):
        read_clip_tasks(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="is not valid JSON"):
        read_clip_tasks(tmp_path / "bad.json")
    (tmp_path / "list.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="has no tasks"):
        read_clip_tasks(tmp_path / "list.json")
