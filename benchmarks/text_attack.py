"""Attacks on titles: exposure of a title, whole attacks, and prompts whose beginnings are read once.

    python -m benchmarks.text_attack [--quick] [--paths scoring attack prefix_cache] [--repeats 3] [--threads 1]

- scoring: the exposure of a title whose vector is given, in the size of Amazon Beauty on random unit vectors: one
  product with the users, compared with thresholds, against cosines of all users and items and a partition of each
  user's row. The thresholds, computed once for all targets and titles, are a case of their own.
- attack: `deepwordbug` without early stop on 20 items of a tiny `RecFormerRec` with random weights: all candidates of
  a word in one call, against one title after the other, encoded alone and ranked among all items.
- prefix_cache: `TALLRec` about users and titles with and without what it keeps of the prompts' beginnings, when they
  are read in the same call, and when an earlier call has left them.

The attack works on the titles and histories of Amazon Video Games if `ZOO_DATA` names the data folder, otherwise on the
embedded sample; the rest is random. `--quick` takes small sizes. It and a choice of `--paths` leave no file unless
`--results` names a folder.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.reference.text_attack import PlainGoal, PlainResult, plain_attack, plain_exposure
from benchmarks.runner import Case, Clock, Timing, all_threads, report, show, timed
from datamodules.text_rec import TextRecBatch, TextRecData
from zoo.text_attack.attack import AttackResult, TextAttack, item_generator
from zoo.text_attack.constraints import EditDistance, ProtectedWords, ReadableWords, Stopwords, accepted
from zoo.text_attack.exposure import thresholds, top_scores
from zoo.text_attack.goals import ExposureGoal, goal_function
from zoo.text_attack.recformer_rec import RecFormerRec
from zoo.text_attack.recipes import build_attack
from zoo.text_attack.tallrec import TALLRec
from zoo.text_attack.transformations import CharacterEdits
from zoo.text_attack.words import Words

if TYPE_CHECKING:
    from collections.abc import Callable

    from zoo.text_attack.pointwise import PromptUsers

RESULTS = Path(__file__).resolve().parent.parent / "results" / "text_attack"
COMMAND = "python -m benchmarks.text_attack"
PATHS = ("scoring", "attack", "prefix_cache")
RECIPE, SEED = "deepwordbug", 42


@dataclass(frozen=True)
class Sizes:
    """What is worked on.

    Attributes:
        anchors: Users of the scored vectors; Beauty's, of whom a search asks 40 %.
        items: Items of the scored vectors.
        width: Numbers of a scored vector.
        k: Length of a user's list.
        titles: Items whose titles are read in the attack.
        users: Anchor users of the attack.
        targets: Items that are attacked.
        hidden_size: Of the decoder, whose heads are 32 wide.
        num_layers: Of the decoder.
        prefix: Tokens of a prompt before the title that is asked about.
        tail: Tokens from there on.
        asked: Users who are asked.
        candidates: Titles that each of them is asked about.
    """

    anchors: int = 8945
    items: int = 12101
    width: int = 768
    k: int = 50
    titles: int = 1000
    users: int = 1200
    targets: int = 20
    hidden_size: int = 128
    num_layers: int = 4
    prefix: int = 120
    tail: int = 24
    asked: int = 64
    candidates: int = 20


FULL = Sizes()
QUICK = Sizes(400, 500, 64, 20, 60, 80, 2, 64, 2, 60, 12, 8, 5)


# Scoring.


class Vectors(NamedTuple):
    """Random unit vectors, and titles of an item as such.

    Attributes:
        users: `(anchors, width)`.
        items: `(items, width)`.
        candidates: `(titles, width)`.
    """

    users: Tensor
    items: Tensor
    candidates: Tensor


def random_vectors(sizes: Sizes, titles: int = 4) -> Vectors:
    """Vectors in these numbers; titles are mixed with users, so that some users do find them."""
    generator = torch.Generator().manual_seed(0)
    users, items, candidates = (
        F.normalize(torch.randn(count, sizes.width, generator=generator), dim=-1)
        for count in (sizes.anchors, sizes.items, titles)
    )
    return Vectors(users, items, F.normalize(candidates + 0.2 * users[:titles], dim=-1))


def goal_of(users: Tensor, tau: Tensor, vectors: Tensor, k: int) -> Callable[[list[str]], Tensor]:
    """Our goal where the vectors of the titles `(titles, width)` are given."""
    return goal_function(ExposureGoal(k, None), lambda texts: users @ vectors[: len(texts)].T, tau)


def scoring_cases(sizes: Sizes) -> list[Case]:
    """Exposure of titles, each; and what is computed once."""
    vectors, item_id, repeats = random_vectors(sizes), 0, 50
    tau = thresholds(top_scores(vectors.users, vectors.items, sizes.k), item_id)
    replaced = vectors.items.clone()

    def reference() -> float:
        replaced[item_id] = vectors.candidates[0]
        return plain_exposure(vectors.users, replaced, item_id, sizes.k)

    def ours(titles: int) -> Callable[[], Timing]:
        goal, texts = goal_of(vectors.users, tau, vectors.candidates, sizes.k), [str(one) for one in range(titles)]
        return repeated(lambda: goal(texts), repeats, titles)

    found = float(goal_of(vectors.users, tau, vectors.candidates, sizes.k)(["0"]))
    size = f"{sizes.anchors:,} users, {sizes.items:,} items, {sizes.width} numbers a vector, float32, K = {sizes.k}"
    plain = "cosines of all users and items, a partition of each row"
    note = f"{size}; mean of {repeats} calls; the exposures, {found:.4f}, differ by {abs(found - reference()):.1e}"
    return [
        Case("scoring, a title", ours(1), timed(reference), 1000, f"{note}; reference: {plain}"),
        Case(
            "scoring, a title of four",
            ours(4),
            timed(reference),
            note=f"{note}; four in a call, time of one; reference: {plain}",
        ),
        Case(
            "scoring, thresholds",
            timed(lambda: thresholds(top_scores(vectors.users, vectors.items, sizes.k), item_id)),
            timed(reference),
            note=f"{size}; once for all targets and titles; reference: a title, by {plain}",
        ),
    ]


def repeated(function: Callable[[], object], repeats: int, pieces: int) -> Callable[[], Timing]:
    """A side that does something so many times and returns the time of one of its pieces."""

    def side() -> Timing:
        clock = Clock()
        for _ in range(repeats):
            function()
        return clock.read() * (1 / (repeats * pieces))

    return side


# Attacks.


class AttackBench:
    """Items of a victim to attack, by our engine and in plain form.

    What both need and nobody's attack changes, the vectors of users and of the clean catalogue, is given to both.

    Args:
        sizes: What is worked on.
        real: Whether titles and histories are those of Amazon Video Games, or generated.
    """

    def __init__(self, sizes: Sizes, real: bool) -> None:
        self.k = sizes.k
        data = TextRecData(
            "amazon_games" if real else "embedded",
            sample_items=max(sizes.titles, 20),
            sample_users=3 * sizes.users,
            keep_items=sizes.titles,
            min_interactions=5,
            keep_users=sizes.users,
            max_history=5,
            target_share=1.0,
        )
        data.setup("test")
        torch.manual_seed(0)
        self.victim = RecFormerRec(max_items=5, max_tokens=161)
        self.victim.set_titles(data.titles)
        self.users = self.victim.user_state(data.whole("test"))
        self.items = self.victim.encode_items()
        # In an item whose vector another has too, ties with that one would be decided by chance in the plain form.
        self.targets = distinct_rows(self.items)[: sizes.targets].tolist()
        # Byte pairs know every word: none stands for an unknown one.
        self.attack = build_attack(RECIPE, delta=None, unk=None, seed=SEED)

    def ours(self) -> list[AttackResult]:
        """Thresholds, and an attack on each target."""
        assert isinstance(self.attack, TextAttack)
        top, results = top_scores(self.users, self.items, self.k), []
        for item in self.targets:
            tau = thresholds(top, item)
            goal = goal_function(ExposureGoal(self.k, None), partial(self.victim.score, self.users), tau)
            title = self.victim.titles[item]
            results.append(self.attack.attack(title, goal, item_id=item, readable=self.victim.readable))
        return results

    def plain(self) -> list[PlainResult]:
        """An attack on each target, one title after the other; the same edits are drawn."""
        return [self.plain_one(item) for item in self.targets]

    def plain_one(self, item: int) -> PlainResult:
        """An attack on one target."""
        title = self.victim.titles[item]
        original, rng = Words.of(title), item_generator(SEED, RECIPE, item)
        transformation, near = CharacterEdits(), EditDistance(30)

        def edits(words: Words, place: int) -> list[Words]:
            return accepted([near], original, words, transformation.candidates(words, place, rng), place)

        limits = (Stopwords(), ProtectedWords(), ReadableWords(self.victim.readable(title)))
        places = set.intersection(*(limit.modifiable(original) for limit in limits))
        goal = PlainGoal(self.victim.encode_items, self.users, self.items, item, self.k)
        return plain_attack(title, sorted(places), goal, edits)


def distinct_rows(vectors: Tensor) -> Tensor:
    """Rows that no other row equals, in a random order."""
    _, place, count = torch.unique(vectors, dim=0, return_inverse=True, return_counts=True)
    alone = torch.nonzero(count[place] == 1).flatten()
    return alone[torch.randperm(len(alone), generator=torch.Generator().manual_seed(SEED))]


def attack_cases(sizes: Sizes, real: bool) -> list[Case]:
    """All targets."""
    bench = AttackBench(sizes, real)
    found, plain = bench.ours(), bench.plain()
    pairs = list(zip(found, plain, strict=True))
    same = sum(one.perturbed == other.text for one, other in pairs)
    largest = max(abs(one.goal_post - other.after) for one, other in pairs)
    queries = sum(one.queries for one in plain) / len(plain)
    note = (
        f"{RECIPE}, no early stop, {len(bench.users):,} users, {len(bench.items):,} titles, random weights; vectors of "
        f"users and clean titles are given, thresholds are not; {same} of {len(plain)} attacked titles are equal, "
        f"exposures differ by {largest:.1e} at most; reference: {queries:.1f} titles for each target, each encoded "
        "alone and ranked by cosines of all users and items"
    )
    return [Case(f"attack, {len(plain)} titles", timed(bench.ours), timed(bench.plain), 10, note)]


# Prompts.


class PromptBench:
    """A decoder, users and titles whose prompts have a given number of tokens.

    Titles and prompt are made of few words, so that the tokenizer makes one token of each.

    Args:
        sizes: What is worked on.
        history: Titles of a history.
    """

    def __init__(self, sizes: Sizes, history: int = 5) -> None:
        draw = random.Random(0)
        words = ["".join(draw.choice("bdfgklmnprst") + draw.choice("aeiou") for _ in range(3)) for _ in range(100)]
        # A title with the mark behind it; a question is a title, filling words, "Answer" and ":".
        length = min((sizes.prefix - 2) // history - 1, sizes.tail - 3)
        header = " ".join(words[place % 100] for place in range(sizes.prefix - history * (length + 1) - 1))
        filling = "".join(f" {words[place % 100]}" for place in range(sizes.tail - length - 2))
        titles = [" ".join(draw.choices(words, k=length)) for _ in range(200)]
        torch.manual_seed(0)
        self.victim = TALLRec(
            backbone_options={
                "hidden_size": sizes.hidden_size,
                "num_layers": sizes.num_layers,
                "num_heads": sizes.hidden_size // 32,
                "intermediate_size": 2 * sizes.hidden_size,
            },
            prompt={
                "header": header,
                "liked": {"item": " {title}", "separator": ".", "end": "."},
                "tail": " {title}" + filling + " Answer:",
                "answer": " {answer}",
            },
            max_history=history,
            max_title_tokens=length,
        )
        self.victim.set_titles(titles)
        self.texts = [" ".join(draw.choices(words, k=length)) for _ in range(sizes.candidates)]
        self.batch = users_of(sizes.asked, history, len(titles))
        self.users: PromptUsers = self.victim.user_state(self.batch)

    def prompts(self) -> list[list[int]]:
        """Tokens of all prompts, those of a user behind each other."""
        table, tails = self.users.tables.with_texts(self.texts)
        rows = [
            [piece for piece in [*user, tail] if piece >= 0]
            for user in self.users.pieces.tolist()
            for tail in tails.tolist()
        ]
        tokens = [part.tolist() for part in torch.split(table.flat, table.lengths.tolist())]
        return [[token for piece in row for token in tokens[piece]] for row in rows]

    def lengths(self) -> tuple[int, int]:
        """Most tokens of a prompt's beginning, and of the rest."""
        table, tails = self.users.tables.with_texts(self.texts)
        return int(table.lengths_of(self.users.pieces).sum(1).max()), int(table.lengths[tails].max())

    def score(self, cached: bool, kept: bool = True) -> Tensor:
        """Probabilities `(users, titles)`; with `kept`, of users who may have been asked before."""
        self.victim.use_prefix_cache = cached
        return self.victim.score(self.users if kept else self.victim.user_state(self.batch), self.texts)


def users_of(count: int, history: int, num_items: int) -> TextRecBatch:
    """Users with random full histories."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, history)
    return TextRecBatch(
        user_ids=torch.arange(count),
        history=torch.randint(num_items, shape, generator=generator),
        liked=torch.ones(shape, dtype=torch.bool),
        item_ids=torch.zeros(count, dtype=torch.int64),
        labels=torch.ones(count),
        candidate_ids=torch.zeros(count, 0, dtype=torch.int64),
        keys=torch.zeros(count, dtype=torch.int64),
    )


def prefix_cache_cases(sizes: Sizes) -> list[Case]:
    """Titles for all users, with and without a cache."""
    bench = PromptBench(sizes)
    largest = float((bench.score(True) - bench.score(False)).abs().max())
    prefix, tail = bench.lengths()
    note = (
        f"{sizes.num_layers} layers of {sizes.hidden_size}, {sizes.asked} users x {sizes.candidates} titles, "
        f"{prefix} + {tail} tokens; probabilities differ by {largest:.1e} at most; reference: the same without a "
        f"cache, {bench.victim.score_batch} whole prompts in a batch"
    )
    how = {"read": "ours reads the beginnings in each call", "kept": "ours has read them before, as in a search"}

    def side(cached: bool, kept: bool) -> Callable[[], Timing]:
        return timed(lambda: bench.score(cached, kept))

    return [
        Case(f"prefix cache, beginnings {name}", side(True, kept), side(False, kept), 2.5, f"{note}; {how[name]}")
        for name, kept in (("read", False), ("kept", True))
    ]


def cases_of(path: str, sizes: Sizes, real: bool) -> list[Case]:
    """The cases of a path."""
    if path == "scoring":
        return scoring_cases(sizes)
    return attack_cases(sizes, real) if path == "attack" else prefix_cache_cases(sizes)


def main() -> None:
    """Measure the paths named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=PATHS, help="what to measure")
    parser.add_argument("--repeats", type=int, help="timed runs of each side; 3, or 1 with --quick")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--results", type=Path, help=f"folder of the JSON file, {RESULTS} for all paths in full size")
    options = parser.parse_args()
    logging.getLogger("datamodules").setLevel(logging.ERROR)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sizes, repeats = (QUICK if options.quick else FULL), options.repeats or (1 if options.quick else 3)
    real = bool(os.environ.get("ZOO_DATA"))
    source = "Amazon Video Games" if real else "the embedded sample"
    command = f"{COMMAND} --quick" if options.quick else COMMAND
    about = {"command": command, "data": f"titles of {source} in the attack, otherwise random"}
    whole = not options.quick and set(options.paths) == set(PATHS)
    cases = [case for path in options.paths for case in cases_of(path, sizes, real)]
    with tempfile.TemporaryDirectory() as passing:
        folder = options.results or (RESULTS if whole else Path(passing))
        records = report(cases, folder / "benchmark.json", **about, threads=options.threads, repeats=repeats)
    show(records, f"Text attacks, {all_threads()} cores")


if __name__ == "__main__":
    main()
