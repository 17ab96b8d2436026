"""How replies are made and judged."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

DECODINGS = ("greedy", "beam", "sample")


@dataclass(frozen=True)
class EvaluationOptions:
    """The arguments of `DialogueModule` that say how replies are made and judged.

    Raises:
        ValueError: If one is out of its range or unknown.
    """

    max_length: int = 30
    decoding: str = "greedy"
    beam_size: int = 5
    num_return: int = 1
    length_penalty: float = 0.0
    no_repeat_ngram: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    judge: str | None = None
    test_forced: bool | None = None
    lexicon: str | None = None
    word_vectors: str | None = None
    table_rows: int = 50

    def __post_init__(self) -> None:
        """Check what decoding does not check."""
        if self.decoding not in DECODINGS:
            raise ValueError(f"decoding must be one of {', '.join(DECODINGS)}, got {self.decoding!r}")
        for name in ("max_length", "beam_size", "num_return"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("table_rows", "no_repeat_ngram", "top_k"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.decoding == "greedy" and self.num_return > 1:
            raise ValueError(f"greedy decoding gives one reply, num_return is {self.num_return}: use beam or sample")

    def changed(self, **options: Any) -> EvaluationOptions:
        """These with others in their place.

        Raises:
            ValueError: If there is no such option.
        """
        known = [field.name for field in fields(self)]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise ValueError(f"no option {', '.join(unknown)}; there are {', '.join(known)}")
        return replace(self, **options)
