"""API-CL: one learner grows from a stream of black-box APIs, with or without a little real data.

The paper's text beyond its abstract could not be read: settings and components are the paper's, the exact formulas are
a documented reconstruction.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from zoo.api_cl.api_session import look, shared_ledger
from zoo.api_cl.apis import APIBuilder
from zoo.api_cl.game import StudentObjective
from zoo.api_cl.gaps import GAPS, ResponseGap
from zoo.api_cl.generator_objective import GeneratorObjective
from zoo.api_cl.generators import GENERATORS
from zoo.api_cl.ledger import QueryBudgetExceeded, QueryLedger
from zoo.api_cl.memory import ReplayMemory
from zoo.api_cl.networks import Classifier, build_classifier
from zoo.api_cl.options import (
    METHODS,
    MODES,
    OPTIMIZERS,
    SCHEDULES,
    WITHOUT_API,
    at_least,
    check_memory,
    one_of,
)
from zoo.api_cl.similarity import SIMILARITIES
from zoo.api_cl.stream_tasks import StreamTasks
from zoo.api_cl.student_objective import CIL_TARGETS, SCENARIOS, ClassSets
from zoo.api_cl.zeroth_order import ZerothOrderGradient
from zoo.common.artifacts import log_figure, log_table
from zoo.common.hyperparameters import plain_hyperparameters
from zoo.common.reproducibility import mix, run_seed

if TYPE_CHECKING:
    from zoo.api_cl.black_box import BlackBoxAPI

log = logging.getLogger(__name__)


class APIStreamCL(StreamTasks):
    """Continual learning from a stream of APIs: generators that look for disagreement, a learner that removes it.

    One fit is the whole stream: epoch k is task k, and `max_epochs` is the number of tasks. A training batch says which
    task and step it is (`task`, `step`, `first`, `last`) and may hold real images and their global labels (`images`,
    `labels`). Query only services whose owner permits distillation.

    One optimizer step of the Trainer's count is one iteration: `generator_steps` rounds of the generators, then
    `student_steps` steps of the learner.

    Args:
        task_classes: By task, its global labels.
        num_classes: K, the learner's outputs.
        image_shape: Channels, rows and columns.
        task_names: Names of the tasks, for the log; numbers by default.
        model: Architecture of the learner (see `build_classifier`), or a module with `features`, `head` and `dim`.
        model_options: Options of the architecture.
        method: See `METHODS`.
        scenario: What real labels compete with in training: "til" or "cil". Both are always evaluated.
        apis: "train", APIs trained on the spot from the data's private images; or a list with one API a task, each a
            `BlackBoxAPI` or a mapping (see `APIBuilder.build`).
        api_archs: Architectures of APIs trained on the spot, taken in turn.
        api_arch_options: By architecture, its options, such as `{resnet18: {width: 16}}`.
        api_epochs: Epochs of their training.
        api_options: What they imitate of a service: `decimals`, `topk`, `label_only`, `latency`, `expose_gradient`.
        api_folder: Where trained APIs are kept for other runs; by default `apis` in the Trainer's root folder.
        generator: "df" or "dcgan".
        latent_dim: Length of the noise.
        base_channels: Width of the generators.
        num_directions: m, directions of the zeroth-order gradient.
        eps: Its step, or "auto" for what the API's precision asks for.
        directions: "auto", "sphere" or "orthonormal".
        central: Whether differences are central: twice the queries.
        gen_grad: "zo", "surrogate" (no gradient of the API at all) or "whitebox" (the control that needs a local API
            with `expose_gradient`).
        generator_gap: "l1", "kl" or "l1_prob".
        student_gap: Likewise, for the learner.
        tau: Temperature of the KL gap.
        adv_weight: lambda_adv.
        balance_weight: lambda_bal.
        conf_weight: lambda_conf.
        coop_weight: lambda_coop.
        coop_margin: mu, the hinge's margin.
        coop: "pixel", "feature" or "none".
        real_weight: alpha, of the labels of real images.
        memory_weight: beta, of replay.
        similarity_weight: gamma.
        similarity: "cka" (debiased), "cka_biased", "cosine", "logit_l2" or "none".
        classic_weight: Weight of the term of "lwf", "ewc" and "derpp".
        cil_target: "masked" or "padded", an ablation for scenario "cil".
        distill_real: Whether the API is imitated on real images as well.
        memory_size: M, images in all; shared out among the processes.
        memory_batch_size: Remembered images in a step; by default `student_batch_size`.
        balanced_memory: Whether a task's classes share its part of the memory equally.
        store_real: Whether real images are remembered, at most half of the memory.
        generator_batch_size: Images of each generator in a round, per process.
        student_batch_size: Synthetic images in a step of the learner, per process.
        generator_steps: Rounds of the generators in an iteration.
        student_steps: Steps of the learner in an iteration; real images of a batch are shared out among them.
        reuse_base: Whether the learner's first step takes the last round's images, already asked for.
        reset_generators: Whether each task starts with fresh generators.
        optimizer: Of the learner: "adam" or "sgd" (with momentum 0.9).
        lr: Its learning rate.
        weight_decay: Its weight decay.
        generator_lr: Learning rate of the generators' Adam.
        schedule: "none", "multistep" or "cosine", over each task.
        clip_norm: Bound of the gradients' norms; none by default.
        budget: Most rows asked in all, over all processes.
        budget_per_api: Most rows asked of one API.
        on_exhausted: "stop_task" or "raise", when a budget ends.
        seed: Of all that is drawn; by default the one of `seed_everything`.

    Raises:
        ValueError: If an option is unknown or out of range, or options contradict each other.
    """

    def __init__(
        self,
        task_classes: list[list[int]],
        num_classes: int,
        image_shape: list[int],
        task_names: list[str] | None = None,
        model: str | nn.Module = "lenet",
        model_options: dict[str, Any] | None = None,
        method: str = "ours",
        scenario: str = "til",
        apis: str | list[Any] = "train",
        api_archs: list[str] | None = None,
        api_arch_options: dict[str, Any] | None = None,
        api_epochs: int = 20,
        api_options: dict[str, Any] | None = None,
        api_folder: str | None = None,
        generator: str = "df",
        latent_dim: int = 256,
        base_channels: int = 64,
        num_directions: int = 1,
        eps: float | str = "auto",
        directions: str = "auto",
        central: bool = False,
        gen_grad: str = "zo",
        generator_gap: str = "l1",
        student_gap: str = "kl",
        tau: float = 1.0,
        adv_weight: float = 1.0,
        balance_weight: float = 1.0,
        conf_weight: float = 0.0,
        coop_weight: float = 1.0,
        coop_margin: float = 0.5,
        coop: str = "pixel",
        real_weight: float = 1.0,
        memory_weight: float = 1.0,
        similarity_weight: float = 1.0,
        similarity: str = "cka",
        classic_weight: float = 1.0,
        cil_target: str = "masked",
        distill_real: bool = True,
        memory_size: int = 2000,
        memory_batch_size: int | None = None,
        balanced_memory: bool = True,
        store_real: bool = True,
        generator_batch_size: int = 64,
        student_batch_size: int = 128,
        generator_steps: int = 1,
        student_steps: int = 5,
        reuse_base: bool = False,
        reset_generators: bool = True,
        optimizer: str = "adam",
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        generator_lr: float = 1e-3,
        schedule: str = "none",
        clip_norm: float | None = None,
        budget: int | None = None,
        budget_per_api: int | None = None,
        on_exhausted: str = "stop_task",
        seed: int | None = None,
    ) -> None:
        sets = ClassSets(task_classes, num_classes)
        super().__init__(sets, task_names)
        self.save_hyperparameters(ignore=plain_hyperparameters({"model": model, "apis": apis}))
        for name, value, allowed in (
            ("method", method, METHODS),
            ("scenario", scenario, SCENARIOS),
            ("gen_grad", gen_grad, MODES),
            ("similarity", similarity, SIMILARITIES),
            ("cil_target", cil_target, CIL_TARGETS),
            ("generator", generator, tuple(GENERATORS)),
            ("optimizer", optimizer, OPTIMIZERS),
            ("schedule", schedule, SCHEDULES),
        ):
            one_of(name, value, allowed)
        at_least(1, latent_dim=latent_dim, generator_batch_size=generator_batch_size)
        at_least(1, student_batch_size=student_batch_size, student_steps=student_steps, api_epochs=api_epochs)
        at_least(0, generator_steps=generator_steps, memory_size=memory_size, weight_decay=weight_decay)
        at_least(0, real_weight=real_weight, memory_weight=memory_weight, similarity_weight=similarity_weight)
        for name, rate in (("lr", lr), ("generator_lr", generator_lr)):
            if not rate > 0:
                raise ValueError(f"{name} must be positive, got {rate}")
        self.method, self.scenario, self.gen_grad = method, scenario, gen_grad
        self.asks = method not in WITHOUT_API
        self.image_shape = [int(size) for size in image_shape]
        self.distill_real = distill_real and self.asks
        self.store_real = store_real or not self.asks
        self.memory_batch_size = memory_batch_size or student_batch_size
        self.generator_batch_size, self.student_batch_size = generator_batch_size, student_batch_size
        self.generator_steps, self.student_steps = generator_steps, student_steps
        self.reuse_base, self.reset_generators = reuse_base, reset_generators
        self.optimizer_name, self.lr, self.weight_decay = optimizer, lr, weight_decay
        self.generator_lr, self.schedule, self.clip_norm, self.seed = generator_lr, schedule, clip_norm, seed
        self._estimator = {
            "num_directions": num_directions, "eps": eps, "directions": directions, "central": central,
        }  # fmt: skip
        self.latent_dim = latent_dim
        forgets = method == "sequential"
        if forgets or not self.asks:
            similarity_weight = 0.0
        self.memory_size = 0 if forgets or method in ("lwf", "ewc") else memory_size
        check_memory(
            self.memory_size, sum(map(len, task_classes)), similarity, similarity_weight > 0 and len(sets) > 1,
            self.memory_batch_size,
        )  # fmt: skip
        self.ewc_weight = classic_weight if method == "ewc" else 0.0
        self.student_objective = StudentObjective(
            sets,
            ResponseGap(student_gap, tau if student_gap == "kl" else 1.0),
            scenario,
            cil_target,
            real=real_weight,
            memory=memory_weight,
            similarity=similarity_weight,
            kind=similarity,
            lwf=classic_weight if method == "lwf" else 0.0,
            derpp=classic_weight if method == "derpp" else 0.0,
        )
        self.generator_objective = GeneratorObjective(
            adv_weight, balance_weight, conf_weight, coop_weight, coop_margin, coop
        )
        self._gap_name, self._tau = generator_gap, tau
        one_of("generator_gap", generator_gap, GAPS)
        # Refused now rather than after the APIs were trained.
        ZerothOrderGradient(num_directions, 1e-3 if eps == "auto" else float(eps), directions, central)

        if isinstance(model, nn.Module):
            learner = model
        else:
            learner = build_classifier(model, image_shape, num_classes, **(model_options or {}))
        if not all(hasattr(learner, name) for name in ("features", "head")):
            raise ValueError("model must have `features` (images to (B, d)) and `head`, a linear layer with K rows")
        self.learner: Classifier = learner  # type: ignore[assignment]
        self.previous: Classifier = copy.deepcopy(self.learner).requires_grad_(False)
        count = {"ours": 2, "sequential": 2, "frozen_generator": 2, "single_generator": 1}.get(method, 0)
        self.generators = nn.ModuleList(
            GENERATORS[generator](latent_dim, tuple(self.image_shape), base_channels) for _ in range(count)
        )
        if reuse_base and count * generator_batch_size != student_batch_size:
            raise ValueError(
                f"reuse_base needs student_batch_size = {count} x generator_batch_size = "
                f"{count * generator_batch_size}, got {student_batch_size}"
            )
        if self.ewc_weight:
            size = sum(parameter.numel() for parameter in self.learner.parameters())
            self.register_buffer("fisher", torch.zeros(size))
            self.register_buffer("anchor", torch.zeros(size))
        self._api_settings = (apis, api_archs or ["lenet"], api_arch_options, api_epochs, api_options, api_folder)
        self._apis: list[BlackBoxAPI] = []
        ledger = QueryLedger(budget, budget_per_api, on_exhausted)
        self.start_state(ledger, ReplayMemory(self.memory_size, balanced_memory, 0.5 if self.asks else 1.0))
        self.automatic_optimization = False

    def setup(self, stage: str) -> None:
        """Make the APIs.

        Raises:
            ValueError: If an API does not fit its task, or the precision is not one that differences can be taken in.
        """
        precision = str(self.trainer.precision)
        if precision in ("16-mixed", "16-true", "bf16-true"):
            raise ValueError(
                f"precision={precision} does not work here: differences of an API's answers need weights in single "
                "precision, and gradients are exchanged by hand. Use 32-true or bf16-mixed."
            )
        if stage != "fit" or not self.asks or self._apis:
            return
        apis, archs, arch_options, epochs, options, folder = self._api_settings
        builder = APIBuilder(
            self.sets.task_classes, self.image_shape, archs, arch_options, epochs, options=options,
            root=folder or Path(self.trainer.default_root_dir) / "apis", seed=run_seed(self.seed),
        )  # fmt: skip
        self._apis = builder.build(apis, getattr(self.trainer, "datamodule", None))
        if self.gen_grad == "whitebox" and not all(getattr(api, "expose_gradient", False) for api in self._apis):
            raise ValueError(
                "gen_grad=whitebox needs the APIs' gradient: give api_options: {expose_gradient: true}, or ModuleAPI "
                "objects that expose it"
            )
        self.ledger = shared_ledger(self.ledger, self.world)
        self.memory.size = self.memory_size // self.world
        for api in self._apis:
            # The limits of a service are those of all its clients together.
            api.share_rate(self.world)

    def on_train_start(self) -> None:
        """Warn of what cannot work, or of a stream that will not be finished."""
        data = getattr(self.trainer, "datamodule", None)
        if self.scenario == "cil" and self.asks and not getattr(data, "real_fraction", 1):
            rank_zero_warn(
                "scenario=cil without real images: nothing tells classes of different tasks apart but which generator "
                "drew an image. Expect class-incremental accuracy far below the task-incremental one."
            )
        epochs = self.trainer.max_epochs
        if self.trainer.max_steps == -1 and epochs is not None and 0 < epochs < len(self.sets):
            log.info(f"max_epochs={epochs} ends before the stream of {len(self.sets)} tasks: an epoch is a task")

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One iteration: rounds of the generators, then steps of the learner.

        Args:
            batch: A batch of the stream: `task`, `step`, `first`, `last`, `images`, `labels`.
            batch_idx: Its place in the task.

        Raises:
            QueryBudgetExceeded: If a budget ends and `on_exhausted` is "raise".
            ValueError: If the task goes backwards.
        """
        task, step = int(batch.task), int(batch.step)
        if batch.first or task != self.task:
            if self.task is not None and task < self.task:
                raise ValueError(f"a batch of task {task} came after task {self.task}: the stream must go forward")
            self._open_task(task)
        # Drawn from a generator of its own: a resumed run goes on with the numbers that an undisturbed one has.
        self._rng = torch.Generator(self.device).manual_seed(mix(run_seed(self.seed), task, step, self.global_rank))
        loss = torch.zeros((), device=self.device)
        try:
            if self.asks and self.session is None and not self.exhausted:
                self._open_session(task, batch)
            if self._may_go_on(batch):
                loss = self._iterate(batch, task, step)
                self.done += 1
        except QueryBudgetExceeded as error:
            if self.ledger.on_exhausted == "raise" or self.world > 1:
                raise
            self._stop_task(str(error))
        self.log("train/loss", loss, prog_bar=True, batch_size=1)
        if self.asks:
            self.log("queries", float(self.ledger.spent()), batch_size=1)
        if batch.last:
            self._close_task(task)

    def look(self, images: Tensor, task: int) -> Tensor | None:
        """Responses of a task's API, if it is a local one: to measure agreement, not counted."""
        if task >= len(self._apis):
            return None
        return look(self._apis[task], self.sets.task_classes[task], images)

    def on_fit_end(self) -> None:
        """Draw, and write what was asked."""
        if getattr(self.trainer, "fast_dev_run", False):
            return
        summary = self.ledger.summary()
        if not self.trainer.is_global_zero:
            return
        self.draw()
        if summary:
            from zoo.api_cl.figures import plot_queries

            log_figure(self, "queries", plot_queries(summary))
            log_table(self, "queries", list(summary[0]), [list(row.values()) for row in summary])

    def teardown(self, stage: str) -> None:
        """Close the APIs' connections."""
        for api in self._apis:
            api.close()
