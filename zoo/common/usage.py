"""The first help page, made without importing torch."""

from __future__ import annotations

import ast
from difflib import get_close_matches
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

PAGE = """\
Train, test and use the methods of the zoo.

usage: train.py [run|fit|validate|test|predict] [--config FILE] [--model NAME] [--data NAME] [options]

  run       fit, then test with the best checkpoint (this is what happens without a subcommand)
  fit, validate, test, predict
            one step alone; the last three take --ckpt_path FILE, `best` or `last`

models (--model NAME, options --model.*)
{models}

data modules (--data NAME, options --data.*)
{data}

examples
  python train.py --config configs/{example}/demo.yaml
  python train.py --model {model} --data {datum} --model.hidden_size 128 --trainer.max_epochs 20
  python train.py --config configs/{example}/demo.yaml --ckpt_path last        resume the newest run of this config
  python train.py test --config configs/{example}/demo.yaml --ckpt_path best
  python train.py --config configs/{example}/demo.yaml --logger wandb          WANDB_MODE=offline works too
  python train.py fit --model.help {model}                                options of one model
  python train.py fit --help                                            all options

A run leaves config.yaml, metrics.csv, best.ckpt, last.ckpt, result.json and its pictures in runs/<model>/version_N.
With --debug an error shows its whole trace.
"""


def usage(models: tuple[ModuleType, Sequence[str]], data: tuple[ModuleType, Sequence[str]], example: str) -> str:
    """The text of `train.py --help`.

    Args:
        models: The package with the models, and their names.
        data: The same for the data modules.
        example: The folder under `configs/` that the example commands use.
    """
    return PAGE.format(
        models=_listing(*models),
        data=_listing(*data),
        example=example,
        model=models[1][-1],
        datum=data[1][-1],
    )


def unknown_name(kind: str, name: str, known: Sequence[str]) -> str:
    """One paragraph for a class name that is not known."""
    nearest = get_close_matches(name.rpartition(".")[2], known, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]}?" if nearest else ""
    return (
        f"--{kind} {name}: no such {'model' if kind == 'model' else 'data module'}.{hint} "
        f"Known: {', '.join(sorted(known))}. A class of your own is named with its module: package.module.Class."
    )


def _listing(package: ModuleType, names: Sequence[str]) -> str:
    width = max(map(len, names))
    summaries = _summaries(package, names)
    return "\n".join(f"  {name:<{width}}  {summaries.get(name, '')}".rstrip() for name in sorted(names))


def _summaries(package: ModuleType, names: Sequence[str]) -> dict[str, str]:
    """First lines of the classes' docstrings, read from the sources so that nothing heavy is imported."""
    found = {}
    for path in Path(next(iter(package.__path__))).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if any(f"class {name}(" in text for name in names):
            for node in ast.parse(text).body:
                if isinstance(node, ast.ClassDef) and node.name in names:
                    line = (ast.get_docstring(node) or "").partition("\n")[0]
                    found[node.name] = shorten(line, 90, placeholder=" ...")
    return found
