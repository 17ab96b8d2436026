from __future__ import annotations

import itertools

import torch
from lightning.pytorch import Trainer

from tests.toy import ToyData, ToyModel
from zoo.common.reproducibility import StepSeed, mix


def test_seeds_of_neighbouring_steps_differ_and_fit_torch():
    seeds = {mix(*keys) for keys in itertools.product(range(-2, 8), repeat=3)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.manual_seed(max(seeds))


def test_seeds_of_neighbouring_steps_share_no_bits():
    # Neighbouring seeds of a weak hash would differ in their low bits only; here each of 63 bits is a coin.
    seeds = [mix(42, 0, step) for step in range(2001)]
    flips = torch.tensor([[(a ^ b) >> bit & 1 for bit in range(63)] for a, b in itertools.pairwise(seeds)])
    assert (flips.double().mean(0) - 0.5).abs().max() < 0.06


class Recorder(ToyModel):
    """Notes the first random number of each step."""

    def __init__(self) -> None:
        super().__init__(3, dropout=0.0)
        self.drawn: dict[tuple[str, int, int], float] = {}

    def training_step(self, batch, batch_idx):
        self.drawn["train", self.current_epoch, batch_idx] = float(torch.rand(()))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.drawn["val", self.current_epoch, batch_idx] = float(torch.rand(()))
        torch.rand(7)


def record(seed: int, noise: int, tmp_path, **settings) -> dict[tuple[str, int, int], float]:
    model = Recorder()
    torch.manual_seed(noise)
    Trainer(
        accelerator="cpu", callbacks=[StepSeed(seed)], default_root_dir=tmp_path, logger=False, max_epochs=2,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **settings,
    ).fit(model, datamodule=ToyData())  # fmt: skip
    return model.drawn


def test_what_a_step_draws_depends_on_the_seed_the_epoch_and_the_batch_alone(tmp_path):
    first = record(1, 10, tmp_path)
    assert record(1, 11, tmp_path) == first
    without_validation = record(1, 12, tmp_path, limit_val_batches=0)
    assert without_validation == {key: value for key, value in first.items() if key[0] == "train"}
    train = [value for key, value in first.items() if key[0] == "train"]
    assert len(set(train)) == len(train) == 12
    assert set(record(2, 10, tmp_path).values()).isdisjoint(first.values())


def test_evaluation_draws_the_same_in_every_epoch(tmp_path):
    drawn = record(1, 10, tmp_path)
    assert all(drawn["val", 0, batch] == drawn["val", 1, batch] for batch in range(3))
