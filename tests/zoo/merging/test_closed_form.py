"""Linear surgery against least squares and reduced-rank regression; the shift against means."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from zoo.merging.closed_form import LinearSurgery, ShiftSurgery
from zoo.merging.surgery import SurgeryBank, SurgeryModule, surgery_loss


def pairs(rows: int = 60, dim: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated features of unequal sizes and another model's features of the same images."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    z = draw(rows, dim) @ draw(dim, dim) + draw(dim)
    return z, z @ (torch.eye(dim) + 0.3 * draw(dim, dim)) + 0.5 * draw(rows, dim) + draw(dim)


def matrix_of(module: SurgeryModule) -> Tensor:
    return module.up.weight.detach() @ module.down.weight.detach()


def reduced_rank(z: Tensor, target: Tensor, rank: int) -> np.ndarray:
    """The best rank-r matrix M of target ~ z M^T, from the eigenvectors of what least squares fits."""
    x, y = z.numpy(), target.numpy()
    full = np.linalg.lstsq(x, y, rcond=None)[0]
    _, vectors = np.linalg.eigh(y.T @ x @ full)
    main = vectors[:, -rank:]
    return (full @ main @ main.T).T


def test_full_rank_is_ordinary_least_squares() -> None:
    z, z_ind = pairs()
    expected = torch.from_numpy(np.linalg.lstsq(z.numpy(), z_ind.numpy(), rcond=None)[0])
    module = LinearSurgery.fit(z, z_ind)
    torch.testing.assert_close(module(z), z @ expected, rtol=0, atol=1e-9)
    single = LinearSurgery.fit(z.float(), z_ind.float())
    assert single.up.weight.dtype == torch.float32
    torch.testing.assert_close(single(z.float()), (z @ expected).float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 3, 7, 8])
def test_a_smaller_rank_is_reduced_rank_regression_of_the_drift(rank: int) -> None:
    z, z_ind = pairs()
    module = LinearSurgery.fit(z, z_ind, rank)
    assert module.down.weight.shape == (rank, 8)
    np.testing.assert_allclose(matrix_of(module).numpy(), reduced_rank(z, z - z_ind, rank), atol=1e-9)


@pytest.mark.parametrize("intercept", [False, True])
def test_no_step_improves_the_fit(intercept: bool) -> None:
    z, z_ind = pairs()
    module = LinearSurgery.fit(z, z_ind, 3, intercept=intercept)
    loss = surgery_loss(module(z), z_ind, "mse")
    loss.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() < 1e-10, name
    # A truncated least-squares matrix is a different one, and worse.
    left, sizes, right = torch.linalg.svd(matrix_of(LinearSurgery.fit(z, z_ind)))
    truncated = (left[:, :3] * sizes[:3]) @ right[:3]
    assert loss < (z - z @ truncated.T - z_ind).square().mean() - 1e-3


def test_an_intercept_is_least_squares_with_a_column_of_ones() -> None:
    z, z_ind = pairs()
    design = np.concatenate([z.numpy(), np.ones((60, 1))], 1)
    expected = design @ np.linalg.lstsq(design, z_ind.numpy(), rcond=None)[0]
    module = LinearSurgery.fit(z, z_ind, intercept=True)
    np.testing.assert_allclose(module(z).detach().numpy(), expected, atol=1e-9)
    reduced = LinearSurgery.fit(z, z_ind, 2, intercept=True)
    torch.testing.assert_close(reduced(z).mean(0), z_ind.mean(0))
    centred = [part - part.mean(0) for part in (z, z - z_ind)]
    np.testing.assert_allclose(matrix_of(reduced).numpy(), reduced_rank(*centred, 2), atol=1e-9)


@pytest.mark.parametrize("rows", [1, 5, 8, 11])
def test_few_or_repeated_rows_give_the_smallest_map(rows: int) -> None:
    z, z_ind = pairs(rows)
    z[:, 3] = z[:, 2]
    expected = torch.linalg.pinv(z) @ (z - z_ind)
    torch.testing.assert_close(matrix_of(LinearSurgery.fit(z, z_ind)), expected.T, rtol=1e-7, atol=1e-9)


def test_features_that_agree_need_no_map() -> None:
    z, _ = pairs()
    assert torch.equal(LinearSurgery.fit(z, z, 3)(z), z)
    assert torch.equal(LinearSurgery.fit(torch.zeros(4, 3), torch.zeros(4, 3), 2)(z[:, :3].float()), z[:, :3].float())


def test_the_shift_is_the_mean_difference_of_each_channel() -> None:
    z, z_ind = pairs()
    module = ShiftSurgery.fit(z, z_ind)
    torch.testing.assert_close(module.shift.detach(), (z - z_ind).sum(0) / 60)
    torch.testing.assert_close(module(z).mean(0), z_ind.mean(0))
    torch.testing.assert_close(module.bias_of(z), z - module(z))
    far = torch.full((10_000, 1), 1e4) + torch.rand(10_000, 1)
    assert float(ShiftSurgery.fit(far, far - 0.25).shift.detach()) == pytest.approx(0.25, abs=1e-3)


@pytest.mark.parametrize("fit", [LinearSurgery.fit, ShiftSurgery.fit], ids=["linear", "shift"])
def test_dense_features_are_fitted_pixel_by_pixel(fit) -> None:
    z, z_ind = pairs()
    maps, maps_ind = (part.reshape(5, 3, 4, 8).movedim(-1, 1) for part in (z, z_ind))
    dense, plain = fit(maps, maps_ind, channel_dim=1), fit(z, z_ind)
    torch.testing.assert_close(dense(maps).movedim(1, -1).reshape(60, 8), plain(z))
    torch.testing.assert_close(dense.bias_of(maps), maps - dense(maps))


def test_a_new_module_changes_nothing() -> None:
    z, _ = pairs()
    for module in (LinearSurgery(8).double(), LinearSurgery(8, 2, intercept=True).double(), ShiftSurgery(8).double()):
        assert torch.equal(module(z), z)


def test_fits_go_in_and_out_of_banks_as_state_dicts() -> None:
    z, z_ind = pairs()
    fitted = {"a": LinearSurgery.fit(z, z_ind, 3), "b": LinearSurgery.fit(z, 2 * z_ind, 3)}
    learned = SurgeryBank(["a", "b"], 8, 3, activation="none").double()
    learned.load_state_dict(SurgeryBank.from_modules(fitted).state_dict())
    assert torch.equal(learned(z, "b"), fitted["b"](z))
    affine = SurgeryModule(8, 3, bias=True, activation="none").double()
    affine.load_state_dict(LinearSurgery.fit(z, z_ind, 3, intercept=True).state_dict())
    torch.testing.assert_close(affine(z).mean(0), z_ind.mean(0))
    shifts = SurgeryBank.from_modules({"a": ShiftSurgery.fit(z, z_ind)})
    empty = SurgeryBank.from_modules({"a": ShiftSurgery(8).double()})
    empty.load_state_dict(shifts.state_dict())
    assert torch.equal(empty(z, task_ids=torch.zeros(60, dtype=torch.int64)), shifts(z, "a"))


def test_half_precision_features_are_fitted_in_float64_and_repaired_in_their_dtype() -> None:
    z, z_ind = (part.half() for part in pairs())
    for fit in (LinearSurgery.fit, ShiftSurgery.fit):
        module, exact = fit(z, z_ind), fit(z.double(), z_ind.double())
        assert {p.dtype for p in module.parameters()} == {torch.float32}
        assert module(z).dtype == torch.float16
        torch.testing.assert_close(module(z.float()), exact(z.double()).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fit", [LinearSurgery.fit, ShiftSurgery.fit], ids=["linear", "shift"])
def test_features_that_cannot_be_fitted_are_refused(fit) -> None:
    z, z_ind = pairs()
    with pytest.raises(ValueError, match=r"shape \(60, 8\), the expert's \(60, 7\)"):
        fit(z, z_ind[:, :7])
    with pytest.raises(ValueError, match=r"at least one image, got features of shape \(0, 8\)"):
        fit(z[:0], z_ind[:0])
    for place, value in ((0, torch.nan), (1, torch.inf)):
        broken = [z.clone(), z_ind.clone()]
        broken[place][5, 2] = value
        with pytest.raises(ValueError, match="NaN or infinity"):
            fit(*broken)


@pytest.mark.parametrize("rank", [0, 9])
def test_an_impossible_rank_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank must lie between 1 and the 8 channels.*got {rank}"):
        LinearSurgery.fit(*pairs(), rank)


def test_fits_carry_no_graph() -> None:
    z, z_ind = (part.requires_grad_() for part in pairs())
    for fit in (LinearSurgery.fit, ShiftSurgery.fit):
        assert all(p.is_leaf and p.requires_grad for p in fit(z, z_ind).parameters())
