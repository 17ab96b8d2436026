"""Run a study: `python study.py studies/<method>/<name>.yaml` trains what is missing and writes its results file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from zoo.common.study import StudyError, load_study, results_path, run_study, write_study

ROOT = Path(__file__).resolve().parent


def main() -> None:
    """Run the study named in `sys.argv`; the exit status is 1 if a check does not hold, 2 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path, help="studies/<method>/<name>.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the study's own")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--smoke", action="store_true", help="try it out: the study's `smoke` settings and one seed")
    options = parser.parse_args()
    try:
        study = load_study(options.study, ROOT)
        content = run_study(study, ROOT, options.seeds, options.jobs, options.smoke)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    path = results_path(study, ROOT, options.smoke)
    write_study(path, content)
    for check in content["checks"]:
        verdict = "smoke" if options.smoke else "holds" if check["holds"] else "FAILS"
        ratio = "" if check["ratio"] is None else f", ratio {check['ratio']:.3f}"
        print(f"{verdict}  {check['check']}  ({check['left']} and {check['right']}{ratio})")
    hint = "a smoke run proves nothing" if options.smoke else "`python -m zoo.common.tables` puts them into the pages"
    print(f"Results in {path.relative_to(ROOT)}; {hint}")
    if not options.smoke and not all(check["holds"] for check in content["checks"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
