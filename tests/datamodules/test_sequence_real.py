from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from datamodules import SequenceData
from datamodules.sources.interactions import gap_variance
from datamodules.sources.sequence_sets import SETS, find_files
from datamodules.sources.sequence_text import read_bytes

pytestmark = pytest.mark.real

DAY = 86_400


@pytest.mark.parametrize(
    ("source", "users", "items", "interactions", "longest", "repeating"),
    [
        ("beauty", 22_363, 12_101, 198_502, 204, 0),
        ("sports", 35_598, 18_357, 296_337, 296, 0),
        ("yelp_a", 30_431, 20_033, 316_354, 350, 7_102),
    ],
)
def test_published_sets_have_the_published_counts(
    source: str, users: int, items: int, interactions: int, longest: int, repeating: int
) -> None:
    data = SequenceData(source=source)
    table = data.sequences
    assert (data.num_users, data.num_items, len(table.item_ids)) == (users, items, interactions)
    lengths = table.offsets.diff()
    assert (int(lengths.min()), int(lengths.max())) == (5, longest)
    rows = data.interactions.rows()
    pairs = np.unique(rows * (items + 1) + table.item_ids.numpy(), return_counts=True)
    assert len(np.unique(pairs[0][pairs[1] > 1] // (items + 1))) == repeating
    assert sorted(table.uniformity_rank.tolist()) == list(range(users))


def test_the_plain_text_of_the_copies_has_the_hashes_asked_of_downloads() -> None:
    for source in ("beauty", "sports", "yelp_a"):
        found = find_files(source, "org", Path(os.environ["ZOO_DATA"]))
        assert found is not None
        for path, kind in zip(found[:2], ("item_org", "time_org"), strict=True):
            content = read_bytes(path)
            assert (len(content), hashlib.sha256(content).hexdigest()) == SETS[source].checks[kind]


def test_train_inputs_of_beauty_are_as_short_as_described() -> None:
    inputs = SequenceData(source="beauty").sequences.train_lengths.numpy() - 1
    assert inputs.mean() == pytest.approx(5.9, abs=0.05)
    assert np.percentile(inputs, [25, 50, 75, 100]).tolist() == [2, 3, 6, 201]
    assert (inputs <= 12).mean() == pytest.approx(0.91, abs=0.005)


def test_repeats_of_yelp_are_counted() -> None:
    data = SequenceData(source="yelp_a")
    shares = [data._history_rows(stage).targets_in_history() / data.num_users for stage in ("validate", "test")]
    assert shares == [pytest.approx(0.054, abs=5e-4), pytest.approx(0.067, abs=5e-4)]


@pytest.mark.parametrize("core", [{"min_user_interactions": 5, "min_item_interactions": 15}])
def test_the_core_and_halves_of_the_scaled_down_proof(core: dict[str, int]) -> None:
    whole = SequenceData(source="beauty", **core)
    assert (whole.num_users, whole.num_items, len(whole.sequences.item_ids)) == (4_406, 1_067, 49_507)
    for part, interactions, days in (("uniform", 23_264, 10.7), ("nonuniform", 26_243, 156.3)):
        half = SequenceData(source="beauty", split=part, **core)
        data = half.interactions
        assert data.timestamps is not None
        spread = np.median(np.sqrt(gap_variance(data.timestamps, data.offsets))) / DAY
        assert (half.num_users, len(data.item_ids)) == (2_203, interactions)
        assert spread == pytest.approx(days, abs=0.05)


def test_the_published_code_exempts_almost_nobody_of_those_it_means() -> None:
    exempt = int(0.15 * 22_363)
    meant = SequenceData(source="beauty", order="var", uniformity="file_order")
    official = SequenceData(source="beauty", order="var", uniformity="official")
    assert meant.user_labels[:2] == official.user_labels[:2] == ["14579", "17312"]
    first, found = meant.sequences.uniformity_rank < exempt, official.sequences.uniformity_rank < exempt
    assert (int(first.sum()), int(found.sum()), int((first & found).sum())) == (3_354, 3_354, 209)


def test_sequences_without_times_and_with_an_item_zero_are_read() -> None:
    path = Path(os.environ["ZOO_DATA"]) / "amazon_games_text" / "sequences.txt.gz"
    data = SequenceData(path=str(path), reindex=True)
    assert (data.num_users, data.num_items, len(data.sequences.item_ids)) == (45_546, 16_859, 396_893)
    assert data.sequences.timestamps is None
    assert data.item_labels[:3] == ["", "0", "1"]


def test_movielens_is_read_from_its_table() -> None:
    path = Path(os.environ["ZOO_DATA"]) / "movielens_small_mm" / "interactions.parquet"
    data = SequenceData(path=str(path), user_column="user", item_column="item")
    assert (data.num_users, data.num_items, len(data.sequences.item_ids)) == (609, 2_521, 61_649)
    times = data.sequences.timestamps
    assert times is not None
    inside = np.diff(data.interactions.rows()) == 0
    assert bool((times.diff()[inside] >= 0).all())
