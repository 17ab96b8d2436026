"""Do titles that were crafted against one recommender work on another one, which was never asked?

    python -m studies.text_attack.transfer [--study studies/text_attack/games.yaml] [--seeds 0 1] [--jobs 1]

Victims and attacked titles are those that the runs of the study have left; runs that are missing are made first. The
victims of two seeds differ in their first weights and in the order of their training. Each target's attacked title of
one seed is scored on the victim of every seed without a search, over all users. The result goes to
results/text_attack/transfer.json: by attack the lift on the victim that was asked (`lift/white`) and on the others
(`lift/transferred`), means over the seeds of the victim that was asked, and each pair (`lift/0_on_1`: crafted on the
victim of seed 0, scored on that of seed 1).
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from datamodules.text_rec import TextRecData
from zoo.common.results import environment, peak_memory, write_json
from zoo.common.study import StudyError, load_study, plan, run_study
from zoo.text_attack.attack import AttackResult
from zoo.text_attack.attack_options import LIST_LENGTHS
from zoo.text_attack.exposure import top_scores
from zoo.text_attack.transfer import TransferStudy, exposure_scorer
from zoo.text_attack.victims import load_victim

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from zoo.common.study import Run
    from zoo.text_attack.transfer import TransferMatrix
    from zoo.text_attack.types import RecBatch
    from zoo.text_attack.victim import TextRecVictim

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "results" / "text_attack" / "transfer.json"
STUDY = ROOT / "studies" / "text_attack" / "games.yaml"
SEARCHES = ("deepwordbug", "punc")
"""Attacks of which a part of the lift is to carry over."""
DIFFERENCE = 1e-3
"""Largest difference between the exposure here and that of the runs: other threads may turn a tie over."""


def scorer(victim: TextRecVictim, users: RecBatch, k: int) -> Callable[[int, list[str]], Tensor]:
    """Exposure `(titles,)` of titles of an item in the lists of length `k` that a retrieval victim gives the users."""
    if victim.kind != "retrieval":
        raise ValueError(f"transfer is measured between retrieval victims, got a {type(victim).__name__}")
    state = victim.user_state(users)
    return exposure_scorer(
        lambda titles: victim.score(state, titles),
        top_scores(state, victim.encode_items(), k),  # type: ignore[operator]
    )


def left_by(run: Run, root: Path = ROOT) -> tuple[Path, list[AttackResult]]:
    """Of a finished run: the checkpoint of the victim that it asked, and its attacked titles."""
    files = sorted(run.folder.glob("*/version_*/attacks.jsonl"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise StudyError(f"{run.variant}, seed {run.seed}: no attacks.jsonl in {run.folder}")
    lines = files[-1].read_text(encoding="utf-8").splitlines()
    given = dict(argument.removeprefix("--").split("=", 1) for argument in run.handed(root))
    return root / given["model.victim_checkpoint"], [AttackResult.from_json(line) for line in lines[1:]]


def summarise(matrices: Mapping[str, TransferMatrix]) -> dict[str, dict[str, dict[str, Any]]]:
    """By attack: white and transferred lift and win rate, a value a source, and the lift of each pair."""
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for attack, matrix in matrices.items():
        row = summary[attack] = {}
        own = torch.eye(len(matrix.sources), dtype=torch.bool)
        for name, table in (("lift", matrix.lift), ("win_rate", matrix.win_rate)):
            row[f"{name}/white"] = _cell(table[own].tolist())
            row[f"{name}/transferred"] = _cell(table[~own].view(len(own), -1).mean(1).tolist())
        for source, lifts in matrix.to_dict().items():
            row |= {f"lift/{source}_on_{victim}": _cell([lift]) for victim, lift in lifts.items()}
    return summary


def _cell(values: list[float]) -> dict[str, Any]:
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": spread, "values": values}


def checks(summary: Mapping[str, Mapping[str, Any]], difference: float) -> list[dict[str, Any]]:
    """Of searches a part of the lift carries over; the white entries are what the runs reported."""
    found = [
        {
            "check": "exposures of the runs and here differ by at most",
            "left": DIFFERENCE,
            "right": round(difference, 6),
            "holds": difference <= DIFFERENCE,
        }
    ]
    for attack in SEARCHES:
        if attack in summary:
            white, moved = (summary[attack][f"lift/{name}"]["mean"] for name in ("white", "transferred"))
            for text, left, right in (
                (f"{attack}: transferred lift > 1", moved, 1.0),
                (f"{attack}: white lift > transferred lift", white, moved),
            ):
                found.append(
                    {"check": text, "left": round(left, 5), "right": round(right, 5), "holds": bool(left > right)}
                )
    return found


def largest_difference(
    victims: Mapping[str, Callable[[int, list[str]], Tensor]], results: Mapping[str, Sequence[AttackResult]]
) -> float:
    """Between the exposures that attacks reported, and those of the same titles in the victims that they asked."""
    largest = 0.0
    for source, attacks in results.items():
        for one in attacks:
            reported = torch.tensor([one.exposure_pre, one.exposure_post], dtype=torch.float64)
            here = victims[source](one.item_id, [one.original, one.perturbed]).double().cpu()
            largest = max(largest, float((here - reported).abs().max()))
    return largest


def transfer(path: Path, seeds: Sequence[int] | None = None, jobs: int = 1, root: Path = ROOT) -> dict[str, Any]:
    """The content of the results file.

    Args:
        path: A study of attacks on retrieval victims that were trained in a run before.
        seeds: At least two, in place of the study's.
        jobs: Runs at a time, where some are missing.
        root: Folder of `train.py`.

    Raises:
        ValueError: If there is only one seed, or victims are not retrieval.
        StudyError: If a run fails.
    """
    started = time.perf_counter()
    study = load_study(path, root)
    seeds = study.seeds if seeds is None else tuple(seeds)
    if len(set(seeds)) < 2:
        raise ValueError(f"transfer needs victims of at least 2 seeds, got {list(seeds)}")
    run_study(study, root, seeds, jobs)
    victims: dict[str, Callable[[int, list[str]], Tensor]] = {}
    checkpoints: dict[str, Path] = {}
    attacks: dict[str, dict[str, list[AttackResult]]] = {}
    users = None
    for run in plan(study, root, seeds):
        checkpoint, results = left_by(run, root)
        config = (run.result() or {})["config"]
        data = TextRecData(**config["data"]["init_args"])
        name = str(run.seed)
        if checkpoints.setdefault(name, checkpoint) != checkpoint:
            raise ValueError(f"{path}: {run.variant}, seed {name}, has another victim than the attacks before it")
        if name not in victims:
            victim = load_victim(str(checkpoint))
            victim.prepare(data)
            users = data.whole("test") if users is None else users
            k = config["model"]["init_args"]["k"] or LIST_LENGTHS[victim.kind]
            victims[name] = scorer(victim, users, k)
        attacks.setdefault(run.variant, {})[name] = results
    matrices = {attack: TransferStudy(victims, results).matrix() for attack, results in attacks.items()}
    summary = summarise(matrices)
    difference = max(largest_difference(victims, results) for results in attacks.values())
    shown = path.resolve().relative_to(root.resolve()).as_posix()
    return {
        "title": f"{study.title}: titles of one seed's victim on another's",
        "command": "python -m studies.text_attack.transfer" + (f" --study {shown}" if path != STUDY else ""),
        "seeds": list(seeds),
        "targets": len(next(iter(next(iter(attacks.values())).values()))),
        "summary": summary,
        "checks": checks(summary, difference),
        "runs": [{"seconds": {"all": round(time.perf_counter() - started, 1)}, **peak_memory(), **environment()}],
    }


def main() -> None:
    """Measure and write; the exit status is 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=STUDY, help="a study of attacks on trained retrieval victims")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the study's own")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, where some are missing")
    options = parser.parse_args()
    content = transfer(options.study.resolve(), options.seeds, options.jobs)
    write_json(RESULT, content)
    for attack, row in content["summary"].items():
        lifts = "  ".join(f"{name.removeprefix('lift/')} x{cell['mean']:.2f}" for name, cell in row.items())
        print(f"{attack:<14}{lifts}")
    for check in content["checks"]:
        verdict = "holds" if check["holds"] else "FAILS"
        print(f"{verdict}  {check['check']}: {check['left']} and {check['right']}")
    print(f"Results in {RESULT.relative_to(ROOT)}")
    if not all(check["holds"] for check in content["checks"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
