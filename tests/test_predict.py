"""What a trained recommender is for: lists for its users, and tests on data that was not there at training."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pandas as pd
import pytest
import torch

from datamodules import SequenceData
from tests.methods import METHODS, UNTRAINED, Method

if TYPE_CHECKING:
    from pathlib import Path

    from zoo.common.cli import ZooCLI

TOP_K = 7
RECOMMENDERS = [method for method in (*METHODS, *UNTRAINED) if method.name in ("TiCoSeRec", "Popularity")]
(TICOSEREC, *_) = RECOMMENDERS
USERS = 96
ONE_EPOCH = ("--trainer.max_epochs", "1", "--model.top_k", str(TOP_K))


def as_table(users: int) -> pd.DataFrame:
    """The embedded sample, one row per interaction, with the ids as words."""
    data = SequenceData(sample_users=users)
    table = data.sequences
    rows = torch.repeat_interleave(torch.arange(data.num_users), table.offsets.diff())
    return pd.DataFrame(
        {
            "user_id": [data.user_labels[row] for row in rows.tolist()],
            "item_id": [data.item_labels[item] for item in table.item_ids.tolist()],
            "timestamp": table.timestamps,
        }
    )


def named(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(user_id="user-" + table["user_id"], item_id="item-" + table["item_id"])


def predictions(cli: ZooCLI) -> dict[str, dict[str, list]]:
    lines = [line for path in cli.run_folder.glob("predictions*.jsonl") for line in path.read_text().splitlines()]
    found = {record["user"]: record for record in map(json.loads, lines)}
    assert len(found) == len(lines)
    return found


@pytest.mark.parametrize("method", RECOMMENDERS, ids=lambda method: method.name)
def test_predict_writes_a_list_of_unseen_items_for_each_user_with_the_ids_of_the_users_file(
    run, tmp_path, capsys, method: Method
):
    table = named(as_table(USERS))
    table.to_csv(tmp_path / "shop.csv", index=False)
    command = (*method.command, *ONE_EPOCH, "--data.source", "files", "--data.path", str(tmp_path / "shop.csv"))
    trained = run("fit", *command)
    capsys.readouterr()
    cli = run("predict", *command, "--ckpt_path", "best")

    assert cli.run_folder.parent == trained.run_folder.parent and cli.run_folder != trained.run_folder
    assert f"Results in {cli.run_folder}" in capsys.readouterr().out
    histories = table.groupby("user_id")["item_id"].agg(set)
    found = predictions(cli)
    assert found.keys() == set(histories.index)
    for user, record in found.items():
        assert len(set(record["items"])) == len(record["scores"]) == TOP_K
        assert set(record["items"]) <= set(table["item_id"]) - histories[user]
        assert record["scores"] == sorted(record["scores"], reverse=True)


@pytest.mark.filterwarnings("ignore:.*it is recommended to use `Trainer\\(devices=1")
def test_two_processes_predict_for_every_user_once(run):
    command = (*TICOSEREC.command, *ONE_EPOCH)
    run("fit", *command)
    one = predictions(run("predict", *command, "--ckpt_path", "best"))
    two = run("predict", *command, "--ckpt_path", "best", "--trainer.strategy", "ddp_fork", "--trainer.devices", "2")
    assert sorted(path.name for path in two.run_folder.glob("*.jsonl")) == [
        "predictions-0.jsonl",
        "predictions-1.jsonl",
    ]
    assert {user: record["items"] for user, record in predictions(two).items()} == {
        user: record["items"] for user, record in one.items()
    }


def test_the_training_users_as_new_data_score_what_they_scored(run, tmp_path):
    command = (*TICOSEREC.command, *ONE_EPOCH)
    trained = run(*command)
    as_table(192).to_csv(tmp_path / "same.csv", index=False)
    again = run("test", *command, "--ckpt_path", "best", "--data.test_path", str(tmp_path / "same.csv"))
    assert again.run_folder != trained.run_folder
    for name, value in again.trainer.callback_metrics.items():
        assert float(value) == pytest.approx(trained.result["metrics"][name], abs=1e-6), name


def new_data(folder: Path) -> Path:
    """Two users whom the training has not seen, one whose last item it does not know, one with a single known item."""
    sequences = {
        "new-1": ["3", "1", "4", "2"],
        "new-2": ["5", "nowhere-1", "7"],
        "new-3": ["1", "2", "nowhere-2"],
        "new-4": ["nowhere-1", "9"],
    }
    rows = [(user, item, time) for user, items in sequences.items() for time, item in enumerate(items)]
    path = folder / "new.csv"
    pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"]).to_csv(path, index=False)
    return path


def test_new_users_are_tested_and_what_is_unknown_is_counted_on_the_terminal(run, tmp_path, capsys):
    run("fit", *TICOSEREC.command, *ONE_EPOCH)
    capsys.readouterr()
    path = new_data(tmp_path)
    cli = run("test", *TICOSEREC.command, *ONE_EPOCH, "--ckpt_path", "best", "--data.test_path", str(path))

    (line,) = [line for line in capsys.readouterr().err.splitlines() if str(path.name) in line]
    assert "2 users to test" in line and "2 of 9 items" in line and "4 of 4 users" in line
    items = {label: index for index, label in enumerate(cli.datamodule.item_labels)}
    ranks = []
    for history, target in ((["3", "1", "4"], "2"), (["5"], "7")):
        item_ids = torch.tensor([[items[item] for item in history]])
        order, _ = cli.model.eval().recommend(
            item_ids, torch.tensor([len(history)]), cli.model.num_items - len(history)
        )
        ranks.append(order[0].tolist().index(items[target]))
    hits = sum(rank < 20 for rank in ranks) / 2
    assert cli.result["metrics"]["test/hr@20"] == pytest.approx(hits)
    mrr = sum(1 / (rank + 1) for rank in ranks if rank < 20) / 2
    assert cli.result["metrics"]["test/mrr@20"] == pytest.approx(mrr, abs=1e-6)


def test_new_data_of_which_nothing_is_known_is_refused(run, refused, tmp_path):
    run("fit", *TICOSEREC.command, *ONE_EPOCH)
    path = tmp_path / "foreign.csv"
    pd.DataFrame({"user_id": ["a", "a"], "item_id": ["x", "y"], "timestamp": [1, 2]}).to_csv(path, index=False)
    command = ("test", *TICOSEREC.command, *ONE_EPOCH, "--ckpt_path", "best", "--data.test_path", str(path))
    assert "foreign.csv: none of 1 users can be tested" in refused(1, *command)
