"""Watches in a Lightning run which task moves which layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer

from zoo.adatask.dominance import TaskDominance, check_sampling
from zoo.adatask.figures import mean_matrix, plot_dominance, plot_histograms
from zoo.adatask.hooks import TaskGradMixin
from zoo.adatask.optimizer import AdaTask
from zoo.common.artifacts import log_figure, log_table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pandas import DataFrame
    from torch import Tensor

MODES = ("auto", "exact", "instant")
SUMMARIES = ("mean", "median", "dominated", "entropy")
_COLUMNS = ("layer", "task", "mean", "median", "dominated", "entropy", "elements")


class TaskDominanceMonitor(Callback):
    """Logs, draws and keeps the tasks' shares rAU in the updates of each shared layer (see `TaskDominance`).

    For modules with `TaskGradMixin`, trained by `AdaTask` or by torch's SGD, RMSprop, Adagrad, Adam or AdamW.
    Training is not changed, but for the time of one gradient per task where a plain optimizer needs their sum alone.

        Trainer(callbacks=[TaskDominanceMonitor(every_n_steps=10)])

    Every epoch logs `rau/<layer>/<task>` (mean), `rau_median/<layer>/<task>`, `rau_dominated/<layer>` and
    `rau_entropy/<layer>`. The pictures `rau/heatmap` and `rau/histograms` and the table `rau` lie with the run; the
    averages are in its checkpoints.

    Args:
        decay: Of the average of squared updates.
        mode: "exact" keeps a first moment per task of optimizers with momentum; "instant" leaves their momentum out;
            "auto" is "instant" for a plain optimizer that is sampled, and else "exact".
        every_n_steps: Average over every n-th optimizer step.
        groups: What makes a layer: "module", "parameter", or a function of a parameter's name.
        log: What to log, of "mean", "median", "dominated" and "entropy".
        histogram_every_n_epochs: When to draw, and to write the table; 0 for the end of the fit alone.
        device: Where the averages lie, such as "cpu"; beside the parameters by default.
        subsample: Share of each parameter's elements to watch.

    Raises:
        ValueError: If an option is out of its range.
        TypeError: At the start of a fit, if the module has no `TaskGradMixin`.
        RuntimeError: At the start of a fit, if the step of the optimizer cannot be split.
    """

    def __init__(
        self,
        decay: float = 0.99,
        mode: str = "auto",
        every_n_steps: int = 1,
        groups: str | Callable[[str], str] = "module",
        log: Sequence[str] = ("mean", "dominated", "entropy"),
        histogram_every_n_epochs: int = 1,
        device: str | None = None,
        subsample: float = 1.0,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        unknown = [name for name in log if name not in SUMMARIES]
        if isinstance(log, str) or unknown:
            raise ValueError(f"log must be a list of {', '.join(SUMMARIES)}, got {log!r}")
        if histogram_every_n_epochs < 0:
            raise ValueError(f"histogram_every_n_epochs must not be negative, got {histogram_every_n_epochs}")
        self._mode, self._summaries, self._draw_every = mode, tuple(log), histogram_every_n_epochs
        self._options: dict[str, Any] = {
            "decay": decay, "every_n_steps": every_n_steps, "groups": groups, "device": device, "subsample": subsample,
        }  # fmt: skip
        check_sampling(decay, every_n_steps, groups, subsample)
        self._dominance: TaskDominance | None = None
        self._pending: dict[str, Any] = {}
        self._watched_before = False
        self._drawn_at = -1

    @property
    def state_key(self) -> str:
        """Tells apart the monitors of one run."""
        groups = self._options["groups"]
        kept = {name: self._options[name] for name in ("decay", "every_n_steps", "subsample")}
        return self._generate_state_key(
            **kept, mode=self._mode, groups=groups if isinstance(groups, str) else groups.__qualname__
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the module keep the gradients of its tasks apart."""
        if stage != "fit":
            return
        if not isinstance(pl_module, TaskGradMixin):
            raise TypeError(
                f"TaskDominanceMonitor needs gradients by task: derive {type(pl_module).__name__} from "
                "zoo.adatask.TaskGradMixin, and return self.joint_loss({task: loss, ...}) from training_step"
            )
        self._watched_before, pl_module.watch_tasks = pl_module.watch_tasks, True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the module; `table` still answers."""
        if stage == "fit" and isinstance(pl_module, TaskGradMixin):
            pl_module.watch_tasks = self._watched_before
            if self._dominance is not None:
                self._dominance.close()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch the optimizer, from where the checkpoint left off."""
        assert isinstance(pl_module, TaskGradMixin)
        if len(trainer.optimizers) != 1:
            raise RuntimeError(f"TaskDominanceMonitor watches one optimizer, this module has {len(trainer.optimizers)}")
        optimizer = trainer.optimizers[0]
        mode = self._mode
        if mode == "auto":
            sampled = self._options["every_n_steps"] > 1 and not isinstance(optimizer, AdaTask)
            mode = "instant" if sampled else "exact"
        names: dict[Tensor, str] = {parameter: name for name, parameter in pl_module.named_parameters()}
        self._dominance = TaskDominance(optimizer, pl_module.task_gradients, names, mode=mode, **self._options)
        self._drawn_at = -1
        if self._pending:
            self._dominance.load_state_dict(self._pending)
            self._pending = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the summaries and, when it is time, draw."""
        assert self._dominance is not None
        rows = self._dominance.table()
        # Every process has the same numbers; the average over them keeps Lightning from asking for it.
        pl_module.log_dict(self._metrics(rows), sync_dist=True, batch_size=1)
        if self._draw_every and (trainer.current_epoch + 1) % self._draw_every == 0:
            self._draw(pl_module, rows)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what the fit ends with."""
        assert self._dominance is not None
        if self._drawn_at != trainer.global_step:
            self._draw(pl_module, self._dominance.table())

    def _metrics(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        found: dict[str, float] = {}
        for row in rows:
            by_task = f"{row['layer']}/{row['task']}"
            keys = {
                "mean": f"rau/{by_task}",
                "median": f"rau_median/{by_task}",
                "dominated": f"rau_dominated/{row['layer']}",
                "entropy": f"rau_entropy/{row['layer']}",
            }
            found |= {keys[name]: row[name] for name in self._summaries}
        return found

    def _draw(self, pl_module: LightningModule, rows: Sequence[Mapping[str, Any]]) -> None:
        dominance, trainer = self._dominance, pl_module.trainer
        self._drawn_at = trainer.global_step
        if not rows or not trainer.is_global_zero:
            return
        assert dominance is not None
        tasks = dominance.tasks
        assert tasks is not None
        means, layers = mean_matrix(rows, tasks)
        title = f"share of the updates, step {trainer.global_step}"
        log_figure(pl_module, "rau/heatmap", plot_dominance(means, layers, tasks, title))
        log_figure(pl_module, "rau/histograms", plot_histograms(dominance.histograms(), len(tasks), tasks[0]))
        log_table(pl_module, "rau", _COLUMNS, [[row[name] for name in _COLUMNS] for row in rows])

    def table(self) -> DataFrame:
        """The summaries of `TaskDominance.table()` as they are now, a row per layer and task.

        Raises:
            RuntimeError: Before a fit.
        """
        from pandas import DataFrame

        if self._dominance is None:
            raise RuntimeError("there is nothing to show before a fit")
        return DataFrame(self._dominance.table(), columns=list(_COLUMNS))

    def state_dict(self) -> dict[str, Any]:
        """The averages, for the checkpoint."""
        return self._pending if self._dominance is None else self._dominance.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the averages of a checkpoint until the fit starts."""
        self._pending = state_dict
