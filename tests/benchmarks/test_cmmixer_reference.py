"""Both sides of the benchmark of CMMixer compute the same, and every case runs."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks import cmmixer
from benchmarks.cmmixer import (
    KS,
    QUICK,
    TIMED,
    cases_of,
    gallery,
    keys_of,
    mixed_patches,
    new_autoencoder,
    ours_retrieval,
    show_memory,
    streams,
    training_peak,
    write_sounds,
)
from benchmarks.reference.cmmixer import (
    Box,
    PlainMixer,
    box_of,
    mix_frames,
    paste_frames,
    plain_retrieval,
    plain_spectrograms,
    softmax_attention,
    visible_patches,
)
from datamodules.sources.log_mel import LogMel
from datamodules.sources.spectrogram_cache import SpectrogramCache
from zoo.cmmixer.beta import keyed_symmetric_beta
from zoo.cmmixer.mixer import OPS, CrossModalMixer
from zoo.cmmixer.vit import Attention
from zoo.common.keyed_random import keyed_uniform, mix_keys

if TYPE_CHECKING:
    from pathlib import Path

SIZES = replace(
    QUICK, clips=3, frames=2, side=16, patch_size=4, batch=2, hidden_size=64, sounds=2, num_mels=8, pairs=30
)
COUNT = 3


def boxes_of(keys: torch.Tensor, frames: int, side: int) -> list[list[Box]]:
    """The boxes that the numbers of ours give in the plain procedure."""
    units = mix_keys(keys[:, None], torch.arange(frames))
    numbers = (keyed_symmetric_beta(1.0, mix_keys(units, 3)), *(keyed_uniform(units, slot) for slot in (10, 20, 2)))
    return [
        [
            box_of(side, side, lam, int(row * side), int(column * side), switch < 0.5)
            for lam, row, column, switch in zip(*clip, strict=True)
        ]
        for clip in zip(*(number.tolist() for number in numbers), strict=True)
    ]


@pytest.mark.parametrize("op", OPS)
def test_with_the_same_parameters_a_batch_is_mixed_as_frame_by_frame(op: str) -> None:
    video, audio = streams(COUNT, SIZES)
    mixed, info = CrossModalMixer(op, patch_size=4)(video, audio, keys=keys_of(COUNT))
    weights = info.weights.expand(COUNT, SIZES.frames, 1, SIZES.side, SIZES.side)
    torch.testing.assert_close(mixed, mix_frames(video, audio, lambda sample, frame: weights[sample, frame, 0]))


def test_from_the_same_numbers_both_sides_cut_the_same_boxes() -> None:
    count, sizes = 40, replace(SIZES, side=15)
    video, audio = streams(count, sizes)
    keys = keys_of(count)
    mixed, info = CrossModalMixer("cutmix")(video, audio, keys=keys)
    boxes = boxes_of(keys, sizes.frames, sizes.side)
    assert {box.pasted for clip in boxes for box in clip} == {True, False}
    masks = torch.stack([torch.stack([box.mask(sizes.side, sizes.side) for box in clip]) for clip in boxes])
    assert info.mask is not None
    assert torch.equal(info.mask.float(), masks)
    for plain in (
        mix_frames(video, audio, lambda sample, frame: masks[sample, frame]),
        paste_frames(video, audio, lambda sample, frame: boxes[sample][frame]),
    ):
        assert torch.equal(mixed, plain)


@pytest.mark.parametrize("op", OPS)
def test_plain_parameters_are_distributed_as_ours(op: str) -> None:
    plain, count = PlainMixer(op, patch_size=4), 400
    masks = torch.stack([plain.mask(16, 16) for _ in range(count)])
    found, wanted = masks.mean((1, 2)), CrossModalMixer(op, patch_size=4).draw(keys_of(count), 1, 16, 16).lam[:, 0]
    assert found.mean().item() == pytest.approx(wanted.mean().item(), abs=0.07)
    assert found.std().item() == pytest.approx(wanted.std().item(), abs=0.05)


@pytest.mark.parametrize("op", OPS)
def test_the_patches_shown_are_those_of_a_mix_of_all_frames(op: str) -> None:
    model, keys = new_autoencoder(SIZES, op), keys_of(COUNT)
    video, audio = streams(COUNT, SIZES)
    visible = model.random_order(keys, model.encoder.num_patches, video.device)[:, : model.num_visible]
    info = model.draw_mix(keys, video.device)
    assert info is not None
    weights = info.weights.expand(COUNT, SIZES.frames, 1, SIZES.side, SIZES.side)
    mixed = mix_frames(video, audio, lambda sample, frame: weights[sample, frame, 0])
    targets = torch.stack([model.encoder.patches(video), model.encoder.patches(audio)], 1)
    found = mixed_patches(model, targets, visible, keys)
    assert found.shape[1] == 8
    torch.testing.assert_close(found, visible_patches(mixed, visible, 4))
    seen = model(video, audio, keys).seen.gather(1, visible[..., None].expand_as(found))
    torch.testing.assert_close(seen, found)


def test_both_attentions_have_one_output_and_gradient() -> None:
    attention = Attention(128, 2)
    states = torch.randn(2, 9, 128, requires_grad=True)
    found, wanted = attention(states), softmax_attention(attention, states)
    torch.testing.assert_close(found, wanted)
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), [states, attention.qkv.weight]),
        torch.autograd.grad(wanted.square().sum(), [states, attention.qkv.weight]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_spectrograms_from_disk_are_those_computed(tmp_path: Path) -> None:
    [file] = write_sounds(tmp_path, 1, seconds=2.0, sample_rate=8000)
    log_mel, times = LogMel(8000, 256, 128, 20, None), torch.tensor([0.1, 1.0, 1.7])
    cache = SpectrogramCache(tmp_path / "kept")
    wanted = plain_spectrograms(file, times, log_mel, 0.5)
    for _ in range(2):
        torch.testing.assert_close(cache.load(file, times, log_mel, 0.5), wanted, rtol=1e-5, atol=1e-4)
    assert (cache.misses, cache.hits) == (1, 1)


@pytest.mark.parametrize("case", ["distinct pairs", "classes", "ties"])
def test_both_metrics_find_the_same_values(case: str) -> None:
    video, audio, pair_ids = gallery(60, 16)
    if case == "classes":
        pair_ids = pair_ids % 7
    if case == "ties":
        audio = audio[torch.arange(60) // 3]
    found, wanted = ours_retrieval(video, audio, pair_ids), plain_retrieval(video, audio, pair_ids, KS)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    assert {f"{side}/{name}" for side in ("v2a", "a2v") for name in ("r@1", "mdr", "mrr", "map")} <= set(wanted)
    assert 0 < wanted["map"] < 1


@pytest.mark.parametrize("path", TIMED)
def test_each_path_times_both_sides(path: str, tmp_path: Path) -> None:
    for case in cases_of(path, SIZES, tmp_path):
        assert case.reference().wall > 0
        assert case.ours().wall > 0
        assert "reference" in case.note


def test_the_ratios_asked_for_stand_beside_their_cases(tmp_path: Path) -> None:
    cases = {case.name: case.required for path in TIMED for case in cases_of(path, SIZES, tmp_path)}
    asked = {name: required for name, required in cases.items() if required is not None}
    assert asked == {
        "mix, cutmix": 10,
        "visible patches, cutmix": 10,
        "encoder, 1 x 64": pytest.approx(1 / 0.45),
        "spectrograms": 20,
    }


def test_the_spectrograms_that_are_timed_come_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [case] = cases_of("spectrograms", SIZES, tmp_path)
    monkeypatch.setattr(LogMel, "forward", None)
    case.ours()
    with pytest.raises(TypeError):
        case.reference()


def test_a_training_step_takes_more_than_its_parameters_and_streams(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    found = training_peak(replace(SIZES, trained=2))
    torch.set_num_threads(threads)
    assert found["peak_bytes"] > found["peak_added_bytes"] >= 0
    assert found["batch_bytes"] == 2 * 4 * 2 * SIZES.frames * 3 * SIZES.side**2
    assert found["parameter_bytes"] > 4 * 64 * 64
    show_memory({"name": "tiny", **found})
    assert "MiB added at the peak" in capsys.readouterr().out


def test_the_command_writes_a_file_for_each_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cmmixer, "QUICK", SIZES)
    arguments = ["--quick", "--paths", "attention", "retrieval", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["cmmixer", *arguments])
    cmmixer.main()
    assert "retrieval, 30 pairs" in capsys.readouterr().out
    for path in ("attention", "retrieval"):
        written = json.loads((tmp_path / f"benchmark_{path}.json").read_text())
        assert written["command"].endswith("--quick")
        assert len(written["cases"]) == 1
