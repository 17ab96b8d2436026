"""Train, test and use the methods of the zoo; `python train.py --help` shows how."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import datamodules
import zoo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zoo.common.cli import ZooCLI

EXAMPLE = "ticoserec"
MODELS = tuple(sorted(zoo.MODELS))
DATA = tuple(sorted(datamodules.DATAMODULES))


def main() -> ZooCLI | None:
    """Run the command in `sys.argv`.

    Returns:
        The finished CLI with its model, data, Trainer and result; `None` after the help page.

    Raises:
        SystemExit: The command failed; the reason is on stderr.
    """
    if sys.argv[1:2] in ([], ["-h"], ["--help"]):
        from zoo.common.usage import usage

        print(usage((zoo, MODELS), (datamodules, DATA), EXAMPLE), end="")
        return None
    # Before torch is loaded: OpenMP's threads wait asleep. Spinning, as they do by default, costs a run a factor of
    # ten and more as soon as any other process wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from zoo.common.cli import run_cli

    return run_cli((zoo, MODELS), (datamodules, DATA))


def run_config(arguments: Sequence[str]) -> ZooCLI:
    """Run a command from Python, as studies over several seeds or settings do.

    Args:
        arguments: What follows `train.py` on the command line.

    Returns:
        The finished CLI; `result` holds the metrics, `run_folder` the place of the files.
    """
    from zoo.common.cli import command_line

    with command_line(arguments):
        cli = main()
    if cli is None:
        raise ValueError("run_config needs a command, such as ['--config', 'configs/ticoserec/demo.yaml']")
    return cli


def console() -> None:
    """The installed command `zoo-train`."""
    main()


if __name__ == "__main__":
    main()
