"""Does the training input pipeline of `SequenceData` scale? Time per sample and memory per interaction, by size.

    python -m benchmarks.sequence_scaling [--users 10000 100000 1000000] [--samples 200000]

Each size runs in a process of its own on synthetic users. Time is that of training batches (a gather of ids, targets
and lengths) and of both views with them, per sample. Memory is what the process holds more after set-up and the batches
than before the interactions were made, per interaction: once for the data module, and once with a model's tables.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from zoo.common.results import environment, write_json

RESULT = Path(__file__).resolve().parent.parent / "results" / "ticoserec" / "sequence_scaling.json"
NUM_ITEMS, BATCH_SIZE = 20_000, 128


def resident_bytes() -> int:
    """Memory of this process, without what only the allocator holds."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def synthetic_interactions(num_users: int) -> Any:
    """Users with 5 to 60 interactions (9 on average, as in the Amazon sets) with random items, days apart."""
    from datamodules.sources.interactions import Interactions

    random = np.random.default_rng(0)
    lengths = np.minimum(4 + random.geometric(0.2, num_users), 60)
    offsets = np.concatenate([[0], lengths.cumsum()])
    item_ids = random.integers(1, NUM_ITEMS + 1, offsets[-1], dtype=np.int32)
    # One draw for all: times that only grow are sorted within each user.
    timestamps = 1_000_000_000 + random.integers(0, 100, offsets[-1], dtype=np.int64).cumsum()
    return Interactions(
        item_ids=item_ids,
        timestamps=timestamps,
        offsets=offsets,
        item_labels=np.arange(1, NUM_ITEMS + 1),
        user_labels=np.arange(num_users),
        name="synthetic",
    )


def measure(num_users: int, samples: int) -> dict[str, Any]:
    """One size, in this process."""
    from lightning.pytorch import Trainer

    from datamodules.sequence import SequenceData
    from zoo.ticoserec.module import TiCoSeRec

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    data = SequenceData(batch_size=BATCH_SIZE, seed=0)
    # A first use of everything: imports and caches are no memory of the data.
    train(data, Trainer, TiCoSeRec)
    before = resident_bytes()

    data = SequenceData(batch_size=BATCH_SIZE, seed=0)
    data.__dict__["interactions"] = synthetic_interactions(num_users)
    data.setup("fit")
    interactions = len(data.sequences.item_ids)
    batches = samples // BATCH_SIZE
    draw(data, batches)
    seconds = min(draw(data, batches) for _ in range(3))
    held = resident_bytes() - before
    model = train(data, Trainer, TiCoSeRec)
    gathered = min(draw(data, batches, model) for _ in range(3))
    drawn = min(draw_views(model) for _ in range(3))
    return {
        "num_users": num_users,
        "interactions": interactions,
        "microseconds_per_sample": 1e6 * seconds / (batches * BATCH_SIZE),
        "microseconds_per_sample_with_views": 1e6 * (gathered / (batches * BATCH_SIZE) + drawn / num_users),
        "bytes_per_interaction": held / interactions,
        "bytes_per_interaction_with_model": (resident_bytes() - before) / interactions,
    }


def train(data: Any, trainer_class: Any, model_class: Any) -> Any:
    """A model of this data that has seen one batch."""
    folder = tempfile.TemporaryDirectory()
    model = model_class(data.num_items, hidden_size=8, inner_size=8, similarity="random", model_warm_up_epochs=0)
    trainer_class(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        limit_train_batches=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder.name,
    ).fit(model, data)
    folder.cleanup()
    return model


def draw_views(model: Any) -> float:
    """Processor seconds of an epoch's views of all users."""
    started = time.process_time()
    model.views.forget()
    model.draw_views(torch.zeros(1, dtype=torch.int64))
    return time.process_time() - started


def draw(data: Any, batches: int, model: Any = None) -> float:
    """Processor seconds of so many training batches, over as many epochs as that takes."""
    started, left = time.process_time(), batches
    loader = data.train_dataloader()
    while left:
        for batch in itertools.islice(loader, left):
            left -= 1
            if model is not None:
                model.draw_views(batch.user_ids)
    return time.process_time() - started


def main() -> None:
    """Measure each size in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measure(options.one, options.samples)))
        return
    sizes = []
    for users in options.users:
        command = [sys.executable, "-m", "benchmarks.sequence_scaling", "--one", str(users)]
        command += ["--samples", str(options.samples)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        sizes.append(json.loads(done.stdout.splitlines()[-1]))
        row = {key: round(value, 1) for key, value in sizes[-1].items()}
        print("  ".join(f"{key} {value:,}" for key, value in row.items()), flush=True)
    cases = [{"name": f"{size['num_users']:,} users", **size} for size in sizes]
    write_json(
        options.result,
        {"command": "python -m benchmarks.sequence_scaling", **environment(), "threads": 1, "cases": cases},
    )


if __name__ == "__main__":
    main()
