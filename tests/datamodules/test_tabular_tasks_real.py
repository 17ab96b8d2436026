from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from datamodules import TabularTaskData

pytestmark = pytest.mark.real


def folder() -> Path:
    return Path(os.environ["ZOO_DATA"]) / "adult_census"


def test_adult_has_the_published_counts_and_statistics() -> None:
    data = TabularTaskData(source="adult")
    assert [len(rows) for rows in data._prepared.parts.values()] == [20_000, 5_000, 7_561]
    assert (len(data.cardinalities), data.num_numeric) == (7, 3)
    income, hours, age = data.tasks
    assert hours["target_std"] == pytest.approx(12.2, abs=0.05)
    assert age["target_std"] == pytest.approx(13.7, abs=0.05)
    assert (income["kind"], income["num_outputs"]) == ("binary", 1)
    labels = torch.cat([batch.targets["income"] for batch in data.train_dataloader()])
    assert labels.mean().item() == pytest.approx(0.241, abs=0.003)


def test_adult_test_rows_are_those_of_the_documented_permutation() -> None:
    table = pd.read_parquet(folder() / "train.parquet")
    order = torch.randperm(32_561, generator=torch.Generator().manual_seed(0)).numpy()
    train, test = table.iloc[order[:20_000]], table.iloc[np.sort(order[25_000:])]
    data = TabularTaskData(source="adult")
    batches = list(data.test_dataloader())
    assert torch.cat([b.targets["hours"] for b in batches]).tolist() == test["hours_per_week"].tolist()
    gain, reference = np.log1p(test["capital_gain"]), np.log1p(train["capital_gain"])
    expected = (gain - reference.mean()) / reference.std(ddof=0)
    np.testing.assert_allclose(torch.cat([b.numbers[:, 1] for b in batches]), expected, atol=1e-5)
    names = sorted(train["native_country"].unique())
    codes = torch.cat([b.categories[:, 5] for b in batches]).tolist()
    assert codes == [names.index(name) + 1 if name in names else 0 for name in test["native_country"]]


def test_rows_of_the_other_published_file_are_tested_on() -> None:
    data = TabularTaskData(source="adult", test_path=str(folder() / "test.parquet"))
    batches = list(data.test_dataloader())
    table = pd.read_parquet(folder() / "test.parquet")
    assert torch.cat([b.targets["age"] for b in batches]).tolist() == table["age"].tolist()


def test_adult_reads_as_a_table_of_ones_own() -> None:
    data = TabularTaskData(
        path=str(folder() / "train.parquet"),
        categorical_columns=["workclass", "education", "race"],
        numeric_columns=["age", "hours_per_week"],
        regression_targets=["education_num", "capital_gain"],
    )
    assert data.task_names == ["education_num", "capital_gain"]
    assert data.cardinalities == [10, 17, 6]
