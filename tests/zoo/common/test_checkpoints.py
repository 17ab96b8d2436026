from __future__ import annotations

import builtins
import errno
import os
import pickle
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from tests.toy import ToyData, ToyModel
from zoo.common import checkpoints
from zoo.common.checkpoints import AtomicCheckpointIO, CheckpointError, LastCheckpoint, load_checkpoint

STATE = {"state_dict": {"weight": torch.arange(10_000.0)}, "epoch": 3}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(STATE, path)
    return path


def test_what_was_saved_is_loaded(saved):
    loaded = load_checkpoint(saved)
    assert loaded["epoch"] == 3 and torch.equal(loaded["state_dict"]["weight"], STATE["state_dict"]["weight"])
    assert [file.name for file in saved.parent.iterdir()] == ["last.ckpt"]


def test_folders_are_made(tmp_path):
    AtomicCheckpointIO().save_checkpoint(STATE, tmp_path / "a" / "b" / "last.ckpt")
    assert load_checkpoint(tmp_path / "a" / "b" / "last.ckpt")["epoch"] == 3


def test_a_missing_file_is_named_with_its_neighbours(saved):
    with pytest.raises(CheckpointError, match=r"none\.ckpt: no such checkpoint file; .* holds last\.ckpt"):
        load_checkpoint(saved.with_name("none.ckpt"))
    with pytest.raises(CheckpointError, match="nor a folder"):
        load_checkpoint(saved.parent / "absent" / "last.ckpt")


@pytest.mark.parametrize("kept", [0, 10, 20_000, -100, -1])
def test_a_file_that_was_cut_short_is_refused(saved, kept):
    saved.write_bytes(saved.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"last\.ckpt: .*cut short"):
        load_checkpoint(saved)


def test_a_flipped_bit_is_refused(saved):
    content = bytearray(saved.read_bytes())
    content[len(content) // 2] ^= 1
    saved.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"last\.ckpt: the checkpoint is damaged \(wrong checksum"):
        load_checkpoint(saved)


class Trap:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    trap = Trap(tmp_path / "sprung")
    torch.save({"state_dict": trap}, tmp_path / "zip.ckpt")
    with pytest.raises(CheckpointError, match=r"zip\.ckpt: refused.*could run code.*\(posix\.mkdir\)"):
        load_checkpoint(tmp_path / "zip.ckpt")
    (tmp_path / "bare.ckpt").write_bytes(pickle.dumps(trap))
    with pytest.raises(CheckpointError, match=r"bare\.ckpt: not a checkpoint"):
        load_checkpoint(tmp_path / "bare.ckpt")
    assert not trap.folder.exists()


def test_something_else_than_a_dictionary_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(CheckpointError, match="holds a list"):
        load_checkpoint(tmp_path / "list.ckpt")


class FullDisk:
    """A file that takes so many bytes and then says that the disk is full."""

    def __init__(self, path: Path, room: int) -> None:
        self.file, self.room = builtins.open(path, "wb"), room  # noqa: SIM115

    def write(self, data: bytes) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name: str) -> object:
        return getattr(self.file, name)

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


@pytest.mark.parametrize("room", [0, 30_000])
def test_a_full_disk_leaves_the_earlier_checkpoint_and_no_half_written_one(saved, monkeypatch, room):
    monkeypatch.setattr(Path, "open", lambda self, mode: FullDisk(self, room))
    with pytest.raises(CheckpointError) as error_info:
        AtomicCheckpointIO().save_checkpoint({**STATE, "epoch": 4}, saved)
    monkeypatch.undo()
    message = str(error_info.value)
    assert str(saved) in message and "No space left on device" in message and "MiB free" in message
    assert "untouched" in message and len(message.splitlines()) == 1
    assert load_checkpoint(saved)["epoch"] == 3
    assert [file.name for file in saved.parent.iterdir()] == ["last.ckpt"]


def test_a_disk_that_fails_at_the_last_moment_leaves_the_earlier_checkpoint(saved, monkeypatch):
    def refuse(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoints.os, "fsync", refuse)
    with pytest.raises(CheckpointError, match="Input/output error"):
        AtomicCheckpointIO().save_checkpoint({**STATE, "epoch": 4}, saved)
    assert load_checkpoint(saved)["epoch"] == 3
    assert [file.name for file in saved.parent.iterdir()] == ["last.ckpt"]


def test_a_program_that_is_stopped_while_saving_leaves_no_temporary_file(saved, monkeypatch):
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpointIO().save_checkpoint({**STATE, "epoch": 4}, saved)
    assert [file.name for file in saved.parent.iterdir()] == ["last.ckpt"]
    assert load_checkpoint(saved)["epoch"] == 3


def test_an_object_that_cannot_be_saved_is_the_error_of_its_own(saved):
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        AtomicCheckpointIO().save_checkpoint({"function": lambda: None}, saved)
    assert [file.name for file in saved.parent.iterdir()] == ["last.ckpt"]


def test_a_full_disk_during_training_ends_in_one_paragraph(refused, monkeypatch):
    monkeypatch.setattr(Path, "open", lambda self, mode="r", *a, **k: (
        FullDisk(self, 1000) if mode == "wb" and ".tmp" in self.name else builtins.open(self, mode, *a, **k)  # noqa: SIM115
    ))  # fmt: skip
    error = refused(
        1, "--model", "tests.toy.ToyModel", "--data", "tests.toy.ToyData", "--trainer.max_epochs", "1",
        "--trainer.log_every_n_steps", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
        "--trainer.enable_model_summary", "false",
    )  # fmt: skip
    assert ("No space left on device" in error and "last.ckpt" in error) or "best.ckpt" in error


def test_the_trainer_loads_through_the_plugin(saved, tmp_path):
    saved.write_bytes(saved.read_bytes()[:-50])
    trainer = Trainer(
        accelerator="cpu", plugins=[AtomicCheckpointIO()], default_root_dir=tmp_path, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="cut short"):
        trainer.test(ToyModel(3), datamodule=ToyData(), ckpt_path=str(saved))


def test_last_is_saved_every_so_many_steps_and_at_the_end_of_an_epoch(tmp_path):
    steps = []

    class Watched(AtomicCheckpointIO):
        def save_checkpoint(self, checkpoint, path, storage_options=None):
            steps.append((Path(path).name, checkpoint["global_step"]))
            super().save_checkpoint(checkpoint, path, storage_options)

    trainer = Trainer(
        accelerator="cpu", plugins=[Watched()], default_root_dir=tmp_path, logger=False, max_epochs=2,
        callbacks=[LastCheckpoint(tmp_path, every_n_train_steps=4), LastCheckpoint(tmp_path)],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(ToyModel(3), datamodule=ToyData())
    # Six steps in an epoch.
    assert steps == [("last.ckpt", step) for step in (4, 6, 8, 12, 12)]
    assert load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 12
