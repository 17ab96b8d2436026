"""The methods that every battery runs: a method joins by its line in `METHODS`."""

from __future__ import annotations

from dataclasses import dataclass

COMMON = (
    "--trainer.accelerator", "cpu",
    "--trainer.enable_progress_bar", "false",
    "--trainer.enable_model_summary", "false",
    "--trainer.log_every_n_steps", "1",
)  # fmt: skip


@dataclass(frozen=True)
class Method:
    """How the batteries run a method.

    Attributes:
        name: The model's class name.
        arguments: The command line that runs it, its demo config as a rule.
        small: What shortens that to a few seconds; must keep at least 6 batches of an even size and 2 epochs, and
            reach every phase of the method (warm-ups and refreshes included).
        no_dropout: What takes away the randomness of a forward pass, for the comparison of processes.
        batch_size: Its batch size; two processes take half of it each.
        tables: Name of a text table that a test run logs, if it logs one.
        figures: Name of a figure that a run logs, if it logs one.
    """

    name: str
    arguments: tuple[str, ...]
    small: tuple[str, ...] = ()
    no_dropout: tuple[str, ...] = ()
    batch_size: int = 32
    figures: str | None = None
    tables: str | None = None

    @property
    def command(self) -> tuple[str, ...]:
        """Arguments of a short run."""
        batch = ("--data.batch_size", str(self.batch_size))
        return (*self.arguments, *COMMON, "--trainer.max_epochs", "2", *batch, *self.small)


TOY = Method(
    "ToyModel",
    ("--model", "tests.toy.ToyModel", "--data", "tests.toy.ToyData"),
    no_dropout=("--model.dropout", "0"),
    batch_size=8,
)

METHODS = [
    TOY,
    Method(
        "SASRec",
        ("--model", "SASRec", "--data", "SequenceData"),
        small=("--data.sample_users", "192", "--model.hidden_size", "32"),
        no_dropout=("--model.hidden_dropout", "0", "--model.attn_dropout", "0"),
    ),
    Method(
        "TiCoSeRec",
        ("--model", "TiCoSeRec", "--data", "SequenceData"),
        small=(
            "--data.sample_users",
            "192",
            "--model.hidden_size",
            "32",
            "--model.model_warm_up_epochs",
            "0",
            "--model.augmentation_warm_up_epochs",
            "0",
        ),
        no_dropout=("--model.hidden_dropout", "0", "--model.attn_dropout", "0"),
    ),
]

EMBEDDED: dict[str, tuple[str, ...]] = {"SequenceData": ("--data.source", "embedded")}
"""For each data module, what puts its embedded sample in place of real data in a config."""
