from __future__ import annotations

import math

import pytest
import torch

from tests.zoo.eacm.dialogues import NUM_EMOTIONS, WORDS, dialogues, widened
from zoo.eacm.encoder import PostEncoder
from zoo.eacm.pooling import SelfAttentionPooling, masked_softmax
from zoo.eacm.selector import EmotionSelector, class_index, emotion_losses

SMALL = {"vocab_size": WORDS, "num_emotions": NUM_EMOTIONS, "hidden_size": 8, "num_layers": 2, "embedding_size": 6}


def test_a_pooling_without_scores_is_the_masked_mean() -> None:
    pooling = SelfAttentionPooling(8)
    torch.nn.init.zeros_(pooling.score.weight)
    states, mask = torch.randn(3, 5, 8), torch.arange(5) < torch.tensor([5, 2, 1])[:, None]
    pooled, weights = pooling(states, mask)
    torch.testing.assert_close(pooled, (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
    assert weights[~mask].eq(0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(3))


def test_a_row_without_places_has_no_weights_and_no_nan() -> None:
    weights = masked_softmax(torch.randn(2, 3), torch.tensor([[True, False, True], [False] * 3]))
    assert weights[1].eq(0).all()
    assert weights[0, 1] == 0
    assert weights.isfinite().all()


def test_pooling_is_the_equation_written_out() -> None:
    pooling = SelfAttentionPooling(4)
    states = torch.randn(1, 3, 4)
    scores = torch.stack([pooling.score.weight[0] @ torch.tanh(pooling.project.weight @ h) for h in states[0]])
    pooled, weights = pooling(states, torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(weights[0], scores.softmax(0))
    torch.testing.assert_close(pooled[0], scores.softmax(0) @ states[0])


def test_an_encoder_reads_each_post_as_if_it_were_alone() -> None:
    encoder = PostEncoder(WORDS, 6, 8, num_layers=2)
    batch = dialogues()
    states, finals = encoder(batch.post_ids, batch.post_mask)
    for row, length in enumerate(batch.post_mask.sum(1).tolist()):
        own = encoder.embedding(batch.post_ids[row : row + 1, :length])
        for layer, gru in enumerate(encoder.layers):
            own, last = gru(own)
            torch.testing.assert_close(finals[row, layer], last[0, 0])
        torch.testing.assert_close(states[row, :length], own[0])


@pytest.mark.parametrize("reads", ["both", "emotion", "semantic"])
def test_padding_changes_no_choice(reads: str) -> None:
    selector = EmotionSelector(**SMALL, reads=reads).eval()
    batch = dialogues()
    wide = widened(batch)
    one, two = selector(batch.post_ids, batch.post_mask), selector(wide.post_ids, wide.post_mask)
    torch.testing.assert_close(one.reply_logits, two.reply_logits, atol=1e-6, rtol=0)
    assert (one.post_logits is None) == (reads == "semantic")
    assert (one.gate is None) == (reads != "both")


def test_a_gate_of_zeros_takes_half_of_each_side() -> None:
    selector = EmotionSelector(**SMALL)
    assert selector.gate is not None
    for weight in selector.gate.parameters():
        torch.nn.init.zeros_(weight)
    emotion, semantic = torch.randn(2, 4, 8)
    fused, gate = selector.fuse(emotion, semantic)
    torch.testing.assert_close(fused, 0.5 * (emotion.tanh() + semantic.tanh()))
    assert gate.eq(0.5).all()


def test_the_gate_is_on_the_side_of_meaning() -> None:
    selector = EmotionSelector(**SMALL)
    assert selector.gate is not None
    torch.nn.init.zeros_(selector.gate.weight)
    torch.nn.init.constant_(selector.gate.bias, 30.0)
    emotion, semantic = torch.randn(2, 4, 8)
    torch.testing.assert_close(selector.fuse(emotion, semantic)[0], semantic.tanh())


def test_a_relu_in_the_gate_keeps_it_at_half_or_more() -> None:
    emotion, semantic = torch.randn(2, 50, 8)
    torch.manual_seed(0)
    plain = EmotionSelector(**SMALL)
    published = EmotionSelector(**SMALL, gate_relu=True)
    assert published.fuse(emotion, semantic)[1].min() >= 0.5
    assert plain.fuse(emotion, semantic)[1].min() < 0.5


def test_losses_at_zero_logits() -> None:
    targets = torch.tensor([[1.0, 0, 0], [0, 1, 1]])
    torch.testing.assert_close(emotion_losses(torch.zeros(2, 3), targets, "sigmoid"), torch.full((2,), math.log(2)))
    torch.testing.assert_close(emotion_losses(torch.zeros(2, 3), targets, "softmax"), torch.full((2,), math.log(3)))


def test_a_softmax_shares_itself_among_several_labels() -> None:
    logits = torch.randn(1, 3)
    loss = emotion_losses(logits, torch.tensor([[0.0, 1, 1]]), "softmax")
    expected = -logits.log_softmax(-1)[0, 1:].mean()
    torch.testing.assert_close(loss[0], expected)


def test_a_low_temperature_sharpens_the_choice() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0]])
    warm = EmotionSelector(**SMALL, head="softmax").probabilities(logits)
    cold = EmotionSelector(**SMALL, head="softmax", temperature=0.25).probabilities(logits)
    torch.testing.assert_close(cold, (logits * 4).softmax(-1))
    assert cold.max() > warm.max()


def test_wrong_arguments_are_named() -> None:
    for options, message in (
        ({"head": "linear"}, "head must be one of sigmoid, softmax"),
        ({"reads": "all"}, "reads must be one of both, emotion, semantic"),
        ({"num_emotions": 1}, "num_emotions must be at least 2, got 1"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            EmotionSelector(**{**SMALL, **options})
    with pytest.raises(ValueError, match="unknown emotion 'joyous': it must be one of calm, joy"):
        class_index("joyous", ["calm", "joy"])
