"""The command line of the zoo: LightningCLI with runs that can be resumed, compared and read later."""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import yaml
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import (
    LightningArgumentParser,
    LightningCLI,
    _InstantiatorFn,
)
from lightning.pytorch.loggers import Logger

from zoo.common.checkpoints import (
    AtomicCheckpointIO,
    BestCheckpoint,
    CheckpointError,
    LastCheckpoint,
    load_run_checkpoint,
    weights_mismatch,
)
from zoo.common.console import prepare_console, print_metrics, progress_callback
from zoo.common.dimensions import DIMENSIONS, resolve_dimension
from zoo.common.memory import TrimHeap
from zoo.common.parser import EXPECTED, LinkFailure, UsageError, ZooParser, cause_for_users, import_mentioned
from zoo.common.reproducibility import StepSeed
from zoo.common.run_logger import RunLogger, drop_later_rows, wandb_run_id
from zoo.common.runs import find_checkpoint, same_run
from zoo.common.trainer import SaveConfig, Stopwatch, ZooTrainer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import ModuleType

Names: TypeAlias = "tuple[ModuleType, Sequence[str]]"
"""A package, and those of its public names that may be given bare."""

RUNS = "runs"
SUBCOMMANDS = ("run", "fit", "validate", "test", "predict")


class _Instantiator(_InstantiatorFn):
    """Keeps links that the class has no argument for out of its hyperparameters, where they would block loading."""

    def __call__(self, class_type: Any, *args: Any, applied_instantiation_links: dict[str, Any], **kwargs: Any) -> Any:
        accepted = {k: v for k, v in applied_instantiation_links.items() if k.rpartition(".")[2] in kwargs}
        return super().__call__(class_type, *args, applied_instantiation_links=accepted, **kwargs)


class ZooCLI(LightningCLI):
    """LightningCLI with a `run` subcommand, safe checkpoints, and a folder per run.

    Args:
        models: Package with the models, and their names.
        data: The same for the data modules.

    Attributes:
        run_folder: Where this run wrote, or `None` under `fast_dev_run`.
        result: What `result.json` holds, after `run` and `test`.
    """

    def __init__(self, models: Names, data: Names):
        self.known = {"model": models[1], "data": data[1]}
        self.run_folder: Path | None = None
        self.result: dict[str, Any] | None = None
        self._resumed_folder: Path | None = None
        self._resumed_step = 0
        self._trained_dimensions: dict[str, Any] = {}
        import_mentioned(sys.argv[1:], (models, data))
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            trainer_class=ZooTrainer,
            parser_class=ZooParser,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            seed_everything_default=42,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's subcommands without `weights_only` (always on for local files), and `run`."""
        inherited = {name: {*skip, "weights_only", "verbose"} for name, skip in LightningCLI.subcommands().items()}
        return {"run": {"model", "datamodule"}, **inherited}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Tell the parser which bare class names there are."""
        # An abbreviated option would stop to work, or mean another one, when an option is added.
        parser = super().init_parser(allow_abbrev=False, **kwargs)
        assert isinstance(parser, ZooParser)
        parser.known = self.known
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of a run, and the links from the data's sizes to the model."""
        parser.add_argument(
            "--logger",
            type=Literal["csv", "wandb"],
            default="csv",
            help="`wandb` logs to Weights & Biases as well; metrics.csv is written in every case.",
        )
        parser.add_argument(
            "--save_every_n_steps",
            type=int | None,
            default=None,
            help="Write last.ckpt also after so many optimizer steps, for epochs that take long.",
        )
        for name in DIMENSIONS:
            parser.link_arguments(
                "data", f"model.init_args.{name}", compute_fn=self._link(name), apply_on="instantiate"
            )

    def _link(self, name: str) -> Callable[[LightningDataModule], Any]:
        def dimension(data: LightningDataModule) -> Any:
            arguments = self._get(self.config, "model").get("init_args") or {}
            if name not in arguments:
                return None
            typed = (self.typed.get("model", {}).get("init_args") or {}).get(name)
            model = _class_of(self._get(self.config, "model")["class_path"])
            try:
                return resolve_dimension(name, data, model, typed, self._trained_dimensions.get(name))
            except Exception as error:
                raise LinkFailure from error

        # The name stands in the help page's list of links.
        dimension.__name__ = name
        return dimension

    def _add_instantiators(self) -> None:
        for key, kind in (("model", LightningModule), ("data", LightningDataModule)):
            self.parser.add_instantiator(_Instantiator(cli=self, key=key), kind, subclasses=True)

    def _parse_ckpt_path(self) -> None:
        """Find the checkpoint, refuse one that contradicts the command, take from it what was not typed."""
        subcommand = self.config["subcommand"]
        section = self.config[subcommand]
        typed = self.parser.parse_args(sys.argv[1:], defaults=False)
        self.typed: dict[str, Any] = typed[subcommand].as_dict()
        if not section.get("ckpt_path"):
            return
        parser = self._subcommand_parsers[subcommand]
        config = yaml.safe_load(parser.dump(section, skip_none=False))
        try:
            path = self._checkpoint_path(section, config)
            checkpoint = load_run_checkpoint(path, resume=subcommand in ("run", "fit"))
        except (FileNotFoundError, CheckpointError) as error:
            raise UsageError(str(error)) from error
        if subcommand in ("run", "fit") and path.name == "last.ckpt" and same_run(path.parent, config):
            self._resumed_folder = path.parent
            self._resumed_step = checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"]
        hparams = dict(checkpoint.get("hyper_parameters") or {})
        hparams.pop("_instantiator", None)
        class_path = section["model"]["class_path"]
        trained_class = hparams.pop("_class_path", None)
        if trained_class is not None and trained_class.rpartition(".")[2] != class_path.rpartition(".")[2]:
            raise UsageError(
                f"{path} is a checkpoint of {trained_class}, but --model is {class_path}. Name the checkpoint's model, "
                "or another checkpoint."
            )
        self._adopt_hyperparameters(path, hparams)
        self.config[subcommand]["ckpt_path"] = str(path)

    def _checkpoint_path(self, section: Any, config: Mapping[str, Any]) -> Path:
        given = str(section["ckpt_path"])
        if given in ("last", "best"):
            name = section["model"]["class_path"].rpartition(".")[2]
            return find_checkpoint(self._root(section), name, given, config)
        return Path(given)

    def _adopt_hyperparameters(self, path: Path, hparams: Mapping[str, Any]) -> None:
        subcommand = self.config["subcommand"]
        parser = self._subcommand_parsers[subcommand]
        model = self.config[subcommand]["model"]
        now = yaml.safe_load(parser.dump(self.config[subcommand], skip_none=False, skip_link_targets=False))["model"]
        arguments = now.get("init_args") or {}
        typed = self.typed.get("model", {}).get("init_args") or {}
        shared = {key: value for key, value in hparams.items() if key in arguments}
        changed = {key: value for key, value in shared.items() if not _equal(value, arguments[key])}
        contradicted = sorted(key for key in changed if key in typed and arguments[key] is not None)
        if contradicted:
            lines = "; ".join(f"{key}: {changed[key]!r} there, {arguments[key]!r} here" for key in contradicted)
            raise UsageError(
                f"{path} was trained with other settings of {model['class_path']} than those given: {lines}. Leave "
                "these options out to take the checkpoint's values, or name another checkpoint."
            )
        self._trained_dimensions = {key: shared[key] for key in DIMENSIONS if shared.get(key) is not None}
        taken = {key: value for key, value in changed.items() if key not in DIMENSIONS}
        if taken:
            chosen = {"class_path": model["class_path"], "init_args": taken}
            self.config = self.parser.parse_object({subcommand: {"model": chosen}}, self.config)
            listed = ", ".join(f"{key}={value!r}" for key, value in sorted(taken.items()))
            print(f"Settings taken from the checkpoint: {listed}", file=sys.stderr)

    def instantiate_classes(self) -> None:
        """Build data, model and Trainer; what they refuse is a mistake in the command."""
        try:
            super().instantiate_classes()
        except (Exception, LinkFailure) as error:
            cause = cause_for_users(error)
            if isinstance(cause, EXPECTED):
                raise UsageError(str(cause)) from error
            if isinstance(error, LinkFailure):
                raise cause from None
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the CSV logger, the checkpoints and the seed to what the configuration asks for."""
        given = self._get(self.config_init, "trainer")
        section = self.config[self.subcommand]
        quiet = bool(given.get("fast_dev_run"))
        csv = self._csv_logger(section)
        if not quiet:
            self.run_folder = Path(csv.log_dir)
        kwargs["logger"] = [csv, *self._loggers(given, section, csv)]
        callbacks = [*_listed(given.get("callbacks"), Callback)]
        added: list[Callback] = [Stopwatch(), StepSeed(int(section["seed_everything"])), TrimHeap()]
        if given.get("enable_checkpointing") is not False:
            added += self._checkpoints(Path(csv.log_dir), section)
        if given.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            progress = progress_callback()
            added.append(progress)
            kwargs["enable_progress_bar"] = isinstance(progress, ProgressBar)
        kwargs["callbacks"] = added + callbacks
        plugins = _listed(given.get("plugins"), object)
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins) and "deepspeed" not in str(given.strategy):
            # DeepSpeed writes its own folders and refuses a plugin.
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        return super().instantiate_trainer(**kwargs)

    def _csv_logger(self, section: Any) -> RunLogger:
        folder = self._resumed_folder
        if folder is None:
            return RunLogger(self._root(section), name=type(self.model).__name__)
        drop_later_rows(folder / "metrics.csv", self._resumed_step)
        return RunLogger(folder.parent.parent, name=folder.parent.name, version=folder.name)

    def _root(self, section: Any) -> Path:
        return Path(section["trainer"].get("default_root_dir") or RUNS)

    def _loggers(self, given: Any, section: Any, csv: RunLogger) -> list[Logger]:
        loggers = _listed(given.get("logger"), Logger)
        if section["logger"] == "wandb" and not given.get("fast_dev_run"):
            from lightning.pytorch.loggers import WandbLogger

            if not any(isinstance(logger, WandbLogger) for logger in loggers):
                folder = self._resumed_folder
                same = wandb_run_id(folder) if folder is not None else None
                name = f"{csv.name}-{csv.version}"
                loggers.append(WandbLogger(project="zoo", name=name, save_dir=csv.log_dir, id=same))
        return loggers

    def _checkpoints(self, folder: Path, section: Any) -> list[Callback]:
        callbacks: list[Callback] = []
        monitor = getattr(self.model, "monitor", None)
        if monitor is not None:
            callbacks.append(BestCheckpoint(folder, monitor, getattr(self.model, "monitor_mode", "max")))
        if section["save_every_n_steps"]:
            callbacks.append(LastCheckpoint(folder, every_n_train_steps=section["save_every_n_steps"]))
        return [*callbacks, LastCheckpoint(folder)]

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except RuntimeError as error:
            mismatch = weights_mismatch(error)
            if mismatch is None:
                raise
            raise CheckpointError(
                f"{self.config[subcommand]['ckpt_path']}: its weights do not fit this {type(self.model).__name__}: "
                f"{mismatch}. Give the options of the training, or another checkpoint."
            ) from error

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        kwargs["ckpt_path"] = self.config[subcommand]["ckpt_path"]
        if subcommand in ("validate", "test"):
            kwargs["verbose"] = False
            if kwargs["ckpt_path"] is None and not getattr(self.model, "answers_untrained", False):
                warnings.warn(f"{subcommand} without --ckpt_path: the model is as it was initialised", stacklevel=2)
        return kwargs

    def after_run(self) -> None:
        """Show and write the result of `run`."""
        self._report("Test", write=True)

    def after_test(self) -> None:
        """Show and write the result of `test`."""
        self._report("Test", write=True)

    def after_validate(self) -> None:
        """Show the metrics of `validate`."""
        self._report("Validation", write=False)

    def after_fit(self) -> None:
        """Say where the checkpoints are."""
        self._say_where()

    def after_predict(self) -> None:
        """Say where the predictions are."""
        self._say_where()

    def _say_where(self) -> None:
        if self.trainer.is_global_zero and self.run_folder is not None:
            print(f"Results in {self.run_folder}")

    def _report(self, title: str, write: bool) -> None:
        if not self.trainer.is_global_zero:
            return
        metrics = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        if metrics:
            print_metrics(metrics, f"{title}: {type(self.model).__name__}")
        if not write or self.run_folder is None:
            return
        from zoo.common.results import write_result

        best = next((c for c in self.trainer.checkpoint_callbacks if isinstance(c, BestCheckpoint)), None)
        if best is not None and best.monitor is not None and best.best_model_score is not None:
            metrics.setdefault(best.monitor, float(best.best_model_score))
        section = self.config[self.subcommand]
        timer = next(c for c in self.trainer.callbacks if isinstance(c, Stopwatch))  # type: ignore[attr-defined]
        self.run_folder.mkdir(parents=True, exist_ok=True)
        self.result = write_result(
            self.run_folder / "result.json",
            config=yaml.safe_load(self._parser(self.subcommand).dump(section, skip_none=False)),
            seed=int(section["seed_everything"]),
            metrics=metrics,
            seconds={"fit": timer.time_elapsed("train"), "test": timer.time_elapsed("test")},
        )
        self._say_where()


def run_cli(models: Names, data: Names) -> ZooCLI:
    """Run the command in `sys.argv`.

    Args:
        models: Package with the models, and their names.
        data: The same for the data modules.

    Returns:
        The finished CLI, with `model`, `datamodule`, `trainer`, `run_folder` and `result`.

    Raises:
        SystemExit: With status 2 for a mistake in the command, 1 for one that showed while running; the error is one
            paragraph on stderr. With `--debug` the error itself is raised instead.
    """
    if "--debug" in sys.argv:
        sys.argv.remove("--debug")
        os.environ["ZOO_DEBUG"] = "1"
    if sys.argv[1:2] and sys.argv[1].startswith("-"):
        # In place: processes that Lightning starts for `ddp` run sys.argv again.
        sys.argv.insert(1, "run")
    if sys.argv[1] not in SUBCOMMANDS:
        sys.stderr.write(f"error: {sys.argv[1]}: no such subcommand. There are {', '.join(SUBCOMMANDS)}.\n")
        raise SystemExit(2)
    prepare_console([package.__name__ for package, _ in (models, data)])
    try:
        return ZooCLI(models, data)
    except EXPECTED as error:
        if os.environ.get("ZOO_DEBUG"):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        sys.stderr.write(f"error: {text}\n")
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from error


@contextmanager
def command_line(arguments: Sequence[str]) -> Iterator[None]:
    """Stand in for a command typed in a shell, for the time of a `with` block."""
    before = sys.argv
    sys.argv = [before[0] if before else "train.py", *arguments]
    try:
        yield
    finally:
        sys.argv = before


def _class_of(class_path: str) -> type:
    from jsonargparse._util import import_object

    found: type = import_object(class_path)
    return found


def _listed(value: Any, kind: type) -> list[Any]:
    values = value if isinstance(value, list) else [value]
    return [item for item in values if item is not None and isinstance(item, kind) and not isinstance(item, bool)]


def _equal(left: Any, right: Any) -> bool:
    """Whether two hyperparameters are the same value, with `[1, 2]` and `(1, 2)` taken as equal."""
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return list(left) == list(right)
    return bool(left == right)
