"""Names of weights: wrappers taken off, and the names of one library version fitted to those of another."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

KeyMap = Literal["auto", "none"] | Callable[[str], str]

# Segments that torch puts into the names of what it wraps; no module is called so.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# Where a model sits in another one: in DDP, in a LightningModule, in an encoder with a head, in CLIP.
_HOLDERS = ("module.", "model.", "backbone.")
_CLIP_TOWERS = ("vision_model.", "text_model.")
_PREFIXES = (*_HOLDERS, *_CLIP_TOWERS)
_REST_OF_CLIP = (*_CLIP_TOWERS, "text_projection.", "visual_projection.", "logit_scale")


def map_names(names: Iterable[str], key_map: KeyMap, reference: Collection[str] | None, label: str) -> dict[str, str]:
    """The name by which each of a source's tensors is to be known.

    "auto" without a reference takes off what DDP, FSDP and `torch.compile` put before names, nothing else, so that
    merged weights fit where the pre-trained ones came from. With a reference it also takes off and puts on the prefixes
    `module.`, `model.`, `backbone.`, `vision_model.` and `text_model.`, in the way that makes the most names fit, and
    leaves out the parts of a CLIP model of which the reference has nothing.

    Args:
        names: The source's names.
        key_map: "auto", "none", or a function from a name to a name.
        reference: The names to fit, where there are any.
        label: What messages call the source.

    Returns:
        Names by the source's names, in its order; those left out are absent.

    Raises:
        ValueError: If two names become one, "auto" finds two ways that are equally good, or `key_map` is none of these.
    """
    names = list(names)
    if callable(key_map):
        return _distinct({name: key_map(name) for name in names}, label)
    if key_map == "none":
        return {name: name for name in names}
    if key_map != "auto":
        raise ValueError(f"key_map must be 'auto', 'none' or a function from a name to a name, got {key_map!r}")
    if reference is None:
        return _distinct(_unwrapped(names), label)
    if set(reference) <= set(names):
        fitted = {name: name for name in names}
    else:
        fitted = _best_fit(_distinct(_unwrapped(names), label), _unwrapped(list(reference)), label)
    return _without_rest_of_clip(fitted, reference)


def _unwrapped(names: list[str]) -> dict[str, str]:
    plain = {name: ".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in names}
    while plain and all(name.startswith("module.") for name in plain.values()):
        plain = {name: short.removeprefix("module.") for name, short in plain.items()}
    return plain


def _best_fit(source: dict[str, str], reference: dict[str, str], label: str) -> dict[str, str]:
    homes = {plain: name for name, plain in reference.items()}
    foreign = _foreign_towers(homes)
    fits: list[dict[str, str]] = []
    most = -1
    for old in _chains(source.values()):
        for new in _chains(homes):
            moved = {
                name: new + plain.removeprefix(old) if plain.startswith(old) else plain
                for name, plain in source.items()
            }
            if old.endswith(foreign) or len(set(moved.values())) < len(moved):
                continue
            found = sum(name in homes for name in moved.values())
            if found >= most:
                # The first, which moves nothing, is the best where it is as good as others.
                fits = [*fits, moved] if found == most else [moved]
                most = found
    best = fits[0]
    for other in fits[1:] if best != source else []:
        for name, new in best.items():
            if new in homes and other[name] in homes and other[name] != new:
                raise ValueError(
                    f"{label}: {name!r} may be {homes[new]!r} or {homes[other[name]]!r}; give key_map, a function from "
                    "name to name"
                )
    return {name: homes.get(moved, moved) for name, moved in best.items()}


def _foreign_towers(names: Collection[str]) -> tuple[str, ...]:
    """Prefixes of the towers of which there is nothing, told by embeddings: the layers of both have the same names."""
    text = any("token_embedding" in name for name in names)
    vision = any("class_embedding" in name or "patch_embedding" in name for name in names)
    return (*(() if text else ("text_model.",)), *(() if vision or not text else ("vision_model.",)))


def _chains(names: Collection[str]) -> list[str]:
    """The empty prefix, and every sequence of known prefixes with which a name starts."""
    found = [""]
    for start in found:
        found += [start + prefix for prefix in _PREFIXES if any(name.startswith(start + prefix) for name in names)]
    return found


def _without_rest_of_clip(fitted: dict[str, str], reference: Collection[str]) -> dict[str, str]:
    bare = {name: _bare(name) for name in fitted}
    if not any(name.startswith(_CLIP_TOWERS) for name in bare.values()):
        return fitted
    known = set(reference)
    held = [*map(_bare, reference), *(bare[name] for name, new in fitted.items() if new in known)]
    lacking = tuple(part for part in _REST_OF_CLIP if not any(name.startswith(part) for name in held))
    return {name: new for name, new in fitted.items() if not bare[name].startswith(lacking)}


def _bare(name: str) -> str:
    parts = name.split(".")
    while len(parts) > 1 and (parts[0] in _WRAPPERS or f"{parts[0]}." in _HOLDERS):
        del parts[0]
    return ".".join(parts)


def _distinct(mapped: dict[str, str], label: str) -> dict[str, str]:
    seen: dict[str, str] = {}
    for name, new in mapped.items():
        if new in seen:
            raise ValueError(f"{label}: {seen[new]!r} and {name!r} both become {new!r} by key_map; use another one")
        seen[new] = name
    return mapped
