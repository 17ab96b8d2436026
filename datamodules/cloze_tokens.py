"""Cloze questions as flat tables of tokens, made once, and the gathering of whole batches from them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from datamodules.cloze_batches import (
    ClozeBatch,
    PairBatch,
    ReaderBatch,
    Run,
    SeparateBatch,
    SlotBatch,
    frame,
    lay,
    places,
    read_template,
    spans,
)
from datamodules.cloze_text import MARKS, MODES, begins, detokenize, second_segment, split_question
from datamodules.cloze_tokenizer import check_tokenizer
from datamodules.loading import Draw
from datamodules.options import one_of
from datamodules.token_table import distinct, tokenize, tokenize_spans

if TYPE_CHECKING:
    from torch import Tensor

    from datamodules.cloze_rows import ClozeRows
    from datamodules.cloze_text import Span

log = logging.getLogger(__name__)

ENCODES = ("joint", "separate", "cloze", "reader")
MASKS = ("first", "each")
LEAST_PASSAGE = 16  # tokens that a passage keeps at least when it is cut


class ClozeTokens(Dataset[ClozeBatch]):
    """Cloze questions, tokenised once; `dataset[Draw(indices, key)]` is a batch.

    The sequences of a batch equal `tokenizer(passage, summary, truncation="only_first", max_length=max_length)` token
    for token and are padded at the right to the longest. Where no row has a passage, they are those of one segment.

    Args:
        rows: The questions.
        tokenizer: A fast tokenizer of transformers.
        encode: "joint": `PairBatch`; "separate": `SeparateBatch`; "cloze": `SlotBatch`; "reader": `ReaderBatch`.
        mode: What stands beside the passage, see `datamodules.cloze_text.second_segment`; "summary_only" is "fill"
            without the passage. The encodings "cloze" and "reader" keep the slot and take "fill" only.
        with_passage: Whether the passage is read.
        max_length: Longest sequence. Only passages are cut, where the tokenizer cuts. In "reader" it is the longest
            passage.
        masks: Of "cloze": "each" has one mask token for each token of the option, "first" one mask token for its first.
        capitalize_initial: Whether an option that fills the start of a question gets a capital.
        mark_option: Whether the tokens of `load_tokenizer(..., marks=True)` stand round the option.
        detokenize: Whether spaces round the punctuation of questions are undone.
        lenient: Whether options with the text of the gold one count as right, too.

    Attributes:
        lengths: int64 `(questions,)`, tokens of the longest sequence of each question.
        truncated: Number of distinct passages that are cut.
        with_passage: Whether passages are read, and there are some.

    Raises:
        ValueError: If options contradict each other or the tokenizer lacks a token that they need, an option or a
            passage has no token, or a question leaves too little of `max_length` to its passage.
    """

    def __init__(
        self,
        rows: ClozeRows,
        tokenizer: Any,
        *,
        encode: str = "joint",
        mode: str = "fill",
        with_passage: bool = True,
        max_length: int = 512,
        masks: str = "each",
        capitalize_initial: bool = False,
        mark_option: bool = False,
        detokenize: bool = False,
        lenient: bool = False,
    ) -> None:
        self.rows, self.encode, self.mode, self.max_length, self.masks = rows, encode, mode, max_length, masks
        self.capitalize_initial, self.mark_option, self.detokenize = capitalize_initial, mark_option, detokenize
        self.with_passage = with_passage and mode != "summary_only" and any(rows.articles)
        self._check_options(tokenizer)
        self._pad = int(tokenizer.pad_token_id)
        self._cut_left = tokenizer.truncation_side == "left"
        self.labels = torch.from_numpy(rows.labels)
        self.accepted = torch.from_numpy(rows.accepted(lenient))
        self._read_passages(tokenizer)
        if encode in ("joint", "separate"):
            self._read_summaries(tokenizer)
        else:
            self._read_slots(tokenizer)
        probe = rows.options[0][0]
        self._single = read_template(tokenizer, probe)
        self._pair = read_template(tokenizer, probe, probe) if self.with_passage else self._single
        self._specials = {"reader": 0, "separate": self._single.size}.get(encode, self._pair.size)
        self._measure()

    def __len__(self) -> int:
        """Number of questions."""
        return len(self.rows)

    def __getitem__(self, draw: Draw | Tensor) -> ClozeBatch:
        """The batch of some questions: of `draw.indices`, or of int64 `(batch,)` itself."""
        rows = draw.indices if isinstance(draw, Draw) else draw
        if self.encode == "joint":
            return self._pairs(rows)
        if self.encode == "separate":
            return self._parts(rows)
        if self.encode == "cloze":
            return self._slots(rows)
        return self._plain(rows)

    def _check_options(self, tokenizer: Any) -> None:
        check_tokenizer(tokenizer, tokenizer.name_or_path)
        one_of(
            ("encode", self.encode, ENCODES),
            ("mode", self.mode, MODES),
            ("masks", self.masks, MASKS),
        )
        if self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {self.max_length}")
        slotted = self.encode in ("cloze", "reader")
        if slotted and self.mode != "fill":
            raise ValueError(f"encode={self.encode!r} keeps the slot of the question; it takes no mode={self.mode!r}")
        if slotted and self.mark_option:
            raise ValueError(f"encode={self.encode!r} keeps the slot of the question; it takes no mark_option")
        if self.encode == "reader" and not self.with_passage:
            raise ValueError(f"encode='reader' needs passages: with_passage=True and articles in {self.rows.name}")
        if (slotted or self.mode in ("concat", "concat_sep")) and tokenizer.mask_token_id is None:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path} has no mask token, which encode={self.encode!r} with "
                f"mode={self.mode!r} writes into the slot: use mode='fill', or a tokenizer of a masked language model"
            )
        if self.mode == "concat_sep" and tokenizer.sep_token_id is None:
            raise ValueError(f"the tokenizer {tokenizer.name_or_path} has no separator token: use mode='concat'")
        if self.mark_option and not set(MARKS) <= tokenizer.get_vocab().keys():
            raise ValueError(f"mark_option needs the tokens {' and '.join(MARKS)}: load_tokenizer(..., marks=True)")

    def _read_passages(self, tokenizer: Any) -> None:
        articles = self.rows.articles if self.with_passage else [""] * len(self.rows)
        texts, self._passage_of = distinct(articles)
        self._passages = tokenize(tokenizer, texts)
        empty = self._passages.sizes(self._passage_of) == 0
        if self.with_passage and empty.any():
            place = self.rows.places[int(empty.nonzero()[0])]
            raise ValueError(f"{place}: the passage gives no token, while others do; with_passage=False leaves all out")

    def _questions(self) -> list[str]:
        return [detokenize(question) for question in self.rows.questions] if self.detokenize else self.rows.questions

    def _read_summaries(self, tokenizer: Any) -> None:
        segments = []
        for place, question, options in zip(self.rows.places, self._questions(), self.rows.options, strict=True):
            try:
                segments += [
                    second_segment(
                        self.mode,
                        question,
                        option,
                        mask_token=tokenizer.mask_token,
                        sep_token=tokenizer.sep_token,
                        capitalize_initial=self.capitalize_initial,
                        marks=MARKS if self.mark_option else None,
                    )
                    for option in options
                ]
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
        texts, which = distinct(segments)
        self._summaries, first, count = tokenize_spans(tokenizer, texts)
        self._summary_of = which.reshape(len(self.rows), -1)
        self._option_first, self._option_count = first[self._summary_of], count[self._summary_of]
        self._check_option_tokens(self._option_count)

    def _read_slots(self, tokenizer: Any) -> None:
        questions, words = [], []
        for place, question, options in zip(self.rows.places, self._questions(), self.rows.options, strict=True):
            try:
                before, after = split_question(question)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
            mask = (len(before), len(before) + len(tokenizer.mask_token))
            questions.append((before + tokenizer.mask_token + after, mask))
            words += [self._in_slot(before, option) for option in options]
        self._question_tokens, self._slot, _ = tokenize_spans(tokenizer, questions)
        texts, which = distinct(words)
        table, first, count = tokenize_spans(tokenizer, texts)
        self._options = table
        self._option_of = which.reshape(len(self.rows), -1)
        self._check_option_tokens(count[self._option_of])
        # Only the option's own tokens are ever asked for.
        self._option_start = (table.offsets[:-1] + first)[self._option_of]
        self._option_pieces = count[self._option_of]
        if self.masks == "first" and self.encode == "cloze":
            self._option_pieces = torch.ones_like(self._option_pieces)
        self._mask_ids = torch.tensor([tokenizer.mask_token_id])

    def _in_slot(self, before: str, option: str) -> tuple[str, Span]:
        # A byte-level vocabulary has other tokens for a word after a space, so the character before belongs to it. A
        # letter there does not: a mask token never stands for what the two would become together.
        left = before[-1:] if not before[-1:].isalnum() else ""
        if self.capitalize_initial and begins(before):
            option = option[:1].upper() + option[1:]
        return left + option, (len(left), len(left) + len(option))

    def _check_option_tokens(self, count: Tensor) -> None:
        empty = (count == 0).nonzero()
        if len(empty):
            row, option = empty[0].tolist()
            text = self.rows.options[row][option]
            raise ValueError(f"{self.rows.places[row]}: option {option}, {text!r}, gives no token of the tokenizer")

    def _measure(self) -> None:
        """Set `lengths` and `truncated`, and check that everything fits."""
        apart = self.encode in ("separate", "reader")
        if self.encode in ("joint", "separate"):
            second = self._summaries.sizes(self._summary_of)
        else:
            second = self._question_tokens.lengths[:, None]
            if self.encode == "cloze":
                second = second - 1 + self._option_pieces
        passage = self._passages.sizes(self._passage_of)[:, None]
        room = self.max_length - self._specials - second
        for_passage = torch.full_like(room, self.max_length - self._specials) if apart else room
        wrong = ((room < 0) | (for_passage < passage.clamp(max=LEAST_PASSAGE))).nonzero()
        if len(wrong):
            row, option = wrong[0].tolist()
            left = int(for_passage[row, option])
            raise ValueError(
                f"{self.rows.places[row]}: {int(second[row, option])} tokens of the question with option {option} and "
                f"{self._specials} special ones are too many for max_length={self.max_length}"
                + (f": a passage that is cut keeps at least {LEAST_PASSAGE}, here {left}" if self.with_passage else "")
            )
        kept = torch.minimum(passage, for_passage)
        together = torch.maximum(kept, second) if apart else kept + second
        self.lengths = together.max(1).values + self._specials
        self.truncated = len(torch.unique(self._passage_of[(kept < passage).any(1)]))
        if self.truncated:
            log.info(
                "%s: %d of %d passages are cut to fit max_length=%d",
                self.rows.name, self.truncated, len(self._passages.lengths), self.max_length,
            )  # fmt: skip

    def _passage(self, rows: Tensor, room: Tensor, types: int = 0) -> Run:
        """Passages of questions, cut to `room` tokens; the two broadcast."""
        texts = self._passage_of[rows]
        length = self._passages.sizes(texts)
        kept = torch.minimum(length, room)
        first = self._passages.offsets[texts]
        return Run(self._passages.ids, first + (length - kept) if self._cut_left else first, kept, types)

    def _pairs(self, rows: Tensor) -> PairBatch:
        template, texts = self._pair, self._summary_of[rows]
        summary = self._summaries.run(texts, template.types[-1])
        segments = [[summary]]
        if self.with_passage:
            room = self.max_length - template.size - summary.size
            segments.insert(0, [self._passage(rows[:, None], room, template.types[0])])
        laid = lay(frame(template, segments), self._pad)
        summary_index, summary_mask = places(laid.starts[-2], summary.size)
        if self.with_passage:
            passage_mask = spans(laid.starts[1], segments[0][0].size, laid.ids.shape[-1])
        else:
            passage_mask = torch.zeros_like(laid.ids, dtype=torch.bool)
        return PairBatch(
            laid.ids,
            laid.attention_mask,
            laid.token_type_ids,
            passage_mask,
            summary_index,
            summary_mask,
            spans(self._option_first[rows], self._option_count[rows], summary_mask.shape[-1]),
            self.labels[rows],
            self.accepted[rows],
            rows,
        )

    def _parts(self, rows: Tensor) -> SeparateBatch:
        template = self._single
        passage = self._passage(rows, torch.tensor(self.max_length - template.size))
        summary = self._summaries.run(self._summary_of[rows])
        passages, summaries = (lay(frame(template, [[run]]), self._pad) for run in (passage, summary))
        summary_index, summary_mask = places(summaries.starts[1], summary.size)
        return SeparateBatch(
            passages.ids,
            passages.attention_mask,
            spans(passages.starts[1], passage.size, passages.ids.shape[-1]),
            summaries.ids,
            summaries.attention_mask,
            summary_index,
            summary_mask,
            spans(self._option_first[rows], self._option_count[rows], summary_mask.shape[-1]),
            self.labels[rows],
            self.accepted[rows],
            rows,
        )

    def _slots(self, rows: Tensor) -> SlotBatch:
        template, pieces = self._pair, self._option_pieces[rows]
        most = int(pieces.max())
        # One sequence for each question and number of mask tokens that occurs among its options.
        keys = torch.arange(len(rows))[:, None] * (most + 1) + pieces
        keys, sequence_of = torch.unique(keys, return_inverse=True)
        sequence_rows, masks = rows[keys // (most + 1)], keys % (most + 1)
        question = self._question_tokens.run(sequence_rows, template.types[-1])
        slot = self._slot[sequence_rows]
        segments = [
            [
                question._replace(size=slot),
                Run(self._mask_ids.expand(most), torch.zeros_like(masks), masks, template.types[-1]),
                question._replace(first=question.first + slot + 1, size=question.size - slot - 1),
            ]
        ]
        if self.with_passage:
            room = self.max_length - template.size - (question.size - 1 + masks)
            segments.insert(0, [self._passage(sequence_rows, room, template.types[0])])
        laid = lay(frame(template, segments), self._pad)
        option_places, inside = places(self._option_start[rows], pieces)
        return SlotBatch(
            laid.ids,
            laid.attention_mask,
            laid.token_type_ids,
            places(laid.starts[-3], masks)[0],
            sequence_of,
            self._options.ids[option_places].long().masked_fill(~inside, -100),
            self.labels[rows],
            self.accepted[rows],
            rows,
        )

    def _plain(self, rows: Tensor) -> ReaderBatch:
        passage = self._passage(rows, torch.tensor(self.max_length))
        question = self._question_tokens.run(rows)
        option = Run(self._options.ids, self._option_start[rows], self._option_pieces[rows])
        passages, questions, options = (lay([run], self._pad) for run in (passage, question, option))
        return ReaderBatch(
            passages.ids,
            questions.ids,
            options.ids,
            passages.attention_mask.bool(),
            questions.attention_mask.bool(),
            options.attention_mask.bool(),
            self._slot[rows],
            self.labels[rows],
            self.accepted[rows],
            rows,
        )
