from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from datamodules import ClozeData
from datamodules.cloze_batches import PairBatch
from datamodules.cloze_rows import ClozeRows
from datamodules.cloze_text import PLACEHOLDER
from datamodules.cloze_tokens import ClozeTokens
from datamodules.loading import Draw
from datamodules.sources.cloze_priors import OptionPriors
from datamodules.sources.cloze_sample import cloze_sample
from tests.datamodules.cloze_own_files import RECAM, records, unlabelled, write, write_prose, write_recam

if TYPE_CHECKING:
    from pathlib import Path

    from datamodules.loading import BatchLoader

SMALL: dict[str, Any] = {"tokenizer": "words", "sample_rows": 64, "max_length": 128}


def rows_of(loader: BatchLoader) -> list[int]:
    return torch.cat([batch.rows for batch in loader]).tolist()


def sizes(data: ClozeData) -> list[int]:
    return [len(data.questions(part)) for part in ("fit", "validate", "test", "predict")]


def ids(data: ClozeData, stage: str) -> set[str]:
    """First parts of the ids: which file the questions are from."""
    return {identity.split("-")[0] for identity in data.questions(stage).ids}


# Batches


def test_each_stage_gives_every_question_once_and_evaluation_the_short_ones_first() -> None:
    data = ClozeData(**SMALL, batch_size=12, eval_batch_size=50)
    assert data.source == "embedded"
    assert sizes(data) == [64, 240, 600, 600]
    assert data.num_options == 5
    for stage, loader, count in (
        ("validate", data.val_dataloader(), 240),
        ("test", data.test_dataloader(), 600),
        ("predict", data.predict_dataloader(), 600),
    ):
        rows = rows_of(loader)
        assert sorted(rows) == list(range(count))
        lengths = data._tokenised(stage).lengths[rows].tolist()
        assert lengths == sorted(lengths)
        assert {len(batch.rows) for batch in loader} == {50, count % 50} - {0}
    loader = data.train_dataloader()
    assert sorted(rows_of(loader)) == list(range(64))
    assert [len(batch.rows) for batch in loader] == [12] * 5 + [4]


def test_training_has_a_new_order_in_every_epoch_and_the_same_one_for_the_same_seed() -> None:
    def epochs(seed: int) -> list[list[int]]:
        loader = ClozeData(**SMALL, seed=seed).train_dataloader()
        found = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            found.append(rows_of(loader))
        return found

    first, again, other = epochs(0), epochs(0), epochs(1)
    assert first == again
    assert first[0] != first[1]
    assert first[0] != other[0]


def test_only_a_bucketed_batch_has_questions_of_about_one_length() -> None:
    def spread(bucketed: bool) -> float:
        data = ClozeData(**SMALL | {"sample_rows": 320}, batch_size=16, seed=0, bucketed=bucketed)
        lengths = data._tokenised("fit").lengths.double()
        return float(torch.stack([lengths[batch.rows].std() for batch in data.train_dataloader()]).mean())

    assert spread(True) < 0.2 * spread(False)


TOKENS = {
    "encode": "joint",
    "mode": "fill",
    "with_passage": True,
    "max_length": 128,
    "masks": "each",
    "capitalize_initial": False,
    "mark_option": False,
    "detokenize": False,
    "lenient": False,
}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"mode": "concat"}, {"mode": "concat"}),
        ({"mode": "concat_sep", "max_length": 64}, {"mode": "concat_sep", "max_length": 64}),
        ({"mode": "summary_only"}, {"mode": "summary_only", "with_passage": False}),
        ({"mode": "option_only"}, {"mode": "option_only", "with_passage": False}),
        ({"mode": "option_only", "with_passage": True}, {"mode": "option_only"}),
        ({"with_passage": False}, {"with_passage": False}),
        ({"encode": "separate"}, {"encode": "separate"}),
        ({"encode": "cloze"}, {"encode": "cloze"}),
        ({"encode": "cloze", "masks": "first"}, {"encode": "cloze", "masks": "first"}),
        ({"encode": "reader"}, {"encode": "reader"}),
        ({"mark_option": True}, {"mark_option": True}),
        ({"capitalize_initial": True}, {"capitalize_initial": True}),
        ({"detokenize_question": True}, {"detokenize": True}),
        ({"lenient_duplicates": True}, {"lenient": True}),
    ],
    ids=str,
)
def test_options_reach_the_tokens(
    given: dict[str, Any], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from datamodules import cloze_tokens

    calls: list[tuple[ClozeRows, Any, dict[str, Any]]] = []

    def record(rows: ClozeRows, tokenizer: Any, **options: Any) -> ClozeTokens:
        calls.append((rows, tokenizer, options))
        return ClozeTokens(rows, tokenizer, **options)

    monkeypatch.setattr(cloze_tokens, "ClozeTokens", record)
    data = ClozeData(**SMALL | given)
    batch = next(iter(data.train_dataloader()))
    ((rows, tokenizer, options),) = calls
    assert rows is data.questions("fit")
    assert tokenizer is data.tokenizer
    assert options == TOKENS | expected
    assert len(batch.rows) == 8


def test_a_stage_is_tokenised_once_and_only_when_asked_for() -> None:
    data = ClozeData(**SMALL)
    data.setup("fit")
    assert set(data._tokens) == {"fit", "validate"}
    before = data._tokens["fit"]
    data.setup("fit")
    data.setup("validate")
    assert data._tokens["fit"] is before
    data.setup("test")
    assert set(data._tokens) == {"fit", "validate", "test"}


def test_the_log_tells_sizes_and_cut_passages_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = {
        kind: write(tmp_path / f"{kind}.jsonl", records(12, seed)) for seed, kind in enumerate(("path", "val_path"))
    }
    data = ClozeData(**paths, **SMALL | {"max_length": 32})
    with caplog.at_level(logging.INFO):
        data.setup("fit")
        data.setup("validate")
        data.setup("fit")
    assert caplog.messages.count("files: 12 fit, 12 validate, 12 test questions") == 1
    cut = [message for message in caplog.messages if "max_length=32" in message]
    assert len(cut) == 2, "one for each part"
    assert all("2 of 6 passages are cut" in message for message in cut)


# Sources


def test_own_files_of_every_column_layout_give_the_same_batches(tmp_path: Path) -> None:
    rows = records(20)
    plain = ClozeData(path=write(tmp_path / "a.jsonl", rows), **SMALL)
    listed = [
        {
            "text": row["article"],
            "ask": row["question"],
            "choices": [row[f"option_{place}"] for place in range(5)],
            "gold": row["label"],
            "key": row["id"],
        }
        for row in rows
    ]
    columns = {
        "article_column": "text",
        "question_column": "ask",
        "option_columns": "choices",
        "label_column": "gold",
        "id_column": "key",
    }
    named = [
        {"text": row["text"], "ask": row["ask"], "gold": row["gold"], "key": row["key"]}
        | dict(zip("abcde", row["choices"], strict=True))
        for row in listed
    ]
    (tmp_path / "c.csv").write_text(
        ",".join(named[0]) + "\n" + "".join(",".join(f'"{cell}"' for cell in row.values()) + "\n" for row in named)
    )
    others = [
        ClozeData(path=write(tmp_path / "b.jsonl.gz", listed), **columns, **SMALL),
        ClozeData(path=str(tmp_path / "c.csv"), **columns | {"option_columns": list("abcde")}, **SMALL),
    ]
    for other in others:
        assert other.questions("fit").ids == plain.questions("fit").ids
        for one, two in zip(plain.val_dataloader(), other.val_dataloader(), strict=True):
            assert all(torch.equal(*pair) for pair in zip(one, two, strict=True))


def test_each_path_is_the_part_that_it_is_named_for(tmp_path: Path) -> None:
    paths = {
        name: write(tmp_path / f"{name}.jsonl", unlabelled(rows) if name == "predict" else rows)
        for name, rows in {
            "train": records(20, 0),
            "val": records(6, 1),
            "test": records(8, 2),
            "predict": records(10, 3),
        }.items()
    }
    given = {"path": paths["train"], "val_path": paths["val"], "test_path": paths["test"]}
    data = ClozeData(**given, predict_path=paths["predict"], **SMALL)
    assert data.source == "files"
    assert sizes(data) == [20, 6, 8, 10]
    assert [ids(data, part) for part in ("fit", "validate", "test", "predict")] == [{"0"}, {"1"}, {"2"}, {"3"}]
    assert data.questions("fit").places[3].endswith("train.jsonl, line 4")
    (batch,) = data.predict_dataloader()
    assert batch.labels.tolist() == [-100] * 10
    assert not batch.accepted.any()
    assert sizes(ClozeData(**given, **SMALL)) == [20, 6, 8, 8], "without a file, those of the test are answered"
    del given["test_path"]
    assert sizes(ClozeData(**given, **SMALL)) == [20, 6, 6, 6], "without a test file, the validation is the test"


def test_other_questions_may_be_tested_on_and_answered_with_every_source(tmp_path: Path) -> None:
    paths = {"test_path": write(tmp_path / "t.jsonl", records(4, 5))}
    paths |= {"predict_path": write(tmp_path / "p.jsonl", unlabelled(records(6, 6)))}
    assert sizes(ClozeData(**paths, **SMALL)) == [64, 240, 4, 6]
    recam = ClozeData(source="recam", data_dir=write_recam(tmp_path / "r"), **paths, **SMALL)
    assert sizes(recam)[1:] == [16, 4, 6]
    prose = ClozeData(source="slot_cloze", data_dir=write_prose(tmp_path / "s"), intersection=False, **paths, **SMALL)
    assert sizes(prose)[2:] == [4, 6]
    assert not prose._tokenised("test").with_passage


def test_questions_without_articles_are_read_without_one(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{k: v for k, v in row.items() if k != "article"} for row in records(30)])
    data = ClozeData(path=path, article_column=None, **SMALL)
    assert not data.with_passage
    assert sizes(data) == [27, 3, 3, 3], "each is an article of its own"
    batch = next(iter(data.train_dataloader()))
    assert isinstance(batch, PairBatch)
    assert not batch.passage_mask.any()


def test_recam_trains_on_its_subtask_and_answers_its_unlabelled_test(tmp_path: Path) -> None:
    folder = write_recam(tmp_path)
    one = ClozeData(source="recam", data_dir=folder, **SMALL)
    assert ids(one, "fit") == {"10", "12", "22"}
    assert sizes(one) == [10 + 12 + 22, 16, 16, 14]
    assert not one.questions("predict").labelled
    plain = ClozeData(source="recam", data_dir=folder, intersection=False, **SMALL)
    assert sizes(plain) == [10 + 12, 16, 16, 14]
    two = ClozeData(source="recam", data_dir=folder, subtask=2, **SMALL)
    assert ids(two, "fit") == {"18", "22"}
    assert sizes(two) == [18 + 22, 20, 20, 20], "without an unlabelled test, those of the test are answered"


def test_subtask_3_trains_on_one_and_is_tested_on_the_other(tmp_path: Path) -> None:
    folder = write_recam(tmp_path)
    onto_two = ClozeData(source="recam", data_dir=folder, subtask=1, eval_subtask=2, intersection=False, **SMALL)
    assert [ids(onto_two, part) for part in ("fit", "validate", "test")] == [{"10", "12"}, {"20"}, {"20"}]
    onto_one = ClozeData(source="recam", data_dir=folder, subtask=2, eval_subtask=1, intersection=False, **SMALL)
    assert [ids(onto_one, part) for part in ("fit", "validate", "test", "predict")] == [
        {"18"},
        {"16"},
        {"12"},
        {"14"},
    ], "the labelled test is free"


def test_recam_is_found_where_all_data_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recam(tmp_path / "recam_semeval2021_task4")
    monkeypatch.setenv("ZOO_DATA", str(tmp_path))
    assert sizes(ClozeData(source="recam", **SMALL))[1] == RECAM["task1_dev"]


def test_slot_cloze_cuts_words_out_of_training_and_development_passages(tmp_path: Path) -> None:
    data = ClozeData(source="slot_cloze", data_dir=write_prose(tmp_path), intersection=False, **SMALL)
    assert not data.with_passage
    train, validate, test, _ = sizes(data)
    assert (train + validate) % 30 == 0
    assert validate == round(0.1 * (train + validate))
    assert test % 30 == 0
    rows = data.questions("test")
    assert all(question.split()[-2].isdigit() and "dev" in question for question in rows.questions)
    assert all("trial" in question for question in data.questions("validate").questions)
    assert not next(iter(data.val_dataloader())).passage_mask.any()
    assert set(data.questions("fit").questions).isdisjoint(data.questions("validate").questions)


# Parts


def test_the_split_is_by_article_and_the_same_for_every_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", records(60))
    data = ClozeData(path=path, validation_fraction=0.3, seed=0, **SMALL)
    train, validate = data.questions("fit"), data.questions("validate")
    assert set(train.articles).isdisjoint(validate.articles)
    assert len(set(validate.articles)) == round(0.3 * 30)
    assert sorted([*train.ids, *validate.ids]) == sorted(f"0-{row}" for row in range(60))
    again = ClozeData(path=path, validation_fraction=0.3, seed=7, **SMALL)
    assert again.questions("validate").ids == validate.ids


@pytest.mark.parametrize(("count", "fraction"), [(2, 0.5), (4, 0.1), (4, 0.9)])
def test_too_few_articles_to_split_are_refused(count: int, fraction: float, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", records(count))
    data = ClozeData(path=path, validation_fraction=fraction, **SMALL)
    if (count, fraction) == (2, 0.5):
        message = "1 articles leave none"
    else:
        message = "2 articles leave none to train or to validate on with validation_fraction"
    with pytest.raises(ValueError, match=rf"{message}.*: give val_path"):
        data.prepare_data()


def shared(tmp_path: Path) -> dict[str, str]:
    """Training rows 1, 2 and 5 share a passage with the validation, the test and both."""
    train, val, test = (records(20, seed)[::2] for seed in (0, 1, 2))
    val[0]["article"] = train[1]["article"].upper().replace(" ", "  ")
    test[3]["article"] = train[2]["article"]
    val[4]["article"] = test[4]["article"] = train[5]["article"]
    return {
        "path": write(tmp_path / "train.jsonl", train),
        "val_path": write(tmp_path / "val.jsonl", val),
        "test_path": write(tmp_path / "test.jsonl", test),
    }


def test_exactly_the_training_questions_about_held_out_articles_are_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = shared(tmp_path)
    with caplog.at_level(logging.INFO):
        data = ClozeData(**paths, **SMALL)
        kept = data.questions("fit").ids
    assert kept == [f"0-{row}" for row in range(0, 20, 2) if row // 2 not in (1, 2, 5)]
    assert "3 of 10 questions are left out, as their 3 passages are in" in caplog.text
    assert sizes(data)[1:3] == [10, 10]
    test_path = paths.pop("test_path")
    assert len(ClozeData(**paths, **SMALL).questions("fit")) == 8
    assert len(ClozeData(**paths | {"val_path": test_path}, **SMALL).questions("fit")) == 8


def test_what_is_not_dropped_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = ClozeData(**shared(tmp_path), drop_overlap=False, **SMALL)
    assert len(data.questions("fit")) == 10
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "shares 3 passages (3 questions)" in record.getMessage()


def test_recam_is_filtered_as_well(tmp_path: Path) -> None:
    folder = write_recam(tmp_path)
    trial, dev = records(RECAM["task1_trial"], 10), records(RECAM["task1_dev"], 16)
    dev[5]["article"] = trial[3]["article"]
    write(tmp_path / "task1_dev.jsonl.gz", dev)
    data = ClozeData(source="recam", data_dir=folder, **SMALL)
    gone = {row["id"] for row in trial} - set(data.questions("fit").ids)
    assert gone == {"10-2", "10-3"}, "both questions about that passage"
    assert len(ClozeData(source="recam", data_dir=folder, drop_overlap=False, **SMALL).questions("fit")) == 44


def test_priors_are_counted_on_training_questions() -> None:
    data = ClozeData(**SMALL)
    rows = [cloze_sample(64), cloze_sample(240, part="validation"), cloze_sample(600, part="test")]
    for stage, part in (("validate", rows[1]), ("test", rows[2])):
        assert data.priors(stage) == OptionPriors.fit(rows[0]).accuracy(part)
    assert data.priors("test")["chance"] == 0.2
    assert all(abs(value - 0.2) < 0.08 for value in data.priors("test").values()), "the sample has none"


def test_the_number_of_options_is_the_files(tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k not in ("option_3", "option_4")} for row in records(20, label=1)]
    data = ClozeData(path=write(tmp_path / "a.jsonl", rows), **SMALL)
    assert data.num_options == 3
    assert next(iter(data.train_dataloader())).input_ids.shape[1] == 3
    five = write(tmp_path / "b.jsonl", records(4, 1))
    for kind in ("test_path", "predict_path"):
        other = ClozeData(path=write(tmp_path / "a.jsonl", rows), **{kind: five}, **SMALL)
        with pytest.raises(ValueError, match=r"b\.jsonl\): 5 options per question, expected 3"):
            other.questions("predict")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: no key 'option_3'"):
        ClozeData(path=write(tmp_path / "a.jsonl", rows), num_options=4, **SMALL).prepare_data()
    with pytest.raises(ValueError, match=r"embedded sample train: 5 options per question, expected 4"):
        ClozeData(num_options=4, **SMALL).prepare_data()


# Tokenizer


def test_the_vocabulary_is_of_the_training_part_and_lacks_the_placeholder() -> None:
    data = ClozeData(**SMALL)
    words = set(data.tokenizer.get_vocab())
    rows = cloze_sample(64)
    text = " ".join([*rows.articles, *rows.questions, *(word for five in rows.options for word in five)])
    expected = set(text.replace(PLACEHOLDER, " ").replace(".", " . ").lower().split())
    assert words == expected | {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
    assert data.vocab_size == len(words)
    assert ClozeData(**SMALL, mark_option=True).vocab_size == len(words) + 2
    assert ClozeData(**SMALL, tokenizer_size=40).vocab_size == 40


def test_other_questions_to_test_on_do_not_change_the_vocabulary(tmp_path: Path) -> None:
    paths = shared(tmp_path)
    rows = json.loads(f"[{','.join((tmp_path / 'train.jsonl').read_text().splitlines())}]")
    rows[2]["question"] = f"Zebras want {PLACEHOLDER} ."
    write(tmp_path / "train.jsonl", rows)
    with_test = ClozeData(**paths, **SMALL)
    test_path = paths.pop("test_path")
    assert test_path
    without = ClozeData(**paths, **SMALL)
    assert len(with_test.questions("fit")) < len(without.questions("fit"))
    assert with_test.state_dict()["tokenizer"] == without.state_dict()["tokenizer"]


def test_a_checkpoint_of_another_tokenizer_is_refused_with_the_way_out(tmp_path: Path) -> None:
    data = ClozeData(**SMALL)
    state = data.state_dict()
    ClozeData(**SMALL, mode="concat", encode="separate").load_state_dict(state)
    other = ClozeData(path=write(tmp_path / "a.jsonl", records(20, 3, option_1="zebra")), **SMALL)
    message = (
        r"trained with another tokenizer \(on data of source='embedded'\) than tokenizer='words' gives here\. "
        r"Give the one of that run: --data\.tokenizer RUN_FOLDER/tokenizer"
    )
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)
    data.tokenizer.save_pretrained(tmp_path / "tokenizer")
    ClozeData(path=str(tmp_path / "a.jsonl"), **SMALL | {"tokenizer": str(tmp_path / "tokenizer")}).load_state_dict(
        state
    )


def test_questions_that_the_checkpoint_has_seen_and_that_are_held_out_now_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = shared(tmp_path)
    test_path = paths.pop("test_path")
    trained = ClozeData(**paths, **SMALL).state_dict()
    ClozeData(**paths, **SMALL).load_state_dict(trained)
    # Another test of this process may have let messages through that are no warnings.
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    ClozeData(**paths, test_path=test_path, **SMALL).load_state_dict(trained)
    assert "1 questions about passages of the validation or the test here were there in the checkpoint's training" in (
        caplog.text
    )


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "race"}, r"source must be one of embedded, recam, slot_cloze, files, got 'race'"),
        ({"subtask": 3}, r"subtask must be one of 1, 2, got 3"),
        ({"eval_subtask": 3}, r"eval_subtask must be one of 1, 2, got 3"),
        ({"eval_subtask": 0}, r"eval_subtask must be one of 1, 2, got 0"),
        ({"mode": "append"}, r"mode must be one of fill, concat, concat_sep, summary_only, option_only, got 'append'"),
        ({"encode": "both"}, r"encode must be one of joint, separate, cloze, reader, got 'both'"),
        ({"masks": "all"}, r"masks must be one of each, first, got 'all'"),
        ({"max_length": 31}, r"max_length must be at least 32, got 31"),
        ({"batch_size": 0}, r"batch_size must be at least 1, got 0"),
        ({"eval_batch_size": 0}, r"eval_batch_size must be at least 1, got 0"),
        ({"sample_rows": 0}, r"sample_rows must be at least 1, got 0"),
        ({"tokenizer_size": 31}, r"tokenizer_size must be at least 32, got 31"),
        ({"num_options": 1}, r"num_options must be at least 2, got 1"),
        ({"num_workers": -1}, r"num_workers must be at least 0, got -1"),
        ({"validation_fraction": 0.0}, r"validation_fraction must lie between 0 and 1, got 0\.0"),
        ({"validation_fraction": 1.0}, r"validation_fraction must lie between 0 and 1, got 1\.0"),
        ({"source": "recam", "path": "a.jsonl"}, r"path=a\.jsonl and source='recam' contradict each other"),
        ({"source": "files"}, r"source='files' needs path: questions as JSON lines, CSV, TSV or Parquet"),
        ({"val_path": "a.jsonl"}, r"val_path=a\.jsonl needs path: source='embedded' has a validation part"),
        ({"data_dir": "x"}, r"data_dir holds ReCAM's files, but source='embedded': use path"),
        ({"eval_subtask": 2}, r"eval_subtask is one of ReCAM's, but source='embedded': use test_path"),
        ({"with_passage": True, "mode": "summary_only"}, r"with_passage=True and mode='summary_only' contradict"),
        ({"with_passage": True, "source": "slot_cloze"}, r"with_passage=True and source='slot_cloze' contradict"),
        ({"with_passage": True, "path": "a.csv", "article_column": None}, r"and article_column=None contradict"),
    ],
    ids=str,
)
def test_options_that_are_out_of_range_or_contradict_each_other_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ClozeData(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encode": "cloze", "mode": "concat"}, r"encode='cloze' keeps the slot of the question; it takes no mode="),
        ({"encode": "reader", "mark_option": True}, r"encode='reader' keeps the slot .* takes no mark_option"),
        ({"encode": "reader", "with_passage": False}, r"encode='reader' needs passages"),
    ],
    ids=str,
)
def test_layouts_that_do_not_fit_the_questions_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClozeData(**SMALL | options).setup("fit")


@pytest.mark.parametrize("part", ["path", "val_path", "test_path"])
def test_parts_without_labels_are_refused_with_the_hint_to_predict(part: str, tmp_path: Path) -> None:
    paths = shared(tmp_path)
    paths[part] = write(tmp_path / "bare.jsonl", unlabelled(records(20, 5)))
    stage = "test" if part == "test_path" else "fit"
    with pytest.raises(ValueError, match=r"bare\.jsonl\) has no labels, which .* test need: answer .* with `predict`"):
        ClozeData(**paths, **SMALL).setup(stage)


# The command line

TINY = (
    "--model.encoder", "tiny", "--model.encoder_options",
    "{hidden_size: 16, num_layers: 1, num_heads: 2, intermediate_size: 16, max_length: 128, dropout: 0.0}",
)  # fmt: skip
DATA = ("--data", "ClozeData", "--data.tokenizer", "words", "--data.sample_rows", "32", "--data.max_length", "128")
SUMMARY = ("--model", "SummaryMRC", *TINY, *DATA)
CLOZE = ("--model", "ClozeScorer", *TINY, *DATA, "--data.encode", "cloze")
READER = ("--model", "GAReader", "--model.embedding_size", "8", "--model.hidden_size", "4", *DATA)
QUIET = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false")
ONE_STEP = (*QUIET, "--trainer.fast_dev_run", "1")
SHORT = (*QUIET, "--trainer.max_epochs", "1", "--trainer.limit_val_batches", "1", "--trainer.log_every_n_steps", "1")

Run = Callable[..., Any]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((*SUMMARY, "--data.mode", "concat"), {"mode": "concat", "with_passage": True, "option_span": False}),
        ((*SUMMARY, "--data.mode", "summary_only", "--data.encode", "separate"), {"with_passage": False}),
        ((*SUMMARY, "--data.mark_option", "true", "--data.encode", "separate"), {"encode_layout": "separate"}),
        (CLOZE, {}),
        ((*READER, "--data.encode", "reader"), {}),
    ],
    ids=range(5),
)
def test_models_take_what_the_data_says_and_make_a_step(run: Run, options: tuple[str, ...], expected: dict) -> None:
    cli = run("fit", *options, *ONE_STEP)
    for name, value in expected.items():
        assert getattr(cli.model, name) == value
    hparams = cli.model.hparams
    assert hparams["num_options"] == 5
    assert hparams["vocab_size"] == cli.datamodule.vocab_size
    for name in ("mode", "encode", "with_passage", "mark_option"):
        if name in hparams:
            assert hparams[name] == getattr(cli.datamodule, name)
    assert hparams["encode"] == cli.datamodule.encode


def test_questions_with_three_options_and_no_passage_train(run: Run, tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k not in ("article", "option_3", "option_4")}
            for row in records(20, label=2)]  # fmt: skip
    path = write(tmp_path / "a.jsonl", rows)
    cli = run("fit", *SUMMARY, "--data.path", path, "--data.article_column", "null", *ONE_STEP)
    assert cli.model.num_options == 3
    assert not cli.model.with_passage


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((*SUMMARY, "--data.encode", "cloze"), "SummaryMRC needs --data.encode joint or separate, got 'cloze'"),
        ((*CLOZE, "--data.encode", "joint"), "ClozeScorer needs --data.encode cloze, got 'joint'"),
        (READER, "GAReader needs --data.encode reader, got 'joint'"),
        ((*SUMMARY, "--model.mode", "concat"), "--model.mode is 'concat', but ClozeData has 'fill'"),
        ((*SUMMARY, "--model.num_options", "4"), "--model.num_options is 4, but ClozeData has 5"),
        ((*SUMMARY, "--data.mode", "option_only", "--model.matcher", "duma"), "matcher='duma' matches with a passage"),
        ((*SUMMARY, "--data.mode", "concat", "--model.option_span", "true"), "option_span needs the option in its"),
        ((*SUMMARY, "--data.source", "files"), "source='files' needs path"),
        ((*SUMMARY, "--data.tokenizer", "someone/bert"), "someone/bert is no local folder, and the hub did not give"),
        ((*SUMMARY, "--model.encoder_options", "{}", "--model.encoder", "someone/bert"), "pretrained=False needs only"),
    ],
    ids=range(10),
)
def test_models_and_data_that_do_not_fit_are_refused_in_one_paragraph(
    refused: Run, options: tuple[str, ...], message: str
) -> None:
    assert message in refused(2, "fit", *options, *ONE_STEP)


def test_sequences_longer_than_the_encoder_are_refused_with_both_numbers(refused: Run) -> None:
    text = refused(1, "fit", *SUMMARY, "--data.max_length", "129", *ONE_STEP)
    assert text == (
        "--data.max_length is 129, but the encoder (BertModel) has 128 positions: set --data.max_length to at most 128"
    )


def test_a_vocabulary_larger_than_the_encoders_is_refused_with_both_numbers(refused: Run, tmp_path: Path) -> None:
    from zoo.summary_mrc import build_text_encoder, save_text_encoder

    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16}
    save_text_encoder(build_text_encoder("tiny", vocab_size=40, options=sizes), tmp_path / "encoder")
    text = refused(2, "fit", "--model", "SummaryMRC", "--model.encoder", str(tmp_path / "encoder"), *DATA, *ONE_STEP)
    vocabulary = ClozeData(**SMALL | {"sample_rows": 32}).vocab_size
    assert f"the tokenizer has {vocabulary} tokens, the embedding of {tmp_path / 'encoder'} has 40" in text


def line_3(**changes: Any) -> list[Any]:
    rows = records(20)
    rows[2] = {key: value for key, value in (rows[2] | changes).items() if value != "DROP"}
    return rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (line_3(question="no slot"), "line 3: question has 0 times @placeholder, expected it once"),
        (line_3(option_2=""), "line 3: option_2 is empty"),
        (line_3(option_5="more"), "line 3: key 'option_5' is one option too many, expected 5"),
        (line_3(label=5), "line 3: label 5 out of range 0..4 (are labels 1-based?)"),
        (line_3(label="B"), "line 3: label 'B' is not an integer"),
        (line_3(label="DROP"), "line 3: no label, while other questions"),
        (line_3(question="word " * 120 + PLACEHOLDER), "line 3: 121 tokens of the question with option 0"),
    ],
    ids=range(7),
)
def test_a_bad_row_is_named_by_file_and_line(refused: Run, tmp_path: Path, rows: list[Any], message: str) -> None:
    path = write(tmp_path / "mine.jsonl", rows)
    # What needs no tokens is found before anything is built.
    status = 1 if "tokens" in message else 2
    text = refused(status, "fit", *SUMMARY, "--data.path", path, "--data.val_path", path, "--data.drop_overlap",
                   "false", *ONE_STEP)  # fmt: skip
    assert f"{path}, {message}" in text
    assert len(text) < 400


def test_a_byte_order_mark_windows_line_ends_and_blank_lines_are_accepted(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in records(20)]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    data = ClozeData(path=str(tmp_path / "a.jsonl"), **SMALL)
    assert sum(sizes(data)[:2]) == 20
    assert data.questions("fit").places[0].endswith("a.jsonl, line 1")


def test_equal_options_are_warned_of_with_their_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = records(20)
    for row in rows[:4]:
        row["option_1"] = row["option_0"].upper()
    ClozeData(path=write(tmp_path / "a.jsonl", rows), **SMALL).setup("fit")
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "4 of 20 questions have two equal options" in record.getMessage()


def test_a_trained_model_is_tested_on_other_questions_and_answers_those_without_labels(
    run: Run, refused: Run, tmp_path: Path, capsys: Any
) -> None:
    train = write(tmp_path / "train.jsonl", records(24))
    command = (*SUMMARY, "--data.path", train, "--data.validation_fraction", "0.25")
    cli = run("fit", *command, *SHORT)
    best = ("--ckpt_path", str(cli.run_folder / "last.ckpt"))

    other = records(8, 4)
    other[0]["article"] = cli.datamodule.questions("fit").articles[0]
    test = ("--data.test_path", write(tmp_path / "test.jsonl", other))
    tested = run("test", *command, *test, *best, *SHORT)
    metrics = tested.result["metrics"]
    assert len(tested.datamodule.questions("test")) == 8
    assert metrics["test/prior/chance"] == pytest.approx(0.2)
    assert metrics["test/acc"] * 8 == pytest.approx(round(metrics["test/acc"] * 8))
    assert tested.datamodule.state_dict()["tokenizer"] == cli.datamodule.state_dict()["tokenizer"]
    assert "2 questions about passages of the validation or the test here were there in the checkpoint's training" in (
        capsys.readouterr().err
    )

    bare = write(tmp_path / "bare.jsonl", unlabelled(records(8, 4)))
    text = refused(1, "test", *command, "--data.test_path", bare, *best, *SHORT)
    assert text == (
        f"test ({bare}) has no labels, which training, validation and test need: answer its questions with `predict`"
    )
    answered = run("predict", *command, "--data.predict_path", bare, *best, *SHORT)
    lines = [json.loads(line) for line in (answered.run_folder / "predictions.jsonl").read_text().splitlines()]
    assert {line["id"] for line in lines} == {f"4-{row}" for row in range(8)}
    submission = (answered.run_folder / "submission.csv").read_text().split()
    chosen = {line["id"]: line["pred"] for line in lines}
    assert submission == [f"{row},{chosen[f'4-{row}']}" for row in range(8)]

    # Words of its own, and as many: only the tokenizer's fingerprint tells the difference.
    changed = [{key: value.replace("Anna", "Zelda") if key in ("article", "question") else value
                for key, value in row.items()} for row in records(24)]  # fmt: skip
    moved = (*SUMMARY, "--data.path", write(tmp_path / "moved.jsonl", changed), "--data.validation_fraction", "0.25")
    text = refused(1, "validate", *moved, *best, *SHORT)
    assert "Give the one of that run: --data.tokenizer RUN_FOLDER/tokenizer" in text
    kept = run("validate", *moved, "--data.tokenizer", str(cli.run_folder / "tokenizer"), *best, *SHORT)
    assert "val/acc" in kept.trainer.callback_metrics


def test_draws_of_the_loader_and_plain_indices_give_the_same_batch() -> None:
    tokens = ClozeData(**SMALL)._tokenised("fit")
    rows = torch.tensor([5, 0, 9])
    assert all(torch.equal(*pair) for pair in zip(tokens[Draw(rows, 3)], tokens[rows], strict=True))


def test_rows_are_plain_questions() -> None:
    rows = ClozeData(**SMALL).questions("fit")
    assert isinstance(rows, ClozeRows)
    assert np.bincount(rows.labels).tolist() == [13, 13, 13, 13, 12]
