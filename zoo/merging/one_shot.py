"""Merges of whole checkpoints that need no data: averaging, Task Arithmetic, TIES, DARE.

Base and experts are read one parameter tensor at a time. With `out` the result is written in the same way, so that a
merge of K experts needs the memory of some K + 2 copies of the largest tensor, not of K models. Sums are in float32 for
files in half precision too; the result has the types of the base.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from zoo.merging.stream import Selection, VectorStream
from zoo.merging.thresholds import columns, threshold_passes
from zoo.merging.transforms import BlockFunction, Dare, Magnitude, Ties

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from typing_extensions import Unpack

    from zoo.merging.weights import Source

MergeFunc = Literal["sum", "mean", "max"]
"""How task vectors become one: see `ties_merge`."""


@overload
def weight_average(
    pretrained: Source, experts: Mapping[str, Source], *, out: None = None, **selection: Unpack[Selection]
) -> dict[str, Tensor]: ...
@overload
def weight_average(
    pretrained: Source, experts: Mapping[str, Source], *, out: str | Path, **selection: Unpack[Selection]
) -> Path: ...
def weight_average(
    pretrained: Source, experts: Mapping[str, Source], *, out: str | Path | None = None, **selection: Unpack[Selection]
) -> dict[str, Tensor] | Path:
    """The mean of the experts' parameters.

    Args:
        pretrained: The base: module, state dict, file, folder or hub id; see `open_weights`. It gives names, types, and
            what is not merged.
        experts: The same by task.
        out: A safetensors file to stream the result to; by default it stays in memory.
        selection: `include`, `exclude`, `key_map`, `buffers` and `progress`; see `Selection`.

    Returns:
        The merged state dict, or the path of the file that holds it.

    Raises:
        ValueError: If the weights do not fit each other, or an option is outside its range.
        FileNotFoundError: If a file is missing.
    """
    stream = VectorStream(pretrained, experts, out, **selection)

    def merged() -> Iterator[tuple[str, Tensor]]:
        for name, base, block in stream.vectors(whole=True):
            total = torch.empty_like(base)
            for part in columns(block):
                total[part] = block[:, part].sum(0) / len(block)
            yield name, total
            del base, total

    return stream.write(merged())


@overload
def task_arithmetic(
    pretrained: Source,
    experts: Mapping[str, Source],
    *,
    coef: float = 0.3,
    out: None = None,
    **selection: Unpack[Selection],
) -> dict[str, Tensor]: ...
@overload
def task_arithmetic(
    pretrained: Source,
    experts: Mapping[str, Source],
    *,
    coef: float = 0.3,
    out: str | Path,
    **selection: Unpack[Selection],
) -> Path: ...
def task_arithmetic(
    pretrained: Source,
    experts: Mapping[str, Source],
    *,
    coef: float = 0.3,
    out: str | Path | None = None,
    **selection: Unpack[Selection],
) -> dict[str, Tensor] | Path:
    """Task Arithmetic (Ilharco et al., arXiv 2212.04089): theta_0 + coef * sum_k tau_k.

    Args:
        pretrained: See `weight_average`.
        experts: See `weight_average`.
        coef: The coefficient of every task vector.
        out: See `weight_average`.
        selection: See `weight_average`.

    Returns:
        See `weight_average`.

    Raises:
        ValueError: If the weights do not fit each other, or an option is outside its range.
        FileNotFoundError: If a file is missing.
    """
    _check_coef(coef)
    stream = VectorStream(pretrained, experts, out, **selection)
    return stream.write(_added(stream, None, "sum", coef))


@overload
def magnitude_merge(
    pretrained: Source,
    experts: Mapping[str, Source],
    *,
    density: float = 0.2,
    coef: float = 0.3,
    out: None = None,
    **selection: Unpack[Selection],
) -> dict[str, Tensor]: ...
@overload
def magnitude_merge(
    pretrained: Source,
    experts: Mapping[str, Source],
    *,
    density: float = 0.2,
    coef: float = 0.3,
    out: str | Path,
    **selection: Unpack[Selection],
) -> Path: ...
def magnitude_merge(
    pretrained: Source,
    experts: Mapping[str, Source],
    *,
    density: float = 0.2,
    coef: float = 0.3,
    out: str | Path | None = None,
    **selection: Unpack[Selection],
) -> dict[str, Tensor] | Path:
    """Task Arithmetic with the entries of largest magnitude of each task vector.

    Args:
        pretrained: See `weight_average`.
        experts: See `weight_average`.
        density: Share of entries to keep, of all that are merged; see `Magnitude`.
        coef: The coefficient of every task vector.
        out: See `weight_average`.
        selection: See `weight_average`.

    Returns:
        See `weight_average`.

    Raises:
        ValueError: If the weights do not fit each other, or an option is outside its range.
        FileNotFoundError: If a file is missing.
    """
    _check_coef(coef)
    transform = Magnitude(density)
    stream = VectorStream(pretrained, experts, out, threshold_passes(density) + 1, **selection)
    return stream.write(_added(stream, transform.fit(stream.blocks), "sum", coef))


@overload
def ties_merge(
    pretrained: Source,
    experts: Mapping[str, Source],
    *,
    density: float = 0.2,
    coef: float = 0.3,
    merge_func: MergeFunc = "sum",
    out: None = None,
    **selection: Unpack[Selection],
) -> dict[str, Tensor]: ...
@overload
def ties_merge(
    pretrained: Source,
    experts: Mapping[str, Source],
    *,
    density: float = 0.2,
    coef: float = 0.3,
    merge_func: MergeFunc = "sum",
    out: str | Path,
    **selection: Unpack[Selection],
) -> Path: ...
def ties_merge(
    pretrained: Source,
    experts: Mapping[str, Source],
    *,
    density: float = 0.2,
    coef: float = 0.3,
    merge_func: MergeFunc = "sum",
    out: str | Path | None = None,
    **selection: Unpack[Selection],
) -> dict[str, Tensor] | Path:
    """TIES (Yadav et al., arXiv 2306.01708): trim, elect signs, merge what agrees.

    The defaults are those of the AdaMerging family. The paper itself takes the mean, with a coefficient of about 1.

    Args:
        pretrained: See `weight_average`.
        experts: See `weight_average`.
        density: Share of entries to keep, of all that are merged: see `Ties`, whose docs tell how to compare this with
            published numbers.
        coef: The coefficient of the merged task vector.
        merge_func: What an entry of the merged vector is of the K that are left: their "sum", their "mean" without
            those that were dropped, or the one of largest magnitude ("max").
        out: See `weight_average`.
        selection: See `weight_average`.

    Returns:
        See `weight_average`.

    Raises:
        ValueError: If the weights do not fit each other, or an option is outside its range.
        FileNotFoundError: If a file is missing.
    """
    _check_coef(coef)
    if merge_func not in _REDUCTIONS:
        raise ValueError(f"merge_func must be one of {', '.join(_REDUCTIONS)}, got {merge_func!r}")
    transform = Ties(density)
    stream = VectorStream(pretrained, experts, out, threshold_passes(density) + 2, **selection)
    return stream.write(_added(stream, transform.fit(stream.blocks), merge_func, coef))


@overload
def dare_merge(
    pretrained: Source,
    experts: Mapping[str, Source],
    *,
    drop: float = 0.5,
    coef: float = 0.3,
    seed: int = 0,
    ties_density: float | None = None,
    out: None = None,
    **selection: Unpack[Selection],
) -> dict[str, Tensor]: ...
@overload
def dare_merge(
    pretrained: Source,
    experts: Mapping[str, Source],
    *,
    drop: float = 0.5,
    coef: float = 0.3,
    seed: int = 0,
    ties_density: float | None = None,
    out: str | Path,
    **selection: Unpack[Selection],
) -> Path: ...
def dare_merge(
    pretrained: Source,
    experts: Mapping[str, Source],
    *,
    drop: float = 0.5,
    coef: float = 0.3,
    seed: int = 0,
    ties_density: float | None = None,
    out: str | Path | None = None,
    **selection: Unpack[Selection],
) -> dict[str, Tensor] | Path:
    """DARE (Yu et al., arXiv 2311.03099): drop entries at random, rescale the others, then Task Arithmetic or TIES.

    Args:
        pretrained: See `weight_average`.
        experts: See `weight_average`.
        drop: Probability with which an entry is dropped, in [0, 1).
        coef: The coefficient of every task vector.
        seed: What is dropped is a function of it, the task and the parameter's name; see `Dare`.
        ties_density: Share of entries that TIES then keeps, see `Ties`; 1 elects signs without trimming. Without it the
            rescaled vectors are added up as they are.
        out: See `weight_average`.
        selection: See `weight_average`.

    Returns:
        See `weight_average`.

    Raises:
        ValueError: If the weights do not fit each other, or an option is outside its range.
        FileNotFoundError: If a file is missing.
    """
    _check_coef(coef)
    ties = None if ties_density is None else Ties(ties_density)
    dare = Dare(drop, seed, task_names=list(experts))
    passes = 1 if ties is None else threshold_passes(ties.density) + 2
    stream = VectorStream(pretrained, experts, out, passes, **selection)
    thin = dare.fit(stream.blocks)
    if ties is None:
        return stream.write(_added(stream, thin, "sum", coef))

    def thinned() -> Iterator[tuple[str, Tensor]]:
        return ((name, thin(name, block, out=block)) for name, block in stream.blocks())

    agree = ties.fit(thinned)

    def both(name: str, block: Tensor, out: Tensor | None = None) -> Tensor:
        return agree(name, thin(name, block, out=out), out=out)

    return stream.write(_added(stream, both, "sum", coef))


def _added(
    stream: VectorStream, change: BlockFunction | None, merge_func: MergeFunc, coef: float
) -> Iterator[tuple[str, Tensor]]:
    """theta_0 + coef * (one vector made of the changed task vectors), parameter by parameter."""
    reduce = _REDUCTIONS[merge_func]
    for name, base, block in stream.vectors():
        if change is not None:
            change(name, block, out=block)
        total = torch.empty_like(base)
        for part in columns(block):
            total[part] = base[part] + coef * reduce(block[:, part])
        yield name, total
        # Or they would be held while the next ones are read.
        del base, total


def _sum(block: Tensor) -> Tensor:
    return block.sum(0)


def _mean_of_kept(block: Tensor) -> Tensor:
    return block.sum(0) / (block != 0).sum(0).clamp(min=1)


def _largest(block: Tensor) -> Tensor:
    return block.gather(0, block.abs().argmax(0, keepdim=True))[0]


_REDUCTIONS: dict[MergeFunc, Callable[[Tensor], Tensor]] = {"sum": _sum, "mean": _mean_of_kept, "max": _largest}


def _check_coef(coef: float) -> None:
    if not math.isfinite(coef):
        raise ValueError(f"coef must be a finite number, got {coef}")
