"""The ECM: its step and mixture written out, its memories, and replies under emotions."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor

from datamodules.dialogue_vocabulary import word_tokenizer
from tests.zoo.eacm.dialogues import NUM_EMOTIONS, WORDS, Batch, dialogues, rows_of, widened
from zoo.eacm.ecm import ECM
from zoo.eacm.lexicon import EmotionLexicon
from zoo.eacm.memories import ExternalMemory
from zoo.eacm.vocabulary import DialogueVocabulary

if TYPE_CHECKING:
    from pathlib import Path

SMALL: dict[str, Any] = {
    "post_vocab_size": WORDS, "reply_vocab_size": WORDS, "num_emotions": NUM_EMOTIONS, "hidden_size": 8,
    "num_layers": 2, "embedding_size": 6, "emotion_size": 5, "memory_size": 7, "max_length": 6,
}  # fmt: skip
NAMES = ["neutral", "happy", "anger"]
VOCABULARY = ["[PAD]", "[UNK]", "[EOS]", "[GO]", "[SEP]", "the", "glad", "fun", "furious", "mad", "a", "b"]
OWN = {0: [], 1: [6, 7], 2: [8, 9]}
"""Ids of each class's words in the default lexicon."""


def vocabulary() -> DialogueVocabulary:
    tokenizer = word_tokenizer({word: index for index, word in enumerate(VOCABULARY)})
    return DialogueVocabulary(tokenizer, tokenizer, NAMES)


def model(filled: bool = True, **options: Any) -> ECM:
    torch.manual_seed(0)
    machine = ECM(**{**SMALL, **options}).eval()
    machine.vocabulary_ = vocabulary()
    if filled and machine.external is not None:
        machine.find_emotion_words()
    # Larger than fresh ones, so that emotions matter.
    with torch.no_grad():
        for name, weight in machine.named_parameters():
            if "emotion" in name or "parts" in name or "choice" in name:
                weight.mul_(3)
    return machine


def sigmoid_gru(machine: ECM, layer: int, parts: Tensor, state: Tensor) -> Tensor:
    """The cell of `BiasedGRUCell`, kind "ecm"."""
    cell: Any = machine.decoder.cells[layer]
    reset_in, update_in, candidate_in = parts.chunk(3, -1)
    reset_own, update_own = (state @ cell.gates.weight.T).chunk(2, -1)
    reset, update = torch.sigmoid(reset_in + reset_own), torch.sigmoid(update_in + update_own)
    new: Tensor = update * state + (1 - update) * torch.tanh(candidate_in + (reset * state) @ cell.candidate.weight.T)
    return new


def reference(machine: ECM, batch: Batch, row: int, emotion: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities of words after each word of a row's reply, and what is left of the memory."""
    decoder, inner, outer = machine.decoder, machine.internal, machine.external
    assert inner is not None
    assert outer is not None
    post = batch.post_ids[row : row + 1, : int(batch.post_mask[row].sum())]
    memory, states = machine.encoder(post, torch.ones_like(post, dtype=torch.bool))
    memory, states = memory[0], list(states[0])

    def attend() -> Tensor:
        attention = decoder.attention
        query = torch.cat(states) @ attention.query.weight.T
        keys = memory @ attention.memory.weight.T + attention.memory.bias
        scores = torch.tanh(keys + query) @ attention.score.weight[0]
        context: Tensor = scores.softmax(0) @ memory
        return context

    vector = machine.emotion_vectors.weight @ emotion
    left = inner.emotions.weight @ emotion
    context = attend()
    own = OWN[int(emotion.argmax())]
    others = [word for word in range(WORDS) if word not in own]
    found = []
    assert decoder.emotion_parts is not None
    for token in batch.reply_in[row, : int(batch.reply_mask[row].sum())].tolist():
        word = decoder.embedding.weight[token]
        gate = torch.sigmoid(
            inner.read_word.weight @ word
            + inner.read_word.bias
            + inner.read_state.weight @ torch.cat((states[-1], context))
        )
        parts = decoder.word_parts.weight @ word + decoder.word_parts.bias
        parts = parts + decoder.context_parts.weight @ context + decoder.emotion_parts.weight @ vector
        parts = parts + inner.parts.weight @ (gate * left)
        states[0] = sigmoid_gru(machine, 0, parts, states[0])
        upper: Any = decoder.layer_parts[0]
        states[1] = sigmoid_gru(machine, 1, upper.weight @ states[0] + upper.bias, states[1])
        context = attend()
        left = torch.sigmoid(inner.write_gate.weight @ states[-1] + inner.write_gate.bias) * left
        logits = decoder.vocabulary(decoder.readout(torch.cat((states[-1], context))))
        share = torch.sigmoid(outer.choice.weight[0] @ states[-1]) if own else torch.zeros(())
        mixed = torch.zeros(WORDS)
        mixed[others] = (1 - share) * logits[others].softmax(0)
        if own:
            mixed[own] = share * logits[own].softmax(0)
        found.append(mixed)
    return torch.stack(found), left


def test_a_step_and_its_mixture_are_those_written_out() -> None:
    machine, batch = model(), dialogues()
    out = machine(batch)
    for row in range(len(batch.post_ids)):
        expected, left = reference(machine, batch, row, batch.reply_emotion[row])
        torch.testing.assert_close(out["logits"][row, : len(expected)].exp(), expected)
        torch.testing.assert_close(out["memory"][row], left)


@pytest.mark.parametrize("internal", [True, False], ids=["internal", "no-internal"])
@pytest.mark.parametrize("external", [True, False], ids=["external", "no-external"])
def test_probabilities_sum_to_one(internal: bool, external: bool) -> None:
    machine = model(internal_memory=internal, external_memory=external)
    logits = machine(dialogues())["logits"]
    assert logits is not None
    total = logits.exp().sum(-1) if external else logits.softmax(-1).sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize("external", [True, False], ids=["external", "no-external"])
def test_a_batch_of_several_emotions_is_its_rows_and_padding_changes_nothing(external: bool) -> None:
    machine, batch = model(external_memory=external), dialogues(rows=8)
    assert len(set(batch.reply_emotion.argmax(-1).tolist())) == NUM_EMOTIONS
    nll = machine.score_replies(batch).nll
    torch.testing.assert_close(machine.score_replies(widened(batch)).nll, nll)
    for row in range(len(nll)):
        torch.testing.assert_close(machine.score_replies(rows_of(batch, [row])).nll[0], nll[row])


def test_the_words_that_can_be_chosen_are_those_of_the_rows_own_emotion() -> None:
    machine = model()
    assert machine.external is not None
    rows = machine.external.own(torch.tensor([0, 1, 2, -1]))
    assert [row.nonzero().flatten().tolist() for row in rows] == [[], [6, 7], [8, 9], []]
    # The likeliest class's, the first of equal ones; without an emotion none.
    shares = torch.tensor([[0.2, 0.3, 0.5], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    assert machine.external.labels(shares).tolist() == [2, 1, -1]


def test_a_class_without_words_has_the_plain_softmax_and_no_choice() -> None:
    machine, batch = model(), dialogues()
    neutral = batch._replace(reply_emotion=torch.eye(NUM_EMOTIONS)[torch.zeros(6, dtype=torch.long)])
    told = machine.tell(neutral, neutral.reply_emotion)
    logits = machine(neutral)["logits"]
    torch.testing.assert_close(logits, machine.decoder.logits(told.outputs).log_softmax(-1))
    scored = machine.score_replies(neutral)
    assert scored.penalty is not None
    assert told.memory is not None
    torch.testing.assert_close(scored.penalty, told.memory.square().sum(-1).mean())
    scored.nll.sum().backward()  # type: ignore[no-untyped-call]
    assert machine.external is not None
    assert all(weight.grad is None or bool(weight.grad.isfinite().all()) for weight in machine.parameters())
    gradient = machine.external.choice.weight.grad
    assert gradient is None or not bool(gradient.any())


def test_extreme_logits_and_choices_stay_finite() -> None:
    memory = ExternalMemory(2, 6, 3)
    memory.emotion_words[1, 4:] = True
    with torch.no_grad():
        memory.choice.weight.fill_(50.0)
    logits = torch.tensor([200.0, -200.0, 0.0, 0.0, 200.0, -200.0]).expand(2, 6).requires_grad_()
    states = torch.ones(2, 3)
    out = memory.log_probabilities(logits, states, torch.tensor([0, 1]))
    assert bool(out.isfinite().all())
    torch.testing.assert_close(out.exp().sum(-1), torch.ones(2))
    torch.testing.assert_close(out[1, 4].exp(), torch.tensor(1.0))


def test_the_penalty_is_what_the_memory_holds_after_each_replys_own_last_word() -> None:
    machine, batch = model(choice_weight=0.0, memory_weight=2.0), dialogues()
    penalty = machine.score_replies(batch).penalty
    lefts = [reference(machine, batch, row, batch.reply_emotion[row])[1] for row in range(len(batch.post_ids))]
    assert penalty is not None
    torch.testing.assert_close(penalty, 2 * torch.stack(lefts).square().sum(-1).mean())
    torch.testing.assert_close(machine.score_replies(widened(batch)).penalty, penalty)
    terms = machine.losses(batch)
    torch.testing.assert_close(terms["loss"], terms["reply"] + penalty)


def test_the_loss_of_the_choice_is_the_mean_over_words_of_rows_that_have_one() -> None:
    machine, batch = model(choice_weight=0.5, memory_weight=0.0), dialogues(rows=8)
    tops = machine.tell(batch, batch.reply_emotion).outputs[..., : SMALL["hidden_size"]]
    assert machine.external is not None
    losses = []
    for row, label in enumerate(batch.reply_emotion.argmax(-1).tolist()):
        if not OWN[label]:
            continue
        for place in range(int(batch.reply_mask[row].sum())):
            share = torch.sigmoid(machine.external.choice.weight[0] @ tops[row, place])
            losses.append(-(share if int(batch.reply_out[row, place]) in OWN[label] else 1 - share).log())
    expected = 0.5 * torch.stack(losses).mean()
    torch.testing.assert_close(machine.score_replies(batch).penalty, expected)
    torch.testing.assert_close(machine.score_replies(widened(batch)).penalty, expected)


def test_without_memories_there_is_no_penalty() -> None:
    machine = model(internal_memory=False, external_memory=False)
    assert machine.score_replies(dialogues()).penalty is None
    assert model(memory_weight=0.0, choice_weight=0.0).score_replies(dialogues()).penalty is None


@pytest.mark.parametrize("term", ["reply", "penalty"])
def test_gradients_reach_both_memories(term: str) -> None:
    machine, batch = model(), dialogues(rows=8)
    machine.losses(batch)[term].backward()  # type: ignore[no-untyped-call]
    assert machine.internal is not None
    assert machine.external is not None
    reached = [machine.internal.emotions, machine.internal.read_word, machine.internal.read_state]
    for layer in (*reached, machine.internal.write_gate, machine.internal.parts, machine.external.choice):
        assert layer.weight.grad is not None
        assert bool(layer.weight.grad.any())
        assert bool(layer.weight.grad.isfinite().all())
    if term == "reply":
        assert all(weight.grad is not None for weight in machine.parameters())


def test_a_soft_emotion_begins_the_memory_with_the_soft_sum_of_its_vectors() -> None:
    machine = model()
    assert machine.internal is not None
    table = machine.internal.begin(torch.eye(NUM_EMOTIONS))
    assert table.equal(machine.internal.emotions.weight.T)
    shares = torch.tensor([[0.25, 0.0, 0.75]])
    torch.testing.assert_close(machine.internal.begin(shares)[0], 0.25 * table[0] + 0.75 * table[2])


@pytest.mark.parametrize("internal", [True, False], ids=["internal", "no-internal"])
@pytest.mark.parametrize("external", [True, False], ids=["external", "no-external"])
def test_steps_are_the_teacher_forced_decoder(internal: bool, external: bool) -> None:
    machine, batch = model(internal_memory=internal, external_memory=external), dialogues()
    state = machine.first_state(batch.post_ids, batch.post_mask, batch.reply_emotion)
    given = machine(batch)["logits"]
    assert given is not None
    for place in range(batch.reply_in.shape[1]):
        logits, state = machine.step(batch.reply_in[:, place], state)
        torch.testing.assert_close(logits, given[:, place])


@pytest.mark.parametrize("decoding", ["greedy", "beam", "sample"])
def test_a_forced_emotion_changes_replies(decoding: str) -> None:
    machine, batch = model(), dialogues(rows=12)
    # Sums of log-probabilities of fresh weights would be best for empty replies.
    options: dict[str, Any] = {"decoding": decoding, "length_penalty": 2.0}
    replies = [machine.answer(batch, emotion=name, **options).words for name in NAMES]
    assert replies[0] != replies[1]
    assert replies[1] != replies[2]
    by_class = machine.answer(batch, emotion=1, **options)
    assert by_class.words == replies[1]
    assert by_class.emotion is not None
    assert by_class.emotion.equal(torch.eye(3)[1].expand(12, -1))


def test_a_mixed_batch_of_asked_emotions_is_each_alone() -> None:
    machine, batch = model(), dialogues()
    kinds = torch.tensor([0, 1, 2, 2, 1, 0])
    together = machine.answer(batch, emotion=kinds, decoding="beam", beam_size=3).words
    for row, label in enumerate(kinds.tolist()):
        alone = machine.answer(rows_of(batch, [row]), emotion=label, decoding="beam", beam_size=3).words
        assert together[row] == alone[0]


def test_without_an_asked_emotion_the_true_one_steers_and_must_be_known() -> None:
    machine, batch = model(), dialogues()
    assert machine.answer(batch).words == machine.answer(batch, emotion=batch.reply_emotion).words
    unknown = batch._replace(reply_emotion_known=torch.tensor([True] * 5 + [False]))
    with pytest.raises(ValueError, match="pass emotion="):
        machine.answer(unknown)
    with pytest.raises(ValueError, match="pass emotion="):
        machine.first_state(batch.post_ids, batch.post_mask, None)


def test_a_true_emotion_that_is_not_known_steers_nothing() -> None:
    machine, batch = model(), dialogues()
    known = torch.tensor([False, True, True, True, True, True])
    swapped = batch.reply_emotion.clone()
    swapped[0] = swapped[0].roll(1)
    first = machine.score_replies(batch._replace(reply_emotion_known=known))
    second = machine.score_replies(batch._replace(reply_emotion_known=known, reply_emotion=swapped))
    assert first.nll.equal(second.nll)
    assert first.emotion is not None
    assert not bool(first.emotion[0].any())


def test_setup_finds_the_words_once_and_a_checkpoint_holds_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "words.tsv"
    path.write_text("glad\thappy\nfun\thappy\nmad\tanger\nrage\tanger\n")
    machine, batch = model(filled=False, emotion_words=str(path)), dialogues()
    source = SimpleNamespace(post_tokenizer=vocabulary().post, reply_tokenizer=vocabulary().reply, label_names=NAMES)
    machine._trainer = SimpleNamespace(datamodule=source)  # type: ignore[assignment]
    with caplog.at_level(logging.INFO, logger="zoo.eacm.memories"):
        machine.setup("fit")
    assert "neutral 0 of 0, happy 2 of 2, anger 1 of 2" in caplog.text
    assert "1 emotions have no words, so that none is chosen: neutral" in caplog.text
    path.unlink()
    machine.setup("test")
    machine._trainer = None
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(machine)
    trainer.save_checkpoint(tmp_path / "ecm.ckpt")
    again = ECM.load_from_checkpoint(tmp_path / "ecm.ckpt", weights_only=True, max_length=6).eval()
    assert again.external is not None
    assert again.external.emotion_words.sum(1).tolist() == [0, 2, 1]
    assert again.score_replies(batch).nll.equal(machine.score_replies(batch).nll)
    assert again.answer(batch).words == machine.answer(batch).words


def test_words_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="none of the emotions' words is in the vocabulary"):
        ExternalMemory(2, 6, 3).fill(EmotionLexicon({"joy": ["glad"]}, ["neutral", "happy"]), ["x"] * 6, 4)
    with pytest.raises(ValueError, match="the vocabulary has 7 words, the model 6"):
        ExternalMemory(2, 6, 3).fill(EmotionLexicon({"joy": ["glad"]}, ["neutral", "happy"]), ["glad"] * 7, 4)


def test_special_words_are_of_no_emotion() -> None:
    memory = ExternalMemory(2, 6, 3)
    memory.fill(EmotionLexicon({"joy": ["glad"]}, ["neutral", "happy"]), ["glad"] * 6, 4)
    assert memory.emotion_words[1].tolist() == [False] * 4 + [True] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_size": 0}, "memory_size must be at least 1, got 0"),
        ({"memory_weight": -1.0}, "must be at least 0, got -1.0"),
        ({"choice_weight": -0.5}, "must be at least 0, got 1.0 and -0.5"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"cell": "lstm"}, "cell must be one of"),
        ({"emotion_head": "hard"}, "emotion_head must be one of"),
    ],
    ids=["memory", "memory-weight", "choice-weight", "dropout", "cell", "head"],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ECM(**{**SMALL, **options})


def test_it_learns_to_say_the_words_of_the_emotion() -> None:
    batch = dialogues(rows=12, reply=1, seed=3)
    kinds = batch.reply_emotion.argmax(-1)
    word = torch.tensor([5, 6, 9])[kinds]
    out = batch.reply_out.clone()
    out[:, 0], out[:, 1] = word, 2
    given = batch._replace(reply_out=out, reply_mask=torch.ones_like(out, dtype=torch.bool))
    inputs = torch.stack((torch.full_like(word, 3), word), 1)
    given = given._replace(reply_in=inputs)
    machine = model().train()
    optimizer = torch.optim.Adam(machine.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        machine.losses(given)["loss"].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    machine.eval()
    for label, said in enumerate(("the", "glad", "mad")):
        answers = machine.answer(given, emotion=label).words
        assert all(row[0] == [said] for row in answers)
    assert float(machine.score_replies(given).nll.detach().mean()) < 0.1


def test_a_row_without_an_emotion_has_no_words_though_the_first_class_has() -> None:
    memory = ExternalMemory(2, 6, 3)
    memory.emotion_words[0, 4:] = True
    labels = memory.labels(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert memory.own(labels).sum(1).tolist() == [2, 0]
