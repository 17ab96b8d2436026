"""Which weights of experts can be merged into those of the pre-trained model."""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from zoo.merging.weights import Weights

_SHOWN = 10
_STATISTIC = re.compile(r"(^|\.)(running_mean|running_var|num_batches_tracked)$")


def is_statistic(name: str) -> bool:
    """Whether a name is that of a running statistic of batch normalisation, which is measured rather than learned."""
    return _STATISTIC.search(name) is not None


def match_weights(
    pretrained: Weights,
    experts: Mapping[str, Weights],
    *,
    include: str | list[str] | None = None,
    exclude: str | list[str] | None = None,
) -> list[str]:
    """Check that experts fit the pre-trained weights.

    Integer and boolean tensors are no part of a merge and may differ or be absent. Of tied weights the first name
    counts.

    Args:
        pretrained: The base.
        experts: Weights by task.
        include: Regular expressions, searched in names; what none of them finds is left alone. All, by default.
        exclude: Regular expressions of what is left alone all the same.

    Returns:
        The names of the floating tensors that all have, in the order of `pretrained`, tied ones once; with running
        statistics (see `is_statistic`).

    Raises:
        ValueError: If there is no expert, one of them lacks keys, has others or other shapes, or nothing is left.
    """
    if not experts:
        raise ValueError("no experts were given; merging needs at least one")
    wanted = _filter(pretrained, experts, include, exclude)
    names = [name for name in pretrained if wanted(name) and _floating(pretrained, name)]
    odd = [name for name in pretrained if wanted(name) and pretrained.dtype(name).is_complex]
    if odd:
        raise ValueError(f"{pretrained.label}: {odd[0]!r} is complex, which is not merged; leave it out with exclude=")
    for task, weights in experts.items():
        _check_expert(f"expert {task}", pretrained, weights, names, wanted)
    merged = [name for name in names if name not in pretrained.tied]
    if not merged:
        raise ValueError(
            f"{pretrained.label}: nothing is left to merge of {len(pretrained)} tensors (include={include!r}, "
            f"exclude={exclude!r})"
        )
    _report_types(pretrained, experts, merged)
    return merged


def _floating(weights: Weights, name: str) -> bool:
    return weights.dtype(name).is_floating_point


def _filter(
    pretrained: Weights,
    experts: Mapping[str, Weights],
    include: str | list[str] | None,
    exclude: str | list[str] | None,
) -> Callable[[str], bool]:
    taken, left = _patterns("include", include), _patterns("exclude", exclude)
    for pattern in taken:
        if not any(map(pattern.search, pretrained)):
            shown = ", ".join(pretrained.names[:_SHOWN])
            raise ValueError(f"include={pattern.pattern!r} finds no name of {pretrained.label}, which has {shown}, ...")
    for pattern in left:
        if not any(map(pattern.search, (name for weights in (pretrained, *experts.values()) for name in weights))):
            warnings.warn(f"exclude={pattern.pattern!r} finds no name in any of the weights", stacklevel=4)
    return name_filter(include, exclude)


def name_filter(include: str | list[str] | None, exclude: str | list[str] | None) -> Callable[[str], bool]:
    """Whether a name is chosen.

    Args:
        include: Regular expressions, searched in names; one of them must be found. All names, by default.
        exclude: Regular expressions of which none may be found.

    Raises:
        ValueError: If one is no regular expression.
    """
    taken, left = _patterns("include", include), _patterns("exclude", exclude)

    def wanted(name: str) -> bool:
        found = not taken or any(pattern.search(name) for pattern in taken)
        return found and not any(pattern.search(name) for pattern in left)

    return wanted


def _patterns(option: str, given: str | list[str] | None) -> list[re.Pattern[str]]:
    texts = [] if given is None else [given] if isinstance(given, str) else list(given)
    try:
        return [re.compile(text) for text in texts]
    except (re.error, TypeError) as error:
        raise ValueError(f"{option}={given!r}: expected regular expressions ({error})") from error


def _check_expert(
    expert: str, pretrained: Weights, weights: Weights, names: list[str], wanted: Callable[[str], bool]
) -> None:
    found: dict[str, str] = {}
    for name in names:
        kept = pretrained.tied.get(name, name)
        if name not in weights:
            if kept == name or kept not in weights:
                found[name] = f"{name} {pretrained.shape(name)} is missing"
        elif weights.shape(name) != pretrained.shape(name):
            found[name] = f"{name} is {weights.shape(name)}, {pretrained.shape(name)} in {pretrained.label}"
        elif not _floating(weights, name):
            found[name] = f"{name} is {weights.dtype(name)}, {pretrained.dtype(name)} in {pretrained.label}"
    known = {kept for alias, kept in weights.tied.items() if alias in pretrained}
    for name in weights:
        same = name in known or weights.tied.get(name, name) in pretrained
        if name not in pretrained and not same and wanted(name) and _floating(weights, name):
            found[name] = f"{name} {weights.shape(name)} is not in {pretrained.label}"
    if found:
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        if any(name in weights for name in names):
            cure = f"Leave heads and other parts of single tasks out, with {_exclusion(found)}."
        else:
            cure = "No name fits: is it another architecture? Otherwise give key_map, a function from name to name."
        raise ValueError(
            f"{expert} does not fit {pretrained.label} in {len(found)} keys: "
            f"{'; '.join(list(found.values())[:_SHOWN])}{more}. {cure}"
        )
    _check_ties(expert, pretrained, weights, set(names))


def _check_ties(expert: str, pretrained: Weights, weights: Weights, names: set[str]) -> None:
    for alias, kept in pretrained.tied.items():
        if not {alias, kept} <= names or alias not in weights:
            continue
        one = weights.tied.get(alias, alias) == weights.tied.get(kept, kept)
        # Copies of a shared tensor are as good as the shared tensor.
        if not one and not torch.equal(weights[alias], weights[kept]):
            raise ValueError(
                f"{expert} has different values for {kept} and {alias}, which are one tensor in {pretrained.label}; "
                f"leave both out with exclude=, or untie them in {pretrained.label}"
            )


def _exclusion(names: Iterable[str]) -> str:
    parts = list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))
    if len(parts) > 3:
        return "exclude=, a regular expression or a list of them"
    choices = "|".join(map(re.escape, parts))
    return f'exclude="^{choices}"' if len(parts) == 1 else f'exclude="^({choices})"'


def _report_types(pretrained: Weights, experts: Mapping[str, Weights], names: list[str]) -> None:
    everyone = {pretrained.label: pretrained, **{f"expert {task}": weights for task, weights in experts.items()}}
    mixed = [name for name in names if len({weights.dtype(name) for weights in everyone.values()}) > 1]
    if not mixed:
        return
    holders: dict[str, list[str]] = {}
    for label, weights in everyone.items():
        holders.setdefault(str(weights.dtype(mixed[0])).removeprefix("torch."), []).append(label)
    kinds = ", ".join(f"{kind} ({', '.join(labels)})" for kind, labels in holders.items())
    warnings.warn(
        f"{len(mixed)} of {len(names)} tensors come in several types, {mixed[0]} as {kinds}; merged in float32",
        stacklevel=3,
    )
