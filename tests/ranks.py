"""Real gloo processes for tests of plain torch code; fits use `ddp_fork`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing


def _rank(rank: int, world_size: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        torch.save(function(rank, *arguments), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_ranks(folder: Path, function: Callable[..., Any], *arguments: Any, world_size: int = 2) -> list[Any]:
    """What `function(rank, *arguments)` returns on each rank of a gloo group; raises what a rank raises."""
    context = multiprocessing.start_processes(
        _rank, (world_size, folder, function, arguments), nprocs=world_size, join=False, start_method="fork"
    )
    try:
        # A collective that only one rank enters would hang for ever.
        assert context.join(timeout=60) or context.join(timeout=60), "the ranks did not end in time"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]
