"""Surgery without training: the best linear map and the mean shift, as controls for the learned modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from zoo.merging.surgery import SurgeryModule, channels_last

if TYPE_CHECKING:
    from typing_extensions import Self


class LinearSurgery(SurgeryModule):
    """z_hat = z - W_up W_down z, with the matrices of the least squared error for their rank.

    Its state dict fits a `SurgeryModule` of the same rank with `activation="none"`, and so a bank of these.

    Args:
        dim: Channels of the features.
        rank: Rank of the map, `dim` if None.
        intercept: Have a constant term.
        channel_dim: As in `SurgeryModule`.

    Raises:
        ValueError: If the rank lies outside 1..dim.
    """

    def __init__(self, dim: int, rank: int | None = None, intercept: bool = False, channel_dim: int = -1) -> None:
        super().__init__(dim, dim if rank is None else rank, bias=intercept, activation="none", channel_dim=channel_dim)

    @classmethod
    @torch.no_grad()
    def fit(
        cls, z: Tensor, z_ind: Tensor, rank: int | None = None, *, intercept: bool = False, channel_dim: int = -1
    ) -> Self:
        """The module that minimises the mean of (z_hat - z_ind)^2, computed in float64.

        With full rank this is ordinary least squares of z_ind on z, with less it is reduced-rank regression of the
        drift z - z_ind on z. Where the rows leave the map open, it is the smallest one that fits.

        Args:
            z: The merged encoder's features, `(images, dim)` or of any shape with `dim` channels.
            z_ind: The expert's features of the same images, of the same shape.
            rank: Rank of the map, `dim` if None.
            intercept: Have a constant term.
            channel_dim: Dimension of the channels.

        Raises:
            ValueError: If the shapes differ, there is no row, a value is not finite, or the rank is not possible.
        """
        rows, drift = _paired(z, z_ind, channel_dim)
        module = cls(rows.shape[1], rank, intercept, channel_dim).to(z.device, _weight_dtype(z))
        centre = rows.mean(0), drift.mean(0)
        if intercept:
            # The drift need not be centred too: centred rows do not see its mean.
            rows = rows - centre[0]
        # The triangle of both matrices together holds all that the regression needs: R and Q^T drift.
        triangle = torch.linalg.qr(torch.cat([rows, drift], 1), mode="r").R[: rows.shape[1]]
        design, projected = triangle.split(rows.shape[1], 1)
        left, singular, right = torch.linalg.svd(design, full_matrices=False)
        known = singular > singular.max() * max(rows.shape) * torch.finfo(rows.dtype).eps
        inverse = torch.where(known, 1 / singular, 0.0)
        weights = right.T @ (inverse[:, None] * (left.T @ projected))
        # The best map of a smaller rank is the full one, seen along the main directions of what it fits.
        main = torch.linalg.svd(design @ weights, full_matrices=True).Vh[: module.rank].T
        module.down.weight.copy_((weights @ main).T)
        module.up.weight.copy_(main)
        if intercept:
            module.down.bias.zero_()
            module.up.bias.copy_(centre[1] - centre[0] @ weights @ main @ main.T)
        return module


class ShiftSurgery(nn.Module):
    """z_hat = z - shift, one number for each channel.

    Args:
        dim: Channels of the features.
        channel_dim: As in `SurgeryModule`.
    """

    def __init__(self, dim: int, channel_dim: int = -1) -> None:
        super().__init__()
        self.dim, self.channel_dim = dim, channel_dim
        self.shift = nn.Parameter(torch.zeros(dim))

    @classmethod
    @torch.no_grad()
    def fit(cls, z: Tensor, z_ind: Tensor, *, channel_dim: int = -1) -> Self:
        """The module whose shift is the mean of z - z_ind in each channel, computed in float64.

        Args:
            z: The merged encoder's features, `(images, dim)` or of any shape with `dim` channels.
            z_ind: The expert's features of the same images, of the same shape.
            channel_dim: Dimension of the channels.

        Raises:
            ValueError: If the shapes differ, there is no row, or a value is not finite.
        """
        _, drift = _paired(z, z_ind, channel_dim)
        module = cls(drift.shape[1], channel_dim).to(z.device, _weight_dtype(z))
        module.shift.copy_(drift.mean(0))
        return module

    def bias_of(self, z: Tensor) -> Tensor:
        """The shift, of the shape and dtype of z.

        Raises:
            ValueError: If z has another number of channels.
        """
        rows = channels_last(z, self.dim, self.channel_dim)
        return self.shift.to(z.dtype).expand_as(rows).movedim(-1, self.channel_dim)

    def forward(self, z: Tensor) -> Tensor:
        """Repaired features z - shift, of the shape and dtype of z."""
        return z - self.bias_of(z)


def _paired(z: Tensor, z_ind: Tensor, channel_dim: int) -> tuple[Tensor, Tensor]:
    """Features and their drift, both float64 `(rows, dim)`."""
    if z.shape != z_ind.shape:
        raise ValueError(f"features have shape {tuple(z.shape)}, the expert's {tuple(z_ind.shape)}; they must agree")
    if not z.numel():
        raise ValueError(f"a fit needs at least one image, got features of shape {tuple(z.shape)}")
    dim = z.shape[channel_dim]
    rows, wanted = (channels_last(part, dim, channel_dim).reshape(-1, dim).double() for part in (z, z_ind))
    drift = rows - wanted
    if not drift.isfinite().all():
        raise ValueError("features to fit hold NaN or infinity; check the merged encoder and the expert")
    return rows, drift


def _weight_dtype(z: Tensor) -> torch.dtype:
    return torch.promote_types(z.dtype, torch.float32)
