"""Summary-MRC: what separate encoding, batches of like lengths, and work done once per question save.

    python -m benchmarks.summary_mrc [--quick] [--paths encoding heads] [--repeats 3] [--threads 1]

- encoding: the passage once per question, against passage and summary in one sequence per option. The two compute
  different things: separate encoding gives up the encoder's attention between passage and summary.
- bucketing: training batches of about one length, against batches in random order, as seconds per real token.
- tokenisation: tokenisation once per question and batches gathered from tables, against a pair of texts at a time and
  batches put together from lists. The tokenizer has one thread on both sides.
- heads: a masked language model's head at the masked places, against logits at every place.

The paths bucketing and tokenisation read ReCAM's training questions (`ZOO_DATA`); the others use random words in the
given lengths. Encoders have fresh weights. `--quick` takes small networks and few questions, and leaves no files unless
`--results` names a folder.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import warnings
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.reference.summary_mrc import PlainPairs, plain_masked_lm_loss, plain_slot_scores
from benchmarks.runner import Case, Timing, all_threads, report, show, write_records
from benchmarks.text_steps import RandomWords, Size, forward, side, training_steps
from datamodules.cloze import ClozeData, ClozeRows
from datamodules.cloze_tokens import ClozeTokens
from datamodules.loading import Draw
from datamodules.passage_pieces import PassagePieces
from zoo.summary_mrc import ClozeScorer, MaskedLM, SummaryMRC, build_text_encoder
from zoo.summary_mrc.encoders import encode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zoo.summary_mrc.choice_module import ChoiceModule

RESULTS = Path(__file__).resolve().parent.parent / "results" / "summary_mrc"
COMMAND = "python -m benchmarks.summary_mrc"
PATHS = ("encoding", "bucketing", "tokenisation", "heads")
REAL = ("bucketing", "tokenisation")  # paths that read ReCAM
PASSAGE, SUMMARY, OPTIONS, MAX_LENGTH = 400, 30, 5, 512
SMALL_VOCABULARY, LARGE_VOCABULARY = 8_000, 30_522  # trained on the spot, BERT's
PER = 100  # questions, batches or sequences that times are given for
LARGE, SMALL, TINY = Size(12, 256), Size(2, 128), Size(1, 32)


def random_batch(count: int, layout: str, vocab_size: int = SMALL_VOCABULARY) -> Any:
    """A batch of so many questions in a layout; the same ones in each."""
    words = RandomWords(vocab_size)
    rows = words.questions(count, PASSAGE, SUMMARY, OPTIONS)
    return ClozeTokens(rows, words.tokenizer, encode=layout, max_length=MAX_LENGTH)[torch.arange(count)]


def encoding_cases(size: Size, questions: int) -> list[Case]:
    """Forward pass and training step with the passage once per question, against once per option.

    Args:
        size: Of the encoder.
        questions: In the batch.
    """
    passes, steps = {}, {}
    for layout in ("separate", "joint"):
        torch.manual_seed(0)
        model = SummaryMRC("tiny", encoder_options=size.options(), vocab_size=SMALL_VOCABULARY, encode=layout)
        batch = random_batch(questions, layout)
        passes[layout] = side(forward(model, model, batch), PER / questions)
        steps[layout] = side(training_steps(model, choice_loss(model, model), [batch]), PER / questions)
    required = 3 if size == LARGE else None
    note = (
        f"passage {PASSAGE}, summary {SUMMARY} tokens, {OPTIONS} options, CoMatch; questions timed: {questions}, "
        f"scaled to {PER}; the reference is encode=joint, which computes something else"
    )
    return [
        Case(f"forward, {size}", passes["separate"], passes["joint"], required, note),
        Case(f"training step, {size}", steps["separate"], steps["joint"], required, note),
    ]


def choice_loss(model: ChoiceModule, scores: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """The loss that a module takes of some scores of a batch."""
    return lambda batch: model.loss(scores(batch), batch.labels)


class Bucketing:
    """Encoder steps over training batches in both orders.

    Args:
        data: The questions, in the joint layout.
        size: Of the encoder.
        steps: Batches to time of an epoch: those at evenly spaced ranks by their length, so that they stand for all.
    """

    def __init__(self, data: ClozeData, size: Size, steps: int) -> None:
        self.data, self.size, self.steps = data, size, steps

    @cached_property
    def orders(self) -> dict[str, tuple[Any, list[Draw]]]:
        """By "ours" and "reference", the questions and the batches of an epoch, the shortest first."""
        orders = {}
        for name, bucketed in (("ours", True), ("reference", False)):
            self.data.bucketed = bucketed
            loader = self.data.train_dataloader()
            tokens: Any = loader.dataset
            orders[name] = tokens, sorted(loader.sampler, key=lambda draw: int(tokens.lengths[draw.indices].max()))
        return orders

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Tokens of an epoch without padding, and the share of padding in both orders."""
        found: dict[str, Any] = {}
        for name, (tokens, draws) in self.orders.items():
            real = places = 0
            for draw in draws:
                mask = tokens[draw].attention_mask
                real, places = real + int(mask.sum()), places + mask.numel()
            found |= {"tokens_of_epoch": real, f"{name}_padding": 1 - real / places}
        return found

    def case(self) -> Case:
        """Encoder steps of an epoch."""
        torch.manual_seed(0)
        # With dropout of attention weights, long batches cost still more: by the square of their length in memory.
        options = self.size.options(dropout=0.0)
        network = build_text_encoder("tiny", vocab_size=self.data.vocab_size, options=options)

        def loss(batch: Any) -> Tensor:
            fields = (batch.input_ids, batch.attention_mask, batch.token_type_ids)
            return encode(network, *(field.flatten(0, 1) for field in fields)).square().mean()

        def steps_of(name: str) -> Callable[[], Timing]:
            tokens, draws = self.orders[name]
            ranks = np.linspace(0, len(draws) - 1, 2 * self.steps + 1)[1::2].round().astype(int)
            batches = [tokens[draws[rank]] for rank in ranks]
            real = sum(int(batch.attention_mask.sum()) for batch in batches)
            return side(training_steps(network, loss, batches), self.facts["tokens_of_epoch"] / real)

        return Case(
            f"encoder steps of an epoch, {self.size}",
            steps_of("ours"),
            steps_of("reference"),
            1.3,
            f"{self.data.batch_size} questions a batch, joint, max_length {self.data.max_length}; {self.steps} of "
            f"{len(self.orders['ours'][1])} batches timed, scaled by their real tokens; reference: bucketed=False",
        )

    def completed(self, record: dict[str, Any]) -> dict[str, Any]:
        """A record with the share of padding, and real tokens per second of the processor."""
        speeds = {
            f"{name}_tokens_per_cpu_second": round(self.facts["tokens_of_epoch"] / record[f"{name}_cpu_seconds"])
            for name in ("reference", "ours")
        }
        return {**record, **self.facts, **speeds}


def tokenisation_cases(rows: ClozeRows, tokenizer: Any, batch_size: int = 32) -> list[Case]:
    """Tokenisation of questions, and batches of them.

    Args:
        rows: The questions; the last ones that fill no batch are only tokenised.
        tokenizer: A fast tokenizer of transformers.
        batch_size: Questions of a batch.
    """

    def ours() -> ClozeTokens:
        return ClozeTokens(rows, tokenizer, max_length=MAX_LENGTH)

    def plain() -> PlainPairs:
        return PlainPairs(rows.articles, rows.questions, rows.options, tokenizer, MAX_LENGTH)

    tokens, pairs = ours(), plain()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    batches = [batch for batch in torch.split(order, batch_size) if len(batch) == batch_size]

    def each(function: Callable[[Tensor], object]) -> Callable[[], Timing]:
        return side(lambda: [function(batch) for batch in batches], PER / len(batches))

    return [
        Case(
            f"tokenise {len(rows)} questions",
            side(ours),
            side(plain),
            note=f"{len(set(rows.articles))} passages; reference: tokenizer(passage, summary) for each option",
        ),
        Case(
            f"assemble a batch of {batch_size} questions",
            each(lambda batch: tokens[batch]),
            each(lambda batch: pairs.batch(batch.tolist())),
            note=f"{len(batches)} batches timed, scaled to {PER}; reference: lists of sequences padded and stacked",
        ),
    ]


def slot_cases(size: Size, vocab_size: int, questions: int) -> list[Case]:
    """`ClozeScorer` with the head at the mask tokens, against logits at every place.

    Args:
        size: Of the encoder.
        vocab_size: Of the head.
        questions: In the batch.
    """
    torch.manual_seed(0)
    model = ClozeScorer("tiny", encoder_options=size.options(), vocab_size=vocab_size)
    batch = random_batch(questions, "cloze", vocab_size)

    def plain(batch: Any) -> Tensor:
        return plain_slot_scores(model.scorer.network, batch)

    passes = [side(forward(model, scores, batch), PER / questions) for scores in (model, plain)]
    losses = [choice_loss(model, scores) for scores in (model, plain)]
    steps = [side(training_steps(model, loss, [batch]), PER / questions) for loss in losses]
    note = (
        f"sequences of {batch.input_ids.shape[-1]} tokens; questions timed: {questions}, scaled to {PER}; reference: "
        "logits at every place"
    )
    what = f"{size}, vocabulary {vocab_size:,}"
    return [
        Case(f"ClozeScorer, forward, {what}", passes[0], passes[1], note=note),
        Case(f"ClozeScorer, training step, {what}", steps[0], steps[1], note=note),
    ]


def masked_lm_case(size: Size, vocab_size: int, sequences: int, length: int = 256) -> Case:
    """A step of `MaskedLM` with the head at the masked places, against logits at every place.

    Args:
        size: Of the encoder.
        vocab_size: Of the head.
        sequences: In the batch.
        length: Tokens of a sequence.
    """
    torch.manual_seed(0)
    model = MaskedLM("tiny", encoder_options=size.options(dropout=0.0), vocab_size=vocab_size)
    words = RandomWords(vocab_size)
    pieces = PassagePieces([words.text(length - 2) for _ in range(sequences)], words.tokenizer, max_length=length)
    batch = pieces[Draw(torch.arange(sequences), key=0)]

    def ours(batch: Any) -> Tensor:
        logits, labels = model(batch)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def plain(batch: Any) -> Tensor:
        return plain_masked_lm_loss(model.scorer.network, batch)

    steps = [side(training_steps(model, loss, [batch]), PER / sequences) for loss in (ours, plain)]
    return Case(
        f"MaskedLM, training step, {size}, vocabulary {vocab_size:,}",
        steps[0],
        steps[1],
        note=f"{sequences} sequences of {length} tokens timed, scaled to {PER}; 15 % of the tokens are masked; "
        "reference: logits at every place",
    )


def cases_of(path: str, quick: bool, data: ClozeData | None) -> list[Case]:
    """The cases of a path but "bucketing".

    Args:
        path: One of `PATHS`.
        quick: Whether networks are small and questions few.
        data: ReCAM, where the path needs it.
    """
    if path == "encoding":
        sizes = [(TINY, 1)] if quick else [(LARGE, 1), (SMALL, 4)]
        return [case for size, questions in sizes for case in encoding_cases(size, questions)]
    if path == "tokenisation":
        assert data is not None
        rows = data.questions("fit")
        chosen = np.random.default_rng(0).permutation(len(rows))[: 64 if quick else 300]
        return tokenisation_cases(rows.select(chosen), data.tokenizer)
    if quick:
        return [*slot_cases(TINY, 1_000, 2), masked_lm_case(TINY, 1_000, 2)]
    return [
        *slot_cases(SMALL, SMALL_VOCABULARY, 8),
        *slot_cases(LARGE, LARGE_VOCABULARY, 4),
        masked_lm_case(Size(3, 128), SMALL_VOCABULARY, 16),
    ]


def recam() -> ClozeData:
    """ReCAM's training questions of subtask 1, tokenised.

    Raises:
        FileNotFoundError: If its files are not there.
    """
    data = ClozeData(source="recam", batch_size=16, max_length=MAX_LENGTH, seed=0)
    data.setup("fit")
    return data


def main() -> None:
    """Measure the paths named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small networks, few questions")
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=PATHS, help="what to measure")
    parser.add_argument("--repeats", type=int, help="timed runs of each side; 3, or 1 with --quick")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--results", type=Path, help=f"folder of the JSON files, {RESULTS} without --quick")
    options = parser.parse_args()
    logging.getLogger("datamodules").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        # Before anything is timed: a missing file is not to show after minutes.
        data = recam() if set(options.paths) & set(REAL) else None
    except FileNotFoundError as error:
        parser.error(f"{error} (or leave out {' and '.join(REAL)}: --paths encoding heads)")
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as passing:
        folder = options.results or (Path(passing) if options.quick else RESULTS)
        for path in options.paths:
            records += measure(path, folder, options.quick, data, options.threads, options.repeats)
    show(records, f"Summary-MRC, {all_threads()} cores")


def measure(
    path: str, folder: Path, quick: bool, data: ClozeData | None, threads: Sequence[int], repeats: int | None
) -> list[dict[str, Any]]:
    """Time a path and write `benchmark_<path>.json`; returns the records of its cases."""
    bucketing = None
    if path == "bucketing":
        assert data is not None
        bucketing = Bucketing(data, TINY if quick else SMALL, 2 if quick else 4)
    cases = cases_of(path, quick, data) if bucketing is None else [bucketing.case()]
    file = folder / f"benchmark_{path}.json"
    about = {
        "command": f"{COMMAND} --quick" if quick else COMMAND,
        "data": "ReCAM, subtask 1" if path in REAL else "random words",
    }
    records = report(cases, file, **about, threads=threads, repeats=repeats or (1 if quick else 3))
    if bucketing is not None:
        records = [bucketing.completed(record) for record in records]
        write_records(records, file, **about)
        for record in records:
            speeds = [f"{record[f'{name}_tokens_per_cpu_second']:,}" for name in ("reference", "ours")]
            shares = [f"{record[f'{name}_padding']:.1%}" for name in ("reference", "ours")]
            print(f"real tokens per CPU second: {' -> '.join(speeds)}; padding: {' -> '.join(shares)}", flush=True)
    return records


if __name__ == "__main__":
    main()
