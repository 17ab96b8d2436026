"""Which task moves which layer of the Adult model, under Adam and under AdaTask.

    python -m studies.adatask.dominance [--epochs 8] [--seeds 0 1 2]

Trains configs/adatask/adult.yaml with both optimizers and a monitor (decay 0.9), and writes the mean share rAU of each
task in the updates of each shared tensor, over the seeds, with the paper's claim as checks and as a picture. With that
decay rAU looks back on some ten steps, and of a bias of eight numbers it jumps about: the checks are on the mean of the
ends of all epochs, and the values at the end of the training stand beside it (`<optimizer>/<task>/last`).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas
from lightning.pytorch import Callback, LightningModule, Trainer

from train import run_config
from zoo.adatask.callbacks import TaskDominanceMonitor
from zoo.adatask.figures import plot_balance_comparison
from zoo.common.results import environment, peak_memory, write_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pandas import DataFrame

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "results" / "adatask" / "dominance.json"
PICTURE = ROOT / "docs" / "adatask_dominance.png"
OPTIMIZERS = ("adam", "adatask")
DECAY = 0.9


class Snapshots(Callback):
    """Keeps the monitor's table of every epoch's end."""

    def __init__(self) -> None:
        self.tables: list[DataFrame] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take one."""
        (monitor,) = (c for c in trainer.callbacks if isinstance(c, TaskDominanceMonitor))  # type: ignore[attr-defined]
        self.tables.append(monitor.table())


def shares(optimizer: str, seed: int, arguments: Sequence[str], folder: Path) -> DataFrame:
    """Mean shares in one training, by shared tensor and task: over its epochs (`mean`) and at its end (`last`)."""
    cli = run_config(
        [
            "fit", "--config", str(ROOT / "configs" / "adatask" / "adult.yaml"), "--seed_everything", str(seed),
            "--model.optimizer", optimizer, "--trainer.default_root_dir", str(folder / f"{optimizer}-{seed}"),
            "--trainer.callbacks+=zoo.adatask.TaskDominanceMonitor", f"--trainer.callbacks.decay={DECAY}",
            "--trainer.callbacks.groups=parameter", "--trainer.callbacks.histogram_every_n_epochs=0",
            "--trainer.callbacks+=studies.adatask.dominance.Snapshots", *arguments,
        ]
    )  # fmt: skip
    (kept,) = (c.tables for c in cli.trainer.callbacks if type(c).__name__ == Snapshots.__name__)  # type: ignore[attr-defined]
    means = pandas.concat(kept).groupby(["layer", "task"], sort=False)["mean"].mean().reset_index()
    last = kept[-1][["layer", "task", "mean"]].rename(columns={"mean": "last"})
    return means.merge(last, on=["layer", "task"])


def summarise(tables: Mapping[tuple[str, int], DataFrame], seeds: Sequence[int]) -> dict[str, Any]:
    """Mean, deviation and values over the seeds, by tensor and `<optimizer>/<task>`."""
    summary: dict[str, Any] = {}
    for optimizer in OPTIMIZERS:
        for row in tables[optimizer, seeds[0]].to_dict("records"):
            for column, suffix in (("mean", ""), ("last", "/last")):
                values = []
                for seed in seeds:
                    table = tables[optimizer, seed]
                    own = table[(table["layer"] == row["layer"]) & (table["task"] == row["task"])]
                    values.append(float(own[column].item()))
                spread = statistics.stdev(values) if len(values) > 1 else None
                cell = {"mean": statistics.fmean(values), "std": spread, "values": values}
                summary.setdefault(row["layer"].removeprefix("backbone."), {})[f"{optimizer}/{row['task']}{suffix}"] = (
                    cell
                )
    return summary


def checks(summary: Mapping[str, Any], tasks: Sequence[str], small: str) -> list[dict[str, Any]]:
    """The claims, on every tensor of the trunk and every seed."""
    trunk = {name: row for name, row in summary.items() if name.startswith("trunk")}
    largest = max(max(row[f"adam/{small}"]["values"]) for row in trunk.values())
    own = ("adatask/" + task for task in tasks)
    balanced = [value for key in own for row in trunk.values() for value in row[key]["values"]]
    return [
        {"check": f"share of {small} under adam < 0.01 each", "left": largest, "right": 0.01, "holds": largest < 0.01},
        {"check": "smallest share under adatask >= 0.15", "left": min(balanced), "right": 0.15,
         "holds": min(balanced) >= 0.15},
        {"check": "largest share under adatask <= 0.55", "left": max(balanced), "right": 0.55,
         "holds": max(balanced) <= 0.55},
    ]  # fmt: skip


def main() -> None:
    """Train, write the result and the picture; the exit status is 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    started = time.perf_counter()
    arguments = ["--trainer.max_epochs", str(options.epochs), "--trainer.enable_progress_bar", "false"]
    with tempfile.TemporaryDirectory() as folder:
        tables = {
            (optimizer, seed): shares(optimizer, seed, arguments, Path(folder))
            for optimizer in OPTIMIZERS
            for seed in options.seeds
        }
    summary = summarise(tables, options.seeds)
    tasks = list(dict.fromkeys(tables["adam", options.seeds[0]]["task"]))
    found = checks(summary, tasks, "income")
    record = {"seconds": {"all": round(time.perf_counter() - started, 1)}, **peak_memory(), **environment()}
    content = {
        "title": "Mean share of each task in the updates of the shared tensors of the Adult model",
        "command": "python -m studies.adatask.dominance",
        "seeds": options.seeds,
        "summary": summary,
        "checks": found,
        "runs": [record],
    }
    write_json(RESULT, content)
    left, right = (
        [[row[f"{optimizer}/{task}"]["mean"] for task in tasks] for row in summary.values()] for optimizer in OPTIMIZERS
    )
    figure = plot_balance_comparison(left, right, list(summary), tasks, ("Adam", "AdaTask"))
    figure.savefig(PICTURE, dpi=150, bbox_inches="tight")
    for check in found:
        print(f"{'holds' if check['holds'] else 'FAILS'}  {check['check']}: {check['left']:.4g}")
    if not all(check["holds"] for check in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
