"""Checkpoints that are whole or absent, and that cannot run code when they are read."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the text names the file and the way out."""


def load_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint without running any code it may hold.

    Args:
        path: A local file.
        map_location: Where its tensors go, as for `torch.load`.

    Returns:
        The checkpoint's dictionary.

    Raises:
        CheckpointError: The file is missing, cut short, no checkpoint, or holds objects other than tensors and plain
            Python values.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file{_neighbours(path)}.")
    size = path.stat().st_size
    if not zipfile.is_zipfile(path):
        # torch.load also reads the bare pickles of torch < 1.6; nothing here ever wrote one.
        raise CheckpointError(
            f"{path}: not a checkpoint, or one that was cut short ({size:,} bytes, no readable end). Copy it again, or "
            "use an older checkpoint of the same run."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.load does not look at the checksums: a flipped bit would become a weight.
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        name = found[1] if found else "not named"
        raise CheckpointError(
            f"{path}: refused, because it holds objects other than tensors and plain values, which could run code when "
            f"loaded ({name}). Checkpoints written by this project never do."
        ) from error
    except (RuntimeError, EOFError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path}: the checkpoint is damaged ({_first_line(error)}). Copy it again, or use an older checkpoint of "
            "the same run."
        ) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path}: holds a {type(checkpoint).__name__}, expected a checkpoint's dictionary.")
    return checkpoint


def load_run_checkpoint(path: str | Path, resume: bool) -> dict[str, Any]:
    """Read what a Trainer saved.

    Args:
        path: A local file.
        resume: Whether training is to go on from it, which needs more than the weights.

    Returns:
        The checkpoint's dictionary.

    Raises:
        CheckpointError: As for `load_checkpoint`, or if a Trainer cannot use it.
    """
    checkpoint = load_checkpoint(path)
    if not {"state_dict", "pytorch-lightning_version"} <= checkpoint.keys():
        shown = ", ".join(map(str, list(checkpoint)[:4])) + (", ..." if len(checkpoint) > 4 else "")
        raise CheckpointError(
            f"{path}: no checkpoint of a Lightning run; it holds {shown or 'nothing'}. Bare weights are loaded in "
            "Python, with load_state_dict."
        )
    if resume and not {"loops", "optimizer_states"} <= checkpoint.keys():
        raise CheckpointError(
            f"{path}: holds the weights alone, without the state of the training, and cannot be resumed. Test it, or "
            "use the run's last.ckpt."
        )
    return checkpoint


def weights_mismatch(error: BaseException) -> str | None:
    """What does not fit, in one sentence, if `error` is torch's list of it."""
    text = str(error)
    if "Error(s) in loading state_dict" not in text:
        return None
    shape = re.compile(r"size mismatch for (\S+): .*?torch.Size\((\[.*?\])\) from checkpoint.*?torch.Size\((\[.*?\])\)")
    found = [f"{name} is {theirs} there and {ours} here" for name, theirs, ours in shape.findall(text)]
    for label, where in (("Missing", "here only"), ("Unexpected", "there only")):
        for names in re.findall(rf"{label} key\(s\) in state_dict: (.*)", text):
            found += [f"{name} is {where}" for name in re.findall(r'"([^"]+)"', names)]
    shown = "; ".join(found[:3]) or _first_line(error)
    return shown + (f"; and {len(found) - 3} more" if len(found) > 3 else "")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it, so that a file under the final name is always whole.

    Works as a Trainer plugin: `Trainer(plugins=[AtomicCheckpointIO()])`. A run that dies while saving leaves the
    previous checkpoint as it was.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write `checkpoint` to `path`.

        Args:
            checkpoint: What the Trainer dumped.
            path: The final name. Remote addresses are left to Lightning.
            storage_options: Not supported, as in Lightning's own plugin.

        Raises:
            CheckpointError: The disk refused the file, most often because it is full.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except (OSError, RuntimeError) as error:
            # torch's zip writer reports a failed write as a RuntimeError, and hides the OSError behind it.
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            cause = _os_error(error)
            if cause is None:
                raise
            raise CheckpointError(
                f"{target}: the checkpoint could not be written ({cause.strerror or cause}; {_free_space(target)}). "
                f"{_what_remains(target)} Make room, or choose another place with --trainer.default_root_dir."
            ) from error
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint as `load_checkpoint` does; `weights_only=False` is honoured only where it is asked for."""
        if "://" in str(path) or weights_only is False:
            return super().load_checkpoint(path, map_location, weights_only)
        return load_checkpoint(path, map_location)


class BestCheckpoint(ModelCheckpoint):
    """Keeps `best.ckpt`, the epoch with the best value of `monitor`.

    Args:
        dirpath: Folder of the file.
        monitor: Name of a logged metric, such as `val/ndcg@20`.
        mode: `"max"` if larger is better, otherwise `"min"`.
    """

    def __init__(self, dirpath: str | Path, monitor: str, mode: str) -> None:
        super().__init__(dirpath=dirpath, filename="best", monitor=monitor, mode=mode, enable_version_counter=False)
        _save_at_step_zero(self)


class LastCheckpoint(ModelCheckpoint):
    """Keeps `last.ckpt`, always the latest state, for resuming.

    `ModelCheckpoint(save_last=True)` is no substitute: it writes only when the best changed.

    Args:
        dirpath: Folder of the file.
        every_n_train_steps: Save after so many optimizer steps; without it, at the end of every epoch.
    """

    def __init__(self, dirpath: str | Path, every_n_train_steps: int | None = None) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="last",
            enable_version_counter=False,
            every_n_train_steps=every_n_train_steps,
            # Also in epochs without validation, and after the validation of those that have one.
            save_on_train_epoch_end=True if every_n_train_steps is None else None,
        )
        _save_at_step_zero(self)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Count an epoch that `max_steps` or `max_time` cut short as one that a resumed run is still in.

        Lightning counts it as processed, so that the resumed run gives all later epochs the order of their successors.
        """
        loop = checkpoint["loops"]["fit_loop"]
        batches = loop["epoch_loop.batch_progress"]
        if batches["current"]["ready"] and not batches["is_last_batch"]:
            for epochs in loop["epoch_progress"].values():
                unfinished = epochs["ready"] - 1
                epochs["processed"] = min(epochs["processed"], unfinished)
                epochs["completed"] = min(epochs["completed"], unfinished)


def _save_at_step_zero(callback: ModelCheckpoint) -> None:
    """Make a checkpoint of a model that has no optimizer, which never leaves step 0 and otherwise counts as saved."""
    callback._last_global_step_saved = -1


def evaluation_checkpoint(trainer: Trainer, model: LightningModule) -> str | None:
    """Path of the weights that a test after training uses: the best, else the last, else those in memory (`None`)."""
    kinds = (BestCheckpoint, LastCheckpoint) if getattr(model, "monitor", None) else (LastCheckpoint,)
    for kind in kinds:
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, kind) and callback.best_model_path and Path(callback.best_model_path).is_file():
                return callback.best_model_path
    return None


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".:") if text else type(error).__name__


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor a folder {path.parent})"
    names = sorted(file.name for file in path.parent.glob("*.ckpt"))
    return f"; {path.parent} holds {', '.join(names)}" if names else f"; {path.parent} holds no checkpoint"


def _os_error(error: BaseException | None) -> OSError | None:
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _free_space(target: Path) -> str:
    try:
        return f"{shutil.disk_usage(target.parent).free / 2**20:,.0f} MiB free on that disk"
    except OSError:
        return "free space unknown"


def _what_remains(target: Path) -> str:
    return "The earlier checkpoint of that name is untouched." if target.is_file() else "No file was left behind."
