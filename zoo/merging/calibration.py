"""Calibration data: the few examples of each task that some merges look at, and the network run on them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from zoo.common.evaluation import evaluation as evaluating
from zoo.merging.features import without_labels
from zoo.merging.merged_model import MergedModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from contextlib import AbstractContextManager


def evaluation(*models: Callable[..., Any]) -> AbstractContextManager[None]:
    """Networks in evaluation mode inside the block; every module's own mode comes back after it.

    Args:
        models: Networks; what is none is left alone.
    """
    networks = [model.skeleton if isinstance(model, MergedModel) else model for model in models]
    return evaluating(*(network for network in networks if isinstance(network, nn.Module)))


def with_weights(model: nn.Module, weights: Mapping[str, Tensor] | None) -> Callable[..., Any]:
    """The model's call with other tensors in place of its own; the module itself is not changed."""
    if not weights:
        return model

    def call(*args: Any, **kwargs: Any) -> Any:
        return functional_call(model, dict(weights), args, kwargs)

    return call


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lies; the CPU for a model without any."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def map_tensors(batch: Any, function: Callable[[Tensor], Any]) -> Any:
    """The batch with a function applied to each tensor in its mappings, tuples and lists; mappings become dicts."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(value, function) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(value, function) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(map_tensors(value, function) for value in batch)
    return batch


def tensors_of(batch: Any) -> list[Tensor]:
    """The tensors of a batch, in the order in which `map_tensors` meets them."""
    found: list[Tensor] = []
    map_tensors(batch, found.append)
    return found


def rows_of(batch: Any) -> int:
    """Examples in a batch: the length of its tensors; 0 without any.

    Raises:
        ValueError: If its tensors have different lengths, so that it cannot be cut into examples.
    """
    shapes = [tuple(tensor.shape) for tensor in tensors_of(batch) if tensor.ndim]
    if len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            f"a batch's tensors have the shapes {', '.join(map(str, shapes))}: expected one row an example in each"
        )
    return shapes[0][0] if shapes else 0


def rows(batch: Any, start: int, end: int) -> Any:
    """Some of a batch's examples."""
    return map_tensors(batch, lambda tensor: tensor[start:end] if tensor.ndim else tensor)


def take_examples(batches: Iterable[Any], num_examples: int, device: torch.device) -> Iterator[Any]:
    """Batches without labels, on a device, until there are enough examples; the last one is cut.

    Args:
        batches: Batches as `default_features` takes them.
        num_examples: Examples at most; no batch beyond them is read.
        device: Where the tensors go.

    Yields:
        Batches, each with one example or more.

    Raises:
        ValueError: If there is no example, or the tensors of a batch have different lengths.
    """
    left = num_examples
    for batch in batches:
        inputs = without_labels(batch)
        count = rows_of(inputs)
        if count:
            # Cut on the host, so that no more than what is used is copied.
            yield map_tensors(rows(inputs, 0, left), lambda tensor: tensor.to(device))
        left -= count
        if left <= 0:
            return
    if left == num_examples:
        raise ValueError("the batches hold no example. Was an iterator given that has been read before?")


@contextmanager
def naming(task: str) -> Iterator[None]:
    """Puts the task's name before the message of a ValueError from inside the block."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"task {task}: {error}") from error


def check_tasks(**given: Mapping[str, Any]) -> None:
    """Refuses mappings by task that do not have the same tasks.

    Args:
        given: By the name of an argument its mapping; the first is what the others are compared with.

    Raises:
        ValueError: If there is no task, or the tasks differ; the message names the difference.
    """
    (first, wanted), *others = given.items()
    if not wanted:
        raise ValueError(f"{first} is empty: give at least one task")
    for name, mapping in others:
        missing = [task for task in wanted if task not in mapping]
        surplus = [task for task in mapping if task not in wanted]
        if missing or surplus:
            parts = [f"no {', '.join(missing)}"] * bool(missing) + [f"also {', '.join(surplus)}"] * bool(surplus)
            raise ValueError(
                f"{name} and {first} must have the same tasks: {name} has {' and '.join(parts)} ({first}: "
                f"{', '.join(wanted)})"
            )
