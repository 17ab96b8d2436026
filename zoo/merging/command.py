"""The command `python -m zoo.merging`: merge checkpoints, or look at their task vectors."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from zoo.common.command import CommandParser

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_DESCRIPTION = """\
Merge fine-tuned checkpoints of one pre-trained model, without data and one tensor at a time.

  python -m zoo.merging merge --method ties --pretrained base --expert mnist=a --expert svhn=b --out merged.safetensors
  python -m zoo.merging inspect --pretrained base --expert mnist=a --expert svhn=b
"""
_SOURCES = """\
A checkpoint is a .safetensors file, a .index.json of shards, a .pt or .bin file with a state dict, a folder of
transformers' save_pretrained or its hub id. An expert may also be a folder with a LoRA adapter of peft.
"""
_MERGE = """\
methods, their options and defaults:
  average          the mean of the experts
  task_arithmetic  base + coef * sum of the task vectors           --coef 0.3
  magnitude        the same with the largest entries alone         --coef 0.3 --density 0.2
  ties             trim, elect signs, add up what agrees           --coef 0.3 --density 0.2 --merge-func sum
  dare             drop at random, rescale, add up                 --coef 0.3 --drop 0.5 --seed 0
  dare_ties        drop at random, rescale, then as ties           --coef 0.3 --drop 0.5 --seed 0 --density 0.2

example:
  python -m zoo.merging merge --method ties --pretrained openai/clip-vit-base-patch32 \\
      --expert mnist=experts/mnist --expert svhn=experts/svhn.safetensors --out merged/
"""
_INSPECT = "Warns of experts that are identical, equal to the base, or far from it.\n"
# What a folder of transformers holds besides weights: configs, vocabularies, templates.
_COMPANIONS = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_NO_COMPANIONS = (".index.json", "adapter_config.json")


class _Method(NamedTuple):
    function: str
    options: dict[str, Any]
    """Defaults by option."""


_METHODS = {
    "average": _Method("weight_average", {}),
    "task_arithmetic": _Method("task_arithmetic", {"coef": 0.3}),
    "magnitude": _Method("magnitude_merge", {"coef": 0.3, "density": 0.2}),
    "ties": _Method("ties_merge", {"coef": 0.3, "density": 0.2, "merge_func": "sum"}),
    "dare": _Method("dare_merge", {"coef": 0.3, "drop": 0.5, "seed": 0}),
    "dare_ties": _Method("dare_merge", {"coef": 0.3, "drop": 0.5, "seed": 0, "density": 0.2}),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: What follows `python -m zoo.merging`; `sys.argv` by default.

    Raises:
        SystemExit: With status 2 after a mistake, which is explained on stderr in one paragraph.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    # Progress and warnings share a console, or they would write over each other.
    console = Console(stderr=True, highlight=False)
    with parser.explaining(), _warnings_on(console):
        if options.command == "merge":
            _merge(options, console)
        else:
            _inspect(options, console)


def _parser() -> CommandParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = CommandParser(
        "python -m zoo.merging", description=_DESCRIPTION, formatter_class=layout, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="merge|inspect")
    merge = commands.add_parser(
        "merge", help="write one model made of several", description=_SOURCES, epilog=_MERGE, formatter_class=layout,
        allow_abbrev=False,
    )  # fmt: skip
    merge.add_argument("--method", required=True, choices=_METHODS, metavar="METHOD", help=", ".join(_METHODS))
    _add_sources(merge)
    merge.add_argument(
        "--out", required=True, type=Path,
        help="a .safetensors file, or, where the pre-trained model is a folder of transformers, a folder: the configs "
        "are copied, and from_pretrained loads it",
    )  # fmt: skip
    merge.add_argument("--coef", type=float, help="coefficient of the task vectors")
    merge.add_argument(
        "--density", type=float,
        help="share of the entries of a task vector to keep, in (0, 1], of all that are merged: parameters that "
        "fine-tuning never moved count too",
    )  # fmt: skip
    merge.add_argument("--merge-func", choices=("sum", "mean", "max"), help="what becomes of entries that agree")
    merge.add_argument("--drop", type=float, help="probability of dropping an entry, in [0, 1)")
    merge.add_argument("--seed", type=int, help="of what is dropped")
    merge.add_argument(
        "--buffers", choices=("pretrained", "average"), default="pretrained",
        help="running statistics of batch normalisation: the pre-trained model's (default), or the experts' average",
    )  # fmt: skip
    inspect = commands.add_parser(
        "inspect", help="show norms by layer and cosines of task vectors", description=_SOURCES, epilog=_INSPECT,
        formatter_class=layout, allow_abbrev=False,
    )  # fmt: skip
    _add_sources(inspect)
    inspect.add_argument(
        "--by", choices=("layer", "module", "block", "task"), default="layer",
        help="one row for each parameter tensor (default), module, numbered block, or one for all",
    )  # fmt: skip
    return parser


def _add_sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pretrained", required=True, metavar="PATH", help="the model that was fine-tuned")
    parser.add_argument(
        "--expert", required=True, action="append", metavar="NAME=PATH", help="a fine-tuned model; give one or more"
    )
    parser.add_argument(
        "--include", action="append", metavar="REGEX",
        help="merge the parameters in whose names this is found; all by default; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--exclude", action="append", metavar="REGEX",
        help="leave these, such as heads, as they are in the pre-trained model; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--key-map", choices=("auto", "none"), default="auto",
        help="auto (default): fit the experts' names to those of the pre-trained model by taking prefixes off or on",
    )  # fmt: skip


def _merge(options: argparse.Namespace, console: Console) -> None:
    from zoo.common.results import peak_memory
    from zoo.merging import one_shot

    settings, experts = _settings(options), _experts(options.expert)
    target, companions = _target(options.out, options.pretrained)
    keywords = dict(settings)
    if options.method == "dare_ties":
        keywords["ties_density"] = keywords.pop("density")
    sizes: dict[str, int] = {}
    started = time.perf_counter()
    with _progress(console, sizes) as progress:
        merge = getattr(one_shot, _METHODS[options.method].function)
        path: Path = merge(
            options.pretrained, experts, out=target, buffers=options.buffers, progress=progress,
            include=options.include, exclude=options.exclude, key_map=options.key_map, **keywords,
        )  # fmt: skip
    for file in companions:
        shutil.copy(file, path.parent)
    shown = [f"{name.replace('_', '-')} {value}" for name, value in settings.items()]
    print(f"{options.method} of {', '.join(experts)}" + (f" ({', '.join(shown)})" if shown else ""))
    print(
        f"{sum(sizes.values()):,} parameters in {len(sizes)} tensors merged in {time.perf_counter() - started:.1f} s, "
        f"peak memory {_bytes(peak_memory()['peak_rss_bytes'])}"
    )
    beside = f", beside it {', '.join(file.name for file in companions)}" if companions else ""
    print(f"wrote {path} ({_bytes(path.stat().st_size)}){beside}")


def _inspect(options: argparse.Namespace, console: Console) -> None:
    import torch

    from zoo.merging.layers import group
    from zoo.merging.stream import VectorStream

    experts = _experts(options.expert)
    with _progress(console, {}) as progress:
        found = VectorStream(
            options.pretrained, experts, progress=progress,
            include=options.include, exclude=options.exclude, key_map=options.key_map,
        ).geometry()  # fmt: skip
    squares = torch.cat([found.base_norms[:, None], found.norms], 1).square()
    rows = dict(zip(found.names, squares, strict=True))
    layers = {
        layer: torch.stack([rows[name] for name in members]).sum(0).sqrt()
        for layer, members in group(found.names, options.by).items()
    }
    whole = squares.sum(0).sqrt()
    norms = Table(title="norms of the task vectors", title_justify="left")
    for heading in (options.by, "pretrained", *experts):
        norms.add_column(escape(heading), justify="left" if heading == options.by else "right", overflow="fold")
    for layer, row in layers.items():
        norms.add_row(escape(layer), *(f"{value:.4g}" for value in row.tolist()))
    norms.add_section()
    norms.add_row("whole vector", *(f"{value:.4g}" for value in whole.tolist()))
    norms.add_row("over pretrained", "1", *(f"{value:.2%}" for value in (whole[1:] / whole[0]).tolist()))
    cosines = Table(title="cosines between the task vectors", title_justify="left")
    for heading in ("", *experts):
        cosines.add_column(escape(heading), justify="right" if heading else "left", overflow="fold")
    for task, row in zip(experts, found.cosines.tolist(), strict=True):
        cosines.add_row(escape(task), *(f"{value:.3f}" for value in row))
    # What goes to a file or a pipe is not cut to the width of a screen.
    page = Console() if sys.stdout.isatty() else Console(width=10_000)
    page.print(norms, cosines)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """Options of the method: what was typed, and defaults."""
    defaults = _METHODS[options.method].options
    everything = {name for method in _METHODS.values() for name in method.options}
    typed = {name: getattr(options, name) for name in sorted(everything) if getattr(options, name) is not None}
    for name in typed:
        if name not in defaults:
            known = ", ".join(f"--{option.replace('_', '-')}" for option in defaults) or "no options of its own"
            raise ValueError(
                f"--{name.replace('_', '-')} does nothing with --method {options.method}, which takes {known}"
            )
    return {name: typed.get(name, default) for name, default in defaults.items()}


def _experts(arguments: Sequence[str]) -> dict[str, str]:
    experts: dict[str, str] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not (name and equals and path):
            raise ValueError(f"--expert {argument}: expected NAME=PATH, such as mnist=experts/mnist.safetensors")
        if name in experts:
            raise ValueError(f"--expert {argument}: {name} is already {experts[name]}; names must differ")
        experts[name] = path
    return experts


def _target(out: Path, pretrained: str) -> tuple[Path, list[Path]]:
    """The file to write, and files of the pre-trained model's folder to put beside it."""
    from zoo.merging.checkpoint_folders import fetch_folder
    from zoo.merging.weight_files import FILE_SUFFIXES

    out = out.expanduser()
    if out.suffix == ".safetensors" and not out.is_dir():
        return out, []
    if out.name.endswith(FILE_SUFFIXES) or out.is_file():
        raise ValueError(f"--out {out}: expected a name that ends in .safetensors, or a folder")
    folder = Path(pretrained).expanduser()
    if not folder.exists():
        folder = fetch_folder(pretrained)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"--out {out}: a folder is written where the pre-trained model is one with a config.json, and {pretrained} "
            "is none; give a name that ends in .safetensors"
        )
    if out.exists() and out.samefile(folder):
        raise ValueError(f"--out {out}: this is the pre-trained model's own folder; choose another one")
    companions = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix in _COMPANIONS)
    return out / "model.safetensors", [file for file in companions if not file.name.endswith(_NO_COMPANIONS)]


@contextmanager
def _progress(console: Console, sizes: dict[str, int]) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal; notes the size of every tensor that is read."""
    layout = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*layout, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading headers", total=None)
        before = 0

        def show(name: str, read: int, total: int) -> None:
            nonlocal before
            sizes.setdefault(name, read - before)
            before = read
            bar.update(task, description=name, completed=read, total=total)

        yield show


@contextmanager
def _warnings_on(console: Console) -> Iterator[None]:
    """Show warnings without the line of code that they come from."""

    def show(message: Warning | str, *_: object) -> None:
        console.print(f"warning: {message}", markup=False, soft_wrap=True)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
