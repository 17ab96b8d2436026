"""From the plain arguments of `TextAttackModule` to attacks, goals and defences."""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zoo.text_attack.goals import ExposureGoal, Goal, PropensityGoal, SoftExposureGoal, check_goal
from zoo.text_attack.recipes import RECIPES, build_attack, recipe_options

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from zoo.text_attack.attack import TextAttack
    from zoo.text_attack.exposure import Ties
    from zoo.text_attack.one_shot import OneShotAttack
    from zoo.text_attack.sentence_encoders import SentenceEncoder

GOALS = ("auto", "exposure", "soft_exposure", "propensity")
DEFENSES = ("spell", "rewrite")
LIST_LENGTHS = {"retrieval": 50, "pointwise": 10}
"""Items that a user is shown, by kind of victim, where nothing else is asked for."""
UNKNOWN_IN_PARITY = "[UNK]"


@dataclass(frozen=True)
class AttackOptions:
    """What an attack is made of, as plain values (see `TextAttackModule`)."""

    recipe: str
    recipe_options: dict[str, Any]
    parity: bool
    synonyms: str | None
    masked_lm: str | None
    part_of_speech: str | None
    rewrites: str | None
    delta: float | None
    budget: int | None
    seed: int

    def __post_init__(self) -> None:
        """Check the values."""
        if self.recipe not in RECIPES:
            raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {self.recipe!r}")
        known = recipe_options(self.recipe)
        unknown = sorted(set(self.recipe_options) - set(known))
        if unknown:
            raise ValueError(
                f"recipe_options: {self.recipe} has no {', '.join(unknown)}; it has {', '.join(known) or 'none'}"
            )
        if self.budget is not None and self.budget < 1:
            raise ValueError(f"budget must be at least 1 query, or None, got {self.budget}")
        if self.delta is not None and not self.delta >= 0:
            raise ValueError(f"delta must be at least 0, or None, got {self.delta}")

    def plain(self) -> dict[str, Any]:
        """All of them."""
        return asdict(self)


def attack_of(options: AttackOptions, encoder: SentenceEncoder | None) -> TextAttack | OneShotAttack:
    """The attack.

    Raises:
        FileNotFoundError: If a source or model is missing.
        ValueError: If the recipe lacks what it needs.
    """
    rewrites: Any = options.rewrites
    if rewrites is not None and not str(rewrites).endswith((".jsonl", ".json")):
        from zoo.text_attack.one_shot import LanguageModelRewriter

        rewrites = LanguageModelRewriter(rewrites)
    return build_attack(
        options.recipe,
        parity=options.parity,
        synonyms=options.synonyms,
        sentence_encoder=encoder,
        masked_lm=options.masked_lm,
        part_of_speech=options.part_of_speech,
        rewrites=rewrites,
        delta=options.delta,
        budget=options.budget,
        # Byte pairs know every word, and a special token's name in a title is read as letters: words are dropped.
        unk=UNKNOWN_IN_PARITY if options.parity else None,
        seed=options.seed,
        **options.recipe_options,
    )


def goal_of(
    name: str, kind: str, k: int | None, ties: Ties | str, mask_seen: bool, temperature: float, delta: float | None
) -> Goal:
    """The goal by name.

    Raises:
        ValueError: If there is none of that name, or it does not fit the kind of victim.
    """
    if name not in GOALS:
        raise ValueError(f"goal must be one of {', '.join(GOALS)}, got {name!r}")
    if name == "auto":
        name = "exposure" if kind == "retrieval" else "propensity"
    length = k or LIST_LENGTHS[kind]
    goal: Goal
    if name == "exposure":
        goal = ExposureGoal(length, delta, ties, mask_seen)  # type: ignore[arg-type]
    elif name == "soft_exposure":
        goal = SoftExposureGoal(length, temperature, delta, mask_seen)
    else:
        goal = PropensityGoal(delta)
    check_goal(goal, kind, has_candidates=True)
    return goal


def defense_of(
    name: str | None, options: dict[str, Any] | None, titles: Sequence[str] | None
) -> Callable[[list[str]], list[str]] | None:
    """The defence by name; without titles only its name and options are checked.

    Raises:
        ValueError: If name or options are unknown.
    """
    if name is None:
        if options:
            raise ValueError("defense_options have no meaning without a defense")
        return None
    if name not in DEFENSES:
        raise ValueError(f"defense must be one of {', '.join(DEFENSES)}, got {name!r}")
    known = {"spell": {"max_edit"}, "rewrite": {"model", "prompt", "max_new_tokens", "batch_size"}}[name]
    unknown = sorted(set(options or {}) - known)
    if unknown:
        raise ValueError(f"defense_options: {name} has no {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    if name == "rewrite" and "model" not in (options or {}):
        raise ValueError("defense='rewrite' needs defense_options.model, a folder or hub id of a language model")
    if titles is None:
        return None
    if name == "spell":
        from zoo.text_attack.defenses import SpellDefense

        return SpellDefense(titles, **(options or {}))
    from zoo.text_attack.rewriting import LMRewriteDefense

    return LMRewriteDefense(**(options or {}))


@torch.no_grad()
def fingerprint(network: nn.Module, titles: Sequence[str]) -> str:
    """A short text that differs between weights, and between catalogues."""
    code = zlib.crc32("\n".join(titles).encode())
    for name, tensor in sorted(network.state_dict().items()):
        flat = tensor.detach().cpu().contiguous().flatten()
        code = zlib.crc32(name.encode(), code)
        if flat.numel():
            code = zlib.crc32(flat.view(torch.uint8).numpy().tobytes(), code)
    return f"{code:08x}"


def results_file(given: str | None, folder: Path, name: str) -> Path:
    """Where results go: a file that was given, or one in the run's folder; other attacks beside the first."""
    if given is None:
        return folder / f"{name}.jsonl"
    path = Path(given)
    return path if name == "attacks" else path.with_name(f"{path.stem}.{name}{path.suffix}")
