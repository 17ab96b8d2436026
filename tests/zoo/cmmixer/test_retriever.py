"""AVRetriever: two towers from one encoder, their training, and what they find."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F

from tests.zoo.cmmixer.small_clips import (
    ENCODER,
    FRAMES,
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
from zoo.cmmixer.export import load_encoder
from zoo.cmmixer.losses import triplet_loss
from zoo.cmmixer.module import MixerMAE
from zoo.cmmixer.retriever import AVRetriever
from zoo.cmmixer.towers import PROJECTORS, DualTower, build_projector

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

DIM = 8


def build(**options: Any) -> AVRetriever:
    torch.manual_seed(0)
    return AVRetriever(**{**ENCODER, "proj_dim": DIM, "lr": 1e-2, **options})


def from_folder(folder: Path, **options: Any) -> AVRetriever:
    sizes = {"encoder": None, "encoder_options": None, "patch_size": None}
    return build(**{**sizes, "init_from": str(folder), **options})


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[MixerMAE, Path]:
    """An autoencoder after some steps, and the folder of its encoder."""
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(1)
    module = MixerMAE(**ENCODER, lr=1e-2, warmup_epochs=0)
    fit(module, batches(3), folder)
    return module.eval(), folder / "encoder"


def contrast_by_hand(video: Tensor, audio: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """NT-Xent item by item, in float64."""
    items, names = torch.cat([video, audio]).detach().double(), torch.cat([ids, ids])
    rows, losses = len(ids), []
    for i in range(2 * rows):
        partner = (i + rows) % (2 * rows)
        scores = [float(items[i] @ items[j]) / temperature for j in range(2 * rows)]
        kept = [scores[j] for j in range(2 * rows) if j == partner or names[j] != names[i]]
        losses.append(math.log(sum(math.exp(score) for score in kept)) - scores[partner])
    return torch.tensor(losses).mean()


def test_both_towers_start_from_the_exported_encoder(pretrained: tuple[MixerMAE, Path]) -> None:
    mae, folder = pretrained
    module, batch = from_folder(folder).eval(), clips(seed=5)
    assert module.towers.video_encoder.config == mae.encoder.config
    with torch.no_grad():
        for stream in (batch.video, batch.audio):
            states = mae.encoder(stream)
            for tower in (module.towers.video_encoder, module.towers.audio_encoder):
                assert float((tower(stream) - states).abs().max()) == 0
    assert not equal(weights(build().towers.video_encoder), weights(mae.encoder))


def test_two_towers_are_different_tensors_that_part_in_the_first_step(
    pretrained: tuple[MixerMAE, Path], tmp_path: Path
) -> None:
    module = from_folder(pretrained[1])
    first, second = module.towers.encoders
    assert first is module.towers.video_encoder and second is module.towers.audio_encoder
    assert equal(weights(first), weights(second))
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    assert all(one.data_ptr() != other.data_ptr() for one, other in pairs)
    fit(module, batches(1), tmp_path)
    assert all(not torch.equal(one, other) for one, other in pairs)


def test_a_shared_encoder_is_one_and_stays_one(pretrained: tuple[MixerMAE, Path], tmp_path: Path) -> None:
    module = from_folder(pretrained[1], share_encoder=True)
    assert module.towers.video_encoder is module.towers.audio_encoder and len(module.towers.encoders) == 1
    before = weights(module.towers.video_encoder)
    fit(module, batches(1), tmp_path)
    assert module.towers.video_encoder is module.towers.audio_encoder
    assert not equal(weights(module.towers.video_encoder), before)
    assert not equal(weights(module.towers.video_head), weights(module.towers.audio_head))


@pytest.mark.parametrize("share", [False, True])
def test_frozen_encoders_stay_bit_by_bit_while_the_heads_learn(
    share: bool, pretrained: tuple[MixerMAE, Path], tmp_path: Path
) -> None:
    module = from_folder(pretrained[1], freeze_encoder=True, share_encoder=share)
    heads = [weights(head) for head in (module.towers.video_head, module.towers.audio_head)]
    fit(module, batches(3), tmp_path)
    for encoder in module.towers.encoders:
        assert equal(weights(encoder), weights(pretrained[0].encoder))
        assert not any(parameter.requires_grad for parameter in encoder.parameters())
    for head, before in zip((module.towers.video_head, module.towers.audio_head), heads, strict=True):
        assert all(not torch.equal(value, before[name]) for name, value in weights(head).items())


def test_a_trainable_encoder_and_both_heads_learn_in_every_weight(tmp_path: Path) -> None:
    module = build()
    before = weights(module)
    fit(module, batches(2), tmp_path)
    assert [name for name, value in weights(module).items() if torch.equal(value, before[name])] == ["transferred"]


@pytest.mark.parametrize("loss", ["nt_xent", "infonce", "triplet"])
def test_the_training_loss_is_that_of_the_embeddings_and_pair_ids(loss: str, tmp_path: Path) -> None:
    module, batch = build(loss=loss, temperature=0.3, margin=0.4), clips(5)
    uneven(module.towers)
    batch = batch._replace(pair_ids=torch.tensor([3, 8, 3, 1, 5]))
    with torch.no_grad():
        video, audio = module(batch.video, batch.audio)
    running = fit(module, [batch], tmp_path)
    if loss == "nt_xent":
        expected = contrast_by_hand(video, audio, batch.pair_ids, 0.3)
    elif loss == "triplet":
        expected = triplet_loss(video, audio, 0.4, batch.pair_ids)
    else:
        scores = (video @ audio.T / 0.3).double()
        same = (batch.pair_ids[:, None] == batch.pair_ids) & ~torch.eye(5, dtype=torch.bool)
        scores = scores.masked_fill(same, -torch.inf)
        expected = -(scores.log_softmax(1).diagonal() + scores.log_softmax(0).diagonal()).mean() / 2
    logged = numbers(running.logged_metrics)
    assert logged["train/loss"] == pytest.approx(float(expected), rel=1e-5)
    assert logged["train/temperature"] == pytest.approx(0.3)


def test_embeddings_have_unit_length_and_each_stream_its_own_tower() -> None:
    module, batch = uneven(build()), clips(3)
    towers = module.towers
    for found, clip, encoder, head in (
        (module.encode_video(batch.video), batch.video, towers.video_encoder, towers.video_head),
        (module.encode_audio(batch.audio), batch.audio, towers.audio_encoder, towers.audio_head),
    ):
        expected = head(encoder(clip)[:, 1:].mean(1))
        torch.testing.assert_close(found, expected / expected.norm(dim=1, keepdim=True))
        assert found.shape == (3, DIM)
    both = module(batch.video, batch.audio)
    assert torch.equal(both[0], module.encode_video(batch.video))
    assert torch.equal(both[1], module.encode_audio(batch.audio))
    assert not torch.allclose(module.encode_audio(batch.video), both[0])


def test_cls_pooling_embeds_the_first_state() -> None:
    towers, batch = uneven(DualTower(fresh_encoder(), pool="cls", projector="linear", proj_dim=DIM)), clips(3)
    states = towers.video_encoder(batch.video)
    torch.testing.assert_close(towers.encode_video(batch.video), F.normalize(towers.video_head(states[:, 0]), dim=1))


@pytest.mark.parametrize("kind", PROJECTORS)
def test_every_projector_has_its_layers_and_trains(kind: str, tmp_path: Path) -> None:
    names = {
        "linear_relu": ["Linear", "ReLU"],
        "linear": ["Linear"],
        "linear_bn": ["Linear", "BatchNorm1d"],
        "mlp": ["Linear", "GELU", "Linear"],
    }
    module: Any = build_projector(kind, WIDTH, DIM)
    assert [type(layer).__name__ for layer in module] == names[kind]
    assert module(torch.randn(4, WIDTH)).shape == (4, DIM)
    running = fit(build(projector=kind), batches(2), tmp_path)
    assert math.isfinite(float(running.logged_metrics["train/loss"]))


def test_under_autocast_the_heads_stay_float32() -> None:
    towers, batch, seen = DualTower(fresh_encoder(), proj_dim=DIM), clips(3), []
    towers.video_head.register_forward_hook(lambda head, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = towers.encode_video(batch.video)
    assert seen == [(torch.float32, torch.float32)]
    assert found.dtype == torch.float32
    # Numbers that bfloat16 does not have.
    assert not torch.equal(found, found.bfloat16().float())
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(found, towers.encode_video(batch.video), rtol=0, atol=0.05)


def temperatures(module: Any) -> float:
    return float(module.temperature.detach())


@pytest.mark.parametrize("start", [0.01, 0.07, 1.0])
@pytest.mark.parametrize("pushed", ["colder", "warmer"])
def test_a_learnable_temperature_moves_within_its_range_and_comes_back(
    start: float, pushed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module, step = build(temperature=start, lr=0.5), [0]
    assert module.temperature.item() == pytest.approx(start)

    def pull(video: Tensor, audio: Tensor, kind: str, temperature: Tensor, *_: Any) -> Tensor:
        step[0] += 1
        towards = 1 if (pushed == "colder") == (step[0] <= 20) else -1
        return towards * temperature.log() + 0 * (video.sum() + audio.sum())

    monkeypatch.setattr("zoo.cmmixer.retriever.retrieval_loss", pull)
    watch = EachStep(temperatures)
    # A schedule without an end keeps its rate.
    fit(module, batches(1) * 60, tmp_path, max_epochs=-1, max_steps=60, callbacks=[watch])
    assert all(0.01 * (1 - 1e-6) <= value <= 1 + 1e-6 for value in watch.seen)
    assert watch.seen[20] == pytest.approx(0.01 if pushed == "colder" else 1.0)
    assert 0.05 < watch.seen[-1] < 0.2


def test_the_contrast_moves_the_temperature(tmp_path: Path) -> None:
    module = build(temperature=0.07)
    watch = EachStep(temperatures)
    fit(module, batches(3), tmp_path, callbacks=[watch])
    assert len(set(watch.seen)) == 4 and all(0.01 <= value <= 1 for value in watch.seen)


@pytest.mark.parametrize("options", [{"loss": "triplet"}, {"learnable_temperature": False}], ids=["triplet", "fixed"])
def test_a_temperature_that_is_not_learned_is_in_no_optimizer_and_stays(
    options: dict[str, Any], tmp_path: Path
) -> None:
    module = build(temperature=0.2, **options)
    running = fit(module, batches(2), tmp_path)
    trained = {id(p) for group in running.optimizers[0].param_groups for p in group["params"]}
    assert id(module.log_temperature) not in trained
    assert module.temperature.item() == pytest.approx(0.2)
    learned = fit(build(), batches(1), tmp_path)
    names = {id(p): group["weight_decay"] for group in learned.optimizers[0].param_groups for p in group["params"]}
    assert names[id(learned.lightning_module.log_temperature)] == 0


@pytest.mark.parametrize("loss", ["nt_xent", "infonce", "triplet"])
def test_a_batch_of_one_pair_is_refused(loss: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 2 pairs in a batch, got 1"):
        fit(build(loss=loss), batches(1, rows=1), tmp_path)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_relevance_of_labels_needs_labels(stage: str, tmp_path: Path) -> None:
    batch = clips()
    batch.labels[2] = -1
    with pytest.raises(ValueError, match=r"relevance='label' needs labels, .* use relevance='pair'"):
        getattr(trainer(tmp_path), stage)(build(relevance="label"), loader([batch]), verbose=False)
    (found,) = getattr(trainer(tmp_path), stage)(build(), loader([batch]), verbose=False)
    assert found[f"{'val' if stage == 'validate' else 'test'}/gallery_size"] == 4


def names(stage: str, ks: tuple[int, ...]) -> set[str]:
    cut = [f"r@{k}" for k in ks]
    directions = [f"{way}/{name}" for way in ("v2a", "a2v") for name in (*cut, "mdr", "mrr", "map")]
    return {f"{stage}/{name}" for name in (*directions, "map", "gallery_size", *(f"chance@{k}" for k in ks))}


@pytest.mark.parametrize("relevance", ["pair", "label"])
def test_the_gallery_of_an_evaluation_is_the_whole_set(relevance: str, tmp_path: Path) -> None:
    module, parts = uneven(build(relevance=relevance, ks=[1, 3], projector="linear")), [clips(4, 0), clips(3, 1)]
    (val,) = trainer(tmp_path).validate(module, loader(parts), verbose=False)
    (test,) = trainer(tmp_path).test(module, loader(parts), verbose=False)
    assert val.keys() == names("val", (1, 3)) and test.keys() == names("test", (1, 3))
    assert list(val.values()) == list(test.values())
    assert val["val/gallery_size"] == 7
    module.eval()
    with torch.no_grad():
        video, audio = (torch.cat(vectors) for vectors in zip(*(module(p.video, p.audio) for p in parts), strict=True))
    ids = torch.cat([part.labels if relevance == "label" else part.pair_ids for part in parts])
    for way, scores in (("v2a", video @ audio.T), ("a2v", audio @ video.T)):
        best = []
        for query in range(7):
            order = scores[query].argsort(descending=True).tolist()
            best.append(1 + next(place for place, found in enumerate(order) if ids[found] == ids[query]))
        for k in (1, 3):
            assert val[f"val/{way}/r@{k}"] == pytest.approx(sum(rank <= k for rank in best) / 7)
        assert val[f"val/{way}/mrr"] == pytest.approx(sum(1 / rank for rank in best) / 7)
    (again,) = trainer(tmp_path).validate(module, loader(parts), verbose=False)
    assert again == val, "a gallery must not outlive its evaluation"


def test_the_default_cut_offs_and_the_monitored_value_are_logged_in_a_fit(tmp_path: Path) -> None:
    running = fit(build(), batches(2), tmp_path, batches(2))
    assert names("val", (1, 5, 10, 25)) <= running.callback_metrics.keys()
    assert AVRetriever.monitor in running.callback_metrics and AVRetriever.monitor_mode == "max"


def test_repeated_ids_of_classes_are_no_news(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    twice = clips()._replace(pair_ids=torch.tensor([1, 1, 2, 3]))
    for relevance, told in (("label", 0), ("pair", 1)):
        caplog.clear()
        with caplog.at_level(logging.INFO, "zoo.cmmixer.metrics"):
            trainer(tmp_path).validate(build(relevance=relevance), loader([twice]), verbose=False)
        assert sum("share their id with others" in text for text in caplog.messages) == told


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_layer_decay_is_over_both_towers(layer_decay: float | None) -> None:
    module = build(layer_decay=layer_decay, weight_decay=0.1)
    optimizer: Any = module.configure_optimizers()
    # The schedule has not begun, so that the rates are those of its base.
    rates = {id(p): group["initial_lr"] for group in optimizer["optimizer"].param_groups for p in group["params"]}
    assert rates.keys() == {id(parameter) for parameter in module.parameters()}
    for encoder in module.towers.encoders:
        factor = layer_decay or 1.0
        assert rates[id(encoder.patch_embedding.weight)] == pytest.approx(1e-2 * factor**2)
        assert rates[id(encoder.get_parameter("blocks.0.attention.qkv.weight"))] == pytest.approx(1e-2 * factor)
        assert rates[id(encoder.norm.weight)] == pytest.approx(1e-2)
    assert rates[id(module.log_temperature)] == pytest.approx(1e-2)


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_wrong_streams_are_refused_in_the_first_batch(stage: str, tmp_path: Path) -> None:
    parts = [clips()._replace(audio=300 * torch.rand(4, FRAMES, *SHAPE))]
    with pytest.raises(ValueError, match=r"audio has values up to .* normalise first"):
        at(stage, build(), parts, tmp_path)


def test_a_checkpoint_alone_gives_the_same_outputs(tmp_path: Path) -> None:
    module = build(projector="mlp", pool="cls", share_encoder=True)
    fit(module, batches(2), tmp_path).save_checkpoint(tmp_path / "last.ckpt")
    loaded, batch = AVRetriever.load_from_checkpoint(tmp_path / "last.ckpt"), clips(seed=9)
    assert loaded.hparams == module.hparams and loaded.towers.video_encoder is loaded.towers.audio_encoder
    for first, second in zip(module(batch.video, batch.audio), loaded(batch.video, batch.audio), strict=True):
        assert torch.equal(first, second)
    assert torch.equal(loaded.temperature, module.temperature)


def test_an_exported_encoder_of_the_towers_stream_is_a_vit(pretrained: tuple[MixerMAE, Path]) -> None:
    encoder = load_encoder(pretrained[1])
    towers = DualTower(encoder, proj_dim=DIM)
    assert towers.video_encoder is encoder and towers.audio_encoder is not encoder


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"loss": "clip"}, "loss must be one of nt_xent, infonce, triplet, got 'clip'"),
        ({"relevance": "class"}, "relevance must be one of pair, label, got 'class'"),
        ({"temperature": 0.001}, "temperature must be from 0.01 to 1.0, got 0.001"),
        ({"temperature": 2.0}, "temperature must be from 0.01 to 1.0, got 2.0"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"top_k": 0}, "top_k must be positive .* got 0"),
        ({"pretrain_epochs": -1}, "pretrain_epochs not negative, got 10, -1"),
        ({"pretrain": {"op": "none"}}, "pretrain has no meaning without pretrain_epochs"),
        ({"pretrain_epochs": 1, "pretrain": {"opp": "none"}}, "pretrain: .*opp"),
        ({"pretrain_epochs": 1, "pretrain": {"op": "blend"}}, "op must be one of .* got 'blend'"),
        ({"pretrain_epochs": 1, "pretrain": {"lr": 0.0}}, "pretrain: lr must be positive, got 0.0"),
        ({"projector": "conv"}, "projector must be one of linear_relu, .* got 'conv'"),
        ({"proj_dim": 0}, "proj_dim must be positive, got 0"),
        ({"pool": "max"}, "pool must be one of mean, cls, got 'max'"),
        ({"ks": [1, 1]}, r"ks must be distinct cut-offs of at least 1, got \[1, 1\]"),
    ],
    ids=str,
)
def test_an_argument_out_of_its_range_is_refused_by_name(options: dict[str, Any], pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        build(**options)
