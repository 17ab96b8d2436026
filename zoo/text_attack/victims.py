"""The victims by name, and out of their checkpoints."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import TYPE_CHECKING, Any

from zoo.common.checkpoints import load_checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zoo.text_attack.victim import TextRecVictim

VICTIMS: dict[str, str] = {
    "CoLLMRec": "zoo.text_attack.collm",
    "P5Rec": "zoo.text_attack.p5",
    "RecFormerRec": "zoo.text_attack.recformer_rec",
    "TALLRec": "zoo.text_attack.tallrec",
}
"""Where each is defined."""


def victim_class(name: str) -> type[TextRecVictim]:
    """The class of a name.

    Raises:
        ValueError: If there is none.
    """
    if name not in VICTIMS:
        raise ValueError(f"victim must be one of {', '.join(VICTIMS)}, got {name!r}")
    kind: type[TextRecVictim] = getattr(import_module(VICTIMS[name]), name)
    return kind


def build_victim(name: str, options: Mapping[str, Any], **sizes: int | None) -> TextRecVictim:
    """A fresh victim.

    Args:
        name: Its class.
        options: Its arguments.
        **sizes: Arguments that the data knows; those that the class does not have, and None, are left out.

    Raises:
        ValueError: If the name or an argument is unknown.
    """
    kind = victim_class(name)
    known = inspect.signature(kind.__init__).parameters
    unknown = [option for option in options if option not in known]
    if unknown:
        listed = ", ".join(parameter for parameter in known if parameter != "self")
        raise ValueError(f"victim_options: {name} has no {', '.join(unknown)}; it has {listed}")
    given = {size: value for size, value in sizes.items() if size in known and value is not None}
    return kind(**{**given, **options})


def load_victim(path: str) -> TextRecVictim:
    """The victim of a checkpoint.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a victim's checkpoint.
    """
    checkpoint = load_checkpoint(path)
    name = checkpoint.get("victim")
    if name not in VICTIMS or any(key.startswith("victim.") for key in checkpoint["state_dict"]):
        raise ValueError(
            f"{path} is no checkpoint of a victim: give the best.ckpt that `train.py --model X` left, X being one of "
            f"{', '.join(VICTIMS)}"
        )
    victim: TextRecVictim = victim_class(name).load_from_checkpoint(path, map_location="cpu", weights_only=True)
    return victim
