"""Likeness of items, against loops over pairs and scipy."""

from __future__ import annotations

import itertools
import logging
import math
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr

from zoo.idsf import item_pairs
from zoo.idsf.item_pairs import num_pairs, pair_cosines, pair_index, unit_rows
from zoo.idsf.semantics import (
    co_interaction,
    cosine_auc,
    cosine_spearman,
    id_semantics_report,
    measure_id_semantics,
    study_sample,
    top_k_cosine,
)

USERS, ITEMS = 30, 24


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw_edges(seed: int, share: float = 0.2) -> torch.Tensor:
    return (torch.rand(USERS, ITEMS, generator=random(seed)) < share).nonzero().T


def multi_hot(seed: int, rows: int = ITEMS) -> torch.Tensor:
    """Vectors with many equal cosines, one of them of zeros."""
    vectors = (torch.rand(rows, 5, generator=random(seed)) < 0.4).float()
    vectors[3] = 0
    return vectors


def cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    lengths = float(first.double().norm() * second.double().norm())
    return round(float(first.double() @ second.double()) / lengths, 7) if lengths else 0.0


def counted(edges: torch.Tensor, items: list[int]) -> list[list[int]]:
    likers = {item: {user for user, own in edges.T.tolist() if own == item} for item in items}
    return [[len(likers[i] & likers[j]) if i != j else 0 for j in items] for i in items]


def counted_auc(values: dict[tuple[int, int], float], related: set[tuple[int, int]]) -> float:
    above = [
        1.0 if values[pair] > values[other] else 0.5 if values[pair] == values[other] else 0.0
        for pair in related
        for other in values
        if other not in related
    ]
    return sum(above) / len(above)


def pairs_of(number: int) -> list[tuple[int, int]]:
    return list(itertools.combinations(range(number), 2))


@pytest.mark.parametrize("rows", [1, 2, 7, 40])
def test_pairs_stand_in_the_order_of_the_upper_triangle(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_pairs, "_ROWS", 6)
    vectors = torch.randn(rows, 3, generator=random(rows))
    found = pair_cosines(unit_rows(vectors, "vectors"))
    assert len(found) == num_pairs(rows) == len(pairs_of(rows))
    for place, (i, j) in enumerate(pairs_of(rows)):
        assert float(found[place]) == pytest.approx(cosine(vectors[i], vectors[j]), abs=2e-7)
        both = torch.tensor([i, j]), torch.tensor([j, i])
        assert pair_index(*both, rows).tolist() == [place, place]


@pytest.mark.parametrize("k", [1, 3, 100])
def test_each_row_keeps_its_nearest_others_only(k: int) -> None:
    vectors = torch.randn(9, 4, generator=random(0))
    found = top_k_cosine(vectors, k)
    for i in range(9):
        others = {j: cosine(vectors[i], vectors[j]) for j in range(9) if j != i}
        nearest = sorted(others, key=lambda j: -others[j])[:k]
        for j in range(9):
            expected = others[j] if j in nearest else 0.0
            assert float(found[i, j]) == pytest.approx(expected, abs=2e-7)


def test_of_equally_near_items_the_earlier_is_kept() -> None:
    found = top_k_cosine(torch.ones(5, 2), 2)
    assert [row.nonzero().flatten().tolist() for row in found] == [[1, 2], [0, 2], [0, 1], [0, 1], [0, 1]]


def test_items_share_the_users_that_a_loop_counts() -> None:
    edges = draw_edges(1)
    found = co_interaction(edges, USERS, ITEMS)
    assert found.tolist() == counted(edges, list(range(ITEMS)))
    some = [7, 2, 19]
    assert co_interaction(edges, USERS, ITEMS, torch.tensor(some)).tolist() == counted(edges, some)
    assert int(found.sum()) > 0


def test_a_repeated_interaction_counts_once() -> None:
    edges = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 0, 1, 0]])
    assert co_interaction(edges, 2, 3).tolist() == [[0, 2, 0], [2, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("form", ["pairs", "matrix"])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_auc_is_the_share_of_pairs_in_order_that_a_loop_counts(
    form: str, ties: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(item_pairs, "_ROWS", 7)
    monkeypatch.setattr(item_pairs, "_QUERIES", 10)
    vectors = multi_hot(2) if ties else torch.randn(ITEMS, 4, generator=random(2))
    values = {(i, j): cosine(vectors[i], vectors[j]) for i, j in pairs_of(ITEMS)}
    related = {pair for pair in values if torch.rand(1, generator=random(hash(pair) % 1000)) < 0.3}
    if form == "pairs":
        # In either order, and one of them twice.
        listed = [(j, i) if (i + j) % 2 else (i, j) for i, j in sorted(related)]
        given = torch.tensor([*listed, listed[0]]).T
    else:
        given = torch.zeros(ITEMS, ITEMS, dtype=torch.bool)
        given[tuple(torch.tensor(sorted(related)).T)] = True
        given.fill_diagonal_(True)
    found = cosine_auc(vectors, given)
    assert found == pytest.approx(counted_auc(values, related), abs=1e-12)
    assert ties == (len(set(values.values())) < len(values) / 2)


def test_auc_of_equal_vectors_is_a_half_and_of_blocks_is_one() -> None:
    blocks = torch.tensor([[1.0, 0], [2, 0], [0, 1], [0, 3]])
    related = torch.tensor([[0, 3], [1, 2]])
    assert cosine_auc(blocks, related) == 1.0
    assert cosine_auc(torch.ones(4, 2), related) == 0.5


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_spearman_is_that_of_scipy(ties: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_pairs, "_QUERIES", 50)
    vectors = multi_hot(4) if ties else torch.randn(ITEMS, 4, generator=random(4))
    other = torch.cat((vectors[:, :2], multi_hot(5)), 1)
    mine = [cosine(vectors[i], vectors[j]) for i, j in pairs_of(ITEMS)]
    theirs = [cosine(other[i], other[j]) for i, j in pairs_of(ITEMS)]
    expected = spearmanr(mine, theirs).statistic
    assert abs(expected) > 0.05
    assert cosine_spearman(vectors, other) == pytest.approx(expected, abs=1e-6)
    counts = torch.randint(0, 4, (ITEMS, ITEMS), generator=random(6))
    upper = [int(counts[i, j]) for i, j in pairs_of(ITEMS)]
    assert cosine_spearman(vectors, counts, similarity=True) == pytest.approx(
        spearmanr(mine, upper).statistic, abs=1e-6
    )


def test_spearman_is_one_with_itself_minus_one_reversed_and_zero_with_a_constant() -> None:
    vectors = torch.randn(ITEMS, 4, generator=random(7))
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    assert cosine_spearman(vectors, 3 * vectors) == pytest.approx(1, abs=1e-6)
    assert cosine_spearman(vectors, -(unit @ unit.T), similarity=True) == pytest.approx(-1, abs=1e-5)
    assert cosine_spearman(vectors, torch.ones(ITEMS, 2)) == 0.0


def test_of_too_many_items_some_are_drawn_by_the_seed(caplog: pytest.LogCaptureFixture) -> None:
    vectors = torch.randn(60, 6, generator=random(8))
    related = (vectors @ vectors.T + torch.randn(60, 60, generator=random(9))) > 2
    reference = vectors + torch.randn(60, 6, generator=random(10))
    exact = cosine_auc(vectors, related), cosine_spearman(vectors, reference)
    with caplog.at_level(logging.INFO):
        drawn = [
            (cosine_auc(vectors, related, 40, seed), cosine_spearman(vectors, reference, False, 40, seed))
            for seed in (0, 0, 1)
        ]
    assert drawn[0] == drawn[1] != drawn[2] and exact not in drawn
    for found in drawn:
        assert found == pytest.approx(exact, abs=0.1)
    assert "drew 40 of 60 items" in caplog.text
    # The drawn items are those that the measure of a part would compare.
    kept = torch.randperm(60, generator=random(1))[:40].sort().values
    assert drawn[2] == (
        cosine_auc(vectors[kept], related[kept][:, kept]),
        cosine_spearman(vectors[kept], reference[kept]),
    )


def report_inputs() -> dict[str, Any]:
    train, held_out = draw_edges(11, 0.25), draw_edges(12, 0.3)
    # Items 5 and 20 are in no training interaction.
    cold = (train[1] == 5) | (train[1] == 20)
    return {
        "representations": {
            "id text": torch.randn(ITEMS, 4, generator=random(13)),
            "raw text": torch.randn(ITEMS, 7, generator=random(14)),
        },
        "held_out_edges": held_out,
        "train_edges": train[:, ~cold],
        "num_users": USERS,
        "num_items": ITEMS,
        "content": {"genre": multi_hot(15)},
        "min_shared": 4,
    }


def test_the_report_holds_what_loops_over_items_with_training_interactions_give() -> None:
    inputs = report_inputs()
    report = measure_id_semantics(**inputs)
    warm = [item for item in range(ITEMS) if item not in (5, 20)]
    pairs = list(itertools.combinations(warm, 2))
    held_out = counted(inputs["held_out_edges"], list(range(ITEMS)))
    train = inputs["train_edges"]
    shared = counted(train, list(range(ITEMS)))
    degree = torch.bincount(train[1], minlength=ITEMS).tolist()
    related = {(i, j) for i, j in pairs if held_out[i][j] >= 4}
    structure = [round(shared[i][j] / math.sqrt(degree[i] * degree[j]), 7) for i, j in pairs]
    genre = [cosine(inputs["content"]["genre"][i], inputs["content"]["genre"][j]) for i, j in pairs]
    assert report[1:] == (len(warm), 2, len(pairs), len(related)) and len(related) > 5
    assert list(report.scores) == ["id text", "raw text"]
    for name, own in inputs["representations"].items():
        values = {(i, j): cosine(own[i], own[j]) for i, j in pairs}
        assert report.scores[name] == {
            "auc": pytest.approx(counted_auc(values, related), abs=1e-12),
            "spearman/genre": pytest.approx(spearmanr(list(values.values()), genre).statistic, abs=1e-6),
            "spearman/structure": pytest.approx(spearmanr(list(values.values()), structure).statistic, abs=1e-6),
        }
    assert id_semantics_report(**inputs) == report.scores


def test_ids_that_hold_structure_score_above_untrained_ones() -> None:
    topic = torch.arange(200) % 5
    liked = torch.arange(300)[:, None] % 5 == topic
    edges = (liked & (torch.rand(300, 200, generator=random(16)) < 0.4)).nonzero().T
    held_out = torch.rand(edges.shape[1], generator=random(17)) < 0.5
    genre = torch.eye(5)[topic]
    ids = genre + 0.3 * torch.randn(200, 5, generator=random(18))
    untrained = torch.randn(200, 16, generator=random(19))
    found = id_semantics_report(
        {"id": ids, "untrained": untrained}, edges[:, held_out], edges[:, ~held_out], 300, 200, {"genre": genre}
    )
    assert min(found["id"]["spearman/genre"], found["id"]["spearman/structure"]) > 0.25 and found["id"]["auc"] > 0.85
    assert found["untrained"]["auc"] == pytest.approx(0.5, abs=0.05)
    assert found["untrained"]["spearman/structure"] == pytest.approx(0, abs=0.05)


def test_without_related_pairs_the_auc_is_nan_and_a_warning_says_so(caplog: pytest.LogCaptureFixture) -> None:
    inputs = report_inputs() | {"min_shared": 25}
    with caplog.at_level(logging.WARNING):
        report = measure_id_semantics(**inputs)
    assert math.isnan(report.scores["id text"]["auc"]) and report.num_related == 0
    assert not math.isnan(report.scores["id text"]["spearman/structure"])
    assert "0 of 231 pairs are liked by 25 users" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"representations": {"id": torch.ones(ITEMS - 1, 2)}}, r"'id'.*24 items.*\(23, 2\)"),
        ({"content": {"genre": torch.ones(ITEMS)}}, r"'genre'.*24 items"),
        ({"content": {"genre": torch.full((ITEMS, 1), math.nan)}}, "'genre': row 0 .*not finite"),
        ({"min_shared": 0}, "min_shared"),
        ({"num_users": 3}, "user ids must be 0 to 2"),
        ({"held_out_edges": torch.tensor([[0], [ITEMS]])}, "item ids must be 0 to 23, got 24 to 24"),
        ({"train_edges": torch.tensor([[0, 1], [3, 4]])}, "3 items or more.*got 2"),
        ({"train_edges": torch.zeros(3, 2).long()}, r"int64 \(2, E\)"),
    ],
    ids=["rows", "shape", "nan", "min_shared", "users", "items", "too few", "edges"],
)
def test_the_report_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_id_semantics(**(report_inputs() | change))


@pytest.mark.parametrize(
    ("related", "message"),
    [
        (torch.zeros(4, 4, dtype=torch.bool), "0 of 6 pairs"),
        (torch.ones(4, 4, dtype=torch.bool), "6 of 6 pairs"),
        (torch.ones(3, 3, dtype=torch.bool), "relation of"),
        (torch.tensor([[0], [4]]), "items 0 to 3, got 0 to 4"),
        (torch.tensor([[1], [1]]), "not related to itself"),
        (torch.tensor([0.5, 1]), "expected int64"),
    ],
    ids=["none", "all", "shape", "range", "self", "fractions"],
)
def test_relations_without_an_auc_are_refused(related: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cosine_auc(torch.randn(4, 2, generator=random(0)), related)


def test_other_sizes_are_refused() -> None:
    vectors = torch.randn(4, 2, generator=random(0))
    with pytest.raises(ValueError, match="of as many"):
        cosine_spearman(vectors, torch.ones(5, 2))
    with pytest.raises(ValueError, match=r"\(n, n\)"):
        cosine_spearman(vectors, torch.ones(4, 2), similarity=True)
    with pytest.raises(ValueError, match="k must"):
        top_k_cosine(vectors, 0)
    with pytest.raises(ValueError, match="max_items"):
        cosine_spearman(vectors, vectors, max_items=2)
    with pytest.raises(ValueError, match="distinct"):
        co_interaction(torch.tensor([[0], [0]]), 1, 2, torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="items must be 0 to 1"):
        co_interaction(torch.tensor([[0], [0]]), 1, 2, torch.tensor([2]))


def edges_with(counts: list[int]) -> torch.Tensor:
    """A user with that many items for each count; the items of neighbours overlap."""
    return torch.tensor([(user, 2 * user + item) for user, count in enumerate(counts) for item in range(count)]).T


def test_the_sample_has_all_items_of_users_within_the_bounds() -> None:
    counts = [4, 5, 60, 61, 7, 8, 9, 10, 3, 2, 30]
    edges = edges_with(counts)
    sample = study_sample(edges[:, torch.randperm(edges.shape[1], generator=random(0))], num_users=5, seed=3)
    users = sample.user_ids.tolist()
    assert len(set(users)) == 5 and all(5 <= counts[user] <= 60 for user in users)
    owned = [{item for user, item in edges.T.tolist() if user == own} for own in users]
    assert set(sample.item_ids.tolist()) == set().union(*owned) and len(sample.item_ids.unique()) == len(
        sample.item_ids
    )
    for item, group in zip(sample.item_ids.tolist(), sample.groups.tolist(), strict=True):
        assert group == min(place for place, own in enumerate(owned) if item in own)
    assert sample.groups.tolist() == sorted(sample.groups.tolist())


def test_the_sample_follows_its_seed() -> None:
    edges = edges_with([6] * 40)
    first, again, other = (study_sample(edges, 4, seed).user_ids.tolist() for seed in (0, 0, 1))
    assert first == again != other


def test_users_nearest_to_the_bounds_fill_a_sample_and_heavy_ones_are_cut() -> None:
    edges = edges_with([1, 4, 90, 5, 400])
    sample = study_sample(edges, num_users=4)
    assert sample.user_ids.tolist() == [3, 1, 0, 2]
    heavy = sample.item_ids[sample.groups == 3]
    assert 45 < len(heavy) <= 60 and int(heavy.max()) > 4 + 60
    assert len(study_sample(edges, num_users=10).user_ids) == 5
    with pytest.raises(ValueError, match="at least one"):
        study_sample(torch.zeros(2, 0).long())
    with pytest.raises(ValueError, match="min_items"):
        study_sample(edges, min_items=0)


def test_cosines_that_are_equal_by_algebra_are_equal() -> None:
    vectors = torch.randint(-3, 4, (60, 3), generator=random(20)).double()
    exact = {(i, j): int(vectors[i] @ vectors[j]) for i, j in pairs_of(60)}
    found = pair_cosines(unit_rows(vectors, "vectors")).tolist()
    right_angles = [value for value, product in zip(found, exact.values(), strict=True) if product == 0]
    assert len(right_angles) > 100 and set(right_angles) == {0.0}
