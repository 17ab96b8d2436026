"""Pre-trained networks of transformers, from a folder or a hub id, with errors that say what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from types import ModuleType

_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def transformers_library() -> ModuleType:
    """The module `transformers`, which only some uses of this package need.

    Raises:
        ImportError: If it is not installed; the message says how to install it.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError("this network needs transformers: pip install 'lightning-method-zoo[hub]'") from error
    module: ModuleType = transformers
    return module


def local_folder(name: str | Path, *, weights: bool = True) -> Path | None:
    """The folder that a name means, or None for a hub id.

    Args:
        name: A folder of `save_pretrained`, or a hub id.
        weights: Whether the folder must hold weights, beside its config.json.

    Raises:
        FileNotFoundError: If it is written as a path and is not a folder, or lacks the files of a checkpoint.
    """
    folder = Path(name).expanduser()
    needed = "config.json"
    if weights:
        needed += " and model.safetensors (or its shards, or pytorch_model.bin), as save_pretrained writes them"
    if not folder.is_dir():
        text = str(name)
        if isinstance(name, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or folder.exists():
            raise FileNotFoundError(f"{name} is not a folder; give a folder with {needed}, or a hub id")
        return None
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if weights and not any((folder / file).is_file() for file in _WEIGHT_FILES):
        missing.append("weights")
    if missing:
        adapter = "; a LoRA adapter alone is no network" if (folder / "adapter_config.json").is_file() else ""
        raise FileNotFoundError(f"the folder {name} has no {' and no '.join(missing)}: put {needed} there{adapter}")
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of a folder's config.json.

    Raises:
        ValueError: If the file is not a JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, it holds a {type(config).__name__}")
    return config


def load_pretrained(name: str | Path, loader: Any, *, weights: bool = True, **options: Any) -> Any:
    """Something of transformers by name: `loader.from_pretrained(name)`.

    A network comes in float32, in eval mode, and with all of its weights from the checkpoint.

    Args:
        name: A folder or a hub id.
        loader: A class of transformers with `from_pretrained`.
        weights: Whether a folder must hold weights, though the loader may need none.
        **options: More arguments of `from_pretrained`.

    Returns:
        The network, tokenizer or config.

    Raises:
        FileNotFoundError: If the folder lacks files, or the hub cannot be reached and its cache has nothing.
        ValueError: If the checkpoint is damaged, does not fit its config, or lacks weights of the network.
    """
    from safetensors import SafetensorError

    folder = local_folder(name, weights=weights)
    is_network = hasattr(loader, "_from_config") or hasattr(loader, "from_config")
    if is_network:
        options.update(dtype=torch.float32, output_loading_info=True)
    try:
        loaded = loader.from_pretrained(folder or name, **options)
    except OSError as error:
        reason = str(error).strip().split("\n")[0]
        if folder:
            raise FileNotFoundError(f"the folder {name} cannot be read: {reason}") from error
        raise FileNotFoundError(
            f"{name} is no local folder, and the hub did not give it ({reason}). Check the name, or run `hf download "
            f"{name} --local-dir FOLDER` where there is a network, and give that folder"
        ) from error
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"the weights of {name} are damaged, or do not fit its config.json: {error}") from error
    if not is_network:
        return loaded
    network, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{name} lacks {len(missing)} weights of {type(network).__name__}, which would be random: "
            f"{', '.join(missing[:10])}"
        )
    return network
