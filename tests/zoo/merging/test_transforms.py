"""Transforms of task vectors against the published rules, written out over whole vectors in float64."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from zoo.merging import thresholds
from zoo.merging.thresholds import magnitude_thresholds
from zoo.merging.transforms import Dare, Magnitude, Ties, Transform

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

Vectors = dict[str, Tensor]

REAL_COLUMNS = thresholds.columns

TRANSFORMS: dict[str, Transform] = {
    "ties": Ties(),
    "ties by layer": Ties(scope="layer"),
    "magnitude": Magnitude(),
    "magnitude by layer": Magnitude(scope="layer"),
    "dare": Dare(),
    "dare without rescaling": Dare(0.9, rescale=False),
}


@pytest.fixture(autouse=True)
def _many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of seven columns, so that small tensors have several, the last one shorter."""

    def columns(block: Tensor) -> Iterator[slice]:
        for start in range(0, block.shape[1], 7):
            yield slice(start, min(start + 7, block.shape[1]))

    monkeypatch.setattr(thresholds, "columns", columns)
    monkeypatch.setattr("zoo.merging.transforms.columns", columns)


def some_vectors(tasks: int = 3, seed: int = 0) -> Vectors:
    """Task vectors whose scale differs from tensor to tensor, with zeros, equal magnitudes and exact cancellation."""
    generator = torch.Generator().manual_seed(seed)
    vectors = {
        name: torch.randn(tasks, size, generator=generator) * scale
        for name, size, scale in (("stem.weight", 40, 1e-2), ("stem.bias", 1, 1.0), ("head.weight", 61, 1e-4))
    }
    vectors["stem.weight"][:, :9] = 0
    vectors["stem.weight"][:, 9:15] = 5e-3 * torch.tensor([1.0, -1.0] * 3)
    if tasks > 1:
        vectors["head.weight"][1, 20:30] = -vectors["head.weight"][0, 20:30]
        vectors["head.weight"][2:, 20:30] = 0
    return vectors


def reading(vectors: Mapping[str, Tensor]) -> Callable[[], Iterator[tuple[str, Tensor]]]:
    return lambda: iter(vectors.items())


def applied(transform: Transform, vectors: Mapping[str, Tensor]) -> Vectors:
    change = transform.fit(reading(vectors))
    return {name: change(name, block) for name, block in vectors.items()}


def flat(vectors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat(list(vectors.values()), 1)


def kth_smallest(vector: Tensor, density: float) -> float:
    rank = vector.numel() - int(density * vector.numel())
    return sorted(abs(value) for value in vector.tolist())[rank - 1] if rank else 0.0


def published_ties(tau: Tensor, density: float) -> Tensor:
    """The rule entry by entry, for `(K, P)`."""
    trimmed = [[x if abs(x) >= kth_smallest(row, density) else 0.0 for x in row.tolist()] for row in tau]
    signs = [math.copysign(1, total) if (total := math.fsum(column)) else 0 for column in zip(*trimmed, strict=True)]
    majority = (sum(signs) > 0) - (sum(signs) < 0)
    signs = [sign or majority for sign in signs]
    return torch.tensor([[x if x * sign > 0 else 0.0 for x, sign in zip(row, signs, strict=True)] for row in trimmed])


@pytest.mark.parametrize("density", [1e-9, 0.01, 0.2, 0.5, 0.58, 0.93, 0.999, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_thresholds_are_the_kth_smallest_magnitudes_exactly(density: float, seed: int) -> None:
    vectors = some_vectors(seed=seed)
    found = magnitude_thresholds(reading(vectors), density)
    assert found.tolist() == [kth_smallest(row, density) for row in flat(vectors)]


def test_thresholds_are_exact_for_any_float() -> None:
    patterns = torch.randint(0, 0x7F800000, (2, 501), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    patterns[1, :300] = patterns[1, 0] // 65536 * 65536 + torch.arange(300, dtype=torch.int32)
    values = patterns.view(torch.float32) * torch.tensor([1.0, -1.0]).repeat(251)[:501]
    for density in (0.1, 0.45, 0.8):
        found = magnitude_thresholds(reading({"a": values[:, :200], "b": values[:, 200:]}), density)
        assert found.tolist() == [kth_smallest(row, density) for row in values]


def test_thresholds_hold_for_more_values_than_torch_sorts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch.quantile refuses more than 2^24 values.
    values = torch.randn(1, 1 << 20, generator=torch.Generator().manual_seed(0))

    def blocks() -> Iterator[tuple[str, Tensor]]:
        for part in range(17):
            yield str(part), values

    expected = values[0].abs().kthvalue(math.ceil((17 * 2**20 - int(0.2 * 17 * 2**20)) / 17)).values
    monkeypatch.setattr(thresholds, "columns", REAL_COLUMNS)
    assert magnitude_thresholds(blocks, 0.2)[0] == expected


def test_thresholds_take_two_passes_and_one_where_all_is_kept() -> None:
    passes = []

    def blocks() -> Iterator[tuple[str, Tensor]]:
        passes.append(1)
        yield from some_vectors().items()

    magnitude_thresholds(blocks, 0.5)
    assert len(passes) == 2
    assert magnitude_thresholds(blocks, 1.0).tolist() == [0, 0, 0]
    assert len(passes) == 3


def test_trimming_keeps_one_entry_more_than_the_share_and_all_that_equal_the_threshold() -> None:
    distinct = {"a": torch.tensor([[5.0, -4.0, 3.0, 2.0]]), "b": torch.tensor([[-6.0, 1.0, 0.5, 0.25, 0.1, 8.0]])}
    assert int((flat(applied(Magnitude(0.3), distinct)) != 0).sum()) == 4
    equal = {"a": torch.tensor([[3.0, -3.0, 3.0, 1.0]])}
    assert applied(Magnitude(0.25), equal)["a"].tolist() == [[3.0, -3.0, 3.0, 0.0]]


def test_ties_worked_by_hand() -> None:
    tau = {"a": torch.tensor([[1, -4, 3, 0.1], [-2, 5, 1, 0.2]])}
    kept = applied(Ties(0.25), tau)["a"]
    assert kept.tolist() == [[0, 0, 3, 0], [-2, 5, 0, 0]]
    assert kept.sum(0).tolist() == [-2, 5, 3, 0]
    # Half of four and one more: the 1 of each is kept too; in the third place they agree, in the first -2 outweighs 1.
    kept = applied(Ties(0.5), tau)["a"]
    assert kept.tolist() == [[0, 0, 3, 0], [-2, 5, 1, 0]]


def test_cancelling_entries_take_the_sign_of_most_parameters() -> None:
    rising = {"a": torch.tensor([[2.0, 1.0, 1.0], [-2.0, 1.0, 0.0]])}
    assert applied(Ties(1.0), rising)["a"].tolist() == [[2, 1, 1], [0, 1, 0]]
    falling = {name: -block for name, block in rising.items()}
    assert applied(Ties(1.0), falling)["a"].tolist() == [[-2, -1, -1], [0, -1, 0]]


def test_what_cancels_does_not_depend_on_the_order_of_the_tasks() -> None:
    # In float32, 1 + 2^-30 - 1 is 0.
    column = torch.tensor([[1.0], [2.0**-30], [-1.0]])
    for order in ([0, 1, 2], [0, 2, 1], [1, 2, 0]):
        kept = applied(Ties(1.0), {"a": torch.cat([column[order], torch.full((3, 1), -1.0)], 1)})["a"]
        assert torch.equal(kept[:, :1], column[order].clamp(min=0))


def test_the_majority_is_counted_over_all_tensors() -> None:
    tau = {"a": torch.tensor([[2.0, 1.0], [-2.0, 1.0]]), "b": torch.tensor([[-1.0, -1.0], [-1.0, -1.0]])}
    assert applied(Ties(1.0), tau)["a"].tolist() == [[0, 1], [-2, 1]]
    assert applied(Ties(1.0, scope="layer"), tau)["a"].tolist() == [[2, 1], [0, 1]]


def test_without_a_majority_cancelling_entries_are_dropped() -> None:
    tau = {"a": torch.tensor([[2.0, 1.0, -1.0], [-2.0, 0.0, 0.0]])}
    assert applied(Ties(1.0), tau)["a"].tolist() == [[0, 1, -1], [0, 0, 0]]


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("tasks", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_ties_equals_the_published_rule_on_the_whole_vector(density: float, tasks: int, seed: int) -> None:
    vectors = some_vectors(tasks, seed)
    assert torch.equal(flat(applied(Ties(density), vectors)), published_ties(flat(vectors), density))


def test_layer_scope_is_the_rule_on_each_tensor_alone() -> None:
    vectors = some_vectors()
    for name, kept in applied(Ties(0.3, scope="layer"), vectors).items():
        assert torch.equal(kept, published_ties(vectors[name], 0.3))
    for name, kept in applied(Magnitude(0.3, scope="layer"), vectors).items():
        assert torch.equal(kept, applied(Magnitude(0.3), {"a": vectors[name]})["a"])


def test_magnitude_keeps_the_largest_of_the_whole_vector() -> None:
    vectors = some_vectors()
    tau, kept = flat(vectors), flat(applied(Magnitude(0.2), vectors))
    limits = torch.tensor([[kth_smallest(row, 0.2)] for row in tau])
    assert torch.equal(kept, torch.where(tau.abs() >= limits, tau, 0))
    assert torch.equal(flat(applied(Magnitude(1.0), vectors)), tau)


def test_entries_that_never_moved_change_what_a_share_means() -> None:
    moved = {"image": torch.randn(2, 775, generator=torch.Generator().manual_seed(0))}
    both = {**moved, "text": torch.zeros(2, 225)}
    assert torch.equal(applied(Ties(0.2), both)["image"], applied(Ties(200 / 775), moved)["image"])
    assert not torch.equal(applied(Ties(0.2), both)["image"], applied(Ties(0.2), moved)["image"])


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_permuting_the_tasks_permutes_the_vectors(transform: Transform) -> None:
    vectors, order = some_vectors(5), [3, 0, 4, 1, 2]
    permuted = {name: block[order] for name, block in vectors.items()}
    if isinstance(transform, Dare):
        names = ["a", "b", "c", "d", "e"]
        ahead = Dare(transform.drop, task_names=names)
        after = Dare(transform.drop, task_names=[names[k] for k in order])
        assert torch.equal(flat(applied(after, permuted)), flat(applied(ahead, vectors))[order])
    else:
        assert torch.equal(flat(applied(transform, permuted)), flat(applied(transform, vectors))[order])


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_the_order_of_the_tensors_does_not_matter(transform: Transform) -> None:
    vectors = some_vectors()
    ahead = applied(transform, vectors)
    after = applied(transform, dict(reversed(vectors.items())))
    assert all(torch.equal(ahead[name], after[name]) for name in vectors)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_vectors_are_left_as_they_are_unless_they_are_the_output(transform: Transform) -> None:
    vectors = some_vectors()
    before = {name: block.clone() for name, block in vectors.items()}
    change = transform.fit(reading(vectors))
    for name, block in vectors.items():
        expected = change(name, block)
        assert torch.equal(block, before[name])
        assert expected.data_ptr() != block.data_ptr()
        # The columns of a store are such views.
        wide = torch.cat([torch.ones(3, 2), block, torch.ones(3, 2)], 1)
        inside = wide[:, 2:-2]
        assert torch.equal(change(name, inside), expected)
        assert change(name, inside, out=inside) is inside  # type: ignore[call-arg]
        assert torch.equal(inside, expected) and wide[:, :2].eq(1).all() and wide[:, -2:].eq(1).all()


def test_vectors_in_half_precision_are_chosen_as_their_values_are_in_float32() -> None:
    vectors = {name: block.bfloat16() for name, block in some_vectors().items()}
    full = {name: block.float() for name, block in vectors.items()}
    for transform in (Ties(0.3), Magnitude(0.3), Ties(0.3, scope="layer")):
        halves = applied(transform, vectors)
        assert all(block.dtype == torch.bfloat16 for block in halves.values())
        assert torch.equal(flat(halves).float(), flat(applied(transform, full)))


def test_dare_is_right_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.merging.transforms.columns", REAL_COLUMNS)
    vectors = {"a": torch.randn(2, 50, generator=torch.Generator().manual_seed(0))}
    mean = sum(applied(Dare(0.5, seed=seed), vectors)["a"].double() for seed in range(2000)) / 2000
    assert float((mean - vectors["a"]).norm() / vectors["a"].norm()) < 0.05


@pytest.mark.parametrize("drop", [0.0, 0.25, 0.9])
def test_dare_drops_its_share_and_rescales_the_rest(drop: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.merging.transforms.columns", REAL_COLUMNS)
    kept = applied(Dare(drop), {"a": torch.full((2, 20_000), 3.0)})["a"]
    plain = applied(Dare(drop, rescale=False), {"a": torch.full((2, 20_000), 3.0)})["a"]
    share = (kept == 0).double().mean(1)
    assert torch.allclose(share, torch.full((2,), drop, dtype=torch.float64), atol=5 * math.sqrt(drop / 20_000) + 1e-9)
    assert torch.allclose(kept[kept != 0], torch.tensor(3 / (1 - drop)))
    assert torch.equal(plain, torch.where(kept != 0, 3.0, 0.0))


def test_dare_draws_anew_for_each_seed_task_and_tensor() -> None:
    ones = {"a": torch.ones(3, 64), "b": torch.ones(3, 64)}
    first, second = applied(Dare(seed=0), ones), applied(Dare(seed=1), ones)
    rows = [*first["a"], *first["b"], *second["a"], *second["b"]]
    assert len({tuple(row.tolist()) for row in rows}) == len(rows)
    assert torch.equal(flat(applied(Dare(seed=0), ones)), flat(first))


def test_dare_does_not_depend_on_how_a_tensor_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = some_vectors()
    pieces = flat(applied(Dare(), vectors))
    monkeypatch.setattr("zoo.merging.transforms.columns", REAL_COLUMNS)
    assert torch.equal(flat(applied(Dare(), vectors)), pieces)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, math.nan])
@pytest.mark.parametrize("transform", [Ties, Magnitude])
def test_a_density_that_is_no_share_is_refused(transform: Callable[..., Transform], density: float) -> None:
    with pytest.raises(ValueError, match=r"density must be a share in \(0, 1\], got"):
        transform(density)


def test_wrong_scopes_and_probabilities_are_refused() -> None:
    with pytest.raises(ValueError, match="scope must be 'global' or 'layer', got 'block'"):
        Ties(scope="block")  # type: ignore[arg-type]
    for drop in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"drop must be a probability in \[0, 1\), got"):
            Dare(drop)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_by_name(value: float) -> None:
    vectors = some_vectors()
    vectors["head.weight"][1, 4] = value
    with pytest.raises(ValueError, match=r"task vector 1 has 1 values in head\.weight that are not finite"):
        Ties().fit(reading(vectors))


def test_blocks_that_do_not_fit_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="b has 3 task vectors, other tensors have 2"):
        Ties().fit(reading({"a": torch.ones(2, 3), "b": torch.ones(3, 3)}))
    with pytest.raises(ValueError, match="there are no parameters"):
        Magnitude().fit(reading({}))
    change = Magnitude().fit(reading({"a": torch.ones(2, 3)}))
    with pytest.raises(ValueError, match="3 task vectors for a transform that was fitted to 2"):
        change("a", torch.ones(3, 3))
    with pytest.raises(ValueError, match="a has 2 task vectors for the tasks x, y, z"):
        Dare(task_names=("x", "y", "z")).fit(reading({}))("a", torch.ones(2, 3))


@pytest.mark.parametrize("shape", [(1, 0), (1, 1), (3, 100), (2, 1 << 19), (5, (1 << 18) + 3), (1 << 19, 2)])
def test_pieces_cover_every_column_once(shape: tuple[int, int]) -> None:
    block = torch.empty(1).expand(shape)
    assert [place for part in REAL_COLUMNS(block) for place in range(part.start, part.stop)] == [*range(shape[1])]
