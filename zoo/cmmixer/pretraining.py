"""What the two modules that train a masked autoencoder share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from zoo.cmmixer.masked_autoencoder import STREAMS, MaskedAutoencoder
from zoo.cmmixer.mixer import OPS, CrossModalMixer
from zoo.cmmixer.vit import DECODER_SIZES, size_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning.pytorch import LightningModule

    from zoo.cmmixer.vit import ViTEncoder


def build_autoencoder(
    encoder: ViTEncoder,
    op: str = "cutmix",
    mixer_options: Mapping[str, Any] | None = None,
    decoder: str | None = None,
    decoder_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> MaskedAutoencoder:
    """A masked autoencoder by names.

    Args:
        encoder: Its encoder.
        op: An operation of `CrossModalMixer`, or "none", "audio_only", "alternate", "concat" (see `MaskedAutoencoder`).
        mixer_options: More arguments of `CrossModalMixer`; the patches of "patch" are the encoder's by default.
        decoder: Size of the decoder by the name of the encoder that it belongs to; "base" by default.
        decoder_options: `hidden_size`, `num_layers`, `num_heads`, `mlp_ratio` that replace the name's.
        options: More arguments of `MaskedAutoencoder`.

    Raises:
        ValueError: If a name is unknown, or an argument is out of its range or unknown.
    """
    given = dict(mixer_options or {})
    mixer: CrossModalMixer | str
    if op in STREAMS:
        if given:
            raise ValueError(f"op={op!r} mixes nothing: mixer_options {', '.join(given)} have no meaning")
        mixer = op
    elif op in OPS:
        try:
            mixer = CrossModalMixer(op, **{"patch_size": encoder.patch_size, **given})
        except TypeError as error:
            raise ValueError(f"mixer_options: {error}") from error
        if op == "patch":
            _, height, width = encoder.config["image_shape"]
            rows, columns = mixer.patch_size
            if height % rows or width % columns:
                raise ValueError(
                    f"mixer_options: patches of {rows} x {columns} do not tile frames of {height} x {width}"
                )
    else:
        raise ValueError(f"op must be one of {', '.join((*OPS, *STREAMS))}, got {op!r}")
    return MaskedAutoencoder(
        encoder, mixer, **size_of(decoder or "base", dict(decoder_options or {}), DECODER_SIZES), **options
    )


def check_training(lr: float, weight_decay: float, warmup_epochs: float) -> None:
    """Refuse settings of an optimizer that are out of their range.

    Raises:
        ValueError: If the rate is not positive, or another number is negative.
    """
    if not lr > 0:
        raise ValueError(f"lr must be positive, got {lr}")
    for name, value in (("weight_decay", weight_decay), ("warmup_epochs", warmup_epochs)):
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")


def refuse_sharding(module: LightningModule) -> None:
    """Refuse strategies that cut parameters into pieces; to be called in `setup`.

    Raises:
        ValueError: Under FSDP, DeepSpeed or model parallelism.
    """
    strategy = type(module.trainer.strategy).__name__
    if any(kind in strategy for kind in ("FSDP", "DeepSpeed", "ModelParallel")):
        raise ValueError(f"{strategy} cuts weights into pieces, and encoders are exported and copied whole: use ddp")


def steps_per_epoch(module: LightningModule) -> int:
    """Optimizer steps of an epoch of the running training."""
    batches = module.trainer.num_training_batches
    return 1 if math.isinf(batches) else max(1, math.ceil(batches / module.trainer.accumulate_grad_batches))


def evaluation_losses(autoencoder: MaskedAutoencoder, video: Any, audio: Any, keys: Any) -> list[Any]:
    """What the autoencoder makes of a batch, both streams one after the other where they alternate."""
    streams = (0, 1) if autoencoder.mixer == "alternate" else (None,)
    return [autoencoder(video, audio, keys, stream) for stream in streams]
