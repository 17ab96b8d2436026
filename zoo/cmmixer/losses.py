"""Losses of the retriever: NT-Xent, InfoNCE and the triplet hinge, with negatives from the global batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.common.contrastive import gather_rows, info_nce, nt_xent
from zoo.common.distributed import world_size

RETRIEVAL_LOSSES = ("nt_xent", "infonce", "triplet")


def retrieval_loss(
    video: Tensor,
    audio: Tensor,
    kind: str = "nt_xent",
    temperature: Tensor | float = 0.07,
    margin: float = 0.2,
    sample_ids: Tensor | None = None,
    gather_distributed: bool = False,
) -> Tensor:
    """Loss of pairs of video and audio, by name (section 2.5).

    - "nt_xent": 2N items, all video and all audio, each against the 2N - 1 others, also those of its own modality;
    - "infonce": each item against the N of the other modality, mean of both directions;
    - "triplet": `triplet_loss`, in which the temperature has no part.

    Args:
        video: Vectors of unit length `(batch, d)`.
        audio: Of the same shape; row i belongs to video i.
        kind: One of the names above.
        temperature: Divides the cosine similarities; positive. A tensor without dimensions gets its gradient, and its
            sign is not looked at, since that would wait for the device.
        margin: Of the hinge of "triplet".
        sample_ids: int64 `(batch,)`; rows of one id are the same pair and no negatives of each other.
        gather_distributed: Take the rows of all processes as negatives, with gradients to them. Averaged over
            processes, as DDP does, value and gradients are those of one process with the whole batch.

    Returns:
        Scalar, fp32 also under autocast (float64 for float64); 0 where all rows have one id.

    Raises:
        ValueError: If the name is unknown, there are fewer than 2 pairs on all processes together, or shapes, ids or
            temperature are not valid.
    """
    if kind not in RETRIEVAL_LOSSES:
        raise ValueError(f"kind must be one of {list(RETRIEVAL_LOSSES)}, got {kind!r}")
    if kind == "triplet":
        return triplet_loss(video, audio, margin, sample_ids, gather_distributed)
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    video, audio = _checked(video, audio, gather_distributed)
    with torch.autocast(video.device.type, enabled=False):
        # Each vector takes half of the division, so that a learnable temperature gets its gradient from all processes.
        scale = temperature**-0.5
        video, audio = video * scale, audio * scale
        if kind == "nt_xent":
            return nt_xent(video, audio, 1.0, gather_distributed, sample_ids)
        return info_nce(video, audio, 1.0, True, gather_distributed, sample_ids)


def triplet_loss(
    video: Tensor,
    audio: Tensor,
    margin: float = 0.2,
    sample_ids: Tensor | None = None,
    gather_distributed: bool = False,
) -> Tensor:
    """Hinge on cosine similarities with the hardest negative of the other modality, in both directions (section 2.5).

    Mean over the 2N anchors of max(0, margin + s_neg - s_pos), s_pos being the similarity to the own partner and s_neg
    the highest one to a row of the other modality that has another id; an anchor without such a row counts as 0.

    Args:
        video: `(batch, d)`, of any length.
        audio: Of the same shape; row i belongs to video i.
        margin: What s_pos must be ahead by.
        sample_ids: As in `retrieval_loss`.
        gather_distributed: As in `retrieval_loss`.

    Returns:
        Scalar, fp32 also under autocast (float64 for float64).

    Raises:
        ValueError: As `retrieval_loss`, or if the margin is negative.
    """
    if not margin >= 0:
        raise ValueError(f"margin must be at least 0, got {margin}")
    video, audio = _checked(video, audio, gather_distributed)
    with torch.autocast(video.device.type, enabled=False):
        video, audio = F.normalize(video, dim=1), F.normalize(audio, dim=1)
        rows = gather_rows(video, audio, sample_ids, gather_distributed)
        ids = torch.arange(len(rows.first), device=video.device) if rows.sample_ids is None else rows.sample_ids
        same = ids[rows.own, None] == ids
        positive = (video * audio).sum(1)
        hinges = [
            F.relu(margin + (anchors @ candidates.T).masked_fill(same, -torch.inf).amax(1) - positive)
            for anchors, candidates in ((video, rows.second), (audio, rows.first))
        ]
        return torch.cat(hinges).mean()


def _checked(video: Tensor, audio: Tensor, gather_distributed: bool) -> tuple[Tensor, Tensor]:
    """Both in full precision, after a look at their shapes."""
    if video.shape != audio.shape or video.ndim != 2:
        raise ValueError(
            f"video and audio must have one shape (batch, d), got {tuple(video.shape)} and {tuple(audio.shape)}"
        )
    pairs = len(video) * (world_size() if gather_distributed else 1)
    if pairs < 2:
        raise ValueError(
            f"a contrastive loss needs at least 2 pairs in a batch, got {pairs}: use a larger batch_size or "
            "drop_last=True"
        )
    dtype = torch.float64 if video.dtype == audio.dtype == torch.float64 else torch.float32
    return video.to(dtype), audio.to(dtype)
