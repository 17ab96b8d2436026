from __future__ import annotations

import pytest
import torch

from datamodules.loading import Draw, keyed_ids
from datamodules.video_audio_rows import (
    ChosenPairs,
    ClipRows,
    ClipTable,
    DigitPool,
    RedrawnPairs,
    compare_standardization,
    digit_labels,
    draw_pairs,
    moments,
    split_groups,
)

PICTURES, SOUNDS = 60, 35


def pool() -> DigitPool:
    # Every image holds its own row number, so that a batch tells where it comes from.
    digits = torch.arange(PICTURES) % 10
    sound_digits = (torch.arange(SOUNDS) * 7) % 10
    pictures = torch.arange(PICTURES).float().view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    sounds = torch.arange(SOUNDS).float().view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    return DigitPool(pictures, digits, sounds, sound_digits)


def rows_of(images: torch.Tensor) -> torch.Tensor:
    return images[:, :, 0, 0, 0].long()


@pytest.mark.parametrize("num_frames", [1, 3])
def test_redrawn_sounds_say_what_the_pictures_show(num_frames: int) -> None:
    own = pool()
    batch = RedrawnPairs(own, 200, num_frames)[Draw(torch.arange(200), 5)]
    pictures, sounds = rows_of(batch.video), rows_of(batch.audio)
    assert pictures.shape == sounds.shape == (200, num_frames)
    assert torch.equal(own.digits[pictures], own.sound_digits[sounds])
    assert torch.equal(batch.labels, digit_labels(own.digits[pictures]))
    assert len(set(sounds.flatten().tolist())) == SOUNDS, "every sound of a digit can be drawn"
    assert sorted(batch.pair_ids.tolist()) == list(range(200))


def test_unpaired_sounds_do_not_know_the_picture() -> None:
    own = pool()
    batch = RedrawnPairs(own, 3000, 1, paired=False)[Draw(torch.arange(3000), 5)]
    same = own.digits[rows_of(batch.video)] == own.sound_digits[rows_of(batch.audio)]
    assert 0.06 < float(same.float().mean()) < 0.14
    assert torch.equal(batch.labels, own.digits[rows_of(batch.video)][:, 0])


@pytest.mark.parametrize(("num_pairs", "num_frames"), [(60, 1), (37, 1), (20, 3)])
def test_an_epoch_that_the_pictures_suffice_for_shows_each_at_most_once(num_pairs: int, num_frames: int) -> None:
    rows = RedrawnPairs(pool(), num_pairs, num_frames)
    pictures = rows_of(rows[Draw(torch.arange(num_pairs), 9)].video).flatten().tolist()
    assert len(set(pictures)) == num_pairs * num_frames


def test_a_longer_epoch_shows_all_pictures_equally_often_in_a_new_order_each_time() -> None:
    pictures = rows_of(RedrawnPairs(pool(), 120, 1)[Draw(torch.arange(120), 9)].video).flatten()
    assert torch.equal(torch.bincount(pictures), torch.full((PICTURES,), 2))
    assert not torch.equal(pictures[:PICTURES], pictures[PICTURES:])


def test_a_redrawn_pair_depends_on_key_and_index_alone() -> None:
    rows = RedrawnPairs(pool(), 50, 2)
    whole = rows[Draw(torch.arange(50), 1)]
    other = rows[Draw(torch.arange(50), 2)]
    part = RedrawnPairs(pool(), 50, 2)[Draw(torch.tensor([40, 3]), 1)]
    for all_rows, two in zip(whole, part, strict=True):
        assert torch.equal(all_rows[[40, 3]], two)
    assert not torch.equal(whole.video, other.video)
    assert not torch.equal(whole.audio, other.audio)
    assert torch.equal(whole.keys, keyed_ids(1, torch.arange(50)))


def test_fixed_pairs_are_of_one_digit_and_repeat_nothing_before_they_must() -> None:
    own = pool()
    pictures, sounds = draw_pairs(own.digits, own.sound_digits, 10, 3, seed=4)
    assert pictures.shape == sounds.shape == (10, 3)
    assert torch.equal(own.digits[pictures], own.sound_digits[sounds])
    assert len(set(pictures.flatten().tolist())) == len(set(sounds.flatten().tolist())) == 30
    again, _ = draw_pairs(own.digits, own.sound_digits, 10, 3, seed=4)
    other, _ = draw_pairs(own.digits, own.sound_digits, 10, 3, seed=5)
    assert torch.equal(pictures, again) and not torch.equal(pictures, other)


def test_evaluation_has_the_same_keys_in_every_epoch_and_training_new_ones() -> None:
    index = torch.arange(4)[:, None]
    for part, changes in (("train", True), ("validate", False), ("test", False)):
        rows = ChosenPairs(pool(), index, index, part)
        first, second = (rows[Draw(torch.arange(4), key)] for key in (1, 2))
        assert torch.equal(first.keys, second.keys) is not changes
        assert torch.equal(first.video, second.video) and torch.equal(first.pair_ids, second.pair_ids)
        assert bool((first.keys >= 0).all())
    ids = [ChosenPairs(pool(), index, index, part)[Draw(torch.arange(4), 0)].pair_ids for part in ("train", "test")]
    assert not set(ids[0].tolist()) & set(ids[1].tolist())


def test_a_label_is_the_string_of_digits_as_a_number() -> None:
    assert digit_labels(torch.tensor([[3, 0, 7], [0, 0, 2]])).tolist() == [307, 2]
    assert digit_labels(torch.tensor([[4]])).tolist() == [4]


def test_moments_over_chunks_are_those_of_all_values() -> None:
    values = torch.randn(1000, dtype=torch.float64) * 3 + 1e4
    mean, std = moments("audio", values.split(300))
    assert mean == pytest.approx(float(values.mean()), rel=1e-9)
    assert std == pytest.approx(float(values.std(correction=0)), rel=1e-6)
    with pytest.raises(ValueError, match=r"audio: all values of the training part are -100: there is no spread"):
        moments("audio", [torch.full((3, 4), -100.0)])


def test_bytes_count_as_fractions_of_white_before_they_are_standardised() -> None:
    video = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1, 1)
    table = ClipTable(video, torch.tensor([1.0, 2.0]).view(2, 1, 1, 1, 1), torch.arange(2), torch.tensor([-1, 3]))
    rows = ClipRows(table, torch.tensor([1, 0]), {"video": (0.5, 0.25), "audio": (1.0, 2.0)}, training=True)
    batch = rows[Draw(torch.tensor([0, 1]), 3)]
    assert batch.video.flatten().tolist() == [2.0, -2.0] and batch.video.dtype == torch.float32
    assert batch.audio.flatten().tolist() == [0.5, 0.0]
    assert (batch.pair_ids.tolist(), batch.labels.tolist()) == ([1, 0], [3, -1])


def test_rows_of_one_pair_are_in_one_part() -> None:
    pair_ids = torch.arange(300) // 3
    parts = split_groups(pair_ids, 0.1, 0, "set", held_out=2)
    assert torch.bincount(parts).tolist() == [240, 30, 30]
    assert all(len(set(parts[pair_ids == group].tolist())) == 1 for group in range(100))
    assert not torch.equal(parts, split_groups(pair_ids, 0.1, 1, "set", held_out=2))
    with pytest.raises(ValueError, match=r"set: validation_fraction=0.5 holds out 2 x 50 of 100 pairs"):
        split_groups(pair_ids, 0.5, 0, "set", held_out=2)


def test_a_checkpoint_of_pictures_scaled_otherwise_is_refused() -> None:
    own = {"source": "pairs", "standardization": {"video": [0.1, 0.3], "audio": [-40.0, 17.0]}}
    close = {"source": "pairs", "standardization": {"video": [0.1001, 0.3001], "audio": [-40.0, 17.01]}}
    compare_standardization(own, close)
    far = {"source": "av_mnist", "standardization": {"video": [0.1, 0.3], "audio": [-40.0, 17.1]}}
    with pytest.raises(ValueError, match=r"trained on audio of mean -40 .* 17.1 \(source='av_mnist'\).*test_path"):
        compare_standardization(own, far)
