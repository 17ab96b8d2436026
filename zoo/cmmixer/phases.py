"""Learning rates of a training in two parts."""

from __future__ import annotations

from zoo.common.schedules import WarmupCosine


class TwoPhases:
    """Two trainings after each other, each with a warm-up and a cosine of its own.

    Args:
        floor: What both cosines end at, as a share of the highest rate.

    Attributes:
        boundary: First step of the second part.
        total_steps: Steps of both parts.
        warmup_steps: Of each part.
    """

    def __init__(self, floor: float = 0.0) -> None:
        self.boundary = self.warmup_steps = self.total_steps = 0
        self.floor = floor

    def _schedule(self, steps: int) -> WarmupCosine:
        return WarmupCosine(self.warmup_steps, steps, self.floor)

    def first(self, step: int) -> float:
        """Factor of what is trained in the first part; 0 in the second."""
        return self._schedule(self.boundary)(step) if step < self.boundary else 0.0

    def second(self, step: int) -> float:
        """Factor of what is trained in the second part; 0 in the first."""
        return 0.0 if step < self.boundary else self._schedule(self.total_steps - self.boundary)(step - self.boundary)
