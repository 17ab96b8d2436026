"""Tables in README.md and the methods' cards, rebuilt from the files under `results/`.

A page holds a pair of comments, and what stands between them is written by `python -m zoo.common.tables`:

    <!-- table: results/ticoserec/core.json test/hr@5 test/ndcg@5=NDCG@5 -->
    <!-- /table -->

The file may be a pattern (`results/ticoserec/benchmark_*.json`); then come the columns, each optionally with the title
to show. `python -m zoo.common.tables --check` changes nothing and fails if a page differs from its files.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

PAGES = ("README.md", "zoo/*/README.md", "benchmarks/README.md")
_TABLE = re.compile(r"(<!-- table: (?P<spec>[^>]*?) -->\n).*?(?P<end><!-- /table -->)", re.DOTALL)
_BENCHMARK_COLUMNS = ("threads", "reference_cpu_seconds", "ours_cpu_seconds", "cpu_ratio", "wall_ratio")
_TITLES = {
    "name": "",
    "reference_cpu_seconds": "reference, CPU s",
    "ours_cpu_seconds": "here, CPU s",
    "cpu_ratio": "ratio",
    "wall_ratio": "ratio (wall)",
    "peak_rss_bytes": "peak memory",
    "seconds/fit": "training",
    "seconds/test": "test",
}


def rebuild(root: Path, check: bool = False) -> list[Path]:
    """Bring the tables of all pages up to date.

    Args:
        root: Folder of README.md.
        check: Write nothing.

    Returns:
        The pages that were (or, with `check`, are) out of date.

    Raises:
        ValueError: If a table names no file, or a column that its file does not have.
    """
    stale = []
    for pattern in PAGES:
        for page in sorted(root.glob(pattern)):
            before = page.read_text(encoding="utf-8")
            try:
                after = _TABLE.sub(lambda match: match[1] + _table(root, match["spec"]) + match["end"], before)
            except ValueError as error:
                raise ValueError(f"{page}: {error}") from error
            if after != before:
                stale.append(page)
                if not check:
                    page.write_text(after, encoding="utf-8")
    return stale


def _table(root: Path, spec: str) -> str:
    pattern, *wanted = spec.split()
    files = sorted(root.glob(pattern))
    if not files:
        raise ValueError(f"table: no file {pattern}")
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    rows = [row for file, record in zip(files, records, strict=True) for row in _rows(file, record)]
    if not wanted and "cases" in records[0]:
        wanted = list(_BENCHMARK_COLUMNS)
    columns = dict(_column(text) for text in ["name", *wanted])
    for column in columns:
        if not any(column in row for row in rows):
            known = sorted({key for row in rows for key in row} - {"name"})
            raise ValueError(f"table: {pattern} has no column {column!r}; it has {', '.join(known)}")
    lines = [list(columns.values()), ["---", *["---:"] * (len(columns) - 1)]]
    lines += [[row.get(column, "") for column in columns] for row in rows]
    body = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    sources = "".join(f"{_source(record)}\n" for record in records[:1])
    return f"{body}\n{sources}"


def _column(text: str) -> tuple[str, str]:
    name, _, title = text.partition("=")
    return name, title.replace("_", " ") or _TITLES.get(name, name.removeprefix("test/"))


def _rows(file: Path, record: dict[str, Any]) -> list[dict[str, str]]:
    """Rows of a results file as text: a study's variants, a benchmark's cases, or a single run."""
    if "summary" in record:
        published = record.get("reference", {}).items()
        rows = [{"name": name, **{key: _value(key, value) for key, value in row.items()}} for name, row in published]
        for name, row in record["summary"].items():
            cells = {key: _value(key, cell["mean"], cell["std"]) for key, cell in row.items()}
            rows.append({"name": name, **cells})
        return rows
    if "cases" in record:
        nested = (list, dict)
        cases = [{key: part for key, part in case.items() if not isinstance(part, nested)} for case in record["cases"]]
        return [{key: _value(key, value) for key, value in case.items()} for case in cases]
    if "metrics" in record:
        values = {**record["metrics"], **{f"seconds/{part}": value for part, value in record["seconds"].items()}}
        values["peak_rss_bytes"] = record["peak_rss_bytes"]
        return [{"name": file.stem, **{key: _value(key, value) for key, value in values.items()}}]
    raise ValueError(f"{file}: neither a study, nor a benchmark, nor a run; it has {', '.join(record)}")


def _value(key: str, value: Any, spread: float | None = None) -> str:
    if value is None:
        return "-"
    if isinstance(value, str | int) and not key.endswith("_bytes"):
        return value if isinstance(value, str) else f"{value:,}"
    if key.endswith("_bytes"):
        return f"{value / 2**20:,.0f} MiB"
    if key.startswith("seconds/"):
        return f"{value:,.0f} s"
    if key.endswith("_ratio"):
        return f"{value:.1f}x"
    digits = 4 if abs(value) < 1 and "seconds" not in key else 2
    return f"{value:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def _source(record: dict[str, Any]) -> str:
    """One line: seeds, machine, versions, commit and command behind the numbers."""
    run = record["runs"][0] if record.get("runs") else record
    seeds = record.get("seeds", [run["seed"]] if "seed" in run else [])
    parts = [f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"] if seeds else []
    if len(seeds) > 1:
        parts.append("mean ± standard deviation")
    device = f"{run['cores']} cores" if run["device"] == "cpu" else run["device"]
    threads = "" if "cases" in record else f", {run['threads']} thread{'s' * (run['threads'] > 1)}"
    parts.append(f"{device}{threads}")
    parts.append(f"torch {run['versions']['torch']}")
    if run.get("commit"):
        parts.append(f"commit {run['commit'][:9]}" + ("" if run.get("clean") else " with changes"))
    if "command" in record:
        parts.append(f"`{record['command']}`")
    return f"<sub>{'; '.join(parts)}</sub>"


def main() -> None:
    """Rebuild the pages under the working folder, or with `--check` fail if one is out of date."""
    check = sys.argv[1:] == ["--check"]
    if sys.argv[1:] and not check:
        raise SystemExit(__doc__)
    stale = rebuild(Path.cwd(), check)
    for page in stale:
        print(f"{page.relative_to(Path.cwd())}: {'differs from its results' if check else 'rebuilt'}")
    if check and stale:
        raise SystemExit("run `python -m zoo.common.tables`")


if __name__ == "__main__":
    main()
