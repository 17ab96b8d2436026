"""The cross-modal mixer: pictures of two streams become one picture."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from zoo.cmmixer.beta import keyed_symmetric_beta
from zoo.common.keyed_random import keyed_uniform, mix_keys

if TYPE_CHECKING:
    from collections.abc import Sequence

OPS = ("cutmix", "mixup", "both", "pixel", "patch")
GRANULARITIES = ("image", "video")
_LARGEST = 20.0
"""Standardised pictures stay far below; bytes, and decibels, do not."""


class MixInfo(NamedTuple):
    """How a batch was mixed.

    Attributes:
        mask: bool `(batch, frames, height, width)`, whether a pixel is the video's; None where pixels are blended.
        lam: float32 `(batch, frames)`, the video's share of each picture.
        blend: float32, the video's share of each pixel where there is no mask, of a shape that broadcasts to
            `(batch, frames, 1, height, width)`.
    """

    mask: Tensor | None
    lam: Tensor
    blend: Tensor | None = None

    @property
    def weights(self) -> Tensor:
        """The video's share of each pixel, float32, of a shape that broadcasts as `blend` does."""
        if self.mask is not None:
            return self.mask[:, :, None].float()
        assert self.blend is not None
        return self.blend


class CrossModalMixer(nn.Module):
    """Mixes the pictures of a video with those of its sound before any network sees them.

    Cut operations take each pixel from one of the two, X = m * V + (1 - m) * A with m in {0, 1}; "mixup" blends them,
    X = lam * V + (1 - lam) * A. Each sample has parameters of its own. They are a function of one random key per
    sample, so that they depend neither on the device nor on the other samples.

    Args:
        op: "cutmix": a box of one stream is pasted into the other; its sides are sqrt(1 - lam) of the picture's with
            lam from Beta(alpha, alpha), its centre is uniform, and it is clipped to the picture. "mixup": a blend with
            lam from Beta(alpha, alpha). "both": one of these two. "pixel": `floor(swap_ratio * height * width)` random
            pixels are the sound's. "patch": each patch of a grid is the sound's with probability `swap_ratio`.
        granularity: "image": parameters of each frame by itself; "video": one draw for all frames of a clip.
        alpha: Parameter of the Beta distribution.
        prob: Probability that a unit (a frame, or a clip) is mixed at all; otherwise it stays the video's.
        switch_prob: Probability that the sound's box is pasted into the video rather than the other way round; with
            "both" the probability of "cutmix", whose directions are then equally likely.
        swap_ratio: Share of the sound for "pixel" and "patch".
        cutmix_minmax: Least and largest share of the picture's sides that a box has, drawn uniformly; the box then lies
            fully inside, and `alpha` has no part in it.
        patch_size: Side of the patches of "patch" in pixels: one number, or rows and columns. As large as the picture,
            it swaps whole pictures.
        share_across_batch: Whether all samples of a batch have the parameters of its first one.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> video, audio = torch.zeros(2, 4, 3, 32, 32), torch.ones(2, 4, 3, 32, 32)
        >>> mixed, info = CrossModalMixer()(video, audio, torch.Generator().manual_seed(0))
        >>> bool(torch.allclose(mixed.mean((2, 3, 4)), 1 - info.lam))
        True
    """

    def __init__(
        self,
        op: str = "cutmix",
        granularity: str = "image",
        alpha: float = 1.0,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        swap_ratio: float = 0.5,
        cutmix_minmax: Sequence[float] | None = None,
        patch_size: int | Sequence[int] = 16,
        share_across_batch: bool = False,
    ) -> None:
        super().__init__()
        for name, value, allowed in (("op", op, OPS), ("granularity", granularity, GRANULARITIES)):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if not 0 < alpha < math.inf:
            raise ValueError(f"alpha must be positive and finite, got {alpha}")
        for name, share in (("prob", prob), ("switch_prob", switch_prob), ("swap_ratio", swap_ratio)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {share}")
        if cutmix_minmax is not None and not (
            len(cutmix_minmax) == 2 and 0 <= cutmix_minmax[0] <= cutmix_minmax[1] <= 1
        ):
            raise ValueError(f"cutmix_minmax must be two ascending shares from 0 to 1, got {cutmix_minmax}")
        if cutmix_minmax is not None and op not in ("cutmix", "both"):
            raise ValueError(f"cutmix_minmax has no meaning for op={op!r}, which has no box")
        sides = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
        if len(sides) != 2 or min(sides) < 1:
            raise ValueError(f"patch_size must be a positive number, or rows and columns, got {patch_size}")
        self.op, self.granularity, self.alpha, self.prob = op, granularity, alpha, prob
        self.switch_prob, self.swap_ratio = switch_prob, swap_ratio
        self.cutmix_minmax = None if cutmix_minmax is None else tuple(cutmix_minmax)
        self.patch_size, self.share_across_batch = sides, share_across_batch

    def forward(
        self, video: Tensor, audio: Tensor, generator: torch.Generator | None = None, keys: Tensor | None = None
    ) -> tuple[Tensor, MixInfo]:
        """Mix a batch.

        Args:
            video: Floating `(batch, frames, channels, height, width)`, standardised.
            audio: Of the same shape: pictures of the sound around each frame.
            generator: A CPU generator that draws the keys; torch's own by default.
            keys: int64 `(batch,)`, one random key per sample; the generator then has no part.

        Returns:
            The mixed pictures, of the shape of `video`, and how they were mixed.

        Raises:
            ValueError: If shapes differ, or values are not those of standardised pictures.
        """
        check_streams(video, audio)
        if keys is None:
            keys = torch.randint(torch.iinfo(torch.int64).max, (len(video),), generator=generator)
        frames, _, height, width = video.shape[1:]
        check_keys(keys, len(video))
        info = self.draw(keys, frames, height, width, video.device)
        return apply_mix(video, audio, info), info

    def draw(self, keys: Tensor, frames: int, height: int, width: int, device: torch.device | str = "cpu") -> MixInfo:
        """The parameters of a batch, without its pictures.

        Args:
            keys: int64 `(batch,)`.
            frames: Frames of each clip.
            height: Rows of a frame.
            width: Columns of a frame.
            device: Where the result is wanted. What is drawn is the same on all.

        Raises:
            ValueError: If the patches of "patch" do not tile a frame.
        """
        # The few numbers that decide a unit are drawn on the CPU; those of single pixels on the device.
        keys = keys.cpu()
        if self.share_across_batch:
            keys = keys[:1].expand(len(keys))
        units = frames if self.granularity == "image" else 1
        keys = mix_keys(keys[:, None], torch.arange(units)).expand(len(keys), frames)
        mixed = keyed_uniform(keys, 1) < self.prob
        if self.op in ("pixel", "patch"):
            return self._scattered(keys.to(device), mixed.to(device), height, width)
        switch = keyed_uniform(keys, 2) < self.switch_prob
        lam = keyed_symmetric_beta(self.alpha, mix_keys(keys, 3))
        blend = torch.where(mixed, lam, 1.0).float().to(device)
        if self.op == "mixup":
            return MixInfo(None, blend, blend[..., None, None, None])
        rows, columns = self._boxes(keys, lam, height, width, device)
        # Where the sound's box is pasted, the video is outside of it; of an unmixed frame all is outside of no box.
        pasted = switch if self.op == "cutmix" else keyed_uniform(keys, 4) < 0.5
        outside = (pasted | ~mixed).to(device)
        rows = rows & mixed.to(device)[..., None]
        # A row of a mask is one of two lines, so that rows are copied rather than pixels computed.
        lines = torch.stack([torch.zeros_like(columns), columns], 2) ^ outside[..., None, None]
        line = torch.arange(0, 2 * outside.numel(), 2, device=rows.device).view(*outside.shape, 1) + rows
        mask = lines.view(-1, width).index_select(0, line.flatten()).view(*outside.shape, height, width)
        area = rows.sum(-1) * columns.sum(-1) / (height * width)
        share = torch.where(outside, 1 - area, area).float()
        if self.op == "cutmix":
            return MixInfo(mask, share)
        cut = switch.to(device)
        weights = torch.where(cut[..., None, None], mask.float(), blend[..., None, None])
        return MixInfo(None, torch.where(cut, share, blend), weights[:, :, None])

    def _boxes(
        self, keys: Tensor, lam: Tensor, height: int, width: int, device: torch.device | str
    ) -> tuple[Tensor, Tensor]:
        """Rows `(batch, frames, height)` and columns `(batch, frames, width)` of each frame's box, bool."""
        lines = []
        for slot, size in ((10, height), (20, width)):
            place = keyed_uniform(keys, slot)
            if self.cutmix_minmax is None:
                side = ((1 - lam).sqrt() * size).long()
                start = (place * size).long() - side // 2
            else:
                low, high = (int(share * size + 1e-9) for share in self.cutmix_minmax)
                side = low + (keyed_uniform(keys, slot + 1) * (high - low + 1)).long()
                start = (place * (size - side + 1)).long()
            start, stop = start.to(device)[..., None], (start + side).to(device)[..., None]
            index = torch.arange(size, device=device)
            lines.append((index >= start) & (index < stop))
        return lines[0], lines[1]

    def _scattered(self, keys: Tensor, mixed: Tensor, height: int, width: int) -> MixInfo:
        """Parameters of "pixel" and "patch"."""
        if self.op == "pixel":
            pixels = height * width
            # 0.57 * 10 * 10 is a little below 57.
            count = int(self.swap_ratio * pixels + 1e-9)
            index = torch.arange(pixels, device=keys.device)
            # Random words, all different by their last bits: those up to the rank `count` are the sound's.
            bits = max(1, (pixels - 1).bit_length())
            words = (mix_keys(keys[..., None], index) >> bits << bits) | index
            if count:
                mask = (words > words.kthvalue(count, dim=2, keepdim=True).values) | ~mixed[..., None]
            else:
                mask = torch.ones_like(words, dtype=torch.bool)
            lam = torch.where(mixed, 1 - count / pixels, 1.0)
            return MixInfo(mask.view(*keys.shape, height, width), lam)
        rows, columns = self.patch_size
        if height % rows or width % columns:
            raise ValueError(f"frames of {height} x {width} cannot be cut into patches of {rows} x {columns}")
        count = (height // rows) * (width // columns)
        kept = keyed_uniform(keys[..., None], 30, torch.arange(count, device=keys.device)) >= self.swap_ratio
        kept |= ~mixed[..., None]
        lam = kept.float().mean(-1)
        kept = kept.view(*keys.shape, height // rows, 1, width // columns, 1).expand(-1, -1, -1, rows, -1, columns)
        return MixInfo(kept.reshape(*keys.shape, height, width), lam)

    def extra_repr(self) -> str:
        """The settings, for printing."""
        return f"op={self.op}, granularity={self.granularity}"


def apply_mix(video: Tensor, audio: Tensor, info: MixInfo) -> Tensor:
    """The mixed pictures of parameters that were drawn before; shapes as in `CrossModalMixer.forward`."""
    if info.mask is not None:
        return torch.where(info.mask[:, :, None], video, audio)
    return torch.lerp(audio, video, info.weights.to(video.dtype))


def check_keys(keys: Tensor, batch: int) -> None:
    """Refuse what is not one key per sample.

    Raises:
        ValueError: If the keys are not int64 `(batch,)`.
    """
    if keys.shape != (batch,) or keys.dtype != torch.int64:
        raise ValueError(f"keys must be int64 of shape ({batch},), got {keys.dtype} {tuple(keys.shape)}")


def check_streams(video: Tensor, audio: Tensor, values: bool = True) -> None:
    """Refuse what are not two streams of standardised pictures.

    Args:
        video: `(batch, frames, channels, height, width)`.
        audio: Likewise.
        values: Whether to look at the values, which makes a GPU wait.

    Raises:
        ValueError: If shapes or dtypes are wrong, or a value is NaN, infinite, or too large for standardised pictures.
    """
    if video.ndim != 5:
        raise ValueError(f"video must have shape (batch, frames, channels, height, width), got {tuple(video.shape)}")
    if video.shape != audio.shape:
        raise ValueError(
            f"video has shape {tuple(video.shape)} and audio {tuple(audio.shape)}: audio must be rendered to the frame "
            "size, one picture of the same channels for each frame"
        )
    for name, stream in (("video", video), ("audio", audio)):
        if not stream.is_floating_point():
            raise ValueError(f"{name} is {stream.dtype}: normalise first, to floating numbers of mean 0 and variance 1")
        if not values:
            continue
        if not stream.numel():
            continue
        # One pass, and no copy of a batch that may be large.
        low, high = torch.aminmax(stream.detach())
        largest = torch.maximum(-low, high).item()
        if not largest < float("inf"):
            raise ValueError(f"{name} has values that are NaN or infinite; a spectrogram needs a floor before its log")
        if largest > _LARGEST:
            raise ValueError(f"{name} has values up to {largest:g}: normalise first, to mean 0 and variance 1")
