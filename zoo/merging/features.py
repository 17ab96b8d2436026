"""What a batch holds, and the features `(B, d)` that a model gives for it.

`default_features` serves any network: a plain one that returns a tensor, or one of transformers with its output object.
What it cannot read is an error that asks for a feature function of one's own; labels never reach the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

FeatureFn: TypeAlias = Callable[[Callable[..., Any], Any], Tensor]
"""`feature_fn(model, batch)` -> features `(B, d)`; the model may be a network or a call of one with other weights."""

_LABEL_KEYS = ("labels", "label", "label_ids")
# Networks name their image argument as they like, so these keys are passed by position where they come alone.
_IMAGE_KEYS = ("pixel_values", "images", "image")
_OWN_FUNCTION = "pass feature_fn=, a function (model, batch) -> features of shape (batch, dimension)"


def default_features(model: Callable[..., Any], batch: Any) -> Tensor:
    """Features of a batch, for the usual kinds of batch and of network.

    Args:
        model: A network, or a function that calls one.
        batch: A tensor of inputs; a NamedTuple with `images`; a pair (inputs, labels); or a mapping of tensors that the
            model takes by name (`pixel_values`, or `input_ids` and `attention_mask`). Labels are dropped.

    Returns:
        Features `(B, d)`, as `read_features` finds them.

    Raises:
        ValueError: If the batch or the output is of no known kind; the message names what came.
    """
    inputs = without_labels(batch)
    if _is_named_tuple(inputs):
        if not isinstance(getattr(inputs, "images", None), Tensor):
            raise ValueError(
                f"a batch of type {type(inputs).__name__} has the fields {', '.join(inputs._fields)} and no tensor "
                f"'images': {_OWN_FUNCTION}"
            )
        inputs = inputs.images
    if isinstance(inputs, Tensor):
        return read_features(model(inputs))
    if isinstance(inputs, Mapping):
        if not inputs:
            raise ValueError(f"the batch is a mapping with no inputs (keys {', '.join(map(str, batch))})")
        # Says which head the batch is for, not what is in it.
        inputs = {name: value for name, value in inputs.items() if name != "task"}
        if len(inputs) == 1 and next(iter(inputs)) in _IMAGE_KEYS:
            return read_features(model(next(iter(inputs.values()))))
        return read_features(model(**inputs))
    raise ValueError(
        f"cannot tell the inputs in a batch of type {_kind(batch)}; known are a tensor, a NamedTuple with 'images', a "
        f"pair (inputs, labels) and a mapping of tensors: {_OWN_FUNCTION}"
    )


def read_features(output: Any) -> Tensor:
    """The features in what a network returned.

    Of an output object (or mapping) the first of these that is there: `image_embeds`, `text_embeds`, `pooler_output`,
    `logits`, and the first token of `last_hidden_state`.

    Args:
        output: A tensor `(B, d)`, or an output object of transformers. Trailing axes of length 1 are removed.

    Returns:
        Features `(B, d)`.

    Raises:
        ValueError: If there is no such field, or its tensor is not of shape `(B, d)`.
    """
    features: Tensor
    source, features = ("the model's output", output) if isinstance(output, Tensor) else _field(output)
    if features.ndim > 2 and all(length == 1 for length in features.shape[2:]):
        features = features.flatten(1)
    if features.ndim != 2:
        raise ValueError(f"{source} has shape {tuple(features.shape)}, not (batch, dimension): {_OWN_FUNCTION}")
    return features


def has_labels(batch: Any) -> bool:
    """Whether `without_labels` would take labels out of this batch."""
    if _is_named_tuple(batch):
        return any(getattr(batch, name, None) is not None for name in _LABEL_KEYS)
    if isinstance(batch, Mapping):
        return any(batch.get(name) is not None for name in _LABEL_KEYS)
    if isinstance(batch, tuple | list) and len(batch) in (1, 2):
        return (len(batch) == 2 and batch[1] is not None) or has_labels(batch[0])
    return False


def without_labels(batch: Any) -> Any:
    """The same batch with nothing in it that tells the labels.

    Args:
        batch: Any kind that `default_features` takes; an unknown kind is returned as it is.

    Returns:
        A NamedTuple with its field `labels` set to None, the inputs of a pair (inputs, labels), the mapping as a dict
        without its label keys, or the tensor itself.

    Raises:
        ValueError: If a plain tuple or list holds more than a pair: which of its entries are labels is not known.
    """
    if _is_named_tuple(batch):
        present = [name for name in _LABEL_KEYS if name in batch._fields]
        return batch._replace(**dict.fromkeys(present)) if present else batch
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if name not in _LABEL_KEYS}
    if isinstance(batch, tuple | list):
        if len(batch) not in (1, 2):
            raise ValueError(
                f"a batch that is a {type(batch).__name__} must be a pair (inputs, labels), this one has {len(batch)} "
                f"entries: {_OWN_FUNCTION}"
            )
        return without_labels(batch[0])
    return batch


def _field(output: Any) -> tuple[str, Tensor]:
    for name in ("image_embeds", "text_embeds", "pooler_output", "logits", "last_hidden_state"):
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(value, Tensor):
            first_token = name == "last_hidden_state" and value.ndim == 3
            return f"{name} of the model's {type(output).__name__}", value[:, 0] if first_token else value
    raise ValueError(f"the model returned {_kind(output)}, in which no features are known: {_OWN_FUNCTION}")


def _is_named_tuple(batch: Any) -> bool:
    return isinstance(batch, tuple) and hasattr(batch, "_fields")


def _kind(value: Any) -> str:
    name = type(value).__name__
    if isinstance(value, Mapping):
        return f"{name} with the keys {', '.join(map(str, value)) or '(none)'}"
    if isinstance(value, tuple | list):
        return f"{name} of {', '.join(type(entry).__name__ for entry in value) or 'nothing'}"
    return name
