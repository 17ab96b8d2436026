"""The sizes that a model takes from its data."""

from __future__ import annotations

import inspect
import operator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning.pytorch import LightningDataModule

DIMENSIONS = ("num_items", "num_users", "num_classes", "vocab_size", "task_names")
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
        if typed is not None and typed != value:
            raise ValueError(
                f"{flag} is {typed!r}, but {source} has {value!r}. Leave the option out: the data decides it."
            )
        if trained is not None and trained != value:
            raise ValueError(
                f"the checkpoint was trained with {name} = {trained!r}, but {source} has {value!r}. Give the data it "
                "was trained on; new data to test on has an option of its own (--data.test_path)."
            )
        return value
    if typed is not None:
        return typed
    if trained is not None:
        return trained
    default = default_of(model, name)
    if default is inspect.Parameter.empty:
        raise ValueError(f"{model.__name__} needs {name}, and {source} does not know it: give it with {flag}.")
    return default


def plain(value: Any, where: str) -> int | list[str]:
    """A size as an `int`, names as a list of `str`: what a checkpoint's hyperparameters can hold."""
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return list(value)
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{where} is {value!r}, expected an integer or a list of names") from None


def default_of(model: type, name: str) -> Any:
    """Default of a constructor's argument, wherever in the class hierarchy it is declared."""
    for base in inspect.getmro(model):
        if "__init__" in vars(base):
            parameters: Mapping[str, inspect.Parameter] = inspect.signature(vars(base)["__init__"]).parameters
            if name in parameters:
                return parameters[name].default
    return inspect.Parameter.empty
