"""Parameter groups whose learning rate shrinks from the head of a ViT down to its embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_EMBEDDINGS = ("patch_embedding", "cls_token")


def layer_decay_groups(
    encoders: Sequence[nn.Module],
    head: Iterable[nn.Parameter],
    lr: float,
    weight_decay: float,
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Groups for AdamW with layer-wise learning rates (section 2.6).

    The rate of layer id k is lr * layer_decay ** (depth + 1 - k). The embeddings of an encoder (its `patch_embedding`
    and `cls_token`) have id 0, its `blocks` 1 .. depth, and the head and all else in the encoder, such as the final
    norm, depth + 1. Biases, weights of norms and other parameters of at most one dimension, and `cls_token`, have no
    weight decay.

    Args:
        encoders: Each with `patch_embedding` and `blocks`; they may share parameters or be the same one, and depths may
            differ.
        head: All other parameters to train; those that belong to an encoder are left to it.
        lr: Learning rate of the head.
        weight_decay: Of matrices.
        layer_decay: Factor from one layer to the one below, in (0, 1]; None gives all the rate `lr`.

    Returns:
        Groups with `params`, `lr` and `weight_decay`, from the lowest layers up, in the same order for the same model.
        Parameters that need no gradient are in none of them, all others in one.

    Raises:
        ValueError: If a number is out of range or an encoder lacks one of its two parts.
    """
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be in (0, 1], or None for one learning rate, got {layer_decay}")
    if not lr > 0 or not weight_decay >= 0:
        raise ValueError(f"lr must be positive and weight_decay at least 0, got {lr} and {weight_decay}")
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    seen: set[int] = set()

    def add(parameter: nn.Parameter, layers_above: int, decayed: bool) -> None:
        if parameter.requires_grad and id(parameter) not in seen:
            seen.add(id(parameter))
            groups.setdefault((layers_above if layer_decay else 0, decayed), []).append(parameter)

    for encoder in encoders:
        depth = _depth(encoder)
        for name, parameter in encoder.named_parameters():
            add(parameter, depth + 1 - _layer_id(name, depth), parameter.ndim > 1 and name != "cls_token")
    for parameter in head:
        add(parameter, 0, parameter.ndim > 1)
    return [
        {
            "params": parameters,
            "lr": lr * (layer_decay or 1.0) ** layers_above,
            "weight_decay": weight_decay if decayed else 0.0,
        }
        for (layers_above, decayed), parameters in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]


def _depth(encoder: nn.Module) -> int:
    blocks = getattr(encoder, "blocks", None)
    if not isinstance(blocks, nn.ModuleList) or not hasattr(encoder, "patch_embedding"):
        raise ValueError(
            f"an encoder needs `blocks` (a ModuleList) and `patch_embedding` for its layers to be told apart, "
            f"{type(encoder).__name__} lacks one"
        )
    return len(blocks)


def _layer_id(name: str, depth: int) -> int:
    part, _, rest = name.partition(".")
    if part in _EMBEDDINGS:
        return 0
    if part == "blocks":
        return int(rest.partition(".")[0]) + 1
    return depth + 1
