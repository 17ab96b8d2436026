"""The safetensors format against the safetensors library, and files that are whole or absent."""

from __future__ import annotations

import errno
import io
import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from zoo.merging.safetensors_stream import DTYPES, SafetensorsWriter, read_header

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

ODD = {
    "weight": torch.randn(3, 4),
    "transposed": torch.randn(4, 3).t(),
    "half": torch.randn(5).bfloat16(),
    "flag": torch.tensor([True, False, True]),
    "count": torch.tensor(7),
    "nothing": torch.empty(0, 4),
    "gerät": torch.randn(2, 1, 3, dtype=torch.float64),
}


def layout(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def write(path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    with SafetensorsWriter(path, layout(tensors), metadata) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])


def raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, dtype: str = "F32", shape: object = None) -> dict[str, object]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def test_the_library_reads_what_the_writer_wrote_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.safetensors"
    write(path, ODD, made_by="hand")
    found = load_file(path)
    assert found.keys() == ODD.keys()
    for name, tensor in ODD.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "made_by": "hand"}
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_every_supported_type_survives_the_trip_through_the_library(tmp_path: Path) -> None:
    tensors = {code: torch.tensor([0, 1, 1]).to(dtype) for code, dtype in DTYPES.items()}
    path = tmp_path / "all.safetensors"
    write(path, tensors)
    assert all(torch.equal(value, tensors[name]) for name, value in load_file(path).items())
    slots, _ = read_header(path)
    # A reader that maps the file needs each number at a multiple of its size.
    assert all(slot.offset % slot.dtype.itemsize == 0 for slot in slots.values())


def test_headers_of_the_library_say_where_the_tensors_lie(tmp_path: Path) -> None:
    path = tmp_path / "theirs.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in ODD.items()}
    save_file(tensors, path, {"format": "pt"})
    slots, metadata = read_header(path)
    assert metadata == {"format": "pt"} and slots.keys() == tensors.keys()
    data = path.read_bytes()
    for name, tensor in tensors.items():
        slot = slots[name]
        assert (slot.dtype, slot.shape) == (tensor.dtype, tuple(tensor.shape))
        expected = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert data[slot.offset : slot.offset + len(expected)] == expected


def test_a_file_that_was_not_finished_leaves_the_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    write(path, {"a": torch.ones(2)})
    writer = SafetensorsWriter(path, {"a": (torch.float32, (2,)), "b": (torch.float32, (3,))})
    with pytest.raises(ValueError, match="1 tensors were never written: b"), writer:
        writer.write("a", torch.zeros(2))
    with pytest.raises(ZeroDivisionError), writer:
        assert 1 / 0
    assert torch.equal(load_file(path)["a"], torch.ones(2))
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_a_full_disk_is_reported_with_the_name_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    writer = SafetensorsWriter(tmp_path / "out.safetensors", layout(ODD))
    writer._temporary.touch()
    monkeypatch.setattr("pathlib.Path.open", lambda *_: Full())
    with pytest.raises(OSError, match=r"No space left on device.*out\.safetensors") as caught:
        writer.__enter__()
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_a_tensor_must_be_as_announced(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "out.safetensors", {"a": (torch.float32, (2, 3))})
    good = torch.ones(2, 3)
    with pytest.raises(ValueError, match="inside a with statement"):
        writer.write("a", good)
    with writer:
        with pytest.raises(
            ValueError, match=r"'a' came as torch.float64 \(2, 3\), the layout says torch.float32 \(2, 3"
        ):
            writer.write("a", good.double())
        with pytest.raises(ValueError, match=r"came as torch.float32 \(3, 2\)"):
            writer.write("a", good.t())
        with pytest.raises(ValueError, match="'b' is not in the layout"):
            writer.write("b", good)
        writer.write("a", good)
        with pytest.raises(ValueError, match="'a' was written before"):
            writer.write("a", good)


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"merged.bin: merged weights are written as .safetensors"):
        SafetensorsWriter(tmp_path / "merged.bin", {})
    with pytest.raises(ValueError, match=r"'a' is torch\.float8_e4m3fn"):
        SafetensorsWriter(tmp_path / "out.safetensors", {"a": (torch.float8_e4m3fn, (1,))})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"not json", b"", "its header is not JSON"),
        (b"\xff\xfe{}", b"", "its header is not JSON"),
        (b"[1]", b"", "its header holds no names"),
        ({"a": entry(0, 8)}, b"1234", "cut short"),
        ({"a": entry(0, 8)}, b"1" * 12, "followed by something else"),
        ({"a": entry(4, 8)}, b"1" * 8, "'a' starts at byte"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, b"1" * 12, "'b' starts at byte"),
        ({"a": entry(0, 8), "b": entry(12, 16)}, b"1" * 16, "'b' starts at byte"),
        ({"a": entry(0, 8, shape=[3])}, b"1" * 8, "'a' takes 8 bytes, its shape 12"),
        ({"a": entry(0, 8, shape=[-2])}, b"1" * 8, "entry of 'a'"),
        ({"a": entry(0, 8, shape="2")}, b"1" * 8, "entry of 'a'"),
        ({"a": {"dtype": "F32"}}, b"", "entry of 'a'"),
        ({"a": 3}, b"", "entry of 'a'"),
        ({"a": entry(0, 2, dtype="F8_E4M3", shape=[2])}, b"12", "'a' is stored as F8_E4M3, expected one of F64"),
    ],
)
def test_damaged_files_are_named_with_what_is_wrong(tmp_path: Path, header: object, data: bytes, message: str) -> None:
    path = raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(ValueError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"1234", b"x" * 100, (10**15).to_bytes(8, "little"), b"\x09" + bytes(7) + b"{}"]
)
def test_other_files_are_no_safetensors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="no safetensors file, or one that was cut short"):
        read_header(path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "whole.safetensors"
    write(path, ODD)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"whole\.safetensors"):
            read_header(path)
