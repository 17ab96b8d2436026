"""AVRetriever with `pretrain_epochs`: an autoencoder first, then towers that start from its encoder."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning import Callback

from tests.zoo.cmmixer.small_clips import ENCODER, EachStep, batches, clips, equal, fit, loader, trainer, weights
from zoo.cmmixer.retriever import AVRetriever

if TYPE_CHECKING:
    from pathlib import Path

EPOCHS, STEPS = 2, 3


def build(**options: Any) -> AVRetriever:
    torch.manual_seed(0)
    settings = {"proj_dim": 8, "lr": 1e-2, "pretrain_epochs": EPOCHS, "pretrain": {"op": "patch", "lr": 2e-2}}
    return AVRetriever(**{**ENCODER, **settings, **options})


def parts(module: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Copies of the towers with their temperature, and of the autoencoder."""
    towers = weights(module.towers) | {"log_temperature": module.log_temperature.detach().clone()}
    return towers, weights(module.autoencoder)


def encoders(state: dict[str, torch.Tensor], tower: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{tower}."): value for name, value in state.items() if name.startswith(f"{tower}.")}


class AtEpochs(Callback):
    """Keeps the parts before the first step of each epoch."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_before_zero_grad(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if trainer.global_step % STEPS == 0:
            self.seen.append(parts(module))


@pytest.mark.parametrize("options", [{}, {"share_encoder": True}, {"freeze_encoder": True}], ids=str)
def test_first_the_autoencoder_learns_then_the_towers_from_its_encoder(
    options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, steps, epochs = build(**options), EachStep(parts), AtEpochs()
    with caplog.at_level(logging.INFO, "zoo.cmmixer.retriever"):
        fit(module, batches(STEPS), tmp_path, max_epochs=EPOCHS + 2, callbacks=[steps, epochs])
    boundary = EPOCHS * STEPS
    for step in range(1, boundary + 1):
        towers, autoencoder = steps.seen[step]
        assert equal(towers, steps.seen[0][0])
        assert all(not torch.equal(value, steps.seen[step - 1][1][name]) for name, value in autoencoder.items())
    towers, autoencoder = epochs.seen[EPOCHS]
    for tower in ("video_encoder", "audio_encoder"):
        assert equal(encoders(towers, tower), encoders(autoencoder, "encoder"))
    assert equal(encoders(towers, "video_head"), encoders(steps.seen[0][0], "video_head"))
    for step in range(boundary + 1, len(steps.seen)):
        towers, autoencoder = steps.seen[step]
        assert equal(autoencoder, steps.seen[boundary][1])
        before = epochs.seen[EPOCHS][0] if step == boundary + 1 else steps.seen[step - 1][0]
        same = {name.partition(".")[0] for name, value in towers.items() if torch.equal(value, before[name])}
        assert same == ({"video_encoder", "audio_encoder"} if "freeze_encoder" in options else set())
    assert sum("the towers start from the encoder" in text for text in caplog.messages) == 1
    assert module.towers.encoders[0] is module.towers.video_encoder


def test_both_parts_log_their_loss(tmp_path: Path) -> None:
    module, batch = build(), clips()
    with torch.no_grad():
        expected = module.autoencoder(batch.video, batch.audio, batch.keys).loss  # type: ignore[misc]
    steps = EachStep(lambda module: dict(module.trainer.logged_metrics))
    fit(module, [batch], tmp_path, max_epochs=EPOCHS + 1, callbacks=[steps])
    first, last = steps.seen[1], steps.seen[-1]
    assert float(first["train/loss"]) == float(first["train/pretrain_loss"]) == pytest.approx(float(expected))
    assert "train/temperature" not in first and "train/temperature" in last


def test_streams_alternate_in_the_first_part(tmp_path: Path) -> None:
    module = build(pretrain={"op": "alternate"})
    forward, seen = module.autoencoder.forward, []  # type: ignore[union-attr]

    def watched(video: Any, audio: Any, keys: Any, stream: Any) -> Any:
        seen.append(stream)
        return forward(video, audio, keys, stream)

    module.autoencoder.forward = watched  # type: ignore[union-attr, method-assign]
    fit(module, batches(STEPS), tmp_path, max_epochs=EPOCHS + 1)
    assert seen == [0, 1, 0] * EPOCHS


def test_the_rates_follow_the_parts(tmp_path: Path) -> None:
    module = build(warmup_epochs=1)

    def rates(module: Any) -> tuple[set[float], set[float]]:
        own = {id(parameter) for parameter in module.autoencoder.parameters()}
        found: tuple[set[float], set[float]] = (set(), set())
        for group in module.optimizers().param_groups:
            inside = {id(parameter) in own for parameter in group["params"]}
            assert len(inside) == 1
            found[inside.pop()].add(round(group["lr"], 12))
            assert group["betas"] == ((0.9, 0.95) if id(group["params"][0]) in own else (0.9, 0.999))
        return found

    steps = EachStep(rates)
    fit(module, batches(STEPS), tmp_path, max_epochs=EPOCHS + 3, callbacks=[steps])

    def factor(step: int, total: int) -> float:
        warmup = STEPS
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))

    boundary, total = EPOCHS * STEPS, (EPOCHS + 3) * STEPS
    for step in range(1, total + 1):
        towers, autoencoder = ({round(rate, 12)} for rate in (0.0, 0.0))
        if step < boundary:
            autoencoder = {round(2e-2 * factor(step, boundary), 12)}
        else:
            towers = {round(1e-2 * factor(step - boundary, total - boundary), 12)}
        assert steps.seen[step] == (towers, autoencoder), step


def test_without_a_rate_of_its_own_the_autoencoder_has_that_of_the_towers() -> None:
    assert build(pretrain=None).pretrain_lr == 1e-2 and build().pretrain_lr == 2e-2


def test_the_towers_first_steps_are_those_of_a_new_optimizer(tmp_path: Path) -> None:
    module, first = build(), {}

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step == EPOCHS * STEPS + 1:
                state = trainer.optimizers[0].state
                first.update({name: float(state[p]["step"]) for name, p in module.named_parameters()})

    fit(module, batches(STEPS), tmp_path, max_epochs=EPOCHS + 1, callbacks=[Look()])
    for name, step in first.items():
        assert step == (EPOCHS * STEPS + 1 if name.startswith("autoencoder.") else 1), name


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("stopped", [EPOCHS * STEPS - 1, EPOCHS * STEPS, EPOCHS * STEPS + 1, EPOCHS * STEPS + STEPS])
def test_a_resumed_run_transfers_once(stopped: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step == stopped:
                trainer.save_checkpoint(path)

    whole, path = build(), tmp_path / "stopped.ckpt"
    options: dict[str, Any] = {"max_epochs": EPOCHS + 2}
    fit(whole, batches(STEPS), tmp_path, **options, callbacks=[Save()])
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert bool(saved["transferred"]) == (stopped > EPOCHS * STEPS)
    resumed, seen = build(), EachStep(lambda module: bool(module.transferred))
    caplog.clear()
    with caplog.at_level(logging.INFO, "zoo.cmmixer.retriever"):
        trainer(tmp_path, **options, limit_val_batches=0, callbacks=[seen]).fit(
            resumed, loader(batches(STEPS)), loader(batches(1)), ckpt_path=path, weights_only=True
        )
    told = sum("the towers start from the encoder" in text for text in caplog.messages)
    assert told == (stopped <= EPOCHS * STEPS)
    assert seen.seen[-1] and bool(resumed.transferred)
    if stopped % STEPS == 0:
        # In the middle of an epoch, which batches come again is the sampler's business.
        assert equal(weights(resumed), weights(whole))


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        ({"max_epochs": EPOCHS}, EPOCHS * STEPS),
        ({"max_epochs": -1, "max_steps": EPOCHS * STEPS}, EPOCHS * STEPS),
        ({"max_epochs": -1, "max_steps": EPOCHS * STEPS + 1}, None),
        ({"max_epochs": EPOCHS + 1}, None),
    ],
    ids=str,
)
def test_a_training_that_ends_with_its_first_part_warns(
    length: dict[str, Any], steps: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "zoo.cmmixer.retriever"):
        fit(build(), batches(STEPS), tmp_path, **length)
    text = f"pretrain_epochs=2 leaves the towers none of the training's {steps} steps: raise --trainer.max_epochs"
    assert (text in caplog.messages) == (steps is not None)
    assert ("leaves the towers none" in caplog.text) == (steps is not None)


def test_a_dry_run_of_one_step_is_of_the_first_part(tmp_path: Path) -> None:
    running = fit(build(), batches(STEPS), tmp_path, fast_dev_run=True)
    assert "train/pretrain_loss" in running.logged_metrics


def test_the_autoencoder_has_the_options_of_pretrain() -> None:
    options = {"op": "pixel", "mixer_options": {"swap_ratio": 0.3}, "mask_ratio": 0.5, "loss_on": "hidden"}
    module: Any = build(pretrain={**options, "decoder_options": {"num_layers": 2}, "audio_weight": 2.0})
    auto = module.autoencoder
    assert (auto.mixer.op, auto.mixer.swap_ratio, auto.mask_ratio) == ("pixel", 0.3, 0.5)
    assert (auto.loss_on, auto.audio_weight, len(auto.decoder_blocks)) == ("hidden", 2.0, 2)
    assert auto.mask_token.shape[-1] == 48, "the decoder follows the encoder's name"
    assert auto.encoder is not module.towers.video_encoder
    assert build(pretrain_epochs=0, pretrain=None).autoencoder is None


def test_without_a_first_part_there_is_nothing_to_transfer(tmp_path: Path) -> None:
    module = build(pretrain_epochs=0, pretrain=None)
    assert bool(module.transferred)
    running = fit(module, batches(2), tmp_path)
    assert "train/pretrain_loss" not in running.logged_metrics
