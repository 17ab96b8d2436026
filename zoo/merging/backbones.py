"""Image encoders: a backbone whose weights are fine-tuned and merged, and a frozen projection after it.

`build_encoder` makes one from a config ("tiny", no network needed), from a folder or from a hub id, and `save_encoder`
writes the folder that it reads back. Names of weights are those in memory: transformers reads and writes other names
for some networks.
"""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from zoo.common.pretrained import local_folder, read_config
from zoo.merging.features import read_features
from zoo.merging.pretrained import load_image_network
from zoo.merging.tiny_backbones import ResidualMLP, tiny_clip, tiny_vit

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_MLP_TYPE = "zoo_residual_mlp"
_PROJECTION_FILE = "projection.safetensors"


class ImageEncoder(nn.Module):
    """A backbone and a frozen linear projection: images to features `(B, d)`, not normalised.

    Args:
        backbone: An image network of transformers, or any module whose output `read_features` can read. Its state
            dict is what is merged.
        width: Length of the backbone's features.
        projection: A linear map without bias from `width` to d, which is frozen and never merged; None for none.

    Raises:
        ValueError: If the projection takes features of another length.
    """

    def __init__(self, backbone: nn.Module, width: int, projection: nn.Linear | None = None) -> None:
        super().__init__()
        if projection is not None and projection.in_features != width:
            raise ValueError(f"the backbone gives features of length {width}, the projection takes {projection}")
        self.backbone = backbone
        self.projection: nn.Module = nn.Identity() if projection is None else projection.requires_grad_(False)
        self.dim = width if projection is None else projection.out_features

    def dummy_images(self) -> Tensor:
        """One black image `(1, C, H, W)` of the size that the backbone's config names.

        Raises:
            ValueError: If it names none.
        """
        config = getattr(self.backbone, "config", None)
        values = config if isinstance(config, dict) else vars(config) if config is not None else {}
        size, channels = values.get("image_size"), values.get("num_channels", 3)
        if size is None:
            raise ValueError(f"the config of {type(self.backbone).__name__} has no image_size")
        height, width = (size, size) if isinstance(size, int) else size
        return torch.zeros(1, int(channels), int(height), int(width))

    def forward(self, images: Tensor) -> Tensor:
        """Features `(B, d)` of images `(B, C, H, W)`."""
        features: Tensor = self.projection(read_features(self.backbone(images)))
        return features


def build_encoder(
    name: str | Path = "tiny", *, kind: str | None = None, projection_dim: int | None = None, **options: int
) -> ImageEncoder:
    """An image encoder in eval mode and float32.

    Args:
        name: "tiny" for a small network with fresh weights; a folder of `save_encoder` or `save_pretrained`; or a hub
            id. A full CLIP model gives its image tower with its visual projection.
        kind: For "tiny" only: "clip" (the default), CLIP's image tower; "vit", a ViT read at its class token; "mlp", a
            `ResidualMLP`.
        projection_dim: For "tiny" only: d of a frozen random projection; None for no projection.
        **options: For "tiny" only: `image_size` (32), `patch_size` (8), `hidden_size` (128), `num_layers` (4),
            `num_heads` (4) and `num_channels` (3). The MLP has no `patch_size` and no `num_heads`, works on grey images
            (`num_channels` 1), and has an `output_size` (64).

    Returns:
        The encoder.

    Raises:
        FileNotFoundError: If the folder lacks files, or the hub cannot be reached and its cache has nothing.
        ImportError: If transformers is needed and missing.
        ValueError: If an option is unknown, the network takes no images, or the weights do not fill it.
    """
    if str(name) == "tiny":
        backbone, width = _tiny(kind or "clip", options)
        projection = None if projection_dim is None else nn.Linear(width, projection_dim, bias=False)
        return ImageEncoder(backbone, width, projection).eval()
    given = [word for word, value in {"kind": kind, "projection_dim": projection_dim}.items() if value is not None]
    if given or options:
        raise ValueError(f"{', '.join([*given, *options])}: for the 'tiny' encoder only, {name} has its own config")
    folder = local_folder(name)
    config = read_config(folder) if folder else {}
    if folder and config.get("model_type") == _MLP_TYPE:
        backbone = ResidualMLP(**{option: value for option, value in config.items() if option != "model_type"})
        backbone.load_state_dict(_read(folder / "model.safetensors"))
        projection, width = None, config["output_size"]
    else:
        backbone, projection, width = load_image_network(name)
    if folder and (folder / _PROJECTION_FILE).is_file():
        weight = _read(folder / _PROJECTION_FILE)["weight"]
        projection = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        projection.load_state_dict({"weight": weight})
    return ImageEncoder(backbone, width, projection).eval()


def save_encoder(encoder: ImageEncoder, folder: str | Path) -> Path:
    """Writes an encoder so that `build_encoder(folder)` gives the same outputs bit for bit.

    Args:
        encoder: One of `build_encoder`, in float32.
        folder: Made if missing. Holds config.json, model.safetensors and, with a projection, projection.safetensors.

    Returns:
        The folder.

    Raises:
        ValueError: If the backbone is neither one of transformers nor a `ResidualMLP`.
    """
    backbone, folder = encoder.backbone, Path(folder)
    writer: Callable[[Path], object] | None = getattr(backbone, "save_pretrained", None)
    if writer is None and not isinstance(backbone, ResidualMLP):
        raise ValueError(f"a backbone of type {type(backbone).__name__} has no save_pretrained: save its state dict")
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(backbone, ResidualMLP):
        config = {"model_type": _MLP_TYPE, **backbone.config}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _write(folder / "model.safetensors", backbone)
    elif writer is not None:
        writer(folder)
    # A projection that an earlier encoder left here would be taken for this one's.
    (folder / _PROJECTION_FILE).unlink(missing_ok=True)
    if isinstance(encoder.projection, nn.Linear):
        _write(folder / _PROJECTION_FILE, encoder.projection)
    return folder


def load_backbone_weights(encoder: ImageEncoder, source: str | Path) -> ImageEncoder:
    """A copy of the encoder with the backbone of another checkpoint, an expert's for example.

    Args:
        encoder: The encoder that the checkpoint was fine-tuned from; left as it is. The copy keeps its projection.
        source: A folder or hub id, as in `build_encoder`, or a safetensors file with the backbone's names in memory.

    Returns:
        The copy, in eval mode.

    Raises:
        FileNotFoundError: If the checkpoint is not there.
        ValueError: If names or shapes differ; the message lists up to ten.
    """
    is_file = Path(source).suffix == ".safetensors"
    state = _read(Path(source)) if is_file else build_encoder(source).backbone.state_dict()
    fresh = copy.deepcopy(encoder)
    own = fresh.backbone.state_dict()
    wrong = [f"{key} is missing" for key in own if key not in state]
    wrong += [f"{key} is unknown to the encoder" for key in state if key not in own]
    wrong += [
        f"{key} has shape {tuple(state[key].shape)}, the encoder's has {tuple(tensor.shape)}"
        for key, tensor in own.items()
        if key in state and state[key].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(f"{source} does not fit the encoder in {len(wrong)} tensors: {'; '.join(wrong[:10])}")
    fresh.backbone.load_state_dict(state)
    return fresh.eval()


def _tiny(kind: str, options: Mapping[str, int]) -> tuple[nn.Module, int]:
    builders: dict[str, Callable[..., nn.Module]] = {"clip": tiny_clip, "vit": tiny_vit, "mlp": ResidualMLP}
    if kind not in builders:
        raise ValueError(f"kind must be one of {', '.join(builders)}, got {kind!r}")
    known = inspect.signature(builders[kind]).parameters
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ValueError(f"the tiny encoder of kind {kind!r} has no {', '.join(unknown)}; it has {', '.join(known)}")
    width_option = "output_size" if kind == "mlp" else "hidden_size"
    return builders[kind](**options), options.get(width_option, known[width_option].default)


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error})") from error


def _write(path: Path, module: nn.Module) -> None:
    from safetensors.torch import save_file

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    save_file(state, path, metadata={"format": "pt"})
