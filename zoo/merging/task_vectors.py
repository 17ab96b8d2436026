"""Task vectors of K experts side by side, merged and differentiated as matrix-vector products."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoo.merging.layers import LayerFn, group
from zoo.merging.safetensors_stream import SafetensorsWriter
from zoo.merging.stream import ExpertWatch
from zoo.merging.vector_files import VectorFile
from zoo.merging.weights import KeyMap, is_statistic, match_weights, open_weights

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from zoo.merging.transforms import Transform
    from zoo.merging.weights import Source, Weights

Coefficients = float | Tensor
"""A number for all, `(K,)` or `(1, K)` by task, or `(L, K)` by layer and task."""

_CHUNK = 1 << 17


class TaskVectorStore:
    """theta_0 and the task vectors tau_k = theta_k - theta_0 of K experts, flat, one column range per layer.

    Merging is `theta_0 + coef @ tau` and its gradient `tau @ g`, one product per layer (Yang et al., arXiv 2310.02575,
    section 3). Nothing here is registered anywhere: neither optimizers nor DistributedDataParallel see it.

    Args:
        theta0: Floating `(P,)`, the pre-trained parameters one after the other, in the order of the layers.
        tau: Floating `(K, P)`, the task vectors; a half-precision one is accumulated in the precision of `theta0`.
        task_names: K names.
        layers: By layer its parameters, in the order of the columns.
        shapes: By parameter its shape.
        names: All names of the pre-trained state dict in its order; those of `layers` by default.
        kept: Tensors that are not merged: integers, statistics, what was excluded.
        dtypes: By merged parameter the type that `state_dict` gives it; that of `theta0` by default.
        tied: By name the parameter that it shares its values with.

    Attributes:
        param_names: The merged parameters, in the order of the columns.
        layer_names: The layers.
        segments: For each layer its columns `[start, end)`.

    Raises:
        ValueError: If there is no expert, a name is double, or sizes disagree.
    """

    def __init__(
        self,
        theta0: Tensor,
        tau: Tensor,
        task_names: Sequence[str],
        layers: Mapping[str, Sequence[str]],
        shapes: Mapping[str, tuple[int, ...]],
        *,
        names: Sequence[str] | None = None,
        kept: Mapping[str, Tensor] | None = None,
        dtypes: Mapping[str, torch.dtype] | None = None,
        tied: Mapping[str, str] | None = None,
    ) -> None:
        self.theta0, self.tau = theta0, tau
        self.task_names, self.layer_names = list(task_names), list(layers)
        self.param_names = [name for members in layers.values() for name in members]
        self.shapes = {name: tuple(shapes[name]) for name in self.param_names}
        self.names = list(names or self.param_names)
        self.kept, self.tied = dict(kept or {}), dict(tied or {})
        self.dtypes = dict(dtypes or dict.fromkeys(self.param_names, theta0.dtype))
        self.layers = {layer: list(members) for layer, members in layers.items()}
        sizes = [torch.Size(self.shapes[name]).numel() for name in self.param_names]
        ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
        self.ranges = {name: (ends[i], ends[i + 1]) for i, name in enumerate(self.param_names)}
        self.segments = [(self.ranges[members[0]][0], self.ranges[members[-1]][1]) for members in layers.values()]
        if not self.task_names:
            raise ValueError("there is no expert: give at least one")
        if len(set(self.task_names)) < len(self.task_names):
            raise ValueError(f"task names must differ, got {', '.join(self.task_names)}")
        if tau.shape != (len(self.task_names), ends[-1]) or theta0.shape != (ends[-1],):
            raise ValueError(
                f"{len(self.task_names)} tasks and {ends[-1]} parameters need theta0 ({ends[-1]},) and tau "
                f"({len(self.task_names)}, {ends[-1]}), got {tuple(theta0.shape)} and {tuple(tau.shape)}"
            )

    @classmethod
    def from_checkpoints(
        cls,
        pretrained: Source,
        experts: Mapping[str, Source],
        *,
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        layer_fn: str | LayerFn = "parameter",
        key_map: KeyMap = "auto",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        mmap: str | Path | None = None,
        buffers: str = "pretrained",
        model: torch.nn.Module | None = None,
    ) -> TaskVectorStore:
        """Read a base and its experts, one tensor of one expert at a time.

        Args:
            pretrained: Module, state dict, safetensors or weights-only torch file, or Hugging Face folder.
            experts: The same for each task.
            include: Regular expressions of the parameters to merge; all floating ones by default.
            exclude: Regular expressions of parameters to take from the base as they are, such as heads.
            layer_fn: Which parameters share a coefficient: see `layer_function`.
            key_map: "auto" (strips the prefixes of wrappers and of CLIP's vision tower), "none", or a function.
            dtype: Of the task vectors. float64 makes everything float64; the base is float32 otherwise.
            device: Where the vectors are kept.
            mmap: File to write the task vectors to and map them from, instead of memory.
            buffers: Floating statistics (of BatchNorm) as "pretrained", or the experts' "average".
            model: A module with the names wanted, for folders whose names differ on disk (ViT).

        Raises:
            ValueError: If the sources do not fit each other, or hold a value that is not finite.
            FileNotFoundError: If one is missing.
        """
        if buffers not in ("pretrained", "average"):
            raise ValueError(f"buffers must be 'pretrained' or 'average', got {buffers!r}")
        base = open_weights(pretrained, "pretrained", key_map=key_map, model=model)
        opened = {
            task: open_weights(source, f"expert {task}", key_map=key_map, base=base, model=model)
            for task, source in experts.items()
        }
        matched = match_weights(base, opened, include=include, exclude=exclude)
        merged = [name for name in matched if not is_statistic(name)]
        if not merged:
            raise ValueError(f"no parameter is left to merge: include={include!r}, exclude={exclude!r}")
        shapes = {name: base.shape(name) for name in merged}
        layers = group(merged, layer_fn)
        ordered = [name for members in layers.values() for name in members]
        size = sum(torch.Size(shapes[name]).numel() for name in ordered)
        theta0 = torch.empty(size, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        tau = (
            torch.empty(len(opened), size, dtype=dtype)
            if mmap is None
            else VectorFile.create(mmap, (len(opened), size), dtype)
        )
        start = 0
        for name in ordered:
            end = start + torch.Size(shapes[name]).numel()
            theta0[start:end] = base.finite(name).flatten()
            for row, weights in zip(tau, opened.values(), strict=True):
                row[start:end] = weights.finite(name).flatten().to(theta0.dtype) - theta0[start:end]
            start = end
        averaged = set(matched) if buffers == "average" else set()
        kept = {name: _kept(name, base, opened, name in averaged) for name in base if name not in shapes}
        store = cls(
            theta0,
            tau,
            list(opened),
            layers,
            shapes,
            names=list(base),
            kept=kept,
            dtypes={name: base.dtype(name) for name in ordered},
            tied=base.tied,
        )
        store.check()
        return store if mmap is not None else store.to(device)

    def check(self) -> None:
        """Warn of experts that are equal to the base or to each other, or far from the base."""
        watch = ExpertWatch(self.task_names)
        for _, columns in self._pieces():
            watch.see(self.theta0[columns], self._vectors(columns))
        watch.warn()

    @property
    def num_parameters(self) -> int:
        """P, the merged parameters."""
        return int(self.theta0.numel())

    @property
    def device(self) -> torch.device:
        """Where merging takes place."""
        return self.theta0.device

    def to(self, device: torch.device | str, offload: bool = False) -> TaskVectorStore:
        """This store on a device.

        Args:
            device: Where the base is, and where merging takes place.
            offload: Whether the task vectors stay in the host's memory, to be copied there piece by piece.
        """
        target = torch.device(device)
        tau = self.tau
        if offload and target.type == "cuda" and tau.device.type == "cpu":
            tau = tau if tau.is_pinned() else tau.pin_memory()
        elif not offload:
            tau = tau.to(target)
        if tau is self.tau and self.theta0.device == target:
            return self
        return self._with(tau, self.theta0.to(target))

    def _with(
        self,
        tau: Tensor,
        theta0: Tensor | None = None,
        task_names: Sequence[str] | None = None,
        layers: Mapping[str, Sequence[str]] | None = None,
    ) -> TaskVectorStore:
        return TaskVectorStore(
            self.theta0 if theta0 is None else theta0,
            tau,
            task_names or self.task_names,
            layers or self.layers,
            self.shapes,
            names=self.names,
            kept=self.kept,
            dtypes=self.dtypes,
            tied=self.tied,
        )

    def regrouped(self, layer_fn: str | LayerFn) -> TaskVectorStore:
        """The same vectors with other layers, sharing memory where the order of the columns stays."""
        layers = group(self.param_names, layer_fn)
        ordered = [name for members in layers.values() for name in members]
        theta0, tau = self.theta0, self.tau
        if ordered != self.param_names:
            columns = torch.cat([torch.arange(*self.ranges[name]) for name in ordered]).to(theta0.device)
            theta0, tau = theta0[columns], tau[:, columns.to(tau.device)]
        return self._with(tau, theta0, layers=layers)

    def coefficients(self, coef: Coefficients) -> Tensor:
        """Coefficients in the form `(L, K)`, in the precision and on the device of the base.

        Raises:
            ValueError: If they have another shape.
        """
        value = torch.as_tensor(coef, dtype=self.theta0.dtype, device=self.device)
        num_layers, num_tasks = len(self.layer_names), len(self.task_names)
        if value.dim() == 0 or value.shape in ((num_tasks,), (1, num_tasks), (num_layers, num_tasks)):
            return value.expand(num_layers, num_tasks)
        hint = ""
        if value.shape == (num_tasks, num_layers):
            hint = " This one is transposed: give coef.T."
        layers = ", ".join(self.layer_names[:3]) + (", ..." if num_layers > 3 else "")
        raise ValueError(
            f"coefficients must be a number, ({num_tasks},) for the tasks {', '.join(self.task_names)}, or "
            f"({num_layers}, {num_tasks}) for the layers {layers} and the tasks, got {tuple(value.shape)}.{hint}"
        )

    def _pieces(self) -> Iterator[tuple[int, slice]]:
        """Layers cut into pieces that stay in a processor's cache; on other devices whole layers."""
        chunk = _CHUNK if self.device.type == "cpu" else (1 << 24)
        for layer, (start, end) in enumerate(self.segments):
            for low in range(start, end, chunk):
                yield layer, slice(low, min(low + chunk, end))

    def _vectors(self, columns: slice) -> Tensor:
        """Task vectors `(K, n)` of some columns, in the precision and on the device of the base."""
        return self.tau[:, columns].to(self.device, self.theta0.dtype, non_blocking=True)

    def merge_flat(self, coef: Coefficients, out: Tensor | None = None) -> Tensor:
        """theta_0 + sum_k coef[l, k] tau_k: `(P,)`, in the precision of the base.

        Args:
            coef: See `Coefficients`.
            out: `(P,)` to write into.
        """
        value = self.coefficients(coef)
        if out is None:
            out = torch.empty_like(self.theta0)
        for layer, columns in self._pieces():
            torch.addmv(self.theta0[columns], self._vectors(columns).T, value[layer], out=out[columns])
        return out

    def merge(self, coef: Coefficients, out: Tensor | None = None) -> dict[str, Tensor]:
        """The merged parameters by name, as views of one flat tensor `(P,)`, which may be given as `out`."""
        return self.views(self.merge_flat(coef, out))

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Parameters by name as views of a flat tensor `(P,)`."""
        return {name: flat[slice(*self.ranges[name])].view(self.shapes[name]) for name in self.param_names}

    def coef_grad(self, flat_grad: Tensor) -> Tensor:
        """dL/dcoef `(L, K)` from dL/dtheta `(P,)`: <g, tau_k> over the columns of each layer.

        The gradient of one coefficient a task is the sum over the layers.
        """
        grad = torch.zeros(len(self.layer_names), len(self.task_names), dtype=self.theta0.dtype, device=self.device)
        for layer, columns in self._pieces():
            grad[layer].addmv_(self._vectors(columns), flat_grad[columns])
        return grad

    def expert(self, task: str) -> dict[str, Tensor]:
        """The parameters of one expert, theta_0 + tau_k.

        Raises:
            ValueError: If there is no such task.
        """
        if task not in self.task_names:
            raise ValueError(f"there is no expert {task!r}: the tasks are {', '.join(self.task_names)}")
        one = torch.zeros(len(self.task_names), dtype=self.theta0.dtype)
        one[self.task_names.index(task)] = 1
        return self.merge(one)

    def state_dict(self, coef: Coefficients) -> dict[str, Tensor]:
        """A whole state dict: merged parameters, and what is kept from the base, with the base's names and types."""
        return self.complete(self.merge(coef))

    def complete(self, merged: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Merged parameters as a whole state dict: with what is kept from the base, and the base's names and types.

        Args:
            merged: The parameters by name.
        """
        return {name: self._exported(name, tensor) for name, tensor in self._all(merged)}

    def _all(self, merged: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name in self.names:
            source = self.tied.get(name, name)
            yield name, merged[source] if source in merged else self.kept[source]

    def _exported(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.dtypes.get(self.tied.get(name, name), tensor.dtype), copy=True)

    def save(self, path: str | Path, coef: Coefficients) -> None:
        """Write `state_dict(coef)` as a safetensors file."""
        self.write(path, self.merge(coef))

    def write(self, path: str | Path, merged: Mapping[str, Tensor]) -> None:
        """Write `complete(merged)` as a safetensors file, one tensor in its own type at a time."""
        tensors = dict(self._all(merged))
        types = {name: self.dtypes.get(self.tied.get(name, name), tensor.dtype) for name, tensor in tensors.items()}
        kinds = {name: (types[name], tuple(tensor.shape)) for name, tensor in tensors.items()}
        with SafetensorsWriter(path, kinds, {"format": "pt"}) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor.detach().to("cpu", types[name]))

    def transform(self, transform: Transform) -> TaskVectorStore:
        """A store of changed task vectors, such as those of `Ties` or `Dare`.

        Args:
            transform: What to change; sees one parameter tensor at a time.
        """

        def blocks() -> Iterator[tuple[str, Tensor]]:
            for name in self.param_names:
                yield name, self._vectors(slice(*self.ranges[name])).float()

        change = transform.fit(blocks)
        tau = torch.empty_like(self.tau)
        for name, block in blocks():
            tau[:, slice(*self.ranges[name])] = change(name, block)
        return self._with(tau)

    def subset(self, tasks: Sequence[str]) -> TaskVectorStore:
        """The store of some of the experts.

        Raises:
            ValueError: If a task is unknown.
        """
        unknown = [task for task in tasks if task not in self.task_names]
        if unknown:
            raise ValueError(f"there is no expert {unknown[0]!r}: the tasks are {', '.join(self.task_names)}")
        return self._with(self.tau[[self.task_names.index(task) for task in tasks]], task_names=tasks)

    def _gram(self) -> Tensor:
        gram = torch.zeros(len(self.task_names), len(self.task_names), dtype=torch.float64, device=self.device)
        for _, columns in self._pieces():
            block = self._vectors(columns)
            gram += (block @ block.T).double()
        return gram.cpu()

    def cosine(self) -> Tensor:
        """Cosines between the task vectors, `(K, K)`; 0 where one is zero."""
        gram = self._gram()
        norms = gram.diagonal().sqrt()
        scale = torch.outer(norms, norms)
        return torch.where(scale > 0, gram / scale.clamp(min=torch.finfo(torch.float64).tiny), 0).float()

    def norms(self) -> Tensor:
        """Euclidean norms of the task vectors by layer, `(L, K)`."""
        squares = torch.zeros(len(self.layer_names), len(self.task_names), dtype=torch.float64, device=self.device)
        for layer, columns in self._pieces():
            squares[layer] += self._vectors(columns).square().sum(1)
        return squares.sqrt().cpu().float()

    def fingerprint(self) -> str:
        """What tells two stores apart: a hash of names, shapes and a sample of some million values."""
        step = max(1, self.num_parameters * (len(self.task_names) + 1) >> 20)
        text = repr((self.task_names, [(name, self.shapes[name]) for name in self.param_names], step))
        found = hashlib.blake2b(text.encode(), digest_size=16)
        for flat in (self.theta0, *self.tau):
            found.update(flat[::step].to("cpu", torch.float32).contiguous().numpy().tobytes())
        return found.hexdigest()


def _kept(name: str, base: Weights, experts: Mapping[str, Weights], average: bool) -> Tensor:
    own = base[name]
    if not average or not own.is_floating_point():
        return own
    total = torch.stack([weights.finite(name).double() for weights in experts.values()])
    return total.mean(0).to(own.dtype)
