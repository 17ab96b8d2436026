"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) on a language model, by peft and in its format."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType

    from torch import nn

DEFAULTS: dict[str, Any] = {"r": 8, "alpha": 16, "dropout": 0.05, "targets": ["q_proj", "v_proj"]}
"""TALLRec's."""


def add_lora(network: nn.Module, options: Mapping[str, Any], adapter: str | Path | None = None) -> nn.Module:
    """A network with adapters, the only parameters of it that are trained.

    Args:
        network: A language model of transformers; it is changed.
        options: `r` (rank, 8), `alpha` (16), `dropout` (0.05) and `targets` (names of the layers, q_proj and v_proj).
            Not used with `adapter`, whose folder says them.
        adapter: Folder of an adapter in peft's format, whose weights are taken and trained on.

    Returns:
        The network of peft.

    Raises:
        FileNotFoundError: If the folder holds no adapter.
        ImportError: If peft is missing.
        ValueError: If an option is unknown or out of its range, or no layer has a name of `targets`.
    """
    peft = peft_library()
    with warnings.catch_warnings():
        # Of peft, which asks transformers for a property that has a new name.
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        return _adapted(peft, network, options, adapter)


def _adapted(peft: Any, network: nn.Module, options: Mapping[str, Any], adapter: str | Path | None) -> nn.Module:
    if adapter is not None:
        return _loaded(peft, network, Path(adapter).expanduser())
    unknown = [name for name in options if name not in DEFAULTS]
    if unknown:
        raise ValueError(f"lora has no {', '.join(unknown)}; it has {', '.join(DEFAULTS)}")
    values = {**DEFAULTS, **options}
    if values["r"] < 1 or not values["alpha"] > 0 or not 0 <= values["dropout"] < 1:
        raise ValueError(
            f"lora needs r of at least 1, a positive alpha and a dropout in [0, 1), got {values['r']}, "
            f"{values['alpha']} and {values['dropout']}"
        )
    targets = list(values["targets"])
    ends = {name.rpartition(".")[2] for name, _ in network.named_modules()}
    missing = [name for name in targets if name not in ends]
    if missing or not targets:
        linear = sorted({n.rpartition(".")[2] for n, m in network.named_modules() if type(m).__name__ == "Linear"})
        raise ValueError(f"no layer is called {', '.join(missing)}: lora's targets can be {', '.join(linear)}")
    config = peft.LoraConfig(
        r=values["r"],
        lora_alpha=values["alpha"],
        lora_dropout=values["dropout"],
        target_modules=targets,
        task_type="CAUSAL_LM",
        bias="none",
    )
    wrapped: nn.Module = peft.get_peft_model(network, config)
    return wrapped


def export_adapter(network: nn.Module, folder: str | Path) -> Path:
    """Write the adapters of `add_lora` in peft's format.

    Raises:
        ValueError: If the network has none.
    """
    writer: Any = network
    if not hasattr(network, "peft_config"):
        raise ValueError("the network has no adapter to export: it was built without lora")
    folder = Path(folder)
    writer.save_pretrained(folder)
    return folder


def peft_library() -> ModuleType:
    """The module `peft`.

    Raises:
        ImportError: If it is not installed; the message says how to install it.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            "lora needs peft: pip install 'lightning-method-zoo[hub]', or train all weights with lora=None"
        ) from error
    module: ModuleType = peft
    return module


def _loaded(peft: Any, network: nn.Module, folder: Path) -> nn.Module:
    missing = [name for name in ("adapter_config.json", "adapter_model.safetensors") if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"the folder {folder} has no {' and no '.join(missing)}: give one that peft's save_pretrained wrote"
        )
    path = folder / "adapter_config.json"
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("peft_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a JSON object ({error})") from error
    if kind != "LORA":
        raise ValueError(f"{path} is of an adapter of the kind {kind!r}, and not LORA")
    try:
        wrapped: nn.Module = peft.PeftModel.from_pretrained(network, folder, is_trainable=True)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the adapter in {folder} does not fit the network: {error}") from error
    return wrapped
