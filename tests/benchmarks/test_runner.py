import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks.runner import Case, Clock, PeakMemory, Timing, report, run_case, show, timed


def test_timings_add_and_scale() -> None:
    assert Timing(1, 2) + Timing(3, 4) * 2 == Timing(7, 10)


def test_clock_counts_from_its_last_reading() -> None:
    clock = Clock()
    time.sleep(0.05)
    first, second = clock.read(), clock.read()
    assert first.wall >= 0.05
    assert second.wall < first.wall


def test_peak_memory_sees_what_was_freed_again() -> None:
    with PeakMemory(interval=0.001) as memory:
        block = torch.ones(40 * 2**20 // 4)
        time.sleep(0.05)
        del block
    assert 30 * 2**20 < memory.added_bytes < 80 * 2**20


def test_case_is_warmed_up_and_timed_in_turn_with_its_threads() -> None:
    calls: list[tuple[str, int]] = []

    def side(name: str, seconds: float) -> Timing:
        calls.append((name, torch.get_num_threads()))
        return Timing(seconds * len(calls), seconds)

    before = torch.get_num_threads()
    case = Case("toy", lambda: side("ours", 1), lambda: side("reference", 10), required=2)
    record = run_case(case, threads=before + 1, repeats=3)
    assert [name for name, _ in calls] == ["reference", "ours"] * 4
    assert {threads for _, threads in calls} == {before + 1}
    assert torch.get_num_threads() == before
    # Medians of the third, fifth, seventh and of the fourth, sixth, eighth call.
    assert (record["reference_cpu_seconds"], record["ours_cpu_seconds"]) == (50, 6)
    assert record["cpu_ratio"] == pytest.approx(50 / 6)
    assert record["wall_ratio"] == 10


def test_cost_is_a_multiple_of_the_base_in_the_same_round() -> None:
    calls: list[str] = []

    def side(name: str, seconds: float) -> Timing:
        calls.append(name)
        # A machine that is ten times slower in the second round of three.
        return Timing(seconds * (10 if 6 <= len(calls) - 1 < 9 else 1), seconds)

    case = Case(
        "toy",
        lambda: side("ours", 3),
        lambda: side("reference", 12),
        base=lambda: side("base", 2),
        floor=1.25,
        at_most=1.6,
    )
    record = run_case(case, threads=1, repeats=3)
    assert calls == ["reference", "ours", "base"] * 4
    assert (record["cost"], record["cost_floor"], record["required_cost_at_most"]) == (1.5, 1.25, 1.6)
    assert record["base_cpu_seconds"] == 2
    assert record["cpu_ratio"] == 4


def test_case_without_a_base_has_no_cost() -> None:
    record = run_case(Case("toy", lambda: Timing(1, 1), lambda: Timing(2, 2)), threads=1, repeats=1)
    assert not [key for key in record if "cost" in key or "base" in key]


def test_report_is_a_file_with_cases_and_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = Case("sleep", timed(lambda: sum(range(1000))), timed(lambda: sum(range(100_000))))
    path = tmp_path / "benchmark.json"
    records = report([case], path, command="python -m benchmarks.toy", data="none", threads=[1, 2], repeats=2)
    content = json.loads(path.read_text())
    assert content["cases"] == records
    assert [record["threads"] for record in records] == [1, 2]
    assert content["command"] == "python -m benchmarks.toy"
    assert content["versions"]["torch"] == torch.__version__
    capsys.readouterr()
    show(records, "toy")
    shown = capsys.readouterr().out
    assert "sleep" in shown
    assert "base" not in shown


def test_table_shows_cost_beside_its_bound(capsys: pytest.CaptureFixture[str]) -> None:
    with_base = Case("heavy", lambda: Timing(3, 3), lambda: Timing(9, 9), base=lambda: Timing(2, 2), at_most=1.75)
    plain = Case("light", lambda: Timing(1, 1), lambda: Timing(2, 2))
    show([run_case(case, threads=1, repeats=1) for case in (with_base, plain)], "toy")
    rows = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if "│" in line}
    assert "1.50 │ 1.75" in rows["heavy"]
    assert "1.50" not in rows["light"]
