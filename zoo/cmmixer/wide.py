"""Clips as wide images: frames beside each other, cut into patches."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LAYOUTS = ("concat", "interleave")


def check_grid(height: int, width: int, frames: int, patch_size: int, layout: str = "concat") -> tuple[int, int]:
    """Rows and columns of the patch grid of a wide image.

    Args:
        height: Rows of a frame in pixels.
        width: Columns of a frame.
        frames: Frames of a clip.
        patch_size: Side of a patch in pixels.
        layout: How the frames share the columns, see `to_wide`.

    Returns:
        Rows and columns of the grid, in patches.

    Raises:
        ValueError: If patches do not tile the image, or the layout is unknown.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if patch_size < 1 or frames < 1:
        raise ValueError(f"patch_size and the number of frames must be positive, got {patch_size} and {frames}")
    columns = frames * width if layout == "interleave" else width
    if height % patch_size or columns % patch_size:
        wide = f"{frames} x {width} columns" if layout == "interleave" else f"{width} columns"
        raise ValueError(
            f"frames of {height} rows and {wide} cannot be cut into patches of {patch_size} x {patch_size}"
        )
    return height // patch_size, frames * width // patch_size


def to_wide(clips: Tensor, layout: str = "concat") -> Tensor:
    """Put the frames of each clip into one wide image.

    Args:
        clips: `(batch, frames, channels, height, width)`.
        layout: "concat": frame t fills columns `t * width` to `(t + 1) * width - 1`. "interleave": column
            `w * frames + t` is column w of frame t, so that a patch is a small tube of space and time.

    Returns:
        `(batch, channels, height, frames * width)`.

    Raises:
        ValueError: If the layout is unknown or the clips have another number of dimensions.
    """
    if clips.ndim != 5:
        raise ValueError(f"clips must have shape (batch, frames, channels, height, width), got {tuple(clips.shape)}")
    batch, frames, channels, height, width = clips.shape
    if layout == "concat":
        ordered = clips.permute(0, 2, 3, 1, 4)
    elif layout == "interleave":
        ordered = clips.permute(0, 2, 3, 4, 1)
    else:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    return ordered.reshape(batch, channels, height, frames * width)


def from_wide(wide: Tensor, frames: int, layout: str = "concat") -> Tensor:
    """The clips of wide images: the inverse of `to_wide`.

    Args:
        wide: `(batch, channels, height, frames * width)`.
        frames: Frames of each clip.
        layout: As in `to_wide`.

    Returns:
        `(batch, frames, channels, height, width)`.

    Raises:
        ValueError: If the layout is unknown, or the columns cannot be shared by the frames.
    """
    batch, channels, height, columns = wide.shape
    if columns % frames:
        raise ValueError(f"{columns} columns cannot be shared by {frames} frames")
    if layout == "concat":
        return wide.reshape(batch, channels, height, frames, columns // frames).permute(0, 3, 1, 2, 4)
    if layout == "interleave":
        return wide.reshape(batch, channels, height, columns // frames, frames).permute(0, 4, 1, 2, 3)
    raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")


def patchify(wide: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches.

    Args:
        wide: `(batch, channels, height, width)`.
        patch_size: Side of a patch.

    Returns:
        `(batch, patches, patch_size * patch_size * channels)`: patches row by row of the grid, values in the order
        row, column, channel.

    Raises:
        ValueError: If patches do not tile the images.
    """
    batch, channels, height, width = wide.shape
    rows, columns = check_grid(height, width, 1, patch_size)
    cut = wide.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch_size * patch_size * channels)


def cut_clips(clips: Tensor, patch_size: int, layout: str = "concat") -> Tensor:
    """`patchify(to_wide(clips, layout), patch_size)`, in one copy where the frames lie side by side.

    Args:
        clips: `(batch, frames, channels, height, width)`.
        patch_size: Side of a patch.
        layout: As in `to_wide`.

    Returns:
        `(batch, patches, patch_size * patch_size * channels)`.

    Raises:
        ValueError: If patches do not tile the frames.
    """
    if layout != "concat" or clips.ndim != 5:
        return patchify(to_wide(clips, layout), patch_size)
    batch, frames, channels, height, width = clips.shape
    rows, columns = check_grid(height, width, frames, patch_size)
    cut = clips.reshape(batch, frames, channels, rows, patch_size, columns // frames, patch_size)
    values = patch_size * patch_size * channels
    return cut.permute(0, 3, 1, 5, 4, 6, 2).reshape(batch, rows * columns, values)


def unpatchify(patches: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """The images that patches were cut from: the inverse of `patchify`.

    Args:
        patches: `(batch, patches, patch_size * patch_size * channels)`.
        patch_size: Side of a patch.
        height: Rows of the image in pixels.
        width: Columns of the image.

    Returns:
        `(batch, channels, height, width)`.

    Raises:
        ValueError: If the number of patches or their size belongs to another image.
    """
    rows, columns = check_grid(height, width, 1, patch_size)
    batch, count, values = patches.shape
    channels, rest = divmod(values, patch_size * patch_size)
    if count != rows * columns or rest:
        raise ValueError(
            f"an image of {height} x {width} has {rows * columns} patches of a multiple of {patch_size * patch_size} "
            f"values, got {count} of {values}"
        )
    cut = patches.reshape(batch, rows, columns, patch_size, patch_size, channels)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, height, width)
