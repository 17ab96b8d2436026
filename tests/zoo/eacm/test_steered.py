"""Language models that a prefix steers: likelihoods, replies, and checkpoints of each kind of backbone."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor

from datamodules.dialogue_vocabulary import word_tokenizer
from tests.zoo.eacm.dialogues import NUM_EMOTIONS, WORDS, Batch, dialogues, rows_of, widened
from tests.zoo.eacm.folders import KINDS, NAMES, folder_of, texts
from zoo.eacm.steered import SteeredLM
from zoo.eacm.vocabulary import DialogueVocabulary

if TYPE_CHECKING:
    from pathlib import Path

SMALL: dict[str, Any] = {
    "post_vocab_size": WORDS, "reply_vocab_size": WORDS, "num_emotions": NUM_EMOTIONS, "hidden_size": 8,
    "embedding_size": 6, "prefix_length": 3, "max_length": 6,
}  # fmt: skip
TINY_OPTIONS = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24}
TINY = ("tiny", "tiny-seq2seq")


def vocabulary() -> DialogueVocabulary:
    words = ["[PAD]", "[UNK]", "[EOS]", "[GO]", "[SEP]", *(f"w{'abcdefgh'[index - 5]}" for index in range(5, WORDS))]
    tokenizer = word_tokenizer({word: index for index, word in enumerate(words)})
    return DialogueVocabulary(tokenizer, tokenizer, NAMES)


def sharpened(machine: SteeredLM) -> SteeredLM:
    with torch.no_grad():
        if machine.prefix is not None:
            machine.prefix.weight.mul_(10)
        head = machine.network.get_output_embeddings()
        head.weight.mul_(4)
        for name, weight in machine.network.named_parameters():
            # A fresh T5 hardly looks at the post.
            if "EncDecAttention" in name:
                weight.mul_(6)
    return machine.eval()


def tiny(backbone: str = "tiny", **options: Any) -> SteeredLM:
    torch.manual_seed(0)
    machine = SteeredLM(**{**SMALL, "backbone": backbone, "backbone_options": TINY_OPTIONS, **options})
    machine.vocabulary_ = vocabulary()
    return sharpened(machine)


def named(path: Path, kind: str, **options: Any) -> tuple[SteeredLM, Batch]:
    known, batch = texts()
    size = known.post.get_vocab_size()
    torch.manual_seed(0)
    machine = SteeredLM(
        **{
            **SMALL,
            "post_vocab_size": size,
            "reply_vocab_size": size,
            "backbone": str(folder_of(path, kind)),
            **options,
        }
    )
    machine.vocabulary_ = known
    return sharpened(machine), batch


def made(kind: str, path: Path, **options: Any) -> tuple[SteeredLM, Batch]:
    return (tiny(kind, **options), dialogues()) if kind in TINY else named(path, kind, **options)


@pytest.mark.parametrize("source", ["auto", "gold", "none"])
@pytest.mark.parametrize("backbone", [*TINY, *KINDS])
def test_padding_and_batch_mates_change_no_likelihood(backbone: str, source: str, tmp_path: Path) -> None:
    machine, batch = made(backbone, tmp_path, emotion_source=source)
    scored = machine.score_replies(batch)
    wide = machine.score_replies(widened(batch))
    torch.testing.assert_close(wide.nll, scored.nll, rtol=1e-4, atol=1e-4)
    assert wide.tokens.equal(scored.tokens)
    assert scored.tokens.equal(batch.reply_mask.sum(1))
    for row in range(len(scored.nll)):
        alone = machine.score_replies(rows_of(batch, [row])).nll[0]
        torch.testing.assert_close(alone, scored.nll[row], rtol=1e-4, atol=1e-4)


def test_the_likelihood_of_a_causal_model_is_that_of_prefix_post_go_and_reply_alone() -> None:
    machine, batch = tiny(emotion_source="gold"), dialogues()
    assert machine.prefix is not None
    nll = machine.score_replies(batch).nll
    for row in range(len(nll)):
        post = batch.post_ids[row][batch.post_mask[row]]
        reply = batch.reply_out[row][batch.reply_mask[row]]
        words = machine.network.get_input_embeddings()(torch.cat((post, torch.tensor([3]), reply)))
        prefix = (machine.prefix.weight @ batch.reply_emotion[row]).view(3, -1)
        logits = machine.network(inputs_embeds=torch.cat((prefix, words))[None]).logits[0].log_softmax(-1)
        start = 3 + len(post)
        expected = -sum(float(logits[start + place, token].detach()) for place, token in enumerate(reply.tolist()))
        assert float(nll[row].detach()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("backbone", [*TINY, *KINDS])
def test_greedy_replies_are_the_step_by_step_argmax(backbone: str, tmp_path: Path) -> None:
    machine, batch = made(backbone, tmp_path, emotion_source="gold")
    answers = machine.answer(batch, emotion=1)
    shares = torch.eye(NUM_EMOTIONS)[1:2]
    eos, _, banned = machine._special_ids()
    for row in range(len(batch.post_ids)):
        one = rows_of(batch, [row])
        given = machine.pieces(one)
        said: list[int] = []
        total = 0.0
        while len(said) < SMALL["max_length"]:
            reply_in = torch.cat((given.reply_in[:, :1], torch.tensor([said], dtype=torch.long)), 1)
            pieces = given._replace(reply_in=reply_in, reply_mask=torch.ones_like(reply_in, dtype=torch.bool))
            logits = machine.reply_logits(pieces, shares)[0, -1].detach()
            allowed = logits.clone()
            allowed[banned] = -torch.inf
            said.append(int(allowed.argmax()))
            total += float(logits.log_softmax(-1)[said[-1]])
            if said[-1] == eos:
                break
        assert answers.words[row] == [machine._words(said)]
        assert float(answers.scores[row, 0]) == pytest.approx(total, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("backbone", TINY)
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_scores_of_beams_are_likelihoods_and_no_worse_than_greedy(backbone: str, penalty: float) -> None:
    machine, batch = tiny(backbone, emotion_source="gold"), dialogues()
    beams = machine.answer(batch, emotion=1, decoding="beam", beam_size=4, num_return=3, length_penalty=penalty)
    greedy = machine.answer(batch, emotion=1, length_penalty=penalty)
    if not penalty:
        assert bool((beams.scores[:, 0] >= greedy.scores[:, 0] - 1e-4).all())
    assert bool((beams.scores.diff(dim=1) <= 1e-5).all())
    assert all(len(row) == 3 and len({tuple(words) for words in row}) == 3 for row in beams.words)
    tokenizer = machine.vocabulary.reply
    shares = torch.eye(NUM_EMOTIONS)[1].expand(len(batch.post_ids), -1)
    for place in range(3):
        rows = [[tokenizer.token_to_id(word) for word in row[place]] for row in beams.words]
        rows = [[*row, 2][: SMALL["max_length"]] for row in rows]
        longest = max(len(row) for row in rows)
        out = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        start = torch.full((len(rows), 1), 3)
        said = batch._replace(
            reply_in=torch.cat((start, out[:, :-1]), 1), reply_out=out,
            reply_mask=torch.arange(longest) < lengths[:, None], reply_emotion=shares,
        )  # fmt: skip
        expected = -machine.score_replies(said).nll.detach() / lengths**penalty
        torch.testing.assert_close(beams.scores[:, place], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backbone", TINY)
def test_samples_come_best_first_and_are_the_same_for_a_seed(backbone: str) -> None:
    machine, batch = tiny(backbone), dialogues()
    options: dict[str, Any] = {"decoding": "sample", "num_return": 4, "temperature": 2.0}
    state = torch.get_rng_state()
    first = machine.answer(batch, **options)
    assert torch.get_rng_state().equal(state)
    assert machine.answer(batch, **options).words == first.words
    assert machine.answer(batch, **options, seed=1).words != first.words
    assert bool((first.scores.diff(dim=1) <= 0).all())
    assert machine.answer(batch, **options, top_k=1).words == [row * 4 for row in machine.answer(batch).words]


@pytest.mark.parametrize("backbone", TINY)
@pytest.mark.parametrize("decoding", ["greedy", "beam", "sample"])
def test_no_reply_has_padding_unknown_words_or_a_run_twice(backbone: str, decoding: str) -> None:
    machine, batch = tiny(backbone), dialogues(rows=8)
    answers = machine.answer(batch, decoding=decoding, no_repeat_ngram=1, temperature=3.0, max_length=20)
    for row in answers.words:
        for words in row:
            assert not {"[PAD]", "[UNK]", "[GO]", "[EOS]"} & set(words)
            assert len(set(words)) == len(words)


@pytest.mark.parametrize("backbone", [*TINY, *KINDS])
def test_the_emotion_changes_logits_and_replies_and_a_prefix_of_zeros_does_not(backbone: str, tmp_path: Path) -> None:
    machine, batch = made(backbone, tmp_path, emotion_source="gold")
    assert machine.prefix is not None
    pieces = machine.pieces(batch)
    kinds = [torch.eye(NUM_EMOTIONS)[label].expand(len(batch.post_ids), -1) for label in range(NUM_EMOTIONS)]
    logits = [machine.reply_logits(pieces, kind).detach() for kind in kinds]
    assert float((logits[0] - logits[1]).abs().max()) > 1e-3
    replies = [machine.answer(batch, emotion=label).words for label in range(NUM_EMOTIONS)]
    assert replies[0] != replies[1] or replies[1] != replies[2]
    assert machine.answer(batch, emotion="joy").words == replies[1]
    with torch.no_grad():
        machine.prefix.weight.zero_()
    assert machine.reply_logits(pieces, kinds[0]).equal(machine.reply_logits(pieces, kinds[1]))
    assert machine.answer(batch, emotion=0).words == machine.answer(batch, emotion=1).words


@pytest.mark.parametrize("backbone", TINY)
def test_the_likelihood_of_replies_trains_the_selector(backbone: str) -> None:
    machine, batch = tiny(backbone), dialogues()
    machine.losses(batch)["reply"].backward()  # type: ignore[no-untyped-call]
    assert machine.selector is not None
    assert machine.prefix is not None
    for weight in (machine.selector.reply_head.weight, machine.prefix.weight):
        assert weight.grad is not None
        assert bool(weight.grad.any())
    machine.zero_grad()
    machine.losses(batch)["loss"].backward()  # type: ignore[no-untyped-call]
    assert all(weight.grad is not None for weight in machine.parameters())


def test_the_gold_rate_steers_that_share_of_training_by_the_true_emotion() -> None:
    machine, batch = tiny(gold_rate=1.0), dialogues()
    chosen = machine.score_replies(batch).emotion
    steered = machine.train().score_replies(batch).emotion
    assert chosen is not None
    assert steered is not None
    torch.testing.assert_close(chosen.sum(1), torch.ones(6))
    assert steered.equal(batch.reply_emotion)


def test_a_frozen_backbone_neither_learns_nor_drops_out() -> None:
    machine, batch = tiny(freeze_backbone=True, backbone_options={**TINY_OPTIONS, "dropout": 0.5}), dialogues()
    machine.train()
    assert not any(part.training for part in machine.network.modules())
    machine.losses(batch)["loss"].backward()  # type: ignore[no-untyped-call]
    assert all(weight.grad is None for weight in machine.network.parameters())
    assert machine.prefix is not None
    assert machine.prefix.weight.grad is not None
    optimized = machine.configure_optimizers()
    assert isinstance(optimized, dict)
    held = {id(weight) for group in optimized["optimizer"].param_groups for weight in group["params"]}
    assert not held & {id(weight) for weight in machine.network.parameters()}


def test_fresh_weights_have_about_the_perplexity_of_guessing() -> None:
    torch.manual_seed(0)
    machine, batch = SteeredLM(**SMALL).eval(), dialogues(rows=30)
    scored = machine.score_replies(batch)
    perplexity = math.exp(float(scored.nll.detach().sum()) / int(scored.tokens.sum()))
    assert WORDS / 2 < perplexity < WORDS * 2


def saved(machine: SteeredLM, path: Path) -> Path:
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", enable_progress_bar=False)
    trainer.strategy.connect(machine)
    trainer.save_checkpoint(path)
    return path


@pytest.mark.parametrize("backbone", [*TINY, *KINDS])
def test_a_checkpoint_needs_nothing_else(backbone: str, tmp_path: Path) -> None:
    folder = tmp_path / "backbone"
    machine, batch = made(backbone, folder, decoding="greedy")
    path = saved(machine, tmp_path / "steered.ckpt")
    if backbone not in TINY:
        folder.rename(tmp_path / "elsewhere")
    again = SteeredLM.load_from_checkpoint(path, weights_only=True, max_length=6).eval()
    assert again.score_replies(batch).nll.equal(machine.score_replies(batch).nll)
    assert again.answer(batch).words == machine.answer(batch).words
    assert again.label_names == NAMES


def test_a_model_without_emotions_takes_none_and_a_gold_one_must_know_them() -> None:
    batch: Any = dialogues()
    plain = tiny(emotion_source="none")
    assert plain.answer(batch).emotion is None
    assert plain.prefix is None
    assert not plain.takes_emotions
    with pytest.raises(ValueError, match="replies without an emotion"):
        plain.answer(batch, emotion=1)
    unknown: Tensor = torch.zeros(6, dtype=torch.bool)
    with pytest.raises(ValueError, match="pass emotion="):
        tiny(emotion_source="gold").answer(batch._replace(reply_emotion_known=unknown))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"emotion_source": "hard"}, "emotion_source must be one of auto, gold, none"),
        ({"emotion_head": "hard"}, "emotion_head must be one of"),
        ({"prefix_length": 0}, "prefix_length must be at least 1"),
        ({"gold_rate": 1.5}, "gold_rate must be"),
        ({"freeze_backbone": True, "emotion_source": "none"}, "leaves nothing to learn"),
        ({"post_vocab_size": WORDS + 1}, "use share_vocab=True"),
        ({"backbone_options": {"width": 3}}, "the tiny backbone has no width"),
        ({"backbone_options": {"num_heads": 3}}, "must be even, got 64 / 3"),
        ({"backbone_options": {"num_layers": 0}}, "num_layers must be at least 1"),
        ({"backbone_config": {"model_type": "gpt2"}}, "'tiny' takes backbone_options"),
        ({"backbone": "some/hub", "backbone_options": {"num_heads": 1}}, "backbone_options are for tiny"),
    ],
    ids=["source", "head", "prefix", "rate", "frozen", "vocabulary", "unknown", "heads", "layers", "config", "named"],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SteeredLM(**{**SMALL, **options})


def test_a_folder_that_is_none_and_a_network_that_cannot_reply_are_refused(tmp_path: Path) -> None:
    import transformers

    with pytest.raises(FileNotFoundError, match="is not a folder"):
        SteeredLM(**SMALL, backbone=str(tmp_path / "nowhere"))
    transformers.ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a vit, which is no language model"):
        SteeredLM(**SMALL, backbone=str(tmp_path))


def test_a_tiny_backbone_needs_one_vocabulary() -> None:
    machine = tiny()
    other = word_tokenizer({**vocabulary().reply.get_vocab(), "wz": WORDS})
    machine.vocabulary_ = None
    source = SimpleNamespace(post_tokenizer=vocabulary().post, reply_tokenizer=other, label_names=NAMES)
    machine._trainer = SimpleNamespace(datamodule=source)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="use share_vocab=True"):
        machine.setup("fit")
