"""CKA is blind to what it must not see, about 0 where nothing is shared, and finite where there is nothing to see."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from zoo.api_cl.similarity import SIMILARITIES, BiasedCKA, DebiasedCKA, similarity_loss

KINDS = [DebiasedCKA, BiasedCKA]


def features(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rotation(d: int, seed: int = 5) -> Tensor:
    return torch.linalg.qr(features(d, d, seed)).Q


def loop_hsic(k: Tensor, l: Tensor) -> float:  # noqa: E741
    """The unbiased estimator, term by term over indices that all differ."""
    n = len(k)
    two = three = four = 0.0
    for i in range(n):
        for j in range(n):
            if j == i:
                continue
            two += float(k[i, j] * l[i, j])
            for q in range(n):
                if q in (i, j):
                    continue
                three += float(k[i, j] * l[i, q])
                for r in range(n):
                    if r not in (i, j, q):
                        four += float(k[i, j] * l[q, r])
    pairs = n * (n - 1)
    return two / pairs - 2 * three / (pairs * (n - 2)) + four / (pairs * (n - 2) * (n - 3))


def test_the_debiased_one_is_made_of_unbiased_estimators() -> None:
    x, y = features(7, 5) + 1, features(7, 3, 1) + features(7, 5)[:, :3]
    k, l = x @ x.T, y @ y.T  # noqa: E741
    wanted = loop_hsic(k, l) / (loop_hsic(k, k) * loop_hsic(l, l)) ** 0.5
    assert 0.02 < abs(wanted) < 0.95
    assert float(DebiasedCKA()(x, y)) == pytest.approx(wanted, rel=1e-9)


def test_the_biased_one_in_gram_form_is_that_of_features() -> None:
    x, y = features(40, 6) + 2, features(40, 9, 1)
    y[:, :6] += x
    a, b = x - x.mean(0), y - y.mean(0)
    wanted = (a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm())
    torch.testing.assert_close(BiasedCKA()(x, y), wanted, rtol=1e-9, atol=0)
    torch.testing.assert_close(BiasedCKA()(x.float(), y.float()), wanted.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_rotation_scale_and_shift_change_nothing(kind: type[DebiasedCKA] | type[BiasedCKA]) -> None:
    cka = kind()
    x, y = features(30, 8), features(30, 8, 1) + features(30, 8)
    assert float(cka(x, x)) == pytest.approx(1, abs=1e-12)
    assert float(cka(x, 1e4 * x @ rotation(8) + 7)) == pytest.approx(1, abs=1e-9)
    torch.testing.assert_close(cka(x, y), cka(1e-3 * x @ rotation(8) - 1, y))
    torch.testing.assert_close(cka(x, y), cka(y, x))
    stretched = x * torch.linspace(0.1, 5, 8)
    assert float(cka(x, stretched)) < 0.95


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_single_precision_suffices_whatever_the_length_and_the_mean(
    kind: type[DebiasedCKA] | type[BiasedCKA], scale: float
) -> None:
    x, y = features(64, 32, dtype=torch.float32), features(64, 32, 1, dtype=torch.float32)
    y = y + x
    wanted = kind()(x.double(), y.double()).float()
    torch.testing.assert_close(kind()(scale * x, y / scale), wanted, rtol=1e-4, atol=0)
    far = (x + 100).requires_grad_(True)
    torch.testing.assert_close(kind()(far, y), wanted, rtol=1e-3, atol=0)


def test_independent_wide_features_have_nothing_in_common_for_the_debiased_one_only() -> None:
    pairs = [(features(64, 512, 2 * i), features(64, 512, 2 * i + 1)) for i in range(20)]
    debiased = torch.stack([DebiasedCKA()(x, y) for x, y in pairs])
    assert abs(float(debiased.mean())) < 0.05 and float(debiased.abs().max()) < 0.1
    assert min(float(BiasedCKA()(x, y)) for x, y in pairs) > 0.8


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_differences(kind: type[DebiasedCKA] | type[BiasedCKA]) -> None:
    x, y = features(6, 3).requires_grad_(True), (features(6, 4, 1)).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda a, b: kind()(a, b), (x, y))


@pytest.mark.parametrize("similarity", ["cka", "cka_biased"])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e6])
@pytest.mark.parametrize("which", ["network", "former"])
def test_features_without_variation_skip_the_term_with_a_warning(similarity: str, value: float, which: str) -> None:
    flat = torch.full((23, 8), value, requires_grad=True)
    varied = features(23, 8, dtype=torch.float32).requires_grad_(True)
    new, old = (flat, varied) if which == "network" else (varied, flat)
    with pytest.warns(UserWarning, match=f"similarity='{similarity}' was skipped: all images have the same features"):
        loss = similarity_loss(similarity, new, old, new, old)
    loss.backward()
    assert float(loss.detach()) == 0.0
    for tensor in (flat, varied):
        assert tensor.grad is not None and float(tensor.grad.abs().max()) == 0.0
    assert float((DebiasedCKA() if similarity == "cka" else BiasedCKA())(flat, varied).detach()) == 0.0


def test_features_that_are_all_orthogonal_have_finite_gradients() -> None:
    # Every pair of images is equally unlike: the debiased estimator has nothing to align.
    x = torch.eye(8, requires_grad=True)
    similarity_loss("cka", x, features(8, 8, dtype=torch.float32), x, x).backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())


def test_a_step_down_the_loss_brings_features_closer() -> None:
    old = features(32, 16)
    for kind in ("cka", "cka_biased", "cosine"):
        new = features(32, 16, 1).requires_grad_(True)
        before = similarity_loss(kind, new, old, new, old)
        before.backward()
        assert new.grad is not None
        step = new.detach() - 0.5 * new.grad / new.grad.norm()
        assert float(similarity_loss(kind, step, old, step, old)) < float(before.detach()) - 1e-3


def test_each_loss_follows_its_formula() -> None:
    x, y, s, t = features(9, 5), features(9, 5, 1), features(9, 4, 2), features(9, 4, 3)
    found = {kind: similarity_loss(kind, x, y, s, t) for kind in SIMILARITIES}
    cosines = (x * y).sum(1) / (x.square().sum(1) * y.square().sum(1)).sqrt()
    torch.testing.assert_close(found["cosine"], 1 - cosines.mean())
    torch.testing.assert_close(found["logit_l2"], (s - t).square().sum() / 36)
    torch.testing.assert_close(found["cka"], 1 - DebiasedCKA()(x, y))
    torch.testing.assert_close(found["cka_biased"], 1 - BiasedCKA()(x, y))
    assert float(found["none"]) == 0.0
    assert len({float(loss) for loss in found.values()}) == 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(similarity_loss("cka", x, x @ rotation(5), s, t)) == pytest.approx(0, abs=1e-9)
        assert float(similarity_loss("cosine", x, 3 * x, s, t)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", SIMILARITIES)
def test_losses_are_single_precision_under_autocast(kind: str) -> None:
    x, y = features(16, 8, dtype=torch.float32), features(16, 8, 1, dtype=torch.float32)
    plain = similarity_loss(kind, x, y, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(similarity_loss(kind, x, y, x, y), plain)
        assert similarity_loss(kind, x.bfloat16(), y, x.bfloat16(), y).dtype == torch.float32
    cosine = similarity_loss("cosine", torch.zeros(4, 3, requires_grad=True), torch.zeros(4, 3), x, y)
    cosine.backward()
    assert float(cosine.detach()) == 1.0


def test_what_does_not_fit_is_refused() -> None:
    x = features(9, 5)
    with pytest.raises(ValueError, match=r"similarity must be one of cka, .*none, got 'l2'"):
        similarity_loss("l2", x, x, x, x)
    with pytest.raises(ValueError, match="at least 4 images, got 3; raise the batch"):
        similarity_loss("cka", x[:3], x[:3], x, x)
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        BiasedCKA()(x[:1], x[:1])
    for cka in (DebiasedCKA(), BiasedCKA()):
        with pytest.raises(ValueError, match=r"of the same n images, got \(9, 5\) and \(8, 5\)"):
            cka(x, x[:8])
        with pytest.raises(ValueError, match=r"must be \(n, d\).*got \(9, 5, 1\)"):
            cka(x[..., None], x)
    with pytest.raises(ValueError, match=r"similarity='cosine' compares row by row.*\(9, 5\) and \(9, 4\)"):
        similarity_loss("cosine", x, x[:, :4], x, x)
    with pytest.raises(ValueError, match=r"similarity='logit_l2'.*\(9, 5\) and \(9, 4\)"):
        similarity_loss("logit_l2", x, x, x, x[:, :4])
