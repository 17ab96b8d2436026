"""Statistics of BatchNorm for weights that no training run has seen."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zoo.merging.calibration import device_of, evaluation, map_tensors
from zoo.merging.features import FeatureFn, default_features, without_labels

if TYPE_CHECKING:
    from collections.abc import Iterable


@torch.no_grad()
def recalibrate_bn(model: nn.Module, batches: Iterable[Any], *, features: FeatureFn = default_features) -> int:
    """Replace the running statistics of every BatchNorm by the means over the given batches of the batch statistics.

    Merged weights give activations of other means and variances than the statistics of any of the merged models. While
    the batches run, BatchNorm normalises by the batch, as in training, and everything else is in evaluation mode.
    Weights, modes and momenta are left as they were, and after an error the statistics too.

    Memory beside the model: one batch's activations and a copy of the statistics.

    Args:
        model: The network, changed in place.
        batches: Batches of inputs, as `features` takes them, each with the same weight; labels are ignored.
        features: `(model, batch)` -> features; only run, its result is not used.

    Returns:
        How many BatchNorm modules got new statistics. With 0 the model has none that keeps any, and no batch is read.

    Raises:
        ValueError: If there is no batch, or the statistics become NaN or infinite.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    if not layers:
        return 0
    device = device_of(model)
    momenta = {name: layer.momentum for name, layer in layers.items()}
    before = {name: [tensor.clone() for tensor in _statistics(layer)] for name, layer in layers.items()}
    try:
        with evaluation(model):
            for layer in layers.values():
                layer.reset_running_stats()
                layer.training = True
                # None makes the running statistics plain means over all batches so far.
                layer.momentum = None
            count = 0
            for batch in batches:
                features(model, map_tensors(without_labels(batch), lambda tensor: tensor.to(device)))
                count += 1
        if not count:
            raise ValueError("recalibrate_bn got no batch. Was an iterator given that has been read before?")
        for name, layer in layers.items():
            if not all(bool(tensor.isfinite().all()) for tensor in _statistics(layer)):
                raise ValueError(f"the statistics of {name!r} became NaN or infinite: look at inputs and weights")
    except BaseException:
        for name, layer in layers.items():
            _restore(layer, before[name])
        raise
    finally:
        for name, layer in layers.items():
            layer.momentum = momenta[name]
    unused = [name for name, layer in layers.items() if not layer.num_batches_tracked]
    for name in unused:
        _restore(layers[name], before[name])
    if unused:
        warnings.warn(
            f"{len(unused)} of {len(layers)} BatchNorm modules did not run and keep their statistics: "
            f"{', '.join(unused[:10])}",
            stacklevel=3,
        )
    return len(layers) - len(unused)


def _statistics(layer: _BatchNorm) -> list[Tensor]:
    return list(layer.buffers(recurse=False))


def _restore(layer: _BatchNorm, statistics: list[Tensor]) -> None:
    for tensor, kept in zip(_statistics(layer), statistics, strict=True):
        tensor.copy_(kept)
