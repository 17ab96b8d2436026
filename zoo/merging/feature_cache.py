"""Features of a merged encoder and of the experts, computed once for each image.

All of them are frozen and images come without augmentation, so that training on stored features is the same as training
on images, for a small part of the time.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.merging.calibration import evaluation
from zoo.merging.features import default_features
from zoo.merging.row_cache import RowCache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from zoo.merging.blocks import Blocks
    from zoo.merging.deep_surgery import DeepSurgery
    from zoo.merging.features import FeatureFn


class FeatureCache(RowCache):
    """Pairs (z, z_ind) of merged and expert features by task and row; `gather(task, rows)` gives some.

    Args:
        folder: Where to keep files, one a task, or None. A file that was made of other weights or images, or is
            damaged, is made anew.
        dtype: Of the stored features, float32 or float16; `gather` returns float32.

    Raises:
        ValueError: If the dtype is another one.
    """

    def __init__(self, folder: str | Path | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__("features", folder, dtype)

    def build(
        self,
        merged: Callable[..., Any],
        expert_of: Callable[[str], nn.Module],
        batches: Mapping[str, Iterable[Any]],
        *,
        feature_fn: FeatureFn = default_features,
        fingerprints: Mapping[str, str] | None = None,
        rows: Mapping[str, Tensor] | None = None,
        device: torch.device | str | None = None,
        sharded: bool = False,
    ) -> list[str]:
        """Compute the features of all images in some batches. All processes of a group must call it.

        Networks run in evaluation mode and get their own mode back. An expert is asked for when its task comes, and let
        go before the next one.

        Args:
            merged: The merged encoder, on its device.
            expert_of: Task -> the expert.
            batches: Task -> batches with a field `rows`, int64 `(batch,)`: numbers that tell the task's images apart.
                An image that comes again is not computed again.
            feature_fn: Function (model, batch) -> features `(batch, ...)`.
            fingerprints: Task -> `fingerprint_of` all that the features depend on: merged weights, the expert's
                weights, the images and what is done to them. Needed with a folder. The dtype and the name of
                `feature_fn` are looked at besides.
            rows: Task -> rows that will be asked for: a file that lacks one is made anew.
            device: Where experts and batches go; None leaves them where they are.
            sharded: The batches of each process are its own share. Otherwise all processes have the same batches and
                take turns.

        Returns:
            Tasks whose features were computed, and not read from a file.

        Raises:
            ValueError: If features of merged and expert differ in shape or are not finite (the message names the task
                and the batch), a batch has no rows, a task has no batch, or a fingerprint is missing.
        """

        def read(expert: nn.Module, batch: Any, where: str) -> tuple[Tensor, Tensor]:
            return feature_pair(merged, expert, batch, where, feature_fn)

        with evaluation(merged):
            return self._build(
                read, expert_of, batches, _extended(fingerprints, _name(feature_fn)), rows, device, sharded
            )


class TargetCache(RowCache):
    """Targets of deep surgery by task and row; `gather(task, rows)` gives what `DeepSurgery.loss` takes.

    Args:
        folder: As in `FeatureCache`.
        dtype: As in `FeatureCache`.

    Raises:
        ValueError: If the dtype is neither float32 nor float16.
    """

    def __init__(self, folder: str | Path | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__("targets", folder, dtype)

    def build(
        self,
        deep: DeepSurgery,
        expert_of: Callable[[str], nn.Module],
        batches: Mapping[str, Iterable[Any]],
        *,
        feature_fn: FeatureFn = default_features,
        blocks: Blocks = None,
        fingerprints: Mapping[str, str] | None = None,
        rows: Mapping[str, Tensor] | None = None,
        device: torch.device | str | None = None,
        sharded: bool = False,
    ) -> list[str]:
        """Compute the experts' token means and features of all images in some batches; see `FeatureCache.build`.

        Args:
            deep: The modules that will learn from the targets.
            expert_of: As in `FeatureCache.build`.
            batches: As in `FeatureCache.build`.
            feature_fn: As in `FeatureCache.build`.
            blocks: As in `DeepSurgery.targets`.
            fingerprints: Task -> `fingerprint_of` the expert's weights, the images and what is done to them.
            rows: As in `FeatureCache.build`.
            device: As in `FeatureCache.build`.
            sharded: As in `FeatureCache.build`.

        Returns:
            Tasks whose targets were computed, and not read from a file.

        Raises:
            ValueError: As in `FeatureCache.build` and `DeepSurgery.targets`.
        """

        def read(expert: nn.Module, batch: Any, where: str) -> tuple[Tensor, ...]:
            try:
                targets = deep.targets(expert, batch, feature_fn, blocks)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            for place, target in enumerate(targets):
                check_finite(target, "the expert's features" if place == len(deep.widths) else f"block {place}", where)
            return targets

        layout = f"{_name(feature_fn)} {blocks or deep.found_at} {deep.widths} {deep.channel_dim} {deep.batch_dim}"
        return self._build(read, expert_of, batches, _extended(fingerprints, layout), rows, device, sharded)


def feature_pair(
    merged: Callable[..., Any],
    expert: Callable[..., Any],
    batch: Any,
    where: str,
    feature_fn: FeatureFn = default_features,
) -> tuple[Tensor, Tensor]:
    """Features of a batch from the merged encoder and from the expert, checked, without gradients.

    Args:
        merged: The merged encoder, in evaluation mode.
        expert: The expert, in evaluation mode.
        batch: What `feature_fn` takes.
        where: Task and batch in words, for messages.
        feature_fn: Function (model, batch) -> features `(batch, ...)`.

    Returns:
        z and z_ind, of one shape `(batch, ...)`.

    Raises:
        ValueError: If the shapes differ or have no dimension besides the batch, or a value is not finite.
    """
    with torch.no_grad():
        z, z_ind = feature_fn(merged, batch), feature_fn(expert, batch)
    if z.shape != z_ind.shape or z.ndim < 2:
        raise ValueError(
            f"{where}: features of the merged encoder have shape {tuple(z.shape)}, of the expert {tuple(z_ind.shape)}; "
            "both must be (batch, dim) or (batch, tokens, dim): give a feature_fn that returns such features of both"
        )
    check_finite(z, "features of the merged encoder", where)
    check_finite(z_ind, "features of the expert", where)
    return z, z_ind


def check_finite(features: Tensor, label: str, where: str) -> None:
    """Refuse features with NaN or infinity.

    Args:
        features: Of any shape.
        label: What they are, for the message.
        where: Task and batch in words, for the message.

    Raises:
        ValueError: If there is such a value.
    """
    broken = ~features.isfinite()
    if broken.any():
        raise ValueError(
            f"{where}: {label} hold NaN or infinity in {int(broken.flatten(1).any(1).sum())} of {len(features)} "
            "images; check the weights and the images"
        )


def fingerprint_of(*parts: Mapping[str, Tensor] | str) -> str:
    """Hash of weights and texts, the same on every machine.

    Args:
        parts: State dicts (or other named tensors, read one at a time; their order does not matter), and texts, such as
            the name of a data set and its transform.

    Returns:
        64 hexadecimal digits of SHA-256. A change of any name, dtype, shape or value gives others.

    Raises:
        ValueError: If a part has no tensors, which would hash all models alike.
    """
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            total.update(_framed("text", part))
            continue
        if not part:
            raise ValueError("there are no tensors to take a fingerprint of; give the merged weights themselves")
        total.update(_framed("tensors", str(len(part))))
        for name in sorted(part):
            tensor = part[name].detach().cpu().contiguous()
            total.update(_framed(name, str(tensor.dtype), str(tuple(tensor.shape))))
            total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _framed(*texts: str) -> bytes:
    """Texts with their lengths, so that no two lists of texts give the same bytes."""
    return b"".join(f"{len(text)}:{text};".encode() for text in texts)


def _extended(fingerprints: Mapping[str, str] | None, more: str) -> dict[str, str]:
    return {task: f"{fingerprint} {more}" for task, fingerprint in (fingerprints or {}).items() if fingerprint}


def _name(function: Callable[..., Any]) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"
