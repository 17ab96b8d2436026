"""CMMixer: a cross-modal mixer and masked autoencoder, and the video-audio retriever that starts from it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo.cmmixer.action_head import ActionHead
    from zoo.cmmixer.export import build_encoder, load_encoder, save_encoder
    from zoo.cmmixer.layer_decay import layer_decay_groups
    from zoo.cmmixer.losses import retrieval_loss, triplet_loss
    from zoo.cmmixer.masked_autoencoder import MaskedAutoencoder, Reconstruction
    from zoo.cmmixer.metrics import CrossModalRetrieval
    from zoo.cmmixer.mixer import CrossModalMixer, MixInfo
    from zoo.cmmixer.module import MixerMAE
    from zoo.cmmixer.positions import grid_positions
    from zoo.cmmixer.retriever import AVRetriever
    from zoo.cmmixer.towers import DualTower
    from zoo.cmmixer.vit import ViTEncoder
    from zoo.cmmixer.wide import from_wide, patchify, to_wide, unpatchify

_HOMES = {
    "AVRetriever": "retriever",
    "ActionHead": "action_head",
    "CrossModalMixer": "mixer",
    "CrossModalRetrieval": "metrics",
    "DualTower": "towers",
    "MaskedAutoencoder": "masked_autoencoder",
    "MixInfo": "mixer",
    "MixerMAE": "module",
    "Reconstruction": "masked_autoencoder",
    "ViTEncoder": "vit",
    "build_encoder": "export",
    "from_wide": "wide",
    "grid_positions": "positions",
    "layer_decay_groups": "layer_decay",
    "load_encoder": "export",
    "patchify": "wide",
    "retrieval_loss": "losses",
    "save_encoder": "export",
    "to_wide": "wide",
    "triplet_loss": "losses",
    "unpatchify": "wide",
}
__all__ = [
    "AVRetriever",
    "ActionHead",
    "CrossModalMixer",
    "CrossModalRetrieval",
    "DualTower",
    "MaskedAutoencoder",
    "MixInfo",
    "MixerMAE",
    "Reconstruction",
    "ViTEncoder",
    "build_encoder",
    "from_wide",
    "grid_positions",
    "layer_decay_groups",
    "load_encoder",
    "patchify",
    "retrieval_loss",
    "save_encoder",
    "to_wide",
    "triplet_loss",
    "unpatchify",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
