"""Both sides of the benchmark of text attacks find the same, and every case runs."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks import text_attack
from benchmarks.reference.text_attack import plain_exposure, plain_probabilities
from benchmarks.text_attack import (
    PATHS,
    QUICK,
    AttackBench,
    PromptBench,
    cases_of,
    distinct_rows,
    goal_of,
    random_vectors,
)
from zoo.text_attack.exposure import thresholds, top_scores
from zoo.text_attack.prefix_cache import read_prefix

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

SIZES = replace(
    QUICK, anchors=150, items=60, width=16, k=8, titles=40, users=50, targets=3, prefix=40, tail=10, asked=4,
    candidates=3,
)  # fmt: skip


@pytest.fixture(autouse=True)
def levels_come_back():
    """The benchmark silences the data module; other tests want to hear it."""
    logger = logging.getLogger("datamodules")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(scope="module")
def attacks() -> AttackBench:
    return AttackBench(SIZES, real=False)


@pytest.fixture(scope="module")
def prompts() -> PromptBench:
    return PromptBench(SIZES)


@pytest.mark.parametrize("k", [1, 8, 59])
def test_both_find_the_same_exposure_of_titles_old_and_new(k: int) -> None:
    vectors = random_vectors(replace(SIZES, k=k), titles=3)
    top = top_scores(vectors.users, vectors.items, k)
    values = []
    for item in range(0, 60, 7):
        tried = torch.cat([vectors.items[item : item + 1], vectors.candidates])
        found = goal_of(vectors.users, thresholds(top, item), tried, k)(["a", "b", "c", "d"]).tolist()
        for value, vector in zip(found, tried, strict=True):
            items = vectors.items.clone()
            items[item] = vector
            wanted = plain_exposure(vectors.users, items, item, k, rows=64)
            assert value == pytest.approx(wanted, abs=1e-9)
            assert plain_exposure(3 * vectors.users, 2 * items, item, k, rows=1000) == wanted
            values.append(wanted)
    assert len(set(values)) > 5


def test_the_plain_exposures_of_a_catalogue_add_up_to_the_length_of_a_list() -> None:
    vectors = random_vectors(SIZES)
    total = sum(plain_exposure(vectors.users, vectors.items, item, SIZES.k) for item in range(SIZES.items))
    assert total == pytest.approx(SIZES.k)


def test_both_searches_end_at_the_same_titles_and_exposures(attacks: AttackBench) -> None:
    found, plain = attacks.ours(), attacks.plain()
    assert [one.perturbed for one in found] == [one.text for one in plain]
    for one, other in zip(found, plain, strict=True):
        assert one.goal_pre == pytest.approx(other.before, abs=1e-9)
        assert one.goal_post == pytest.approx(other.after, abs=1e-9)
        assert one.n_scored == other.queries
        assert one.stop == "exhausted"
    assert sum(one.perturbed != one.original for one in found) >= 2
    assert any(one.goal_post > one.goal_pre for one in found)


def test_the_plain_search_encodes_one_title_at_a_time_and_ours_those_of_a_word(
    attacks: AttackBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, sizes = attacks.victim.encode_items, list[int]()

    def counted(texts: list[str] | None = None) -> Tensor:
        assert texts is not None
        sizes.append(len(texts))
        return encode(texts)

    monkeypatch.setattr(attacks.victim, "encode_items", counted)
    queries = sum(one.queries for one in attacks.plain())
    assert sizes == [1] * queries
    sizes.clear()
    words = [len(attacks.victim.titles[item].split()) for item in attacks.targets]
    attacks.ours()
    assert len(sizes) <= sum(2 + count for count in words) < queries
    assert max(sizes) >= 3


def test_items_that_share_a_vector_are_no_targets() -> None:
    rows = distinct_rows(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [2.0, 2.0]]))
    assert sorted(rows.tolist()) == [1, 3]


def test_probabilities_are_those_of_each_prompt_by_itself_with_and_without_a_cache(prompts: PromptBench) -> None:
    answers = prompts.victim.answers
    wanted = plain_probabilities(prompts.victim.decoder, prompts.prompts(), answers.yes_id, answers.no_id)
    wanted = wanted.view(SIZES.asked, SIZES.candidates)
    assert float(wanted.std()) > 1e-3
    for cached in (False, True):
        for kept in (False, True, True):
            torch.testing.assert_close(prompts.score(cached, kept), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("prefix", "tail"), [(40, 10), (120, 24)])
def test_prompts_have_the_lengths_asked_for(prefix: int, tail: int) -> None:
    bench = PromptBench(replace(SIZES, prefix=prefix, tail=tail))
    assert bench.lengths() == (prefix, tail)
    assert {len(prompt) for prompt in bench.prompts()} == {prefix + tail}


@pytest.mark.parametrize("path", PATHS)
def test_each_path_times_both_sides(path: str) -> None:
    for case in cases_of(path, SIZES, real=False):
        assert case.reference().wall > 0
        assert case.ours().wall > 0
        assert "reference" in case.note


def test_the_ratios_asked_for_stand_beside_their_cases_and_what_differs_in_their_notes() -> None:
    cases = [case for path in PATHS for case in cases_of(path, SIZES, real=False)]
    assert {case.name: case.required for case in cases if case.required is not None} == {
        "scoring, a title": 1000,
        "attack, 3 titles": 10,
        "prefix cache, beginnings read": 2.5,
        "prefix cache, beginnings kept": 2.5,
    }
    notes = {case.name: case.note for case in cases}
    assert "differ by 0.0e+00" in notes["scoring, a title"]
    assert "3 of 3 attacked titles are equal, exposures differ by 0.0e+00" in notes["attack, 3 titles"]


def test_only_the_kept_cache_is_timed_without_reading_beginnings(monkeypatch: pytest.MonkeyPatch) -> None:
    read, kept = cases_of("prefix_cache", SIZES, real=False)
    kept.ours()
    calls = counted_calls(monkeypatch)
    kept.ours()
    assert not calls
    kept.reference()
    read.reference()
    assert not calls
    read.ours()
    assert calls


def counted_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever beginnings are read."""
    calls = list[int]()

    def counted(*given: object) -> object:
        calls.append(1)
        return read_prefix(*given)  # type: ignore[arg-type]

    monkeypatch.setattr("zoo.text_attack.tallrec.read_prefix", counted)
    return calls


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    monkeypatch.setattr(text_attack, "QUICK", SIZES)
    monkeypatch.delenv("ZOO_DATA", raising=False)

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["text_attack", *arguments])
        text_attack.main()
        return capsys.readouterr().out

    return call


def test_the_command_writes_one_file_for_all_paths(run: Callable[..., str], tmp_path: Path) -> None:
    assert "attack, 3 titles" in run("--quick", "--results", str(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["benchmark.json"]
    written = json.loads((tmp_path / "benchmark.json").read_text())
    assert written["command"].endswith("--quick")
    assert "embedded sample" in written["data"]
    assert len(written["cases"]) == 6


def test_small_sizes_and_a_choice_of_paths_leave_no_file(
    run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_attack, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(text_attack, "FULL", SIZES)
    run("--quick", "--paths", "scoring")
    run("--paths", "scoring", "--repeats", "1")
    assert not list(tmp_path.iterdir())
    run("--repeats", "1")
    assert [file.name for file in (tmp_path / "results").iterdir()] == ["benchmark.json"]
