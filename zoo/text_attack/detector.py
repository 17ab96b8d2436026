"""Telling attacked titles from clean ones by how unexpected they read."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

    from zoo.text_attack.perplexity import LanguageModel

_log = logging.getLogger(__name__)


class PerplexityDetector:
    """Flags titles whose perplexity is higher than that of nearly all clean titles.

    The ratio of a title is its perplexity over the median of clean titles; it is flagged above the `quantile` of the
    ratios of clean titles.

    Args:
        language_model: Has `perplexity(list[str]) -> (titles,)`, NaN for a title with nothing to read.
        quantile: Share of clean titles that are not flagged, in (0, 1).

    Raises:
        ValueError: If `quantile` is outside (0, 1).
    """

    def __init__(self, language_model: LanguageModel, quantile: float = 0.95) -> None:
        if not 0 < quantile < 1:
            raise ValueError(f"quantile must be in (0, 1), got {quantile}")
        self.language_model, self.quantile = language_model, quantile
        self._median: float | None = None
        self._threshold: float | None = None

    def fit(self, clean: Sequence[str]) -> Self:
        """Take the median and the threshold from clean titles.

        Args:
            clean: Titles; those without a perplexity are left out and counted in the log.

        Raises:
            ValueError: If no title has a perplexity, or one is infinite.
        """
        values = self._read(clean, "clean")
        self._median = float(values.quantile(0.5))
        self._threshold = float((values / self._median).quantile(self.quantile))
        return self

    @property
    def threshold(self) -> float:
        """Highest ratio that is not flagged.

        Raises:
            RuntimeError: If `fit` was not called.
        """
        if self._threshold is None:
            raise RuntimeError("the detector has no threshold yet: call fit with clean titles")
        return self._threshold

    def ratios(self, titles: Sequence[str]) -> Tensor:
        """Perplexity over the median of clean titles, float64 `(titles,)`; NaN where a title has nothing to read.

        Raises:
            RuntimeError: If `fit` was not called.
            ValueError: If a perplexity is infinite.
        """
        if self._median is None:
            raise RuntimeError("the detector has no median yet: call fit with clean titles")
        return self._perplexity(titles) / self._median

    def flags(self, titles: Sequence[str]) -> Tensor:
        """Which titles read like attacked ones, bool `(titles,)`; a title with nothing to read is not flagged.

        Raises:
            RuntimeError: If `fit` was not called.
            ValueError: If a perplexity is infinite.
        """
        return self.ratios(titles) > self.threshold

    def auroc(self, attacked: Sequence[str], clean: Sequence[str]) -> float:
        """Chance that an attacked title reads worse than a clean one, equal ones counting half; 0.5 tells nothing.

        Needs no `fit`. Titles without a perplexity are left out and counted in the log.

        Raises:
            ValueError: If either side has no title with a perplexity, or one is infinite.
        """
        bad, good = self._read(attacked, "attacked"), self._read(clean, "clean").sort().values
        below = torch.searchsorted(good, bad)
        reached = torch.searchsorted(good, bad, right=True)
        return float((below + reached).double().mean() / 2 / len(good))

    def _read(self, titles: Sequence[str], name: str) -> Tensor:
        values = self._perplexity(titles)
        readable = values[~values.isnan()]
        if len(readable) < len(values):
            _log.info("%d of %d %s titles have no perplexity", len(values) - len(readable), len(values), name)
        if not len(readable):
            raise ValueError(f"none of the {len(titles)} {name} titles has a perplexity")
        return readable

    def _perplexity(self, titles: Sequence[str]) -> Tensor:
        titles = list(titles)
        values = self.language_model.perplexity(titles).detach().double().cpu()
        if values.shape != (len(titles),):
            raise ValueError(f"{len(titles)} titles must get a perplexity each, got shape {tuple(values.shape)}")
        infinite = values.isinf().nonzero().flatten().tolist()
        if infinite:
            raise ValueError(f"the perplexity of the title {titles[infinite[0]]!r} is infinite")
        return values
