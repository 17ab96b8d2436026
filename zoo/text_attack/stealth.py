"""How much of a title an attack changed: edits, words, longest common subsequence, meaning, fluency."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchmetrics import Metric

from zoo.text_attack.words import Words

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence


def levenshtein(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Least number of insertions, deletions and substitutions between two strings, or two lists of words.

    A column of the table of distances is one pair of integers with a bit a row, so a column costs a few operations on
    integers (Myers, 1999; Hyyrö, 2003).

    Example:
        >>> levenshtein("kitten", "sitting")
        3
    """
    start = 0
    shorter = min(len(first), len(second))
    while start < shorter and first[start] == second[start]:
        start += 1
    end = 0
    while end < shorter - start and first[-1 - end] == second[-1 - end]:
        end += 1
    pattern, text = first[start : len(first) - end], second[start : len(second) - end]
    if not pattern or not text:
        return len(pattern) + len(text)
    rows = _rows_of(pattern)
    full = (1 << len(pattern)) - 1
    last = 1 << (len(pattern) - 1)
    distance, rises, falls = len(pattern), full, 0
    for symbol in text:
        equal = rows.get(symbol, 0)
        diagonal = (((equal & rises) + rises) ^ rises) | equal
        right_rises = falls | ~(diagonal | rises)
        right_falls = rises & diagonal
        if right_rises & last:
            distance += 1
        elif right_falls & last:
            distance -= 1
        right_rises = (right_rises << 1) | 1
        vertical = equal | falls
        rises = ((right_falls << 1) | ~(vertical | right_rises)) & full
        falls = right_rises & vertical & full
    return distance


def _rows_of(pattern: Sequence[Hashable]) -> dict[Hashable, int]:
    """For each symbol an integer with a bit at each of its places."""
    rows: dict[Hashable, int] = {}
    for place, symbol in enumerate(pattern):
        rows[symbol] = rows.get(symbol, 0) | (1 << place)
    return rows


def _common_length(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence, with bits as in `levenshtein` (Hyyrö, 2004)."""
    rows = _rows_of(first)
    full = (1 << len(first)) - 1
    unmatched = full
    for symbol in second:
        matches = unmatched & rows.get(symbol, 0)
        unmatched = ((unmatched + matches) | (unmatched - matches)) & full
    return len(first) - unmatched.bit_count()


def words_changed(original: str, perturbed: str) -> float:
    """Share of words that differ: the least number of word edits, divided by the words of the longer title.

    Returns:
        In [0, 1]; where both have as many words, at most the share of places whose words differ.
    """
    first, second = Words.of(original).words, Words.of(perturbed).words
    return levenshtein(first, second) / max(len(first), len(second), 1)


def rouge_l(original: str, perturbed: str) -> float:
    """ROUGE-L: F1 of the longest common subsequence of lower-cased words.

    Returns:
        In [0, 1]; 1 for equal words, also where neither has any, and 0 for titles with no word in common.
    """
    first, second = Words.of(original.lower()).words, Words.of(perturbed.lower()).words
    if not first and not second:
        return 1.0
    return 2 * _common_length(first, second) / (len(first) + len(second))


class TextStealth(Metric):
    """Means over targets of how far attacked titles are from the original ones.

    `compute` gives `edit_distance` (Levenshtein), `edit_ratio` (that over the length of the original title),
    `words_changed`, `rouge_l`, and, where they were given, `cosine`, and `ppl_pre`, `ppl_post`, `ppl_ratio` (attacked
    over original) with their medians (`ppl_ratio_median`, ...): perplexity of titles is noisy. Titles without a
    perplexity (NaN, or None in a result) are left out of its means alone.

    What is kept is one row a target and is summed in sorted order: the same to the last bit for any order of targets
    and any number of processes.

    Example:
        >>> metric = TextStealth()
        >>> metric.update(["Super Mario"], ["Super Mairo"])
        >>> {name: round(float(value), 3) for name, value in metric.compute().items()}
        {'edit_distance': 2.0, 'edit_ratio': 0.182, 'words_changed': 0.5, 'rouge_l': 0.5}
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    rows: list[Tensor]

    _COLUMNS = ("edit_distance", "edit_ratio", "words_changed", "rouge_l", "cosine", "ppl_pre", "ppl_post", "ppl_ratio")

    def __init__(self) -> None:
        super().__init__()
        # A process without a target takes part in the exchange with an empty tensor of this type and of one dimension.
        self.set_dtype(torch.float64)
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(
        self,
        originals: Sequence[str],
        perturbed: Sequence[str],
        *,
        cosine: Tensor | None = None,
        ppl_pre: Tensor | None = None,
        ppl_post: Tensor | None = None,
    ) -> None:
        """Compare titles with attacked ones.

        Args:
            originals: Titles.
            perturbed: The attacked title of each.
            cosine: Cosine `(titles,)` of their sentence embeddings.
            ppl_pre: Perplexity `(titles,)` of the titles.
            ppl_post: Perplexity `(titles,)` of the attacked titles.

        Raises:
            ValueError: If lengths differ, or one perplexity comes without the other.
        """
        if len(originals) != len(perturbed):
            raise ValueError(f"each title needs its attacked title, got {len(originals)} and {len(perturbed)}")
        if (ppl_pre is None) != (ppl_post is None):
            raise ValueError("give the perplexity of both the titles and the attacked titles, or of neither")
        given = {"cosine": cosine, "ppl_pre": ppl_pre, "ppl_post": ppl_post}
        absent = torch.full((len(originals),), torch.nan, dtype=torch.float64)
        columns = {}
        for name, values in given.items():
            if values is not None and values.shape != absent.shape:
                raise ValueError(f"{name} must have shape {tuple(absent.shape)}, got {tuple(values.shape)}")
            columns[name] = absent if values is None else values.detach().double().cpu()
        pairs = list(zip(originals, perturbed, strict=True))
        distances = torch.tensor([levenshtein(a, b) for a, b in pairs], dtype=torch.float64)
        columns |= {
            "edit_distance": distances,
            "edit_ratio": distances / torch.tensor([max(len(a), 1) for a in originals], dtype=torch.float64),
            "words_changed": torch.tensor([words_changed(a, b) for a, b in pairs], dtype=torch.float64),
            "rouge_l": torch.tensor([rouge_l(a, b) for a, b in pairs], dtype=torch.float64),
            "ppl_ratio": columns["ppl_post"] / columns["ppl_pre"],
        }
        table = torch.stack([columns[name] for name in self._COLUMNS], dim=1)
        self.rows.append(table.flatten().to(self.device))

    def compute(self) -> dict[str, Tensor]:
        """Means and medians by name, float64; without those that no target has."""
        # A list before an exchange, one tensor after it.
        flat = torch.cat(self.rows) if isinstance(self.rows, list) and self.rows else self.rows
        if not isinstance(flat, Tensor):
            return {}
        result = {}
        for name, column in zip(self._COLUMNS, flat.view(-1, len(self._COLUMNS)).T, strict=True):
            values = column[~column.isnan()].sort().values
            if not len(values):
                continue
            result[name] = values.sum() / len(values)
            if name.startswith("ppl_"):
                result[f"{name}_median"] = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
        return result
