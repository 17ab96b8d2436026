"""Merging and representation surgery: time against plain procedures, memory against what the numbers themselves take.

    python -m benchmarks.merging [--quick] [--paths merge_float32 memory] [--repeats 5] [--threads 1]

Task vectors, checkpoints and images are random numbers in the shapes of CLIP's ViT-B/32. A merge with the gradient of
its coefficients is given as a multiple of the time in which the task vectors can be read twice (two times `tau.sum()`),
as reading is most of what it has to do, and beside a loop over tensors whose graph is kept for a backward pass per
task. Resident memory is counted in copies of the parameters, that of streamed merges in copies of the largest tensor.
`--quick` takes the first layers only, and leaves no files unless `--results` names a folder.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from benchmarks.reference.merging import PlainLayerwiseMerge, PlainSurgery
from benchmarks.runner import Case, Clock, PeakMemory, Timing, all_threads, report, show, timed, write_records
from benchmarks.sequence_scaling import resident_bytes
from zoo.common.pretrained import transformers_library
from zoo.merging.backbones import build_encoder
from zoo.merging.feature_cache import FeatureCache
from zoo.merging.one_shot import dare_merge, task_arithmetic, ties_merge, weight_average
from zoo.merging.safetensors_stream import SafetensorsWriter
from zoo.merging.surgery import SurgeryBank, surgery_loss
from zoo.merging.task_vectors import TaskVectorStore

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

RESULTS = Path(__file__).resolve().parent.parent / "results" / "merging"
COMMAND = "python -m benchmarks.merging"
DATA = "random numbers"
NUM_TASKS = 8
QUICK_SIZE = 20_000_000
STREAMED_SIZE = 73_000_000  # nine files of float32 and the merged one stay below 3 GB
STEPS = 1000  # of surgery, that times are given for
MIB = 2**20
_M_MMAP_THRESHOLD = -3  # of malloc.h
ONE_SHOT = {merge.__name__: merge for merge in (weight_average, task_arithmetic, ties_merge, dare_merge)}

Shapes: TypeAlias = "Mapping[str, tuple[int, ...]]"
_T = TypeVar("_T")


def clip_shapes(limit: int | None = None) -> dict[str, tuple[int, ...]]:
    """Parameters of the image tower of CLIP ViT-B/32: 199 tensors, 87.456 million numbers.

    Args:
        limit: Take the first tensors with at most so many numbers together.
    """
    library = transformers_library()
    with torch.device("meta"):
        model = library.CLIPVisionModel(library.CLIPVisionConfig())
    shapes: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, parameter in model.named_parameters():
        size += parameter.numel()
        if limit is not None and size > limit:
            break
        shapes[name] = tuple(parameter.shape)
    return shapes


def numbers_in(shapes: Shapes) -> int:
    """P, how many numbers the tensors hold."""
    return sum(map(math.prod, shapes.values()))


def new_store(shapes: Shapes, dtype: torch.dtype = torch.float32, num_tasks: int = NUM_TASKS) -> TaskVectorStore:
    """Random task vectors with a coefficient per tensor, drawn in place."""
    generator = torch.Generator().manual_seed(0)
    size = numbers_in(shapes)
    theta0 = torch.empty(size).normal_(std=0.02, generator=generator)
    tau = torch.empty(num_tasks, size, dtype=dtype)
    for row in tau:
        row.normal_(std=1e-3, generator=generator)
    return TaskVectorStore(theta0, tau, task_names(num_tasks), {name: [name] for name in shapes}, shapes)


def task_names(num_tasks: int) -> list[str]:
    """Names of so many tasks."""
    return [f"task{number}" for number in range(num_tasks)]


class MergeStep:
    """What a step of AdaMerging does besides running the network: merge, and differentiate the coefficients.

    The network's gradients at the merged parameters are random, the same ones for every task.

    Args:
        shapes: Of the parameters.
        dtype: Of the task vectors.
        num_tasks: Number of tasks K.
    """

    def __init__(self, shapes: Shapes, dtype: torch.dtype, num_tasks: int = NUM_TASKS) -> None:
        self.store = new_store(shapes, dtype, num_tasks)
        generator = torch.Generator().manual_seed(1)
        self.coef = torch.rand(len(shapes), num_tasks, generator=generator)
        self.task_gradient = torch.empty_like(self.store.theta0).normal_(generator=generator)
        self.gradient = num_tasks * self.task_gradient
        self.merged = torch.empty_like(self.store.theta0)
        vectors = [list(self.store.views(row).values()) for row in self.store.tau]
        self.reference = PlainLayerwiseMerge(list(self.store.views(self.store.theta0).values()), vectors)

    def ours(self) -> tuple[Tensor, Tensor]:
        """Merged parameters `(P,)` and the gradient `(L, K)`, from a gradient that the network has added up."""
        return self.store.merge_flat(self.coef, self.merged), self.store.coef_grad(self.gradient)

    def ours_adding_up(self) -> tuple[Tensor, Tensor]:
        """The same with the gradients of the tasks added up, which otherwise the network's backward passes do."""
        self.store.merge_flat(self.coef, self.merged)
        self.gradient.zero_()
        for _ in self.store.task_names:
            self.gradient += self.task_gradient
        return self.merged, self.store.coef_grad(self.gradient)

    def plain(self) -> tuple[list[Tensor], Tensor]:
        """The same by autograd through the merge; the merged parameters by tensor."""
        rows = [list(self.store.views(self.task_gradient).values())] * len(self.store.task_names)
        return self.reference.gradient(self.coef, rows)

    def read_twice(self) -> None:
        """Read the task vectors as often as a merge and a gradient must."""
        self.store.tau.sum()
        self.store.tau.sum()

    def cases(self) -> list[Case]:
        """With gradients that are added up already, and with adding them up."""
        num_tasks, kind = len(self.store.task_names), str(self.store.tau.dtype).removeprefix("torch.")
        name = f"merge and gradient, {self.store.num_parameters / 1e6:.1f} M, {kind}"
        note = (
            f"{len(self.store.param_names)} tensors of {self.store.num_parameters:,} numbers, K = {num_tasks}, a "
            "coefficient per tensor and task; reference: a loop over tensors, autograd with a backward pass per task"
        )
        # To read all vectors and the base for the merge and write the result; to read vectors and gradient once more.
        vectors, others = 2 * num_tasks * self.store.tau.itemsize, 3 * self.store.theta0.itemsize
        alone = Case(
            name,
            timed(self.ours),
            timed(self.plain),
            required=10,
            note=f"{note}; base: tau.sum() twice; floor: bytes to be moved",
            base=timed(self.read_twice),
            floor=(vectors + others) / vectors,
            at_most=2,
        )
        adding = f"{note}; ours also adds up the gradients of the tasks"
        return [alone, Case(f"{name}, adding up", timed(self.ours_adding_up), timed(self.plain), 10, adding)]


def store_memory(shapes: Shapes, dtype: torch.dtype, num_tasks: int) -> tuple[int, int]:
    """Resident bytes of a store with merged parameters and their gradient, beyond the interpreter.

    Returns:
        What is held after three merges and gradients, and the largest amount during these and the making of the store.
    """
    torch.set_num_threads(1)
    # Code that the libraries load for large products is the interpreter's.
    _merge_and_differentiate({"weight": (2**18,), "bias": (2,)}, dtype, num_tasks)
    before = resident_bytes()
    with PeakMemory(interval=0.001) as memory:
        held = _merge_and_differentiate(shapes, dtype, num_tasks)
    resident = resident_bytes() - before
    del held
    return resident, memory.added_bytes


def _merge_and_differentiate(shapes: Shapes, dtype: torch.dtype, num_tasks: int) -> tuple[object, ...]:
    store = new_store(shapes, dtype, num_tasks)
    merged, gradient = torch.empty_like(store.theta0), torch.empty_like(store.theta0)
    for _ in range(3):
        store.merge_flat(0.3, merged)
        gradient.copy_(merged)
        store.coef_grad(gradient)
    return store, merged, gradient


def memory_record(shapes: Shapes, dtype: torch.dtype, num_tasks: int = NUM_TASKS) -> dict[str, Any]:
    """Resident memory of store, merged parameters and their gradient, in float32 copies of the parameters."""
    kind, own = str(dtype).removeprefix("torch."), 4 * numbers_in(shapes)
    resident, peak = _in_new_process(store_memory, shapes, dtype, num_tasks)
    return {
        "name": f"store, merged weights and gradient, {own / 4e6:.1f} M, {kind}",
        "threads": 1,
        "copy_bytes": own,
        "resident_added_bytes": resident,
        "peak_added_bytes": peak,
        "copies": resident / own,
        "peak_copies": peak / own,
        # The vectors, the base, the merged parameters and their gradient; a fifth of a copy is for anything else.
        "required_copies_at_most": num_tasks * dtype.itemsize / 4 + 3.2,
        "note": "resident memory beyond the interpreter's, held between steps without what only the allocator keeps, "
        "and at the peak with that; a copy: all parameters in float32",
    }


def write_checkpoints(folder: Path, shapes: Shapes, num_tasks: int = NUM_TASKS) -> tuple[Path, dict[str, Path]]:
    """A base and experts near it as safetensors files, one tensor in memory at a time; their paths."""
    base, experts = (
        folder / "base.safetensors",
        {task: folder / f"{task}.safetensors" for task in task_names(num_tasks)},
    )
    layout = {name: (torch.float32, shape) for name, shape in shapes.items()}
    generator = torch.Generator().manual_seed(0)
    with ExitStack() as stack:
        writers = [stack.enter_context(SafetensorsWriter(path, layout)) for path in (base, *experts.values())]
        for name, shape in shapes.items():
            tensor = torch.empty(shape).normal_(std=0.02, generator=generator)
            writers[0].write(name, tensor)
            for writer in writers[1:]:
                writer.write(name, tensor + torch.empty(shape).normal_(std=1e-3, generator=generator))
    return base, experts


def streaming_peak(
    merge: str, base: Path, experts: Mapping[str, Path], out: Path, return_blocks: bool = False
) -> tuple[int, float]:
    """Resident bytes that a one-shot merge of files takes at its peak beyond the interpreter, and its seconds.

    Args:
        merge: One of `ONE_SHOT`.
        base: File of the base.
        experts: Files by task.
        out: File to write.
        return_blocks: Have glibc return every freed tensor to the system. Its heap otherwise keeps some of what was
            freed, another amount in each run.
    """
    if return_blocks and sys.platform == "linux":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**16)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        # What is loaded at the first use of anything is the interpreter's.
        first_base, first_experts = write_checkpoints(Path(folder), {"weight": (3, 4), "bias": (3,)}, len(experts))
        ONE_SHOT[merge](first_base, first_experts, out=Path(folder) / "merged.safetensors")
    start = time.perf_counter()
    with PeakMemory(interval=0.001) as memory:
        ONE_SHOT[merge](base, experts, out=out)
    return memory.added_bytes, time.perf_counter() - start


def streaming_records(shapes: Shapes, num_tasks: int = NUM_TASKS) -> list[dict[str, Any]]:
    """Memory of each one-shot merge of safetensors files, in copies of the largest tensor."""
    largest, records = 4 * max(map(math.prod, shapes.values())), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, experts = write_checkpoints(folder, shapes, num_tasks)
        out = folder / "merged.safetensors"
        for merge, return_blocks in product(ONE_SHOT, (True, False)):
            peak, seconds = _in_new_process(streaming_peak, merge, base, experts, out, return_blocks)
            heap = "blocks returned" if return_blocks else "default heap"
            records.append(
                {
                    "name": f"{merge}, {numbers_in(shapes) / 1e6:.1f} M, {heap}",
                    "threads": 1,
                    "wall_seconds": seconds,
                    "model_bytes": 4 * numbers_in(shapes),
                    "copy_bytes": largest,
                    "peak_added_bytes": peak,
                    "copies": peak / largest,
                    # What a heap holds beyond the tensors is not the merge's to bound.
                    "required_copies_at_most": num_tasks + 3.0 if return_blocks else None,
                    "note": f"float32 files of a base and {num_tasks} experts to a file; resident memory at the peak "
                    "beyond the interpreter's; a copy: the largest tensor in float32",
                }
            )
    return records


def _in_new_process(function: Callable[..., _T], *args: Any) -> _T:
    # What others leave to the allocator would hide what is taken.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


class SurgerySteps:
    """Training steps of surgery on stored features, and on images that both encoders see anew in every step.

    Args:
        num_tasks: Number of tasks.
        batch_size: Images of each task in a step.
        pool: Different images of each task.
        rank: Of the modules.
        encoder: Options of the tiny encoder.
    """

    def __init__(
        self, num_tasks: int = 4, batch_size: int = 16, pool: int = 64, rank: int = 16, **encoder: int
    ) -> None:
        torch.manual_seed(0)
        self.options: dict[str, Any] = {
            "image_size": 64,
            "patch_size": 16,
            "hidden_size": 256,
            "num_layers": 4,
            **encoder,
        }
        self.batch_size = batch_size
        build = partial(build_encoder, "tiny", **self.options)
        self.merged = build()
        self.experts = {task: build() for task in task_names(num_tasks)}
        size = self.options["image_size"]
        self.images = {task: torch.randn(pool, 3, size, size) for task in self.experts}
        self.bank = SurgeryBank(task_names(num_tasks), self.merged.dim, rank)
        self.optimizer = torch.optim.Adam(self.bank.parameters(), lr=1e-3)
        modules: list[Any] = [self.bank[task] for task in self.experts]
        weights = [(module.down.weight.detach().clone(), module.up.weight.detach().clone()) for module in modules]
        self.reference = PlainSurgery(self.merged, list(self.experts.values()), weights)
        rows = torch.arange(pool)
        self.cache = FeatureCache()
        batches = {task: [{"images": images, "rows": rows}] for task, images in self.images.items()}
        self.cache.build(self.merged, self.experts.__getitem__, batches, feature_fn=_features)
        self._draws = {side: torch.Generator().manual_seed(1) for side in ("ours", "plain")}

    def _rows(self, side: str) -> dict[str, Tensor]:
        # Both sides see the same images, whichever runs more steps.
        draw = self._draws[side]
        return {
            task: torch.randperm(len(pool), generator=draw)[: self.batch_size] for task, pool in self.images.items()
        }

    def ours(self) -> Tensor:
        """A step on features of the cache; the sum of the losses."""
        losses = []
        self.optimizer.zero_grad()
        for task, rows in self._rows("ours").items():
            z, z_ind = self.cache.gather(task, rows)
            losses.append(surgery_loss(self.bank(z, task), z_ind))
        total = torch.stack(losses).sum()
        torch.autograd.backward(total)
        self.optimizer.step()
        return total.detach()

    def plain(self) -> Tensor:
        """The same step on images."""
        return self.reference.step([self.images[task][rows] for task, rows in self._rows("plain").items()])

    def case(self) -> Case:
        """Both, scaled to `STEPS` steps."""
        shape = ", ".join(f"{name} {value}" for name, value in self.options.items())
        return Case(
            f"surgery step, {len(self.experts)} tasks",
            repeated(self.ours, 50),
            repeated(self.plain, 1),
            required=20,
            note=f"CLIP image tower, {shape}; {self.batch_size} images of each task; reference: merged encoder and "
            f"experts run in every step; 50 steps and 1 step per timing, scaled to {STEPS:,}",
        )


def _features(model: Callable[..., Any], batch: Any) -> Tensor:
    features: Tensor = model(batch["images"])
    return features


def repeated(function: Callable[[], object], times: int) -> Callable[[], Timing]:
    """A side that does a step so many times and returns the time of `STEPS` of them."""

    def side() -> Timing:
        clock = Clock()
        for _ in range(times):
            function()
        return clock.read() * (STEPS / times)

    return side


def time_cases(path: str, quick: bool) -> list[Case]:
    """The cases of a path, ready to run."""
    if path == "surgery":
        return [SurgerySteps().case()]
    shapes = clip_shapes(QUICK_SIZE if quick else None)
    return MergeStep(shapes, torch.float32 if path == "merge_float32" else torch.bfloat16).cases()


def memory_records(path: str, quick: bool) -> list[dict[str, Any]]:
    """The records of a path that is about memory."""
    if path == "streaming":
        return streaming_records(clip_shapes(QUICK_SIZE if quick else STREAMED_SIZE))
    shapes = clip_shapes(QUICK_SIZE if quick else None)
    return [memory_record(shapes, dtype) for dtype in (torch.float32, torch.bfloat16)]


def show_memory(records: Sequence[dict[str, Any]]) -> None:
    """Print resident memory, a line per record."""
    for record in records:
        limit = record["required_copies_at_most"]
        print(
            f"{record['name']}: {record['copies']:.2f} copies of {record['copy_bytes'] / MIB:,.1f} MiB"
            f"{'' if limit is None else f', at most {limit:.1f}'}; peak {record['peak_added_bytes'] / MIB:,.0f} MiB",
            flush=True,
        )


TIMED = ("merge_float32", "merge_bfloat16", "surgery")
PATHS = (*TIMED, "memory", "streaming")


def main() -> None:
    """Measure the paths named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first layers only")
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=PATHS, help="what to measure")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each side")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--results", type=Path, help=f"folder of the JSON files, {RESULTS} without --quick")
    options = parser.parse_args()
    torch.manual_seed(0)
    records = []
    with tempfile.TemporaryDirectory() as passing:
        folder = options.results or (Path(passing) if options.quick else RESULTS)
        command = f"{COMMAND} --quick" if options.quick else COMMAND
        for path in options.paths:
            file = folder / f"benchmark_{path}.json"
            if path not in TIMED:
                found = memory_records(path, options.quick)
                write_records(found, file, command=command, data=DATA)
                show_memory(found)
                continue
            records += report(
                time_cases(path, options.quick),
                file,
                command=command,
                data=DATA,
                threads=options.threads,
                repeats=options.repeats,
            )
    if records:
        show(records, f"Merging, {all_threads()} cores")


if __name__ == "__main__":
    main()
