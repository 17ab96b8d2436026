from __future__ import annotations

import gzip
import json
import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer

from datamodules import TargetBatch, TextRecBatch, TextRecData
from datamodules.loading import Draw

if TYPE_CHECKING:
    from pathlib import Path

SMALL: dict[str, Any] = {"sample_items": 60, "sample_users": 90}


def users_of(data: TextRecData) -> list[list[int]]:
    corpus = data.corpus
    return [part.tolist() for part in np.split(corpus.item_ids, corpus.offsets[1:-1])]


def history(batch: TextRecBatch, row: int) -> list[int]:
    return [item for item in batch.history[row].tolist() if item >= 0]


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.mark.parametrize("mode", ["sequence", "yesno"])
@pytest.mark.parametrize("max_history", [2, 50])
def test_parts_are_split_by_leave_one_out(mode: str, max_history: int) -> None:
    data = TextRecData(**SMALL, mode=mode, max_history=max_history, num_candidates=10)
    users = users_of(data)
    train = data.whole("train")
    expected = [(user, own[:p][::-1][:max_history], own[p]) for user, own in enumerate(users)
                for p in range(1, len(own) - 2)]  # fmt: skip
    found = [(int(train.user_ids[k]), history(train, k), int(train.item_ids[k])) for k in range(len(train.user_ids))]
    assert found == expected
    assert train.labels.eq(1).all() and not train.keys.any()
    for part, cut in (("val", -2), ("test", -1)):
        batch = data.whole(part)
        assert batch.user_ids.tolist() == list(range(len(users)))
        assert [history(batch, user) for user in range(len(users))] == [u[:cut][::-1][:max_history] for u in users]
        assert batch.item_ids.tolist() == [own[cut] for own in users]
        assert batch.labels.eq(1).all()
        assert batch.candidate_ids.shape == (len(users), 10 if mode == "yesno" else 0)
        for user, drawn in enumerate(batch.candidate_ids.tolist()):
            assert len(set(drawn)) == len(drawn)
            assert not set(drawn) & set(users[user])


def test_training_counts_and_pairs_are_of_all_but_the_last_two_items() -> None:
    data = TextRecData(**SMALL)
    pairs = [(user, item) for user, own in enumerate(users_of(data)) for item in own[:-2]]
    assert data.train_pairs.tolist() == [list(pair) for pair in pairs]
    counts = Counter(item for _, item in pairs)
    assert data.item_counts.tolist() == [counts[item] for item in range(60)]


def test_loaders_give_every_sample_once_and_another_order_in_every_epoch() -> None:
    data = TextRecData(**SMALL, batch_size=17, eval_batch_size=19, seed=3)
    loader = data.train_dataloader()
    first = [batch.item_ids for batch in loader]
    assert [len(ids) for ids in first[:-1]] == [17] * (len(first) - 1)
    assert sorted(torch.cat(first).tolist()) == sorted(data.whole("train").item_ids.tolist())
    loader.sampler.set_epoch(1)
    assert not torch.equal(torch.cat(first), torch.cat([batch.item_ids for batch in loader]))
    test = list(data.test_dataloader())
    assert sorted(torch.cat([batch.user_ids for batch in test]).tolist()) == list(range(90))
    widths = [batch.history.shape[1] for batch in test]
    assert widths == sorted(widths)


def test_questions_of_yes_and_no_are_drawn_anew_in_each_epoch_but_not_in_each_run() -> None:
    options = {**SMALL, "mode": "yesno", "num_candidates": 9, "seed": 1}

    def epoch(number: int) -> list[tuple[int, int, float]]:
        loader = TextRecData(**options).train_dataloader()
        loader.sampler.set_epoch(number)
        return [row for b in loader for row in zip(b.user_ids.tolist(), b.item_ids.tolist(), b.labels.tolist(),
                                                   strict=True)]  # fmt: skip

    rows = epoch(0)
    assert rows == epoch(0)
    assert {row for row in rows if not row[2]} != {row for row in epoch(1) if not row[2]}
    assert np.mean([label for *_, label in rows]) == pytest.approx(0.5, abs=0.1)
    users = users_of(TextRecData(**options))
    for user, item, label in rows:
        assert (item in users[user][:-2]) == bool(label)


def test_candidates_are_the_same_in_every_run_and_for_any_batch_size() -> None:
    options = {**SMALL, "mode": "yesno", "num_candidates": 9}
    whole = TextRecData(**options, seed=1).whole("test")
    for batch in TextRecData(**options, seed=2, eval_batch_size=7).test_dataloader():
        assert torch.equal(batch.candidate_ids, whole.candidate_ids[batch.user_ids])


def test_filters_keep_popular_items_then_users_with_enough_of_them_then_some_users(
    caplog: pytest.LogCaptureFixture,
) -> None:
    full = TextRecData(**SMALL, unescape_html=False)
    users = users_of(full)
    counts = Counter(item for own in users for item in own)
    kept = sorted(sorted(range(60), key=lambda item: (-counts[item], item))[:20])
    expected = {
        full.user_labels[user]: [kept.index(item) for item in own if item in kept] for user, own in enumerate(users)
    }
    expected = {label: own for label, own in expected.items() if len(own) >= 4}
    with caplog.at_level(logging.INFO):
        data = TextRecData(**SMALL, unescape_html=False, keep_items=20, min_interactions=4)
        assert dict(zip(data.user_labels, users_of(data), strict=True)) == expected
    assert data.titles == [full.titles[item] for item in kept]
    assert data.item_labels == [full.item_labels[item] for item in kept]
    assert f"{90 - len(expected)} of 90 users have fewer than 4 interactions" in caplog.text
    assert "keep_items keeps 20 of 60 items" in caplog.text
    some = TextRecData(**SMALL, unescape_html=False, keep_items=20, min_interactions=4, keep_users=10)
    assert some.num_users == 10 and some.num_items == 20
    assert all(expected[label] == own for label, own in zip(some.user_labels, users_of(some), strict=True))
    other = TextRecData(**SMALL, keep_items=20, min_interactions=4, keep_users=10, subset_seed=1)
    assert other.user_labels != some.user_labels
    with pytest.raises(ValueError, match="embedded: no user has 99 interactions, the most are 12"):
        TextRecData(**SMALL, min_interactions=99).corpus  # noqa: B018 - read on first use


def test_entities_in_titles_are_what_they_stand_for_unless_told_otherwise() -> None:
    raw, clean = TextRecData(unescape_html=False).titles, TextRecData().titles
    assert any("&amp;" in title for title in raw) and any("&#39;" in title for title in raw)
    assert not any("&amp;" in title or "&#39;" in title for title in clean)
    assert [title for title in raw if "&" not in title] == [
        new for old, new in zip(raw, clean, strict=True) if "&" not in old
    ]


@pytest.mark.parametrize("targets", ["random", "cold", "popular"])
def test_targets_are_drawn_from_their_pool_and_are_a_function_of_their_seed(targets: str) -> None:
    data = TextRecData(targets=targets, target_share=0.05)
    found = data.target_ids.tolist()
    assert len(found) == len(set(found)) == 15
    assert found == TextRecData(targets=targets, target_share=0.05, seed=9).target_ids.tolist()
    assert found != TextRecData(targets=targets, target_share=0.05, target_seed=1).target_ids.tolist()
    assert TextRecData(targets=targets, num_targets=4).target_ids.tolist() == found[:4]
    order = data.item_counts.sort().values
    counts = data.item_counts[data.target_ids]
    if targets == "cold":
        assert counts.max() <= order[59]
    elif targets == "popular":
        assert counts.min() >= order[-60]
    else:
        assert counts.min() < order[100] and counts.max() > order[-100]


@pytest.mark.parametrize(("share", "items", "count"), [(0.01, 300, 3), (0.01, 50, 1), (0.07, 100, 7), (1.0, 20, 20)])
def test_the_number_of_targets_is_the_floor_of_the_share_and_at_least_one(share: float, items: int, count: int) -> None:
    assert len(TextRecData(sample_items=items, sample_users=30, target_share=share).target_ids) == count


def test_targets_can_be_named() -> None:
    assert TextRecData(**SMALL, targets=[5, 0, 59]).target_ids.tolist() == [5, 0, 59]
    for targets, message in (([60], r"item 60 is not in the catalogue, expected ids 0\.\.59"), ([-1], "item -1"),
                             ([3, 3], "3 is there twice")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            TextRecData(**SMALL, targets=targets).setup("test")
    with pytest.raises(ValueError, match="13 targets were asked for, but targets='cold' has only 12 items"):
        TextRecData(**SMALL, targets="cold", num_targets=13).setup("test")


def test_shilling_adds_users_to_training_only() -> None:
    clean = TextRecData(**SMALL, num_targets=2)
    data = TextRecData(**SMALL, num_targets=2, shilling="bandwagon", shilling_share=0.05)
    assert (data.num_users, clean.num_users) == (94, 90)
    assert data.user_labels == [*clean.user_labels, *(f"shilling-{fake}" for fake in range(4))]
    assert torch.equal(data.target_ids, clean.target_ids)
    assert torch.equal(data.item_counts, clean.item_counts)
    for part in ("val", "test"):
        for own, wanted in zip(data.whole(part), clean.whole(part), strict=True):
            assert torch.equal(own, wanted)
    real, fake = clean.whole("train"), data.whole("train")
    assert torch.equal(fake.item_ids[: len(real.item_ids)], real.item_ids)
    added = fake.user_ids >= 90
    assert added.nonzero().flatten().tolist() == list(range(len(real.item_ids), len(fake.item_ids)))
    last = {user: item for user, item in zip(fake.user_ids.tolist(), fake.item_ids.tolist(), strict=True) if user >= 90}
    assert list(last.values()) == data.target_ids.tolist() * 2
    assert torch.equal(data.train_pairs[: len(clean.train_pairs)], clean.train_pairs)
    assert set(data.train_pairs[len(clean.train_pairs) :, 0].tolist()) == {90, 91, 92, 93}
    drawn = TextRecData(**SMALL, num_targets=2, num_candidates=9, shilling="random", shilling_share=0.05, mode="yesno")
    assert int(next(iter(drawn.train_dataloader())).user_ids.max()) <= 93
    assert {len(batch.labels) for batch in drawn.val_dataloader()} == {90}


class Model(LightningModule):
    def __init__(self, attacks: bool) -> None:
        super().__init__()
        if attacks:
            self.attacks_items = True
        self.seen: list[tuple[int, Any]] = []

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen.append((dataloader_idx, batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return batch


def trainer() -> Trainer:
    return Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")


def test_a_model_that_attacks_titles_gets_the_targets_one_by_one() -> None:
    data = TextRecData(**SMALL, num_targets=5)
    model = Model(attacks=True)
    trainer().test(model, data, verbose=False)
    assert all(isinstance(batch, TextRecBatch) for loader, batch in model.seen if loader == 0)
    targets = [batch for loader, batch in model.seen if loader == 1]
    assert all(isinstance(batch, TargetBatch) for batch in targets)
    assert [batch.item_ids.tolist() for batch in targets] == [[item] for item in data.target_ids.tolist()]
    assert [batch.texts for batch in targets] == [[data.titles[item]] for item in data.target_ids.tolist()]
    assert [batch.texts for batch in trainer().predict(model, data)] == [batch.texts for batch in targets]


def test_any_other_model_gets_the_users() -> None:
    data = TextRecData(**SMALL)
    model = Model(attacks=False)
    trainer().test(model, data, verbose=False)
    assert {loader for loader, _ in model.seen} == {0}
    assert sum(len(batch.labels) for _, batch in model.seen) == 90
    assert sum(len(batch.labels) for batch in trainer().predict(model, data)) == 90


def test_a_checkpoint_of_another_catalogue_is_refused() -> None:
    state = TextRecData(**SMALL).state_dict()
    TextRecData(**SMALL, mode="yesno", targets="cold").load_state_dict(state)
    with pytest.raises(ValueError, match=r"another catalogue: 60 items of source='embedded', here 30 items"):
        TextRecData(**SMALL, keep_items=30).load_state_dict(state)


RATED = (
    "user,item,title,time,stars",
    "u1,a,Alpha,30,5", "u2,b,Beta,1,4", "u1,b,Beta,10,1", "u1,c,Gamma &amp; Co,20,4", "u1,d,Delta,40,2",
    "u1,e,Epsilon,50,5", "u2,c,Gamma &amp; Co,2,3", "u2,a,Alpha,3,3.5", "u2,d,Delta,4,5", "u3,e,Epsilon,1,5",
)  # fmt: skip
NAMES = {"user_column": "user", "item_column": "item", "time_column": "time"}


def test_a_table_without_ratings_is_sequences_by_time(tmp_path: Path) -> None:
    data = TextRecData(path=write(tmp_path / "x.csv", *RATED), **NAMES)
    assert data.source == "csv"
    assert data.item_labels == ["a", "b", "c", "d", "e"]
    assert data.titles == ["Alpha", "Beta", "Gamma & Co", "Delta", "Epsilon"]
    assert data.user_labels == ["u1", "u2", "u3"]
    assert users_of(data) == [[1, 2, 0, 3, 4], [1, 2, 0, 3], [4]]
    assert data.whole("val").user_ids.tolist() == [0, 1]
    assert data.train_pairs.tolist() == [[0, 1], [0, 2], [0, 0], [1, 1], [1, 2], [2, 4]]


def test_a_table_with_ratings_gives_true_labels_or_the_sequences_of_liked_items(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", *RATED)
    data = TextRecData(path=path, **NAMES, rating_column="stars", mode="yesno")
    train = data.whole("train")
    assert train.item_ids.tolist() == [2, 0, 2]
    assert train.labels.tolist() == [1, 1, 0]
    assert train.history.tolist() == [[1, -1], [2, 1], [1, -1]]
    assert train.liked.tolist() == [[False, False], [True, False], [True, False]]
    assert data.whole("val").labels.tolist() == [0, 1]
    test = data.whole("test")
    assert test.labels.tolist() == [1, 1]
    assert test.history.tolist() == [[3, 0, 2, 1], [0, 2, 1, -1]]
    assert test.liked.tolist() == [[False, True, True, False], [True, False, True, False]]
    assert test.candidate_ids.shape == (2, 0)
    assert data.train_pairs.tolist() == [[0, 2], [0, 0], [1, 1], [2, 4]]
    assert data.item_counts.tolist() == [1, 2, 2, 0, 1]
    strict = TextRecData(path=path, **NAMES, rating_column="stars", like_threshold=4.5)
    assert (strict.mode, users_of(strict)) == ("sequence", [[0, 4], [3], [4]])


def test_test_path_tests_other_users_over_the_known_items(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "x.csv", *RATED)
    rows = ["n1,a,1", "n1,zzz,2", "n1,b,3", "u2,c,1", "u2,d,2", "n2,a,1", "n2,yyy,2", "n3,zzz,1", "n3,a,2"]
    new = write(tmp_path / "new.csv", "user,item,time", *rows)
    with caplog.at_level(logging.INFO):
        data = TextRecData(path=path, test_path=new, **NAMES, mode="yesno", num_candidates=2)
        test = data.whole("test")
    assert test.user_ids.tolist() == [-1, 1]
    assert test.history.tolist() == [[0], [2]]
    assert test.item_ids.tolist() == [1, 3]
    assert all(not {1, 0} & set(row) for row in test.candidate_ids[:1].tolist())
    assert "2 of 4 users can be tested on; unknown to x.csv are 3 interactions and 3 users; left out are 1 users" in (
        caplog.text
    )
    with pytest.raises(ValueError, match=r"num_candidates=2, but a user of x\.csv has only 0 items outside"):
        data.whole("val")
    rated = TextRecData(path=path, test_path=new, **NAMES, rating_column="stars", mode="yesno")
    with pytest.raises(ValueError, match=r"new\.csv has no column 'stars'"):
        rated.setup("test")
    strange = write(tmp_path / "strange.csv", "user,item,time", "n1,q,1", "n1,r,2")
    with pytest.raises(ValueError, match=r"strange\.csv: none of 1 users can be tested on"):
        TextRecData(path=path, test_path=strange, **NAMES).setup("test")


def test_test_path_with_ratings_in_sequence_mode_asks_for_the_last_liked_item(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", *RATED)
    new = write(tmp_path / "new.csv", "user,item,time,stars", "n1,a,1,5", "n1,b,2,4", "n1,c,3,1", "n2,a,1,1")
    data = TextRecData(path=path, test_path=new, **NAMES, rating_column="stars")
    test = data.whole("test")
    assert (test.history.tolist(), test.item_ids.tolist()) == ([[0]], [1])


def books(folder: Path) -> Path:
    folder.mkdir()
    rows = [
        {"liked": ["A", "B"], "disliked": ["C"], "target": f"T{k % 3}", "label": k % 2} for k in range(20)
    ] + [{"liked": [], "disliked": ["D", "E"], "target": "A", "label": 1}]  # fmt: skip
    for name, part in (("train", rows), ("test", rows[-3:])):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in part)
    return folder


def test_questions_have_their_own_histories_and_labels(tmp_path: Path) -> None:
    books(tmp_path / "tallrec_books")
    options = {"source": "tallrec_books", "mode": "yesno", "data_dir": str(tmp_path)}
    data = TextRecData(**options)
    train, val, test = (data.whole(part) for part in ("train", "val", "test"))
    assert (len(train.labels), len(val.labels), len(test.labels)) == (19, 2, 3)
    names = [[data.titles[item] for item in history(test, row)] for row in range(3)]
    assert names == [["B", "A", "C"], ["B", "A", "C"], ["E", "D"]]
    assert test.liked.tolist() == [[True, True, False], [True, True, False], [False, False, False]]
    assert [data.titles[item] for item in test.item_ids.tolist()] == ["T0", "T1", "A"]
    assert test.labels.tolist() == [0, 1, 1]
    assert data.num_users == 24 and not set(train.user_ids.tolist()) & set(val.user_ids.tolist())
    pairs = {tuple(pair) for pair in data.train_pairs.tolist()}
    liked = {(user, item) for user, row, flags in zip(train.user_ids.tolist(), train.history.tolist(),
                                                      train.liked.tolist(), strict=True)
             for item, flag in zip(row, flags, strict=True) if flag}  # fmt: skip
    asked = zip(train.user_ids.tolist(), train.item_ids.tolist(), train.labels.tolist(), strict=True)
    assert pairs == liked | {(user, item) for user, item, label in asked if label}
    few = TextRecData(**options, keep_users=4)
    assert (len(few.whole("train").labels), len(few.whole("test").labels)) == (4, 3)
    new = tmp_path / "new.jsonl"
    new.write_text('{"liked": ["A", "?"], "disliked": [], "target": "B", "label": 0}\n'
                   '{"liked": ["A"], "disliked": [], "target": "??", "label": 0}\n')  # fmt: skip
    other = TextRecData(**options, test_path=str(new)).whole("test")
    assert (other.user_ids.tolist(), [data.titles[item] for item in history(other, 0)]) == ([-1], ["A"])


def test_a_user_who_has_met_everything_cannot_be_asked_about_something_new(tmp_path: Path) -> None:
    lines = [f"u,{item},T{item}" for item in "abcab"]
    data = TextRecData(path=write(tmp_path / "x.csv", "user_id,item_id,title", *lines), mode="yesno")
    with pytest.raises(ValueError, match="user u has met all 3 items in training"):
        data.setup("fit")


def test_data_that_leaves_nothing_to_learn_or_to_test_is_refused(tmp_path: Path) -> None:
    data = TextRecData(path=write(tmp_path / "x.csv", "user_id,item_id,title", "u,a,A", "u,b,B", "v,b,B"))
    assert len(data.whole("train").labels) == 1
    with pytest.raises(ValueError, match=r"x\.csv has nothing for val: a user needs three items"):
        data.whole("val")
    alone = TextRecData(path=write(tmp_path / "y.csv", "user_id,item_id,title", "u,a,A", "v,b,B"))
    with pytest.raises(ValueError, match=r"y\.csv has no training sample"):
        alone.setup("fit")
    with pytest.raises(ValueError, match="part must be one of train, val, test, got 'dev'"):
        data.whole("dev")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "games"}, "source must be one of embedded, amazon_games"),
        ({"mode": "rating"}, "mode must be one of sequence, yesno"),
        ({"targets": "cheap"}, "targets must be one of random, cold, popular"),
        ({"targets": []}, r"targets=\[\], num_targets=None: expected a list that is not empty"),
        ({"targets": [1], "num_targets": 3}, "no num_targets beside it"),
        ({"category": "baby"}, "category must be one of beauty, toys, sports"),
        ({"shilling": "aush"}, "shilling must be one of None, bandwagon, random"),
        ({"target_share": 0.0}, "target_share must be above 0 and at most 1, got 0"),
        ({"shilling_share": 1.5}, "shilling_share must be above 0"),
        ({"num_targets": 0}, "num_targets must be at least 1"),
        ({"max_history": 0}, "max_history must be at least 1"),
        ({"sample_items": 5}, "sample_items must be at least 20"),
        ({"source": "embedded", "path": "x.csv"}, "contradict each other"),
        ({"source": "csv"}, "source='csv' needs path"),
        ({"items_path": "x.csv"}, "items_path=x.csv has the titles of a table"),
        ({"data_dir": "/x"}, "data_dir holds published sets"),
        ({"source": "tallrec_books"}, "set mode='yesno'"),
        ({"source": "tallrec_books", "mode": "yesno", "keep_items": 9}, "keep_items=9 needs sequences"),
        ({"source": "tallrec_books", "mode": "yesno", "shilling": "random"}, "shilling='random' needs sequences"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextRecData(**options)


def test_a_draw_of_training_rows_keeps_its_keys_in_any_batch() -> None:
    rows = TextRecData(**SMALL)._rows("train")
    whole = rows[Draw(torch.arange(len(rows)), 3)].keys
    assert len(whole.unique()) == len(rows) and whole.min() >= 0
    assert torch.equal(rows[Draw(torch.tensor([5]), 3)].keys, whole[5:6])


def test_worker_processes_give_the_same_batches() -> None:
    options = {**SMALL, "mode": "yesno", "num_candidates": 9, "seed": 1, "batch_size": 64}
    plain, workers = (TextRecData(**options, num_workers=n).train_dataloader() for n in (0, 1))
    for own, other in zip(plain, workers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))


def test_evaluation_can_ask_about_a_few_users_who_keep_their_candidates() -> None:
    options = {**SMALL, "mode": "yesno", "num_candidates": 5}
    every, few = TextRecData(**options), TextRecData(**options, eval_users=7)
    for part in ("val", "test"):
        whole, drawn = every.whole(part), few.whole(part)
        assert len(drawn.user_ids) == 7
        rows = [whole.user_ids.tolist().index(user) for user in drawn.user_ids.tolist()]
        assert rows == sorted(rows)
        assert drawn.item_ids.equal(whole.item_ids[rows])
        assert drawn.candidate_ids.equal(whole.candidate_ids[rows])
    assert few.whole("train").item_ids.equal(every.whole("train").item_ids)
    assert len(TextRecData(**options, eval_users=10**6).whole("test").user_ids) == len(every.whole("test").user_ids)


def test_only_a_bucketed_batch_has_histories_of_about_one_length() -> None:
    def padding(bucketed: bool) -> float:
        data = TextRecData(**SMALL, batch_size=16, seed=0, bucketed=bucketed)
        return sum(float((batch.history < 0).float().sum()) for batch in data.train_dataloader())

    assert padding(True) < 0.5 * padding(False)
