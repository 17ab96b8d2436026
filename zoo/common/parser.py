"""Command line parsing whose errors are one paragraph."""

from __future__ import annotations

import inspect
import re
import sys
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, NoReturn

import yaml
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser

from zoo.common.usage import unknown_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import ModuleType

EXPECTED = (ValueError, OSError, ImportError, MisconfigurationException)
"""Errors that are made for users: bad input, bad settings, missing files, missing packages."""

_CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
_NO_INFORMATION = ("Expected a <class 'NoneType'>", "Expected a path but")


class UsageError(ValueError):
    """A command that cannot run as it was typed; ends the program with status 2."""


class ZooParser(LightningArgumentParser):
    """LightningArgumentParser that answers a mistake with the mistake alone, and the nearest right word.

    Attributes:
        known: For `"model"` and `"data"`, the class names that may be given bare.
    """

    known: Mapping[str, Sequence[str]]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one paragraph and exit with status 2."""
        if not self.exit_on_error:
            raise ArgumentError(None, message) from ex
        sys.stderr.write(f"error: {self._readable(message)}\n")
        self.exit(2)

    def _readable(self, message: str) -> str:
        key = re.search(r'Parser key "(model|data)"', message)
        if key is not None and (name := _unknown_class(message)) is not None:
            return unknown_name(key[1], name, self.known[key[1]])
        if missing := re.search(r"arguments are required: \S*?(model|data)$", message):
            known = ", ".join(sorted(self.known[missing[1]]))
            return f"--{missing[1]} is missing. Known: {known}. A config brings its own: --config FILE."
        if option := re.search(r"Option '([^']+)' is not accepted", message):
            owner = re.search(r"class_path '([^']+)'", message)
            accepted = _parameters(owner[1]) if owner else []
            prefix = f"--{key[1]}." if key else ""
            return (
                f"{prefix}{option[1]}: {owner[1] if owner else 'it'} has no such option.{_nearest(option[1], accepted)}"
            )
        if unknown := re.search(r"unrecognized arguments: (.*)", message):
            word = unknown[1].split()[0].split("=")[0]
            options = [name for name in self._option_string_actions if name.startswith("--")]
            return f"unknown option {unknown[1]}.{_nearest(word, options)}"
        if problem := re.search(r"Problems parsing config: (.*)", message, re.DOTALL):
            where = problem[1].replace(' in "<unicode string>",', ",")
            return f"{_broken_config()}: not a readable YAML file: {' '.join(where.split())}"
        if message.startswith("Unexpected config:"):
            found = shorten(message.partition(":")[2], 60, placeholder=" ...") or "nothing"
            return f"{_broken_config()}: expected options such as 'model: {self.known['model'][0]}', found {found}"
        return _condensed(message)


def _unknown_class(message: str) -> str | None:
    """The class name that could not be resolved, if that is what the message is about."""
    bare = re.search(r"Expected a dot import path string: (\S+)", message)
    dotted = re.search(r"given class_path '([^']+)':\s+(No module named|module .* has no attribute|Failed)", message)
    found = bare or dotted
    return found[1] if found else None


def _parameters(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    try:
        owner = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return []
    constructors = (vars(base)["__init__"] for base in inspect.getmro(owner)[:-1] if "__init__" in vars(base))
    return sorted({name for constructor in constructors for name in inspect.signature(constructor).parameters})


def _nearest(word: str, known: Iterable[str]) -> str:
    nearest = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {nearest[0]}?" if nearest else " --help lists the options."


def _condensed(message: str) -> str:
    """Leave out of a message what speaks of the parser's types and not of the user's input."""
    key = re.search(r'Parser key "([^"]+)":', message)
    body = message.replace(key[0], "") if key else message
    body = body.split("Errors:", 1)[-1].split("Given value type", 1)[0]
    lines = (line.strip().removeprefix("- ") for line in body.splitlines())
    kept = " ".join(line for line in lines if line and not line.startswith(_NO_INFORMATION))
    value = re.search(r"Given value: (.+)", message)
    if value is not None and value[1] not in kept and "NestedArg" not in value[1]:
        kept += f", got {value[1]}"
    return f"--{key[1]}: {kept}" if key else kept


def _broken_config() -> str:
    """The first config on the command line that is no YAML, or no mapping."""
    words = [word for argument in sys.argv for word in argument.split("=", 1)]
    for path in (Path(word) for word in words if word.endswith(_CONFIG_SUFFIXES)):
        try:
            if not isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict):
                return str(path)
        except (yaml.YAMLError, UnicodeDecodeError):
            return str(path)
        except OSError:
            continue
    return "--config"


def import_mentioned(arguments: Sequence[str], packages: Sequence[tuple[ModuleType, Sequence[str]]]) -> None:
    """Load the known classes that a command or its configs name: the parser finds bare names only among those.

    Args:
        arguments: What follows the program's name.
        packages: Packages, and those of their public names that may be given bare.

    Raises:
        UsageError: A config is no text.
    """
    text = list(arguments)
    for before, word in zip(["", *arguments], arguments, strict=False):
        option, _, value = word.partition("=") if word.startswith("-") else (before, "", word)
        path = Path(value)
        if path.suffix not in _CONFIG_SUFFIXES or not path.is_file():
            continue
        try:
            text.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            # Other options may name files that only look like configs.
            if option in ("--config", "--model", "--data", "--trainer"):
                raise UsageError(f"{path}: not a text file in UTF-8: {error}") from error
    mentioned = " ".join(text)
    for package, known in packages:
        for name in known:
            if name in mentioned:
                getattr(package, name)


class LinkFailure(BaseException):
    """Carries what a link raised past the parser.

    The parser catches an `Exception` and writes the data module into its message, whose text makes all of its loaders.
    """


def cause_for_users(error: BaseException) -> BaseException:
    """The error that a constructor or a link raised, without the parser's wrapping.

    An error that the zoo itself raised `from` another stays as it is: its text is the better one.
    """
    while error.__cause__ is not None and (
        isinstance(error, LinkFailure) or _raised_in(error).partition(".")[0] == "jsonargparse"
    ):
        error = error.__cause__
    return error


def _raised_in(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
