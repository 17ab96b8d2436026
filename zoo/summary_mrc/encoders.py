"""Text encoders of transformers: built with fresh or pre-trained weights, saved, read back, and run.

A "base" encoder has no pooler, so that every weight has a gradient and none is random after loading.
"""

from __future__ import annotations

import copy
import inspect
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from zoo.common.pretrained import load_pretrained, transformers_library

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PretrainedConfig

_logger = logging.getLogger(__name__)

TINY_KINDS = ("bert", "electra", "albert", "roberta", "deberta-v2")


def build_text_encoder(
    name: str | Path | Mapping[str, Any] | PretrainedConfig,
    *,
    vocab_size: int | None = None,
    pretrained: bool = True,
    options: Mapping[str, Any] | None = None,
    head: Literal["base", "masked_lm"] = "base",
    max_length: int | None = None,
    pad_token_id: int | None = None,
    resize: bool = False,
    gradient_checkpointing: bool = False,
) -> nn.Module:
    """A text encoder in train mode and float32.

    Args:
        name: "tiny" for a small network; a folder of `save_text_encoder` or `save_pretrained`; a hub id; or a config,
            as a dict with `model_type` or as an object, for fresh weights. A checkpoint may have more than asked for:
            other heads are left out.
        vocab_size: Number of tokens of the tokenizer. Networks with fresh weights are made for it, unless their config
            is given and says otherwise; "tiny" needs it.
        pretrained: False for the config of a folder or hub id with fresh weights.
        options: For "tiny" only: `kind` ("bert", "electra", "albert", "roberta" or "deberta-v2"), `hidden_size` (64),
            `num_layers` (2), `num_heads` (4), `intermediate_size` (128), `max_length` (512), `dropout` (0.1),
            `initializer_range` (0.02, which suits wide networks; a narrow one learns faster from about
            `hidden_size ** -0.5`).
        head: "base" for the last hidden states, "masked_lm" for a network with a masked language model's head.
        max_length: Longest sequence that will come; None for no check.
        pad_token_id: The tokenizer's, for fresh weights; None for the config's ("tiny": 0).
        resize: Whether the embedding grows to a larger `vocab_size`; its new rows are random.
        gradient_checkpointing: Whether layers are computed again in the backward pass to save memory.

    Returns:
        The network of transformers; its `config` says sizes and special tokens.

    Raises:
        FileNotFoundError: If the folder lacks files, or the hub cannot be reached and its cache has nothing.
        ImportError: If transformers is missing.
        ValueError: If an option is unknown, the network does not take text, the weights do not fill it, or it is too
            small for `vocab_size` or `max_length`.
    """
    if head not in ("base", "masked_lm"):
        raise ValueError(f"head must be base or masked_lm, got {head!r}")
    library = transformers_library()
    if isinstance(name, (str, Path)):
        tiny, label = str(name) == "tiny", str(name)
    else:
        tiny, label = False, "the given config"
    if options and not tiny:
        raise ValueError(f"{', '.join(options)}: for the 'tiny' encoder only, {label} has its own config")

    weights = None
    if tiny:
        config = _tiny_config(library, vocab_size, pad_token_id, **(options or {}))
    elif isinstance(name, (str, Path)):
        config = _named(name, library.AutoConfig, weights=pretrained)
        if pretrained:
            weights = name
        else:
            config = _fresh(config, vocab_size, pad_token_id)
    elif hasattr(name, "to_dict"):
        config = copy.deepcopy(name)
    else:
        config = _config_of(library, dict(name), vocab_size, pad_token_id)
    network = _make(library, config, head, weights, label)
    _check_positions(network, label, max_length)
    _fit_vocabulary(network, label, vocab_size, resize)
    if gradient_checkpointing:
        if not getattr(network, "supports_gradient_checkpointing", False):
            raise ValueError(f"{type(network).__name__} has no gradient checkpointing: leave it off")
        # Its name up to transformers 5.23 is the second one.
        enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
        # The reentrant kind loses gradients of inputs that need none, and does not go with DDP.
        enable({"use_reentrant": False})
    out: nn.Module = network.train()
    return out


def encode(
    network: nn.Module, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
) -> Tensor:
    """Last hidden states `(batch, length, hidden_size)` of `build_text_encoder`'s network, with or without a head.

    Args:
        network: The network.
        input_ids: int64 `(batch, length)`.
        attention_mask: int64 or bool `(batch, length)`.
        token_type_ids: int64 `(batch, length)`; left out where the network has no more than one type (RoBERTa).
    """
    base: Any = getattr(network, "base_model", network)
    types = type_arguments(network, token_type_ids)
    states: Tensor = base(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state
    return states


def type_arguments(network: nn.Module, token_type_ids: Tensor | None) -> dict[str, Tensor]:
    """Token types as keyword arguments of a network: none where it has no more than one type."""
    config: Any = network.config
    if token_type_ids is None or getattr(config, "type_vocab_size", 0) < 2:
        return {}
    return {"token_type_ids": token_type_ids}


def save_text_encoder(network: nn.Module, folder: str | Path) -> Path:
    """Writes a network in float32, so that `build_text_encoder(folder)` gives the same outputs bit for bit.

    Args:
        network: One of `build_text_encoder`. A network with a masked language model's head is read back with its head
            or as a base.
        folder: Made if missing.

    Returns:
        The folder.
    """
    folder = Path(folder)
    if any(tensor.is_floating_point() and tensor.dtype != torch.float32 for tensor in network.state_dict().values()):
        network = copy.deepcopy(network).float()
    writer: Any = network
    writer.save_pretrained(folder)
    return folder


def max_positions(network: nn.Module) -> int | None:
    """Longest sequence that a network takes, or None where positions are relative and nothing limits it."""
    for module_name, module in network.named_modules():
        if module_name.rpartition(".")[2] == "position_embeddings" and isinstance(module, nn.Embedding):
            # Networks like RoBERTa count positions from the padding's id + 1.
            before = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - before
    config: Any = network.config
    limit = getattr(config, "max_position_embeddings", None)
    return None if limit is None or getattr(config, "relative_attention", False) else int(limit)


def _named(name: str | Path, loader: Any, **options: Any) -> Any:
    try:
        return load_pretrained(name, loader, **options)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}. Without a checkpoint: the encoder 'tiny' or a config gives fresh weights, and pretrained=False "
            "needs only the config.json of a folder"
        ) from error


def _tiny_config(
    library: Any,
    vocab_size: int | None,
    pad_token_id: int | None,
    kind: str = "bert",
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    intermediate_size: int = 128,
    max_length: int = 512,
    dropout: float = 0.1,
    initializer_range: float = 0.02,
    **unknown: Any,
) -> Any:
    if unknown:
        known = [option for option in inspect.signature(_tiny_config).parameters if option not in _NO_OPTIONS]
        raise ValueError(f"the tiny encoder has no {', '.join(unknown)}; it has {', '.join(known)}")
    if kind not in TINY_KINDS:
        raise ValueError(f"kind must be one of {', '.join(TINY_KINDS)}, got {kind!r}")
    if vocab_size is None:
        raise ValueError("the tiny encoder needs vocab_size, the number of tokens of the tokenizer")
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "intermediate_size": intermediate_size,
        "max_length": max_length,
    }
    for option, size in sizes.items():
        if size < 1:
            raise ValueError(f"{option} must be at least 1, got {size}")
    if hidden_size % num_heads:
        raise ValueError(f"hidden_size ({hidden_size}) must be a multiple of num_heads ({num_heads})")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    pad = 0 if pad_token_id is None else pad_token_id
    values: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": max_length,
        "initializer_range": initializer_range,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        "pad_token_id": pad,
    }
    if kind in ("albert", "electra"):
        values["embedding_size"] = hidden_size
    if kind == "roberta":
        # Published networks of this kind have one token type, the class's default has two.
        values |= {"max_position_embeddings": max_length + pad + 1, "type_vocab_size": 1}
    if kind == "deberta-v2":
        # As in the published networks of this kind: relative positions in log buckets, none added to the input.
        values |= {
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_buckets": 32,
            "position_biased_input": False,
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
        }
    return library.AutoConfig.for_model(kind, **values)


_NO_OPTIONS = ("library", "vocab_size", "pad_token_id", "unknown")


def _config_of(library: Any, values: dict[str, Any], vocab_size: int | None, pad_token_id: int | None) -> Any:
    kind = values.pop("model_type", None)
    if kind not in library.CONFIG_MAPPING:
        raise ValueError(
            f"the encoder's config has model_type {kind!r}; it must be one that transformers knows, such as "
            f"{', '.join(TINY_KINDS)}"
        )
    default = library.AutoConfig.for_model(kind)
    known = {*default.to_dict(), *default.attribute_map}
    unknown = [key for key in values if key not in known]
    if unknown:
        _logger.warning("%s has no %s: without effect", type(default).__name__, ", ".join(unknown))
    for key, value in {"vocab_size": vocab_size, "pad_token_id": pad_token_id}.items():
        if value is not None:
            values.setdefault(key, value)
    return library.AutoConfig.for_model(kind, **values)


def _fresh(config: Any, vocab_size: int | None, pad_token_id: int | None) -> Any:
    if vocab_size is not None:
        config.vocab_size = vocab_size
    if pad_token_id is not None:
        config.pad_token_id = pad_token_id
    return config


def _make(library: Any, config: Any, head: str, weights: str | Path | None, label: str) -> Any:
    mapping = library.MODEL_MAPPING if head == "base" else library.MODEL_FOR_MASKED_LM_MAPPING
    if type(config) not in mapping:
        what = "no masked language model" if head == "masked_lm" else "no network"
        raise ValueError(f"transformers has {what} of model_type {config.model_type!r}, which {label} is")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{label} ({config.model_type}) has an encoder and a decoder; give a network that has one stack"
        )
    kinds = mapping[type(config)]
    kind = kinds[0] if isinstance(kinds, tuple) else kinds
    if kind.main_input_name != "input_ids":
        raise ValueError(f"{label} is a {kind.__name__}, whose input is {kind.main_input_name}, not input_ids")
    if not hasattr(config, "hidden_size"):
        raise ValueError(f"the config of {label} ({config.model_type}) has no hidden_size: give the text network alone")
    options = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(kind.__init__).parameters else {}
    loader = library.AutoModel if head == "base" else library.AutoModelForMaskedLM
    if weights is not None:
        return _named(weights, loader, **options)
    return loader.from_config(config, dtype=torch.float32, **options)


def _check_positions(network: nn.Module, label: str, max_length: int | None) -> None:
    limit = max_positions(network)
    if max_length is not None and limit is not None and max_length > limit:
        raise ValueError(f"max_length is {max_length}, but {label} takes sequences of at most {limit} tokens: lower it")


def _fit_vocabulary(network: Any, label: str, vocab_size: int | None, resize: bool) -> None:
    size = network.get_input_embeddings().num_embeddings
    if vocab_size is None or vocab_size <= size:
        return
    if not resize:
        raise ValueError(
            f"the tokenizer has {vocab_size} tokens, the embedding of {label} has {size}: give the tokenizer that "
            "belongs to the encoder, or resize=True (on the command line --data.mark_option true) if tokens were added"
        )
    network.resize_token_embeddings(vocab_size, mean_resizing=False)
