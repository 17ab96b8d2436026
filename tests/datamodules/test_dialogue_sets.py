from __future__ import annotations

import gzip
import json
import zipfile
from typing import TYPE_CHECKING, Any

import pytest

from datamodules import DialogueData
from datamodules.dialogue_split import pairs_of
from datamodules.sources.dialogue_files import read_file, read_posts
from datamodules.sources.dialogue_sets import SETS, SEVEN, read_dailydialog, read_set
from datamodules.sources.dialogue_turns import Dialogues, emotion_ids

if TYPE_CHECKING:
    from pathlib import Path

NAMES = list(SEVEN)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def dialogue(*turns: tuple[str, str]) -> str:
    return json.dumps({"id": "x", "turns": [{"text": text, "emotion": emotion} for text, emotion in turns]}) + "\n"


def chat(first: str, second: str, third: str, label: str) -> str:
    return json.dumps({"id": 0, "turns": [first, second, third], "label": label}) + "\n"


def replies(found: Dialogues, names: list[str], context: int = 1) -> list[tuple[str, str, int, int]]:
    pairs = pairs_of(found, names, context)
    return [
        (" | ".join(found.texts[low:high]), found.texts[high], int(pairs.primary[high - 1]), int(pairs.primary[high]))
        for low, high in zip(pairs.first.tolist(), pairs.reply.tolist(), strict=True)
    ]


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_every_turn_of_a_dialogue_but_the_first_is_a_reply(name: str, tmp_path: Path) -> None:
    lines = dialogue(("a", "no emotion"), ("b", "anger"), ("c", "happiness")) + dialogue(("d", "fear"), ("e", "none"))
    found = read_file(write(tmp_path / name, lines))
    assert replies(found, NAMES) == [("a", "b", 0, 1), ("b", "c", 1, 4), ("d", "e", 3, 0)]
    assert replies(found, NAMES, 2) == [("a", "b", 0, 1), ("a | b", "c", 1, 4), ("d", "e", 3, 0)]


def test_only_the_third_turn_of_emocontext_is_a_reply_in_both_formats(tmp_path: Path) -> None:
    names = list(SETS["emocontext"].label_names)
    lines = read_file(write(tmp_path / "x.jsonl", chat("a", "b", "c", "sad")))
    table = read_file(write(tmp_path / "x.txt", "id\tturn1\tturn2\tturn3\tlabel\n0\ta\tb\tc\tsad\n"))
    for found in (lines, table):
        assert replies(found, names, 2) == [("a | b", "c", -1, 2)]


def test_misspelt_emotions_of_reccon_are_mapped_and_others_refused(tmp_path: Path) -> None:
    felt = ["happy", "happines", "sad", "excited", "surprised", "angry", "neutral", "Fear"]
    turns = [{"turn": k + 1, "utterance": f"t{k}", "emotion": name} for k, name in enumerate(felt)]
    found = read_file(write(tmp_path / "x.json", json.dumps({"tr_1": [turns]})))
    primary, secondary = emotion_ids(found, NAMES)
    assert [NAMES[value] for value in primary] == [
        "happiness", "happiness", "sadness", "happiness", "surprise", "anger", "neutral", "fear"
    ]  # fmt: skip
    assert not secondary.any()
    turns[1]["emotion"] = "hapy"
    found = read_file(write(tmp_path / "x.json", json.dumps({"tr_1": [turns]})))
    with pytest.raises(
        ValueError, match="dialogue 'tr_1' turn 2: unknown emotion 'hapy', expected one of neutral, anger"
    ):
        emotion_ids(found, NAMES)


def test_synonyms_do_not_change_emotions_that_a_set_has_itself() -> None:
    names = SETS["empathetic"].label_names
    found = Dialogues("x")
    for name in ("excited", "sad"):
        found.turn(name, name, "line 1")
    assert [names[value] for value in emotion_ids(found, names)[0]] == ["excited", "sad"]


def test_meld_is_sorted_by_turn_and_keeps_commas_and_quotes(tmp_path: Path) -> None:
    text = (
        "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID\n"
        '1,"Well, ""hi""",A,joy,positive,0,1\n2,first,B,neutral,neutral,0,0\n3,It\u0092s,C,anger,negative,1,0\n'
        "4,no,C,fear,negative,1,1\n"
    )
    found = read_file(write(tmp_path / "train_sent_emo.csv", text))
    assert replies(found, list(SETS["meld"].label_names)) == [
        ("first", 'Well, "hi"', 0, 4), ("It\N{RIGHT SINGLE QUOTATION MARK}s", "no", 1, 3)
    ]  # fmt: skip


def test_empathetic_dialogues_have_commas_as_words_and_one_emotion_a_dialogue(tmp_path: Path) -> None:
    text = (
        "conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,tags\n"
        'hit:0,1,sentimental,p,1,Well_comma_ "yes,5|5,\nhit:0,2,sentimental,p,0,oh,5|5,\n'
    )
    found = read_file(write(tmp_path / "train.csv", text))
    names = list(SETS["empathetic"].label_names)
    place = names.index("sentimental")
    assert len(names) == 32
    assert replies(found, names) == [('Well, "yes', "oh", place, place)]


def test_official_pairs_have_two_emotions_a_side(tmp_path: Path) -> None:
    pairs = [[[f"post {k}", 0, 0], [f"reply {k}", 1, 5]] for k in range(10)]
    data = DialogueData(path=str(write(tmp_path / "dev_data.json", json.dumps(pairs))))
    assert data.label_names == ["other", "like", "sad", "disgust", "angry", "happy"]
    batch = data.whole("train")
    assert batch.reply_emotion.tolist() == [[0, 1, 0, 0, 0, 1]] * 8
    assert batch.post_emotion.tolist() == [[1, 0, 0, 0, 0, 0]] * 8
    assert data.transitions("train")[0, 1] == 8
    pairs[3][1][2] = 6
    data = DialogueData(path=str(write(tmp_path / "dev_data.json", json.dumps(pairs))))
    with pytest.raises(ValueError, match="pair 3 reply: emotion id 6 is the largest, but num_emotions=6"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.jsonl", "{}\n", "line 1 is '{}', expected an object with a list of turns"),
        ("x.jsonl", dialogue(("a", "fear")) + "{\n", "line 2 is not JSON"),
        ("x.jsonl", '{"turns": [{"text": "a"}]}\n', "line 1 turn 1: emotion is None, expected a text"),
        ("x.jsonl", '{"turns": ["a", "b"]}\n', "line 1: label is None, expected a text"),
        ("x.json", "[[1, 2, 3]]", r"pair 0 is \[1, 2, 3\], expected \[post, reply\]"),
        ("x.json", '[[["a", 0, 0], ["b", 0]]]', r"pair 0: the reply is \['b', 0\], expected \[text, id, id\]"),
        ("x.json", "[]", "holds no dialogue"),
        ("x.json", '{"d": 3}', "dialogue 'd' is 3, expected a list of turns"),
        ("x.csv", "a,b\n1,2\n", "has the columns a, b; expected those of MELD"),
        ("x.csv", "Utterance,Emotion,Dialogue_ID,Utterance_ID\nhi,joy,0,x\n", "line 2: Utterance_ID is 'x'"),
        ("x.csv", "Utterance,Emotion,Dialogue_ID,Utterance_ID\nhi,joy,0\n", "line 2 has 3 fields, expected 4"),
        ("x.tsv", "a\tb\tc\n", "line 1 has 3 fields separated by tabs, expected post and reply"),
        ("x.tsv", "a\tb\nc\n", "line 2 has 1 fields separated by tabs, line 1 has 2"),
        ("x.tsv", "\n", "is empty"),
        (
            "x.txt",
            "id\tturn1\tturn2\tturn3\tlabel\n0\ta\tb\tsad\n",
            "line 2 has 4 fields separated by tabs, expected 5",
        ),
    ],
)
def test_a_malformed_file_names_the_place(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_file(write(tmp_path / name, text))


def test_files_that_are_absent_truncated_or_not_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_file(tmp_path / "x.tsv")
    (tmp_path / "x.tsv").write_bytes(b"a\tb\nc\xff\td\n")
    with pytest.raises(ValueError, match="line 2: byte 0xff is not UTF-8"):
        read_file(tmp_path / "x.tsv")
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b"{}" * 900)[:20])
    with pytest.raises(ValueError, match="truncated or no gzip"):
        read_file(tmp_path / "x.jsonl.gz")


def test_a_negative_emotion_is_refused(tmp_path: Path) -> None:
    found = read_file(write(tmp_path / "x.tsv", "a\tb\t0\t-1\n"))
    with pytest.raises(ValueError, match="line 1 reply: emotion id -1 is negative"):
        emotion_ids(found, NAMES)


def test_posts_are_read_one_a_line(tmp_path: Path) -> None:
    found = read_posts(write(tmp_path / "x.txt", "a b\r\nc [SEP] d\n"))
    assert found.texts == ["a b", "", "c [SEP] d", ""]


def test_one_held_out_file_is_for_test_and_of_two_the_first_is_for_validation(tmp_path: Path) -> None:
    folder = tmp_path / "emocontext"
    for name in ("train", "valid"):
        write(folder / f"{name}.jsonl.gz", chat("a", "b", name, "sad"))
    parts = read_set("emocontext", None, str(tmp_path))
    assert parts.val is None
    assert parts.test is not None and parts.test.texts[2] == "valid"
    write(folder / "test.txt", "id\tturn1\tturn2\tturn3\tlabel\n0\ta\tb\ttest\tsad\n")
    for parts in (read_set("emocontext", None, str(tmp_path)), read_set("emocontext", str(folder), None)):
        assert parts.val is not None and parts.test is not None
        assert (parts.train.texts[2], parts.val.texts[2], parts.test.texts[2]) == ("train", "valid", "test")


def test_a_missing_set_says_which_files_to_put_where(tmp_path: Path) -> None:
    message = (
        "dailydialog_train.json is missing: put dailydialog_train.json, dailydialog_valid.json, dailydialog_test.json"
    )
    with pytest.raises(FileNotFoundError, match=message):
        read_set("reccon", None, str(tmp_path))


def test_test_rows_are_filled_up_from_training_and_never_trained_on(tmp_path: Path) -> None:
    labels = ["others", "happy", "sad", "angry"]
    train = "".join(chat("a", f"b {k}", f"train {k}", labels[k % 4]) for k in range(80))
    held = "".join(chat("a", "b", f"valid {k}", "others") for k in range(9)) + chat("a", "b", "valid 9", "sad")
    write(tmp_path / "emocontext" / "train.jsonl", train)
    write(tmp_path / "emocontext" / "valid.jsonl", held)
    options: dict[str, Any] = {"source": "emocontext", "data_dir": str(tmp_path), "eval_per_class": 6}
    data = DialogueData(**options, eval_from_train=4)
    test = data.whole("test")
    assert test.reply_emotion.sum(0).tolist() == [6, 4, 5, 4]
    moved = {text for text in test.reply_text if text.startswith("train")}
    assert len(moved) == 12
    for part in ("train", "val"):
        assert not moved & set(data.whole(part).reply_text)
    for post, reply in zip(test.post_text, test.reply_text, strict=True):
        assert reply.startswith("valid") or post == f"a [SEP] b {reply.split()[1]}"
    assert DialogueData(**options).whole("test").reply_emotion.sum(0).tolist() == [6, 0, 1, 0]


TEXT = "Hi . __eou__ Hello . __eou__\nWhat ? __eou__ This ! __eou__ Oh . __eou__\n"


def test_the_original_dailydialog_is_read_from_folders_zip_files_and_zip_files_within(tmp_path: Path) -> None:
    write(tmp_path / "plain" / "dialogues_text.txt", TEXT)
    write(tmp_path / "plain" / "dialogues_emotion.txt", "0 4 \n6 1 5 \n")
    inner = tmp_path / "train.zip"
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("train/dialogues_train.txt", TEXT)
        archive.writestr("train/dialogues_emotion_train.txt", "0 4\n6 1 5\n")
    outer = tmp_path / "ijcnlp_dailydialog.zip"
    with zipfile.ZipFile(outer, "w") as archive:
        archive.write(inner, "ijcnlp_dailydialog/train.zip")
        archive.writestr("ijcnlp_dailydialog/dialogues_text.txt", "other __eou__\n")
        archive.writestr("__MACOSX/ijcnlp_dailydialog/._dialogues_text.txt", "nothing")
    for path in (tmp_path / "plain", inner, outer):
        parts = read_dailydialog(path)
        assert replies(parts.train, NAMES) == [("Hi .", "Hello .", 0, 4), ("What ?", "This !", 6, 1),
                                               ("This !", "Oh .", 1, 5)]  # fmt: skip
        assert parts.val is parts.test is None


@pytest.mark.parametrize(
    ("emotions", "message"),
    [
        ("0 4\n", "has 2 dialogues, .* has 1, expected as many; dialogue 2 .* without its other half"),
        ("0\n", r"has 2 dialogues, .* has 1, .*dialogue 1 \(line 1\) has 2 turns and 1 emotions"),
        ("0 4\n6 1\n", r"do not fit: dialogue 2 \(line 2\) has 3 turns and 2 emotions"),
        ("0 4\n6 x 1\n", "line 2 turn 2: emotion is 'x', expected an id from 0 to 6"),
    ],
)
def test_text_and_emotions_that_do_not_fit_name_counts_and_the_first_dialogue(
    emotions: str, message: str, tmp_path: Path
) -> None:
    write(tmp_path / "dialogues_text.txt", TEXT)
    write(tmp_path / "dialogues_emotion.txt", emotions)
    with pytest.raises(ValueError, match=message):
        read_dailydialog(tmp_path)


def test_a_folder_without_dailydialog_says_what_belongs_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither dialogues_train\.txt and"):
        read_dailydialog(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_dailydialog(tmp_path / "none.zip")
    (tmp_path / "bad.zip").write_bytes(b"PK no")
    with pytest.raises(ValueError, match="truncated or no zip file"):
        read_dailydialog(tmp_path / "bad.zip")


def test_the_emotion_of_a_post_is_that_of_its_last_turn(tmp_path: Path) -> None:
    write(tmp_path / "dailydialog" / "train.jsonl", dialogue(("a", "fear"), ("b", "anger"), ("c", "neutral")) * 5)
    data = DialogueData(source="dailydialog", data_dir=str(tmp_path), context_turns=2)
    batch = data.whole("train")
    assert batch.post_text == ["a", "a [SEP] b"] * 3
    assert batch.post_emotion.argmax(1).tolist() == [3, 1] * 3
    assert batch.reply_emotion.argmax(1).tolist() == [1, 0] * 3
