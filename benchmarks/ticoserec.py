"""TiCoSeRec against the published procedure in plain form: training epochs, evaluation, and the making of batches.

    python -m benchmarks.ticoserec [--paths contrastive_epoch evaluation] [--steps 20] [--repeats 3] [--threads 1]

Works on Amazon Beauty if `ZOO_DATA` names the data folder, otherwise on the embedded sample, where the ratios are
others. Epochs are timed on their first batches and scaled to all users; what happens once an epoch is timed whole.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import random
import tempfile
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from scipy import sparse
from torch.utils.data import DataLoader, SequentialSampler

from benchmarks.reference.sasrec import PlainSASRec, evaluate, train_step
from benchmarks.reference.ticoserec import (
    EvalSamples,
    HybridSimilarity,
    OfflineSimilarity,
    OnlineSimilarity,
    Ratios,
    Sequences,
    TrainSamples,
)
from benchmarks.runner import Case, Clock, Timing, all_threads, report, show, timed
from datamodules.sequence import SequenceData
from zoo.common.keyed_random import mix_keys
from zoo.ticoserec.jagged import row_and_position, unpad_left
from zoo.ticoserec.module import TiCoSeRec

if TYPE_CHECKING:
    from collections.abc import Iterator

BATCH_SIZE = 128
NEVER = 10**6
RESULTS = Path(__file__).resolve().parent.parent / "results" / "ticoserec"
BEAUTY = Ratios(crop=0.4, mask=0.7, reorder=0.5, substitute=0.2, insert=0.5, mask_mode="maximum")


class _EpochClock(Callback):
    """Times the second epoch of a short training: what comes before its first step, and its steps."""

    def __init__(self) -> None:
        self.clock, self.before, self.steps = Clock(), Timing(0, 0), Timing(0, 0)

    def on_train_batch_start(self, *arguments: Any) -> None:
        if arguments[-1] == 0:
            self.before = self.clock.read()

    def on_train_epoch_end(self, *_: Any) -> None:
        self.steps = self.clock.read()


class _EvaluationClock(Callback):
    """Times one pass over the validation set."""

    def on_validation_start(self, *_: Any) -> None:
        self.clock = Clock()

    def on_validation_end(self, *_: Any) -> None:
        self.whole = self.clock.read()


@dataclass
class Bench:
    """Both implementations on one data set, with the settings of the published Beauty run.

    Args:
        data: The sequences.
        steps: Batches to time of an epoch.
        folder: Where models may leave their pictures.
    """

    data: SequenceData
    steps: int
    folder: str

    @cached_property
    def scale(self) -> float:
        """Epochs are so many times longer than what is timed of them."""
        return self.data.num_users / (self.steps * BATCH_SIZE)

    # The plain side.

    @cached_property
    def sequences(self) -> Sequences:
        """All users as lists."""
        table = self.data.sequences
        assert table.timestamps is not None
        bounds = list(itertools.pairwise(table.offsets.tolist()))
        items, times = table.item_ids.tolist(), table.timestamps.tolist()
        exempt = (table.uniformity_rank < int(0.15 * len(bounds))).nonzero().flatten().tolist()
        return Sequences(
            [items[a:b] for a, b in bounds], [times[a:b] for a, b in bounds], set(exempt), self.data.num_items
        )

    @cached_property
    def offline(self) -> OfflineSimilarity:
        """ItemCF-IUF in dictionaries."""
        return OfflineSimilarity(self.sequences.train_items())

    @cached_property
    def plain(self) -> tuple[PlainSASRec, torch.optim.Optimizer]:
        """The dense encoder and its optimiser."""
        model = PlainSASRec(self.data.num_items)
        return model, torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-6)

    def plain_batches(self, phase: str) -> Iterator[list[torch.Tensor]]:
        """Training batches, sample by sample; `phase` is "recommendation", "contrastive" or "hybrid"."""
        samples = TrainSamples(self.sequences, BEAUTY)
        if phase == "contrastive":
            samples.similarity = self.offline
        elif phase == "hybrid":
            online = OnlineSimilarity(self.plain[0].item_embedding.weight)
            samples.similarity = HybridSimilarity(self.offline, online)
        return iter(DataLoader(samples, batch_size=BATCH_SIZE, shuffle=True))

    def plain_epoch(self, phase: str) -> Timing:
        """An epoch of the plain side, scaled from its first steps."""
        model, optimizer = self.plain
        clock = Clock()
        batches = self.plain_batches(phase)
        before = clock.read()
        for batch in itertools.islice(batches, self.steps):
            train_step(model, optimizer, batch)
        return before + clock.read() * self.scale

    def plain_evaluation(self) -> Timing:
        """Full ranking of all users, scaled from the first ones."""
        items = [row[:-2] for row in self.sequences.items]
        rows = np.repeat(np.arange(len(items)), [len(row) for row in items])
        flat = np.concatenate(items)
        seen = sparse.csr_matrix((np.ones(len(flat)), (rows, flat)), shape=(len(items), self.data.num_items + 1))
        samples = EvalSamples(self.sequences, ahead=2)
        batches = DataLoader(samples, batch_size=BATCH_SIZE, sampler=SequentialSampler(samples))
        clock = Clock()
        evaluate(self.plain[0], itertools.islice(batches, self.steps), seen)
        return clock.read() * self.scale

    def plain_data(self) -> Timing:
        """Batches of a contrastive epoch without the model."""
        batches = self.plain_batches("contrastive")
        clock = Clock()
        for _ in itertools.islice(batches, self.steps):
            pass
        return clock.read() * self.scale

    # Our side.

    def model(self, phase: str) -> TiCoSeRec:
        """The published model in one of its phases from the second epoch on."""
        return TiCoSeRec(
            self.data.num_items,
            cl_weight=0.0 if phase == "recommendation" else 0.1,
            model_warm_up_epochs=0,
            augmentation_warm_up_epochs=0 if phase == "hybrid" else NEVER,
            crop_ratio=BEAUTY.crop,
            mask_ratio=BEAUTY.mask,
            reorder_ratio=BEAUTY.reorder,
            substitute_ratio=BEAUTY.substitute,
            insert_ratio=BEAUTY.insert,
            mask_mode=BEAUTY.mask_mode,
        )

    def trainer(self, clock: Callback, **settings: Any) -> Trainer:
        """A Trainer that does nothing but train."""
        return Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=self.folder,
            callbacks=[clock],
            **settings,
        )

    def epoch(self, phase: str) -> Timing:
        """An epoch of ours in Lightning, scaled from its first steps."""
        clock = _EpochClock()
        trainer = self.trainer(clock, max_epochs=2, limit_train_batches=self.steps, limit_val_batches=0)
        trainer.fit(self.model(phase), self.data)
        return clock.before + clock.steps * self.scale

    def evaluation(self) -> Timing:
        """Full ranking of all users."""
        clock = _EvaluationClock()
        self.trainer(clock).validate(self.model("recommendation"), self.data, verbose=False)
        return clock.whole

    @cached_property
    def prepared(self) -> TiCoSeRec:
        """A model with its tables."""
        model = self.model("contrastive")
        trainer = self.trainer(_EpochClock(), max_epochs=1, limit_train_batches=1, limit_val_batches=0)
        trainer.fit(model, self.data)
        return model

    def make_batches(self) -> None:
        """All that an epoch does before the encoder: batches, negatives and both views."""
        model = self.prepared
        assert model.negatives is not None
        for batch in self.data.train_dataloader():
            unpad_left(batch.item_ids, batch.lengths)
            unpad_left(batch.target_ids, batch.lengths)
            rows, places = row_and_position(batch.lengths)
            users = batch.user_ids[rows]
            model.negatives(users, mix_keys(0, users, places), 1)
            model.draw_views(batch.user_ids)

    def cases(self) -> dict[str, Case]:
        """What is timed, by name, with the ratio that is to be reached on Beauty."""
        scaled = f"first {self.steps} batches of {BATCH_SIZE}, scaled to all users"
        return {
            "recommendation_epoch": Case(
                "recommendation epoch",
                lambda: self.epoch("recommendation"),
                lambda: self.plain_epoch("recommendation"),
                4,
                scaled,
            ),
            "contrastive_epoch": Case(
                "contrastive epoch",
                lambda: self.epoch("contrastive"),
                lambda: self.plain_epoch("contrastive"),
                4,
                scaled,
            ),
            "hybrid_epoch": Case(
                "hybrid epoch",
                lambda: self.epoch("hybrid"),
                lambda: self.plain_epoch("hybrid"),
                5,
                f"{scaled}; the refresh of the item similarity once an epoch is timed whole",
            ),
            "evaluation": Case(
                "full-ranking evaluation",
                self.evaluation,
                self.plain_evaluation,
                4,
                f"ours whole; reference: {scaled}",
            ),
            "data": Case(
                "data and augmentation per epoch",
                timed(self.make_batches),
                self.plain_data,
                40,
                f"ours whole; reference: {scaled}",
            ),
        }


def main() -> None:
    """Time the paths named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paths", nargs="+", help="what to time; everything by default")
    parser.add_argument("--steps", type=int, default=20, help="batches to time of an epoch")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each side")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, all_threads()}))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    random.seed(0)
    source = "beauty" if os.environ.get("ZOO_DATA") else "embedded"
    data = SequenceData(source=source, batch_size=BATCH_SIZE, seed=0)
    folder = tempfile.TemporaryDirectory()
    cases = Bench(data, min(options.steps, data.num_users // BATCH_SIZE), folder.name).cases()
    unknown = [name for name in options.paths or [] if name not in cases]
    if unknown:
        parser.error(f"no path {unknown[0]!r}; there are {', '.join(cases)}")
    records = []
    for name in options.paths or cases:
        records += report(
            [cases[name]],
            options.results / f"benchmark_{name}.json",
            command="python -m benchmarks.ticoserec",
            data=source,
            threads=options.threads,
            repeats=options.repeats,
        )
    folder.cleanup()
    show(records, f"TiCoSeRec on {source}, {all_threads()} cores")


if __name__ == "__main__":
    main()
