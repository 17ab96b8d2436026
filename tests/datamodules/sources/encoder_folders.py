"""Tiny encoders of texts and images as folders of `save_pretrained`, and what they are given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from datamodules.sources.feature_encoders import encoded_features

if TYPE_CHECKING:
    from pathlib import Path

transformers = pytest.importorskip("transformers")

WORDS = ["red", "green", "blue", "cup", "toy", "chair", "soft", "hard"]
TEXTS = ["red cup", "green", "", "blue toy chair soft hard red cup", "soft toy", "unheard of"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def tokenizer(special: bool = True, pad: bool = True, **options: Any) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {token: index for index, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    if pad:
        options["pad_token"] = "[PAD]"
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **options)


def text_encoder(folder: Path, tokens: Any = None, seed: int = 0, positions: int = 20) -> Path:
    torch.manual_seed(seed)
    config = transformers.BertConfig(vocab_size=12, max_position_embeddings=positions, **SIZES)
    transformers.BertModel(config).save_pretrained(folder)
    (tokens or tokenizer()).save_pretrained(folder)
    return folder


def image_encoder(folder: Path, kind: str = "vit", size: int = 16) -> Path:
    torch.manual_seed(0)
    shape = {"image_size": size, "patch_size": 8}
    if kind == "vit":
        network = transformers.ViTModel(transformers.ViTConfig(**shape, **SIZES))
    elif kind == "classifier":
        network = transformers.ViTForImageClassification(transformers.ViTConfig(**shape, **SIZES))
    elif kind == "vision":
        network = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**shape, **SIZES))
    elif kind == "clip":
        text = {
            "vocab_size": 12,
            "max_position_embeddings": 20,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "pad_token_id": 0,
        }
        config = transformers.CLIPConfig(text_config={**SIZES, **text}, vision_config={**SIZES, **shape},
                                         projection_dim=24)  # fmt: skip
        network = transformers.CLIPModel(config)
    else:
        network = transformers.ResNetModel(
            transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        )
    network.save_pretrained(folder)
    exact = {"height": size, "width": size}
    processor = transformers.ViTImageProcessorPil(size=exact)
    if kind in ("vision", "clip"):
        processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=exact)
    processor.save_pretrained(folder)
    return folder


def pictures(items: int = 5, size: int = 12) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (items, size, size, 3), dtype=np.uint8)


def text_features(folder: Path, cache: Path, texts: list[str] = TEXTS, batch_size: int = 64) -> np.ndarray:
    return encoded_features("text", texts, str(folder), str(cache), batch_size)
