"""Implicit feedback on items that have features: training pairs, and users to rank all items for."""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning import LightningDataModule

from datamodules.interaction_checks import check_fingerprint, check_table, fingerprint, known_pairs
from datamodules.interaction_features import NORMS, choose_modalities, normalise, replace_missing
from datamodules.interaction_rows import (
    InteractionBatch,
    InteractionTable,
    RankingBatch,
    RankingRows,
    TrainInteractions,
    TrainUsers,
    UserSampler,
)
from datamodules.interaction_split import RULES, TEST, TRAIN, VALIDATION, assign_parts, cold_split, iterated_core
from datamodules.loading import BatchLoader, KeyedSampler, LoaderMixin, follow, run_seed, training_sampler
from datamodules.options import at_least, one_of
from datamodules.sources.interaction_files import LAYOUTS, read_files
from datamodules.sources.interaction_sets import SOURCES, read_set
from datamodules.sources.interactions import return_memory

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["InteractionBatch", "InteractionData", "InteractionTable", "RankingBatch", "check_table"]

log = logging.getLogger(__name__)

_STAGES = {"validate": VALIDATION, "test": TEST}


class InteractionData(LoaderMixin, LightningDataModule):
    """Pairs of users and items, and features of the items, in whole batches.

    Training takes pairs; the model draws its negatives from the keys of a batch. Evaluation ranks all items for every
    user who has something to find and something in the training. It masks what the user has in the training and nothing
    else: validation items stay in the ranking of the test, as in the published protocol. Prediction ranks for all users
    under the same mask.

    Reads the embedded sample (no file, no network), published sets, and the user's own data: `path` names a folder in
    the layout of MMRec (`.inter` and `.npy`) or LATTICE (`{train,val,test}.json` and `.npy`), or a table of pairs.

    Args:
        source: "embedded" (default), "movielens", "tiktok", "baby", "sports", "clothing", or "files" (implied by
            `path`).
        path: Folder or file of the user's own data.
        layout: Layout of `path`: "mmrec", "lattice", "table", or "auto" to tell by the files that are there.
        data_dir: Folder of the published sets; `$ZOO_DATA` by default, or else the user's cache.
        test_path: Pairs to test on instead of the test part: CSV, TSV, Parquet, `.inter`, or a `test.json` of LATTICE.
            Users and items are known by their labels; pairs of unknown ones are counted and left out.
        modalities: Features to use; by default all that the source has.
        feature_norm: "l2" (rows of length 1), "standardize" (columns of mean 0 and deviation 1), or None.
        missing_rate: Share of the items, chosen at random, that lose one random modality: its vector becomes the mean
            over the items that keep theirs.
        min_rating: Lowest rating of a published set that counts as a choice; by default all count.
        min_user_interactions: Iterated core: users with fewer interactions are removed.
        min_item_interactions: Iterated core: items with fewer interactions are removed.
        split: "published" (the default where the source has one), or a random choice of each user's interactions by
            the rule "official" (the default elsewhere) or "mmrec". A part that a published split lacks is held out of
            its training part.
        split_seed: What every random choice among the data depends on.
        keep_train_per_user: Sparse regime: training interactions of a user that are kept, chosen at random.
        cold_fraction: Cold-item protocol: share of the items (or their number, from 2 on) that leaves the training;
            validation and test rank one half of them each, and nothing else.
        sampling: "interaction": every training pair once in an epoch; or "user": the published procedure, where a batch
            has distinct random users, and one random training item of each.
        batch_size: Training batch of one process.
        eval_batch_size: Users of one process in validation, test and prediction.
        num_workers: Worker processes; 0 is the fastest, as a batch is one gather.
        pin_memory: Whether batches are in page-locked memory; by default where a GPU is.
        seed: Key of the order of training; by default the one of `seed_everything`.
        sample_users: Users of the embedded sample.
        feature_encoders: Modality to the hub id or folder of the encoder that makes its features, where a published set
            comes without them.
        cache_dir: Folder for features that were made.

    Raises:
        ValueError: If options contradict each other or are out of range.
    """

    def __init__(
        self,
        source: str | None = None,
        path: str | None = None,
        layout: str = "auto",
        data_dir: str | None = None,
        test_path: str | None = None,
        modalities: list[str] | None = None,
        feature_norm: str | None = None,
        missing_rate: float = 0.0,
        min_rating: float | None = None,
        min_user_interactions: int | None = None,
        min_item_interactions: int | None = None,
        split: str | None = None,
        split_seed: int = 0,
        keep_train_per_user: int | None = None,
        cold_fraction: float = 0.0,
        sampling: str = "interaction",
        batch_size: int = 1024,
        eval_batch_size: int = 2048,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        seed: int | None = None,
        sample_users: int = 600,
        feature_encoders: dict[str, str] | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.source = source or ("files" if path else "embedded")
        self.path, self.layout, self.data_dir, self.test_path = path, layout, data_dir, test_path
        self.chosen_modalities, self.feature_norm, self.missing_rate = modalities, feature_norm, missing_rate
        self.min_rating = min_rating
        self.min_user_interactions, self.min_item_interactions = min_user_interactions, min_item_interactions
        self.split, self.split_seed = split, split_seed
        self.keep_train_per_user, self.cold_fraction = keep_train_per_user, cold_fraction
        self.sampling, self.batch_size, self.eval_batch_size = sampling, batch_size, eval_batch_size
        self.num_workers, self.seed, self.sample_users = num_workers, seed, sample_users
        self.feature_encoders, self.cache_dir = feature_encoders, cache_dir
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._given: InteractionTable | None = None
        self._check_options()

    def _check_options(self) -> None:
        one_of(
            ("source", self.source, ("embedded", *SOURCES, "files")),
            ("layout", self.layout, LAYOUTS),
            ("feature_norm", self.feature_norm, NORMS),
            ("split", self.split, (None, "published", *RULES)),
            ("sampling", self.sampling, ("interaction", "user")),
        )
        at_least(
            ("min_user_interactions", self.min_user_interactions, 1),
            ("min_item_interactions", self.min_item_interactions, 1),
            ("keep_train_per_user", self.keep_train_per_user, 1),
            ("cold_fraction", self.cold_fraction, 0),
            ("batch_size", self.batch_size, 1),
            ("eval_batch_size", self.eval_batch_size, 1),
            ("num_workers", self.num_workers, 0),
            ("sample_users", self.sample_users, 1),
        )
        if not 0 <= self.missing_rate <= 1:
            raise ValueError(f"missing_rate must be at least 0 and at most 1, got {self.missing_rate}")
        if self.path and self.source != "files":
            raise ValueError(f"path={self.path} and source={self.source!r} contradict each other: give one of the two")
        if self.source == "files" and not self.path:
            raise ValueError("source='files' needs path: a folder in the layout of MMRec or LATTICE, or a table")
        if self.layout != "auto" and self.source != "files":
            raise ValueError(f"layout={self.layout!r} says how to read path, but source={self.source!r}")
        for name in ("data_dir", "min_rating", "feature_encoders", "cache_dir"):
            if getattr(self, name) is not None and self.source not in SOURCES:
                raise ValueError(f"{name} belongs to the published sets ({', '.join(SOURCES)}), source={self.source!r}")
        if self.test_path and self.cold_fraction:
            raise ValueError("test_path and cold_fraction contradict each other: cold items are tested on their own")

    @classmethod
    def from_table(cls, table: InteractionTable, **options: Any) -> InteractionData:
        """A datamodule on data in memory.

        Args:
            table: Pairs and features.
            options: All other arguments of `InteractionData`; reading options do not apply.

        Raises:
            ValueError: If an option names another source of data.
        """
        for name in ("source", "path"):
            if options.get(name) is not None:
                raise ValueError(f"from_table reads table: remove {name}={options[name]!r}")
        data = cls(**options)
        data.source, data._given = table.name, table
        return data

    def _read(self) -> InteractionTable:
        if self._given is not None:
            return self._given
        if self.source in SOURCES:
            return read_set(
                self.source,
                self.data_dir,
                self.chosen_modalities,
                self.min_rating,
                self.feature_encoders,
                self.cache_dir,
            )
        if self.source == "embedded":
            from datamodules.sources.interaction_sample import interaction_sample

            return interaction_sample(self.sample_users)
        assert self.path is not None
        return read_files(Path(self.path), self.layout)

    @cached_property
    def table(self) -> InteractionTable:
        """The data after the checks and the core, before the split; read on first use (also downloaded, under a lock).

        Its features are as the source has them.
        """
        read = self._read()
        table = check_table(read._replace(features=choose_modalities(read.features, self.chosen_modalities, read.name)))
        if self.min_user_interactions is not None or self.min_item_interactions is not None:
            table = iterated_core(table, self.min_user_interactions or 1, self.min_item_interactions or 1)
        log.info("%s: %d users, %d items, %d interactions, modalities: %s", table.name, table.num_users,
                 table.num_items, len(table.item_ids), ", ".join(table.features) or "none")  # fmt: skip
        return table

    @cached_property
    def _cold_parts(self) -> NDArray[np.int8]:
        if not self.cold_fraction:
            return np.full(self.num_items, TRAIN, dtype=np.int8)
        return cold_split(self.table.item_ids, self.num_items, self.cold_fraction, self.split_seed)

    @cached_property
    def _parts(self) -> NDArray[np.int8]:
        """Part of each interaction of `table`; -1 for one that is in none."""
        cold_parts = self._cold_parts if self.cold_fraction else None
        return assign_parts(self.table, self.split, self.split_seed, cold_parts, self.keep_train_per_user)

    def _edges(self, chosen: NDArray[np.bool_]) -> Tensor:
        return torch.from_numpy(np.stack([self.table.user_ids[chosen], self.table.item_ids[chosen]]))

    @cached_property
    def num_users(self) -> int:
        """Number of users; ids are 0..num_users - 1."""
        return self.table.num_users

    @cached_property
    def num_items(self) -> int:
        """Size of the catalogue; ids are 0..num_items - 1."""
        return self.table.num_items

    @cached_property
    def user_labels(self) -> list[str]:
        """External ids: that of user k is at k."""
        return [str(label) for label in self.table.user_labels.tolist()]

    @cached_property
    def item_labels(self) -> list[str]:
        """External ids: that of item k is at k."""
        return [str(label) for label in self.table.item_labels.tolist()]

    @property
    def item_names(self) -> list[str] | None:
        """Titles to show, that of item k at k; None where the source has none."""
        return self.table.item_names

    @property
    def images(self) -> NDArray[np.uint8] | None:
        """Thumbnails to show, uint8 `(num_items, height, width, 3)`; None where the source has none."""
        return self.table.images

    @cached_property
    def features(self) -> dict[str, Tensor]:
        """Modality to float32 `(num_items, size)`, after `missing_rate` and `feature_norm`, sorted by name."""
        features = replace_missing(self.table.features, self.missing_rate, self.split_seed)
        return {name: torch.from_numpy(normalise(features[name], self.feature_norm)) for name in sorted(features)}

    @cached_property
    def modalities(self) -> list[str]:
        """Names of the features, sorted."""
        return sorted(self.table.features)

    @cached_property
    def feature_sizes(self) -> list[int]:
        """Length of a vector of each of `modalities`."""
        return [self.table.features[name].shape[1] for name in self.modalities]

    @cached_property
    def train_edges(self) -> Tensor:
        """Training pairs, int64 `(2, interactions)`: user ids and item ids, without duplicates."""
        return self._edges(self._parts == TRAIN)

    @cached_property
    def held_out_edges(self) -> Tensor:
        """Validation and test pairs, int64 `(2, interactions)`: user ids and item ids."""
        return self._edges((self._parts == VALIDATION) | (self._parts == TEST))

    @cached_property
    def cold_item_ids(self) -> Tensor:
        """Items that the cold-item protocol takes from the training, int64 `(cold,)`; empty without it."""
        return torch.from_numpy(np.flatnonzero(self._cold_parts != TRAIN))

    @cached_property
    def _fingerprint(self) -> dict[str, Any]:
        return fingerprint(self.source, self.user_labels, self.item_labels, self.features, self.train_edges)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint's users, items, graph and features are: its parameters mean nothing with others."""
        return dict(self._fingerprint)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare the data of a checkpoint with this one.

        Raises:
            ValueError: If the users, the items, the features or the training pairs differ.
        """
        check_fingerprint(self._fingerprint, state_dict)

    def prepare_data(self) -> None:
        """Download what is missing."""
        if self.source in SOURCES:
            self.table  # noqa: B018 - read on first use

    def setup(self, stage: str) -> None:
        """Read the data; later calls cost nothing."""
        # Now, and not at the first checkpoint: a model that trains the features may do so in this memory.
        self._fingerprint  # noqa: B018 - read on first use
        return_memory()

    @cached_property
    def _test_edges(self) -> Tensor:
        """The pairs of `test_path` by their ids here."""
        from datamodules.sources.interaction_files import read_pairs

        assert self.test_path is not None
        return known_pairs(self.test_path, read_pairs(Path(self.test_path)), self.table, self.train_edges)

    @cached_property
    def _ranking_rows(self) -> dict[str, RankingRows]:
        return {}

    def _rows_of(self, stage: str) -> RankingRows:
        if stage not in self._ranking_rows:
            self._ranking_rows[stage] = self._make_rows(stage)
        return self._ranking_rows[stage]

    def _make_rows(self, stage: str) -> RankingRows:
        if stage == "predict":
            return RankingRows(torch.arange(self.num_users), None, self.train_edges, self.num_users)
        part = _STAGES[stage]
        targets = self._test_edges if stage == "test" and self.test_path else self._edges(self._parts == part)
        wanted = torch.bincount(targets[0], minlength=self.num_users) > 0
        trained = torch.bincount(self.train_edges[0], minlength=self.num_users) > 0
        without = int((wanted & ~trained).sum())
        if without:
            log.info("%s: %d of %d users of the %s have no training interaction and are skipped",
                     self.source, without, int(wanted.sum()), "test" if part == TEST else "validation")  # fmt: skip
        user_ids = (wanted & trained).nonzero()[:, 0]
        if not len(user_ids):
            raise ValueError(f"{self.source}: no user has interactions both to train and to {stage}")
        candidates = torch.from_numpy(np.flatnonzero(self._cold_parts == part)) if self.cold_fraction else None
        return RankingRows(user_ids, targets, self.train_edges, self.num_users, candidates)

    def train_dataloader(self) -> BatchLoader:
        """Training batches in an order keyed by seed and epoch; all ranks have equal batches."""
        if self.sampling == "interaction":
            pairs = TrainInteractions(self.train_edges)
            return self._loader(
                pairs, training_sampler(len(pairs), self.batch_size, self.seed, self.trainer, "interactions")
            )
        users = TrainUsers(self.train_edges)
        sampler = UserSampler(len(users), self.train_edges.shape[1], self.batch_size, seed=run_seed(self.seed))
        if self.trainer is not None:
            follow(sampler, self.trainer)
        return self._loader(users, sampler)

    def _eval_loader(self, stage: str) -> BatchLoader:
        rows = self._rows_of(stage)
        return self._loader(rows, KeyedSampler(len(rows), self.eval_batch_size, order=rows.by_targets()))

    def val_dataloader(self) -> BatchLoader:
        """Users with validation items, from the fewest to the most."""
        return self._eval_loader("validate")

    def test_dataloader(self) -> BatchLoader:
        """Users with test items, or those of `test_path`, from the fewest to the most."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> BatchLoader:
        """All users, in the order of their ids; no targets, and the training items masked as in the test."""
        return self._eval_loader("predict")
