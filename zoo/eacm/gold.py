"""True emotions in the place of chosen ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def gold_shares(batch: Any, head: str) -> Tensor:
    """The true emotions of replies as distributions, float32 `(batch, num_emotions)`; zeros where they are unknown.

    Args:
        batch: Has `reply_emotion` and `reply_emotion_known`.
        head: "sigmoid" for the multi-hot vector itself, "softmax" for equal shares of it.
    """
    gold: Tensor = batch.reply_emotion.float() * batch.reply_emotion_known[:, None]
    return gold if head == "sigmoid" else gold / gold.sum(-1, keepdim=True).clamp(min=1)


def known_gold(batch: Any, head: str) -> Tensor:
    """`gold_shares` of posts to reply to.

    Raises:
        ValueError: If one of them is not known.
    """
    if not bool(batch.reply_emotion_known.all()):
        raise ValueError(
            "this model replies with the true emotion, which these posts lack: pass emotion=, or use a model that "
            "chooses the emotion (emotion_source='auto')"
        )
    return gold_shares(batch, head)
