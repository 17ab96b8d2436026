"""Settings that must hold before torch is imported, and fixtures for all tests."""

import os

# Forked processes hang for ever when the parent has used OpenMP threads; nothing here may reach for a network.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
# Lightning itself calls what jsonargparse has deprecated.
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"
os.environ.pop("ZOO_DEBUG", None)

import gc
import hashlib
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

    from tests.methods import Method
    from zoo.common.cli import ZooCLI

ROOT = Path(__file__).parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests on real data where there is none."""
    data = os.environ.get("ZOO_DATA")
    if data and Path(data).is_dir():
        return
    reason = pytest.mark.skip(reason=f"real data: ZOO_DATA names no folder ({data or 'not set'})")
    for item in items:
        if "real" in item.keywords:
            item.add_marker(reason)


def pytest_collection_finish() -> None:
    """Leave what was collected out of garbage collection: it stays, and forked processes would copy it to look."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("caches")
    os.environ["HF_HOME"] = str(folder / "huggingface")
    os.environ["MPLCONFIGDIR"] = str(folder / "matplotlib")
    os.environ["WANDB_DIR"] = str(folder)
    os.environ["WANDB_CACHE_DIR"] = str(folder / "wandb")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., "ZooCLI"]:
    """`run("test", "--config", ...)` does what `train.py` does, in this process, with its runs under `tmp_path`."""
    import train

    def call(*arguments: str) -> "ZooCLI":
        line = ["train.py", *map(str, arguments)]
        if "--trainer.default_root_dir" not in line:
            line += ["--trainer.default_root_dir", str(tmp_path / "runs")]
        monkeypatch.setattr(sys, "argv", line)
        # A failure shows its trace.
        monkeypatch.setenv("ZOO_DEBUG", os.environ.get("ZOO_DEBUG", "1"))
        cli = train.main()
        assert cli is not None
        return cli

    return call


@pytest.fixture
def first_step(run: Callable[..., "ZooCLI"], tmp_path: Path) -> Callable[..., "list[dict[str, torch.Tensor]]"]:
    """`first_step("name", method, "--trainer.devices", "2")` returns the first step's gradients in each process."""
    import torch

    def call(name: str, method: "Method", *arguments: str) -> "list[dict[str, torch.Tensor]]":
        folder = tmp_path / name
        recorder = ("--trainer.callbacks+=tests.callbacks.GradientRecorder", f"--trainer.callbacks.folder={folder}")
        # What comes after the step is not looked at.
        only = ("--trainer.max_steps", "1", "--trainer.limit_val_batches", "0", "--trainer.enable_checkpointing=false")
        run("fit", *method.command, *method.exact, *only, *recorder, *arguments)
        return [torch.load(path, weights_only=True) for path in sorted(folder.iterdir())]

    return call


@pytest.fixture
def full_first_step(
    first_step: Callable[..., "list[dict[str, torch.Tensor]]"], tmp_path_factory: pytest.TempPathFactory
) -> "Callable[[Method], dict[str, torch.Tensor]]":
    """`full_first_step(method)` returns the gradients in one process at full precision, computed once for all tests."""
    import torch
    from filelock import FileLock

    # The workers of pytest-xdist have a folder each, in one that is theirs together.
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "first_steps"

    def call(method: "Method") -> "dict[str, torch.Tensor]":
        folder.mkdir(exist_ok=True)
        path = folder / f"{hashlib.sha256(repr((method.command, method.exact)).encode()).hexdigest()}.pt"
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                (gradients,) = first_step("full", method)
                torch.save(gradients, path)
        found: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
        return found

    return call


@pytest.fixture
def refused(
    run: Callable[..., object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """`refused(2, "--model", "Nope")` expects that exit status and returns the one paragraph on stderr."""

    def call(status: int, *arguments: str) -> str:
        capsys.readouterr()
        monkeypatch.setenv("ZOO_DEBUG", "")
        with pytest.raises(SystemExit) as exit_info:
            run(*arguments)
        error = capsys.readouterr().err
        assert exit_info.value.code == status, error
        paragraph = [line for line in error.splitlines() if line.startswith("error: ")]
        assert len(paragraph) == 1, error
        assert "Traceback" not in error
        assert error.endswith(paragraph[0] + "\n"), error
        return paragraph[0].removeprefix("error: ")

    return call


@pytest.fixture(autouse=True)
def _restored_filters() -> Iterator[None]:
    """The command line silences warnings for its process; the next test must see them again."""
    with warnings.catch_warnings():
        yield
