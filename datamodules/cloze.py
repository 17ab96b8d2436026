"""Multiple-choice cloze questions about passages: ReCAM, files of one's own, and samples that need no file."""

from __future__ import annotations

import logging
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningDataModule

from datamodules.cloze_batches import PairBatch, ReaderBatch, SeparateBatch, SlotBatch
from datamodules.cloze_parts import check_same_options, distinct, split_by_article, training_texts
from datamodules.cloze_rows import ClozeRows
from datamodules.cloze_text import MODES
from datamodules.loading import BatchLoader, KeyedSampler, LoaderMixin, training_sampler
from datamodules.options import at_least, one_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from datamodules.cloze_tokens import ClozeTokens

__all__ = ["ClozeData", "ClozeRows", "PairBatch", "ReaderBatch", "SeparateBatch", "SlotBatch"]

log = logging.getLogger(__name__)

SOURCES = ("embedded", "recam", "slot_cloze", "files")
LAYOUTS = ("joint", "separate", "cloze", "reader")
_SAMPLE_VALIDATION, _SAMPLE_TEST = 240, 600
_WITHOUT_PASSAGE = ("summary_only", "option_only")


class ClozeData(LoaderMixin, LightningDataModule):
    """Passages, questions with one `@placeholder`, and K options for it, as token sequences.

    Args:
        source: "embedded" (default; generated passages and questions), "recam" (SemEval 2021 task 4), "slot_cloze"
            (function words cut out of ReCAM's passages) or "files" (implied by `path`).
        path: Questions to train on: JSON lines, CSV, TSV (all also `.gz`) or Parquet.
        val_path: Questions to validate on; by default `validation_fraction` of those of `path`, by article.
        test_path: Questions to test on, in place of the source's own; without one, those of the validation.
        predict_path: Questions to answer, with or without labels; by default ReCAM's unlabelled test.
        article_column: Column of passages; None for questions without.
        question_column: Column of questions.
        option_columns: Columns of the options: a pattern with `{}` for 0..K-1, names, or one column of lists.
        label_column: Column of the right option's index, from 0.
        id_column: Column of ids, where there is one.
        data_dir: Folder of ReCAM's files; `$ZOO_DATA/recam_semeval2021_task4` by default.
        subtask: ReCAM's subtask: 1 (imperceptible words) or 2 (unspecific words).
        eval_subtask: Subtask of validation and test; another than `subtask` is ReCAM's subtask 3.
        intersection: Whether ReCAM's training has the file of words that are both.
        drop_overlap: Whether training questions go whose article is in validation or test.
        num_options: Options K that every question must have; by default what the training file has.
        lenient_duplicates: Whether an option with the right one's text counts as right.
        tokenizer: "train" (word pieces of the training text), "words" (its most frequent words), a local folder or a
            hub id.
        tokenizer_size: Vocabulary of "train" and "words".
        mode: What is compared with the passage: "fill" (option in its slot), "concat" (option after the question),
            "concat_sep" (after a separator), "summary_only" (filled, no passage) or "option_only".
        encode: Layout: "joint", "separate" (for `SummaryMRC`), "cloze" (for `ClozeScorer`) or "reader" (`GAReader`).
        with_passage: Whether sequences have the passage; by default in the first three modes, where there are passages.
        masks: For "cloze": mask tokens in the slot, one for "each" piece of an option, or for the "first" only.
        mark_option: Whether marker tokens stand round the filled option.
        capitalize_initial: Whether an option at the start of a question begins with a capital.
        detokenize_question: Whether the spaces round a question's punctuation go.
        max_length: Longest sequence; passages are cut to it.
        validation_fraction: Share of training articles to validate on where the source has no such part.
        sample_rows: Training questions of the embedded sample.
        batch_size: Questions of a training batch of one process.
        eval_batch_size: Questions of a batch of one process in validation, test and prediction.
        bucketed: Whether questions of about one length share a training batch.
        num_workers: Worker processes.
        pin_memory: Whether batches are in page-locked memory; by default where a GPU is.
        seed: Key of the order of training; by default the one of `seed_everything`.

    Raises:
        ValueError: If options contradict each other or are out of range.
    """

    def __init__(
        self,
        source: str | None = None,
        path: str | None = None,
        val_path: str | None = None,
        test_path: str | None = None,
        predict_path: str | None = None,
        article_column: str | None = "article",
        question_column: str = "question",
        option_columns: str | list[str] = "option_{}",
        label_column: str = "label",
        id_column: str = "id",
        data_dir: str | None = None,
        subtask: int = 1,
        eval_subtask: int | None = None,
        intersection: bool = True,
        drop_overlap: bool = True,
        num_options: int | None = None,
        lenient_duplicates: bool = False,
        tokenizer: str = "train",
        tokenizer_size: int = 8_000,
        mode: str = "fill",
        encode: str = "joint",
        with_passage: bool | None = None,
        masks: str = "each",
        mark_option: bool = False,
        capitalize_initial: bool = False,
        detokenize_question: bool = False,
        max_length: int = 512,
        validation_fraction: float = 0.1,
        sample_rows: int = 2_000,
        batch_size: int = 8,
        eval_batch_size: int = 32,
        bucketed: bool = True,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.source = source or ("files" if path else "embedded")
        self.path, self.val_path, self.test_path, self.predict_path = path, val_path, test_path, predict_path
        self.columns = (article_column, question_column, option_columns, label_column, id_column)
        self.data_dir, self.subtask = data_dir, subtask
        self.eval_subtask = subtask if eval_subtask is None else eval_subtask
        self.intersection, self.drop_overlap, self.lenient_duplicates = intersection, drop_overlap, lenient_duplicates
        self.tokenizer_name, self.tokenizer_size = tokenizer, tokenizer_size
        self.mode, self.encode, self.masks, self.mark_option = mode, encode, masks, mark_option
        self.capitalize_initial, self.detokenize_question = capitalize_initial, detokenize_question
        self.max_length, self.validation_fraction, self.sample_rows = max_length, validation_fraction, sample_rows
        self.batch_size, self.eval_batch_size, self.bucketed = batch_size, eval_batch_size, bucketed
        self.num_workers, self.seed = num_workers, seed
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._num_options, self._with_passage = num_options, with_passage
        self._tokens: dict[str, ClozeTokens] = {}
        self._check_options()

    def _check_options(self) -> None:
        one_of(
            ("source", self.source, SOURCES),
            ("subtask", self.subtask, (1, 2)),
            ("eval_subtask", self.eval_subtask, (1, 2)),
            ("mode", self.mode, MODES),
            ("encode", self.encode, LAYOUTS),
            ("masks", self.masks, ("each", "first")),
        )
        at_least(
            ("max_length", self.max_length, 32),
            ("batch_size", self.batch_size, 1),
            ("eval_batch_size", self.eval_batch_size, 1),
            ("sample_rows", self.sample_rows, 1),
            ("tokenizer_size", self.tokenizer_size, 32),
            ("num_options", self._num_options, 2),
            ("num_workers", self.num_workers, 0),
        )
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie between 0 and 1, got {self.validation_fraction}")
        if self.path and self.source != "files":
            raise ValueError(f"path={self.path} and source={self.source!r} contradict each other: give one of the two")
        if self.source == "files" and not self.path:
            raise ValueError("source='files' needs path: questions as JSON lines, CSV, TSV or Parquet")
        if self.val_path and self.source != "files":
            raise ValueError(f"val_path={self.val_path} needs path: source={self.source!r} has a validation part")
        if self.data_dir and self.source not in ("recam", "slot_cloze"):
            raise ValueError(f"data_dir holds ReCAM's files, but source={self.source!r}: use path for a file")
        if self.eval_subtask != self.subtask and self.source not in ("recam", "slot_cloze"):
            raise ValueError(f"eval_subtask is one of ReCAM's, but source={self.source!r}: use test_path for a file")
        if self._with_passage and (self.mode == "summary_only" or not self._passages):
            reason = "mode='summary_only'" if self._passages else f"source={self.source!r}"
            if self.source == "files" and not self._passages:
                reason = "article_column=None"
            raise ValueError(f"with_passage=True and {reason} contradict each other: there is no passage to read")

    @property
    def _passages(self) -> bool:
        """Whether the questions are about passages."""
        return self.source != "slot_cloze" and (self.source != "files" or self.columns[0] is not None)

    @property
    def with_passage(self) -> bool:
        """Whether sequences have the passage."""
        if self._with_passage is not None:
            return self._with_passage
        return self.mode not in _WITHOUT_PASSAGE and self._passages

    @cached_property
    def _unfiltered(self) -> dict[str, ClozeRows]:
        """Training, validation and test questions as they are read."""
        parts = self._read_parts()
        if self.test_path:
            parts["test"] = self._read(self.test_path, "test")
        parts.setdefault("test", parts["validate"])
        check_same_options(parts.values(), self._num_options or parts["fit"].num_options)
        return parts

    @cached_property
    def _parts(self) -> dict[str, ClozeRows]:
        """Training, validation and test questions, without training questions that the others give away."""
        from datamodules.sources.cloze_overlap import drop_overlap, warn_of_overlap

        parts = dict(self._unfiltered)
        others = [part for name, part in parts.items() if name != "fit"]
        if self.source in ("recam", "files"):
            if self.drop_overlap:
                parts["fit"] = drop_overlap(parts["fit"], *others)
            else:
                warn_of_overlap(parts["fit"], *others)
        log.info("%s: %s questions", self.source, ", ".join(f"{len(part)} {name}" for name, part in parts.items()))
        return parts

    def _read_parts(self) -> dict[str, ClozeRows]:
        if self.source == "embedded":
            from datamodules.sources.cloze_sample import cloze_sample

            return {
                "fit": cloze_sample(self.sample_rows, 0, "train"),
                "validate": cloze_sample(_SAMPLE_VALIDATION, 0, "validation"),
                "test": cloze_sample(_SAMPLE_TEST, 0, "test"),
            }
        if self.source == "recam":
            found = {part: self._recam(part) for part in ("fit", "validate", "test")}
            return {part: rows for part, rows in found.items() if rows is not None}
        if self.source == "slot_cloze":
            from datamodules.sources.slot_cloze import slot_cloze

            train, validation = self._recam("fit"), self._recam("validate")
            assert train is not None
            assert validation is not None
            rows, test = slot_cloze(distinct(train.articles), distinct(validation.articles), 0)
            return {**self._split(rows), "test": test}
        assert self.path is not None
        rows = self._read(self.path, "train")
        if self.val_path:
            return {"fit": rows, "validate": self._read(self.val_path, "validation")}
        return self._split(rows)

    def _split(self, rows: ClozeRows) -> dict[str, ClozeRows]:
        train, validation = split_by_article(rows, self.validation_fraction)
        return {"fit": train, "validate": validation}

    def _recam(self, part: str) -> ClozeRows | None:
        from datamodules.sources.recam import read_recam

        subtask = self.subtask if part == "fit" else self.eval_subtask
        names = {"fit": "train", "validate": "validation"}
        folder = None if self.data_dir is None else Path(self.data_dir)
        return read_recam(folder, subtask, names.get(part, part), self.intersection, self.subtask)

    def _read(self, path: str, part: str) -> ClozeRows:
        from datamodules.sources.cloze_files import ClozeColumns, read_cloze

        article, question, options, label, identity = self.columns
        choices = options if isinstance(options, str) else tuple(options)
        columns = ClozeColumns(article, question, choices, label, identity)
        return read_cloze(Path(path), columns, self._num_options, part)

    def questions(self, stage: str) -> ClozeRows:
        """The text of the questions of "fit", "validate", "test" or "predict"."""
        if stage == "predict":
            return self._predict_rows
        return self._parts[stage]

    @cached_property
    def _predict_rows(self) -> ClozeRows:
        if self.predict_path:
            rows = self._read(self.predict_path, "predict")
        elif self.source == "recam":
            found = self._recam("predict")
            rows = self._parts["test"] if found is None else found
        else:
            rows = self._parts["test"]
        check_same_options([rows], self.num_options)
        return rows

    @cached_property
    def num_options(self) -> int:
        """Options K of every question."""
        return self._parts["fit"].num_options

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer, trained on first use where it is to be trained."""
        from datamodules.cloze_tokenizer import load_tokenizer

        # Before the filter: other questions to test on must not change the vocabulary.
        train = partial(training_texts, self._unfiltered["fit"])
        return load_tokenizer(self.tokenizer_name, train, self.tokenizer_size, self.mark_option)

    @cached_property
    def vocab_size(self) -> int:
        """Number of tokens, marker tokens included."""
        return len(self.tokenizer)

    @cached_property
    def _priors(self) -> Any:
        from datamodules.sources.cloze_priors import OptionPriors

        return OptionPriors.fit(self._parts["fit"])

    def priors(self, stage: str) -> dict[str, float]:
        """Accuracy of answers that read no question: chance, the most frequent place, and the words' frequency."""
        found: dict[str, float] = self._priors.accuracy(self.questions(stage))
        return found

    def state_dict(self) -> dict[str, Any]:
        """The tokenizer's fingerprint, as token ids mean nothing with another one, and the number of questions."""
        from datamodules.cloze_tokenizer import tokenizer_fingerprint

        fingerprint = tokenizer_fingerprint(self.tokenizer)
        return {"source": self.source, "tokenizer": fingerprint, "questions": len(self._parts["fit"])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare the tokenizer of a checkpoint with this one, and warn of training questions that are held out here.

        Raises:
            ValueError: If they differ.
        """
        own = self.state_dict()
        if own["tokenizer"] != state_dict["tokenizer"]:
            raise ValueError(
                f"the checkpoint was trained with another tokenizer (on data of source={state_dict['source']!r}) than "
                f"tokenizer={self.tokenizer_name!r} gives here. Give the one of that run: --data.tokenizer "
                "RUN_FOLDER/tokenizer"
            )
        known = state_dict["questions"] - own["questions"]
        if known > 0 and state_dict["questions"] <= len(self._unfiltered["fit"]):
            log.warning(
                "%s: %d questions about passages of the validation or the test here were there in the checkpoint's "
                "training, so that results may be too good: train with this test_path, which leaves them out",
                self.source, known,
            )  # fmt: skip

    def prepare_data(self) -> None:
        """Read files and tokenizer once, so that errors come from one process."""
        self.tokenizer  # noqa: B018 - read on first use

    def setup(self, stage: str) -> None:
        """Tokenise the questions of a stage; later calls cost nothing."""
        for part in {"fit": ("fit", "validate")}.get(stage, (stage,)):
            self._tokenised(part)

    def _tokenised(self, part: str) -> ClozeTokens:
        if part in self._tokens:
            return self._tokens[part]
        from datamodules.cloze_tokens import ClozeTokens

        rows = self.questions(part)
        if part != "predict" and not rows.labelled:
            raise ValueError(
                f"{rows.name} has no labels, which training, validation and test need: answer its questions with "
                "`predict`"
            )
        tokens = ClozeTokens(
            rows,
            self.tokenizer,
            encode=self.encode,
            mode=self.mode,
            with_passage=self.with_passage,
            max_length=self.max_length,
            masks=self.masks,
            capitalize_initial=self.capitalize_initial,
            mark_option=self.mark_option,
            detokenize=self.detokenize_question,
            lenient=self.lenient_duplicates,
        )
        self._tokens[part] = tokens
        return tokens

    def train_dataloader(self) -> BatchLoader:
        """Training batches in an order keyed by seed and epoch; all ranks have equal batches."""
        tokens = self._tokenised("fit")
        lengths = tokens.lengths if self.bucketed else None
        sampler = training_sampler(len(tokens), self.batch_size, self.seed, self.trainer, "questions", lengths)
        return self._loader(tokens, sampler)

    def _eval_loader(self, part: str) -> BatchLoader:
        tokens = self._tokenised(part)
        order = tokens.lengths.argsort(stable=True)
        return self._loader(tokens, KeyedSampler(len(tokens), self.eval_batch_size, order=order))

    def val_dataloader(self) -> BatchLoader:
        """Validation questions, in the order of length."""
        return self._eval_loader("validate")

    def test_dataloader(self) -> BatchLoader:
        """Test questions, in the order of length."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> BatchLoader:
        """Questions to answer, in the order of length."""
        return self._eval_loader("predict")
