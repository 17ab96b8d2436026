from __future__ import annotations

import numpy as np
import pytest
import torch

from datamodules.dialogue_rows import DialogueRows, emotion_targets, labels_of, turn_tokens
from datamodules.dialogue_sampling import BalancedSampler
from datamodules.dialogue_vocabulary import SPECIAL_TOKENS, learn_tokenizer, word_tokenizer
from datamodules.loading import Draw, keyed_ids

TEXTS = ["One two three", "", "four five", "six", "seven eight nine ten"]


def rows_of(first: list[int], reply: list[int], max_post: int = 30, max_reply: int = 30) -> DialogueRows:
    tokenizer = learn_tokenizer(TEXTS, 100)
    tokens = turn_tokens(tokenizer, TEXTS)
    count = len(first)
    labels = labels_of(np.arange(count) % 3 - 1, np.zeros(count, dtype=np.int64), 3)
    return DialogueRows(
        "rows", TEXTS, tokens, tokens, np.array(first), np.array(reply), labels, labels, max_post, max_reply
    )


def words(ids: torch.Tensor, row: int) -> str:
    names = {index: word for word, index in learn_tokenizer(TEXTS, 100).get_vocab().items()}
    return " ".join(names[int(index)] for index in ids[row])


@pytest.mark.parametrize(
    ("primary", "secondary", "classes"), [(2, 0, {2}), (0, 0, {0}), (1, 5, {1, 5}), (0, 3, {3}), (1, 1, {1})]
)
def test_targets_follow_the_label_algebra(primary: int, secondary: int, classes: set[int]) -> None:
    targets = emotion_targets(torch.tensor([primary, 4]), torch.tensor([secondary, 0]), 6)
    assert targets.dtype == torch.float32
    assert targets[0].tolist() == [float(value in classes) for value in range(6)]
    assert targets[1].tolist() == [0, 0, 0, 0, 1, 0]


def test_targets_refuse_ids_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"from 0 to 6, but num_emotions=6: expected 0\.\.5"):
        emotion_targets(torch.tensor([0, 6]), torch.tensor([0, 0]), 6)


def test_unknown_emotions_have_no_target_and_a_secondary_one_stands_for_none() -> None:
    labels = labels_of(np.array([-1, 0, 0, 2]), np.array([0, 1, 0, 1]), 3)
    assert labels.classes.tolist() == [-1, 1, 0, 2]
    assert labels.targets.tolist() == [[0, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 1]]


def test_posts_and_replies_are_gathered_with_their_special_words() -> None:
    rows = rows_of([0, 0, 2], [2, 3, 4])
    draw = Draw(torch.tensor([1, 0, 2]), 7)
    batch = rows[draw]
    assert [words(batch.post_ids, row) for row in range(3)] == [
        "one two three [SEP] four five", "one two three [PAD] [PAD] [PAD]", "four five [SEP] six [PAD] [PAD]"
    ]  # fmt: skip
    assert [words(batch.reply_in, row) for row in range(3)] == [
        "[GO] six [PAD] [PAD] [PAD]", "[GO] four five [PAD] [PAD]", "[GO] seven eight nine ten"
    ]  # fmt: skip
    assert [words(batch.reply_out, row) for row in range(3)] == [
        "six [EOS] [PAD] [PAD] [PAD]", "four five [EOS] [PAD] [PAD]", "seven eight nine ten [EOS]"
    ]  # fmt: skip
    assert batch.post_mask.equal(batch.post_ids != 0)
    assert batch.reply_mask.equal(batch.reply_out != 0)
    assert batch.post_ids.dtype == batch.reply_in.dtype == batch.reply_out.dtype == torch.int64
    assert batch.post_emotion_known.tolist() == [True, False, True]
    assert batch.reply_emotion.tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]
    assert batch.keys.equal(keyed_ids(7, draw.indices))
    assert batch.indices.tolist() == [1, 0, 2]
    assert batch.post_text == ["One two three [SEP] four five", "One two three", "four five [SEP] six"]
    assert batch.reply_text == ["six", "four five", "seven eight nine ten"]


def test_long_posts_keep_their_end_and_long_replies_their_start_without_end_of_sequence(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "datamodules.dialogue_rows")
    batch = rows_of([0, 0, 2], [2, 3, 4], max_post=3, max_reply=3)[Draw(torch.arange(3), 0)]
    assert [words(batch.post_ids, row) for row in range(3)] == ["one two three", "[SEP] four five", "five [SEP] six"]
    assert [words(batch.reply_out, row) for row in range(3)] == [
        "four five [EOS]",
        "six [EOS] [PAD]",
        "seven eight nine",
    ]
    assert words(batch.reply_in, 2) == "[GO] seven eight"
    assert "2 of 3 posts (66.7 %) are cut to their last 3 words, 1 replies (33.3 %) to their first 3" in caplog.text


def test_a_post_without_a_reply_has_no_place_that_counts() -> None:
    batch = rows_of([0], [1])[Draw(torch.arange(1), 0)]
    assert batch.reply_mask.tolist() == [[False]]
    assert batch.reply_out.tolist() == [[0]]
    assert words(batch.post_ids, 0) == "one two three"


def test_words_are_lower_case_with_apostrophes_inside_marks_alone_and_digits_as_zero() -> None:
    text = "Don\N{RIGHT SINGLE QUOTATION MARK}t say 'Hi' at 10:30... [GO] [SEP] ok"
    tokenizer = learn_tokenizer([text], 100)
    assert tokenizer.encode(text).tokens == [
        "don't", "say", "'", "hi", "'", "at", "00", ":", "00", ".", ".", ".", "[", "go", "]", "[SEP]", "ok"
    ]  # fmt: skip


def test_a_vocabulary_has_the_most_frequent_words_behind_the_special_tokens() -> None:
    tokenizer = learn_tokenizer(["b b a c c", "d"], 8)
    assert tokenizer.get_vocab() == {word: index for index, word in enumerate((*SPECIAL_TOKENS, "b", "c", "a"))}
    assert tokenizer.encode("d A [PAD]").ids[:2] == [1, 7]
    assert set(learn_tokenizer(["b b a c c"], 8, min_count=2).get_vocab()) == {*SPECIAL_TOKENS, "b", "c"}
    copy = type(tokenizer).from_str(tokenizer.to_str())
    assert copy.encode("c [SEP] b").ids == tokenizer.encode("c [SEP] b").ids == [6, 4, 5]
    assert word_tokenizer().get_vocab_size() == len(SPECIAL_TOKENS)
    with pytest.raises(ValueError, match="no word is left"):
        learn_tokenizer(["a b"], 100, min_count=2)


CLASSES = torch.tensor([0] * 50 + [1] * 7 + [3] * 20 + [-1] * 9)


def drawn(whole: bool, world: int = 1, rank: int = 0, epoch: int = 0, size: int = 8) -> list[Draw]:
    sampler = BalancedSampler(
        CLASSES,
        size // world,
        whole_batches=whole,
        lengths=torch.arange(86) % 11,
        seed=3,
        num_replicas=world,
        rank=rank,
    )
    sampler.set_epoch(epoch)
    return list(sampler)


def test_whole_batches_have_one_class_each_and_all_classes_are_equally_likely() -> None:
    seen = []
    for epoch in range(60):
        batches = drawn(True, epoch=epoch)
        assert [len(batch.indices) for batch in batches] == [8] * 9
        for batch in batches:
            assert len(set(CLASSES[batch.indices].tolist())) == 1
            seen.append(int(CLASSES[batch.indices[0]]))
    shares = torch.bincount(torch.tensor(seen), minlength=4) / len(seen)
    assert shares[[0, 1, 3]].sub(1 / 3).abs().max() < 0.08
    assert shares[2] == 0


def test_mixed_batches_draw_the_class_of_each_row() -> None:
    rows = torch.cat([batch.indices for epoch in range(30) for batch in drawn(False, epoch=epoch)])
    shares = torch.bincount(CLASSES[rows], minlength=4) / len(rows)
    assert shares[[0, 1, 3]].sub(1 / 3).abs().max() < 0.05
    assert any(len(set(CLASSES[batch.indices].tolist())) > 1 for batch in drawn(False))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_a_power_leaves_frequent_classes_frequent(power: float, whole: bool) -> None:
    sampler, rows = BalancedSampler(CLASSES, 8, whole_batches=whole, power=power, seed=3), []
    for epoch in range(120 if whole else 30):
        sampler.set_epoch(epoch)
        rows.extend(batch.indices for batch in sampler)
    drawn_shares = torch.bincount(CLASSES[torch.cat(rows)], minlength=4) / (len(rows) * 8)
    counts = torch.bincount(CLASSES[CLASSES >= 0], minlength=4).double() ** power * torch.tensor([1, 1, 0, 1])
    torch.testing.assert_close(drawn_shares.double(), counts / counts.sum(), atol=0.06, rtol=0)


def test_rows_of_a_class_repeat_only_after_all_of_them() -> None:
    rows = torch.cat([batch.indices for batch in drawn(True)])
    for value in (0, 1, 3):
        counts = torch.bincount(rows[CLASSES[rows] == value], minlength=86)[value == CLASSES]
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("whole", [True, False])
def test_two_processes_see_together_what_one_sees(whole: bool) -> None:
    alone = drawn(whole, epoch=2)
    both = [drawn(whole, 2, rank, 2) for rank in range(2)]
    for one, left, right in zip(alone, *both, strict=True):
        assert one.indices.equal(torch.cat([left.indices, right.indices]))
        assert one.key == left.key == right.key


@pytest.mark.parametrize("whole", [True, False])
def test_an_order_depends_on_the_epoch_and_resumes_in_its_middle(whole: bool) -> None:
    sampler = BalancedSampler(CLASSES, 8, whole_batches=whole, seed=3)
    first = list(sampler)
    sampler.first_batch = 4
    assert all(a.indices.equal(b.indices) for a, b in zip(first[4:], sampler, strict=True))
    sampler.first_batch = 0
    sampler.set_epoch(1)
    assert not all(a.indices.equal(b.indices) for a, b in zip(first, sampler, strict=True))


def test_balanced_batches_have_about_one_length() -> None:
    lengths = torch.arange(86) % 11
    spread = [float(lengths[batch.indices].float().std()) for batch in drawn(False)]
    plain = BalancedSampler(CLASSES, 8, whole_batches=False, seed=3)
    assert sum(spread) < 0.5 * sum(float(lengths[batch.indices].float().std()) for batch in plain)


def test_nothing_to_balance_by_is_refused() -> None:
    with pytest.raises(ValueError, match="no row has a known class"):
        BalancedSampler(torch.full((5,), -1), 2, whole_batches=True)
