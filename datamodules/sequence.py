"""Sequences of items that users chose, with times: leave-one-out batches for next-item recommendation."""

from __future__ import annotations

import logging
import zlib
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning import LightningDataModule

from datamodules.loading import BatchLoader, KeyedSampler, LoaderMixin, training_sampler
from datamodules.options import at_least, one_of
from datamodules.sequence_rows import HistoryRows, SequenceBatch, SequenceTable, TrainRows
from datamodules.sources.interactions import (
    Interactions,
    core,
    drop_absent_items,
    gap_variance,
    half,
    limit_length,
    offsets_of,
    rank_of,
    return_memory,
    sample_users,
    sort_by_time,
)
from datamodules.sources.sequence_files import read_path
from datamodules.sources.sequence_sets import ORDERS, SETS, read_set

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["SequenceBatch", "SequenceData", "SequenceTable"]

log = logging.getLogger(__name__)

SOURCES = ("embedded", *SETS, "files")
UNIFORMITIES = ("train_times", "all_times", "file_order", "official")


class SequenceData(LoaderMixin, LightningDataModule):
    """Users' item sequences, split by leave-one-out, in whole batches.

    Of a user's items v_1..v_m, training takes v_1..v_{m-3} as input and v_2..v_{m-2} as targets; validation predicts
    v_{m-1} and test v_m, each after everything before it. Inputs are cut to their last `max_length` items.

    Reads the embedded sample (no file, no network), the published sets in the two-file format, and the user's own data:
    `path` names a two-file `.txt` (or `.txt.gz`) item file, a CSV or TSV (also `.gz`) or a Parquet file.

    Args:
        source: "embedded" (default), "beauty", "sports", "home", "yelp_a", "yelp_b", or "files" (implied by `path`).
        path: Item file, or table of interactions.
        time_path: Time file beside a two-file item file; by default the one of the same name with `_time` for `_item`,
            if it is there.
        test_path: Sequences to test on instead of the training users' own last items, in the format of `path`. Ids are
            mapped through the training labels; unknown ones are counted and reported.
        data_dir: Folder of the published sets; `$ZOO_DATA` by default, or else the user's cache.
        order: Order of the users of a published set: "org" (by id), "var" (as published by variance), or "auto".
        user_column: Column of users in a table.
        item_column: Column of items in a table.
        time_column: Column of Unix seconds or dates in a table; None for a table in the order
            of the interactions.
        min_user_interactions: Iterated core: users with fewer interactions are removed.
        min_item_interactions: Iterated core: items with fewer interactions are removed.
        min_length: Users with fewer interactions are dropped, at least 4. By default such a user is an error.
        reindex: Whether item ids of a two-file item file that are not 1..V get new ones.
        sort: Whether to sort the times within a line of the two-file format; otherwise decreasing times are an error.
            A table is always sorted by user and time.
        drop_duplicates: Whether rows of a table that repeat user, item and time are dropped; otherwise an error.
        max_length: Longest input.
        batch_size: Training batch of one process.
        eval_batch_size: Batch of one process in validation, test and prediction.
        mask_seen: Whether evaluation excludes the user's input items from the ranking.
        repeat_pad: Whether training repeats a short sequence into the free places of its row (RepPad).
        repeat_separator: Whether one padding item stands between the copies.
        user_fraction: Share of users to keep, chosen at random, the same in every run.
        split: "uniform" or "nonuniform": only the users with the most even gaps between times, or only the others.
        split_by: Cut for `split` at half of the "users" or of the "interactions".
        uniformity: What `uniformity_rank` ranks: variance of the gaps between distinct times of the training part
            ("train_times") or of the whole sequence ("all_times"), the order of the users ("file_order"), or what the
            published code does, which tests row numbers against a list of user ids ("official").
        sample_users: Users of the embedded sample.
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
        time_path: str | None = None,
        test_path: str | None = None,
        data_dir: str | None = None,
        order: str = "auto",
        user_column: str = "user_id",
        item_column: str = "item_id",
        time_column: str | None = "timestamp",
        min_user_interactions: int | None = None,
        min_item_interactions: int | None = None,
        min_length: int | None = None,
        reindex: bool = False,
        sort: bool = False,
        drop_duplicates: bool = False,
        max_length: int = 50,
        batch_size: int = 128,
        eval_batch_size: int = 512,
        mask_seen: bool = True,
        repeat_pad: bool = False,
        repeat_separator: bool = True,
        user_fraction: float = 1.0,
        split: str | None = None,
        split_by: str = "users",
        uniformity: str = "train_times",
        sample_users: int = 1_000,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.source = source or ("files" if path else "embedded")
        self.path, self.time_path, self.test_path, self.data_dir = path, time_path, test_path, data_dir
        self.order, self.reindex, self.sort, self.drop_duplicates = order, reindex, sort, drop_duplicates
        self.user_column, self.item_column, self.time_column = user_column, item_column, time_column
        self.min_user_interactions, self.min_item_interactions = min_user_interactions, min_item_interactions
        self.min_length, self.user_fraction, self.sample_users = min_length, user_fraction, sample_users
        self.max_length, self.batch_size, self.eval_batch_size = max_length, batch_size, eval_batch_size
        self.mask_seen, self.repeat_pad, self.repeat_separator = mask_seen, repeat_pad, repeat_separator
        self.split, self.split_by, self.uniformity = split, split_by, uniformity
        self.num_workers, self.seed = num_workers, seed
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._frame: pd.DataFrame | None = None
        self._check_options()

    def _check_options(self) -> None:
        one_of(
            ("source", self.source, SOURCES),
            ("order", self.order, ORDERS),
            ("uniformity", self.uniformity, UNIFORMITIES),
            ("split", self.split, (None, "uniform", "nonuniform")),
            ("split_by", self.split_by, ("users", "interactions")),
        )
        at_least(
            ("max_length", self.max_length, 1),
            ("batch_size", self.batch_size, 1),
            ("eval_batch_size", self.eval_batch_size, 1),
            ("sample_users", self.sample_users, 1),
            ("min_length", self.min_length, 4),
            ("min_user_interactions", self.min_user_interactions, 1),
            ("min_item_interactions", self.min_item_interactions, 1),
            ("num_workers", self.num_workers, 0),
        )
        if not 0 < self.user_fraction <= 1:
            raise ValueError(f"user_fraction must be above 0 and at most 1, got {self.user_fraction}")
        if self.path and self.source != "files":
            raise ValueError(f"path={self.path} and source={self.source!r} contradict each other: give one of the two")
        if self.source == "files" and not self.path:
            raise ValueError("source='files' needs path: an item file (.txt, .txt.gz), a CSV or a Parquet file")
        if self.time_path and not self.path:
            raise ValueError(f"time_path={self.time_path} needs path, the item file that it belongs to")
        if self.data_dir and self.source not in SETS:
            raise ValueError(f"data_dir holds published sets, but source={self.source!r}: use path for a file")
        if self.order != "auto" and self.source not in SETS:
            raise ValueError(f"order={self.order!r} chooses between files of a published set, source={self.source!r}")

    @classmethod
    def from_dataframe(cls, df: pd.DataFrame, **options: Any) -> SequenceData:
        """A datamodule on a table of interactions in memory.

        Args:
            df: One row per interaction, in columns named by `user_column`, `item_column` and `time_column`.
            options: All other arguments of `SequenceData`; reading options do not apply.

        Raises:
            ValueError: If an option names another source of data.
        """
        for name in ("source", "path", "time_path", "data_dir"):
            if options.get(name) is not None:
                raise ValueError(f"from_dataframe reads df: remove {name}={options[name]!r}")
        data = cls(**options)
        data.source, data._frame = "dataframe", df
        return data

    def _read(self) -> Interactions:
        if self.source in SETS:
            return read_set(self.source, self.order, self.data_dir)
        if self.source == "embedded":
            from datamodules.sources.sequence_sample import sequence_sample

            return sequence_sample(self.sample_users)[0]
        columns = (self.user_column, self.item_column, self.time_column)
        if self._frame is not None:
            from datamodules.sources.sequence_tables import from_frame

            return from_frame(self._frame, columns, self.drop_duplicates, "dataframe")
        assert self.path is not None
        return read_path(Path(self.path), self.time_path, columns, self.reindex, self.sort, self.drop_duplicates)

    @cached_property
    def interactions(self) -> Interactions:
        """The data after all filters, read on first use (also downloaded, under a lock)."""
        data = self._read()
        if self.sort:
            data = sort_by_time(data)
        if self.min_user_interactions is not None or self.min_item_interactions is not None:
            data = core(data, self.min_user_interactions or 1, self.min_item_interactions or 1)
        data = limit_length(data, self.min_length)
        data = sample_users(data, self.user_fraction)
        if self.split is not None:
            data = half(data, self.split, self.split_by)
        data = drop_absent_items(data)
        if data.timestamps is not None and not gap_variance(data.timestamps, data.offsets).any():
            same = not np.diff(data.timestamps)[np.diff(data.rows()) == 0].any()
            if same:
                log.warning("%s: all times of every user are equal: choices by time become ties", data.name)
        log.info(
            "%s: %d users, %d items, %d interactions", data.name, data.num_users, data.num_items, len(data.item_ids)
        )
        return data

    @cached_property
    def num_items(self) -> int:
        """Size of the catalogue; item ids are 1..num_items."""
        return self.interactions.num_items

    @cached_property
    def num_users(self) -> int:
        """Number of users; rows are 0..num_users - 1."""
        return self.interactions.num_users

    @cached_property
    def item_labels(self) -> list[str]:
        """External ids: that of item k is at k, and an empty string for padding is at 0."""
        return ["", *map(str, self.interactions.item_labels.tolist())]

    @cached_property
    def user_labels(self) -> list[str]:
        """External ids: that of user row k is at k."""
        return [str(label) for label in self.interactions.user_labels.tolist()]

    @cached_property
    def sequences(self) -> SequenceTable:
        """All sequences, in the memory of `interactions`."""
        data = self.interactions
        times = data.timestamps
        return SequenceTable(
            torch.from_numpy(data.item_ids),
            None if times is None else torch.from_numpy(times),
            torch.from_numpy(data.offsets),
            torch.from_numpy(data.lengths - 2),
            torch.from_numpy(self._uniformity_rank(data)),
        )

    def _uniformity_rank(self, data: Interactions) -> np.ndarray[Any, np.dtype[np.int64]]:
        users = np.arange(data.num_users)
        if self.uniformity == "file_order":
            return users
        if self.uniformity == "official":
            return self._official_rank(data)
        if data.timestamps is None:
            return np.full_like(users, data.num_users)  # without times nobody is known to be uniform
        if self.uniformity == "all_times":
            return rank_of(gap_variance(data.timestamps, data.offsets), data.user_labels)
        lengths = data.lengths
        trained = np.arange(len(data.item_ids)) < np.repeat(data.offsets[1:] - 2, lengths)
        return rank_of(gap_variance(data.timestamps[trained], offsets_of(lengths - 2)), data.user_labels)

    def _official_rank(self, data: Interactions) -> np.ndarray[Any, np.dtype[np.int64]]:
        labels = data.user_labels
        if labels.dtype.kind != "i":
            raise ValueError(
                f"uniformity='official' compares row numbers with user ids, but user {labels[0]!r} of {data.name} is "
                "not a number"
            )
        rank = np.full(data.num_users, data.num_users)
        inside = (labels >= 0) & (labels < data.num_users)
        rank[labels[inside]] = np.flatnonzero(inside)
        return rank

    def state_dict(self) -> dict[str, Any]:
        """The catalogue's fingerprint: a checkpoint's item ids mean nothing with another one."""
        labels = "\n".join(map(str, self.interactions.item_labels.tolist()))
        return {"source": self.source, "num_items": self.num_items, "catalogue": zlib.crc32(labels.encode())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare the catalogue of a checkpoint with this one.

        Raises:
            ValueError: If they differ.
        """
        own = self.state_dict()
        if own["catalogue"] != state_dict["catalogue"]:
            raise ValueError(
                f"the checkpoint was trained on another catalogue: {state_dict['num_items']} items of source="
                f"{state_dict['source']!r}, here {own['num_items']} items of source={own['source']!r}. Use the data "
                "options of the training, and test_path for other sequences over its items"
            )

    def prepare_data(self) -> None:
        """Download what is missing."""
        if self.source in SETS:
            self.interactions  # noqa: B018 - read on first use

    def setup(self, stage: str) -> None:
        """Read the data; later calls cost nothing."""
        self.sequences  # noqa: B018 - read on first use
        if stage in ("fit", "validate", "test") and self.mask_seen:
            rows = self._history_rows("test" if stage == "test" else "validate")
            lost = rows.targets_in_history()
            if lost:
                log.info(
                    "%s: %d of %d %s targets (%.1f %%) are in the user's own history and out of reach as seen items "
                    "are masked; mask_seen=False ranks them",
                    self.source, lost, len(rows), "test" if stage == "test" else "validation", 100 * lost / len(rows),
                )  # fmt: skip
        return_memory()

    def _history_rows(self, stage: str) -> HistoryRows:
        if stage == "test" and self.test_path:
            return self._test_rows
        table = self.sequences
        held_back = {"validate": 2, "test": 1, "predict": 0}[stage]
        return HistoryRows(
            table.item_ids,
            table.offsets[:-1],
            table.offsets.diff() - held_back,
            torch.arange(self.num_users),
            self.max_length,
            self.mask_seen,
            targets=stage != "predict",
        )

    @cached_property
    def _test_rows(self) -> HistoryRows:
        from datamodules.sources.sequence_tables import map_to

        assert self.test_path is not None
        columns = (self.user_column, self.item_column, self.time_column)
        other = read_path(Path(self.test_path), None, columns, True, self.sort, self.drop_duplicates)
        if self.sort:
            other = sort_by_time(other)
        found = map_to(other, self.interactions)
        return HistoryRows(
            torch.from_numpy(found.item_ids),
            torch.from_numpy(found.starts),
            torch.from_numpy(found.lengths),
            torch.from_numpy(found.users),
            self.max_length,
            self.mask_seen,
        )

    def train_dataloader(self) -> BatchLoader:
        """Training batches in an order keyed by seed and epoch; all ranks have equal batches."""
        rows = TrainRows(self.sequences, self.max_length, self.repeat_pad, self.repeat_separator)
        sampler = training_sampler(len(rows), self.batch_size, self.seed, self.trainer, "users")
        return self._loader(rows, sampler)

    def _eval_loader(self, stage: str) -> BatchLoader:
        rows = self._history_rows(stage)
        return self._loader(rows, KeyedSampler(len(rows), self.eval_batch_size, order=rows.by_length()))

    def val_dataloader(self) -> BatchLoader:
        """The last but one item of each user, in the order of length."""
        return self._eval_loader("validate")

    def test_dataloader(self) -> BatchLoader:
        """The last item of each user, or of the users of `test_path`, in the order of length."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> BatchLoader:
        """The whole history of each user, in the order of length."""
        return self._eval_loader("predict")
