"""EACM (Wei et al. 2019, arXiv 2106.03044): a chat machine that chooses the emotion of its reply."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.common.checkpoints import load_checkpoint
from zoo.eacm.decoder import EmotionDecoder, Setting
from zoo.eacm.dialogue_module import EVALUATION
from zoo.eacm.encoder import PostEncoder
from zoo.eacm.recurrent_module import RecurrentDialogue, projected_nll
from zoo.eacm.selector import EmotionSelector
from zoo.eacm.steering import SelectorSteering
from zoo.eacm.types import Scored
from zoo.eacm.word_vectors import read_word_vectors

if TYPE_CHECKING:
    from zoo.eacm.decoder import Decoded
    from zoo.eacm.decoding import State
    from zoo.eacm.types import Dialogues

log = logging.getLogger(__name__)

SOURCES = ("none", "gold", "auto", "auto_nosem", "auto_noemo", "hard")
TABLES = ("emotion", "semantic", "post", "reply")
_READS = {"auto_nosem": "emotion", "auto_noemo": "semantic"}


class EACM(SelectorSteering, RecurrentDialogue):
    """Emotion-aware chat machine: reads how a post feels and what it says, chooses an emotion, and replies with it.

    The distribution `e` over emotions of an `EmotionSelector` becomes the emotion vector `V_e = e W_e`, a soft sum, so
    that the reply's likelihood trains the selector as well. It shifts the gates of the decoder's first layer and the
    query of its attention. The loss is `L_gen + lambda_emotion (L_post + L_reply)` (spec sections 2.2 to 2.4).

    Args:
        post_vocab_size: Words of posts; given by the data.
        reply_vocab_size: Words of replies; given by the data.
        num_emotions: Number of emotions; given by the data.
        hidden_size: Size of all states.
        num_layers: Layers of each encoder and of the decoder.
        embedding_size: Size of word vectors.
        emotion_size: Size of the emotion vector.
        emotion_source: What steers the reply: "auto" (EACM), "none" (a sequence-to-sequence model with attention),
            "gold" (the true emotion: the upper control), "auto_nosem" and "auto_noemo" (a selector without the
            semantic, or without the emotion encoder), "hard" (the likeliest emotion alone, which the reply's
            likelihood cannot train).
        emotion_head: "sigmoid" (several emotions at a time) or "softmax" (one).
        emotion_temperature: Of the softmax: below 1 the distribution is sharper than the logits say.
        gold_rate: Share of the training samples whose reply is steered by the true emotion in place of the chosen one
            (0 as published): for a decoder that has seen pure emotions when one is forced.
        cell: "ecm" (the state is reset before its product, as published) or "torch" (after it).
        gate_relu: Whether a ReLU stands in the fusion gate's sigmoid, as in the published code.
        attention_emotion_bias: Whether the emotion shifts the attention's query.
        decoder_emotion_bias: Whether it shifts the gates of the decoder's first layer.
        dropout: On word vectors, between layers, on pooled vectors and before the output layer.
        init_from: Checkpoint of a model without emotion (`Seq2Seq`) whose encoder and decoder this one begins with.
        **options: Those of `DialogueModule`.

    Raises:
        ValueError: If an argument is out of its range or unknown.
    """

    def __init__(
        self,
        post_vocab_size: int,
        reply_vocab_size: int,
        num_emotions: int = 6,
        hidden_size: int = 256,
        num_layers: int = 2,
        embedding_size: int = 200,
        emotion_size: int = 200,
        emotion_source: str = "auto",
        emotion_head: str = "sigmoid",
        emotion_temperature: float = 1.0,
        gold_rate: float = 0.0,
        cell: str = "ecm",
        gate_relu: bool = False,
        attention_emotion_bias: bool = True,
        decoder_emotion_bias: bool = True,
        dropout: float = 0.0,
        init_from: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_emotions=num_emotions, emotion_head=emotion_head, **options)
        if emotion_source not in SOURCES:
            raise ValueError(f"emotion_source must be one of {', '.join(SOURCES)}, got {emotion_source!r}")
        sizes = {
            "post_vocab_size": post_vocab_size, "reply_vocab_size": reply_vocab_size, "hidden_size": hidden_size,
            "num_layers": num_layers, "embedding_size": embedding_size, "emotion_size": emotion_size,
        }  # fmt: skip
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        for name, share in (("dropout", dropout), ("gold_rate", gold_rate)):
            if not 0 <= share <= 1 or (name == "dropout" and share == 1):
                raise ValueError(f"{name} must be at least 0 and at most 1 (dropout below it), got {share}")
        self.save_hyperparameters(ignore=[*EVALUATION, "init_from"])
        self.emotion_source, self.gold_rate = emotion_source, gold_rate
        self.chooses_emotions = emotion_source not in ("none", "gold")
        self.takes_emotions = emotion_source != "none"
        self.selector = (
            EmotionSelector(
                post_vocab_size, num_emotions, hidden_size, num_layers, embedding_size,
                _READS.get(emotion_source, "both"), gate_relu, emotion_head, emotion_temperature, dropout,
            )
            if self.chooses_emotions
            else None
        )  # fmt: skip
        self.emotion_vectors = nn.Linear(num_emotions, emotion_size, bias=False) if self.takes_emotions else None
        if self.emotion_vectors is not None:
            # Rows of W_e: of unit size in the mean, as those of an embedding.
            nn.init.normal_(self.emotion_vectors.weight, std=emotion_size**-0.5)
        self.encoder = PostEncoder(post_vocab_size, embedding_size, hidden_size, num_layers, dropout)
        self.decoder = EmotionDecoder(
            reply_vocab_size, embedding_size, hidden_size, num_layers, emotion_size if self.takes_emotions else 0,
            cell, decoder_emotion_bias, attention_emotion_bias, dropout,
        )  # fmt: skip
        if init_from is not None:
            self._begin_with(init_from)

    def _begin_with(self, path: str) -> None:
        weights = load_checkpoint(Path(path).expanduser())["state_dict"]
        own = self.state_dict()
        kept = {
            name: value
            for name, value in weights.items()
            if name.startswith(("encoder.", "decoder.")) and "emotion" not in name and name in own
        }
        wrong = [name for name, value in kept.items() if value.shape != own[name].shape]
        if wrong or not kept:
            raise ValueError(
                f"init_from: {path} does not fit: {', '.join(wrong[:3]) or 'it has no encoder and decoder'}; it must "
                "be a recurrent model of this room with the same sizes and words"
            )
        self.load_state_dict(kept, strict=False)
        log.info("%d tensors begin with those of %s", len(kept), path)

    def word_table(self) -> Tensor:
        """The decoder's word vectors, `(reply_vocab_size, embedding_size)`."""
        return self.decoder.embedding.weight.detach()

    def load_word_vectors(self, table: str, path: str | Path) -> float:
        """Begin with word vectors of a file.

        Args:
            table: "emotion" or "semantic" (of the selector's encoders), "post" or "reply".
            path: Text format, one word a line with its numbers; may be `.gz`.

        Returns:
            Share of the words that have a vector there; the others stay as they are.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the table is unknown or not there, or the vectors have another size than it.
        """
        encoders = {
            "emotion": getattr(self.selector, "emotion_encoder", None),
            "semantic": getattr(self.selector, "semantic_encoder", None),
            "post": self.encoder,
            "reply": self.decoder,
        }
        if table not in encoders:
            raise ValueError(f"table must be one of {', '.join(TABLES)}, got {table!r}")
        owner = encoders[table]
        if owner is None:
            raise ValueError(f"emotion_source={self.emotion_source!r} has no {table} encoder")
        tokenizer = self.vocabulary.reply if table == "reply" else self.vocabulary.post
        weight: Tensor = owner.embedding.weight
        words = [tokenizer.id_to_token(index) for index in range(len(weight))]
        vectors, known = read_word_vectors(path, words, weight.shape[1])
        with torch.no_grad():
            weight[known] = vectors[known].to(weight)
        return float(known.float().mean())

    @torch.no_grad()
    def attention_maps(self, batch: Dialogues) -> tuple[dict[str, Tensor], list[str], list[str]] | None:
        """Attention of the batch's longest reply over its post, with the emotion and with a vector of zeros for it."""
        row = int(batch.reply_mask.sum(1).argmax())
        words = [int(part[row].sum()) for part in (batch.reply_mask, batch.post_mask)]
        _, shares = self._steer(batch)
        maps = {}
        for title, used in (("with the emotion", shares), ("without it", None if shares is None else 0 * shares)):
            if used is None:
                title = "attention"
            if title not in maps:
                maps[title] = self.decode_given(batch, used).weights[row, : words[0], : words[1]].cpu()
        post = [self.vocabulary.post.id_to_token(token) for token in batch.post_ids[row, : words[1]].tolist()]
        return maps, post, self.vocabulary.reply_words(batch.reply_out[row, : words[0]].tolist())

    # The emotion.

    def _emotion_vector(self, shares: Tensor | None) -> Tensor | None:
        if self.emotion_vectors is None or shares is None:
            return None
        vector: Tensor = self.emotion_vectors(shares)
        return vector

    # Replies.

    def decode_given(self, batch: Dialogues, shares: Tensor | None) -> Decoded:
        """The decoder over the batch's own replies, steered by a distribution `(batch, num_emotions)`."""
        memory, states = self.encoder(batch.post_ids, batch.post_mask)
        setting = self.decoder.setting(memory, batch.post_mask, self._emotion_vector(shares))
        decoded: Decoded = self.decoder(batch.reply_in, states, setting, batch.reply_mask)
        return decoded

    def score_replies(self, batch: Dialogues) -> Scored:
        """Likelihood of the batch's replies, with gradients."""
        selection, shares = self._steer(batch)
        decoded = self.decode_given(batch, shares)
        nll = projected_nll(self.decoder, decoded.outputs, batch.reply_out, batch.reply_mask)
        return Scored(nll, batch.reply_mask.sum(1), selection, shares)

    def forward(self, batch: Dialogues) -> dict[str, Tensor | None]:
        """Everything the model makes of a batch.

        Returns:
            `logits` `(batch, reply length, reply_vocab_size)`, `post_emotion_logits` and `reply_emotion_logits`
            `(batch, num_emotions)` and `gate` `(batch, hidden_size)`, None where the model has none.
        """
        selection, shares = self._steer(batch)
        return {
            "logits": self.decoder.logits(self.decode_given(batch, shares).outputs),
            "post_emotion_logits": None if selection is None else selection.post_logits,
            "reply_emotion_logits": None if selection is None else selection.reply_logits,
            "gate": None if selection is None else selection.gate,
        }

    def first_state(self, post_ids: Tensor, post_mask: Tensor, emotion: Tensor | None) -> State:
        """The state before the first word; what stays the same for all words is in it as well."""
        memory, states = self.encoder(post_ids, post_mask)
        setting = self.decoder.setting(memory, post_mask, self._emotion_vector(emotion))
        state = {"states": states, "context": self.decoder.first(states, setting)}
        state |= {"memory": setting.memory, "keys": setting.keys, "mask": setting.mask}
        return state if setting.shift is None else {**state, "shift": setting.shift}

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """One word on, for hypotheses."""
        setting = Setting(state["memory"], state["keys"], state["mask"], state.get("shift"))
        parts = self.decoder.parts_of(tokens, setting)
        states, context, _ = self.decoder.step(parts, state["states"], state["context"], setting)
        logits = self.decoder.logits(torch.cat((states[:, -1], context), dim=-1))
        return logits, {**state, "states": states, "context": context}


class Seq2Seq(EACM):
    """A sequence-to-sequence model with attention, without any emotion: `EACM` with `emotion_source="none"`.

    Args:
        post_vocab_size: Words of posts; given by the data.
        reply_vocab_size: Words of replies; given by the data.
        num_emotions: Number of emotions of the data, for what is measured of the replies.
        **options: Those of `EACM`.
    """

    def __init__(self, post_vocab_size: int, reply_vocab_size: int, num_emotions: int = 6, **options: Any) -> None:
        super().__init__(post_vocab_size, reply_vocab_size, num_emotions, emotion_source="none", **options)
        # No argument of this class: loading a checkpoint would hand it over.
        self.hparams.pop("emotion_source", None)


class EmoEmb(EACM):
    """A sequence-to-sequence model that is told the emotion of its reply: `EACM` with `emotion_source="gold"`.

    Args:
        post_vocab_size: Words of posts; given by the data.
        reply_vocab_size: Words of replies; given by the data.
        num_emotions: Number of emotions; given by the data.
        **options: Those of `EACM`.
    """

    def __init__(self, post_vocab_size: int, reply_vocab_size: int, num_emotions: int = 6, **options: Any) -> None:
        super().__init__(post_vocab_size, reply_vocab_size, num_emotions, emotion_source="gold", **options)
        # No argument of this class: loading a checkpoint would hand it over.
        self.hparams.pop("emotion_source", None)
