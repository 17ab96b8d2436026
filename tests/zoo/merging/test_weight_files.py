"""Files and folders of weights: read in place, checked, never executed."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from zoo.merging.checkpoint_folders import fetch_folder
from zoo.merging.weight_files import open_file
from zoo.merging.weights import Weights, open_weights

if TYPE_CHECKING:
    from torch import Tensor

SHARED = torch.randn(6, 4)
TENSORS = {
    "a": SHARED,
    "b": SHARED.t(),
    "rows": SHARED[2:, 1:3],
    "half": torch.randn(5, 2).half(),
    "count": torch.tensor(3),
    "none": torch.empty(2, 0),
}
PLAIN = {name: tensor.clone().contiguous() for name, tensor in TENSORS.items()}


def same(weights: Weights, tensors: dict[str, Tensor]) -> None:
    assert weights.names == list(tensors)
    for name, tensor in tensors.items():
        assert weights.shape(name) == tuple(tensor.shape) and weights.dtype(name) == tensor.dtype
        found = weights[name]
        assert found.dtype == tensor.dtype and torch.equal(found, tensor) and found.is_contiguous(), name


def resident(what: str) -> int:
    """Bytes of this process in memory: `VmRSS` now, `VmHWM` at most since the last `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this system does not tell a process its peak memory")


def test_a_torch_file_is_read_in_place_views_and_all(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "w.pt")
    same(open_weights(tmp_path / "w.pt", "pretrained"), TENSORS)


def test_a_safetensors_file_is_read_in_place(tmp_path: Path) -> None:
    save_file(PLAIN, tmp_path / "w.safetensors")
    weights = open_weights(str(tmp_path / "w.safetensors"), "pretrained")
    same(weights, {name: PLAIN[name] for name in weights.names})
    assert sorted(weights) == sorted(PLAIN)


def test_a_file_of_old_torch_is_read_too(tmp_path: Path) -> None:
    torch.save(PLAIN, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    same(open_weights(tmp_path / "old.bin", "pretrained"), PLAIN)


def test_a_compressed_or_foreign_endian_archive_is_not_read_in_place(tmp_path: Path) -> None:
    torch.save(PLAIN, tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt") as old, zipfile.ZipFile(tmp_path / "z.pt", "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry.filename), zipfile.ZIP_DEFLATED)
    same(open_weights(tmp_path / "z.pt", "pretrained"), PLAIN)
    with zipfile.ZipFile(tmp_path / "w.pt") as old, zipfile.ZipFile(tmp_path / "big.pt", "w") as new:
        for entry in old.infolist():
            content = old.read(entry.filename)
            new.writestr(entry.filename, b"big" if entry.filename.endswith("byteorder") else content)
    swapped = PLAIN["a"].view(torch.uint8).view(6, 4, 4).flip(-1).contiguous().view(torch.float32)[..., 0]
    assert torch.equal(open_weights(tmp_path / "big.pt", "pretrained")["a"], swapped)


def test_a_lightning_checkpoint_gives_its_state_dict(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": PLAIN, "hyper_parameters": {"lr": 0.1}}, tmp_path / "last.ckpt")
    same(open_weights(tmp_path / "last.ckpt", "expert x"), PLAIN)


def test_extra_states_of_modules_are_passed_over(tmp_path: Path) -> None:
    torch.save({**PLAIN, "layer._extra_state": {"scale": 1}}, tmp_path / "w.pt")
    same(open_weights(tmp_path / "w.pt", "expert x"), PLAIN)


def test_a_pickled_model_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(
        ValueError, match=r"model.pt: refused.*torch.nn.modules.linear.Linear.*torch.save\(model.state_d"
    ):
        open_weights(tmp_path / "model.pt", "expert x")

    class Trap:
        def __reduce__(self) -> object:
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"a": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(ValueError, match=r"trap.pt: refused.*mkdir"):
        open_weights(tmp_path / "trap.pt", "expert x")
    assert not (tmp_path / "sprung").exists()


def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    # What torch.jit.save leaves, as far as torch.load looks.
    torch.save(PLAIN, tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt", "a") as archive:
        archive.writestr("w/constants.pkl", b"")
    with pytest.raises(ValueError, match=r"w.pt: a TorchScript program, not weights. Save a state dict"):
        open_weights(tmp_path / "w.pt", "expert x")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
def test_truncated_and_foreign_files_are_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        save_file(PLAIN, path)
    else:
        torch.save(PLAIN, path, _use_new_zipfile_serialization=suffix == ".pt")
    whole = path.read_bytes()
    for content in (whole[:-40], whole[: len(whole) // 2], whole[:1], b"", b"hello, this is text\n" * 20, whole[5:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"w{suffix}"):
            open_file(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, expected a state dict"),
        ({"epoch": 1}, "no state dict, nor a checkpoint with one under 'state_dict'; it holds epoch"),
        ({}, "it holds nothing"),
        ({"epoch": 1, "model": {"a": torch.ones(1)}}, r'weights_only=True\)\["model"\]'),
        ({"a": torch.ones(1), "b": 3}, "'b' is a int, expected a tensor"),
        ({"a": torch.ones(2, 2).to_sparse()}, "'a' is sparse or quantised"),
        ({"a": torch.ones(2).to(torch.float8_e4m3fn)}, "'a' is sparse or quantised .torch.float8_e4m3fn"),
        ({"a": torch.ones(2, device="meta")}, "'a' was saved from the meta device"),
    ],
)
def test_a_torch_file_must_hold_a_state_dict(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=message) as caught:
        open_weights(tmp_path / "w.pt", "expert x")
    assert str(tmp_path / "w.pt") in str(caught.value)


def test_a_file_that_changes_under_an_open_reader_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    weights = open_weights(path, "pretrained")
    assert not weights["a"].any()
    save_file({"a": torch.ones(100), "b": torch.ones(3)}, tmp_path / "other.safetensors")
    os.replace(tmp_path / "other.safetensors", path)
    with pytest.raises(ValueError, match=r"w.safetensors: the file has changed since it was opened"):
        weights["a"]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_reading_a_file_keeps_no_more_than_one_tensor_in_memory(tmp_path: Path, suffix: str) -> None:
    size, count = 8 << 20, 8
    path = tmp_path / f"w{suffix}"
    tensors = {f"layer.{i}": torch.full((size // 4,), float(i)) for i in range(count)}
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    del tensors
    weights = open_weights(path, "pretrained")
    weights.finite("layer.0")
    forget_peak()
    before = resident("VmRSS")
    for number, name in enumerate(weights):
        assert float(weights.finite(name).mean()) == number
    assert resident("VmHWM") - before < 1.5 * size


def test_tied_tensors_of_one_file_are_found(tmp_path: Path) -> None:
    torch.save({"embed": SHARED, "other": SHARED[:3], "head": SHARED, "copy": SHARED.clone()}, tmp_path / "w.pt")
    assert open_weights(tmp_path / "w.pt", "x").tied == {"head": "embed"}
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["embed"].weight
    assert open_weights(model, "x").tied == {"head.weight": "embed.weight"}
    # The library keeps one of the names and notes the others in the file's metadata.
    save_model(model, str(tmp_path / "w.safetensors"))
    weights = open_weights(tmp_path / "w.safetensors", "x")
    assert set(weights) == {"embed.weight", "head.weight"} and len(weights.tied) == 1
    assert torch.equal(weights["head.weight"], weights["embed.weight"])


def folder_of_shards(folder: Path, **homes: str) -> Path:
    folder.mkdir()
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, folder / "model-00001-of-00002.safetensors")
    save_file({"c": torch.zeros(4)}, folder / "model-00002-of-00002.safetensors")
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    index = {"metadata": {}, "weight_map": {"a": first, "c": second, "b": first, **homes}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards_are_one_model_in_the_order_of_their_index(tmp_path: Path) -> None:
    folder = folder_of_shards(tmp_path / "model")
    for source in (folder, folder / "model.safetensors.index.json"):
        weights = open_weights(source, "pretrained")
        same(weights, {"a": torch.ones(2), "c": torch.zeros(4), "b": torch.ones(3)})


def test_a_bad_index_is_reported_with_the_shard(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone.safetensors: this shard is missing"):
        open_weights(folder_of_shards(tmp_path / "1", d="gone.safetensors"), "x")
    with pytest.raises(ValueError, match=r"00001-of-00002.safetensors: 'd' is not in it"):
        open_weights(folder_of_shards(tmp_path / "2", d="model-00001-of-00002.safetensors"), "x")
    with pytest.raises(ValueError, match=r"names '../1/model-00001-of-00002.safetensors' as a shard"):
        open_weights(folder_of_shards(tmp_path / "3", d="../1/model-00001-of-00002.safetensors"), "x")
    for text in ("[]", "{", '{"weight_map": 3}'):
        (tmp_path / "bad.index.json").write_text(text)
        with pytest.raises(ValueError, match=r"bad.index.json: no index of shards"):
            open_weights(tmp_path / "bad.index.json", "x")


def test_folders_with_torch_files_are_read(tmp_path: Path) -> None:
    torch.save(PLAIN, tmp_path / "pytorch_model.bin")
    same(open_weights(tmp_path, "pretrained"), PLAIN)
    # Where both are there, the safer format is taken.
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert open_weights(tmp_path, "pretrained").names == ["a"]


def test_missing_and_unknown_files_are_named_with_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.safetensors: no such file or folder"):
        open_weights(tmp_path / "nowhere.safetensors", "x")
    with pytest.raises(FileNotFoundError, match=r"experts/mnist.pt: no such file or folder$"):
        open_weights("experts/mnist.pt", "x")
    with pytest.raises(FileNotFoundError, match=r"expected model.safetensors or .*it holds nothing"):
        open_weights(tmp_path, "x")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(FileNotFoundError, match=r"it holds notes.txt"):
        open_weights(tmp_path, "x")
    with pytest.raises(
        ValueError, match=r"notes.txt: unknown kind of weights, expected a name that ends in one of .saf"
    ):
        open_weights(tmp_path / "notes.txt", "x")
    with pytest.raises(
        ValueError, match=r"expert x: a int holds no weights, expected a module, a state dict or a path"
    ):
        open_weights(3, "expert x")  # type: ignore[arg-type]


def test_a_hub_id_is_found_in_the_cache_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants", reason="the extra hub is not installed")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--someone--expert-of-mnist"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    save_file({"a": torch.ones(1)}, snapshot / "model.safetensors")
    assert open_weights("someone/expert-of-mnist", "expert mnist").names == ["a"]
    with pytest.raises(FileNotFoundError, match=r"someone/else: no such file or folder, and the hub did not give it"):
        fetch_folder("someone/else")
