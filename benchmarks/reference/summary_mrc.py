"""Peers' ways with multiple-choice cloze questions: a pair of texts at a time, and logits at every place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

PLACEHOLDER = "@placeholder"


class PlainPairs:
    """Questions tokenised option by option, and batches put together from lists.

    Args:
        articles: The passage of each question.
        questions: Each with one placeholder.
        options: Options of each question.
        tokenizer: A fast tokenizer of transformers.
        max_length: Longest sequence; passages are cut to it.
    """

    def __init__(
        self,
        articles: Sequence[str],
        questions: Sequence[str],
        options: Sequence[Sequence[str]],
        tokenizer: Any,
        max_length: int = 512,
    ) -> None:
        self.pad = tokenizer.pad_token_id
        self.samples = [
            [self._pair(tokenizer, article, question, option, max_length) for option in choices]
            for article, question, choices in zip(articles, questions, options, strict=True)
        ]

    @staticmethod
    def _pair(tokenizer: Any, article: str, question: str, option: str, max_length: int) -> dict[str, list[int]]:
        """The sequence of one option, and where passage, summary and option stand in it."""
        start = question.index(PLACEHOLDER)
        summary = question.replace(PLACEHOLDER, option)
        encoding = tokenizer(
            article, summary, truncation="only_first", max_length=max_length, return_offsets_mapping=True
        )
        segments = encoding.sequence_ids(0)
        places = [place for place, segment in enumerate(segments) if segment == 1]
        spans = [encoding["offset_mapping"][place] for place in places]
        return {
            "input_ids": encoding["input_ids"],
            "attention_mask": encoding["attention_mask"],
            "token_type_ids": encoding["token_type_ids"],
            "passage_mask": [int(segment == 0) for segment in segments],
            "summary_index": places,
            "summary_mask": [1] * len(places),
            "option_mask": [int(low < start + len(option) and high > start) for low, high in spans],
        }

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Some questions, padded to the longest: a tensor `(batch, options, length or summary)` for each field."""
        chosen = [self.samples[row] for row in rows]
        padded = {}
        for field in chosen[0][0]:
            filler = self.pad if field == "input_ids" else 0
            longest = max(len(pair[field]) for pairs in chosen for pair in pairs)
            padded[field] = torch.tensor(
                [[pair[field] + [filler] * (longest - len(pair[field])) for pair in pairs] for pairs in chosen]
            )
        return padded


def plain_slot_scores(network: nn.Module, batch: Any) -> Tensor:
    """Scores of options at mask tokens, from logits of the whole sequences.

    Args:
        network: With a masked language model's head.
        batch: A `SlotBatch`.

    Returns:
        `(batch, options)`.
    """
    logits = network(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, token_type_ids=batch.token_type_ids
    ).logits
    scores = []
    for sequences, options in zip(batch.sequence_of.tolist(), batch.option_ids.tolist(), strict=True):
        for sequence, option in zip(sequences, options, strict=True):
            tokens = [token for token in option if token >= 0]
            places = batch.mask_index[sequence, : len(tokens)]
            log_probabilities = logits[sequence, places].log_softmax(-1)
            scores.append(log_probabilities[range(len(tokens)), tokens].mean())
    return torch.stack(scores).view(batch.sequence_of.shape)


def plain_masked_lm_loss(network: nn.Module, batch: Any) -> Tensor:
    """The network's own loss, mean cross-entropy of the masked tokens, from logits of the whole sequences.

    Args:
        network: With a masked language model's head.
        batch: A `PassageBatch`.
    """
    loss: Tensor = network(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        token_type_ids=batch.token_type_ids,
        labels=batch.labels,
    ).loss
    return loss
