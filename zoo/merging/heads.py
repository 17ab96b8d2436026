"""Frozen task heads, from features to logits, and one safetensors file for the heads of all tasks.

A head is never trained and never merged: its tensors are buffers, so that no optimizer finds them.
"""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Mapping


class LinearHead(nn.Module):
    """A frozen linear classifier: logits = W z + b.

    Args:
        weight: W `(C, d)`; copied.
        bias: b `(C,)`, or None; copied.

    Raises:
        ValueError: If a shape does not fit or a value is not finite.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", _frozen_weight(weight))
        if bias is not None:
            if bias.shape != weight.shape[:1] or not bool(bias.isfinite().all()):
                raise ValueError(
                    f"a head's bias must hold {weight.shape[0]} finite numbers, one a class, got shape "
                    f"{tuple(bias.shape)}"
                )
            bias = bias.detach().clone()
        self.register_buffer("bias", bias)

    def forward(self, features: Tensor) -> Tensor:
        """Logits `(B, C)` of features `(B, d)`."""
        dtype = _wide(features, self.weight)
        # A head costs nothing, and low precision here would tie the best classes.
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(
                features.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)
            )


class CosineHead(nn.Module):
    """CLIP's zero-shot head: logits = scale * z / |z| @ W^T, with W used as it is.

    Args:
        weight: W `(C, d)`, one text embedding (or prototype) of unit length a class; copied.
        scale: CLIP's exp(logit_scale), 100 for the published models; 1 where W already holds it.

    Raises:
        ValueError: If the shape is not `(C, d)`, a value is not finite, or the scale is not positive.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scale: float | Tensor = 1.0) -> None:
        super().__init__()
        scale = float(scale)
        if not 0 < scale < math.inf:
            raise ValueError(f"a head's scale must be a positive number, got {scale}")
        self.register_buffer("weight", _frozen_weight(weight))
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.register_buffer("scale", torch.tensor(scale, dtype=dtype, device=weight.device))

    def forward(self, features: Tensor) -> Tensor:
        """Logits `(B, C)` of features `(B, d)`."""
        dtype = _wide(features, self.weight)
        # A head costs nothing, and low precision here would tie the best classes.
        with torch.autocast(features.device.type, enabled=False):
            return self.scale.to(dtype) * F.linear(F.normalize(features.to(dtype), dim=-1), self.weight.to(dtype))


def as_head(head: Tensor | nn.Module, scale: float = 1.0) -> nn.Module:
    """A frozen head of whatever stands for one.

    Args:
        head: A weight `(C, d)`, which becomes a `CosineHead`; an `nn.Linear`, which becomes a `LinearHead`; one of
            these two; or any other module from features to logits, of which a frozen copy in eval mode is made.
        scale: The scale of the `CosineHead` of a weight: 1 where the weight already holds it, as CLIP heads in one
            tensor do; exp(logit_scale) for text embeddings of unit length.

    Returns:
        A module none of whose parameters requires a gradient.

    Raises:
        ValueError: If a scale is given with a module, or a weight is not a valid one.
    """
    if isinstance(head, Tensor):
        return CosineHead(head, scale)
    if scale != 1.0:
        raise ValueError(f"scale={scale} goes with a head given as a weight, this one is a {type(head).__name__}")
    if isinstance(head, LinearHead | CosineHead):
        return head
    if type(head) is nn.Linear:
        return LinearHead(head.weight, head.bias)
    return copy.deepcopy(head).requires_grad_(False).eval()


def prototypes(num_classes: int, dim: int, seed: int = 0) -> Tensor:
    """Random unit vectors `(num_classes, dim)`: class prototypes for networks that have no text tower.

    Args:
        num_classes: C.
        dim: d.
        seed: The same seed gives the same vectors.
    """
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(num_classes, dim, generator=generator), dim=-1)


def save_heads(path: str | Path, heads: Mapping[str, Tensor | nn.Module]) -> Path:
    """Writes the heads of all tasks into one safetensors file, with the keys `<task>.weight`, `.bias` and `.scale`.

    Args:
        path: The file to write; its folder is made.
        heads: Task -> what `as_head` turns into a `LinearHead` or a `CosineHead`.

    Returns:
        The file's path.

    Raises:
        ValueError: If there is no head, or a head is of another kind: its numbers alone would not tell what it does.
    """
    from safetensors.torch import save_file

    if not heads:
        raise ValueError("there are no heads to save")
    kinds: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for task, given in heads.items():
        head = as_head(given)
        if not isinstance(head, LinearHead | CosineHead):
            raise ValueError(
                f"the head of {task!r} is a {type(head).__name__}; saved are LinearHead and CosineHead only"
            )
        kinds[task] = "linear" if isinstance(head, LinearHead) else "cosine"
        for name, tensor in head.state_dict().items():
            # Cloned because tasks may share one tensor, which the format refuses.
            tensors[f"{task}.{name}"] = tensor.detach().cpu().contiguous().clone()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_file(tensors, temporary, metadata={"format": "pt", "heads": json.dumps(kinds)})
    temporary.replace(path)
    return path


def load_heads(path: str | Path) -> dict[str, nn.Module]:
    """Reads the heads that `save_heads` wrote.

    Args:
        path: The safetensors file.

    Returns:
        Task -> head, in the order they were saved in.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a safetensors file of `save_heads`.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"heads: there is no file {path}; save_heads writes one")
    heads: dict[str, nn.Module] = {}
    try:
        with safe_open(path, framework="pt") as file:
            kinds: dict[str, str] = json.loads((file.metadata() or {}).get("heads", "{}"))
            names = set(file.keys())
            for task, kind in kinds.items():
                weight = file.get_tensor(f"{task}.weight")
                if kind == "linear":
                    bias = file.get_tensor(f"{task}.bias") if f"{task}.bias" in names else None
                    heads[task] = LinearHead(weight, bias)
                else:
                    heads[task] = CosineHead(weight, file.get_tensor(f"{task}.scale"))
    except SafetensorError as error:
        raise ValueError(f"heads: {path} is not a whole safetensors file of heads ({error})") from error
    if not heads:
        raise ValueError(
            f"heads: {path} does not say what its tensors are (keys {', '.join(sorted(names)[:10])}); make heads of "
            "them with LinearHead or CosineHead and write these with save_heads"
        )
    return heads


def check_head(task: str, head: nn.Module, num_classes: int, dim: int | None) -> None:
    """Refuse a head that does not fit the data or the encoder; one without a `weight` is not looked at.

    Args:
        task: Its task.
        head: From features to logits.
        num_classes: Classes of the task.
        dim: Length of the encoder's features, where it is known.

    Raises:
        ValueError: If the head has other numbers.
    """
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor):
        return
    if len(weight) != num_classes:
        raise ValueError(f"the head of {task} has {len(weight)} classes, the data {num_classes}")
    if dim is not None and weight.shape[1] != dim:
        raise ValueError(f"the head of {task} takes {weight.shape[1]} features, the encoder gives {dim}")


def _frozen_weight(weight: Tensor) -> Tensor:
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(
            f"a head's weight must be floating numbers of shape (classes, feature dimension), got "
            f"{weight.dtype} of shape {tuple(weight.shape)}"
        )
    if not bool(weight.isfinite().all()):
        raise ValueError(f"a head's weight of shape {tuple(weight.shape)} holds NaN or infinite values")
    return weight.detach().clone()


def _wide(features: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype to compute logits in: at least float32. Checks that the dimensions agree."""
    if features.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"the head takes features of dimension {weight.shape[1]}, the encoder gave {features.shape[-1]} (features "
            f"of shape {tuple(features.shape)}): build the heads with the projection that the encoder has"
        )
    return torch.promote_types(torch.promote_types(features.dtype, weight.dtype), torch.float32)
