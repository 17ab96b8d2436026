"""Fixed positions on a rectangular grid."""

from __future__ import annotations

import math

import pytest
import torch

from zoo.cmmixer.positions import grid_positions


def test_positions_are_sines_and_cosines_of_column_then_row() -> None:
    rows, columns, width = 3, 5, 12
    positions = grid_positions(rows, columns, width)
    assert positions.shape == (15, 12)
    assert positions.dtype == torch.float32
    for place, vector in enumerate(positions.tolist()):
        row, column = divmod(place, columns)
        expected = []
        for coordinate in (column, row):
            angles = [coordinate / 10000 ** (4 * i / width) for i in range(width // 4)]
            expected += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        assert vector == pytest.approx(expected, abs=1e-6)


def test_the_first_half_tells_the_column_and_the_second_the_row() -> None:
    across, down = grid_positions(14, 56, 16).view(14, 56, 2, 8).unbind(2)
    assert torch.equal(across, across[:1].expand_as(across))
    assert torch.equal(down, down[:, :1].expand_as(down))
    # The first quarter begins with the sine of the column itself.
    torch.testing.assert_close(across[0, :, 0], torch.arange(56.0).sin())
    torch.testing.assert_close(down[:, 0, 0], torch.arange(14.0).sin())


@pytest.mark.parametrize(("rows", "columns"), [(14, 56), (14, 14), (1, 7), (9, 1)])
def test_all_positions_differ(rows: int, columns: int) -> None:
    positions = grid_positions(rows, columns, 64)
    assert positions.shape == (rows * columns, 64)
    assert torch.cdist(positions, positions).fill_diagonal_(torch.inf).min() > 0.1


def test_columns_that_change_places_take_their_positions_along() -> None:
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    grid = grid_positions(4, 6, 16).view(4, 6, 16)
    index = torch.arange(24).view(4, 6)[:, order].flatten()
    assert torch.equal(grid[:, order].flatten(0, 1), grid_positions(4, 6, 16)[index])
    # A position depends on its own row and column, not on the size of the grid.
    assert torch.equal(grid[:2, :3], grid_positions(2, 3, 16).view(2, 3, 16))


def test_on_a_square_grid_they_are_those_of_published_masked_autoencoders() -> None:
    from transformers.models.vit_mae import modeling_vit_mae

    build = getattr(modeling_vit_mae, "build_2d_sinusoidal_position_embedding", None)
    if build is None:
        pytest.skip("this release of transformers has no function that builds these positions")
    theirs = build(height=14, width=14, embed_dim=64)
    # Its halves come as row, column; its own weights take them the other way round.
    torch.testing.assert_close(grid_positions(14, 14, 64), torch.cat([theirs[:, 32:], theirs[:, :32]], 1))


@pytest.mark.parametrize("width", [0, 2, 30])
def test_a_width_that_cannot_be_quartered_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match=rf"multiple of 4, got {width}"):
        grid_positions(2, 2, width)


@pytest.mark.parametrize(("rows", "columns"), [(0, 3), (3, 0)])
def test_an_empty_grid_is_refused(rows: int, columns: int) -> None:
    with pytest.raises(ValueError, match=f"rows and columns, got {rows} x {columns}"):
        grid_positions(rows, columns, 8)
