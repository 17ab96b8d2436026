"""MixerMAE: a masked autoencoder of mixed pictures and sounds, and the encoder that it leaves."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from zoo.cmmixer.export import build_encoder, save_encoder
from zoo.cmmixer.layer_decay import layer_decay_groups
from zoo.cmmixer.mixer import check_streams
from zoo.cmmixer.pretraining import (
    build_autoencoder,
    check_training,
    evaluation_losses,
    refuse_sharding,
    steps_per_epoch,
)
from zoo.cmmixer.vit import pooled
from zoo.common.artifacts import log_figure, run_folder
from zoo.common.schedules import WarmupCosine, fit_schedule

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler

    from zoo.cmmixer.masked_autoencoder import Reconstruction
    from zoo.cmmixer.types import VideoAudioBatch
    from zoo.cmmixer.vit import ViTEncoder

log = logging.getLogger(__name__)

_SHOWN = 4


class MixerMAE(LightningModule):
    """CMMixer's pre-training (Yuan et al. 2023, arXiv 2308.13820): mix two streams, hide most, paint both.

    The frames of a clip, and the log-mel pictures of the sound around them, are mixed into one wide picture. A ViT
    encodes a quarter of its patches; a decoder with two heads paints the hidden patches of both originals. After the
    training the run's folder, or `export`, holds `encoder/` for `--model.init_from` of `AVRetriever` and `ActionHead`.

    Args:
        image_shape: Channels, height and width of a frame.
        num_frames: Frames T of a clip.
        encoder: Size of the encoder: "tiny", "base" (default), "deep_base" (the default of the published class),
            "large" or "huge".
        encoder_options: `hidden_size`, `num_layers`, `num_heads`, `mlp_ratio` that replace the name's.
        decoder: Size of the decoder by the same names; that of the encoder by default.
        decoder_options: As `encoder_options`.
        patch_size: Side of a patch in pixels; 16 by default.
        layout: How frames lie in the wide picture: "concat" (default), or "interleave" for tubes of space and time.
        op: How the streams are mixed: "cutmix" (default), "mixup", "both", "pixel", "patch"; or not: "none" (the video
            is seen, both are painted), "audio_only" (the other way round), "alternate" (one stream at a time, seen and
            painted), "concat" (both are seen, as tokens beside each other).
        mixer_options: More arguments of `CrossModalMixer`, such as `granularity` or `alpha`.
        mask_ratio: Share of the patches that is hidden.
        mask_block: Side of the blocks of patches that are hidden or visible together.
        norm_pix_loss: Whether targets are standardised patch by patch.
        audio_weight: Weight of the sound's loss.
        loss_on: Where a stream is scored: "masked" (default), "hidden" or "replaced" (see `MaskedAutoencoder`).
        lr: Highest learning rate of AdamW (betas 0.9 and 0.95).
        weight_decay: Decoupled; not on biases, norms and the CLS token.
        warmup_epochs: Epochs in which the rate rises; it falls along a cosine in the others.
        min_lr: Where it falls to.
        init_from: A folder of an earlier export, or a Hugging Face ViTMAE checkpoint (folder or hub id).
        export: Folder for `encoder/`, where later runs find it by one name; by default the run's.

    Raises:
        ValueError: If an argument is out of its range, or contradicts the checkpoint of `init_from`.
    """

    monitor = "val/loss"
    monitor_mode = "min"

    def __init__(
        self,
        image_shape: list[int],
        num_frames: int = 4,
        encoder: str | None = None,
        encoder_options: dict[str, Any] | None = None,
        decoder: str | None = None,
        decoder_options: dict[str, Any] | None = None,
        patch_size: int | None = None,
        layout: str | None = None,
        op: str = "cutmix",
        mixer_options: dict[str, Any] | None = None,
        mask_ratio: float = 0.75,
        mask_block: int = 1,
        norm_pix_loss: bool = False,
        audio_weight: float = 1.0,
        loss_on: str = "masked",
        lr: float = 2e-4,
        weight_decay: float = 0.05,
        warmup_epochs: float = 40,
        min_lr: float = 0.0,
        init_from: str | None = None,
        export: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if not lr > 0 or not 0 <= min_lr <= lr:
            raise ValueError(f"lr must be positive, and min_lr from 0 to lr, got {lr} and {min_lr}")
        check_training(lr, weight_decay, warmup_epochs)
        self.lr, self.weight_decay, self.warmup_epochs, self.export = lr, weight_decay, warmup_epochs, export
        self.autoencoder = build_autoencoder(
            build_encoder(image_shape, num_frames, encoder, encoder_options, patch_size, layout, init_from),
            op,
            mixer_options,
            decoder or encoder,
            decoder_options,
            mask_ratio=mask_ratio,
            mask_block=mask_block,
            norm_pix_loss=norm_pix_loss,
            audio_weight=audio_weight,
            loss_on=loss_on,
        )
        self._schedule = WarmupCosine(0, floor=min_lr / lr)
        # Of patches standardised one by one, and of none, there is no PSNR.
        ratios = () if norm_pix_loss or mask_ratio == 0 else ("psnr_video", "psnr_audio")
        names = ("loss", "loss_video", "loss_audio", *ratios)
        self.val_means, self.test_means = (nn.ModuleDict({name: _new_mean(name) for name in names}) for _ in range(2))

    @property
    def encoder(self) -> ViTEncoder:
        """The encoder in training."""
        return self.autoencoder.encoder

    def save_encoder(self, folder: str | Path) -> Path:
        """Write the encoder for `AVRetriever`, `ActionHead` and `load_encoder`; returns the folder."""
        return save_encoder(self.encoder, folder)

    def forward(
        self, video: Tensor, audio: Tensor, keys: Tensor | None = None, stream: int | None = None
    ) -> Reconstruction:
        """Mix, hide and paint; see `MaskedAutoencoder.forward`."""
        out: Reconstruction = self.autoencoder(video, audio, keys, stream)
        return out

    def setup(self, stage: str) -> None:
        """Refuse strategies that cut weights into pieces."""
        refuse_sharding(self)

    def on_train_start(self) -> None:
        """Fit the schedule to the length of the training."""
        self._schedule.warmup_steps = round(self.warmup_epochs * steps_per_epoch(self))
        fit_schedule(self, self._schedule)

    def training_step(self, batch: VideoAudioBatch, batch_idx: int) -> Tensor:
        """The loss of a batch.

        Raises:
            ValueError: If the streams of a batch differ in shape; in the first batch of an epoch also if they are not
                standardised.
        """
        check_streams(batch.video, batch.audio, values=batch_idx == 0)
        out = self(batch.video, batch.audio, batch.keys, batch_idx % 2)
        count = len(batch.video)
        self.log("train/loss", out.loss.detach(), prog_bar=True, batch_size=count)
        self.log("train/loss_video", out.loss_video.detach(), batch_size=count)
        self.log("train/loss_audio", out.loss_audio.detach(), batch_size=count)
        loss: Tensor = out.loss
        return loss

    def validation_step(self, batch: VideoAudioBatch, batch_idx: int) -> None:
        """Count a batch of the validation."""
        self._evaluate(batch, self.val_means, batch_idx)

    def test_step(self, batch: VideoAudioBatch, batch_idx: int) -> None:
        """Count a batch of the test; the first one is drawn."""
        self._evaluate(batch, self.test_means, batch_idx)
        if batch_idx == 0 and self.trainer.is_global_zero:
            from zoo.cmmixer.figures import draw_reconstruction

            log_figure(self, "test/reconstruction", draw_reconstruction(self.reconstruct(batch, _SHOWN)))

    def _evaluate(self, batch: VideoAudioBatch, means: nn.ModuleDict, batch_idx: int) -> None:
        check_streams(batch.video, batch.audio, values=batch_idx == 0)
        outs = evaluation_losses(self.autoencoder, batch.video, batch.audio, batch.keys)
        count = len(batch.video)
        for name in ("loss", "loss_video", "loss_audio"):
            _mean(means, name).update(sum(getattr(out, name) for out in outs), count)
        for index, name in enumerate(("psnr_video", "psnr_audio")):
            if name in means:
                clips = (batch.video, batch.audio)[index].float().flatten(1)
                peak = clips.amax(1) - clips.amin(1)
                # Where streams alternate, the second pass sees and paints the sound.
                error = outs[index if len(outs) > 1 else 0].errors[:, index]
                # Silence has no peak, and its ratio of minus infinity would be that of the whole set.
                ratio = 10 * (peak.square() / error.clamp(min=1e-12)).log10()
                _mean(means, name).update(ratio.where(peak > 0, 0.0), (peak > 0).float())

    def on_validation_epoch_end(self) -> None:
        """Log `val/*`."""
        self._log_means("val", self.val_means)

    def on_test_epoch_end(self) -> None:
        """Log `test/*`."""
        self._log_means("test", self.test_means)

    def _log_means(self, stage: str, means: nn.ModuleDict) -> None:
        for name in means:
            metric = _mean(means, name)
            self.log(f"{stage}/{name}", metric.compute(), prog_bar=name == "loss")
            metric.reset()

    @torch.no_grad()
    def reconstruct(self, batch: VideoAudioBatch, count: int | None = None) -> dict[str, Tensor]:
        """Both streams as painted, and what they were painted from.

        Args:
            batch: A batch.
            count: Its first samples only.

        Returns:
            Clips `(batch, frames, channels, height, width)` on the CPU: `video`, `audio`, `mix` (where there is one),
            `visible` (NaN where hidden; `visible_sound` where the encoder sees the sound by itself), `pred_video` and
            `pred_audio`, painted everywhere. Targets that are standardised patch by patch are brought back to their own
            mean and spread.
        """
        video, audio, keys = batch.video[:count], batch.audio[:count], batch.keys[:count]
        outs = evaluation_losses(self.autoencoder, video, audio, keys)
        shown = {"video": video, "audio": audio}
        info = self.autoencoder.draw_mix(keys, video.device)
        if info is not None:
            from zoo.cmmixer.mixer import apply_mix

            shown["mix"] = apply_mix(video, audio, info)
        patches = self.encoder.num_patches
        halves = outs[0].seen.float().masked_fill(outs[0].mask[..., None], torch.nan).split(patches, 1)
        names = ("visible_sound",) if self.autoencoder.mixer == "audio_only" else ("visible", "visible_sound")
        shown |= {name: self.autoencoder.to_clips(half) for name, half in zip(names, halves, strict=False)}
        predictions = (outs[0].pred_video, outs[-1].pred_audio)
        for name, stream, prediction in zip(("video", "audio"), (video, audio), predictions, strict=True):
            painted = prediction.float()
            if self.autoencoder.norm_pix_loss:
                target = self.encoder.patches(stream).float()
                scale = (target.var(-1, keepdim=True) + 1e-6).sqrt()
                painted = painted * scale + target.mean(-1, keepdim=True)
            shown[f"pred_{name}"] = self.autoencoder.to_clips(painted)
        return {name: clips.float().cpu() for name, clips in shown.items()}

    def predict_step(self, batch: VideoAudioBatch, batch_idx: int) -> dict[str, Tensor]:
        """Features of both streams by themselves, nothing mixed or hidden.

        Returns:
            `video` and `audio`, float32 `(batch, hidden_size)`: means over the patches' states; `pair_ids`.
        """
        check_streams(batch.video, batch.audio, values=batch_idx == 0)
        features = {name: pooled(self.encoder(getattr(batch, name)), "mean").float() for name in ("video", "audio")}
        return {**features, "pair_ids": batch.pair_ids}

    def on_fit_end(self) -> None:
        """Write the encoder."""
        if getattr(self.trainer, "fast_dev_run", False):
            return
        folder = run_folder(self.trainer) if self.export is None else Path(self.export)
        if self.trainer.is_global_zero:
            log.info("Encoder: %s", self.save_encoder(folder / "encoder"))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with a linear warm-up and a cosine."""
        groups = layer_decay_groups([self.encoder], self.autoencoder.parameters(), self.lr, self.weight_decay)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, self._schedule), "interval": "step"},
        }


def _new_mean(name: str) -> MeanMetric:
    # NaN counts as the worst value. Left out of the mean, as by default, it would make the run look well.
    return MeanMetric(nan_strategy=-math.inf if name.startswith("psnr") else math.inf)


def _mean(means: nn.ModuleDict, name: str) -> MeanMetric:
    metric = means[name]
    assert isinstance(metric, MeanMetric)
    return metric
