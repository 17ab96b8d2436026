from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import torch

from datamodules import SequenceBatch, SequenceData
from datamodules.loading import Draw
from datamodules.sequence_rows import HistoryRows, SequenceTable, TrainRows
from datamodules.sources.interactions import Interactions, core, gap_variance, half, offsets_of

if TYPE_CHECKING:
    from pathlib import Path


def ragged(data: SequenceData) -> list[list[int]]:
    table = data.sequences
    return [part.tolist() for part in torch.tensor_split(table.item_ids, table.offsets[1:-1])]


def write(folder: Path, items: str, times: str | None = None, name: str = "x") -> str:
    (folder / f"{name}_item.txt").write_text(items)
    if times is not None:
        (folder / f"{name}_time.txt").write_text(times)
    return str(folder / f"{name}_item.txt")


@pytest.mark.parametrize("max_length", [1, 4, 50])
def test_leave_one_out_equals_a_plain_loop(max_length: int) -> None:
    data = SequenceData(sample_users=300, max_length=max_length, batch_size=17, eval_batch_size=19)
    users = ragged(data)
    seen = 0
    for batch in data.train_dataloader():
        assert batch.seen_ids is None
        assert batch.item_ids.shape == batch.target_ids.shape == (len(batch.user_ids), int(batch.lengths.max()))
        for user, items, length, targets in zip(*batch[:4], strict=True):
            sequence = users[user]
            inputs, following = sequence[:-3][-max_length:], sequence[1:-2][-max_length:]
            padding = [0] * (len(items) - len(inputs))
            assert items.tolist() == padding + inputs
            assert targets.tolist() == padding + following
            assert length == len(inputs)
            seen += 1
    assert seen == 300
    for loader, cut in (
        (data.val_dataloader(), -2),
        (data.test_dataloader(), -1),
        (data.predict_dataloader(), None),
    ):
        rows, widths = [], []
        for batch in loader:
            widths.append(batch.item_ids.shape[1])
            for user, items, length, target, history in zip(*batch, strict=True):
                sequence = users[user]
                before = sequence[:cut]
                assert [i for i in items.tolist() if i] == before[-max_length:]
                assert items.tolist()[len(items) - int(length) :] == before[-max_length:]
                assert int(target) == (sequence[cut] if cut else 0)
                assert sorted(i for i in history.tolist() if i) == sorted(before)
                rows.append(int(user))
        assert sorted(rows) == list(range(300))
        assert widths == sorted(widths)


def test_batches_are_int64_and_the_table_is_small() -> None:
    data = SequenceData(batch_size=16)
    batch = next(iter(data.train_dataloader()))
    assert isinstance(batch, SequenceBatch)
    assert {field.dtype for field in batch if field is not None} == {torch.int64}
    table = data.sequences
    assert table.item_ids.dtype == torch.int32
    assert int(table.item_ids.min()) == 1
    assert int(table.item_ids.max()) == data.num_items
    size = sum(field.numel() * field.element_size() for field in table if field is not None)
    assert size <= 15 * len(table.item_ids)
    assert torch.equal(table.train_lengths, table.offsets.diff() - 2)


def test_seen_ids_hold_the_whole_history_also_when_the_input_is_cut_and_none_without_masking() -> None:
    data = SequenceData(sample_users=100, max_length=2)
    batch = next(iter(data.test_dataloader()))
    assert batch.item_ids.shape[1] == 2
    assert batch.seen_ids.shape[1] > 2
    unmasked = next(iter(SequenceData(sample_users=100, max_length=2, mask_seen=False).test_dataloader()))
    assert not unmasked.seen_ids.any()
    assert torch.equal(unmasked.item_ids, batch.item_ids)


@pytest.mark.parametrize("separator", [False, True])
@pytest.mark.parametrize("max_length", [5, 12, 50])
def test_repeat_padding_fills_the_row_with_whole_rows_of_the_sequence(separator: bool, max_length: int) -> None:
    data = SequenceData(sample_users=200, max_length=max_length)
    table, users = data.sequences, ragged(data)
    rows = TrainRows(table, max_length, repeat_pad=True, repeat_separator=separator)
    found: dict[int, set[int]] = {}
    for key in range(40):
        batch = rows[Draw(torch.arange(200), key)]
        assert torch.equal(batch.item_ids, rows[Draw(torch.arange(200), key)].item_ids)
        one = rows[Draw(torch.tensor([17]), key)]
        width = one.item_ids.shape[1]
        assert torch.equal(one.item_ids[0], batch.item_ids[17, -width:])
        assert not batch.item_ids[17, :-width].any()
        for user, items, length, targets in zip(*batch[:4], strict=True):
            inputs, following = users[user][:-3], users[user][1:-2]
            extra_most = max_length // len(inputs)
            join = [0] if separator else []
            possible = {}
            for extra in range(1, extra_most + 1) if extra_most else [0]:
                full_inputs = (inputs + join) * extra + inputs
                full_targets = (following + join) * extra + following
                possible[tuple(full_inputs[-max_length:])] = (full_targets[-max_length:], extra)
            span = items[len(items) - int(length) :].tolist()
            assert tuple(span) in possible
            wanted, extra = possible[tuple(span)]
            assert targets[len(items) - int(length) :].tolist() == wanted
            assert not items[: len(items) - int(length)].any()
            found.setdefault(int(user), set()).add(extra)
    shortest = min(range(200), key=lambda user: len(users[user]))
    if max_length > 5:
        assert len(found[shortest]) > 1, "the number of copies must vary"


def test_targets_in_history_are_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    frame = pd.DataFrame(
        {"user_id": np.repeat(["a", "b", "c"], 5), "item_id": list("pqrsp") + list("pqrst") + list("ppqrq")}
    )
    data = SequenceData.from_dataframe(frame, time_column=None)
    with caplog.at_level(logging.INFO):
        data.setup("test")
    assert "2 of 3 test targets (66.7 %) are in the user's own history" in caplog.text


def assert_ranks(rank: torch.Tensor, variances: list[float]) -> None:
    order = rank.argsort().tolist()
    assert sorted(rank.tolist()) == list(range(len(variances)))
    np.testing.assert_allclose(np.array(variances)[order], np.sort(variances), rtol=1e-12)
    even = [user for user in order if variances[user] == 0]
    assert even == sorted(even), "ties follow the users' names, here their rows"


def test_uniformity_follows_the_gaps_of_distinct_training_times() -> None:
    rng = np.random.default_rng(3)
    lengths = rng.integers(4, 20, 60)
    times = [np.sort(rng.integers(0, 30, n)) * 86_400 for n in lengths]
    expected = []
    for own in times:
        gaps = np.diff(np.unique(own[:-2]))
        expected.append(float(np.var(gaps)) if len(gaps) else 0.0)
    frame = pd.DataFrame(
        {
            "user_id": np.repeat(np.arange(60), lengths),
            "item_id": np.concatenate([np.arange(n) for n in lengths]),
            "timestamp": np.concatenate(times),
        }
    )
    rank = SequenceData.from_dataframe(frame).sequences.uniformity_rank
    assert_ranks(rank, expected)
    assert expected.count(0.0) > 1
    every = [float(np.var(np.diff(np.unique(own)))) if len(np.unique(own)) > 1 else 0.0 for own in times]
    rank = SequenceData.from_dataframe(frame, uniformity="all_times").sequences.uniformity_rank
    assert_ranks(rank, every)
    moved = frame.assign(timestamp=frame["timestamp"] + 12_345)
    assert SequenceData.from_dataframe(moved, uniformity="all_times").sequences.uniformity_rank.equal(rank)


def test_uniformity_of_the_file_and_of_the_published_code(tmp_path: Path) -> None:
    order = [3, 5, 1, 4, 2]
    path = write(tmp_path, "".join(f"{user} 1 2 3 4\n" for user in order))
    assert SequenceData(path=path, uniformity="file_order").sequences.uniformity_rank.tolist() == [0, 1, 2, 3, 4]
    # Row i is tested against the ids of the first lines: row 1 finds id 1 in line 2, row 0 finds nothing.
    assert SequenceData(path=path, uniformity="official").sequences.uniformity_rank.tolist() == [5, 2, 4, 0, 3]
    assert SequenceData(path=path).sequences.uniformity_rank.tolist() == [5] * 5, "no times, nobody is known uniform"


def naive_core(pairs: list[tuple[int, int]], min_user: int, min_item: int) -> list[tuple[int, int]]:
    while True:
        users = [u for u, _ in pairs]
        items = [i for _, i in pairs]
        kept = [(u, i) for u, i in pairs if users.count(u) >= min_user and items.count(i) >= min_item]
        if len(kept) == len(pairs):
            return kept
        pairs = kept


def test_core_equals_a_plain_loop_and_reindexes() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, 40)
    items = rng.integers(1, 21, lengths.sum()).astype(np.int32)
    labels = np.arange(1, 21) * 10
    data = Interactions(items, None, offsets_of(lengths), labels, np.arange(40), "toy")
    pairs = list(zip(data.rows().tolist(), items.tolist(), strict=True))
    item_counts = np.bincount(items)
    one_round = [(u, i) for u, i in pairs if lengths[u] >= 4 and item_counts[i] >= 6]
    expected = naive_core(pairs, 4, 6)
    assert 0 < len(expected) < len(items)
    assert expected != one_round, "the sample must need several rounds"
    found = core(data, 4, 6)
    names, things = found.user_labels[found.rows()].tolist(), found.item_labels[found.item_ids - 1].tolist()
    external = list(zip(names, things, strict=True))
    assert external == [(u, i * 10) for u, i in expected]
    assert set(found.item_ids.tolist()) == set(range(1, found.num_items + 1))
    with pytest.raises(ValueError, match=r"nothing is left of 40 users and 20 items .* has 50 .* every item 1"):
        core(data, 50, 1)


@pytest.mark.parametrize("split_by", ["users", "interactions"])
def test_the_halves_part_the_users_by_their_variance(split_by: str) -> None:
    whole = SequenceData().interactions
    parts = [SequenceData(split=part, split_by=split_by).interactions for part in ("uniform", "nonuniform")]
    assert sorted([*parts[0].user_labels, *parts[1].user_labels]) == whole.user_labels.tolist()
    variances = [gap_variance(part.timestamps, part.offsets) for part in parts if part.timestamps is not None]
    assert variances[0].max() <= variances[1].min()
    sizes = [part.num_users if split_by == "users" else len(part.item_ids) for part in parts]
    assert abs(sizes[0] - sizes[1]) <= 60
    assert all(set(part.item_ids.tolist()) == set(range(1, part.num_items + 1)) for part in parts)
    without_times = Interactions(*[*whole.__dict__.values()][:1], None, *[*whole.__dict__.values()][2:])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no times: split='uniform' needs them"):
        half(without_times, "uniform", "users")


def test_a_share_of_the_users_is_the_same_in_every_run_and_reindexed() -> None:
    first = SequenceData(user_fraction=0.1, seed=1)
    assert first.num_users == 100
    assert first.user_labels == SequenceData(user_fraction=0.1, seed=2).user_labels
    assert set(first.sequences.item_ids.tolist()) == set(range(1, first.num_items + 1))


def test_short_users_are_refused_or_dropped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, "1 1 2 3 4\n2 1 2 3\n3 5 4 3 2 1\n4 1\n")
    with pytest.raises(ValueError, match=r"2 of 4 users have fewer than 4 .* user 2 with 3.*min_length=4"):
        SequenceData(path=path).setup("fit")
    with caplog.at_level(logging.INFO):
        data = SequenceData(path=path, min_length=4)
        assert data.user_labels == ["1", "3"]
    assert "dropped 2 of 4 users with fewer than 4" in caplog.text
    data = SequenceData(path=path, min_length=5)
    assert (data.num_items, data.item_labels) == (5, ["", "1", "2", "3", "4", "5"])
    with pytest.raises(ValueError, match="none of the 4 users has min_length=9"):
        SequenceData(path=path, min_length=9).setup("fit")


def test_equal_times_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, "1 1 2 3 4\n2 4 3 2 1\n", "1 7 7 7 7\n2 9 9 9 9\n")
    SequenceData(path=path).setup("fit")
    assert "all times of every user are equal" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "beautty"}, "source must be one of .*beauty.* got 'beautty'"),
        ({"path": "x.txt", "source": "beauty"}, "path=x.txt and source='beauty' contradict"),
        ({"path": "x.txt", "source": "embedded"}, "path=x.txt and source='embedded' contradict"),
        ({"source": "files"}, "source='files' needs path"),
        ({"time_path": "t.txt"}, "time_path=t.txt needs path"),
        ({"data_dir": "d"}, "data_dir holds published sets, but source='embedded'"),
        ({"order": "var"}, "order='var' .* source='embedded'"),
        ({"order": "up"}, "order must be one of auto, org, var, got 'up'"),
        ({"split": "half"}, "split must be one of None, uniform, nonuniform, got 'half'"),
        ({"split_by": "items"}, "split_by must be one of .* got 'items'"),
        ({"uniformity": "x"}, "uniformity must be one of .* got 'x'"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"eval_batch_size": -1}, "eval_batch_size must be at least 1, got -1"),
        ({"min_length": 3}, "min_length must be at least 4, got 3"),
        ({"min_item_interactions": 0}, "min_item_interactions must be at least 1, got 0"),
        ({"user_fraction": 0.0}, "user_fraction must be above 0 and at most 1, got 0"),
        ({"user_fraction": 1.5}, "user_fraction must be above 0 and at most 1, got 1.5"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
    ],
)
def test_contradictory_options_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceData(**options)


def test_a_checkpoint_of_another_catalogue_is_refused(tmp_path: Path) -> None:
    first = SequenceData(path=write(tmp_path, "1 1 2 3 4\n", name="a"))
    second = SequenceData(path=write(tmp_path, "1 5 2 3 4\n", name="b"), reindex=True)
    assert first.num_items == second.num_items
    first.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="trained on another catalogue: 4 items of source='files', here 4 items"):
        second.load_state_dict(first.state_dict())


def test_other_sequences_are_tested_with_the_ids_of_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = write(tmp_path, "10 1 2 3 4\n20 4 3 2 1 5\n")
    # 20 is known; 30 is not, and has an unknown item; the last item of 40 is unknown; 50 has no known item before.
    other = write(tmp_path, "20 5 1 2\n30 3 77 4 1\n40 1 2 88\n50 99 1\n", name="new")
    data = SequenceData(path=train, test_path=other)
    with caplog.at_level(logging.INFO):
        data.setup("test")
    assert "3 of 8 items (3 interactions left out) and 3 of 4 users" in caplog.text
    assert "1 users whose last item is unknown and 1 without a known item before it" in caplog.text
    (batch,) = data.test_dataloader()
    assert batch.user_ids.tolist() == [1, -1]
    assert batch.item_ids.tolist() == [[5, 1], [3, 4]]
    assert batch.target_ids.tolist() == [2, 1]
    assert [loader_batch.target_ids.tolist() for loader_batch in data.val_dataloader()] == [[3, 1]]
    alien = SequenceData(path=train, test_path=write(tmp_path, "1 90 91 92\n", name="alien"))
    with pytest.raises(ValueError, match=r"none of 1 users can be tested.*3 of 3 items are unknown"):
        alien.test_dataloader()


def test_history_rows_name_users_and_targets() -> None:
    rows = HistoryRows(
        torch.tensor([1, 2, 3, 4, 5], dtype=torch.int32),
        torch.tensor([0, 3]),
        torch.tensor([2, 1]),
        torch.tensor([7, -1]),
        max_length=5,
    )
    batch = rows[Draw(torch.tensor([1, 0]), 0)]
    assert batch.user_ids.tolist() == [-1, 7]
    assert batch.item_ids.tolist() == [[0, 4], [1, 2]]
    assert batch.target_ids.tolist() == [5, 3]
    assert rows.by_length().tolist() == [1, 0]


def test_table_and_batch_are_what_models_import() -> None:
    import datamodules.sequence

    assert datamodules.sequence.SequenceTable is SequenceTable
    assert SequenceTable._fields == ("item_ids", "timestamps", "offsets", "train_lengths", "uniformity_rank")
    assert SequenceBatch._fields == ("user_ids", "item_ids", "lengths", "target_ids", "seen_ids")
