"""What the benchmarks of IDSF time: data in the published sizes, and training steps in Lightning."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from lightning.pytorch import Callback, Trainer

from benchmarks.runner import Clock, Timing
from datamodules.interaction import InteractionData, InteractionTable
from zoo.idsf.module import IDSF

if TYPE_CHECKING:
    from collections.abc import Mapping

FEATURE_SIZES = {"image": 4096, "text": 1024}
HIDDEN_SIZE, BATCH_SIZE = 128, 1024


class Size(NamedTuple):
    """Numbers of a data set, with the interactions of its training and validation."""

    num_users: int
    num_items: int
    num_train: int
    num_validation: int


BABY = Size(19_445, 7_050, 118_551, 21_682)
CLOTHING = Size(39_387, 23_033, 278_677, 1_000)


def random_table(size: Size, feature_sizes: Mapping[str, int]) -> InteractionTable:
    """Distinct uniform pairs, and normal features."""
    generator = np.random.default_rng(0)
    wanted = size.num_train + size.num_validation
    if wanted > size.num_users * size.num_items:
        raise ValueError(f"there are no {wanted} pairs of {size.num_users} users and {size.num_items} items")
    pairs = generator.choice(size.num_users * size.num_items, wanted, replace=False, shuffle=False)
    split = (generator.permutation(wanted) >= size.num_train).astype(np.int8)
    table = InteractionTable(
        "random", np.arange(size.num_users), np.arange(size.num_items), *np.divmod(pairs, size.num_items), split, {},
        None, None,
    )  # fmt: skip
    return completed(table, feature_sizes)


def completed(table: InteractionTable, feature_sizes: Mapping[str, int]) -> InteractionTable:
    """Interactions with random features, and a test part of one interaction of the validation.

    Without a test part the datamodule would hold one out of the training.
    """
    assert table.split is not None
    generator = np.random.default_rng(1)
    split = table.split.copy()
    split[np.flatnonzero(split == 1)[0]] = 2
    features = {
        name: generator.standard_normal((table.num_items, width), dtype=np.float32)
        for name, width in feature_sizes.items()
    }
    return table._replace(split=split, features=features)


def load(feature_sizes: Mapping[str, int]) -> InteractionTable:
    """The interactions of Baby where `ZOO_DATA` names the data folder, else random ones in its numbers."""
    if not os.environ.get("ZOO_DATA"):
        return random_table(BABY, feature_sizes)
    return completed(InteractionData(source="baby").table, feature_sizes)


def new_data(table: InteractionTable, batch_size: int = BATCH_SIZE) -> InteractionData:
    """The published procedure's batches: of distinct users."""
    return InteractionData.from_table(table, sampling="user", batch_size=batch_size, seed=0)


def new_model(data: InteractionData, hidden_size: int = HIDDEN_SIZE, **options: Any) -> IDSF:
    """IDSF with the settings of the reference but for `options` and what it contrasts and trains."""
    sizes = data.num_users, data.num_items, data.modalities, data.feature_sizes
    return IDSF(*sizes, hidden_size=hidden_size, **options)


class _StepClock(Callback):
    """Times the first step, which also makes the state of the optimiser, and those after it."""

    def __init__(self) -> None:
        self.clock, self.first, self.later = Clock(), Timing(0, 0), Timing(0, 0)

    def on_train_batch_start(self, *arguments: Any) -> None:
        if arguments[-1] == 0:
            self.clock.restart()

    def on_train_batch_end(self, *arguments: Any) -> None:
        if arguments[-1] == 0:
            self.first = self.clock.read()
        else:
            self.later = self.later + self.clock.read()


def trainer(*callbacks: Callback, **settings: Any) -> Trainer:
    """A Trainer that does nothing but train or validate."""
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tempfile.gettempdir(),
        callbacks=list(callbacks),
        **settings,
    )


def train(model: IDSF, data: InteractionData, steps: int) -> Timing:
    """Time of a step of ours in Lightning, batch and negatives included: the mean of `steps` after one more.

    With no further steps, the time of that one.
    """
    clock = _StepClock()
    trainer(clock, max_epochs=1, limit_train_batches=steps + 1, limit_val_batches=0).fit(model, data)
    return clock.later * (1 / steps) if steps else clock.first


def quiet() -> None:
    """Print results only."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("datamodules").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
