"""Scoring the options of a question by a masked language model, with or without fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zoo.common.hyperparameters import plain_hyperparameters
from zoo.summary_mrc.choice_module import ChoiceModule, check_length
from zoo.summary_mrc.encoders import build_text_encoder
from zoo.summary_mrc.slot_scorer import MaskedSlotScorer

if TYPE_CHECKING:
    from torch import Tensor

    from zoo.summary_mrc.types import SlotBatch


class ClozeScorer(ChoiceModule):
    """Masked-LM scoring: the log-probability of each option at mask tokens in the slot, one pass per question.

    With a pre-trained network it answers without training: `train.py test` in place of `train.py fit`.

    Args:
        encoder: "tiny", a local folder, a hub id, or a config (a mapping with `model_type`) for fresh weights; with a
            masked language model's head.
        pretrained: Whether to load the weights of a folder or hub id, or only its config.
        encoder_options: Options of "tiny" (see `build_text_encoder`).
        vocab_size: Size of the tokenizer's vocabulary.
        num_options: Options K of every question.
        encode: Layout of the data, "cloze"; its `masks` says whether all word pieces of an option are scored.
        lr: Highest learning rate of AdamW.
        weight_decay: Decoupled; not on biases and norms.
        warmup_ratio: Share of the steps in which the rate rises; it falls to 0 in the others.
        label_smoothing: Of the cross-entropy over options.
        gradient_checkpointing: Whether the encoder computes activations anew in the backward pass.

    Raises:
        ValueError: If an option is out of its range, or the data has another layout.
    """

    def __init__(
        self,
        encoder: str | dict[str, Any] = "google-bert/bert-large-uncased",
        pretrained: bool = True,
        encoder_options: dict[str, Any] | None = None,
        vocab_size: int | None = None,
        num_options: int = 5,
        encode: str = "cloze",
        lr: float = 1e-5,
        weight_decay: float = 0.01,
        warmup_ratio: float = 0.1,
        label_smoothing: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(num_options, lr, weight_decay, warmup_ratio, label_smoothing)
        self.save_hyperparameters(ignore=plain_hyperparameters({"encoder": encoder}))
        if encode != "cloze":
            raise ValueError(f"ClozeScorer needs --data.encode cloze, got {encode!r}")
        network = build_text_encoder(
            encoder,
            vocab_size=vocab_size,
            pretrained=pretrained,
            options=encoder_options,
            head="masked_lm",
            gradient_checkpointing=gradient_checkpointing,
        )
        self.scorer = MaskedSlotScorer(network)
        # A test without a checkpoint of ours is then what is meant.
        self.answers_untrained = pretrained and isinstance(encoder, str) and encoder != "tiny"

    def setup(self, stage: str) -> None:
        """Check that the data's sequences fit the encoder."""
        check_length(self, self.scorer.network)

    def forward(self, batch: SlotBatch) -> Tensor:
        """Scores `(batch, options)`, mean log-probabilities of an option's tokens."""
        scores: Tensor = self.scorer(
            batch.input_ids,
            batch.attention_mask,
            batch.token_type_ids,
            batch.mask_index,
            batch.sequence_of,
            batch.option_ids,
        )
        return scores
