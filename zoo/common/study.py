"""Studies: several settings of a method, each with several seeds, run through `train.py` and compared.

A study is a YAML file:

    title: What is compared, in one line.
    seeds: [0, 1]
    variants:                                  # rows of the result
      sasrec: {config: configs/ticoserec/core_sasrec.yaml}
      wide:
        config: configs/ticoserec/core_sasrec.yaml
        overrides: {model.hidden_size: 128}    # as on train.py's command line
    overrides: {trainer.max_epochs: 40}        # for all variants
    smoke: {trainer.max_epochs: 1}             # added by --smoke
    checks:                                    # on the means over the seeds
      - test/ndcg@5: wide >= 1.08 * sasrec
      - test/hr@5: wide >= sasrec - 0.01 each seed   # on every seed instead of the means
    reference:                                 # published rows to stand beside ours
      SASRec, published: {test/hr@5: 0.037}
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_CHECK = re.compile(
    r"\s*([\w.-]+)\s*(>=|<=|>|<)\s*(?:([\d.]+)\s*\*\s*)?([\w.-]+)\s*(?:([+-])\s+([\d.]+)\s*)?(each seed)?\s*"
)
_KEYS = {"title", "seeds", "variants", "overrides", "smoke", "checks", "reference"}


class StudyError(ValueError):
    """A study that cannot be run, or a run of it that failed; the text is for the user."""


@dataclass(frozen=True)
class Variant:
    """One row of a study: a config and what differs from it."""

    config: str
    overrides: dict[str, Any]


@dataclass(frozen=True)
class Check:
    """A required relation of two variants, or a variant and a number: `left comparison factor * right + offset`."""

    metric: str
    left: str
    comparison: str
    factor: float
    right: str
    offset: float = 0.0
    each_seed: bool = False

    def __str__(self) -> str:
        """The check as its study has it."""
        factor = "" if self.factor == 1 else f"{self.factor:g} * "
        offset = f" {'-' if self.offset < 0 else '+'} {abs(self.offset):g}" if self.offset else ""
        seeds = " each seed" if self.each_seed else ""
        return f"{self.metric}: {self.left} {self.comparison} {factor}{self.right}{offset}{seeds}"

    def holds(self, left: float, right: float) -> bool:
        """Whether two values stand in the relation."""
        return bool(_COMPARISONS[self.comparison](left, self.factor * right + self.offset))


@dataclass(frozen=True)
class Study:
    """A study as its file has it."""

    path: Path
    title: str
    seeds: tuple[int, ...]
    variants: dict[str, Variant]
    smoke: dict[str, Any]
    checks: tuple[Check, ...]
    reference: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Run:
    """One training of a study: a variant with a seed, in a folder of its own."""

    variant: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]

    def result(self) -> dict[str, Any] | None:
        """What `train.py` recorded, or None while the run is not finished."""
        found = sorted(self.folder.glob("*/version_*/result.json"), key=lambda path: path.stat().st_mtime)
        if not found:
            return None
        record: dict[str, Any] = json.loads(found[-1].read_text(encoding="utf-8"))
        return record


def load_study(path: Path, root: Path) -> Study:
    """Read and check a study.

    Args:
        path: The study's file.
        root: Folder of `train.py`; configs are relative to it.

    Raises:
        StudyError: If something is missing or unknown; the text names the file, the key and the value.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise StudyError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("variants"), dict):
        raise StudyError(f"{path}: expected a mapping with `variants`, got {str(content)[:60]!r}")
    _refuse_unknown(path, "", content, _KEYS)
    shared = content.get("overrides") or {}
    variants = {}
    for name, fields in content["variants"].items():
        _refuse_unknown(path, f"variants.{name}.", fields, {"config", "overrides"})
        if not (root / str(fields.get("config"))).is_file():
            raise StudyError(f"{path}: variants.{name}.config: no file {fields.get('config')!r}")
        variants[str(name)] = Variant(fields["config"], {**shared, **(fields.get("overrides") or {})})
    seeds = content.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) for seed in seeds):
        raise StudyError(f"{path}: seeds: expected a list of integers, got {seeds!r}")
    checks = tuple(
        _parse_check(path, metric, text, variants)
        for entry in content.get("checks") or []
        for metric, text in entry.items()
    )
    return Study(
        path,
        str(content.get("title", path.stem)),
        tuple(seeds),
        variants,
        content.get("smoke") or {},
        checks,
        content.get("reference") or {},
    )


def _refuse_unknown(path: Path, prefix: str, fields: Any, known: set[str]) -> None:
    if not isinstance(fields, dict):
        raise StudyError(f"{path}: {prefix.rstrip('.')}: expected a mapping, got {fields!r}")
    for key in fields:
        if key not in known:
            raise StudyError(f"{path}: unknown key {prefix}{key}; there are {', '.join(sorted(known))}")


def _parse_check(path: Path, metric: str, text: str, variants: Mapping[str, Variant]) -> Check:
    match = _CHECK.fullmatch(str(text))
    if match is None:
        raise StudyError(f"{path}: check {metric}: {text!r} is not of the form `variant >= 1.1 * variant`")
    left, comparison, factor, right, sign, offset, each_seed = match.groups()
    for name in (left, right):
        if name not in variants and not (name is right and _number(name) is not None):
            raise StudyError(f"{path}: check {metric}: no variant {name!r}; there are {', '.join(variants)}")
    shift = float(offset or 0) * (-1 if sign == "-" else 1)
    return Check(metric, left, comparison, float(factor or 1), right, shift, bool(each_seed))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def plan(study: Study, root: Path, seeds: Sequence[int], smoke: bool = False) -> list[Run]:
    """The runs of a study.

    A run's folder carries a digest of its settings: a changed study starts anew, and a study that is started again
    finds what it has finished.

    Args:
        study: The study.
        root: Folder of `train.py`.
        seeds: Seeds of each variant.
        smoke: Add the study's `smoke` overrides.
    """
    runs = []
    for name, variant in study.variants.items():
        overrides = {**variant.overrides, **(study.smoke if smoke else {})}
        config = yaml.safe_load((root / variant.config).read_text(encoding="utf-8"))
        digest = hashlib.sha256(json.dumps([config, overrides], sort_keys=True).encode()).hexdigest()[:8]
        for seed in seeds:
            folder = Path("runs", "studies", *_name(study).parts, name, f"seed_{seed}-{digest}")
            arguments = ["--config", variant.config, "--seed_everything", str(seed)]
            arguments += [f"--{key}={_flag_value(value)}" for key, value in overrides.items()]
            arguments += ["--trainer.default_root_dir", folder.as_posix()]
            runs.append(Run(name, seed, root / folder, tuple(arguments)))
    return runs


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
        StudyError: If the run fails; the text holds the end of its output.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "train.py", *run.arguments]
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
        StudyError: If runs fail; the others are finished first, and kept.
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

    with ThreadPoolExecutor(jobs) as pool:
        failures = [failure for failure in pool.map(attempt, missing) if failure is not None]
    if failures:
        raise StudyError("\n\n".join(failures))
    records = [{"variant": run.variant, **(run.result() or {})} for run in runs]
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


def results_path(study: Study, root: Path, smoke: bool = False) -> Path:
    """`results/<method>/<study>.json`; smoke runs, which prove nothing, stay among the runs."""
    name = _name(study).with_suffix(".json")
    return root / "runs" / "studies" / "smoke" / name if smoke else root / "results" / name


def write_study(path: Path, content: Mapping[str, Any]) -> None:
    """Write the results file, completely or not at all."""
    # Loads torch, which a study itself does not need.
    from zoo.common.results import write_json

    write_json(path, content)


def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Per variant and metric: mean, sample standard deviation (None for one seed) and the values, seed by seed."""
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for name in dict.fromkeys(str(record["variant"]) for record in records):
        own = [record for record in records if record["variant"] == name]
        columns = {metric: [record["metrics"].get(metric) for record in own] for metric in own[0]["metrics"]}
        columns |= {f"seconds/{part}": [record["seconds"].get(part) for record in own] for part in own[0]["seconds"]}
        columns["peak_rss_bytes"] = [record["peak_rss_bytes"] for record in own]
        summary[name] = {key: _spread(values) for key, values in columns.items()}
    return summary


def _spread(values: list[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    complete = len(known) == len(values)
    return {
        "mean": statistics.fmean(known) if complete else None,
        "std": statistics.stdev(known) if complete and len(known) > 1 else None,
        "values": values,
    }


def evaluate_check(check: Check, summary: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Measured sides of a check, their ratio, overall and seed by seed, and whether the check holds."""
    left = _side(check, check.left, summary)
    right = _side(check, check.right, summary)
    # A number stands against every seed.
    values = right["values"] if check.right in summary else right["values"] * len(left["values"])
    pairs = list(zip(left["values"], values, strict=True))
    known = left["mean"] is not None and right["mean"] is not None
    sides = pairs if check.each_seed else [(left["mean"], right["mean"])]
    return {
        "check": str(check),
        "left": left["mean"],
        "right": right["mean"],
        "ratio": left["mean"] / right["mean"] if known and right["mean"] else None,
        "ratios": [a / b if a is not None and b else None for a, b in pairs],
        "holds": known and all(check.holds(a, b) for a, b in sides),
    }


def _side(check: Check, name: str, summary: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    if name not in summary:
        number = float(name)
        return {"mean": number, "values": [number]}
    if check.metric not in summary[name]:
        raise StudyError(f"check {check}: {name} has no {check.metric}; it has {', '.join(summary[name])}")
    return dict(summary[name][check.metric])
