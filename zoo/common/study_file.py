"""The file of a study: what is compared, and what is asked of it.

It is written in YAML:

    title: What is compared, in one line.
    seeds: [0, 1]
    variants:                                  # rows of the result
      sasrec: {config: configs/ticoserec/core_sasrec.yaml}
      wide:
        config: configs/ticoserec/core_sasrec.yaml
        overrides: {model.hidden_size: 128}    # as on train.py's command line
      tuned:
        config: configs/ticoserec/core_sasrec.yaml
        first:                                 # a run before it, with the same seed; equal ones are trained once
          config: configs/x/pretrain.yaml
          overrides: {trainer.max_epochs: 100}
        hand: {model.init_from: encoder}       # files or folders that it leaves, given to this one
    overrides: {trainer.max_epochs: 40}        # for all variants, and not for the runs before them
    smoke: {trainer.max_epochs: 1}             # added by --smoke, also to the runs before (see `study.plan`)
    checks:                                    # on the means over the seeds
      - test/ndcg@5: wide >= 1.08 * sasrec
      - test/hr@5: wide >= sasrec - 0.01 each seed   # on every seed instead of the means
    reference:                                 # published rows to stand beside ours
      SASRec, published: {test/hr@5: 0.037}
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from zoo.common.study_checks import StudyError, parse_check

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zoo.common.study_checks import Check

_KEYS = {"title", "seeds", "variants", "overrides", "smoke", "checks", "reference"}
FIRST = "first"
"""Folder of the runs before the others; variants with equal ones share them."""


@dataclass(frozen=True)
class Variant:
    """One row of a study: a config and what differs from it, and the run that comes before it, if any."""

    config: str
    overrides: dict[str, Any]
    first: Variant | None = None
    hand: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A study as its file has it."""

    path: Path
    title: str
    seeds: tuple[int, ...]
    variants: dict[str, Variant]
    smoke: dict[str, Any]
    checks: tuple[Check, ...]
    reference: dict[str, dict[str, float]]


def load_study(path: Path, root: Path) -> Study:
    """Read and check a study.

    Args:
        path: The study's file.
        root: Folder of `train.py`; configs are relative to it.

    Raises:
        StudyError: If something is missing or unknown; the text names the file, the key and the value.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise StudyError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("variants"), dict):
        raise StudyError(f"{path}: expected a mapping with `variants`, got {str(content)[:60]!r}")
    if FIRST in content["variants"]:
        raise StudyError(f"{path}: variants.{FIRST}: the name is taken by the runs before others")
    _refuse_unknown(path, "", content, _KEYS)
    shared = content.get("overrides") or {}
    variants = {}
    for name, fields in content["variants"].items():
        variants[str(name)] = _parse_variant(path, f"variants.{name}.", fields, root, shared)
    seeds = content.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) for seed in seeds):
        raise StudyError(f"{path}: seeds: expected a list of integers, got {seeds!r}")
    checks = tuple(
        parse_check(path, metric, text, variants)
        for entry in content.get("checks") or []
        for metric, text in entry.items()
    )
    return Study(
        path,
        str(content.get("title", path.stem)),
        tuple(seeds),
        variants,
        content.get("smoke") or {},
        checks,
        content.get("reference") or {},
    )


def _parse_variant(path: Path, prefix: str, fields: Any, root: Path, shared: Mapping[str, Any]) -> Variant:
    variant = _parse_run(path, prefix, fields, root, {"config", "overrides", "first", "hand"})
    overrides = {**shared, **variant.overrides}
    if not {"first", "hand"} & set(fields):
        return replace(variant, overrides=overrides)
    if not {"first", "hand"} <= set(fields):
        raise StudyError(f"{path}: {prefix.rstrip('.')}: first and hand belong together, one of them is missing")
    first = _parse_run(path, f"{prefix}first.", fields["first"], root, {"config", "overrides"})
    hand = fields["hand"]
    if not isinstance(hand, dict) or not hand:
        raise StudyError(f"{path}: {prefix}hand: expected a mapping of settings to names of files, got {hand!r}")
    for key, name in hand.items():
        if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise StudyError(
                f"{path}: {prefix}hand.{key}: expected the name of a file or folder in the folder of the run before, "
                f"got {name!r}"
            )
        if key in variant.overrides:
            raise StudyError(f"{path}: {prefix}hand.{key}: it is given by {prefix}overrides, too; leave one of them")
    return Variant(variant.config, overrides, first, hand)


def _parse_run(path: Path, prefix: str, fields: Any, root: Path, known: set[str]) -> Variant:
    _refuse_unknown(path, prefix, fields, known)
    if not (root / str(fields.get("config"))).is_file():
        raise StudyError(f"{path}: {prefix}config: no file {fields.get('config')!r}")
    overrides = fields.get("overrides") or {}
    if not isinstance(overrides, dict):
        raise StudyError(f"{path}: {prefix}overrides: expected a mapping, got {overrides!r}")
    return Variant(fields["config"], overrides)


def _refuse_unknown(path: Path, prefix: str, fields: Any, known: set[str]) -> None:
    if not isinstance(fields, dict):
        raise StudyError(f"{path}: {prefix.rstrip('.')}: expected a mapping, got {fields!r}")
    for key in fields:
        if key not in known:
            raise StudyError(f"{path}: unknown key {prefix}{key}; there are {', '.join(sorted(known))}")
