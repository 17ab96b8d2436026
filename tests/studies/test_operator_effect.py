import pytest
import torch

from datamodules.sequence import SequenceData
from studies.ticoserec.operator_effect import measure, spread_in_days

DAY = 86_400


def test_spread_is_the_population_deviation_of_each_row() -> None:
    gaps = torch.tensor([DAY, 3 * DAY, 5 * DAY])
    assert spread_in_days(gaps, torch.tensor([2, 0, 1])).tolist() == [1.0, 0.0, 0.0]


def test_choosing_by_time_evens_out_the_gaps_more_than_chance_does() -> None:
    figures = measure(SequenceData(sample_users=500))
    spread = {name: figures[f"gap_std/{name}/mean"] for name in ("before", "ti_insert", "random_insert")}
    assert spread["ti_insert"] < 0.9 * spread["random_insert"] < 0.9 * spread["before"]
    assert figures["gap_std/ti_crop/mean"] < 0.9 * figures["gap_std/random_crop/mean"]


@pytest.mark.real
def test_figures_of_beauty() -> None:
    figures = measure(SequenceData(source="beauty"))
    expected = {
        "gap_std/before/mean": 95.4,
        "gap_std/before/median": 51.1,
        "gap_std/ti_insert/mean": 47.2,
        "gap_std/ti_insert/median": 25.1,
        "gap_std/random_insert/mean": 70.9,
        "gap_std/random_insert/median": 36.6,
        "lowered/ti_insert": 0.986,
        "lowered/random_insert": 0.91,
        "long_users": 1927,
        "gap_std/ti_crop/mean": 10.7,
        "gap_std/ti_crop_official/mean": 20.1,
        "gap_std/random_crop/mean": 47.6,
    }
    assert figures == pytest.approx(expected, rel=0.02)
