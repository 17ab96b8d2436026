"""Tensors of the images of several tasks, computed once for each image, in memory and in checked files."""

from __future__ import annotations

import gc
import os
import warnings
import weakref
from collections.abc import Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import quote

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zoo.merging.calibration import evaluation, map_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

Reader: TypeAlias = "Callable[[nn.Module, Any, str], Sequence[Tensor]]"
"""(expert, batch, where) -> tensors `(batch, ...)`; `where` says in words which batch it is, for messages."""

_DTYPES = (torch.float32, torch.float16)


class RowCache:
    """What was computed for each row of each task: a few tensors.

    Args:
        kind: What the values are; begins the names of files.
        folder: Where to keep files, one a task, or None. A file that was made of anything else, or is damaged, is made
            anew.
        dtype: Of the stored values, float32 or float16; `gather` returns float32.

    Raises:
        ValueError: If the dtype is another one.
    """

    def __init__(self, kind: str, folder: str | Path | None = None, dtype: torch.dtype = torch.float32) -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"dtype of a cache must be one of {list(_DTYPES)}, got {dtype}")
        self.kind, self.dtype = kind, dtype
        self.folder = None if folder is None else Path(folder)
        self._rows: dict[str, Tensor] = {}
        self._values: dict[str, list[Tensor]] = {}

    @property
    def task_names(self) -> list[str]:
        """Tasks that are there."""
        return list(self._rows)

    def rows(self, task: str) -> Tensor:
        """Rows of a task that are there, int64, ascending.

        Raises:
            ValueError: If there is no such task.
        """
        if task not in self._rows:
            raise ValueError(f"the cache has no task {task!r}; it has {self.task_names}")
        return self._rows[task]

    def to(self, device: torch.device | str) -> None:
        """Keep everything on a device; it is built on the CPU."""
        self._rows = {task: rows.to(device) for task, rows in self._rows.items()}
        self._values = {task: [value.to(device) for value in values] for task, values in self._values.items()}

    def gather(self, task: str, rows: Tensor | None = None) -> tuple[Tensor, ...]:
        """Values of some rows, in their order.

        Args:
            task: Their task.
            rows: int64 `(batch,)`, also repeated ones; None for all, in the order of `rows(task)`.

        Returns:
            float32 tensors `(batch, ...)` on the device of `rows`.

        Raises:
            ValueError: If the task or a row is not there.
        """
        known = self.rows(task)
        if rows is None:
            return tuple(value.float() for value in self._values[task])
        wanted = rows.to(known.device)
        places = torch.searchsorted(known, wanted).clamp_(max=len(known) - 1)
        strangers = wanted[known[places] != wanted]
        if len(strangers):
            raise ValueError(
                f"the cache has no row {strangers[:10].tolist()} of task {task!r}, of which it has {len(known)}; build "
                "it from batches with all rows that will be asked for"
            )
        return tuple(value[places].to(rows.device).float() for value in self._values[task])

    def _build(
        self,
        read: Reader,
        expert_of: Callable[[str], nn.Module],
        batches: Mapping[str, Iterable[Any]],
        fingerprints: Mapping[str, str] | None,
        rows: Mapping[str, Tensor] | None,
        device: torch.device | str | None,
        sharded: bool,
    ) -> list[str]:
        """Fill in the tasks of `batches`; returns those that no file had. All processes must call it."""
        names = fingerprints or {}
        lacking = [task for task in batches if self.folder is not None and not names.get(task)]
        if lacking:
            raise ValueError(
                f"a cache in the folder {self.folder} needs fingerprints= of each task; there is none of {lacking}"
            )
        computed = []
        for task in batches:
            stored = self._read(task, names[task], (rows or {}).get(task)) if self.folder is not None else None
            # A process may lack the file that the others have; they compute together or not at all.
            if not all(_everywhere(stored is not None)) or stored is None:
                with _failing_together():
                    mine, expert = self._compute(read, expert_of, task, batches[task], device, sharded)
                    # In a cycle of references it would live beside the next one.
                    if expert() is not None:
                        gc.collect()
                stored = _joined(task, mine)
                with _failing_together():
                    if self.folder is not None and _process()[0] == 0:
                        self._write(task, names[task], stored)
                computed.append(task)
            self._rows[task], self._values[task] = stored[0], stored[1:]
        return computed

    @torch.no_grad()
    def _compute(
        self,
        read: Reader,
        expert_of: Callable[[str], nn.Module],
        task: str,
        batches: Iterable[Any],
        device: torch.device | str | None,
        sharded: bool,
    ) -> tuple[list[Tensor], weakref.ref[nn.Module]]:
        """Rows and values of this process's batches, nothing without one; and the expert, to see whether it is gone."""
        rank, world = _process()
        seen = torch.zeros(0, dtype=torch.int64)
        parts: list[list[Tensor]] = []
        expert = expert_of(task)
        with _moved(expert, device), evaluation(expert):
            for index, batch in enumerate(batches):
                where = f"task {task!r}, batch {index}"
                rows = _rows_of(batch, where)
                fresh = (~torch.isin(rows, seen)).nonzero().squeeze(1)
                fresh = fresh[_firsts(rows[fresh]).sort().values]
                seen = torch.cat([seen, rows[fresh]])
                if not len(fresh) or not (sharded or index % world == rank):
                    continue
                if len(fresh) < len(rows):
                    batch = map_tensors(batch, partial(_chosen, fresh, len(rows)))
                if device is not None:
                    batch = map_tensors(batch, partial(Tensor.to, device=device))
                parts.append([rows[fresh], *(self._stored(value, where) for value in read(expert, batch, where))])
                _check_shapes(parts, where)
        return [torch.cat(column) for column in zip(*parts, strict=True)], weakref.ref(expert)

    def _stored(self, value: Tensor, where: str) -> Tensor:
        stored = value.detach().to("cpu", self.dtype)
        if not stored.isfinite().all():
            raise ValueError(
                f"{where}: values up to {float(value.abs().max()):.3g} do not fit in {self.dtype}; "
                "use dtype=torch.float32 for the cache"
            )
        return stored

    def _file(self, task: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{self.kind}-{quote(task, safe='')}.safetensors"

    def _read(self, task: str, fingerprint: str, rows: Tensor | None) -> list[Tensor] | None:
        from safetensors import SafetensorError, safe_open

        path = self._file(task)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("fingerprint") != fingerprint:
                    return None
                values = [file.get_tensor(str(place)) for place in range(len(file.keys()) - 1)]
                stored = [file.get_tensor("rows"), *values]
        except SafetensorError as error:
            warnings.warn(f"{path} is damaged and is made anew ({error})", stacklevel=2)
            return None
        if any(value.dtype != self.dtype for value in values):
            return None
        return stored if rows is None or bool(torch.isin(rows.cpu(), stored[0]).all()) else None

    def _write(self, task: str, fingerprint: str, stored: Sequence[Tensor]) -> None:
        from safetensors.torch import save_file

        path = self._file(task)
        path.parent.mkdir(parents=True, exist_ok=True)
        names = ["rows", *map(str, range(len(stored) - 1))]
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        save_file(dict(zip(names, stored, strict=True)), temporary, metadata={"fingerprint": fingerprint})
        temporary.replace(path)


@contextmanager
def _moved(model: nn.Module, device: torch.device | str | None) -> Iterator[None]:
    """A model on a device within a `with`; one that its owner keeps goes back where it was."""
    home = next((parameter.device for parameter in model.parameters()), None)
    if device is None or home is None:
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(home)


def _rows_of(batch: Any, where: str) -> Tensor:
    rows = batch.get("rows") if isinstance(batch, Mapping) else getattr(batch, "rows", None)
    if not isinstance(rows, Tensor) or rows.ndim != 1 or rows.is_floating_point():
        raise ValueError(
            f"{where}: a batch must have a field 'rows', int64 (batch,), that tells its images apart; this "
            f"{type(batch).__name__} has {_described(rows)}"
        )
    return rows.cpu().long()


def _described(field: Any) -> str:
    return f"{field.dtype} {tuple(field.shape)}" if isinstance(field, Tensor) else str(field)


def _chosen(places: Tensor, length: int, field: Tensor) -> Tensor:
    return field[places.to(field.device)] if field.shape[:1] == (length,) else field


def _firsts(rows: Tensor) -> Tensor:
    """Places of the first of each row, in the order of the rows."""
    ordered, places = rows.sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return places[first]


def _check_shapes(parts: Sequence[Sequence[Tensor]], where: str) -> None:
    rows, *values = parts[-1]
    for value, before in zip(values, parts[0][1:], strict=True):
        if value.shape != (len(rows), *before.shape[1:]):
            raise ValueError(
                f"{where}: values of shape {tuple(value.shape)} for {len(rows)} images; "
                f"the shape must be {(len(rows), *before.shape[1:])}, as in the batches before"
            )


def _process() -> tuple[int, int]:
    """Rank of this process, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _everywhere(value: Any) -> list[Any]:
    """A small value of each process."""
    world = _process()[1]
    values = [value] * world
    if world > 1:
        dist.all_gather_object(values, value)
    return values


@contextmanager
def _failing_together() -> Iterator[None]:
    """What raises in one process raises in all, which would otherwise wait for it for ever."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    told = _everywhere(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for rank, message in enumerate(told):
        if message is not None:
            raise RuntimeError(f"process {rank} failed: {message}")


def _joined(task: str, mine: list[Tensor]) -> list[Tensor]:
    """Rows and values of all processes, each row once, in ascending order."""
    rank, world = _process()
    shapes = _everywhere([tuple(column.shape) for column in mine])
    if not any(shapes):
        raise ValueError(f"there is no batch of task {task!r} to build a cache from")
    whole = mine
    if world > 1:
        # The only device that this backend can send from.
        device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
        dtypes = next(filter(None, _everywhere([column.dtype for column in mine])))
        parts: list[list[Tensor]] = []
        for source, sizes in enumerate(shapes):
            columns = []
            for place, size in enumerate(sizes):
                column = mine[place] if source == rank else torch.empty(size, dtype=dtypes[place])
                column = column.to(device).contiguous()
                dist.broadcast(column, source)
                columns.append(column.cpu())
            parts.extend([columns] if columns else [])
        whole = [torch.cat(column) for column in zip(*parts, strict=True)]
    places = _firsts(whole[0])
    return [column[places] for column in whole]
