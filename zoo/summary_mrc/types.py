"""What the modules of this room expect of data: any objects with these fields do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class ChoiceBatch(Protocol):
    """Multiple-choice questions, whatever their layout.

    Attributes:
        labels: int64 `(batch,)`, the right option; -100 where unknown.
        accepted: bool `(batch, options)`, options that count as right.
        rows: int64 `(batch,)`, the questions' rows in their table.
    """

    @property
    def labels(self) -> Tensor: ...  # noqa: D102
    @property
    def accepted(self) -> Tensor: ...  # noqa: D102
    @property
    def rows(self) -> Tensor: ...  # noqa: D102


class PairBatch(ChoiceBatch, Protocol):
    """Passage and second segment in one sequence per option.

    Attributes:
        input_ids: int64 `(batch, options, length)`.
        attention_mask: int64 `(batch, options, length)`, 1 for tokens.
        token_type_ids: int64 `(batch, options, length)`; ignored by encoders with one type.
        passage_mask: bool `(batch, options, length)`, the passage's tokens, without special ones.
        summary_index: int64 `(batch, options, summary)`, where the second segment's tokens stand in the sequence.
        summary_mask: bool `(batch, options, summary)`, which of `summary_index` are tokens.
        option_mask: bool `(batch, options, summary)`, which of them are the option's.
    """

    @property
    def input_ids(self) -> Tensor: ...  # noqa: D102
    @property
    def attention_mask(self) -> Tensor: ...  # noqa: D102
    @property
    def token_type_ids(self) -> Tensor: ...  # noqa: D102
    @property
    def passage_mask(self) -> Tensor: ...  # noqa: D102
    @property
    def summary_index(self) -> Tensor: ...  # noqa: D102
    @property
    def summary_mask(self) -> Tensor: ...  # noqa: D102
    @property
    def option_mask(self) -> Tensor: ...  # noqa: D102


class SeparateBatch(ChoiceBatch, Protocol):
    """A sequence per passage, and one per option.

    Attributes:
        passage_ids: int64 `(batch, length)`.
        passage_attention_mask: int64 `(batch, length)`, 1 for tokens.
        passage_mask: bool `(batch, length)`, tokens without special ones.
        summary_ids: int64 `(batch, options, width)`.
        summary_attention_mask: int64 `(batch, options, width)`.
        summary_index: int64 `(batch, options, summary)`, as in `PairBatch`, into `width`.
        summary_mask: bool `(batch, options, summary)`.
        option_mask: bool `(batch, options, summary)`.
    """

    @property
    def passage_ids(self) -> Tensor: ...  # noqa: D102
    @property
    def passage_attention_mask(self) -> Tensor: ...  # noqa: D102
    @property
    def passage_mask(self) -> Tensor: ...  # noqa: D102
    @property
    def summary_ids(self) -> Tensor: ...  # noqa: D102
    @property
    def summary_attention_mask(self) -> Tensor: ...  # noqa: D102
    @property
    def summary_index(self) -> Tensor: ...  # noqa: D102
    @property
    def summary_mask(self) -> Tensor: ...  # noqa: D102
    @property
    def option_mask(self) -> Tensor: ...  # noqa: D102


class SlotBatch(ChoiceBatch, Protocol):
    """Passage and question with mask tokens in the slot, one sequence per number of mask tokens.

    Attributes:
        input_ids: int64 `(sequences, length)`.
        attention_mask: int64 `(sequences, length)`.
        token_type_ids: int64 `(sequences, length)`.
        mask_index: int64 `(sequences, pieces)`, places of the mask tokens, 0 where there is none.
        sequence_of: int64 `(batch, options)`, the sequence that scores an option.
        option_ids: int64 `(batch, options, pieces)`, tokens of an option, -100 where there is none.
    """

    @property
    def input_ids(self) -> Tensor: ...  # noqa: D102
    @property
    def attention_mask(self) -> Tensor: ...  # noqa: D102
    @property
    def token_type_ids(self) -> Tensor: ...  # noqa: D102
    @property
    def mask_index(self) -> Tensor: ...  # noqa: D102
    @property
    def sequence_of(self) -> Tensor: ...  # noqa: D102
    @property
    def option_ids(self) -> Tensor: ...  # noqa: D102


class ReaderBatch(ChoiceBatch, Protocol):
    """Passage, question and options, each by itself.

    Attributes:
        passage_ids: int64 `(batch, length)`.
        question_ids: int64 `(batch, width)`.
        option_ids: int64 `(batch, options, pieces)`.
        passage_mask: bool `(batch, length)`.
        question_mask: bool `(batch, width)`.
        option_mask: bool `(batch, options, pieces)`.
        slot: int64 `(batch,)`, place of the slot in the question.
    """

    @property
    def passage_ids(self) -> Tensor: ...  # noqa: D102
    @property
    def question_ids(self) -> Tensor: ...  # noqa: D102
    @property
    def option_ids(self) -> Tensor: ...  # noqa: D102
    @property
    def passage_mask(self) -> Tensor: ...  # noqa: D102
    @property
    def question_mask(self) -> Tensor: ...  # noqa: D102
    @property
    def option_mask(self) -> Tensor: ...  # noqa: D102
    @property
    def slot(self) -> Tensor: ...  # noqa: D102


class PassageBatch(Protocol):
    """Passages with masked tokens.

    Attributes:
        input_ids: int64 `(batch, length)`.
        attention_mask: int64 `(batch, length)`.
        token_type_ids: int64 `(batch, length)`.
        labels: int64 `(batch, length)`, the token that was masked; -100 elsewhere.
    """

    @property
    def input_ids(self) -> Tensor: ...  # noqa: D102
    @property
    def attention_mask(self) -> Tensor: ...  # noqa: D102
    @property
    def token_type_ids(self) -> Tensor: ...  # noqa: D102
    @property
    def labels(self) -> Tensor: ...  # noqa: D102


class QuestionTable(Protocol):
    """Questions as text, for pictures and tables.

    Attributes:
        articles: the passage of each question.
        questions: the questions, with their placeholder.
        options: the options of each question.
        ids: what identifies each question.
    """

    @property
    def articles(self) -> list[str]: ...  # noqa: D102
    @property
    def questions(self) -> list[str]: ...  # noqa: D102
    @property
    def options(self) -> list[list[str]]: ...  # noqa: D102
    @property
    def ids(self) -> list[str]: ...  # noqa: D102
