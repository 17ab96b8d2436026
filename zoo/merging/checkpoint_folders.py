"""Folders of weights as transformers and peft write them, here or on the hub."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.merging.weight_files import FILE_SUFFIXES, StoredTensor, memory_tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

MODEL_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def weights_in_folder(folder: Path, names: Sequence[str] = MODEL_FILES) -> Path:
    """The file of weights in a folder of `save_pretrained`.

    Args:
        folder: The folder.
        names: Files to look for; the first that is there is taken.

    Raises:
        FileNotFoundError: If none of them is there.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    inside = sorted(path.name for path in folder.iterdir())
    shown = ", ".join(inside[:8]) + (", ..." if len(inside) > 8 else "") if inside else "nothing"
    raise FileNotFoundError(f"{folder}: no weights in this folder, expected {' or '.join(names)}; it holds {shown}")


def fetch_folder(name: str | Path) -> Path:
    """The local copy of a folder on the Hugging Face hub, downloaded where it is not in the cache.

    Args:
        name: A hub id, such as "openai/clip-vit-base-patch32".

    Raises:
        FileNotFoundError: If it is no hub id, or neither cache nor hub have it.
        ImportError: If huggingface_hub, which comes with transformers, is not installed.
    """
    text = str(name)
    if isinstance(name, Path) or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", text) or text.endswith(FILE_SUFFIXES):
        raise FileNotFoundError(f"{name}: no such file or folder")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"{name} is no local folder, and hub ids need transformers: pip install 'lightning-method-zoo[hub]'"
        ) from error
    try:
        wanted = ["config.json", "adapter_config.json", *MODEL_FILES[:2], "model-*.safetensors", ADAPTER_FILES[0]]
        folder = Path(snapshot_download(text, allow_patterns=wanted))
        if not any((folder / file).is_file() for file in (*MODEL_FILES, *ADAPTER_FILES)):
            # Old repositories have nothing else; new ones have these too, and would be fetched twice.
            wanted = [*MODEL_FILES[2:], "pytorch_model-*.bin", ADAPTER_FILES[1]]
            folder = Path(snapshot_download(text, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"{name}: no such file or folder, and the hub did not give it ({reason}). Check the name, or run `hf "
            f"download {name} --local-dir FOLDER` where there is a network, and give that folder."
        ) from error
    return folder


def load_like(folder: Path, model: nn.Module) -> dict[str, StoredTensor] | None:
    """Entries of a folder's weights under the names they have in a loaded model.

    Args:
        folder: A folder of `save_pretrained`. Its weights are loaded as a whole.
        model: A model of transformers, or a module with one as its child; the class that loads, and whose names
            are taken.

    Returns:
        The entries without those that the folder has nothing for, or None if `model` is not of that kind.

    Raises:
        ValueError: If the folder's weights do not fit its own config.
    """
    if "transformers" not in sys.modules:
        return None
    import transformers

    parts = (("", model), *((f"{name}.", child) for name, child in model.named_children()))
    found = [(prefix, part) for prefix, part in parts if isinstance(part, transformers.PreTrainedModel)]
    if not found or not (folder / "config.json").is_file():
        return None
    prefix, part = found[0]
    verbosity = transformers.logging.get_verbosity()
    # Its list of missing weights speaks of random ones, which are left out here.
    transformers.logging.set_verbosity_error()
    try:
        loaded, info = type(part).from_pretrained(
            folder, dtype="auto", output_loading_info=True, local_files_only=True, use_safetensors=None
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"{folder}: {type(part).__name__}.from_pretrained cannot load it ({error})") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    absent = set(info["missing_keys"])
    entries = memory_tensors(loaded.state_dict(), str(folder))
    return {prefix + name: entry for name, entry in entries.items() if name not in absent}
