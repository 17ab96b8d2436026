"""The sizes, and other properties, that a model takes from its data."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule

DIMENSIONS = (
    "num_items",
    "num_users",
    "num_classes",
    "vocab_size",
    "post_vocab_size",
    "reply_vocab_size",
    "num_emotions",
    "task_names",
    "tasks",
    "task_classes",
    "cardinalities",
    "num_numeric",
    "modalities",
    "feature_sizes",
    "in_channels",
    "image_shape",
    "num_frames",
    "num_options",
    "mode",
    "encode",
    "with_passage",
    "mark_option",
)
"""Properties of a data module that are handed to the model's argument of the same name."""


def resolve_dimension(
    name: str,
    data: LightningDataModule,
    model: type,
    typed: Any = None,
    trained: Any = None,
) -> Any:
    """The value of a model's data-dependent argument.

    Args:
        name: The argument, one of `DIMENSIONS`.
        data: The data module, asked for a property of that name.
        model: The model's class.
        typed: What the user typed, if anything.
        trained: What the checkpoint that is loaded was trained with, if there is one.

    Returns:
        The data's value; without one what was typed, then what was trained with, then the argument's default.

    Raises:
        ValueError: The values contradict each other, or none is there and the model needs one.
    """
    flag, source = f"--model.{name}", type(data).__name__
    value = None
    if name in vars(data) or hasattr(type(data), name):
        try:
            value = getattr(data, name)
        except AttributeError as error:
            # Left alone, hasattr() and the parser take it for a data module without the property.
            raise ValueError(f"{source}.{name} failed: {error}") from error
    if value is not None:
        value = plain(value, f"{source}.{name}")
        if typed is not None and not _same(typed, value):
            raise ValueError(
                f"{flag} is {typed!r}, but {source} has {value!r}. Leave the option out: the data decides it"
                f"{f', by --data.{name}.' if name in inspect.signature(type(data)).parameters else '.'}"
            )
        if trained is not None and not _same(trained, value):
            raise ValueError(
                f"the checkpoint was trained with {name} = {trained!r}, but {source} has {value!r}. Give the data it "
                "was trained on; new data to test on has an option of its own (--data.test_path)."
            )
        # Statistics differ in their last digits with the number of threads; those of the training are the model's.
        return value if trained is None else trained
    if typed is not None:
        return typed
    if trained is not None:
        return trained
    default = default_of(model, name)
    if default is inspect.Parameter.empty:
        raise ValueError(f"{model.__name__} needs {name}, and {source} does not know it: give it with {flag}.")
    return default


def _same(left: Any, right: Any) -> bool:
    """Whether two values agree, floating numbers up to the order of their summation."""
    if isinstance(left, float) or isinstance(right, float):
        return isinstance(left, (int, float)) and isinstance(right, (int, float)) and math.isclose(left, right)
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(_same, left, right))
    return bool(left == right)


def plain(value: Any, where: str) -> Any:
    """A size, a name, a yes or no, lists of sizes, of lists of sizes, of names, of descriptions.

    All of it is what hyperparameters can hold.

    A description is a mapping from names to numbers and texts, such as that of a task.
    """
    if isinstance(value, (str, bool)):
        return value
    if isinstance(value, (list, tuple)):
        return [
            {str(key): _plain_leaf(leaf, f"{where}[{place}][{key!r}]") for key, leaf in item.items()}
            if isinstance(item, Mapping)
            else item
            if isinstance(item, str)
            else [_whole(number, f"{where}[{place}]") for number in item]
            if isinstance(item, (list, tuple))
            else _whole(item, f"{where}[{place}]")
            for place, item in enumerate(value)
        ]
    return _whole(value, where)


def _whole(value: Any, where: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{where} is {value!r}, expected an integer or a list of integers or names") from None


def _plain_leaf(value: Any, where: str) -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise ValueError(f"{where} is {value!r}, expected a plain number or text")


def default_of(model: type, name: str) -> Any:
    """Default of a constructor's argument, wherever in the class hierarchy it is declared."""
    for base in inspect.getmro(model):
        if "__init__" in vars(base):
            parameters: Mapping[str, inspect.Parameter] = inspect.signature(vars(base)["__init__"]).parameters
            if name in parameters:
                return parameters[name].default
    return inspect.Parameter.empty
