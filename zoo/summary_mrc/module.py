"""Summary-MRC: each option filled into the question, and the filled sentence matched with the passage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.common.hyperparameters import plain_hyperparameters
from zoo.summary_mrc.choice_module import ChoiceModule, check_length
from zoo.summary_mrc.encoders import build_text_encoder, encode
from zoo.summary_mrc.masked import at_least_float32, masked_mean
from zoo.summary_mrc.matching import KINDS, SummaryMatcher

if TYPE_CHECKING:
    from zoo.summary_mrc.types import PairBatch, SeparateBatch

MODES = ("fill", "concat", "concat_sep", "summary_only", "option_only")
FILLED = ("fill", "summary_only")
"""Modes whose second segment is the question with the option in its slot."""
LAYOUTS = ("joint", "separate")


class SummaryMRC(ChoiceModule):
    """Summary-MRC (Chen et al., SemEval 2021, arXiv 2105.12051): options are compared as whole summaries.

    The option is put into the question's slot, encoder and matcher compare the filled sentence with the passage, and
    one scorer is shared by all options. What is compared is decided by the data (`mode`, `encode`).

    Args:
        encoder: "tiny", a local folder, a hub id, or a config (a mapping with `model_type`) for fresh weights.
        pretrained: Whether to load the weights of a folder or hub id, or only its config.
        encoder_options: Options of "tiny" (see `build_text_encoder`).
        vocab_size: Size of the tokenizer's vocabulary.
        num_options: Options K of every question.
        mode: "fill" (the method), "concat" or "concat_sep" (option beside the question), "summary_only" (no passage) or
            "option_only".
        encode: "joint": passage and summary in one sequence per option; "separate": the passage once per question.
        with_passage: Whether there is a passage; by default in the first three modes.
        matcher: "comatch", "cls", "duma" or "mean" (see `SummaryMatcher`); "auto" is "comatch" with a passage and
            "mean" without one.
        match_dim: Width of "comatch"; the encoder's by default.
        match_heads: Attention heads of "duma".
        option_span: Whether the scorer sees the option's tokens in their slot by themselves: their mean state, and what
            the matcher compared it with; by default where there is a slot with an option in it.
        use_cls: Whether the scorer sees the first token's state.
        mark_option: Whether the data puts marker tokens round the option; the encoder's embedding grows by them.
        dropout: Before the scorer.
        lr: Highest learning rate of AdamW.
        weight_decay: Decoupled; not on biases and norms.
        warmup_ratio: Share of the steps in which the rate rises; it falls to 0 in the others.
        label_smoothing: Of the cross-entropy over options.
        gradient_checkpointing: Whether the encoder computes activations anew in the backward pass.
        option_chunk: Options that go through the network at a time; in training the activations of one chunk are kept
            at a time. Gradients are the same.

    Raises:
        ValueError: If options contradict each other or the data.
    """

    def __init__(
        self,
        encoder: str | dict[str, Any] = "google/electra-large-discriminator",
        pretrained: bool = True,
        encoder_options: dict[str, Any] | None = None,
        vocab_size: int | None = None,
        num_options: int = 5,
        mode: str = "fill",
        encode: str = "joint",
        with_passage: bool | None = None,
        matcher: str = "auto",
        match_dim: int | None = None,
        match_heads: int | None = None,
        option_span: bool | None = None,
        use_cls: bool = True,
        mark_option: bool = False,
        dropout: float = 0.1,
        lr: float = 1e-5,
        weight_decay: float = 0.01,
        warmup_ratio: float = 0.1,
        label_smoothing: float = 0.0,
        gradient_checkpointing: bool = False,
        option_chunk: int | None = None,
    ) -> None:
        super().__init__(num_options, lr, weight_decay, warmup_ratio, label_smoothing)
        self.save_hyperparameters(ignore=plain_hyperparameters({"encoder": encoder}))
        for name, value, allowed in (
            ("mode", mode, MODES),
            ("matcher", matcher, ("auto", *KINDS)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if encode not in LAYOUTS:
            raise ValueError(f"SummaryMRC needs --data.encode {' or '.join(LAYOUTS)}, got {encode!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        if option_chunk is not None and option_chunk < 1:
            raise ValueError(f"option_chunk must be at least 1, got {option_chunk}")
        passage = mode not in ("summary_only", "option_only") if with_passage is None else with_passage
        if matcher in ("comatch", "duma") and not passage:
            raise ValueError(f"matcher={matcher!r} matches with a passage, and mode={mode!r} has none: use cls or mean")
        if option_span and mode not in FILLED:
            raise ValueError(f"option_span needs the option in its slot: mode must be fill, got {mode!r}")
        self.mode, self.encode_layout, self.with_passage = mode, encode, passage
        self.option_span = mode in FILLED if option_span is None else option_span
        self.use_cls, self.option_chunk = use_cls, option_chunk
        self.encoder = build_text_encoder(
            encoder,
            vocab_size=vocab_size,
            pretrained=pretrained,
            options=encoder_options,
            resize=mark_option,
            gradient_checkpointing=gradient_checkpointing,
        )
        config: Any = self.encoder.config
        width = int(config.hidden_size)
        kind = ("comatch" if passage else "mean") if matcher == "auto" else matcher
        self.matcher = SummaryMatcher(kind, width, match_dim, match_heads)
        self.dropout = nn.Dropout(dropout)
        span_dim = (width + self.matcher.span_dim) * self.option_span
        # No bias: a number that all options share changes no probability, and has no gradient.
        self.scorer = nn.Linear(self.matcher.out_dim + width * use_cls + span_dim, 1, bias=False)

    def setup(self, stage: str) -> None:
        """Check that the data's sequences fit the encoder."""
        check_length(self, self.encoder)

    def forward(self, batch: PairBatch | SeparateBatch) -> Tensor:
        """Scores `(batch, options)` of a batch in the layout of `encode`, float32 also under autocast."""
        options = batch.summary_mask.shape[1]
        passage = self._passage(batch)
        chunk = self.option_chunk or options
        scores = []
        for start in range(0, options, chunk):
            part = slice(start, start + chunk)
            if chunk < options and torch.is_grad_enabled():
                # Kept: a chunk's inputs and scores; its activations come again, one chunk at a time.
                score: Tensor = checkpoint(self._score, batch, passage, part, use_reentrant=False)
            else:
                score = self._score(batch, passage, part)
            scores.append(score)
        return torch.cat(scores, 1)

    def _passage(self, batch: Any) -> Tensor | None:
        """States `(batch, length, width)` of the passages, where they have sequences of their own."""
        if self.encode_layout == "joint" or not self.with_passage:
            return None
        return encode(self.encoder, batch.passage_ids, batch.passage_attention_mask)

    def _states(self, batch: Any, passage: Tensor | None, part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Of the options of a slice, N = batch * options of them: states of the summary, its mask, states of the
        passage, its mask, and the state of the first token.
        """  # noqa: D205
        index, mask = batch.summary_index[:, part].flatten(0, 1), batch.summary_mask[:, part].flatten(0, 1)
        if self.encode_layout == "joint":
            ids, attended = batch.input_ids[:, part].flatten(0, 1), batch.attention_mask[:, part].flatten(0, 1)
            types = None if batch.token_type_ids is None else batch.token_type_ids[:, part].flatten(0, 1)
            states = encode(self.encoder, ids, attended, types)
            passage_states, passage_mask = states, batch.passage_mask[:, part].flatten(0, 1)
        else:
            ids = batch.summary_ids[:, part].flatten(0, 1)
            states = encode(self.encoder, ids, batch.summary_attention_mask[:, part].flatten(0, 1))
            passage_states, passage_mask = (states, mask) if passage is None else (passage, batch.passage_mask)
        summary = states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))
        return summary, mask, passage_states, passage_mask, states[:, 0]

    def _score(self, batch: Any, passage: Tensor | None, part: slice) -> Tensor:
        """Scores `(batch, options of the slice)`."""
        summary, mask, passage_states, passage_mask, first = self._states(batch, passage, part)
        span = batch.option_mask[:, part].flatten(0, 1) if self.option_span else None
        vectors = [self.matcher(summary, mask, passage_states, passage_mask, first=first, span=span)]
        if self.use_cls:
            vectors.append(first)
        if span is not None:
            vectors.append(masked_mean(summary, span).to(summary.dtype))
        vector = at_least_float32(self.dropout(torch.cat(vectors, -1)))
        # Not a matrix product, which autocast would round: scores in bfloat16 would often be ties.
        scores = (vector * self.scorer.weight[0]).sum(-1)
        return scores.view(len(batch.labels), -1)

    def attention(self, batch: Any) -> tuple[Tensor, Tensor, Tensor] | None:
        """Attention of the first question's summaries over its passage, where the matcher has one."""
        if not self.with_passage or not self.matcher.uses_passage:
            return None
        first = type(batch)(*(field[:1] if isinstance(field, Tensor) else field for field in batch))
        summary, mask, passage_states, passage_mask, _ = self._states(first, self._passage(first), slice(None))
        weights: Tensor = self.matcher.attention(summary, mask, passage_states, passage_mask)
        joint = self.encode_layout == "joint"
        source, ids = (first.input_ids, first.input_ids) if joint else (first.summary_ids, first.passage_ids[None])
        tokens = source[0].gather(1, first.summary_index[0]).masked_fill(~mask, -1)
        ids = ids[0].expand(len(mask), -1).masked_fill(~passage_mask.expand(len(mask), -1), -1)
        return tokens, ids, weights
