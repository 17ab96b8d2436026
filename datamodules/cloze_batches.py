"""Batches of multiple-choice cloze questions, and the laying of token runs side by side in padded sequences."""

from __future__ import annotations

from functools import reduce
from itertools import groupby
from operator import add, itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence


class PairBatch(NamedTuple):
    """Passage and summary in one sequence per option.

    The second segment of a sequence is called summary, whatever the mode puts there.

    Attributes:
        input_ids: int64 `(batch, options, length)`, padded with the tokenizer's pad id.
        attention_mask: int64 `(batch, options, length)`, 1 for all tokens, special ones included.
        token_type_ids: int64 `(batch, options, length)`, as the tokenizer's template has them; 0 in padding.
        passage_mask: bool `(batch, options, length)`, the passage's tokens without special ones; all False without a
            passage.
        summary_index: int64 `(batch, options, summary)`, place in the sequence of each token of the summary, without
            special ones at its ends; 0 where there is none.
        summary_mask: bool `(batch, options, summary)`, where `summary_index` means a token.
        option_mask: bool `(batch, options, summary)`, the option's own tokens among those of `summary_index`.
        labels: int64 `(batch,)`, index of the right option; -100 where unknown.
        accepted: bool `(batch, options)`, options that count as right; all False where unknown.
        rows: int64 `(batch,)`, rows of the table of questions.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor
    passage_mask: Tensor
    summary_index: Tensor
    summary_mask: Tensor
    option_mask: Tensor
    labels: Tensor
    accepted: Tensor
    rows: Tensor


class SeparateBatch(NamedTuple):
    """Passages once per question, and summaries once per option, each in a sequence of its own.

    Attributes:
        passage_ids: int64 `(batch, length)`, padded with the tokenizer's pad id.
        passage_attention_mask: int64 `(batch, length)`, 1 for all tokens, special ones included.
        passage_mask: bool `(batch, length)`, without special tokens; all False without a passage.
        summary_ids: int64 `(batch, options, width)`, padded with the tokenizer's pad id.
        summary_attention_mask: int64 `(batch, options, width)`, 1 for all tokens, special ones included.
        summary_index: int64 `(batch, options, summary)`, place in `width` of each token of the summary, without special
            ones at its ends; 0 where there is none.
        summary_mask: bool `(batch, options, summary)`, where `summary_index` means a token.
        option_mask: bool `(batch, options, summary)`, the option's own tokens among those of `summary_index`.
        labels: int64 `(batch,)`, index of the right option; -100 where unknown.
        accepted: bool `(batch, options)`, options that count as right; all False where unknown.
        rows: int64 `(batch,)`, rows of the table of questions.
    """

    passage_ids: Tensor
    passage_attention_mask: Tensor
    passage_mask: Tensor
    summary_ids: Tensor
    summary_attention_mask: Tensor
    summary_index: Tensor
    summary_mask: Tensor
    option_mask: Tensor
    labels: Tensor
    accepted: Tensor
    rows: Tensor


class SlotBatch(NamedTuple):
    """Passage and question with mask tokens in the slot: one sequence per question and number of mask tokens.

    Attributes:
        input_ids: int64 `(sequences, length)`, padded with the tokenizer's pad id.
        attention_mask: int64 `(sequences, length)`, 1 for all tokens, special ones included.
        token_type_ids: int64 `(sequences, length)`, as the tokenizer's template has them; 0 in padding.
        mask_index: int64 `(sequences, pieces)`, places of the mask tokens in the sequence; 0 where there is none.
        sequence_of: int64 `(batch, options)`, the sequence that scores the option.
        option_ids: int64 `(batch, options, pieces)`, the option's tokens, -100 where there is none.
        labels: int64 `(batch,)`, index of the right option; -100 where unknown.
        accepted: bool `(batch, options)`, options that count as right; all False where unknown.
        rows: int64 `(batch,)`, rows of the table of questions.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor
    mask_index: Tensor
    sequence_of: Tensor
    option_ids: Tensor
    labels: Tensor
    accepted: Tensor
    rows: Tensor


class ReaderBatch(NamedTuple):
    """Passages, questions with one mask token in the slot, and options, without special tokens at their ends.

    Attributes:
        passage_ids: int64 `(batch, length)`, padded with the tokenizer's pad id.
        question_ids: int64 `(batch, width)`, padded with the tokenizer's pad id.
        option_ids: int64 `(batch, options, pieces)`, padded with the tokenizer's pad id.
        passage_mask: bool `(batch, length)`, where there is a token; all False without a passage.
        question_mask: bool `(batch, width)`, where there is a token.
        option_mask: bool `(batch, options, pieces)`, where there is a token.
        slot: int64 `(batch,)`, place of the mask token in the question.
        labels: int64 `(batch,)`, index of the right option; -100 where unknown.
        accepted: bool `(batch, options)`, options that count as right; all False where unknown.
        rows: int64 `(batch,)`, rows of the table of questions.
    """

    passage_ids: Tensor
    question_ids: Tensor
    option_ids: Tensor
    passage_mask: Tensor
    question_mask: Tensor
    option_mask: Tensor
    slot: Tensor
    labels: Tensor
    accepted: Tensor
    rows: Tensor


ClozeBatch = PairBatch | SeparateBatch | SlotBatch | ReaderBatch


class Special(NamedTuple):
    """Special tokens that stand together at one place of a template.

    Attributes:
        ids: int64 `(tokens,)`.
        types: int64 `(tokens,)`, their token types.
    """

    ids: Tensor
    types: Tensor


class Template(NamedTuple):
    """Where a tokenizer puts its special tokens.

    Attributes:
        specials: Those before the first segment, those after each segment.
        types: Token type of each segment.
    """

    specials: list[Special]
    types: list[int]

    @property
    def size(self) -> int:
        """Number of special tokens."""
        return sum(len(special.ids) for special in self.specials)


def read_template(tokenizer: Any, *probe: str) -> Template:
    """The template of a tokenizer for one segment or a pair, read off an encoded probe.

    Args:
        tokenizer: A fast tokenizer of transformers.
        probe: One text or two, each with at least one token.

    Raises:
        ValueError: If the probe's segments do not stand in order, each in one piece.
    """
    encoding = tokenizer(*probe, return_token_type_ids=True, return_attention_mask=False, verbose=False)
    tokens = zip(encoding.sequence_ids(0), encoding["input_ids"], encoding["token_type_ids"], strict=True)
    groups = [(segment, [token[1:] for token in group]) for segment, group in groupby(tokens, itemgetter(0))]
    if [segment for segment, _ in groups if segment is not None] != list(range(len(probe))):
        raise ValueError(
            f"the template of {type(tokenizer).__name__} must keep {len(probe)} segments in order and whole, but it "
            f"encodes {probe} with segments {encoding.sequence_ids(0)}"
        )
    specials: list[list[tuple[int, int]]] = [[]]
    types = []
    for segment, group in groups:
        if segment is None:
            specials[-1] = group
        else:
            types.append(group[0][1])
            specials.append([])
    tables = [torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2) for pairs in specials]
    return Template([Special(table[:, 0], table[:, 1]) for table in tables], types)


class Run(NamedTuple):
    """One run of tokens for each sequence of a batch.

    Attributes:
        source: `(tokens,)`, ids that the runs are cut from.
        first: int64, of any shape: where each run starts in `source`.
        size: int64, of any shape: its tokens; may be 0.
        types: Token type of all these tokens, or int64 `(most tokens of a run,)` by their place in the run.
    """

    source: Tensor
    first: Tensor
    size: Tensor
    types: int | Tensor = 0


def frame(template: Template, segments: Sequence[Sequence[Run]]) -> list[Run]:
    """The runs of all segments, with the template's special tokens before and after each segment."""
    specials = [Run(ids, torch.tensor(0), torch.tensor(len(ids)), types) for ids, types in template.specials]
    runs = [specials[0]]
    for segment, special in zip(segments, specials[1:], strict=True):
        runs += [*segment, special]
    return runs


class Laid(NamedTuple):
    """Sequences made of runs.

    Attributes:
        ids: int64 `(..., length)`, padded.
        attention_mask: int64 `(..., length)`, 1 where a token is.
        token_type_ids: int64 `(..., length)`, 0 in padding.
        starts: int64 `(...)` for each run, its place in the sequence.
    """

    ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor
    starts: list[Tensor]


def lay(runs: Sequence[Run], pad: int) -> Laid:
    """Put runs one after the other, for all sequences of a batch at once.

    Args:
        runs: In their order. The shapes of their `first` and `size` broadcast to that of the batch.
        pad: Id of padding, at the right of each sequence.
    """
    total = reduce(add, (run.size for run in runs))
    shape, width = total.shape, int(total.max())
    ids = torch.full((*shape, width), pad)
    types = torch.zeros_like(ids)
    # Where each sequence begins in the flat memory of `ids`.
    origin = (torch.arange(shape.numel()) * width).reshape(shape)
    start, starts = torch.zeros_like(total), []
    for run in runs:
        within = torch.arange(int(run.size.max()))
        inside = (within < run.size[..., None]).expand(*shape, -1)
        target = ((origin + start)[..., None] + within).masked_select(inside)
        ids.view(-1)[target] = run.source[(run.first[..., None] + within).masked_select(inside)].long()
        if isinstance(run.types, Tensor):
            types.view(-1)[target] = run.types.masked_select(inside)
        elif run.types:
            types.view(-1)[target] = run.types
        starts.append(start)
        start = start + run.size
    return Laid(ids, (torch.arange(width) < total[..., None]).long(), types, starts)


def places(start: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Places of runs in their sequences.

    Args:
        start: int64 `(...)`.
        count: int64 `(...)`.

    Returns:
        int64 `(..., most tokens)`, 0 where there is none; and where there is one.
    """
    within = torch.arange(int(count.max()))
    inside = within < count[..., None]
    return (start[..., None] + within) * inside, inside


def spans(start: Tensor, count: Tensor, width: int) -> Tensor:
    """Masks of runs: bool `(..., width)`, True at `start .. start + count - 1`."""
    columns = torch.arange(width)
    return (columns >= start[..., None]) & (columns < (start + count)[..., None])
