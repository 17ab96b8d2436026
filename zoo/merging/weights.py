"""Weights of one model from wherever they are, read one tensor at a time and known by fitting names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from zoo.merging.checkpoint_folders import fetch_folder, load_like, weights_in_folder
from zoo.merging.key_maps import KeyMap, map_names
from zoo.merging.lora import adapted_tensors, is_adapter, open_adapter
from zoo.merging.matching import is_statistic, match_weights
from zoo.merging.weight_files import StoredTensor, memory_tensors, open_file

if TYPE_CHECKING:
    from collections.abc import Hashable

__all__ = ["KeyMap", "Source", "Weights", "is_statistic", "match_weights", "open_weights"]

Source = nn.Module | Mapping[str, Tensor] | str | Path
"""A module, a state dict, or the path of a file or folder."""


class Weights(Mapping[str, Tensor]):
    """Named tensors of one model, read when they are asked for.

    `weights[name]` is the tensor: freshly read where it lies in a file, otherwise the very tensor in memory, which is
    not to be written to.

    Args:
        entries: The tensors by name, in the order of the source.
        label: What messages call the weights.
    """

    tied: dict[str, str]
    """Names that are another name's very tensor, and that name: the first of them in the source's order."""

    def __init__(self, entries: Mapping[str, StoredTensor], label: str) -> None:
        self.entries = dict(entries)
        self.label = label
        self.tied = {}
        first: dict[Hashable, str] = {}
        for name, entry in self.entries.items():
            kept = first.setdefault(entry if entry.storage is None else entry.storage, name)
            if kept != name:
                self.tied[name] = kept

    @property
    def names(self) -> list[str]:
        """All names, in the order of the source."""
        return list(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read for it."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor, which is not read for it."""
        return self._entry(name).dtype

    def finite(self, name: str) -> Tensor:
        """`self[name]`, checked.

        Raises:
            ValueError: If it holds a NaN or an infinity.
        """
        tensor = self[name]
        # The extremes show both in one pass and without a copy.
        if tensor.is_floating_point() and tensor.numel() and not all(map(torch.isfinite, tensor.aminmax())):
            nan, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
            raise ValueError(
                f"{self.label}: {name!r} holds {nan} NaN and {infinite} infinite of {tensor.numel():,} values; use a "
                "checkpoint from before the training diverged"
            )
        return tensor

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor.

        Raises:
            KeyError: If there is none of that name.
            ValueError: If it is on the meta device, which keeps no values.
        """
        tensor = self._entry(name).read()
        if tensor.is_meta:
            raise ValueError(f"{self.label}: {name!r} is on the meta device, without values; load the weights first")
        return tensor

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self.entries)

    def __len__(self) -> int:
        """How many names."""
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of that name; it is not read for it."""
        return name in self.entries

    def _entry(self, name: str) -> StoredTensor:
        try:
            return self.entries[name]
        except KeyError:
            raise KeyError(f"{self.label}: there is no tensor {name!r}") from None


def open_weights(
    source: Source,
    label: str,
    *,
    key_map: KeyMap = "auto",
    base: Weights | None = None,
    model: nn.Module | None = None,
) -> Weights:
    """Open the weights of a model.

    Args:
        source: A module; a state dict; a file (`.safetensors`, the `.index.json` of its shards, or one of `torch.save`:
            a state dict, or a Lightning checkpoint with one); a folder of transformers' `save_pretrained`, or the hub
            id of one; a folder with a LoRA adapter of peft.
        label: What messages call it, such as "pretrained" or "expert mnist".
        key_map: How its names become those of `base` or `model`; see `map_names`. A module opened without these keeps
            its names. A function is applied to the names of the file, of an adapter to those of the adapted tensors.
        base: The pre-trained weights, for an expert: its names are fitted to theirs, and an adapter is added to them.
        model: A module that the weights are for. Names are fitted to its own, where there is no `base`. Where a folder
            lacks some of its names, the folder is loaded by `type(model).from_pretrained`, as a whole: some models,
            such as ViT, have other names on disk than in memory.

    Returns:
        The weights. Nothing is read yet, but for what the cases above say.

    Raises:
        FileNotFoundError: If there is no such file, or it lacks a shard.
        ValueError: If it is damaged, cannot be read without running code from it, or does not fit `base`.
    """
    reference = base
    if reference is None and model is not None:
        reference = Weights(memory_tensors(model.state_dict(), "model"), "model")
    if isinstance(source, nn.Module) and reference is None and key_map == "auto":
        # `functional_call` needs a module's own names, wrappers and all.
        key_map = "none"
    if not isinstance(source, (str, Path)):
        return _fitted(_in_memory(source, label), label, label, key_map, reference)
    path = Path(source).expanduser()
    if not path.exists():
        path = fetch_folder(source)
    if not path.is_dir():
        return _fitted(open_file(path), label, str(path), key_map, reference)
    if is_adapter(path):
        if base is None:
            raise ValueError(f"{label}: {path} holds a LoRA adapter, which is an expert only together with its base")
        adapter = open_adapter(path)
        names = map_names(adapter, key_map, base.entries, str(path))
        return Weights(adapted_tensors(adapter, names, base.entries, str(path)), label)
    weights = _fitted(open_file(weights_in_folder(path)), label, str(path), key_map, reference)
    if key_map == "auto" and reference is not None and model is not None and _lacking(weights, reference):
        loaded = load_like(path, model)
        if loaded is not None:
            other = _fitted(loaded, label, str(path), key_map, reference)
            return other if _lacking(other, reference) < _lacking(weights, reference) else weights
    return weights


def _in_memory(source: nn.Module | Mapping[str, Tensor], label: str) -> dict[str, StoredTensor]:
    if isinstance(source, Weights):
        return source.entries
    if isinstance(source, nn.Module):
        return memory_tensors(source.state_dict(), label)
    if isinstance(source, Mapping):
        return memory_tensors(source, label)
    raise ValueError(f"{label}: a {type(source).__name__} holds no weights, expected a module, a state dict or a path")


def _fitted(
    entries: Mapping[str, StoredTensor], label: str, origin: str, key_map: KeyMap, reference: Weights | None
) -> Weights:
    adapted = next((name for name in entries if ".lora_A." in name or ".lora_embedding_A" in name), None)
    if adapted is not None:
        raise ValueError(
            f"{origin}: {adapted!r} belongs to a LoRA adapter; give the folder of its save_pretrained, or the model of "
            "merge_and_unload()"
        )
    names = map_names(entries, key_map, None if reference is None else reference.entries, origin)
    known = {new: entries[name] for name, new in names.items()}
    if reference is not None:
        # Files keep one of several tied names, and not always the same one.
        for alias, kept in reference.tied.items():
            for name, other in ((alias, kept), (kept, alias)):
                if name not in known and other in known:
                    known[name] = known[other]
    return Weights(known, label)


def _lacking(weights: Weights, reference: Weights) -> int:
    return sum(name not in weights for name in reference if reference.dtype(name).is_floating_point)
