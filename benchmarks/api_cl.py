"""Zeroth-order gradients with all directions in one batch, against a Python loop over directions.

    python -m benchmarks.api_cl [--repeats 9] [--threads 1] [--device cpu]

Both sides ask two LeNets, one of them the API, at points along as many random directions; times are those of 100
estimates, scaled from a few. What a batch saves is what a call costs beside its arithmetic: launching kernels on a GPU,
a request to a service (`a call takes 20 ms`), the overhead of operators for a few small images. Where the arithmetic of
the networks fills the processor, as that of 64 images already does on one core, no batch can make it less. There the
networks take the batch in pieces of 256 rows: `in one piece` shows what it costs to fetch new memory from the system
for the activations of all rows, layer by layer.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.runner import Case, Clock, Timing, all_threads, report, show
from zoo.api_cl.networks import build_classifier
from zoo.api_cl.zeroth_order import ZerothOrderGradient

RESULTS = Path(__file__).resolve().parent.parent / "results" / "api_cl"
COMMAND = "python -m benchmarks.api_cl"
IMAGE_SHAPE, NUM_CLASSES, NUM_DIRECTIONS, EPS = (1, 28, 28), 5, 20, 1e-3
ROWS_AT_ONCE = 256  # that a network takes
ESTIMATES = 100  # that times are given for

LossFunction = Callable[[Tensor], Tensor]


def loop_estimate(loss_fn: LossFunction, x: Tensor, directions: Tensor, eps: float) -> Tensor:
    """The estimate in plain form: one evaluation a direction.

    Args:
        loss_fn: Losses `(B,)` of points `(B, ...)`.
        x: Samples `(B, ...)`.
        directions: `(m, B, ...)`.
        eps: Length of a step.
    """
    base = loss_fn(x)
    gradient = torch.zeros_like(x)
    for direction in directions:
        slope = (loss_fn(x + eps * direction) - base) / eps
        gradient += slope.reshape(-1, *[1] * (x.ndim - 1)) * direction
    return gradient * (x[0].numel() / len(directions))


def black_box_loss(
    api: nn.Module, model: nn.Module, seconds: float = 0.0, rows_at_once: int = ROWS_AT_ONCE
) -> LossFunction:
    """The adversarial loss of points before tanh: minus the mean absolute difference of log-responses.

    Args:
        api: Stands for the service.
        model: The model that learns from it.
        seconds: What each call of the service takes beside its arithmetic.
        rows_at_once: Largest batch that a network takes.
    """

    def answers(network: nn.Module, images: Tensor) -> Tensor:
        return torch.cat([network(piece) for piece in images.split(rows_at_once)]).log_softmax(-1)

    def loss(points: Tensor) -> Tensor:
        images = points.tanh()
        if seconds:
            time.sleep(seconds)
        return -(answers(api, images) - answers(model, images)).abs().mean(-1)

    return loss


def repeated(function: Callable[[], object], times: int, device: torch.device) -> Callable[[], Timing]:
    """A side that estimates so many times and returns the time of `ESTIMATES`."""

    def side() -> Timing:
        clock = Clock()
        with torch.no_grad():
            for _ in range(times):
                function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock.read() * (ESTIMATES / times)

    return side


def estimate_case(
    batch_size: int,
    device: torch.device,
    kind: str = "sphere",
    times: int = 2,
    seconds: float = 0.0,
    rows_at_once: int = ROWS_AT_ONCE,
    required: float | None = None,
) -> Case:
    """One estimate for a batch.

    Args:
        batch_size: Samples.
        device: Of everything.
        kind: Our directions; the loop always draws them on the sphere, one after the other.
        times: Estimates per timing.
        seconds: What each call of the service takes beside its arithmetic.
        rows_at_once: Largest batch that a network takes.
        required: Ratio asked for.
    """
    torch.manual_seed(0)
    api, model = (build_classifier("lenet", IMAGE_SHAPE, NUM_CLASSES).to(device).eval() for _ in range(2))
    loss = black_box_loss(api, model, seconds, rows_at_once)
    x = torch.randn(batch_size, *IMAGE_SHAPE, device=device)
    ours = ZerothOrderGradient(NUM_DIRECTIONS, EPS, kind)
    drawer = ZerothOrderGradient(NUM_DIRECTIONS, EPS, "sphere")
    call = f", a call takes {1000 * seconds:g} ms" if seconds else ""
    whole = ", in one piece" if rows_at_once >= batch_size * ours.rows_per_sample > ROWS_AT_ONCE else ""
    return Case(
        f"{batch_size} images, {kind}{call}{whole}",
        repeated(lambda: ours(loss, x), times, device),
        repeated(lambda: loop_estimate(loss, x, drawer.draw(x), EPS), times, device),
        required,
        f"LeNet, 28x28, {NUM_DIRECTIONS} directions, {device.type}; reference: a loop over directions; "
        f"{times} estimate(s) per timing, scaled to {ESTIMATES}",
    )


def main() -> None:
    """Measure all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each side")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file")
    options = parser.parse_args()
    device: torch.device = options.device
    cases = [
        estimate_case(64, device, required=8),
        estimate_case(64, device, rows_at_once=64 * (NUM_DIRECTIONS + 1)),
        estimate_case(64, device, "orthonormal"),
        estimate_case(1, device, times=20),
        estimate_case(1, device, times=5, seconds=0.02),
        estimate_case(64, device, seconds=0.02),
    ]
    suffix = "" if device.type == "cpu" else f"_{device.type}"
    records = report(
        cases,
        options.results / f"benchmark_zeroth_order{suffix}.json",
        command=COMMAND + ("" if device.type == "cpu" else f" --device {device}"),
        data="random numbers",
        threads=options.threads,
        repeats=options.repeats,
    )
    show(records, f"Zeroth-order gradients on {device}, {all_threads()} cores")


if __name__ == "__main__":
    main()
