from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import datamodules
from datamodules import VideoAudioBatch, VideoAudioData
from datamodules.loading import Draw, KeyedSampler
from tests.datamodules.sources.av_folders import write_pairs

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def data() -> VideoAudioData:
    found = VideoAudioData(seed=3)
    found.setup("fit")
    return found


def joined(batches: list[VideoAudioBatch]) -> VideoAudioBatch:
    return VideoAudioBatch(*(torch.cat(tensors) for tensors in zip(*batches, strict=True)))


def test_the_sample_needs_no_option(data: VideoAudioData) -> None:
    assert (data.source, data.image_shape, data.num_frames, data.num_classes) == ("embedded", [1, 16, 16], 1, 10)
    assert data.label_names == list("0123456789")
    batches = list(data.train_dataloader())
    assert len(batches) == len(data.train_dataloader()) == 15
    for batch in batches:
        assert batch.video.shape == batch.audio.shape == (64, 1, 1, 16, 16)
        assert [tensor.dtype for tensor in batch] == [torch.float32] * 2 + [torch.int64] * 3
        assert all(bool(tensor.isfinite().all()) for tensor in batch[:2])
    assert (len(joined(list(data.val_dataloader())).labels), len(joined(list(data.test_dataloader())).labels)) == (
        150,
        300,
    )
    assert torch.equal(joined(list(data.predict_dataloader())).audio, joined(list(data.test_dataloader())).audio)


def test_the_training_part_has_mean_zero_and_deviation_one(data: VideoAudioData) -> None:
    pool = data._clips._pools["train"]  # type: ignore[attr-defined]
    for images in (pool.pictures, pool.sounds):
        assert float(images.mean()) == pytest.approx(0, abs=1e-4)
        assert float(images.std(correction=0)) == pytest.approx(1, abs=1e-4)
    test = data._clips._pools["test"]  # type: ignore[attr-defined]
    assert float(test.sounds.mean()) != pytest.approx(0, abs=1e-4), "the numbers are those of the training"


def test_both_sides_of_every_pair_have_the_digit_of_its_label(data: VideoAudioData) -> None:
    clips: Any = data._clips
    for part, loader in (
        ("train", data.train_dataloader()), ("validate", data.val_dataloader()), ("test", data.test_dataloader()),
    ):  # fmt: skip
        pool, batch = clips._pools[part], joined(list(loader))
        for images, pool_images, digits in (
            (batch.video, pool.pictures, pool.digits),
            (batch.audio, pool.sounds, pool.sound_digits),
        ):
            distance = torch.cdist(images.flatten(1), pool_images.flatten(1))
            assert float(distance.min(dim=1).values.max()) < 0.1
            assert torch.equal(digits[distance.argmin(dim=1)], batch.labels)


def test_fixed_pairs_stay_while_redrawn_ones_change(data: VideoAudioData) -> None:
    def epochs(pairing: str) -> list[set[tuple[float, float]]]:
        loader = VideoAudioData(pairing=pairing, num_pairs=128, seed=1).train_dataloader()
        found = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            batch = joined(list(loader))
            found.append({(float(v.double().sum()), float(a.double().sum())) for v, a in zip(*batch[:2], strict=True)})
        return found

    first, second = epochs("fixed")
    assert first == second
    first, second = epochs("redrawn")
    assert len(first & second) < 5
    other = joined(list(VideoAudioData(pairing="fixed", num_pairs=128, pair_seed=1).train_dataloader()))
    same = joined(list(VideoAudioData(pairing="fixed", num_pairs=128, pair_seed=0).train_dataloader()))
    assert sorted(other.labels.tolist()) != sorted(same.labels.tolist())
    assert sorted(same.pair_ids.tolist()) == list(range(128))


def test_the_test_pairs_depend_on_no_seed() -> None:
    one, other = (VideoAudioData(seed=s, pair_seed=s, pairing=p) for s, p in ((0, "redrawn"), (7, "fixed")))
    for left, right in zip(joined(list(one.test_dataloader())), joined(list(other.test_dataloader())), strict=True):
        assert torch.equal(left, right)
    assert not torch.equal(joined(list(one.val_dataloader())).video, joined(list(other.val_dataloader())).video), (
        "validation pairs are drawn by pair_seed"
    )


def test_clips_of_several_digits_are_labelled_by_their_string() -> None:
    data = VideoAudioData(num_frames=3, channels=3, image_size=20, num_mels=16)
    assert (data.image_shape, data.num_frames, data.num_classes, data.label_names) == ([3, 20, 20], 3, 1000, None)
    batch = joined(list(data.test_dataloader()))
    assert batch.video.shape == batch.audio.shape == (300, 3, 3, 20, 20)
    assert len(set(batch.labels.tolist())) > 100 and int(batch.labels.max()) < 1000
    assert torch.equal(batch.audio[:, :, 0], batch.audio[:, :, 2])


@pytest.mark.parametrize("pairing", ["redrawn", "fixed", "unpaired"])
def test_two_ranks_see_what_one_with_twice_the_batch_sees(pairing: str) -> None:
    rows: Any = VideoAudioData(pairing=pairing, num_pairs=100)._clips.rows("train")
    settings = {"shuffle": True, "equal": True, "drop_last": True, "seed": 2}
    one = [rows[draw] for draw in KeyedSampler(100, 16, **settings)]
    ranks = [[rows[draw] for draw in KeyedSampler(100, 8, **settings, num_replicas=2, rank=r)] for r in range(2)]
    assert len(one) == 6
    for whole, left, right in zip(one, *ranks, strict=True):
        for tensor, parts in zip(whole, zip(left, right, strict=True), strict=True):
            assert torch.equal(tensor, torch.cat(parts))


def test_workers_make_the_same_batches() -> None:
    alone, two = (VideoAudioData(num_pairs=200, seed=5, num_workers=workers) for workers in (0, 2))
    for left, right in zip(alone.train_dataloader(), two.train_dataloader(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_only_full_batches_are_trained_on_but_never_none(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="datamodules.loading")
    batches = list(VideoAudioData(num_pairs=100, batch_size=32).train_dataloader())
    assert [len(batch.labels) for batch in batches] == [32] * 3
    assert "4 of 100 pairs are left out of each epoch" in caplog.text
    assert [len(batch.labels) for batch in VideoAudioData(num_pairs=20, batch_size=32).train_dataloader()] == [20]


def test_a_row_has_a_key_of_its_own_in_each_epoch(data: VideoAudioData) -> None:
    loader = data.train_dataloader()
    keys = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        keys += joined(list(loader)).keys.tolist()
    assert len(set(keys)) == 2 * 960 and min(keys) >= 0


def test_a_checkpoint_knows_how_its_pictures_were_scaled(data: VideoAudioData, tmp_path: Path) -> None:
    VideoAudioData(pairing="fixed").load_state_dict(data.state_dict())
    other = VideoAudioData(path=str(write_pairs(tmp_path / "pairs")))
    with pytest.raises(ValueError, match=r"was trained on video of .*source='embedded'.*--data.test_path"):
        other.load_state_dict(data.state_dict())


class Watcher(LightningModule):
    """Counts what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.keys: list[int] = []

    def training_step(self, batch: VideoAudioBatch, batch_idx: int) -> torch.Tensor:
        self.keys += batch.keys.tolist()
        return ((batch.video - self.weight * batch.audio) ** 2).mean()

    def validation_step(self, batch: VideoAudioBatch, batch_idx: int) -> None:
        self.log("val/weight", self.weight, batch_size=len(batch.labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path")
def test_a_resumed_run_sees_what_the_unbroken_one_saw(tmp_path: Path) -> None:
    def trainer(**options: Any) -> Trainer:
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        return Trainer(accelerator="cpu", default_root_dir=tmp_path, **quiet, **options)

    whole, rest = Watcher(), Watcher()
    options = {"num_pairs": 200, "batch_size": 64, "seed": 4}
    each_step = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False)
    trainer(max_epochs=2, callbacks=[each_step]).fit(whole, VideoAudioData(**options))
    trainer(max_epochs=2, enable_checkpointing=False).fit(
        rest, VideoAudioData(**options), ckpt_path=tmp_path / "step=4.ckpt", weights_only=True
    )
    assert len(whole.keys) == len(set(whole.keys)) == 6 * 64
    assert rest.keys == whole.keys[4 * 64 :]
    assert float(rest.weight.detach()) == float(whole.weight.detach()) != 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "avmnist"}, "source must be one of embedded, av_mnist, pairs, csv, got 'avmnist'"),
        ({"pairing": "random"}, "pairing must be one of redrawn, fixed, unpaired, got 'random'"),
        ({"channels": 2}, "channels must be one of None, 1, 3, got 2"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"validation_fraction": 0.0}, "validation_fraction must be above 0 and below 1"),
        ({"source": "pairs"}, r"path=None and source='pairs' do not go together: give its path"),
        ({"source": "embedded", "path": "x"}, r"path=x and source='embedded' do not go together: leave one of the two"),
        ({"data_dir": "x"}, "data_dir=x has no meaning for source='embedded': only for av_mnist"),
        ({"window": 2.6}, "window=2.6 has no meaning for source='embedded': only for csv"),
        ({"path": "x.csv", "num_pairs": 3}, "num_pairs=3 has no meaning for source='csv': only for embedded, av_mnist"),
        ({"path": "x.csv", "pairing": "fixed"}, "pairing='fixed' has no meaning for source='csv'"),
        ({"path": "x.csv", "window": -1.0}, "window must be above 0 seconds"),
        ({"pre_emphasis": 1.0}, "pre_emphasis must be at least 0 and below 1"),
        ({"pad_short": True}, "pad_short has no meaning for source='embedded'"),
        ({"standardize": False}, "standardize=False is for ready tensors, source='embedded' has sounds in dB"),
        ({"num_frames": 10}, "num_frames=10: labels are strings of digits as a number, of 9 at most"),
    ],
    ids=["source", "pairing", "channels", "batch", "fraction", "no_path", "path", "data_dir", "window", "csv_pairs",
         "csv_pairing", "csv_window", "pre_emphasis", "pad_short", "standardize", "num_frames"],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoAudioData(**options)


def test_other_pairs_can_be_tested_on(tmp_path: Path) -> None:
    audio = torch.randn(6, 1, 1, 16, 16) - 30
    video = torch.randint(0, 256, (6, 1, 1, 16, 16), dtype=torch.uint8)
    folder = write_pairs(tmp_path / "new", video=video, audio=audio, label=torch.arange(6), pair_id=None)
    data = VideoAudioData(test_path=str(folder))
    batch = next(iter(data.test_dataloader()))
    mean, std = data.standardization["video"]
    torch.testing.assert_close(batch.video, (video / 255 - mean) / std)
    assert batch.labels.tolist() == list(range(6))
    with pytest.raises(FileNotFoundError, match=r"test_path=.*gone is missing"):
        VideoAudioData(test_path=str(tmp_path / "gone")).setup("test")
    (tmp_path / "new.csv").write_text("video,audio\n")
    with pytest.raises(ValueError, match=r"new.csv is a file, but source='embedded' is tested on a folder"):
        VideoAudioData(test_path=str(tmp_path / "new.csv")).setup("test")


def test_the_package_names_them() -> None:
    assert {"VideoAudioData", "VideoAudioBatch", "LogMel"} <= set(datamodules.__all__)
    assert datamodules.LogMel.__module__ == "datamodules.sources.log_mel"


def test_draws_need_no_order(data: VideoAudioData) -> None:
    rows: Any = data._clips.rows("train")
    batch = rows[Draw(torch.tensor([5]), 77)]
    assert torch.equal(batch.video[0], rows[Draw(torch.arange(1000), 77)].video[5])
