"""The table 'method x task': base, experts, joint training, all merges, AdaMerging; with and without Surgery.

    python -m studies.merging.compare [--config configs/merging/eight_tasks.yaml] [--seeds 0 1 2] [--name eight_tasks]

Everything follows the config of AdaMerging that is given: its data, its experts or recipe (trained once per seed, and
kept), its number of adaptation steps. Each row is a command of `train.py`, run in this process. The result goes to
results/merging/<name>.json, with the claims of the two papers as checks, and the picture to docs/merging_<name>.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from train import run_config
from zoo.common.results import environment, peak_memory, write_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ROOT = Path(__file__).resolve().parents[2]
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "pretrained": ("pretrained", {}),
    "individual": ("individual", {}),
    "joint": ("joint", {}),
    "average": ("average", {}),
    "task_arithmetic": ("task_arithmetic", {"coef": 0.3}),
    "ties": ("ties", {"coef": 0.3}),
    "dare": ("dare", {"coef": 0.3}),
    "fisher": ("fisher", {}),
    "regmean": ("regmean", {}),
}
ADAPTED: dict[str, dict[str, Any]] = {
    "adamerging_task": {"granularity": "task"},
    "adamerging_task_pp": {"granularity": "task", "preprocess": "ties"},
    "adamerging_layer": {"granularity": "layer"},
    "adamerging_layer_pp": {"granularity": "layer", "preprocess": "ties"},
    "adamerging_block": {"granularity": "block"},
    "adamerging_project": {"granularity": "layer", "constraint": "project"},
}
SHARED = ("experts", "pretrained", "heads", "encoder", "encoder_options", "recipe", "merge_tasks", "exclude")
"""Options of AdaMerging that the other modules have as well."""
NOT_REPAIRED = ("pretrained", "individual", "joint")
CLAIMS = ("average", "task_arithmetic", "ties", "adamerging_layer")
"""Bases of the published table of Surgery."""

Row = dict[str, float]


class Comparison:
    """The rows of one seed.

    Args:
        config: A config of AdaMerging.
        seed: The seed of experts and adaptation.
        folder: Where runs are kept.
        methods: Rows to have; all by default.
        surgery_steps: Steps of Surgery's training; 0 leaves Surgery out.
        arguments: Further arguments of all commands.
        kept_only: Whether rows that were not run before are left out.
        surgery_rank: Rank of Surgery's modules.
    """

    def __init__(
        self,
        config: Path,
        seed: int,
        folder: Path,
        methods: Sequence[str] | None = None,
        surgery_steps: int = 1000,
        arguments: Sequence[str] = (),
        kept_only: bool = False,
        surgery_rank: int = 16,
    ) -> None:
        self.kept_only, self.surgery_rank = kept_only, surgery_rank
        self.seed, self.folder, self.methods = seed, folder, methods
        self.surgery_steps, self.arguments = surgery_steps, list(arguments)
        self.settings = yaml.safe_load(config.read_text(encoding="utf-8"))

    def _content(self, model: str, options: Mapping[str, Any], steps: int | None = None) -> dict[str, Any]:
        """The config of a row's command."""
        given = dict(self.settings["model"]["init_args"])
        if model != "AdaMerging":
            # The rest is AdaMerging's own.
            given = {key: value for key, value in given.items() if key in SHARED}
        content = dict(self.settings)
        content["model"] = {"class_path": model, "init_args": {**given, **options}}
        content["seed_everything"] = self.seed
        if steps is not None:
            data = content["data"]
            content["data"] = {**data, "init_args": {**data["init_args"], "steps_per_epoch": steps}}
            content["trainer"] = {**content["trainer"], "max_epochs": 1}
        return content

    def _run(self, name: str, content: Mapping[str, Any]) -> dict[str, Any] | None:
        """Metrics, folder and record of a row's command: of an earlier run of the same one, if there is one."""
        kept, command = self.folder / "rows" / f"{name}.json", {"config": content, "arguments": self.arguments}
        if kept.exists():
            done: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
            if done["command"] == json.loads(json.dumps(command)):
                return done
        if self.kept_only:
            return None
        started = time.perf_counter()
        path = self.folder / "command.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        cli = run_config(
            [
                "run", "--config", str(path), "--trainer.default_root_dir", str(self.folder / "runs"),
                "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false", *self.arguments,
            ]
        )  # fmt: skip
        seconds = {"all": round(time.perf_counter() - started, 1)}
        run = {"row": name, "seed": self.seed, "seconds": seconds, **peak_memory(), **environment()}
        done = {"command": command, "metrics": metrics_of(cli), "folder": str(cli.run_folder), "run": run}
        write_json(kept, done)
        print(f"seed {self.seed}  {name:<28} {done['metrics']['test/acc/mean']:.4f}", flush=True)
        return done

    def _wanted(self, name: str) -> bool:
        return self.methods is None or name in self.methods

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Names of rows, and what is kept of each: `metrics`, `folder` and `run`."""
        for name, (rule, options) in RULES.items():
            if not self._wanted(name) or (name == "joint" and not self._has_joint()):
                continue
            own = {"rule": rule, "rule_options": options}
            if done := self._run(name, self._content("MergedClassifier", own)):
                yield name, done
            if name not in NOT_REPAIRED:
                yield from self._repaired(name, {"base": rule, "base_options": options})
        for name, options in ADAPTED.items():
            if self._wanted(name) and (done := self._run(name, self._content("AdaMerging", options))):
                yield name, done
                coef = {"coef_path": str(Path(done["folder"]) / "last.ckpt")}
                yield from self._repaired(name, {"base": "adamerging", "base_options": coef})

    def _has_joint(self) -> bool:
        recipe = self.settings["model"]["init_args"].get("recipe") or {}
        return bool(recipe.get("joint_epochs"))

    def _repaired(self, name: str, options: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        if not self.surgery_steps:
            return
        if self.surgery_rank != 16:
            options = {**options, "rank": self.surgery_rank}
        content = self._content("RepresentationSurgery", options, self.surgery_steps)
        if done := self._run(f"{name}_surgery", content):
            yield f"{name}_surgery", done


def metrics_of(cli: Any) -> Row:
    """The test metrics of a run."""
    return {key: float(value) for key, value in cli.result["metrics"].items() if key.startswith("test/")}


def summarise(found: Mapping[int, Mapping[str, Row]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Mean, deviation and values over the seeds, by row and metric; a row that a seed lacks is that of the others."""
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for name in dict.fromkeys(name for rows in found.values() for name in rows):
        rows = [rows[name] for rows in found.values() if name in rows]
        for metric in rows[0]:
            values = [row[metric] for row in rows]
            spread = statistics.stdev(values) if len(values) > 1 else None
            summary.setdefault(name, {})[metric] = {"mean": statistics.fmean(values), "std": spread, "values": values}
    return summary


def checks(summary: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The claims of both papers, on the means over the seeds."""

    def mean(name: str, metric: str = "test/acc/mean") -> float:
        return float(summary[name][metric]["mean"])

    found = []

    def check(text: str, left: float, right: float) -> None:
        found.append({"check": text, "left": round(left, 5), "right": round(right, 5), "holds": left >= right})

    if {"adamerging_layer", "adamerging_task", "task_arithmetic"} <= set(summary):
        layer = mean("adamerging_layer")
        check("layer-wise AdaMerging >= Task Arithmetic + 0.03", layer, mean("task_arithmetic") + 0.03)
        check("layer-wise AdaMerging >= task-wise", layer, mean("adamerging_task"))
    bases = [name for name in summary if f"{name}_surgery" in summary]
    for name in bases:
        check(f"{name}: accuracy with Surgery >= without + 0.03", mean(f"{name}_surgery"), mean(name) + 0.03)
        before = mean(f"{name}_surgery", "test/bias_l1_before/mean")
        check(
            f"{name}: L1 bias falls by >= 40 %",
            0.6 * before,
            mean(f"{name}_surgery", "test/bias_l1/mean"),
        )
    published = [name for name in CLAIMS if name in bases]
    if len(published) > 1:
        alone, repaired = [mean(name) for name in published], [mean(f"{name}_surgery") for name in published]
        check(
            "the spread between the published bases at least halves",
            0.5 * (max(alone) - min(alone)),
            max(repaired) - min(repaired),
        )
    return found


def show(summary: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    tasks = [key.removeprefix("test/acc/") for key in next(iter(summary.values())) if key.startswith("test/acc/")]
    table = Table(title="Accuracy in per cent, mean over the seeds")
    table.add_column("method")
    for task in tasks:
        table.add_column(task, justify="right")
    for name, row in summary.items():
        table.add_row(name, *(f"{100 * row[f'test/acc/{task}']['mean']:.1f}" for task in tasks))
    Console(width=220).print(table)


def picture(summary: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw the gain of Surgery on each base."""
    from zoo.merging.figures import plot_surgery_gain

    bases = {
        name: (row["test/acc/mean"]["mean"], summary[f"{name}_surgery"]["test/acc/mean"]["mean"])
        for name, row in summary.items()
        if f"{name}_surgery" in summary
    }
    plot_surgery_gain(bases).savefig(path, dpi=150, bbox_inches="tight")


def compare(
    config: Path,
    seeds: Sequence[int],
    name: str,
    folder: Path,
    methods: Sequence[str] | None = None,
    surgery_steps: int = 1000,
    arguments: Sequence[str] = (),
    kept_only: bool = False,
    surgery_rank: int = 16,
) -> dict[str, Any]:
    """Run all rows for all seeds; rows that were run before by the same command are kept.

    Args:
        config: A config of AdaMerging.
        seeds: Seeds of experts and adaptation.
        name: Name of the comparison.
        folder: Where runs and experts are kept.
        methods: Rows to have; all by default.
        surgery_steps: Steps of Surgery's training; 0 leaves Surgery out.
        arguments: Further arguments of all commands.
        kept_only: Whether rows that were not run before are left out.
        surgery_rank: Rank of Surgery's modules.
    """
    found: dict[int, dict[str, Row]] = {}
    records = []
    for seed in seeds:
        comparison = Comparison(
            config, seed, folder / str(seed), methods, surgery_steps, arguments, kept_only, surgery_rank
        )
        done = dict(comparison.rows())
        found[seed] = {name: row["metrics"] for name, row in done.items()}
        records += [row["run"] for row in done.values()]
    summary = summarise(found)
    return {
        "title": f"{name}: accuracy by method and task",
        "command": f"python -m studies.merging.compare --config {config.relative_to(ROOT)} --name {name}"
        + (f" --surgery_rank {surgery_rank}" if surgery_rank != 16 else "")
        + (f" --surgery_steps {surgery_steps}" if surgery_steps != 1000 else ""),
        "config": yaml.safe_load(config.read_text(encoding="utf-8")),
        "seeds": list(seeds),
        "summary": summary,
        "checks": checks(summary),
        "runs": records,
    }


def main() -> None:
    """Compare and write; the exit status is 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "merging" / "eight_tasks.yaml")
    parser.add_argument("--name", help="of the result; that of the config by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=[*RULES, *ADAPTED], help="rows to have; all by default")
    parser.add_argument("--surgery_steps", type=int, default=1000, help="of Surgery's training; 0: no Surgery")
    parser.add_argument("--surgery_rank", type=int, default=16, help="rank of Surgery's modules")
    parser.add_argument("--folder", type=Path, help="where runs and experts are kept; runs/compare/<name> by default")
    parser.add_argument("--kept_only", action="store_true", help="leave out rows that were not run before")
    options, arguments = parser.parse_known_args()
    config = options.config.resolve()
    name = options.name or config.stem
    folder = options.folder or ROOT / "runs" / "compare" / name
    content = compare(
        config, options.seeds, name, folder, options.methods, options.surgery_steps, arguments, options.kept_only,
        options.surgery_rank,
    )  # fmt: skip
    write_json(ROOT / "results" / "merging" / f"{name}.json", content)
    if options.surgery_steps:
        picture(content["summary"], ROOT / "docs" / f"merging_{name}.png")
    show(content["summary"])
    for check in content["checks"]:
        verdict = "holds" if check["holds"] else "FAILS"
        print(f"{verdict}  {check['check']}: {check['left']:.4f} and {check['right']:.4f}")
    if not all(check["holds"] for check in content["checks"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
