from __future__ import annotations

import pytest
import torch

from datamodules import DialogueData

pytestmark = pytest.mark.real


def test_dailydialog_has_the_published_pairs_and_parts_of_whole_dialogues() -> None:
    data = DialogueData(source="dailydialog")
    assert data.label_names[0] == "neutral"
    sizes = [len(data.whole(part).indices) for part in ("train", "val", "test")]
    assert sizes == [66_493, 7_454, 6_976]
    assert sizes[0] + sizes[1] == 84_765 - 10_818
    assert sizes[2] == 7_965 - 989
    assert data.transitions("train").sum() == sizes[0]
    assert data.emotion_counts[0] / sizes[0] == pytest.approx(0.82, abs=0.01)
    assert data.post_vocab_size == 10_000


def test_emocontext_of_the_proof_has_its_rows_of_each_emotion() -> None:
    data = DialogueData(
        source="emocontext", keep_per_class=2_500, eval_per_class=380, eval_from_train=380, max_post_length=20,
        max_reply_length=12, vocab_size=3_500, balance="class",
    )  # fmt: skip
    assert data.label_names == ["others", "happy", "sad", "angry"]
    assert data.emotion_counts.tolist() == [2_500] * 4
    test = data.whole("test")
    assert test.reply_emotion.sum(0).tolist() == [380] * 4
    assert not test.post_emotion_known.any()
    assert test.reply_emotion_known.all()
    assert all(" [SEP] " in post for post in test.post_text[:100])
    assert data.post_vocab_size == 3_500
    assert len(data.train_dataloader()) == 10_000 // 64


def test_emocontext_whole_has_the_published_labels() -> None:
    data = DialogueData(source="emocontext")
    counts = data.emotion_counts + data.whole("val").reply_emotion.sum(0).to(torch.int64)
    assert counts.tolist() == [14_948, 4_243, 5_463, 5_506]
    assert data.whole("test").reply_emotion.sum(0).tolist() == [2_338, 142, 125, 150]


def test_meld_has_the_published_turns() -> None:
    data = DialogueData(source="meld", context_turns=3)
    sizes = [len(data.whole(part).indices) for part in ("train", "val", "test")]
    assert sizes[0] + sizes[1] == 9_989 - 1_038
    assert sizes[2] == 1_109 - 114
    assert data.label_names[4] == "joy"
