"""AVRetriever: video finds sound and sound finds video, by two towers that start from one pre-trained encoder."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from zoo.cmmixer.export import build_encoder
from zoo.cmmixer.layer_decay import layer_decay_groups
from zoo.cmmixer.losses import RETRIEVAL_LOSSES, retrieval_loss
from zoo.cmmixer.matches import Matches
from zoo.cmmixer.metrics import CrossModalRetrieval
from zoo.cmmixer.mixer import check_streams
from zoo.cmmixer.phases import TwoPhases
from zoo.cmmixer.pretraining import build_autoencoder, check_training, refuse_sharding, steps_per_epoch
from zoo.cmmixer.towers import DualTower
from zoo.common.schedules import fit_schedule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning.pytorch.utilities.types import OptimizerLRScheduler

    from zoo.cmmixer.types import VideoAudioBatch

log = logging.getLogger(__name__)

RELEVANCE = ("pair", "label")
_COLDEST, _WARMEST = 0.01, 1.0
_LOG_RANGE = math.log(_COLDEST), math.log(_WARMEST)


class AVRetriever(LightningModule):
    """CMMixer's retriever (Yuan et al. 2023, arXiv 2308.13820): two towers, trained to agree on pairs.

    Each tower sees its own stream, nothing mixed or hidden. Both start from the encoder of `init_from`, which
    `MixerMAE` leaves, or from one that `pretrain_epochs` of the training make first.

    Args:
        image_shape: Channels, height and width of a frame.
        num_frames: Frames T of a clip.
        init_from: Folder of an exported encoder, or a Hugging Face ViTMAE checkpoint (folder or hub id); fresh weights
            by default.
        encoder: Size of a fresh encoder: "tiny", "base" (default), "deep_base", "large" or "huge".
        encoder_options: `hidden_size`, `num_layers`, `num_heads`, `mlp_ratio` that replace the name's.
        patch_size: Side of a patch in pixels; 16 by default, that of the checkpoint with `init_from`.
        layout: "concat" (default) or "interleave"; that of the checkpoint with `init_from`.
        share_encoder: Whether the towers stay one encoder.
        freeze_encoder: Whether only the projectors are trained.
        pool: "mean" over patches, or "cls".
        projector: "linear_relu" (the published code's), "linear", "linear_bn" (batch normalisation over the rows of
            each process) or "mlp".
        proj_dim: Width of the embeddings.
        loss: "nt_xent" (negatives of both streams), "infonce" (of the other stream) or "triplet" (the hardest one of
            the other stream). Negatives are those of all processes.
        margin: Of "triplet".
        temperature: Divides similarities.
        learnable_temperature: Whether it is trained, within 0.01 and 1.
        relevance: What counts as found: "pair" (items of the same pair) or "label" (of the same class).
        ks: Cut-offs of R@k.
        top_k: Length of predicted lists.
        lr: Highest learning rate of AdamW.
        weight_decay: Decoupled; not on biases, norms and the CLS token.
        layer_decay: Factor of the learning rate from one layer of the encoders to the one below; none by default.
        warmup_epochs: Epochs in which the rate rises; it falls along a cosine in the others.
        pretrain_epochs: First epochs of the training that train a masked autoencoder in place of the towers; these then
            start from its encoder.
        pretrain: What that autoencoder is: `op`, `mixer_options`, `decoder`, `decoder_options`, `mask_ratio`,
            `mask_block`, `norm_pix_loss`, `audio_weight`, `loss_on` of `MixerMAE`, and `lr`.

    Raises:
        ValueError: If an argument is out of its range, or contradicts the checkpoint of `init_from`.
    """

    monitor = "val/map"
    monitor_mode = "max"

    transferred: Tensor

    def __init__(
        self,
        image_shape: list[int],
        num_frames: int = 4,
        init_from: str | None = None,
        encoder: str | None = None,
        encoder_options: dict[str, Any] | None = None,
        patch_size: int | None = None,
        layout: str | None = None,
        share_encoder: bool = False,
        freeze_encoder: bool = False,
        pool: str = "mean",
        projector: str = "linear_relu",
        proj_dim: int = 2048,
        loss: str = "nt_xent",
        margin: float = 0.2,
        temperature: float = 0.07,
        learnable_temperature: bool = True,
        relevance: str = "pair",
        ks: list[int] = [1, 5, 10, 25],  # noqa: B006 - a plain value, never changed
        top_k: int = 10,
        lr: float = 1e-4,
        weight_decay: float = 0.05,
        layer_decay: float | None = None,
        warmup_epochs: float = 0.0,
        pretrain_epochs: int = 0,
        pretrain: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        for name, value, allowed in (("loss", loss, RETRIEVAL_LOSSES), ("relevance", relevance, RELEVANCE)):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if not _COLDEST <= temperature <= _WARMEST:
            raise ValueError(f"temperature must be from {_COLDEST} to {_WARMEST}, got {temperature}")
        check_training(lr, weight_decay, warmup_epochs)
        if top_k < 1 or pretrain_epochs < 0:
            raise ValueError(f"top_k must be positive and pretrain_epochs not negative, got {top_k}, {pretrain_epochs}")
        if pretrain and not pretrain_epochs:
            raise ValueError("pretrain has no meaning without pretrain_epochs: set it above 0")
        self.loss, self.margin, self.relevance, self.top_k = loss, margin, relevance, top_k
        self.lr, self.weight_decay, self.layer_decay = lr, weight_decay, layer_decay
        self.warmup_epochs, self.pretrain_epochs = warmup_epochs, pretrain_epochs
        base = build_encoder(image_shape, num_frames, encoder, encoder_options, patch_size, layout, init_from)
        self.towers = DualTower(base, share_encoder, freeze_encoder, pool, projector, proj_dim)
        log_temperature = torch.tensor(float(temperature)).log().clamp(*_LOG_RANGE)
        self.log_temperature = nn.Parameter(log_temperature, requires_grad=learnable_temperature and loss != "triplet")
        options = dict(pretrain or {})
        self.pretrain_lr = float(options.pop("lr", lr))
        if not self.pretrain_lr > 0:
            raise ValueError(f"pretrain: lr must be positive, got {self.pretrain_lr}")
        self.autoencoder = None
        if pretrain_epochs:
            fresh = build_encoder(image_shape, num_frames, encoder, encoder_options, patch_size, layout, init_from)
            try:
                self.autoencoder = build_autoencoder(fresh, **{"decoder": encoder, **options})
            except TypeError as error:
                raise ValueError(f"pretrain: {error}") from error
        self.register_buffer("transferred", torch.tensor(not pretrain_epochs))
        self._schedule = TwoPhases()
        classes = relevance == "label"
        self.val_metric, self.test_metric = (CrossModalRetrieval(ks, repeats_expected=classes) for _ in range(2))
        self.matches = Matches(self)

    @property
    def temperature(self) -> Tensor:
        """The temperature, within 0.01 and 1."""
        return self.log_temperature.clamp(*_LOG_RANGE).exp()

    def encode_video(self, clips: Tensor) -> Tensor:
        """Embeddings `(batch, proj_dim)` of unit length of clips `(batch, T, channels, height, width)`."""
        return self.towers.encode_video(clips)

    def encode_audio(self, clips: Tensor) -> Tensor:
        """Embeddings `(batch, proj_dim)` of unit length of pictures of sound, of the clips' shape."""
        return self.towers.encode_audio(clips)

    def forward(self, video: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of both streams of a batch."""
        return self.encode_video(video), self.encode_audio(audio)

    def setup(self, stage: str) -> None:
        """Refuse strategies that cut weights into pieces."""
        refuse_sharding(self)

    def on_train_start(self) -> None:
        """Fit the schedule to the length of the training, and warn where that ends before the towers' part begins."""
        steps = steps_per_epoch(self)
        self._schedule.warmup_steps = round(self.warmup_epochs * steps)
        self._schedule.boundary = self.pretrain_epochs * steps
        fit_schedule(self, self._schedule)
        # A training without an end has no steps to count.
        if self.pretrain_epochs and 0 < self._schedule.total_steps <= self._schedule.boundary:
            log.warning(
                "pretrain_epochs=%d leaves the towers none of the training's %d steps: raise --trainer.max_epochs",
                self.pretrain_epochs, self._schedule.total_steps,
            )  # fmt: skip

    def on_train_batch_start(self, batch: VideoAudioBatch, batch_idx: int) -> None:
        """Start the towers from the pre-trained encoder, when its part is over."""
        # Not when the epoch starts: a run resumed from the last batch of an epoch begins the next one without that.
        if batch_idx or self.autoencoder is None or self.current_epoch < self.pretrain_epochs or bool(self.transferred):
            return
        for encoder in self.towers.encoders:
            encoder.load_state_dict(self.autoencoder.encoder.state_dict())
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        for parameter in self._tower_parameters():
            # Moments of steps without gradients would make the first steps too long.
            optimizer.optimizer.state.pop(parameter, None)
        self.transferred.fill_(True)
        log.info("Epoch %d: the towers start from the encoder pre-trained until now", self.current_epoch)

    def training_step(self, batch: VideoAudioBatch, batch_idx: int) -> Tensor:
        """The loss of a batch: of pairs, or of pictures in the first `pretrain_epochs`.

        Raises:
            ValueError: If there are fewer than 2 pairs, or the streams differ in shape; in the first batch of an epoch
                also if they are not standardised.
        """
        check_streams(batch.video, batch.audio, values=batch_idx == 0)
        if self.autoencoder is not None and self.current_epoch < self.pretrain_epochs:
            out = self.autoencoder(batch.video, batch.audio, batch.keys, batch_idx % 2)
            loss, idle = out.loss, self._tower_parameters()
            self.log("train/pretrain_loss", loss.detach(), batch_size=len(batch.video))
        else:
            video, audio = self(batch.video, batch.audio)
            temperature = self.temperature
            loss = retrieval_loss(video, audio, self.loss, temperature, self.margin, batch.pair_ids, True)
            idle = iter(()) if self.autoencoder is None else self.autoencoder.parameters()
            self.log("train/temperature", temperature.detach(), batch_size=len(batch.video))
        # What this part does not train gets gradients of zero: other processes would wait for them in vain.
        for parameter in idle:
            loss = loss + 0 * parameter.sum()
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch.video))
        return loss  # type: ignore[no-any-return]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """A step, after which the temperature is brought back into its range: beyond it there is no gradient."""
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.log_temperature.clamp_(*_LOG_RANGE)

    def _tower_parameters(self) -> Iterator[nn.Parameter]:
        for parameter in (*self.towers.parameters(), self.log_temperature):
            if parameter.requires_grad:
                yield parameter

    def validation_step(self, batch: VideoAudioBatch, batch_idx: int) -> None:
        """Add a batch to the validation's gallery."""
        self._gather(batch, self.val_metric, batch_idx)

    def on_test_start(self) -> None:
        """Forget what a test that was broken off has left."""
        self.test_metric.reset()
        self.matches.clear()

    def test_step(self, batch: VideoAudioBatch, batch_idx: int) -> None:
        """Add a batch to the test's gallery."""
        video, audio = self._gather(batch, self.test_metric, batch_idx)
        self.matches.show(batch, video, audio, self._ids(batch))

    def _ids(self, batch: VideoAudioBatch) -> Tensor:
        """Items of one id are relevant for each other."""
        if self.relevance == "pair":
            return batch.pair_ids
        if bool((batch.labels < 0).any()):
            raise ValueError("relevance='label' needs labels, and the data has pairs without one: use relevance='pair'")
        return batch.labels

    def _gather(self, batch: VideoAudioBatch, metric: CrossModalRetrieval, batch_idx: int) -> tuple[Tensor, Tensor]:
        check_streams(batch.video, batch.audio, values=batch_idx == 0)
        video, audio = self(batch.video, batch.audio)
        metric.update(video, audio, self._ids(batch))
        return video, audio

    def on_validation_epoch_end(self) -> None:
        """Log `val/*`."""
        self._log_metric("val", self.val_metric)

    def on_test_epoch_end(self) -> None:
        """Log `test/*`, and draw."""
        self._log_metric("test", self.test_metric)
        self.matches.draw()

    def _log_metric(self, stage: str, metric: CrossModalRetrieval) -> None:
        for name, value in metric.compute().items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "map")
        metric.reset()

    def on_predict_start(self) -> None:
        """Begin a new gallery."""
        self.matches.clear()

    def predict_step(self, batch: VideoAudioBatch, batch_idx: int) -> dict[str, Tensor]:
        """Embeddings of a batch: `video` and `audio`, float32 `(batch, proj_dim)` of unit length, and `pair_ids`."""
        check_streams(batch.video, batch.audio, values=batch_idx == 0)
        video, audio = self(batch.video, batch.audio)
        self.matches.add(video, audio, batch.pair_ids)
        return {"video": video, "audio": audio, "pair_ids": batch.pair_ids}

    def on_predict_end(self) -> None:
        """Write `predictions.jsonl`: for each video its `top_k` sounds, for each sound its videos."""
        self.matches.write(self.top_k)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW; the towers and the autoencoder have rates and schedules of their own."""
        head = [parameter for parameter in self.towers.parameters() if parameter.requires_grad]
        towers = layer_decay_groups(self.towers.encoders, head, self.lr, self.weight_decay, self.layer_decay)
        if self.log_temperature.requires_grad:
            towers.append({"params": [self.log_temperature], "lr": self.lr, "weight_decay": 0.0})
        groups = [(group, self._schedule.second) for group in towers]
        if self.autoencoder is not None:
            parameters = self.autoencoder.parameters()
            own = layer_decay_groups([self.autoencoder.encoder], parameters, self.pretrain_lr, self.weight_decay)
            groups += [({**group, "betas": (0.9, 0.95)}, self._schedule.first) for group in own]
        optimizer = torch.optim.AdamW([group for group, _ in groups])
        scheduler = LambdaLR(optimizer, [factor for _, factor in groups])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
