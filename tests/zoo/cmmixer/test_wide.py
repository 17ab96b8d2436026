"""Clips as wide images and patches."""

from __future__ import annotations

import pytest
import torch

from zoo.cmmixer.wide import LAYOUTS, check_grid, cut_clips, from_wide, patchify, to_wide, unpatchify


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("frames", [1, 3, 4])
def test_clips_come_back_from_patches(layout: str, frames: int) -> None:
    clips = torch.randn(2, frames, 3, 8, 12)
    wide = to_wide(clips, layout)
    assert wide.shape == (2, 3, 8, frames * 12)
    patches = patchify(wide, 4)
    assert patches.shape == (2, 2 * 3 * frames, 48)
    back = unpatchify(patches, 4, 8, frames * 12)
    assert torch.equal(back, wide)
    assert torch.equal(from_wide(back, frames, layout), clips)


def test_concat_puts_each_frame_into_its_own_columns() -> None:
    clips = torch.randn(2, 4, 3, 6, 5)
    wide = to_wide(clips)
    for frame in range(4):
        assert torch.equal(wide[..., 5 * frame : 5 * (frame + 1)], clips[:, frame])


def test_interleave_takes_a_column_of_each_frame_in_turn() -> None:
    constants = torch.arange(4.0)[None, :, None, None, None].expand(1, 4, 1, 2, 3)
    assert to_wide(constants, "interleave")[0, 0, 1].tolist() == [0, 1, 2, 3] * 3
    clips = torch.randn(2, 3, 2, 4, 5)
    wide = to_wide(clips, "interleave")
    for frame in range(3):
        assert torch.equal(wide[..., frame::3], clips[:, frame])


def test_patches_go_row_by_row_and_their_values_row_column_channel() -> None:
    wide = torch.randn(2, 3, 4, 6)
    patches = patchify(wide, 2)
    for row in range(2):
        for column in range(3):
            values = [
                wide[1, channel, 2 * row + y, 2 * column + x].item()
                for y in range(2)
                for x in range(2)
                for channel in range(3)
            ]
            assert patches[1, 3 * row + column].tolist() == values


def test_a_patch_of_interleaved_frames_is_a_tube() -> None:
    frames = torch.arange(4.0)[None, :, None, None, None].expand(1, 4, 1, 8, 2)
    patches = patchify(to_wide(frames, "interleave"), 8).view(8, 8)
    assert torch.equal(patches, torch.arange(4.0).repeat(8, 2))


def test_the_grid_of_interleaved_frames_needs_only_their_columns_together() -> None:
    assert check_grid(224, 224, 4, 16) == (14, 56)
    assert check_grid(8, 2, 4, 8, "interleave") == (1, 1)
    with pytest.raises(ValueError, match="frames of 8 rows and 2 columns cannot be cut into patches of 8 x 8"):
        check_grid(8, 2, 4, 8)


@pytest.mark.parametrize(
    ("height", "width", "frames", "patch_size", "layout", "message"),
    [
        (10, 8, 2, 4, "concat", "frames of 10 rows and 8 columns cannot be cut into patches of 4 x 4"),
        (8, 10, 2, 4, "concat", "frames of 8 rows and 10 columns cannot be cut into patches of 4 x 4"),
        (8, 10, 3, 4, "interleave", "frames of 8 rows and 3 x 10 columns cannot be cut into patches of 4 x 4"),
        (8, 8, 2, 0, "concat", "must be positive, got 0 and 2"),
        (8, 8, 0, 4, "concat", "must be positive, got 4 and 0"),
        (8, 8, 2, 4, "stacked", "layout must be one of concat, interleave, got 'stacked'"),
    ],
    ids=["height", "width", "interleaved-width", "patch_size", "frames", "layout"],
)
def test_grids_that_do_not_fit_are_refused_with_their_numbers(
    height: int, width: int, frames: int, patch_size: int, layout: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_grid(height, width, frames, patch_size, layout)


def test_tensors_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"clips must have shape .*, got \(2, 3, 8, 8\)"):
        to_wide(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="layout must be one of"):
        to_wide(torch.zeros(1, 2, 1, 4, 4), "stacked")
    with pytest.raises(ValueError, match="layout must be one of"):
        from_wide(torch.zeros(1, 1, 4, 8), 2, "stacked")
    with pytest.raises(ValueError, match="10 columns cannot be shared by 3 frames"):
        from_wide(torch.zeros(1, 1, 4, 10), 3)
    with pytest.raises(ValueError, match="8 rows and 10 columns cannot be cut into patches of 4 x 4"):
        patchify(torch.zeros(1, 1, 8, 10), 4)
    with pytest.raises(ValueError, match="8 x 12 has 6 patches of a multiple of 16 values, got 5 of 16"):
        unpatchify(torch.zeros(1, 5, 16), 4, 8, 12)
    with pytest.raises(ValueError, match="8 x 12 has 6 patches of a multiple of 16 values, got 6 of 20"):
        unpatchify(torch.zeros(1, 6, 20), 4, 8, 12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("frames", [1, 3, 4])
def test_clips_are_cut_in_one_copy_as_in_two_steps(layout, frames):
    clips = torch.arange(2 * frames * 3 * 8 * 12).float().view(2, frames, 3, 8, 12)
    assert torch.equal(cut_clips(clips, 4, layout), patchify(to_wide(clips, layout), 4))
