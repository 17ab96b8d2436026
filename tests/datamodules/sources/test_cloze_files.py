from __future__ import annotations

import csv
import gzip
import io
import json
import logging

import numpy as np
import pandas as pd
import pytest

from datamodules.sources.cloze_files import ClozeColumns, read_cloze

ROWS = [
    {"id": "a1", "article": 'He said "no", twice.', "question": "He has @placeholder hope .", "label": 2},
    {"id": "a2", "article": "Zwei\u2028Zeilen\nund Äpfel", "question": "@placeholder are here", "label": 0},
]
OPTIONS = [["little", "some", "no"], ["Apples", "007", "NA"]]
WITH_OPTIONS = [row | {f"option_{k}": word for k, word in enumerate(OPTIONS[n])} for n, row in enumerate(ROWS)]


def write(folder, name, content):
    path = folder / name
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(rows, separator=",", end="\n"):
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=separator, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def row_with(**changes):
    row = {**WITH_OPTIONS[0], **changes}
    return {key: value for key, value in row.items() if value != "DROP"}


WRITERS = {
    "plain.jsonl": lambda: json_lines(WITH_OPTIONS),
    "lines.json": lambda: json_lines(WITH_OPTIONS).rstrip(),
    "packed.jsonl.gz": lambda: json_lines(WITH_OPTIONS),
    "windows.jsonl": lambda: json_lines(WITH_OPTIONS).replace("}\n", "}\r\n"),
    "bom.jsonl": lambda: "\ufeff" + json_lines(WITH_OPTIONS),
    "blank.jsonl": lambda: "\n" + json_lines(WITH_OPTIONS).replace("}\n", "}\n \n\n"),
    "plain.csv": lambda: table(WITH_OPTIONS),
    "windows.csv": lambda: "\ufeff" + table(WITH_OPTIONS, end="\r\n") + "\r\n\r\n",
    "blank.csv": lambda: table(WITH_OPTIONS).replace("\na1", "\n\na1"),
    "plain.tsv": lambda: table(WITH_OPTIONS, "\t"),
    "packed.tsv.gz": lambda: table(WITH_OPTIONS, "\t"),
}


@pytest.mark.parametrize("name", [*WRITERS, "plain.parquet"])
@pytest.mark.parametrize("listed", [False, True])
def test_every_format_gives_the_same_questions(tmp_path, name, listed):
    columns = ClozeColumns(options="choices") if listed else None
    if name.endswith("parquet"):
        frame = pd.DataFrame([row | {"choices": words} for row, words in zip(WITH_OPTIONS, OPTIONS, strict=True)])
        frame.to_parquet(tmp_path / name)
        path = tmp_path / name
    else:
        path = write(tmp_path, name, WRITERS[name]())
        if listed:
            as_text = "csv" in name or "tsv" in name
            rows = [
                row | {"choices": json.dumps(words) if as_text else words}
                for row, words in zip(ROWS, OPTIONS, strict=True)
            ]
            path = write(tmp_path, name, table(rows, "\t" if "tsv" in name else ",") if as_text else json_lines(rows))
    found = read_cloze(path, columns, part="train")
    assert found.articles == [row["article"] for row in ROWS]
    assert found.questions == [row["question"] for row in ROWS]
    assert found.options == OPTIONS
    assert found.labels.tolist() == [2, 0]
    assert found.labels.dtype == np.int64
    assert found.ids == ["a1", "a2"]
    assert found.num_options == 3
    assert found.name == f"train ({path})"


def test_places_are_lines_of_the_file_whatever_is_between(tmp_path):
    path = write(tmp_path, "a.jsonl", WRITERS["blank.jsonl"]())
    assert read_cloze(path).places == [f"{path}, line 2", f"{path}, line 5"]
    broken = [row_with(article="two\nlines"), row_with()]
    path = write(tmp_path, "a.csv", table(broken))
    assert read_cloze(path).places == [f"{path}, line 2", f"{path}, line 4"]


def test_columns_may_have_other_names_and_articles_may_be_missing(tmp_path):
    rows = [{"sentence": "so @placeholder", "good": "x", "bad": " y ", "gold": 1}]
    columns = ClozeColumns(None, "sentence", ("good", "bad"), "gold", "key")
    found = read_cloze(write(tmp_path, "a.jsonl", json_lines(rows)), columns, 2)
    assert (found.articles, found.options, found.ids) == ([""], [["x", "y"]], ["0"])
    assert read_cloze(write(tmp_path, "a.csv", table(rows)), columns).labels.tolist() == [1]
    lettered = [{"question": "so @placeholder", "o0x": "a", "o1x": "b", "o2x": "", "label": 0}]
    path = write(tmp_path, "b.csv", table(lettered))
    # A third column without a value is no third option.
    assert read_cloze(path, ClozeColumns(None, options="o{}x"), 2).options == [["a", "b"]]


@pytest.mark.parametrize("value", ["DROP", None, "", -1])
def test_files_without_labels_are_read_as_such(tmp_path, value):
    rows = [row_with(label=value), row_with(label=value)]
    assert not read_cloze(write(tmp_path, "a.jsonl", json_lines(rows))).labelled
    if value != "DROP":
        assert not read_cloze(write(tmp_path, "a.csv", table(rows))).labelled
        pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
        assert not read_cloze(tmp_path / "a.parquet").labelled


@pytest.mark.parametrize("value", [1, 1.0, "1", "1.0", " 1 "], ids=repr)
def test_whole_numbers_are_labels_however_they_are_written(tmp_path, value):
    assert read_cloze(write(tmp_path, "a.jsonl", json_lines([row_with(label=value)]))).labels.tolist() == [1]


BAD_JSON = [
    (row_with(question="no slot"), r"line 2: question has 0 times @placeholder, expected it once"),
    (row_with(question="@placeholder @placeholder"), r"line 2: question has 2 times @placeholder"),
    (row_with(question="DROP"), r"line 2: no key 'question', only 'id', 'article'"),
    (row_with(question=5), r"line 2: question is '5' \(int\), expected a text"),
    (row_with(article=""), r"line 2: article is empty, expected a text"),
    (row_with(article=" \t"), r"line 2: article is blank"),
    (row_with(article="DROP"), r"line 2: no key 'article'"),
    (row_with(option_1="DROP"), r"line 2: no key 'option_1'"),
    (row_with(option_1=""), r"line 2: option_1 is empty"),
    (row_with(option_2=None), r"line 2: option_2 is empty"),
    (row_with(option_3="more"), r"line 2: key 'option_3' is one option too many, expected 3"),
    (row_with(label=3), r"line 2: label 3 out of range 0\.\.2 \(are labels 1-based\?\)"),
    (row_with(label=-2), r"line 2: label -2 out of range 0\.\.2"),
    (row_with(label=True), r"line 2: label True is not an integer"),
    (row_with(label=1.5), r"line 2: label 1\.5 is not an integer, expected the index of the gold option, 0\.\.2"),
    (row_with(label="B"), r"line 2: label 'B' is not an integer"),
    (row_with(label=[1]), r"line 2: label \[1\] is not an integer"),
    (row_with(label=float("inf")), r"line 2: label inf is not an integer"),
    (row_with(label="DROP"), r"line 2: no label, while other questions"),
    (row_with(label=None), r"line 2: no label, while other questions"),
    (row_with(id=["x"]), r"line 2: id \['x'\], expected a text or an integer"),
    ([1, 2], r"line 2: a JSON list, expected an object; write the entries"),
    ("text", r"line 2: a JSON str, expected an object"),
    ({}, r"line 2: no key 'article', only an empty object"),
]


@pytest.mark.parametrize(("row", "message"), BAD_JSON, ids=range(len(BAD_JSON)))
def test_a_bad_row_is_refused_with_line_and_key(tmp_path, row, message):
    path = write(tmp_path, "bad.jsonl", json_lines([row_with(), row]))
    with pytest.raises(ValueError, match=rf"bad\.jsonl.*{message}"):
        read_cloze(path)


GOOD = json_lines([row_with()])
HEADER = "article,question,option_0,option_1,label\n"
BAD_FILES = [
    ("a.jsonl", "", r"a\.jsonl is empty, expected one question per line"),
    ("a.jsonl", "\ufeff\n \n", r"a\.jsonl is empty, expected one question per line"),
    ("a.jsonl", GOOD + GOOD[:40], r"a\.jsonl, line 2: no JSON \(.*expected one object per line"),
    ("a.jsonl", json.dumps([row_with()], indent=1), r"a\.jsonl, line 1: no JSON"),
    ("a.json", json.dumps([row_with()]), r"a\.json, line 1: a JSON list, expected an object; write the entries"),
    ("a.jsonl", GOOD.encode() + b'{"article": "\xff"}', r"a\.jsonl line 2: byte 0xff is not UTF-8"),
    ("a.jsonl", GOOD.encode("utf-16"), r"a\.jsonl line 1: byte 0xff is not UTF-8"),
    ("a.csv", "", r"a\.csv is empty"),
    ("a.csv", HEADER, r"a\.csv\) has no rows, expected one question per line"),
    ("a.csv", HEADER + "t,a @placeholder,x,y\n", r"a\.csv, line 2: 4 fields separated by ',', but the header has 5"),
    ("a.csv", HEADER + "t,a @placeholder,x,y,0\nt,no,x,y,0\n", r"a\.csv, line 3: question has 0 times @placeholder"),
    ("a.csv", HEADER + 't,"a @placeholder,x,y,0\n', r"a\.csv, line 2: unexpected end of data"),
    ("a.csv", HEADER + 't,"a "b" @placeholder",x,y,0\n', r"a\.csv, line 2: .*double quote inside .*written twice"),
    ("a.csv", HEADER + f"{'t' * 140_000},@placeholder,x,y,0\n", r"line 2: .*131,072 characters need \.jsonl or \.parq"),
    ("a.csv", "label," + HEADER, r"a\.csv, line 1: column 'label' is there twice"),
    ("a.csv", "text,question\nx,@placeholder\n", r"a\.csv, line 2: no column 'article', only 'text', 'question'"),
    ("a.csv", "article,question,label\nx,@placeholder,0\n", r"a\.csv, line 2: no column 'option_0'"),
    ("a.csv", "article,question,option_0\nx,@placeholder,z\n", r"a\.csv, line 2: 1 option in option_0, expected two"),
    ("a.xls", GOOD, r"a\.xls ends in '\.xls', expected \.jsonl, \.json, \.csv or \.tsv \(also with \.gz\), or \.parq"),
    ("a.parquet", GOOD, r"a\.parquet is truncated or no Parquet file"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_a_bad_file_is_refused_with_its_name(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_cloze(write(tmp_path, name, content))


def test_damaged_and_missing_files_are_refused(tmp_path):
    path = write(tmp_path, "a.jsonl.gz", GOOD)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz is truncated or no gzip file"):
        read_cloze(path)
    with pytest.raises(FileNotFoundError, match=r"gone\.csv does not exist"):
        read_cloze(tmp_path / "gone.csv")
    pd.DataFrame([row_with(label=True)]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet, row 0: label True is not an integer"):
        read_cloze(tmp_path / "a.parquet")
    pd.DataFrame([row_with(option_1=3.5)]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet, row 0: option_1 is '3\.5' \(float\), expected a text"):
        read_cloze(tmp_path / "a.parquet")


def test_the_number_of_options_is_held_to(tmp_path):
    path = write(tmp_path, "a.jsonl", json_lines(WITH_OPTIONS))
    with pytest.raises(ValueError, match=r"line 1: no key 'option_3'"):
        read_cloze(path, num_options=4)
    with pytest.raises(ValueError, match=r"line 1: key 'option_2' is one option too many, expected 2"):
        read_cloze(path, num_options=2)
    with pytest.raises(ValueError, match=r"line 1: 2 options in option_0, option_1, expected 3"):
        read_cloze(path, ClozeColumns(options=("option_0", "option_1")), 3)
    listed = [row | {"choices": words} for row, words in zip(ROWS, OPTIONS, strict=True)]
    listed[1]["choices"] = ["one", "two"]
    with pytest.raises(ValueError, match=r"line 2: 2 options in choices, expected 3, as in the first question"):
        read_cloze(write(tmp_path, "b.jsonl", json_lines(listed)), ClozeColumns(options="choices"))
    listed[1]["choices"] = ["one", "", "two"]
    with pytest.raises(ValueError, match=r"line 2: choices\[1\] is empty"):
        read_cloze(write(tmp_path, "b.jsonl", json_lines(listed)), ClozeColumns(options="choices"))
    listed[1]["choices"] = "one, two, three"
    with pytest.raises(ValueError, match=r"line 2: choices is 'one, two, three', expected a list of options"):
        read_cloze(write(tmp_path, "b.jsonl", json_lines(listed)), ClozeColumns(options="choices"))
    with pytest.raises(ValueError, match=r"line 1: no key 'options', only"):
        read_cloze(path, ClozeColumns(options="options"))


def test_columns_with_two_roles_are_refused():
    with pytest.raises(ValueError, match=r"column 'label' is used twice"):
        ClozeColumns(options=("label", "b"))
    with pytest.raises(ValueError, match=r"expected two columns or more"):
        ClozeColumns(options=("a",))
    with pytest.raises(ValueError, match=r"expected one \{\}, for the number"):
        ClozeColumns(options="{}_{}")


def test_equal_options_and_repeated_ids_are_counted_in_one_warning_each(tmp_path, caplog):
    rows = [row_with(option_0="No"), row_with(id="a3"), row_with(option_1="no")]
    with caplog.at_level(logging.WARNING):
        assert len(read_cloze(write(tmp_path, "a.jsonl", json_lines(rows)), part="dev")) == 3
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "2 of 3 questions have two equal options" in messages[0]
    assert "1 ids were there before" in messages[1]
    caplog.clear()
    read_cloze(write(tmp_path, "a.jsonl", json_lines(WITH_OPTIONS)))
    assert not caplog.records
