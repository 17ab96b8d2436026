"""Recurrent models of dialogue: the encoder of the post, and replies decoded step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.common.evaluation import evaluation
from zoo.eacm.decoding import decode
from zoo.eacm.dialogue_module import DialogueModule, Emotion
from zoo.eacm.types import EOS_ID, GO_ID, PAD_ID, UNK_ID, Answers

if TYPE_CHECKING:
    from zoo.eacm.decoder import EmotionDecoder
    from zoo.eacm.decoding import Replies, State
    from zoo.eacm.evaluation_options import EvaluationOptions


def reply_nll(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood of replies, float32 `(batch,)`.

    Args:
        logits: `(batch, length, vocab_size)`.
        labels: int64 `(batch, length)`.
        mask: bool `(batch, length)`, False on padding.
    """
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    return (losses.view(labels.shape) * mask).sum(1)


def projected_nll(decoder: EmotionDecoder, outputs: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """`reply_nll` of a decoder's outputs, of which padding is never projected to words.

    Args:
        decoder: Makes logits of outputs.
        outputs: `(batch, length, size)`.
        labels: int64 `(batch, length)`.
        mask: bool `(batch, length)`, False on padding.
    """
    logits = decoder.logits(outputs[mask])
    losses = F.cross_entropy(logits.float(), labels[mask], reduction="none")
    return losses.new_zeros(len(labels)).index_add(0, mask.nonzero()[:, 0], losses)


def decode_replies(model: Any, state: State, options: EvaluationOptions, keys: Tensor | None = None) -> Replies:
    """`decode` with the options of a module; PAD, UNK and GO are never said."""
    device = next(iter(state.values())).device
    generator = torch.Generator(device).manual_seed(options.seed) if options.decoding == "sample" else None
    return decode(
        model, state, go_id=GO_ID, eos_id=EOS_ID, banned=(PAD_ID, UNK_ID, GO_ID), max_length=options.max_length,
        method=options.decoding, beam_size=options.beam_size if options.decoding == "beam" else 1,
        num_return=options.num_return, length_penalty=options.length_penalty,
        no_repeat_ngram=options.no_repeat_ngram, temperature=options.temperature, top_k=options.top_k,
        top_p=options.top_p, generator=generator, keys=keys if options.decoding == "sample" else None,
    )  # fmt: skip


class RecurrentDialogue(DialogueModule):
    """A recurrent model of dialogue.

    A subclass has `score_replies`, `first_state`, `step` and `steering`.

    Args:
        **options: Those of `DialogueModule`.
    """

    def steering(self, batch: Any, emotion: Emotion) -> Tensor | None:
        """The distribution `(posts, num_emotions)` that steers the replies to a batch; None without one."""
        raise NotImplementedError

    def first_state(self, post_ids: Tensor, post_mask: Tensor, emotion: Tensor | None) -> State:
        """The state before the first word of replies to posts, steered by a distribution `(posts, num_emotions)`."""
        raise NotImplementedError

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Logits `(n, vocab_size)` of the words after `tokens` int64 `(n,)`, and the new state (see `decode`)."""
        raise NotImplementedError

    @torch.no_grad()
    def generate(
        self,
        post_ids: Tensor,
        post_mask: Tensor,
        emotion: Tensor | None = None,
        keys: Tensor | None = None,
        **options: Any,
    ) -> Replies:
        """Replies in ids.

        Args:
            post_ids: int64 `(posts, length)`, filled with 0 on the right.
            post_mask: bool `(posts, length)`.
            emotion: Distribution `(posts, num_emotions)` that steers them; None for a model that takes none.
            keys: int64 `(posts,)`: what a sampled reply depends on beside the seed; by default the post's row.
            **options: In place of the module's own (see `DialogueModule`): `decoding`, `beam_size`, ...
        """
        chosen = self.options.changed(**options)
        with evaluation(self), torch.autocast(post_ids.device.type, enabled=False):
            return decode_replies(self, self.first_state(post_ids, post_mask, emotion), chosen, keys)

    @torch.no_grad()
    def answer(self, batch: Any, emotion: Emotion = None, **options: Any) -> Answers:
        """Replies to posts, in words; see `DialogueModule.answer`."""
        with evaluation(self), torch.autocast(batch.post_ids.device.type, enabled=False):
            steered = self.steering(batch, emotion)
        replies = self.generate(batch.post_ids, batch.post_mask, steered, getattr(batch, "keys", None), **options)
        tokens, lengths = replies.tokens.tolist(), replies.lengths.tolist()
        words = [
            [self.vocabulary.reply_words(own[:length]) for own, length in zip(rows, counts, strict=True)]
            for rows, counts in zip(tokens, lengths, strict=True)
        ]
        return Answers(words, replies.scores, steered)
