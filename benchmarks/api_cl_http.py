"""A classifier behind HTTP: bytes against JSON, and several requests in flight against one after the other.

    python -m benchmarks.api_cl_http [--quick] [--repeats 5]

Client and server are two processes of one machine, so that what counts is the time on the clock: rows per second of
images 28x28 of random numbers. The network behind the service is one matrix, as the transport is what is measured. In
the second case the service takes 20 ms more for each request, as one far away does. `--quick` sends fewer images, and
leaves no file unless `--results` names a folder.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.runner import Case, all_threads, run_case, show, timed, write_records
from zoo.api_cl.boxes import ModuleAPI
from zoo.api_cl.http_box import HTTPAPI
from zoo.api_cl.networks import build_classifier
from zoo.api_cl.server import classifier_app, serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

    from torch import Tensor

RESULTS = Path(__file__).resolve().parent.parent / "results" / "api_cl"
COMMAND = "python -m benchmarks.api_cl_http"
DATA = "random numbers"
SHAPE = (1, 28, 28)
CLASSES = (0, 1, 2, 3, 4)
LATENCY = 0.02


def classifier(latency: float = 0.0) -> ModuleAPI:
    """The network behind the service."""
    torch.manual_seed(0)
    network = build_classifier("logistic", SHAPE, len(CLASSES))
    return ModuleAPI(network, CLASSES, name="local", input_shape=SHAPE, latency=latency)


def _serve(latency: float, line: Connection) -> None:
    torch.set_num_threads(1)
    with serving(classifier_app(classifier(latency))) as url:
        line.send(url)
        line.recv()


@contextmanager
def service(latency: float) -> Iterator[str]:
    """The URL of a service in a process of its own."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(latency, theirs), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        ours.send("stop")
        process.join()


class Transport:
    """The same images through two clients.

    Args:
        url: Where the service is.
        rows: Images of a query.
        max_batch: Images of a request.
    """

    def __init__(self, url: str, rows: int = 2048, max_batch: int = 128) -> None:
        self.url, self.max_batch = url, max_batch
        self.images = 2 * torch.rand(rows, *SHAPE, generator=torch.Generator().manual_seed(0)) - 1

    def client(self, protocol: str, max_inflight: int) -> HTTPAPI:
        """A client of the service."""
        return HTTPAPI(self.url, protocol, CLASSES, max_batch=self.max_batch, max_inflight=max_inflight)

    def run(self, api: HTTPAPI) -> Tensor:
        """One query of all images."""
        return api.query(self.images, "student")

    def record(self, name: str, ours: HTTPAPI, reference: HTTPAPI, required: float, repeats: int) -> dict[str, Any]:
        """Time two clients; `required` is the ratio of rows per second to reach."""
        rows = len(self.images)
        note = (
            f"{rows} images in requests of {self.max_batch}; the ratio asked for is that of the time on the clock, the "
            "processor seconds are the client's alone"
        )
        case = Case(name, timed(lambda: self.run(ours)), timed(lambda: self.run(reference)), note=note)
        record = run_case(case, 1, repeats)
        for side in ("ours", "reference"):
            record[f"{side}_rows_per_second"] = rows / record[f"{side}_wall_seconds"]
        record["required_wall_ratio"] = required
        return record


def bytes_against_json(url: str, rows: int, repeats: int) -> dict[str, Any]:
    """The binary extension beside JSON, one request after the other."""
    transport = Transport(url, rows)
    with transport.client("oip_binary", 1) as ours, transport.client("oip", 1) as reference:
        return transport.record("bytes against JSON", ours, reference, 5, repeats)


def in_flight_against_sequential(url: str, rows: int, repeats: int) -> dict[str, Any]:
    """Four requests in flight beside one after the other."""
    transport = Transport(url, rows, max_batch=64)
    with transport.client("oip_binary", 4) as ours, transport.client("oip_binary", 1) as reference:
        name = f"4 in flight against 1, {1000 * LATENCY:g} ms"
        return transport.record(name, ours, reference, 2, repeats)


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each side")
    parser.add_argument("--results", type=Path, help=f"folder of the JSON file, {RESULTS} without --quick")
    options = parser.parse_args()
    rows = 256 if options.quick else 2048
    with service(0.0) as url:
        records = [bytes_against_json(url, rows, options.repeats)]
    with service(LATENCY) as url:
        records.append(in_flight_against_sequential(url, rows, options.repeats))
    for record in records:
        print(
            f"{record['name']}: {record['ours_rows_per_second']:,.0f} rows/s, {record['wall_ratio']:.1f} times as many "
            f"(asked for {record['required_wall_ratio']:g})"
        )
    with tempfile.TemporaryDirectory() as passing:
        folder = options.results or (Path(passing) if options.quick else RESULTS)
        command = f"{COMMAND} --quick" if options.quick else COMMAND
        write_records(records, folder / "benchmark_http.json", command=command, data=DATA)
    show(records, f"A classifier behind HTTP, {all_threads()} cores")


if __name__ == "__main__":
    main()
