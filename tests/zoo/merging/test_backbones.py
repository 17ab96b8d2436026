"""Image encoders: built, saved, read back, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zoo.merging.backbones import ImageEncoder, build_encoder, load_backbone_weights, save_encoder

SIZES = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
IMAGES = torch.rand(3, 3, 8, 8)
KINDS = ("clip", "vit", "mlp")


def tiny(kind: str = "clip", **options: int) -> ImageEncoder:
    sizes = {key: size for key, size in SIZES.items() if kind != "mlp" or key not in ("patch_size", "num_heads")}
    torch.manual_seed(0)
    return shaken(build_encoder("tiny", kind=kind, **{**sizes, **options}))


def shaken(module: Any) -> Any:
    """Fresh weights hide differences: biases are 0 and norms are 1."""
    for parameter in module.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return module


@pytest.fixture(scope="module")
def clip() -> Any:
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 32, "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 31}
    torch.manual_seed(1)
    # The tower's own projection_dim differs on purpose: CLIPModel goes by the outer one.
    vision = {**sizes, "image_size": 8, "patch_size": 4, "projection_dim": 99}
    return shaken(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6))).eval()


@pytest.fixture
def clip_folder(clip: Any, tmp_path: Path) -> Path:
    clip.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


@torch.no_grad()
def features(encoder: nn.Module) -> Tensor:
    out: Tensor = encoder(IMAGES)
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("projection_dim", [None, 5])
def test_a_tiny_encoder_comes_back_bit_for_bit(kind: str, projection_dim: int | None, tmp_path: Path) -> None:
    encoder = tiny(kind, **({} if projection_dim is None else {"projection_dim": projection_dim}))
    assert encoder.dim == (projection_dim or {"mlp": 64}.get(kind, 16))
    assert features(encoder).shape == (3, encoder.dim)
    assert save_encoder(encoder, tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    read = build_encoder(str(tmp_path / "new" / "folder"))
    assert read.dim == encoder.dim
    assert torch.equal(features(read), features(encoder))
    assert list(read.backbone.state_dict()) == list(encoder.backbone.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_is_in_eval_mode_float32_and_with_sdpa(kind: str, tmp_path: Path) -> None:
    encoder = tiny(kind, projection_dim=5)
    for each in (encoder, build_encoder(save_encoder(encoder, tmp_path))):
        assert not any(module.training for module in each.modules())
        assert {tensor.dtype for tensor in each.state_dict().values()} == {torch.float32}
        assert all(parameter.requires_grad for parameter in each.backbone.parameters())
        assert not any(parameter.requires_grad for parameter in each.projection.parameters())
        if kind != "mlp":
            assert each.backbone.config._attn_implementation == "sdpa"


def test_every_weight_of_a_tiny_backbone_has_a_gradient() -> None:
    for kind in KINDS:
        encoder = tiny(kind, projection_dim=5)
        encoder(IMAGES).square().sum().backward()
        assert all(parameter.grad is not None for parameter in encoder.backbone.parameters()), kind


def test_the_features_of_clip_and_vit_are_class_tokens() -> None:
    clip, vit = tiny("clip"), tiny("vit")
    with torch.no_grad():
        hidden = clip.backbone(IMAGES).last_hidden_state[:, 0]
        torch.testing.assert_close(features(clip), clip.backbone.post_layernorm(hidden))
        torch.testing.assert_close(features(vit), vit.backbone(IMAGES).last_hidden_state[:, 0])
    assert not [name for name in vit.backbone.state_dict() if name.startswith("pooler")]


def test_the_mlp_is_the_residual_network_of_its_docstring() -> None:
    encoder = tiny("mlp", output_size=7).double()
    state = encoder.backbone.state_dict()

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    x = linear(IMAGES.double().mean(1).reshape(3, 64), "stem")
    for block in ("blocks.0", "blocks.1"):
        inner = linear(norm(x, f"{block}.norm"), f"{block}.up")
        assert inner.shape == (3, 32)
        x = x + linear(inner * 0.5 * (1 + torch.erf(inner / 2**0.5)), f"{block}.down")
    torch.testing.assert_close(encoder(IMAGES.double()), linear(norm(x, "norm"), "output"))
    assert encoder.dim == 7


def test_the_mlp_takes_grey_and_colour_images() -> None:
    grey = tiny("mlp")
    assert torch.equal(grey(IMAGES.mean(1, keepdim=True)), grey(IMAGES))
    colour = tiny("mlp", num_channels=3)
    assert colour.backbone.stem.in_features == 3 * 64
    assert not torch.equal(colour(IMAGES), colour(IMAGES.flip(1)))
    for encoder, shape in ((grey, (2, 3, 9, 8)), (colour, (2, 1, 8, 8))):
        with pytest.raises(ValueError, match=r"takes images of shape \(\d, 8, 8\), got \("):
            encoder(torch.zeros(shape))


def test_a_full_clip_model_gives_its_image_tower_and_projection(clip: Any, clip_folder: Path, tmp_path: Path) -> None:
    encoder = build_encoder(clip_folder)
    with torch.no_grad():
        expected = clip.get_image_features(pixel_values=IMAGES).pooler_output
    assert encoder.dim == 6
    assert torch.equal(features(encoder), expected)
    assert list(encoder.backbone.state_dict()) == list(clip.vision_model.state_dict())
    again = build_encoder(save_encoder(encoder, tmp_path / "saved"))
    assert torch.equal(features(again), expected)
    assert not any("text" in name for name in load_file(tmp_path / "saved" / "model.safetensors"))


def test_image_towers_with_and_without_projection_are_read(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {**sizes, "image_size": 8, "patch_size": 4, "projection_dim": 5}
    alone = shaken(CLIPVisionModel(CLIPVisionConfig(**config))).eval()
    alone.save_pretrained(tmp_path / "alone")
    projected = shaken(CLIPVisionModelWithProjection(CLIPVisionConfig(**config))).eval()
    projected.save_pretrained(tmp_path / "projected")
    with torch.no_grad():
        assert torch.equal(features(build_encoder(tmp_path / "alone")), alone(IMAGES).pooler_output)
        assert torch.equal(features(build_encoder(tmp_path / "projected")), projected(IMAGES).image_embeds)


def test_a_checkpoint_with_the_old_names_is_read(tmp_path: Path) -> None:
    encoder = tiny("clip")
    save_encoder(encoder, tmp_path)
    state = {f"vision_model.{name}": tensor for name, tensor in encoder.backbone.state_dict().items()}
    state["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(features(build_encoder(tmp_path)), features(encoder))


def test_a_vit_classifier_gives_its_class_token_not_a_random_pooler(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = shaken(ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4))).eval()
    model.save_pretrained(tmp_path)
    encoder = build_encoder(tmp_path)
    with torch.no_grad():
        expected = model.vit(IMAGES).last_hidden_state[:, 0]
    assert torch.equal(features(encoder), expected)
    assert torch.equal(features(build_encoder(tmp_path)), expected)


def test_a_convolutional_network_is_read_and_saved(tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    model = shaken(ResNetModel(config)).eval()
    model.save_pretrained(tmp_path / "resnet")
    encoder = build_encoder(tmp_path / "resnet")
    assert encoder.dim == 12 and features(encoder).shape == (3, 12)
    again = build_encoder(save_encoder(encoder, tmp_path / "again"))
    assert torch.equal(features(again), features(encoder))


def test_low_precision_checkpoints_are_read_in_float32(clip: Any, tmp_path: Path) -> None:
    import copy

    copy.deepcopy(clip).bfloat16().save_pretrained(tmp_path)
    encoder = build_encoder(tmp_path)
    assert {tensor.dtype for tensor in encoder.state_dict().values()} == {torch.float32}


def test_saving_over_an_encoder_with_a_projection_leaves_none_behind(tmp_path: Path) -> None:
    save_encoder(tiny("clip", projection_dim=5), tmp_path)
    encoder = tiny("clip")
    save_encoder(encoder, tmp_path)
    assert torch.equal(features(build_encoder(tmp_path)), features(encoder))


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_is_the_base_with_other_backbone_weights(kind: str, tmp_path: Path) -> None:
    base, expert = tiny(kind, projection_dim=5), tiny(kind, projection_dim=5)
    shaken(expert)
    before = features(base)
    save_encoder(expert, tmp_path / "expert")
    save_file(expert.backbone.state_dict(), tmp_path / "expert.safetensors")
    expert.projection.load_state_dict(base.projection.state_dict())
    for source in (tmp_path / "expert", str(tmp_path / "expert.safetensors")):
        loaded = load_backbone_weights(base.train(), source)
        assert torch.equal(features(loaded), features(expert))
        assert not loaded.training
    assert torch.equal(features(base), before)
    assert not torch.equal(features(expert), before)


def test_an_expert_of_another_shape_is_refused_by_names_and_shapes(clip_folder: Path, tmp_path: Path) -> None:
    base = build_encoder(clip_folder)
    save_encoder(tiny("clip", num_layers=1), tmp_path / "shallow")
    with pytest.raises(
        ValueError, match=r"shallow does not fit the encoder in \d+ tensors: encoder\.layers\.1\.\S+ is m"
    ):
        load_backbone_weights(base, tmp_path / "shallow")
    save_encoder(tiny("clip", num_layers=3), tmp_path / "deep")
    with pytest.raises(ValueError, match=r"encoder\.layers\.2\.\S+ is unknown to the encoder") as caught:
        load_backbone_weights(tiny("clip"), tmp_path / "deep")
    assert str(caught.value).count(";") == 9
    save_encoder(tiny("clip", patch_size=2), tmp_path / "fine")
    with pytest.raises(ValueError, match=r"has shape \(16, 3, 2, 2\), the encoder's has \(16, 3, 4, 4\)"):
        load_backbone_weights(tiny("clip"), tmp_path / "fine")
    with pytest.raises(FileNotFoundError, match=r"no file .*x\.safetensors"):
        load_backbone_weights(base, tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["./nothing", "/nothing/here", "~/nothing", "a/b/c", Path("nothing")])
def test_a_missing_folder_says_which_files_belong_there(name: str | Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is not a folder; give a folder with config\.json and model\.safet"):
        build_encoder(name)


def test_an_incomplete_folder_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"has no config\.json and no weights: put config\.json and model\.safe"
    ):
        build_encoder(tmp_path)
    save_encoder(tiny("clip"), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no weights: put"):
        build_encoder(str(tmp_path))
    (tmp_path / "config.json").rename(tmp_path / "adapter_config.json")
    with pytest.raises(FileNotFoundError, match="a LoRA adapter alone is no network"):
        build_encoder(tmp_path)
    file = tmp_path / "adapter_config.json"
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        build_encoder(str(file))


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_named(kind: str, tmp_path: Path) -> None:
    save_encoder(tiny(kind, projection_dim=5), tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=f"{tmp_path}.*(damaged|is not a whole)"):
        build_encoder(tmp_path)
    weights.write_bytes(whole)
    config.write_text(config.read_text()[:-5])
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        build_encoder(tmp_path)
    config.write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json must hold a JSON object, it holds a list"):
        build_encoder(tmp_path)


def test_weights_that_would_be_random_are_refused(tmp_path: Path) -> None:
    save_encoder(tiny("clip"), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["post_layernorm.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of CLIPVisionModel.*: post_layernorm\.weight"):
        build_encoder(tmp_path)


def test_a_hub_id_without_a_network_says_how_to_get_a_folder() -> None:
    with pytest.raises(FileNotFoundError, match=r"nobody/nothing is no local folder.*hf download nobody/nothing"):
        build_encoder("nobody/nothing")


def test_networks_that_do_not_take_images_are_refused(clip_folder: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, vocab_size=20)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="is a BertModel, whose input is input_ids, not pixel_values"):
        build_encoder(tmp_path / "bert")


def test_options_that_would_do_nothing_are_refused(clip_folder: Path) -> None:
    with pytest.raises(ValueError, match="kind, image_size: for the 'tiny' encoder only"):
        build_encoder(clip_folder, kind="vit", image_size=8)
    with pytest.raises(ValueError, match="of kind 'mlp' has no patch_size; it has image_size, hidden_size"):
        build_encoder("tiny", kind="mlp", patch_size=4)
    with pytest.raises(ValueError, match="kind must be one of clip, vit, mlp, got 'resnet'"):
        build_encoder("tiny", kind="resnet")
    for wrong, message in (({"image_size": 30}, r"image_size \(30\)"), ({"num_heads": 3}, r"hidden_size \(16\)")):
        with pytest.raises(ValueError, match=message):
            build_encoder("tiny", **{**SIZES, "patch_size": 4, **wrong})


def test_an_encoder_of_ones_own_backbone(tmp_path: Path) -> None:
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    encoder = ImageEncoder(backbone, 4)
    assert torch.equal(features(encoder), backbone(IMAGES)) and encoder.dim == 4
    with pytest.raises(ValueError, match="backbone of type Sequential has no save_pretrained"):
        save_encoder(encoder, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="features of length 4, the projection takes"):
        ImageEncoder(backbone, 4, nn.Linear(5, 2, bias=False))


def test_what_is_saved_tells_its_kind(tmp_path: Path) -> None:
    save_encoder(tiny("mlp"), tmp_path / "mlp")
    config = json.loads((tmp_path / "mlp" / "config.json").read_text())
    assert config.pop("model_type") == "zoo_residual_mlp"
    assert config == {"image_size": 8, "hidden_size": 16, "num_layers": 2, "num_channels": 1, "output_size": 64}
    shutil.copytree(tmp_path / "mlp", tmp_path / "copy")
    assert build_encoder(tmp_path / "copy").dim == 64


@pytest.mark.parametrize("kind", KINDS)
def test_a_dummy_image_fits_its_encoder(kind: str) -> None:
    encoder = tiny(kind, num_channels=1)
    image = encoder.dummy_images()
    assert image.shape == (1, 1, 8, 8) and not image.any()
    assert encoder(image).shape == (1, encoder.dim)
    with pytest.raises(ValueError, match="config of Flatten has no image_size"):
        ImageEncoder(nn.Flatten(), 192).dummy_images()
