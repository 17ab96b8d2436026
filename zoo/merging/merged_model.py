"""A network that runs with merged weights."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from zoo.merging.task_vectors import Coefficients, TaskVectorStore


def find_prefix(skeleton: nn.Module, names: Iterable[str]) -> str:
    """What stands before the names in the state dict of a module that wraps the merged one, such as "backbone.".

    Raises:
        ValueError: If the module has no such names.
    """
    wanted = list(names)
    there = set(skeleton.state_dict())
    for name in [wanted[0]] if wanted[0] in there else sorted(there):
        if name == wanted[0] or name.endswith(f".{wanted[0]}"):
            prefix = name.removesuffix(wanted[0])
            if all(prefix + other in there for other in wanted):
                return prefix
    missing = [name for name in wanted if name not in there]
    raise ValueError(
        f"{type(skeleton).__name__} has no parameter {missing[0]!r} ({len(missing)} of {len(wanted)} are missing): "
        "give the module whose weights were merged, or one that wraps it"
    )


class MergedModel(nn.Module):
    """A module that runs with merged weights, without a copy of them for each use.

    Args:
        skeleton: The module whose parameters are replaced, or a module around it; may be on the meta device. Modes and
            buffers are its own.
        store: Base and task vectors.
        coef: Merging coefficients: a number, `(K,)` or `(L, K)`.

    Raises:
        ValueError: If the skeleton has not the store's names and shapes.
    """

    def __init__(self, skeleton: nn.Module, store: TaskVectorStore, coef: Coefficients) -> None:
        super().__init__()
        # Neither is a part of the state: a checkpoint must not hold K models.
        self._parts = (skeleton, store)
        self.prefix = find_prefix(skeleton, store.param_names)
        own = skeleton.state_dict()
        for name, shape in store.shapes.items():
            if tuple(own[self.prefix + name].shape) != shape:
                raise ValueError(
                    f"{name} has the shape {shape} in the store and {tuple(own[self.prefix + name].shape)} in "
                    f"{type(skeleton).__name__}"
                )
        self.views = prefixed(store.merge(coef), self.prefix)
        self.coef = store.coefficients(coef)

    @property
    def skeleton(self) -> nn.Module:
        """The module that is run."""
        return self._parts[0]

    @property
    def store(self) -> TaskVectorStore:
        """Base and task vectors."""
        return self._parts[1]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the skeleton gives with the merged weights."""
        return functional_call(self.skeleton, {**self._rest(), **self.views}, args, kwargs)

    def _rest(self) -> dict[str, Tensor]:
        """What a skeleton on the meta device lacks: tensors that are not merged."""
        lacking = [name for name, tensor in self.skeleton.state_dict().items() if tensor.is_meta]
        if not lacking:
            return {}
        kept = {self.prefix + name: self.store.kept[name] for name in self.store.names if name in self.store.kept}
        return {name: kept[name] for name in lacking if name in kept}

    def materialize(self) -> nn.Module:
        """A module of its own with the merged weights, in evaluation mode."""
        module = copy.deepcopy(self.skeleton)
        if any(parameter.is_meta for parameter in module.parameters()):
            module = module.to_empty(device=self.store.device)
        merged = prefixed(self.store.state_dict(self.coef), self.prefix)
        there = set(module.state_dict())
        module.load_state_dict({name: tensor for name, tensor in merged.items() if name in there}, strict=False)
        return module.eval()


def prefixed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The same tensors under longer names."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def freeze(module: nn.Module) -> nn.Module:
    """The module in evaluation mode with nothing to train, in place.

    Dropout is off and statistics of BatchNorm stand still, whatever mode the module around it is put in.
    """
    module.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module


@torch.no_grad()
def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors with a NaN or an infinity."""
    return [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
