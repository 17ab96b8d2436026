"""The mixer mixes, and how: by properties, exactly where pixels are cut, and against a loop that draws boxes."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats

from zoo.cmmixer.mixer import GRANULARITIES, OPS, CrossModalMixer, apply_mix, check_streams

CUT = ("cutmix", "pixel", "patch")
BATCH, FRAMES, CHANNELS, SIZE = 32, 4, 3, 16


def mixer(op="cutmix", granularity="image", **options):
    return CrossModalMixer(op, granularity, **{"patch_size": 4, **options})


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def streams(batch=BATCH, dtype=torch.float32):
    shape = (batch, FRAMES, CHANNELS, SIZE, SIZE)
    return tuple(torch.randn(shape, generator=seeded(seed)).to(dtype) for seed in (1, 2))


def black_and_white(batch=BATCH):
    shape = (batch, FRAMES, CHANNELS, SIZE, SIZE)
    return torch.zeros(shape), torch.ones(shape)


def boxes(region):
    """Top, bottom, left, right of the true pixels of `(units, height, width)`, which must be boxes."""
    rows, columns = region.any(2), region.any(1)
    assert torch.equal(region, rows[:, :, None] & columns[:, None, :])
    edges = []
    for line in (rows, columns):
        count = line.sum(1)
        first = line.long().argmax(1)
        last = line.shape[1] - line.flip(1).long().argmax(1)
        assert torch.equal(last - first, torch.where(count > 0, count, line.shape[1])), "a line with gaps"
        edges += [first, torch.where(count > 0, last, first)]
    return torch.stack(edges, 1)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("op", OPS)
def test_the_sound_gets_into_the_picture(op, granularity):
    mixed, info = mixer(op, granularity)(*black_and_white(), seeded())
    mean = mixed.mean((2, 3, 4))
    assert torch.allclose(mean, 1 - info.lam, atol=1e-6)
    assert float((mean > 0).float().mean()) > 0.95
    assert float((mean < 1).float().mean()) > 0.95
    assert info.lam.dtype == torch.float32 and info.lam.shape == (BATCH, FRAMES)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("op", CUT)
def test_every_pixel_of_a_cut_is_one_of_the_two_streams_in_all_channels(op, granularity):
    video, audio = streams()
    mixed, info = mixer(op, granularity)(video, audio, seeded())
    seen, heard = (mixed == video).all(2), (mixed == audio).all(2)
    assert bool((seen | heard).all())
    assert torch.equal(info.mask, seen)
    assert bool(seen.any()) and bool(heard.any())
    assert torch.allclose(info.lam, seen.float().mean((2, 3)))
    assert torch.equal(info.weights, seen.float()[:, :, None])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_mixup_is_a_convex_combination_with_one_share_per_unit(granularity):
    video, audio = streams(dtype=torch.float64)
    mixed, info = mixer("mixup", granularity)(video, audio, seeded())
    assert info.mask is None
    assert bool(((info.lam >= 0) & (info.lam <= 1)).all())
    lam = info.lam.double()[..., None, None, None]
    assert torch.allclose(mixed, lam * video + (1 - lam) * audio, rtol=0, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_the_shares_of_mixup_are_beta_distributed(alpha):
    lam = mixer("mixup", alpha=alpha).draw(torch.arange(2000), 4, 4, 4).lam
    assert stats.kstest(lam.flatten().numpy(), stats.beta(alpha, alpha).cdf).pvalue > 1e-3


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_both_cuts_a_unit_with_probability_switch_prob_and_blends_it_otherwise(share):
    lam, weights = mixer("both", switch_prob=share).draw(torch.arange(2000), 2, 16, 16)[1:]
    flat = weights.view(4000, 256)
    cut = ((flat == 0) | (flat == 1)).all(1)
    blend = (flat == flat[:, :1]).all(1)
    assert bool((cut | blend).all())
    assert float(cut.float().mean()) == pytest.approx(share, abs=0.02)
    assert torch.allclose(lam.flatten(), flat.mean(1))


def test_both_pastes_either_stream_equally_often():
    weights = mixer("both", switch_prob=1.0, cutmix_minmax=(0.3, 0.5)).draw(torch.arange(4000), 1, 16, 16).weights
    sound_inside = weights.mean((1, 2, 3, 4)) > 0.5
    assert float(sound_inside.float().mean()) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_cutmix_pastes_the_sound_with_probability_switch_prob_and_the_video_otherwise(share):
    mask = mixer(switch_prob=share, cutmix_minmax=(0.3, 0.5)).draw(torch.arange(4000), 1, 16, 16).mask[:, 0]
    sound_inside = mask.float().mean((1, 2)) > 0.5
    boxes(torch.where(sound_inside[:, None, None], ~mask, mask))
    assert float(sound_inside.float().mean()) == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("op", OPS)
def test_granularity_video_has_one_draw_for_all_frames_and_image_one_for_each(op):
    weights = mixer(op, "video").draw(torch.arange(50), 4, 16, 16).weights
    assert torch.equal(weights, weights[:, :1].expand_as(weights))
    weights = mixer(op, "image").draw(torch.arange(50), 4, 16, 16).weights
    differ = (weights[:, 1:] != weights[:, :-1]).flatten(2).any(2)
    assert float(differ.float().mean()) > 0.95


@pytest.mark.parametrize("op", OPS)
def test_samples_differ_unless_they_share_their_parameters(op):
    keys = torch.arange(50)
    weights = mixer(op).draw(keys, 2, 16, 16).weights
    assert float((weights[1:] != weights[:-1]).flatten(2).any(2).float().mean()) > 0.95
    shared = mixer(op, share_across_batch=True).draw(keys, 2, 16, 16).weights
    assert torch.equal(shared, weights[:1].expand_as(shared))


@pytest.mark.parametrize("op", OPS)
def test_a_seed_fixes_the_mix_and_leaves_the_generator_of_torch_alone(op):
    video, audio = streams()
    before = torch.get_rng_state()
    first, again, other = (mixer(op)(video, audio, seeded(seed))[0] for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_generator_and_keys_the_seed_of_torch_fixes_the_mix():
    video, audio = streams()
    mixed = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        mixed.append(mixer()(video, audio)[0])
    assert torch.equal(mixed[0], mixed[1]) and not torch.equal(mixed[0], mixed[2])
    assert not torch.equal(mixer()(video, audio)[0], mixer()(video, audio)[0])


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("op", OPS)
def test_a_sample_is_mixed_by_its_key_whatever_the_rest_of_the_batch(op, granularity):
    video, audio = streams(8)
    keys = torch.randint(2**63 - 1, (8,), generator=seeded())
    part = mixer(op, granularity, prob=0.7, alpha=0.6)
    mixed = part(video, audio, keys=keys)[0]
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    assert torch.equal(part(video[order], audio[order], keys=keys[order])[0], mixed[order])
    assert torch.equal(part(video[6:7], audio[6:7], keys=keys[6:7])[0], mixed[6:7])
    assert torch.equal(part(video, audio, seeded(9), keys=keys)[0], mixed)


@pytest.mark.parametrize("op", OPS)
def test_parameters_that_were_drawn_before_give_the_same_mix(op):
    video, audio = streams()
    keys = torch.arange(BATCH)
    info = mixer(op).draw(keys, FRAMES, SIZE, SIZE)
    assert torch.equal(apply_mix(video, audio, info), mixer(op)(video, audio, keys=keys)[0])


@pytest.mark.parametrize("ratio", ["0", "0.1", "0.29", "0.5", "0.57", "0.999", "1"])
@pytest.mark.parametrize("shape", [(7, 9), (10, 10), (16, 16)], ids=str)
def test_pixel_takes_exactly_the_floor_of_its_share(shape, ratio):
    height, width = shape
    mask = mixer("pixel", swap_ratio=float(ratio)).draw(torch.arange(20), 2, height, width).mask
    assert set((~mask).sum((2, 3)).flatten().tolist()) == {int(Fraction(ratio) * height * width)}


def test_pixel_takes_all_places_equally_often():
    taken = ~mixer("pixel", swap_ratio=0.3).draw(torch.arange(2000), 2, 10, 10).mask.view(4000, 100)
    assert float((taken.float().mean(0) - 0.3).abs().max()) < 0.03
    # Places next to each other are no more often taken together than others.
    together = (taken[:, 1:] & taken[:, :-1]).float().mean()
    assert float(together) == pytest.approx(0.3 * 29 / 99, abs=0.003)


@pytest.mark.parametrize("patch_size", [4, (2, 8), [16, 4], 16], ids=str)
def test_patch_takes_whole_patches_of_its_grid_by_themselves(patch_size):
    rows, columns = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    mask = mixer("patch", patch_size=patch_size, swap_ratio=0.3).draw(torch.arange(2000), 2, 16, 16).mask
    blocks = mask.view(4000, 16 // rows, rows, 16 // columns, columns)
    corner = blocks[:, :, :1, :, :1]
    assert torch.equal(blocks, corner.expand_as(blocks))
    taken = (~corner).float().flatten(1)
    assert float((taken.mean(0) - 0.3).abs().max()) < 0.03
    count = taken.shape[1]
    assert float(taken.sum(1).var()) == pytest.approx(count * 0.3 * 0.7, rel=0.1)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("op", OPS)
def test_prob_0_leaves_the_video(op, granularity):
    video, audio = streams()
    mixed, info = mixer(op, granularity, prob=0.0)(video, audio, seeded())
    assert torch.equal(mixed, video)
    assert torch.equal(info.lam, torch.ones(BATCH, FRAMES))


@pytest.mark.parametrize("op", OPS)
def test_prob_is_the_share_of_units_that_are_mixed_at_all(op):
    for granularity, units in (("image", slice(None)), ("video", slice(1))):
        lam = mixer(op, granularity, prob=0.4).draw(torch.arange(2000), 2, 16, 16).lam[:, units]
        assert float((lam < 1).float().mean()) == pytest.approx(0.4, abs=0.03)


def loop_boxes(alpha, height, width, units):
    """Top, bottom, left, right of boxes drawn one by one."""
    rng = np.random.default_rng(0)
    result = []
    for _ in range(units):
        lam = rng.beta(alpha, alpha)
        edges = []
        for size in (height, width):
            side, centre = int(size * np.sqrt(1 - lam)), rng.integers(size)
            start = centre - side // 2
            edges += [max(start, 0), min(start + side, size)]
        result.append(edges)
    return np.array(result)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_boxes_of_cutmix_are_those_of_a_loop_that_draws_and_clips_them(alpha):
    height, width, units = 12, 20, 8000
    info = mixer(alpha=alpha, switch_prob=1.0).draw(torch.arange(units), 1, height, width)
    ours, theirs = boxes(~info.mask[:, 0]).numpy(), loop_boxes(alpha, height, width, units)
    areas = []
    for edges in (ours, theirs):
        areas.append((edges[:, 1] - edges[:, 0]) * (edges[:, 3] - edges[:, 2]) / (height * width))
    assert np.allclose(1 - info.lam[:, 0].numpy(), areas[0], atol=1e-6)
    assert areas[0].mean() == pytest.approx(areas[1].mean(), abs=0.01)
    assert stats.ks_2samp(*areas).pvalue > 1e-3
    # The sides and middles of boxes that are not empty.
    ours, theirs = (edges[area > 0] for edges, area in zip((ours, theirs), areas, strict=True))
    for low, high in ((0, 1), (2, 3)):
        for sign in (-1, 1):
            found, expected = (edges[:, high] + sign * edges[:, low] for edges in (ours, theirs))
            assert stats.ks_2samp(found, expected).pvalue > 1e-3
    # Both sides come from one share, the places of rows and columns from numbers of their own.
    for quantity in (lambda edges: edges[:, 1::2] - edges[:, ::2], lambda edges: edges[:, 1::2] + edges[:, ::2]):
        found, expected = (np.corrcoef(quantity(edges).T)[0, 1] for edges in (ours, theirs))
        assert found == pytest.approx(expected, abs=0.04)


def test_boxes_within_bounds_lie_inside_and_have_all_their_sides_and_places():
    edges = boxes(~mixer(cutmix_minmax=[0.25, 0.75], switch_prob=1.0).draw(torch.arange(4000), 1, 16, 8).mask[:, 0])
    for start, stop, size in ((edges[:, 0], edges[:, 1], 16), (edges[:, 2], edges[:, 3], 8)):
        sides = torch.bincount(stop - start, minlength=size + 1)
        allowed = sides[size // 4 : size * 3 // 4 + 1]
        assert int(allowed.sum()) == 4000
        assert stats.chisquare(allowed.numpy()).pvalue > 1e-3
        for side in (size // 4, size * 3 // 4):
            places = torch.bincount(start[stop - start == side], minlength=size - side + 1)
            assert len(places) == size - side + 1
            assert stats.chisquare(places.numpy()).pvalue > 1e-3
    assert abs(float(torch.corrcoef((edges[:, 1::2] - edges[:, ::2]).T.float())[0, 1])) < 0.06
    assert abs(float(torch.corrcoef(edges[:, ::2].T.float())[0, 1])) < 0.06


def test_bounds_that_are_one_number_give_boxes_of_one_size():
    mask = mixer(cutmix_minmax=(0.5, 0.5), switch_prob=1.0).draw(torch.arange(100), 2, 16, 16).mask
    assert set((~mask).sum((2, 3)).flatten().tolist()) == {64}


@pytest.mark.parametrize("op", ["cutmix", "mixup", "both"])
def test_a_tiny_alpha_gives_whole_pictures_and_no_nan(op):
    video, audio = streams()
    mixed, info = mixer(op, alpha=0.01)(video, audio, seeded())
    assert bool(mixed.isfinite().all()) and bool(info.lam.isfinite().all())


@pytest.mark.parametrize("op", OPS)
def test_gradients_reach_both_streams_by_their_shares(op):
    video, audio = (stream.requires_grad_() for stream in streams(4))
    mixed, info = mixer(op)(video, audio, seeded())
    mixed.sum().backward()
    assert torch.allclose(video.grad, info.weights.expand_as(video), atol=1e-6)
    assert torch.allclose(audio.grad, (1 - info.weights).expand_as(audio), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_the_mix_keeps_the_dtype_of_its_streams(op, dtype):
    video, audio = streams(dtype=dtype)
    mixed = mixer(op)(video, audio, seeded())[0]
    assert mixed.dtype == dtype
    plain = mixer(op)(video.float(), audio.float(), seeded())[0]
    assert torch.allclose(mixed.float(), plain, atol=0.06 if dtype == torch.bfloat16 else 1e-6)


def test_a_mixer_prints_its_settings_and_has_no_state():
    part = mixer("patch", "video")
    assert "op=patch, granularity=video" in repr(part)
    assert not part.state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"op": "cut"}, "op must be one of cutmix, mixup, both, pixel, patch, got 'cut'"),
        ({"granularity": "clip"}, "granularity must be one of image, video, got 'clip'"),
        ({"alpha": 0.0}, "alpha must be positive and finite, got 0.0"),
        ({"alpha": -1.0}, "alpha must be positive and finite, got -1.0"),
        ({"alpha": float("nan")}, "alpha must be positive and finite, got nan"),
        ({"prob": 1.5}, "prob must be from 0 to 1, got 1.5"),
        ({"prob": -0.1}, "prob must be from 0 to 1, got -0.1"),
        ({"switch_prob": 2}, "switch_prob must be from 0 to 1, got 2"),
        ({"swap_ratio": float("nan")}, "swap_ratio must be from 0 to 1, got nan"),
        ({"cutmix_minmax": (0.5, 0.2)}, "cutmix_minmax must be two ascending shares"),
        ({"cutmix_minmax": (0.5,)}, "cutmix_minmax must be two ascending shares"),
        ({"cutmix_minmax": (0.5, 1.2)}, "cutmix_minmax must be two ascending shares"),
        ({"patch_size": 0}, "patch_size must be a positive number, or rows and columns, got 0"),
        ({"patch_size": (4, 4, 4)}, "patch_size must be a positive number"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CrossModalMixer(**options)


def test_patches_that_do_not_tile_a_frame_are_refused():
    with pytest.raises(ValueError, match="frames of 16 x 16 cannot be cut into patches of 4 x 5"):
        mixer("patch", patch_size=(4, 5))(*streams(), seeded())


def test_sound_of_another_shape_is_refused_with_both_shapes():
    video = torch.zeros(2, 4, 3, 16, 16)
    message = r"\(2, 4, 3, 16, 16\) and audio \(2, 4, 3, 8, 8\): audio must be rendered to the frame size"
    with pytest.raises(ValueError, match=message):
        mixer()(video, torch.zeros(2, 4, 3, 8, 8))
    with pytest.raises(ValueError, match="audio must be rendered to the frame size"):
        mixer()(video, torch.zeros(2, 4, 1, 16, 16))
    with pytest.raises(ValueError, match=r"video must have shape .*, got \(2, 3, 16, 16\)"):
        mixer()(video[:, 0], video[:, 0])


@pytest.mark.parametrize("name", ["video", "audio"])
def test_pictures_that_are_not_standardised_are_refused_by_name(name):
    good = torch.zeros(2, 1, 1, 16, 16)
    bytes_ = torch.full_like(good, 200, dtype=torch.uint8)
    for bad, message in (
        (bytes_, f"{name} is torch.uint8: normalise first"),
        (bytes_.float(), f"{name} has values up to 200: normalise first"),
        (good - 80.0, f"{name} has values up to 80: normalise first"),
        (good.clone().index_fill_(0, torch.tensor([1]), float("nan")), f"{name} has values that are NaN or infinite"),
        ((good * 0).log(), f"{name} has values that are NaN or infinite; a spectrogram needs a floor"),
    ):
        pair = {"video": good, "audio": good, name: bad}
        with pytest.raises(ValueError, match=message):
            mixer()(pair["video"], pair["audio"])


def test_values_are_not_looked_at_when_not_asked_for():
    check_streams(torch.full((1, 1, 1, 4, 4), 255.0), torch.full((1, 1, 1, 4, 4), float("nan")), values=False)
