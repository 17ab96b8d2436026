"""Encoders on disk, and encoders built from what is there."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from zoo.cmmixer.vit import SIZES, ViTEncoder, size_of
from zoo.common.pretrained import local_folder, read_config

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

log = logging.getLogger(__name__)

MODEL_TYPE = "cmmixer_vit"
_WEIGHTS = "model.safetensors"
_KEYS = frozenset(
    ("image_shape", "num_frames", "patch_size", "hidden_size", "num_layers", "num_heads", "mlp_ratio", "layout")
)


def save_encoder(encoder: ViTEncoder, folder: str | Path) -> Path:
    """Write an encoder: `config.json` and `model.safetensors`.

    Args:
        encoder: What to write.
        folder: Where to; made if missing.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": MODEL_TYPE, **encoder.config}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file({name: value.contiguous() for name, value in encoder.state_dict().items()}, folder / _WEIGHTS)
    return folder


def build_encoder(
    image_shape: Sequence[int],
    num_frames: int,
    size: str | None = None,
    options: Mapping[str, Any] | None = None,
    patch_size: int | None = None,
    layout: str | None = None,
    init_from: str | Path | None = None,
) -> ViTEncoder:
    """An encoder for clips of a shape, with fresh weights or those of a pre-trained one.

    Args:
        image_shape: Channels, height and width of a frame.
        num_frames: Frames of a clip.
        size: One of the names of `SIZES`; "base" by default.
        options: `hidden_size`, `num_layers`, `num_heads`, `mlp_ratio` that replace the name's.
        patch_size: Side of a patch; 16 by default, 14 for "huge".
        layout: "concat" (default) or "interleave".
        init_from: A folder written by `save_encoder`, or a Hugging Face ViTMAE checkpoint (folder or hub id). The sizes
            are then those of the checkpoint; what is given beside it must agree. Frames may have another size and
            number: positions are computed for them.

    Raises:
        FileNotFoundError: If the checkpoint is not there.
        ValueError: If it is damaged, or what is given contradicts it.
    """
    if init_from is None:
        arguments = size_of(size or "base", dict(options or {}), SIZES)
        patch = patch_size or (14 if size == "huge" else 16)
        return ViTEncoder(image_shape, num_frames, patch, **arguments, layout=layout or "concat")
    try:
        folder = local_folder(init_from)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"init_from: {error}. A checkpoint of a retriever or a classifier has all weights itself: load it with "
            "init_from=None, and the sizes in encoder_options and patch_size"
        ) from error
    found = read_config(folder) if folder else {}
    if found.get("model_type") != MODEL_TYPE:
        return _from_vitmae(init_from, image_shape, num_frames, size, options, patch_size, layout)
    assert folder is not None
    found = _checked(folder, found)
    wanted = _given(size, options, patch_size, layout)
    _check_same(init_from, found, {**wanted, "channels": image_shape[0]}, found["image_shape"][0])
    shape = (found["num_frames"], found["image_shape"])
    if shape != (num_frames, list(image_shape)):
        log.info(
            "%s was trained on %d frames of %s, these are %d of %s: positions are computed anew, weights are kept",
            init_from, *shape, num_frames, list(image_shape),
        )  # fmt: skip
    encoder = ViTEncoder(**{**found, "image_shape": list(image_shape), "num_frames": num_frames})
    try:
        encoder.load_state_dict(load_file(folder / _WEIGHTS))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder / _WEIGHTS} is damaged, or does not fit its config.json: {error}") from error
    return encoder


def load_encoder(folder: str | Path) -> ViTEncoder:
    """The encoder of a folder written by `save_encoder`, for clips as it was trained on.

    Args:
        folder: The folder.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is damaged, or is not such a folder.
    """
    path = local_folder(Path(folder))
    assert path is not None
    config = read_config(path)
    if config.get("model_type") != MODEL_TYPE:
        raise ValueError(f"{path / 'config.json'} has model_type={config.get('model_type')!r}, expected {MODEL_TYPE!r}")
    config = _checked(path, config)
    return build_encoder(config["image_shape"], config["num_frames"], init_from=folder)


def _checked(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an encoder in its config."""
    arguments = {key: value for key, value in config.items() if key != "model_type"}
    if arguments.keys() != _KEYS:
        different = ", ".join(sorted(arguments.keys() ^ _KEYS))
        raise ValueError(f"{folder / 'config.json'} is not one that save_encoder writes: see {different}")
    return arguments


def _given(
    size: str | None, options: Mapping[str, Any] | None, patch_size: int | None, layout: str | None
) -> dict[str, Any]:
    named = size_of(size or "base", dict(options or {}), SIZES)
    arguments = named if size else dict(options or {})
    arguments |= {} if patch_size is None else {"patch_size": patch_size}
    return arguments | ({} if layout is None else {"layout": layout})


def _check_same(name: str | Path, found: Mapping[str, Any], wanted: Mapping[str, Any], channels: int) -> None:
    for key, value in wanted.items():
        known = channels if key == "channels" else found[key]
        if known != value:
            raise ValueError(
                f"the encoder of {name} has {key} = {known}, but {value} is asked for"
                + (": give data with as many channels" if key == "channels" else f": leave {key} out")
            )


def _from_vitmae(
    name: str | Path,
    image_shape: Sequence[int],
    num_frames: int,
    size: str | None,
    options: Mapping[str, Any] | None,
    patch_size: int | None,
    layout: str | None,
) -> ViTEncoder:
    from zoo.cmmixer.vitmae import load_vitmae, vitmae_config

    found = vitmae_config(name)
    channels = found.pop("channels")
    wanted = _given(size, options, patch_size, None)
    _check_same(name, found, {**wanted, "channels": image_shape[0]}, channels)
    encoder = ViTEncoder(image_shape, num_frames, **found, layout=layout or "concat")
    load_vitmae(encoder, name)
    return encoder
