from __future__ import annotations

import gzip
import logging
import zipfile
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
import torch

from datamodules import TabularTaskData
from datamodules.sources.task_sets import ADULT, CENSUS, CRIME, CRIME_RATES, SETS, TIKTOK

if TYPE_CHECKING:
    from pathlib import Path

Columns = dict[str, list[str]]


def write(path: Path, columns: Columns, separator: str, header: bool = False, end: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [separator.join(cells) for cells in zip(*columns.values(), strict=True)]
    path.write_text("\n".join([separator.join(columns)] * header + lines) + end)


def adult(size: int = 32_561) -> Columns:
    rng = np.random.default_rng(0)
    columns = {name: rng.choice(["A", "B", "?"], size).tolist() for name in ADULT}
    for name, high in (("age", 90), ("fnlwgt", 9_999), ("education_num", 16), ("hours", 99)):
        columns[name] = rng.integers(1, high, size).astype(str).tolist()
    for name in ("capital_gain", "capital_loss"):
        columns[name] = (rng.integers(0, 5_000, size) * rng.integers(0, 2, size)).astype(str).tolist()
    columns["income"] = rng.choice(["<=50K", ">50K"], size, p=[0.75, 0.25]).tolist()
    return columns


def test_adult_is_split_and_encoded_as_documented_from_text_and_parquet(tmp_path: Path) -> None:
    columns = adult()
    write(tmp_path / "text" / "adult.data", columns, ", ", end="\n\n")
    (tmp_path / "table" / "adult_census").mkdir(parents=True)
    frame = pd.DataFrame(columns).rename(columns={"hours": "hours_per_week"})
    for name in ("age", "fnlwgt", "education_num", "capital_gain", "capital_loss", "hours_per_week"):
        frame[name] = frame[name].astype(int)
    frame.to_parquet(tmp_path / "table" / "adult_census" / "train.parquet")
    text, table = (TabularTaskData(source="adult", data_dir=str(tmp_path / name)) for name in ("text", "table"))
    assert text.state_dict() == table.state_dict()
    assert text.tasks == table.tasks
    assert text.task_names == ["income", "hours", "age"]
    assert text.cardinalities == [4] * 7
    assert text.num_numeric == 3
    order = torch.randperm(32_561, generator=torch.Generator().manual_seed(0))
    train = order[:20_000].numpy()
    for loader, part in (
        (text.val_dataloader(), order[20_000:25_000]),
        (text.test_dataloader(), order[25_000:]),
        (table.test_dataloader(), order[25_000:]),
    ):
        batches = list(loader)
        rows = part.sort().values.numpy()
        income = np.array(columns["income"])[rows] == ">50K"
        assert torch.cat([batch.targets["income"] for batch in batches]).numpy().tolist() == income.astype(int).tolist()
        hours = np.array(columns["hours"], dtype=float)
        np.testing.assert_array_equal(torch.cat([batch.targets["hours"] for batch in batches]).numpy(), hours[rows])
        gain = np.log1p(np.array(columns["capital_gain"], dtype=float))
        expected = (gain[rows] - gain[train].mean()) / gain[train].std()
        np.testing.assert_allclose(torch.cat([batch.numbers[:, 1] for batch in batches]), expected, atol=1e-5)
        race = np.array(["?AB".index(value) + 1 for value in columns["race"]])
        np.testing.assert_array_equal(torch.cat([batch.categories[:, 3] for batch in batches]), race[rows])
        assert all(not batch.masks for batch in batches)
    statistics = {task["name"]: (task["target_mean"], task["target_std"]) for task in text.tasks}
    assert statistics["income"] == (0, 1)
    assert statistics["hours"] == (pytest.approx(hours[train].mean()), pytest.approx(hours[train].std()))


def test_the_published_test_file_of_adult_is_tested_on(tmp_path: Path) -> None:
    write(tmp_path / "adult.data", adult(), ", ")
    other = adult(10)
    other["income"] = [f"{label}." for label in other["income"]]
    other["race"][3] = "Martian"
    write(tmp_path / "adult.test", other, ", ")
    path = tmp_path / "adult.test"
    path.write_text("|1x3 Cross validator\n" + path.read_text())
    data = TabularTaskData(source="adult", data_dir=str(tmp_path), test_path=str(path))
    (batch,) = data.test_dataloader()
    assert batch.targets["income"].tolist() == [float(label == ">50K.") for label in other["income"]]
    assert batch.targets["age"].tolist() == [float(age) for age in other["age"]]
    assert batch.categories[3, 3] == 0
    assert (batch.categories == 0).sum() == 1


def test_a_file_with_other_rows_or_labels_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "adult.data", adult(100), ", ")
    with pytest.raises(ValueError, match=r"adult\.data has 100 rows, expected 32561: the file is incomplete"):
        TabularTaskData(source="adult", data_dir=str(tmp_path)).setup("fit")
    columns = adult(100)
    columns["income"][7] = "50K"
    write(tmp_path / "adult.data", columns, ", ")
    with pytest.raises(ValueError, match=r"adult\.data line 8: income '50K', expected '>50K' or '<=50K'"):
        TabularTaskData(source="adult", data_dir=str(tmp_path)).setup("fit")


def crime() -> Columns:
    rng = np.random.default_rng(1)
    size = 2_215
    columns = {name: rng.normal(5, 2, size).round(3).astype(str).tolist() for name in CRIME}
    columns |= {name: ["?"] * size for name in ("county_code", "community_code")}
    columns["fold"] = rng.integers(1, 11, size).astype(str).tolist()
    columns["community"] = [f"town{k}" for k in range(size)]
    for k in rng.choice(size, 1_800, replace=False):
        columns["attribute_100"][k] = "?"
    columns["attribute_26"][11] = "?"
    columns["attribute_3"][12] = "1000"
    for k in rng.choice(size, 300, replace=False):
        columns["arsons"][k] = "?"
    return columns


def test_crime_has_eight_tasks_with_masks_with_and_without_a_header(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    columns = crime()
    for name in ("with", "without"):
        write(tmp_path / name / "CommViolPredUnnormalizedData.txt", columns, ",", header=name == "with")
    path = tmp_path / "with" / "CommViolPredUnnormalizedData.txt"
    path.write_text(path.read_text().replace("community,state,county_code,community_code,fold", "a,b,c,d,fold", 1))
    data, plain = (TabularTaskData(source="crime", data_dir=str(tmp_path / name)) for name in ("with", "without"))
    with caplog.at_level(logging.INFO):
        assert data.task_names == list(CRIME_RATES)
    assert "1 of 124 numeric columns lack 5 % of their cells or more" in caplog.text
    assert "1 of 272445 cells are empty, get the training median (attribute_26 1)" in caplog.text
    assert data.tasks == plain.tasks
    assert (data.num_numeric, data.cardinalities) == (123, [])
    order = torch.randperm(2_215, generator=torch.Generator().manual_seed(0))
    seen = 0
    for loader, part in zip(
        (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()),
        torch.split(order, [1_400, 350, 465]),
        strict=True,
    ):
        batches = list(loader)
        masks = torch.cat([batch.masks["arsons"] for batch in batches])
        labels = torch.cat([batch.targets["arsons"] for batch in batches])
        assert all(set(batch.masks) == {"arsons"} for batch in batches)
        expected = [columns["arsons"][k] for k in part.tolist()]
        found = [label if mask else None for label, mask in zip(labels.tolist(), masks.tolist(), strict=True)]
        wanted = [None if cell == "?" else pytest.approx(float(cell)) for cell in expected]
        if part.shape[0] != 1_400:  # those of training are in another order
            assert found == [wanted[k] for k in part.argsort().tolist()]
        assert not labels[~masks].any()
        seen += int(masks.sum())
        assert float(torch.cat([batch.numbers for batch in batches]).abs().max()) <= 5
    assert seen == 2_215 - 300
    for one, other in zip(data.test_dataloader(), plain.test_dataloader(), strict=True):
        assert torch.equal(one.numbers, other.numbers)


def test_bike_is_unpacked_from_a_download_and_nothing_else_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    size = 17_379
    small = {"season": 4, "mnth": 12, "hr": 24, "holiday": 2, "weekday": 7, "workingday": 2, "weathersit": 4}
    columns = {"instant": [str(k) for k in range(size)]}
    columns |= {name: rng.integers(0, high, size).astype(str).tolist() for name, high in small.items()}
    for name in ("temp", "atemp", "hum", "windspeed"):
        columns[name] = rng.random(size).round(4).astype(str).tolist()
    columns |= {name: rng.integers(0, 300, size).astype(str).tolist() for name in ("casual", "registered")}
    write(tmp_path / "made" / "hour.csv", columns, ",", header=True)
    with zipfile.ZipFile(tmp_path / "made" / "Bike.zip", "w") as archive:
        archive.writestr("../../evil.txt", "x")
        archive.writestr("day.csv", "x")
        archive.write(tmp_path / "made" / "hour.csv", "hour.csv")
    remote = SETS["bike"].remote
    assert remote is not None
    url = (tmp_path / "made" / "Bike.zip").as_uri()
    monkeypatch.setitem(SETS, "bike", replace(SETS["bike"], remote=remote._replace(url=url)))
    root = tmp_path / "a" / "b"
    root.mkdir(parents=True)
    data = TabularTaskData(source="bike", data_dir=str(root))
    data.prepare_data()
    names = {path.name for path in root.rglob("*") if path.is_file() and not path.name.endswith(".lock")}
    assert names == {"Bike-Sharing-Dataset.zip", "hour.csv"}
    assert not list(tmp_path.rglob("evil.txt"))
    assert data.cardinalities == [high + 1 for high in small.values()]
    assert [(task["name"], task["kind"]) for task in data.tasks] == [
        ("casual", "regression"),
        ("registered", "regression"),
    ]
    (root / "bike_sharing" / "hour.csv").unlink()
    (root / "bike_sharing" / "Bike-Sharing-Dataset.zip").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"Bike-Sharing-Dataset\.zip is damaged or holds no hour\.csv"):
        TabularTaskData(source="bike", data_dir=str(root)).setup("fit")


def test_a_downloaded_set_without_a_network_says_what_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = SETS["adult"].remote
    assert remote is not None
    gone = remote._replace(url=(tmp_path / "gone").as_uri())
    monkeypatch.setitem(SETS, "adult", replace(SETS["adult"], remote=gone))
    with pytest.raises(FileNotFoundError, match=r"put adult\.data \(plain or \.gz\) into .*adult_census"):
        TabularTaskData(source="adult", data_dir=str(tmp_path)).setup("fit")


@pytest.mark.parametrize(
    ("source", "name"), [("tiktok", "final_track1_train.txt"), ("wechat", r"user_action\.csv .*feed_info\.csv")]
)
def test_sets_that_must_be_asked_for_say_which_file_to_put_where(tmp_path: Path, source: str, name: str) -> None:
    with pytest.raises(FileNotFoundError) as error:
        TabularTaskData(source=source, data_dir=str(tmp_path)).setup("fit")
    message = str(error.value)
    assert f"source={source!r} cannot be downloaded: ask the organisers" in message
    assert f"put {SETS[source].files[0]} (plain or .gz) into {tmp_path / source}" in message


def test_census_income_makes_two_binary_tasks(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    size = 1_000
    columns = {name: rng.choice(["Not in universe", "?", "Yes"], size).tolist() for name in CENSUS}
    for name in SETS["census_income"].numeric:
        columns[name] = rng.integers(0, 50, size).astype(str).tolist()
    columns["instance_weight"] = ["1700.09"] * size
    columns["never_married"] = rng.choice(["Never married", "Divorced", "Widowed"], size).tolist()
    columns["income"] = rng.choice(["- 50000.", "50000+."], size).tolist()
    plain = tmp_path / "census-income.data"
    write(plain, columns, ", ")
    (tmp_path / "census-income.data.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    data = TabularTaskData(source="census_income", data_dir=str(tmp_path))
    assert (len(CENSUS), len(data.cardinalities), data.num_numeric) == (42, 32, 7)
    assert [(task["name"], task["kind"]) for task in data.tasks] == [("income", "binary"), ("never_married", "binary")]
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    rows = order[900:].sort().values.tolist()
    (batch,) = data.test_dataloader()
    assert batch.targets["income"].tolist() == [float(columns["income"][k] == "50000+.") for k in rows]
    assert batch.targets["never_married"].tolist() == [float(columns["never_married"][k][0] == "N") for k in rows]


def test_tiktok_takes_rare_categories_for_unknown_and_groups_by_user(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    size = 3_000
    columns = {name: rng.integers(-1, 40, size).astype(str).tolist() for name in TIKTOK}
    columns["item_id"] = rng.geometric(0.02, size).astype(str).tolist()
    columns |= {name: rng.integers(0, 2, size).astype(str).tolist() for name in ("finish", "like")}
    write(tmp_path / "tiktok" / "final_track1_train.txt", columns, "\t")
    data = TabularTaskData(source="tiktok", data_dir=str(tmp_path))
    assert data.task_names == ["finish", "like"]
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0)).tolist()
    train, test = order[:2_430], sorted(order[2_700:])
    (batch,) = data.test_dataloader()
    assert len(batch.numbers) == 300
    assert batch.numbers.shape == (300, 0)
    counts: dict[str, int] = {}
    for k in train:
        counts[columns["item_id"][k]] = counts.get(columns["item_id"][k], 0) + 1
    vocabulary = sorted(value for value, count in counts.items() if count >= 10)
    assert 0 < len(vocabulary) < len(counts)
    assert data.cardinalities[1] == len(vocabulary) + 1
    expected = [vocabulary.index(v) + 1 if v in vocabulary else 0 for v in (columns["item_id"][k] for k in test)]
    assert batch.categories[:, 1].tolist() == expected
    assert batch.user_ids is not None
    users = [columns["uid"][k] for k in test]
    pairs = set(zip(users, batch.user_ids.tolist(), strict=True))
    assert len(pairs) == len(set(users)) == len({code for _, code in pairs})
    inputs = ["uid", "item_id", "author_id", "item_city", "channel", "music_id", "device"]
    options = {"source": "tiktok", "data_dir": str(tmp_path), "categorical_columns": inputs}
    assert TabularTaskData(**options, numeric_columns=["duration"]).num_numeric == 1


def wechat(folder: Path) -> tuple[Columns, Columns]:
    rng = np.random.default_rng(5)
    size, feeds = 500, 30
    action = {"userid": rng.integers(0, 20, size).astype(str).tolist()}
    action["feedid"] = rng.integers(0, feeds, size).astype(str).tolist()
    action |= {name: rng.integers(0, 2, size).astype(str).tolist() for name in ("device", *SETS["wechat"].kinds)}
    feed = {"feedid": rng.permutation(feeds).astype(str).tolist()}
    feed |= {name: rng.integers(0, 6, feeds).astype(str).tolist() for name in ("authorid", "bgm_song_id")}
    feed["bgm_singer_id"] = [""] * 5 + ["s"] * (feeds - 5)
    feed["videoplayseconds"] = rng.integers(1, 60, feeds).astype(str).tolist()
    feed["description"] = ['"some, words"'] * feeds
    write(folder / "user_action.csv", action, ",", header=True)
    write(folder / "feed_info.csv", feed, ",", header=True)
    return action, feed


def test_wechat_joins_what_is_known_of_a_feed(tmp_path: Path) -> None:
    action, feed = wechat(tmp_path / "wechat")
    data = TabularTaskData(source="wechat", data_dir=str(tmp_path), min_category_count=1, tasks=["comment", "like"])
    assert data.task_names == ["comment", "like"]
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0)).tolist()
    train, test = order[:405], sorted(order[450:])
    (batch,) = data.test_dataloader()
    of = {feedid: k for k, feedid in enumerate(feed["feedid"])}
    author = [feed["authorid"][of[action["feedid"][k]]] for k in range(500)]
    seconds = np.log1p([float(feed["videoplayseconds"][of[action["feedid"][k]]]) for k in range(500)])
    vocabulary = sorted({author[k] for k in train})
    assert batch.categories[:, 3].tolist() == [vocabulary.index(author[k]) + 1 for k in test]
    expected = (seconds[test] - seconds[train].mean()) / seconds[train].std()
    np.testing.assert_allclose(batch.numbers[:, 0], expected, atol=1e-5)
    assert batch.targets["comment"].tolist() == [float(action["comment"][k]) for k in test]
    names = TabularTaskData(source="wechat", data_dir=str(tmp_path)).task_names
    assert names == ["read_comment", "like", "click_avatar", "forward"]


def test_wechat_refuses_feeds_that_are_missing_or_repeated(tmp_path: Path) -> None:
    folder = tmp_path / "wechat"
    action, feed = wechat(folder)

    def fails(message: str, kind: type[Exception] = ValueError) -> None:
        with pytest.raises(kind, match=message):
            TabularTaskData(source="wechat", data_dir=str(tmp_path)).setup("fit")

    write(folder / "feed_info.csv", {name: [*cells, cells[0]] for name, cells in feed.items()}, ",", header=True)
    fails(rf"feed_info\.csv line 32: feedid {feed['feedid'][0]} was there before")
    write(folder / "feed_info.csv", {name: cells for name, cells in feed.items() if name != "authorid"}, ",", True)
    fails(r"neither .*user_action\.csv nor feed_info\.csv has a column 'authorid'")
    write(folder / "feed_info.csv", {name: cells[1:] for name, cells in feed.items()}, ",", header=True)
    row = action["feedid"].index(feed["feedid"][0])
    fails(rf"user_action\.csv line {row + 2}: feedid {feed['feedid'][0]} is not in .*feed_info\.csv")
    (folder / "feed_info.csv").unlink()
    fails(r"feed_info\.csv \(or \.gz\) is missing beside", FileNotFoundError)
