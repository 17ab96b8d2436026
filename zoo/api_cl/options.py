"""The methods of the stream, and the checks of what a user sets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

METHODS = (
    "ours",
    "sequential",
    "single_generator",
    "frozen_generator",
    "noise",
    "real_only",
    "classic",
    "lwf",
    "ewc",
    "derpp",
)
"""What trains the learner:

- "ours": two generators, the present API, memory and similarity.
- "sequential": the same without memory and similarity, the lower reference.
- "single_generator", "frozen_generator", "noise": one generator; generators that are never trained; Gaussian pixels.
- "real_only": labels and memory of the real images alone, no API; "classic" is the same with all of them.
- "lwf", "ewc", "derpp": further classic methods on real images (learning without forgetting, elastic weight
  consolidation, dark experience replay).
"""
WITHOUT_API = ("real_only", "classic", "lwf", "ewc", "derpp")
MODES = ("zo", "surrogate", "whitebox")
OPTIMIZERS = ("adam", "sgd")
SCHEDULES = ("none", "multistep", "cosine")


def one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Refuse a value that is not allowed.

    Raises:
        ValueError: Naming the option and what is allowed.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def at_least(least: float, **values: float) -> None:
    """Refuse values below a bound.

    Raises:
        ValueError: Naming the option.
    """
    for name, value in values.items():
        if not value >= least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def check_memory(size: int, num_classes: int, similarity: str, uses_similarity: bool, rows: int) -> None:
    """Refuse a memory that cannot serve.

    Args:
        size: Images.
        num_classes: Of all tasks.
        similarity: Kind of the similarity term.
        uses_similarity: Whether its weight is positive and there is a second task.
        rows: Remembered images in a step of the learner.

    Raises:
        ValueError: If it is smaller than the number of classes, or the similarity has nothing to be computed on.
    """
    if 0 < size < num_classes:
        raise ValueError(
            f"memory_size={size} is smaller than the {num_classes} classes: give at least {num_classes}, or 0 for none"
        )
    if not uses_similarity or similarity == "none":
        return
    if not size:
        raise ValueError(
            f"similarity={similarity} compares networks on remembered images, but memory_size is 0: give a memory, or "
            "similarity=none"
        )
    if similarity == "cka" and rows < 4:
        raise ValueError(f"similarity=cka needs 4 remembered images a step, but memory_batch_size is {rows}")


def learning_rate_factor(schedule: str, step: int, steps: int) -> float:
    """Factor of the learning rate at a step of a task: "multistep" has a tenth, three tenths and half as milestones.

    Args:
        schedule: One of `SCHEDULES`.
        step: From 0.
        steps: Of the task.
    """
    if schedule == "multistep":
        return 0.3 ** sum(step >= share * steps for share in (0.1, 0.3, 0.5))
    if schedule == "cosine":
        import math

        return 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    return 1.0


def queries_per_iteration(
    generators: int,
    generator_steps: int,
    generator_batch_size: int,
    rows_per_sample: int,
    student_steps: int,
    student_batch_size: int,
    reuse_base: bool,
) -> dict[str, int]:
    """Rows that one iteration asks for, by purpose.

    Args:
        generators: 0 where none is trained.
        generator_steps: Rounds of the generators.
        generator_batch_size: Images of each generator in a round.
        rows_per_sample: Points of the estimate, the unperturbed one included.
        student_steps: Steps of the learner.
        student_batch_size: Synthetic images in each; 0 where no API is asked.
        reuse_base: Whether the first of them takes the unperturbed images of the last round.
    """
    base = generators * generator_steps * generator_batch_size
    found = {
        "gen_base": base,
        "gen_dirs": base * (rows_per_sample - 1),
        "student": student_steps * student_batch_size,
    }
    if reuse_base and base:
        found["student"] -= min(student_batch_size, generators * generator_batch_size)
    return {purpose: rows for purpose, rows in found.items() if rows}
