"""Histories of items with titles: batches for recommenders that read text, and the titles to attack."""

from __future__ import annotations

import logging
import zlib
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningDataModule

from datamodules.loading import BatchLoader, Draw, KeyedSampler, LoaderMixin, training_sampler
from datamodules.options import at_least, one_of
from datamodules.shilling import GENERATORS, ShillingInjector
from datamodules.sources.interactions import return_memory
from datamodules.sources.text_rec_sets import CATEGORIES, SETS, read_set
from datamodules.text_rec_rows import (
    EVALUATION_KEY,
    Sequences,
    TargetBatch,
    TargetRows,
    TextCorpus,
    TextRecBatch,
    TextRecRows,
)
from datamodules.text_rec_split import (
    PARTS,
    choose_targets,
    chosen,
    eval_rows,
    liked_only,
    read_test,
    train_rows,
    training_pairs,
    training_part,
    unescaped,
)

if TYPE_CHECKING:
    from torch import Tensor

    from datamodules.sources.text_rec_files import TextColumns

__all__ = ["TargetBatch", "TextRecBatch", "TextRecData"]

log = logging.getLogger(__name__)

SOURCES = ("embedded", *SETS, "recformer_json", "csv")


class TextRecData(LoaderMixin, LightningDataModule):
    """Users' histories over a catalogue of titles, and questions about items.

    In "sequence" mode every item but a user's first is a training sample: the history before it, and it as the next
    one. The last item is for test, the last but one for validation, each after all before it; users with fewer than
    three items are for training only.

    In "yesno" mode a sample is a history, an item and a label. Without ratings a training sample asks for the true next
    item with probability 0.5, and otherwise for one that the user has not met in training, drawn anew in each epoch
    (P5); evaluation ranks the held-out item among `num_candidates` others. With ratings the labels are the true ones.

    Args:
        source: "embedded" (default), "amazon_games", "tallrec_books", "movielens_small", "amazon2014",
            "recformer_json" (implied by a `path` to a folder) or "csv" (implied by any other `path`).
        mode: "sequence" or "yesno".
        path: Table of interactions (CSV or TSV, also `.gz`, or Parquet), or a folder of RecFormer's JSON files.
        items_path: Table of items and titles; by default the titles are a column of `path`.
        test_path: Users or questions to test on in place of the training users' own: a table like `path` without
            titles, whose items are the `item_labels`; for tallrec_books JSON lines like the set's own. Known items
            only, unknown ones are counted and reported.
        data_dir: Folder of the published sets; `$ZOO_DATA` by default, or else the user's cache.
        user_column: Column of users in a table.
        item_column: Column of items in a table.
        title_column: Column of titles in a table.
        time_column: Column of Unix seconds or dates; None for a table in the order of the interactions.
        rating_column: Column of ratings; None for a table without.
        like_threshold: A rating above it is a like. Sequences are of liked items.
        category: Category of "amazon2014": "beauty", "toys" or "sports".
        sample_items: Items of the embedded sample.
        sample_users: Users of the embedded sample.
        keep_items: Only the so many items with the most interactions, ties by the lowest id. The first of the filters.
        min_interactions: Users with fewer interactions (with the items kept) are dropped. The second filter.
        keep_users: Only the first so many users after a shuffle; of tallrec_books, so many training questions. The
            last filter.
        subset_seed: Of that shuffle.
        unescape_html: Whether HTML entities in titles become what they stand for.
        max_history: Longest history; the newest items are kept.
        eval_users: Validation and test ask about so many users at most (or questions), drawn by `subset_seed`: for
            victims that read a prompt for each item.
        num_candidates: Items to rank the held-out one against ("yesno" without ratings), the same in every run.
        targets: Items whose titles are attacked: "random", "cold" (drawn from the fifth with the fewest training
            interactions), "popular" (from the fifth with the most), or a list of item ids.
        target_share: Targets per item, at least one.
        num_targets: Number of targets; overrides the share.
        target_seed: Of the draw of targets.
        shilling: "random" or "bandwagon" adds fake users to the training sequences; see `ShillingInjector`.
        shilling_share: Fake users per real user.
        bucketed: Whether training batches have histories of about one length: less padding.
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
        mode: str = "sequence",
        path: str | None = None,
        items_path: str | None = None,
        test_path: str | None = None,
        data_dir: str | None = None,
        user_column: str = "user_id",
        item_column: str = "item_id",
        title_column: str = "title",
        time_column: str | None = None,
        rating_column: str | None = None,
        like_threshold: float = 3.0,
        category: str = "beauty",
        sample_items: int = 300,
        sample_users: int = 600,
        keep_items: int | None = None,
        min_interactions: int | None = None,
        keep_users: int | None = None,
        subset_seed: int = 0,
        unescape_html: bool = True,
        max_history: int = 50,
        eval_users: int | None = None,
        num_candidates: int = 99,
        targets: list[int] | str = "random",
        target_share: float = 0.01,
        num_targets: int | None = None,
        target_seed: int = 42,
        shilling: str | None = None,
        shilling_share: float = 0.01,
        bucketed: bool = False,
        batch_size: int = 128,
        eval_batch_size: int = 512,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        implied = "embedded"
        if path:
            implied = "recformer_json" if Path(path).is_dir() else "csv"
        self.source, self.mode = source or implied, mode
        self.path, self.items_path, self.test_path, self.data_dir = path, items_path, test_path, data_dir
        self.user_column, self.item_column, self.title_column = user_column, item_column, title_column
        self.time_column, self.rating_column, self.like_threshold = time_column, rating_column, like_threshold
        self.category, self.sample_items, self.sample_users = category, sample_items, sample_users
        self.keep_items, self.min_interactions, self.keep_users = keep_items, min_interactions, keep_users
        self.subset_seed, self.unescape_html, self.max_history = subset_seed, unescape_html, max_history
        self.eval_users, self.num_candidates = eval_users, num_candidates
        self.targets, self.target_share = targets, target_share
        self.num_targets, self.target_seed = num_targets, target_seed
        self.shilling, self.shilling_share = shilling, shilling_share
        self.bucketed, self.batch_size, self.eval_batch_size = bucketed, batch_size, eval_batch_size
        self.num_workers, self.seed = num_workers, seed
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._parts: dict[str, TextRecRows] = {}
        self._check_options()

    def _check_options(self) -> None:
        one_of(
            ("source", self.source, SOURCES),
            ("mode", self.mode, ("sequence", "yesno")),
            ("category", self.category, CATEGORIES),
            ("shilling", self.shilling, (None, *GENERATORS)),
        )
        if isinstance(self.targets, str):
            one_of(("targets", self.targets, ("random", "cold", "popular", "a list of item ids")))
        at_least(
            ("sample_items", self.sample_items, 20),
            ("sample_users", self.sample_users, 1),
            ("keep_items", self.keep_items, 2),
            ("min_interactions", self.min_interactions, 1),
            ("keep_users", self.keep_users, 1),
            ("max_history", self.max_history, 1),
            ("eval_users", self.eval_users, 1),
            ("num_candidates", self.num_candidates, 1),
            ("num_targets", self.num_targets, 1),
            ("batch_size", self.batch_size, 1),
            ("eval_batch_size", self.eval_batch_size, 1),
            ("num_workers", self.num_workers, 0),
        )
        for name, share in (("target_share", self.target_share), ("shilling_share", self.shilling_share)):
            if not 0 < share <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {share}")
        if self.path and self.source not in ("csv", "recformer_json"):
            raise ValueError(f"path={self.path} and source={self.source!r} contradict each other: give one of the two")
        if self.source in ("csv", "recformer_json") and not self.path:
            raise ValueError(f"source={self.source!r} needs path: a CSV or Parquet file, or RecFormer's folder")
        if self.items_path and self.source != "csv":
            raise ValueError(f"items_path={self.items_path} has the titles of a table, but source={self.source!r}")
        if self.data_dir and self.source not in SETS:
            raise ValueError(f"data_dir holds published sets, but source={self.source!r}: use path for a file")
        if not isinstance(self.targets, str) and (not self.targets or self.num_targets is not None):
            raise ValueError(f"targets={self.targets}, num_targets={self.num_targets}: expected a list that is not "
                             "empty, and no num_targets beside it")  # fmt: skip
        if self.source == "tallrec_books":
            self._check_questions()

    def _check_questions(self) -> None:
        if self.mode != "yesno":
            raise ValueError("source='tallrec_books' has questions, not sequences: set mode='yesno'")
        for name in ("keep_items", "min_interactions", "shilling"):
            if (value := getattr(self, name)) is not None:
                raise ValueError(f"{name}={value!r} needs sequences, but tallrec_books has questions: remove it")

    @property
    def _columns(self) -> TextColumns:
        from datamodules.sources.text_rec_files import TextColumns

        return TextColumns(self.user_column, self.item_column, self.title_column, self.time_column, self.rating_column)

    def _read(self) -> TextCorpus:
        if self.source in SETS:
            return read_set(self.source, self.category, self.data_dir, self.like_threshold)
        if self.source == "embedded":
            from datamodules.sources.text_rec_sample import text_rec_sample

            return text_rec_sample(self.sample_items, self.sample_users)[0]
        from datamodules.sources.text_rec_files import read_csv_corpus, read_recformer

        assert self.path is not None
        if self.source == "recformer_json":
            return read_recformer(Path(self.path))
        items_path = Path(self.items_path) if self.items_path else None
        return read_csv_corpus(Path(self.path), items_path, self._columns, self.like_threshold)

    @cached_property
    def corpus(self) -> TextCorpus:
        """Titles and sequences after all filters, read on first use."""
        data = self._read()
        if self.mode == "sequence":
            data = liked_only(data)
        data = chosen(data, self.keep_items, self.min_interactions, self.keep_users, self.subset_seed)
        if self.unescape_html:
            data = unescaped(data)
        log.info(
            "%s: %d users, %d items, %d interactions", data.name, data.num_users, data.num_items, len(data.item_ids)
        )
        return data

    @cached_property
    def titles(self) -> list[str]:
        """Title of item k at k."""
        return self.corpus.titles

    @cached_property
    def item_labels(self) -> list[str]:
        """External id of item k at k."""
        return self.corpus.item_labels

    @cached_property
    def user_labels(self) -> list[str]:
        """External id of user row k at k; fake users of `shilling` come last."""
        fakes = self.num_users - self.corpus.num_users
        return [*self.corpus.user_labels, *(f"shilling-{fake}" for fake in range(fakes))]

    @cached_property
    def num_items(self) -> int:
        """Size of the catalogue; item ids are 0..num_items - 1."""
        return self.corpus.num_items

    @cached_property
    def num_users(self) -> int:
        """Number of users, fake ones included; rows are 0..num_users - 1."""
        if self.shilling is None:
            return self.corpus.num_users
        return len(self._training.offsets) - 1

    @cached_property
    def item_counts(self) -> Tensor:
        """Training interactions of each item by real users, int64 `(num_items,)`."""
        pairs, _ = training_pairs(self.corpus, training_part(self.corpus))
        return torch.bincount(pairs[:, 1], minlength=self.num_items)

    @cached_property
    def target_ids(self) -> Tensor:
        """Items whose titles are attacked, int64 `(targets,)`."""
        return choose_targets(self.targets, self.target_share, self.num_targets, self.target_seed, self.item_counts)

    @cached_property
    def train_pairs(self) -> Tensor:
        """Training interactions that are liked, those of fake users included: int64 `(pairs, 2)`, user and item."""
        pairs, liked = training_pairs(self.corpus, self._training)
        return pairs[liked]

    @cached_property
    def _training(self) -> Sequences:
        """The training sequences, with fake users behind the real ones."""
        real = training_part(self.corpus)
        if self.shilling is None:
            return real
        injector = ShillingInjector(self.shilling, self.shilling_share)
        found = injector(real.item_ids, real.offsets, self.target_ids, self.num_items)
        fake = torch.ones(len(found.item_ids) - len(real.item_ids), dtype=torch.bool)
        return Sequences(found.item_ids, torch.cat([real.liked, fake]), found.offsets)

    @property
    def _drawn(self) -> bool:
        """Whether items that users have not met stand for what they dislike."""
        return self.mode == "yesno" and self.corpus.liked is None

    def _rows(self, part: str) -> TextRecRows:
        if part in self._parts:
            return self._parts[part]
        if part == "train":
            rows = train_rows(self.corpus, self._training, self.user_labels, self.max_history, self._drawn)
        else:
            other = None
            if part == "test" and self.test_path:
                path = Path(self.test_path)
                other = read_test(self.corpus, path, self._columns, self.like_threshold, self.mode)
            rows = eval_rows(self.corpus, part, self.max_history, self.num_candidates if self._drawn else 0, other)
            if self.eval_users is not None:
                rows = rows.drawn(self.eval_users, self.subset_seed)
        self._parts[part] = rows
        return rows

    def whole(self, part: str) -> TextRecBatch:
        """All rows of a part as one batch.

        Args:
            part: "train" (as it is in the data: without drawn negatives, and with keys of 0), "val" or "test" (as
                evaluated, in the order of the users).

        Raises:
            ValueError: If there is no such part, or nothing in it.
        """
        one_of(("part", part, tuple(PARTS)))
        rows = self._rows(part)
        everything = torch.arange(len(rows))
        return rows.positives(everything) if part == "train" else rows[Draw(everything, EVALUATION_KEY)]

    def state_dict(self) -> dict[str, Any]:
        """The catalogue's fingerprint: a checkpoint's item ids mean nothing with another one."""
        labels = "\n".join(self.item_labels)
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
                "options of the training, and test_path for other users over its items"
            )

    def setup(self, stage: str) -> None:
        """Read the data; later calls cost nothing."""
        self.target_ids  # noqa: B018 - read on first use, and checked
        if stage == "fit":
            self._rows("train")
        if stage in ("fit", "validate"):
            self._rows("val")
        else:
            self._rows("test")
        return_memory()

    @property
    def _attacks(self) -> bool:
        """Whether the model under the Trainer attacks titles."""
        module = getattr(self.trainer, "lightning_module", None)
        return bool(getattr(module, "attacks_items", False))

    def train_dataloader(self) -> BatchLoader:
        """Training batches in an order keyed by seed and epoch; all ranks have equal batches."""
        rows = self._rows("train")
        lengths = rows.lengths if self.bucketed else None
        return self._loader(
            rows, training_sampler(len(rows), self.batch_size, self.seed, self.trainer, "samples", lengths)
        )

    def _users_loader(self, part: str) -> BatchLoader:
        rows = self._rows(part)
        return self._loader(rows, KeyedSampler(len(rows), self.eval_batch_size, order=rows.by_length()))

    def _targets_loader(self) -> BatchLoader:
        rows = TargetRows(self.target_ids, self.titles)
        return self._loader(rows, KeyedSampler(len(rows), 1))

    def val_dataloader(self) -> BatchLoader:
        """What is asked in validation, in the order of the length of the histories."""
        return self._users_loader("val")

    def test_dataloader(self) -> BatchLoader | list[BatchLoader]:
        """What is asked in test; beside it the targets, if the model attacks titles (`attacks_items`)."""
        users = self._users_loader("test")
        return [users, self._targets_loader()] if self._attacks else users

    def predict_dataloader(self) -> BatchLoader:
        """The targets if the model attacks titles (`attacks_items`), one a batch; otherwise what is asked in test."""
        return self._targets_loader() if self._attacks else self._users_loader("test")
