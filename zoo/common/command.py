"""Command lines of parts: `python -m zoo.<room>`."""

from __future__ import annotations

import argparse
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator


class CommandParser(argparse.ArgumentParser):
    """Answers a mistake with the mistake alone."""

    def error(self, message: str) -> NoReturn:
        """Print one paragraph and exit with status 2."""
        if message.startswith("unrecognized arguments"):
            message += f"; `{self.prog} --help` shows what there is"
        self.exit(2, f"error: {message}\n")

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Answer the errors of users so, too; with `ZOO_DEBUG` they show their trace."""
        try:
            yield
        except (ValueError, OSError, ImportError) as error:
            if os.environ.get("ZOO_DEBUG"):
                raise
            self.error(" ".join(str(error).split()) or type(error).__name__)
