import json
import math
import platform
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from zoo.common import results
from zoo.common.results import write_result


def written(path: Path, **changed: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "config": {"model": {"lr": 0.1}},
        "seed": 3,
        "metrics": {"test/hr@5": torch.tensor(0.25)},
        "seconds": {"fit": 1.23456},
    }
    return write_result(path, **{**arguments, **changed})


def checkout(folder: Path) -> Path:
    """A git repository with one commit that holds a `zoo` package and a result."""
    for name in ("zoo/__init__.py", "results/toy/one.json", "README.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(folder), *identity, *command], check=True)
    return folder


def test_record_tells_what_was_run_where_and_at_what_cost(tmp_path: Path) -> None:
    record = written(tmp_path / "new" / "result.json")
    assert json.loads((tmp_path / "new" / "result.json").read_text()) == record
    assert record["config"] == {"model": {"lr": 0.1}}
    assert (record["seed"], record["metrics"], record["seconds"]) == (3, {"test/hr@5": 0.25}, {"fit": 1.235})
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["python"] == platform.python_version()
    assert record["versions"]["zoo"] == zoo.__version__
    assert record["cores"] >= 1
    assert record["threads"] == torch.get_num_threads()
    assert record["device"] == "cpu"
    # The interpreter with torch takes more than 100 MB and this machine has less than 10 TB.
    assert 1e8 < record["peak_rss_bytes"] < 1e13


def test_number_that_is_not_finite_becomes_null(tmp_path: Path) -> None:
    record = written(tmp_path / "r.json", metrics={"test/loss": math.nan, "test/ppl": math.inf})
    assert record["metrics"] == {"test/loss": None, "test/ppl": None}


def test_failed_write_leaves_the_old_record_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    written(path)
    before = path.read_text()

    def full_disk(self: Path, text: str, **_: Any) -> int:
        with self.open("w") as file:
            file.write(text[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space left"):
        written(path, seed=4)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_commit_and_clean_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = checkout(tmp_path)
    monkeypatch.setattr(zoo, "__file__", str(root / "zoo" / "__init__.py"))
    head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    environment = results.environment()
    assert (environment["commit"], environment["clean"]) == (head.stdout.strip(), True)
    (root / "results" / "toy" / "two.json").write_text("{}")
    (root / "README.md").write_text("a new table")
    assert results.environment()["clean"] is True, "results and tables are no code"
    (root / "zoo" / "part.py").write_text("")
    assert results.environment()["clean"] is False


def test_installed_copy_in_somebody_elses_checkout_has_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = checkout(tmp_path)
    installed = root / "env" / "site-packages" / "zoo" / "__init__.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("")
    monkeypatch.setattr(zoo, "__file__", str(installed))
    environment = results.environment()
    assert (environment["commit"], environment["clean"]) == (None, None)


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert results.environment()["commit"] is None
