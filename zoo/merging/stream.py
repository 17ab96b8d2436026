"""Experts beside their base, read one parameter tensor at a time, and what is made of them, written in the same way."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor

from zoo.merging.safetensors_stream import SafetensorsWriter
from zoo.merging.thresholds import columns
from zoo.merging.weights import KeyMap, Source, is_statistic, match_weights, open_weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zoo.merging.weights import Weights

Progress = Callable[[str, int, int], None]
"""Called with the name of the tensor just read, the number of parameters read so far, and of those in all passes."""

_FAR = 1.0


class Selection(TypedDict, total=False):
    """What is merged, and how; keyword arguments of all one-shot merges.

    Attributes:
        include: Regular expressions, searched in names: the parameters to merge. All floating ones by default.
        exclude: Regular expressions of parameters to take from the base as they are, such as heads.
        key_map: How names of experts become those of the base: "auto", "none" or a function; see `open_weights`.
        buffers: Floating buffers as "pretrained" (the default), or the experts' "average". A state dict does not tell
            buffers from parameters; taken for buffers are the statistics of batch normalisation, that is names ending
            in `running_mean`, `running_var` or `num_batches_tracked`. They are never part of a task vector. Integers
            (such as `num_batches_tracked`) are those of the base in any case.
        progress: Called after each tensor; see `Progress`.
    """

    include: str | list[str] | None
    exclude: str | list[str] | None
    key_map: KeyMap
    buffers: Literal["pretrained", "average"]
    progress: Progress | None


class Geometry(NamedTuple):
    """Sizes and directions of task vectors."""

    names: list[str]
    """The L parameters."""
    base_norms: Tensor
    """float64 `(L,)`, the norms of the base's parameters."""
    norms: Tensor
    """float64 `(L, K)`, those of the task vectors."""
    cosines: Tensor
    """float64 `(K, K)`, the cosines between whole task vectors; 0 where one is zero."""


class VectorStream:
    """A base and its K experts, of which one parameter tensor at a time is in memory.

    Args:
        pretrained: Module, state dict, file or folder; see `open_weights`.
        experts: The same by task.
        out: Where `write` writes: a safetensors file, or memory if None.
        passes: How often the parameters will be read, for `progress`.
        include: See `Selection`, as for the others.
        exclude: See `Selection`.
        key_map: See `Selection`.
        buffers: See `Selection`.
        progress: See `Selection`.

    Attributes:
        task_names: The K tasks.
        names: The merged parameters, in the base's order.
        num_parameters: P, their size.

    Raises:
        ValueError: If the weights do not fit each other, an option is unknown, or `out` is one of the sources.
        FileNotFoundError: If a file is missing.
    """

    def __init__(
        self,
        pretrained: Source,
        experts: Mapping[str, Source],
        out: str | Path | None = None,
        passes: int = 1,
        *,
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        key_map: KeyMap = "auto",
        buffers: Literal["pretrained", "average"] = "pretrained",
        progress: Progress | None = None,
    ) -> None:
        if buffers not in ("pretrained", "average"):
            raise ValueError(f"buffers must be 'pretrained' or 'average', got {buffers!r}")
        base = open_weights(pretrained, "pretrained", key_map=key_map)
        opened = {
            task: open_weights(source, f"expert {task}", key_map=key_map, base=base) for task, source in experts.items()
        }
        matched = match_weights(base, opened, include=include, exclude=exclude)
        self.task_names = list(opened)
        self.names = [name for name in matched if not is_statistic(name)]
        if not self.names:
            raise ValueError(f"no parameter is left to merge: include={include!r}, exclude={exclude!r}")
        self.num_parameters = sum(math.prod(base.shape(name)) for name in self.names)
        self._base, self._experts = base, opened
        self._averaged = [name for name in matched if is_statistic(name)] if buffers == "average" else []
        self._progress, self._passes, self._read = progress, passes, 0
        self._memory: Tensor | None = None
        self._writer = None
        if out is not None:
            refuse_source(Path(out), [pretrained, *experts.values()])
            self._writer = SafetensorsWriter(out, {name: (base.dtype(name), base.shape(name)) for name in base})

    def blocks(self) -> Iterator[tuple[str, Tensor]]:
        """Names and task vectors, float32 `(K, n)`, for `Transform.fit`."""
        for name, base, block in self.vectors():
            del base
            yield name, block

    def vectors(self, whole: bool = False) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Names, the base's parameters `(n,)`, and the task vectors `(K, n)`, on the base's device.

        The base's parameters are in its precision, at least float32, and not to be written to. The task vectors are
        float32, may be overwritten, and are gone when the next ones are read. The first pass warns of experts that are
        equal or far from the base.

        Args:
            whole: Give the parameters of the experts, in the base's precision, in place of the task vectors.

        Raises:
            ValueError: If a value is not finite.
        """
        watch = ExpertWatch(self.task_names) if self._read == 0 else None
        for name in self.names:
            base = _flat(self._base, name)
            block = self._block(base, base.dtype if whole else torch.float32)
            for row, weights in zip(block, self._experts.values(), strict=True):
                theta = _flat(weights, name).to(base)
                if whole:
                    row.copy_(theta)
                else:
                    torch.sub(theta, base, out=row)
                del theta
            if watch is not None:
                watch.see(base, block, whole)
            self._read += len(base)
            # What is still held when the next tensors are read adds to the largest memory.
            yield name, base, block
            del base
            if self._progress is not None:
                self._progress(name, self._read, self._passes * self.num_parameters)
        if watch is not None:
            watch.warn()

    def write(self, merged: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor] | Path:
        """Put merged parameters in the place of the base's.

        Args:
            merged: All merged parameters by name, flat, in any precision; new tensors.

        Returns:
            A state dict with the base's names, shapes and types, or the path of the file with it.

        Raises:
            ValueError: If a merged value is not finite in the base's type.
            OSError: If the file cannot be written.
        """
        if self._writer is not None:
            with self._writer as writer:
                for name, tensor in self._all(merged):
                    writer.write(name, tensor)
                    del tensor
            return self._writer.path
        state: dict[str, Tensor] = {}
        fresh = {*self.names, *self._averaged}
        for name, tensor in self._all(merged):
            kept = self._base.tied.get(name, name)
            state[name] = state[kept] if kept != name else tensor if name in fresh else tensor.clone()
        return {name: state[name] for name in self._base}

    def geometry(self) -> Geometry:
        """Norms by parameter, and cosines between the task vectors, computed in float64 in one pass."""
        base_norms, norms = [], []
        gram = torch.zeros(len(self._experts), len(self._experts), dtype=torch.float64)
        for _, base, block in self.vectors():
            square, products = torch.zeros((), dtype=torch.float64), torch.zeros_like(gram)
            for part in columns(block):
                square += base[part].double().square().sum().cpu()
                piece = block[:, part].double()
                products += (piece @ piece.T).cpu()
            base_norms.append(square.sqrt())
            norms.append(products.diagonal().sqrt())
            gram += products
            del base
        lengths = gram.diagonal().sqrt()
        scale = torch.outer(lengths, lengths)
        cosines = torch.where(scale > 0, gram / torch.where(scale > 0, scale, 1), 0)
        return Geometry(self.names, torch.stack(base_norms), torch.stack(norms), cosines)

    def _block(self, base: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory for `(K, n)`, the same every time: two such blocks would be twice the memory of a merge."""
        rows = len(self._experts)
        if self._memory is None or self._memory.dtype != dtype or self._memory.device != base.device:
            self._memory = None
            largest = max(math.prod(self._base.shape(name)) for name in self.names)
            self._memory = torch.empty(rows * largest, dtype=dtype, device=base.device)
        return self._memory[: rows * len(base)].view(rows, len(base))

    def _all(self, merged: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the base or what has become of it, an alias after what it is tied to."""
        aliases: dict[str, list[str]] = {}
        for alias, kept in self._base.tied.items():
            aliases.setdefault(kept, []).append(alias)
        for source in (self._kept(), self._averages(), merged):
            for name, tensor in source:
                result = tensor.to(self._base.dtype(name)).view(self._base.shape(name))
                if source is merged:
                    self._check(name, result)
                for known in (name, *aliases.get(name, ())):
                    yield known, result
                del tensor, result

    def _kept(self) -> Iterator[tuple[str, Tensor]]:
        changed = {*self.names, *self._averaged, *self._base.tied}
        return ((name, self._base[name]) for name in self._base if name not in changed)

    def _averages(self) -> Iterator[tuple[str, Tensor]]:
        for name in self._averaged:
            mean = torch.zeros_like(self._base[name], dtype=torch.float64)
            for weights in self._experts.values():
                mean += weights.finite(name).to(mean)
            yield name, mean / len(self._experts)

    def _check(self, name: str, tensor: Tensor) -> None:
        # The extremes show it in one pass and without a copy.
        if tensor.numel() and not all(map(torch.isfinite, tensor.aminmax())):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"merged values of {name} are outside the range of {kind}: take a smaller coefficient")


class ExpertWatch:
    """Looks for experts that are equal to the base or each other, or far from the base.

    Args:
        task_names: The K tasks.
    """

    def __init__(self, task_names: Sequence[str]) -> None:
        self._tasks = task_names
        self._base, self._vectors = 0.0, torch.zeros(len(task_names), dtype=torch.float64)
        self._identical = set(combinations(range(len(task_names)), 2))

    def see(self, base: Tensor, block: Tensor, whole: bool = False) -> None:
        """Take in some parameters.

        Args:
            base: `(n,)`, of the base.
            block: `(K, n)`, the task vectors.
            whole: Whether `block` has the experts' parameters instead.
        """
        for part in columns(block):
            piece = block[:, part] - base[part] if whole else block[:, part]
            self._base += float(torch.linalg.vector_norm(base[part])) ** 2
            self._vectors += torch.linalg.vector_norm(piece, dim=1).double().square().cpu()
            self._identical = {(j, k) for j, k in self._identical if torch.equal(piece[j], piece[k])}

    def warn(self) -> None:
        """Warn of what was seen."""
        for task, square in zip(self._tasks, self._vectors.tolist(), strict=True):
            if square == 0:
                warnings.warn(f"expert {task} equals the pre-trained model: its task vector is 0", stacklevel=3)
            elif square > _FAR**2 * self._base:
                ratio = math.sqrt(square / self._base) if self._base else math.inf
                warnings.warn(
                    f"expert {task} is far from the pre-trained model: its task vector has {ratio:.3g} times the norm "
                    "of the base. Was it fine-tuned from another base?",
                    stacklevel=3,
                )
        for j, k in sorted(self._identical):
            if self._vectors[j] > 0:
                warnings.warn(f"experts {self._tasks[j]} and {self._tasks[k]} are identical", stacklevel=3)


def _flat(weights: Weights, name: str) -> Tensor:
    tensor = weights.finite(name).flatten()
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def refuse_source(out: Path, sources: Sequence[Source]) -> None:
    """Refuse to write a result over a file that is still to be read.

    Raises:
        ValueError: If the result is one of the sources, or lies in one.
    """
    if not out.exists():
        return
    for source in sources:
        if not isinstance(source, (str, Path)) or not (path := Path(source).expanduser()).exists():
            continue
        folder = path if path.is_dir() else path.parent if path.name.endswith(".index.json") else None
        if out.samefile(path) or (folder is not None and out.parent.samefile(folder)):
            raise ValueError(f"{out} belongs to the weights that are merged ({source}): choose another place")
