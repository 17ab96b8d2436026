"""EACM: replies to many posts at once, training steps, and what emotions and attention cost.

    python -m benchmarks.eacm [--quick] [--paths beam training throughput] [--repeats 3] [--threads 1]

- beam: beam search for 64 posts at once, selector and encoder included, against one post after the other. The steps are
  the model's own on both sides; with `our search` the reference is our own code, one post after the other.
- training: forward and backward of the full model, against the same with a decoder that looks up the word, multiplies
  `[word; context]` and the emotion with their weights, and takes logits and loss in each step, as published.
- throughput: the full training step with its optimizer, against a GRU encoder-decoder of torch's own in the same sizes,
  without attention and emotion. Records and output have the reply tokens per second of both.

Weights, posts and replies are random. `--quick` takes small sizes. It and a choice of `--paths` leave no file unless
`--results` names a folder.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.reference.eacm import PlainDecoder, PlainReply, PlainSeq2Seq, plain_beam
from benchmarks.runner import Case, all_threads, run_case, show, timed, write_records
from zoo.eacm.eacm import EACM
from zoo.eacm.types import EOS_ID, GO_ID, PAD_ID, UNK_ID, Scored

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from zoo.eacm.decoding import Replies

RESULTS = Path(__file__).resolve().parent.parent / "results" / "eacm"
COMMAND = "python -m benchmarks.eacm"
PATHS = ("beam", "training", "throughput")
BANNED = (PAD_ID, UNK_ID, GO_ID)
TOLERANCE = 1e-4
"""Largest difference of scores, and of gradients as a share of their tensor's largest, between both sides."""
LOGIT_SPREAD = 4.0
"""Standard deviation of the logits in the search: a few words are likely, as in a trained model."""


@dataclass(frozen=True)
class Sizes:
    """What is worked on.

    Attributes:
        vocab_size: Words of posts, and of replies.
        hidden_size: Of all states.
        num_layers: Of encoders and decoder.
        embedding_size: Of word vectors, and of the emotion vector.
        num_emotions: Of the selector.
        batch: Posts of a batch.
        post: Words of the longest post; the shortest has half of them.
        reply: Words of the longest reply, and most words of one that is made.
        reply_mean: Words of a reply in the mean, where their lengths differ.
        beam_size: Hypotheses of a post.
    """

    vocab_size: int = 10_000
    hidden_size: int = 256
    num_layers: int = 2
    embedding_size: int = 200
    num_emotions: int = 6
    batch: int = 64
    post: int = 20
    reply: int = 20
    beam_size: int = 5
    reply_mean: int = 13


FULL = Sizes()
"""The published sizes; replies are as long as those of DailyDialog."""
SMALL = Sizes(3_500, 96, 1, 96, 4, 64, 20, 13, 5, 5)
"""The sizes of the study on EmoContext, and its replies' length."""
QUICK = Sizes(500, 32, 2, 24, 4, 8, 8, 6, 3, 4)


class Batch(NamedTuple):
    """What the loss reads of a batch; see `zoo.eacm.types.Dialogues`."""

    post_ids: Tensor
    post_mask: Tensor
    reply_in: Tensor
    reply_out: Tensor
    reply_mask: Tensor
    post_emotion: Tensor
    reply_emotion: Tensor
    post_emotion_known: Tensor
    reply_emotion_known: Tensor
    keys: Tensor
    post_text: list[str]
    reply_text: list[str]


def random_batch(sizes: Sizes, full: bool = True) -> Batch:
    """Posts of different lengths and replies that end: of full length, or around the mean with one of full length."""
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint((sizes.post + 1) // 2, sizes.post + 1, (sizes.batch,), generator=draw)
    lengths[0] = sizes.post
    mask = torch.arange(sizes.post) < lengths[:, None]
    posts = torch.randint(4, sizes.vocab_size, mask.shape, generator=draw) * mask
    words = torch.randint(4, sizes.vocab_size, (sizes.batch, sizes.reply - 1), generator=draw)
    first, last = (torch.full((sizes.batch, 1), token) for token in (GO_ID, EOS_ID))
    kinds = torch.randint(0, sizes.num_emotions, (2, sizes.batch), generator=draw)
    emotions = torch.nn.functional.one_hot(kinds, sizes.num_emotions).float()
    known, texts = torch.ones(sizes.batch, dtype=torch.bool), [""] * sizes.batch
    ends = torch.full((sizes.batch,), sizes.reply)
    if not full:
        apart = min(sizes.reply - sizes.reply_mean, sizes.reply_mean - 1)
        ends = torch.randint(sizes.reply_mean - apart, sizes.reply_mean + apart + 1, ends.shape, generator=draw)
        ends[0] = sizes.reply
    said = torch.arange(sizes.reply) < ends[:, None]
    reply_out = torch.cat((words, last), 1).scatter(1, ends[:, None] - 1, EOS_ID)
    return Batch(
        posts, mask, torch.cat((first, words), 1) * said, reply_out * said, said, emotions[0], emotions[1], known,
        known, torch.arange(sizes.batch), texts, texts,
    )  # fmt: skip


def new_model(sizes: Sizes, kind: type[EACM] = EACM) -> EACM:
    """A model with random weights, the same each time."""
    torch.manual_seed(0)
    return kind(
        sizes.vocab_size, sizes.vocab_size, sizes.num_emotions, sizes.hidden_size, sizes.num_layers,
        sizes.embedding_size, sizes.embedding_size, max_length=sizes.reply, decoding="beam", beam_size=sizes.beam_size,
    )  # fmt: skip


# Replies.


class BeamBench:
    """Posts to reply to, with a model whose likely words are few.

    Args:
        sizes: What is worked on.
    """

    def __init__(self, sizes: Sizes) -> None:
        self.sizes, self.batch = sizes, random_batch(sizes)
        self.model = new_model(sizes).eval()
        decoder = self.model.decoder
        with torch.no_grad():
            # So that replies depend on their posts.
            for part in (self.model.encoder.embedding, decoder.context_parts):
                part.weight.mul_(20)
            state = self.first_state(self.batch.post_ids, self.batch.post_mask)
            logits, _ = self.model.step(torch.full((sizes.batch,), GO_ID), state)
            decoder.vocabulary.weight.mul_(LOGIT_SPREAD / logits.std())

    def first_state(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """The state before the first word, steered by what the selector chooses."""
        return self.model.first_state(ids, mask, self.model.choose(ids, mask)[1])

    @torch.no_grad()
    def found(self, ids: Tensor, mask: Tensor) -> Replies:
        """Replies to posts by our search."""
        return self.model.generate(ids, mask, self.model.choose(ids, mask)[1])

    def posts(self) -> list[tuple[Tensor, Tensor]]:
        """The posts one at a time, without padding: ids and mask `(1, length)`."""
        lengths = self.batch.post_mask.sum(1).tolist()
        return [
            (self.batch.post_ids[row : row + 1, :length], self.batch.post_mask[row : row + 1, :length])
            for row, length in enumerate(lengths)
        ]

    def ours(self) -> Replies:
        """All posts at once."""
        return self.found(self.batch.post_ids, self.batch.post_mask)

    def ours_one_by_one(self) -> list[Replies]:
        """One post after the other by the same code."""
        return [self.found(*post) for post in self.posts()]

    @torch.no_grad()
    def plain(self) -> list[PlainReply]:
        """One post after the other by the plain search."""
        return [
            plain_beam(
                self.model.step, self.first_state(*post), go_id=GO_ID, eos_id=EOS_ID, banned=BANNED,
                max_length=self.sizes.reply, beam_size=self.sizes.beam_size,
            )
            for post in self.posts()
        ]  # fmt: skip


def difference_of_replies(found: Replies, plain: list[PlainReply]) -> tuple[int, float]:
    """How many best replies are the same, and the largest difference of scores."""
    same = sum(
        row[: len(reply.tokens)] == reply.tokens and not any(row[len(reply.tokens) :])
        for row, reply in zip(found.tokens[:, 0].tolist(), plain, strict=True)
    )
    scores = zip(found.scores[:, 0].tolist(), plain, strict=True)
    return same, max(abs(score - reply.log_prob) for score, reply in scores)


def beam_cases(sizes: Sizes) -> list[Case]:
    """Replies to a batch of posts."""
    bench = BeamBench(sizes)
    found, plain = bench.ours(), bench.plain()
    same, largest = difference_of_replies(found, plain)
    if same < sizes.batch or largest > TOLERANCE:
        raise RuntimeError(f"{same} of {sizes.batch} best replies are the same, scores differ by {largest:.1e} at most")
    lengths = [len(reply.tokens) for reply in plain]
    note = (
        f"{sizes.batch} posts, {sizes.beam_size} hypotheses, {sizes.vocab_size:,} words, {sizes.num_layers} layers of "
        f"{sizes.hidden_size}; replies of {min(lengths)} to {max(lengths)} words, {sum(lengths) / len(lengths):.1f} in "
        f"the mean, {sizes.reply} at most, {len({str(reply.tokens) for reply in plain})} different; the same on both "
        f"sides, scores differ by {largest:.1e} at most; "
        "selector and encoder included, the model's step is the same; reference: one post after the other"
    )
    name, ours = f"beam search, {sizes.vocab_size:,} words", timed(bench.ours)
    alone = Case(f"{name}, our search", ours, timed(bench.ours_one_by_one), note=f"{note}, our search")
    return [Case(name, ours, timed(bench.plain), 8, f"{note}, plain search"), alone]


# Training.


class StepwiseEACM(EACM):
    """EACM with the published decoder."""

    stepwise: PlainDecoder

    def score_replies(self, batch: Any) -> Scored:
        """Likelihood of the batch's replies, a word at a time."""
        selection, shares = self._steer(batch)
        memory, states = self.encoder(batch.post_ids, batch.post_mask)
        emotion = self._emotion_vector(shares)
        assert emotion is not None
        nll = self.stepwise.nll(
            batch.reply_in, batch.reply_out, batch.reply_mask, states, emotion, memory, batch.post_mask
        )
        return Scored(nll, batch.reply_mask.sum(1), selection, shares)


def stepwise_model(sizes: Sizes) -> StepwiseEACM:
    """The published form of `new_model`, with the same weights."""
    model = new_model(sizes, StepwiseEACM)
    assert isinstance(model, StepwiseEACM)
    model.stepwise = PlainDecoder(model.decoder)
    del model.decoder
    return model


def gradients(model: EACM) -> dict[str, Tensor]:
    """Gradients by parameter, those of the published decoder in the layout of ours."""
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    if not isinstance(model, StepwiseEACM):
        return found
    own = {name.removeprefix("stepwise."): found.pop(name) for name in list(found) if name.startswith("stepwise.")}
    hidden, layers = model.stepwise.readout.shape[0], len(model.stepwise.gates)
    size = model.stepwise.embedding.shape[1]
    query = torch.split(own["query"], [hidden, own["query"].shape[1] // layers - hidden] * layers, dim=1)
    named = {
        "embedding": own["embedding"],
        "word_parts": own["inputs.0"][:, :size],
        "context_parts": own["inputs.0"][:, size:],
        "emotion_parts": own["emotion"],
        "attention.memory": own["memory"],
        "attention.query": torch.cat(query[::2], dim=1),
        # Our weight is the sum of those of the layers, each of which has its whole gradient.
        "attention.emotion": query[1],
        "attention.score": own["score"],
        "readout": own["readout"],
        "vocabulary": own["vocabulary"],
    }
    biases = {"word_parts": "biases.0", "attention.memory": "memory_bias"}
    biases |= {name: f"{name}_bias" for name in ("readout", "vocabulary")}
    for layer in range(layers):
        named |= {f"cells.{layer}.gates": own[f"gates.{layer}"], f"cells.{layer}.candidate": own[f"candidates.{layer}"]}
        if layer:
            named[f"layer_parts.{layer - 1}"] = own[f"inputs.{layer}"]
            biases[f"layer_parts.{layer - 1}"] = f"biases.{layer}"
    found |= {f"decoder.{name}.weight": value for name, value in named.items()}
    return found | {f"decoder.{name}.bias": own[value] for name, value in biases.items()}


def step_of(model: EACM, batch: Batch, optimizer: torch.optim.Optimizer | None = None) -> Callable[[], float]:
    """Forward and backward of a batch, and the optimizer's step if there is one; returns the loss."""

    def step() -> float:
        model.zero_grad()
        loss = model.losses(batch)["loss"]
        loss.backward()  # type: ignore[no-untyped-call]
        if optimizer is not None:
            optimizer.step()
        return loss.item()

    return step


def difference_of_gradients(ours: EACM, plain: EACM) -> float:
    """Largest difference of two models' gradients, as a share of the largest number of its tensor.

    Raises:
        RuntimeError: If they have not the same tensors.
    """
    first, second = gradients(ours), gradients(plain)
    if first.keys() != second.keys():
        raise RuntimeError(f"gradients on one side only: {', '.join(sorted(first.keys() ^ second.keys()))}")
    return max(float((second[name] - one).abs().max() / one.abs().max()) for name, one in first.items())


def training_cases(sizes: Sizes) -> list[Case]:
    """Forward and backward of a batch, with replies of different and of the same length."""
    return [training_case(sizes, full=False), training_case(sizes, full=True)]


def training_case(sizes: Sizes, full: bool) -> Case:
    """Forward and backward of a batch; 1.5x is asked for where replies have their usual lengths."""
    batch = random_batch(sizes, full)
    ours, plain = new_model(sizes), stepwise_model(sizes)
    steps = step_of(ours, batch), step_of(plain, batch)
    losses = [step() for step in steps]
    largest = difference_of_gradients(ours, plain)
    if largest > TOLERANCE or abs(losses[0] - losses[1]) > TOLERANCE:
        raise RuntimeError(f"losses are {losses[0]} and {losses[1]}, gradients differ by {largest:.1e} at most")
    mean = float(batch.reply_mask.sum() / sizes.batch)
    note = (
        f"{sizes.batch} posts, replies of {mean:.1f} words in the mean, {sizes.reply} at most, {sizes.num_layers} "
        f"layers of {sizes.hidden_size}; forward and backward of the full loss; gradients differ by {largest:.1e} of "
        "their tensor's largest at most; selector and encoder are the same; reference: word, [word; context], emotion, "
        "logits and loss in each step, of all replies until the longest ends"
    )
    name = f"training step, {sizes.vocab_size:,} words" + (", replies without padding" if full else "")
    return Case(name, timed(steps[0]), timed(steps[1]), None if full else 1.5, note)


# Throughput.


def throughput_cases(sizes: Sizes) -> list[Case]:
    """The full training step beside that of a plain sequence-to-sequence model."""
    batch = random_batch(sizes)
    ours = new_model(sizes)
    torch.manual_seed(0)
    plain = PlainSeq2Seq(sizes.vocab_size, sizes.embedding_size, sizes.hidden_size, sizes.num_layers)
    plain_optimizer = sgd(plain)

    def reference() -> None:
        plain.zero_grad()
        plain.loss(batch.post_ids, batch.reply_in, batch.reply_out).backward()  # type: ignore[no-untyped-call]
        plain_optimizer.step()

    counts = [sum(weight.numel() for weight in model.parameters()) / 1e6 for model in (ours, plain)]
    note = (
        f"{sizes.batch} posts, replies of {sizes.reply} words, {sizes.vocab_size:,} words, {sizes.num_layers} layers "
        f"of {sizes.hidden_size}; forward, backward and a step of SGD; ours: three encoders, gate, attention and "
        f"readout, {counts[0]:.1f} million weights; reference: nn.GRU twice and the output layer, {counts[1]:.1f} "
        "million"
    )
    return [
        Case(
            f"EACM beside nn.GRU, {sizes.vocab_size:,} words",
            timed(step_of(ours, batch, sgd(ours))),
            timed(reference),
            0.5,
            note,
        )
    ]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """A slow optimizer: weights hardly change while steps are timed."""
    return torch.optim.SGD(model.parameters(), lr=1e-6)


def cases_of(path: str, sizes: Sizes) -> list[Case]:
    """The cases of a path."""
    return {"beam": beam_cases, "training": training_cases, "throughput": throughput_cases}[path](sizes)


def measure(path: str, sizes: Sizes, threads: list[int], repeats: int) -> list[dict[str, Any]]:
    """Records of a path, those of the throughput with reply tokens per second."""
    records = []
    for case in cases_of(path, sizes):
        for count in threads:
            record = run_case(case, count, repeats)
            line = f"{case.name}, {count} thread(s): {record['cpu_ratio']:.1f}x"
            if path == "throughput":
                for side in ("ours", "reference"):
                    rate = sizes.batch * sizes.reply / record[f"{side}_wall_seconds"]
                    record[f"{side}_tokens_per_second"] = round(rate)
                    line += f", {side} {rate:,.0f} tokens/s"
            print(line, flush=True)
            records.append(record)
    return records


def main() -> None:
    """Measure the paths named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=PATHS, help="what to measure")
    parser.add_argument("--repeats", type=int, help="timed runs of each side; 3, or 1 with --quick")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--results", type=Path, help=f"folder of the JSON file, {RESULTS} for all paths in full size")
    options = parser.parse_args()
    repeats = options.repeats or (1 if options.quick else 3)
    every = (QUICK,) if options.quick else (FULL, SMALL)
    whole = not options.quick and set(options.paths) == set(PATHS)
    records = [
        record for path in options.paths for sizes in every for record in measure(path, sizes, options.threads, repeats)
    ]
    with tempfile.TemporaryDirectory() as passing:
        folder = options.results or (RESULTS if whole else Path(passing))
        command = f"{COMMAND} --quick" if options.quick else COMMAND
        write_records(records, folder / "benchmark.json", command=command, data="random")
    show(records, f"EACM, {all_threads()} cores")


if __name__ == "__main__":
    main()
