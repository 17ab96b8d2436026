"""Two encoders with a projector each: clips and sounds as vectors of one space."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.cmmixer.vit import initialise, pooled

if TYPE_CHECKING:
    from zoo.cmmixer.vit import ViTEncoder

POOLS = ("mean", "cls")
PROJECTORS = ("linear_relu", "linear", "linear_bn", "mlp")


def build_projector(kind: str, hidden_size: int, proj_dim: int) -> nn.Module:
    """From pooled states `(batch, hidden_size)` to embeddings `(batch, proj_dim)`.

    Args:
        kind: "linear_relu" (the published code's), "linear", "linear_bn" (with batch normalisation), or "mlp" (linear,
            GELU, linear).
        hidden_size: Width of the encoder.
        proj_dim: Width of the embeddings.

    Raises:
        ValueError: If the kind is unknown or the width not positive.
    """
    if proj_dim < 1:
        raise ValueError(f"proj_dim must be positive, got {proj_dim}")
    projectors = {
        "linear_relu": lambda: nn.Sequential(nn.Linear(hidden_size, proj_dim), nn.ReLU()),
        "linear": lambda: nn.Sequential(nn.Linear(hidden_size, proj_dim)),
        "linear_bn": lambda: nn.Sequential(nn.Linear(hidden_size, proj_dim), nn.BatchNorm1d(proj_dim)),
        "mlp": lambda: nn.Sequential(nn.Linear(hidden_size, proj_dim), nn.GELU(), nn.Linear(proj_dim, proj_dim)),
    }
    if kind not in projectors:
        raise ValueError(f"projector must be one of {', '.join(PROJECTORS)}, got {kind!r}")
    projector = projectors[kind]()
    initialise(projector)
    return projector


class DualTower(nn.Module):
    """An encoder and a projector for each stream; the encoders start equal, the projectors do not.

    Args:
        encoder: What both towers start from.
        share_encoder: Whether they stay one encoder.
        freeze_encoder: Whether the encoders are not trained.
        pool: "mean" over the patches' states, or "cls"; a LayerNorm follows.
        projector: Kind of the projectors (see `build_projector`).
        proj_dim: Width of the embeddings.

    Raises:
        ValueError: If a name is unknown.
    """

    def __init__(
        self,
        encoder: ViTEncoder,
        share_encoder: bool = False,
        freeze_encoder: bool = False,
        pool: str = "mean",
        projector: str = "linear_relu",
        proj_dim: int = 2048,
    ) -> None:
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {pool!r}")
        self.pool, self.freeze_encoder = pool, freeze_encoder
        self.video_encoder = encoder
        self.audio_encoder = encoder if share_encoder else copy.deepcopy(encoder)
        width = encoder.hidden_size
        # Towers with different projectors: a projector is no part of what the streams have in common.
        self.video_head = nn.Sequential(nn.LayerNorm(width), build_projector(projector, width, proj_dim))
        self.audio_head = nn.Sequential(nn.LayerNorm(width), build_projector(projector, width, proj_dim))
        if freeze_encoder:
            for tower in self.encoders:
                tower.requires_grad_(False)

    @property
    def encoders(self) -> list[ViTEncoder]:
        """The encoders, one or two."""
        towers = [self.video_encoder, self.audio_encoder]
        return towers[:1] if self.video_encoder is self.audio_encoder else towers

    def _embed(self, clips: Tensor, encoder: ViTEncoder, head: nn.Module) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_encoder):
            states = pooled(encoder(clips), self.pool)
        # Not under autocast: embeddings of half precision have similarities that are often ties in a large gallery.
        with torch.autocast(clips.device.type, enabled=False):
            weights = next(head.parameters())
            return F.normalize(head(states.to(weights.dtype)), dim=1)

    def encode_video(self, clips: Tensor) -> Tensor:
        """Embeddings `(batch, proj_dim)` of unit length of clips `(batch, T, channels, height, width)`."""
        return self._embed(clips, self.video_encoder, self.video_head)

    def encode_audio(self, clips: Tensor) -> Tensor:
        """Embeddings `(batch, proj_dim)` of unit length of pictures of sound, of the same shape as the clips."""
        return self._embed(clips, self.audio_encoder, self.audio_head)
