"""Encoders on disk, and what is built from them."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.zoo.cmmixer.small_clips import FRAMES, PATCH, SHAPE, SIZES, clips, equal, fresh_encoder, weights
from zoo.cmmixer.export import MODEL_TYPE, build_encoder, load_encoder, save_encoder

if TYPE_CHECKING:
    from pathlib import Path

LOG = "zoo.cmmixer.export"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_encoder(fresh_encoder(), tmp_path / "deep" / "encoder")


@pytest.mark.parametrize("layout", ["concat", "interleave"])
def test_a_saved_encoder_comes_back_equal(layout: str, tmp_path: Path) -> None:
    encoder, batch = fresh_encoder(layout=layout, mlp_ratio=2.5, num_layers=2), clips()
    written = save_encoder(encoder, tmp_path / "deep" / "encoder")
    assert written == tmp_path / "deep" / "encoder"
    assert {path.name for path in written.iterdir()} == {"config.json", "model.safetensors"}
    torch.manual_seed(5)
    for found in (load_encoder(written), load_encoder(str(written)), build_encoder(SHAPE, FRAMES, init_from=written)):
        assert found.config == encoder.config and equal(weights(found), weights(encoder))
        assert torch.equal(found(batch.video), encoder(batch.video))


def test_a_folder_is_overwritten(folder: Path) -> None:
    other = fresh_encoder(seed=4, num_layers=2)
    save_encoder(other, folder)
    assert equal(weights(load_encoder(folder)), weights(other))


def test_a_fresh_encoder_has_the_size_of_its_name_and_the_options() -> None:
    encoder = build_encoder(SHAPE, FRAMES, "tiny", {"num_layers": 2}, 8, "interleave")
    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "mlp_ratio": 4.0}
    assert encoder.config == {
        **sizes, "image_shape": SHAPE, "num_frames": FRAMES, "patch_size": 8, "layout": "interleave"
    }  # fmt: skip
    plain = build_encoder(SHAPE, FRAMES, "tiny")
    assert plain.patch_size == 16 and plain.layout == "concat"
    base = build_encoder(SHAPE, FRAMES, options={"num_layers": 1})
    assert base.hidden_size == 768 and base.config["num_heads"] == 12


@pytest.mark.parametrize(
    ("shape", "frames"), [([1, 16, 16], 3), ([1, 32, 24], 2), ([1, 8, 8], 1)], ids=["frames", "size", "both"]
)
def test_clips_of_another_length_or_size_keep_the_weights_and_say_so(
    shape: list[int], frames: int, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, LOG):
        encoder = build_encoder(shape, frames, init_from=folder)
    assert f"was trained on 2 frames of [1, 16, 16], these are {frames} of {shape}" in caplog.text
    assert "positions are computed anew" in caplog.text
    assert equal(weights(encoder), weights(load_encoder(folder)))
    fresh = fresh_encoder(shape=shape, frames=frames)
    assert torch.equal(encoder.positions, fresh.positions)
    rows, columns = shape[1] // PATCH, frames * shape[2] // PATCH
    assert encoder(torch.randn(2, frames, *shape)).shape == (2, 1 + rows * columns, SIZES["hidden_size"])


def test_clips_as_in_training_are_no_news(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, LOG):
        build_encoder(SHAPE, FRAMES, init_from=folder)
    assert "positions are computed anew" not in caplog.text


@pytest.mark.parametrize(("saved", "asked"), [(1, 3), (3, 1)])
def test_another_number_of_channels_is_refused_naming_both(saved: int, asked: int, tmp_path: Path) -> None:
    save_encoder(fresh_encoder(shape=[saved, 16, 16]), tmp_path)
    pattern = f"has channels = {saved}, but {asked} is asked for: give data with as many channels"
    with pytest.raises(ValueError, match=pattern):
        build_encoder([asked, 16, 16], FRAMES, init_from=tmp_path)


@pytest.mark.parametrize(
    ("given", "pattern"),
    [
        ({"patch_size": 8}, "has patch_size = 4, but 8 is asked for: leave patch_size out"),
        ({"layout": "interleave"}, "has layout = concat, but interleave is asked for: leave layout out"),
        ({"options": {"num_layers": 2}}, "has num_layers = 1, but 2 is asked for: leave num_layers out"),
        ({"options": {"mlp_ratio": 2}}, r"has mlp_ratio = 4.0, but 2 is asked for: leave mlp_ratio out"),
        ({"size": "tiny"}, "has hidden_size = 16, but 64 is asked for: leave hidden_size out"),
        ({"size": "tiny", "options": {"hidden_size": 16}}, "has num_layers = 1, but 3 is asked for"),
        ({"size": "small"}, "encoder must be one of tiny, .* got 'small'"),
        ({"options": {"depth": 1}}, "unknown option 'depth' of a transformer"),
    ],
    ids=str,
)
def test_what_contradicts_the_checkpoint_is_refused_by_name(given: dict[str, Any], pattern: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=pattern):
        build_encoder(SHAPE, FRAMES, init_from=folder, **given)


def test_what_agrees_with_the_checkpoint_is_accepted(folder: Path) -> None:
    for size in (None, "tiny"):
        encoder = build_encoder(SHAPE, FRAMES, size, {**SIZES, "mlp_ratio": 4}, PATCH, "concat", folder)
        assert equal(weights(encoder), weights(load_encoder(folder)))


def loaders(folder: Path) -> list[Any]:
    return [lambda: load_encoder(folder), lambda: build_encoder(SHAPE, FRAMES, init_from=folder)]


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "other"])
def test_damaged_weights_are_refused_naming_the_file(damage: str, folder: Path, tmp_path: Path) -> None:
    path = folder / "model.safetensors"
    if damage == "other":
        path = save_encoder(fresh_encoder(hidden_size=32), tmp_path / "other") / "model.safetensors"
        path.replace(folder / "model.safetensors")
        path = folder / "model.safetensors"
    else:
        content = path.read_bytes()
        path.write_bytes({"truncated": content[: len(content) // 2], "text": b"weights", "empty": b""}[damage])
    for load in loaders(folder):
        with pytest.raises(ValueError, match=f"{path} is damaged, or does not fit its config.json"):
            load()


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "all"])
def test_missing_files_are_named(missing: str, folder: Path) -> None:
    for name in ("config.json", "model.safetensors") if missing == "all" else (missing,):
        (folder / name).unlink()
    pattern = "is not a folder" if missing == "all" else f"has no {'weights' if 'model' in missing else missing}"
    if missing == "all":
        folder.rmdir()
    for load in loaders(folder):
        with pytest.raises(FileNotFoundError, match=pattern):
            load()


def test_a_config_that_was_not_written_so_is_refused_naming_what_differs(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    assert config["model_type"] == MODEL_TYPE
    for broken, key in (
        ({name: value for name, value in config.items() if name != "image_shape"}, "image_shape"),
        ({name: value for name, value in config.items() if name != "layout"}, "layout"),
        ({**config, "depth": 3}, "depth"),
    ):
        path.write_text(json.dumps(broken), "utf-8")
        for load in loaders(folder):
            with pytest.raises(ValueError, match=f"{path} is not one that save_encoder writes: see {key}"):
                load()
    path.write_text("{", "utf-8")
    for load in loaders(folder):
        with pytest.raises(ValueError, match=f"{path} is not valid JSON"):
            load()


def test_another_kind_of_model_is_no_exported_encoder(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({"model_type": "bert", "hidden_size": 8}), "utf-8")
    with pytest.raises(ValueError, match=f"{path} has model_type='bert', expected 'cmmixer_vit'"):
        load_encoder(folder)


def test_a_folder_of_vitmae_starts_an_encoder_of_wide_pictures(tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTMAEConfig(**sizes, image_size=16, patch_size=4, num_channels=3)
    transformers.ViTMAEModel(config).save_pretrained(tmp_path)
    encoder = build_encoder([3, 16, 16], FRAMES, layout="interleave", init_from=tmp_path)
    assert encoder.grid == (4, 8) and encoder.patch_size == 4 and encoder.layout == "interleave"
    with pytest.raises(ValueError, match="has channels = 3, but 1 is asked for"):
        build_encoder(SHAPE, FRAMES, init_from=tmp_path)
    with pytest.raises(ValueError, match="has patch_size = 4, but 8 is asked for: leave patch_size out"):
        build_encoder([3, 16, 16], FRAMES, patch_size=8, init_from=tmp_path)
    with pytest.raises(ValueError, match="has hidden_size = 16, but 64 is asked for"):
        build_encoder([3, 16, 16], FRAMES, "tiny", init_from=tmp_path)
