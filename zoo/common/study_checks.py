"""What is asked of a study's results: means and spreads over the seeds, and checks on them."""

from __future__ import annotations

import operator
import re
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

_COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_CHECK = re.compile(
    r"\s*([\w.-]+)\s*(>=|<=|>|<)\s*(?:([\d.]+)\s*\*\s*)?([\w.-]+)\s*(?:([+-])\s+([\d.]+)\s*)?(each seed)?\s*"
)


class StudyError(ValueError):
    """A study that cannot be run, or a run of it that failed; the text is for the user."""


@dataclass(frozen=True)
class Check:
    """A required relation of two variants, or a variant and a number: `left comparison factor * right + offset`."""

    metric: str
    left: str
    comparison: str
    factor: float
    right: str
    offset: float = 0.0
    each_seed: bool = False

    def __str__(self) -> str:
        """The check as its study has it."""
        factor = "" if self.factor == 1 else f"{self.factor:g} * "
        offset = f" {'-' if self.offset < 0 else '+'} {abs(self.offset):g}" if self.offset else ""
        seeds = " each seed" if self.each_seed else ""
        return f"{self.metric}: {self.left} {self.comparison} {factor}{self.right}{offset}{seeds}"

    def holds(self, left: float, right: float) -> bool:
        """Whether two values stand in the relation."""
        return bool(_COMPARISONS[self.comparison](left, self.factor * right + self.offset))


def parse_check(path: Path, metric: str, text: str, variants: Collection[str]) -> Check:
    """A check as a study has it.

    Args:
        path: The study's file.
        metric: What is compared.
        text: `variant >= 1.1 * variant`, `variant < 0.5`, `variant >= variant - 0.01 each seed`.
        variants: Names of the study's variants.

    Raises:
        StudyError: If it is of no such form, or names a variant that is not there.
    """
    match = _CHECK.fullmatch(str(text))
    if match is None:
        raise StudyError(f"{path}: check {metric}: {text!r} is not of the form `variant >= 1.1 * variant`")
    left, comparison, factor, right, sign, offset, each_seed = match.groups()
    for name in (left, right):
        if name not in variants and not (name is right and _number(name) is not None):
            raise StudyError(f"{path}: check {metric}: no variant {name!r}; there are {', '.join(variants)}")
    shift = float(offset or 0) * (-1 if sign == "-" else 1)
    return Check(metric, left, comparison, float(factor or 1), right, shift, bool(each_seed))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Per variant and metric: mean, sample standard deviation (None for one seed) and the values, seed by seed."""
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for name in dict.fromkeys(str(record["variant"]) for record in records):
        own = [record for record in records if record["variant"] == name]
        columns = {metric: [record["metrics"].get(metric) for record in own] for metric in own[0]["metrics"]}
        columns |= {f"seconds/{part}": [record["seconds"].get(part) for record in own] for part in own[0]["seconds"]}
        columns["peak_rss_bytes"] = [record["peak_rss_bytes"] for record in own]
        summary[name] = {key: _spread(values) for key, values in columns.items()}
    return summary


def _spread(values: list[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    complete = len(known) == len(values)
    return {
        "mean": statistics.fmean(known) if complete else None,
        "std": statistics.stdev(known) if complete and len(known) > 1 else None,
        "values": values,
    }


def evaluate_check(check: Check, summary: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Measured sides of a check, their ratio, overall and seed by seed, and whether the check holds."""
    left = _side(check, check.left, summary)
    right = _side(check, check.right, summary)
    # A number stands against every seed.
    values = right["values"] if check.right in summary else right["values"] * len(left["values"])
    pairs = list(zip(left["values"], values, strict=True))
    known = left["mean"] is not None and right["mean"] is not None
    sides = pairs if check.each_seed else [(left["mean"], right["mean"])]
    return {
        "check": str(check),
        "left": left["mean"],
        "right": right["mean"],
        "ratio": left["mean"] / right["mean"] if known and right["mean"] else None,
        "ratios": [a / b if a is not None and b else None for a, b in pairs],
        "holds": known and all(check.holds(a, b) for a, b in sides),
    }


def _side(check: Check, name: str, summary: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    if name not in summary:
        number = float(name)
        return {"mean": number, "values": [number]}
    if check.metric not in summary[name]:
        raise StudyError(f"check {check}: {name} has no {check.metric}; it has {', '.join(summary[name])}")
    return dict(summary[name][check.metric])
