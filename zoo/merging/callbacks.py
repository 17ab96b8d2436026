"""Watches merging in a Lightning run, and merges at the end of one; for modules of any kind."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from zoo.common.artifacts import log_figure
from zoo.merging import one_shot
from zoo.merging.drawing import block_of
from zoo.merging.figures import plot_coefficients
from zoo.merging.merged_model import find_prefix
from zoo.merging.stream import Selection, VectorStream
from zoo.merging.weights import match_weights, open_weights

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from zoo.merging.weights import Source

log = logging.getLogger(__name__)

MERGES = ("weight_average", "task_arithmetic", "magnitude_merge", "ties_merge", "dare_merge")
_SHARDED = ("FSDP", "DeepSpeed", "ModelParallel")


class CoefficientLogger(Callback):
    """Logs and draws merging coefficients while they are learnt.

    For modules with `coefficients()`, a tensor `(L, K)`, with `layer_names`, and with `task_names` (or `merge_tasks`,
    where these are not all tasks).

        Trainer(callbacks=[CoefficientLogger(every_n_steps=10)])

    Logs `coef/<task>`, the mean over the layers, and `coef/<block>/<task>`. The picture `coefficients` lies with the
    run.

    Args:
        every_n_steps: Optimizer steps between two logs.
        draw_every_n_steps: Optimizer steps between two pictures; 0 for the end of the fit alone.
        blocks: Whether to log the means of blocks too: a number for each block and task.

    Raises:
        ValueError: If an option is out of range, or the coefficients do not fit the names.
        TypeError: At the start of a fit, if the module has no coefficients.
    """

    def __init__(self, every_n_steps: int = 50, draw_every_n_steps: int = 0, blocks: bool = True) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        if draw_every_n_steps < 0:
            raise ValueError(f"draw_every_n_steps must not be negative, got {draw_every_n_steps}")
        self._every, self._draw_every, self._blocks = every_n_steps, draw_every_n_steps, blocks
        self._logged_at = self._drawn_at = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module without coefficients."""
        lacking = [name for name in ("coefficients", "layer_names", "task_names") if not hasattr(pl_module, name)]
        if stage == "fit" and lacking:
            raise TypeError(
                f"CoefficientLogger needs {', '.join(lacking)} of {type(pl_module).__name__}: coefficients(), a tensor "
                "(layers, tasks), and layer_names and task_names"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what the fit starts with."""
        self._logged_at = self._drawn_at = -1
        self._log(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log and draw when it is time."""
        step = trainer.global_step
        if step % self._every == 0 and step != self._logged_at:
            self._log(trainer, pl_module)
        if self._draw_every and step and step % self._draw_every == 0 and step != self._drawn_at:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log and draw what the fit ends with."""
        if trainer.global_step != self._logged_at:
            self._log(trainer, pl_module)
        if trainer.global_step != self._drawn_at:
            self._draw(trainer, pl_module)

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        coef, layers, tasks = _coefficients(pl_module)
        self._logged_at = trainer.global_step
        found = _by_task("coef", coef, tasks)
        if self._blocks:
            rows: dict[str, list[int]] = {}
            for place, layer in enumerate(layers):
                rows.setdefault(block_of(layer), []).append(place)
            for block, places in rows.items():
                found |= _by_task(f"coef/{block}", coef[places], tasks)
        # Past the Trainer's own logging, which would show only the steps that its log_every_n_steps shares with ours.
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in found.items()})
        for logger in trainer.loggers:
            logger.log_metrics(found, step=trainer.global_step)

    def _draw(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._drawn_at = trainer.global_step
        if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            title = f"merging coefficients, step {trainer.global_step}"
            log_figure(pl_module, "coefficients", plot_coefficients(*_coefficients(pl_module), title))


class MergeOnFitEnd(Callback):
    """Merges the weights that a fit ends with and other experts, and writes the result as safetensors.

        MergeOnFitEnd("base.safetensors", {"mnist": "mnist.safetensors"}, out="merged.safetensors", coef=0.4)

    The module may hold the network under any name and may have more than it, such as a head: what counts are the names
    of the pre-trained weights. That all fits is checked before the fit. The first process writes, the others wait for
    it; under `fast_dev_run` nothing is written.

    Args:
        pretrained: What all were fine-tuned from: module, state dict, file or folder (see `open_weights`).
        experts: The other experts by task.
        method: "weight_average", "task_arithmetic", "magnitude_merge", "ties_merge" or "dare_merge" of
            `zoo.merging.one_shot`.
        out: The file to write.
        task: What the module that is trained is called among the experts.
        options: Of the method, such as `coef`, and which parameters are merged (see `Selection`).

    Raises:
        ValueError: If the method or an option is unknown, `task` is the name of another expert, or, before the fit,
            weights do not fit each other.
        FileNotFoundError: Before the fit, if a file is missing.
        MisconfigurationException: Before the fit, under a strategy that cuts parameters into pieces.
    """

    def __init__(
        self,
        pretrained: Source,
        experts: Mapping[str, Source],
        method: str = "task_arithmetic",
        *,
        out: str | Path,
        task: str = "trained",
        **options: Any,
    ) -> None:
        if method not in MERGES:
            raise ValueError(f"method must be one of {', '.join(MERGES)}, got {method!r}")
        if task in experts:
            raise ValueError(f"there is an expert {task!r} already: give the trained module another name with task=")
        self._merge = getattr(one_shot, method)
        selections = set(Selection.__annotations__)
        own = inspect.signature(self._merge).parameters.keys() - {"pretrained", "experts", "out", "selection"}
        unknown = options.keys() - own - selections
        if unknown:
            raise ValueError(
                f"{method} has no option {', '.join(sorted(unknown))}; there are {', '.join(sorted(own | selections))}"
            )
        self._pretrained, self._experts, self._out = pretrained, dict(experts), Path(out).expanduser()
        self._task, self._options = task, options
        self._selection = {name: value for name, value in options.items() if name in selections}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse now what could not be merged after hours of training."""
        strategy = type(trainer.strategy).__name__
        if any(name in strategy for name in _SHARDED):
            raise MisconfigurationException(
                f"MergeOnFitEnd cannot see whole weights under {strategy}: save a full checkpoint, and merge it with "
                "`python -m zoo.merging merge`"
            )
        VectorStream(self._pretrained, self._all(pl_module), **self._selection)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge and write."""
        if getattr(trainer, "fast_dev_run", False):
            log.info(f"fast_dev_run: {self._out} is not written.")
            return
        if trainer.is_global_zero:
            self._merge(self._pretrained, self._all(pl_module), out=self._out, **self._options)
            log.info(f"Merged {', '.join([*self._experts, self._task])}: {self._out}")
        trainer.strategy.barrier("merged")

    def _all(self, pl_module: LightningModule) -> dict[str, Source]:
        """All experts, the trained one with the names and on the device of the base."""
        chosen = {name: self._selection[name] for name in ("include", "exclude") if name in self._selection}
        base = open_weights(self._pretrained, "pretrained", key_map=self._selection.get("key_map", "auto"))
        prefix = find_prefix(pl_module, match_weights(base, {"pretrained": base}, **chosen))
        state = pl_module.state_dict()
        own = {name: state[prefix + name].detach().cpu() for name in base if prefix + name in state}
        return {**self._experts, self._task: own}


def _coefficients(pl_module: LightningModule) -> tuple[Tensor, Sequence[str], Sequence[str]]:
    """Coefficients `(L, K)`, names of layers and of tasks."""
    module: Any = pl_module
    coef = module.coefficients().detach().float().cpu()
    layers, tasks = module.layer_names, getattr(module, "merge_tasks", module.task_names)
    if tuple(coef.shape) != (len(layers), len(tasks)):
        raise ValueError(
            f"{type(module).__name__}.coefficients() has the shape {tuple(coef.shape)}, expected {len(layers)} layers "
            f"x {len(tasks)} tasks"
        )
    return coef, layers, tasks


def _by_task(prefix: str, coef: Tensor, tasks: Sequence[str]) -> dict[str, float]:
    return {f"{prefix}/{task}": mean for task, mean in zip(tasks, coef.mean(0).tolist(), strict=True)}
