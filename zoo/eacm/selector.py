"""The emotion selector: which emotion a reply should have, from what a post says and how it feels."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.eacm.encoder import PostEncoder
from zoo.eacm.pooling import SelfAttentionPooling

if TYPE_CHECKING:
    from collections.abc import Sequence

HEADS = ("sigmoid", "softmax")
READINGS = ("both", "emotion", "semantic")


class Selection(NamedTuple):
    """What an `EmotionSelector` makes of posts.

    Attributes:
        post_logits: `(batch, num_emotions)` of the post's own emotion; None without the emotion encoder.
        reply_logits: `(batch, num_emotions)` of the reply's emotion.
        fused: `(batch, hidden_size)`, what the reply's emotion is chosen from.
        gate: `(batch, hidden_size)`, share of the semantic side in it; None with one encoder only.
        emotion_weights: float32 `(batch, length)`, attention over the post; None without that encoder.
        semantic_weights: float32 `(batch, length)`; None without that encoder.
    """

    post_logits: Tensor | None
    reply_logits: Tensor
    fused: Tensor
    gate: Tensor | None
    emotion_weights: Tensor | None
    semantic_weights: Tensor | None


class EmotionSelector(nn.Module):
    """Two readings of a post, pooled and fused by a gate (EACM, arXiv 2106.03044, emotion selector).

    With `h_e` and `h_s` the pooled states of the emotion and the semantic encoder, the post's emotion has the logits
    `W_p h_e + b_p`, the gate is `w = sigmoid(W_f [h_e; h_s] + b_f)`, and the reply's emotion has the logits
    `W_r ((1 - w) tanh(h_e) + w tanh(h_s)) + b_r`.

    Args:
        vocab_size: Number of words of posts.
        num_emotions: Number of classes.
        hidden_size: Size of the encoders' states.
        num_layers: Layers of each encoder.
        embedding_size: Size of word vectors; each encoder has its own.
        reads: "both" encoders, or "emotion" or "semantic" alone.
        gate_relu: Whether a ReLU stands in the gate's sigmoid as in the published code: no gate is below 0.5 then.
        head: "sigmoid" (several emotions at a time) or "softmax" (one).
        temperature: Of the softmax: below 1 the distribution is sharper than the logits say.
        dropout: In the encoders and on the fused vector.

    Raises:
        ValueError: If an argument is out of its range or unknown.
    """

    def __init__(
        self,
        vocab_size: int,
        num_emotions: int = 6,
        hidden_size: int = 256,
        num_layers: int = 2,
        embedding_size: int = 200,
        reads: str = "both",
        gate_relu: bool = False,
        head: str = "sigmoid",
        temperature: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"head must be one of {', '.join(HEADS)}, got {head!r}")
        if reads not in READINGS:
            raise ValueError(f"reads must be one of {', '.join(READINGS)}, got {reads!r}")
        if num_emotions < 2:
            raise ValueError(f"num_emotions must be at least 2, got {num_emotions}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.num_emotions, self.gate_relu, self.head, self.temperature = num_emotions, gate_relu, head, temperature

        def part() -> tuple[PostEncoder, SelfAttentionPooling]:
            encoder = PostEncoder(vocab_size, embedding_size, hidden_size, num_layers, dropout)
            return encoder, SelfAttentionPooling(hidden_size)

        self.emotion_encoder: PostEncoder | None = None
        self.semantic_encoder: PostEncoder | None = None
        self.emotion_pooling: SelfAttentionPooling | None = None
        self.semantic_pooling: SelfAttentionPooling | None = None
        if reads != "semantic":
            self.emotion_encoder, self.emotion_pooling = part()
        if reads != "emotion":
            self.semantic_encoder, self.semantic_pooling = part()
        self.post_head = nn.Linear(hidden_size, num_emotions) if reads != "semantic" else None
        self.gate = nn.Linear(2 * hidden_size, hidden_size) if reads == "both" else None
        self.reply_head = nn.Linear(hidden_size, num_emotions)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor, mask: Tensor) -> Selection:
        """Choose emotions.

        Args:
            ids: int64 `(batch, length)`, padded on the right.
            mask: bool `(batch, length)`, False on padding.
        """
        emotion = semantic = emotion_weights = semantic_weights = post_logits = gate = None
        if self.emotion_encoder is not None and self.emotion_pooling is not None:
            emotion, emotion_weights = self.emotion_pooling(self.emotion_encoder(ids, mask)[0], mask)
        if self.semantic_encoder is not None and self.semantic_pooling is not None:
            semantic, semantic_weights = self.semantic_pooling(self.semantic_encoder(ids, mask)[0], mask)
        if self.post_head is not None and emotion is not None:
            post_logits = self.post_head(self.dropout(emotion))
        if self.gate is not None and emotion is not None and semantic is not None:
            fused, gate = self.fuse(emotion, semantic)
        else:
            alone = semantic if emotion is None else emotion
            assert alone is not None
            fused = torch.tanh(alone)
        reply_logits = self.reply_head(self.dropout(fused))
        return Selection(post_logits, reply_logits, fused, gate, emotion_weights, semantic_weights)

    def fuse(self, emotion: Tensor, semantic: Tensor) -> tuple[Tensor, Tensor]:
        """The fusion network.

        Args:
            emotion: `(batch, hidden_size)`, pooled states of the emotion encoder.
            semantic: `(batch, hidden_size)`, those of the semantic encoder.

        Returns:
            The fused vector and the gate, both `(batch, hidden_size)`.
        """
        assert self.gate is not None
        raw = self.gate(torch.cat((emotion, semantic), dim=-1))
        gate = torch.sigmoid(F.relu(raw) if self.gate_relu else raw)
        return (1 - gate) * torch.tanh(emotion) + gate * torch.tanh(semantic), gate

    def probabilities(self, logits: Tensor) -> Tensor:
        """What logits `(batch, num_emotions)` say of each emotion, float32 of the same shape."""
        logits = logits.float()
        return torch.sigmoid(logits) if self.head == "sigmoid" else torch.softmax(logits / self.temperature, dim=-1)

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of each row, float32 `(batch,)`: the mean binary cross-entropy, or the cross-entropy of a softmax.

        Args:
            logits: `(batch, num_emotions)`.
            targets: float32 `(batch, num_emotions)`, multi-hot; the softmax shares itself among several.
        """
        return emotion_losses(logits, targets, self.head)


def emotion_losses(logits: Tensor, targets: Tensor, head: str) -> Tensor:
    """Loss of each row, float32 `(batch,)` (see `EmotionSelector.losses`)."""
    logits = logits.float()
    if head == "sigmoid":
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(-1)
    shares = targets / targets.sum(-1, keepdim=True).clamp(min=1)
    return -(shares * logits.log_softmax(-1)).sum(-1)


def class_index(name: str, label_names: Sequence[str]) -> int:
    """Class of a name.

    Raises:
        ValueError: If there is none.
    """
    if name not in label_names:
        raise ValueError(f"unknown emotion {name!r}: it must be one of {', '.join(label_names) or '(no names known)'}")
    return list(label_names).index(name)
