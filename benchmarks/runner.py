"""Times our code against a plain reference in one process, side by side, and writes what it found.

Both sides of a case are run once to warm up and then in turn, so that a busy machine slows both; the medians count.
"""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from zoo.common.results import environment, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


@dataclass(frozen=True)
class Timing:
    """Processor seconds of all threads, and wall-clock seconds."""

    cpu: float
    wall: float

    def __add__(self, other: Timing) -> Timing:
        """One after the other."""
        return Timing(self.cpu + other.cpu, self.wall + other.wall)

    def __mul__(self, factor: float) -> Timing:
        """The same `factor` times."""
        return Timing(self.cpu * factor, self.wall * factor)


class Clock:
    """Time since it was made or last read."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start anew."""
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def read(self) -> Timing:
        """Time since the last call; the next one counts from here."""
        timing = Timing(time.process_time() - self._cpu, time.perf_counter() - self._wall)
        self.restart()
        return timing


def timed(function: Callable[[], object]) -> Callable[[], Timing]:
    """A side of a case that is one call."""

    def side() -> Timing:
        clock = Clock()
        function()
        return clock.read()

    return side


@dataclass(frozen=True)
class Case:
    """One piece of work done in two ways.

    Attributes:
        name: What is timed.
        ours: Does it once and returns how long the whole of it takes; a part may be timed and scaled up.
        reference: The same for the plain implementation.
        required: Ratio of processor seconds to reach on one thread.
        note: What was timed and how it was scaled.
        base: What everybody pays, such as a step without the method; the record then holds the cost of ours as a
            multiple of it.
        floor: The multiple below which no exact implementation can get.
        at_most: The multiple not to exceed on one thread.
    """

    name: str
    ours: Callable[[], Timing]
    reference: Callable[[], Timing]
    required: float | None = None
    note: str = ""
    base: Callable[[], Timing] | None = None
    floor: float | None = None
    at_most: float | None = None


class PeakMemory:
    """Largest resident memory of this process inside a `with` block, above that at its start."""

    def __init__(self, interval: float = 0.005) -> None:
        self._interval, self._process, self._stop = interval, psutil.Process(), threading.Event()
        self.added_bytes = 0

    def __enter__(self) -> PeakMemory:
        """Return what is free to the system, and watch."""
        gc.collect()
        if sys.platform == "linux":
            # Otherwise memory that an earlier case has left to the allocator hides what this one takes.
            ctypes.CDLL(None).malloc_trim(0)
        self._start = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self.added_bytes = max(self.added_bytes, self._process.memory_info().rss - self._start)

    def __exit__(self, *_: object) -> None:
        """Stop watching."""
        self._stop.set()
        self._thread.join()


def run_case(case: Case, threads: int, repeats: int = 3) -> dict[str, Any]:
    """Time both sides of a case, and its base where it has one.

    Args:
        case: What to time.
        threads: Threads of torch.
        repeats: Timed runs of each side after one to warm up; memory is watched while warming up.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sides = {"reference": case.reference, "ours": case.ours}
        if case.base is not None:
            sides["base"] = case.base
        peaks = {}
        for name, side in sides.items():
            with PeakMemory() as memory:
                side()
            peaks[name] = memory.added_bytes
        timings: dict[str, list[Timing]] = {name: [] for name in sides}
        for _ in range(repeats):
            for name, side in sides.items():
                gc.collect()
                timings[name].append(side())
    finally:
        torch.set_num_threads(before)
    record: dict[str, Any] = {"name": case.name, "threads": threads, "required_ratio": case.required}
    for name, runs in timings.items():
        record[f"{name}_cpu_seconds"] = statistics.median(run.cpu for run in runs)
        record[f"{name}_wall_seconds"] = statistics.median(run.wall for run in runs)
        record[f"{name}_peak_added_bytes"] = peaks[name]
        record[f"{name}_cpu_seconds_of_runs"] = [run.cpu for run in runs]
    record["cpu_ratio"] = record["reference_cpu_seconds"] / record["ours_cpu_seconds"]
    record["wall_ratio"] = record["reference_wall_seconds"] / record["ours_wall_seconds"]
    if case.base is not None:
        # Of each round, as what disturbs a busy machine comes and goes between rounds.
        rounds = zip(timings["ours"], timings["base"], strict=True)
        record["cost"] = statistics.median(ours.cpu / base.cpu for ours, base in rounds)
        record |= {"cost_floor": case.floor, "required_cost_at_most": case.at_most}
    record["note"] = case.note
    return record


def all_threads() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def report(
    cases: Sequence[Case], path: Path, *, command: str, data: str, threads: Sequence[int], repeats: int = 3
) -> list[dict[str, Any]]:
    """Run cases with each number of threads and write what was found.

    Args:
        cases: What to time.
        path: JSON file to write.
        command: How to get this file again.
        data: What the cases worked on.
        threads: Numbers of threads, such as 1 and `all_threads()`.
        repeats: Timed runs of each side.

    Returns:
        The records of the cases, as in the file beside the machine.
    """
    records = []
    for case in cases:
        for count in threads:
            records.append(run_case(case, count, repeats))
            cost = f", {records[-1]['cost']:.2f} times the base" if "cost" in records[-1] else ""
            print(f"{case.name}, {count} thread(s): {records[-1]['cpu_ratio']:.1f}x{cost}", flush=True)
    write_records(records, path, command=command, data=data)
    return records


def write_records(records: Sequence[dict[str, Any]], path: Path, *, command: str, data: str) -> None:
    """Write records, each with a name and the number of threads, beside the machine."""
    content = {"command": command, "data": data, **environment(), "cases": records}
    # The setting left behind by the last case says nothing about the file.
    content.pop("threads")
    write_json(path, content)


def show(records: Sequence[dict[str, Any]], title: str) -> None:
    """Print a table of cases; CPU and wall are seconds, memory is what the warm-up run added at its peak."""
    table = Table(title=title, title_justify="left")
    table.add_column("case")
    with_base = any("cost" in record for record in records)
    for column in (
        "threads",
        "reference\nCPU",
        "here\nCPU",
        "ratio\nCPU",
        "asked\nfor",
        "reference\nwall",
        "here\nwall",
        "ratio\nwall",
        "reference\nMiB",
        "here\nMiB",
        *(("times\nbase", "at\nmost") if with_base else ()),
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for record in records:
        required = record["required_ratio"]
        table.add_row(
            record["name"],
            str(record["threads"]),
            *(f"{record[f'{side}_cpu_seconds']:.3g}" for side in ("reference", "ours")),
            f"{record['cpu_ratio']:.1f}x",
            "" if required is None else f"{required:g}x",
            *(f"{record[f'{side}_wall_seconds']:.3g}" for side in ("reference", "ours")),
            f"{record['wall_ratio']:.1f}x",
            *(f"{record[f'{side}_peak_added_bytes'] / 2**20:,.0f}" for side in ("reference", "ours")),
            *(_number(record.get(key)) for key in ("cost", "required_cost_at_most") if with_base),
        )
    console = Console()
    # A pipe has no width of its own, and the table must not be folded into it.
    Console(width=max(console.width, 150 if with_base else 130)).print(table)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
