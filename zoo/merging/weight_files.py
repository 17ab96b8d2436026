"""Files and folders of weights, opened without reading their tensors."""

from __future__ import annotations

import json
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from zoo.merging.safetensors_stream import read_header

_TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
FILE_SUFFIXES = (".safetensors", ".index.json", *_TORCH_SUFFIXES)


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor that is read when it is asked for.

    Args:
        shape: Its shape.
        dtype: Its type.
        read: Returns it; of a tensor in memory, the tensor itself, which is not to be written to.
        storage: What tensors that are one and the same have in common, None where that is not known.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    storage: Hashable = None


def memory_tensors(tensors: Mapping[str, object], label: str) -> dict[str, StoredTensor]:
    """Entries of a state dict.

    Args:
        tensors: Tensors by name; extra states of modules are passed over.
        label: What messages call it.

    Raises:
        ValueError: If a value is no plain tensor with values.
    """
    return {name: _in_memory(tensor) for name, tensor in _plain(tensors, label).items()}


def open_file(path: Path) -> dict[str, StoredTensor]:
    """Entries of a `.safetensors` file, a `.index.json` of shards, or a file of `torch.save`.

    Files are looked at, never executed: what `torch.load(weights_only=True)` refuses is refused. Only files in the
    format of torch < 1.6 are read as a whole.

    Raises:
        FileNotFoundError: If the file or one of its shards is missing.
        ValueError: If it is damaged, of another kind, or holds something else than weights.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.suffix == ".safetensors":
        return _safetensors_file(path)
    if path.name.endswith(".index.json"):
        return _shards(path)
    if path.suffix in _TORCH_SUFFIXES:
        return _torch_file(path)
    raise ValueError(
        f"{path}: unknown kind of weights, expected a name that ends in one of {', '.join(FILE_SUFFIXES)}, or a folder"
    )


class _RawFile:
    """A file whose tensors are read by their place.

    Reading into fresh memory rather than mapping the file: pages of a mapping would stay with the process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp = self._identity(path)

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int, stride: tuple[int, ...] = ()) -> Tensor:
        """The tensor whose first number is at byte `offset`, contiguous if it has no `stride`."""
        if 0 in shape:
            return torch.empty(shape, dtype=dtype)
        if stride:
            count = 1 + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
            return self.tensor(dtype, (count,), offset).as_strided(shape, stride).contiguous()
        tensor = torch.empty(shape, dtype=dtype)
        buffer = tensor.reshape(-1).view(torch.uint8).numpy().data
        with self.path.open("rb", buffering=0) as file:
            file.seek(offset)
            done = 0
            while done < len(buffer):
                read = file.readinto(buffer[done:])
                if not read:
                    break
                done += read
        if done < len(buffer) or self._identity(self.path) != self._stamp:
            raise ValueError(f"{self.path}: the file has changed since it was opened; open it again")
        return tensor

    @staticmethod
    def _identity(path: Path) -> tuple[int, int, int]:
        found = path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns


def _plain(tensors: Mapping[str, object], label: str) -> dict[str, Tensor]:
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(name, str) and name.endswith("_extra_state"):
            continue
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{label}: no state dict: {name!r} is a {type(tensor).__name__}, expected a tensor")
        # Eight-bit floats, too: they mean nothing without scales that are kept elsewhere.
        small = tensor.is_floating_point() and tensor.element_size() == 1
        if tensor.layout is not torch.strided or tensor.is_quantized or small:
            raise ValueError(f"{label}: {name!r} is sparse or quantised ({tensor.dtype}); save it as ordinary numbers")
        plain[name] = tensor.detach()
    return plain


def _in_memory(tensor: Tensor) -> StoredTensor:
    # Not the address of the data: on the meta device all have the same.
    place = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.stride())
    storage = (*place, tensor.dtype, tuple(tensor.shape)) if tensor.numel() else None
    return StoredTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor, storage)


def _safetensors_file(path: Path) -> dict[str, StoredTensor]:
    slots, metadata = read_header(path)
    raw = _RawFile(path)
    entries = {
        name: StoredTensor(slot.shape, slot.dtype, partial(raw.tensor, slot.dtype, slot.shape, slot.offset))
        for name, slot in slots.items()
    }
    # safetensors' own save_model notes there which names it left out because they are another's tensor.
    entries.update({name: entries[kept] for name, kept in metadata.items() if kept in slots and name not in slots})
    return entries


def _shards(index: Path) -> dict[str, StoredTensor]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        homes = {str(name): str(home) for name, home in places.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: no index of shards (no readable weight_map)") from error
    opened: dict[str, dict[str, StoredTensor]] = {}
    for home in dict.fromkeys(homes.values()):
        if Path(home).name != home or home.endswith(".index.json"):
            raise ValueError(f"{index}: names {home!r} as a shard, expected a file beside it")
        if not (index.parent / home).is_file():
            raise FileNotFoundError(f"{index.parent / home}: this shard is missing; {index.name} names it")
        opened[home] = open_file(index.parent / home)
    for name, home in homes.items():
        if name not in opened[home]:
            raise ValueError(f"{index.parent / home}: {name!r} is not in it, though {index.name} says so")
    return {name: opened[home][name] for name, home in homes.items()}


def _torch_file(path: Path) -> dict[str, StoredTensor]:
    lazy = zipfile.is_zipfile(path) and _readable_in_place(path)
    try:
        # On the meta device a tensor has no values, but knows where in the file they lie.
        found = torch.load(path, map_location="meta" if lazy else "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refusal(path, error) from error
    except Exception as error:  # a reader led astray by foreign bytes fails in any way
        if "TorchScript" in str(error):
            raise ValueError(f"{path}: a TorchScript program, not weights. {_HOW_TO_SAVE}") from error
        raise ValueError(f"{path}: no file of torch.save, or a damaged one ({_first_line(error)})") from error
    tensors = _plain(_state_dict(found, path), str(path))
    if not lazy:
        return {name: _in_memory(tensor) for name, tensor in tensors.items()}
    raw = _RawFile(path)
    return {name: _in_file(name, tensor, raw) for name, tensor in tensors.items()}


_HOW_TO_SAVE = (
    'Save a state dict where the model can be loaded: torch.save(model.state_dict(), "weights.pt"), or '
    'safetensors.torch.save_model(model, "weights.safetensors").'
)


def _refusal(path: Path, error: pickle.UnpicklingError) -> ValueError:
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    if found is None:
        return ValueError(f"{path}: no file of torch.save, or a damaged one ({path.stat().st_size:,} bytes)")
    return ValueError(
        f"{path}: refused, because it holds objects other than tensors and plain values, which could run code when "
        f"loaded ({found[1]}; a whole pickled model is such an object). {_HOW_TO_SAVE}"
    )


def _readable_in_place(path: Path) -> bool:
    """Whether an archive's tensors lie in it as they are in memory, as torch.save writes them."""
    try:
        with zipfile.ZipFile(path) as archive:
            orders = [archive.read(name) for name in archive.namelist() if name.endswith("/byteorder")]
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, RuntimeError) as error:
        raise ValueError(f"{path}: no file of torch.save, or a damaged one ({_first_line(error)})") from error
    return stored and orders in ([], [sys.byteorder.encode()])


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".:") if text else type(error).__name__


def _state_dict(found: object, path: Path) -> Mapping[str, object]:
    if isinstance(found, Mapping):
        inner = found.get("state_dict")
        if isinstance(inner, Mapping):
            return inner
        if any(isinstance(value, Tensor) for value in found.values()):
            return found
        keys = [str(key) for key in found]
        shown = ", ".join(keys[:10]) + (", ..." if len(keys) > 10 else "") if keys else "nothing"
        nested = [str(key) for key, value in found.items() if isinstance(value, Mapping)]
        way = f' Pass torch.load(path, weights_only=True)["{nested[0]}"] if that is it.' if nested else ""
        raise ValueError(f"{path}: no state dict, nor a checkpoint with one under 'state_dict'; it holds {shown}.{way}")
    raise ValueError(f"{path}: holds a {type(found).__name__}, expected a state dict. {_HOW_TO_SAVE}")


def _in_file(name: str, tensor: Tensor, raw: _RawFile) -> StoredTensor:
    begin = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if begin is None:
        raise ValueError(f"{raw.path}: {name!r} was saved from the meta device, without values")
    offset = begin + tensor.storage_offset() * tensor.element_size()
    shape, stride = tuple(tensor.shape), () if tensor.is_contiguous() else tensor.stride()
    read = partial(raw.tensor, tensor.dtype, shape, offset, stride)
    storage = (offset, tensor.dtype, shape, tensor.stride()) if tensor.numel() else None
    return StoredTensor(shape, tensor.dtype, read, storage)
