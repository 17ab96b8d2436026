"""Memory of IDSF's training steps, by measurement in processes of their own and by formula."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.idsf_steps import (
    BABY,
    BATCH_SIZE,
    CLOTHING,
    FEATURE_SIZES,
    HIDDEN_SIZE,
    Size,
    load,
    new_data,
    new_model,
    quiet,
    random_table,
    train,
)
from benchmarks.runner import PeakMemory
from benchmarks.sequence_scaling import resident_bytes
from zoo.common.negatives import NegativeSampler

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

CLOTHING_LIMIT = 8 * 10**9  # bytes


def step_bytes(
    size: Size, feature_sizes: Sequence[int], hidden_size: int, num_contrasted: int, num_batch_items: int
) -> dict[str, int]:
    """What a training step holds at its peak, in bytes, of float32 and for frozen features, M modalities and L = 2.

    - parameters: (M + 1) U d + M I d of tables, sum(d (D_m + 1)) of projections, 5 (d^2 + 2d) of attention (M = 2);
    - gradients as much, and twice as much of Adam;
    - features: I sum(D_m), one copy for source, datamodule and model;
    - graph: a matrix of 2E + N entries and its transpose, values of 4 and columns of 8 bytes;
    - structure: c_m, I d each, and five matrices N x M d: IDs, layer, sum, and two that a sum or product makes;
    - attention: 2M scores of the item branch and M + 2 mixes, `num_batch_items` x d each;
    - contrast: two matrices of a chunk x 2n while one loss is made, n = `num_contrasted`, and of each of the 3 M losses
      its gradients, 2 n d.

    Args:
        size: Of the data.
        feature_sizes: D_m.
        hidden_size: d.
        num_contrasted: Items in the contrastive loss; the number of items for all.
        num_batch_items: Distinct items of the batch; the number of items where all are encoded.
    """
    m, d, nodes = len(feature_sizes), hidden_size, size.num_users + size.num_items
    entries = 2 * size.num_train + nodes
    parameters = 4 * (
        (m + 1) * size.num_users * d
        + m * size.num_items * d
        + sum(d * (width + 1) for width in feature_sizes)
        + (m + (3 if m > 1 else 0)) * (d * d + 2 * d)
    )
    chunk = min(num_contrasted, 4096)
    contrast = 2 * chunk * 2 * num_contrasted + 3 * m * 2 * num_contrasted * d
    return {
        "parameters": parameters,
        "gradients": parameters,
        "adam": 2 * parameters,
        "features": 4 * size.num_items * sum(feature_sizes),
        "graph": 2 * (12 * entries + 8 * nodes),
        "structure": 4 * m * d * (size.num_items + 5 * nodes),
        "attention": 4 * d * num_batch_items * (4 * m + 2),
        "contrast": 4 * contrast,
    }


def published_contrast_bytes(num_items: int, num_modalities: int) -> int:
    """What the published loss over all items saves for its backward pass: 6 M I^2 float32 (3 M losses, two views)."""
    return 6 * num_modalities * num_items**2 * 4


def training_peak(
    size: Size | None,
    feature_sizes: Mapping[str, int],
    hidden_size: int,
    batch_size: int,
    steps: int,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Memory of training steps, everything from the making of the data on; to be called in a new process.

    Args:
        size: Of a random graph; None for Baby.
        feature_sizes: Widths of random features.
        hidden_size: d.
        batch_size: Users of a batch.
        steps: Steps after the first.
        options: Of `IDSF`.

    Returns:
        Resident bytes at the peak, of the whole process and beyond what it has before it reads or makes data, the CPU
        seconds of a step, and the mean number of distinct items of a batch.
    """
    torch.set_num_threads(1)
    quiet()
    warm_up = new_data(random_table(Size(30, 20, 90, 20), {"image": 4}), 8)
    train(new_model(warm_up, 4), warm_up, 1)
    if size is None:
        # The library that reads the file is the interpreter's.
        load({})
    before = resident_bytes()
    with PeakMemory(interval=0.001) as memory:
        data = new_data(load(feature_sizes) if size is None else random_table(size, feature_sizes), batch_size)
        timing = train(new_model(data, hidden_size, **options), data, steps)
    sampler, items = NegativeSampler(data.train_edges[0], data.train_edges[1], data.num_items), []
    for batch in islice(data.train_dataloader(), 10):
        drawn = torch.cat([batch.item_ids, sampler(batch.user_ids, batch.keys, 1).flatten()])
        items.append(len(torch.unique(drawn)))
    return {
        "peak_added_bytes": memory.added_bytes,
        "peak_bytes": before + memory.added_bytes,
        "cpu_seconds": timing.cpu,
        "batch_items": round(sum(items) / len(items)),
    }


def memory_record(
    name: str,
    size: Size | None,
    options: Mapping[str, Any],
    feature_sizes: Mapping[str, int] = FEATURE_SIZES,
    hidden_size: int = HIDDEN_SIZE,
    batch_size: int = BATCH_SIZE,
    steps: int = 1,
    limit: int | None = None,
) -> dict[str, Any]:
    """Peak of a training step in a new process, beside what its parts and the published loss take by their formulas."""
    found = _in_new_process(training_peak, size, feature_sizes, hidden_size, batch_size, steps, options)
    numbers = BABY if size is None else size
    every = options.get("contrast_scope") == "all"
    contrasted = numbers.num_items if every else min(found["batch_items"], 2048)
    encoded = numbers.num_items if every else found["batch_items"]
    parts = step_bytes(numbers, list(feature_sizes.values()), hidden_size, contrasted, encoded)
    return {
        "name": name,
        "threads": 1,
        **found,
        "required_peak_bytes_at_most": limit,
        "formula_bytes": sum(parts.values()),
        "formula_parts": parts,
        "published_contrast_bytes": published_contrast_bytes(numbers.num_items, len(feature_sizes)),
        "note": f"{steps + 1} step(s) in Lightning, batches of {batch_size} users, hidden {hidden_size}, frozen "
        f"features {list(feature_sizes.values())}; resident memory of a process of its own, beyond "
        "the interpreter's and whole; published: what the reference's loss over all items saves, 6 M I^2 * 4 bytes",
    }


def memory_records(path: str) -> list[dict[str, Any]]:
    """The records of a path that is about memory."""
    if path == "clothing":
        options = {"contrast_scope": "all"}
        return [memory_record("all items, Clothing-sized", CLOTHING, options, steps=0, limit=CLOTHING_LIMIT)]
    size = None if os.environ.get("ZOO_DATA") else BABY
    return [
        memory_record("items of the batch, Baby", size, {"contrast_scope": "batch"}),
        memory_record("all items, Baby", size, {"contrast_scope": "all"}),
    ]


def show_memory(records: Sequence[dict[str, Any]]) -> None:
    """Print resident memory, a line per record."""
    for record in records:
        limit, mib = record["required_peak_bytes_at_most"], 2**20
        parts = ", ".join(f"{name} {part / mib:,.0f}" for name, part in record["formula_parts"].items())
        asked = "" if limit is None else f", at most {limit / mib:,.0f}"
        print(
            f"{record['name']}: {record['peak_added_bytes'] / mib:,.0f} MiB added at the peak "
            f"({record['peak_bytes'] / mib:,.0f} of the process{asked}), formula {record['formula_bytes'] / mib:,.0f} "
            f"({parts}); published loss alone {record['published_contrast_bytes'] / mib:,.0f}; "
            f"{record['cpu_seconds']:.2f} CPU seconds a step",
            flush=True,
        )


def _in_new_process(function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    # What others leave to the allocator would hide what is taken.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()
