"""What a checkpoint remembers of the table that it was trained on."""

from __future__ import annotations

import math
import zlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from datamodules.sources.task_tables import Encoding, TaskColumns


def fingerprint(
    source: str, columns: TaskColumns, encoding: Encoding | None, parts: Mapping[str, Tensor]
) -> dict[str, Any]:
    """What of a table must stay the same for a model trained on it, in plain values.

    Args:
        source: Where the table comes from.
        columns: What its columns are for.
        encoding: How its values become tensors; None for the embedded sample.
        parts: Rows of each part.
    """
    vocabularies = () if encoding is None else encoding.vocabularies
    statistics = [] if encoding is None else [*encoding.medians, *encoding.means, *encoding.stds]
    return {
        "source": source,
        "columns": [*columns.categorical, *columns.numeric, *(name for name, _ in columns.targets)],
        "vocabulary": zlib.crc32("\n\n".join("\n".join(labels) for labels in vocabularies).encode()),
        "split": zlib.crc32(b"".join(rows.numpy().tobytes() for rows in parts.values())),
        "statistics": [float(value) for value in statistics],
    }


def check_fingerprint(own: Mapping[str, Any], trained: Mapping[str, Any]) -> None:
    """Compare the table of a checkpoint with the one at hand.

    Raises:
        ValueError: If they differ.
    """
    for what in ("columns", "vocabulary", "split", "statistics"):
        if not _same(own[what], trained[what]):
            was, now = (f"{state[what]} of source={state['source']!r}" for state in (trained, own))
            raise ValueError(
                f"the checkpoint was trained on another table, its {what} differ: {was}, here {now}. Use the data "
                "options of the training, and test_path for other rows"
            )


def _same(left: Any, right: Any) -> bool:
    if not isinstance(left, list) or not all(isinstance(value, float) for value in [*left, *right]):
        return bool(left == right)
    # Sums of many numbers may differ in their last digits from machine to machine.
    return len(left) == len(right) and all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(left, right, strict=True))
