"""IDSF against the published procedure in plain form: training steps, sampling, propagation, ranking, and memory.

    python -m benchmarks.idsf [--paths training sampler ...] [--repeats 3] [--threads 1]

Works on the interactions of Amazon Baby if `ZOO_DATA` names the data folder, otherwise on random ones in the same
numbers; features are random in the published widths. Memory is measured in processes of their own. The path "clothing"
takes a training step with the contrastive loss over all items on a random graph in the size of Amazon Clothing.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Callback
from torch import Tensor

from benchmarks.idsf_memory import memory_records, show_memory
from benchmarks.idsf_steps import FEATURE_SIZES, HIDDEN_SIZE, load, new_data, new_model, quiet, train, trainer
from benchmarks.reference.idsf import PlainIDSF, PlainSampler, evaluate, row_normalised_graph, train_step
from benchmarks.runner import Case, Clock, Timing, all_threads, report, show, write_records
from zoo.common.negatives import NegativeSampler
from zoo.idsf.graph import BipartiteGraph
from zoo.idsf.recommender import TopNRecommender

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from datamodules.interaction import InteractionData

RESULTS = Path(__file__).resolve().parent.parent / "results" / "idsf"
COMMAND = "python -m benchmarks.idsf"
TIMED = ("training", "same_maths", "ranking", "sampler", "propagation")
PATHS = (*TIMED, "memory", "clothing")
PER = 1000  # batches or products that times are given for


class _EvaluationClock(Callback):
    """Times one pass over the validation set."""

    def on_validation_start(self, *_: Any) -> None:
        self.clock = Clock()

    def on_validation_end(self, *_: Any) -> None:
        self.whole = self.clock.read()


class GivenVectors(TopNRecommender):
    """Ranks by vectors that are given, `(num_users, d)` and `(num_items, d)`."""

    def __init__(self, users: Tensor, items: Tensor, ks: list[int]) -> None:
        super().__init__(
            len(users), len(items), [], [], lr=1e-3, lr_decay=1.0, lr_decay_epochs=1, num_negatives=1, ks=ks,
            ndcg_variant="hits", top_k=max(ks), train_edges=None, features=None,
        )  # fmt: skip
        self.given = users, items

    def encode(self) -> tuple[Tensor, Tensor]:
        """The given vectors."""
        return self.given


@dataclass
class Bench:
    """Both implementations on one data set.

    Args:
        data: Interactions and features.
        hidden_size: d.
        steps: Training steps to time of ours with the loss over a batch.
        ranked_users: Users that the plain evaluation ranks for.
        batches: Batches to time of ours; of the reference a fifth, and of products a twentieth.
    """

    data: InteractionData
    hidden_size: int = HIDDEN_SIZE
    steps: int = 5
    ranked_users: int = 2000
    batches: int = 200

    # Training steps.

    @cached_property
    def plain(self) -> tuple[PlainIDSF, torch.optim.Optimizer]:
        """The published form with trained features, and its optimiser."""
        model = PlainIDSF(
            self.data.num_users, self.data.num_items, self.data.features, self.data.train_edges, self.hidden_size
        )
        return model, torch.optim.Adam(model.parameters(), lr=5e-4)

    @cached_property
    def plain_sampler(self) -> PlainSampler:
        """The published sampler."""
        return PlainSampler(self.data.train_edges, self.data.num_items)

    def plain_step(self) -> Timing:
        """One step of the published form on a batch that it draws."""
        model, optimizer = self.plain
        sampler = self.plain_sampler
        clock = Clock()
        train_step(model, optimizer, *sampler.sample(self.data.batch_size))
        return clock.read()

    def step(self, **options: Any) -> Timing:
        """A step of ours, the mean of some."""
        model = new_model(self.data, self.hidden_size, **options)
        return train(model, self.data, 1 if options.get("contrast_scope") == "all" else self.steps)

    def training(self) -> list[Case]:
        """The default of ours against the published settings."""
        note = (
            f"batches of {self.data.batch_size} users, features {self.data.feature_sizes}, hidden {self.hidden_size}; "
            f"ours in Lightning, mean of {self.steps} steps: contrasts the items of the batch, frozen features; "
            "reference: all items, trained features; both draw their batch"
        )
        return [Case("training step", self.step, self.plain_step, 8, note)]

    def same_maths(self) -> list[Case]:
        """The published settings on both sides."""
        note = "all items contrasted and features trained on both sides"
        return [
            Case(
                "training step, same maths",
                lambda: self.step(contrast_scope="all", trainable_features=True),
                self.plain_step,
                note=note,
            )
        ]

    # Ranking.

    @cached_property
    def vectors(self) -> tuple[Tensor, Tensor]:
        """Random vectors of users and items."""
        generator = torch.Generator().manual_seed(0)
        users, items = (
            torch.randn(size, self.hidden_size, generator=generator)
            for size in (self.data.num_users, self.data.num_items)
        )
        return users, items

    def rank(self, ks: Sequence[int] = (10, 20)) -> tuple[dict[str, float], Timing]:
        """Metrics of all users with validation items, and the time of it."""
        clock = _EvaluationClock()
        found = trainer(clock).validate(GivenVectors(*self.vectors, list(ks)), self.data, verbose=False)
        return {name.removeprefix("val/"): value for name, value in found[0].items()}, clock.whole

    @cached_property
    def wanted(self) -> dict[int, list[int]]:
        """By user the items to find in the validation."""
        found: dict[int, list[int]] = {}
        for batch in self.data.val_dataloader():
            for user, targets in zip(batch.user_ids.tolist(), batch.target_ids.tolist(), strict=True):
                found[user] = [item for item in targets if item >= 0]
        return found

    def plain_rank(self, ks: Sequence[int] = (10, 20)) -> tuple[dict[str, float], Timing]:
        """Metrics of some of these users, and the time scaled to all."""
        order = np.random.default_rng(0).permutation(list(self.wanted))[: self.ranked_users].tolist()
        some, known = {user: self.wanted[user] for user in order}, self.plain_sampler.items
        clock = Clock()
        found = evaluate(*self.vectors, known, some, ks)
        return found, clock.read() * (len(self.wanted) / len(some))

    def ranking(self) -> list[Case]:
        """Evaluation by full ranking from given vectors."""
        note = (
            f"{len(self.wanted):,} users with validation items, all {self.data.num_items:,} items ranked, vectors "
            f"given; ours in Lightning, all users, four metrics; reference: two metrics of "
            f"{min(self.ranked_users, len(self.wanted)):,} users, scaled to all"
        )
        return [Case("full ranking", lambda: self.rank()[1], lambda: self.plain_rank()[1], 4, note)]

    # Batches.

    @cached_property
    def negatives(self) -> NegativeSampler:
        """The sampler that our model has."""
        return NegativeSampler(self.data.train_edges[0], self.data.train_edges[1], self.data.num_items)

    def draw(self) -> Timing:
        """Batches of ours and their negatives."""
        sampler, loader = self.negatives, self.data.train_dataloader()
        clock = Clock()
        for draw in islice(loader.sampler, self.batches):
            batch = loader.dataset[draw]
            sampler(batch.user_ids, batch.keys, 1)
        return clock.read() * (PER / min(self.batches, len(loader)))

    def sampler(self) -> list[Case]:
        """Users, an item of each and a negative item of each."""
        size, count = self.data.batch_size, max(1, self.batches // 5)
        reference = repeated(lambda: self.plain_sampler.sample(size), count)
        note = (
            f"batches of {size} users with a positive and a negative item each, {self.batches} and {count} timed; "
            f"times of {PER:,} batches"
        )
        return [Case("sampler", self.draw, reference, 40, note)]

    # Propagation.

    def products(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """A step along the graph, ours and by a COO matrix."""
        sizes = self.data.num_users, self.data.num_items
        graph = BipartiteGraph(self.data.train_edges, *sizes, "rw_self")
        matrix = row_normalised_graph(self.data.train_edges, *sizes)
        return graph.propagate, lambda x: torch.sparse.mm(matrix, x)

    def propagation(self) -> list[Case]:
        """Forward and backward along the graph."""
        ours, plain = self.products()
        nodes, width = self.data.num_users + self.data.num_items, self.hidden_size
        generator = torch.Generator().manual_seed(0)
        parts = [torch.randn(nodes, width, generator=generator).requires_grad_() for _ in range(2)]
        both = torch.cat(parts, dim=1).detach().requires_grad_()
        one, two = torch.ones(nodes, width), torch.ones(nodes, 2 * width)

        def each(product: Callable[[Tensor], Tensor], inputs: Sequence[Tensor], gradient: Tensor) -> None:
            for x in inputs:
                x.grad = None
                product(x).backward(gradient)  # type: ignore[no-untyped-call]

        count = max(1, self.batches // 20)
        note = f"{nodes:,} nodes, forward and backward; reference: torch.sparse.mm of COO; times of {PER:,}"
        return [
            Case(
                f"propagation, {width} columns",
                repeated(lambda: each(ours, parts[:1], one), count),
                repeated(lambda: each(plain, parts[:1], one), count),
                2,
                note,
            ),
            Case(
                f"propagation, {2 * width} columns",
                repeated(lambda: each(ours, [both], two), count),
                repeated(lambda: each(plain, parts, one), count),
                note=f"{note}; reference: {width} columns and {width} more",
            ),
        ]


def repeated(function: Callable[[], object], times: int) -> Callable[[], Timing]:
    """A side that does something so many times and returns the time of `PER` of them."""

    def side() -> Timing:
        clock = Clock()
        for _ in range(times):
            function()
        return clock.read() * (PER / times)

    return side


def main() -> None:
    """Measure the paths named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=PATHS, help="what to measure")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each side")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    options = parser.parse_args()
    quiet()
    torch.manual_seed(0)
    data = "interactions of Amazon Baby" if os.environ.get("ZOO_DATA") else "random interactions in Baby's numbers"
    about = {"command": COMMAND, "data": f"{data}, random features"}
    bench = Bench(new_data(load(FEATURE_SIZES))) if set(options.paths) & set(TIMED) else None
    records: list[dict[str, Any]] = []
    for path in options.paths:
        file = options.results / f"benchmark_{path}.json"
        if path in TIMED:
            cases = getattr(bench, path)()
            records += report(cases, file, **about, threads=options.threads, repeats=options.repeats)
        else:
            if path == "clothing":
                about = {**about, "data": "random interactions in Clothing's numbers, random features"}
            found = memory_records(path)
            write_records(found, file, **about)
            show_memory(found)
    if records:
        show(records, f"IDSF, {all_threads()} cores")


if __name__ == "__main__":
    main()
