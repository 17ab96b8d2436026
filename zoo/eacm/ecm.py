"""ECM (Zhou et al. 2018, arXiv 1704.01074): a chat machine that is told the emotion of its reply."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.common.distributed import global_mean
from zoo.eacm.decoder import EmotionDecoder, Setting
from zoo.eacm.dialogue_module import EVALUATION, Emotion
from zoo.eacm.encoder import PostEncoder
from zoo.eacm.gold import gold_shares, known_gold
from zoo.eacm.lexicon import EmotionLexicon
from zoo.eacm.likelihood import summed_nll
from zoo.eacm.memories import ExternalMemory, InternalMemory
from zoo.eacm.recurrent_module import RecurrentDialogue
from zoo.eacm.types import GO_ID, Scored

if TYPE_CHECKING:
    from zoo.eacm.decoding import State
    from zoo.eacm.types import Dialogues


class Told(NamedTuple):
    """What the decoder makes of given replies.

    Attributes:
        outputs: `(batch, reply length, 2 * hidden_size)`, last state and context at each word.
        memory: `(batch, memory_size)`, what is left of the internal memory after each reply's own last word; None
            without one.
    """

    outputs: Tensor
    memory: Tensor | None


class ECM(RecurrentDialogue):
    """Emotional chatting machine: replies to a post with an emotion that it is given, in training the true one.

    The emotion has a vector that is part of the decoder's input (a linear part of the first layer's gates, as that of
    the previous word). The internal memory is an emotion that words use up (`InternalMemory`), the external memory a
    choice between words of the emotion and all others (`ExternalMemory`). The loss is
    `L_gen + memory_weight ||M_last||^2 + choice_weight L_choice`: the mean over replies of what is left of the internal
    memory after their last word, and the mean over words of `-log P(choice)`; the choice is in `L_gen` as well, which
    is the likelihood of the mixture.

    A reply may be asked for with a distribution over emotions: vector and internal memory are its soft sums, as in the
    EACM; the words of the external memory are those of its likeliest class. The published code takes the first
    sample's emotion for the words of a whole batch; here each has its own.

    Args:
        post_vocab_size: Words of posts; given by the data.
        reply_vocab_size: Words of replies; given by the data.
        num_emotions: Number of emotions; given by the data.
        hidden_size: Size of all states.
        num_layers: Layers of the encoder and of the decoder.
        embedding_size: Size of word vectors.
        emotion_size: Size of the emotion vector.
        memory_size: Size of the internal memory.
        internal_memory: Whether there is one.
        external_memory: Whether there is one.
        memory_weight: Weight of the penalty on what is left of the internal memory.
        choice_weight: Weight of the loss of the choice of emotion words; 0 for none.
        emotion_words: Words of the external memory: "default" for a small English list (`DEFAULT_WORDS`), or a file of
            lines `word<TAB>emotion`. A checkpoint holds them. They may differ from the test's `lexicon`.
        emotion_head: "softmax" (several true emotions share) or "sigmoid" (each counts in full).
        cell: "ecm" (the state is reset before its product) or "torch" (after it).
        dropout: On word vectors, between layers and before the output layer.
        **options: Those of `DialogueModule`.

    Raises:
        ValueError: If an argument is out of its range or unknown.
    """

    takes_emotions = True

    def __init__(
        self,
        post_vocab_size: int,
        reply_vocab_size: int,
        num_emotions: int = 6,
        hidden_size: int = 256,
        num_layers: int = 2,
        embedding_size: int = 200,
        emotion_size: int = 100,
        memory_size: int = 256,
        internal_memory: bool = True,
        external_memory: bool = True,
        memory_weight: float = 1.0,
        choice_weight: float = 1.0,
        emotion_words: str = "default",
        emotion_head: str = "softmax",
        cell: str = "ecm",
        dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(num_emotions=num_emotions, emotion_head=emotion_head, **options)
        sizes = {
            "post_vocab_size": post_vocab_size, "reply_vocab_size": reply_vocab_size, "hidden_size": hidden_size,
            "num_layers": num_layers, "embedding_size": embedding_size, "emotion_size": emotion_size,
            "memory_size": memory_size,
        }  # fmt: skip
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        if memory_weight < 0 or choice_weight < 0:
            raise ValueError(
                f"memory_weight and choice_weight must be at least 0, got {memory_weight} and {choice_weight}"
            )
        if emotion_head not in ("softmax", "sigmoid"):
            raise ValueError(f"emotion_head must be one of softmax, sigmoid, got {emotion_head!r}")
        self.save_hyperparameters(ignore=EVALUATION)
        self.memory_weight, self.choice_weight, self.emotion_words = memory_weight, choice_weight, emotion_words
        self.emotion_vectors = nn.Linear(num_emotions, emotion_size, bias=False)
        nn.init.normal_(self.emotion_vectors.weight, std=emotion_size**-0.5)
        self.encoder = PostEncoder(post_vocab_size, embedding_size, hidden_size, num_layers, dropout)
        self.decoder = EmotionDecoder(
            reply_vocab_size, embedding_size, hidden_size, num_layers, emotion_size, cell, gate_bias=True,
            attention_bias=False, dropout=dropout,
        )  # fmt: skip
        self.internal = (
            InternalMemory(num_emotions, memory_size, embedding_size, hidden_size) if internal_memory else None
        )
        self.external = ExternalMemory(num_emotions, reply_vocab_size, hidden_size) if external_memory else None

    def setup(self, stage: str) -> None:
        """Take the words of the datamodule, and find those of emotions among them.

        Raises:
            FileNotFoundError: If `emotion_words` is no file.
            RuntimeError: If there are no words.
            ValueError: If the model was trained with others, or no emotion has words.
        """
        super().setup(stage)
        if self.external is not None and not self.external.is_filled:
            self.find_emotion_words()

    def find_emotion_words(self) -> None:
        """Fill the external memory from `emotion_words` and the vocabulary."""
        assert self.external is not None
        tokenizer, names = self.vocabulary.reply, self.label_names
        default = self.emotion_words == "default"
        lexicon = EmotionLexicon.default(names) if default else EmotionLexicon.read(self.emotion_words, names)
        words = [tokenizer.id_to_token(index) for index in range(tokenizer.get_vocab_size())]
        self.external.fill(lexicon, words, first=GO_ID + 1)

    def word_table(self) -> Tensor:
        """The decoder's word vectors, `(reply_vocab_size, embedding_size)`."""
        return self.decoder.embedding.weight.detach()

    # The emotion.

    def steering(self, batch: Any, emotion: Emotion) -> Tensor:
        """The distribution that steers replies: the one asked for, or the true one.

        Raises:
            ValueError: If none is asked for, and a true one is not known.
        """
        asked = self.distribution(emotion, len(batch.post_ids))
        return known_gold(batch, self.emotion_head) if asked is None else asked

    # Replies.

    def _advance(
        self,
        parts: Tensor,
        gates: Tensor | None,
        states: Tensor,
        context: Tensor,
        memory: Tensor | None,
        setting: Setting,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One word on: the new states, context and internal memory."""
        if self.internal is not None and gates is not None and memory is not None:
            parts = parts + self.internal.read(gates, states[:, -1], context, memory)
        states, context, _ = self.decoder.step(parts, states, context, setting)
        if self.internal is not None and memory is not None:
            memory = self.internal.write(states[:, -1], memory)
        return states, context, memory

    def _parts(self, tokens: Tensor, setting: Setting) -> tuple[Tensor, Tensor | None]:
        """What words and emotion add to the first layer, and words to the gate that reads the internal memory."""
        vectors = self.decoder.dropout(self.decoder.embedding(tokens))
        parts = self.decoder.word_parts(vectors)
        assert setting.shift is not None
        parts = parts + (setting.shift if tokens.dim() == 1 else setting.shift[:, None])
        return parts, None if self.internal is None else self.internal.words(vectors)

    def tell(self, batch: Dialogues, emotion: Tensor) -> Told:
        """The decoder over the batch's own replies, steered by a distribution `(batch, num_emotions)`."""
        post, states = self.encoder(batch.post_ids, batch.post_mask)
        setting = self.decoder.setting(post, batch.post_mask, self.emotion_vectors(emotion))
        parts, gates = self._parts(batch.reply_in, setting)
        context = self.decoder.first(states, setting)
        memory = None if self.internal is None else self.internal.begin(emotion)
        tops, contexts, memories = [], [], []
        for place in range(parts.shape[1]):
            gate = None if gates is None else gates[:, place]
            states, context, memory = self._advance(parts[:, place], gate, states, context, memory, setting)
            tops.append(states[:, -1])
            contexts.append(context)
            if memory is not None:
                memories.append(memory)
        outputs = torch.cat((torch.stack(tops, 1), torch.stack(contexts, 1)), dim=-1)
        if not memories:
            return Told(outputs, None)
        left = torch.stack(memories, 1)
        last = (batch.reply_mask.sum(1) - 1).clamp(min=0)[:, None, None].expand(-1, 1, left.shape[-1])
        return Told(outputs, left.gather(1, last).squeeze(1))

    def _words(self, outputs: Tensor, labels: Tensor | None) -> Tensor:
        logits = self.decoder.logits(outputs)
        if self.external is None or labels is None:
            return logits
        return self.external.log_probabilities(logits, outputs[..., : self.decoder.readout.out_features], labels)

    def _labels(self, emotion: Tensor) -> Tensor | None:
        return None if self.external is None else self.external.labels(emotion)

    def score_replies(self, batch: Dialogues) -> Scored:
        """Likelihood of the batch's replies with their true emotions, with gradients."""
        emotion = gold_shares(batch, self.emotion_head)
        told, labels = self.tell(batch, emotion), self._labels(emotion)
        # Padding is never projected to words.
        rows = batch.reply_mask.nonzero()[:, 0]
        logits = self._words(told.outputs[batch.reply_mask], None if labels is None else labels[rows])
        nll = summed_nll(logits, batch.reply_out, batch.reply_mask)
        penalty = None
        if told.memory is not None and self.memory_weight:
            penalty = self.memory_weight * told.memory.float().square().sum(-1).mean()
        if self.external is not None and labels is not None and self.choice_weight:
            tops = told.outputs[..., : self.decoder.readout.out_features]
            losses, some = self.external.choice_losses(tops, batch.reply_out, labels)
            counted = batch.reply_mask & some[:, None]
            choice = self.choice_weight * global_mean(losses.flatten(), counted.flatten())
            penalty = choice if penalty is None else penalty + choice
        return Scored(nll, batch.reply_mask.sum(1), None, emotion, penalty)

    def forward(self, batch: Dialogues) -> dict[str, Tensor | None]:
        """Everything the model makes of a batch, steered by the true emotions.

        Returns:
            `logits` `(batch, reply length, reply_vocab_size)` (with the external memory: log-probabilities), and
            `memory` `(batch, memory_size)`, what is left of the internal one; None without.
        """
        emotion = gold_shares(batch, self.emotion_head)
        told = self.tell(batch, emotion)
        return {"logits": self._words(told.outputs, self._labels(emotion)), "memory": told.memory}

    def first_state(self, post_ids: Tensor, post_mask: Tensor, emotion: Tensor | None) -> State:
        """The state before the first word; what stays the same for all words is in it as well.

        Raises:
            ValueError: If there is no emotion.
        """
        if emotion is None:
            raise ValueError("an ECM replies with an emotion: pass emotion=, a distribution (posts, num_emotions)")
        post, states = self.encoder(post_ids, post_mask)
        setting = self.decoder.setting(post, post_mask, self.emotion_vectors(emotion))
        assert setting.shift is not None
        state = {"states": states, "context": self.decoder.first(states, setting), "shift": setting.shift}
        state |= {"memory": setting.memory, "keys": setting.keys, "mask": setting.mask}
        if self.internal is not None:
            state["left"] = self.internal.begin(emotion)
        if self.external is not None:
            state["labels"] = self.external.labels(emotion)
        return state

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """One word on, for hypotheses."""
        setting = Setting(state["memory"], state["keys"], state["mask"], state["shift"])
        parts, gates = self._parts(tokens, setting)
        states, context, left = self._advance(
            parts, gates, state["states"], state["context"], state.get("left"), setting
        )
        new = {**state, "states": states, "context": context}
        if left is not None:
            new["left"] = left
        return self._words(torch.cat((states[:, -1], context), dim=-1), state.get("labels")), new
