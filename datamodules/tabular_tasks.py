"""Tables whose rows have the labels of several tasks."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning import LightningDataModule

from datamodules.loading import BatchLoader, KeyedSampler, LoaderMixin, training_sampler
from datamodules.options import at_least
from datamodules.sources.interactions import return_memory
from datamodules.sources.task_sample import NUM_INPUTS, task_names, task_sample, tenths
from datamodules.sources.task_sets import SETS, read_set, set_columns
from datamodules.sources.task_tables import PARTS, Encoding, Parsed, Table, TaskColumns, parse, read_table
from datamodules.task_batches import TabularTaskBatch
from datamodules.task_fingerprint import check_fingerprint, fingerprint
from datamodules.task_rows import TaskRows, TaskTensors, describe_task, hide_labels, task_tensors

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

__all__ = ["TabularTaskBatch", "TabularTaskData"]

log = logging.getLogger(__name__)

SOURCES = ("embedded", *SETS, "files")
_FRAME = "dataframe"


class _Prepared(NamedTuple):
    """What `_prepared` makes of the source."""

    tensors: TaskTensors
    parts: dict[str, Tensor]
    columns: TaskColumns
    encoding: Encoding | None
    tasks: list[dict[str, Any]]


class TabularTaskData(LoaderMixin, LightningDataModule):
    """Rows of a table with the labels of several tasks, in whole batches.

    Reads the embedded sample (no file, no network), known sets, and the user's own tables. Categories are coded from 1
    by the training rows, 0 stands for all others; numbers are standardised by the training rows, and an empty cell
    gets their median; an empty target is a label that is not there. The embedded sample's inputs are used as they are.

    Args:
        source: "embedded" (default), "adult", "crime", "bike", "census_income", "tiktok", "wechat", or "files" (implied
            by `path`).
        path: CSV or TSV with a header (also `.gz`), or Parquet, with the columns declared below.
        test_path: Rows to test on instead of those of the test part: a file of the same columns or, for a known set, of
            its format. Categories are coded as in training; unknown ones are counted and reported.
        data_dir: Folder of the known sets; `$ZOO_DATA` by default, or else the user's cache.
        categorical_columns: Inputs that are categories; for a known set, in place of its own.
        numeric_columns: Inputs that are numbers; for a known set, in place of its own.
        binary_targets: Targets in {0, 1}.
        multiclass_targets: Targets in 0..C-1.
        regression_targets: Targets that are numbers.
        user_column: Users, for metrics within a user; may be an input too.
        split_column: Part of each row: "train", "validation" or "test". By default parts are drawn at random.
        validation_fraction: Share of the rows for validation; 0.1 by default, or what the known set is split into.
        test_fraction: Share of the rows for test; likewise. 0 is allowed with `test_path`.
        split_seed: Key of the split and of `missing_fraction`.
        tasks: Which tasks, in this order; by default all that are declared, or that the known set names.
        target_scaling: Whether `tasks` carry mean and standard deviation of the training targets of a regression;
            otherwise 0 and 1. By default they do, but for the embedded sample, whose scales are its point.
        min_category_count: Categories with fewer training rows are taken for unknown; 1 by default, 10 for "tiktok"
            and "wechat".
        missing_fraction: Share of each task's training labels to hide, at random.
        sample_rows: Training rows of the embedded sample; validation and test have a third of it each.
        sample_scales: Scales of the embedded sample's tasks, one for each.
        sample_categories: So many first inputs of the embedded sample are given as categories too: their tenths.
        batch_size: Training batch of one process.
        eval_batch_size: Batch of one process in validation, test and prediction.
        num_workers: Worker processes; 0 is the fastest, as a batch is one gather.
        pin_memory: Whether batches are in page-locked memory; by default where a GPU is.
        seed: Key of the order of training; by default the one of `seed_everything`.

    Raises:
        ValueError: If options contradict each other or are out of range.
    """

    def __init__(
        self,
        source: str | None = None,
        path: str | None = None,
        test_path: str | None = None,
        data_dir: str | None = None,
        categorical_columns: list[str] | None = None,
        numeric_columns: list[str] | None = None,
        binary_targets: list[str] | None = None,
        multiclass_targets: list[str] | None = None,
        regression_targets: list[str] | None = None,
        user_column: str | None = None,
        split_column: str | None = None,
        validation_fraction: float | None = None,
        test_fraction: float | None = None,
        split_seed: int = 0,
        tasks: list[str] | None = None,
        target_scaling: bool | None = None,
        min_category_count: int | None = None,
        missing_fraction: float = 0.0,
        sample_rows: int = 3_072,
        sample_scales: list[float] = [1.0, 100.0],  # noqa: B006 - read only, and a plain YAML value
        sample_categories: int = 0,
        batch_size: int = 256,
        eval_batch_size: int = 4_096,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.source = source or ("files" if path else "embedded")
        self.path, self.test_path, self.data_dir = path, test_path, data_dir
        self.categorical_columns, self.numeric_columns = categorical_columns, numeric_columns
        self.targets = [
            (name, kind)
            for kind, names in (
                ("binary", binary_targets),
                ("multiclass", multiclass_targets),
                ("regression", regression_targets),
            )
            for name in names or []
        ]
        self.user_column, self.split_column = user_column, split_column
        self.validation_fraction, self.test_fraction, self.split_seed = validation_fraction, test_fraction, split_seed
        self.chosen_tasks, self.target_scaling = tasks, target_scaling
        self.min_category_count, self.missing_fraction = min_category_count, missing_fraction
        self.sample_rows, self.sample_scales = sample_rows, list(sample_scales)
        self.sample_categories = sample_categories
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.num_workers, self.seed = num_workers, seed
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._frame: pd.DataFrame | None = None
        self._check_options()
        self._columns = self._declared_columns()

    def _check_options(self) -> None:
        if self.source not in (*SOURCES, _FRAME):
            raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {self.source!r}")
        at_least(
            ("batch_size", self.batch_size, 1),
            ("eval_batch_size", self.eval_batch_size, 1),
            ("num_workers", self.num_workers, 0),
            ("min_category_count", self.min_category_count, 1),
            ("sample_rows", self.sample_rows, 3),
            ("sample_categories", self.sample_categories, 0),
            ("validation_fraction", self.validation_fraction, 0),
            ("test_fraction", self.test_fraction, 0),
            ("missing_fraction", self.missing_fraction, 0),
        )
        if self.missing_fraction >= 1:
            raise ValueError(f"missing_fraction must be below 1, got {self.missing_fraction}")
        if (self.validation_fraction or 0) + (self.test_fraction or 0) >= 1:
            raise ValueError(
                f"validation_fraction={self.validation_fraction} and test_fraction={self.test_fraction} leave no rows "
                "for training"
            )
        if not self.sample_scales or not all(scale > 0 for scale in self.sample_scales):
            raise ValueError(f"sample_scales must be numbers above 0, one a task, got {self.sample_scales}")
        if self.path and self.source != "files":
            raise ValueError(f"path={self.path} and source={self.source!r} contradict each other: give one of the two")
        if self.source == "files" and not self.path:
            raise ValueError("source='files' needs path: a CSV, TSV or Parquet file")
        if self.data_dir and self.source not in SETS:
            raise ValueError(f"data_dir holds known sets, but source={self.source!r}: use path for a file")
        fractions = {"validation_fraction": self.validation_fraction, "test_fraction": self.test_fraction}
        given = [f"{name}={value}" for name, value in fractions.items() if value is not None]
        if self.split_column and given:
            raise ValueError(f"split_column={self.split_column!r} and {given[0]} contradict each other: give one")
        own = {"targets": self.targets, "user_column": self.user_column, "split_column": self.split_column}
        inputs = {"categorical_columns": self.categorical_columns, "numeric_columns": self.numeric_columns}
        if self.source in SETS:
            self._refuse(own, "declares columns of your own file, but the known set has its own")
        elif self.source == "embedded":
            self._refuse({**own, **inputs}, "declares columns of your own file, but there is no path")
            self._refuse({"test_path": self.test_path, **fractions}, "does not apply to the embedded sample")

    def _refuse(self, options: dict[str, Any], why: str) -> None:
        for name, value in options.items():
            if value:
                raise ValueError(f"{name}={value} {why}: source={self.source!r}")

    def _declared_columns(self) -> TaskColumns:
        """What the columns are for, before anything is read."""
        own = [(name, "regression") for name in task_names(self.sample_scales)] if self.source == "embedded" else []
        kinds = dict(own or self.targets) if self.source not in SETS else SETS[self.source].kinds
        chosen = self.chosen_tasks
        if chosen is not None:
            if not chosen or len(set(chosen)) < len(chosen):
                raise ValueError(f"tasks must name at least one task, each once, got {chosen}")
            if unknown := next((name for name in chosen if name not in kinds), None):
                raise ValueError(f"tasks must be some of {', '.join(kinds)}, got {unknown!r}")
        if self.source in SETS:
            return set_columns(self.source, chosen, self.categorical_columns, self.numeric_columns)
        if self.source == "embedded":
            numeric = tuple(f"x_{k}" for k in range(1, NUM_INPUTS + 1))
            tenths = tuple(f"{name}_tenth" for name in numeric[: self.sample_categories])
            return TaskColumns(tenths, numeric, tuple((name, "regression") for name in chosen or kinds))
        columns = TaskColumns(
            tuple(self.categorical_columns or ()),
            tuple(self.numeric_columns or ()),
            tuple(self.targets),
            self.user_column,
            self.split_column,
        )
        if not columns.targets:
            raise ValueError(
                "a table needs a target: name columns in binary_targets, multiclass_targets or regression_targets"
            )
        if not (columns.categorical or columns.numeric):
            raise ValueError("a table needs an input: name columns in categorical_columns or numeric_columns")
        return replace(columns, targets=tuple((name, kinds[name]) for name in chosen or kinds))

    @classmethod
    def from_dataframe(cls, df: pd.DataFrame, **options: Any) -> TabularTaskData:
        """A datamodule on a table in memory.

        Args:
            df: One row per example, in the declared columns.
            options: All other arguments of `TabularTaskData`.

        Raises:
            ValueError: If an option names another source of data.
        """
        for name in ("source", "path", "data_dir"):
            if options.get(name) is not None:
                raise ValueError(f"from_dataframe reads df: remove {name}={options[name]!r}")
        data = cls(source=_FRAME, **options)
        data._frame = df
        return data

    def _read(self) -> tuple[Table, TaskColumns]:
        if self.source in SETS:
            return read_set(self.source, self._columns, self.data_dir)
        if self.path is not None:
            return read_table(Path(self.path), self._columns), self._columns
        if self._frame is None:
            raise ValueError("a table in memory is given by TabularTaskData.from_dataframe(df, ...), not by source")
        return Table(self._frame, _FRAME), self._columns

    @cached_property
    def _prepared(self) -> _Prepared:
        """Everything about the table, read on first use (also downloaded, under a lock)."""
        if self.source == "embedded":
            name, columns, encoding = "embedded", self._columns, None
            tensors, parts = self._sample()
        else:
            table, columns = self._read()
            parsed = parse(table, columns)
            name, parts = parsed.name, self._parts(parsed)
            known = SETS.get(self.source)
            count = self.min_category_count or (known.min_category_count if known else 1)
            encoding = Encoding.fit(parsed, columns, parts["train"].numpy(), count)
            tensors = task_tensors(parsed, encoding)
        classes = {task: int(tensors.targets[task].max()) + 1 for task, kind in columns.targets if kind == "multiclass"}
        if self.missing_fraction:
            tensors = hide_labels(tensors, parts["train"], self.missing_fraction, self.split_seed)
        scaling = self.source != "embedded" if self.target_scaling is None else self.target_scaling
        tasks = [
            describe_task(name, task, kind, tensors, parts["train"], classes.get(task), scaling)
            for task, kind in columns.targets
        ]
        log.info(
            "%s: %s rows to train, validate and test on; %d categorical and %d numeric inputs; tasks %s",
            name, ", ".join(str(len(rows)) for rows in parts.values()), tensors.categories.shape[1],
            tensors.numbers.shape[1], ", ".join(task for task, _ in columns.targets),
        )  # fmt: skip
        return _Prepared(tensors, parts, columns, encoding, tasks)

    def _sample(self) -> tuple[TaskTensors, dict[str, Tensor]]:
        held_out = self.sample_rows // 3
        sizes = [self.sample_rows, held_out, held_out]
        inputs, targets = task_sample(self.sample_scales, sizes)
        numbers = torch.cat(inputs)
        chosen = {name: torch.cat(targets[name]) for name, _ in self._columns.targets}
        tensors = TaskTensors(tenths(numbers[:, : self.sample_categories]), numbers, chosen, {}, None)
        return tensors, dict(zip(PARTS, torch.split(torch.arange(len(numbers)), sizes), strict=True))

    def _parts(self, parsed: Parsed) -> dict[str, Tensor]:
        """The rows of each part, in the order of the table."""
        total = len(parsed.numbers)
        if parsed.parts is not None:
            own = torch.from_numpy(parsed.parts)
            parts = {name: (own == k).nonzero()[:, 0] for k, name in enumerate(PARTS)}
        else:
            order = torch.randperm(total, generator=torch.Generator().manual_seed(self.split_seed))
            rows = [part.sort().values for part in torch.split(order, self._sizes(total))]
            parts = dict(zip(PARTS, rows, strict=True))
        for name, rows_of in parts.items():
            if not len(rows_of) and not (name == "test" and self.test_path):
                way_out = f"{self.split_column} never says so" if self.split_column else "give it a larger fraction"
                raise ValueError(f"{parsed.name}: the {name} part has none of the {total} rows: {way_out}")
        return parts

    def _sizes(self, total: int) -> list[int]:
        known = SETS.get(self.source)
        if known and known.sizes and self.validation_fraction is None and self.test_fraction is None:
            return list(known.sizes)
        defaults = known.fractions if known else (0.1, 0.1)
        given = (self.validation_fraction, self.test_fraction)
        held_out = [
            round(total * (default if own is None else own)) for own, default in zip(given, defaults, strict=True)
        ]
        return [total - sum(held_out), *held_out]

    @cached_property
    def tasks(self) -> list[dict[str, Any]]:
        """Name, kind, num_outputs, target_mean and target_std of each task."""
        return self._prepared.tasks

    @cached_property
    def task_names(self) -> list[str]:
        """Names of the tasks."""
        return [task["name"] for task in self.tasks]

    @cached_property
    def cardinalities(self) -> list[int]:
        """Number of codes of each categorical column, the unknown code 0 included."""
        encoding = self._prepared.encoding
        if encoding is None:
            return [11] * self.sample_categories
        return [len(vocabulary) + 1 for vocabulary in encoding.vocabularies]

    @cached_property
    def num_numeric(self) -> int:
        """Number of numeric columns."""
        return self._prepared.tensors.numbers.shape[1]

    def state_dict(self) -> dict[str, Any]:
        """Columns, vocabularies, the split and what numbers are standardised by: other ones would not fit a model."""
        return fingerprint(self.source, self._prepared.columns, self._prepared.encoding, self._prepared.parts)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare a checkpoint's table with this one.

        Raises:
            ValueError: If they differ.
        """
        check_fingerprint(self.state_dict(), state_dict)

    def prepare_data(self) -> None:
        """Download what is missing."""
        if self.source in SETS:
            self._prepared  # noqa: B018 - read on first use

    def setup(self, stage: str) -> None:
        """Read the data; later calls cost nothing."""
        self._prepared  # noqa: B018 - read on first use
        if stage == "test":
            self._test_rows  # noqa: B018 - read on first use
        if stage == "predict":
            self._predict_rows  # noqa: B018 - read on first use
        return_memory()

    @cached_property
    def _test_rows(self) -> TaskRows:
        return self._rows_to_test(labelled=True)

    @cached_property
    def _predict_rows(self) -> TaskRows:
        """The rows to test on, whose labels a user's own file need not have."""
        return self._rows_to_test(labelled=self.source in SETS)

    def _rows_to_test(self, labelled: bool) -> TaskRows:
        prepared = self._prepared
        if self.test_path is None:
            return TaskRows(prepared.tensors, prepared.parts["test"])
        assert prepared.encoding is not None
        columns, path = replace(prepared.columns, split=None), Path(self.test_path)
        if not labelled:
            columns = replace(columns, targets=(), user=None)
        table = SETS[self.source].read(path, columns) if self.source in SETS else read_table(path, columns)
        parsed = parse(table, columns, {task["name"]: task["num_outputs"] for task in prepared.tasks})
        return TaskRows(task_tensors(parsed, prepared.encoding), torch.arange(len(parsed.numbers)))

    def train_dataloader(self) -> BatchLoader:
        """Training batches in an order keyed by seed and epoch; all ranks have equal batches."""
        rows = TaskRows(self._prepared.tensors, self._prepared.parts["train"])
        sampler = training_sampler(len(rows), self.batch_size, self.seed, self.trainer)
        return self._loader(rows, sampler)

    def _eval_loader(self, rows: TaskRows) -> BatchLoader:
        return self._loader(rows, KeyedSampler(len(rows), self.eval_batch_size))

    def val_dataloader(self) -> BatchLoader:
        """The rows of the validation part, in the order of the table."""
        return self._eval_loader(TaskRows(self._prepared.tensors, self._prepared.parts["validation"]))

    def test_dataloader(self) -> BatchLoader:
        """The rows of the test part, or those of `test_path`, in the order of their table."""
        return self._eval_loader(self._test_rows)

    def predict_dataloader(self) -> BatchLoader:
        """The rows that are tested on, in the same order."""
        return self._eval_loader(self._predict_rows)
