"""One base and its experts on disk: what a fine-tuning run leaves and what a merging run takes."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.merging.backbones import save_encoder
from zoo.merging.heads import save_heads

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import nn

    from zoo.merging.backbones import ImageEncoder

_LIST = "experts.json"


@dataclass(frozen=True)
class ExpertFolder:
    """A folder of experts.

        experts.json           the tasks, in order
        pretrained/            the base, as `save_encoder` writes it
        experts/<number>/      the expert of each task, likewise
        joint/                 optional: one encoder trained on all tasks
        heads.safetensors      the heads of all tasks

    Attributes:
        root: The folder.
        experts: By task, the folder of its expert.
    """

    root: Path
    experts: dict[str, Path]

    @property
    def pretrained(self) -> Path:
        """The base."""
        return self.root / "pretrained"

    @property
    def heads(self) -> Path:
        """The heads of all tasks."""
        return self.root / "heads.safetensors"

    @property
    def joint(self) -> Path | None:
        """The encoder trained on all tasks, if there is one."""
        folder = self.root / "joint"
        return folder if folder.is_dir() else None


def is_expert_folder(path: str | Path) -> bool:
    """Whether a path is a folder that `write_expert_folder` wrote."""
    return (Path(path).expanduser() / _LIST).is_file()


def read_expert_folder(path: str | Path, tasks: Sequence[str] | None = None) -> ExpertFolder:
    """Find the experts in a folder.

    Args:
        path: The folder, or one with such a folder `experts` in it, as a run's folder has.
        tasks: The experts to take; all by default.

    Raises:
        FileNotFoundError: If the folder, or something in it, is missing.
        ValueError: If a task has no expert there.
    """
    given = Path(path).expanduser()
    root = next((folder for folder in (given, given / "experts") if is_expert_folder(folder)), None)
    if root is None:
        raise FileNotFoundError(
            f"{path} is no folder of experts: {_LIST} is missing. `python train.py --model TaskExperts ...` leaves one "
            "in its run's folder; experts from elsewhere are given one by one, as a mapping from tasks to paths"
        )
    try:
        listed: list[str] = json.loads((root / _LIST).read_text(encoding="utf-8"))["tasks"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{root / _LIST} is not a list of tasks: {error}") from error
    experts = {task: root / "experts" / str(number) for number, task in enumerate(listed)}
    missing = [task for task in tasks or [] if task not in experts]
    if missing:
        raise ValueError(
            f"{root} has no expert of {', '.join(missing)}: it has {', '.join(listed)}. Choose among them with "
            "merge_tasks"
        )
    folder = ExpertFolder(root, {task: experts[task] for task in tasks or listed})
    for needed in (folder.pretrained, *folder.experts.values(), folder.heads):
        if not needed.exists():
            raise FileNotFoundError(f"{needed} is missing: {root} is not complete")
    return folder


def write_expert_folder(
    root: str | Path,
    pretrained: ImageEncoder,
    experts: Iterable[tuple[str, ImageEncoder]],
    heads: Mapping[str, nn.Module],
    joint: ImageEncoder | None = None,
    about: Mapping[str, Any] | None = None,
) -> ExpertFolder:
    """Write a base and its experts, completely or not at all.

    Args:
        root: The folder; one that is there is replaced.
        pretrained: The base.
        experts: Tasks and their encoders; drawn one by one, so that they need not exist side by side.
        heads: By task.
        joint: An encoder trained on all tasks.
        about: Plain values to note in the list, such as the settings of the training.
    """
    target = Path(root).expanduser()
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_encoder(pretrained, partial / "pretrained")
    names: list[str] = []
    for task, encoder in experts:
        save_encoder(encoder, partial / "experts" / str(len(names)))
        names.append(task)
    if joint is not None:
        save_encoder(joint, partial / "joint")
    save_heads(partial / "heads.safetensors", heads)
    (partial / _LIST).write_text(json.dumps({"tasks": names, "about": dict(about or {})}, indent=2), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return read_expert_folder(target)
