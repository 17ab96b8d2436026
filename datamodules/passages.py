"""Passages for the pre-training of a masked language model: of ReCAM, of one's own files, and generated ones."""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from lightning import LightningDataModule

from datamodules.loading import BatchLoader, KeyedSampler, LoaderMixin, training_sampler
from datamodules.options import at_least, one_of
from datamodules.passage_pieces import PassageBatch, PassagePieces

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerFast

    from datamodules.cloze_rows import ClozeRows

__all__ = ["PassageBatch", "PassageData"]

log = logging.getLogger(__name__)

SOURCES = ("embedded", "recam", "files")


class _Texts(NamedTuple):
    """Passages, and the filled questions of each (none in most sources)."""

    passages: list[str]
    questions: list[list[str]]

    def take(self, rows: list[int]) -> _Texts:
        return _Texts([self.passages[row] for row in rows], [self.questions[row] for row in rows])


def _alone(passages: list[str]) -> _Texts:
    return _Texts(passages, [[] for _ in passages])


def _with_questions(texts: _Texts, rows: ClozeRows) -> _Texts:
    """Passages with the questions about them, the right option in its slot."""
    from datamodules.cloze_text import fill_placeholder
    from datamodules.sources.cloze_overlap import article_key

    index = {article_key(passage): place for place, passage in enumerate(texts.passages)}
    columns = (rows.articles, rows.questions, rows.options, rows.labels.tolist())
    for article, question, options, label in zip(*columns, strict=True):
        texts.questions[index[article_key(article)]].append(fill_placeholder(question, options[label])[0])
    return texts


class PassageData(LoaderMixin, LightningDataModule):
    """Passages as masked token sequences.

    Reads the passages of the generated cloze questions (no file, no network), those of ReCAM (of all of its files, as
    passages need no label), and the user's own: `.txt`, `.jsonl`, `.json`, `.csv`, `.tsv` (all also `.gz`) or
    `.parquet`.

    Args:
        source: "embedded" (default), "recam", or "files" (implied by `path`).
        path: Passages to train on, and to validate on a share of them.
        test_path: Passages to test on, in the formats of `path`; by default those of the validation.
        text_column: Column or key of the passages; `.txt` files have none.
        paragraphs: Whether a passage of a `.txt` file ends at a blank line only, instead of at each line's end.
        data_dir: Folder of ReCAM's files; `$ZOO_DATA/recam_semeval2021_task4` by default.
        questions: Whether labelled training questions, with the right option in its slot, follow their passages as
            second segment; by default in the embedded sample only. Those of ReCAM about passages of its validation or
            test are left out.
        subtask: ReCAM's subtask of the questions: 1 or 2.
        tokenizer: "train" (word pieces of the training passages), "words" (their most frequent words), a local folder
            or a hub id.
        tokenizer_size: Vocabulary of "train" and "words".
        max_length: Longest sequence; longer passages give several.
        mlm_probability: Share of the tokens to predict.
        validation_fraction: Share of the passages to validate on.
        sample_passages: Passages of the embedded sample.
        batch_size: Sequences of a training batch of one process.
        eval_batch_size: Sequences of a batch of one process in validation and test.
        bucketed: Whether sequences of about one length share a training batch.
        num_workers: Worker processes.
        pin_memory: Whether batches are in page-locked memory; by default where a GPU is.
        seed: Key of order and masks in training; by default the one of `seed_everything`.

    Raises:
        ValueError: If options contradict each other or are out of range.
    """

    def __init__(
        self,
        source: str | None = None,
        path: str | None = None,
        test_path: str | None = None,
        text_column: str = "text",
        paragraphs: bool = False,
        data_dir: str | None = None,
        questions: bool | None = None,
        subtask: int = 1,
        tokenizer: str = "train",
        tokenizer_size: int = 8_000,
        max_length: int = 512,
        mlm_probability: float = 0.15,
        validation_fraction: float = 0.1,
        sample_passages: int = 1_000,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        bucketed: bool = True,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.source = source or ("files" if path else "embedded")
        self.path, self.test_path, self.text_column, self.paragraphs = path, test_path, text_column, paragraphs
        self.data_dir, self.subtask = data_dir, subtask
        self.questions = self.source == "embedded" if questions is None else questions
        self.tokenizer_name, self.tokenizer_size = tokenizer, tokenizer_size
        self.max_length, self.mlm_probability = max_length, mlm_probability
        self.validation_fraction, self.sample_passages = validation_fraction, sample_passages
        self.batch_size, self.eval_batch_size, self.bucketed = batch_size, eval_batch_size, bucketed
        self.num_workers, self.seed = num_workers, seed
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._pieces: dict[str, PassagePieces] = {}
        self._check_options()

    def _check_options(self) -> None:
        one_of(("source", self.source, SOURCES), ("subtask", self.subtask, (1, 2)))
        at_least(
            ("tokenizer_size", self.tokenizer_size, 32),
            ("max_length", self.max_length, 8),
            ("sample_passages", self.sample_passages, 2),
            ("batch_size", self.batch_size, 1),
            ("eval_batch_size", self.eval_batch_size, 1),
            ("num_workers", self.num_workers, 0),
        )
        for name, share in (
            ("mlm_probability", self.mlm_probability),
            ("validation_fraction", self.validation_fraction),
        ):
            if not 0 < share < 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {share}")
        if self.path and self.source != "files":
            raise ValueError(f"path={self.path} and source={self.source!r} contradict each other: give one of the two")
        if self.source == "files" and not self.path:
            raise ValueError("source='files' needs path: passages as .txt, .jsonl, .csv, .tsv or .parquet")
        if self.data_dir and self.source != "recam":
            raise ValueError(f"data_dir holds ReCAM's files, but source={self.source!r}: use path for a file")
        if self.questions and self.source == "files":
            raise ValueError("questions=True is for ReCAM and the embedded sample: a file of passages has none")

    @cached_property
    def _texts(self) -> dict[str, _Texts]:
        """Passages of training, validation and test, read on first use."""
        texts = self._read()
        count = len(texts.passages)
        held = max(1, round(self.validation_fraction * count))
        if held >= count:
            raise ValueError(
                f"{self.path or self.source}: {count} passages leave none to train on with validation_fraction="
                f"{self.validation_fraction}: give more passages"
            )
        # The split is the same in every run, whatever its seed.
        order = np.random.default_rng(0).permutation(count).tolist()
        parts = {"fit": texts.take(sorted(order[held:])), "validate": texts.take(sorted(order[:held]))}
        parts["test"] = _alone(self._read_file(self.test_path)) if self.test_path else parts["validate"]
        log.info(
            "%s: %s passages", self.source, ", ".join(f"{len(part.passages)} {name}" for name, part in parts.items())
        )
        return parts

    def _read(self) -> _Texts:
        if self.source == "files":
            assert self.path is not None
            return _alone(self._read_file(self.path))
        if self.source == "embedded":
            from datamodules.sources.cloze_sample import QUESTIONS_PER_PASSAGE, cloze_sample

            rows = cloze_sample(QUESTIONS_PER_PASSAGE * self.sample_passages)
            texts = _alone(list(dict.fromkeys(rows.articles)))
            return _with_questions(texts, rows) if self.questions else texts
        from datamodules.sources.recam import passages

        texts = _alone(passages(self._recam_folder))
        return _with_questions(texts, self._training_questions()) if self.questions else texts

    @property
    def _recam_folder(self) -> Path | None:
        return None if self.data_dir is None else Path(self.data_dir)

    def _read_file(self, path: str) -> list[str]:
        from datamodules.sources.passage_files import read_passages

        # A text file to test on may stand beside a table to train on.
        paragraphs = self.paragraphs and Path(path).name.removesuffix(".gz").endswith(".txt")
        return read_passages(path, self.text_column, paragraphs)

    def _training_questions(self) -> ClozeRows:
        """ReCAM's training questions, none whose answer validation or test asks for."""
        from datamodules.sources.cloze_overlap import drop_overlap
        from datamodules.sources.recam import read_recam

        train, *others = (
            read_recam(self._recam_folder, self.subtask, part) for part in ("train", "validation", "test")
        )
        assert train is not None
        return drop_overlap(train, *(other for other in others if other is not None))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer, trained on first use where it is to be trained."""
        from datamodules.cloze_tokenizer import load_tokenizer

        return load_tokenizer(self.tokenizer_name, self._training_texts, self.tokenizer_size)

    def _training_texts(self) -> Iterator[str]:
        part = self._texts["fit"]
        yield from part.passages
        for questions in part.questions:
            yield from questions

    @cached_property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self.tokenizer)

    def state_dict(self) -> dict[str, Any]:
        """The tokenizer's fingerprint: a checkpoint's token ids mean nothing with another one."""
        from datamodules.cloze_tokenizer import tokenizer_fingerprint

        return {"source": self.source, "tokenizer": tokenizer_fingerprint(self.tokenizer)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare the tokenizer of a checkpoint with this one.

        Raises:
            ValueError: If they differ.
        """
        if self.state_dict()["tokenizer"] != state_dict["tokenizer"]:
            raise ValueError(
                f"the checkpoint was trained with another tokenizer (on data of source={state_dict['source']!r}) than "
                f"tokenizer={self.tokenizer_name!r} gives here. Give the one of that run: --data.tokenizer "
                "RUN_FOLDER/tokenizer"
            )

    def prepare_data(self) -> None:
        """Read files and tokenizer once, so that errors come from one process."""
        self.tokenizer  # noqa: B018 - read on first use

    def setup(self, stage: str) -> None:
        """Tokenise the passages of a stage; later calls cost nothing."""
        # A Trainer's stage is no plain text, which the log would show.
        for part in {"fit": ("fit", "validate"), "validate": ("validate",), "test": ("test",)}.get(stage, ()):
            self._tokenised(part)

    def _tokenised(self, part: str) -> PassagePieces:
        if part not in self._pieces:
            texts = self._texts[part]
            pieces = PassagePieces(
                texts.passages,
                self.tokenizer,
                max_length=self.max_length,
                mlm_probability=self.mlm_probability,
                questions=texts.questions,
                key=None if part == "fit" else 0,
            )
            if pieces.left_out:
                log.warning("%s: %d of %d %s passages have no token of the tokenizer and are left out",
                            self.source, pieces.left_out, len(texts.passages), part)  # fmt: skip
            self._pieces[part] = pieces
        return self._pieces[part]

    def train_dataloader(self) -> BatchLoader:
        """Training batches in an order keyed by seed and epoch, with new masks in every epoch."""
        pieces = self._tokenised("fit")
        lengths = pieces.lengths if self.bucketed else None
        sampler = training_sampler(len(pieces), self.batch_size, self.seed, self.trainer, "sequences", lengths)
        return self._loader(pieces, sampler)

    def _eval_loader(self, part: str) -> BatchLoader:
        pieces = self._tokenised(part)
        order = pieces.lengths.argsort(stable=True)
        return self._loader(pieces, KeyedSampler(len(pieces), self.eval_batch_size, order=order))

    def val_dataloader(self) -> BatchLoader:
        """Validation sequences in the order of length, with the same masks each time."""
        return self._eval_loader("validate")

    def test_dataloader(self) -> BatchLoader:
        """Test sequences in the order of length, with the same masks each time."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> BatchLoader:
        """The test's sequences."""
        return self._eval_loader("test")
