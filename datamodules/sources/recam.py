"""The files of ReCAM (SemEval 2021, task 4): questions about abstract words in summaries of news.

The data has no licence; its passages are news texts, for research only. No file is part of this package.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from datamodules.cloze_rows import ClozeRows
from datamodules.sources.cloze_files import read_cloze
from datamodules.sources.cloze_overlap import article_key

if TYPE_CHECKING:
    from collections.abc import Iterator

REPOSITORY = "https://github.com/boyuanzheng010/SemEval2021-Reading-Comprehension-of-Abstract-Meaning"
COMMIT = "93dff63af52d031980da8a8c8ea71f5a399031dc"
SUBTASKS = (1, 2)
PARTS = ("train", "validation", "test", "predict")

_OPTIONS = 5
_FOLDER = "recam_semeval2021_task4"
_TOPICS = {1: "Imperceptibility", 2: "Nonspecificity"}
_MIRROR_FOLDERS = {1: "imperceptibility", 2: "non-specificity"}  # of a repository with the labels of the tests
# The publication really spells its folder `trail_data`.
_SUBFOLDERS = ("", "training_data", "trail_data", "trial_data", "test_data")


def _names(subtask: int) -> dict[str, list[str]]:
    """File names of each role, without `.jsonl`: the publication's, and those of a flat folder."""
    number = f"Task_{subtask}"
    return {
        "train": [f"{number}_train", f"task{subtask}_train"],
        "trial": [f"{number}_{_TOPICS[subtask]}", f"task{subtask}_trial"],
        "intersection": ["Task_3_Intersection", "intersection_trial"],
        "dev": [f"{number}_dev", f"task{subtask}_dev"],
        "labelled test": [f"{number}_test_with_labels", f"task{subtask}_test_a"],
        "unlabelled test": [f"{number}_test", f"task{subtask}_test_b_unlabelled"],
    }


def _root(data_dir: Path | None, asked: str) -> Path:
    if data_dir is not None:
        folder = Path(data_dir).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"data_dir={data_dir} is not a folder; {asked}")
        return folder
    root = os.environ.get("ZOO_DATA")
    if not root:
        raise FileNotFoundError(f"no data_dir, and ZOO_DATA is not set; {asked}")
    folder = Path(root).expanduser() / _FOLDER
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; {asked}")
    return folder


def _way_out(names: list[str]) -> str:
    return (
        f"get {' or '.join(f'{name}.jsonl' for name in names)} (plain or .gz) from the folder data of {REPOSITORY} "
        f"(commit {COMMIT[:7]}) and name the folder that it lies in, or the copy of the repository, in "
        f"--data.data_dir, or put it into $ZOO_DATA/{_FOLDER}"
    )


def _folders(root: Path, subtask: int) -> Iterator[Path]:
    for base in (root, root / "data", root / _FOLDER):
        for topic in ("", _MIRROR_FOLDERS[subtask]):
            for folder in _SUBFOLDERS:
                yield base / topic / folder


def _find(root: Path, subtask: int, role: str) -> Path | None:
    names = _names(subtask)[role]
    for name in names:
        for folder in _folders(root, subtask):
            for path in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz"):
                if path.is_file():
                    return path
    return None


def recam_files(
    data_dir: Path | None, subtask: int, part: str, *, intersection: bool = False, train_subtask: int | None = None
) -> list[Path]:
    """Files of a part of a subtask.

    Looked for are the names of the publication and of its repository's folders, those of a mirror of it with the labels
    of the tests (`Task_1_test_with_labels.jsonl`), and those of a flat folder (`task1_dev.jsonl`, ...), all also with
    `.gz`. Training takes the training file and the trial file; where the former is missing, the trial file and the
    labelled test. The test is the labelled test, unless it is used in training, and otherwise the development file.

    Args:
        data_dir: Folder of the files or a copy of the repository; `$ZOO_DATA/recam_semeval2021_task4` by default.
        subtask: 1 (imperceptible words) or 2 (unspecific words).
        part: "train", "validation", "test", or "predict" (the test without labels).
        intersection: Whether training takes the trial questions that are of both subtasks, too.
        train_subtask: The subtask that is trained on, by default the same; another one leaves the labelled test free.

    Raises:
        FileNotFoundError: If there is no folder or no such file; the message says what to put where.
        ValueError: If the subtask or the part is none.
    """
    if subtask not in SUBTASKS:
        more = "; subtask 3 trains on one of them and tests on the other" if subtask == 3 else ""
        raise ValueError(f"subtask {subtask!r}, expected 1 or 2{more}")
    if part not in PARTS:
        raise ValueError(f"part {part!r}, expected one of {', '.join(PARTS)}")
    names = _names(subtask)
    roles = {
        "train": ["train", "trial"],
        "validation": ["dev"],
        "test": ["dev"],
        "predict": ["unlabelled test"],
    }[part]
    way_out = _way_out([names[role][0] for role in roles])
    root = _root(data_dir, way_out)
    found = {role: _find(root, subtask, role) for role in names}
    if part == "train":
        roles = ["train", "trial"] if found["train"] else ["trial", "labelled test"]
        roles += ["intersection"] if intersection else []
    elif part == "test" and found["labelled test"] and (found["train"] or train_subtask not in (None, subtask)):
        roles = ["labelled test"]
    if intersection and part == "train" and found["intersection"] is None:
        raise FileNotFoundError(
            f"{root} has no file of intersection questions; {_way_out(names['intersection'][:1])}; or train without "
            "them: --data.intersection false"
        )
    files = [path for role in roles if (path := found[role]) is not None]
    if not files:
        raise FileNotFoundError(f"{root} has no file for {part} of subtask {subtask}; {way_out}")
    return files


def read_recam(
    data_dir: Path | None, subtask: int, part: str, intersection: bool = False, train_subtask: int | None = None
) -> ClozeRows | None:
    """Questions of a part of a subtask.

    Args:
        data_dir: See `recam_files`.
        subtask: See `recam_files`.
        part: See `recam_files`.
        intersection: See `recam_files`.
        train_subtask: See `recam_files`.

    Returns:
        None for a test that would be the development file again, and for questions to predict where there are none.

    Raises:
        FileNotFoundError: If there is no folder, or no file to train or to validate on.
        ValueError: If a file is malformed.
    """
    try:
        files = recam_files(data_dir, subtask, part, intersection=intersection, train_subtask=train_subtask)
    except FileNotFoundError:
        if part != "predict":
            raise
        return None
    if part == "test" and files == recam_files(data_dir, subtask, "validation"):
        return None
    name = f"ReCAM subtask {subtask} {part}"
    rows = [read_cloze(path, num_options=_OPTIONS, part=name) for path in files]
    return ClozeRows.concatenate(rows, name)


def passages(data_dir: Path | None) -> list[str]:
    """All distinct passages of all files, for pre-training; those of the tests are among them, their labels not.

    Args:
        data_dir: See `recam_files`.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If a file is malformed.
    """
    names = _names(1)
    root = _root(data_dir, way_out := _way_out([names["train"][0]]))
    found = [_find(root, subtask, role) for subtask in SUBTASKS for role in _names(subtask)]
    files = list(dict.fromkeys(path for path in found if path is not None))
    if not files:
        raise FileNotFoundError(f"{root} has no file of ReCAM; {way_out}")
    distinct: dict[str, str] = {}
    for path in files:
        for text in read_cloze(path, num_options=_OPTIONS, part="passages").articles:
            distinct.setdefault(article_key(text), text)
    return list(distinct.values())
