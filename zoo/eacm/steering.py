"""What steers replies: a chosen emotion, the true one, or the one asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.common.keyed_random import keyed_uniform
from zoo.eacm.dialogue_module import DialogueModule, Emotion
from zoo.eacm.gold import gold_shares, known_gold

if TYPE_CHECKING:
    from zoo.eacm.selector import EmotionSelector, Selection
    from zoo.eacm.types import Dialogues


class SelectorSteering(DialogueModule):
    """A model of dialogue whose replies a selector may steer.

    Attributes:
        selector: Chooses emotions; None for a model that chooses none.
        emotion_source: "auto" and the like, "hard", "gold" or "none".
        gold_rate: Share of the training samples that are steered by the true emotion in place of the chosen one.
    """

    selector: EmotionSelector | None
    emotion_source: str
    gold_rate: float

    def choose(self, post_ids: Tensor, post_mask: Tensor) -> tuple[Selection, Tensor]:
        """What the selector makes of posts, and the distribution that steers their replies."""
        assert self.selector is not None
        selection = self.selector(post_ids, post_mask)
        shares = self.selector.probabilities(selection.reply_logits)
        if self.emotion_source == "hard":
            shares = F.one_hot(shares.argmax(-1), self.num_emotions).to(shares)
        return selection, shares

    def steering(self, batch: Any, emotion: Emotion) -> Tensor | None:
        """The distribution that steers replies: the one asked for, the chosen one, or the true one ("gold").

        Raises:
            ValueError: If an emotion is asked for and the model takes none, or it takes the true one, which is not
                known.
        """
        if not self.takes_emotions:
            if emotion is not None:
                raise ValueError("emotion_source='none' replies without an emotion: leave emotion out")
            return None
        asked = self.distribution(emotion, len(batch.post_ids))
        if asked is not None:
            return asked
        if self.chooses_emotions:
            return self.choose(batch.post_ids, batch.post_mask)[1]
        return known_gold(batch, self.emotion_head)

    def _steer(self, batch: Dialogues) -> tuple[Selection | None, Tensor | None]:
        if not self.takes_emotions:
            return None, None
        if not self.chooses_emotions:
            return None, gold_shares(batch, self.emotion_head)
        selection, shares = self.choose(batch.post_ids, batch.post_mask)
        if self.training and self.gold_rate > 0:
            gold = (keyed_uniform(batch.keys) < self.gold_rate) & batch.reply_emotion_known
            shares = torch.where(gold[:, None], gold_shares(batch, self.emotion_head), shares)
        return selection, shares
