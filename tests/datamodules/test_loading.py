from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import Dataset

from datamodules import SequenceData
from datamodules.loading import BatchLoader, Draw, KeyedSampler, keyed_uniform, training_sampler

if TYPE_CHECKING:
    from pathlib import Path

    from datamodules import SequenceBatch


class Echo(Dataset[Draw]):
    """Returns what was asked for."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, draw: Draw) -> Draw:
        return draw


def drawn(sampler: KeyedSampler) -> list[list[int]]:
    return [draw.indices.tolist() for draw in sampler]


def test_each_epoch_is_a_permutation_of_its_own_and_reproducible() -> None:
    sampler = KeyedSampler(101, 8, shuffle=True, seed=5)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = drawn(sampler)
        assert len(batches) == len(sampler) == 13
        assert [len(batch) for batch in batches] == [8] * 12 + [5]
        assert batches == drawn(sampler)
        epochs.append([index for batch in batches for index in batch])
        assert sorted(epochs[-1]) == list(range(101))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != [i for batch in drawn(KeyedSampler(101, 8, shuffle=True, seed=6)) for i in batch]


@pytest.mark.parametrize("size", [96, 97, 98, 99, 103, 6])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_together_see_the_batches_of_one_process(size: int, world: int) -> None:
    one = drawn(KeyedSampler(size, 4 * world, shuffle=True, equal=True, seed=1))
    ranks = [
        drawn(KeyedSampler(size, 4, shuffle=True, equal=True, seed=1, num_replicas=world, rank=rank))
        for rank in range(world)
    ]
    left_out = KeyedSampler(size, 4, equal=True, num_replicas=world, rank=0).left_out
    assert left_out == size % (4 * world) % world
    joined = [[index for part in parts for index in part] for parts in zip(*ranks, strict=True)]
    expected = [batch for batch in one if len(batch) >= world]
    assert [len(batch) for batch in joined] == [len(batch) // world * world for batch in expected]
    for together, alone in zip(joined, expected, strict=True):
        assert together == alone[: len(together)]
    assert sum(map(len, joined)) == size - left_out
    for parts in zip(*ranks, strict=True):
        assert len({len(part) for part in parts}) == 1


@pytest.mark.parametrize("size", [3, 5, 7, 8, 16, 17, 18])
def test_evaluation_counts_each_sample_once_and_gives_every_rank_a_batch(size: int) -> None:
    order = torch.arange(size).flip(0)
    samplers = [KeyedSampler(size, 4, order=order, num_replicas=3, rank=rank) for rank in range(3)]
    batches = [drawn(sampler) for sampler in samplers]
    assert [len(own) for own in batches] == [len(sampler) for sampler in samplers]
    assert all(own and all(own) for own in batches)
    assert sorted(i for own in batches for batch in own for i in batch) == list(range(size))


def test_fewer_samples_than_processes_are_refused() -> None:
    with pytest.raises(ValueError, match="2 samples cannot be shared by 3 processes"):
        KeyedSampler(2, 4, num_replicas=3, rank=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        KeyedSampler(2, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_restored_loader_continues_where_it_was(workers: int) -> None:
    def loader() -> BatchLoader:
        return BatchLoader(Echo(50), sampler=KeyedSampler(50, 8, shuffle=True, seed=2), num_workers=workers)

    first = loader()
    first.sampler.set_epoch(3)
    batches = [draw.indices.tolist() for draw in first]
    assert first.state_dict() == {"epoch": 4, "batches": 0}
    iterator = iter(first)
    for _ in range(3):
        next(iterator)
    state = first.state_dict()
    assert state == {"epoch": 3, "batches": 3}

    second = loader()
    second.load_state_dict(state)
    iter(second)  # nobody draws from this one: the position must survive
    assert [draw.indices.tolist() for draw in second] == batches[3:]
    assert [draw.indices.tolist() for draw in second] == batches
    second.load_state_dict(state)
    second.sampler.set_epoch(4)
    assert len(list(second)) == len(second)


def test_keyed_numbers_are_uniform_and_depend_on_key_and_index_alone() -> None:
    indices = torch.arange(20_000)
    numbers = keyed_uniform(123, indices)
    assert torch.equal(numbers[[7, 3]], keyed_uniform(123, torch.tensor([7, 3])))
    assert not torch.equal(numbers, keyed_uniform(124, indices))
    counts = torch.histc(numbers, 20, 0, 1)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 45  # chi-square, 19 degrees of freedom, p < 0.001
    assert abs(float(torch.corrcoef(torch.stack([numbers[1:], numbers[:-1]]))[0, 1])) < 0.03


class Recorder(LightningModule):
    """Notes what it is shown; its weights depend on the order."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(400))
        self.shown: list[tuple[int, int, list[int], int]] = []

    def training_step(self, batch: SequenceBatch, batch_idx: int) -> torch.Tensor:
        self.shown.append((self.current_epoch, batch_idx, batch.user_ids.tolist(), int(batch.item_ids.sum())))
        return (self.weight[batch.item_ids].mean() - batch.lengths.float().mean()) ** 2

    def validation_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        self.log("val/length", batch.lengths.float().mean(), batch_size=len(batch.lengths))

    def predict_step(self, batch: SequenceBatch, batch_idx: int) -> torch.Tensor:
        return batch.user_ids

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def trainer(folder: Path, **options: object) -> Trainer:
    return Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path")
@pytest.mark.parametrize(
    ("workers", "options"),
    [(0, {}), (2, {}), (0, {"val_check_interval": 0.5}), (0, {"limit_train_batches": 2})],
)
def test_a_run_resumed_from_any_checkpoint_sees_what_the_unbroken_one_saw(
    tmp_path: Path, workers: int, options: dict[str, object]
) -> None:
    def data() -> SequenceData:
        return SequenceData(sample_users=200, batch_size=64, num_workers=workers, seed=3, repeat_pad=True)

    each_step = ModelCheckpoint(
        tmp_path, "{epoch}-{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False
    )
    best = ModelCheckpoint(tmp_path, "val-{epoch}", monitor="val/length", save_top_k=-1)
    unbroken = Recorder()
    trainer(tmp_path, callbacks=[each_step, best], **options).fit(unbroken, data())
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) >= 6
    for file in files if workers == 0 else files[1::4]:
        step = torch.load(file, weights_only=True)["global_step"]
        resumed = Recorder()
        trainer(tmp_path, enable_checkpointing=False, **options).fit(resumed, data(), ckpt_path=file, weights_only=True)
        assert resumed.shown == unbroken.shown[step:], file.name
        assert torch.equal(resumed.weight, unbroken.weight), file.name


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling")
@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled val")
def test_overfit_batches_repeats_the_same_few_batches(tmp_path: Path) -> None:
    model = Recorder()
    options = {"overfit_batches": 2, "enable_checkpointing": False}
    trainer(tmp_path, **options).fit(model, SequenceData(sample_users=200, batch_size=32))
    assert [(epoch, index, len(users)) for epoch, index, users, _ in model.shown] == [
        (0, 0, 32), (0, 1, 32), (1, 0, 32), (1, 1, 32),
    ]  # fmt: skip
    assert [shown[2] for shown in model.shown[:2]] == [shown[2] for shown in model.shown[2:]]


def test_prediction_covers_every_user_once(tmp_path: Path) -> None:
    rows = trainer(tmp_path).predict(Recorder(), SequenceData(sample_users=100, eval_batch_size=32))
    assert sorted(torch.cat(rows).tolist()) == list(range(100))  # type: ignore[arg-type]


LENGTHS = (torch.arange(1_003) * 389) % 400


def test_bucketed_batches_hold_samples_of_about_one_length_in_a_random_order() -> None:
    sampler = KeyedSampler(len(LENGTHS), 4, shuffle=True, lengths=LENGTHS, seed=5)
    batches = [LENGTHS[draw.indices] for draw in sampler]
    assert sorted(i for batch in drawn(sampler) for i in batch) == list(range(len(LENGTHS)))
    assert [len(batch) for batch in batches] == [4] * 250 + [3]
    spread = torch.tensor([int(batch.max() - batch.min()) for batch in batches], dtype=torch.float64)
    # A pool of 200 samples covers lengths 0..399: neighbours in it differ by 2 on average, three gaps a batch.
    assert spread.mean() < 10
    firsts = torch.tensor([int(batch.min()) for batch in batches], dtype=torch.float64)
    place = torch.arange(len(firsts), dtype=torch.float64)
    assert abs(torch.corrcoef(torch.stack([firsts, place]))[0, 1]) < 0.2, "short batches must not all come first"
    sampler.set_epoch(1)
    assert batches[0].tolist() != LENGTHS[next(iter(sampler)).indices].tolist()


def test_bucketed_batches_of_two_ranks_make_those_of_one() -> None:
    settings = {"shuffle": True, "equal": True, "lengths": LENGTHS, "seed": 2}
    one = drawn(KeyedSampler(len(LENGTHS), 8, **settings))
    ranks = [drawn(KeyedSampler(len(LENGTHS), 4, **settings, num_replicas=2, rank=rank)) for rank in range(2)]
    assert [left + right for left, right in zip(*ranks, strict=True)][:-1] == one[:-1]


def test_bucketing_leaves_no_sample_out_of_every_epoch() -> None:
    lengths = torch.arange(41)
    ranks = [
        KeyedSampler(41, 4, shuffle=True, equal=True, lengths=lengths, num_replicas=2, rank=rank) for rank in range(2)
    ]
    last, seen = set(), set()
    for epoch in range(40):
        for sampler in ranks:
            sampler.set_epoch(epoch)
            seen.update(index for batch in drawn(sampler) for index in batch)
        last.add(*set(range(41)).difference(*(batch for sampler in ranks for batch in drawn(sampler))))
    assert seen == set(range(41))
    assert len(last) > 10, "whatever is left out changes from epoch to epoch"


@pytest.mark.parametrize("size", [96, 97, 103, 24, 25])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_last_batch_that_is_not_full_is_left_out_on_request(size: int, world: int) -> None:
    settings = {"shuffle": True, "equal": True, "seed": 1}
    whole = drawn(KeyedSampler(size, 4 * world, **settings))
    ranks = [KeyedSampler(size, 4, **settings, drop_last=True, num_replicas=world, rank=rank) for rank in range(world)]
    batches = [drawn(sampler) for sampler in ranks]
    assert {len(batch) for own in batches for batch in own} == {4}
    assert [len(own) for own in batches] == [len(sampler) for sampler in ranks] == [size // (4 * world)] * world
    joined = [[index for part in parts for index in part] for parts in zip(*batches, strict=True)]
    assert joined == whole[: size // (4 * world)]
    assert [sampler.left_out for sampler in ranks] == [size % (4 * world)] * world


def test_the_only_batch_stays_however_small_it_is() -> None:
    ranks = [KeyedSampler(7, 4, equal=True, drop_last=True, num_replicas=2, rank=rank) for rank in range(2)]
    assert [drawn(sampler) for sampler in ranks] == [[[0, 1, 2]], [[3, 4, 5]]]
    assert [sampler.left_out for sampler in ranks] == [1, 1]
    assert drawn(KeyedSampler(3, 4, drop_last=True)) == [[0, 1, 2]]


def test_what_dropping_leaves_out_changes_from_epoch_to_epoch() -> None:
    sampler = KeyedSampler(21, 8, shuffle=True, drop_last=True)
    left_out = set()
    for epoch in range(20):
        sampler.set_epoch(epoch)
        left_out |= set(range(21)).difference(*drawn(sampler))
    assert left_out == set(range(21))


def test_samples_left_out_by_dropping_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="datamodules.loading")
    sampler = training_sampler(21, 8, 0, None, "pairs", drop_last=True)
    assert len(sampler) == 2
    assert "5 of 21 pairs are left out of each epoch, others each time, so that all batches are full" in caplog.text
