"""Differences along random directions: equal to autograd where they must be, unbiased elsewhere."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.api_cl import loop_estimate
from zoo.api_cl.gaps import ResponseGap
from zoo.api_cl.zeroth_order import ZerothOrderGradient, check_step_size, step_size

if TYPE_CHECKING:
    from collections.abc import Callable


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def small_net(size: int, classes: int, seed: int, hidden: int = 20, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Flatten(),
        nn.Linear(size, hidden),
        nn.BatchNorm1d(hidden) if norm else nn.Identity(),
        nn.Tanh(),
        nn.Linear(hidden, classes),
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3 if parameter.ndim == 2 else 1)
    return net.double()


def exact_gradient(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(x).sum(), x)
    return gradient


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))


def mean_row_cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.flatten(1).double(), b.flatten(1).double(), dim=1).mean())


def black_box(api: nn.Module, model: nn.Module, batch: int, balance: float = 0.7) -> Callable[[Tensor], Tensor]:
    """Adversarial and balance terms of points before tanh, with the mean response of the first `batch` rows held."""
    gap = ResponseGap("l1")

    def loss(points: Tensor) -> Tensor:
        probs, logits = api(points.tanh()).softmax(-1), model(points.tanh())
        mean = probs[:batch].mean(0).detach()
        return -gap(probs, logits) + balance * (probs * (mean.log() + 1)).sum(-1)

    return loss


def objective(api: nn.Module, model: nn.Module, points: Tensor, balance: float = 0.7) -> Tensor:
    probs, logits = api(points.tanh()).softmax(-1), model(points.tanh())
    mean = probs.mean(0)
    return -ResponseGap("l1")(probs, logits).mean() + balance * (mean * mean.log()).sum()


@pytest.mark.parametrize("central", [False, True])
def test_with_all_orthonormal_directions_a_quadratic_has_its_own_gradient(central: bool) -> None:
    matrix, x = normal(12, 12), normal(5, 3, 4, seed=1)

    def loss(points: Tensor) -> Tensor:
        flat = points.flatten(1)
        return ((flat @ matrix) * flat).sum(1)

    eps = 1e-5
    found = ZerothOrderGradient(12, eps, "orthonormal", central)(loss, x, seeded()).gradient
    wanted = exact_gradient(loss, x)
    error = (found - wanted).abs().max() / wanted.abs().max()
    assert found.shape == x.shape
    assert error < 1e-8 if central else error < 1e-4
    # A step forward leaves eps times the curvature along the directions, a step to both sides leaves nothing.
    big = ZerothOrderGradient(12, 0.5, "orthonormal", central)(loss, x, seeded()).gradient
    assert (torch.allclose(big, wanted, atol=1e-9)) is central


def test_with_all_orthonormal_directions_the_generators_weights_get_the_gradient_of_autograd() -> None:
    size, batch = 12, 8
    api, model = small_net(size, 4, 0), small_net(size, 4, 1)
    weight = (0.3 * normal(6, size, seed=2)).requires_grad_(True)
    noise = normal(batch, 6, seed=3)
    (wanted,) = torch.autograd.grad(objective(api, model, noise @ weight), weight)

    points = noise @ weight
    estimator = ZerothOrderGradient(size, 1e-5, "orthonormal")
    gradient = estimator(black_box(api, model, batch), points, seeded()).gradient
    (found,) = torch.autograd.grad((points * gradient).sum() / batch, weight)
    assert cosine(found, wanted) > 0.9999
    assert abs(float(found.norm() / wanted.norm()) - 1) < 1e-3


@pytest.mark.parametrize("m", [1, 4, 16])
def test_the_second_moment_follows_its_law_and_the_mean_is_the_gradient(m: int) -> None:
    size, draws = 64, 20_000 // m
    slope = normal(size, seed=5)
    x = normal(1, size).expand(draws, size)
    found = ZerothOrderGradient(m, 1e-3, "sphere")(lambda points: points @ slope, x, seeded(m)).gradient
    ratio = found.square().sum(1).mean() / slope.square().sum()
    assert abs(float(ratio) / ((size + m - 1) / m) - 1) < 0.05
    # Of the 64 coordinates one may lie outside of 3 standard errors by chance, none outside of 4.5.
    scores = (found.mean(0) - slope).abs() / (found.std(0) / math.sqrt(draws))
    assert int((scores > 3).sum()) <= 1 and float(scores.max()) < 4.5


def test_orthonormal_directions_tell_more_than_independent_ones() -> None:
    slope, x = normal(64, seed=5), normal(200, 64)

    def found(kind: str) -> Tensor:
        return ZerothOrderGradient(20, 1e-3, kind)(lambda points: points @ slope, x, seeded(1)).gradient

    wanted = slope.expand(200, 64)
    assert mean_row_cosine(found("sphere"), wanted) == pytest.approx(0.49, abs=0.015)
    assert mean_row_cosine(found("orthonormal"), wanted) == pytest.approx(0.555, abs=0.015)
    torch.testing.assert_close(found("orthonormal").mean(0), slope, rtol=0, atol=0.7)


@pytest.mark.parametrize("kind", ["sphere", "orthonormal"])
def test_directions_have_length_one_and_are_orthogonal_if_asked(kind: str) -> None:
    x = normal(3, 2, 4, 4, dtype=torch.float32)
    directions = ZerothOrderGradient(8, directions=kind).draw(x, seeded())
    assert directions.shape == (8, 3, 2, 4, 4) and directions.dtype == torch.float32
    flat = directions.flatten(2).transpose(0, 1)
    gram = flat @ flat.mT
    torch.testing.assert_close(gram.diagonal(dim1=1, dim2=2), torch.ones(3, 8))
    off = (gram - torch.diag_embed(gram.diagonal(dim1=1, dim2=2))).abs().max()
    assert off < 1e-5 if kind == "orthonormal" else off > 0.1
    # Each sample has directions of its own.
    assert not torch.allclose(directions[:, 0], directions[:, 1])


@pytest.mark.parametrize(("m", "size", "orthonormal"), [(7, 32, False), (8, 32, True), (8, 8, True), (9, 8, False)])
def test_auto_takes_orthonormal_directions_from_eight_on_where_they_fit(m: int, size: int, orthonormal: bool) -> None:
    x = normal(2, size)
    same = ZerothOrderGradient(m, directions="orthonormal" if orthonormal else "sphere").draw(x, seeded())
    assert torch.equal(ZerothOrderGradient(m).draw(x, seeded()), same)


@pytest.mark.parametrize("kind", ["sphere", "orthonormal"])
def test_samples_do_not_depend_on_each_other(kind: str) -> None:
    size, batch, m = 12, 6, 9
    api, model = small_net(size, 4, 0, norm=True).eval(), small_net(size, 4, 1, norm=True).eval()
    estimator = ZerothOrderGradient(m, 1e-4, kind)
    x = normal(batch, size)
    directions = estimator.draw(x, seeded())

    def estimate(samples: Tensor, along: Tensor) -> Tensor:
        losses = black_box(api, model, len(samples))(estimator.points(samples, along).flatten(0, 1))
        return estimator.estimate(losses.view(-1, len(samples)), along)

    found = estimate(x, directions)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(estimate(x[order], directions[:, order]), found[order])
    twice = estimate(x.repeat(2, 1), directions.repeat(1, 2, 1))
    torch.testing.assert_close(twice, found.repeat(2, 1))
    # The order of the directions does not matter either.
    torch.testing.assert_close(estimate(x, directions.flip(0)), found)


def test_a_network_that_couples_its_rows_is_told_apart() -> None:
    """The test above must be able to fail: BatchNorm in training mode makes rows depend on each other."""
    size, m = 12, 4
    api, model = small_net(size, 4, 0, norm=True).train(), small_net(size, 4, 1, norm=True).train()
    estimator = ZerothOrderGradient(m, 1e-4, "sphere")
    x = normal(6, size)
    directions = estimator.draw(x, seeded())
    first = estimator.estimate(
        black_box(api, model, 6)(estimator.points(x, directions).flatten(0, 1)).view(-1, 6), directions
    )
    x = torch.cat([x[:3], normal(3, size, seed=9)])
    other = estimator.estimate(
        black_box(api, model, 6)(estimator.points(x, directions).flatten(0, 1)).view(-1, 6), directions
    )
    assert not torch.allclose(first[:3], other[:3], rtol=1e-3)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_slopes_are_directional_derivatives() -> None:
    net = small_net(12, 4, 0)
    x = normal(5, 3, 4)

    def loss(points: Tensor) -> Tensor:
        return net(points).logsumexp(-1)

    estimator = ZerothOrderGradient(1, 1e-6, central=True)
    directions = estimator.draw(x, seeded())
    losses = loss(estimator.points(x, directions).flatten(0, 1)).view(3, 5)
    _, slopes = torch.func.jvp(loss, (x,), (directions[0],))
    wanted = 12 * slopes.view(5, 1, 1) * directions[0]
    torch.testing.assert_close(estimator.estimate(losses, directions), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("central", [False, True])
def test_one_batch_gives_what_a_loop_over_directions_and_samples_gives(central: bool) -> None:
    net = small_net(12, 4, 0)
    x = normal(3, 3, 4)
    calls = []

    def loss(points: Tensor) -> Tensor:
        calls.append(len(points))
        return net(points).logsumexp(-1)

    estimator = ZerothOrderGradient(5, 1e-2, "sphere", central)
    rows, directions = estimator.perturb(x, seeded())
    found, losses = estimator(loss, x, seeded())
    assert calls == [estimator.rows_per_sample * 3] == [len(rows) * 3]
    assert torch.equal(rows[0], x) and torch.equal(losses[0], loss(x))
    wanted = torch.zeros_like(x)
    for i in range(3):
        for u in directions[:, i]:
            after, before = loss((x[i] + 1e-2 * u)[None]), loss((x[i] - 1e-2 * u if central else x[i])[None])
            wanted[i] += 12 / 5 * (after - before) / (2e-2 if central else 1e-2) * u
    torch.testing.assert_close(found, wanted)
    if not central:
        torch.testing.assert_close(loop_estimate(loss, x, directions, 1e-2), wanted)


def test_nothing_is_differentiated_and_autocast_is_off() -> None:
    seen = []

    def loss(points: Tensor) -> Tensor:
        seen.append((points.requires_grad, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), points.dtype))
        return F.linear(points, torch.ones(1, points.shape[1], dtype=points.dtype)).squeeze(1)

    x = normal(64, 8, dtype=torch.float32).requires_grad_(True)
    plain = ZerothOrderGradient(8)(loss, x, seeded())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = ZerothOrderGradient(8)(loss, x, seeded())
        narrow = ZerothOrderGradient(8)(loss, x.bfloat16(), seeded())
    assert seen == [(False, False, False, torch.float32)] * 3
    assert torch.equal(plain.gradient, mixed.gradient) and not plain.gradient.requires_grad
    assert narrow.gradient.dtype == torch.float32
    torch.testing.assert_close(plain.gradient, torch.ones(64, 8), rtol=0, atol=0.02)
    assert ZerothOrderGradient(8)(loss, x.double(), seeded()).gradient.dtype == torch.float64


def test_the_same_seed_draws_the_same_directions() -> None:
    x = normal(3, 8)
    estimator = ZerothOrderGradient(2)
    assert torch.equal(estimator.draw(x, seeded(1)), estimator.draw(x, seeded(1)))
    assert not torch.equal(estimator.draw(x, seeded(1)), estimator.draw(x, seeded(2)))


def trained_pair() -> tuple[nn.Module, nn.Module]:
    """Two classifiers of the same 8x8 images, of different size, that agree in part and are not too sure."""
    x = normal(600, 64, seed=7, dtype=torch.float32).tanh()
    labels = (x @ normal(64, 5, seed=8, dtype=torch.float32)).argmax(1)
    nets = []
    for seed, hidden in ((0, 48), (1, 24)):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 5))
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        for _ in range(10):
            optimizer.zero_grad()
            F.cross_entropy(net(x), labels).backward()
            optimizer.step()
        nets.append(net.requires_grad_(False))
    return nets[0], nets[1]


def test_the_step_that_suits_rounded_responses_finds_the_gradient_and_a_small_one_does_not() -> None:
    api, model = trained_pair()
    gap = ResponseGap("l1")
    x = normal(64, 64, seed=11, dtype=torch.float32)
    wanted = exact_gradient(lambda points: gap(api(points.tanh()).softmax(-1), model(points.tanh())), x)

    def found(eps: float) -> Tensor:
        def loss(points: Tensor) -> Tensor:
            rounded = (api(points.tanh()).softmax(-1) * 1e4).round() / 1e4
            return gap(rounded, model(points.tanh()), decimals=4)

        return ZerothOrderGradient(64, eps)(loss, x, seeded()).gradient

    assert step_size(4, None, 64) == pytest.approx(0.1)
    assert mean_row_cosine(found(step_size(4, None, 64)), wanted) > 0.8
    assert mean_row_cosine(found(1e-3), wanted) < 0.3


def test_the_step_that_suits_8_bit_images_finds_the_gradient_and_a_small_one_does_not() -> None:
    api, model = trained_pair()
    gap = ResponseGap("l1")
    x = normal(64, 64, seed=11, dtype=torch.float32)
    wanted = exact_gradient(lambda points: gap(api(points.tanh()).softmax(-1), model(points.tanh())), x)

    def found(eps: float) -> Tensor:
        def loss(points: Tensor) -> Tensor:
            images = points.tanh()
            grey = ((images + 1) * 127.5).round() / 127.5 - 1
            return gap(api(grey).softmax(-1), model(images))

        return ZerothOrderGradient(64, eps)(loss, x, seeded()).gradient

    assert step_size(None, "uint8", 64) == pytest.approx(8 * 2 / 255)
    # .68 here: tanh makes steps in the pixels smaller than those before it.
    assert mean_row_cosine(found(step_size(None, "uint8", 64)), wanted) > 0.6
    assert mean_row_cosine(found(2 * step_size(None, "uint8", 64)), wanted) > 0.8
    assert mean_row_cosine(found(1e-3), wanted) < 0.3


@pytest.mark.parametrize(
    ("decimals", "quantization", "size", "step"),
    [
        (None, None, 784, 1e-3),
        (7, None, 784, 10**-2.5),
        (6, None, 784, 1e-2),
        (4, None, 784, 0.1),
        (2, None, 784, 1.0),
        (0, None, 784, 1.0),
        (12, None, 784, 1e-3),
        (1000, None, 784, 1e-3),
        (None, "uint8", 784, 28 * 2 / 255),
        (6, "uint8", 3072, math.sqrt(3072) * 2 / 255),
        (2, "uint8", 784, 1.0),
    ],
)
def test_the_step_follows_what_is_rounded(
    decimals: int | None, quantization: str | None, size: int, step: float
) -> None:
    assert step_size(decimals, quantization, size) == pytest.approx(step)
    assert check_step_size(step, decimals, quantization, size) is None
    assert check_step_size(float(f"{step:.2g}"), decimals, quantization, size) is None


def test_a_step_that_drowns_in_rounding_is_told_with_one_that_does_not() -> None:
    assert check_step_size(1e-3, 4, None, 784) == (
        "eps=0.001 is too small for responses of 4 decimals: differences would be mostly rounding; use eps=0.1"
    )
    both = check_step_size(1e-3, 6, "uint8", 784)
    assert both is not None and "responses of 6 decimals and 8-bit images of 784 values" in both
    assert both.endswith("use eps=0.22")
    unrounded = check_step_size(1e-7, None, None, 784)
    assert unrounded is not None and "too small for float32" in unrounded and unrounded.endswith("use eps=0.001")
    assert check_step_size(1e-4, None, None, 784) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_directions": 0}, "num_directions must be at least 1, got 0"),
        ({"eps": 0.0}, "eps must be a positive number, got 0.0"),
        ({"eps": -1e-3}, "eps must be a positive number, got -0.001"),
        ({"eps": math.nan}, "eps must be a positive number, got nan"),
        ({"directions": "cube"}, "directions must be one of auto, sphere, orthonormal, got 'cube'"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZerothOrderGradient(**options)  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(
        ValueError, match="num_directions=9 orthonormal directions do not exist in samples of 8 numbers"
    ):
        ZerothOrderGradient(9, directions="orthonormal").perturb(normal(2, 2, 4))
    with pytest.raises(ValueError, match=r"floating point of shape \(batch, ...\), got torch.int64"):
        ZerothOrderGradient().perturb(torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"got torch.float64 of shape \(4,\)"):
        ZerothOrderGradient().perturb(normal(4))
    with pytest.raises(ValueError, match=r"loss_fn returned the shape \(\) for 9 points; expected one loss a point"):
        ZerothOrderGradient(2)(lambda points: points.sum(), normal(3, 4))
    with pytest.raises(ValueError, match=r"directions have the shape \(2, 4\), expected \(1, 2, 4\)"):
        ZerothOrderGradient().points(normal(2, 4), normal(2, 4))
    with pytest.raises(ValueError, match=r"losses of shape \(3, 5\).*expected losses of shape \(2, 5\)"):
        ZerothOrderGradient().estimate(normal(3, 5), normal(1, 5, 4))


def test_steps_for_impossible_services_are_refused() -> None:
    with pytest.raises(ValueError, match="decimals must be None or at least 0, got -1"):
        step_size(-1, None, 64)
    with pytest.raises(ValueError, match="input_quantization must be None or 'uint8', got 'int4'"):
        step_size(None, "int4", 64)
    with pytest.raises(ValueError, match="num_values must be at least 1, got 0"):
        step_size(None, None, 0)
