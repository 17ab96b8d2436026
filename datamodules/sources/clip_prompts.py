"""What CLIP is asked about an image of a task: class names and prompt templates, and where the published sets are.

They are configuration: `clip8.json` beside this file has the eight tasks of the merging papers and the sets of small
images that this package reads, and a file of the user's own can take its place. Each entry's `note` says where the
words come from and how exact they are. (Templates and names marked as CLIP's are those of github.com/openai/CLIP, MIT.)
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

MERGING_TASKS = ("sun397", "stanford_cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")
"""The eight tasks of the merging papers, in the order of their tables."""

ROBUSTNESS_TASKS = ("stanford_cars", "eurosat", "resisc45", "gtsrb")
"""The tasks that have published corrupted splits."""

_PACKAGED = Path(__file__).with_name("clip8.json")
_HUB_KEYS = {"id", "config", "splits", "image_column", "label_column"}
_TASK_KEYS = {"note", "hub", "templates", "class_names", "aliases"}


class HubSource(NamedTuple):
    """Where a data set is on the Hugging Face hub.

    Attributes:
        id: Its id, `owner/name`.
        config: Name of its configuration, or None where it has one only.
        splits: By part ("train", "test", names of corruptions), what the set calls it.
        image_column: Column of the images.
        label_column: Column of the labels.
    """

    id: str
    config: str | None
    splits: dict[str, str]
    image_column: str
    label_column: str


class ClipTask(NamedTuple):
    """A task as CLIP is asked about it.

    Attributes:
        templates: Prompts with "{}" where the name of a class goes.
        class_names: Names of the classes in the order of the labels; None where those of the data set are used.
        aliases: Names that data sets have for classes, and the name among `class_names` that each means.
        hub: Where the published set is, if there is one.
        note: Where the words come from.
    """

    templates: list[str]
    class_names: list[str] | None
    aliases: dict[str, str]
    hub: HubSource | None
    note: str


def read_clip_tasks(path: str | Path | None = None) -> dict[str, ClipTask]:
    """Tasks of a JSON file such as `clip8.json`.

    Args:
        path: The file; the packaged one by default.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If it is not as described; the message names the task and the field.
    """
    path = _PACKAGED if path is None else Path(path).expanduser()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: expected a JSON file such as {_PACKAGED}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON in UTF-8: {error}") from error
    tasks = content.get("tasks") if isinstance(content, dict) else None
    if not isinstance(tasks, dict) or not tasks:
        raise ValueError(f"{path} has no tasks: expected an object 'tasks' with an entry for each, as in {_PACKAGED}")
    return {task: _task(entry, f"{path}: {task}") for task, entry in tasks.items()}


def clip_task(task: str, path: str | Path | None = None) -> ClipTask:
    """One of these tasks.

    Args:
        task: Its name.
        path: See `read_clip_tasks`.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If there is no such task, or the file is malformed.
    """
    tasks = read_clip_tasks(path)
    if task not in tasks:
        raise ValueError(f"there are no prompts for the task {task!r}: expected one of {', '.join(tasks)}, or a JSON "
                         f"file of your own with an entry {task!r}, as {_PACKAGED.name} has")  # fmt: skip
    return tasks[task]


def clip_prompts(
    task: str, classes: Sequence[str] | None = None, path: str | Path | None = None
) -> tuple[list[str], list[str]]:
    """Names of the classes in the order of the labels, and templates with "{}" where they go.

    Args:
        task: Its name.
        classes: The data set's own names in the order of its labels; by default the labels are in the order of the
            task's `class_names`.
        path: See `read_clip_tasks`.

    Returns:
        Names, as many as there are classes, and templates.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If there is no such task, or a class is not known to it, or the task takes the data set's own
            names and none are given.
    """
    entry = clip_task(task, path)
    if classes is None:
        if entry.class_names is None:
            raise ValueError(f"the task {task!r} takes its class names from its data set: expected them as classes")
        return list(entry.class_names), list(entry.templates)
    if entry.class_names is None:
        return [tidy_class_name(name) for name in classes], list(entry.templates)
    known = {name: name for name in entry.class_names} | entry.aliases
    unknown = [name for name in classes if name not in known]
    if unknown:
        raise ValueError(f"the task {task!r} has no class {unknown[0]!r} ({len(unknown)} of {len(classes)} are "
                         f"unknown): expected names such as {', '.join(map(repr, list(known)[:5]))}")  # fmt: skip
    return [known[name] for name in classes], list(entry.templates)


def tidy_class_name(name: str) -> str:
    """A class name as words: "/a/apartment_building/outdoor" is "apartment building outdoor".

    A slash parts words in a name without spaces only ("Ram C/V Cargo Van" keeps its own).
    """
    name = name.strip()
    if " " not in name:
        name = re.sub(r"^/?[a-z]/", "", name).replace("/", " ")
    return " ".join(name.replace("_", " ").split())


def _task(entry: Any, where: str) -> ClipTask:
    _check_keys(entry, _TASK_KEYS, where)
    templates = _texts(entry["templates"], f"{where}: templates")
    lacking = [template for template in templates if template.count("{}") != 1]
    if lacking:
        raise ValueError(f"{where}: templates has {lacking[0]!r}: expected {{}} once, where the class name goes")
    names = entry["class_names"]
    if names is not None:
        names = _texts(names, f"{where}: class_names")
        if len(names) < 2 or len(set(names)) < len(names):
            raise ValueError(f"{where}: class_names has {names}: expected at least two, each once, or null")
    aliases = _strings(entry["aliases"], f"{where}: aliases")
    strange = [name for name in aliases.values() if name not in (names or [])]
    if strange:
        raise ValueError(f"{where}: aliases lead to {strange[0]!r}: expected one of class_names")
    return ClipTask(templates, names, aliases, _hub(entry["hub"], f"{where}: hub"), str(entry["note"]))


def _hub(entry: Any, where: str) -> HubSource | None:
    if entry is None:
        return None
    _check_keys(entry, _HUB_KEYS, where)
    for key in _HUB_KEYS - {"splits"}:
        if not (isinstance(entry[key], str) or (key == "config" and entry[key] is None)):
            raise ValueError(f"{where}: {key} is {entry[key]!r}: expected a text")
    splits = _strings(entry["splits"], f"{where}: splits")
    return HubSource(entry["id"], entry["config"], splits, entry["image_column"], entry["label_column"])


def _check_keys(entry: Any, keys: set[str], where: str) -> None:
    if not isinstance(entry, dict) or set(entry) != keys:
        found = ", ".join(sorted(entry)) if isinstance(entry, dict) else type(entry).__name__
        raise ValueError(f"{where} has {found or 'nothing'}: expected {', '.join(sorted(keys))}")


def _texts(values: Any, where: str) -> list[str]:
    if not isinstance(values, list) or not values or not all(isinstance(v, str) and v.strip() for v in values):
        raise ValueError(f"{where} is {values!r}: expected a list of texts that are not empty")
    return list(values)


def _strings(values: Any, where: str) -> dict[str, str]:
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise ValueError(f"{where} is {values!r}: expected an object of texts")
    return dict(values)
