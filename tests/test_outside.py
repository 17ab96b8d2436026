"""The wheel, used from a folder and a project that are not ours."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING

import pytest

import zoo
from tests.conftest import ROOT

if TYPE_CHECKING:
    from pathlib import Path

DOCUMENTS = [path for path in [ROOT / "README.md", *sorted((ROOT / "zoo").glob("*/README.md"))] if path.is_file()]
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A copy, because setuptools leaves build/ and egg-info where it builds.
    source = tmp_path_factory.mktemp("source")
    for name in ("zoo", "datamodules"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip(source, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "dist", ".")
    (path,) = (source / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip(target, "install", "-q", "--no-deps", "--target", str(target), str(wheel))
    return target


def pip(folder: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    subprocess.run(command, cwd=folder, check=True, timeout=120)


def python(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # -P keeps the current folder off the path: only the installed copy can be found.
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_wheel_holds_the_packages_their_data_and_the_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "zoo-train = train:console" in archive.read(entry_points).decode()
    assert {"train.py", "zoo/py.typed", "datamodules/py.typed", "zoo/common/cli.py"} <= names
    assert {str(path.relative_to(ROOT)) for path in DOCUMENTS[1:]} <= names
    assert not [name for name in names if name.startswith(("tests/", "configs/", "benchmarks/"))]


def test_each_exported_part_is_there_and_the_command_helps(installed, tmp_path):
    code = (
        "import zoo, datamodules, train, sys\n"
        f"assert zoo.__file__.startswith({str(installed)!r}), zoo.__file__\n"
        "sys.argv = ['zoo-train', '--help']\n"
        "train.console()\n"
        "[getattr(zoo, name) for name in zoo.__all__]\n"
        "[getattr(datamodules, name) for name in datamodules.__all__]\n"
    )
    done = python(installed, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in zoo.MODELS)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_snippets_of_a_document_run_in_a_foreign_project(installed, tmp_path, document):
    snippets = SNIPPET.findall(document.read_text(encoding="utf-8"))
    if not snippets:
        pytest.skip("the document has no python snippet")
    # One after the other, as a reader types them.
    (tmp_path / "snippets.py").write_text("\n".join(snippets), encoding="utf-8")
    done = python(installed, tmp_path, "snippets.py")
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_method_has_a_card_with_a_snippet():
    methods = {path.partition(".common")[0].split(".")[1] for path in zoo.MODELS.values()}
    for method in sorted(methods):
        assert SNIPPET.search((ROOT / "zoo" / method / "README.md").read_text(encoding="utf-8")), method
