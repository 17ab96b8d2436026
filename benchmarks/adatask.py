"""AdaTask against the published procedure in plain form, and against training without it.

    python -m benchmarks.adatask [--paths step_large training_step] [--repeats 9] [--threads 1]

Gradients and images are random numbers; times are those of 1,000 steps, scaled from a few. What AdaTask costs is given
as a multiple of one ordinary step with fused Adam, beside the multiple below which no exact implementation can get: K
for the optimizer's step, which has K times the accumulators, and about (1 + 2K) / 3 for training, where K backward
passes, each about twice a forward pass, replace one.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.reference.adatask import PlainAdaTask, separate_backwards
from benchmarks.runner import Case, Clock, PeakMemory, Timing, all_threads, report, show, write_records
from zoo.adatask import AdaTask
from zoo.adatask.backbones.mtan import MTAN
from zoo.adatask.gradients import infer_membership

RESULTS = Path(__file__).resolve().parent.parent / "results" / "adatask"
COMMAND = "python -m benchmarks.adatask"
BATCH_SIZE, IMAGE_SIZE, CHANNELS = 16, 48, (32, 64, 64)
STEPS_AT_ONCE = 20
STEPS = 1000  # that times are given for
MIB = 2**20
_M_MMAP_THRESHOLD = -3  # of malloc.h

Shapes: TypeAlias = Sequence[torch.Size]


def mtan_shapes() -> list[torch.Size]:
    """Shapes of what both tasks of MTAN share: 144 tensors, 35 million numbers."""
    model = MTAN({"segmentation": 7, "depth": 1})
    parameters = list(model.parameters())
    losses = [out.sum() for out in model(torch.zeros(1, 3, 64, 64)).outputs.values()]
    reached = infer_membership(losses, parameters)
    return [parameter.shape for parameter, ids in zip(parameters, reached, strict=True) if len(ids) > 1]


def small_shapes() -> list[torch.Size]:
    """Many small tensors, where what is done per tensor counts."""
    return [torch.Size([64, 64])] * 100


def new_parameters(shapes: Shapes) -> list[nn.Parameter]:
    """Random parameters, the same for each side."""
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(0.1 * torch.randn(shape, generator=generator)) for shape in shapes]


def repeated(function: Callable[[], object], times: int = 1) -> Callable[[], Timing]:
    """A side that does a step so many times and returns the time of `STEPS` of them."""

    def side() -> Timing:
        clock = Clock()
        for _ in range(times):
            function()
        return clock.read() * (STEPS / times)

    return side


def step_case(name: str, shapes: Shapes, num_tasks: int, at_once: int = 1, at_most: float | None = None) -> Case:
    """The optimizer's step with the gradients already there.

    Args:
        name: Of the case.
        shapes: Of the shared parameters.
        num_tasks: Number of tasks K.
        at_once: Steps per timing.
        at_most: Multiple of a step of fused Adam on the summed gradient not to exceed.
    """
    rows: list[list[Tensor | None]] = [[torch.randn(shape) for shape in shapes] for _ in range(num_tasks)]
    ours = AdaTask(new_parameters(shapes), num_tasks)
    ours.gradients.accumulate(rows, [True] * num_tasks)
    plain = PlainAdaTask([parameter.detach() for parameter in new_parameters(shapes)], num_tasks)
    parameters = new_parameters(shapes)
    for parameter, gradient in zip(parameters, ours.gradients.joint(), strict=True):
        parameter.grad = gradient
    adam = torch.optim.Adam(parameters, lr=1e-3, fused=True)
    elements = sum(shape.numel() for shape in shapes)
    return Case(
        f"step, {name}, K = {num_tasks}",
        repeated(ours.step, at_once),
        repeated(lambda: plain.step(rows), at_once),
        required=3,
        note=f"{len(shapes)} shared tensors of {elements:,} numbers; reference: a loop over tasks and tensors; base: "
        f"fused Adam on the sum; {at_once} step(s) per timing, scaled to {STEPS:,}",
        base=repeated(adam.step, at_once),
        floor=num_tasks,
        at_most=at_most,
    )


class ConvTasks(nn.Module):
    """A convolutional trunk and linear heads so small that they cost nothing.

    Args:
        num_tasks: Number of heads.
        channels: Channels of the convolutions.
    """

    def __init__(self, num_tasks: int, channels: Sequence[int] = CHANNELS) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for below, size in zip([3, *channels[:-1]], channels, strict=True):
            layers += [nn.Conv2d(below, size, kernel_size=3, padding=1), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Linear(channels[-1], 1) for _ in range(num_tasks))

    def losses(self, images: Tensor, targets: Tensor) -> tuple[list[Tensor], Tensor]:
        """Mean squared error of each task, and the features of the trunk.

        Args:
            images: float `(batch, 3, height, width)`.
            targets: float `(batch, tasks)`.
        """
        features = self.trunk(images).mean((2, 3))
        pairs = zip(self.heads, targets.unbind(1), strict=True)
        return [F.mse_loss(head(features)[:, 0], target) for head, target in pairs], features


@dataclass
class Training:
    """Whole training steps of one model in four ways, each on weights of its own.

    Args:
        num_tasks: Number of tasks K.
        batch_size: Images per batch.
        image_size: Height and width.
    """

    num_tasks: int
    batch_size: int = BATCH_SIZE
    image_size: int = IMAGE_SIZE

    def __post_init__(self) -> None:
        """Draw the batch."""
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(self.batch_size, 3, self.image_size, self.image_size, generator=generator)
        self.targets = torch.randn(self.batch_size, self.num_tasks, generator=generator)

    def model(self) -> ConvTasks:
        """The model with its first weights."""
        torch.manual_seed(0)
        return ConvTasks(self.num_tasks)

    def base(self) -> Callable[[], None]:
        """A step on the sum of the losses with fused Adam."""
        model = self.model()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)

        def step() -> None:
            optimizer.zero_grad()
            losses, _ = model.losses(self.images, self.targets)
            torch.stack(losses).sum().backward()
            optimizer.step()

        return step

    def ours(self, mode: str) -> Callable[[], None]:
        """A step of AdaTask; `mode` as in `per_task_grads`."""
        model = self.model()
        optimizer = AdaTask(model.parameters(), self.num_tasks)

        def step() -> None:
            optimizer.zero_grad()
            losses, features = model.losses(self.images, self.targets)
            optimizer.backward(losses, features=None if mode == "loop" else features, mode=mode)
            optimizer.step()

        return step

    def published(self) -> Callable[[], None]:
        """K + 1 backward passes through everything, and a loop over tasks and tensors."""
        model = self.model()
        parameters = list(model.parameters())
        optimizer = PlainAdaTask(parameters, self.num_tasks)

        def step() -> None:
            for parameter in parameters:
                parameter.grad = None
            losses, _ = model.losses(self.images, self.targets)
            optimizer.step(separate_backwards(losses, parameters))

        return step

    def cases(self) -> list[Case]:
        """A case for each way to pass backwards."""
        floor = (1 + 2 * self.num_tasks) / 3
        note = (
            f"convolutions 3, {', '.join(map(str, CHANNELS))}, batch {self.batch_size} at {self.image_size}x"
            f"{self.image_size}; reference: K + 1 backward passes and a loop; base: one pass of the sum, "
            f"fused Adam; 3 steps per timing, scaled to {STEPS:,}"
        )
        return [
            Case(
                f"training step, {mode}, K = {self.num_tasks}",
                repeated(self.ours(mode), 3),
                repeated(self.published(), 3),
                note=note,
                base=repeated(self.base(), 3),
                floor=floor,
                # "batched" is there for accelerators.
                at_most=None if mode == "batched" else 1.1 * floor,
            )
            for mode in ("loop", "cut", "batched")
        ]


def peak_memory(shapes: Shapes, num_tasks: int, low_memory: bool, return_blocks: bool) -> int:
    """Resident bytes that `backward` and `step` take at their peak beyond parameters and accumulators.

    Activations are none: each loss is a weighted sum of the parameters.

    Args:
        shapes: Of the shared parameters.
        num_tasks: Number of tasks K.
        low_memory: The option of AdaTask.
        return_blocks: Have glibc return every freed tensor to the system. Its heap otherwise keeps some of what was
            freed, another amount in each run.
    """
    if return_blocks and sys.platform == "linux":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**16)
    torch.set_num_threads(1)
    parameters = new_parameters(shapes)
    optimizer = AdaTask(parameters, num_tasks, low_memory=low_memory)

    def step() -> None:
        losses = [torch.stack([(p * (k + 1)).sum() for p in parameters]).sum() for k in range(num_tasks)]
        optimizer.backward(losses)
        del losses
        optimizer.step()
        optimizer.zero_grad()

    step()
    added = 0
    for _ in range(3):
        with PeakMemory(interval=0.001) as memory:
            step()
        added = max(added, memory.added_bytes)
    return added


def memory_record(shapes: Shapes, num_tasks: int, return_blocks: bool) -> dict[str, Any]:
    """Extra memory of the default and of `low_memory=True`, in bytes and in copies of the shared parameters."""
    own = 4 * sum(shape.numel() for shape in shapes)
    heap = "blocks returned" if return_blocks else "default heap"
    record: dict[str, Any] = {"name": f"MTAN, K = {num_tasks}, {heap}", "threads": 1, "shared_bytes": own}
    for side, low_memory in (("default", False), ("low_memory", True)):
        # A process of its own: what others leave to the allocator hides what is taken.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            peak = pool.submit(peak_memory, shapes, num_tasks, low_memory, return_blocks).result()
        record |= {f"{side}_peak_added_bytes": peak, f"{side}_copies": peak / own}
    # What a heap holds beyond the tensors is not the optimizer's to bound.
    record["required_low_memory_copies_at_most"] = 2.0 if return_blocks else None
    record["note"] = "resident memory at the peak of backward and step beyond parameters and accumulators"
    return record


def time_cases(path: str) -> list[Case]:
    """The cases of a path, ready to run."""
    if path == "step_large":
        return [step_case("MTAN", mtan_shapes(), 2, at_most=3.2)]
    if path == "step_small":
        shapes = small_shapes()
        return [
            step_case("100 of 64x64", shapes, 2, STEPS_AT_ONCE, at_most=3.2),
            step_case("100 of 64x64", shapes, 5, STEPS_AT_ONCE),
        ]
    return [case for num_tasks in (2, 3, 5) for case in Training(num_tasks).cases()]


def show_memory(records: Sequence[dict[str, Any]]) -> None:
    """Print extra memory, a line per record."""
    for record in records:
        sides = ", ".join(
            f"{side} {record[f'{side}_peak_added_bytes'] / MIB:,.0f} MiB ({record[f'{side}_copies']:.2f} copies)"
            for side in ("default", "low_memory")
        )
        print(f"{record['name']}: {sides}; a copy is {record['shared_bytes'] / MIB:,.0f} MiB", flush=True)


PATHS = ("step_large", "step_small", "training_step", "memory")


def main() -> None:
    """Measure the paths named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=PATHS, help="what to measure")
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each side")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    options = parser.parse_args()
    torch.manual_seed(0)
    records = []
    for path in options.paths:
        file = options.results / f"benchmark_{path}.json"
        if path == "memory":
            kinds = [(num_tasks, returned) for num_tasks in (2, 5) for returned in (True, False)]
            found = [memory_record(mtan_shapes(), *kind) for kind in kinds]
            write_records(found, file, command=COMMAND, data="random numbers")
            show_memory(found)
            continue
        records += report(
            time_cases(path),
            file,
            command=COMMAND,
            data="random numbers",
            threads=options.threads,
            repeats=options.repeats,
        )
    if records:
        show(records, f"AdaTask, {all_threads()} cores")


if __name__ == "__main__":
    main()
