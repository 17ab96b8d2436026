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
    assert "sleep" in capsys.readouterr().out
