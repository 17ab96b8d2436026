"""A base, its experts and their heads: where they come from."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.common.reproducibility import run_seed
from zoo.merging.backbones import ImageEncoder, build_encoder
from zoo.merging.evaluation import TaskEvaluation
from zoo.merging.expert_folder import ExpertFolder, read_expert_folder
from zoo.merging.features import FeatureFn, default_features
from zoo.merging.finetune import prototype_heads
from zoo.merging.heads import CosineHead, as_head, check_head, load_heads
from zoo.merging.merged_model import freeze
from zoo.merging.recipe import Recipe, train_experts
from zoo.merging.weights import open_weights
from zoo.merging.zero_shot import zero_shot_heads

if TYPE_CHECKING:
    from zoo.merging.layers import LayerFn
    from zoo.merging.task_vectors import TaskVectorStore
    from zoo.merging.weights import KeyMap

log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_HEAD_SCALE = 16.0


class ExpertModule(TaskEvaluation):
    """A base and its experts, ready to be merged.

    The experts come as a folder that `TaskExperts` wrote, as a mapping from tasks to modules, state dicts or paths, or,
    for demos and studies, they are trained on the spot by a `recipe` and kept for the next run. None of them is a
    parameter of this module: optimizers, checkpoints and DistributedDataParallel see what the method trains only.

    Args:
        tasks: One mapping for each task that is evaluated, with `name` and `num_classes`.
        experts: A folder of experts, or by task a module, state dict, safetensors or weights-only torch file, Hugging
            Face or LoRA folder.
        pretrained: The base: the folder's own by default, or a path, hub id, state dict or module.
        heads: Frozen heads: those of the folder by default, a file of `save_heads`, by task a module or a weight
            `(classes, features)`, or "zero_shot" for heads from the text tower of `text_model`.
        text_model: CLIP model of the zero-shot heads, `pretrained` by default.
        encoder: The network: a module, or "tiny", or whatever `build_encoder` takes; that of `pretrained` by default.
        encoder_options: Options of "tiny".
        merge_tasks: Tasks whose experts are merged; all by default. The others are unseen: evaluated only.
        include: Regular expressions of the parameters to merge; all by default.
        exclude: Regular expressions of parameters to leave as in the base.
        granularity: Which parameters share a coefficient: "task", "block", "module", "layer", or a function of names.
        key_map: How names in the files become those of the network: "auto", "none" or a function.
        buffers: Floating statistics of BatchNorm: "pretrained" or "average".
        tau_dtype: Type of the task vectors: "float32", "bfloat16" (half the memory), "float16" or "float64".
        mmap: File to keep the task vectors in, instead of memory.
        feature_fn: Features `(batch, d)` from (model, batch); `default_features` by default.
        recipe: Options of `Recipe`, for experts trained on the spot.
        head_scale: Scale of the random prototypes that are the heads of a recipe.

    Raises:
        ValueError: If options contradict each other or are out of range.
        FileNotFoundError: If a file is missing.
    """

    _experts: Any
    _pretrained: Any

    def __init__(
        self,
        tasks: list[dict[str, Any]],
        experts: Any = None,
        pretrained: Any = None,
        heads: Any = None,
        text_model: str | None = None,
        encoder: Any = "tiny",
        encoder_options: dict[str, Any] | None = None,
        merge_tasks: list[str] | None = None,
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        granularity: str | LayerFn = "layer",
        key_map: KeyMap = "auto",
        buffers: str = "pretrained",
        tau_dtype: str = "float32",
        mmap: str | None = None,
        feature_fn: FeatureFn | None = None,
        recipe: dict[str, Any] | None = None,
        head_scale: float = _HEAD_SCALE,
    ) -> None:
        super().__init__([task["name"] for task in tasks])
        self.num_classes = {task["name"]: int(task["num_classes"]) for task in tasks}
        if tau_dtype not in _DTYPES:
            raise ValueError(f"tau_dtype must be one of {', '.join(_DTYPES)}, got {tau_dtype!r}")
        # Not set as attributes: those that are modules would be registered.
        self.__dict__.update(_experts=experts, _pretrained=pretrained)
        self._text_model = text_model
        self._own_network = isinstance(encoder, nn.Module) or encoder != "tiny"
        self._include, self._exclude, self._granularity = include, exclude, granularity
        self._key_map, self._statistics, self._mmap = key_map, buffers, mmap
        self._tau_dtype = _DTYPES[tau_dtype]
        self.feature_fn = feature_fn or default_features
        self.recipe = None if recipe is None else Recipe.from_options(recipe)
        self._folder: ExpertFolder | None = None
        self._store: TaskVectorStore | None = None
        self._trained_on: dict[str, Any] = {}
        self._said: set[str] = set()
        self.merge_tasks = self._merged_tasks(merge_tasks)
        if isinstance(experts, (str, Path)):
            self._folder = read_expert_folder(experts, self.merge_tasks)
        # In a tuple: attributes that are modules would be registered.
        self._network = (freeze(self._build(encoder, encoder_options or {})),)
        own = self.encoder.backbone if isinstance(self.encoder, ImageEncoder) else self.encoder
        self._merged_part = (own,)
        self.prefix = "backbone." if isinstance(self.encoder, ImageEncoder) else ""
        built = self._build_heads(heads, head_scale)
        self.heads = nn.ModuleList(built[name] for name in self.task_names)
        self._zero_shot = isinstance(heads, str) and heads == "zero_shot"

    def _merged_tasks(self, chosen: list[str] | None) -> list[str]:
        experts = self._experts
        if experts is None and self.recipe is None:
            raise ValueError(
                "experts are missing: give --model.experts, a folder that `python train.py --model TaskExperts ...` "
                "left, or a mapping from tasks to paths; or a recipe, to train small ones on the spot"
            )
        if experts is not None and self.recipe is not None:
            raise ValueError("experts and recipe exclude each other: experts are given, or trained on the spot")
        there = list(experts) if isinstance(experts, Mapping) else None
        names = chosen or there or self.task_names
        unknown = [name for name in names if name not in self.task_names]
        if unknown:
            raise ValueError(
                f"there is an expert or a merge_tasks entry {unknown[0]!r}, but the tasks of the data are "
                f"{', '.join(self.task_names)}"
            )
        lacking = [name for name in names if there is not None and name not in there]
        if lacking or (there is not None and chosen is None and set(there) != set(self.task_names)):
            missing = lacking or [name for name in self.task_names if name not in there]  # type: ignore[operator]
            raise ValueError(
                f"experts has {', '.join(there or [])}, but not {', '.join(missing)} of the tasks "
                f"{', '.join(self.task_names)}: give these experts, or name in merge_tasks those to merge"
            )
        if len(set(names)) < len(names) or not names:
            raise ValueError(f"merge_tasks must name at least one task, each once, got {names}")
        return list(names)

    @property
    def encoder(self) -> nn.Module:
        """The network, frozen; its own weights are those of the base."""
        return self._network[0]

    def _build(self, encoder: Any, options: Mapping[str, Any]) -> nn.Module:
        pretrained = self._pretrained
        if isinstance(encoder, nn.Module):
            return copy.deepcopy(encoder)
        if isinstance(pretrained, nn.Module):
            return copy.deepcopy(pretrained)
        if self._folder is not None and pretrained is None:
            return build_encoder(self._folder.pretrained)
        if isinstance(pretrained, (str, Path)) and encoder == "tiny":
            return build_encoder(pretrained)
        if self.recipe is None and isinstance(pretrained, Mapping):
            raise ValueError("a base given as a state dict needs the network: give encoder=, a module")
        if self.recipe is None and pretrained is None:
            raise ValueError("experts given one by one need the base they were fine-tuned from: give pretrained")
        return build_encoder(str(encoder), **options)

    def _build_heads(self, heads: Any, scale: float) -> dict[str, nn.Module]:
        given: Mapping[str, Any]
        dim = getattr(self.encoder, "dim", None)
        if isinstance(heads, Mapping):
            given = heads
        elif heads == "zero_shot":
            # Filled in when the class names are known; the shapes are needed to load a checkpoint.
            given = {task: CosineHead(torch.zeros(count, int(dim or 0))) for task, count in self.num_classes.items()}
        elif heads is not None:
            given = load_heads(heads)
        elif self._folder is not None:
            given = load_heads(self._folder.heads)
        elif self.recipe is not None:
            given = self._prototypes(scale)
        else:
            raise ValueError("heads are missing: give a file of save_heads, or a head for each task")
        missing = [task for task in self.task_names if task not in given]
        if missing:
            raise ValueError(f"there is no head for {', '.join(missing)}: heads has {', '.join(given)}")
        built = {task: freeze(as_head(given[task])) for task in self.task_names}
        for task, head in built.items():
            check_head(task, head, self.num_classes[task], dim)
        return built

    def _prototypes(self, scale: float) -> dict[str, nn.Module]:
        dim = int(getattr(self.encoder, "dim", 0))
        if not dim:
            raise ValueError("a recipe needs an encoder of build_encoder, whose number of features is known")
        return prototype_heads(self.num_classes, dim, scale)

    def head(self, task: str) -> nn.Module:
        """The frozen head of a task."""
        return self.heads[self.task_names.index(task)]

    @property
    def folder(self) -> ExpertFolder | None:
        """The folder of experts, where they come from one."""
        return self._folder

    def sources(self) -> tuple[Any, dict[str, Any]]:
        """Base and experts, as `open_weights` takes them."""
        given: Mapping[str, Any]
        if self._folder is not None:
            given = self._folder.experts
        else:
            assert isinstance(self._experts, Mapping)
            given = self._experts
        found = {task: given[task] for task in self.merge_tasks}
        base: Any = self._merged_part[0]
        if self.recipe is None and (self._own_network or isinstance(self._pretrained, Mapping)):
            # The network was not made of the base.
            own = self._folder.pretrained if self._folder is not None else base
            base = self._ordered(_backbone(own if self._pretrained is None else self._pretrained))
        return _backbone(base), {task: _backbone(source) for task, source in found.items()}

    def _ordered(self, base: Any) -> dict[str, Tensor]:
        """The base's weights in the order of the network: the rows of coefficients follow it."""
        network = self._merged_part[0]
        known = self._key_map if isinstance(self._key_map, str) else "none"
        opened = open_weights(base, "pretrained", key_map=known, model=network)
        places = {name: place for place, name in enumerate(network.state_dict())}
        return {name: opened[name] for name in sorted(opened, key=lambda name: places.get(name, len(places)))}

    def selection(self) -> dict[str, Any]:
        """What of them is merged: keyword arguments of the one-shot merges."""
        return {
            "include": self._include,
            "exclude": self._exclude,
            "key_map": self._key_map,
            "buffers": self._statistics,
        }

    def _train_recipe(self) -> None:
        assert self.recipe is not None
        known = self._trained_on.get("folder")
        if known is not None:
            self._folder = read_expert_folder(known, self.merge_tasks)
            return
        data = getattr(self.trainer, "datamodule", None)
        if data is None or not hasattr(data, "train_loader"):
            raise ValueError(
                "a recipe trains on the data module's labelled images: give the Trainer a ClassificationTasksData, or "
                "give experts"
            )
        seed = run_seed()
        fingerprints = [data.fingerprint(part) for part in ("pretrain", "finetune")]
        shape = {name: list(tensor.shape) for name, tensor in self.encoder.state_dict().items()}
        heads = [[list(head.weight.shape), float(head.scale)] for head in self.heads if isinstance(head, CosineHead)]
        own = getattr(data, "seed", None)
        key = self.recipe.key(self.task_names, fingerprints, shape, heads, seed, *([] if own is None else [own]))
        # Beside the folders of runs: later runs of any module find them there.
        places = [logger.save_dir for logger in self.trainer.loggers if logger.save_dir]
        root = Path(places[0] if places else self.trainer.default_root_dir) / "experts" / key
        log.info(f"Base and experts: {root}")
        self._folder = train_experts(
            root,
            _as_image_encoder(self.encoder),
            {task: self.head(task) for task in self.task_names},
            data,
            self.recipe,
            tasks=self.task_names,
            seed=seed,
            feature_fn=self.feature_fn,
            device=self.trainer.strategy.root_device,
            progress=any(type(c).__name__.endswith("ProgressBar") for c in self.trainer.callbacks),  # type: ignore[attr-defined]
        )

    def _fill_zero_shot(self) -> None:
        data = getattr(self.trainer, "datamodule", None)
        prompts = getattr(data, "prompts", None)
        if not prompts:
            raise ValueError(
                "heads: zero_shot needs the class names and the prompt templates of the data, which this data module "
                "does not have; give heads of zero_shot_heads(...)"
            )
        found = zero_shot_heads(
            self._text_model or self._pretrained,
            class_names={task: prompts[task]["class_names"] for task in self.task_names},
            templates={task: prompts[task]["templates"] for task in self.task_names},
        )
        for task in self.task_names:
            self.head(task).load_state_dict(found[task].state_dict())
        self._trained_on["zero_shot"] = True


def _backbone(source: Any) -> Any:
    return source.backbone if isinstance(source, ImageEncoder) else source


def _as_image_encoder(encoder: nn.Module) -> ImageEncoder:
    if not isinstance(encoder, ImageEncoder):
        raise ValueError("a recipe trains an encoder of build_encoder; experts of other networks are given")
    return encoder
