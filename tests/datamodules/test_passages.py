from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from lightning import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.trainer.states import TrainerFn

from datamodules.cloze_rows import ClozeRows
from datamodules.cloze_tokenizer import load_tokenizer
from datamodules.loading import Draw, KeyedSampler
from datamodules.passage_pieces import PassageBatch, PassagePieces
from datamodules.passages import PassageData
from datamodules.sources.cloze_sample import QUESTIONS_PER_PASSAGE, cloze_sample
from datamodules.sources.passage_files import read_passages

if TYPE_CHECKING:
    from collections.abc import Sequence

PASSAGES = cloze_sample(60 * QUESTIONS_PER_PASSAGE).articles[::QUESTIONS_PER_PASSAGE]
QUESTIONS = ["Anna wants peace and Boris fears nothing .", "Emma fears debt and Felix wants nothing ."]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("words", lambda: [*PASSAGES, *QUESTIONS, "it is long"])


def whole(pieces: PassagePieces) -> PassageBatch:
    return pieces[Draw(torch.arange(len(pieces)), 0)]


def shown(batch: PassageBatch) -> torch.Tensor:
    """The tokens before any was hidden."""
    return torch.where(batch.labels == -100, batch.input_ids, batch.labels)


def rows_of(batch: PassageBatch) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(shown(batch), batch.attention_mask, strict=True)]


def test_a_short_passage_is_what_the_tokenizer_makes_of_it(tokenizer: Any) -> None:
    pieces = PassagePieces(PASSAGES, tokenizer)
    batch = whole(pieces)
    expected = tokenizer(PASSAGES, padding=True, return_tensors="pt")
    assert torch.equal(shown(batch), expected["input_ids"])
    assert torch.equal(batch.attention_mask, expected["attention_mask"])
    assert torch.equal(batch.token_type_ids, expected["token_type_ids"])
    assert torch.equal(pieces.lengths, expected["attention_mask"].sum(1))
    assert {field.dtype for field in batch} == {torch.int64}


@pytest.mark.parametrize("max_length", [3, 9, 21, 64])
def test_long_passages_give_pieces_of_about_equal_length_and_lose_nothing(tokenizer: Any, max_length: int) -> None:
    pieces = PassagePieces(PASSAGES, tokenizer, max_length=max_length)
    rows = rows_of(whole(pieces))
    inner = [row[1:-1] for row in rows]
    texts = tokenizer(PASSAGES, add_special_tokens=False)["input_ids"]
    assert [token for piece in inner for token in piece] == [token for text in texts for token in text]
    assert all(row[0] == tokenizer.cls_token_id and row[-1] == tokenizer.sep_token_id for row in rows)
    assert max(map(len, rows)) <= max_length
    start = 0
    for text in texts:
        count = -(-len(text) // (max_length - 2))
        sizes = [len(piece) for piece in inner[start : start + count]]
        assert sum(sizes) == len(text)
        assert max(sizes) - min(sizes) <= 1
        start += count
    assert start == len(rows)


def asked(counts: Sequence[int]) -> list[list[str]]:
    return [[f"{QUESTIONS[number % 2]} it is {'long ' * number}" for number in range(count)] for count in counts]


def test_each_piece_and_each_question_is_in_a_sequence_of_the_pair_template(tokenizer: Any) -> None:
    counts = [0, 1, 5, 2] * 4
    passages, questions = PASSAGES[: len(counts)], asked(counts)
    pieces = PassagePieces(passages, tokenizer, max_length=40, questions=questions)
    batch = whole(pieces)
    assert batch.input_ids.shape[1] <= 40
    rows, start = rows_of(batch), 0
    for passage, several in zip(passages, questions, strict=True):
        text = tokenizer(passage, add_special_tokens=False)["input_ids"]
        seconds = [tokenizer(question, add_special_tokens=False)["input_ids"] for question in several]
        room = 40 - (3 + max(map(len, seconds)) if seconds else 2)
        count = -(-len(text) // room)
        own = rows[start : start + max(count, len(seconds))]
        types = batch.token_type_ids[start : start + len(own)]
        found = []
        for number, (row, kinds) in enumerate(zip(own, types, strict=True)):
            first, *rest = _split(row, tokenizer.sep_token_id)
            found.append(first[1:])
            assert rest == ([seconds[number % len(seconds)]] if seconds else [])
            ends = len(first) + 1
            assert not kinds[:ends].any()
            assert kinds[ends : len(row)].all()
        assert [token for piece in found[:count] for token in piece] == text
        assert all(piece == found[number % count] for number, piece in enumerate(found))
        start += len(own)
    assert start == len(rows)
    assert pieces.lengths.tolist() == [len(row) for row in rows]


def _split(row: list[int], separator: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in row:
        if token == separator:
            parts.append([])
        else:
            parts[-1].append(token)
    assert parts[-1] == []
    return parts[:-1]


def test_what_is_hidden_depends_on_key_and_sequence_and_not_on_the_batch(tokenizer: Any) -> None:
    pieces = PassagePieces(PASSAGES, tokenizer)
    every = whole(pieces)
    rows = torch.tensor([7, 41, 3])
    some = pieces[Draw(rows, 0)]
    width = some.input_ids.shape[1]
    for one, other in zip(some, every, strict=True):
        assert torch.equal(one, other[rows, :width])
    again, other_key = whole(pieces), pieces[Draw(torch.arange(len(pieces)), 1)]
    assert torch.equal(again.labels, every.labels)
    assert not torch.equal(other_key.labels, every.labels)
    fixed = PassagePieces(PASSAGES, tokenizer, key=0)
    assert torch.equal(fixed[Draw(torch.arange(len(pieces)), 1)].labels, every.labels)


def test_tokens_are_chosen_and_replaced_in_the_proportions_of_bert(tokenizer: Any) -> None:
    pieces = PassagePieces(PASSAGES, tokenizer, mlm_probability=0.3)
    draws = [pieces[Draw(torch.arange(len(pieces)), key)] for key in range(30)]
    special = torch.tensor(tokenizer.all_special_ids)
    kept, masked, changed, chosen, total = 0, 0, 0, 0, 0
    places = torch.zeros_like(draws[0].labels)
    for batch in draws:
        assert not torch.isin(batch.labels[batch.labels != -100], special).any()
        hidden = batch.labels != -100
        assert torch.equal(batch.input_ids[~hidden], shown(batch)[~hidden])
        places += hidden
        chosen += int(hidden.sum())
        total += int((~torch.isin(shown(batch), special)).sum())
        masked += int((batch.input_ids[hidden] == tokenizer.mask_token_id).sum())
        kept += int((batch.input_ids[hidden] == batch.labels[hidden]).sum())
        others = batch.input_ids[hidden & (batch.input_ids != batch.labels)]
        changed += int((others != tokenizer.mask_token_id).sum())
        assert int(batch.input_ids.max()) < len(tokenizer)
    assert chosen / total == pytest.approx(0.3, abs=0.01)
    vocabulary = len(tokenizer)
    assert masked / chosen == pytest.approx(0.8 + 0.1 / vocabulary, abs=0.01)
    assert changed / chosen == pytest.approx(0.1 * (1 - 2 / vocabulary), abs=0.01)
    assert kept / chosen == pytest.approx(0.1 + 0.1 / vocabulary, abs=0.01)
    counts = places[:, 1:20]
    assert float(counts.double().var()) == pytest.approx(30 * 0.3 * 0.7, rel=0.2), "draws are independent"


def test_every_sequence_has_something_to_predict(tokenizer: Any) -> None:
    batch = whole(PassagePieces(PASSAGES, tokenizer, max_length=4, mlm_probability=0.01))
    assert ((batch.labels != -100).sum(1) >= 1).all()
    assert ((batch.labels != -100).sum(1) == 1).double().mean() > 0.95


def test_unknown_words_are_not_asked_for_and_empty_passages_are_counted(tokenizer: Any) -> None:
    pieces = PassagePieces(["zebra zebra zebra Anna", " ", "It was Anna."], tokenizer, mlm_probability=0.99)
    batch = whole(pieces)
    assert pieces.left_out == 1
    assert len(pieces) == 2
    assert (batch.labels[0] != -100).sum() == 1
    assert batch.labels[0][4] == tokenizer.convert_tokens_to_ids("anna")
    with pytest.raises(ValueError, match="none of the 2 passages has a token"):
        PassagePieces([" ", ""], tokenizer)


def test_too_little_room_and_a_tokenizer_without_mask_are_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="max_length=2 leaves 0 tokens to passages beside 2 special tokens and 0"):
        PassagePieces(PASSAGES, tokenizer, max_length=2)
    with pytest.raises(ValueError, match=r"max_length=26 leaves 15 tokens .* beside 3 special tokens and 8 of a q"):
        PassagePieces(PASSAGES[:1], tokenizer, max_length=26, questions=[QUESTIONS[:1]])
    PassagePieces(PASSAGES[:1], tokenizer, max_length=27, questions=[QUESTIONS[:1]])
    bare = load_tokenizer("words", lambda: PASSAGES)
    bare.mask_token = None
    with pytest.raises(ValueError, match="has no mask token"):
        PassagePieces(PASSAGES, bare)


def test_two_processes_see_what_one_sees(tokenizer: Any) -> None:
    pieces = PassagePieces(PASSAGES, tokenizer)
    options = {"shuffle": True, "equal": True, "seed": 3}
    one = [pieces[draw] for draw in KeyedSampler(len(pieces), 8, **options, num_replicas=1, rank=0)]
    two = [
        [pieces[draw] for draw in KeyedSampler(len(pieces), 4, **options, num_replicas=2, rank=rank)]
        for rank in range(2)
    ]
    for global_batch, *parts in zip(one, *two, strict=True):
        low = 0
        for part in parts:
            width, count = part.input_ids.shape[1], len(part.input_ids)
            assert torch.equal(global_batch.input_ids[low : low + count, :width], part.input_ids)
            assert torch.equal(global_batch.labels[low : low + count, :width], part.labels)
            low += count
        assert low == len(global_batch.input_ids)


class Recorder(BoringModel):
    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[list[torch.Tensor]]] = {"train": [], "val": []}

    def on_train_epoch_start(self) -> None:
        self.seen["train"].append([])

    def on_validation_epoch_start(self) -> None:
        self.seen["val"].append([])

    def training_step(self, batch: PassageBatch, batch_idx: int) -> torch.Tensor:  # type: ignore[override]
        self.seen["train"][-1].append(batch.labels)
        return self.layer(torch.ones(1, 32)).sum()

    def validation_step(self, batch: PassageBatch, batch_idx: int) -> None:  # type: ignore[override]
        self.seen["val"][-1].append(batch.labels)


def fitted(tmp_path: Path) -> dict[str, list[list[torch.Tensor]]]:
    model = Recorder()
    trainer = Trainer(
        default_root_dir=tmp_path, max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(model, datamodule=PassageData(sample_passages=40, batch_size=16, tokenizer="words", seed=1))
    return model.seen


def test_training_masks_are_new_in_every_epoch_and_validation_masks_stay(tmp_path: Path) -> None:
    seen, again = fitted(tmp_path), fitted(tmp_path)
    first, second = ([batch.flatten().tolist() for batch in epoch] for epoch in seen["train"])
    assert sorted(first) != sorted(second)
    assert [batch.tolist() for epoch in again["train"] for batch in epoch] == [
        batch.tolist() for epoch in seen["train"] for batch in epoch
    ]
    assert all(torch.equal(*pair) for pair in zip(*seen["val"], strict=True))
    assert len(first) == -(-36 * QUESTIONS_PER_PASSAGE // 16)
    assert sum(len(batch) for batch in seen["train"][0]) == 36 * QUESTIONS_PER_PASSAGE


def test_the_split_is_by_passage_and_the_same_for_every_seed() -> None:
    parts = [PassageData(sample_passages=50, seed=seed)._texts for seed in (0, 1)]
    assert parts[0] == parts[1]
    train, held = parts[0]["fit"].passages, parts[0]["validate"].passages
    assert len(train), len(held) == (45, 5)
    assert sorted(train + held) == sorted(cloze_sample(50 * QUESTIONS_PER_PASSAGE).articles[::QUESTIONS_PER_PASSAGE])
    assert parts[0]["test"] == parts[0]["validate"]


def test_the_vocabulary_of_the_sample_has_every_word_of_its_questions() -> None:
    data = PassageData(tokenizer="words", sample_passages=100)
    rows = cloze_sample(600, part="test")
    questions = [
        question.replace("@placeholder", " ".join(offered))
        for question, offered in zip(rows.questions, rows.options, strict=True)
    ]
    ids = data.tokenizer([*rows.articles, *questions])["input_ids"]
    assert data.tokenizer.unk_token_id not in {token for row in ids for token in row}
    assert data.vocab_size == len(data.tokenizer)


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    if path.suffix == ".parquet":
        import pandas as pd

        pd.DataFrame(rows).to_parquet(path)
        return path
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind in (".csv", ".tsv"):
        separator = "," if kind == ".csv" else "\t"
        lines = [separator.join(rows[0]), *(separator.join(f'"{cell}"' for cell in row.values()) for row in rows)]
    elif kind == ".txt":
        lines = [row["text"] for row in rows]
    else:
        lines = [json.dumps(row) for row in rows]
    content = b"\xef\xbb\xbf" + "\r\n".join([*lines, ""]).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize(
    "name", ["a.txt", "a.txt.gz", "a.jsonl", "a.json.gz", "a.csv", "a.csv.gz", "a.tsv", "a.parquet"]
)
def test_passages_are_read_from_each_format(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = ["Anna drinks tea, maybe.", "Boris carries maps.", "Anna drinks tea, maybe."]
    path = write(tmp_path / name, [{"text": text, "source": "me"} for text in texts])
    with caplog.at_level(logging.INFO, "datamodules.sources.passage_files"):
        assert read_passages(path) == texts[:2]
    assert "1 of 3 passages are there before" in caplog.text


def test_a_text_file_may_have_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("One\n two.\n \n\nThree.\n")
    assert read_passages(path) == ["One", "two.", "Three."]
    assert read_passages(path, paragraphs=True) == ["One two.", "Three."]


def test_bad_files_are_refused_with_file_and_line(tmp_path: Path) -> None:
    def refuse(name: str, content: str | bytes, message: str) -> None:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError, match=message):
            read_passages(path)

    refuse("empty.txt", "\n \n", r"empty.txt is empty, expected one passage per line")
    refuse("latin.txt", b"one\ncaf\xe9\n", r"latin.txt line 2: byte 0xe9 is not UTF-8")
    refuse("a.jsonl", '{"text": "x"}\n{"body": "y"}\n', r"a.jsonl, line 2: no 'text', only 'body'; name the column")
    refuse("a.jsonl", '{"text": "x"}\n\n{"text": 3}\n', r"a.jsonl, line 3: text is 3, expected a text")
    refuse("a.csv", "text,b\n ,1\n", r"a.csv, line 2: text is ' ', expected a text that is not blank")
    refuse("a.csv", "text,b\n", r"a.csv has no rows")
    refuse("a.doc", "x", r"ends in '.doc', expected .txt")
    refuse("cut.txt.gz", gzip.compress(b"one\ntwo\n")[:-4], r"cut.txt.gz is truncated")
    table = write(tmp_path / "a.parquet", [{"body": "x"}])
    with pytest.raises(ValueError, match=r"a.parquet: no 'text', only 'body'"):
        read_passages(table)
    with pytest.raises(FileNotFoundError, match=r"missing.txt does not exist"):
        read_passages(tmp_path / "missing.txt")
    with pytest.raises(ValueError, match=r"paragraphs=True is for .txt files"):
        read_passages(table, paragraphs=True)


def test_own_passages_train_and_other_ones_are_tested(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [{"body": text, "x": "1"} for text in PASSAGES])
    test = write(tmp_path / "b.txt", [{"text": "Anna drinks zebra."}])
    data = PassageData(path=str(path), test_path=str(test), text_column="body", tokenizer="words", max_length=16)
    data.setup("fit")
    data.setup("test")
    (batch,) = data.test_dataloader()
    assert data.tokenizer.unk_token_id in rows_of(batch)[0]
    assert sum(len(batch.input_ids) for batch in data.val_dataloader()) > 6


def test_a_passage_of_the_sample_has_its_own_questions_with_the_gold_word() -> None:
    rows = cloze_sample(50 * QUESTIONS_PER_PASSAGE)
    filled = [
        (article, question.replace("@placeholder", options[label]))
        for article, question, options, label in zip(
            rows.articles, rows.questions, rows.options, rows.labels.tolist(), strict=True
        )
    ]
    texts = PassageData(sample_passages=50)._texts
    found = [
        (passage, question)
        for part in ("fit", "validate")
        for passage, questions in zip(*texts[part], strict=True)
        for question in questions
    ]
    assert sorted(found) == sorted(filled)
    assert not any(PassageData(sample_passages=50, questions=False)._texts["fit"].questions)


def rows_about(articles: list[str], name: str) -> ClozeRows:
    count = len(articles)
    return ClozeRows(
        name, articles, [f"{name} saw @placeholder ." for _ in articles], [["one", "two"]] * count,
        np.ones(count, dtype=np.int64), [str(row) for row in range(count)], [f"{name} {row}" for row in range(count)],
    )  # fmt: skip


def test_filled_training_questions_follow_their_passages_and_none_of_held_out_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from datamodules.sources import recam

    texts = PASSAGES[:20]
    parts = {
        "train": rows_about([texts[0], texts[1].upper(), texts[1], texts[5]], "train"),
        "validation": rows_about([texts[5], texts[6]], "dev"),
        "test": None,
    }
    monkeypatch.setattr(recam, "passages", lambda folder: list(texts))
    monkeypatch.setattr(recam, "read_recam", lambda folder, subtask, part: parts[part])
    data = PassageData(source="recam", questions=True)
    both = [*zip(*data._texts["fit"], strict=True), *zip(*data._texts["validate"], strict=True)]
    found = {passage: questions for passage, questions in both if questions}
    assert found == {texts[0]: ["train saw two ."], texts[1]: ["train saw two ."] * 2}
    assert not any(PassageData(source="recam")._texts["fit"].questions)
    data.setup("fit")
    total = sum(len(batch.input_ids) for part in ("fit", "validate") for batch in [whole(data._tokenised(part))])
    assert total == 21


def test_a_checkpoint_of_another_tokenizer_is_refused() -> None:
    data = PassageData(sample_passages=20, tokenizer="words")
    state = data.state_dict()
    data.load_state_dict(state)
    with pytest.raises(ValueError, match=r"another tokenizer .*--data.tokenizer RUN_FOLDER/tokenizer"):
        PassageData(sample_passages=20, tokenizer="words", tokenizer_size=40).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "wiki"}, "source must be one of embedded, recam, files, got 'wiki'"),
        ({"source": "files"}, "source='files' needs path"),
        ({"source": "recam", "path": "a.txt"}, "contradict each other"),
        ({"questions": True, "path": "a.txt"}, "questions=True is for ReCAM and the embedded sample"),
        ({"data_dir": "x"}, "data_dir holds ReCAM's files, but source='embedded'"),
        ({"subtask": 3, "source": "recam"}, "subtask must be one of 1, 2, got 3"),
        ({"mlm_probability": 0.0}, "mlm_probability must lie between 0 and 1, got 0.0"),
        ({"validation_fraction": 1.0}, "validation_fraction must lie between 0 and 1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_length": 4}, "max_length must be at least 8, got 4"),
        ({"eval_batch_size": 0}, "eval_batch_size must be at least 1, got 0"),
        ({"sample_passages": 1}, "sample_passages must be at least 2, got 1"),
        ({"tokenizer_size": 31}, "tokenizer_size must be at least 32, got 31"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"validation_fraction": 0.0}, "validation_fraction must lie between 0 and 1, got 0.0"),
        ({"mlm_probability": 1.0}, "mlm_probability must lie between 0 and 1, got 1.0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PassageData(**options)


def test_the_log_calls_a_part_by_its_name_and_evaluation_has_short_sequences_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.txt", [{"text": text} for text in [*PASSAGES, "... !"]])
    data = PassageData(path=str(path), test_path=str(path), tokenizer="words", eval_batch_size=7)
    # Punctuation is a word as any other; without it the last passage has no token.
    data.tokenizer.backend_tokenizer.normalizer = _without_punctuation()
    data.setup(TrainerFn.TESTING)
    assert "files: 1 of 61 test passages have no token of the tokenizer and are left out" in caplog.text
    batches = list(data.test_dataloader())
    assert [len(batch.input_ids) for batch in batches] == [7] * 8 + [4]
    lengths = torch.cat([batch.attention_mask.sum(1) for batch in batches]).tolist()
    assert lengths == sorted(lengths)


def _without_punctuation() -> Any:
    from tokenizers import Regex, normalizers

    return normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex("[.!]"), "")])


def test_a_single_passage_is_too_little(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", [{"text": "Anna drinks tea."}])
    with pytest.raises(ValueError, match=r"a.txt: 1 passages leave none to train on"):
        PassageData(path=str(path)).setup("fit")


@pytest.mark.real
def test_recams_passages_and_questions_are_read() -> None:
    data = PassageData(source="recam", questions=True, tokenizer="words", tokenizer_size=2_000, max_length=128)
    data.setup("fit")
    questions = sum(map(len, data._texts["fit"].questions))
    assert len(data._texts["fit"].passages) > 4_000
    assert questions > 1_500
    assert int(data._tokenised("fit").lengths.max()) <= 128
