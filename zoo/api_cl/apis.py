"""The APIs of a stream: given as objects, described in a config, or trained on the spot from private images."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from filelock import FileLock
from torch import Tensor
from torch.nn import functional as F

from zoo.api_cl.boxes import BlackBoxAPI, ModuleAPI
from zoo.api_cl.networks import ARCHITECTURES, Classifier, build_classifier
from zoo.common.reproducibility import mix

if TYPE_CHECKING:
    from collections.abc import Sequence

TYPES = ("train", "module", "http")
MODULE_OPTIONS = ("decimals", "topk", "label_only", "latency", "expose_gradient", "max_batch")
"""What a local API may imitate of a service."""


class PrivateData(Protocol):
    """What the data must offer for training APIs on the spot; `ClassStreamData` does."""

    def private(self, task: int) -> tuple[Tensor, Tensor]:
        """All training images of a task, uint8 `(n, c, h, w)`, and their global labels, int64 `(n,)`."""

    def fingerprint(self, task: int) -> str:
        """A hash of them."""


class APIBuilder:
    """Makes the APIs of a stream.

    Args:
        task_classes: By task, its global labels.
        image_shape: Channels, rows and columns.
        archs: Architectures of the APIs trained on the spot; taken in turn.
        arch_options: By architecture, options of `build_classifier`, such as `{resnet18: {width: 16}}`.
        epochs: Epochs of such a training.
        lr: Highest learning rate of its Adam.
        options: What these local APIs imitate of a service: `decimals`, `topk`, `label_only`, `latency`,
            `expose_gradient`, `max_batch`.
        root: Folder in which trained APIs are kept.
        seed: Of their weights and of the order of images.

    Raises:
        ValueError: If an option is unknown or out of range.
    """

    def __init__(
        self,
        task_classes: Sequence[Sequence[int]],
        image_shape: Sequence[int],
        archs: Sequence[str] = ("lenet",),
        arch_options: Mapping[str, Mapping[str, Any]] | None = None,
        epochs: int = 20,
        lr: float = 1e-3,
        options: Mapping[str, Any] | None = None,
        root: str | Path = "runs/apis",
        seed: int = 0,
    ) -> None:
        unknown = [name for name in archs if name not in ARCHITECTURES]
        if unknown or not archs:
            raise ValueError(
                f"api_archs has {unknown[0] if unknown else 'no name'!r}: expected some of {', '.join(ARCHITECTURES)}"
            )
        strange = [name for name in arch_options or {} if name not in ARCHITECTURES]
        if strange:
            raise ValueError(f"api_arch_options has {strange[0]!r}: expected some of {', '.join(ARCHITECTURES)}")
        if epochs < 1 or not lr > 0:
            raise ValueError(f"api_epochs and api_lr must be positive, got {epochs} and {lr}")
        wrong = [name for name in options or {} if name not in MODULE_OPTIONS]
        if wrong:
            raise ValueError(f"api_options has no {wrong[0]!r}: it has {', '.join(MODULE_OPTIONS)}")
        self.task_classes, self.image_shape = [list(classes) for classes in task_classes], tuple(image_shape)
        self.archs, self.epochs, self.lr = list(archs), epochs, lr
        self.arch_options = {arch: dict(own) for arch, own in (arch_options or {}).items()}
        self.options, self.root, self.seed = dict(options or {}), Path(root), seed

    def build(
        self, apis: str | Sequence[BlackBoxAPI | Mapping[str, Any]], data: PrivateData | None
    ) -> list[BlackBoxAPI]:
        """One API for each task, in their order.

        Args:
            apis: "train", or for each task an object or a mapping with `type`: "train" (and `arch`), "module" (`arch`,
                `weights`, a safetensors file, and `api_options`), or "http" (`url` and what `HTTPAPI` takes).
            data: Where private images come from, for "train".

        Raises:
            ValueError: If they do not fit the tasks.
            FileNotFoundError: If a file of weights is missing.
        """
        tasks = range(len(self.task_classes))
        if isinstance(apis, str):
            if apis != "train":
                raise ValueError(f"apis must be 'train' or a list with one API a task, got {apis!r}")
            apis = [{"type": "train"} for _ in tasks]
        if len(apis) != len(self.task_classes):
            raise ValueError(f"apis has {len(apis)} entries for {len(self.task_classes)} tasks: expected one a task")
        found = [
            api if isinstance(api, BlackBoxAPI) else self._described(task, api, data)
            for task, api in zip(tasks, apis, strict=True)
        ]
        check_classes(found, self.task_classes)
        return found

    def _described(self, task: int, api: Mapping[str, Any], data: PrivateData | None) -> BlackBoxAPI:
        if not isinstance(api, Mapping):
            raise ValueError(f"apis[{task}] is {api!r}: expected an API, or a mapping with its type")
        about = dict(api)
        kind = about.pop("type", None)
        if kind not in TYPES:
            raise ValueError(f"apis[{task}] has the type {kind!r}: expected one of {', '.join(TYPES)}")
        classes = tuple(about.pop("classes", self.task_classes[task]))
        if kind == "http":
            from zoo.api_cl.http_box import HTTPAPI

            if "url" not in about:
                raise ValueError(f"apis[{task}] of type http needs a url, such as http://127.0.0.1:8000")
            _known(task, about, list(inspect.signature(HTTPAPI).parameters))
            about.setdefault("input_shape", self.image_shape)
            return HTTPAPI(classes=classes, name=about.pop("name", f"api{task}"), **about)
        arch = about.pop("arch", self.archs[task % len(self.archs)])
        name = about.pop("name", f"api{task}-{arch}")
        weights = about.pop("weights", None)
        _known(task, about, MODULE_OPTIONS)
        if kind == "module":
            if weights is None:
                raise ValueError(f"apis[{task}] of type module needs weights, a safetensors file")
            network = load_network(weights, arch, self.image_shape, len(classes), self.arch_options.get(arch))
        else:
            if data is None or not hasattr(data, "private"):
                raise ValueError(
                    f"apis[{task}] is to be trained on the spot, which needs the private images of a ClassStreamData: "
                    "give the Trainer one, or give apis as a list of APIs"
                )
            network = self._trained(task, classes, arch, data)
        return ModuleAPI(network, classes, name=name, input_shape=self.image_shape, **{**self.options, **about})

    def _trained(self, task: int, classes: Sequence[int], arch: str, data: PrivateData) -> Classifier:
        """The network of an API, from its file if it was trained before."""
        from safetensors.torch import save_file

        options = self.arch_options.get(arch, {})
        settings = [data.fingerprint(task), task, list(classes), self.image_shape, arch, options]
        settings += [self.epochs, self.lr]
        digest = hashlib.blake2b(json.dumps([*settings, self.seed]).encode(), digest_size=8).hexdigest()
        path = self.root / f"{arch}-{digest}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if path.exists():
                return load_network(path, arch, self.image_shape, len(classes), options)
            images, labels = data.private(task)
            seed = mix(self.seed, task)
            network = train_api(arch, images, labels, classes, self.epochs, self.lr, seed, **options)
            partial = path.with_suffix(".part")
            save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, partial)
            partial.replace(path)
        return network


def train_api(
    arch: str,
    images: Tensor,
    labels: Tensor,
    classes: Sequence[int],
    epochs: int = 20,
    lr: float = 1e-3,
    seed: int = 0,
    batch_size: int = 64,
    **options: Any,
) -> Classifier:
    """Train the network behind an API, as its owner would: private images, cross-entropy, Adam with a cosine decay.

    Args:
        arch: One of `ARCHITECTURES`.
        images: uint8 `(n, c, h, w)`.
        labels: Global labels, int64 `(n,)`.
        classes: The API's classes, in the order of its answers.
        epochs: Passes over the images.
        lr: Highest learning rate.
        seed: Of the first weights and the order.
        batch_size: Images a step.
        options: Of the architecture.

    Returns:
        The network in eval mode; it takes images in [-1, 1].

    Raises:
        ValueError: If an image is of another class.
    """
    place = {label: column for column, label in enumerate(classes)}
    strangers = sorted(set(labels.tolist()) - set(place))
    if strangers:
        raise ValueError(f"an API of the classes {list(classes)} cannot learn from images of {strangers}")
    targets = torch.tensor([place[label] for label in labels.tolist()])
    canonical = images.float() / 127.5 - 1
    # Nothing that is drawn here may shift what the caller draws afterwards.
    with torch.random.fork_rng(devices=[]):
        # That of the CPU alone, where all is drawn: `torch.manual_seed` would seed GPUs too, which are not restored.
        torch.default_generator.manual_seed(seed)
        network = build_classifier(arch, tuple(images.shape[1:]), len(classes), **options)
        network.train()
        steps = epochs * max(1, len(images) // batch_size)
        optimizer = torch.optim.Adam(network.parameters(), lr=lr)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(epochs):
            # A rest of a few images is left to another epoch: normalisation by such a batch would be noise.
            for rows in torch.split(torch.randperm(len(images)), batch_size)[: max(1, len(images) // batch_size)]:
                loss = F.cross_entropy(network(canonical[rows]), targets[rows])
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                scheduler.step()
    return network.eval()


def load_network(
    path: str | Path,
    arch: str,
    image_shape: Sequence[int],
    num_classes: int,
    options: Mapping[str, Any] | None = None,
) -> Classifier:
    """A network with the weights of a safetensors file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or holds another network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected the weights of a {arch} as safetensors")
    with torch.random.fork_rng(devices=[]):
        # First weights are drawn only to be overwritten.
        network = build_classifier(arch, image_shape, num_classes, **(options or {}))
    try:
        network.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(
            f"{path} does not hold a {arch} for images {tuple(image_shape)} and {num_classes} classes: {reason}"
        ) from error
    return network.eval()


def _known(task: int, about: Mapping[str, Any], options: Sequence[str]) -> None:
    """Refuse an option that an API of this type does not have."""
    wrong = [key for key in about if key not in options]
    if wrong:
        raise ValueError(f"apis[{task}] has no option {wrong[0]!r}: it has {', '.join(options)}")


def check_classes(apis: Sequence[BlackBoxAPI], task_classes: Sequence[Sequence[int]]) -> None:
    """Refuse APIs whose classes overlap or are not those of their task, or that share a name.

    Raises:
        ValueError: Naming the APIs and the labels.
    """
    owner: dict[int, BlackBoxAPI] = {}
    for api in apis:
        for label in api.classes:
            if label in owner:
                raise ValueError(f"APIs {owner[label].name!r} and {api.name!r} both declare the class {label}")
            owner[label] = api
    names = [api.name for api in apis]
    for task, (api, classes) in enumerate(zip(apis, task_classes, strict=True)):
        if api.name in names[:task]:
            raise ValueError(
                f"the APIs of tasks {names.index(api.name)} and {task} are both named {api.name!r}: give each a name of"
                " its own, by which queries are counted and limited"
            )
        if set(api.classes) != set(classes):
            missing, extra = sorted(set(classes) - set(api.classes)), sorted(set(api.classes) - set(classes))
            raise ValueError(
                f"API {api.name!r} declares {list(api.classes)}, but task {task} of the data has {list(classes)}: "
                f"missing {missing or 'none'}, unknown {extra or 'none'}"
            )
