"""Aggregators against loops, closed forms and optimality conditions, in float64."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.adatask.aggregators import (
    aggregator,
    aligned_mtl,
    cagrad,
    default_compose,
    imtl_g,
    mgda,
    nash_mtl,
    upgrad,
)
from zoo.adatask.conflicts import GradVac, PCGrad, gradvac, pcgrad, projection_orders

if TYPE_CHECKING:
    from collections.abc import Callable

VECTORS = ("pcgrad", "gradvac")
TORCHJD = ("imtl_g", "aligned_mtl")
WEIGHTS = ("mgda", "cagrad", "nash_mtl", "upgrad", *TORCHJD)
SEEDS = range(6)


def gradients(tasks: int, seed: int = 0, size: int = 7, spread: float = 1.0) -> Tensor:
    """Gradients of which most conflict, with lengths that differ by up to 10^spread."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(tasks, size, dtype=torch.float64, generator=generator)
    matrix -= 0.7 * matrix.mean(0) if tasks > 1 else 0.0
    return matrix * 10 ** (spread * torch.rand(tasks, 1, dtype=torch.float64, generator=generator))


def make(name: str, **options: Any) -> Callable[[Tensor], Tensor]:
    if name in TORCHJD:
        pytest.importorskip("torchjd", reason="the extra aggregators is not installed")
    return aggregator(name, **options)


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def looped_pcgrad(matrix: Tensor, orders: Tensor) -> Tensor:
    changed = matrix.clone()
    for k, order in enumerate(orders.tolist()):
        for j in order:
            product = float(changed[k] @ matrix[j])
            if product < 0:
                changed[k] -= product / float(matrix[j] @ matrix[j]) * matrix[j]
    return changed


def looped_gradvac(matrix: Tensor, targets: Tensor, orders: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    changed, targets = matrix.clone(), targets.clone()
    for k, order in enumerate(orders.tolist()):
        for j in order:
            length, other = float(changed[k].norm()), float(matrix[j].norm())
            cosine, target = float(changed[k] @ matrix[j]) / (length * other), float(targets[k, j])
            if cosine < target:
                sines = math.sqrt(1 - cosine**2), math.sqrt(1 - target**2)
                changed[k] += length * (target * sines[0] - cosine * sines[1]) / (other * sines[1]) * matrix[j]
            targets[k, j] = (1 - beta) * target + beta * cosine
    return changed, targets


@pytest.mark.parametrize("tasks", [2, 3, 5])
@pytest.mark.parametrize("seed", SEEDS)
def test_pcgrad_equals_the_loop_over_pairs_in_the_same_order(tasks: int, seed: int) -> None:
    matrix = gradients(tasks, seed)
    expected = looped_pcgrad(matrix, projection_orders(tasks, generator()))
    assert torch.allclose(pcgrad(matrix, generator()), expected, rtol=1e-10, atol=1e-12)
    assert not torch.equal(expected, matrix)


@pytest.mark.parametrize("tasks", [2, 3, 5])
@pytest.mark.parametrize("seed", SEEDS)
def test_gradvac_equals_the_loop_over_pairs_and_its_targets_follow_the_cosines_met(tasks: int, seed: int) -> None:
    vaccine = GradVac(beta=0.3, seed=3)
    orders, targets = generator(3), torch.zeros(tasks, tasks, dtype=torch.float64)
    for step in range(4):
        matrix = gradients(tasks, 10 * seed + step)
        expected, moved = looped_gradvac(matrix, targets, projection_orders(tasks, orders), 0.3)
        if step == 1:
            same = gradvac(matrix, targets, generator(5))
            other, _ = looped_gradvac(matrix, targets, projection_orders(tasks, generator(5)), 0.3)
            assert torch.allclose(same, other, rtol=1e-9, atol=1e-11)
        assert torch.allclose(vaccine(matrix), expected, rtol=1e-9, atol=1e-11)
        targets = moved
        assert vaccine.targets is not None
        assert torch.allclose(vaccine.targets, targets, rtol=1e-9, atol=1e-11)


def test_every_order_of_projections_leaves_out_the_task_itself_and_all_orders_come() -> None:
    orders = [tuple(map(tuple, projection_orders(3, generator(seed)).tolist())) for seed in range(60)]
    assert {order[0] for order in orders} == {(1, 2), (2, 1)}
    assert {order[1] for order in orders} == {(0, 2), (2, 0)}
    assert len(set(orders)) == 8


@pytest.mark.parametrize("seed", SEEDS)
def test_two_tasks_do_not_conflict_after_pcgrad(seed: int) -> None:
    matrix = gradients(2, seed)
    assert (pcgrad(matrix) @ matrix.T).min() >= -1e-12 * matrix.norm() ** 2


def test_gradients_without_conflict_are_left_alone() -> None:
    matrix = gradients(4).abs()
    assert torch.equal(pcgrad(matrix), matrix)
    assert torch.equal(gradvac(matrix, torch.full((4, 4), -0.5)), matrix)


def test_gradvac_raises_the_cosine_to_its_target() -> None:
    matrix = gradients(2)
    target = 0.6
    assert torch.cosine_similarity(*matrix, dim=0) < target
    changed = gradvac(matrix, torch.full((2, 2), target, dtype=torch.float64))
    for k in (0, 1):
        assert float(torch.cosine_similarity(changed[k], matrix[1 - k], dim=0)) == pytest.approx(target, rel=1e-10)


def test_gradvac_of_parallel_gradients_and_targets_of_one_stays_finite() -> None:
    matrix = torch.stack([gradients(1)[0], 3 * gradients(1)[0], -gradients(1)[0]])
    assert gradvac(matrix, torch.ones(3, 3)).isfinite().all()


@pytest.mark.parametrize("seed", range(20))
def test_mgda_of_two_tasks_has_its_closed_form(seed: int) -> None:
    first, second = matrix = gradients(2, seed)
    share = float(((second - first) @ second / (first - second).square().sum()).clamp(0, 1))
    assert torch.allclose(mgda(matrix), torch.tensor([share, 1 - share], dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("tasks", [3, 5, 9])
@pytest.mark.parametrize("normalize", ["none", "l2"])
def test_mgda_finds_the_shortest_vector_of_the_hull(tasks: int, normalize: Any) -> None:
    for seed in SEEDS:
        matrix = gradients(tasks, seed)
        points = matrix / matrix.norm(dim=1, keepdim=True) if normalize == "l2" else matrix
        alpha = mgda(matrix, normalize)
        shares = alpha * matrix.norm(dim=1) if normalize == "l2" else alpha
        direction = alpha @ matrix
        assert float(shares.sum()) == pytest.approx(1, rel=1e-12) and shares.min() >= 0
        # p . d >= d . d for every point of the hull holds for the nearest point to the origin alone.
        assert (points @ direction).min() >= direction @ direction - 1e-9 * points.norm(dim=1).min() ** 2


def cagrad_of_two(first: Tensor, second: Tensor, c: float) -> Tensor:
    """The best worst case over the ball: at the ball's end of one gradient, or where both products are equal."""
    mean = (first + second) / 2
    radius = c * mean.norm()
    candidates = [mean + radius * gradient / gradient.norm() for gradient in (first, second)]
    between = (first - second) / (first - second).norm()
    across = mean - (mean @ between) * between
    share = -(mean @ between) / radius
    if share.abs() <= 1:
        candidates.append(mean + radius * (share * between + (1 - share**2).sqrt() * across / across.norm()))
    return max(candidates, key=lambda direction: float(torch.minimum(first @ direction, second @ direction)))


@pytest.mark.parametrize("c", [0.2, 0.4, 0.9])
def test_cagrad_of_two_tasks_has_its_closed_form(c: float) -> None:
    kinds = set()
    for seed in range(20):
        matrix = gradients(2, seed, spread=0.5)
        alpha = cagrad(matrix, c, rescale=False)
        expected = cagrad_of_two(*matrix, c)
        assert torch.allclose(alpha @ matrix, expected, atol=1e-6 * float(matrix.norm()))
        assert torch.allclose(cagrad(matrix, c), alpha / (1 + c**2), rtol=1e-12)
        kinds.add(bool((alpha - 0.5).min() > 1e-9))
    assert kinds == {True, False}


@pytest.mark.parametrize("tasks", [3, 6])
def test_cagrad_has_no_duality_gap_and_stays_in_its_ball(tasks: int) -> None:
    c = 0.4
    for seed in SEEDS:
        matrix = gradients(tasks, seed)
        alpha = cagrad(matrix, c, rescale=False)
        mean, direction = matrix.mean(0), alpha @ matrix
        assert (direction - mean).norm() <= c * mean.norm() * (1 + 1e-9)
        weights = (alpha - 1 / tasks) / (alpha - 1 / tasks).sum()
        combination = weights @ matrix
        bound = combination @ mean + c * mean.norm() * combination.norm()
        assert (matrix @ direction).min() >= bound - 1e-8 * matrix.norm() ** 2


def test_cagrad_without_radius_is_the_mean_and_where_gradients_cancel_it_stays_in_the_ball() -> None:
    assert cagrad(gradients(3), 0.0).tolist() == pytest.approx([1 / 3] * 3)
    matrix = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 10.0]], dtype=torch.float64)
    alpha = cagrad(matrix, 0.4, rescale=False)
    mean = matrix.mean(0)
    assert alpha.isfinite().all() and (alpha @ matrix - mean).norm() <= 0.4 * mean.norm() * (1 + 1e-9)


@pytest.mark.parametrize("tasks", [1, 2, 3, 5])
def test_nash_weights_are_the_inverse_of_the_gramian_times_themselves(tasks: int) -> None:
    for seed in SEEDS:
        matrix = gradients(tasks, seed, spread=4)
        alpha = nash_mtl(matrix)
        assert alpha.min() > 0
        assert torch.allclose((matrix @ matrix.T @ alpha) * alpha, torch.ones(tasks).double(), atol=1e-5)
        assert float((alpha @ matrix).norm()) == pytest.approx(math.sqrt(tasks), rel=1e-5)


def test_nash_weights_of_gradients_that_cancel_stay_finite() -> None:
    first = gradients(1)
    alpha = nash_mtl(torch.cat([first, -first, 2 * first]))
    assert alpha.isfinite().all() and alpha.min() > 0
    # More tasks than dimensions, often with zero inside their hull: full Newton steps leave the positive orthant here.
    for seed in range(1000):
        matrix = torch.randn(9, 3, dtype=torch.float64, generator=generator(seed))
        alpha = nash_mtl(matrix)
        assert alpha.isfinite().all() and alpha.min() > 0
        assert (alpha * matrix.norm(dim=1)).max() < 1e5


@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_imtl_g_has_equal_projections_and_sum_one(tasks: int) -> None:
    matrix = gradients(tasks, spread=3)
    alpha = make("imtl_g")(matrix)
    projections = (alpha @ matrix) @ (matrix / matrix.norm(dim=1, keepdim=True)).T
    assert float(alpha.sum()) == pytest.approx(1)
    assert torch.allclose(projections, projections[0].expand(tasks), rtol=1e-8)


def test_imtl_g_of_opposite_gradients_is_zero() -> None:
    first = gradients(1)
    assert not make("imtl_g")(torch.cat([first, -first])).any()


def test_aligned_mtl_makes_all_singular_values_the_smallest() -> None:
    matrix = gradients(4)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    aligned = values[-1] * left @ right
    assert torch.allclose(make("aligned_mtl")(matrix) @ matrix, aligned.mean(0), rtol=1e-8)
    mean_square = values.square().mean().sqrt() * left @ right
    assert torch.allclose(make("aligned_mtl", scale_mode="rmse")(matrix) @ matrix, mean_square.mean(0), rtol=1e-8)


@pytest.mark.parametrize("seed", SEEDS)
def test_upgrad_of_two_tasks_is_the_mean_after_pcgrad(seed: int) -> None:
    matrix = gradients(2, seed)
    assert torch.allclose(upgrad(matrix) @ matrix, pcgrad(matrix).mean(0), rtol=1e-9, atol=1e-12)


def test_upgrad_projects_each_gradient_to_the_nearest_point_without_conflict() -> None:
    # By Dykstra's alternating projections onto the half-spaces of the dual cone.
    matrix = gradients(4, 1)
    total = torch.zeros_like(matrix[0])
    for point in matrix:
        corrections = torch.zeros_like(matrix)
        for _ in range(3000):
            for j, row in enumerate(matrix):
                start = point + corrections[j]
                point = start - (start @ row).clamp(max=0) / (row @ row) * row
                corrections[j] = start - point
        total += point / len(matrix)
    direction = upgrad(matrix) @ matrix
    assert torch.allclose(direction, total, atol=1e-7)
    assert (matrix @ direction).min() > -1e-9


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_follow_a_permutation_of_the_tasks(name: str) -> None:
    matrix, order = gradients(4), torch.tensor([2, 0, 3, 1])
    function = make(name)
    assert torch.allclose(function(matrix[order]), function(matrix)[order], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_do_not_depend_on_the_unit_of_all_losses_even_at_the_ends_of_float32(name: str) -> None:
    function = make(name)
    matrix = gradients(3).float()
    expected = function(matrix)
    for scale in (2.0**-80, 2.0**80):
        found = function(matrix * scale)
        assert torch.allclose(found * scale if name == "nash_mtl" else found, expected, rtol=1e-3)


def test_conflicts_do_not_depend_on_the_unit_of_all_losses() -> None:
    matrix = gradients(3).float()
    scaled = pcgrad(matrix * 2.0**-90, generator()) * 2.0**90
    assert torch.allclose(scaled, pcgrad(matrix, generator()), rtol=1e-5)


@pytest.mark.parametrize("name", [*VECTORS, *WEIGHTS])
def test_a_missing_task_changes_nothing_for_the_others(name: str) -> None:
    matrix = gradients(3)
    with_gap = torch.cat([matrix[:1], torch.zeros(1, 7).double(), matrix[1:]])
    kept = torch.tensor([0, 2, 3])
    found, expected = make(name)(with_gap), make(name)(matrix)
    assert torch.allclose(found[kept], expected, rtol=1e-12)
    assert not found[1].any()


@pytest.mark.parametrize("name", [*VECTORS, *WEIGHTS])
def test_no_task_at_all_gives_zeros(name: str) -> None:
    assert not make(name)(torch.zeros(3, 5)).any()


@pytest.mark.parametrize("name", [*VECTORS, *WEIGHTS])
def test_one_task_keeps_its_direction(name: str) -> None:
    matrix = gradients(1)
    found = make(name)(matrix)
    direction = found[0] if name in VECTORS else found @ matrix
    expected = {"nash_mtl": 1 / float(matrix.norm()), "cagrad": 1.4 / 1.16}.get(name, 1.0)
    assert torch.allclose(direction, expected * matrix[0], rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*VECTORS, *WEIGHTS])
def test_half_precision_is_combined_in_float32(name: str, dtype: torch.dtype) -> None:
    matrix = gradients(3).to(dtype)
    found, expected = make(name)(matrix), make(name)(matrix.float())
    assert found.dtype == (dtype if name in VECTORS else torch.float32)
    assert torch.equal(found, expected.to(found.dtype))


@pytest.mark.parametrize("name", [*VECTORS, *WEIGHTS])
def test_autocast_does_not_lower_the_precision(name: str) -> None:
    matrix = gradients(3).float()
    expected = make(name)(matrix)
    with torch.autocast("cpu", torch.bfloat16):
        found = make(name)(matrix)
    assert torch.equal(found, expected)


class Products(TorchDispatchMode):
    """Counts operations that read a tensor of `size` columns, matrix products apart."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.products, self.others = size, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        large = any(isinstance(value, Tensor) and self.size in value.shape for value in args)
        if large and func._schema.name == "aten::mm":
            self.products += 1
        elif large and func._schema.name not in ("aten::permute", "aten::detach"):
            self.others += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*VECTORS, *WEIGHTS])
def test_gradients_are_read_by_one_gramian_and_at_most_one_combination(name: str) -> None:
    function = make(name)
    matrix = gradients(5, size=101).float()
    with Products(101) as count:
        function(matrix)
    assert (count.products, count.others) == (2 if name in VECTORS else 1, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [*VECTORS, *WEIGHTS])
def test_a_gradient_that_is_not_finite_is_named(name: str, value: float) -> None:
    matrix = gradients(3).float()
    matrix[1, 2] = value
    with pytest.raises(ValueError, match=r"task 1 .*not finite"):
        make(name)(matrix)


@pytest.mark.parametrize("matrix", [torch.ones(3), torch.ones(0, 3), torch.ones(2, 3, dtype=torch.int64)])
def test_a_malformed_matrix_is_refused(matrix: Tensor) -> None:
    with pytest.raises(ValueError, match=r"\(tasks, parameters\)"):
        pcgrad(matrix)
    with pytest.raises(ValueError, match=r"\(tasks, parameters\)"):
        mgda(matrix)


@pytest.mark.parametrize("name", VECTORS)
def test_surgery_goes_on_from_its_state_as_if_never_stopped(name: str) -> None:
    through, first, second = (aggregator(name) for _ in range(3))
    assert isinstance(first, PCGrad | GradVac) and isinstance(second, PCGrad | GradVac)
    for step in range(3):
        through(gradients(5, step))
        first(gradients(5, step))
    second.load_state_dict(first.state_dict())
    for step in range(3, 6):
        assert torch.equal(second(gradients(5, step)), through(gradients(5, step)))
    assert not torch.equal(aggregator(name)(gradients(5, 5)), through(gradients(5, 5)))


def test_a_state_taken_before_the_first_call_can_be_loaded() -> None:
    vaccine = GradVac()
    vaccine(gradients(3))
    vaccine.load_state_dict(GradVac().state_dict())
    assert torch.equal(vaccine(gradients(3)), GradVac()(gradients(3)))


def test_a_missing_task_keeps_its_targets() -> None:
    vaccine = GradVac()
    vaccine(gradients(3))
    assert vaccine.targets is not None
    before = vaccine.targets.clone()
    matrix = gradients(3, 1)
    matrix[1] = 0
    vaccine(matrix)
    assert torch.equal(vaccine.targets[1], before[1]) and torch.equal(vaccine.targets[:, 1], before[:, 1])
    assert vaccine.targets[0, 2] != before[0, 2]


def test_names_options_and_composition_are_known_or_refused() -> None:
    for name in (*VECTORS, *WEIGHTS):
        found = make(name)(gradients(3))
        assert (found.ndim, default_compose(name)) == ((2, "pre") if name in VECTORS else (1, "post"))
    assert torch.equal(aggregator("cagrad", c=0.7)(gradients(3)), cagrad(gradients(3), 0.7))
    with pytest.raises(ValueError, match="'sum'; known: pcgrad, gradvac, mgda"):
        aggregator("sum")
    with pytest.raises(ValueError, match="'sum'; known: pcgrad"):
        default_compose("sum")
    with pytest.raises(ValueError, match=r"'cagrad' has no option alpha; it has: \['c', 'rescale'\]"):
        aggregator("cagrad", alpha=1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cagrad(gradients(2), -0.1), "c must be at least 0, got -0.1"),
        (lambda: mgda(gradients(2), "loss"), "normalize .* got 'loss'"),  # type: ignore[arg-type]
        (lambda: aligned_mtl(gradients(2), "max"), "scale_mode .* got 'max'"),  # type: ignore[arg-type]
        (lambda: aggregator("gradvac", beta=1.5), "beta must be in"),
        (lambda: gradvac(gradients(2), torch.zeros(3, 3)), r"target cosines .*\(3, 3\)"),
        (lambda: gradvac(gradients(2), torch.full((2, 2), 1.1)), r"target cosines .*1\.1"),
    ],
)
def test_an_impossible_option_is_named_with_its_value(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("function", [imtl_g, aligned_mtl])
def test_a_missing_library_is_named_with_the_extra(
    function: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchjd", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-method-zoo\[aggregators\]'"):
        function(gradients(2))
