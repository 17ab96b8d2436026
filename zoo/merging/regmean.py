"""RegMean (Jin et al., arXiv 2212.09849): linear layers whose outputs are the closest to those of all experts."""

from __future__ import annotations

import sys
import warnings
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch
from torch import Tensor, nn

from zoo.merging.calibration import check_tasks, device_of, evaluation, naming, take_examples, with_weights
from zoo.merging.expert_sources import ExpertSources
from zoo.merging.features import FeatureFn, default_features

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from typing_extensions import Unpack

    from zoo.merging.stream import Selection
    from zoo.merging.weights import Source


class LinearWeight(NamedTuple):
    """The weight of one or several linear layers.

    Attributes:
        layers: The layers that use it.
        transposed: Whether it is `(out, in)`, as in `nn.Linear`, rather than `(in, out)`, as in transformers' Conv1D.
    """

    layers: list[nn.Module]
    transposed: bool


def linear_weights(model: nn.Module) -> dict[str, LinearWeight]:
    """The weights of a model that are used by linear layers alone, by parameter name.

    Linear layers are `nn.Linear` and transformers' Conv1D. A weight that an embedding uses too is not among them: what
    is the best for the layer's inputs is not for the embedding.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, LinearWeight] = {}
    refused: set[str] = set()
    for module in model.modules():
        for part, parameter in module.named_parameters(recurse=False):
            name, transposed = names[id(parameter)], _transposed(module)
            if part == "weight" and transposed is not None:
                known = found.setdefault(name, LinearWeight([], transposed))
                known.layers.append(module)
                if known.transposed is transposed:
                    continue
            refused.add(name)
    return {name: weight for name, weight in found.items() if name not in refused}


@torch.no_grad()
def input_grams(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    features: FeatureFn = default_features,
    num_examples: int = 256,
    dtype: torch.dtype = torch.float32,
    parameters: Iterable[str] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Gram matrices X^T X / n of the inputs of linear layers, in one pass over a few examples.

    Inputs of more than two axes are flattened to rows: each token (or position) counts as one.

    Memory beside the model: one matrix `(in, in)` a weight.

    Args:
        model: The network; used in evaluation mode, and left as it was.
        batches: Batches of inputs, as `features` takes them; labels are ignored.
        features: `(model, batch)` -> features; only run, its result is not used.
        num_examples: Examples at most.
        dtype: In which products are taken and summed, float32 or float64, also under autocast.
        parameters: Names of weights to look at; all of `linear_weights` by default.
        weights: Tensors by name to run the model with in place of its own.

    Returns:
        By the weight's name the matrix `(in, in)`, on the model's device. Weights whose layers did not run are absent.

    Raises:
        ValueError: If an option is out of range, a name is none of `linear_weights`, there is no example, or an input
            is not finite.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    if num_examples < 1:
        raise ValueError(f"num_examples must be at least 1, got {num_examples}")
    linear = linear_weights(model)
    names = list(linear) if parameters is None else list(parameters)
    unknown = [name for name in names if name not in linear]
    if unknown:
        raise ValueError(f"not the weights of linear layers: {', '.join(unknown[:10])}")
    device, sums = device_of(model), _InputSums(dtype)
    call = with_weights(model, weights)
    with ExitStack() as stack:
        stack.enter_context(evaluation(model))
        for name in names:
            for layer in linear[name].layers:
                handle = layer.register_forward_pre_hook(partial(sums.add, name), with_kwargs=True)
                stack.callback(handle.remove)
        for batch in take_examples(batches, num_examples, device):
            features(call, batch)
    return sums.means()


class _InputSums:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}

    def add(self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs: Tensor = args[0] if args else next(iter(kwargs.values()))
        matrix = inputs.flatten(0, -2).to(self.dtype) if inputs.ndim > 1 else inputs[None].to(self.dtype)
        with torch.autocast(matrix.device.type, enabled=False):
            if name not in self.sums:
                self.sums[name], self.rows[name] = matrix.T @ matrix, len(matrix)
            else:
                self.sums[name].addmm_(matrix.T, matrix)
                self.rows[name] += len(matrix)

    def means(self) -> dict[str, Tensor]:
        for name, total in self.sums.items():
            # The diagonal shows every NaN and infinity of the inputs.
            if not bool(total.diagonal().isfinite().all()):
                raise ValueError(f"the inputs of the layer of {name!r} are NaN or infinite, or overflow {self.dtype}")
            total /= max(self.rows[name], 1)
        return self.sums


@overload
def regmean_merge(
    pretrained: Source,
    experts: Mapping[str, Source],
    model: nn.Module,
    batches: Mapping[str, Iterable[Any]],
    *,
    features: FeatureFn = default_features,
    num_examples: int = 256,
    off_diagonal: float = 0.95,
    dtype: torch.dtype = torch.float32,
    out: None = None,
    **selection: Unpack[Selection],
) -> dict[str, Tensor]: ...
@overload
def regmean_merge(
    pretrained: Source,
    experts: Mapping[str, Source],
    model: nn.Module,
    batches: Mapping[str, Iterable[Any]],
    *,
    features: FeatureFn = default_features,
    num_examples: int = 256,
    off_diagonal: float = 0.95,
    dtype: torch.dtype = torch.float32,
    out: str | Path,
    **selection: Unpack[Selection],
) -> Path: ...
def regmean_merge(
    pretrained: Source,
    experts: Mapping[str, Source],
    model: nn.Module,
    batches: Mapping[str, Iterable[Any]],
    *,
    features: FeatureFn = default_features,
    num_examples: int = 256,
    off_diagonal: float = 0.95,
    dtype: torch.dtype = torch.float32,
    out: str | Path | None = None,
    **selection: Unpack[Selection],
) -> dict[str, Tensor] | Path:
    """Merge every linear layer so that sum_k |X_k W^T - X_k W_k^T|^2 is least, and average everything else.

    W^T = (sum_k G_k)^-1 sum_k G_k W_k^T, with G_k = X_k^T X_k / n over the inputs of that layer in expert k, its
    entries off the diagonal multiplied by `off_diagonal` (Jin et al., section 3). It is solved by Cholesky
    factorisation in float64, for the distance from the experts' average, which therefore remains where the inputs say
    nothing.

    Memory beside the model, whatever the number of experts: one expert, two times the matrices of `input_grams`
    together, and one tensor of the size of each linear weight, in `dtype`. Then the result (with `out`, one tensor of
    it), the K experts' weights of one layer at a time, and that layer's equations in float64.

    Args:
        pretrained: Base: module, state dict, file or folder, as `open_weights` takes it.
        experts: The same for each task.
        model: The network of these weights, or a module around it. Only its structure is used, and what the weights
            lack; it is left as it was.
        batches: For each task batches of inputs, as `features` takes them; labels are ignored.
        features: `(model, batch)` -> features; only run, its result is not used.
        num_examples: Examples of each task at most.
        off_diagonal: Factor from 0 to 1 of the Gram matrices' entries off the diagonal.
        dtype: Of the Gram matrices, float32 or float64.
        out: A safetensors file to stream the result to; by default it stays in memory.
        selection: `include`, `exclude`, `key_map`, `buffers` and `progress`; see `Selection`.

    Returns:
        A state dict with the names and types of the base, or the path of the file that holds it.

    Raises:
        FileNotFoundError: If a source is missing.
        ValueError: If sources, tasks, options or inputs are not as said above.

    Warns:
        UserWarning: If the layers of a linear weight did not run, so that it is averaged, or if a matrix is singular,
            so that a multiple of its diagonal, which is named, had to be added to it.
    """
    if not 0 <= off_diagonal <= 1:
        raise ValueError(f"off_diagonal must be from 0 to 1, got {off_diagonal}")
    check_tasks(experts=experts, batches=batches)
    sources = ExpertSources(pretrained, experts, model, out, **selection)
    linear = linear_weights(model)
    homes = {name: full for name, full in sources.parameters.items() if full in linear}
    equations = {full: _NormalEquations(linear[full].transposed) for full in homes.values()}
    for task in sources.task_names:
        with naming(task):
            grams = input_grams(
                model,
                batches[task],
                features=features,
                num_examples=num_examples,
                dtype=dtype,
                parameters=equations,
                weights=sources.tensors(task),
            )
        for name, full in homes.items():
            # Taken out one by one, so that what is added up is not kept; the second of two names finds nothing.
            if full in grams:
                equations[full].add(grams.pop(full), sources.base[name], sources.expert(task, name), off_diagonal)
    idle = [name for name, full in homes.items() if equations[full].sums is None]
    jitters: dict[str, float] = {}

    def merged() -> Iterator[tuple[str, Tensor]]:
        for name, base, block in sources.stream.vectors(whole=True):
            mean = block.sum(0, dtype=torch.float64) / len(block)
            if name in homes and equations[homes[name]].sums is not None:
                shape = sources.base.shape(name)
                weight, jitter = equations[homes[name]].solve(base.view(shape), mean.view(shape), name)
                if jitter:
                    jitters[name] = jitter
                yield name, weight.flatten().to(base.device)
            else:
                yield name, mean

    result = sources.stream.write(merged())
    if idle:
        warnings.warn(f"averaged, as their layers did not run: {_some(idle)}", stacklevel=2)
    if jitters:
        warnings.warn(
            f"the inputs of {len(jitters)} layers do not determine their weights; up to {max(jitters.values()):.1e} "
            f"times the diagonal was added to the Gram matrices of {_some(list(jitters))}. Give more examples, or "
            f"off_diagonal < {off_diagonal}",
            stacklevel=2,
        )
    return result


class _NormalEquations:
    """sum_k G_k and sum_k G_k (W_k - W_0)^T of one layer."""

    def __init__(self, transposed: bool) -> None:
        self.transposed = transposed
        self.sums: tuple[Tensor, Tensor] | None = None

    def add(self, gram: Tensor, base: Tensor, weight: Tensor, off_diagonal: float) -> None:
        """Add one expert; its Gram matrix is changed."""
        diagonal = gram.diagonal().clone()
        gram *= off_diagonal
        gram.diagonal().copy_(diagonal)
        with torch.autocast(gram.device.type, enabled=False):
            # Differences from the base are small, and so are the rounding errors of their products.
            moment = gram @ (self._inputs_first(weight, gram) - self._inputs_first(base, gram))
        if self.sums is None:
            self.sums = gram, moment
        else:
            self.sums[0].add_(gram)
            self.sums[1].add_(moment)

    def solve(self, base: Tensor, mean: Tensor, label: str) -> tuple[Tensor, float]:
        """The layer's weight in float64, and what was added to its matrix, in units of the diagonal."""
        assert self.sums is not None
        gram, moment = (total.double() for total in self.sums)
        average = self._inputs_first(mean, gram)
        target = moment - gram @ (average - self._inputs_first(base, gram))
        distance, jitter = _solve(gram, target, torch.finfo(self.sums[0].dtype).eps, label)
        merged = average + distance
        return (merged.T if self.transposed else merged), jitter

    def _inputs_first(self, weight: Tensor, like: Tensor) -> Tensor:
        """A weight as `(in, out)`."""
        return (weight.T if self.transposed else weight).to(like)


def _solve(gram: Tensor, target: Tensor, eps: float, label: str) -> tuple[Tensor, float]:
    """Solution of gram @ x = target, for a Gram matrix whose entries have a relative error of eps."""
    # With a diagonal of ones, what counts as singular does not depend on the units of the inputs.
    scale = gram.diagonal().sqrt()
    silent = scale == 0
    scale = scale.masked_fill(silent, 1.0)
    unit = gram / scale / scale[:, None]
    # An input that is always 0 has no part in any equation, and its weights stay the average.
    unit.diagonal().masked_fill_(silent, 1.0)
    least, jitter = 10 * eps * len(unit) ** 0.5, 0.0
    while jitter < 1:
        factor, failed = torch.linalg.cholesky_ex(unit)
        # Pivots below the error of the entries are noise, and dividing by them would make more of it.
        if not failed and bool((factor.diagonal().square() >= least).all()):
            return torch.cholesky_solve(target / scale[:, None], factor) / scale[:, None], jitter
        # Where the inputs say nothing, the errors of the target are divided by it.
        larger = max(10 * jitter, eps**0.5)
        unit.diagonal().add_(larger - jitter)
        jitter = larger
    raise ValueError(f"the Gram matrices of {label!r} overflow in their sum: use dtype=torch.float64")


def _transposed(module: nn.Module) -> bool | None:
    if isinstance(module, nn.Linear):
        return True
    # Where transformers has not been loaded there is no layer of it.
    library = sys.modules.get("transformers.pytorch_utils")
    return False if library is not None and isinstance(module, library.Conv1D) else None


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
