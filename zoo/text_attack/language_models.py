"""Language models of transformers as the body of a recommender: small and fresh, or of a checkpoint."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zoo.common.pretrained import load_pretrained, transformers_library

if TYPE_CHECKING:
    from collections.abc import Mapping


def build_decoder(name: str, options: Mapping[str, Any] | None, vocab_size: int) -> nn.Module:
    """A causal language model in train mode and float32.

    Args:
        name: "tiny" for a small Llama with fresh weights, or a folder or hub id.
        options: For "tiny" only: `hidden_size` (64), `num_layers` (2), `num_heads` (4), `intermediate_size` (128),
            `initializer_range` (`hidden_size ** -0.5`, from which a narrow network learns; published wide ones have
            0.02), `max_length` (2048).
        vocab_size: Tokens of "tiny".

    Raises:
        FileNotFoundError: If the folder lacks files, or the hub cannot be reached.
        ValueError: If an option is unknown or out of its range.
    """
    library = transformers_library()
    if name == "tiny":
        return _fresh(library.LlamaForCausalLM, _tiny_llama(library, vocab_size, **(options or {})))
    return _loaded(name, options, library.AutoModelForCausalLM)


def build_t5(name: str, options: Mapping[str, Any] | None, vocab_size: int) -> nn.Module:
    """A T5 with a language model's head, in train mode and float32.

    Args:
        name: "tiny" for a small one with fresh weights, or a folder or hub id.
        options: For "tiny" only: `hidden_size` (64), `num_layers` (2), `num_heads` (4), `intermediate_size` (128),
            `dropout` (0), `initializer_factor` (1).
        vocab_size: Tokens of "tiny".

    Raises:
        FileNotFoundError: If the folder lacks files, or the hub cannot be reached.
        ValueError: If an option is unknown or out of its range, or the network is no T5.
    """
    library = transformers_library()
    if name == "tiny":
        return _fresh(library.T5ForConditionalGeneration, _tiny_t5(library, vocab_size, **(options or {})))
    network = _loaded(name, options, library.AutoModelForSeq2SeqLM)
    config: Any = network.config
    if config.model_type not in ("t5", "mt5"):
        raise ValueError(f"{name} is a {config.model_type}: P5 needs a T5")
    return network


def num_tokens(network: nn.Module) -> int:
    """Rows of the table of token vectors."""
    model: Any = network
    return int(model.get_input_embeddings().num_embeddings)


def _fresh(kind: Any, config: Any) -> nn.Module:
    network: nn.Module = kind(config)
    return network.float().train()


def _loaded(name: str, options: Mapping[str, Any] | None, loader: Any) -> nn.Module:
    if options:
        raise ValueError(f"{', '.join(options)}: backbone_options are for 'tiny' only, {name} has its own config")
    network: nn.Module = load_pretrained(name, loader)
    return network.train()


def _check(build: Any, unknown: Mapping[str, Any], hidden_size: int, num_heads: int, **sizes: int) -> None:
    if unknown:
        known = [
            name for name in inspect.signature(build).parameters if name not in ("library", "vocab_size", "unknown")
        ]
        raise ValueError(f"the tiny backbone has no {', '.join(unknown)}; it has {', '.join(known)}")
    for name, size in {"hidden_size": hidden_size, "num_heads": num_heads, **sizes}.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if hidden_size % num_heads:
        raise ValueError(f"hidden_size ({hidden_size}) must be a multiple of num_heads ({num_heads})")


def _tiny_llama(
    library: Any,
    vocab_size: int,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    intermediate_size: int = 128,
    initializer_range: float | None = None,
    max_length: int = 2048,
    **unknown: Any,
) -> Any:
    _check(
        _tiny_llama, unknown, hidden_size, num_heads, num_layers=num_layers, intermediate_size=intermediate_size,
        max_length=max_length,
    )  # fmt: skip
    if hidden_size // num_heads % 2:
        raise ValueError(f"hidden_size / num_heads must be even, got {hidden_size} / {num_heads}")
    return library.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=max_length,
        initializer_range=hidden_size**-0.5 if initializer_range is None else initializer_range,
        attention_dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dtype=torch.float32,
    )


def _tiny_t5(
    library: Any,
    vocab_size: int,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    intermediate_size: int = 128,
    dropout: float = 0.0,
    initializer_factor: float = 1.0,
    **unknown: Any,
) -> Any:
    _check(_tiny_t5, unknown, hidden_size, num_heads, num_layers=num_layers, intermediate_size=intermediate_size)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    return library.T5Config(
        vocab_size=vocab_size,
        d_model=hidden_size,
        d_kv=hidden_size // num_heads,
        d_ff=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        dropout_rate=dropout,
        initializer_factor=initializer_factor,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
