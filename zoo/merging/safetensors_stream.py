"""The safetensors format, tensor by tensor: headers checked and tensors written one at a time."""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType
    from typing import BinaryIO

    from torch import Tensor

# Eight-bit floats are not among them: their values mean nothing without scales that are kept elsewhere.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000


class Slot(NamedTuple):
    """Where a tensor lies in a file; `offset` counts bytes from the file's start."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


def read_header(path: Path) -> tuple[dict[str, Slot], dict[str, str]]:
    """Read what a safetensors file holds, without its tensors.

    Args:
        path: The file.

    Returns:
        The tensors' places by name, in the order of the header, and the file's metadata.

    Raises:
        ValueError: If the file is cut short, is no safetensors file, or holds a type of numbers that is not supported.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"{path}: no safetensors file, or one that was cut short ({size:,} bytes)")
        text = file.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no safetensors file (its header is not JSON)") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: no safetensors file (its header holds no names)")
    metadata = header.pop("__metadata__", None) or {}
    slots = {name: _slot(path, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for name, slot in sorted(slots.items(), key=lambda item: (item[1].offset, _nbytes(item[1]))):
        if slot.offset != end:
            raise ValueError(f"{path}: damaged header, {name!r} starts at byte {slot.offset:,}, expected {end:,}")
        end += _nbytes(slot)
    if end != size:
        kind = "cut short" if size < end else "followed by something else"
        raise ValueError(f"{path}: {kind}: {size:,} bytes where its header speaks of {end:,}. Copy it again.")
    return slots, {str(key): str(value) for key, value in metadata.items()}


class SafetensorsWriter:
    """Writes a safetensors file of which one tensor at a time is in memory.

    Used as a context manager. Tensors come in any order. They go to a temporary file beside the place, which is renamed
    when all have come, so that a file under the final name is always whole.

    Example:
        >>> with SafetensorsWriter("out.safetensors", {"weight": (torch.float32, (2, 3))}) as writer:
        ...     writer.write("weight", torch.zeros(2, 3))

    Args:
        path: The final name, ending in `.safetensors`. Missing folders are made.
        layout: Type and shape of every tensor, by name.
        metadata: Texts by name; `format: pt`, which transformers asks for, is added.

    Raises:
        ValueError: If the name has another ending, or a type cannot be stored.
    """

    def __init__(
        self,
        path: str | Path,
        layout: Mapping[str, tuple[torch.dtype, Sequence[int]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        if self.path.suffix != ".safetensors":
            raise ValueError(f"{self.path}: merged weights are written as .safetensors; choose a name that ends so")
        for name, (dtype, _) in layout.items():
            if dtype not in _CODES:
                raise ValueError(f"{self.path}: {name!r} is {dtype}, which safetensors files here do not store")
        texts = {"format": "pt", **(metadata or {})}
        header: dict[str, object] = {"__metadata__": texts}
        relative: dict[str, Slot] = {}
        end = 0
        # Wide types first, as the library does: readers that map the file need aligned numbers.
        for name, (dtype, shape) in sorted(layout.items(), key=lambda item: -item[1][0].itemsize):
            slot = Slot(dtype, tuple(shape), end)
            end += _nbytes(slot)
            header[name] = {"dtype": _CODES[dtype], "shape": list(slot.shape), "data_offsets": [slot.offset, end]}
            relative[name] = slot
        text = json.dumps(header, ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._start = len(text).to_bytes(8, "little") + text
        self._slots = {name: slot._replace(offset=len(self._start) + slot.offset) for name, slot in relative.items()}
        self._left = dict.fromkeys(layout)
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self._file: BinaryIO | None = None

    def __enter__(self) -> SafetensorsWriter:
        """Open the temporary file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._temporary.open("wb")
        try:
            self._put(self._start, 0)
        except OSError as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor.

        Args:
            name: One of the layout, not written before.
            tensor: Of the announced type and shape, on any device.

        Raises:
            ValueError: If the layout says otherwise.
            OSError: If the disk refuses it, most often because it is full.
        """
        if name not in self._left:
            why = "was written before" if name in self._slots else "is not in the layout"
            raise ValueError(f"{self.path}: {name!r} {why}")
        slot = self._slots[name]
        if tensor.dtype != slot.dtype or tuple(tensor.shape) != slot.shape:
            raise ValueError(
                f"{self.path}: {name!r} came as {tensor.dtype} {tuple(tensor.shape)}, the layout says {slot.dtype} "
                f"{slot.shape}"
            )
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._put(flat.numpy().data, slot.offset)
        del self._left[name]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Rename the file if it is whole, remove it otherwise."""
        file, self._file = self._file, None
        assert file is not None
        try:
            with file:
                if kind is None:
                    if self._left:
                        missing = ", ".join(list(self._left)[:10])
                        raise ValueError(f"{self.path}: {len(self._left)} tensors were never written: {missing}")
                    file.flush()
                    os.fsync(file.fileno())
            if kind is None:
                os.replace(self._temporary, self.path)
        finally:
            with suppress(FileNotFoundError):
                self._temporary.unlink()

    def _put(self, data: bytes | memoryview, offset: int) -> None:
        if self._file is None:
            raise ValueError(f"{self.path}: a SafetensorsWriter is used inside a with statement")
        try:
            self._file.seek(offset)
            self._file.write(data)
        except OSError as error:
            raise OSError(error.errno, f"could not be written ({error.strerror})", str(self.path)) from error


def _nbytes(slot: Slot) -> int:
    return math.prod(slot.shape) * slot.dtype.itemsize


def _slot(path: Path, name: str, entry: object, start: int) -> Slot:
    try:
        if not isinstance(entry, dict):
            raise TypeError("no entry")
        code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)):
            raise TypeError("no whole numbers")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged header, the entry of {name!r} cannot be read") from error
    if code not in DTYPES:
        raise ValueError(
            f"{path}: {name!r} is stored as {code}, expected one of {', '.join(DTYPES)}. Save the weights anew without "
            "quantisation."
        )
    slot = Slot(DTYPES[code], tuple(shape), start + begin)
    if end - begin != _nbytes(slot):
        raise ValueError(f"{path}: damaged header, {name!r} takes {end - begin:,} bytes, its shape {_nbytes(slot):,}")
    return slot
