import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from zoo.common.tables import rebuild

RUN = {
    "seed": 0,
    "cores": 2,
    "threads": 1,
    "device": "cpu",
    "versions": {"torch": "2.13.0"},
    "commit": "0123456789abcdef",
    "clean": True,
}


def cell(mean: float, std: float | None) -> dict[str, Any]:
    return {"mean": mean, "std": std, "values": []}


STUDY = {
    "command": "python study.py studies/toy/one.yaml",
    "seeds": [0, 1],
    "reference": {"Toy, published": {"test/hr@5": 0.05}},
    "summary": {
        "toy": {"test/hr@5": cell(0.0512, 0.0004), "seconds/fit": cell(1234.5, 2.0), "peak_rss_bytes": cell(2**30, 5)},
    },
    "runs": [RUN],
}
BENCHMARK = {
    **RUN,
    "command": "python -m benchmarks.toy",
    "cases": [
        {
            "name": "epoch",
            "threads": 1,
            "reference_cpu_seconds": 50.0,
            "ours_cpu_seconds": 10.0,
            "cpu_ratio": 5.0,
            "runs": [1.0, 2.0],
        },
    ],
}


def page_with(root: Path, spec: str, record: dict[str, Any]) -> Path:
    (root / "results" / "toy").mkdir(parents=True)
    (root / "results" / "toy" / "one.json").write_text(json.dumps(record))
    page = root / "zoo" / "toy" / "README.md"
    page.parent.mkdir(parents=True)
    page.write_text(f"# Toy\n\n<!-- table: {spec} -->\n<!-- /table -->\n\nThe end.\n")
    return page


def test_pages_agree_with_their_results() -> None:
    assert rebuild(ROOT, check=True) == [], "run `python -m zoo.common.tables`"


def test_study_becomes_rows_of_mean_and_spread_beside_the_published_ones(tmp_path: Path) -> None:
    page = page_with(tmp_path, "results/toy/one.json test/hr@5 seconds/fit peak_rss_bytes=memory", STUDY)
    assert rebuild(tmp_path) == [page]
    assert page.read_text().splitlines()[2:-2] == [
        "<!-- table: results/toy/one.json test/hr@5 seconds/fit peak_rss_bytes=memory -->",
        "|  | hr@5 | training | memory |",
        "| --- | ---: | ---: | ---: |",
        "| Toy, published | 0.0500 |  |  |",
        "| toy | 0.0512 ± 0.0004 | 1,234 s | 1,024 MiB |",
        "",
        "<sub>seeds 0, 1; mean ± standard deviation; 2 cores, 1 thread; torch 2.13.0; commit 012345678; "
        "`python study.py studies/toy/one.yaml`</sub>",
        "<!-- /table -->",
    ]
    assert page.read_text().endswith("<!-- /table -->\n\nThe end.\n")


def test_benchmark_has_columns_of_its_own(tmp_path: Path) -> None:
    page = page_with(tmp_path, "results/toy/o*.json threads ours_cpu_seconds cpu_ratio", BENCHMARK)
    rebuild(tmp_path)
    assert "| epoch | 1 | 10.00 | 5.0x |" in page.read_text()


def test_single_run_is_a_row_named_after_its_file(tmp_path: Path) -> None:
    record = {**RUN, "metrics": {"test/hr@5": 0.25}, "seconds": {"fit": 3.2}, "peak_rss_bytes": 2**20, "clean": False}
    page = page_with(tmp_path, "results/toy/one.json test/hr@5=HR@5 seconds/fit", record)
    rebuild(tmp_path)
    assert "|  | HR@5 | training |" in page.read_text()
    assert "| one | 0.2500 | 3 s |" in page.read_text()
    assert "commit 012345678 with changes" in page.read_text()


def test_second_rebuild_changes_nothing_and_check_sees_an_edited_number(tmp_path: Path) -> None:
    page = page_with(tmp_path, "results/toy/one.json test/hr@5", STUDY)
    assert rebuild(tmp_path, check=True) == [page]
    assert "0.0512" not in page.read_text(), "a check must not write"
    rebuild(tmp_path)
    assert rebuild(tmp_path) == []
    page.write_text(page.read_text().replace("0.0512", "0.0612"))
    assert rebuild(tmp_path, check=True) == [page]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("results/toy/none.json test/hr@5", "no file results/toy/none.json"),
        ("results/toy/one.json test/hr@7", "has no column 'test/hr@7'; it has .*test/hr@5"),
    ],
)
def test_table_of_something_that_is_not_there_is_an_error_that_names_the_page(
    spec: str, message: str, tmp_path: Path
) -> None:
    page_with(tmp_path, spec, STUDY)
    with pytest.raises(ValueError, match=rf"README.md: table: .*{message}"):
        rebuild(tmp_path)
