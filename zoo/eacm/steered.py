"""Language models of transformers whose replies an emotion steers by a soft prefix (beyond the paper)."""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.common.evaluation import evaluation
from zoo.common.pretrained import load_pretrained, transformers_library
from zoo.eacm.backbones import (
    TINY,
    Pieces,
    ReplyTokenizer,
    config_values,
    first_words,
    last_to_end,
    named_backbone,
    read_tokenizer,
    surface_words,
    tiny_backbone,
)
from zoo.eacm.dialogue_module import EVALUATION, DialogueModule, Emotion
from zoo.eacm.likelihood import summed_nll
from zoo.eacm.selector import EmotionSelector
from zoo.eacm.steering import SelectorSteering
from zoo.eacm.types import EOS_ID, GO_ID, PAD_ID, UNK_ID, Answers, Scored

if TYPE_CHECKING:
    from zoo.eacm.evaluation_options import EvaluationOptions
    from zoo.eacm.types import Dialogues

SOURCES = ("auto", "gold", "none")


class SteeredLM(SelectorSteering, DialogueModule):
    """A language model that replies with an emotion, chosen as by the EACM and put before the post as a soft prefix.

    The distribution `e` over emotions of an `EmotionSelector` becomes `e W`, `prefix_length` vectors of the network's
    hidden size, which stand before the post: a causal model reads [prefix][post][separator][reply], an encoder and
    decoder [prefix][post] in its encoder. As in the EACM the sum is soft, so that the reply's likelihood trains the
    selector as well.

    The words that perplexity counts are those of the dialogue tokenizer, with the end of a reply, whatever tokens the
    network has: it compares models of different tokens. A network with a tokenizer of its own must spell words that the
    dialogue vocabulary does not know, blanks, and the letters' case: there its perplexity is an upper bound. Of a
    reply that was cut it sees the same words, without an end.

    Args:
        post_vocab_size: Words of posts; given by the data.
        reply_vocab_size: Words of replies; given by the data.
        num_emotions: Number of emotions; given by the data.
        backbone: "tiny" (a small Llama) or "tiny-seq2seq" (a small T5), with fresh weights over the dialogue's words,
            for which posts and replies must share a vocabulary; or a folder of `save_pretrained` with its tokenizer, or
            a hub id, of a causal model or an encoder and decoder, which reads the texts as written.
        backbone_options: Of a tiny one: `hidden_size` (64), `num_layers` (2), `num_heads` (4), `intermediate_size`
            (128), `dropout` (0).
        backbone_config: Config of a backbone with a name, for fresh weights: a checkpoint has it, so that it can be
            read where the folder is not in reach.
        prefix_length: Vectors of the prefix.
        freeze_backbone: Whether the network stays as it is, so that only prefix and selector learn.
        emotion_source: What steers the reply: "auto" (the selector), "gold" (the true emotion) or "none" (no prefix).
        gold_rate: Share of the training samples that the true emotion steers in place of the chosen one.
        emotion_head: "softmax" (one emotion at a time) or "sigmoid" (several).
        emotion_temperature: Of the softmax: below 1 the distribution is sharper than the logits say.
        hidden_size: Size of the selector's states.
        num_layers: Layers of each of its encoders.
        embedding_size: Size of their word vectors.
        dropout: Of the selector.
        max_tokens: Most tokens of a post for a tokenizer of the backbone's own; the last ones are kept.
        optimizer: "adamw", "adam" or "sgd".
        lr: Learning rate.
        **options: Those of `DialogueModule`; `max_length` and `no_repeat_ngram` count the network's tokens.

    Raises:
        FileNotFoundError: If the folder lacks files, or the hub cannot be reached.
        ValueError: If an argument is out of its range or unknown, or the checkpoint does not fit.
    """

    def __init__(
        self,
        post_vocab_size: int,
        reply_vocab_size: int,
        num_emotions: int = 6,
        backbone: str = "tiny",
        backbone_options: dict[str, Any] | None = None,
        backbone_config: dict[str, Any] | None = None,
        prefix_length: int = 4,
        freeze_backbone: bool = False,
        emotion_source: str = "auto",
        gold_rate: float = 0.0,
        emotion_head: str = "softmax",
        emotion_temperature: float = 1.0,
        hidden_size: int = 128,
        num_layers: int = 1,
        embedding_size: int = 128,
        dropout: float = 0.0,
        max_tokens: int = 128,
        optimizer: str = "adamw",
        lr: float = 1e-3,
        **options: Any,
    ) -> None:
        super().__init__(num_emotions=num_emotions, emotion_head=emotion_head, optimizer=optimizer, lr=lr, **options)
        if emotion_source not in SOURCES:
            raise ValueError(f"emotion_source must be one of {', '.join(SOURCES)}, got {emotion_source!r}")
        if emotion_head not in ("softmax", "sigmoid"):
            raise ValueError(f"emotion_head must be one of softmax, sigmoid, got {emotion_head!r}")
        sizes = {
            "post_vocab_size": post_vocab_size, "reply_vocab_size": reply_vocab_size, "prefix_length": prefix_length,
            "hidden_size": hidden_size, "num_layers": num_layers, "embedding_size": embedding_size,
            "max_tokens": max_tokens,
        }  # fmt: skip
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        for name, share in (("dropout", dropout), ("gold_rate", gold_rate)):
            if not 0 <= share <= 1 or (name == "dropout" and share == 1):
                raise ValueError(f"{name} must be at least 0 and at most 1 (dropout below it), got {share}")
        if freeze_backbone and emotion_source == "none":
            raise ValueError("freeze_backbone=True with emotion_source='none' leaves nothing to learn")
        if backbone in TINY and backbone_config is not None:
            raise ValueError(f"backbone_config is for a folder or hub id, {backbone!r} takes backbone_options")
        if backbone not in TINY and backbone_options:
            raise ValueError(f"backbone_options are for {' and '.join(TINY)}, {backbone} has its own config")
        if backbone in TINY and post_vocab_size != reply_vocab_size:
            raise ValueError(
                f"backbone={backbone!r} reads posts and replies with one vocabulary, got post_vocab_size="
                f"{post_vocab_size} and reply_vocab_size={reply_vocab_size}: use share_vocab=True in the data"
            )
        self.emotion_source, self.gold_rate, self.is_tiny = emotion_source, gold_rate, backbone in TINY
        self.chooses_emotions, self.takes_emotions = emotion_source == "auto", emotion_source != "none"
        self.freeze_backbone, self.prefix_length, self.max_tokens = freeze_backbone, prefix_length, max_tokens
        if self.is_tiny:
            self.network: Any = tiny_backbone(backbone, reply_vocab_size, backbone_options)
        else:
            self.network = named_backbone(backbone, backbone_config)
        self.save_hyperparameters(ignore=EVALUATION)
        self.is_seq2seq = bool(getattr(self.network.config, "is_encoder_decoder", False))
        self._tokenizer: ReplyTokenizer | None = None
        if not self.is_tiny:
            if backbone_config is None:
                self._take_tokenizer(load_pretrained(backbone, transformers_library().AutoTokenizer, weights=False))
            self.hparams["backbone_config"] = config_values(self.network)
        if freeze_backbone:
            self.network.requires_grad_(False)
        self.selector = (
            EmotionSelector(
                post_vocab_size, num_emotions, hidden_size, num_layers, embedding_size, head=emotion_head,
                temperature=emotion_temperature, dropout=dropout,
            )
            if self.chooses_emotions
            else None
        )  # fmt: skip
        words = self.network.get_input_embeddings()
        self.prefix: nn.Linear | None = None
        if self.takes_emotions:
            self.prefix = nn.Linear(num_emotions, prefix_length * words.weight.shape[1], bias=False)
            # As large as the words that it stands among.
            nn.init.normal_(self.prefix.weight, std=float(words.weight.detach().std()))

    def train(self, mode: bool = True) -> SteeredLM:
        """Training mode; a frozen network stays in evaluation mode."""
        super().train(mode)
        if self.freeze_backbone:
            self.network.eval()
        return self

    # Words.

    def _take_tokenizer(self, tokenizer: Any) -> None:
        start = self._start_id()
        self._tokenizer = ReplyTokenizer(tokenizer, self.is_seq2seq, start, self.max_tokens)
        count, rows = len(tokenizer), self.network.get_input_embeddings().num_embeddings
        if count > rows:
            raise ValueError(f"the tokenizer has {count} tokens, the backbone {rows}: give the one that belongs to it")

    def _start_id(self) -> int | None:
        """First input of a decoder behind an encoder."""
        if not self.is_seq2seq:
            return None
        config = self.network.config
        for source in (config, self.network.generation_config):
            for name in ("decoder_start_token_id", "bos_token_id"):
                if getattr(source, name, None) is not None:
                    return int(getattr(source, name))
        raise ValueError(f"the backbone ({config.model_type}) has no decoder_start_token_id")

    @property
    def tokenizer(self) -> ReplyTokenizer:
        """Tokens of a backbone with a name; a RuntimeError for a tiny one, or one of a config alone."""
        if self._tokenizer is None:
            raise RuntimeError("the backbone has no tokenizer of its own: load a checkpoint, or give its folder")
        return self._tokenizer

    def setup(self, stage: str) -> None:
        """Take the words of the datamodule.

        Raises:
            ValueError: If the model was trained with others, or they are not shared and a tiny backbone needs that.
        """
        super().setup(stage)
        known = self.vocabulary_
        if self.is_tiny and known is not None and known.post.get_vocab() != known.reply.get_vocab():
            raise ValueError("a tiny backbone reads posts and replies with one vocabulary: use share_vocab=True")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the words, and the backbone's own tokenizer."""
        super().on_save_checkpoint(checkpoint)
        if self._tokenizer is not None:
            checkpoint["backbone_tokenizer"] = self._tokenizer.to_text()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them back."""
        super().on_load_checkpoint(checkpoint)
        if "backbone_tokenizer" in checkpoint:
            self._take_tokenizer(read_tokenizer(checkpoint["backbone_tokenizer"]))

    def word_table(self) -> Tensor | None:
        """The network's word vectors `(reply_vocab_size, hidden size)`; None for tokens of its own."""
        if not self.is_tiny:
            return None
        table: Tensor = self.network.get_input_embeddings().weight.detach()
        return table

    def pieces(self, batch: Dialogues) -> Pieces:
        """Posts and replies in the network's tokens."""
        if self.is_tiny:
            return Pieces(batch.post_ids, batch.post_mask, batch.reply_in, batch.reply_out, batch.reply_mask)
        ended = batch.reply_out.eq(EOS_ID).any(1).tolist()
        replies = [
            text if end else first_words(self.vocabulary.reply, text, count)
            for text, end, count in zip(batch.reply_text, ended, batch.reply_mask.sum(1).tolist(), strict=True)
        ]
        own = self.tokenizer.pieces(batch.post_text, replies, ended)
        return Pieces(*(part.to(batch.post_ids.device) for part in own))

    def _posts(self, batch: Any) -> tuple[Tensor, Tensor]:
        if self.is_tiny:
            return batch.post_ids, batch.post_mask
        ids, mask = self.tokenizer.posts(batch.post_text)
        return ids.to(self.device), mask.to(self.device)

    def _inputs(self, ids: Tensor, mask: Tensor, shares: Tensor | None) -> tuple[Tensor, Tensor]:
        """Vectors `(batch, length, hidden size)` of the prefix and of tokens, and their mask."""
        vectors = self.network.get_input_embeddings()(ids)
        if self.prefix is None or shares is None:
            return vectors, mask
        prefix = self.prefix(shares).view(len(ids), self.prefix_length, -1)
        vectors = torch.cat((prefix.to(vectors.dtype), vectors), dim=1)
        return vectors, torch.cat((mask.new_ones(len(ids), self.prefix_length), mask), dim=1)

    # Replies.

    def reply_logits(self, pieces: Pieces, shares: Tensor | None) -> Tensor:
        """Logits `(batch, reply length, tokens)` of given replies.

        Args:
            pieces: Posts and replies.
            shares: The distribution `(batch, num_emotions)` that steers them; None without one.
        """
        if self.is_seq2seq:
            vectors, mask = self._inputs(pieces.post_ids, pieces.post_mask, shares)
            logits: Tensor = self.network(
                inputs_embeds=vectors, attention_mask=mask.long(), decoder_input_ids=pieces.reply_in, use_cache=False
            ).logits
            return logits
        # Padding between post and reply is no harm: it is masked, and the positions go on without it.
        ids = torch.cat((pieces.post_ids, pieces.reply_in), dim=1)
        vectors, mask = self._inputs(ids, torch.cat((pieces.post_mask, pieces.reply_mask), dim=1), shares)
        length = pieces.reply_in.shape[1]
        taken = inspect.signature(self.network.forward).parameters
        extra: dict[str, Any] = {}
        if "position_ids" in taken:
            extra["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
        if "logits_to_keep" in taken:
            extra["logits_to_keep"] = length
        logits = self.network(inputs_embeds=vectors, attention_mask=mask.long(), use_cache=False, **extra).logits
        return logits[:, -length:]

    def score_replies(self, batch: Dialogues) -> Scored:
        """Likelihood of the batch's replies, with gradients; `tokens` are words of the dialogue tokenizer."""
        selection, shares = self._steer(batch)
        pieces = self.pieces(batch)
        logits = self.reply_logits(pieces, shares)[pieces.reply_mask]
        nll = summed_nll(logits, pieces.reply_out, pieces.reply_mask)
        return Scored(nll, batch.reply_mask.sum(1), selection, shares)

    @torch.no_grad()
    def answer(self, batch: Any, emotion: Emotion = None, **options: Any) -> Answers:
        """Replies to posts, in words of the dialogue tokenizer; see `DialogueModule.answer`."""
        chosen = self.options.changed(**options)
        with evaluation(self), torch.autocast(batch.post_ids.device.type, enabled=False):
            steered = self.steering(batch, emotion)
            ids, mask = self._posts(batch)
            if self.is_tiny and not self.is_seq2seq:
                ids = torch.cat((ids, torch.full_like(ids[:, :1], GO_ID)), dim=1)
                mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
            elif not self.is_seq2seq:
                ids, mask = last_to_end(ids, mask)
            vectors, mask = self._inputs(ids, mask, steered)
            tokens, scores = self._decode(vectors, mask, chosen)
        words = [self._words(row) for row in tokens.tolist()]
        count = chosen.num_return
        rows = [words[low : low + count] for low in range(0, len(words), count)]
        return Answers(rows, scores.view(-1, count), steered)

    def _decode(self, vectors: Tensor, mask: Tensor, options: EvaluationOptions) -> tuple[Tensor, Tensor]:
        """Tokens `(posts * num_return, length)` and scores of replies, best first."""
        if options.decoding == "beam" and options.num_return > options.beam_size:
            raise ValueError(f"num_return must be at most beam_size={options.beam_size}, got {options.num_return}")
        beam, sample = options.decoding == "beam" and options.beam_size > 1, options.decoding == "sample"
        eos, pad, banned = self._special_ids()
        settings: dict[str, Any] = {
            "max_new_tokens": options.max_length, "do_sample": sample, "num_beams": options.beam_size if beam else 1,
            "num_return_sequences": options.num_return, "no_repeat_ngram_size": options.no_repeat_ngram,
            "repetition_penalty": 1.0, "eos_token_id": eos, "pad_token_id": pad, "suppress_tokens": banned or None,
        }  # fmt: skip
        if sample:
            settings |= {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
        if beam:
            settings |= {"length_penalty": options.length_penalty, "early_stopping": "never"}
        if self.is_seq2seq:
            settings["decoder_start_token_id"] = self._start_id()
        devices = [vectors.device] if vectors.is_cuda else []
        with torch.random.fork_rng(devices), warnings.catch_warnings():
            # That the post's n-grams do not count is what is meant.
            warnings.filterwarnings("ignore", message="Passing `no_repeat_ngram_size` with `inputs_embeds`")
            torch.manual_seed(options.seed)
            out = self.network.generate(
                inputs_embeds=vectors, attention_mask=mask.long(), return_dict_in_generate=True, output_scores=beam,
                output_logits=not beam, **settings,
            )  # fmt: skip
        tokens = out.sequences[:, 1:] if self.is_seq2seq else out.sequences
        if beam:
            return tokens, out.sequences_scores
        # The end counts, what comes after it does not.
        counted = tokens.eq(eos).cumsum(1) - tokens.eq(eos).long() == 0
        sums = torch.zeros(len(tokens), device=tokens.device)
        for place, logits in enumerate(out.logits):
            logs = logits.float().log_softmax(-1).gather(1, tokens[:, place, None]).squeeze(1)
            sums += torch.where(counted[:, place], logs, 0.0)
        scores = sums / counted.sum(1).clamp(min=1) ** options.length_penalty
        order = scores.view(-1, options.num_return).argsort(dim=1, descending=True, stable=True)
        start = torch.arange(0, len(tokens), options.num_return, device=tokens.device)
        flat = (order + start[:, None]).flatten()
        return tokens[flat], scores[flat]

    def _special_ids(self) -> tuple[int, int, list[int]]:
        if self.is_tiny:
            return EOS_ID, PAD_ID, [PAD_ID, UNK_ID, GO_ID]
        return self.tokenizer.eos_id, self.tokenizer.pad_id, self.tokenizer.banned

    def _words(self, tokens: list[int]) -> list[str]:
        eos = self._special_ids()[0]
        kept = tokens[: tokens.index(eos)] if eos in tokens else tokens
        if self.is_tiny:
            return self.vocabulary.reply_words(kept)
        return surface_words(self.vocabulary.reply, self.tokenizer.text(kept))
