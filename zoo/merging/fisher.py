"""Fisher merging (Matena and Raffel, arXiv 2111.09832): parameters averaged by how much predictions depend on them."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from zoo.merging.calibration import (
    check_tasks,
    device_of,
    evaluation,
    map_tensors,
    naming,
    rows,
    rows_of,
    take_examples,
    tensors_of,
    with_weights,
)
from zoo.merging.expert_sources import ExpertSources
from zoo.merging.features import FeatureFn, default_features
from zoo.merging.heads import as_head
from zoo.merging.objectives import check_logits

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from typing_extensions import Unpack

    from zoo.merging.stream import Selection
    from zoo.merging.weights import Source

Squares = dict[str, Tensor]

# Numbers in the gradients of the examples that are taken at once, where no chunk size is given: 256 MB of float32.
_GRADIENT_BUDGET = 1 << 26


def fisher_information(
    model: nn.Module,
    batches: Iterable[Any],
    head: Tensor | nn.Module,
    *,
    features: FeatureFn = default_features,
    num_examples: int = 256,
    per_example: Literal["vmap", "loop"] = "vmap",
    chunk_size: int | None = None,
    max_classes: int = 64,
    seed: int = 0,
    parameters: Iterable[str] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Diagonal of the Fisher information, F = E_x sum_c p_c(x) (d log p_c(x) / d theta)^2 (Matena and Raffel, eq. 5).

    Every example's gradient is squared by itself; squaring the gradient of a batch would add products of different
    examples. The classes are those the model expects, not labels. An example costs one backward pass a class.

    Memory beside the model: the result, and some four times `chunk_size` gradients of the whole model (one with
    "loop"), whatever the numbers of examples and of classes.

    Args:
        model: The network; used in evaluation mode, and left as it was.
        batches: Batches of inputs, as `features` takes them; labels are ignored.
        head: What gives logits `(B, C)` of the features: a module, or the weight of a `CosineHead`.
        features: `(model, batch)` -> features `(B, d)`.
        num_examples: Examples at most.
        per_example: "vmap" takes the gradients of a chunk of examples together; "loop" takes one example after the
            other, for models that `torch.func.vmap` cannot run.
        chunk_size: Examples at once with "vmap"; by default as many as have 2^26 gradient numbers together, at least 1.
        max_classes: Up to this many classes the expectation over classes is exact. With more, this many labels are
            drawn from p(x) for each example, which is unbiased.
        seed: Of these draws.
        parameters: Names of the parameters to look at; all floating ones by default.
        weights: Tensors by name to run the model with in place of its own.

    Returns:
        By parameter name F, in the parameter's shape, float32 or wider, on the model's device.

    Raises:
        ValueError: If an option is out of range, a parameter is unknown, there is no example, logits are malformed, or
            `vmap` cannot run the model.
    """
    if per_example not in ("vmap", "loop"):
        raise ValueError(f"per_example must be 'vmap' or 'loop', got {per_example!r}")
    for option, value in (("num_examples", num_examples), ("chunk_size", chunk_size), ("max_classes", max_classes)):
        if value is not None and value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}")
    device, weights = device_of(model), dict(weights or {})
    own = {name: tensor for name, tensor in model.named_parameters() if tensor.is_floating_point()}
    names = list(own) if parameters is None else list(parameters)
    unknown = [name for name in names if name not in own]
    if unknown or not names:
        raise ValueError(f"the model has no floating parameter {', '.join(map(repr, unknown[:10])) or 'at all'}")
    theta = {name: weights.pop(name, own[name]).detach() for name in names}
    to_logits = _Logits(model, copy.deepcopy(as_head(head)).to(device), features, weights)
    if per_example == "loop":
        chunk_size = 1
    elif chunk_size is None:
        chunk_size = max(1, _GRADIENT_BUDGET // sum(tensor.numel() for tensor in theta.values()))
    squares = partial(_vmapped, to_logits) if per_example == "vmap" else partial(_alone, to_logits)
    generator = torch.Generator().manual_seed(seed)
    total: Squares = {
        name: torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
        for name, tensor in theta.items()
    }
    seen = 0
    with evaluation(model):
        for batch in take_examples(batches, num_examples, device):
            count = rows_of(batch)
            for start in range(0, count, chunk_size):
                chunk = rows(batch, start, start + chunk_size)
                with torch.no_grad():
                    logits = to_logits(theta, chunk)
                check_logits(logits)
                if len(logits) != rows_of(chunk):
                    raise ValueError(f"{rows_of(chunk)} examples gave logits for {len(logits)}: one row an example")
                squares(theta, chunk, _directions(logits, max_classes, generator), total)
            seen += count
    return {name: tensor.div_(seen) for name, tensor in total.items()}


@overload
def fisher_merge(
    pretrained: Source,
    experts: Mapping[str, Source],
    model: nn.Module,
    batches: Mapping[str, Iterable[Any]],
    heads: Mapping[str, Tensor | nn.Module],
    *,
    features: FeatureFn = default_features,
    num_examples: int = 256,
    eps: float = 1e-6,
    normalize: bool = True,
    per_example: Literal["vmap", "loop"] = "vmap",
    chunk_size: int | None = None,
    max_classes: int = 64,
    seed: int = 0,
    out: None = None,
    **selection: Unpack[Selection],
) -> dict[str, Tensor]: ...
@overload
def fisher_merge(
    pretrained: Source,
    experts: Mapping[str, Source],
    model: nn.Module,
    batches: Mapping[str, Iterable[Any]],
    heads: Mapping[str, Tensor | nn.Module],
    *,
    features: FeatureFn = default_features,
    num_examples: int = 256,
    eps: float = 1e-6,
    normalize: bool = True,
    per_example: Literal["vmap", "loop"] = "vmap",
    chunk_size: int | None = None,
    max_classes: int = 64,
    seed: int = 0,
    out: str | Path,
    **selection: Unpack[Selection],
) -> Path: ...
def fisher_merge(
    pretrained: Source,
    experts: Mapping[str, Source],
    model: nn.Module,
    batches: Mapping[str, Iterable[Any]],
    heads: Mapping[str, Tensor | nn.Module],
    *,
    features: FeatureFn = default_features,
    num_examples: int = 256,
    eps: float = 1e-6,
    normalize: bool = True,
    per_example: Literal["vmap", "loop"] = "vmap",
    chunk_size: int | None = None,
    max_classes: int = 64,
    seed: int = 0,
    out: str | Path | None = None,
    **selection: Unpack[Selection],
) -> dict[str, Tensor] | Path:
    """Average the experts' parameters, each number weighted by its Fisher information in its expert.

    theta = sum_k F_k theta_k / sum_k F_k (Matena and Raffel, eq. 4), with F_k of `fisher_information`, each divided by
    its Euclidean norm over all merged parameters, plus `eps`. Floating tensors that are no parameters are averaged.

    Memory beside the model, whatever the number of experts: one expert, its Fisher information, the average and the sum
    of the weights so far, and some four times `chunk_size` gradients of the whole model.

    Args:
        pretrained: Base: module, state dict, file or folder, as `open_weights` takes it.
        experts: The same for each task.
        model: The network of these weights, or a module around it. Only its structure is used, and what the weights
            lack; it is left as it was.
        batches: For each task batches of inputs, as `features` takes them; labels are ignored.
        heads: For each task what gives logits of the features, as in `fisher_information`.
        features: `(model, batch)` -> features `(B, d)`.
        num_examples: Examples of each task at most.
        eps: Least weight of a number, above 0: where no expert's predictions depend on it, it is the plain average.
        normalize: Divide by the norm, so that no task outweighs the others because it has more or less certain
            predictions.
        per_example: As in `fisher_information`.
        chunk_size: As in `fisher_information`.
        max_classes: As in `fisher_information`.
        seed: As in `fisher_information`.
        out: A safetensors file to stream the result to; by default it stays in memory.
        selection: `include`, `exclude`, `key_map`, `buffers` and `progress`; see `Selection`.

    Returns:
        A state dict with the names and types of the base, or the path of the file that holds it.

    Raises:
        FileNotFoundError: If a source is missing.
        ValueError: If sources, tasks, options, inputs or logits are not as said above, or a task's predictions do not
            depend on any merged parameter.
    """
    if not 0 < eps < float("inf"):
        raise ValueError(f"eps must be a positive number, got {eps}")
    check_tasks(experts=experts, batches=batches, heads=heads)
    sources = ExpertSources(pretrained, experts, model, out, **selection)
    names = {full: name for name, full in sources.parameters.items()}
    means: dict[str, Tensor] = {}
    totals: dict[str, Tensor] = {}
    for task in sources.task_names:
        with naming(task):
            information = fisher_information(
                model,
                batches[task],
                heads[task],
                features=features,
                num_examples=num_examples,
                per_example=per_example,
                chunk_size=chunk_size,
                max_classes=max_classes,
                seed=seed,
                parameters=names,
                weights=sources.tensors(task),
            )
        # Squares of squares leave the range of float32.
        norm = sum(float(torch.linalg.vector_norm(f, dtype=torch.float64)) ** 2 for f in information.values()) ** 0.5
        if not norm:
            raise ValueError(
                f"task {task}: the predictions do not depend on any merged parameter; do features= and its head use "
                "the model?"
            )
        for full, name in names.items():
            weight = information.pop(full).div_(norm if normalize else 1.0).add_(eps)
            theta = sources.expert(task, name).to(weight)
            if full not in means:
                means[full], totals[full] = theta.clone(), weight
            else:
                totals[full] += weight
                # A running average keeps exactly what all experts agree on.
                means[full] += (theta - means[full]).mul_(weight).div_(totals[full])

    def merged() -> Iterator[tuple[str, Tensor]]:
        for name, base, block in sources.stream.vectors(whole=True):
            full = sources.parameters.get(name)
            if full is None:
                yield name, block.sum(0, dtype=torch.float64) / len(block)
            else:
                yield name, means[full].flatten().to(base.device)

    return sources.stream.write(merged())


class _Logits:
    """Logits of a batch as a function of the parameters that are looked at."""

    def __init__(self, model: nn.Module, head: nn.Module, features: FeatureFn, fixed: Mapping[str, Tensor]) -> None:
        self.model, self.head, self.features, self.fixed = model, head, features, fixed

    def __call__(self, theta: Mapping[str, Tensor], batch: Any) -> Tensor:
        features = self.features(with_weights(self.model, {**self.fixed, **theta}), batch)
        logits: Tensor = self.head(features)
        return logits


def _directions(logits: Tensor, max_classes: int, generator: torch.Generator) -> Tensor:
    """Vectors v `(B, S, C)` with F(x) = sum_s (d (v_s . log p) / d theta)^2, exactly or in expectation."""
    p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)
    if p.shape[1] <= max_classes:
        return p.sqrt().diag_embed()
    # Drawn on the CPU, so that a seed means the same on every device.
    drawn = torch.multinomial(p.cpu(), max_classes, replacement=True, generator=generator).to(p.device)
    vectors: Tensor = F.one_hot(drawn, p.shape[1]).to(p.dtype) / max_classes**0.5
    return vectors


def _vmapped(to_logits: _Logits, theta: Mapping[str, Tensor], chunk: Any, directions: Tensor, total: Squares) -> None:
    tensors = tensors_of(chunk)

    def example(parts: list[Tensor], vectors: Tensor) -> Squares:
        queue = iter(parts)
        alone = map_tensors(chunk, lambda whole: next(queue).unsqueeze(0) if whole.ndim else next(queue))
        log_p, pullback = vjp(lambda values: _log_p(to_logits(values, alone)), dict(theta))[:2]
        squares: Squares = {}
        for vector in vectors.to(log_p.dtype).unbind():
            (gradients,) = pullback(vector)
            for name, gradient in gradients.items():
                square = gradient.to(total[name].dtype).square()
                squares[name] = squares[name].add_(square) if name in squares else square
        return squares

    try:
        # Fused attention has no batching rule.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            found = vmap(example, in_dims=([0 if tensor.ndim else None for tensor in tensors], 0))(tensors, directions)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError(
            f"per_example='vmap': torch.func.vmap cannot run {type(to_logits.model).__name__} ({error}); use "
            "per_example='loop'"
        ) from error
    for name, squares in found.items():
        total[name] += squares.sum(0)


def _alone(to_logits: _Logits, theta: Mapping[str, Tensor], chunk: Any, directions: Tensor, total: Squares) -> None:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in theta.items()}
    with torch.enable_grad():
        log_p = _log_p(to_logits(leaves, chunk))
        values = (directions[0].to(log_p.dtype) @ log_p).unbind()
    for value in values:
        keep = value is not values[-1]
        gradients = torch.autograd.grad(value, list(leaves.values()), retain_graph=keep, materialize_grads=True)
        for name, gradient in zip(leaves, gradients, strict=True):
            total[name] += gradient.to(total[name].dtype).square()


def _log_p(logits: Tensor) -> Tensor:
    return F.log_softmax(logits[0], 0, dtype=torch.promote_types(logits.dtype, torch.float32))
