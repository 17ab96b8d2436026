from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.zoo.eacm.dialogues import NUM_EMOTIONS, WORDS, dialogues, rows_of, widened
from zoo.eacm.eacm import EACM, EmoEmb, Seq2Seq
from zoo.eacm.vocabulary import DialogueVocabulary

if TYPE_CHECKING:
    from pathlib import Path

SMALL: dict[str, Any] = {
    "post_vocab_size": WORDS, "reply_vocab_size": WORDS, "num_emotions": NUM_EMOTIONS, "hidden_size": 8,
    "num_layers": 2, "embedding_size": 6, "emotion_size": 5, "max_length": 6,
}  # fmt: skip


def model(**options: Any) -> EACM:
    torch.manual_seed(0)
    return EACM(**{**SMALL, **options}).eval()


def words(model: EACM) -> EACM:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    names = ["[PAD]", "[UNK]", "[EOS]", "[GO]", *(f"w{index}" for index in range(4, WORDS))]
    tokenizer = Tokenizer(WordLevel({name: index for index, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    model.vocabulary_ = DialogueVocabulary(tokenizer, tokenizer, ["calm", "joy", "anger"])
    return model


@pytest.mark.parametrize("source", ["none", "gold", "auto", "auto_nosem", "auto_noemo", "hard"])
@pytest.mark.parametrize("head", ["sigmoid", "softmax"])
def test_padding_and_batch_mates_change_no_likelihood(source: str, head: str) -> None:
    machine, batch = model(emotion_source=source, emotion_head=head), dialogues()
    nll = machine.score_replies(batch).nll
    torch.testing.assert_close(machine.score_replies(widened(batch)).nll, nll)
    for row in range(len(nll)):
        torch.testing.assert_close(machine.score_replies(rows_of(batch, [row])).nll[0], nll[row])


def test_a_pure_emotion_gives_exactly_its_vector() -> None:
    machine = model()
    assert machine.emotion_vectors is not None
    pure = torch.eye(NUM_EMOTIONS)
    vectors = machine._emotion_vector(pure)
    assert vectors is not None
    assert vectors.equal(machine.emotion_vectors.weight.T)


def test_a_forced_emotion_is_what_a_gold_model_of_the_same_weights_does() -> None:
    auto, gold = model(), model(emotion_source="gold")
    gold.load_state_dict({k: v for k, v in auto.state_dict().items() if not k.startswith("selector.")})
    batch = dialogues()._replace(reply_emotion=torch.eye(NUM_EMOTIONS)[[1] * 6])
    one = auto.generate(batch.post_ids, batch.post_mask, auto.steering(batch, 1))
    two = gold.generate(batch.post_ids, batch.post_mask, gold.steering(batch, None))
    assert one.tokens.equal(two.tokens)
    torch.testing.assert_close(one.scores, two.scores)


@pytest.mark.parametrize(
    ("source", "reached"), [("auto", True), ("auto_nosem", True), ("auto_noemo", True), ("hard", False)]
)
def test_the_replys_likelihood_reaches_the_selector_through_the_soft_vector(source: str, reached: bool) -> None:
    machine = model(emotion_source=source, lambda_emotion=0.0)
    machine.losses(dialogues())["reply"].backward()
    assert machine.selector is not None
    gradient = machine.selector.reply_head.weight.grad
    assert (gradient is not None and bool(gradient.ne(0).any())) == reached


def test_without_its_biases_an_emotion_changes_nothing() -> None:
    batch = dialogues()
    for options in ({}, {"attention_emotion_bias": False}, {"decoder_emotion_bias": False}):
        machine = model(**options)
        shares = torch.eye(NUM_EMOTIONS)
        steered = [machine.decode_given(batch, shares[[label] * 6]).outputs for label in range(2)]
        assert not steered[0].allclose(steered[1])
        for name, weight in machine.decoder.named_parameters():
            if "emotion" in name:
                torch.nn.init.zeros_(weight)
        silent = [machine.decode_given(batch, shares[[label] * 6]).outputs for label in range(2)]
        assert silent[0].equal(silent[1])


def test_both_biases_can_be_left_out() -> None:
    names = [
        name for name, _ in model(attention_emotion_bias=False, decoder_emotion_bias=False).decoder.named_parameters()
    ]
    assert not [name for name in names if "emotion" in name]


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_uniform_words_cost_the_logarithm_of_their_number(reduction: str) -> None:
    machine = model(loss_reduction=reduction)
    for weight in machine.decoder.vocabulary.parameters():
        torch.nn.init.zeros_(weight)
    torch.testing.assert_close(machine.losses(dialogues())["reply"], torch.tensor(math.log(WORDS)))


def test_reductions_weigh_replies_or_words() -> None:
    batch = dialogues()
    scored = model().score_replies(batch)
    by_reply = model(loss_reduction="sequence").reply_loss(scored)
    by_word = model(loss_reduction="token").reply_loss(scored)
    torch.testing.assert_close(by_reply, (scored.nll / scored.tokens).mean())
    torch.testing.assert_close(by_word, scored.nll.sum() / scored.tokens.sum())


def test_unknown_emotions_do_not_count() -> None:
    machine, batch = model(), dialogues()
    known = torch.tensor([True, False, True, False, False, True])
    some = machine.losses(batch._replace(post_emotion_known=known))
    alone = machine.losses(rows_of(batch, [0, 2, 5]))
    torch.testing.assert_close(some["post_emotion"], alone["post_emotion"])
    none = machine.losses(batch._replace(post_emotion_known=torch.zeros(6, dtype=torch.bool)))
    assert none["post_emotion"] == 0
    none["loss"].backward()


def test_the_loss_is_the_weighted_sum() -> None:
    terms = model(lambda_emotion=0.3).losses(dialogues())
    torch.testing.assert_close(terms["loss"], terms["reply"] + 0.3 * (terms["post_emotion"] + terms["reply_emotion"]))
    assert set(model(emotion_source="none").losses(dialogues())) == {"reply", "loss"}


def test_steps_say_what_the_whole_says() -> None:
    machine, batch = model(), dialogues()
    shares = machine.steering(batch, None)
    state = machine.first_state(batch.post_ids, batch.post_mask, shares)
    whole = machine(batch)["logits"]
    assert whole is not None
    for place in range(batch.reply_in.shape[1]):
        logits, state = machine.step(batch.reply_in[:, place], state)
        torch.testing.assert_close(logits, whole[:, place])


def test_replies_hold_no_special_word_and_are_scored_as_the_model_scores_them() -> None:
    machine, batch = model(), dialogues()
    for method in ("greedy", "beam", "sample"):
        shares = machine.steering(batch, 0)
        replies = machine.generate(batch.post_ids, batch.post_mask, shares, decoding=method, beam_size=3)
        tokens, lengths = replies.tokens[:, 0], replies.lengths[:, 0]
        said = torch.arange(tokens.shape[1]) < lengths[:, None]
        assert tokens[said].min() >= 4
        out = tokens.masked_fill(~(said | (torch.arange(tokens.shape[1]) == lengths[:, None])), 0)
        given = batch._replace(
            reply_in=torch.cat((torch.full((6, 1), 3), out[:, :-1]), 1), reply_out=out, reply_mask=out > 0,
            reply_emotion=torch.eye(NUM_EMOTIONS)[[0] * 6],
        )  # fmt: skip
        gold = model(emotion_source="gold")
        gold.load_state_dict({k: v for k, v in machine.state_dict().items() if not k.startswith("selector.")})
        torch.testing.assert_close(-gold.score_replies(given).nll, replies.log_probs[:, 0])


def test_gold_emotions_steer_a_share_of_the_training() -> None:
    batch = dialogues(rows=200)
    machine = model(gold_rate=0.5)
    chosen = machine.score_replies(batch).emotion
    machine.train()
    mixed = machine.score_replies(batch).emotion
    assert chosen is not None
    assert mixed is not None
    gold = (mixed == batch.reply_emotion).all(1)
    assert 60 < int(gold.sum()) < 140
    assert mixed[~gold].allclose(chosen[~gold])
    unknown = machine.score_replies(batch._replace(reply_emotion_known=torch.zeros(200, dtype=torch.bool))).emotion
    assert unknown is not None
    assert unknown.allclose(chosen)


def test_the_vocabulary_travels_with_the_checkpoint(tmp_path: Path) -> None:
    machine = words(model())
    content: dict[str, Any] = {}
    machine.on_save_checkpoint(content)
    other = model()
    other.on_load_checkpoint(content)
    assert other.label_names == ["calm", "joy", "anger"]
    assert other.vocabulary.same_as(machine.vocabulary)
    answers = other.answer(dialogues(), emotion="joy", decoding="beam", num_return=2)
    assert len(answers.words[0]) == 2
    assert all(word.startswith("w") for row in answers.words for own in row for word in own)
    ids, mask = other.vocabulary.encode_posts(["w4 w5 w6", "w7"], max_length=2)
    assert ids.tolist() == [[5, 6], [7, 0]]
    assert mask.tolist() == [[True, True], [True, False]]
    with pytest.raises(ValueError, match="a post without any word: ' '"):
        other.vocabulary.encode_posts([" "])


def test_other_words_than_those_of_the_training_are_refused() -> None:
    machine, stranger = words(model()), words(model())
    assert stranger.vocabulary_ is not None
    data = SimpleNamespace(
        post_tokenizer=stranger.vocabulary.post, reply_tokenizer=stranger.vocabulary.reply, label_names=["a", "b", "c"]
    )
    machine._trainer = SimpleNamespace(datamodule=data)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="was trained with other words or emotions than this datamodule has"):
        machine.setup("test")


def test_a_model_without_emotion_hands_its_weights_on(tmp_path: Path) -> None:
    plain = Seq2Seq(**{k: v for k, v in SMALL.items() if k != "emotion_source"})
    path = tmp_path / "plain.ckpt"
    torch.save({"state_dict": plain.state_dict(), "pytorch-lightning_version": "2.6.0"}, path)
    machine = model(init_from=str(path))
    assert machine.encoder.embedding.weight.equal(plain.encoder.embedding.weight)
    assert machine.decoder.vocabulary.weight.equal(plain.decoder.vocabulary.weight)
    with pytest.raises(ValueError, match=r"does not fit: encoder\.embedding\.weight"):
        model(init_from=str(path), embedding_size=7)


def test_word_vectors_fill_the_table_that_is_named(tmp_path: Path) -> None:
    machine = words(model())
    path = tmp_path / "vectors.txt"
    path.write_text("w4 1 2 3 4 5 6\nw9 6 5 4 3 2 1\nelse 0 0 0 0 0 0\n")
    before = machine.decoder.embedding.weight.clone()
    assert machine.load_word_vectors("reply", path) == pytest.approx(2 / WORDS)
    assert machine.decoder.embedding.weight[4].tolist() == [1, 2, 3, 4, 5, 6]
    assert machine.decoder.embedding.weight[5].equal(before[5])
    machine.load_word_vectors("emotion", path)
    with pytest.raises(ValueError, match="table must be one of emotion, semantic, post, reply, got 'word'"):
        machine.load_word_vectors("word", path)
    with pytest.raises(ValueError, match="emotion_source='none' has no emotion encoder"):
        words(model(emotion_source="none")).load_word_vectors("emotion", path)
    path.write_text("w4 1 2 3\n")
    with pytest.raises(ValueError, match=r"3\b.*\b6|6\b.*\b3"):
        machine.load_word_vectors("reply", path)


def test_bad_emotions_are_named() -> None:
    machine = words(model())
    batch = dialogues()
    for emotion, message in (
        ("happy", "unknown emotion 'happy': it must be one of calm, joy, anger"),
        (3, r"an emotion must be in 0\.\.2, got 3"),
        (torch.ones(6, 2), r"emotion must have the shape \(6, 3\)"),
        (torch.full((6, 3), math.nan), "finite and at least 0"),
        ([0.5, -0.5, 1.0], "finite and at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            machine.answer(batch, emotion=emotion)
    with pytest.raises(ValueError, match="emotion_source='none' replies without an emotion"):
        words(model(emotion_source="none")).answer(batch, emotion=1)
    unknown = batch._replace(reply_emotion_known=torch.zeros(6, dtype=torch.bool))
    with pytest.raises(ValueError, match="which these posts lack: pass emotion="):
        words(model(emotion_source="gold")).answer(unknown)


def test_bad_arguments_are_named() -> None:
    for options, message in (
        ({"emotion_source": "best"}, "emotion_source must be one of none, gold, auto"),
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"dropout": 1.0}, "dropout must be at least 0"),
        ({"gold_rate": 1.5}, "gold_rate must be at least 0"),
        ({"optimizer": "lion"}, "optimizer must be one of sgd, adam, adamw"),
        ({"loss_reduction": "sum"}, "loss_reduction must be one of sequence, token"),
        ({"decoding": "best"}, "decoding must be one of greedy, beam, sample"),
        ({"num_return": 2}, "greedy decoding gives one reply"),
        ({"label_names": ["a"]}, "label_names has 1 names for num_emotions=3"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"max_length": 0}, "max_length must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**options)


def test_siblings_are_settings_of_the_same_machine() -> None:
    assert Seq2Seq(**SMALL).emotion_source == "none"
    assert EmoEmb(**SMALL).emotion_source == "gold"
    assert not Seq2Seq(**SMALL).takes_emotions
    assert not EmoEmb(**SMALL).chooses_emotions
