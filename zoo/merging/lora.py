"""LoRA adapters of peft as experts: base weights with the adapter's product added, one tensor at a time."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from zoo.merging.checkpoint_folders import ADAPTER_FILES, MODEL_FILES, weights_in_folder
from zoo.merging.weight_files import StoredTensor, open_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

# Options that say where an adapter sits and how it was trained; any other one may change what it computes.
_HARMLESS = frozenset(
    {
        *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config"),
        *("exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern"),
        *("layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "modules_to_save", "peft_type"),
        *("peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules"),
        *("task_type", "use_rslora"),
    }
)
# These initialisations change the base weights as well, which an adapter's folder does not hold.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Update:
    """What an adapter does to one tensor.

    Args:
        whole: A tensor that takes its place, if any.
        down: A, `(r, in, ...)`, if there is a product to add.
        up: B, `(out, r, ...)`.
        scaling: Factor of B @ A.
        transposed: Whether the tensor is more likely (in, out) than (out, in), where both fit.
    """

    whole: StoredTensor | None = None
    down: StoredTensor | None = None
    up: StoredTensor | None = None
    scaling: float = 1.0
    transposed: bool = False


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter rather than whole weights.

    Raises:
        ValueError: If it holds both.
    """
    if not (folder / "adapter_config.json").is_file():
        return False
    whole = [name for name in MODEL_FILES if (folder / name).is_file()]
    if whole:
        raise ValueError(f"{folder}: holds an adapter and whole weights; give the path of {whole[0]} or move one away")
    return True


def open_adapter(folder: Path) -> dict[str, Update]:
    """What a LoRA adapter does, by the names that its tensors have in the model it was trained on.

    Args:
        folder: A folder of `PeftModel.save_pretrained`.

    Raises:
        FileNotFoundError: If the weights are missing.
        ValueError: If it is no plain LoRA adapter.
    """
    config = _config(folder)
    path = weights_in_folder(folder, ADAPTER_FILES)
    updates: dict[str, Update] = {}
    for key, entry in open_file(path).items():
        name = key.removeprefix("base_model.model.")
        if ".base_layer.out_proj.lora_" in name:
            # Its layer for torch.nn.MultiheadAttention adds the output's product twice, other layers once.
            raise ValueError(
                f"{path}: {key!r} adapts a torch.nn.MultiheadAttention, where peft computes more than "
                "base + scaling * B @ A; merge this adapter with peft (merge_and_unload) and give the whole weights"
            )
        found = re.fullmatch(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?", name)
        if found is None and ".lora_" in name:
            raise ValueError(f"{path}: {key!r} is no part of a plain LoRA adapter; merge it with peft first")
        target = (f"{found[1]}.weight" if found else name).replace(".base_layer.", ".")
        update = updates.get(target, Update())
        if found is None:
            update = replace(update, whole=entry)
        elif found[3] == "B":
            update = replace(update, up=entry)
        else:
            transposed = found[2] is not None or bool(config.get("fan_in_fan_out"))
            scaling = _scaling(config, found[1], rank=entry.shape[0])
            update = replace(update, down=entry, scaling=scaling, transposed=transposed)
        updates[target] = update
    halves = [name for name, update in updates.items() if (update.down is None) != (update.up is None)]
    if halves or not updates:
        raise ValueError(f"{path}: {f'lora_A or lora_B of {halves[0]!r} is missing' if halves else 'holds nothing'}")
    return updates


def adapted_tensors(
    adapter: Mapping[str, Update], fitted: Mapping[str, str], base: Mapping[str, StoredTensor], label: str
) -> dict[str, StoredTensor]:
    """Entries of the base with an adapter on it: theta_k = theta_0 + scaling * B @ A, in float32.

    Args:
        adapter: As `open_adapter` gives it.
        fitted: The base's names by the adapter's; what has none is left out.
        base: Entries of the base.
        label: What messages call the adapter.

    Raises:
        ValueError: If a tensor of the adapter has none to be added to, or does not fit it.
    """
    entries = dict(base)
    lost = []
    for name, target in fitted.items():
        update = adapter[name]
        original = update.whole or entries.get(target)
        if original is None:
            lost.append(f"{name} (as {target})" if target != name else name)
        else:
            entries[target] = original if update.down is None else _sum(original, update, target, label)
    if lost:
        shown = ", ".join(lost[:10]) + (f" and {len(lost) - 10} more" if len(lost) > 10 else "")
        raise ValueError(
            f"{label}: the adapter changes {len(lost)} tensors that the base has not: {shown}. The base has "
            f"{', '.join(list(base)[:3])}, ...; it must be the model that the adapter was trained on, or give key_map."
        )
    return entries


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ValueError(f"{path}: peft_type is {kind}, expected LORA; merge other adapters with peft first")
    start = config.get("init_lora_weights")
    odd = [f"{name}={value!r}" for name, value in config.items() if value and name not in _HARMLESS]
    if isinstance(start, str) and start.startswith(_CHANGE_THE_BASE):
        odd.append(f"init_lora_weights={start!r}")
    if odd:
        raise ValueError(
            f"{path}: {', '.join(odd)} is more than base + scaling * B @ A; merge this adapter with peft "
            "(merge_and_unload) and give the whole weights"
        )
    return config


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = config.get("lora_alpha", 8)
    for pattern, own in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = own
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _sum(original: StoredTensor, update: Update, target: str, label: str) -> StoredTensor:
    down, up, shape = update.down, update.up, original.shape
    assert down is not None
    assert up is not None
    fits = down.shape[0] == up.shape[1] and math.prod(up.shape[2:]) == 1
    plain = fits and shape == (up.shape[0], *down.shape[1:])
    turned = fits and len(down.shape) == 2 and shape == (down.shape[1], up.shape[0])
    if not original.dtype.is_floating_point or not (plain or turned):
        raise ValueError(
            f"{label}: {target!r} is {original.dtype} {shape} in the base, which lora_A {down.shape} and lora_B "
            f"{up.shape} do not fit"
        )
    dtype = torch.float64 if original.dtype == torch.float64 else torch.float32
    turned = turned and (update.transposed or not plain)
    return StoredTensor(shape, dtype, partial(_read_sum, original, down, up, update.scaling, turned, dtype))


def _read_sum(
    original: StoredTensor, down: StoredTensor, up: StoredTensor, scaling: float, turned: bool, dtype: torch.dtype
) -> Tensor:
    weight = original.read()
    matrix = weight.t() if turned else weight.flatten(1)
    factors = (entry.read().to(weight.device, dtype).flatten(1) for entry in (up, down))
    summed = torch.addmm(matrix.to(dtype), *factors, alpha=scaling)
    return (summed.t() if turned else summed).reshape(original.shape).contiguous()
