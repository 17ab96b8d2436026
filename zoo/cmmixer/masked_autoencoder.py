"""A masked autoencoder that sees a quarter of a mixed picture and paints both originals."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from zoo.cmmixer.mixer import check_keys, check_streams
from zoo.cmmixer.positions import grid_positions
from zoo.cmmixer.vit import _EPS, Block, initialise
from zoo.cmmixer.wide import cut_clips, from_wide, unpatchify
from zoo.common.keyed_random import keyed_uniform, mix_keys

if TYPE_CHECKING:
    from zoo.cmmixer.mixer import CrossModalMixer, MixInfo
    from zoo.cmmixer.vit import ViTEncoder

LOSS_ON = ("masked", "hidden", "replaced")
STREAMS = ("none", "audio_only", "alternate", "concat")
"""What the encoder may see in place of a mix."""
_MASK_SLOT, _MIX_SLOT = 101, 102


class Reconstruction(NamedTuple):
    """What the autoencoder makes of a batch.

    Attributes:
        loss: Scalar, `loss_video + audio_weight * loss_audio`.
        loss_video: Scalar, mean squared error of the video where it is scored; each sample counts alike.
        loss_audio: Likewise.
        pred_video: `(batch, patches, patch_size ** 2 * channels)`.
        pred_audio: Likewise.
        mask: bool `(batch, patches)`, true where a patch was removed; `(batch, 2 * patches)` for "concat": the video's,
            then the sound's.
        seen: `(batch, patches, patch_size ** 2 * channels)`, the patches that the encoder saw, 0 where removed, or
            `(batch, 2 * patches, ...)`.
        errors: `(batch, 2)`, mean squared error of the removed patches of each sample, on the scale of the targets:
            video, audio; 0 where none was removed.
    """

    loss: Tensor
    loss_video: Tensor
    loss_audio: Tensor
    pred_video: Tensor
    pred_audio: Tensor
    mask: Tensor
    seen: Tensor
    errors: Tensor


class MaskedAutoencoder(nn.Module):
    """Fuse, then separate: hidden patches of video and sound are painted from visible patches of their mix.

    Only the visible patches are mixed, embedded and encoded.

    Args:
        encoder: The encoder to train.
        mixer: How the streams are mixed, or one of "none" (the video is seen alone), "audio_only" (the sound is),
            "alternate" (one stream is seen and painted, the other one in the next step), "concat" (both are, as tokens
            beside each other).
        hidden_size: Width of the decoder, a multiple of 4.
        num_layers: Its blocks.
        num_heads: Its attention heads.
        mlp_ratio: Width of its MLPs over `hidden_size`.
        mask_ratio: Share of the patches that is removed, in [0, 1).
        mask_block: Side of the square blocks of patches that are removed or kept together: what is hidden is then
            farther from what is seen. Where the number of visible patches cuts a block, its last patches are removed.
        norm_pix_loss: Whether targets are standardised patch by patch.
        audio_weight: Weight w_a of the sound's loss.
        loss_on: Where a stream is scored: "masked": on removed patches; "hidden": also on visible ones, as far as the
            other stream replaced it; "replaced": on these alone.

    Raises:
        ValueError: If an argument is out of its range.
    """

    positions: Tensor
    block: Tensor

    def __init__(
        self,
        encoder: ViTEncoder,
        mixer: CrossModalMixer | str,
        hidden_size: int = 256,
        num_layers: int = 4,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        mask_ratio: float = 0.75,
        mask_block: int = 1,
        norm_pix_loss: bool = False,
        audio_weight: float = 1.0,
        loss_on: str = "masked",
    ) -> None:
        super().__init__()
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio must be at least 0 and below 1, got {mask_ratio}")
        if loss_on not in LOSS_ON:
            raise ValueError(f"loss_on must be one of {', '.join(LOSS_ON)}, got {loss_on!r}")
        if isinstance(mixer, str) and mixer not in STREAMS:
            raise ValueError(f"mixer must be a CrossModalMixer or one of {', '.join(STREAMS)}, got {mixer!r}")
        if loss_on == "masked" and (mask_ratio == 0 or encoder.num_patches == 1):
            raise ValueError(
                f"mask_ratio={mask_ratio} removes none of {encoder.num_patches} patches: nothing is scored"
            )
        if not 0 <= audio_weight < math.inf:
            raise ValueError(f"audio_weight must be finite and not negative, got {audio_weight}")
        if mixer in ("alternate", "concat") and loss_on != "masked":
            raise ValueError(
                f"loss_on={loss_on!r} has no meaning for {mixer!r}, which shows no stream in place of another"
            )
        if mask_block < 1:
            raise ValueError(f"mask_block must be at least 1, got {mask_block}")
        self.encoder, self.mixer = encoder, mixer
        rows, columns = (torch.arange(size) // mask_block for size in encoder.grid)
        self.mask_block = mask_block
        self.register_buffer("block", (rows[:, None] * len(columns) + columns).flatten(), persistent=False)
        self.mask_ratio, self.norm_pix_loss = mask_ratio, norm_pix_loss
        self.audio_weight, self.loss_on = audio_weight, loss_on
        values = encoder.patch_embedding.in_features
        self.decoder_embedding = nn.Linear(encoder.hidden_size, hidden_size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.register_buffer("positions", grid_positions(*encoder.grid, hidden_size), persistent=False)
        self.decoder_blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(num_layers))
        self.decoder_norm = nn.LayerNorm(hidden_size, eps=_EPS)
        self.video_head = nn.Linear(hidden_size, values)
        self.audio_head = nn.Linear(hidden_size, values)
        for part in (self.decoder_embedding, self.decoder_blocks, self.video_head, self.audio_head):
            initialise(part)
        nn.init.normal_(self.mask_token, std=0.02)
        if mixer == "concat":
            self.stream_embedding = nn.Parameter(torch.randn(2, 1, encoder.hidden_size) * 0.02)
            self.decoder_stream_embedding = nn.Parameter(torch.randn(2, 1, hidden_size) * 0.02)

    @property
    def num_visible(self) -> int:
        """Visible patches of a picture, `int(patches * (1 - mask_ratio))`, at least one."""
        return max(1, int(self.encoder.num_patches * (1 - self.mask_ratio) + 1e-9))

    def random_order(self, keys: Tensor, patches: int, device: torch.device) -> Tensor:
        """A random order of the patches of each sample, int64 `(batch, patches)`: the first ones are visible."""
        place = torch.arange(patches, device=device)
        # A block has one number, and its patches stay in order.
        block = self.block[place % len(self.block)] + place // len(self.block) * len(self.block)
        noise = keyed_uniform(keys.to(device)[:, None], _MASK_SLOT, block)
        return noise.argsort(stable=True, dim=1)

    def draw_mix(self, keys: Tensor, device: torch.device) -> MixInfo | None:
        """How each sample of a batch is mixed; None where it is not."""
        if isinstance(self.mixer, str):
            return None
        _, height, width = self.encoder.config["image_shape"]
        return self.mixer.draw(mix_keys(keys, _MIX_SLOT), self.encoder.config["num_frames"], height, width, device)

    def forward(
        self, video: Tensor, audio: Tensor, keys: Tensor | None = None, stream: int | None = None
    ) -> Reconstruction:
        """Mix, hide, and paint.

        Args:
            video: Floating `(batch, T, channels, height, width)`, standardised.
            audio: Of the same shape.
            keys: int64 `(batch,)`, one random key per sample: masks and mixes are functions of it. By default drawn
                with torch's CPU generator.
            stream: For "alternate": the stream seen and painted, 0 for video and 1 for sound.

        Raises:
            ValueError: If the clips have other shapes than the encoder is for, or another argument is not as described.
        """
        check_streams(video, audio, values=False)
        if keys is None:
            keys = torch.randint(torch.iinfo(torch.int64).max, (len(video),))
        check_keys(keys, len(video))
        targets = torch.stack([self.encoder.patches(video), self.encoder.patches(audio)], 1)
        if self.mixer == "concat":
            return self._concat(targets, keys)
        if self.mixer == "alternate" and stream not in (0, 1):
            raise ValueError(f"'alternate' needs the stream to see, 0 for video or 1 for sound, got {stream}")
        patches = self.encoder.num_patches
        order = self.random_order(keys, patches, video.device)
        visible = order[:, : self.num_visible]
        info = self.draw_mix(keys, video.device)
        share = None if info is None else self._patch_weights(info, len(video))
        seen = self._seen(targets, share, visible, stream)
        states = self.encoder.encode(self.encoder.embed(seen, visible))
        decoded = self._decode(self._place(self.decoder_embedding(states[:, 1:]), order) + self.positions, states)
        pred_video, pred_audio = self.video_head(decoded), self.audio_head(decoded)
        mask = torch.ones_like(order, dtype=torch.bool).scatter_(1, visible, False)
        weights = self._scored(mask, share)
        if self.mixer == "alternate":
            weights = torch.stack([weights[:, 0] * (stream != 1), weights[:, 1] * (stream == 1)], 1)
        shown = self._on_grid(seen, visible, patches)
        return self._result(pred_video, pred_audio, targets, weights, torch.stack([mask, mask], 1), mask, shown)

    def _concat(self, targets: Tensor, keys: Tensor) -> Reconstruction:
        """Both streams as tokens beside each other, hidden together."""
        batch, _, patches, values = targets.shape
        order = self.random_order(keys, 2 * patches, targets.device)
        visible = order[:, : 2 * self.num_visible]
        flat = targets.flatten(1, 2)
        seen = flat.gather(1, visible[..., None].expand(-1, -1, values))
        second = visible >= patches
        tokens = self.encoder.embed(seen, visible % patches) + self.stream_embedding[second.long(), 0]
        states = self.encoder.encode(tokens)
        placed = self._place(self.decoder_embedding(states[:, 1:]), order).view(batch, 2, patches, -1)
        placed = placed + self.positions + self.decoder_stream_embedding
        decoded = self._decode(placed.flatten(1, 2), states)
        pred_video, pred_audio = self.video_head(decoded[:, :patches]), self.audio_head(decoded[:, patches:])
        mask = torch.ones_like(order, dtype=torch.bool).scatter_(1, visible, False)
        halves = mask.view(batch, 2, patches)
        shown = self._on_grid(seen, visible, 2 * patches)
        return self._result(pred_video, pred_audio, targets, halves.float(), halves, mask, shown)

    def _patch_weights(self, info: MixInfo, batch: int) -> Tensor:
        """The video's share of each pixel of each patch, `(batch, patches, patch_size ** 2)`, bool or float32."""
        _, height, width = self.encoder.config["image_shape"]
        shares = info.weights if info.mask is None else info.mask[:, :, None]
        pixels = shares.expand(batch, self.encoder.config["num_frames"], 1, height, width)
        return cut_clips(pixels, self.encoder.patch_size, self.encoder.layout)

    def _seen(self, targets: Tensor, share: Tensor | None, visible: Tensor, stream: int | None) -> Tensor:
        """The visible patches of the mix, `(batch, visible, values)`."""
        rows = torch.arange(len(visible), device=visible.device)[:, None]
        if share is None:
            heard = self.mixer == "audio_only" or (self.mixer == "alternate" and stream == 1)
            return targets[rows, int(heard), visible]
        weights = share[rows, visible][..., None]
        shape = (*weights.shape[:-1], -1)
        video, audio = (targets[rows, place, visible].view(shape) for place in (0, 1))
        if weights.dtype == torch.bool:
            return torch.where(weights, video, audio).flatten(2)
        return torch.lerp(audio, video, weights.to(video.dtype)).flatten(2)

    def _place(self, tokens: Tensor, order: Tensor) -> Tensor:
        """Decoder tokens at their places on the grid, mask tokens elsewhere; `(batch, patches, hidden_size)`."""
        batch, count, width = tokens.shape
        hidden = self.mask_token.to(tokens.dtype).expand(batch, order.shape[1] - count, -1)
        places = order.argsort(1)[..., None].expand(-1, -1, width)
        return torch.cat([tokens, hidden], 1).gather(1, places)

    def _decode(self, placed: Tensor, states: Tensor) -> Tensor:
        """Decoder states of the patches; CLS takes part and is dropped."""
        decoded = torch.cat([self.decoder_embedding(states[:, :1]), placed], 1)
        for block in self.decoder_blocks:
            decoded = block(decoded)
        normed: Tensor = self.decoder_norm(decoded)[:, 1:]
        return normed

    def _scored(self, mask: Tensor, share: Tensor | None) -> Tensor:
        """Weight of each patch in the loss of each stream, `(batch, 2, patches)`."""
        removed = mask.float()
        if share is None:
            # Of a stream that is not seen at all, every patch is hidden.
            replaced = torch.zeros_like(removed), torch.zeros_like(removed)
            if self.mixer in ("none", "audio_only"):
                replaced = (replaced[0], 1 - removed) if self.mixer == "none" else (1 - removed, replaced[1])
        else:
            video = share.float().mean(2)
            replaced = (1 - removed) * (1 - video), (1 - removed) * video
        both = torch.stack(replaced, 1)
        if self.loss_on == "masked":
            return removed[:, None].expand_as(both)
        return both if self.loss_on == "replaced" else both + removed[:, None]

    def _result(
        self,
        pred_video: Tensor,
        pred_audio: Tensor,
        targets: Tensor,
        weights: Tensor,
        removed: Tensor,
        mask: Tensor,
        seen: Tensor,
    ) -> Reconstruction:
        wanted = standardise_patches(targets.float()) if self.norm_pix_loss else targets
        # Not under autocast: a mean over many squares of half precision loses digits.
        error = (torch.stack([pred_video, pred_audio], 1).float() - wanted.float()).square().mean(-1)
        losses = weighted_mean(error, weights).mean(0)
        loss = losses[0] + self.audio_weight * losses[1]
        errors = weighted_mean(error.detach(), removed.float())
        return Reconstruction(loss, losses[0], losses[1], pred_video, pred_audio, mask, seen, errors)

    @staticmethod
    def _on_grid(seen: Tensor, visible: Tensor, patches: int) -> Tensor:
        empty = seen.new_zeros(len(seen), patches, seen.shape[-1])
        return empty.scatter(1, visible[..., None].expand_as(seen), seen)

    def to_clips(self, patches: Tensor) -> Tensor:
        """Clips `(batch, T, channels, height, width)` of patches `(batch, patches, values)`."""
        _, height, width = self.encoder.config["image_shape"]
        frames = self.encoder.config["num_frames"]
        wide = unpatchify(patches, self.encoder.patch_size, height, frames * width)
        return from_wide(wide, frames, self.encoder.layout)

    def extra_repr(self) -> str:
        """The settings, for printing."""
        return f"mask_ratio={self.mask_ratio}, loss_on={self.loss_on}"


def standardise_patches(patches: Tensor) -> Tensor:
    """Patches `(..., values)` of mean 0 and variance 1 each (plus 1e-6 in the root)."""
    mean = patches.mean(-1, keepdim=True)
    return (patches - mean) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def weighted_mean(errors: Tensor, weights: Tensor) -> Tensor:
    """Mean over the last dimension with weights; 0 where all weights are 0.

    Of each sample by itself, so that samples count alike whatever share of them is scored.
    """
    total = weights.sum(-1)
    return (errors * weights).sum(-1) / torch.where(total > 0, total, 1.0)
