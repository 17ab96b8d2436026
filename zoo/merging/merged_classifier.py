"""A base and its experts merged in one shot, or not at all: the rows that AdaMerging and Surgery are compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.common.hyperparameters import plain_hyperparameters
from zoo.merging.merging_module import MergingModule
from zoo.merging.rules import RULES, check_rule, merge_by_rule

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

METHODS = ("individual", *RULES)


class MergedClassifier(MergingModule):
    """Evaluates a merge that needs no training, or what it is compared with.

    Args:
        rule: "pretrained" (the base), "individual" (each expert on its task), "joint" (one encoder trained on all
            tasks, where the folder of experts has one), "average", "task_arithmetic", "magnitude", "ties", "dare",
            "dare_ties", "fisher", "regmean", or "adamerging" (with coefficients of an earlier run).
        rule_options: Options of the rule, such as `coef`, `density`, `drop` or `coef_path` (see `RULES`).
        sources: What is merged: the arguments of `MergingModule`.

    Raises:
        ValueError: If the rule or an option is unknown.
    """

    def __init__(
        self,
        tasks: list[dict[str, Any]],
        rule: str = "task_arithmetic",
        rule_options: dict[str, Any] | None = None,
        **sources: Any,
    ) -> None:
        super().__init__(tasks, **sources)
        self.save_hyperparameters(ignore=plain_hyperparameters({"tasks": tasks, **sources}))
        if rule not in METHODS:
            raise ValueError(f"rule must be one of {', '.join(METHODS)}, got {rule!r}")
        if rule != "individual":
            check_rule(rule, rule_options or {})
        elif rule_options:
            raise ValueError(f"individual has no options, got {', '.join(rule_options)}")
        self.rule, self.rule_options = rule, dict(rule_options or {})
        # There is nothing to optimize, and Lightning need not warn about it in every step.
        self.automatic_optimization = False
        self._merged: dict[str, Tensor] = {}
        self._present = ""

    def setup(self, stage: str) -> None:
        """Read the experts and merge them."""
        super().setup(stage)
        if not self._merged and self.rule != "individual":
            self._merged = merge_by_rule(self, self.rule, self.rule_options, self.calibration_batches)

    def merged(self) -> dict[str, Tensor]:
        """The merged parameters by name; there from `setup` on.

        Raises:
            ValueError: For "individual", which merges nothing.
        """
        if self.rule == "individual":
            raise ValueError("individual experts are not merged")
        return self._merged

    def task_logits(self, batch: Any, task: str) -> Tensor:
        """Logits `(batch, classes)` by the merged weights, or by the task's expert (by the base, if it has none)."""
        if self.rule == "individual" and self._present != task:
            expert = self.store.expert(task) if task in self.merge_tasks else dict(self.store.merge(0.0))
            self._merged, self._present = expert, task
        with torch.no_grad():
            return self.logits_with(self._merged, batch, task)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """End the training: the merge is complete after `setup`."""
        self.trainer.should_stop = True

    def configure_optimizers(self) -> None:
        """No optimizer."""

    def export(self, path: str | Path | None = None) -> dict[str, Tensor]:
        """The merged weights as a plain state dict with the base's names and types.

        Args:
            path: File to write them to, as safetensors.
        """
        return self.exported(self.merged(), path)
