from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tokenizers import Tokenizer

from datamodules import DialogueData
from datamodules.dialogue_sampling import BalancedSampler
from datamodules.sources.dialogue_sample import ANSWERS, FEELINGS, TOPICS, reply_emotion

if TYPE_CHECKING:
    from pathlib import Path

    from datamodules.loading import BatchLoader

SMALL: dict[str, Any] = {"sample_pairs": 200, "batch_size": 16}


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def pairs_file(path: Path, count: int = 40, emotions: tuple[str, ...] = ("0", "1")) -> str:
    lines = (f"post w{row}\treply\t{emotions[0]}\t{emotions[row % len(emotions)]}" for row in range(count))
    return write(path, *lines)


def test_the_sample_has_a_reply_emotion_that_takes_both_topic_and_feeling() -> None:
    data = DialogueData()
    assert [len(data.whole(part).indices) for part in ("train", "val", "test")] == [1_600, 200, 200]
    assert data.label_names == ["neutral", "happy", "sad", "angry"]
    assert data.num_emotions == 4
    assert 100 <= data.post_vocab_size == data.reply_vocab_size <= 170
    batch = data.whole("train")
    kinds = {topic: kind for kind, topics in enumerate(TOPICS) for topic in topics}
    feelings = {word: emotion for emotion, words in enumerate(FEELINGS) for word in words}
    for row, (post, reply) in enumerate(zip(batch.post_text, batch.reply_text, strict=True)):
        kind = next(kinds[word] for word in post.split() if word in kinds)
        emotion = next(feelings[word] for word in post.split() if word in feelings)
        felt = reply_emotion(kind, emotion)
        assert batch.post_emotion[row].argmax() == emotion
        assert batch.reply_emotion[row].argmax() == felt
        assert any(word in reply for word in ANSWERS[felt])
    shares = data.transitions("train") / data.transitions("train").sum(1, keepdim=True)
    assert shares.sub(0.25).abs().max() < 0.06
    assert len({*batch.post_text, *data.whole("test").post_text, *data.whole("val").post_text}) == 2_000


def test_the_rule_of_the_sample_is_a_latin_square() -> None:
    table = torch.tensor([[reply_emotion(kind, emotion) for emotion in range(4)] for kind in range(4)])
    assert table.sort(0).values.equal(table.sort(1).values.T)
    assert table.sort(1).values.eq(torch.arange(4)).all()


def test_loaders_give_every_pair_once_and_evaluation_in_the_order_of_length() -> None:
    data = DialogueData(**SMALL, eval_batch_size=7, seed=3)
    loader = data.train_dataloader()
    first = torch.cat([batch.indices for batch in loader])
    assert first.sort().values.equal(torch.arange(160))
    loader.sampler.set_epoch(1)
    assert not first.equal(torch.cat([batch.indices for batch in loader]))
    test = list(data.test_dataloader())
    assert torch.cat([batch.indices for batch in test]).sort().values.equal(torch.arange(20))
    lengths = torch.cat([batch.post_mask.sum(1) + batch.reply_mask.sum(1) for batch in test])
    assert lengths.equal(lengths.sort().values)


def test_batches_of_one_class_have_one_reply_emotion() -> None:
    data = DialogueData(**SMALL, balance="class", seed=1)
    seen = set()
    for batch in data.train_dataloader():
        emotions = set(batch.reply_emotion.argmax(1).tolist())
        assert len(emotions) == 1
        seen |= emotions
    assert len(seen) > 1


def test_the_power_of_balance_reaches_the_sampler() -> None:
    data = DialogueData(**SMALL, balance="mixed", balance_power=1.0)
    sampler = data.train_dataloader().sampler
    assert isinstance(sampler, BalancedSampler)
    assert sampler.weights.equal(data.emotion_counts[data.emotion_counts > 0].float())
    assert data.emotion_counts.unique().numel() > 1


@pytest.mark.parametrize("balance", ["none", "class", "mixed"])
def test_a_resumed_loader_continues_in_the_middle_of_its_epoch(balance: str) -> None:
    def loader() -> BatchLoader:
        return DialogueData(**SMALL, balance=balance, seed=5).train_dataloader()

    whole, stopped, resumed = loader(), loader(), loader()
    whole.sampler.set_epoch(3)
    stopped.sampler.set_epoch(3)
    batches = iter(stopped)
    seen = [next(batches) for _ in range(4)]
    resumed.load_state_dict(stopped.state_dict())
    seen += resumed
    assert len(seen) == 10
    for batch, expected in zip(seen, whole, strict=True):
        assert batch.indices.equal(expected.indices)
        assert batch.keys.equal(expected.keys)


def test_the_vocabulary_is_of_the_training_part_alone(tmp_path: Path) -> None:
    data = DialogueData(path=pairs_file(tmp_path / "pairs.tsv"), min_count=1)
    words = set(data.post_tokenizer.get_vocab())
    # Digits become 0, so posts differ by words of one letter more.
    assert {"post", "reply", "w0", "w00"} <= words
    lines = [f"post {chr(97 + row)}{chr(97 + row)}\treply" for row in range(20)]
    data = DialogueData(path=write(tmp_path / "words.tsv", *lines), label_names=["no", "yes"])
    train = {word for text in data.whole("train").post_text for word in text.split()}
    held = {word for part in ("val", "test") for text in data.whole(part).post_text for word in text.split()}
    assert train <= set(data.post_tokenizer.get_vocab())
    assert not (held - train) & set(data.post_tokenizer.get_vocab())
    assert (data.whole("test").post_ids == 1).any()


def test_separate_vocabularies_have_their_own_words() -> None:
    data = DialogueData(**SMALL, share_vocab=False, reply_vocab_size=20)
    assert data.reply_vocab_size == 20 < data.post_vocab_size
    assert data.post_tokenizer is not data.reply_tokenizer
    assert "feel" in data.post_tokenizer.get_vocab()
    assert "feel" not in data.reply_tokenizer.get_vocab()
    shared = DialogueData(**SMALL)
    assert shared.post_tokenizer is shared.reply_tokenizer


def test_a_checkpoint_of_other_words_is_refused_and_a_test_file_changes_none(tmp_path: Path) -> None:
    data = DialogueData(**SMALL)
    state = data.state_dict()
    again = Tokenizer.from_str(state["post_tokenizer"])
    assert again.get_vocab() == data.post_tokenizer.get_vocab()
    other = write(tmp_path / "new.tsv", "a new post\ta reply\thappy\tsad", "i am glad\tokay\t\t3")
    tested = DialogueData(**SMALL, test_path=other)
    tested.load_state_dict(state)
    batch = tested.whole("test")
    assert batch.post_text == ["a new post", "i am glad"]
    assert batch.reply_emotion.argmax(1).tolist() == [2, 3]
    assert batch.post_emotion_known.tolist() == [True, False]
    with pytest.raises(ValueError, match="trained with other words"):
        DialogueData(sample_pairs=200, vocab_size=30).load_state_dict(state)


def test_posts_to_answer_come_one_a_line_and_empty_ones_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "datamodules")
    path = write(tmp_path / "posts.txt", "i am glad", "", "the exam [SEP] was gloomy")
    data = DialogueData(**SMALL, predict_path=path)
    batch = next(iter(data.predict_dataloader()))
    assert sorted(batch.post_text) == ["i am glad", "the exam [SEP] was gloomy"]
    assert not batch.reply_mask.any()
    assert not batch.reply_emotion_known.any()
    assert (batch.post_ids == 4).sum() == 1
    assert "1 of 3 pairs are dropped, 1 without a word in the post" in caplog.text
    assert data.whole("test").indices.equal(DialogueData(**SMALL).whole("predict").indices)


def test_pairs_of_one_post_are_in_one_part(tmp_path: Path) -> None:
    lines = [f"post {row % 12}\treply {row}" for row in range(60)]
    data = DialogueData(path=write(tmp_path / "pairs.txt", *lines), label_names=["no", "yes"], val_share=0.2)
    parts = [set(data.whole(part).post_text) for part in ("train", "val", "test")]
    assert [len(posts) for posts in parts] == [8, 2, 2]
    assert not (parts[0] & parts[1]) | (parts[0] & parts[2]) | (parts[1] & parts[2])
    whole = DialogueData(path=str(tmp_path / "pairs.txt"), label_names=["no", "yes"], test_share=0)
    assert len(whole.whole("train").indices) == 55
    with pytest.raises(ValueError, match="nothing for test: give test_path"):
        whole.whole("test")


def test_emotions_of_a_table_are_names_or_numbers(tmp_path: Path) -> None:
    named = DialogueData(path=pairs_file(tmp_path / "names.tsv", emotions=("sad", "other", "joy")))
    assert named.label_names == ["other", "joy", "sad"]
    numbered = DialogueData(path=pairs_file(tmp_path / "ids.tsv", emotions=("2", "0")))
    assert numbered.label_names == ["0", "1", "2"]
    more = DialogueData(path=str(tmp_path / "ids.tsv"), num_emotions=5)
    assert more.num_emotions == 5
    given = DialogueData(path=str(tmp_path / "ids.tsv"), label_names=["none", "good", "bad"])
    assert given.label_names == ["none", "good", "bad"]


def test_more_ids_than_emotions_name_the_largest(tmp_path: Path) -> None:
    data = DialogueData(path=pairs_file(tmp_path / "ids.tsv", emotions=("1", "7", "3")), num_emotions=4)
    with pytest.raises(ValueError, match=r"ids\.tsv line 2 reply: emotion id 7 is the largest, but num_emotions=4"):
        data.setup("fit")


def test_an_unknown_emotion_names_the_row_and_the_known_ones(tmp_path: Path) -> None:
    lines = ["a\tb\tgood\tgood", "c\td\tbad\tugly"]
    data = DialogueData(path=write(tmp_path / "x.tsv", *lines), label_names=["good", "bad"])
    with pytest.raises(ValueError, match=r"x\.tsv line 2 reply: unknown emotion 'ugly', expected one of good, bad$"):
        data.setup("fit")
    held = write(tmp_path / "test.tsv", "a\tb\thappy\tjoyous")
    data = DialogueData(path=pairs_file(tmp_path / "y.tsv", emotions=("happy", "other")), test_path=held)
    with pytest.raises(
        ValueError, match=r"test\.tsv line 1 reply: unknown emotion 'joyous'.*those of the training file"
    ):
        data.setup("test")


def test_pairs_without_words_are_counted_and_nothing_left_is_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "datamodules")
    lines = [f"post {chr(97 + row)}\treply" for row in range(10)]
    path = write(tmp_path / "x.tsv", " \treply", "post\t ", *lines)
    data = DialogueData(path=path, label_names=["no", "yes"])
    assert sum(len(data.whole(part).indices) for part in ("train", "val", "test")) == 10
    assert "2 of 12 pairs are dropped, 1 without a word in the post, 1 without one in the reply" in caplog.text
    path = write(tmp_path / "empty.tsv", " \treply", "post\t ")
    with pytest.raises(ValueError, match="none of 2 pairs of post and reply in 2 dialogues has a word on both sides"):
        DialogueData(path=path, label_names=["no", "yes"]).setup("fit")


@pytest.mark.parametrize("balance", ["class", "mixed"])
def test_an_emotion_without_a_training_reply_is_warned_of_once(
    balance: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = pairs_file(tmp_path / "x.tsv", emotions=("0", "2"))
    data = DialogueData(path=path, label_names=["a", "b", "c", "d"], balance=balance, batch_size=4)
    data.setup("fit")
    list(data.train_dataloader())
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sum("no training reply has the emotions b, d" in message for message in warnings) == 1
    assert data.emotion_counts.tolist()[1::2] == [0, 0]


def test_training_and_evaluation_keep_so_many_of_each_reply_emotion(tmp_path: Path) -> None:
    path = pairs_file(tmp_path / "x.tsv", 200, ("0", "0", "0", "1"))
    options: dict[str, Any] = {"path": path, "label_names": ["a", "b"], "keep_per_class": 20, "eval_per_class": 3}
    data = DialogueData(**options)
    assert data.emotion_counts.tolist() == [20, 20]
    for part in ("val", "test"):
        assert data.whole(part).reply_emotion.sum(0).max() == 3
    assert data.whole("train").post_text == DialogueData(**options).whole("train").post_text
    assert data.whole("train").post_text != DialogueData(**options, subset_seed=1).whole("train").post_text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "nowhere"}, "source must be one of embedded, dailydialog"),
        ({"balance": "all"}, "balance must be one of none, class, mixed"),
        ({"balance": "mixed", "balance_power": 1.5}, "balance_power must be from 0 to 1"),
        ({"balance_power": 0.5}, "balance_power=0.5 needs balance"),
        ({"source": "tsv"}, "needs path"),
        ({"path": "x.csv"}, "say what it is in source"),
        ({"path": "x.tsv", "source": "embedded"}, "contradict each other"),
        ({"data_dir": "/tmp"}, "data_dir holds published sets"),
        ({"reply_vocab_size": 100}, "needs share_vocab=False"),
        ({"eval_from_train": 5}, "fills up to eval_per_class"),
        ({"val_share": 0.0}, "val_share must be between 0 and 1"),
        ({"test_share": 1.0}, "test_share must be at least 0 and below 1"),
        ({"max_reply_length": 0}, "max_reply_length must be at least 1"),
        ({"vocab_size": 5}, "vocab_size must be at least 6"),
        ({"num_emotions": 3}, "has its own emotions"),
        ({"path": "x.tsv", "label_names": ["a", "a"]}, "expected different names"),
        ({"path": "x.tsv", "label_names": ["a", "b"], "num_emotions": 3}, "as many as emotions"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DialogueData(**options)


def test_a_part_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="part must be one of train, val, test, predict"):
        DialogueData(**SMALL).whole("training")
