"""Merging coefficients on disk, with the names of their layers and tasks."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from zoo.merging.constraints import MergingCoefficients

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_NAME = "coefficients"
_ABOUT = ("granularity", "preprocess", "density")


class SavedCoefficients(NamedTuple):
    """Merging coefficients and what they belong to.

    Attributes:
        values: `(L, K)`.
        layer_names: L names.
        task_names: K names.
        about: `granularity`, `preprocess` and `density` of the task vectors that they are for, where known.
        path: The file.
    """

    values: Tensor
    layer_names: list[str]
    task_names: list[str]
    about: dict[str, Any]
    path: str

    def select(self, layer_names: Sequence[str], task_names: Sequence[str]) -> Tensor:
        """The coefficients `(L, K)` in the order of some layers and tasks.

        Raises:
            ValueError: If one of them is not there.
        """
        for what, wanted, there in (
            ("layer", layer_names, self.layer_names),
            ("task", task_names, self.task_names),
        ):
            missing = [name for name in wanted if name not in there]
            if missing:
                raise ValueError(
                    f"{self.path} has no {what} {missing[0]!r} ({len(missing)} missing): it has {_some(there)}; "
                    f"expected {_some(wanted)}"
                )
        rows = torch.tensor([self.layer_names.index(name) for name in layer_names])
        return self.values[rows][:, torch.tensor([self.task_names.index(name) for name in task_names])]


def save_coefficients(
    path: str | Path,
    coef: Tensor,
    layer_names: Sequence[str],
    task_names: Sequence[str],
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write coefficients as a safetensors file.

    Args:
        path: The file; its folder is made if missing.
        coef: `(L, K)`.
        layer_names: L names.
        task_names: K names.
        about: Plain values, see `SavedCoefficients`.
    """
    names = {"layers": list(layer_names), "tasks": list(task_names), "about": dict(about or {})}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    metadata = {key: json.dumps(value) for key, value in names.items()}
    save_file({_NAME: coef.detach().cpu().contiguous()}, Path(path), metadata=metadata)


def load_coefficients(path: str | Path) -> SavedCoefficients:
    """Read the coefficients of a file of `save_coefficients`, or of a checkpoint of `AdaMerging`.

    Args:
        path: The file; a checkpoint ends with .ckpt.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not one of coefficients, or their shape is not that of its names.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} is missing: expected coefficients of AdaMerging.export_coefficients, or a checkpoint of AdaMerging"
        )
    found = _from_checkpoint(file) if file.suffix == ".ckpt" else _from_safetensors(file)
    expected = (len(found.layer_names), len(found.task_names))
    if tuple(found.values.shape) != expected:
        hint = ". This one is transposed: save coef.T" if tuple(found.values.T.shape) == expected else ""
        raise ValueError(
            f"{path} has coefficients of shape {tuple(found.values.shape)} for the {expected[0]} layers "
            f"{_some(found.layer_names)} and the {expected[1]} tasks {_some(found.task_names)}{hint}"
        )
    return found


def _from_safetensors(file: Path) -> SavedCoefficients:
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            layers, tasks = json.loads(metadata["layers"]), json.loads(metadata["tasks"])
            about = json.loads(metadata.get("about", "{}"))
            return SavedCoefficients(opened.get_tensor(_NAME), layers, tasks, about, str(file))
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{file} is no file of coefficients with the names of layers and tasks: {error}") from error


def _from_checkpoint(file: Path) -> SavedCoefficients:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        raw = content["state_dict"]["coefficients_.raw"]
        names, settings = content["merging"], content["hyper_parameters"]
        coefficients = MergingCoefficients(raw.shape[0], raw.shape[1], constraint=settings["constraint"])
    except (KeyError, RuntimeError, EOFError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{file} is no checkpoint of AdaMerging: {error!r}") from error
    coefficients.raw.data.copy_(raw)
    about = {key: settings.get(key) for key in _ABOUT}
    return SavedCoefficients(
        coefficients().detach(), list(names["layer_names"]), list(names["merge_tasks"]), about, str(file)
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(list(names)[:5]) + (", ..." if len(names) > 5 else "")
