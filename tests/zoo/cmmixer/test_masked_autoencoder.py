"""The masked autoencoder against loops over patches in float64, and by what may and may not change its loss."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from zoo.cmmixer.masked_autoencoder import LOSS_ON, MaskedAutoencoder, standardise_patches, weighted_mean
from zoo.cmmixer.mixer import OPS, CrossModalMixer, apply_mix
from zoo.cmmixer.vit import ViTEncoder
from zoo.cmmixer.wide import LAYOUTS, patchify, to_wide

SIZE, PATCH, BATCH = 8, 4, 5
KEYS = torch.tensor([11, 2**62, 5, 77, 123456789])
STREAMS = ["none", "audio_only", "concat", "alternate-0", "alternate-1"]


def autoencoder(mixer="patch", frames=2, channels=1, layout="concat", size=SIZE, patch=PATCH, **options):
    torch.manual_seed(0)
    encoder = ViTEncoder([channels, size, size], frames, patch, 16, 2, 2, layout=layout)
    name = mixer.split("-")[0]
    part = CrossModalMixer(name, patch_size=patch // 2) if name in OPS else name
    return MaskedAutoencoder(encoder, part, **{"hidden_size": 12, "num_layers": 1, "num_heads": 3, **options})


def clips(frames=2, channels=1, size=SIZE, batch=BATCH, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, frames, channels, size, size, generator=generator) for _ in range(2))


def stream_of(mixer):
    return int(mixer[-1]) if mixer.startswith("alternate") else None


def mixed(model, video, audio, keys=KEYS):
    """The pictures that the encoder looks at, whole."""
    info = model.draw_mix(keys, video.device)
    return apply_mix(video, audio, info)


def painted(model, video, audio):
    """The result, and what the decoder's first block was given."""
    given = []
    model.decoder_blocks[0].register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    return model(video, audio, KEYS), given[0]


class Painted(nn.Module):
    """A head that knows the answer."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, states):
        return self.answer + 0 * states.sum()


def loop_patches(clip, layout="concat", patch=PATCH):
    """Patches of one clip, value by value: a list of lists in float64."""
    frames, channels, height, width = clip.shape

    def value(channel, row, column):
        place = divmod(column, width) if layout == "concat" else divmod(column, frames)[::-1]
        return clip[place[0], channel, row, place[1]].double().item()

    found = []
    for top, left in itertools.product(range(0, height, patch), range(0, frames * width, patch)):
        places = itertools.product(range(top, top + patch), range(left, left + patch), range(channels))
        found.append([value(channel, row, column) for row, column, channel in places])
    return found


def loop_losses(model, video, audio, out, video_share, norm=False):
    """Losses of both streams, sample by sample and patch by patch, from what the model painted."""
    totals = []
    for stream, (clip, guesses) in enumerate(((video, out.pred_video), (audio, out.pred_audio))):
        per_sample = []
        for sample in range(len(clip)):
            top = bottom = 0.0
            for place, target in enumerate(loop_patches(clip[sample], model.encoder.layout)):
                if norm:
                    mean = sum(target) / len(target)
                    variance = sum((x - mean) ** 2 for x in target) / (len(target) - 1)
                    target = [(x - mean) / math.sqrt(variance + 1e-6) for x in target]
                guess = guesses[sample, place].double().tolist()
                error = sum((x - y) ** 2 for x, y in zip(guess, target, strict=True)) / len(target)
                where = place + stream * (model.mixer == "concat") * model.encoder.num_patches
                if out.mask[sample, where]:
                    weight = float(model.loss_on != "replaced")
                else:
                    share = video_share[sample][place]
                    weight = (1 - share if stream == 0 else share) * (model.loss_on != "masked")
                top, bottom = top + weight * error, bottom + weight
            per_sample.append(top / bottom if bottom else 0.0)
        totals.append(sum(per_sample) / len(per_sample))
    return totals


def shares(model, mixer, batch=BATCH):
    """The video's share of each patch, by a mix of white and black pictures."""
    if mixer in OPS:
        frames, _, height, width = model.encoder.config["num_frames"], *model.encoder.config["image_shape"]
        white = torch.ones(batch, frames, 1, height, width)
        pictures = mixed(model, white, torch.zeros_like(white))
        return [[sum(x) / len(x) for x in loop_patches(clip, model.encoder.layout)] for clip in pictures]
    return [[float(mixer != "audio_only")] * model.encoder.num_patches] * batch


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mixer", OPS)
def test_mixing_visible_patches_is_mixing_pictures(mixer, layout, channels, frames):
    model = autoencoder(mixer, frames, channels, layout)
    video, audio = clips(frames, channels)
    out = model(video, audio, KEYS)
    whole = patchify(to_wide(mixed(model, video, audio), layout), PATCH)
    expected = torch.where(out.mask[..., None], 0, whole)
    if mixer in ("cutmix", "pixel", "patch"):
        assert torch.equal(out.seen, expected)
    assert torch.allclose(out.seen, expected, rtol=0, atol=1e-6)
    loops = torch.tensor([loop_patches(clip, layout) for clip in mixed(model, video, audio)])
    assert torch.allclose(whole.double(), loops.double(), atol=1e-6)


def test_masks_and_mixes_are_unrelated():
    torch.manual_seed(0)
    encoder = ViTEncoder([1, 16, 16], 1, 4, 16, 1, 2)
    model = MaskedAutoencoder(encoder, CrossModalMixer("patch", patch_size=4), 12, 1, 3)
    keys = torch.arange(2000)
    mask = model(*clips(1, 1, 16, batch=2000), keys).mask
    kept = model.draw_mix(keys, torch.device("cpu")).mask[:, 0, ::4, ::4].flatten(1)
    assert float(kept[~mask].float().mean()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("ratio", "size", "visible"), [(0.75, 8, 2), (0.75, 16, 8), (0.9, 20, 5), (0.5, 12, 9), (0.05, 8, 7)]
)
def test_the_share_of_visible_patches_is_exact(ratio, size, visible):
    model = autoencoder(size=size, mask_ratio=ratio)
    mask = model(*clips(size=size), KEYS).mask
    assert mask.dtype == torch.bool and mask.shape == (BATCH, 2 * (size // 4) ** 2)
    assert set((~mask).sum(1).tolist()) == {visible} == {model.num_visible}


@pytest.mark.parametrize("mixer", ["patch", "none", "concat"])
def test_samples_have_masks_of_their_own_and_all_places_are_equally_often_visible(mixer):
    model = autoencoder(mixer, frames=1, size=16)
    mask = model(*clips(1, 1, 16, batch=2000), torch.arange(2000)).mask
    assert float((mask[1:] != mask[:-1]).any(1).float().mean()) > 0.99
    assert float((mask.float().mean(0) - 0.75).abs().max()) < 0.04


def test_tokens_are_placed_where_their_patches_were():
    model = autoencoder()
    order = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    tokens = torch.randn(3, 3, 12)
    placed = model._place(tokens, order)
    for sample, rank in itertools.product(range(3), range(8)):
        expected = tokens[sample, rank] if rank < 3 else model.mask_token[0, 0]
        assert torch.equal(placed[sample, order[sample, rank]], expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_decoder_finds_each_state_at_the_place_of_its_patch(layout):
    model = autoencoder("mixup", layout=layout)
    video, audio = clips()
    out, given = painted(model, video, audio)
    tokens = model.encoder.embed(model.encoder.patches(mixed(model, video, audio)))
    for sample in range(BATCH):
        places = torch.nonzero(~out.mask[sample])[:, 0]
        # Attention does not mind the order of its tokens.
        states = model.decoder_embedding(model.encoder.encode(tokens[sample : sample + 1, places]))[0]
        assert torch.allclose(given[sample, 0], states[0], atol=1e-5)
        expected = model.mask_token[0].expand(8, -1).clone()
        expected[places] = states[1:]
        assert torch.allclose(given[sample, 1:], expected + model.positions, atol=1e-5)


def test_concat_gives_both_streams_their_positions_and_their_own_embedding():
    model = autoencoder("concat")
    video, audio = clips()
    out, given = painted(model, video, audio)
    tokens = [model.encoder.embed(model.encoder.patches(clip)) for clip in (video, audio)]
    tokens = torch.cat([part + model.stream_embedding[i] for i, part in enumerate(tokens)], 1)
    for sample in range(BATCH):
        places = torch.nonzero(~out.mask[sample])[:, 0]
        assert len(places) == 4
        states = model.decoder_embedding(model.encoder.encode(tokens[sample : sample + 1, places]))[0]
        expected = model.mask_token[0].expand(16, -1).clone()
        expected[places] = states[1:]
        own = model.decoder_stream_embedding.expand(-1, 8, -1).flatten(0, 1)
        expected = expected + model.positions.repeat(2, 1) + own
        assert torch.allclose(given[sample, 1:], expected, atol=1e-5)
    both = torch.cat([model.encoder.patches(video), model.encoder.patches(audio)], 1)
    assert torch.equal(out.seen, torch.where(out.mask[..., None], 0, both))


@pytest.mark.parametrize("loss_on", LOSS_ON)
@pytest.mark.parametrize("mixer", ["cutmix", "mixup", "both", "patch", "none", "audio_only"])
def test_the_loss_is_that_of_a_loop_over_patches(mixer, loss_on):
    model = autoencoder(mixer, channels=3, layout="interleave", loss_on=loss_on)
    video, audio = clips(channels=3)
    out = model(video, audio, KEYS)
    expected = loop_losses(model, video, audio, out, shares(model, mixer))
    assert [out.loss_video.item(), out.loss_audio.item()] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mixer", ["concat", "alternate-0", "alternate-1"])
def test_the_loss_on_removed_patches_without_a_mix_is_that_of_a_loop(mixer):
    model = autoencoder(mixer)
    video, audio = clips()
    out = model(video, audio, KEYS, stream_of(mixer))
    expected = loop_losses(model, video, audio, out, shares(model, mixer))
    if mixer != "concat":
        expected[1 - stream_of(mixer)] = 0.0
        seen = model.encoder.patches((video, audio)[stream_of(mixer)])
        assert torch.equal(out.seen, torch.where(out.mask[..., None], 0, seen))
    assert [out.loss_video.item(), out.loss_audio.item()] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss_on", LOSS_ON)
def test_the_loss_of_standardised_targets_is_that_of_a_loop(loss_on):
    model = autoencoder("patch", norm_pix_loss=True, loss_on=loss_on)
    video, audio = clips()
    video, audio = 2 * video + 1, audio - 3
    out = model(video, audio, KEYS)
    expected = loop_losses(model, video, audio, out, shares(model, "patch"), norm=True)
    assert [out.loss_video.item(), out.loss_audio.item()] == pytest.approx(expected, rel=1e-5)


def test_errors_are_those_of_the_removed_patches_of_each_sample():
    model = autoencoder("mixup", loss_on="hidden")
    video, audio = clips()
    out = model(video, audio, KEYS)
    assert not out.errors.requires_grad
    for stream, (clip, guesses) in enumerate(((video, out.pred_video), (audio, out.pred_audio))):
        wanted = model.encoder.patches(clip)
        for sample, removed in enumerate(out.mask):
            error = (guesses[sample, removed] - wanted[sample, removed]).square().mean()
            assert out.errors[sample, stream].item() == pytest.approx(error.item(), rel=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0])
def test_the_sound_counts_by_its_weight(weight):
    out = autoencoder(audio_weight=weight)(*clips(), KEYS)
    assert out.loss.item() == pytest.approx(out.loss_video.item() + weight * out.loss_audio.item(), rel=1e-6)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "standardised"])
@pytest.mark.parametrize("mixer", ["cutmix", "mixup", *STREAMS])
def test_a_perfect_painting_costs_nothing_whatever_is_painted_where_patches_are_visible(mixer, norm):
    model = autoencoder(mixer, norm_pix_loss=norm)
    video, audio = clips()
    stream = stream_of(mixer)
    mask = model(video, audio, KEYS, stream).mask
    masks = mask.view(BATCH, 2, -1).unbind(1) if mixer == "concat" else (mask, mask)
    for name, clip, removed in zip(("video_head", "audio_head"), (video, audio), masks, strict=True):
        wanted = model.encoder.patches(clip)
        wanted = standardise_patches(wanted) if norm else wanted
        setattr(model, name, Painted(torch.where(removed[..., None], wanted, 100.0)))
    out = model(video, audio, KEYS, stream)
    assert out.loss.item() == 0 and not out.errors.any()


@pytest.mark.parametrize("loss_on", LOSS_ON)
def test_a_painting_matters_exactly_where_it_is_scored(loss_on):
    model = autoencoder("cutmix", loss_on=loss_on)
    out = model(*clips(), KEYS)
    share = torch.tensor(shares(model, "cutmix"))
    for guesses, strange in ((out.pred_video, 1 - share), (out.pred_audio, share)):
        gradient = torch.autograd.grad(out.loss, guesses, retain_graph=True)[0].abs().sum(2)
        replaced = ~out.mask & (strange > 0)
        expected = {"masked": out.mask, "hidden": out.mask | replaced, "replaced": replaced}[loss_on]
        assert torch.equal(gradient > 0, expected)
        assert bool(replaced.any())


@pytest.mark.parametrize(("mixer", "heard"), [("none", 0), ("audio_only", 1), ("alternate-0", 0), ("alternate-1", 1)])
def test_a_stream_that_is_not_seen_changes_neither_states_nor_the_loss_of_the_other(mixer, heard):
    model = autoencoder(mixer, loss_on="masked" if mixer.startswith("alternate") else "hidden")
    states = []
    model.encoder.norm.register_forward_hook(lambda *call: states.append(call[2]))
    pair, others = list(clips()), clips(seed=2)
    losses = [model(*pair, KEYS, stream_of(mixer))[1:3]]
    pair[1 - heard] = others[1 - heard]
    losses.append(model(*pair, KEYS, stream_of(mixer))[1:3])
    assert torch.equal(states[0], states[1])
    assert torch.equal(losses[0][heard], losses[1][heard])
    if mixer in ("none", "audio_only"):
        assert not torch.equal(losses[0][1 - heard], losses[1][1 - heard])
    else:
        assert losses[0][1 - heard] == losses[1][1 - heard] == 0


def test_standardised_patches_have_mean_0_and_variance_1():
    patches = standardise_patches(torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(0)) * 7 + 2)
    assert float(patches.mean(-1).abs().max()) < 1e-5
    assert torch.allclose(patches.var(-1), torch.ones(3, 5), atol=1e-5)
    assert bool((standardise_patches(torch.full((2, 16), 3.0)) == 0).all())


def test_a_weighted_mean_is_of_each_row_by_itself_and_0_without_weights():
    errors, weights = torch.tensor([[1.0, 2, 4], [5, 5, 5]]), torch.tensor([[1.0, 0, 0.5], [0, 0, 0]])
    assert weighted_mean(errors, weights).tolist() == [2, 0]


@pytest.mark.parametrize("mixer", ["cutmix", "mixup", "pixel", *STREAMS])
def test_a_sample_is_painted_by_its_key_whatever_the_rest_of_the_batch(mixer):
    model = autoencoder(mixer)
    video, audio = clips()
    order = torch.tensor([3, 0, 4, 2, 1])
    out = model(video, audio, KEYS, stream_of(mixer))
    again = model(video[order], audio[order], KEYS[order], stream_of(mixer))
    assert torch.equal(again.mask, out.mask[order]) and torch.equal(again.seen, out.seen[order])
    for name in ("pred_video", "pred_audio", "errors"):
        assert torch.allclose(getattr(again, name), getattr(out, name)[order], atol=1e-5)
    alone = model(video[2:3], audio[2:3], KEYS[2:3], stream_of(mixer))
    assert torch.equal(alone.seen, out.seen[2:3])
    assert not torch.equal(model(video, audio, KEYS + 1, stream_of(mixer)).mask, out.mask)


def test_without_keys_the_seed_of_torch_decides():
    model = autoencoder()
    first, again, other = (torch.manual_seed(seed) and model(*clips()).seen for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_clips_come_back_from_their_patches(layout, frames):
    model = autoencoder(frames=frames, channels=3, layout=layout)
    video = clips(frames, 3)[0]
    assert torch.equal(model.to_clips(model.encoder.patches(video)), video)


@pytest.mark.parametrize("mixer", ["cutmix", "mixup", "both", *STREAMS])
def test_autocast_to_bfloat16_gives_a_finite_float32_loss(mixer):
    model = autoencoder(mixer, norm_pix_loss=True)
    plain = model(*clips(), KEYS, stream_of(mixer)).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*clips(), KEYS, stream_of(mixer)).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain.item(), rel=0.02)
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())


@pytest.mark.parametrize("mixer", ["cutmix", "mixup", "both", "pixel", "patch", *STREAMS])
def test_every_parameter_has_a_gradient_which_is_0_for_the_head_of_a_stream_that_is_not_painted(mixer):
    model = autoencoder(mixer)
    model(*clips(), KEYS, stream_of(mixer)).loss.backward()
    idle = {"alternate-0": "audio_head", "alternate-1": "video_head"}.get(mixer, "no head")
    for name, parameter in model.named_parameters():
        assert bool(parameter.grad.any()) != name.startswith(idle), name


@pytest.mark.parametrize("mixer", ["cutmix", "concat"])
def test_a_few_pairs_can_be_learnt_by_heart(mixer):
    model = autoencoder(mixer, hidden_size=32, num_heads=4)
    video, audio = clips(batch=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    first = model(video, audio, KEYS[:4]).loss.item()
    for _ in range(110):
        optimizer.zero_grad()
        model(video, audio, KEYS[:4]).loss.backward()
        optimizer.step()
    assert model(video, audio, KEYS[:4]).loss.item() < 0.1 * first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio must be at least 0 and below 1, got 1.0"),
        ({"mask_ratio": -0.1}, "mask_ratio must be at least 0 and below 1, got -0.1"),
        ({"mask_ratio": 0.0}, "removes none of 8 patches: nothing is scored"),
        ({"loss_on": "visible"}, "loss_on must be one of masked, hidden, replaced, got 'visible'"),
        ({"mixer": "cut"}, "mixer must be a CrossModalMixer or one of none, audio_only, alternate, concat, got 'cut'"),
        ({"audio_weight": -1.0}, "audio_weight must be finite and not negative, got -1.0"),
        ({"hidden_size": 18}, "multiple of 4, got 18"),
        ({"num_heads": 5}, "5 heads cannot share a hidden_size of 12"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        autoencoder(**options)


def test_clips_of_another_shape_are_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"clips \(batch, 2, 1, 8, 8\).*got \(5, 3, 1, 8, 8\)"):
        autoencoder()(*clips(frames=3), KEYS)


@pytest.mark.parametrize("mixer", ["alternate", "concat"])
@pytest.mark.parametrize("loss_on", ["hidden", "replaced"])
def test_streams_that_replace_nothing_are_scored_where_masked_only(mixer, loss_on):
    with pytest.raises(ValueError, match=f"loss_on='{loss_on}' has no meaning for '{mixer}'"):
        autoencoder(mixer, loss_on=loss_on)


@pytest.mark.parametrize("stream", [None, 2])
def test_alternating_needs_to_know_its_stream(stream):
    with pytest.raises(ValueError, match=f"0 for video or 1 for sound, got {stream}"):
        autoencoder("alternate")(*clips(), KEYS, stream)


@pytest.mark.parametrize("keys", [KEYS[:1], KEYS.int()], ids=["too few", "int32"])
def test_keys_must_be_one_whole_number_a_sample(keys):
    with pytest.raises(ValueError, match="keys must be int64 of shape"):
        autoencoder("none")(*clips(), keys)


def test_streams_of_different_shapes_are_refused_by_the_network_too():
    video, audio = clips()
    with pytest.raises(ValueError, match="audio must be rendered to the frame size"):
        autoencoder("none")(video, audio[..., :-1], KEYS)


def test_blocks_of_patches_are_hidden_together():
    encoder = ViTEncoder([1, 16, 16], 1, patch_size=2, hidden_size=8, num_layers=1, num_heads=2)
    model = MaskedAutoencoder(encoder, "none", 8, 1, 2, mask_block=4)
    keys = torch.randint(2**62, (64,), generator=torch.Generator().manual_seed(0))
    order = model.random_order(keys, encoder.num_patches, torch.device("cpu"))
    seen = torch.zeros(64, 64, dtype=torch.bool).scatter_(1, order[:, : model.num_visible], True).view(64, 2, 4, 2, 4)
    shares = seen.float().mean((2, 4)).flatten(1)
    assert shares.sort(1).values.tolist() == [[0, 0, 0, 1]] * 64, "one of four blocks is visible, all of it"
    assert len(set(shares.argmax(1).tolist())) == 4
    with pytest.raises(ValueError, match="mask_block must be at least 1, got 0"):
        MaskedAutoencoder(encoder, "none", 8, 1, 2, mask_block=0)
