"""Pictures of a test: what was painted, what was found, and how similar everything is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TITLES = {
    "video": "video",
    "audio": "sound",
    "mix": "mix",
    "visible": "what the encoder sees",
    "visible_sound": "what the encoder sees",
    "pred_video": "painted video",
    "pred_audio": "painted sound",
}
_SEEN = ("visible", "visible_sound")
_HIDDEN = 0.82  # grey
_RIGHT, _WRONG = "#2a9d3a", "#c63d2f"


def _new_figure(width: float, height: float) -> Figure:
    # Not pyplot, which would choose a display.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _picture(image: Tensor, low: float, high: float) -> Any:
    """Channels last, within 0 and 1, grey where there is nothing."""
    scaled = ((image - low) / max(high - low, 1e-6)).clamp(0, 1).nan_to_num(_HIDDEN)
    scaled = scaled[:3] if len(scaled) >= 3 else scaled[:1].expand(3, -1, -1)
    return scaled.permute(1, 2, 0).numpy()


def _show(axes: Axes, image: Any, title: str = "", colour: str | None = None) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    if title:
        axes.set_title(title, fontsize=8)
    for spine in axes.spines.values():
        spine.set_visible(colour is not None)
        spine.set_linewidth(2.5)
        if colour is not None:
            spine.set_color(colour)


def _range(clips: Tensor) -> tuple[float, float]:
    return float(clips.min()), float(clips.max())


def draw_reconstruction(clips: Mapping[str, Tensor]) -> Figure:
    """Originals, mix, visible patches, and both paintings of what is hidden, beside each other, a sample a row.

    Spectrograms have low tones at the bottom.

    Args:
        clips: What `MixerMAE.reconstruct` returns: `(samples, frames, channels, height, width)` by name.
    """
    names = [name for name in _TITLES if name in clips]
    samples, frames, _, height, width = clips["video"].shape
    seen = [clips[name if name in clips else other] for name, other in (_SEEN, _SEEN[::-1])]
    aspect = frames * width / height
    figure = _new_figure(min(24.0, 1.7 * aspect * len(names)), 1.8 * samples + 0.3)
    axes = figure.subplots(samples, len(names), squeeze=False)
    for sample in range(samples):
        for column, name in enumerate(names):
            # Each stream on the scale of its original; a mix has values of both, which are standardised.
            sound = name in ("audio", "pred_audio", "visible_sound")
            source = clips["audio"] if sound else clips["video"]
            low, high = _range(source[sample])
            picture = clips[name][sample]
            if name.startswith("pred"):
                # What is seen is not scored as a rule, and what is painted there means nothing.
                picture = picture.masked_fill(~seen[sound][sample].isnan(), torch.nan)
            wide = torch.cat(list(picture), 2)
            if sound:
                wide = wide.flip(1)
            _show(axes[sample, column], _picture(wide, low, high), _TITLES[name] if sample == 0 else "")
    return figure


def draw_similarity(similarity: Tensor, ids: Tensor) -> Figure:
    """Cosines of all videos (rows) with all sounds (columns), sorted so that equal ids lie together.

    Args:
        similarity: `(n, n)`.
        ids: int64 `(n,)`.
    """
    order = ids.argsort(stable=True)
    figure = _new_figure(5.2, 4.6)
    axes = figure.subplots()
    image = axes.imshow(similarity[order][:, order].numpy(), vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
    axes.set_xlabel("sounds")
    axes.set_ylabel("videos")
    classes = len(set(ids.tolist()))
    sorting = "sorted by id" if classes == len(ids) else f"sorted by the {classes} ids that make items relevant"
    axes.set_title(f"cosine of {len(ids)} pairs, {sorting}", fontsize=9)
    figure.colorbar(image, shrink=0.8)
    return figure


def draw_retrieval(
    video: Tensor, audio: Tensor, similarity: Tensor, ids: Tensor, queries: int = 5, top_k: int = 5
) -> Figure:
    """What is found among some pairs: sounds for videos on the left, videos for sounds on the right.

    Args:
        video: A picture of each clip, `(n, channels, height, width)`.
        audio: Likewise.
        similarity: `(n, n)`, videos in rows.
        ids: int64 `(n,)`; a green frame is around what has the query's id.
        queries: Rows to draw.
        top_k: Pictures found.
    """
    queries, top_k = min(queries, len(ids)), min(top_k, len(ids))
    # Spread over the pairs: neighbours may be of one class.
    chosen = torch.linspace(0, len(ids) - 1, queries).long().tolist()
    figure = _new_figure(1.15 * (2 * top_k + 3), 1.25 * queries + 0.6)
    axes = figure.subplots(queries, 2 * top_k + 3, squeeze=False)
    audio = audio.flip(2)
    for half, (own, other, scores) in enumerate(((video, audio, similarity), (audio, video, similarity.T))):
        start = half * (top_k + 2)
        for row, query in enumerate(chosen):
            title = ("video", "sound")[half] if row == 0 else ""
            _show(axes[row, start], _picture(own[query], *_range(own[query])), title)
            for place, found in enumerate(scores[query].topk(top_k).indices.tolist()):
                colour = _RIGHT if ids[found] == ids[query] else _WRONG
                title = f"{place + 1}" if row == 0 else ""
                picture = _picture(other[found], *_range(other[found]))
                _show(axes[row, start + 1 + place], picture, title, colour)
    for row in range(queries):
        axes[row, top_k + 1].axis("off")
    figure.suptitle(f"found among {len(ids)} pairs; a green frame: as it should be", fontsize=9)
    return figure
