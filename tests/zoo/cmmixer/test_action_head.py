"""ActionHead: classes of one stream by a linear probe, or a fine-tuning."""

from __future__ import annotations

import json
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
from zoo.cmmixer.action_head import ActionHead
from zoo.cmmixer.export import save_encoder

if TYPE_CHECKING:
    from pathlib import Path

CLASSES = 3


def build(**options: Any) -> ActionHead:
    torch.manual_seed(0)
    return ActionHead(**{"num_classes": CLASSES, **ENCODER, "lr": 1e-2, **options})


@pytest.mark.parametrize("stream", ["video", "audio"])
def test_a_probe_leaves_the_encoder_as_it_was_exported(stream: str, tmp_path: Path) -> None:
    encoder = fresh_encoder()
    folder = save_encoder(encoder, tmp_path / "encoder")
    sizes = {"encoder": None, "encoder_options": None, "patch_size": None}
    module = build(**sizes, init_from=str(folder), stream=stream)
    head = weights(module.head)
    running = fit(module, batches(3), tmp_path)
    assert equal(weights(module.encoder), weights(encoder))
    assert all(not torch.equal(value, head[name]) for name, value in weights(module.head).items())
    trained = [p for group in running.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in module.head.parameters()}


def test_a_fine_tuning_changes_every_weight(tmp_path: Path) -> None:
    module = build(freeze_encoder=False)
    before = weights(module)
    fit(module, batches(2), tmp_path)
    assert not [name for name, value in weights(module).items() if torch.equal(value, before[name])]


@pytest.mark.parametrize("layer_decay", [0.75, 0.5, None])
def test_layers_have_rates_that_shrink_towards_the_embeddings(layer_decay: float | None) -> None:
    module = build(freeze_encoder=False, layer_decay=layer_decay, weight_decay=0.1)
    optimizer: Any = module.configure_optimizers()
    groups = optimizer["optimizer"].param_groups
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rates.keys() == {id(p) for p in module.parameters()}
    factor, encoder = layer_decay or 1.0, module.encoder
    for parameter, power in (
        (encoder.patch_embedding.weight, 2),
        (encoder.cls_token, 2),
        (encoder.get_parameter("blocks.0.mlp.0.weight"), 1),
        (encoder.norm.weight, 0),
        (module.head.weight, 0),
        (module.head.bias, 0),
    ):
        assert rates[id(parameter)] == pytest.approx(1e-2 * factor**power)


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("stream", ["video", "audio"])
def test_logits_are_of_the_stream_s_normed_features(stream: str, pool: str, tmp_path: Path) -> None:
    module, batch = uneven(build(stream=stream, pool=pool, label_smoothing=0.2), 0.3), clips(6)
    states = module.encoder(getattr(batch, stream))
    features = states[:, 0] if pool == "cls" else states[:, 1:].mean(1)
    centred = features - features.mean(1, keepdim=True)
    normed = centred / (features.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    logits = (normed @ module.head.weight.T + module.head.bias).detach()
    torch.testing.assert_close(module(getattr(batch, stream)).detach(), logits, rtol=1e-4, atol=1e-5)
    (found,) = trainer(tmp_path).validate(module, loader([batch]), verbose=False)
    loss = F.cross_entropy(logits, batch.labels, label_smoothing=0.2)
    accuracy = float((logits.argmax(1) == batch.labels).float().mean())
    assert numbers(found) == pytest.approx({"val/loss": float(loss), "val/acc": accuracy}, rel=1e-4)


def test_an_evaluation_counts_clips_not_batches(tmp_path: Path) -> None:
    module, parts = uneven(build(), 0.3), [clips(6, 0), clips(3, 1)]
    (found,) = trainer(tmp_path).test(module, loader(parts), verbose=False)
    logits, labels = torch.cat([module(p.video) for p in parts]).detach(), torch.cat([p.labels for p in parts])
    expected = {
        "test/loss": float(F.cross_entropy(logits, labels)),
        "test/acc": float((logits.argmax(1) == labels).float().mean()),
    }
    assert numbers(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("label", [-1, CLASSES])
@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_a_label_out_of_range_is_refused_naming_the_range(stage: str, label: int, tmp_path: Path) -> None:
    batch = clips()
    batch.labels[1:3] = label
    pattern = f"2 of 4 clips have labels outside 0 to 2, the first {label}: .* need labels"
    with pytest.raises(ValueError, match=pattern):
        at(stage, build(), [batch], tmp_path)


@pytest.mark.parametrize("kind", ["constant", "nan", "one-nan", "tie"])
@pytest.mark.parametrize("label", range(CLASSES))
def test_logits_that_decide_nothing_have_an_accuracy_of_zero(kind: str, label: int, tmp_path: Path) -> None:
    module, batch = build(), clips()
    batch.labels.fill_(label)
    logits = torch.zeros(4, CLASSES)
    if kind != "constant":
        logits[:, label] = 5.0
    if kind == "nan":
        logits[:] = torch.nan
    elif kind == "one-nan":
        logits[:, (label + 1) % CLASSES] = torch.nan
    elif kind == "tie":
        logits[:, (label + 1) % CLASSES] = 5.0
    module.forward = lambda clips: logits  # type: ignore[method-assign]
    (found,) = trainer(tmp_path).validate(module, loader([batch]), verbose=False)
    assert found["val/acc"] == 0
    assert math.isinf(found["val/loss"]) == ("nan" in kind)


def test_a_sure_and_right_answer_has_an_accuracy_of_one(tmp_path: Path) -> None:
    module, batch = build(), clips()
    module.forward = lambda clips: F.one_hot(batch.labels, CLASSES).float()  # type: ignore[method-assign]
    (found,) = trainer(tmp_path).validate(module, loader([batch]), verbose=False)
    assert found["val/acc"] == 1


@pytest.mark.parametrize("names", [None, ["zero", "one", "two"]], ids=["numbers", "names"])
def test_predictions_have_ids_and_names_of_classes_and_need_no_labels(names: list[str] | None, tmp_path: Path) -> None:
    module, parts = uneven(build(), 1.0), [clips(4, 0), clips(3, 1)]
    for part in parts:
        part.labels.fill_(-1)
    running = trainer(tmp_path)
    if names:
        from lightning import LightningDataModule

        class Data(LightningDataModule):
            label_names = names

            def predict_dataloader(self) -> Any:
                return loader(parts)

        found: Any = running.predict(module, datamodule=Data())
    else:
        found = running.predict(module, loader(parts))
    chances = torch.cat([module(part.video) for part in parts]).softmax(1).detach()
    classes = chances.argmax(1).tolist()
    assert len(set(classes)) > 1
    ids = [id_ for part in parts for id_ in part.pair_ids.tolist()]
    assert [id_ for part in found for id_ in part["pair_ids"].tolist()] == ids
    assert [c for part in found for c in part["labels"].tolist()] == classes
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text("utf-8").splitlines()]
    assert [line["pair_id"] for line in lines] == [str(id_) for id_ in ids]
    assert [line["label"] for line in lines] == [names[c] if names else str(c) for c in classes]
    assert [line["probability"] for line in lines] == pytest.approx(chances.amax(1).tolist())


def test_the_rate_warms_up_by_epochs(tmp_path: Path) -> None:
    module = build(warmup_epochs=2)
    fit(module, batches(3), tmp_path, max_epochs=5)
    assert module._schedule.warmup_steps == 6 and module._schedule.total_steps == 15


def test_a_checkpoint_alone_gives_the_same_outputs(tmp_path: Path) -> None:
    module = build(freeze_encoder=False, stream="audio", pool="cls")
    fit(module, batches(2), tmp_path, batches(1)).save_checkpoint(tmp_path / "last.ckpt")
    loaded, batch = ActionHead.load_from_checkpoint(tmp_path / "last.ckpt"), clips(seed=9)
    assert loaded.hparams == module.hparams and torch.equal(loaded(batch.audio), module(batch.audio))


def test_wrong_streams_are_refused_in_the_first_batch(tmp_path: Path) -> None:
    parts = [clips()._replace(video=300 * torch.rand(4, FRAMES, *SHAPE))]
    with pytest.raises(ValueError, match=r"video has values up to .* normalise first"):
        fit(build(), parts, tmp_path)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"num_classes": 0}, "num_classes must be at least 2, got 0: does the data have labels"),
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"stream": "text"}, "stream must be one of video, audio, got 'text'"),
        ({"pool": "max"}, "pool must be one of mean, cls, got 'max'"),
        ({"label_smoothing": 1.0}, "label_smoothing must be at least 0 and below 1, got 1.0"),
        ({"lr": -1.0}, "lr must be positive, got -1.0"),
        ({"warmup_epochs": -1}, "warmup_epochs must not be negative, got -1"),
    ],
    ids=str,
)
def test_an_argument_out_of_its_range_is_refused_by_name(options: dict[str, Any], pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        build(**options)


def test_the_head_starts_small_and_without_a_bias() -> None:
    module = build()
    assert module.head.weight.shape == (CLASSES, WIDTH) and float(module.head.weight.detach().std()) < 0.03
    assert bool((module.head.bias == 0).all())
