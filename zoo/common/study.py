"""Studies: several settings of a method, each with several seeds, run through `train.py` and compared.

What a study's file holds is told in `zoo.common.study_file`.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

# Importable from here for those who run studies.
from zoo.common.study_checks import StudyError as StudyError
from zoo.common.study_checks import evaluate_check, summarise
from zoo.common.study_file import FIRST
from zoo.common.study_file import load_study as load_study

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from zoo.common.study_file import Study, Variant


@dataclass(frozen=True)
class Run:
    """One training of a study: a variant with a seed, in a folder of its own."""

    variant: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]
    first: Run | None = None
    hand: tuple[tuple[str, str], ...] = ()

    def result(self) -> dict[str, Any] | None:
        """What `train.py` recorded, or None while the run is not finished."""
        path = self._result_path()
        if path is None:
            return None
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return record

    def _result_path(self) -> Path | None:
        found = sorted(self.folder.glob("*/version_*/result.json"), key=lambda path: path.stat().st_mtime)
        return found[-1] if found else None

    def handed(self, root: Path) -> list[str]:
        """Arguments that give this run what the run before it has left, as paths relative to `root`.

        Raises:
            StudyError: If that run is not finished, or has left nothing of the name.
        """
        if self.first is None:
            return []
        result = self.first._result_path()
        if result is None:
            raise StudyError(f"{self.variant}, seed {self.seed}: {self.first.variant} is not finished")
        arguments = []
        for key, name in self.hand:
            path = result.parent / name
            if not path.exists():
                there = ", ".join(sorted(file.name for file in result.parent.iterdir()))
                raise StudyError(
                    f"{self.variant}, seed {self.seed}: hand.{key}: {self.first.variant} has left no {name!r} in "
                    f"{result.parent}; there are {there}"
                )
            # The folder of `train.py` may be moved between two halves of a run, and results tell no one's folders.
            arguments.append(f"--{key}={path.relative_to(root).as_posix()}")
        return arguments


def plan(study: Study, root: Path, seeds: Sequence[int], smoke: bool = False) -> list[Run]:
    """The runs of a study.

    A run's folder carries a digest of its settings, which for a variant with a run before it are those of both: a
    changed study starts anew, and a study that is started again finds what it has finished. Runs before others are
    shared by all studies of a method.

    Args:
        study: The study.
        root: Folder of `train.py`.
        seeds: Seeds of each variant.
        smoke: Add the study's `smoke` overrides; to a run before another one `model.*` only where both configs have
            the same class of model, and `data.*` likewise.
    """
    runs = []
    extra = study.smoke if smoke else {}

    own = Path("runs", "studies", *_name(study).parts)

    def run(name: str, folder: Path, variant: Variant, seed: int, digest: str) -> Run:
        place = folder / f"seed_{seed}-{digest}"
        arguments = ["--config", variant.config, "--seed_everything", str(seed)]
        arguments += [f"--{key}={_flag_value(value)}" for key, value in variant.overrides.items()]
        arguments += ["--trainer.default_root_dir", place.as_posix()]
        return Run(name, seed, root / place, tuple(arguments))

    for name, variant in study.variants.items():
        config, first = _read_config(root / variant.config), variant.first
        variant = replace(variant, overrides={**variant.overrides, **extra})
        content = [config, variant.overrides]
        if first is None:
            runs += [run(name, own / name, variant, seed, _digest(content)) for seed in seeds]
            continue
        earlier_config = _read_config(root / first.config)
        same = {group: _class_name(config, group) == _class_name(earlier_config, group) for group in ("model", "data")}
        known = {key: value for key, value in extra.items() if same.get(key.partition(".")[0], True)}
        first = replace(first, overrides={**first.overrides, **known})
        before = [earlier_config, first.overrides]
        content += [before, variant.hand]
        for seed in seeds:
            earlier = run(f"the run before {name}", own.parent / FIRST, first, seed, _digest(before))
            later = run(name, own / name, variant, seed, _digest(content))
            runs.append(replace(later, first=earlier, hand=tuple(variant.hand.items())))
    return runs


def _read_config(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _class_name(config: Any, group: str) -> str:
    content = config.get(group) if isinstance(config, dict) else None
    name = content.get("class_path") if isinstance(content, dict) else content
    return str(name).rpartition(".")[2]


def _digest(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def _name(study: Study) -> Path:
    """`<method>/<study>`, the place of results and runs."""
    return Path(study.path.resolve().parent.name, study.path.stem)


def _flag_value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def execute(run: Run, root: Path, threads: int | None = None) -> None:
    """Train and test one variant with one seed, in a process of its own; go on where it was stopped.

    Args:
        run: What to run.
        root: Folder of `train.py`.
        threads: OpenMP threads; by default what the environment says.

    Raises:
        StudyError: If the run fails; the text holds the end of its output. If the run before it has not left what
            it needs.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "train.py", *run.arguments, *run.handed(root)]
    if any(run.folder.glob("*/version_*/last.ckpt")):
        command += ["--ckpt_path", "last"]
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    log = run.folder / "output.log"
    with log.open("ab") as output:
        done = subprocess.run(command, cwd=root, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False)
    if run.result() is None:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise StudyError(f"{run.variant}, seed {run.seed}: status {done.returncode}; the end of {log}:\n{tail}")


def run_study(
    study: Study, root: Path, seeds: Sequence[int] | None = None, jobs: int = 1, smoke: bool = False
) -> dict[str, Any]:
    """Run what is missing of a study and put the results together.

    Args:
        study: The study.
        root: Folder of `train.py`.
        seeds: Seeds in place of the study's; a smoke run takes the first one only by default.
        jobs: Runs at a time; they share the cores.
        smoke: Add the study's `smoke` overrides.

    Returns:
        The content of the results file.

    Raises:
        StudyError: If runs fail; those that do not need them are finished first, and kept.
    """
    if seeds is None:
        seeds = study.seeds[:1] if smoke else study.seeds
    runs = plan(study, root, seeds, smoke)
    missing = [run for run in runs if run.result() is None]
    print(f"{_name(study)}: {len(runs) - len(missing)} of {len(runs)} runs are finished", flush=True)
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 and "OMP_NUM_THREADS" not in os.environ else None

    def attempt(run: Run) -> str | None:
        try:
            execute(run, root, threads)
        except StudyError as error:
            return str(error)
        print(f"{run.variant}, seed {run.seed}: finished", flush=True)
        return None

    def attempt_all(some: Iterable[Run]) -> list[str]:
        with ThreadPoolExecutor(jobs) as pool:
            return [failure for failure in pool.map(attempt, some) if failure is not None]

    failures = attempt_all([*_firsts(missing), *(run for run in missing if run.first is None)])
    failures += attempt_all(run for run in missing if run.first is not None and run.first.result() is not None)
    if failures:
        raise StudyError("\n\n".join(failures))
    records = [_record(run) for run in runs]
    summary = summarise(records)
    return {
        "title": study.title,
        "command": f"python study.py studies/{_name(study).as_posix()}.yaml" + (" --smoke" if smoke else ""),
        "seeds": list(seeds),
        "summary": summary,
        "checks": [evaluate_check(check, summary) for check in study.checks],
        "reference": study.reference,
        "runs": records,
    }


def _firsts(runs: Iterable[Run]) -> list[Run]:
    """What must be trained before `runs`; equal ones are one, and called after all that wait for it."""
    found: dict[Path, Run] = {}
    for run in runs:
        first = run.first
        if first is None or first.result() is not None:
            continue
        known = found.get(first.folder)
        found[first.folder] = first if known is None else replace(first, variant=f"{known.variant} and {run.variant}")
    return list(found.values())


def _record(run: Run) -> dict[str, Any]:
    """What a finished run has recorded; `seconds/first` is the training of the run before it, null if that is gone."""
    record = {"variant": run.variant, **(run.result() or {})}
    if run.first is not None:
        before = run.first.result()
        if before is None:
            print(f"{run.variant}, seed {run.seed}: the run before it is gone from {run.first.folder}", flush=True)
        record["first"] = before
        record["seconds"] = {**record["seconds"], FIRST: before and before["seconds"].get("fit")}
    return record


def results_path(study: Study, root: Path, smoke: bool = False) -> Path:
    """`results/<method>/<study>.json`; smoke runs, which prove nothing, stay among the runs."""
    name = _name(study).with_suffix(".json")
    return root / "runs" / "studies" / "smoke" / name if smoke else root / "results" / name


def write_study(path: Path, content: Mapping[str, Any]) -> None:
    """Write the results file, completely or not at all."""
    # Loads torch, which a study itself does not need.
    from zoo.common.results import write_json

    write_json(path, content)
