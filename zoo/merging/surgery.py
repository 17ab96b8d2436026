"""Representation surgery (Yang et al., 2024, arXiv 2402.02705): a merged encoder's features, repaired for each task.

Features z of a merged encoder drift away from the features z_ind that the expert of a task would give, and the task's
frozen head was made for the latter. A small module per task predicts the drift from z and subtracts it; it learns from
unlabelled inputs to imitate the expert.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "none": nn.Identity}
_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": F.l1_loss,
    "mse": F.mse_loss,
    "smooth_l1": F.smooth_l1_loss,
    "cosine": lambda found, wanted: (1 - F.cosine_similarity(found, wanted, dim=-1)).mean(),
}
_MATCHES = ("raw", "normalized")
_RESERVED = frozenset(dir(nn.ModuleDict()))


def channels_last(z: Tensor, dim: int, channel_dim: int = -1) -> Tensor:
    """A view of features with their channels in the last dimension.

    Args:
        z: Floating point, `dim` long in dimension `channel_dim`.
        dim: Number of channels.
        channel_dim: -1 for `(..., dim)`, 1 for `(batch, dim, height, width)`.

    Raises:
        ValueError: If the features are no numbers with a fraction, or have another number of channels.
    """
    if not z.is_floating_point():
        raise ValueError(f"features must be floating point, got {z.dtype}; a feature_fn may have returned ids")
    if not -z.ndim <= channel_dim < z.ndim or z.shape[channel_dim] != dim:
        raise ValueError(
            f"features of shape {tuple(z.shape)} must have {dim} channels in dimension {channel_dim}; "
            "set dim and channel_dim to what the feature_fn returns"
        )
    return z.movedim(channel_dim, -1)


class SurgeryModule(nn.Module):
    """z_hat = z - B(z) with B(z) = W_up act(W_down z), of rank `rank` (Yang et al., 2024).

    W_up starts at zero, so that a new module changes nothing. The 2 * dim * rank weights may have a wider dtype than
    the features; the result has the features' dtype.

    Args:
        dim: Channels of the features.
        rank: Width of the bottleneck, from 1 to `dim`.
        bias: Give both matrices an intercept. The paper has none.
        activation: "relu", "gelu", or "none" for a linear map.
        channel_dim: Dimension of the channels: -1 for `(..., dim)`, 1 for dense features `(batch, dim, height, width)`.

    Raises:
        ValueError: If the rank lies outside 1..dim or the activation is unknown.
    """

    def __init__(
        self,
        dim: int,
        rank: int = 16,
        bias: bool = False,
        activation: Literal["relu", "gelu", "none"] = "relu",
        channel_dim: int = -1,
    ) -> None:
        super().__init__()
        if not 1 <= rank <= dim:
            raise ValueError(f"rank must lie between 1 and the {dim} channels of the features, got {rank}")
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be one of {list(_ACTIVATIONS)}, got {activation!r}")
        # A linear map of full rank is ordinary least squares, which is asked for on purpose.
        if rank == dim and activation != "none":
            warnings.warn(
                f"rank {rank} is the full width of the features: nothing is saved over a square matrix", stacklevel=2
            )
        self.dim, self.rank, self.channel_dim = dim, rank, channel_dim
        self.down = nn.Linear(dim, rank, bias=bias)
        self.activation = _ACTIVATIONS[activation]()
        self.up = nn.Linear(rank, dim, bias=bias)
        for parameter in self.up.parameters():
            nn.init.zeros_(parameter)

    def bias_of(self, z: Tensor) -> Tensor:
        """The predicted drift B(z), of the shape and dtype of z.

        Raises:
            ValueError: If z has another number of channels.
        """
        rows = channels_last(z, self.dim, self.channel_dim).to(self.down.weight.dtype)
        bias: Tensor = self.up(self.activation(self.down(rows)))
        return bias.to(z.dtype).movedim(-1, self.channel_dim)

    def forward(self, z: Tensor) -> Tensor:
        """Repaired features z - B(z), of the shape and dtype of z."""
        return z - self.bias_of(z)

    def extra_repr(self) -> str:
        """Sizes, as `print` shows them."""
        return f"dim={self.dim}, rank={self.rank}, channel_dim={self.channel_dim}"


class SurgeryBank(nn.Module):
    """One surgery module per task, with parameters of its own.

    A step on some tasks leaves the parameters of the others, and what an optimizer keeps for them, untouched, as long
    as gradients are set to None between steps. (In one stacked tensor, the momentum of Adam would move them.)

    Args:
        task_names: Any distinct, non-empty names; the ids of a mixed batch count in this order.
        dim: Channels of the features.
        rank: As in `SurgeryModule`, as are the others.
        bias: As in `SurgeryModule`.
        activation: As in `SurgeryModule`.
        channel_dim: As in `SurgeryModule`.

    Raises:
        ValueError: If the names are not distinct, or an argument does not suit `SurgeryModule`.
    """

    def __init__(
        self,
        task_names: Sequence[str],
        dim: int,
        rank: int = 16,
        bias: bool = False,
        activation: Literal["relu", "gelu", "none"] = "relu",
        channel_dim: int = -1,
    ) -> None:
        super().__init__()
        names = _checked(task_names)
        self._fill({name: SurgeryModule(dim, rank, bias, activation, channel_dim) for name in names})

    @classmethod
    def from_modules(cls, modules: Mapping[str, nn.Module]) -> SurgeryBank:
        """A bank of ready modules, which it shares: fitted `LinearSurgery` or `ShiftSurgery`, or a part of a bank.

        Args:
            modules: Task name -> module from features to repaired features of the same shape.

        Raises:
            ValueError: If there is none.
        """
        bank = cls.__new__(cls)
        nn.Module.__init__(bank)
        _checked(list(modules))
        bank._fill(modules)
        return bank

    def _fill(self, modules: Mapping[str, nn.Module]) -> None:
        self.task_names = tuple(modules)
        self.tasks = nn.ModuleDict()
        for name, module in modules.items():
            self.tasks[_key(name)] = module

    def __getitem__(self, task: str) -> nn.Module:
        """The module of a task.

        Raises:
            ValueError: If there is no such task.
        """
        if task not in self.task_names:
            raise ValueError(f"there is no surgery module for task {task!r}; the tasks are {list(self.task_names)}")
        return self.tasks[_key(task)]

    def forward(self, z: Tensor, task: str | None = None, task_ids: Tensor | None = None) -> Tensor:
        """Repaired features.

        Args:
            z: Features, of one task or of several.
            task: Name of the task of all rows.
            task_ids: int64 `(batch,)` in place of `task`: positions in `task_names`, one for each row of z.

        Returns:
            A tensor like z. Modules of tasks without a row are not run.

        Raises:
            ValueError: If not exactly one of `task` and `task_ids` is given, or it does not fit the tasks or z.
        """
        if (task is None) == (task_ids is None):
            raise ValueError(
                "surgery needs the task of its features, by either task= or task_ids=; "
                f"the tasks are {list(self.task_names)}"
            )
        if task is not None:
            repaired: Tensor = self[task](z)
            return repaired
        assert task_ids is not None
        return self._mixed(z, task_ids)

    def _mixed(self, z: Tensor, task_ids: Tensor) -> Tensor:
        if task_ids.shape != z.shape[:1] or task_ids.is_floating_point():
            raise ValueError(
                f"task_ids must be int64 of shape {tuple(z.shape[:1])} for features of shape {tuple(z.shape)}, "
                f"got {task_ids.dtype} of shape {tuple(task_ids.shape)}"
            )
        order = torch.argsort(task_ids, stable=True)
        present, counts = torch.unique_consecutive(task_ids[order], return_counts=True)
        ids = present.tolist()
        strangers = [number for number in ids if not 0 <= number < len(self.task_names)]
        if strangers:
            raise ValueError(
                f"task_ids has {strangers}, but ids run from 0 to {len(self.task_names) - 1}: {list(self.task_names)}"
            )
        parts = torch.split(z[order], counts.tolist())
        repaired = [self[self.task_names[number]](part) for number, part in zip(ids, parts, strict=True)]
        return torch.cat(repaired)[torch.argsort(order)] if repaired else z


def surgery_loss(
    z_hat: Tensor,
    z_ind: Tensor,
    loss: Literal["l1", "mse", "cosine", "smooth_l1"] = "l1",
    match: Literal["raw", "normalized"] = "raw",
    channel_dim: int = -1,
) -> Tensor:
    """Distance of repaired features from the expert's, mean over the batch and dimensions.

    Args:
        z_hat: Repaired features `(..., dim)`.
        z_ind: The expert's features, of the same shape.
        loss: "l1" (the paper), "mse", "smooth_l1", or "cosine" (1 - cosine, mean over the batch).
        match: "raw" features, or both "normalized" to length 1 first.
        channel_dim: Dimension of the channels, over which lengths and cosines are taken.

    Returns:
        A scalar, in float32 or wider.

    Raises:
        ValueError: If the shapes differ or an option is unknown.
    """
    if loss not in _LOSSES:
        raise ValueError(f"loss must be one of {list(_LOSSES)}, got {loss!r}")
    if match not in _MATCHES:
        raise ValueError(f"match must be one of {list(_MATCHES)}, got {match!r}")
    if z_hat.shape != z_ind.shape:
        raise ValueError(
            f"repaired features have shape {tuple(z_hat.shape)}, the expert's {tuple(z_ind.shape)}; "
            "use a feature_fn that gives both the same"
        )
    dtype = torch.promote_types(torch.promote_types(z_hat.dtype, z_ind.dtype), torch.float32)
    found, wanted = (z.to(dtype).movedim(channel_dim, -1) for z in (z_hat, z_ind))
    if match == "normalized":
        found, wanted = F.normalize(found, dim=-1), F.normalize(wanted, dim=-1)
    return _LOSSES[loss](found, wanted)


def _checked(task_names: Sequence[str]) -> list[str]:
    names = [task_names] if isinstance(task_names, str) else list(task_names)
    if isinstance(task_names, str) or not names or not all(names) or len(set(names)) < len(names):
        raise ValueError(f"task_names must be a list of distinct, non-empty names, got {task_names!r}")
    return names


def _key(name: str) -> str:
    """Name of a task as a key of a ModuleDict; `urllib.parse.unquote` turns it back.

    Dots would split the names of parameters, and some words are attributes of the ModuleDict itself.
    """
    key = name.replace("%", "%25").replace(".", "%2E")
    return f"%{ord(key[0]):02X}{key[1:]}" if key in _RESERVED else key
