"""MixerMAE: what it trains and logs, what it paints, and the encoder that it leaves."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.zoo.cmmixer.small_clips import (
    ENCODER,
    FRAMES,
    PATCH,
    SHAPE,
    WIDTH,
    EachStep,
    at,
    batches,
    clips,
    equal,
    fit,
    fresh_encoder,
    loader,
    numbers,
    trainer,
    uneven,
    weights,
)
from zoo.cmmixer.export import load_encoder, save_encoder
from zoo.cmmixer.masked_autoencoder import standardise_patches
from zoo.cmmixer.mixer import OPS, apply_mix
from zoo.cmmixer.module import MixerMAE

if TYPE_CHECKING:
    from pathlib import Path

EVERY_OP = (*OPS, "none", "audio_only", "alternate", "concat")
TRAIN = ("train/loss", "train/loss_video", "train/loss_audio")


def build(**options: Any) -> MixerMAE:
    torch.manual_seed(0)
    return MixerMAE(**{**ENCODER, "lr": 1e-3, "warmup_epochs": 0, **options})


@pytest.mark.parametrize("op", EVERY_OP)
def test_every_op_trains_and_logs_both_losses(op: str, tmp_path: Path) -> None:
    module = build(op=op, audio_weight=0.5)
    before = weights(module.autoencoder)
    watch = EachStep(lambda module: numbers(module.trainer.logged_metrics))
    fit(module, batches(3), tmp_path, callbacks=[watch])
    for seen in watch.seen[1:]:
        assert all(math.isfinite(seen[name]) for name in TRAIN)
        expected = seen["train/loss_video"] + 0.5 * seen["train/loss_audio"]
        assert seen["train/loss"] == pytest.approx(expected, rel=1e-5)
    after = weights(module.autoencoder)
    assert all(not torch.equal(after[name], before[name]) for name in before)
    assert all(bool(value.isfinite().all()) for value in after.values())


def test_the_logged_losses_are_those_of_the_batch(tmp_path: Path) -> None:
    module, batch = build(lr=1e-9), clips()
    with torch.no_grad():
        expected = module.autoencoder(batch.video, batch.audio, batch.keys)
    running = fit(module, [batch], tmp_path)
    logged = numbers(running.logged_metrics)
    for name in ("loss", "loss_video", "loss_audio"):
        assert logged[f"train/{name}"] == pytest.approx(float(getattr(expected, name)), rel=1e-4)


def test_streams_alternate_by_the_batch_s_number(tmp_path: Path) -> None:
    module = build(op="alternate")
    watch = EachStep(lambda module: numbers(module.trainer.logged_metrics))
    fit(module, batches(4), tmp_path, callbacks=[watch])
    painted = [(seen["train/loss_video"] > 0, seen["train/loss_audio"] > 0) for seen in watch.seen[1:]]
    assert painted == [(True, False), (False, True)] * 2


@pytest.mark.parametrize("op", ["cutmix", "alternate", "concat"])
def test_validation_logs_losses_and_psnr_of_hidden_patches(op: str, tmp_path: Path) -> None:
    module, parts = uneven(build(op=op)), [clips(4, 0), clips(3, 1)]
    (found,) = trainer(tmp_path).validate(module, loader(parts), verbose=False)
    sums: dict[str, float] = dict.fromkeys(
        ("val/loss", "val/loss_video", "val/loss_audio", "val/psnr_video", "val/psnr_audio"), 0.0
    )
    assert found.keys() == sums.keys()
    with torch.no_grad():
        for batch in parts:
            streams = (0, 1) if op == "alternate" else (None,)
            outs = [module.autoencoder(batch.video, batch.audio, batch.keys, stream) for stream in streams]
            for name in ("loss", "loss_video", "loss_audio"):
                sums[f"val/{name}"] += sum(float(getattr(out, name)) for out in outs) * len(batch.keys)
            for part, name in enumerate(("video", "audio")):
                out = outs[part if len(outs) > 1 else 0]
                stream = getattr(batch, name)
                wanted, painted = module.encoder.patches(stream), (out.pred_video, out.pred_audio)[part]
                patches = module.encoder.num_patches
                mask = out.mask[:, part * patches : (part + 1) * patches] if op == "concat" else out.mask
                for row in range(len(stream)):
                    hidden = mask[row]
                    error = float((painted[row][hidden] - wanted[row][hidden]).square().mean())
                    peak = float(stream[row].max() - stream[row].min())
                    sums[f"val/psnr_{name}"] += 10 * math.log10(peak**2 / error)
    assert numbers(found) == pytest.approx({name: value / 7 for name, value in sums.items()}, rel=1e-4)


def test_silence_has_no_psnr_and_spoils_none(tmp_path: Path) -> None:
    module, batch = uneven(build()), clips(4)
    silent = batch._replace(audio=batch.audio.clone())
    silent.audio[1] = -0.7
    (found,) = trainer(tmp_path).validate(module, loader([silent]), verbose=False)
    kept = torch.tensor([0, 2, 3])
    (wanted,) = trainer(tmp_path).validate(
        module, loader([type(batch)(*(field[kept] for field in silent))]), verbose=False
    )
    assert found["val/psnr_audio"] == pytest.approx(wanted["val/psnr_audio"], rel=1e-5)
    assert math.isfinite(found["val/psnr_video"])


def test_a_prediction_of_nan_counts_as_the_worst(tmp_path: Path) -> None:
    module, parts = build(), [clips(4, 0), clips(4, 1)]
    forward = module.autoencoder.forward

    def broken(video: Any, audio: Any, keys: Any, stream: Any) -> Any:
        out = forward(video, audio, keys, stream)
        wrong = torch.nan if torch.equal(video, parts[1].video) else 1.0
        return out._replace(loss=out.loss * wrong, errors=out.errors * wrong)

    module.autoencoder.forward = broken  # type: ignore[method-assign, assignment]
    (found,) = trainer(tmp_path).validate(module, loader(parts), verbose=False)
    assert found["val/loss"] == math.inf and math.isfinite(found["val/loss_video"])
    assert found["val/psnr_video"] == found["val/psnr_audio"] == -math.inf


def test_standardised_targets_have_no_psnr(tmp_path: Path) -> None:
    (found,) = trainer(tmp_path).validate(build(norm_pix_loss=True), loader(batches(1)), verbose=False)
    assert set(found) == {"val/loss", "val/loss_video", "val/loss_audio"}


def test_a_test_logs_the_same_and_draws(tmp_path: Path) -> None:
    module, parts = build(), batches(2)
    (val,) = trainer(tmp_path).validate(module, loader(parts), verbose=False)
    (test,) = trainer(tmp_path).test(module, loader(parts), verbose=False)
    assert numbers(test) == pytest.approx({name.replace("val/", "test/"): value for name, value in val.items()})
    assert (tmp_path / "figures" / "test" / "reconstruction.png").is_file()


@pytest.mark.parametrize("export", [False, True])
def test_the_encoder_is_written_when_the_training_ends(
    export: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "elsewhere" / "stage"
    module = build(export=str(folder) if export else None)
    with caplog.at_level(logging.INFO, "zoo.cmmixer.module"):
        fit(module, batches(2), tmp_path / "run")
    written = (folder if export else tmp_path / "run") / "encoder"
    assert [path.parent for path in tmp_path.rglob("*.safetensors")] == [written]
    assert str(written) in caplog.text
    loaded, batch = load_encoder(written), clips()
    assert equal(weights(loaded), weights(module.encoder)) and loaded.config == module.encoder.config
    assert torch.equal(loaded(batch.video), module.encoder(batch.video))


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    module = build(export=str(tmp_path / "stage"))
    fit(module, batches(2), tmp_path / "run", batches(2), fast_dev_run=True)
    trainer(tmp_path / "run", fast_dev_run=True).test(module, loader(batches(1)), verbose=False)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("layout", ["concat", "interleave"])
@pytest.mark.parametrize("op", ["patch", "none", "audio_only", "alternate", "concat"])
def test_what_is_reconstructed_is_nan_exactly_where_it_was_hidden(op: str, layout: str) -> None:
    module, batch = build(op=op, layout=layout), clips(5)
    shown = module.reconstruct(batch, 3)
    visible = "visible_sound" if op == "audio_only" else "visible"
    more = {"patch": {"mix"}, "concat": {"visible_sound"}}.get(op, set())
    names = {"video", "audio", visible, "pred_video", "pred_audio"} | more
    assert shown.keys() == names
    assert all(part.shape == (3, FRAMES, *SHAPE) and part.dtype == torch.float32 for part in shown.values())
    video, audio, keys = batch.video[:3], batch.audio[:3], batch.keys[:3]
    assert torch.equal(shown["video"], video) and torch.equal(shown["audio"], audio)
    auto = module.autoencoder
    with torch.no_grad():
        out = auto(video, audio, keys, 0)
    patches = auto.encoder.num_patches
    hidden = auto.to_clips(out.mask[:, :patches, None].expand(-1, -1, PATCH**2).float()).bool()
    assert torch.equal(shown[visible].isnan(), hidden) and 0 < int(hidden.sum()) < hidden.numel()
    if op != "concat":
        assert int(hidden.sum()) == 3 * (patches - patches // 4) * PATCH**2
    source = audio if op == "audio_only" else video
    if op == "patch":
        source = apply_mix(video, audio, auto.draw_mix(keys, video.device))  # type: ignore[arg-type]
        assert torch.equal(shown["mix"], source)
    assert torch.equal(shown[visible][~hidden], source[~hidden])
    torch.testing.assert_close(shown["pred_video"], auto.to_clips(out.pred_video))
    if op == "alternate":
        with torch.no_grad():
            out = auto(video, audio, keys, 1)
    torch.testing.assert_close(shown["pred_audio"], auto.to_clips(out.pred_audio))
    assert len(module.reconstruct(batch)["video"]) == 5


def test_perfect_standardised_predictions_are_shown_as_the_originals() -> None:
    module, batch = build(norm_pix_loss=True), clips(3)
    batch = batch._replace(audio=3 * batch.audio + 2)
    forward = module.autoencoder.forward

    def perfect(video: Any, audio: Any, keys: Any, stream: Any) -> Any:
        wanted = [standardise_patches(module.encoder.patches(part)) for part in (video, audio)]
        return forward(video, audio, keys, stream)._replace(pred_video=wanted[0], pred_audio=wanted[1])

    module.autoencoder.forward = perfect  # type: ignore[method-assign, assignment]
    shown = module.reconstruct(batch)
    torch.testing.assert_close(shown["pred_video"], batch.video, rtol=0, atol=1e-5)
    torch.testing.assert_close(shown["pred_audio"], batch.audio, rtol=0, atol=1e-5)


def test_the_rate_warms_up_by_epochs_and_falls_to_its_floor(tmp_path: Path) -> None:
    module = build(lr=1e-2, min_lr=1e-3, warmup_epochs=1.5)
    rates = EachStep(lambda module: module.optimizers().param_groups[0]["lr"])
    fit(module, batches(4), tmp_path, max_epochs=5, callbacks=[rates])
    warmup, total = 6, 20
    expected = []
    for step in range(1, total + 1):
        way = (step - warmup) / (total - warmup)
        cosine = 1e-3 + 9e-3 * 0.5 * (1 + math.cos(math.pi * way))
        expected.append(1e-2 * (step + 1) / (warmup + 1) if step < warmup else cosine)
    assert rates.seen[1:] == pytest.approx(expected) and rates.seen[-1] == pytest.approx(1e-3)


def test_accumulated_batches_are_one_step_of_the_warm_up(tmp_path: Path) -> None:
    module = build(lr=1e-2, warmup_epochs=1)
    fit(module, batches(4), tmp_path, max_epochs=3, accumulate_grad_batches=2)
    assert module._schedule.warmup_steps == 2 and module._schedule.total_steps == 6


def test_the_optimizer_has_the_published_betas_and_decays_matrices_only() -> None:
    module = build(lr=2e-3, weight_decay=0.1)
    optimizer: Any = module.configure_optimizers()
    groups = optimizer["optimizer"].param_groups
    assert all(group["betas"] == (0.9, 0.95) and group["lr"] == 2e-3 for group in groups)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay.keys() == {id(p) for p in module.parameters()}
    for name, parameter in module.named_parameters():
        plain = parameter.ndim == 1 or name.endswith("cls_token")
        assert decay[id(parameter)] == (0.0 if plain else 0.1), name


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"audio": 300 * torch.rand(4, FRAMES, *SHAPE)}, "audio has values up to .* normalise first"),
        ({"video": torch.full((4, FRAMES, *SHAPE), torch.nan)}, "video has values that are NaN or infinite"),
        ({"audio": torch.zeros(4, FRAMES, 1, 16, 8)}, r"audio \(4, 2, 1, 16, 8\): audio must be rendered to the frame"),
        ({"video": torch.zeros(4, FRAMES, *SHAPE, dtype=torch.uint8)}, "video is torch.uint8: normalise first"),
    ],
    ids=["decibels", "nan", "shape", "bytes"],
)
def test_wrong_streams_are_refused_in_the_first_batch(
    change: dict[str, Any], pattern: str, stage: str, tmp_path: Path
) -> None:
    module, parts = build(), [clips()._replace(**change)]
    with pytest.raises(ValueError, match=pattern):
        at(stage, module, parts, tmp_path)


def test_frames_of_another_size_than_the_encoder_s_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the encoder is for clips \(batch, 2, 1, 16, 16\).* got \(4, 2, 1, 16, 8\)"):
        fit(build(), batches(1, shape=[1, 16, 8]), tmp_path)


def test_predicted_features_are_means_of_the_encoder_s_states(tmp_path: Path) -> None:
    module, parts = uneven(build()), batches(2)
    found: Any = trainer(tmp_path).predict(module, loader(parts))
    module.eval()
    for part, batch in zip(found, parts, strict=True):
        assert torch.equal(part["pair_ids"], batch.pair_ids)
        for name in ("video", "audio"):
            states = module.encoder(getattr(batch, name))
            assert part[name].shape == (4, WIDTH) and part[name].dtype == torch.float32
            torch.testing.assert_close(part[name], states[:, 1:].mean(1).detach())


def test_a_checkpoint_alone_gives_the_same_outputs(tmp_path: Path) -> None:
    module = build(op="patch", mixer_options={"granularity": "video"}, decoder_options={"num_layers": 2})
    fit(module, batches(2), tmp_path).save_checkpoint(tmp_path / "last.ckpt")
    loaded, batch = MixerMAE.load_from_checkpoint(tmp_path / "last.ckpt"), clips(seed=9)
    assert loaded.hparams == module.hparams
    first, second = (part(batch.video, batch.audio, batch.keys) for part in (module, loaded))
    for name, value in first._asdict().items():
        assert torch.equal(value, getattr(second, name)), name


def test_training_goes_on_from_an_earlier_export(tmp_path: Path) -> None:
    encoder = fresh_encoder()
    save_encoder(encoder, tmp_path)
    options = {**ENCODER, "encoder": None, "encoder_options": None, "patch_size": None, "decoder": "tiny"}
    module = MixerMAE(**options, init_from=str(tmp_path))
    assert equal(weights(module.encoder), weights(encoder))


def test_the_decoder_follows_the_encoder_s_name_unless_it_has_one() -> None:
    assert build().autoencoder.mask_token.shape[-1] == 48
    module = build(decoder="base", decoder_options={"hidden_size": 32, "num_heads": 2, "num_layers": 3})
    assert module.autoencoder.mask_token.shape[-1] == 32 and len(module.autoencoder.decoder_blocks) == 3


def test_the_mixer_s_patches_are_the_encoder_s_unless_given() -> None:
    assert build(op="patch").autoencoder.mixer.patch_size == (PATCH, PATCH)  # type: ignore[union-attr]
    module = build(op="patch", mixer_options={"patch_size": [16, 8]})
    assert module.autoencoder.mixer.patch_size == (16, 8)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"lr": 0.0}, "lr must be positive, .* got 0.0"),
        ({"lr": 1e-3, "min_lr": 2e-3}, "min_lr from 0 to lr, got 0.001 and 0.002"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative, got -1.0"),
        ({"warmup_epochs": -1}, "warmup_epochs must not be negative, got -1"),
        ({"op": "blend"}, "op must be one of cutmix, .* concat, got 'blend'"),
        ({"op": "none", "mixer_options": {"alpha": 2.0}}, "op='none' mixes nothing: mixer_options alpha"),
        ({"mixer_options": {"beta": 2.0}}, "mixer_options: .*beta"),
        ({"mixer_options": {"alpha": -2.0}}, "alpha must be positive.* got -2.0"),
        ({"op": "patch", "mixer_options": {"patch_size": 5}}, "patches of 5 x 5 do not tile frames of 16 x 16"),
        ({"mask_ratio": 1.0}, "mask_ratio .* got 1.0"),
        ({"loss_on": "all"}, "loss_on must be one of masked, hidden, replaced, got 'all'"),
        ({"encoder": "small"}, "encoder must be one of tiny, .* got 'small'"),
        ({"encoder_options": {"depth": 2}}, "unknown option 'depth'"),
        ({"decoder": "small"}, "decoder must be one of tiny, .* got 'small'"),
        ({"layout": "rows"}, "layout must be one of concat, interleave, got 'rows'"),
        ({"patch_size": 5}, "16 columns cannot be cut into patches of 5 x 5"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_an_argument_out_of_its_range_is_refused_by_name(options: dict[str, Any], pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        build(**options)
