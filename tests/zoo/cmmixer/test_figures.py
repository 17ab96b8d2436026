"""Pictures of a test: what is where, which way up, and in which colour."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from zoo.cmmixer.figures import draw_reconstruction, draw_retrieval, draw_similarity

GREEN, RED = "#2a9d3a", "#c63d2f"
NAMES = ("video", "audio", "mix", "visible", "pred_video", "pred_audio")
TITLES = ["video", "sound", "mix", "what the encoder sees", "painted video", "painted sound"]


def made(samples: int = 2, frames: int = 3, channels: int = 1, names: tuple[str, ...] = NAMES) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(samples, frames, channels, 8, 6, generator=generator) for name in names}


def picture(axes: Any) -> torch.Tensor:
    """What is shown, `(height, width, 3)`, row 0 at the top."""
    (image,) = axes.get_images()
    assert image.origin == "upper" and axes.yaxis_inverted()
    return torch.as_tensor(image.get_array())


def frame(axes: Any) -> str | None:
    """Colour of the frame, None where there is none."""
    shown = {spine.get_visible() for spine in axes.spines.values()}
    assert len(shown) == 1
    return to_hex(axes.spines["left"].get_edgecolor()) if shown == {True} else None


@pytest.mark.parametrize("names", [NAMES, tuple(name for name in NAMES if name != "mix")], ids=["mix", "no-mix"])
def test_a_reconstruction_has_a_row_for_each_sample_and_a_column_for_each_part(names: tuple[str, ...]) -> None:
    figure = draw_reconstruction(made(names=names))
    assert isinstance(figure, Figure) and len(figure.axes) == 2 * len(names)
    titles = [title for name, title in zip(NAMES, TITLES, strict=True) if name in names]
    assert [axes.get_title() for axes in figure.axes] == titles + [""] * len(names)
    assert all(picture(axes).shape == (8, 3 * 6, 3) for axes in figure.axes)


def test_low_tones_are_at_the_bottom_and_videos_keep_their_way_up() -> None:
    clips = made(1, 2)
    for part in clips.values():
        part.zero_()
        # Row 0: the lowest tones, or the top of a frame.
        part[:, :, :, 0] = 1.0
    clips["visible"] = torch.full_like(clips["visible"], torch.nan)
    axes = dict(zip(NAMES, draw_reconstruction(clips).axes, strict=True))
    for name in set(NAMES) - {"visible"}:
        expected = torch.zeros(8, 12, 3)
        expected[-1 if name in ("audio", "pred_audio") else 0] = 1.0
        torch.testing.assert_close(picture(axes[name]).float(), expected)


def test_frames_lie_from_left_to_right_on_the_scale_of_the_original() -> None:
    clips = made(1, 2)
    clips["video"] = torch.cat([torch.full((1, 1, 1, 8, 6), -1.0), torch.full((1, 1, 1, 8, 6), 3.0)], 1)
    clips["pred_video"] = torch.full((1, 2, 1, 8, 6), 1.0)
    clips["pred_video"][:, 1] = 9.0
    clips["audio"], clips["pred_audio"] = 10 * clips["video"], 10 * clips["pred_video"]
    clips["visible"] = torch.full_like(clips["video"], torch.nan)
    axes = dict(zip(NAMES, draw_reconstruction(clips).axes, strict=True))
    for name, left in (("video", 0.0), ("pred_video", 0.5), ("audio", 0.0), ("pred_audio", 0.5)):
        shown = picture(axes[name])
        assert bool((shown[:, :6] == left).all()) and bool((shown[:, 6:] == 1).all()), name


def test_paintings_of_what_is_seen_are_grey() -> None:
    clips = made(1, 1)
    clips["visible"] = torch.full_like(clips["video"], torch.nan)
    clips["visible"][..., :2] = 0.0
    axes = dict(zip(NAMES, draw_reconstruction(clips).axes, strict=True))
    for name in ("pred_video", "pred_audio"):
        shown = picture(axes[name])
        assert torch.allclose(shown[:, :2].float(), torch.tensor(0.82))
        assert not bool((shown[:, 2:] == shown[0, 0]).any())
    clips["visible_sound"] = torch.full_like(clips["video"], torch.nan)
    figure = draw_reconstruction(clips)
    painted = picture(figure.axes[-1])
    assert not torch.allclose(painted[:, :2].float(), torch.tensor(0.82)), "of the sound, nothing is seen"


def test_what_is_hidden_is_grey() -> None:
    clips = made()
    hidden = torch.rand(2, 3, 1, 8, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    clips["visible"] = clips["video"].masked_fill(hidden, torch.nan)
    for sample in range(2):
        shown = picture(draw_reconstruction(clips).axes[6 * sample + 3])
        where = torch.cat(list(hidden[sample]), 2)[0]
        grey = shown[where]
        assert len(set(grey.flatten().tolist())) == 1 and 0.5 < float(grey[0, 0]) < 0.95
        original = picture(draw_reconstruction(clips).axes[6 * sample])
        torch.testing.assert_close(shown[~where], original[~where])


@pytest.mark.parametrize(("channels", "colour"), [(1, False), (2, False), (3, True), (5, True)])
def test_three_channels_are_a_colour_and_fewer_are_grey(channels: int, colour: bool) -> None:
    shown = picture(draw_reconstruction(made(1, 1, channels)).axes[0])
    assert bool((shown[..., 0] != shown[..., 1]).any()) == colour
    assert bool(shown.isfinite().all()) and float(shown.min()) >= 0 and float(shown.max()) <= 1


def test_a_constant_clip_can_be_drawn() -> None:
    clips = {name: torch.zeros(1, 1, 1, 8, 6) for name in NAMES}
    assert all(bool(picture(axes).isfinite().all()) for axes in draw_reconstruction(clips).axes)


def test_similarities_are_sorted_so_that_equal_ids_lie_together() -> None:
    ids = torch.tensor([5, 2, 5, 9, 2])
    similarity = torch.rand(5, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    axes, bar = draw_similarity(similarity, ids).axes
    (image,) = axes.get_images()
    order = [1, 4, 0, 2, 3]
    expected = torch.tensor([[float(similarity[i, j]) for j in order] for i in order])
    torch.testing.assert_close(torch.as_tensor(image.get_array()).float(), expected)
    assert image.get_clim() == (-1, 1)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("sounds", "videos")
    assert axes.get_title() == "cosine of 5 pairs, sorted by the 3 ids that make items relevant"
    assert draw_similarity(similarity, torch.arange(5)).axes[0].get_title() == "cosine of 5 pairs, sorted by id"
    assert bar is not axes


def drawn(count: int, ids: list[int], **options: int) -> tuple[list[list[Any]], torch.Tensor, Any]:
    """Axes by row and column, similarities, and the figure; picture i is bright in row i of its pixels."""
    generator = torch.Generator().manual_seed(3)
    video, audio = torch.zeros(count, 1, 8, 6), torch.zeros(count, 1, 8, 6)
    for i in range(count):
        video[i, :, i, :3] = 1.0
        audio[i, :, i, 3:] = 1.0
    similarity = torch.rand(count, count, generator=generator)
    figure = draw_retrieval(video, audio, similarity, torch.tensor(ids), **options)
    columns = 2 * min(options.get("top_k", 5), count) + 3
    return [figure.axes[i : i + columns] for i in range(0, len(figure.axes), columns)], similarity, figure


def shown(axes: Any, kind: str) -> int:
    """Which picture is drawn; sounds are upside down."""
    image = picture(axes)[..., 0]
    row, column = (int(place) for place in image.argmax().div(6, rounding_mode="floor")[None].repeat(2))
    bright = (image == 1).nonzero()
    assert {kind} == {"video" if int(place) < 3 else "sound" for place in bright[:, 1]}
    assert row == column and len(set(bright[:, 0].tolist())) == 1
    return 7 - row if kind == "sound" else row


@pytest.mark.parametrize(("count", "queries", "top_k"), [(7, 3, 4), (3, 5, 5)])
def test_what_is_found_is_in_order_and_green_only_where_ids_agree(count: int, queries: int, top_k: int) -> None:
    ids = [1, 2, 1, 3, 2, 1, 3][:count]
    rows, similarity, figure = drawn(count, ids, queries=queries, top_k=top_k)
    queries, top_k = min(queries, count), min(top_k, count)
    assert len(rows) == queries and len(figure.axes) == queries * (2 * top_k + 3)
    asked = [shown(row[0], "video") for row in rows]
    assert asked == [round((count - 1) * place / (queries - 1)) for place in range(queries)]
    for row, query in zip(rows, asked, strict=True):
        assert shown(row[top_k + 2], "sound") == query
        assert frame(row[0]) is None and frame(row[top_k + 2]) is None
        assert not row[top_k + 1].axison
        for scores, start, kind in ((similarity[query], 1, "sound"), (similarity[:, query], top_k + 3, "video")):
            order = sorted(range(count), key=lambda i: -float(scores[i]))[:top_k]
            assert [shown(axes, kind) for axes in row[start : start + top_k]] == order
            colours = [GREEN if ids[found] == ids[query] else RED for found in order]
            assert [frame(axes) for axes in row[start : start + top_k]] == colours


def test_a_retrieval_s_titles_say_what_is_asked_and_the_places() -> None:
    rows, _, figure = drawn(6, list(range(6)), queries=2, top_k=3)
    places = ["1", "2", "3"]
    assert [axes.get_title() for axes in rows[0]] == ["video", *places, "", "sound", *places]
    assert {axes.get_title() for axes in rows[1]} == {""}
    assert figure.get_suptitle().startswith("found among 6 pairs")
