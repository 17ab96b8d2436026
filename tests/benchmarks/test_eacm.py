"""Both sides of the benchmark of the EACM find the same, and every case runs."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks import eacm
from benchmarks.eacm import (
    BANNED,
    PATHS,
    QUICK,
    TOLERANCE,
    BeamBench,
    cases_of,
    difference_of_gradients,
    difference_of_replies,
    gradients,
    measure,
    new_model,
    random_batch,
    step_of,
    stepwise_model,
)
from benchmarks.reference.eacm import PlainReply, PlainSeq2Seq, plain_beam
from zoo.eacm.decoding import decode
from zoo.eacm.types import EOS_ID, GO_ID

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

SIZES = replace(QUICK, vocab_size=60, hidden_size=16, embedding_size=10, batch=4, post=6, reply=5, reply_mean=3)


class Chain:
    """Says words with probabilities that depend on the last word only; the state counts the steps."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def step(self, tokens: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.logits[tokens], {"steps": state["steps"] + 1}


@pytest.mark.parametrize("beam_size", [1, 2, 5])
@pytest.mark.parametrize("seed", range(4))
def test_both_searches_find_the_same_replies_with_and_without_an_end(beam_size: int, seed: int) -> None:
    chain = Chain(2 * torch.randn(9, 9, generator=torch.Generator().manual_seed(seed)))
    chain.logits[:, EOS_ID] += seed - 1
    given: dict[str, Any] = {
        "go_id": GO_ID,
        "eos_id": EOS_ID,
        "banned": BANNED,
        "max_length": 6,
        "beam_size": beam_size,
    }
    plain = plain_beam(chain.step, {"steps": torch.zeros(1)}, **given)
    found = decode(chain, {"steps": torch.zeros(1)}, method="beam", **given)
    same, largest = difference_of_replies(found, [plain])
    assert same == 1
    assert largest < 1e-5
    assert not set(plain.tokens) & set(BANNED)


def test_a_wide_plain_search_finds_the_likeliest_of_all_replies() -> None:
    logits = torch.randn(7, 7, generator=torch.Generator().manual_seed(5))
    log_probs, best = logits.log_softmax(-1), PlainReply([], -float("inf"))
    stack = [PlainReply([], 0.0)]
    while stack:
        reply = stack.pop()
        if reply.tokens[-1:] == [EOS_ID] or len(reply.tokens) == 3:
            best = max(best, reply, key=lambda one: one.log_prob)
            continue
        last = reply.tokens[-1] if reply.tokens else GO_ID
        stack += [
            PlainReply([*reply.tokens, word], reply.log_prob + float(log_probs[last, word]))
            for word in range(7)
            if word not in BANNED
        ]
    found = plain_beam(
        Chain(logits).step, {"steps": torch.zeros(1)}, go_id=GO_ID, eos_id=EOS_ID, banned=BANNED, max_length=3,
        beam_size=7,
    )  # fmt: skip
    assert found.tokens == best.tokens
    assert found.log_prob == pytest.approx(best.log_prob, abs=1e-5)


def test_the_model_replies_the_same_at_once_and_one_post_at_a_time() -> None:
    bench = BeamBench(SIZES)
    assert not bench.batch.post_mask.all()
    plain = bench.plain()
    assert len({tuple(reply.tokens) for reply in plain}) == SIZES.batch
    same, largest = difference_of_replies(bench.ours(), plain)
    assert same == SIZES.batch
    assert largest < TOLERANCE
    for row, alone in enumerate(bench.ours_one_by_one()):
        assert difference_of_replies(alone, plain[row : row + 1])[0] == 1


def test_a_reply_that_goes_on_after_the_other_is_not_the_same() -> None:
    bench = BeamBench(SIZES)
    found, plain = bench.ours(), bench.plain()
    shorter = [PlainReply(reply.tokens[:-1], reply.log_prob - 1) for reply in plain]
    same, largest = difference_of_replies(found, shorter)
    assert same == 0
    assert largest == pytest.approx(1, abs=TOLERANCE)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_both_decoders_have_the_same_loss_and_gradients(num_layers: int) -> None:
    sizes = replace(SIZES, num_layers=num_layers)
    batch = random_batch(sizes, full=False)
    assert batch.reply_mask.any(1).all()
    assert not batch.reply_mask.all()
    ours, plain = new_model(sizes), stepwise_model(sizes)
    assert step_of(ours, batch)() == pytest.approx(step_of(plain, batch)(), abs=1e-5)
    assert set(gradients(ours)) == {name for name, _ in ours.named_parameters()}
    assert difference_of_gradients(ours, plain) < TOLERANCE


def test_replies_of_different_lengths_end_once_and_are_padded_after_it() -> None:
    sizes = replace(SIZES, batch=200, reply=9, reply_mean=4)
    batch = random_batch(sizes, full=False)
    lengths = batch.reply_mask.sum(1)
    assert lengths[0] == 9
    assert set(lengths[1:].tolist()) == set(range(1, 8))
    assert batch.reply_out.eq(EOS_ID).sum(1).eq(1).all()
    assert batch.reply_out.gather(1, lengths[:, None] - 1).eq(EOS_ID).all()
    for tokens in (batch.reply_in, batch.reply_out):
        assert tokens.ne(0).equal(batch.reply_mask)
    assert random_batch(sizes).reply_mask.all()


def test_gradients_that_differ_or_are_missing_are_seen() -> None:
    batch = random_batch(SIZES)
    ours, plain = new_model(SIZES), stepwise_model(SIZES)
    for model in (ours, plain):
        step_of(model, batch)()
    grad = plain.stepwise.query.grad
    assert grad is not None
    grad[:, SIZES.hidden_size] += 1
    assert difference_of_gradients(ours, plain) > 10 * TOLERANCE
    ours.decoder.readout.bias.grad = None
    with pytest.raises(RuntimeError, match=r"one side only: decoder\.readout\.bias$"):
        difference_of_gradients(ours, plain)


def test_gradients_are_of_one_batch_however_often_a_step_is_taken() -> None:
    model, batch = new_model(SIZES), random_batch(SIZES)
    step = step_of(model, batch)
    first = (step(), {name: value.clone() for name, value in gradients(model).items()})
    assert step() == first[0]
    assert all(value.equal(first[1][name]) for name, value in gradients(model).items())


def test_the_plain_model_reads_the_post_and_the_words_before() -> None:
    torch.manual_seed(0)
    model, batch = PlainSeq2Seq(SIZES.vocab_size, 6, 8, 2), random_batch(SIZES)
    logits = model(batch.post_ids, batch.reply_in)
    assert logits.shape == (SIZES.batch, SIZES.reply, SIZES.vocab_size)
    changed = batch.reply_in.clone()
    changed[:, 3] = 4 + (changed[:, 3] - 3) % 50
    other = model(batch.post_ids, changed)
    assert other[:, :3].equal(logits[:, :3])
    assert not other[:, 3].allclose(logits[:, 3])
    assert not model(batch.post_ids.flip(0), batch.reply_in).allclose(logits)


@pytest.mark.parametrize("path", PATHS)
def test_each_path_times_both_sides(path: str) -> None:
    for case in cases_of(path, SIZES):
        assert case.reference().wall > 0
        assert case.ours().wall > 0
        assert "reference: " in case.note


def test_the_ratios_asked_for_stand_beside_their_cases() -> None:
    assert {case.name: case.required for path in PATHS for case in cases_of(path, SIZES)} == {
        "beam search, 60 words": 8,
        "beam search, 60 words, our search": None,
        "training step, 60 words": 1.5,
        "training step, 60 words, replies without padding": None,
        "EACM beside nn.GRU, 60 words": 0.5,
    }


def test_sides_that_find_different_things_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eacm, "difference_of_replies", lambda *_: (3, 0.0))
    with pytest.raises(RuntimeError, match="3 of 4 best replies are the same"):
        cases_of("beam", SIZES)
    monkeypatch.setattr(eacm, "difference_of_gradients", lambda *_: 0.5)
    with pytest.raises(RuntimeError, match=r"gradients differ by 5\.0e-01"):
        cases_of("training", SIZES)


def test_records_of_the_throughput_have_its_tokens_per_second() -> None:
    [record] = measure("throughput", SIZES, [1], repeats=1)
    for side in ("ours", "reference"):
        assert record[f"{side}_tokens_per_second"] == round(20 / record[f"{side}_wall_seconds"])
    assert "ours_tokens_per_second" not in measure("beam", SIZES, [1], repeats=1)[0]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    monkeypatch.setattr(eacm, "QUICK", SIZES)

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["eacm", *arguments])
        eacm.main()
        return capsys.readouterr().out

    return call


def test_the_command_writes_one_file_for_all_paths(run: Callable[..., str], tmp_path: Path) -> None:
    assert "tokens/s" in run("--quick", "--results", str(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["benchmark.json"]
    written = json.loads((tmp_path / "benchmark.json").read_text())
    assert written["command"].endswith("--quick")
    assert len(written["cases"]) == 5


def test_small_sizes_and_a_choice_of_paths_leave_no_file(
    run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eacm, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(eacm, "FULL", SIZES)
    monkeypatch.setattr(eacm, "SMALL", replace(SIZES, vocab_size=50))
    run("--quick", "--paths", "throughput")
    run("--paths", "throughput", "--repeats", "1")
    assert not list(tmp_path.iterdir())
    run("--repeats", "1")
    assert [file.name for file in (tmp_path / "results").iterdir()] == ["benchmark.json"]
