"""What the operators do to the gaps: `python -m studies.ticoserec.operator_effect` (Amazon Beauty, no training).

The premise of the paper in figures. An inserted item is given the time in the middle of the gap that it splits. For
each user: the standard deviation of the gaps of the training part before and after Ti-Insert, and after insertion at
random places; and inside the window that Ti-Crop keeps of a long sequence, by both window rules and at random.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from datamodules.sequence import SequenceData
from zoo.common.results import write_result
from zoo.ticoserec.augment import CROP, INSERT, Sequences, ViewPolicy, describe, make_views
from zoo.ticoserec.gaps import right_gaps
from zoo.ticoserec.jagged import gather_rows, row_and_position, row_starts

DAY = 86_400
SEED = 0
INSERT_RATIO, CROP_RATIO, LONG = 0.5, 0.4, 12
RESULT = Path(__file__).resolve().parents[2] / "results" / "ticoserec" / "operator_effect.json"


def spread_in_days(gaps: Tensor, lengths: Tensor) -> Tensor:
    """Population standard deviation of each row's gaps (seconds), 0 for a row with fewer than two."""
    rows, _ = row_and_position(lengths)
    count = lengths.clamp(min=1)
    days = gaps.double() / DAY
    mean = torch.zeros(len(lengths), dtype=torch.float64).index_add_(0, rows, days) / count
    squares = torch.zeros(len(lengths), dtype=torch.float64).index_add_(0, rows, (days - mean[rows]).square())
    return (squares / count).sqrt()


def spread_after_insertion(sequences: Sequences, gaps: Tensor, policy: ViewPolicy, keys: Tensor) -> Tensor:
    """Spread of each row when every inserted item halves the gap in which it stands."""
    operators = torch.full_like(sequences.lengths, INSERT)
    nearest = torch.arange(int(sequences.item_ids.max()) + 1)
    views = make_views(policy, sequences, operators, keys, nearest)
    split = torch.zeros(len(gaps), dtype=torch.bool)
    split[views.sources[views.inserted]] = True
    return spread_in_days(torch.where(split, gaps / 2, gaps.double())[views.sources], views.lengths)


def spread_in_crop(sequences: Sequences, gaps: Tensor, policy: ViewPolicy, keys: Tensor) -> Tensor:
    """Spread of the gaps between the items that are kept of each row."""
    operators = torch.full_like(sequences.lengths, CROP)
    nearest = torch.arange(int(sequences.item_ids.max()) + 1)
    views = make_views(policy, sequences, operators, keys, nearest)
    _, positions = row_and_position(views.lengths)
    last = positions == views.lengths.repeat_interleave(views.lengths) - 1
    return spread_in_days(gaps[views.sources][~last], views.lengths - 1)


def measure(data: SequenceData) -> dict[str, float]:
    """All figures, spreads in days."""
    table = data.sequences
    assert table.timestamps is not None
    time_lengths = table.train_lengths
    lengths, first = time_lengths - 1, table.offsets[:-1]
    times = gather_rows(table.timestamps, first, time_lengths)
    items = gather_rows(table.item_ids, first, lengths).long()
    gaps = right_gaps(times, time_lengths, lengths).values
    keys = torch.randint(2**62, (len(lengths),), generator=torch.Generator().manual_seed(SEED))
    by_time = ViewPolicy(insert=INSERT_RATIO, crop=CROP_RATIO)
    by_chance = ViewPolicy(insert=INSERT_RATIO, crop=CROP_RATIO, positions="random")
    official = ViewPolicy(insert=INSERT_RATIO, crop=CROP_RATIO, window="official")

    everybody = describe(by_time, items, lengths, times, time_lengths)
    before = spread_in_days(gaps, lengths)
    inserted = spread_after_insertion(everybody, gaps, by_time, keys)
    inserted_by_chance = spread_after_insertion(everybody, gaps, by_chance, keys)
    uneven = before > 0
    figures = {
        "gap_std/before/mean": before.mean(),
        "gap_std/before/median": before.median(),
        "gap_std/ti_insert/mean": inserted.mean(),
        "gap_std/ti_insert/median": inserted.median(),
        "gap_std/random_insert/mean": inserted_by_chance.mean(),
        "gap_std/random_insert/median": inserted_by_chance.median(),
        "lowered/ti_insert": (inserted < before)[uneven].double().mean(),
        "lowered/random_insert": (inserted_by_chance < before)[uneven].double().mean(),
    }

    is_long = lengths > LONG
    starts, time_starts = row_starts(lengths)[is_long], row_starts(time_lengths)[is_long]
    long_lengths, long_time_lengths = lengths[is_long], time_lengths[is_long]
    long_items = gather_rows(items, starts, long_lengths)
    long_times = gather_rows(times, time_starts, long_time_lengths)
    long_gaps = gather_rows(gaps, starts, long_lengths)
    figures["long_users"] = is_long.sum()
    for name, policy in (("ti_crop", by_time), ("ti_crop_official", official), ("random_crop", by_chance)):
        rows = describe(policy, long_items, long_lengths, long_times, long_time_lengths)
        figures[f"gap_std/{name}/mean"] = spread_in_crop(rows, long_gaps, policy, keys[is_long]).mean()
    return {name: float(value) for name, value in figures.items()}


def main() -> None:
    """Measure on Beauty and write the result."""
    started = time.perf_counter()
    figures = measure(SequenceData(source="beauty"))
    for name, value in figures.items():
        print(f"{name:32}{value:10.3f}")
    config = {"data": "beauty", "insert_ratio": INSERT_RATIO, "crop_ratio": CROP_RATIO, "long": LONG}
    record = write_result(
        RESULT, config=config, seed=SEED, metrics=figures, seconds={"all": time.perf_counter() - started}
    )
    print(f"Results in {RESULT.parent.name}/{RESULT.name}, {record['seconds']['all']} s")


if __name__ == "__main__":
    main()
