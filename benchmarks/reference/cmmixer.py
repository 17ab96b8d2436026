"""CMMixer's published procedure in plain form: a frame at a time, a query at a time, attention written out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from datamodules.sources.media import audio_windows
from datamodules.sources.video_files import read_audio

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from datamodules.sources.log_mel import LogMel
    from zoo.cmmixer.vit import Attention


class Box(NamedTuple):
    """Rows and columns of a frame, the last ones excluded, and whether they are the sound's or all others are."""

    top: int
    bottom: int
    left: int
    right: int
    pasted: bool

    def mask(self, height: int, width: int) -> Tensor:
        """The video's share of each pixel, float32 `(height, width)`."""
        mask = torch.full((height, width), float(self.pasted))
        mask[self.top : self.bottom, self.left : self.right] = float(not self.pasted)
        return mask


def box_of(height: int, width: int, lam: float, row: int, column: int, pasted: bool) -> Box:
    """The box of a frame.

    Args:
        height: Rows of the frame.
        width: Columns of the frame.
        lam: The box has sides of sqrt(1 - lam) times the frame's.
        row: Of its centre.
        column: Of its centre.
        pasted: Whether the sound's box is pasted into the video, or the other way round.
    """
    rows, columns = int(height * math.sqrt(1 - lam)), int(width * math.sqrt(1 - lam))
    top, left = row - rows // 2, column - columns // 2
    return Box(max(top, 0), min(top + rows, height), max(left, 0), min(left + columns, width), pasted)


class PlainMixer:
    """Draws the parameters of one frame after the other.

    Args:
        op: An operation of `CrossModalMixer`; its other settings are that class's defaults.
        seed: Of numpy's generator.
        patch_size: Side of the patches of "patch".
    """

    def __init__(self, op: str, seed: int = 0, patch_size: int = 16) -> None:
        self.op, self.patch_size, self.generator = op, patch_size, np.random.default_rng(seed)

    def box(self, height: int, width: int) -> Box:
        """A box for "cutmix"."""
        lam = self.generator.beta(1.0, 1.0)
        row, column = int(self.generator.integers(height)), int(self.generator.integers(width))
        return box_of(height, width, lam, row, column, bool(self.generator.random() < 0.5))

    def mask(self, height: int, width: int) -> Tensor:
        """The video's share of each pixel of a frame, float32 `(height, width)`."""
        if self.op == "pixel":
            share = np.ones(height * width, dtype=np.float32)
            share[: height * width // 2] = 0
            self.generator.shuffle(share)
            return torch.from_numpy(share).view(height, width)
        if self.op == "patch":
            p = self.patch_size
            kept = self.generator.random((height // p, width // p)) >= 0.5
            return torch.from_numpy(np.kron(kept, np.ones((p, p))).astype(np.float32))
        if self.op == "mixup" or (self.op == "both" and self.generator.random() >= 0.5):
            return torch.full((height, width), self.generator.beta(1.0, 1.0))
        return self.box(height, width).mask(height, width)


def mix_frames(video: Tensor, audio: Tensor, mask: Callable[[int, int], Tensor]) -> Tensor:
    """Mix one frame after the other, m V + (1 - m) A, and stack them.

    Args:
        video: `(batch, frames, channels, height, width)`.
        audio: Of the same shape.
        mask: m of sample and frame, `(height, width)`.
    """
    clips = []
    for sample in range(video.shape[0]):
        frames = []
        for frame in range(video.shape[1]):
            m = mask(sample, frame)
            frames.append(video[sample, frame] * m + audio[sample, frame] * (1 - m))
        clips.append(torch.stack(frames))
    return torch.stack(clips)


def paste_frames(video: Tensor, audio: Tensor, box: Callable[[int, int], Box]) -> Tensor:
    """Boxes pasted from frame to frame as in the published code: two copies of both streams, and slices of them.

    Args:
        video: `(batch, frames, channels, height, width)`.
        audio: Of the same shape.
        box: Of sample and frame.
    """
    seen, heard, mixed, other = video.clone(), audio.clone(), video.clone(), audio.clone()
    for sample in range(video.shape[0]):
        for frame in range(video.shape[1]):
            top, bottom, left, right, pasted = box(sample, frame)
            inside = (sample, frame, slice(None), slice(top, bottom), slice(left, right))
            if pasted:
                mixed[inside] = heard[inside]
            else:
                other[inside] = seen[inside]
                mixed[sample, frame] = other[sample, frame]
    return mixed


def visible_patches(clips: Tensor, visible: Tensor, patch_size: int) -> Tensor:
    """Some patches of clips whose frames lie beside each other.

    Args:
        clips: `(batch, frames, channels, height, width)`.
        visible: int64 `(batch, visible)`, places in the grid of the wide picture, row by row.
        patch_size: Side of a patch.

    Returns:
        `(batch, visible, patch_size ** 2 * channels)`, values in the order row, column, channel.
    """
    batch, frames, channels, height, width = clips.shape
    wide = clips.permute(0, 2, 3, 1, 4).reshape(batch, channels, height, frames * width)
    cut = wide.reshape(batch, channels, height // patch_size, patch_size, frames * width // patch_size, patch_size)
    patches = torch.einsum("nchpwq->nhwpqc", cut).reshape(batch, -1, patch_size * patch_size * channels)
    return patches.gather(1, visible[..., None].expand(-1, -1, patches.shape[-1]))


def softmax_attention(attention: Attention, states: Tensor) -> Tensor:
    """Self-attention by a matrix of all pairs of tokens.

    Args:
        attention: Its weights.
        states: `(batch, tokens, hidden_size)`.
    """
    batch, tokens, width = states.shape
    heads = attention.num_heads
    qkv = attention.qkv(states).reshape(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    query, key, value = qkv[0], qkv[1], qkv[2]
    scores = (query @ key.transpose(-2, -1)) * (width // heads) ** -0.5
    attended = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, tokens, width)
    projected: Tensor = attention.proj(attended)
    return projected


@torch.no_grad()
def plain_spectrograms(path: str | Path, times: Tensor, log_mel: LogMel, window: float) -> Tensor:
    """The sound around each frame, read and transformed whenever it is wanted; `(frames, num_mels, columns)`."""
    waveform, _ = read_audio(path)
    pictures = [log_mel(audio_windows(waveform, log_mel.sample_rate, time[None], window))[0] for time in times]
    return torch.stack(pictures)


def plain_retrieval(video: Tensor, audio: Tensor, pair_ids: Tensor, ks: Sequence[int]) -> dict[str, float]:
    """Ranks of one query after the other from a sorted list, by the names of `CrossModalRetrieval`.

    Args:
        video: `(gallery, d)`.
        audio: Of the same shape; row i belongs to video i.
        pair_ids: `(gallery,)`, which items are relevant for each other.
        ks: Cut-offs.
    """
    streams = F.normalize(video, dim=1), F.normalize(audio, dim=1)
    ids = pair_ids.tolist()
    values: dict[str, float] = {}
    for name, queries, gallery in (("v2a", *streams), ("a2v", *reversed(streams))):
        best, precision = [], []
        for query, own in zip(queries, ids, strict=True):
            scores = (gallery @ query).tolist()
            # Of equal scores the irrelevant ones come first.
            order = sorted(range(len(ids)), key=lambda item: (-scores[item], ids[item] == own))
            ranks = [rank for rank, item in enumerate(order, 1) if ids[item] == own]
            best.append(ranks[0])
            precision.append(sum(found / rank for found, rank in enumerate(ranks, 1)) / len(ranks))
        values |= {f"{name}/r@{k}": float(np.mean([rank <= k for rank in best])) for k in ks}
        values[f"{name}/mdr"] = float(np.median(best))
        values[f"{name}/mrr"] = float(np.mean([1 / rank for rank in best]))
        values[f"{name}/map"] = float(np.mean(precision))
    values["map"] = (values["v2a/map"] + values["a2v/map"]) / 2
    return values
